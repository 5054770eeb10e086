"""Makes Push-T demonstrations: `python -m envs.pusht_demos --episodes 640 --output X.zarr.zip`.

Episode i depends only on the seed, i, the recovery fraction and the settings, whatever the number of
processes. Finished episodes wait in the folder `<output>.partial`; the same command continues an interrupted
run.

The result is a zarr group of format 2 (F frames, E episodes; units px and rad):
  data/state (F, 5) float32         agent x, y, block x, y, angle, before the action of the same row
  data/action (F, 2) float32        target of the agent; from each first state at rest they lead to success
  meta/episode_ends (E,) int64      frames up to and including each episode
  meta/recovery (E,) bool           whether the episode starts from a disturbed state in the middle of another
  meta/seed (E, 3) int64            seed, episode number, attempt
Its attributes hold the arguments, the generator version and the number of episodes left out as unsolved.
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np

from envs.pusht.geometry import AGENT_RADIUS, ARENA, BORDER, CORNERS, clearance, coverage, to_world
from envs.pusht.physics import reset_state
from envs.pusht.planner import SETTINGS, plan_episode
from envs.shared.demo_pool import (
    check_demo_options,
    check_output,
    demo_parser,
    is_recovery,
    make_set,
    run_command,
    whole_file,
)

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
    """Short state (5,) near a random one of `states` (n, 5), no contact, not solved; None if not found."""
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
    """Episode `index` as a dict of state (n, 5), action (n, 2), attempt; n = 0 when no attempt was solved."""
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
    return {
        "state": np.empty((0, 5), np.float32),
        "action": np.empty((0, 2), np.float32),
        "attempt": ATTEMPTS,
    }


def save_episode(path, seed, index, recovery, settings):
    """Makes one episode and stores it at `path`; the file appears whole or not at all."""
    episode = make_episode(seed, index, recovery, settings)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **episode)


def gather(paths, arguments):
    """Arrays of the final layout by name, and the number of unsolved episodes among those stored at `paths`."""
    states, actions, seeds, recovery = [], [], [], []
    for index, path in enumerate(paths):
        with np.load(path) as episode:
            if len(episode["state"]):
                states.append(episode["state"])
                actions.append(episode["action"])
                seeds.append((arguments["seed"], index, int(episode["attempt"])))
                recovery.append(is_recovery(index, arguments["recovery"]))
    if not states:
        raise ValueError(f"--episodes got {arguments['episodes']}, but none of them was solved; try another --seed")
    arrays = {
        "data/state": np.concatenate(states),
        "data/action": np.concatenate(actions),
        "meta/episode_ends": np.cumsum([len(part) for part in states]).astype(np.int64),
        "meta/recovery": np.array(recovery, dtype=bool),
        "meta/seed": np.array(seeds, dtype=np.int64),
    }
    return arrays, len(paths) - len(states)


def write_zarr(output, arrays, attributes):
    """Writes arrays as a zarr group of format 2, a folder or a .zip file; it appears whole or not at all."""
    import numcodecs
    import zarr

    output = Path(output)
    folder = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    group = zarr.open_group(folder, mode="w", zarr_format=2)
    group.attrs.update(attributes)
    for name, array in arrays.items():
        # Column order: the block's columns stand still during approaches and so almost vanish.
        codec = numcodecs.Blosc("zstd", clevel=9, shuffle=numcodecs.Blosc.BITSHUFFLE)
        chunks = (max(1, min(len(array), 65536)), *array.shape[1:])
        target = group.create_array(
            name, shape=array.shape, dtype=array.dtype, chunks=chunks, compressors=codec, order="F"
        )
        target[:] = array
    if output.suffix != ".zip":
        folder.replace(output)
        return
    archive = output.with_name(f"{output.name}.{os.getpid()}.zip.tmp")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():  # a fixed date, so that equal sets are equal bytes
                file.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix()), path.read_bytes())
    shutil.rmtree(folder)
    archive.replace(output)


def read_attributes(path):
    """Attributes of the zarr group at `path`, a folder or a .zip file; OSError or ValueError for none."""
    import zarr

    if path.is_dir():
        return zarr.open_group(path, mode="r").attrs.asdict()
    if not zipfile.is_zipfile(path):  # ZipStore itself would fail on it with an AttributeError
        raise ValueError(f"{path} is not a zip file")
    with zarr.storage.ZipStore(path, mode="r") as store:
        return zarr.open_group(store, mode="r").attrs.asdict()


def check_arguments(options):
    """The arguments that decide the content of the set; ValueError with what was got and what is allowed."""
    check_demo_options(options)
    if options.settings not in RECOVERY_SETTINGS:
        raise ValueError(f"--settings got {options.settings}, allowed {', '.join(RECOVERY_SETTINGS)}")
    check_output(options.output, (".zarr", ".zarr.zip"))
    content = ("episodes", "seed", "recovery", "settings")
    return {"version": VERSION} | {name: getattr(options, name) for name in content}


def generate(options):
    """Makes the set that the options ask for, or the missing part of it."""
    arguments = check_arguments(options)
    output = Path(options.output)

    def finish(paths):
        arrays, unsolved = gather(paths, arguments)
        write_zarr(output, arrays, {"arguments": arguments, "unsolved": unsolved})
        ends = arrays["meta/episode_ends"]
        print(f"{len(ends)} episodes, {unsolved} left out as unsolved, {ends[-1] / len(ends):.1f} steps on average")

    made = make_set(
        output,
        arguments,
        work=save_episode,
        jobs=[
            (options.seed, index, is_recovery(index, options.recovery), options.settings)
            for index in range(options.episodes)
        ],
        suffix=".npz",
        processes=options.processes,
        stored=lambda path: read_attributes(path)["arguments"],
        finish=finish,
    )
    if not made:
        print(f"{output} is complete")
        return
    size = sum(path.stat().st_size for path in [output, *output.rglob("*")] if path.is_file()) / 1000
    print(f"{output}: {size:.0f} kB")


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = demo_parser(
        "envs.pusht_demos",
        __doc__.splitlines()[0],
        episodes=640,
        output="name of the set: X.zarr (a folder) or X.zarr.zip (one file)",
        processes=os.cpu_count(),
    )
    help_settings = f"{' or '.join(RECOVERY_SETTINGS)} (default %(default)s); fast is 4 times cheaper, less smooth"
    parser.add_argument("--settings", default="smooth", help=help_settings)
    return run_command(generate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
