"""Real-time control: which action of which chunk is due when, against an independent table."""

import numpy as np
import pytest

from eval.realtime.schedule import ChunkSchedule

HORIZON, OBS_STEPS, ACTION_STEPS = 8, 2, 4
USABLE = HORIZON - OBS_STEPS + 1  # actions of a chunk from the observed step on


def schedule(mode="async", replan="needed"):
    return ChunkSchedule(mode=mode, replan=replan, horizon=HORIZON, obs_steps=OBS_STEPS, action_steps=ACTION_STEPS)


def drive(one, latency, *, steps=60, expected=None):
    """Step ``one`` with inference of ``latency`` steps; [(observed step, index) of the action, or None] and starts.

    A chunk's actions are (observed step, index).
    """
    actions, starts = [], []
    for step in range(steps):
        if one.observed is not None and step >= one.observed + latency:
            one.join(chunk_of(one.observed), step)
        if one.due(step, latency if expected is None else expected):
            starts.append(step)
            one.start(step)
            if latency == 0 or step == 0:  # an episode begins with its first chunk
                one.join(chunk_of(step), step)
        held = len(one.holds)
        action = tuple(one.action(step))
        actions.append(action if len(one.holds) == held else None)
    return actions, starts


def chunk_of(observed):
    return np.array([(observed, index) for index in range(HORIZON)])


def expected_actions(starts, latency, steps):
    """The table of policy/dataset/windows.py: the newest chunk that is there, at the index of the time that passed."""
    table = []
    for step in range(steps):
        there = [start for start in starts if step >= (start + latency if start else 0) and latency < USABLE]
        origin = max(there, default=0)
        index = OBS_STEPS - 1 + step - origin
        table.append((origin, index) if index < HORIZON else None)
    return table


@pytest.mark.parametrize("latency", [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 20])
@pytest.mark.parametrize("replan", ["needed", "always"])
def test_async_follows_the_time_table(latency, replan):
    """Ta steps of the plan minus what inference takes; beyond that the rest of T is a reserve, then holds."""
    one = schedule(replan=replan)
    actions, starts = drive(one, latency)
    between = max(latency, 1) if replan == "always" else max(ACTION_STEPS - latency, latency, 1)
    first = 1 if replan == "always" else max(ACTION_STEPS - latency, 1)
    if latency >= USABLE and replan == "needed":
        between = latency  # never served: it asks again at once
    assert starts == [0, *range(first, 60, between)]
    assert actions == expected_actions(starts, latency, 60)
    assert one.holds == [step for step, action in enumerate(actions) if action is None]
    assert one.too_late == (sum(start + latency < 60 for start in starts[1:]) if latency >= USABLE else 0)
    assert sum(one.executed) == 60 - len(one.holds)


@pytest.mark.parametrize("latency", [0, 1, 3, 12])
def test_sync_executes_every_action_from_the_observed_step_on(latency):
    one = schedule("sync")
    actions, starts = drive(one, latency)
    cycle = ACTION_STEPS + latency
    assert starts == [0, *range(ACTION_STEPS, 60, cycle)]
    for step, action in enumerate(actions[ACTION_STEPS:]):
        number, place = divmod(step, cycle)
        index = OBS_STEPS - 1 + place - latency
        assert action == (None if place < latency else (starts[number + 1], index))
    assert one.too_late == 0


def test_inference_that_takes_longer_than_expected_uses_the_reserve():
    """3 steps instead of 1: no hold, the actions beyond Ta are executed, and none of the new chunk's past ones."""
    actions, starts = drive(schedule(), 3, expected=1)
    assert starts[:4] == [0, 3, 6, 9]  # the second chunk joins at 6, with 1 of its 4 steps left
    assert actions[:6] == [(0, index) for index in range(1, 7)] and actions[6] == (3, 4)
    assert None not in actions
    early, later = drive(schedule(), 1, expected=3)
    assert later[:4] == [0, 1, 2, 3] and early == expected_actions(later, 1, 60)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_hold_repeats_the_last_action(mode):
    one = schedule(mode)
    one.start(0)
    one.join(chunk_of(0), 0)
    last = USABLE - 1 if mode == "async" else ACTION_STEPS - 1
    done = [tuple(one.action(step)) for step in range(20)]
    assert done == [(0, 1 + min(step, last)) for step in range(20)]
    assert one.holds == list(range(last + 1, 20)) and one.executed == [last + 1]


def test_a_guess_is_shifted_by_the_steps_of_its_own_time_table():
    """Async: since its observation; sync: since it began to be executed; nothing after T steps."""
    for mode, elapsed in (("async", 5), ("sync", 2)):
        one = schedule(mode)
        assert one.start(0) == {}
        one.join(chunk_of(0), 0 if mode == "async" else 3)
        guess = one.start(5)
        assert guess["elapsed"] == elapsed and guess["previous"].shape == (1, HORIZON, 2)
        np.testing.assert_array_equal(guess["previous"][0], chunk_of(0))
    assert one.start(3 + HORIZON - 1)["elapsed"] == HORIZON - 1
    assert one.start(3 + HORIZON) == {}


def test_one_inference_at_a_time():
    for replan in ("needed", "always"):
        one = schedule(replan=replan)
        assert one.due(0, 1)
        one.start(0)
        assert not one.due(0, 1) and not one.due(99, 99)
