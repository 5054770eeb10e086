"""Exactly the asked frames of a video file, decoded with PyAV from the keyframe before each of them."""

import contextlib
import functools
import itertools
import os
from typing import NamedTuple

import av
import numpy as np

from policy.dataset.image.decode import STRETCH

SAMPLINGS = ("uniform", "strided")
MOST_PIXELS = 2**26  # of a frame, twice those of 8K
ROUNDED = 1e-3  # s, Matroska's unit of time: how far a time stamp may be from where a constant rate puts it
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # how Matroska and its main part begin


class FrameIndex(NamedTuple):
    """count: frames of a video; times: their timestamps (count,) as shown, None where the file does not tell them;
    keyframes: numbers, from 0 up, of frames that decoding can start at; matrix: (a, b, c, d), column and row go to
    (a column + c row, b column + d row) where they are shown; end: the time after the last frame; unit: of times, in s.
    """

    count: int
    times: np.ndarray | None
    keyframes: np.ndarray
    matrix: tuple
    end: int = 0
    unit: float = 0

    def start_for(self, number):
        """The last keyframe that is not after frame ``number``."""
        return self.keyframes[np.searchsorted(self.keyframes, number, side="right") - 1]

    def steps(self, rate):
        """How many steps of 1 / ``rate`` s the video lasts, at least one."""
        if self.times is None:
            raise ValueError("target_fps: got a video without time stamps, allowed: null, or a container that has them")
        return max(round(float(self.end - self.times[0]) * self.unit * rate), 1)

    def shown_at(self, seconds):
        """Numbers of the frames that are shown so many ``seconds`` (...) after the first one begins."""
        times = self.times[0] + (seconds + ROUNDED) / self.unit
        return np.searchsorted(self.times, times, side="right") - 1


@functools.lru_cache(maxsize=1 << 14)
def frame_index(path):
    """FrameIndex of the video at ``path``, read from its packets; decoded once where these have no timestamps.

    The count that a container declares includes frames that its edit list hides and, in AVI, moments without any.
    Raises ValueError for a file that is not a video, has no frames or is cut off; where the format does not tell the
    file's size (MPEG-TS, raw streams), one that is cut off is a shorter video.
    """
    with _opened(path) as (container, stream):
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        packets = [(packet.pts, packet.is_keyframe, packet.is_corrupt, packet.duration or 0) for packet in packets]
        unit = float(stream.time_base)
    size = os.path.getsize(path)
    if (
        any(corrupt for _, _, corrupt, _ in packets) or declared_size(path) > 1.05 * size
    ):  # writers differ by some bytes
        raise ValueError(f"{path}: got a damaged or cut-off file, allowed: a whole video")
    matrix = _display_matrix(path)
    times, keys = [time for time, *_ in packets], [time for time, key, *_ in packets if key]
    if None in times or len(set(times)) < len(times):
        with _opened(path) as (container, stream):
            index = FrameIndex(sum(1 for _ in container.decode(stream)), None, np.zeros(1, int), matrix)
    else:
        last = max(((time, duration) for time, _, _, duration in packets), default=(0, 0))
        times = np.sort(times)
        lasts = max(last[1], int(np.median(np.diff(times))) if len(times) > 1 else 0)  # AVI says a unit, whatever it is
        keyframes = np.union1d(0, np.searchsorted(times, keys)).astype(int)
        index = FrameIndex(len(times), times, keyframes, matrix, last[0] + lasts, unit)
    if index.count == 0:
        raise ValueError(f"{path}: got 0 frames, allowed: at least 1")
    return index


def declared_size(path):
    """Bytes that the start of an AVI or Matroska file (RFC 8794, sections 4 and 11) says it has; 0 where it does not.

    FFmpeg reads such a file as far as it goes and does not complain; it does for MP4.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    start = head.find(SEGMENT) + len(SEGMENT)
    if not head.startswith(EBML) or start < len(EBML):
        return 0
    octets = 9 - head[start].bit_length()  # of the size: as many as there are zero bits in front, and one
    largest = (1 << 7 * octets) - 1
    size = int.from_bytes(head[start : start + octets], "big") & largest
    return 0 if size == largest else start + octets + size  # the largest number stands for "unknown"


def clip_positions(count, *, frames, sampling, stride=1, views=1, rng=None):
    """Numbers (K, F) of the frames that make up K clips of a video of ``count`` frames.

    uniform: one frame of each of F equal segments of the video (arXiv 1608.00859, section 3.1), drawn with ``rng``,
    else evenly spread over the views, the middle for one. strided: every ``stride``-th frame from a start drawn with
    ``rng``, else from K starts evenly spread over the video, the middle for one; a video shorter than the clip repeats
    its last frame.
    """
    steps = np.arange(frames)
    if sampling == "uniform":
        inside = (np.arange(views)[:, None] + 0.5) / views if rng is None else rng.random((1, frames))
        positions = (steps + inside) * count / frames
    else:
        room = max(count - 1 - (frames - 1) * stride, 0)
        if rng is not None:
            starts = rng.integers(room + 1, size=1)
        else:
            starts = np.arange(views) * room // (views - 1) if views > 1 else np.array([room // 2])
        positions = starts[:, None] + steps * stride
    return np.minimum(positions.astype(np.int64), count - 1)


def clip_numbers(index, *, target_fps=None, **options):
    """As ``clip_positions`` with its ``options``, for the video of a ``FrameIndex``.

    target_fps: frames a second that the video is taken to have, whatever it has: of each step the frame shown then.
    Raises ValueError for a video without time stamps.
    """
    if target_fps is None:
        return clip_positions(index.count, **options)
    return index.shown_at(clip_positions(index.steps(target_fps), **options) / target_fps)


def read_clip(path, positions):
    """Frames number ``positions`` (F,), in any order and repeated at will, of a video as RGB: uint8 (F, h, w, 3).

    They are turned as the file says. Raises ValueError for positions that the video does not have,
    and for a file that cannot be decoded.
    """
    index = frame_index(path)
    wanted = np.unique(positions).tolist()
    if wanted[0] < 0 or wanted[-1] >= index.count:
        raise ValueError(f"{path}: positions: got {wanted[0]} to {wanted[-1]}, allowed: 0 to {index.count - 1}")
    found = {} if index.times is None else _after_seeking(path, index, wanted)
    if len(found) < len(wanted):  # not every container seeks where it is told to
        found = _from_the_start(path, index, wanted)
    if len(found) < len(wanted):
        lost = next(number for number in wanted if number not in found)
        raise ValueError(f"{path}: got no frame {lost} of {index.count}, allowed: a video that can be decoded")
    sizes = {frame.shape[1::-1] for frame in found.values()}
    if len(sizes) > 1:
        named = " and ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(f"{path}: got frames of {named} px, allowed: of one size")
    return _upright(np.stack([found[number] for number in positions]), index.matrix)


def _after_seeking(path, index, wanted):
    """{number: (h, w, 3)} of the ``wanted`` numbers; some may be missing."""
    found = {}
    with _opened(path) as (container, stream), contextlib.suppress(av.error.FFmpegError):
        for keyframe, group in itertools.groupby(wanted, index.start_for):
            container.seek(int(index.times[keyframe]), stream=stream)
            # Some decoders make grey pictures, with good timestamps, of what follows anything but a keyframe.
            packets = itertools.dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))
            frames = ((frame.pts, frame) for packet in packets for frame in packet.decode())
            found |= _keep(frames, {index.times[number]: number for number in group})
    return found


def _from_the_start(path, index, wanted):
    """{number: (h, w, 3)} of the ``wanted`` numbers; some may be missing."""
    with _opened(path) as (container, stream):
        frames = container.decode(stream)
        if index.times is None:
            return _keep(enumerate(frames), {number: number for number in wanted})
        return _keep(((frame.pts, frame) for frame in frames), {index.times[number]: number for number in wanted})


def _keep(frames, numbers):
    """{number: (h, w, 3)} of the pairs (key, frame) whose key is in ``numbers`` {key: number}, until all are there."""
    found = {}
    for key, frame in frames:
        if key in numbers:
            found[numbers[key]] = frame.to_ndarray(format="rgb24")
            if len(found) == len(numbers):
                break
    return found


def _display_matrix(path):
    """(a, b, c, d) of the video's first frame, in any unit; ValueError for turns by other than quarters.

    One frame of a video is asked alone: a frame that was keeps its memory, and the threads that convert its colours,
    until Python collects garbage, which a forked process would do and then wait for these threads for ever.
    """
    found = None
    with _opened(path) as (container, stream), contextlib.suppress(av.error.FFmpegError):
        found = next((frame.side_data.get("DISPLAYMATRIX") for frame in container.decode(stream)), None)
    if found is None:
        return 1, 0, 0, 1
    ((a, b), (c, d)) = np.frombuffer(found, np.int32).reshape(3, 3)[:2, :2].tolist()
    if (a or d) and (b or c):
        raise ValueError(
            f"{path}: got frames to be turned by other than quarters, allowed: by 0, 90, 180 or 270 degrees"
        )
    return a, b, c, d


def _upright(frames, matrix):
    """frames (F, h, w, 3) as ``matrix`` says that they are shown."""
    a, b, c, d = matrix
    if b or c:
        frames, a, d = frames.swapaxes(1, 2), c, b
    return np.ascontiguousarray(frames[:, :: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@contextlib.contextmanager
def _opened(path):
    """(container, video stream) of ``path``; what FFmpeg complains about becomes a ValueError that names the file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: got no pictures, allowed: a video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"{path}: got pictures of an unknown codec, allowed: those that FFmpeg decodes")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MOST_PIXELS or max(width, height) > STRETCH * min(width, height):
                allowed = f"at most {MOST_PIXELS:,} px, a side {STRETCH:,} times the other"
                raise ValueError(f"{path}: got frames of {width} x {height} px, allowed: {allowed}")
            stream.codec_context.thread_count = 1  # worker processes use the cores better than FFmpeg's threads
            yield container, stream
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: got a file that cannot be decoded ({error.strerror}), allowed: a video") from error
