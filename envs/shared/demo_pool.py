"""What the makers of demonstrations share: a set of items made by worker processes, resumable, whole or not at all.

Finished items wait in the folder `<output>.partial` beside the arguments that they were made with; the same command
continues an interrupted run. Only one process at a time works on a set, the others wait for it.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from envs.shared.workers import start_worker


def is_recovery(index, fraction):
    """Whether episode `index` starts disturbed: spreads the fraction evenly over the episode numbers."""
    return math.floor((index + 1) * fraction) > math.floor(index * fraction)


# Command lines ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with 1."""

    def error(self, message):
        self.exit(1, f"error: {message}\n")


def demo_parser(module, description, *, episodes, output, processes):
    """A Parser with the options of every maker of demonstrations; `episodes` and `processes` are defaults."""
    parser = Parser(prog=f"python -m {module}", description=description)
    parser.add_argument("--episodes", type=int, default=episodes, help="number of episodes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")
    help_recovery = "share of episodes that start disturbed, 0 to 1 (default %(default)s)"
    parser.add_argument("--recovery", type=float, default=0.5, help=help_recovery)
    parser.add_argument("--output", required=True, help=output)
    parser.add_argument("--processes", type=int, default=processes, help="processes (default %(default)s)")
    return parser


def check_demo_options(options):
    """ValueError with what was got and what is allowed, for the options of `demo_parser` except the output."""
    if options.episodes < 1:
        raise ValueError(f"--episodes got {options.episodes}, allowed 1 or more")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed got {options.seed}, allowed 0 to 2**32 - 1")
    if not 0 <= options.recovery <= 1:
        raise ValueError(f"--recovery got {options.recovery}, allowed 0 to 1")
    check_processes(options.processes)


def check_processes(processes):
    """ValueError for fewer than one."""
    if processes < 1:
        raise ValueError(f"--processes got {processes}, allowed 1 or more")


def check_output(output, endings, name="--output"):
    """ValueError for a name without one of the `endings` or in a folder that cannot be written."""
    output = Path(output)
    if not output.name.endswith(endings):
        raise ValueError(f"{name} got {output}, allowed a name ending in {' or '.join(endings)}")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK | os.X_OK)):
        raise ValueError(f"{name} got {output}, but {output.parent} is not a writable folder, allowed one that is")


def run_command(generate, parser, arguments):
    """Parse `arguments` and call `generate(options)`; returns the exit code, with one line for every error."""
    try:
        generate(parser.parse_args(arguments))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


# Sets ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path):
    """A temporary Path to write instead of `path`, which appears when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def item_file(partial, index, suffix):
    """Path of one finished item in the folder of an unfinished set."""
    return Path(partial) / f"{index:06d}{suffix}"


def make_set(output, arguments, *, work, jobs, suffix, processes, stored, finish, unit="episode", description=None):
    """Make the set `output`, or what is missing of it; False where it was complete already.

    arguments: what decides on the content, as JSON; `stored(output)` reads them back from a finished set.
    work(path, *jobs[i]): makes item i and writes it to `path`, with `suffix`, whole or not at all; importable, as
    worker processes call it. finish(paths): writes `output` from all the items, whole or not at all.

    Raises ValueError for an `output` of other arguments or of other origin, and whatever `work` and `finish` raise.
    """
    output = Path(output)
    partial = output.with_name(output.name + ".partial")
    with contextlib.ExitStack() as stack:
        while not _present(output, partial, arguments, stored):
            if not partial.exists():
                _begin(partial, arguments)
            if _lock(stack, partial):
                break
        if output.exists():  # complete from the start, or made by another process while this one waited
            return False
        paths = [item_file(partial, index, suffix) for index in range(len(jobs))]
        _make_missing(paths, work, jobs, processes, unit, description)
        finish(paths)
        shutil.rmtree(partial)
    return True


def _present(output, partial, arguments, stored):
    """Whether `output` is complete; ValueError when it or `partial` is of other arguments, or no set at all."""
    place = output if output.exists() else partial
    try:
        if place == output:
            found = dict(stored(output))
        elif partial.exists():
            found = dict(json.loads((partial / "arguments.json").read_text()))
        else:
            return False
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"--output got {place}, which exists and is not a set of this program, allowed a new path"
        ) from error
    for name, value in arguments.items():
        if found.get(name) != value:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} got {value}, but {place} was made with {found.get(name)}, allowed the same")
    return place == output


def _begin(partial, arguments):
    fresh = partial.with_name(f"{partial.name}.{os.getpid()}.tmp")
    fresh.mkdir()
    (fresh / "arguments.json").write_text(json.dumps(arguments))
    try:
        fresh.rename(partial)
    except OSError:
        shutil.rmtree(fresh)
        if not partial.exists():  # else another process was faster
            raise


def _lock(stack, partial):
    """Hold `partial` until the stack is closed, or the process ends; False where it went away meanwhile."""
    try:
        lock = stack.enter_context(open(partial / "lock", "w"))  # noqa: SIM115 (the stack closes it)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that works on {partial}")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return (partial / "arguments.json").exists()


def _make_missing(paths, work, jobs, processes, unit, description):
    """Makes the items that the folder of an unfinished set lacks, with a progress bar."""
    missing = [(path, *job) for path, job in zip(paths, jobs, strict=True) if not path.exists()]
    done = len(paths) - len(missing)
    with tqdm(total=len(paths), initial=done, desc=description, unit=unit, smoothing=0.05) as bar:
        if processes == 1:
            for job in missing:
                work(*job)
                bar.update()
            return
        processes = max(1, min(processes, len(missing)))
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=start_worker) as pool:
            try:
                for future in as_completed([pool.submit(work, *job) for job in missing]):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else a stop would wait for all the items still queued
                raise
