"""What the plan says of demonstrations."""

import pytest
import tiny

from eval.benchmark.demonstrations import describe_windows

TASK = {"data": "mine"}


@pytest.mark.parametrize(("lengths", "words"), [((9, 12, 10), None), ((12, 3, 4, 10, 2, 1), "4 of 6 episodes")])
def test_episodes_too_short_to_use_are_counted(lengths, words):
    """A window of 9 frames needs 5 of an episode, where 1 and 3 may be padded; held-out episodes count, too."""
    config, buffer = tiny.policy_config(), tiny.replay_buffer(lengths=lengths, images=False)
    config["model"] |= {"horizon": 9}
    half = len(lengths) // 2
    parts = [tiny.window_data(config, buffer, episodes=range(*part)) for part in ((0, half), (half, len(lengths)))]
    line = describe_windows(TASK, *parts)
    assert f"{len(lengths)} episodes, {sum(lengths)} frames" in line and "\n" not in line
    assert words in line if words else "unused" not in line
    assert ("2 of 3 episodes" in describe_windows(TASK, parts[0], None)) == bool(words)
