"""Grids of episodes as mp4, with the score drawn in."""

import math

import numpy as np
from PIL import Image, ImageDraw

GAP = 4  # px between the tiles


def write_grid(path, episodes, *, fps=10, hold=8):
    """Write an H.264 mp4 of several episodes side by side.

    episodes: [{"frames": [(s, s, 3) uint8], "score": [running score a frame], "seed", "success"}]; an episode that
    ends earlier keeps its last frame. hold: how many frames the end stays. Returns ``path``.
    """
    import av

    size = episodes[0]["frames"][0].shape[0]
    columns = math.ceil(math.sqrt(len(episodes)))
    rows = math.ceil(len(episodes) / columns)
    height, width = (count * (size + GAP) - GAP for count in (rows, columns))
    height, width = height + height % 2, width + width % 2  # yuv420p needs even sides
    length = max(len(episode["frames"]) for episode in episodes) + hold
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for time in range(length):
            canvas = np.full((height, width, 3), 40, np.uint8)
            for number, episode in enumerate(episodes):
                row, column = divmod(number, columns)
                top, left = row * (size + GAP), column * (size + GAP)
                canvas[top : top + size, left : left + size] = _tile(episode, time)
            for packet in stream.encode(av.VideoFrame.from_ndarray(canvas, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def _tile(episode, time):
    step = min(time, len(episode["frames"]) - 1)
    image = Image.fromarray(episode["frames"][step])
    draw = ImageDraw.Draw(image)
    finished = step == len(episode["frames"]) - 1
    colour = (0, 130, 0) if finished and episode["success"] else (200, 0, 0) if finished else (0, 0, 0)
    text = f"seed {episode['seed']}  step {step}  score {episode['score'][step]:.2f}"
    draw.rectangle([0, 0, image.width, 13], fill=(255, 255, 255))
    draw.text((3, 1), text, fill=colour)
    return np.asarray(image)
