"""Environments side by side, in this process or in worker processes that are watched and replaced.

A slot holds one environment and one episode at a time. A round is one command for each of some slots:

    with open_slots(env_options, slots=2, workers=2, obs_steps=2, keys=["image"]) as slots:
        reports = slots.run({0: ("reset", seed, film, states), 1: ("execute", actions)})  # {slot: Report}
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import wait
from types import ModuleType

from tqdm import tqdm

from envs import close_env, make_env
from envs.shared.episode import Episode

TIMEOUT = 300.0  # s without an answer after which a worker counts as dead
DEATHS = 3  # with this one the pool gives up
GRACE = 10.0  # s that the workers have to close their environments


def open_slots(env_options, *, slots, workers=0, obs_steps, keys, timeout=TIMEOUT):
    """A context manager whose ``run(commands)`` carries out a round: {slot: command} -> {slot: Report}.

    env_options: {"name": ..., options} for ``make_env``; keys: observations that are kept; slots are numbers below
    ``slots``, spread over ``workers`` processes, or over none for 0. Commands: ("reset", seed, film, states), of
    which states may be missing, and ("execute", actions (Ta, Da)). What an environment raises reaches the caller.
    """
    if workers < 0:
        raise ValueError(f"workers: got {workers}, allowed: >= 0")
    settings = {"env_options": env_options, "obs_steps": obs_steps, "keys": list(keys)}
    if workers == 0:
        return LocalSlots(**settings)
    return WorkerSlots(settings, workers=min(workers, slots), timeout=timeout)


class LocalSlots:
    """Slots in this process; an environment is made when its slot is first reset."""

    def __init__(self, env_options, obs_steps, keys):
        self.env_options = env_options
        self.episode_options = {"obs_steps": obs_steps, "keys": keys}
        self.envs, self.episodes = {}, {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for env in self.envs.values():
            close_env(env)

    def run(self, commands):
        return {slot: self.carry_out(slot, *command) for slot, command in commands.items()}

    def carry_out(self, slot, command, *arguments):
        """``Report`` of the episode in ``slot`` after a command."""
        if command == "reset":
            self._reset(slot, *arguments)
        else:
            self.episodes[slot].execute(*arguments)
        report = self.episodes[slot].report()
        if report.row is not None:
            del self.episodes[slot]  # its frames are large
        return report

    def _reset(self, slot, seed, film, states=False):
        if slot not in self.envs:
            self.envs[slot] = make_env(**self.env_options)
        self.episodes[slot] = Episode(self.envs[slot], seed, film=film, states=states, **self.episode_options)


class WorkerSlots:
    """Slots spread over processes round robin.

    A worker that dies, or does not answer for ``timeout`` s, is replaced; ``run`` then has None instead of a report
    for its episodes that are not over, which are lost. Raises ChildProcessError when that happens too often.
    """

    def __init__(self, settings, *, workers, timeout):
        self.settings, self.timeout, self.deaths = settings, timeout, 0
        self.workers = [Worker(settings) for _ in range(workers)]

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            if error is None:
                for worker in self.workers:
                    worker.connection.close()  # it then closes its environments and ends
                end = time.monotonic() + GRACE
                for worker in self.workers:
                    worker.process.join(max(0, end - time.monotonic()))
        finally:
            for worker in self.workers:
                worker.kill()

    def run(self, commands):
        reports = dict.fromkeys(commands)
        pending = {}  # {worker: its slots without a report}
        for number, worker in enumerate(self.workers):
            own = {slot: command for slot, command in commands.items() if slot % len(self.workers) == number}
            if own:
                worker.send(own)
                pending[worker] = set(own)
        while pending:
            end = min(worker.heard for worker in pending) + self.timeout
            ready = wait([worker.connection for worker in pending], max(0, end - time.monotonic()))
            for worker in list(pending):
                late = time.monotonic() > worker.heard + self.timeout
                if worker.connection in ready:
                    answer, cause = worker.receive(), None
                elif late:
                    answer, cause = None, f"no answer in {self.timeout:g} s"
                else:
                    continue
                if answer is None:
                    pending[worker].clear()
                    self._replace(worker, cause, reports)
                else:
                    slot, reports[slot] = answer
                    pending[worker].remove(slot)
                if not pending[worker]:
                    del pending[worker]
        return reports

    def _replace(self, worker, cause, reports):
        """Put a new worker in the place of a dead one and strike out the ``reports`` whose episodes died with it."""
        worker.kill()
        number, self.deaths = self.workers.index(worker), self.deaths + 1
        message = f"environment worker {number} died ({cause or worker.cause()})"
        if self.deaths == DEATHS:
            raise ChildProcessError(
                f"{message}: got {DEATHS} deaths in one rollout, allowed: {DEATHS - 1}; if memory is short, use a"
                " smaller num_envs"
            )
        lost = [s for s, r in reports.items() if s % len(self.workers) == number and (r is None or r.row is None)]
        reports.update(dict.fromkeys(lost))
        tqdm.write(f"{message}; {len(lost)} episodes start again in a new one", file=sys.stderr)
        self.workers[number] = Worker(self.settings)


class Worker:
    """One process and the parent's end of the pipe to it."""

    def __init__(self, settings):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, settings), daemon=True)
        with _light_start(), deaf_children():
            self.process.start()
        theirs.close()  # so that the death of the process closes the pipe
        self.heard = time.monotonic()

    def send(self, commands):
        self.heard = time.monotonic()
        with suppress(OSError):  # it died since the last round, which ``receive`` finds too
            self.connection.send(commands)

    def receive(self):
        """(slot, report), or None when the process is dead; raises what the environment raised."""
        self.heard = time.monotonic()
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)  # the pipe closes a moment before the process has an exit code
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self):
        self.process.kill()
        self.process.join()
        self.connection.close()

    def cause(self):
        """Signal or exit code of the dead process."""
        code = self.process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextmanager
def _light_start():
    """Let a process that is started here use one thread, and not import the program that runs here, torch and all."""
    threads, program = os.environ.get("OMP_NUM_THREADS"), sys.modules["__main__"]
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def usual_processes():
    """How many processes work unless asked otherwise: one a core, but 8 at most, as a simulator may need 1 GB."""
    return min(os.cpu_count() or 1, 8)


@contextmanager
def deaf_children():
    """Processes that are started in here never hear Ctrl-C, not even while they import: their parent answers it."""
    resource_tracker.ensure_running()  # which would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_worker():
    """Prepares a worker process, which a killed parent ends."""

    def follow_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def serve(connection, settings):
    """What a worker process does: rounds of commands in, one report a command out, until the pipe is closed."""
    start_worker()
    with LocalSlots(**settings) as slots:
        while True:
            try:
                commands = connection.recv()
            except EOFError:
                return
            for slot, command in commands.items():
                try:
                    answer = slot, slots.carry_out(slot, *command)
                except Exception as error:
                    connection.send(_portable(error))
                    return
                connection.send(answer)


def _portable(error):
    """``error`` with the worker's traceback as a note; as a RuntimeError when its type does not survive a pipe."""
    note = "in an environment worker:\n" + "".join(traceback.format_exception(error))
    try:
        same = str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        same = False
    if not same:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
