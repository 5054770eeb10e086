"""Rotations as arrays, float64: rotation vectors (..., 3), quaternions xyzw (..., 4), matrices and 6 numbers.

The 6 numbers are those of Zhou et al. (arXiv 1812.07035) with the first two ROWS of the matrix, as in pytorch3d's
matrix_to_rotation_6d, on which Diffusion Policy's data and checkpoints rest. The paper takes the first two columns.
"""

import numpy as np


def matrix_to_6d(matrix):
    """First two rows (..., 6) of rotation matrices (..., 3, 3)."""
    matrix = np.asarray(matrix, dtype=np.float64)
    return matrix[..., :2, :].reshape(*matrix.shape[:-2], 6)


def sixd_to_matrix(sixd):
    """Rotation matrices (..., 3, 3) of any two row vectors (..., 6), made orthonormal by Gram-Schmidt.

    Raises ValueError where a vector is zero or both are parallel.
    """
    first, second = np.split(np.asarray(sixd, dtype=np.float64), 2, axis=-1)
    first = _unit(first, "6-D rotation")
    second = _unit(second, "6-D rotation")
    second = _unit(second - (first * second).sum(-1, keepdims=True) * first, "6-D rotation")
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def rotvec_to_matrix(rotvec):
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3), axis times angle in rad (Rodrigues' formula)."""
    rotvec = np.asarray(rotvec, dtype=np.float64)
    x, y, z = np.moveaxis(rotvec, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*rotvec.shape, 3)
    angle = np.linalg.norm(rotvec, axis=-1)[..., None, None]
    sin = np.sinc(angle / np.pi)  # sin(angle) / angle, exact at 0 as well
    half = np.sinc(angle / (2 * np.pi))
    return np.eye(3) + sin * cross + 0.5 * half**2 * (cross @ cross)


def matrix_to_rotvec(matrix):
    """Rotation vectors (..., 3) with angles in [0, pi] of rotation matrices (..., 3, 3)."""
    m = np.asarray(matrix, dtype=np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 2, 0] + m[..., 0, 2], m[..., 2, 1] + m[..., 1, 2]
    xw, yw, zw = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    diagonal = np.stack([1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz], axis=-1)
    outer = np.stack([diagonal[..., 0], xy, xz, xw, xy, diagonal[..., 1], yz, yw], axis=-1)
    outer = np.concatenate([outer, np.stack([xz, yz, diagonal[..., 2], zw, xw, yw, zw, diagonal[..., 3]], -1)], -1)
    outer = outer.reshape(*m.shape[:-2], 4, 4)  # 4 times the quaternion's outer product with itself
    # The row of the largest component loses no digits, whatever the angle; near pi the others do.
    row = np.argmax(diagonal, axis=-1)[..., None, None]
    quat = np.take_along_axis(outer, row, axis=-2)[..., 0, :]
    quat = quat * np.where(quat[..., 3:] < 0, -1.0, 1.0)
    norm = np.linalg.norm(quat[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(norm, quat[..., 3:])
    return quat[..., :3] * np.divide(angle, norm, out=np.zeros_like(norm), where=norm > 0)


def quat_to_matrix(quat):
    """Rotation matrices (..., 3, 3) of quaternions xyzw (..., 4) of any length but 0, which raises ValueError."""
    x, y, z, w = np.moveaxis(_unit(np.asarray(quat, dtype=np.float64), "quaternion"), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _unit(vectors, name):
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if (norm < 1e-12).any():
        raise ValueError(f"{name}: got vectors that are zero or parallel, allowed: ones that name a rotation")
    return vectors / norm
