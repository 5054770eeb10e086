"""A set of items made by worker processes: resumable, whole or not at all.

Finished items wait in the folder OUTPUT.partial beside the arguments that they were made with; the same call continues
an interrupted run. Only one process at a time works on a set, the others wait for it.
"""

import json
import math
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from pathlib import Path

from tqdm import tqdm

from envs.shared.files import locked, whole, write_whole
from envs.shared.workers import deaf_children, start_worker

NOTE = "arguments.json"
BEGUN = re.compile(rf"lock|{NOTE}\.partial.*")  # what lies in OUTPUT.partial before anything was made


def is_recovery(index, fraction):
    """Whether episode ``index`` starts disturbed: spreads the fraction evenly over the episode numbers."""
    return math.floor((index + 1) * fraction) > math.floor(index * fraction)


def partial_of(output):
    """The folder of the unfinished set ``output``."""
    output = Path(output)
    return output.with_name(f"{output.name}.partial")


def make_set(output, arguments, *, work, jobs, suffix, processes, stored, finish, unit="episode", description=None):
    """Make the set ``output``, or what is missing of it; False where it was complete already.

    arguments: what decides on the content, as JSON; ``stored(output)`` reads them back from a finished set.
    work(place, *jobs[i]): writes item i to the path ``place``, with ``suffix``; worker processes import it.
    finish(place, paths): writes the set to the path ``place``, of the name of ``output``, from the items at ``paths``.

    Raises ValueError for an ``output`` of other arguments or of other origin, and whatever ``work`` and ``finish``
    raise.
    """
    output = Path(output)
    partial = partial_of(output)
    if _is_complete(output, partial, arguments, stored):
        return False
    with locked(partial):
        made = not _is_complete(output, partial, arguments, stored)  # another process may have been faster
        if made:
            if not (partial / NOTE).exists():
                write_whole(partial / NOTE, json.dumps(arguments))
            paths = [partial / f"{index:06d}{suffix}" for index in range(len(jobs))]
            _make_missing(paths, work, jobs, processes, unit, description)
            finish(partial / output.name, paths)
            os.replace(partial / output.name, output)
        shutil.rmtree(partial)
    return made


def _is_complete(output, partial, arguments, stored):
    """Whether ``output`` is there; ValueError when it or ``partial`` is of other arguments, or no set at all."""
    place = output if output.exists() else partial
    try:
        if place == output:
            found = dict(stored(output))
        elif partial.exists() and any(not BEGUN.fullmatch(name) for name in os.listdir(partial)):
            found = dict(json.loads((partial / NOTE).read_text()))
        else:
            return False
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"output: got {place}, allowed: a set that this program began, or a new path") from error
    for name, value in arguments.items():
        if found.get(name) != value:
            raise ValueError(f"{name}: got {value}, allowed: {found.get(name)}, with which {place} was made")
    return place == output


def _make_missing(paths, work, jobs, processes, unit, description):
    """Makes the items that the folder of an unfinished set lacks, with a progress bar."""
    missing = [(work, path, *job) for path, job in zip(paths, jobs, strict=True) if not path.exists()]
    done = len(paths) - len(missing)
    with tqdm(total=len(paths), initial=done, desc=description, unit=unit, smoothing=0.05) as bar:
        if processes == 1:
            for job in missing:
                _make(*job)
                bar.update()
            return
        processes = max(1, min(processes, len(missing)))
        others = active_children()
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=start_worker) as pool:
            try:
                with deaf_children():
                    futures = [pool.submit(_make, *job) for job in missing]
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):  # the items at work are begun again by the next run
                    for worker in set(active_children()) - set(others):
                        worker.kill()
                pool.shutdown(cancel_futures=True)  # else a stop would wait for all the items still queued
                raise


def _make(work, path, *job):
    """Item ``path``, whole or not at all, also while a worker of a killed run is still at it."""
    with whole(path, shared=True) as place:
        work(place, *job)
