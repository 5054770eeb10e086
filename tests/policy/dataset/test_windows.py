"""Windows, splits and orders against slow references written from their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.dataset import FrameDataset, ReplayBuffer, WindowDataset, epoch_order, split_episodes, window_frames

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@st.composite
def window_cases(draw):
    """(episode lengths, chosen episodes or None, horizon, pad_before, pad_after)."""
    lengths = draw(LENGTHS)
    episodes = draw(st.none() | st.lists(st.integers(0, len(lengths) - 1), unique=True))
    horizon = draw(st.integers(1, 10))
    return lengths, episodes, horizon, draw(st.integers(0, horizon - 1)), draw(st.integers(0, horizon - 1))


def windows_of_lists(lengths, episodes, horizon, pad_before, pad_after):
    """Every run of ``horizon`` entries of the lists of frame numbers, each with its ends repeated."""
    runs, first = [], 0
    for number, length in enumerate(lengths):
        frames = list(range(first, first + length))
        first += length
        if episodes is not None and number not in episodes:
            continue
        padded = frames[:1] * pad_before + frames + frames[-1:] * pad_after
        runs += [(number, padded[i : i + horizon]) for i in range(len(padded) - horizon + 1)]
    order = {number: place for place, number in enumerate(episodes if episodes is not None else range(len(lengths)))}
    return [run for number, run in sorted(runs, key=lambda item: order[item[0]])]


@settings(deadline=None, max_examples=300)
@given(window_cases())
def test_windows_are_the_runs_of_the_padded_episodes(case):
    lengths, episodes, horizon, pad_before, pad_after = case
    expected = windows_of_lists(*case)
    ends = np.cumsum(lengths)
    options = {"horizon": horizon, "pad_before": pad_before, "pad_after": pad_after, "episodes": episodes}
    if not expected:
        chosen = [lengths[i] for i in (range(len(lengths)) if episodes is None else episodes)]
        allowed = max(chosen, default=0) + pad_before + pad_after
        with pytest.raises(ValueError, match=f"horizon: got {horizon}, .*{allowed}"):
            window_frames(ends, **options)
        return
    windows = window_frames(ends, **options)
    assert windows.tolist() == expected
    episode = np.searchsorted(ends, windows, side="right")
    assert (episode == episode[:, :1]).all()  # none crosses the edge of an episode


def test_a_horizon_that_fits_one_episode_leaves_the_shorter_ones_out():
    windows = window_frames(np.array([3, 13, 16]), horizon=10, pad_before=0, pad_after=0)
    assert windows.tolist() == [list(range(3, 13))]
    with pytest.raises(ValueError, match="horizon"):
        window_frames(np.array([3, 13, 16]), horizon=11, pad_before=0, pad_after=0)


# The split of the episodes -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    num_episodes=st.integers(2, 60),
    val_ratio=st.floats(0, 0.5),
    seed=st.integers(0, 2**31),
    max_train=st.none() | st.integers(1, 70),
)
def test_split_is_disjoint_deterministic_and_its_held_out_part_does_not_depend_on_the_cap(
    num_episodes, val_ratio, seed, max_train
):
    train, val = split_episodes(num_episodes, val_ratio=val_ratio, seed=seed, max_train=max_train)
    again = split_episodes(num_episodes, val_ratio=val_ratio, seed=seed, max_train=max_train)
    all_train, same_val = split_episodes(num_episodes, val_ratio=val_ratio, seed=seed)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(val, again[1])
    np.testing.assert_array_equal(val, same_val)
    assert sorted([*all_train, *val]) == list(range(num_episodes))
    assert set(train) <= set(all_train) and len(train) == min(len(all_train), max_train or num_episodes)
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    assert len(val) == 0 if val_ratio == 0 else abs(len(val) - max(val_ratio * num_episodes, 1)) <= 0.5


def test_split_depends_on_the_seed():
    splits = {tuple(split_episodes(100, val_ratio=0.1, seed=seed)[1]) for seed in range(20)}
    assert len(splits) == 20


@settings(deadline=None)
@given(lengths=st.lists(st.integers(4, 9), min_size=3, max_size=8), seed=st.integers(0, 100))
def test_no_frame_is_in_training_and_held_out_windows(lengths, seed):
    frames = np.arange(sum(lengths), dtype=np.float32)[:, None]
    buffer = ReplayBuffer({"action": frames, "agent_pos": frames}, np.cumsum(lengths))
    parts = [
        WindowDataset(buffer, obs_keys=["agent_pos"], horizon=6, obs_steps=2, pad_after=3, episodes=episodes)
        for episodes in split_episodes(len(lengths), val_ratio=0.3, seed=seed)
    ]
    seen = []
    for part in parts:
        batch = part.batch(np.arange(len(part)))
        seen.append({*batch["action"].flatten(), *batch["obs"]["agent_pos"].flatten(), *batch["frame_id"]})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


# The order of an epoch -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    num_windows=st.integers(1, 200), group=st.integers(1, 20), seed=st.integers(0, 2**31), epoch=st.integers(0, 5000)
)
def test_epoch_order_is_a_permutation_in_runs_of_group_windows(num_windows, group, seed, epoch):
    order = epoch_order(num_windows, seed=seed, epoch=epoch, group=group)
    assert sorted(order) == list(range(num_windows))
    np.testing.assert_array_equal(order, epoch_order(num_windows, seed=seed, epoch=epoch, group=group))
    breaks = np.flatnonzero(np.diff(order) != 1) + 1
    runs = np.split(order, breaks)
    assert len(runs) <= num_windows // group + 2
    if group > 1:  # blocks start at one shift modulo group, or two of them happen to stand in order
        assert len({run[0] % group for run in runs if run[0] > 0}) <= 1


@pytest.mark.parametrize("group", [1, 8])
def test_epoch_order_depends_on_seed_and_epoch(group):
    orders = {tuple(epoch_order(100, seed=seed, epoch=epoch, group=group)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_groups_are_cut_elsewhere_in_other_epochs():
    """So that a window has other neighbours: over 40 epochs, every cut modulo the group of four occurs."""
    cuts = set()
    for epoch in range(40):
        order = epoch_order(100, seed=0, epoch=epoch, group=4)
        cuts |= {int(b) % 4 for a, b in zip(order, order[1:], strict=False) if b != a + 1 and b > 0}
    assert cuts == {0, 1, 2, 3}


def test_every_position_of_an_epoch_gets_every_window_equally_often():
    """Chi-square of window at first position over 4000 epochs: 19 degrees of freedom, 99.9 % quantile 43.8."""
    counts = np.bincount([epoch_order(20, seed=3, epoch=epoch)[0] for epoch in range(4000)], minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 43.8


# Batches -------------------------------------------------------------------------------------------------------------


class Recording:
    """An array that keeps what it was indexed with."""

    def __init__(self, array):
        self.array, self.read = array, []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        self.read.append(np.asarray(index))
        return self.array[index]


def recorded_buffer(lengths=(9, 14, 11)):
    """Random images, positions and actions that record what is read."""
    rng = np.random.default_rng(1)
    frames = sum(lengths)
    arrays = {
        "image": rng.integers(0, 256, (frames, 6, 5, 3), dtype=np.uint8),
        "agent_pos": rng.normal(size=(frames, 2)).astype(np.float32),
        "action": rng.normal(size=(frames, 4)).astype(np.float32),
    }
    return ReplayBuffer({key: Recording(array) for key, array in arrays.items()}, np.cumsum(lengths)), arrays


@pytest.mark.parametrize("obs_steps", [1, 2, 3])
@pytest.mark.parametrize("indices", [[5], [0, 1, 2, 3], [30, 2, 2, 17], list(range(20))])
def test_batch_equals_naive_indexing_and_reads_each_observed_frame_once(obs_steps, indices):
    buffer, arrays = recorded_buffer()
    data = WindowDataset(buffer, obs_keys=["image", "agent_pos"], horizon=8, obs_steps=obs_steps, pad_after=7)
    windows = window_frames(buffer.episode_ends, horizon=8, pad_before=obs_steps - 1, pad_after=7)
    assert len(data) == len(windows) == 34 + 3 * (obs_steps - 1)
    batch = data.batch(np.array(indices))

    observed = sorted({frame for i in indices for frame in windows[i][:obs_steps]})
    for key in ("image", "agent_pos"):
        (read,) = buffer.arrays[key].read
        assert read.tolist() == observed  # the To frames of each window and no other, none twice
    assert batch["frame_id"].tolist() == observed
    assert batch["frame"].shape == (len(indices), obs_steps)
    for row, i in enumerate(indices):
        for step in range(obs_steps):
            frame, position = windows[i][step], batch["frame"][row, step]
            np.testing.assert_array_equal(batch["obs"]["image"][position], arrays["image"][frame].transpose(2, 0, 1))
            np.testing.assert_array_equal(batch["obs"]["agent_pos"][position], arrays["agent_pos"][frame])
        for step in range(8):
            np.testing.assert_array_equal(batch["action"][row, step], arrays["action"][windows[i][step]])
    assert batch["obs"]["image"].dtype == np.uint8 and set(batch["obs"]) == {"image", "agent_pos"}


@pytest.mark.parametrize(("obs_steps", "pad_after", "shortest"), [(2, 7, 8), (2, 0, 15), (1, 0, 16), (1, 3, 13)])
def test_episodes_too_short_for_a_window_are_named(obs_steps, pad_after, shortest):
    """Every other episode has windows, also one of just enough frames."""
    lengths = np.array([shortest - 1, shortest, 40, 3, shortest - 1, 20])
    buffer = ReplayBuffer({"action": np.zeros((lengths.sum(), 2), np.float32)}, np.cumsum(lengths))
    data = WindowDataset(buffer, obs_keys=[], horizon=16, obs_steps=obs_steps, pad_after=pad_after)
    assert data.unused.tolist() == [0, 3, 4] and data.shortest == shortest
    used = np.searchsorted(buffer.episode_ends, data.windows, side="right")
    assert np.unique(used).tolist() == [1, 2, 5]
    data.use_episodes([0, 2])
    assert data.unused.tolist() == [0]


def test_only_the_observed_keys_are_read():
    buffer, _ = recorded_buffer()
    data = WindowDataset(buffer, obs_keys=["agent_pos"], horizon=8, obs_steps=2, pad_after=7)
    assert set(data.batch(np.arange(4))["obs"]) == {"agent_pos"}
    assert buffer.arrays["image"].read == []


def test_frame_batches_equal_naive_indexing():
    buffer, arrays = recorded_buffer()
    data = FrameDataset(buffer, obs_keys=["image"], target_key="action", frames=[3, 20, 33])
    batch = data.batch(np.array([2, 0]))
    assert len(data) == 3 and set(batch) == {"obs", "action"} and set(batch["obs"]) == {"image"}
    np.testing.assert_array_equal(batch["obs"]["image"], arrays["image"][[33, 3]].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(batch["action"], arrays["action"][[33, 3]])


# Wrong options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(0, 0, 0), (4, -1, 0), (4, 4, 0), (4, 0, -1), (4, 0, 4)])
def test_window_options_are_checked(options):
    horizon, pad_before, pad_after = options
    with pytest.raises(ValueError, match="horizon, pad_before, pad_after"):
        window_frames(np.array([20]), horizon=horizon, pad_before=pad_before, pad_after=pad_after)
    for obs_steps in (0, 9):
        with pytest.raises(ValueError, match="obs_steps"):
            WindowDataset(recorded_buffer()[0], obs_keys=["image"], horizon=8, obs_steps=obs_steps, pad_after=0)


@pytest.mark.parametrize(
    ("key", "options"),
    [("val_ratio", {"val_ratio": -0.1}), ("val_ratio", {"val_ratio": 1}), ("val_ratio", {"val_ratio": 0.9}),
     ("max_train_episodes", {"max_train": 0}), ("seed", {"seed": -1})],
)  # fmt: skip
def test_split_options_are_checked(key, options):
    with pytest.raises(ValueError, match=key):
        split_episodes(3, **{"val_ratio": 0.1, "seed": 0, **options})
    with pytest.raises(ValueError, match="windows_per_group"):
        epoch_order(10, seed=0, epoch=0, group=0)
