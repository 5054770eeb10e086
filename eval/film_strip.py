"""Episodes as strips of frames for a page or a paper, a row a camera: of robomimic's HDF5, or of an mp4.

python -m eval.film_strip LIFT.hdf5 CAN.hdf5 [--demo demo_0] [--frames 6] [--output strip.png]
"""

import json
from pathlib import Path

import numpy as np

from envs.robomimic.hdf5 import open_file
from eval.shared.command import Parser, command
from eval.shared.machine import check_positive
from policy.training.pictures import picture_rows, save_png


def read_demo(path, demo):
    """({camera: images (T, h, w, 3) uint8}, steps a second or None) of the episode ``demo`` of a robomimic HDF5."""
    with open_file(path) as file:
        demos = list(file.get("data", ()))
        if demo not in demos:
            raise ValueError(f"--demo: got {demo!r}, allowed in {path}: {', '.join(demos) or 'none'}")
        views = {key: images for key, images in file[f"data/{demo}/obs"].items() if images.ndim == 4}
        if not views:
            raise ValueError(f"{path}: got no images, allowed: a file with some (python -m envs.robomimic_images)")
        arguments = json.loads(file["data"].attrs.get("env_args", "{}"))
        return {key: images[:] for key, images in views.items()}, arguments.get("env_kwargs", {}).get("control_freq")


def read_film(path):
    """({"": frames (T, h, w, 3) uint8}, frames a second) of a film."""
    import av

    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return {"": np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])}, rate


def strip(path, *, demo, frames):
    """Rows of ``picture_rows``: each camera of the episode at so many moments, the first and the last among them."""
    if path.suffix not in (".hdf5", ".h5", ".mp4"):
        raise ValueError(f"FILE: got {path}, allowed: .hdf5, .h5, .mp4")
    views, rate = read_film(path) if path.suffix == ".mp4" else read_demo(path, demo)
    rows = []
    for camera, images in views.items():
        moments = np.linspace(0, len(images) - 1, min(frames, len(images))).round().astype(int)
        titles = None if rows else [f"{moment / rate:.1f} s" if rate else f"step {moment}" for moment in moments]
        name = camera.removesuffix("_image").replace("robot0_", "").replace("_", " ")
        rows.append((f"{path.stem}\n{name}".rstrip(), list(images[moments]), titles))
    return rows


@command
def main(argv=None):
    parser = Parser("eval.film_strip", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".hdf5 of robomimic with images, or .mp4")
    parser.add_argument("--demo", default="demo_0", help="episode of an HDF5")
    parser.add_argument("--frames", type=int, default=6, help="of an episode")
    parser.add_argument("--side", type=int, default=168, help="px, height of a frame, roughly")
    parser.add_argument("--caption", default="", help="words below the picture")
    parser.add_argument("--output", type=Path, default=Path("strip.png"), help="the PNG to write")
    args = parser.parse_args(argv)
    check_positive(frames=args.frames, side=args.side)
    rows = [row for path in args.files for row in strip(path, demo=args.demo, frames=args.frames)]
    save_png(picture_rows(rows, caption=args.caption, side=args.side), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
