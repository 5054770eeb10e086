"""Expert episodes that start where a Push-T policy went: the corrections of DAgger (arXiv 1011.0686, section 3.1).

There the expert labels every visited state with its action. Here it plans a whole episode from some of them, because
its plans lead to success and a single action of it does not. ``eval.rollout.rollout(..., states=True)`` records them.

The result is a zarr as ``envs.pusht.scenes.ensure_images`` writes it (data/state, data/action, data/img,
meta/episode_ends) with the attributes arguments, unsolved (how many starts were left out) and origins (rollout seed and
step that each episode starts from).
"""

import json
import os
from pathlib import Path

import numpy as np
import zarr

from envs.pusht.geometry import coverage
from envs.pusht.planner import PX_PER_RAD, SETTINGS, plan_episode
from envs.pusht.scenes import ensure_images
from envs.shared.checks import check_choice, check_output, check_positive, check_seed
from envs.shared.item_set import NOTE, make_set, partial_of
from envs.shared.zarr_files import read_attributes, write_zarr

VERSION = 1  # raise it when the same arguments make other episodes
STREAM = 0x64616767  # first word of every seed sequence: keeps ours apart from that of the demonstrations
SOLVED = 0.95  # coverage from which gym-pusht calls it a success
SPREAD_PX = 16.0  # starts of one episode differ at least by this, with PX_PER_RAD for angles
SHARE = 8  # starts that every failed episode gives before a successful one gives any


def choose_starts(visited, count, seed):
    """States from which the expert should show the way: starts (n, 5) and origins (n, 2), n <= count.

    visited: [{"seed", "score", "success", "states" (steps + 1, 5)}]; origins: rollout seed and step of each start.
    Failed episodes come before successful ones, the lowest score first, then the longest; among them they take turns.
    Each gives its states in random order, late ones sooner, but none that is solved or close to one given before.
    Raises ValueError for states that are not (steps + 1, 5) finite numbers, and when there is nothing to choose.
    """
    ranked = []
    for number, episode in enumerate(visited):
        states = _checked(episode)
        steps = _distinct_steps(states, np.random.default_rng([STREAM, seed, number]))
        for turn, step in enumerate(steps):
            rank = (turn // SHARE, episode["success"], turn, episode["score"], -len(states), number)
            ranked.append((rank, states[step], (episode["seed"], step)))
    if not ranked:
        raise ValueError(f"visited: got {len(visited)} episodes, allowed: at least one with a state that is not solved")
    ranked.sort(key=lambda choice: choice[0])
    _, starts, origins = zip(*ranked[:count], strict=True)
    return np.array(starts), np.array(origins)


def _checked(episode):
    """The states of a visited episode as float64."""
    states = np.asarray(episode["states"], np.float64)
    if states.shape != (len(states), 5) or not states.size or not np.isfinite(states).all():
        raise ValueError(
            f"visited: got states of shape {states.shape} or NaN from seed {episode['seed']}, allowed: (steps + 1, 5)"
            " finite numbers"
        )
    return states


def _distinct_steps(states, rng):
    """Steps of unsolved states (n, 5), SPREAD_PX apart, drawn with a chance in proportion to time."""
    places = np.column_stack([states[:, :4], PX_PER_RAD * np.unwrap(states[:, 4])])
    times = np.arange(1, len(states) + 1)
    steps = []
    for step in rng.choice(len(states), len(states), replace=False, p=times / times.sum()).tolist():
        apart = np.linalg.norm(places[steps] - places[step], axis=1) > SPREAD_PX
        if apart.all() and coverage(*states[step, 2:].tolist()) < SOLVED:
            steps.append(step)
    return steps


def make_corrections(*, visited, count, seed, output, image_size, processes, settings="smooth"):
    """Path of a zarr ``output`` with expert episodes from at most ``count`` of the ``visited`` states.

    visited and the choice: see ``choose_starts``. settings: of the planner; processes: that plan. The same call goes on
    with an interrupted set, and from the starts chosen then, whatever ``visited`` is now. Raises ValueError for wrong
    arguments, for a set of other ones at ``output``, and when the expert solves nothing.
    """
    output = Path(output)
    check_positive(count=count, image_size=image_size, processes=processes)
    check_seed(seed)
    check_choice("settings", settings, SETTINGS)
    check_output(output, ".zarr")
    chosen = _earlier_choice(output)
    if chosen is None:
        starts, origins = choose_starts(visited, count, seed)
        chosen = {"starts": starts.tolist(), "origins": origins.tolist()}
    arguments = {"version": VERSION, "count": count, "seed": seed, "image_size": image_size, "settings": settings}
    arguments |= chosen
    make_set(
        output,
        arguments,
        work=save_correction,
        jobs=[(start, seed, index, settings) for index, start in enumerate(chosen["starts"])],
        suffix=".npz",
        processes=processes,
        stored=_stored_arguments,
        finish=lambda place, paths: _finish(place, paths, arguments),
        description="expert corrections",
    )
    return output


def _stored_arguments(path):
    return read_attributes(path)["arguments"]


def _earlier_choice(output):
    """Starts and origins of the finished or unfinished set ``output``; None where there is no such set."""
    try:
        found = _stored_arguments(output) if output.exists() else json.loads((partial_of(output) / NOTE).read_text())
        return {name: found[name] for name in ("starts", "origins")}
    except (KeyError, TypeError, ValueError, OSError):  # something else may be there, which ``make_set`` reports
        return None


def save_correction(path, start, seed, index, settings):
    """Plans an episode from ``start`` and stores it at ``path``."""
    states, actions, solved = plan_episode(start, np.random.default_rng([STREAM, seed, index]), SETTINGS[settings])
    np.savez(path, state=states, action=actions, solved=solved)


def _finish(place, paths, arguments):
    """Writes the solved ones of the episodes at ``paths``, with images, as the zarr ``place``."""
    states, actions, origins = [], [], []
    for path, origin in zip(paths, arguments["origins"], strict=True):
        with np.load(path) as episode:
            if episode["solved"]:
                states.append(episode["state"])
                actions.append(episode["action"])
                origins.append(origin)
    if not states:
        raise ValueError(f"count: got {len(paths)} starts, but the expert solved none; allowed: another seed or output")
    ends = np.cumsum([len(part) for part in states])
    drawn = _draw(paths[0].parent, np.concatenate(states), np.concatenate(actions), ends, arguments["image_size"])
    unsolved = len(paths) - len(states)
    attributes = {"arguments": arguments, "unsolved": unsolved, "origins": origins}
    zarr.open_group(str(drawn), mode="r+").attrs.update(attributes)
    os.replace(drawn, place)
    print(f"{len(ends)} corrections, {unsolved} left out as unsolved, {ends[-1] / len(ends):.1f} steps on average")


def _draw(folder, states, actions, ends, image_size):
    """Path of a zarr in ``folder`` with the episodes and their images."""
    source = folder / "episodes.zarr"
    if not source.exists():  # else an interrupted run has written the same
        write_zarr(source, {"data/state": states, "data/action": actions, "meta/episode_ends": ends}, {})
    return ensure_images(source, cache_dir=folder, image_size=image_size)
