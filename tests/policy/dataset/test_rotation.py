"""Rotations against scipy: random ones, tiny angles, angles at pi, any leading shape, both directions."""

import numpy as np
import pytest

from policy.dataset.robomimic.rotation import (
    matrix_to_6d,
    matrix_to_rotvec,
    quat_to_matrix,
    rotvec_to_matrix,
    sixd_to_matrix,
)

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation  # comes with robosuite only

ANGLES = {
    "zero": [0.0],
    "tiny": [1e-300, 1e-160, 1e-12, 1e-9, 1e-8, 1e-7, 1e-5, 1e-3],
    "any": [0.1, 0.5, 1.0, np.pi / 2, 2.0, 2.5, 3.0],
    "near pi": [np.pi - 1e-3, np.pi - 1e-6, np.pi - 1e-8, np.pi - 1e-12],
    "pi": [np.pi],
}


def axes():
    """Coordinate axes, ones with a zero component and random ones, (n, 3)."""
    random = np.random.default_rng(0).normal(size=(40, 3))
    axes = np.concatenate([np.eye(3), -np.eye(3), [[1, 1, 0], [0, -1, 1], [1, 0, -1], [1, 1, 1]], random])
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def rotvecs(kind):
    return np.concatenate([axes() * angle for angle in ANGLES[kind]])


@pytest.mark.parametrize("kind", ANGLES)
def test_rotation_vectors_to_matrices(kind):
    expected = Rotation.from_rotvec(rotvecs(kind)).as_matrix()
    np.testing.assert_allclose(rotvec_to_matrix(rotvecs(kind)), expected, atol=1e-15)


@pytest.mark.parametrize("kind", ANGLES)
def test_matrices_to_rotation_vectors(kind):
    """Tiny angles to nearly all their digits; at pi both signs name the same rotation."""
    vectors = rotvecs(kind)
    back = matrix_to_rotvec(Rotation.from_rotvec(vectors).as_matrix())
    if kind == "pi":
        np.testing.assert_allclose(np.abs(np.sum(back * vectors, axis=1)), np.pi**2, rtol=1e-14)
    else:
        np.testing.assert_allclose(back, vectors, atol=4e-15, rtol=1e-10 if kind == "tiny" else 1e-14)
    assert (np.linalg.norm(back, axis=-1) <= np.pi + 1e-14).all()
    np.testing.assert_allclose(rotvec_to_matrix(back), rotvec_to_matrix(vectors), atol=3e-15)


def test_angles_beyond_pi_come_back_as_the_short_way():
    np.testing.assert_allclose(matrix_to_rotvec(rotvec_to_matrix([0, 0, 1.5 * np.pi])), [0, 0, -np.pi / 2], atol=1e-15)


@pytest.mark.parametrize("kind", ANGLES)
def test_quaternions_are_xyzw_and_need_no_unit_length(kind):
    rotations = Rotation.from_rotvec(rotvecs(kind))
    np.testing.assert_allclose(quat_to_matrix(-3 * rotations.as_quat()), rotations.as_matrix(), atol=2e-15)


def test_six_numbers_are_the_first_two_rows():
    """The example of a quarter turn about z: x goes to y, so that the rows are (0, -1, 0) and (1, 0, 0)."""
    np.testing.assert_allclose(matrix_to_6d(rotvec_to_matrix([0, 0, np.pi / 2])), [0, -1, 0, 1, 0, 0], atol=1e-15)
    matrices = Rotation.random(50, random_state=0).as_matrix()
    np.testing.assert_array_equal(matrix_to_6d(matrices), np.concatenate([matrices[:, 0], matrices[:, 1]], axis=1))
    np.testing.assert_allclose(sixd_to_matrix(matrix_to_6d(matrices)), matrices, atol=1e-15)


def test_any_two_vectors_become_a_rotation():
    """Gram-Schmidt: orthonormal, right-handed, the first row in place, the second in the plane of both."""
    sixd = np.random.default_rng(1).normal(size=(100, 6)) * 5
    matrices = sixd_to_matrix(sixd)
    np.testing.assert_allclose(matrices @ np.swapaxes(matrices, 1, 2), np.tile(np.eye(3), (100, 1, 1)), atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(matrices), 1)
    np.testing.assert_allclose(np.cross(matrices[:, 0], sixd[:, :3]), 0, atol=1e-14)
    np.testing.assert_allclose(np.sum(matrices[:, 2] * sixd[:, 3:], axis=1), 0, atol=1e-13)
    assert (np.sum(matrices[:, 0] * sixd[:, :3], axis=1) > 0).all()
    assert (np.sum(matrices[:, 1] * sixd[:, 3:], axis=1) > 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)])
def test_leading_shapes_and_types(shape):
    vectors = np.random.default_rng(2).normal(size=(*shape, 3)).astype(np.float32)
    matrices = rotvec_to_matrix(vectors)
    quats = np.random.default_rng(3).normal(size=(*shape, 4))
    assert matrices.shape == quat_to_matrix(quats).shape == (*shape, 3, 3)
    assert matrix_to_rotvec(matrices).shape == (*shape, 3)
    assert matrix_to_6d(matrices).shape == (*shape, 6)
    assert sixd_to_matrix(matrix_to_6d(matrices)).shape == (*shape, 3, 3)
    assert {f.dtype for f in (matrices, matrix_to_rotvec(matrices), matrix_to_6d(matrices.astype("f4")))} == {
        np.dtype("f8")
    }
    for index in np.ndindex(shape):
        np.testing.assert_allclose(rotvec_to_matrix(vectors[index]), matrices[index], atol=1e-15)


@pytest.mark.parametrize("sixd", [np.zeros(6), [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 2, 3, 2, 4, 6]])
def test_vectors_that_name_no_rotation_are_refused(sixd):
    with pytest.raises(ValueError, match="6-D rotation: got vectors that are zero or parallel"):
        sixd_to_matrix(sixd)
    with pytest.raises(ValueError, match="quaternion: got"):
        quat_to_matrix(np.zeros(4))
