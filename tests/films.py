"""Films whose frames tell their number, files that are none, and reading the films that rollouts write."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

COUNT = 48


def numbered(number, height=32, width=48):
    """A grainy picture whose mean is 8 + 4 * ``number``."""
    grain = np.random.default_rng(0).integers(-8, 9, (height, width, 1))
    return np.broadcast_to(8 + 4 * number + grain, (height, width, 3)).astype(np.uint8)


def numbers(clip):
    """Frame numbers (...) of pictures (..., h, w, 3) of ``numbered``, or (..., 3, h, w) in [-1, 1]."""
    if isinstance(clip, torch.Tensor):
        clip = ((clip + 1) * 127.5).movedim(-3, -1).numpy()
    return np.round((clip.mean((-3, -2, -1)) - 8) / 4).astype(int)


ENCODERS = {  # pixels, quality, B-frames
    "libx264": ("yuv444p", {"crf": "1"}, 3),
    "libvpx-vp9": ("yuv420p", {"deadline": "realtime"}, 0),
    "mpeg4": ("yuv420p", {"sc_threshold": "1000000000"}, 2),
    "mpeg2video": ("yuv420p", {"sc_threshold": "1000000000"}, 2),
    "mjpeg": ("yuvj420p", {}, 0),
    "flv": ("yuv420p", {}, 0),
}


def write_video(path, count=COUNT, *, picture=numbered, codec="libx264", times=None, container=None, **options):
    """Encode pictures number 0 to ``count`` - 1, with B-frames and at least every twelfth a keyframe where possible."""
    pixels, quality, b_frames = ENCODERS[codec]
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=24, options={**quality, **options})
        stream.pix_fmt, stream.bit_rate = pixels, 4_000_000
        stream.height, stream.width = picture(0).shape[:2]
        stream.codec_context.gop_size = 12
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, 240)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number * 10 if times is None else times[number]
            frame.time_base = Fraction(1, 240)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def clip_files(folder):
    """Four videos of 48, 20, 5 and 1 frames."""
    return [write_video(folder / f"{count}_frames.mp4", count) for count in (48, 20, 5, 1)]


def broken_files(folder):
    """{what is wrong: path}."""
    content = Path(write_video(folder / "whole.mp4", container={"movflags": "faststart"})).read_bytes()
    paths = {name: folder / f"{name}.mp4" for name in ("cut", "headless", "text", "empty", "no_frames", "gone")}
    paths["cut"].write_bytes(content[: len(content) * 2 // 3])
    paths["headless"].write_bytes(content[len(content) // 2 :])
    paths["text"].write_text("not a video at all\n" * 50)
    paths["empty"].touch()
    with av.open(str(paths["no_frames"]), "w") as file:
        file.add_stream("libx264", rate=24).width = 32
        file.start_encoding()
    paths["sound"] = folder / "sound.wav"
    with wave.open(str(paths["sound"]), "wb") as file:
        file.setparams((1, 2, 8000, 800, "NONE", ""))
        file.writeframes(bytes(1600))
    return {name: str(path) for name, path in paths.items()}


def decode(path):
    """Frames (F, h, w, 3) of an H.264 film of 10 a second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 10
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
