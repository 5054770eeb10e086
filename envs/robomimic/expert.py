"""Scripted experts for robosuite's Lift and PickPlaceCan: phases over privileged state, delta OSC_POSE actions.

Every episode draws its own speed, gain, heights and offsets, and every action is disturbed, so that a policy sees how
to come back; recovery episodes are recorded from a state that the expert was pushed into.
"""

import numpy as np

from envs.robomimic.backend import rotation_matrix
from envs.shared.checks import check_choice

POSITION_UNIT, ROTATION_UNIT = 0.05, 0.5  # m and rad of a full action, OSC_POSE's output range
OPEN, CLOSED = -1.0, 1.0
TASKS = {"lift": "Lift", "can": "PickPlaceCan"}  # robomimic's names: robosuite's
NOISE = 0.05  # standard deviation of every position action; rotation and grasping have 0.3 of it
SETTLED = 5  # steps that success must hold before an episode ends
DOWN = np.array([0.0, 0.0, -1.0])
LIMITS = {"Lift": 200, "PickPlaceCan": 300}  # steps after which an episode counts as failed
PUSHED_BEFORE = {"Lift": 36, "PickPlaceCan": 90}  # steps; an undisturbed episode takes about 44 and 128


class Expert:
    """Chooses actions (7,) for one episode from the low-dimensional observations of ``RobosuiteEnv``.

    task: "Lift" or "PickPlaceCan"; target: place (3,) in m that the can belongs to, None for Lift.
    """

    def __init__(self, task, rng, target=None):
        check_choice("expert task", task, LIMITS)
        self.can, self.rng = task == "PickPlaceCan", rng
        self.thing = "Can" if self.can else "cube"
        self.gain = rng.uniform(0.85, 1.15) / POSITION_UNIT  # actions per m
        self.speed = rng.uniform(0.85, 1.0)
        self.hover = rng.uniform(0.07, 0.11)
        self.detour = np.append(rng.uniform(-0.03, 0.03, 2), 0)
        self.yaw_offset = rng.uniform(-0.06, 0.06)
        self.lift = rng.uniform(0.13, 0.17) if self.can else rng.uniform(0.10, 0.15)
        self.target = None if target is None else np.append(target[:2] + rng.uniform(-0.02, 0.02, 2), target[2])
        self.enter("hover")
        self.detour_steps = 12

    def enter(self, phase):
        """Go on with ``phase``."""
        self.phase, self.steps = phase, 0
        if phase == "hover":
            self.detour_steps = 0
            self.offset = self.rng.uniform(-0.004, 0.004, 3) * [1, 1, 0.5] + [0, 0, 0.01 * self.can]

    def resume(self, low_dim):
        """Go on after a push: with what is still in the hand, else from above."""
        hand, thing = low_dim["robot0_eef_pos"], low_dim[f"{self.thing}_pos"]
        if self.phase not in ("grasp", "raise", "carry", "lower") or np.linalg.norm(hand - thing) > 0.04:
            self.enter("hover")
        else:
            self.lift_to = np.append(hand[:2], self.grasp_at[2] + self.lift)
            self.enter("raise")

    def act(self, low_dim):
        """The next action: position and rotation deltas in [-1, 1], then the gripper."""
        hand, thing = low_dim["robot0_eef_pos"], low_dim[f"{self.thing}_pos"]
        yaw = self._yaw_error(low_dim)
        goal, gripper = getattr(self, f"_{self.phase}")(hand, thing, abs(yaw))
        self.steps += 1
        still = self.phase in ("grasp", "release")
        noise = self.rng.normal(0, NOISE * (0.3 if still else 1.0), 3)
        position = np.clip(self.gain * (goal - hand), -self.speed, self.speed) + noise
        rotation = self._rotation(low_dim, yaw) + self.rng.normal(0, NOISE * 0.3, 3)
        return np.clip(np.concatenate([position, rotation, [gripper]]), -1, 1)

    # Phases: where the gripper should go, and what its fingers do ----------------------------------------------

    def _hover(self, hand, thing, yaw):
        goal = thing + [0, 0, self.hover]
        if self.steps < self.detour_steps:
            return goal + self.detour, OPEN
        away = goal - hand
        if np.hypot(*away[:2]) < 0.012 and abs(away[2]) < 0.02 and yaw < 0.12:
            self.enter("descend")
        return goal, OPEN

    def _descend(self, hand, thing, yaw):
        goal = thing + self.offset
        if self.lies:  # it is rounder there, and slips out of a grip above its middle
            goal[2] -= 0.015
        goal[2] = max(goal[2], 0.812)  # the table of Lift stands at 0.8 m
        away = goal - hand
        if (np.hypot(*away[:2]) < 0.01 and abs(away[2]) < 0.008) or self.steps >= 40:
            self.grasp_at = hand.copy()
            self.enter("grasp")
        elif np.hypot(*away[:2]) > 0.03 and away[2] < -0.02:  # pushed aside: from above again
            self.enter("hover")
        return goal, OPEN

    def _grasp(self, hand, thing, yaw):
        if self.steps >= 10:
            self.lift_to = self.grasp_at + [0, 0, self.lift]
            self.enter("raise")
        return self.grasp_at, CLOSED

    def _raise(self, hand, thing, yaw):
        if np.linalg.norm(hand - thing) > 0.06:  # it stayed behind or fell
            self.enter("hover")
        elif self.can and hand[2] > self.lift_to[2] - 0.03:
            self.enter("carry")
        return self.lift_to + [0, 0, 0.02], CLOSED

    def _carry(self, hand, thing, yaw):
        goal = np.append(self.target[:2], self.lift_to[2])
        if hand[2] - thing[2] > 0.08:
            self.enter("hover")
        elif np.hypot(*(goal - hand)[:2]) < 0.025 or self.steps >= 60:
            self.enter("lower")
        return goal, CLOSED

    def _lower(self, hand, thing, yaw):
        goal = np.append(self.target[:2], self.grasp_at[2] + 0.05)
        if abs(hand[2] - goal[2]) < 0.015 or self.steps >= 30:
            self.release_at = hand.copy()
            self.enter("release")
        return goal, CLOSED

    def _release(self, hand, thing, yaw):
        if self.steps >= 5:
            self.enter("retreat")
        return self.release_at, OPEN

    def _retreat(self, hand, thing, yaw):
        if self.steps >= 40:  # it lies in the wrong place
            self.enter("hover")
        return self.release_at + [0, 0, 0.15], OPEN

    # Rotation ---------------------------------------------------------------------------------------------------

    def _yaw_error(self, low_dim):
        """Angle (rad) about the vertical from the finger axis to where it should be, 0 for a can that stands.

        That is the nearest side of the cube, or across a can that lies: its length just fits between the fingers.
        """
        turn = np.pi if self.can else np.pi / 2  # symmetry
        thing = rotation_matrix(low_dim[f"{self.thing}_quat"])
        side = np.cross([0, 0, 1], thing[:, 2]) if self.can else thing[:, 0]
        self.lies = self.can and np.hypot(*side[:2]) > 0.5
        if self.can and not self.lies:
            return 0.0
        fingers = rotation_matrix(low_dim["robot0_eef_quat"])[:, 1]
        angle = np.arctan2(side[1], side[0]) - np.arctan2(fingers[1], fingers[0]) + self.yaw_offset
        return (angle + turn / 2) % turn - turn / 2

    def _rotation(self, low_dim, yaw):
        """Rotation action (3,) towards a gripper that points straight down, turned by ``yaw``."""
        axis = rotation_matrix(low_dim["robot0_eef_quat"])[:, 2]
        error = np.cross(axis, DOWN) + np.array([0, 0, yaw])
        return np.clip(error / ROTATION_UNIT, -0.5, 0.5)


def make_expert(env, rng):
    """An expert for the task of ``env`` (RobosuiteEnv), which also tells it where the can belongs."""
    task = env.env_args["env_name"]
    simulation = env.robosuite
    target = simulation.target_bin_placements[simulation.object_id] if task == "PickPlaceCan" else None
    return Expert(task, rng, target)


def run_episode(env, seed, *, recovery=False):
    """One episode of the expert in ``env``, whose actions are "recorded" and that draws nothing.

    recovery: the expert first works for a random while, is pushed away for a few steps, and only then recorded.
    Returns {"states" (L, S), "actions" (L, 7), "rewards" (L,), "low_dim": {key: (L, D)}, "success": bool}, L steps.
    """
    task = env.env_args["env_name"]
    rng = np.random.default_rng([seed, 1])
    env.reset(seed)
    expert = make_expert(env, rng)
    if recovery:
        _push(env, expert, rng, steps=rng.integers(PUSHED_BEFORE[task]))
    states, actions, rewards, observed = [], [], [], []
    held = 0
    while len(actions) < LIMITS[task] and held < SETTLED:
        low_dim = env.low_dim()
        action = expert.act(low_dim)
        states.append(env.state)
        observed.append(low_dim)
        actions.append(action)
        rewards.append(env.step(action)[0])
        held = held + 1 if rewards[-1] else 0
    return {
        "states": np.stack(states),
        "actions": np.stack(actions),
        "rewards": np.array(rewards),
        "low_dim": {key: np.stack([o[key] for o in observed]) for key in observed[0]},
        "success": held == SETTLED,
    }


def _push(env, expert, rng, *, steps):
    """Let the expert work for ``steps``, then move it away for up to ten; half of the time it drops what it holds.

    A can is dropped inside its bin only: elsewhere it would fall to where the arm cannot reach. A cube that the push
    left lifted is dropped as well, as nothing would be left to do.
    """
    for _ in range(steps):
        action = expert.act(env.low_dim())
        if env.step(action)[0]:  # done before the push came
            break
    direction = np.append(rng.uniform(-1, 1, 2), rng.uniform(-0.3, 1))
    turn = rng.uniform(-0.4, 0.4, 3)
    keep = rng.random() < 0.5 or (expert.can and expert.phase not in ("grasp", "raise"))
    gripper = action[-1] if steps and keep else OPEN
    for _ in range(rng.integers(3, 11)):
        env.step(np.concatenate([direction, turn, [gripper]]))
    for _ in range(10 * env.success):
        env.step(np.concatenate([np.zeros(6), [OPEN]]))
    expert.resume(env.low_dim())
