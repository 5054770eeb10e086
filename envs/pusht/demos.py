"""Push-T demonstrations by the planner, as a replay buffer.

Episode i depends only on the seed, i, the recovery fraction and the settings, whatever the number of processes.

The result is a zarr group of format 2 (F frames, E episodes; units px and rad):
  data/state (F, 5) float32         agent x, y, block x, y, angle, before the action of the same row
  data/action (F, 2) float32        target of the agent; from each first state at rest they lead to success
  meta/episode_ends (E,) int64      frames up to and including each episode
  meta/recovery (E,) bool           whether the episode starts from a disturbed state in the middle of another
  meta/seed (E, 3) int64            seed, episode number, attempt
Its attributes hold the arguments, the generator version and the number of episodes left out as unsolved.
"""

import numpy as np

from envs.pusht.geometry import AGENT_RADIUS, ARENA, BORDER, CORNERS, clearance, coverage, to_world
from envs.pusht.physics import reset_state
from envs.pusht.planner import SETTINGS, plan_episode
from envs.shared.checks import check_choice, check_demo_options, check_output
from envs.shared.item_set import is_recovery, make_set
from envs.shared.zarr_files import read_attributes, write_zarr

VERSION = 1  # raise it when the same arguments make other episodes
STREAM = 0x70757368  # first word of every seed sequence: keeps ours apart from gym-pusht's reset(seed)
RECOVERY_SETTINGS = {"smooth": "recovery", "fast": "fast"}
ATTEMPTS = 4
JITTER_TRIES = 100
JITTER = np.array([20.0, 20.0, 8.0, 8.0, 0.15])  # sd: agent px, block px, block rad


def random_start(rng):
    """Short state (5,) drawn like gym-pusht's reset, after its one substep."""
    raw = [*rng.integers(50, 450, 2), *rng.integers(100, 400, 2), rng.uniform(-np.pi, np.pi)]
    return reset_state(raw)


def disturbed_start(states, rng):
    """Short state (5,) near a random one of ``states`` (n, 5), no contact, not solved; None if not found."""
    middle = states[rng.integers(len(states))]
    for _ in range(JITTER_TRIES):
        start = (middle + rng.normal(size=5) * JITTER).astype(np.float32)
        start[4] %= np.float32(2 * np.pi)
        x, y, *pose = (float(value) for value in start)
        points = [(x, y)] + [to_world(u, v, tuple(pose)) for u, v in CORNERS]
        inside = all(BORDER <= value <= ARENA - BORDER for point in points for value in point)
        if inside and clearance(x, y, tuple(pose)) > AGENT_RADIUS and coverage(*pose) < 0.95:
            return start
    return None


def make_episode(seed, index, recovery, settings):
    """Episode ``index`` as a dict of state (n, 5), action (n, 2), attempt; n = 0 when no attempt was solved."""
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([STREAM, seed, index, attempt])
        start, effort = random_start(rng), SETTINGS[settings]
        if recovery:
            effort = SETTINGS[RECOVERY_SETTINGS[settings]]
            states, _, solved = plan_episode(start, rng, effort)
            start = disturbed_start(states, rng) if solved else None
            if start is None:
                continue
        states, actions, solved = plan_episode(start, rng, effort)
        if solved:
            return {"state": states, "action": actions, "attempt": attempt}
    return {"state": np.empty((0, 5), np.float32), "action": np.empty((0, 2), np.float32), "attempt": ATTEMPTS}


def save_episode(path, seed, index, recovery, settings):
    """Makes one episode and stores it at ``path``."""
    np.savez(path, **make_episode(seed, index, recovery, settings))


def gather(paths, arguments):
    """Arrays of the final layout by name, and the number of unsolved episodes among those stored at ``paths``."""
    states, actions, seeds, recovery = [], [], [], []
    for index, path in enumerate(paths):
        with np.load(path) as episode:
            if len(episode["state"]):
                states.append(episode["state"])
                actions.append(episode["action"])
                seeds.append((arguments["seed"], index, int(episode["attempt"])))
                recovery.append(is_recovery(index, arguments["recovery"]))
    if not states:
        raise ValueError(f"seed: got {arguments['seed']}, with which no episode was solved, allowed: another one")
    arrays = {
        "data/state": np.concatenate(states),
        "data/action": np.concatenate(actions),
        "meta/episode_ends": np.cumsum([len(part) for part in states]).astype(np.int64),
        "meta/recovery": np.array(recovery, dtype=bool),
        "meta/seed": np.array(seeds, dtype=np.int64),
    }
    return arrays, len(paths) - len(states)


def make_demos(output, *, episodes, seed, recovery, settings, processes):
    """Make the set ``output``, .zarr or .zarr.zip, or what is missing of it; False where it was complete.

    recovery: the share of episodes that start disturbed; settings: of the planner, "smooth" or "fast". Raises
    ValueError for wrong arguments, for a set of other ones at ``output``, and where no episode is solved.
    """
    check_demo_options(episodes=episodes, seed=seed, recovery=recovery, processes=processes)
    check_choice("settings", settings, RECOVERY_SETTINGS)
    check_output(output, ".zarr", ".zarr.zip")
    content = {"episodes": episodes, "seed": seed, "recovery": recovery, "settings": settings}
    arguments = {"version": VERSION, **content}

    def finish(place, paths):
        arrays, unsolved = gather(paths, arguments)
        write_zarr(place, arrays, {"arguments": arguments, "unsolved": unsolved})
        ends = arrays["meta/episode_ends"]
        print(f"{len(ends)} episodes, {unsolved} left out as unsolved, {ends[-1] / len(ends):.1f} steps on average")

    return make_set(
        output,
        arguments,
        work=save_episode,
        jobs=[(seed, index, is_recovery(index, recovery), settings) for index in range(episodes)],
        suffix=".npz",
        processes=processes,
        stored=lambda path: read_attributes(path)["arguments"],
        finish=finish,
    )
