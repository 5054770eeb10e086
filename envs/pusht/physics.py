"""Exact Push-T physics through pymunk's own C functions, and the real environment to check it.

A full state is (12,) float64: agent x, y (px), agent vx, vy (px/s), block x, y (px), angle (rad), block vx,
vy (px/s), angular velocity (rad/s), last target x, y (px). A short state is (5,): agent x, y, block x, y,
angle, at rest.

Chipmunk's position correction velocity and cached contacts are not readable and so not part of a state: a
rollout restored in the middle of an episode can end elsewhere than the unbroken one. Measured on 150
episodes: not at all in three of four, over 0.01 px in one of a hundred, 0.35 px at most.
"""

import numpy as np

from envs.pusht.env import push_t_environment
from envs.pusht.geometry import AGENT_RADIUS, SUBSTEP_SECONDS, SUBSTEPS, agent_motion

WALLS = (((5, 506), (5, 5)), ((5, 5), (506, 5)), ((506, 5), (506, 506)), ((5, 506), (506, 506)))
APART = (50.0, 50.0, 350.0, 350.0)  # agent and block positions (px) that do not touch


def make_environment():
    """A gym-pusht environment (state observation) whose agent and block have not touched yet."""
    environment = push_t_environment()(obs_type="state")
    # reset runs one substep. From the environment's own default the agent is inside the block, and the
    # correction velocity of that contact would move the block later; so start them far apart.
    environment.reset(options={"reset_to_state": [*APART, 0.0]})
    return environment


def environment_at(state):
    """A fresh gym-pusht environment at rest in a short state (5,), exactly (unlike `reset_to_state`)."""
    environment = make_environment()
    agent_x, agent_y, block_x, block_y, angle = (float(value) for value in state)
    environment.agent.position = (agent_x, agent_y)
    environment.block.angle = angle  # before the position: it turns about the centre of mass, not the origin
    environment.block.position = (block_x, block_y)
    environment.space.reindex_shapes_for_body(environment.agent)
    environment.space.reindex_shapes_for_body(environment.block)
    return environment


def reset_state(raw):
    """The short state (5,) float32 that gym-pusht's `reset_to_state` makes of raw values (5,)."""
    observation, _ = make_environment().reset(options={"reset_to_state": [float(value) for value in raw]})
    return observation.astype(np.float32)


def full_state(environment, last_target):
    """Full state (12,) of a gym-pusht environment; last_target: (2,) px, the latest action."""
    agent, block = environment.agent, environment.block
    return np.array(
        [
            *agent.position,
            *agent.velocity,
            *block.position,
            block.angle,
            *block.velocity,
            block.angular_velocity,
            *last_target,
        ]
    )


class PushTSimulator:
    """One bare Chipmunk space with the bodies of gym-pusht, stepped without pymunk's Python objects.

    Makes the same numbers whatever it ran before. Targets are at most max_steps control steps long.
    """

    def __init__(self, max_steps):
        import pymunk
        from pymunk._chipmunk_cffi import ffi, lib

        self._lib = lib
        # A space of our own without the environment's collision callback, which triples the cost of a step.
        # Python objects are kept only because they own the C objects.
        environment = make_environment()
        self._owner = pymunk.Space()
        self._owner.damping = 0.0
        self._owner.add(*(environment.add_segment(self._owner, a, b, 2) for a, b in WALLS))
        agent = environment.add_circle(self._owner, (256, 400), AGENT_RADIUS)
        block, block_shapes = environment.add_tee(self._owner, (256, 300), 0)
        self._space, self._agent, self._block = self._owner._space, agent._body, block._body
        self._shapes = [shape._shape for shape in (*agent.shapes, *block_shapes)]
        self._first_shape = len(WALLS)

        self.positions = np.empty((max_steps * SUBSTEPS + 1, 2))
        self._vectors = ffi.new("cpVect[]", max_steps * SUBSTEPS)
        self.velocities = np.frombuffer(ffi.buffer(self._vectors)).reshape(-1, 2)  # the same memory

    def restore(self, state):
        """Puts agent and block into a full state (12,) with no contacts.

        Chipmunk solves simultaneous contacts in the order in which its search tree finds them, and that
        depends on shape numbers and on how the tree was filled. So this does what `environment_at` does, in
        the same order; then both make the same numbers, bit for bit. Without it 16 of 300 checks of 60 random
        targets differed, by up to tens of px.
        """
        lib, space = self._lib, self._space
        for shape in self._shapes:
            lib.cpSpaceRemoveShape(space, shape)
        lib.cpSpaceSetShapeIDCounter(space, self._first_shape)
        self._place((*APART[:2], 0.0, 0.0, *APART[2:], 0.0, 0.0, 0.0, 0.0))
        for shape in self._shapes:
            lib.cpSpaceAddShape(space, shape)
        lib.cpSpaceStep(space, SUBSTEP_SECONDS)  # also uses up the last contact's correction velocity
        self._place(state[:10].tolist())
        lib.cpSpaceReindexShapesForBody(space, self._agent)
        lib.cpSpaceReindexShapesForBody(space, self._block)

    def _place(self, values):
        agent_x, agent_y, agent_vx, agent_vy, x, y, angle, vx, vy, spin = values
        lib = self._lib
        lib.cpBodySetPosition(self._agent, (agent_x, agent_y))
        lib.cpBodySetVelocity(self._agent, (agent_vx, agent_vy))
        lib.cpBodySetAngle(self._block, angle)
        lib.cpBodySetPosition(self._block, (x, y))
        lib.cpBodySetVelocity(self._block, (vx, vy))
        lib.cpBodySetAngularVelocity(self._block, spin)

    def load_targets(self, targets, state):
        """Precomputes the agent's motion towards targets (n, 2) px from a full state; n <= max_steps."""
        agent_motion(targets, state, self.positions, self.velocities)

    def advance(self, step):
        """Runs control step `step` of the loaded targets; returns the block's x, y (px) and angle (rad)."""
        set_velocity, run_substep = self._lib.cpBodySetVelocity, self._lib.cpSpaceStep
        agent, space, vectors = self._agent, self._space, self._vectors
        for i in range(step * SUBSTEPS, (step + 1) * SUBSTEPS):
            set_velocity(agent, vectors[i])
            run_substep(space, SUBSTEP_SECONDS)
        position = self._lib.cpBodyGetPosition(self._block)
        return position.x, position.y, self._lib.cpBodyGetAngle(self._block)

    def skip_to(self, step):
        """Puts the agent where it is before control step `step`; for spans in which it touches nothing."""
        self._lib.cpBodySetPosition(self._agent, tuple(self.positions[step * SUBSTEPS].tolist()))

    def state_after(self, steps, targets):
        """Full state (12,) after the first `steps` >= 1 control steps of the loaded targets (n, 2)."""
        lib, body = self._lib, self._block
        position, velocity = lib.cpBodyGetPosition(body), lib.cpBodyGetVelocity(body)
        pose = (position.x, position.y, lib.cpBodyGetAngle(body))
        motion = (velocity.x, velocity.y, lib.cpBodyGetAngularVelocity(body))
        agent, agent_velocity = self.positions[steps * SUBSTEPS], self.velocities[steps * SUBSTEPS - 1]
        return np.array([*agent, *agent_velocity, *pose, *motion, *targets[steps - 1]])
