"""robosuite behind the common interface: seeding, drawing, actions, episodes in worker processes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT
from robosuite_args import old_style, standard

pytest.importorskip("robosuite")

from scipy.spatial.transform import Rotation  # noqa: E402

from envs.robomimic.env import CAMERAS, RobosuiteEnv  # noqa: E402
from envs.robomimic.expert import run_episode  # noqa: E402
from envs.shared.workers import open_slots

ALONE = """
import sys, numpy as np
from envs.shared.workers import open_slots
from envs.robomimic.env import RobosuiteEnv
task, state, output = sys.argv[1:]
env = RobosuiteEnv(task=task, actions="recorded")
env.reset_to(np.load(state))
np.savez(output, **{camera: env.image(camera) for camera in env.cameras}, xml=env.model_xml)
env.close()
"""


@pytest.fixture(scope="module")
def make():
    """Environments that are closed at the end."""
    made = []

    def build(*args, **options):
        made.append(RobosuiteEnv(*args, **options))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.fixture(scope="module")
def lift(make):
    return make(task="Lift", actions="recorded")


@pytest.fixture(scope="module")
def can(make, lift):
    return make(task="PickPlaceCan", actions="recorded")


@pytest.fixture(scope="module")
def absolute(make):
    return make(env_args=standard() | {"reflections": False}, task="Lift", max_steps=60)


@pytest.fixture(scope="module")
def episode(lift):
    """One episode of the expert, of seed 3, with the goals (L, 10) that the controller had: world frame."""
    goals, step = [], lift.robosuite.step

    def noting(action):
        result = step(action)
        controller = lift.robosuite.robots[0].part_controllers["right"]
        assert controller.input_ref_frame == "base"
        position = controller.origin_pos + controller.origin_ori @ controller.goal_pos
        rotation = controller.origin_ori @ controller.goal_ori
        goals.append(np.concatenate([position, rotation[0], rotation[1], action[-1:]]))
        return result

    lift.robosuite.step = noting
    try:
        found = run_episode(lift, 3)
    finally:
        del lift.robosuite.step
    return found | {"goals": np.stack(goals)}


def picture(env, state):
    env.reset_to(state)
    return {camera: env.image(camera) for camera in CAMERAS}


# Seeds ------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_state_whatever_ran_before(lift, absolute, can):
    states = []
    for env in (lift, absolute):
        for history in ((), (1, 2)):
            for seed in history:
                env.reset(seed)
                env.step(np.zeros(7) if env is lift else np.array([0, 0, 1, 1, 0, 0, 0, -1, 0, 1.0]))
            env.reset(100000)
            states.append(env.state)
    assert all(np.array_equal(state, states[0]) for state in states)
    lift.reset(100001)
    assert np.abs(lift.state - states[0])[1:].max() > 0.01
    can.reset(7)
    first = can.state
    can.reset(8)
    assert not np.array_equal(can.state, first)
    can.reset(7)
    assert np.array_equal(can.state, first)


def test_reset_to_restores_a_state(can):
    can.reset(1)
    state, expected = can.state, can.low_dim()
    for _ in range(5):
        can.step(np.full(7, 0.5))
    moved = can.low_dim()
    assert np.abs(moved["robot0_eef_pos"] - expected["robot0_eef_pos"]).max() > 0.01
    can.reset_to(state)
    found = can.low_dim()
    for key in expected:
        if "acc" not in key:
            np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-9, err_msg=key)
    # the relative pose is of this state, not of the one before
    hand = Rotation.from_quat(found["robot0_eef_quat"]).as_matrix()
    relative = hand.T @ (found["Can_pos"] - found["robot0_eef_pos"])
    np.testing.assert_allclose(found["Can_to_robot0_eef_pos"], relative, atol=1e-6)
    assert found["object"].shape == (14,)


# Pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(lift, can, tmp_path_factory):
    """{task: (state, pictures and XML drawn by a process with nothing else in it, its output)}."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    for env in (lift, can):
        env.reset(5)
        task = env.env_args["env_name"]
        np.save(folder / "state.npy", env.state)
        command = [sys.executable, "-c", ALONE, task, folder / "state.npy", folder / f"{task}.npz"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found[task] = env.state, dict(np.load(folder / f"{task}.npz")), result.stdout + result.stderr
    return found


def test_two_environments_draw_their_own_pictures(lift, can, alone):
    """Also: no marks of robosuite's sites are seen before the first reset, as the other process did none."""
    (lift_state, lift_alone, _), (can_state, can_alone, _) = alone["Lift"], alone["PickPlaceCan"]
    for _ in range(2):
        for camera in CAMERAS:
            lift.reset_to(lift_state)
            can.reset_to(can_state)
            np.testing.assert_array_equal(lift.image(camera), lift_alone[camera])
            np.testing.assert_array_equal(can.image(camera), can_alone[camera])
    assert lift_alone["agentview"].shape == (84, 84, 3)
    assert lift.model_xml == str(lift_alone["xml"]) and can.model_xml == str(can_alone["xml"])
    assert str(ROOT.anchor) + "root" not in lift.model_xml and 'file="robosuite/models/' in lift.model_xml


def test_closing_an_environment_leaves_the_others_their_pictures(lift, can, alone):
    state, expected, _ = alone["PickPlaceCan"]
    other = RobosuiteEnv(task="Lift", actions="recorded", image_size=32)
    other.reset(0)
    assert other.frame(64).shape == (64, 64, 3)
    picture(can, state)
    other.close()
    other.close()
    np.testing.assert_array_equal(picture(can, state)["agentview"], expected["agentview"])


def test_reflections_change_the_picture(lift, absolute, alone):
    state, expected, _ = alone["Lift"]
    assert lift.reflections is True and absolute.reflections is False
    plain = picture(absolute, state)["agentview"]
    difference = np.abs(plain.astype(int) - expected["agentview"])
    assert 0 < difference.max() < 40 and difference.mean() < 2


def test_observations(lift):
    lift.reset(0)
    obs = lift.observe()
    assert obs["agentview_image"].shape == (3, 84, 84) and obs["agentview_image"].dtype == np.uint8
    np.testing.assert_array_equal(obs["agentview_image"].transpose(1, 2, 0), lift.image("agentview"))
    assert obs["object"].shape == (10,) and obs["object"].dtype == np.float32
    image = obs["agentview_image"].astype(int)
    cube = (image[0] > 90) & (image[0] > 2 * image[1])  # the red cube lies below the middle: the right way up
    assert cube.sum() > 5 and np.argwhere(cube)[:, 0].mean() > 42
    assert lift.frame(48).shape == (48, 48, 3)


def test_load_model_changes_the_model_only(lift, alone):
    state, expected, _ = alone["Lift"]
    xml = lift.model_xml
    lift.load_model(xml)
    difference = np.abs(picture(lift, state)["agentview"].astype(int) - expected["agentview"])
    assert difference.mean() < 0.05
    geom = next(line for line in xml.splitlines() if 'name="cube_g0_vis"' in line)
    size = geom.split('size="')[1].split('"')[0]
    larger = " ".join(str(2 * float(value)) for value in size.split())
    try:
        lift.load_model(xml.replace(geom, geom.replace(f'size="{size}"', f'size="{larger}"')))
        assert np.abs(picture(lift, state)["agentview"].astype(int) - expected["agentview"]).mean() > 0.2
        np.testing.assert_array_equal(lift.state, state)
        assert lift.low_dim()["object"].shape == (10,)
    finally:
        lift.load_model(xml)
    assert np.abs(picture(lift, state)["agentview"].astype(int) - expected["agentview"]).mean() < 0.05
    lift.reset(5)
    np.testing.assert_allclose(lift.state, state, rtol=0, atol=1e-9)


# Actions ----------------------------------------------------------------------------------------------------------


def test_an_absolute_action_reaches_its_pose(absolute):
    absolute.reset(0)
    start = absolute.low_dim()
    rotation = Rotation.from_rotvec([0.15, -0.1, 0.5]) * Rotation.from_quat(start["robot0_eef_quat_site"])
    position = start["robot0_eef_pos"] + [0.06, 0.08, 0.05]
    first, second = rotation.as_matrix()[:2]
    # lengths and angle of the rows do not matter
    action = np.concatenate([position, 1.3 * first, 0.8 * second + 0.2 * first, [-1]])
    for _ in range(30):
        reward, done, info = absolute.step(action)
        assert (reward, done, info) == (0.0, False, {"success": False})
    end = absolute.low_dim()
    assert np.abs(end["robot0_eef_pos"] - position).max() < 0.01
    error = (Rotation.from_quat(end["robot0_eef_quat_site"]) * rotation.inv()).magnitude()
    assert np.degrees(error) < 3
    for _ in range(30):
        done = absolute.step(action)[1]
    assert done  # max_steps


def test_goals_of_the_delta_controller_lift_the_cube_as_absolute_actions(absolute, episode):
    assert episode["success"]
    absolute.reset_to(episode["states"][0])
    for goal in episode["goals"]:
        reward, done, info = absolute.step(goal)
    assert reward == 1.0 and done and info["success"]


def test_old_and_new_metadata_move_alike(make, episode):
    env = make(env_args=old_style(), actions="recorded")
    assert not env.robosuite.lite_physics
    env.reset_to(episode["states"][0])
    hands = []
    for action in episode["actions"]:
        hands.append(env.low_dim()["robot0_eef_pos"])
        success = env.step(action)[2]["success"]
    assert success
    assert np.abs(np.stack(hands) - episode["low_dim"]["robot0_eef_pos"]).max() < 0.015


def test_bad_arguments(lift, absolute):
    for env, action in ((lift, np.zeros(10)), (absolute, np.zeros(7)), (lift, np.full(7, np.nan))):
        with pytest.raises(ValueError, match="action"):
            env.step(action)
    for state in (np.zeros(31), np.full(32, np.inf), np.zeros((2, 32))):
        with pytest.raises(ValueError, match="state"):
            lift.reset_to(state)
    with pytest.raises(ValueError, match="cameras"):
        RobosuiteEnv(task="Lift", cameras=("nowhere",))
    for options in ({}, {"task": "Lift", "env_args": standard("PickPlaceCan")}):
        with pytest.raises(ValueError, match="task, env_args"):
            RobosuiteEnv(**options)
    with pytest.raises(ValueError, match="max_steps"):
        RobosuiteEnv(task="Lift", max_steps=0)


def test_a_model_that_cannot_be_built(absolute):
    with pytest.raises(ValueError, match="model_file"):
        absolute.load_model("not xml")  # the last test of this environment


def test_it_is_quiet_but_for_the_renderer(alone):
    for _, _, output in alone.values():
        assert output.startswith("rendering without a display: ") and output.count("\n") == 1, output


# In worker processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_episodes_in_workers_depend_on_their_seed_alone(capfd):
    """Bit for bit those of one environment in this process, in any slot, and after a worker died in the middle."""
    env = {"name": "robosuite", "task": "Lift", "actions": "recorded", "cameras": ["agentview"], "image_size": 24}
    options = {"obs_steps": 2, "keys": ["agentview_image", "robot0_eef_pos", "object"]}
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    seeds = (5, 6)
    with open_slots(env, slots=1, **options) as slots:
        expected = {}
        for seed in seeds:
            slots.run({0: ("reset", seed, False)})
            expected[seed] = slots.run({0: ("execute", actions)})[0].observation
    assert not np.array_equal(expected[5]["object"], expected[6]["object"])

    def equal(reports):
        """Slot 0 has seed 6, slot 1 seed 5: the other way round."""
        pairs = ((reports[0], expected[6]), (reports[1], expected[5]))
        return all(np.array_equal(report.observation[key], obs[key]) for report, obs in pairs for key in obs)

    resets = {0: ("reset", 6, False), 1: ("reset", 5, False)}
    execute = {slot: ("execute", actions) for slot in resets}
    with open_slots(env, slots=2, workers=2, **options) as slots:
        slots.run(resets)
        assert equal(slots.run(execute))
        slots.run(resets)
        slots.workers[0].process.kill()
        reports = slots.run(execute)
        assert reports[0] is None and reports[1] is not None
        slots.run({0: resets[0]})
        assert equal({0: slots.run({0: execute[0]})[0], 1: reports[1]})
    assert "worker 0 died (SIGKILL)" in capfd.readouterr().err
