"""env_args of robomimic data sets, of any generation, to the arguments of the installed robosuite.

A data set says how its environment was made: {"env_name", "env_version", "type", "env_kwargs"}. Files of robosuite
1.4 and before describe one OSC_POSE controller, those of 1.5 a composite one. Facts behind the translation:
robosuite 1.5 has no ``control_delta`` (it is silently ignored), reads absolute goals only with ``input_type:
absolute``, and only ``input_ref_frame: world`` makes them the world's coordinates that robomimic files hold.
"""

import copy
import re

from envs.shared.checks import check_choice

ROBOSUITE_TYPE = 1  # robomimic's EnvType.ROBOSUITE_TYPE
OLDEST, NEWEST = (1, 0), (1, 5)  # versions whose env_args are understood
ACTIONS = ("absolute", "recorded")
# What this program decides, whatever the recording did: no window, images only when asked for, no end of its own.
OURS = {
    "has_renderer": False,
    "use_camera_obs": False,
    "ignore_done": True,
    "hard_reset": False,
    "reward_shaping": False,
}
OSC_POSE = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "input_type": "delta",
    "input_ref_frame": "base",
    "interpolation": None,
    "ramp_ratio": 0.2,
    "gripper": {"type": "GRIP"},
}


def standard_env_args(task, *, version, cameras, image_size):
    """The env_args of ``task`` as robomimic's files for robosuite 1.5 have them: one Panda, delta OSC_POSE, 20 Hz."""
    return {
        "env_name": task,
        "env_version": version,
        "type": ROBOSUITE_TYPE,
        "env_kwargs": {
            "robots": ["Panda"],
            "controller_configs": {"type": "BASIC", "body_parts": {"right": copy.deepcopy(OSC_POSE)}},
            "control_freq": 20,
            "lite_physics": True,
            "use_object_obs": True,
            "has_renderer": False,
            "has_offscreen_renderer": True,
            "use_camera_obs": True,
            "camera_names": list(cameras),
            "camera_heights": image_size,
            "camera_widths": image_size,
            "camera_depths": False,
            "ignore_done": True,
            "reward_shaping": False,
        },
    }


def check_env_args(env_args, tasks):
    """Raise ValueError, which says what and why, for env_args of no known simulator, version or task."""
    missing = [key for key in ("env_name", "type", "env_kwargs") if key not in env_args]
    if missing:
        raise ValueError(
            f"env_args: got {sorted(env_args)}, allowed: env_name, type and env_kwargs ({missing} missing)"
        )
    kwargs = env_args["env_kwargs"]
    if not isinstance(kwargs, dict) or not kwargs.get("robots") or not kwargs.get("controller_configs"):
        known = sorted(kwargs) if isinstance(kwargs, dict) else kwargs
        raise ValueError(f"env_args env_kwargs: got {known}, allowed: options with robots and controller_configs")
    configs = kwargs["controller_configs"]
    for config in configs if isinstance(configs, list) else [configs]:
        if not isinstance(config, dict) or not isinstance(config.get("body_parts", {}), dict):
            raise ValueError(f"env_args controller_configs: got {config}, allowed: a description of a controller")
    if env_args["type"] != ROBOSUITE_TYPE:
        raise ValueError(f"env_args type: got {env_args['type']!r}, allowed: {ROBOSUITE_TYPE} (robosuite)")
    version = env_args.get("env_version")
    if version is not None:
        number = re.match(r"(\d+)\.(\d+)", str(version))
        if number is None or not OLDEST <= tuple(map(int, number.groups())) <= NEWEST:
            oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
            raise ValueError(
                f"env_version: got {version!r}, allowed: {oldest} to {newest}, whose controllers are known here"
            )
    check_choice("env_name", env_args["env_name"], sorted(tasks))


def same_model(env_args, installed):
    """Whether a model recorded with ``env_args`` loads in the ``installed`` version: assets and names moved at 1.5."""
    recorded = str(env_args.get("env_version") or "0")
    return recorded.split(".")[:2] == installed.split(".")[:2]


def make_arguments(env_args, *, actions):
    """Arguments of robosuite.make for ``env_args``, with ``actions`` "absolute" (world frame) or as "recorded".

    Raises ValueError for another controller than OSC_POSE where it would have to be translated.
    """
    check_choice("task.env.actions", actions, ACTIONS)
    kwargs = copy.deepcopy(env_args["env_kwargs"])
    for key in [key for key in kwargs if key.startswith("camera_") or key.startswith("render_")]:
        del kwargs[key]
    config = kwargs["controller_configs"]
    robots = kwargs["robots"]
    per_robot = config if isinstance(config, list) else [config] * (len(robots) if isinstance(robots, list) else 1)
    composites = [_composite(part) for part in per_robot]
    if "body_parts" not in per_robot[0]:
        kwargs["lite_physics"] = False  # the default of 1.5, which steps differently, did not exist
    if actions == "absolute":
        for arm in (arm for composite in composites for arm in _arms(composite)):
            _check_osc(arm)
            arm |= {"input_type": "absolute", "input_ref_frame": "world"}
    kwargs["controller_configs"] = composites if isinstance(config, list) else composites[0]
    return kwargs | OURS


def _composite(config):
    """A 1.5 controller configuration; an older one of a single arm is wrapped."""
    if "body_parts" in config:
        return config
    _check_osc(config)
    arm = {key: value for key, value in config.items() if key != "control_delta"}
    arm |= {
        "input_type": "delta" if config.get("control_delta", True) else "absolute",
        "input_ref_frame": "world",
        "gripper": {"type": "GRIP"},
    }
    return {"type": "BASIC", "body_parts": {"right": arm}}


def _arms(composite):
    """Configurations of the arms; robosuite's own files nest them once more under "arms"."""
    parts = composite["body_parts"]
    parts = parts.get("arms", parts)
    return [part for name, part in parts.items() if name in ("right", "left")]


def _check_osc(config):
    if config.get("type") != "OSC_POSE":
        raise ValueError(f"controller: got {config.get('type')!r}, allowed: OSC_POSE")
