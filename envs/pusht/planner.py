"""A Push-T expert without learning: beam search over contact primitives with the exact physics as its model.

A primitive drives the agent around the T to a point of its outline and then pushes along an arc.
`plan_episode` plans, executes in the real gym-pusht environment and plans again until the environment reports
success.
"""

from dataclasses import dataclass, replace

import numpy as np

from envs.pusht.geometry import (
    REACHABLE_LENGTH,
    coverage,
    goal_distance,
    next_contact,
    primitive_targets,
)
from envs.pusht.physics import PushTSimulator, environment_at, full_state

EPISODE_STEPS = 300
MAX_PRIMITIVE_STEPS = 180
PLANNED_COVERAGE = 0.9503  # a little over gym-pusht's 0.95, so that a plan that differs in the last digits still ends
MAY_COVER = 8.0  # px of mean corner distance above which the coverage is certainly below 0.95
LEAST_PUSH_STEPS = 3  # a push may not stop earlier: doing almost nothing again and again would look cheap
WORSE_STOP, WORSE_PUSH, WORSE_APPROACH = 5.0, 60.0, 80.0  # px over the distance at the start
WORSE_COST = 25.0  # steps over the best stop so far
PARENTS = 30  # candidates that one refinement round perturbs
SPREAD_PX, PX_PER_RAD = 8.0, 60.0  # beam members differ at least by this in block pose
NEAR_GOAL, NEAR_SEARCHES = 25.0, 4
POSITION_RANGE = (0.02, 0.98)
DIRECTION_LIMIT = 1.2  # rad; a push further from the normal slides off


@dataclass(frozen=True)
class ExpertSettings:
    """Search effort (samples per level), speeds (px/step, px/step^2) and weights of the cost (steps)."""

    first_samples: int
    next_samples: int
    beam: int
    refine_rounds: int
    refine_samples: int
    max_speed: float
    max_acceleration: float
    push_speeds: tuple[float, float]
    depth: int = 2
    steps_per_px: float = 1.2
    unfinished_steps: float = 15.0
    push_steps: int = 60


SMOOTH = ExpertSettings(
    first_samples=2000,
    next_samples=200,
    beam=20,
    refine_rounds=3,
    refine_samples=400,
    max_speed=14.0,
    max_acceleration=3.0,
    push_speeds=(3.0, 8.0),
)
RECOVERY = replace(SMOOTH, first_samples=1000, next_samples=100, beam=12, refine_rounds=2, refine_samples=200)
FAST = ExpertSettings(
    first_samples=400,
    next_samples=60,
    beam=12,
    refine_rounds=1,
    refine_samples=200,
    max_speed=18.0,
    max_acceleration=4.0,
    push_speeds=(4.0, 12.0),
)
SETTINGS = {"smooth": SMOOTH, "fast": FAST, "recovery": RECOVERY}


@dataclass(frozen=True, eq=False)
class Node:
    """A full state (12,) that primitives reach in `steps` from the root, the last with targets (n, 2)."""

    state: np.ndarray
    steps: int
    distance: float
    targets: np.ndarray
    parent: "Node | None" = None
    primitive: np.ndarray | None = None
    cost: float = np.inf
    success: bool = False

    def order(self):
        """Sort key: successes first, then by cost."""
        return not self.success, self.cost

    def chain(self):
        """The targets (n, 2) of each primitive from the root to here."""
        parts, node = [], self
        while node.parent is not None:
            parts.append(node.targets)
            node = node.parent
        return parts[::-1]


def root_node(state):
    """The node of a full state (12,) with nothing planned."""
    return Node(state, 0, goal_distance(*state[4:7]), np.empty((0, 2)))


def draw_primitives(rng, count, settings):
    """Random primitives (count, 5), columns as in `primitive_targets`."""
    edge = rng.choice(len(REACHABLE_LENGTH), size=count, p=REACHABLE_LENGTH / REACHABLE_LENGTH.sum())
    position = rng.uniform(*POSITION_RANGE, count)
    direction = np.where(rng.random(count) < 0.2, 0.0, rng.normal(0, 0.35, count))
    curvature = np.where(rng.random(count) < 0.3, 0.0, rng.normal(0, 0.004, count))
    speed = rng.uniform(*settings.push_speeds, count)
    direction = direction.clip(-DIRECTION_LIMIT, DIRECTION_LIMIT)
    return np.stack([edge, position, direction, curvature, speed], axis=1)


def perturb_primitives(rng, primitives, scale, settings):
    """Gaussian variations of primitives (N, 5) on the same edges."""
    noise = rng.normal(size=(len(primitives), 4)) * np.array([0.08, 0.15, 0.002, 1.5]) * scale
    varied = primitives.copy()
    varied[:, 1:] += noise
    varied[:, 1] = varied[:, 1].clip(*POSITION_RANGE)
    varied[:, 2] = varied[:, 2].clip(-DIRECTION_LIMIT, DIRECTION_LIMIT)
    varied[:, 4] = varied[:, 4].clip(*settings.push_speeds)
    return varied


class BeamSearch:
    """Searches sequences of primitives from one state; `rng` makes the samples."""

    def __init__(self, simulator, settings, rng):
        self.simulator, self.settings, self.rng = simulator, settings, rng
        self.shortest = EPISODE_STEPS + 1  # steps of the shortest success found

    def search(self, root):
        """The best node found from a root node, or None when no primitive can be executed."""
        settings = self.settings
        self.shortest = EPISODE_STEPS + 1
        beam, found = [root], []
        for level in range(settings.depth):
            count = settings.first_samples if level == 0 else settings.next_samples
            nodes = []
            for parent in beam:
                nodes += self._expand(parent, draw_primitives(self.rng, count, settings))
            for turn in range(settings.refine_rounds):
                nodes += self._refine(nodes, 0.6**turn)
            nodes.sort(key=Node.order)
            found += nodes[:1]
            beam = self._distinct(nodes)
        return min(found, key=Node.order, default=None)

    def _refine(self, nodes, scale):
        best = sorted(nodes, key=Node.order)[:PARENTS]
        if not best:
            return []
        shares = np.arange(self.settings.refine_samples) % len(best)
        primitives = np.stack([node.primitive for node in best])[shares]
        primitives = perturb_primitives(self.rng, primitives, scale, self.settings)
        children = []
        for parent in dict.fromkeys(node.parent for node in best):  # one batch per parent
            rows = [i for i, share in enumerate(shares) if best[share].parent is parent]
            children += self._expand(parent, primitives[rows])
        return children

    def _distinct(self, nodes):
        """The best unfinished nodes whose block poses differ, at most `beam` of them."""
        kept = []
        for node in nodes:
            if node.success:
                continue
            gaps = [(node.state[4:7] - other.state[4:7]) * (1, 1, PX_PER_RAD) for other in kept]
            if all(np.linalg.norm(gap) > SPREAD_PX for gap in gaps):
                kept.append(node)
            if len(kept) == self.settings.beam:
                break
        return kept

    def _expand(self, parent, primitives):
        settings = self.settings
        limits = (settings.max_speed, settings.max_acceleration, settings.push_steps)
        found = primitive_targets(primitives, parent.state, limits, MAX_PRIMITIVE_STEPS)
        children = []
        for primitive, targets, approach_steps, steps in zip(primitives, *found, strict=True):
            room = self.shortest - parent.steps - 1
            if steps > 0 and approach_steps < room:
                child = self._roll_out(parent, primitive, targets[: min(steps, room)], int(approach_steps))
                if child is not None:
                    children.append(child)
        return children

    def _roll_out(self, parent, primitive, targets, approach_steps):
        """The best stopping point of one primitive as a node, or None when every one is bad."""
        simulator, settings = self.simulator, self.settings
        simulator.restore(parent.state)
        simulator.load_targets(targets, parent.state)
        start, total = parent.distance, len(targets)
        best, best_cost, lowest, success = None, np.inf, np.inf, False
        step, at_rest, pose = 0, False, tuple(parent.state[4:7])
        while step < total:
            if at_rest:
                contact = next_contact(simulator.positions, step, total, *pose)
                if contact == total:
                    break
                if contact > step:
                    simulator.skip_to(contact)
                    step = contact
            before, pose = pose, simulator.advance(step)
            step += 1
            at_rest = pose == before
            distance = goal_distance(*pose)
            if distance < MAY_COVER and coverage(*pose) > PLANNED_COVERAGE:
                self.shortest, success = parent.steps + step, True
                best, best_cost = (step, distance, simulator.state_after(step, targets)), self.shortest
                break
            cost = parent.steps + step + settings.steps_per_px * distance + settings.unfinished_steps
            pushed = step - approach_steps
            if pushed <= 0:
                if distance - start > WORSE_APPROACH:
                    break
                continue
            lowest = min(lowest, cost)
            if distance - start > WORSE_PUSH or cost > lowest + WORSE_COST:
                break
            may_stop = pushed >= LEAST_PUSH_STEPS and not at_rest and distance - start <= WORSE_STOP
            if may_stop and cost < best_cost:
                best, best_cost = (step, distance, simulator.state_after(step, targets)), cost
        if best is None:
            return None
        stop, distance, state = best
        steps = parent.steps + stop
        return Node(state, steps, distance, targets[:stop], parent, primitive, best_cost, success)


def plan_episode(state, rng, settings):
    """Solves one episode in the real gym-pusht environment.

    state: (5,) agent x, y, block x, y (px), block angle (rad), at rest; rounded to float32 first. rng: a
    numpy Generator. Returns states (n, 5) float32 and actions (n, 2) float32 with states[t] before
    actions[t], and whether the last action ended the episode with success within 300 steps. The same
    generator state gives the same bits. Raises ValueError for a state that is not 5 finite numbers.
    """
    state = np.asarray(state, dtype=np.float32)
    if state.shape != (5,) or not np.isfinite(state).all():
        raise ValueError(f"state: got {state}, allowed: 5 finite numbers")
    environment = environment_at(state)
    simulator = PushTSimulator(MAX_PRIMITIVE_STEPS)
    search = BeamSearch(simulator, settings, rng)
    states, actions = [], []
    current, last_target = state, state[:2].astype(np.float64)
    while len(actions) < EPISODE_STEPS:
        root = root_node(full_state(environment, last_target))
        plan = search.search(root)
        for _ in range(NEAR_SEARCHES):
            if root.distance >= NEAR_GOAL or (plan is not None and plan.success):
                break
            again = search.search(root)
            plan = min((node for node in (plan, again) if node is not None), key=Node.order, default=None)
        if plan is None:
            break
        parts = plan.chain()
        for target in np.concatenate(parts if plan.success else parts[:1])[: EPISODE_STEPS - len(actions)]:
            states.append(current)
            actions.append(target.astype(np.float32))
            current, _, done, _, _ = environment.step(actions[-1])
            current, last_target = current.astype(np.float32), target
            if done:
                return np.array(states), np.array(actions), True
    # Reshaped because there may be no rows.
    return np.array(states, np.float32).reshape(-1, 5), np.array(actions, np.float32).reshape(-1, 2), False
