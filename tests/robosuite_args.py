"""The env_args that robomimic's files of old and new robosuites hold."""

from envs.robomimic.env import CAMERAS
from envs.robomimic.metadata import OSC_POSE, standard_env_args


def standard(task="Lift"):
    return standard_env_args(task, version="1.5.2", cameras=CAMERAS, image_size=84)


def old_style(task="Lift", *, version="1.4.1", delta=True, **changes):
    """env_args as in the official files of robosuite 1.2 (offline_study) and 1.4."""
    ours = ("input_type", "input_ref_frame", "gripper")
    controller = {key: value for key, value in OSC_POSE.items() if key not in ours}
    controller |= {"control_delta": delta, "kp": 150, "damping": 1} | changes
    kwargs = standard(task)["env_kwargs"] | {"controller_configs": controller, "render_gpu_device_id": 0}
    del kwargs["lite_physics"]
    return {"env_name": task, "env_version": version, "type": 1, "env_kwargs": kwargs}
