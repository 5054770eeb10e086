"""Plane geometry of the Push-T block in numba: coverage, goal distance, approach paths and agent motion.

Poses are (x, y, angle) of the block body's origin in px, px, rad; y points down as in gym-pusht. The block
frame moves and turns with the block. Constants of the T, the agent and its controller are those of gym-pusht
0.1.8 (gym_pusht/envs/pusht.py: add_tee, add_circle, step).
"""

import math

import numpy as np
from numba import njit

from envs.shared.numba_cache import keep

ARENA = 512.0
AGENT_RADIUS = 15.0
SUBSTEPS = 10
SUBSTEP_SECONDS = 0.01
POSITION_GAIN, VELOCITY_GAIN = 100.0, 20.0
GOAL_X, GOAL_Y, GOAL_ANGLE = 256.0, 256.0, math.pi / 4

# Outline of the T in the block frame (px), in the order that makes (dy, -dx) of an edge its outward normal.
CORNERS = np.array(
    [[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], dtype=np.float64
)
BLOCK_AREA = 6300.0
# The T as two rectangles x0, y0, x1, y1: bar and stem. They share an edge and do not overlap.
RECTANGLES = np.array([[-60, 0, 60, 30], [-15, 30, 15, 120]], dtype=np.float64)
# Part of each edge that a disc of the agent's radius can touch: next to the two inner corners it cannot.
REACHABLE = np.array(
    [
        [[-60, 0], [60, 0]],
        [[60, 0], [60, 30]],
        [[60, 30], [30, 30]],
        [[15, 45], [15, 120]],
        [[15, 120], [-15, 120]],
        [[-15, 120], [-15, 45]],
        [[-30, 30], [-60, 30]],
        [[-60, 30], [-60, 0]],
    ],
    dtype=np.float64,
)
REACHABLE_LENGTH = np.abs(REACHABLE[:, 1] - REACHABLE[:, 0]).sum(axis=1)

MARGIN = 8.0  # px between agent and block on the way to a push
GROWTH = AGENT_RADIUS + MARGIN
# The outline grown by GROWTH with mitred corners, and the same region as two overlapping rectangles.
GROWN_CORNERS = np.array(
    [
        [-60 - GROWTH, -GROWTH],
        [60 + GROWTH, -GROWTH],
        [60 + GROWTH, 30 + GROWTH],
        [15 + GROWTH, 30 + GROWTH],
        [15 + GROWTH, 120 + GROWTH],
        [-15 - GROWTH, 120 + GROWTH],
        [-15 - GROWTH, 30 + GROWTH],
        [-60 - GROWTH, 30 + GROWTH],
    ]
)
GROWN_RECTANGLES = np.array(
    [[-60 - GROWTH, -GROWTH, 60 + GROWTH, 30 + GROWTH], [-15 - GROWTH, -GROWTH, 15 + GROWTH, 120 + GROWTH]]
)
BORDER = 8.0  # px: approach paths stay inside [BORDER, ARENA - BORDER]
TARGET_GRID = 64.0  # targets are multiples of 1/64 px: exact in float32, and they compress well
SKIN = 1e-6  # px: points this close to the grown outline count as outside of it


def compiled(function):
    """``function`` by numba, its code kept on disk where that is possible."""
    return keep(njit(function))


@compiled
def to_world(x, y, pose):
    """Point (x, y) of the block frame in the world, px."""
    c, s = math.cos(pose[2]), math.sin(pose[2])
    return pose[0] + c * x - s * y, pose[1] + s * x + c * y


@compiled
def to_block(x, y, pose):
    """World point (x, y) in the block frame, px."""
    c, s = math.cos(pose[2]), math.sin(pose[2])
    dx, dy = x - pose[0], y - pose[1]
    return c * dx + s * dy, c * dy - s * dx


@compiled
def goal_distance(x, y, angle):
    """Mean distance (px) of the 8 corners of the T at this pose to their places at the goal pose."""
    c, s = math.cos(angle), math.sin(angle)
    goal_c, goal_s = math.cos(GOAL_ANGLE), math.sin(GOAL_ANGLE)
    total = 0.0
    for i in range(8):
        u, v = CORNERS[i, 0], CORNERS[i, 1]
        dx = x - GOAL_X + (c - goal_c) * u - (s - goal_s) * v
        dy = y - GOAL_Y + (s - goal_s) * u + (c - goal_c) * v
        total += math.sqrt(dx * dx + dy * dy)
    return total / 8


@compiled
def _clip(polygon, count, normal_x, normal_y, limit):
    """Part of a convex polygon with normal . p <= limit: vertices (12, 2) and their count."""
    out = np.empty((12, 2))
    kept = 0
    for i in range(count):
        j = (i + 1) % count
        before = limit - normal_x * polygon[i, 0] - normal_y * polygon[i, 1]
        after = limit - normal_x * polygon[j, 0] - normal_y * polygon[j, 1]
        if before >= 0:
            out[kept] = polygon[i]
            kept += 1
        if (before > 0 > after) or (before < 0 < after):
            t = before / (before - after)
            out[kept] = polygon[i] + t * (polygon[j] - polygon[i])
            kept += 1
    return out, kept


@compiled
def coverage(x, y, angle):
    """Share in [0, 1] of the goal area that the T covers at this pose, as gym-pusht computes with shapely."""
    goal = (GOAL_X, GOAL_Y, GOAL_ANGLE)
    area = 0.0
    for mine in range(2):
        x0, y0, x1, y1 = RECTANGLES[mine]
        for other in range(2):
            polygon = np.empty((12, 2))
            corners = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
            for i in range(4):
                world_x, world_y = to_world(corners[i][0], corners[i][1], (x, y, angle))
                polygon[i] = to_block(world_x, world_y, goal)
            left, top, right, bottom = RECTANGLES[other]
            polygon, count = _clip(polygon, 4, 1.0, 0.0, right)
            polygon, count = _clip(polygon, count, -1.0, 0.0, -left)
            polygon, count = _clip(polygon, count, 0.0, 1.0, bottom)
            polygon, count = _clip(polygon, count, 0.0, -1.0, -top)
            twice = 0.0
            for i in range(count):
                j = (i + 1) % count
                twice += polygon[i, 0] * polygon[j, 1] - polygon[j, 0] * polygon[i, 1]
            area += abs(twice) / 2
    return area / BLOCK_AREA


@compiled
def clearance(x, y, pose):
    """Distance (px) of a world point to the T at `pose`; 0 inside."""
    u, v = to_block(x, y, pose)
    best = np.inf
    for i in range(2):
        dx = max(RECTANGLES[i, 0] - u, 0.0, u - RECTANGLES[i, 2])
        dy = max(RECTANGLES[i, 1] - v, 0.0, v - RECTANGLES[i, 3])
        best = min(best, math.sqrt(dx * dx + dy * dy))
    return best


@compiled
def agent_motion(targets, start, positions, velocities):
    """Motion of the agent under gym-pusht's PD control; the block does not act back on it.

    targets: (n, 2) px. start: x, y (px), vx, vy (px/s). Fills positions[:10 n + 1] (px, before each substep
    and at the end) and velocities[:10 n] (px/s, during each substep).
    """
    x, y, vx, vy = start[0], start[1], start[2], start[3]
    positions[0, 0], positions[0, 1] = x, y
    for i in range(len(targets) * SUBSTEPS):
        step = i // SUBSTEPS
        vx += (POSITION_GAIN * (targets[step, 0] - x) + VELOCITY_GAIN * (0 - vx)) * SUBSTEP_SECONDS
        vy += (POSITION_GAIN * (targets[step, 1] - y) + VELOCITY_GAIN * (0 - vy)) * SUBSTEP_SECONDS
        x += vx * SUBSTEP_SECONDS
        y += vy * SUBSTEP_SECONDS
        velocities[i, 0], velocities[i, 1] = vx, vy
        positions[i + 1, 0], positions[i + 1, 1] = x, y


@compiled
def next_contact(positions, step, steps, x, y, angle):
    """First control step in [step, steps) in which the agent comes within 1 px of the T; `steps` if none."""
    for k in range(step, steps):
        for i in range(k * SUBSTEPS, (k + 1) * SUBSTEPS + 1):
            if clearance(positions[i, 0], positions[i, 1], (x, y, angle)) < AGENT_RADIUS + 1.0:
                return k
    return steps


@compiled
def _inside_grown(u, v):
    for i in range(2):
        x0, y0, x1, y1 = GROWN_RECTANGLES[i]
        if x0 + SKIN < u < x1 - SKIN and y0 + SKIN < v < y1 - SKIN:
            return True
    return False


@compiled
def _in_arena(u, v, pose):
    x, y = to_world(u, v, pose)
    return BORDER <= x <= ARENA - BORDER and BORDER <= y <= ARENA - BORDER


@compiled
def _free_segment(ax, ay, bx, by):
    """Whether the segment a-b of the block frame stays out of the interior of the grown outline."""
    for i in range(2):
        low, high = 0.0, 1.0
        for axis in range(2):
            origin = ax if axis == 0 else ay
            delta = bx - ax if axis == 0 else by - ay
            near = GROWN_RECTANGLES[i, axis] + SKIN
            far = GROWN_RECTANGLES[i, axis + 2] - SKIN
            if abs(delta) < 1e-12:
                if origin <= near or origin >= far:
                    high = -1.0
            else:
                t0, t1 = (near - origin) / delta, (far - origin) / delta
                low, high = max(low, min(t0, t1)), min(high, max(t0, t1))
        if high > low:
            return False
    return True


@compiled
def _leave_grown(u, v, pose):
    """Nearest point to (u, v) of the grown outline and in the arena; (u, v) itself when already outside."""
    if not _inside_grown(u, v):
        return u, v
    best, best_u, best_v = np.inf, u, v
    for i in range(8):
        ax, ay = GROWN_CORNERS[i]
        bx, by = GROWN_CORNERS[(i + 1) % 8]
        near_u = min(max(u, min(ax, bx)), max(ax, bx))
        near_v = min(max(v, min(ay, by)), max(ay, by))
        distance = math.hypot(near_u - u, near_v - v)
        if distance < best and _in_arena(near_u, near_v, pose):
            best, best_u, best_v = distance, near_u, near_v
    return best_u, best_v


@compiled
def _corner_paths(u, v, pose):
    """Shortest distances (8,) from (u, v) to the grown corners and the corner (8,) before each, or -1."""
    distances, previous = np.full(8, np.inf), np.full(8, -1)
    usable, done = np.zeros(8, dtype=np.bool_), np.zeros(8, dtype=np.bool_)
    for i in range(8):
        usable[i] = _in_arena(GROWN_CORNERS[i, 0], GROWN_CORNERS[i, 1], pose)
        if usable[i] and _free_segment(u, v, GROWN_CORNERS[i, 0], GROWN_CORNERS[i, 1]):
            distances[i] = math.hypot(GROWN_CORNERS[i, 0] - u, GROWN_CORNERS[i, 1] - v)
    for _ in range(8):  # Dijkstra
        here = -1
        for i in range(8):
            if not done[i] and distances[i] < np.inf and (here < 0 or distances[i] < distances[here]):
                here = i
        if here < 0:
            break
        done[here] = True
        ax, ay = GROWN_CORNERS[here]
        for i in range(8):
            bx, by = GROWN_CORNERS[i]
            length = distances[here] + math.hypot(bx - ax, by - ay)
            if usable[i] and length < distances[i] and _free_segment(ax, ay, bx, by):
                distances[i], previous[i] = length, here
    return distances, previous


@compiled
def _push_start(primitive, pose):
    """Point (block frame, px) where the push begins and its heading (block frame, rad)."""
    edge = int(primitive[0])
    ax, ay = REACHABLE[edge, 0]
    bx, by = REACHABLE[edge, 1]
    length = REACHABLE_LENGTH[edge]
    normal_x, normal_y = (by - ay) / length, (ax - bx) / length
    heading = math.atan2(-normal_y, -normal_x) + primitive[2]
    back = MARGIN / math.cos(primitive[2])
    u = ax + primitive[1] * (bx - ax) + AGENT_RADIUS * normal_x - back * math.cos(heading)
    v = ay + primitive[1] * (by - ay) + AGENT_RADIUS * normal_y - back * math.sin(heading)
    u, v = _leave_grown(u, v, pose)
    return u, v, heading


@compiled
def _approach(start, exit_u, exit_v, goal_u, goal_v, distances, previous):
    """Polyline start, exit point, corners, goal: points (12, 2) and their count, 0 if unreachable."""
    points = np.empty((12, 2))
    points[0] = start
    points[1, 0], points[1, 1] = exit_u, exit_v
    count, last = 2, -1
    if not _free_segment(exit_u, exit_v, goal_u, goal_v):
        best = np.inf
        for i in range(8):
            length = distances[i] + math.hypot(GROWN_CORNERS[i, 0] - goal_u, GROWN_CORNERS[i, 1] - goal_v)
            if length < best and _free_segment(GROWN_CORNERS[i, 0], GROWN_CORNERS[i, 1], goal_u, goal_v):
                best, last = length, i
        if last < 0:
            return points, 0
        corners = 0
        node = last
        while node >= 0:
            corners += 1
            node = previous[node]
        node = last
        for i in range(corners):
            points[count + corners - 1 - i] = GROWN_CORNERS[node]
            node = previous[node]
        count += corners
    points[count, 0], points[count, 1] = goal_u, goal_v
    return points, count + 1


@compiled
def _path_point(points, count, s, heading, curvature):
    """Point at arc length s (px) of the polyline, or of the circular arc that goes on from its end."""
    for i in range(count - 1):
        length = math.hypot(points[i + 1, 0] - points[i, 0], points[i + 1, 1] - points[i, 1])
        if s <= length and length > 0:
            t = s / length
            u = points[i, 0] + t * (points[i + 1, 0] - points[i, 0])
            v = points[i, 1] + t * (points[i + 1, 1] - points[i, 1])
            return u, v
        s -= length
    u, v = points[count - 1]
    if abs(curvature) < 1e-9:
        return u + s * math.cos(heading), v + s * math.sin(heading)
    turned = heading + curvature * s
    u += (math.sin(turned) - math.sin(heading)) / curvature
    v += (math.cos(heading) - math.cos(turned)) / curvature
    return u, v


@compiled
def _write_targets(points, count, heading, primitive, pose, limits, targets):
    """Fills `targets` along approach and push; returns the control steps of the approach and in all.

    The speed (px/step) rises by at most a_max a step and falls in time to enter the push at the push speed.
    """
    max_speed, max_acceleration, push_steps = limits
    push_speed = primitive[4]
    length = 0.0
    for i in range(count - 1):
        length += math.hypot(points[i + 1, 0] - points[i, 0], points[i + 1, 1] - points[i, 1])
    s = speed = 0.0
    steps = approach_steps = 0
    while steps < len(targets) and steps - approach_steps < push_steps:
        if s < length:
            half = max_acceleration / 2
            brake = math.sqrt(half * half + push_speed**2 + 2 * max_acceleration * (length - s)) - half
            speed = min(speed + max_acceleration, max_speed, max(brake, push_speed))
        else:
            speed = min(speed + max_acceleration, max(speed - max_acceleration, push_speed))
        s += speed
        u, v = _path_point(points, count, s, heading, primitive[3])
        x, y = to_world(u, v, pose)
        if s > length and not (0 <= x <= ARENA and 0 <= y <= ARENA):
            break
        targets[steps, 0] = round(min(max(x, 0.0), ARENA) * TARGET_GRID) / TARGET_GRID
        targets[steps, 1] = round(min(max(y, 0.0), ARENA) * TARGET_GRID) / TARGET_GRID
        steps += 1
        if s < length:
            approach_steps = steps
    return approach_steps, steps


@compiled
def primitive_targets(primitives, state, limits, max_steps):
    """Targets of contact primitives from one state.

    primitives: (N, 5) edge, position along its reachable part in [0, 1], direction from the inward normal
    (rad), curvature (rad/px), push speed (px/step). state: (12,), see pusht_physics. limits: v_max (px/step),
    a_max (px/step^2), push steps. Returns targets (N, max_steps, 2) px, approach steps (N,) and steps (N,),
    the latter 0 for a primitive that cannot be reached.
    """
    count = len(primitives)
    targets = np.empty((count, max_steps, 2))
    approach_steps, steps = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    pose = (state[4], state[5], state[6])
    start = np.array(to_block(state[10], state[11], pose))
    exit_u, exit_v = start[0], start[1]
    agent_u, agent_v = to_block(state[0], state[1], pose)
    if _inside_grown(agent_u, agent_v) or _inside_grown(exit_u, exit_v):
        exit_u, exit_v = _leave_grown(agent_u, agent_v, pose)
    distances, previous = _corner_paths(exit_u, exit_v, pose)
    for i in range(count):
        u, v, heading = _push_start(primitives[i], pose)
        if not _in_arena(u, v, pose) or _inside_grown(u, v):
            continue
        points, number = _approach(start, exit_u, exit_v, u, v, distances, previous)
        if number == 0:
            continue
        approach_steps[i], steps[i] = _write_targets(points, number, heading, primitives[i], pose, limits, targets[i])
        if steps[i] - approach_steps[i] < 1:
            steps[i] = 0
    return targets, approach_steps, steps
