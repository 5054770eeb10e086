"""env_args of every generation of robosuite, and what is refused."""

import json

import pytest
from robosuite_args import old_style, standard

pytest.importorskip("robosuite")

from envs.robomimic.env import RobosuiteEnv  # noqa: E402
from envs.robomimic.metadata import OSC_POSE, make_arguments, same_model  # noqa: E402


@pytest.mark.parametrize(
    "env_args, actions, kind, frame, lite",
    [
        (old_style(version="1.2.0"), "recorded", "delta", "world", False),
        (old_style(version="1.4.1"), "recorded", "delta", "world", False),
        (old_style(delta=False), "recorded", "absolute", "world", False),
        (old_style(), "absolute", "absolute", "world", False),
        (old_style(delta=False), "absolute", "absolute", "world", False),
        (standard(), "recorded", "delta", "base", True),
        (standard(), "absolute", "absolute", "world", True),
    ],
)
def test_translation_of_the_controller(env_args, actions, kind, frame, lite):
    before = json.dumps(env_args)
    arguments = make_arguments(env_args, actions=actions)
    assert json.dumps(env_args) == before
    arm = arguments["controller_configs"]["body_parts"]["right"]
    assert arguments["controller_configs"]["type"] == "BASIC" and arm["gripper"] == {"type": "GRIP"}
    assert (arm["type"], arm["input_type"], arm["input_ref_frame"]) == ("OSC_POSE", kind, frame)
    assert "control_delta" not in arm and arm["output_max"] == OSC_POSE["output_max"]
    assert arguments["lite_physics"] is lite and not arguments["use_camera_obs"] and not arguments["has_renderer"]
    assert not any(key.startswith(("camera_", "render_")) for key in arguments)


def test_models_of_other_versions_are_told_apart():
    for recorded, same in (("1.5.0", True), ("1.5.2", True), ("1.4.1", False), (None, False), ("1.50.0", False)):
        assert same_model({"env_version": recorded}, "1.5.2") is same


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_args, words",
    [
        (standard() | {"env_version": "2.0.1"}, "env_version"),
        (standard() | {"env_version": "new"}, "env_version"),
        (standard() | {"type": 2}, "env_args type"),
        (standard("Lifting"), "env_name"),
        ({"env_name": "Lift", "type": 1}, "env_kwargs.* missing"),
        (old_style(type="JOINT_POSITION"), "controller"),
    ],
)
def test_env_args_that_are_not_understood(env_args, words):
    with pytest.raises(ValueError, match=words):
        RobosuiteEnv(env_args=env_args)
    for key in ("robots", "controller_configs"):
        env_args = standard()
        del env_args["env_kwargs"][key]
        with pytest.raises(ValueError, match="env_args env_kwargs"):
            RobosuiteEnv(env_args=env_args)


def test_joint_controllers_take_no_absolute_poses():
    env_args = standard()
    env_args["env_kwargs"]["controller_configs"]["body_parts"]["right"]["type"] = "JOINT_POSITION"
    with pytest.raises(ValueError, match="controller"):
        make_arguments(env_args, actions="absolute")
    arguments = make_arguments(env_args, actions="recorded")
    assert arguments["controller_configs"]["body_parts"]["right"]["type"] == "JOINT_POSITION"
    with pytest.raises(ValueError, match="task.env.actions"):
        make_arguments(standard(), actions="relative")
