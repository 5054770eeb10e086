"""Reading the films that rollouts write."""

import av
import numpy as np


def decode(path):
    """Frames (F, h, w, 3) of an H.264 film of 10 a second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 10
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
