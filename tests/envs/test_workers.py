"""Environments in worker processes: the same results as in this one, also when workers die, and none is left over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from paths import ROOT

from envs import make_env
from envs.shared import workers as module
from envs.shared.workers import open_slots
from eval.rollout.loop import rollout
from policy.build import build_model

RUN = {"episodes": 11, "seed": 100, "num_inference_steps": 2, "videos": 2}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    policy = build_model(tiny.policy_config(images=True, sampler="ddpm")).eval()
    policy.normalizer.fit("agent_pos", torch.tensor([[0.0, 0.0], [50.0, 20.0]]))
    return policy


@pytest.fixture(scope="module")
def expected(policy):
    return rollout(policy, fake(), **RUN)


def fake(**options):
    return {"name": "fake_env:FakeEnv", "images": True, **options}


def trouble(kind, seed, step):
    return {"kind": kind, "seed": seed, "step": step}


def slots_of(env, *, slots=4, workers=2, **options):
    return open_slots(env, slots=slots, workers=workers, obs_steps=2, keys=["agent_pos"], **options)


def events(log, kind=""):
    """[(process, event, seed)] of a log of ``FakeEnv``."""
    found = [(int(words[0]), " ".join(words[1:-1]), words[-1]) for words in map(str.split, log.open())]
    return [event for event in found if kind in event[1]]


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def none_left(log, seconds=0.0):
    """Whether all processes that ever held an environment are gone after at most so many seconds."""
    processes, end = {pid for pid, *_ in events(log)} - {os.getpid()}, time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return len(processes) > 0 and not any(map(alive, processes))


def same_films(films, expected):
    for one, other in zip(films, expected, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_array_equal(np.stack(one["frames"]), np.stack(other["frames"]), strict=True)
        assert all(one[key] == other[key] for key in ("score", "seed", "success"))


# Results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "num_envs"), [(0, 1), (0, 8), (1, 3), (2, 1), (2, 3), (2, 8), (3, 50)])
def test_results_do_not_depend_on_workers(policy, expected, log, capfd, workers, num_envs):
    summary, films = rollout(policy, fake(log=log), workers=workers, num_envs=num_envs, **RUN)
    assert summary == expected[0]
    same_films(films, expected[1])
    processes = {pid for pid, *_ in events(log)}
    used = min(num_envs, RUN["episodes"])
    assert len(processes) == max(1, min(workers, used)) and (workers == 0) == (os.getpid() in processes)
    assert len(events(log, "made")) == len(events(log, "close")) == used
    assert workers == 0 or none_left(log)
    assert capfd.readouterr().err.count("died") == 0


def test_states_travel(policy):
    """Bit for bit as without workers; an episode that was not asked for them has none, nor has a running one."""
    expected = rollout(policy, fake(name="fake_env:StatefulEnv"), states=True, **RUN)[2]
    visited = rollout(policy, fake(name="fake_env:StatefulEnv"), workers=2, num_envs=3, states=True, **RUN)[2]
    for one, other in zip(visited, expected, strict=True):
        np.testing.assert_array_equal(one.pop("states"), other.pop("states"), strict=True)
        assert one == other
    with slots_of(fake(name="fake_env:StatefulEnv", length=2)) as slots:
        reports = slots.run({0: ("reset", 5, False, True), 1: ("reset", 6, False, False)})
        assert reports[0].states is None
        reports = slots.run({0: ("execute", np.zeros((2, 2))), 1: ("execute", np.zeros((2, 2)))})
        assert reports[0].states[:, :2].tolist() == [[5, 0], [5, 1], [5, 2]] and reports[1].states is None
    with pytest.raises(ValueError, match="states"):
        rollout(policy, fake(), workers=1, num_envs=1, states=True, **RUN)


def test_slots_go_round_robin_and_their_environments_are_made_late(log):
    with slots_of(fake(log=log)) as slots:
        reports = slots.run({0: ("reset", 10, False), 2: ("reset", 12, False), 3: ("reset", 13, True)})
        assert list(reports) == [0, 2, 3] and len(events(log, "made")) == 3
        place = {int(seed): pid for pid, _, seed in events(log, "reset")}
        assert place[10] == place[12] != place[13]
        reports = slots.run({3: ("execute", np.zeros((1, 2))), 0: ("execute", np.zeros((30, 2)))})
        assert reports[3].row is None and reports[0].observation is None and reports[0].film is None
        assert reports[3].observation.keys() == {"agent_pos"}  # not "image", not "unseen"
        np.testing.assert_array_equal(reports[3].observation["agent_pos"], [[13, 0], [13, 1]])
        assert reports[0].row.keys() == {"seed", "score", "success", "steps"}
        slots.run({0: ("reset", 14, False)})
        assert len(events(log, "made")) == 3


def test_workers_run_at_the_same_time_and_a_full_pipe_holds_none_up(log):
    """Each of four slots sleeps 4 x 0.2 s; the films are larger than a pipe's buffer."""
    with slots_of(fake(log=log, pause=0.2, length=4), slots=4, workers=4) as slots:
        slots.run({slot: ("reset", slot, True) for slot in range(4)})
        start = time.monotonic()
        reports = slots.run({slot: ("execute", np.zeros((4, 2))) for slot in range(4)})
        assert time.monotonic() - start < 2
        assert all(len(report.film["frames"]) == 5 for report in reports.values())


def test_workers_are_light(log, monkeypatch):
    """One thread, and not the program that runs here nor torch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    program = sys.modules["__main__"]
    env = {"name": "test_workers_loaded:Env", "log": str(log)}
    (log.parent / "test_workers_loaded.py").write_text(
        "import sys\nimport fake_env\n\n\nclass Env(fake_env.FakeEnv):\n    def reset(self, seed):\n"
        "        super().reset(seed)\n        self.log('loaded ' + ','.join(sys.modules))\n"
    )
    monkeypatch.syspath_prepend(log.parent)
    with slots_of(env, workers=1) as slots:
        slots.run({0: ("reset", 1, False)})
    assert [event for _, event, _ in events(log, "made")] == ["made with 1 threads"]
    loaded = events(log, "loaded")[0][1].split()[1].split(",")
    assert "envs.shared.workers" in loaded and not {"torch", "pytest", "eval", "policy"} & set(loaded)
    assert os.environ["OMP_NUM_THREADS"] == "3" and sys.modules["__main__"] is program
    monkeypatch.delenv("OMP_NUM_THREADS")
    with slots_of(fake()):
        assert "OMP_NUM_THREADS" not in os.environ


# Deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cause"), [("die", "SIGKILL"), ("exit", "exit code 7")])
def test_episodes_of_a_dead_worker_start_again(policy, expected, log, capfd, kind, cause):
    """Slots 0, 2, 4 hold seeds 104, 102, 100 and die with one of them: the same summary as without."""
    env = fake(log=log, trouble=trouble(kind, 104, 4))
    summary, films = rollout(policy, env, workers=2, num_envs=5, **RUN)
    assert summary == expected[0]
    same_films(films, expected[1])
    lost = [int(seed) for _, _, seed in events(log, "reset")]
    lost = sorted(seed for seed in set(lost) if lost.count(seed) == 2)
    assert 104 in lost and len(lost) >= 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "died" in line]
    assert f"worker 0 died ({cause}); {len(lost)} episodes" in line
    assert len({pid for pid, *_ in events(log)}) == 3 and none_left(log)


def test_what_a_death_costs(log, capfd):
    """Episodes that were over keep their report; those of the dead worker that answered before are lost as well."""
    with slots_of(fake(log=log, trouble=trouble("die", 24, 2), length=3), slots=6) as slots:
        slots.run({slot: ("reset", 20 + slot, False) for slot in range(6)})
        lengths = {0: 3, 1: 1, 2: 1, 3: 3, 4: 3, 5: 1}
        reports = slots.run({slot: ("execute", np.zeros((length, 2))) for slot, length in lengths.items()})
        assert reports[2] is None and reports[4] is None
        assert reports[0].row["steps"] == reports[3].row["steps"] == 3
        assert reports[1].observation and reports[5].observation
        assert "died (SIGKILL); 2 episodes start" in capfd.readouterr().err
        again = slots.run({4: ("reset", 24, False), 2: ("reset", 22, False), 1: ("execute", np.zeros((3, 2)))})
        assert again[4].observation and again[2].observation and again[1].row["steps"] == 3
        place = {int(seed): pid for pid, _, seed in events(log, "reset")}
        os.kill(place[21], signal.SIGKILL)  # while it has nothing to do
        while alive(place[21]):
            time.sleep(0.01)
        time.sleep(0.1)  # its threads hold the pipe a moment longer
        reports = slots.run({slot: ("execute", np.zeros((1, 2))) for slot in (2, 5)})
        assert reports[5] is None and reports[2].observation
        assert "worker 1 died (SIGKILL); 1 episodes start" in capfd.readouterr().err
        assert slots.run({5: ("reset", 25, False)})[5].observation
    assert none_left(log)


def test_the_third_death_is_an_error(policy, expected, log):
    env = fake(log=log, trouble=trouble("die", 101, 2), times=2)
    assert rollout(policy, env, workers=1, num_envs=3, **RUN)[0] == expected[0]
    log.unlink()
    with pytest.raises(ChildProcessError, match="SIGKILL.*3 deaths"):
        rollout(policy, {**env, "times": 3}, workers=1, num_envs=3, **RUN)
    assert none_left(log)


def test_a_worker_that_hangs_is_killed(log, capfd):
    with slots_of(fake(log=log, trouble=trouble("hang", 1, 1)), timeout=2) as slots:
        slots.run({0: ("reset", 0, False), 1: ("reset", 1, False)})
        start = time.monotonic()
        reports = slots.run({0: ("execute", np.zeros((1, 2))), 1: ("execute", np.zeros((1, 2)))})
        assert 1.9 < time.monotonic() - start < 6
        assert reports[0].observation and reports[1] is None
        assert "worker 1 died (no answer in 2 s); 1 episodes start" in capfd.readouterr().err
        time.sleep(2.1)  # the parent was busy: this does not count
        assert slots.run({0: ("execute", np.zeros((1, 2))), 1: ("reset", 1, False)})[0].observation
    assert none_left(log)


# Errors and ends -------------------------------------------------------------------------------------------------


def test_errors_of_environments_reach_the_caller(policy, log):
    with pytest.raises(ValueError) as error:
        rollout(policy, fake(log=log, trouble=trouble("raise", 103, 2)), workers=2, num_envs=4, **RUN)
    assert str(error.value) == "action: got seed 103, allowed: others"
    assert "make_trouble" in error.value.__notes__[0]  # DEBUG=1 shows where it was
    assert none_left(log)
    with pytest.raises(RuntimeError, match="^SimulatorError: joint 5\n"):
        rollout(policy, fake(trouble=trouble("strange", 100, 1)), workers=1, num_envs=1, **RUN)
    with pytest.raises(ModuleNotFoundError, match="No module named 'nothing_like_it'"):
        rollout(policy, {"name": "nothing_like_it:Env"}, workers=1, num_envs=1, **RUN)


class Interrupted:
    obs_steps = 2

    def __init__(self, encoder):
        self.encoder = encoder

    def act(self, obs, **options):
        raise KeyboardInterrupt


def test_no_worker_is_left_after_an_interruption(policy, log):
    with pytest.raises(KeyboardInterrupt):
        rollout(Interrupted(policy.encoder), fake(log=log), workers=2, **RUN)
    assert none_left(log) and not events(log, "close")


def test_workers_leave_ctrl_c_to_their_parent(log):
    with slots_of(fake(log=log)) as slots:
        slots.run({0: ("reset", 0, False)})
        ((pid, *_),) = events(log, "made")
        os.kill(pid, signal.SIGINT)
        assert slots.run({0: ("execute", np.zeros((1, 2)))})[0].observation
    assert len(events(log, "close")) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(log, how):
    """Ctrl-C, which the terminal sends to all of them, and a killed parent, in the middle of a slow step.

    The workers must not import the program, which has no ``if __name__ == "__main__"``.
    """
    program = log.parent / "program.py"
    program.write_text(
        "import numpy as np; from envs.shared.workers import open_slots\n"
        f"env = {{'name': 'fake_env:FakeEnv', 'pause': 1000, 'log': {str(log)!r}}}\n"
        "with open_slots(env, slots=2, workers=2, obs_steps=1, keys=['agent_pos']) as slots:\n"
        "    slots.run({0: ('reset', 0, False), 1: ('reset', 1, False)})\n"
        "    print('ready', flush=True)\n"
        "    slots.run({0: ('execute', np.zeros((1, 2))), 1: ('execute', np.zeros((1, 2)))})\n"
    )
    parent = subprocess.Popen(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under a shell's background jobs
    )
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.2)
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
    else:
        parent.kill()
    assert parent.wait(60) == (-signal.SIGINT if how == signal.SIGINT else -signal.SIGKILL)
    assert none_left(log, seconds=5)
    error = parent.stderr.read()
    assert error.count("Traceback") == (1 if how == signal.SIGINT else 0)


def test_workers_that_do_not_close_in_time_are_killed(log, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.5)
    with slots_of(fake(log=log)) as slots:
        slots.run({0: ("reset", 0, False)})
        ((pid, *_),) = events(log, "made")
        os.kill(pid, signal.SIGSTOP)
    assert none_left(log)


# Names -----------------------------------------------------------------------------------------------------------


def test_environments_from_anywhere():
    assert make_env("fake_env:FakeEnv", length=5).length == 5
    for name in ("os:system", "fake_env:Nothing", "fake_env:", "fake_env:FakeEnv:x"):
        with pytest.raises(ValueError, match=f"task.env.name: got '{name}'"):
            make_env(name, command="false")
    for name in ("fake", None, 3, ["pusht"]):
        with pytest.raises(ValueError, match="task.env.name.*module:attribute"):
            make_env(name)
    for name in ("pusht", "fake_env:FakeEnv"):
        with pytest.raises(ValueError, match="task.env: got strength"):
            make_env(name, strength=3)
