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

import argparse
import json
import math
import os
import shutil
import signal
import sys
import threading
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from envs.pusht_geometry import AGENT_RADIUS, ARENA, BORDER, CORNERS, clearance, coverage, to_world
from envs.pusht_physics import reset_state
from envs.pusht_planner import SETTINGS, plan_episode

VERSION = 1  # raise it when the same arguments make other episodes
STREAM = 0x70757368  # first word of every seed sequence: keeps ours apart from gym-pusht's reset(seed)
RECOVERY_SETTINGS = {"smooth": "recovery", "fast": "fast"}
ATTEMPTS = 4
JITTER_TRIES = 100
JITTER = np.array([20.0, 20.0, 8.0, 8.0, 0.15])  # sd: agent px, block px, block rad


def is_recovery(index, fraction):
    """Whether episode `index` starts disturbed: spreads the fraction evenly over the episode numbers."""
    return math.floor((index + 1) * fraction) > math.floor(index * fraction)


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


def episode_file(partial, index):
    """Path of one finished episode in the folder of an unfinished set."""
    return Path(partial) / f"{index:06d}.npz"


def save_episode(partial, index, episode):
    """Stores one finished episode; the file appears whole or not at all."""
    temporary = Path(partial) / f"{index:06d}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, **episode)
    temporary.replace(episode_file(partial, index))


def gather(partial, arguments, indices):
    """Arrays of the final layout by name, and the number of unsolved episodes among `indices`."""
    states, actions, seeds, recovery = [], [], [], []
    for index in indices:
        with np.load(episode_file(partial, index)) as episode:
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
    return arrays, len(indices) - len(states)


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


def stored_arguments(output, partial):
    """Arguments of the finished or unfinished set at `output`, None for neither; ValueError for no set."""
    try:
        if output.exists():
            return dict(read_attributes(output)["arguments"])
        if partial.exists():
            return dict(json.loads((partial / "arguments.json").read_text()))
    except (KeyError, TypeError, ValueError, OSError) as error:
        path = output if output.exists() else partial
        raise ValueError(
            f"--output got {path}, which exists and is not a set of this program, allowed a new path"
        ) from error
    return None


def check_arguments(options):
    """The arguments that decide the content of the set; ValueError with what was got and what is allowed."""
    output = Path(options.output)
    if options.episodes < 1:
        raise ValueError(f"--episodes got {options.episodes}, allowed 1 or more")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed got {options.seed}, allowed 0 to 2**32 - 1")
    if not 0 <= options.recovery <= 1:
        raise ValueError(f"--recovery got {options.recovery}, allowed 0 to 1")
    if options.processes < 1:
        raise ValueError(f"--processes got {options.processes}, allowed 1 or more")
    if options.settings not in RECOVERY_SETTINGS:
        raise ValueError(f"--settings got {options.settings}, allowed {', '.join(RECOVERY_SETTINGS)}")
    if not output.name.endswith((".zarr", ".zarr.zip")):
        raise ValueError(f"--output got {output}, allowed a name ending in .zarr or .zarr.zip")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK | os.X_OK)):
        raise ValueError(f"--output got {output}, but {output.parent} is not a writable folder, allowed one that is")
    content = ("episodes", "seed", "recovery", "settings")
    return {"version": VERSION} | {name: getattr(options, name) for name in content}


def start_worker():
    """Prepares a worker process: only the parent answers Ctrl-C, and a killed parent ends its workers."""

    def follow_parent():
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow_parent, daemon=True).start()


def make_missing(partial, arguments, processes):
    """Makes the episodes that the folder of an unfinished set lacks, with a progress bar."""
    indices = range(arguments["episodes"])
    missing = [index for index in indices if not episode_file(partial, index).exists()]
    jobs = {
        index: (arguments["seed"], index, is_recovery(index, arguments["recovery"]), arguments["settings"])
        for index in missing
    }
    with tqdm(total=len(indices), initial=len(indices) - len(missing), unit="episode", smoothing=0.05) as bar:
        if processes == 1:
            for index, job in jobs.items():
                save_episode(partial, index, make_episode(*job))
                bar.update()
            return
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=start_worker) as pool:
            try:
                futures = {pool.submit(make_episode, *job): index for index, job in jobs.items()}
                for future in as_completed(futures):
                    save_episode(partial, futures[future], future.result())
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else a stop would wait for all the episodes still queued
                raise


def generate(options):
    """Makes the set that the options ask for, or the missing part of it."""
    arguments = check_arguments(options)
    output = Path(options.output)
    partial = output.with_name(output.name + ".partial")
    stored = stored_arguments(output, partial)
    for name, value in arguments.items():
        if stored is not None and stored.get(name) != value:
            place = output if output.exists() else partial
            raise ValueError(f"--{name} got {value}, but {place} was made with {stored.get(name)}, allowed the same")
    if output.exists():
        print(f"{output} is complete")
        return
    if stored is None:
        fresh = output.with_name(f"{partial.name}.{os.getpid()}.tmp")
        fresh.mkdir()
        (fresh / "arguments.json").write_text(json.dumps(arguments))
        fresh.rename(partial)
    make_missing(partial, arguments, options.processes)
    arrays, unsolved = gather(partial, arguments, range(arguments["episodes"]))
    write_zarr(output, arrays, {"arguments": arguments, "unsolved": unsolved})
    shutil.rmtree(partial)
    ends = arrays["meta/episode_ends"]
    size = sum(path.stat().st_size for path in [output, *output.rglob("*")] if path.is_file()) / 1000
    print(f"{len(ends)} episodes, {unsolved} left out as unsolved, {ends[-1] / len(ends):.1f} steps on average")
    print(f"{output}: {size:.0f} kB")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with 1."""

    def error(self, message):
        self.exit(1, f"error: {message}\n")


def main(arguments=None):
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m envs.pusht_demos", description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=640, help="number of episodes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")
    help_recovery = "share of episodes that start disturbed, 0 to 1 (default %(default)s)"
    parser.add_argument("--recovery", type=float, default=0.5, help=help_recovery)
    parser.add_argument("--output", required=True, help="name of the set: X.zarr (a folder) or X.zarr.zip (one file)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes (default %(default)s)")
    help_settings = f"{' or '.join(RECOVERY_SETTINGS)} (default %(default)s); fast is 4 times cheaper, less smooth"
    parser.add_argument("--settings", default="smooth", help=help_settings)
    try:
        generate(parser.parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
