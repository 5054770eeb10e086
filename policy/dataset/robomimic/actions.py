"""Absolute actions of robomimic's demonstrations: the goals of the arm's controller, without a simulator.

robosuite's OSC_POSE controller turns an action of 7 numbers (position 3, rotation vector 3, gripper 1) into a goal for
the grip site. robosuite 1.5.2: controllers/parts/arm/osc.py, set_goal; 1.4.1: controllers/osc.py, set_goal.
"""

import re
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import numpy as np

from policy.dataset.robomimic.rotation import matrix_to_6d, quat_to_matrix, rotvec_to_matrix

TOLERANCE = 1e-6  # by which a delta may leave the range that the controller clips it to
ORIENTATIONS = ("axisangle", "euler", "xyaxes", "zaxis")  # the ways of MuJoCo's XML beside quat
RECORDED = "--actions recorded keeps the actions as they are"


class Controller(NamedTuple):
    """How one arm reads its actions. frame: "world" or "base"; the four ranges: (6,) each."""

    absolute: bool
    frame: str
    input_min: np.ndarray
    input_max: np.ndarray
    output_min: np.ndarray
    output_max: np.ndarray
    keeps_rotation: bool  # robosuite <= 1.4: a rotation of exactly zero leaves the previous goal's


def num_arms(width, where):
    """Arms of an action of ``width`` numbers, 7 each."""
    if width not in (7, 14):
        raise ValueError(f"{where}: got {width} numbers, allowed: 7 an arm, 7 or 14; {RECORDED}")
    return width // 7


def read_controllers(env_args, arms, where):
    """The Controller of each of ``arms`` robots, from the description of the environment stored with the data.

    Raises ValueError for anything but OSC_POSE with fixed gains.
    """
    kwargs = env_args.get("env_kwargs")
    configs = kwargs.get("controller_configs") if isinstance(kwargs, dict) else None
    configs = configs if isinstance(configs, list) else [configs] * arms
    if len(configs) != arms or not all(isinstance(config, dict) for config in configs):
        raise ValueError(f"{where}: got controller_configs {configs}, allowed: one description, or one an arm")
    version = [int(n) for n in re.findall(r"\d+", str(env_args.get("env_version", "")))[:2]]
    try:
        return [_read_controller(config, version >= [1, 5], where) for config in configs]
    except (AttributeError, TypeError) as error:  # words or lists where a description belongs
        raise ValueError(f"{where}: got controller_configs {configs}, allowed: a description ({error})") from error


def _read_controller(config, is_new, where):
    parts = config.get("body_parts", config.get("body_parts_controller_configs"))  # the second: before 1.5.1
    arm = config
    if parts is not None:
        if config.get("type") != "BASIC":
            raise ValueError(f"{where}: got the controller {config.get('type')!r}, allowed: BASIC; {RECORDED}")
        is_new = True
        arm = parts.get("right", parts.get("arms", {}).get("right", {}))
    if arm.get("type") != "OSC_POSE":
        raise ValueError(f"{where}: got the controller {arm.get('type')!r}, allowed: OSC_POSE; {RECORDED}")
    if arm.get("impedance_mode", "fixed") != "fixed":
        raise ValueError(f"{where}: got impedance_mode {arm['impedance_mode']!r}, allowed: fixed; {RECORDED}")
    if is_new and not (config.get("control_delta", True) and arm.get("control_delta", True)):
        raise ValueError(
            f"{where}: got control_delta false, which robosuite 1.5 ignores, so that it is not known what the actions"
            f" are, allowed: input_type delta or absolute; {RECORDED}"
        )
    kind = arm.get("input_type", "delta") if is_new else ("delta" if arm.get("control_delta", True) else "absolute")
    frame = arm.get("input_ref_frame", "base") if is_new else "world"
    if kind not in ("delta", "absolute") or frame not in ("world", "base"):
        raise ValueError(
            f"{where}: got input_type {kind!r} and input_ref_frame {frame!r}, allowed: delta or absolute, world or base"
        )
    defaults = {"input_min": -1, "input_max": 1, "output_min": [-0.05] * 3 + [-0.5] * 3}
    defaults["output_max"] = [0.05] * 3 + [0.5] * 3
    ranges = {}
    for name, default in defaults.items():
        try:
            values = np.asarray(arm.get(name, default), dtype=np.float64)
        except ValueError:  # words, or lists of several lengths
            values = np.array([np.nan])
        if values.shape not in ((), (6,)) or not np.isfinite(values).all():
            raise ValueError(f"{where}: {name}: got {arm.get(name)}, allowed: one number or 6")
        ranges[name] = np.broadcast_to(values, 6)
    return Controller(absolute=kind == "absolute", frame=frame, keeps_rotation=not is_new, **ranges)


def absolute_actions(actions, controllers, obs, model_file, where, goals=None):
    """Actions (T, 10 an arm) in the world frame: goal position 3, 6-D rotation 6, gripper 1.

    actions: (T, 7 an arm); obs: {key: (T, ...)}; model_file: the episode's MuJoCo XML or None; goals: ``actions_abs``
    of the file or None. ``goals`` are left aside for a controller in the base's frame: files do not say whether its
    goals were written in that frame or in the world's.

    Raises ValueError that names ``where`` when something is missing or out of range.
    """
    arms = []
    for arm, controller in enumerate(controllers):
        own = slice(7 * arm, 7 * arm + 7)
        if goals is not None and controller.frame == "world":
            position, rotation = goals[:, own][:, :3], rotvec_to_matrix(goals[:, own][:, 3:6])
        else:
            position, rotation = _goals(actions[:, own], controller, obs, model_file, arm, where)
        gripper = actions[:, own][:, 6:]
        arms.append(np.concatenate([position, matrix_to_6d(rotation), gripper], axis=1))
    return np.concatenate(arms, axis=1)


def _goals(actions, controller, obs, model_file, arm, where):
    """Goal positions (T, 3) and rotations (T, 3, 3) of one arm's ``actions`` (T, 7)."""
    base_position, base = np.zeros(3), np.eye(3)
    if controller.frame == "base":
        model = _parse(model_file, f"{where}: the frame of robot{arm}'s base")
        base_position, base = _base_pose(model, arm, where)
    if controller.absolute:
        return base_position + actions[:, :3] @ base.T, base @ rotvec_to_matrix(actions[:, 3:6])
    deltas = _scaled(actions[:, :6], controller, where)
    position, rotation = _site_pose(obs, model_file, arm, where)
    goal_position = position + deltas[:, :3] @ base.T
    goal_rotation = base @ rotvec_to_matrix(deltas[:, 3:]) @ base.T @ rotation
    if controller.keeps_rotation:
        for step in np.flatnonzero((deltas[:, 3:] == 0).all(axis=1)):
            if step:  # at first the goal is the rotation the arm has, which is what a delta of zero gives
                goal_rotation[step] = goal_rotation[step - 1]
    return goal_position, goal_rotation


def _scaled(actions, controller, where):
    low, high = controller.input_min, controller.input_max
    outside = (actions < low - TOLERANCE) | (actions > high + TOLERANCE)
    if outside.any():
        frame, column = np.argwhere(outside)[0]
        raise ValueError(
            f"{where}: actions: got {actions[frame, column]:g} in frame {frame}, column {column}, allowed:"
            f" {low[column]:g} to {high[column]:g}, the deltas of its controller; {RECORDED}"
        )
    scale = np.abs(controller.output_max - controller.output_min) / np.abs(high - low)
    middle = (controller.output_max + controller.output_min) / 2
    return (np.clip(actions, low, high) - (high + low) / 2) * scale + middle


def _site_pose(obs, model_file, arm, where):
    """Position (T, 3), rotation (T, 3, 3) of the grip site: robosuite's eef_pos is the site's, eef_quat the hand's."""
    robot = f"robot{arm}"
    position, site, hand = (obs.get(f"{robot}_eef_{name}") for name in ("pos", "quat_site", "quat"))
    if position is None or (site is None and hand is None):
        raise ValueError(
            f"{where}: got no obs/{robot}_eef_pos and obs/{robot}_eef_quat, allowed: both, from which the goals of"
            f" delta actions follow; {RECORDED}"
        )
    if site is not None:
        return position, _rotations(site, f"{where}: obs/{robot}_eef_quat_site")
    model = _parse(model_file, f"{where}: the rotation between robot{arm}'s hand and grip site")
    hand_name = f"{robot}_right_hand"
    bodies = [body for body in model.iter("body") if body.get("name") == hand_name]
    chains = [chain for body in bodies for chain in _chains(body) if chain[-1].get("name", "").endswith("grip_site")]
    if len(chains) != 1:
        raise ValueError(f"{where}: model_file: got {len(chains)} grip sites in {hand_name}, allowed: 1")
    return position, _rotations(hand, f"{where}: obs/{robot}_eef_quat") @ _compose(chains[0], where)[1]


def _rotations(quats, name):
    try:
        return quat_to_matrix(quats)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _base_pose(model, arm, where):
    """Position (3,) and rotation (3, 3) in the world of the frame in which robosuite 1.5 takes the base to be."""
    name = f"robot{arm}_right_center"
    chains = [chain for chain in _chains(model.find("worldbody")) if chain[-1].get("name") == name]
    if len(chains) != 1:
        raise ValueError(f"{where}: model_file: got {len(chains)} sites {name}, allowed: 1")
    return _compose(chains[0], where)


def _parse(model_file, purpose):
    if model_file is None:
        raise ValueError(f"{purpose}: got no attribute model_file, allowed: the episode's MuJoCo XML; {RECORDED}")
    try:
        model = ElementTree.fromstring(model_file)
    except ElementTree.ParseError as error:
        raise ValueError(f"{purpose}: got a model_file that is no XML ({error}), allowed: MuJoCo's XML") from error
    if model.find("worldbody") is None:
        raise ValueError(f"{purpose}: got a model_file without worldbody, allowed: MuJoCo's XML")
    return model


def _chains(body):
    """Yield [body, ..., site] for every site below ``body``; ``body`` itself is left out."""
    for site in body.findall("site"):
        yield [site]
    for child in body.findall("body"):
        for chain in _chains(child):
            yield [child, *chain]


def _compose(chain, where):
    """Position (3,) and rotation (3, 3) of the chain's last element in the frame that the chain starts from."""
    position, rotation = np.zeros(3), np.eye(3)
    for element in chain:
        name = element.get("name")
        joints = [child.get("name") for child in element if child.tag in ("joint", "freejoint")]
        other = [key for key in ORIENTATIONS if key in element.attrib]
        if joints or other:
            raise ValueError(
                f"{where}: model_file: {name}: got {joints or other}, allowed: a body without joints whose rotation is"
                " a quat"
            )
        position = position + rotation @ np.array(element.get("pos", "0 0 0").split(), dtype=np.float64)
        w, x, y, z = np.array(element.get("quat", "1 0 0 0").split(), dtype=np.float64)  # MuJoCo: wxyz
        rotation = rotation @ quat_to_matrix([x, y, z, w])
    return position, rotation
