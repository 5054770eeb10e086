"""Speed of decoding and augmenting pictures and videos, by the number of worker processes; eval.speed decode."""

import itertools
import os
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from eval.shared.machine import check_positive
from policy.dataset.image.dataset import ImageDataset
from policy.dataset.image.sources import open_images
from policy.dataset.video.dataset import VideoDataset

SHIFTS = {"crop": "pad", "flip": 0.5}  # as preset image_fast
RECIPE = {"crop": "resized", "flip": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25}  # as paper.yaml
CLASSES, IMAGES, VIDEOS = 2, 256, 8
FRAMES = 240  # of a video, 640 x 480 px H.264, 30 a second


def add_options(parser):
    counts = list(range(os.cpu_count() + 1))[:9]
    parser.add_argument("--workers", type=int, nargs="+", default=counts, help=f"processes, default {counts}")
    parser.add_argument("--batch", type=int, default=64, help="images a batch, default 64; of clips an eighth")


def run(args):
    """(name, title, what, settings, rows, table) of what the options ask for."""
    check_positive(batch=args.batch, seconds=args.seconds)
    for workers in args.workers:
        if workers < 0:
            raise ValueError(f"--workers: got {workers}, allowed: >= 0")
    settings = {"workers": sorted(set(args.workers)), "batch": args.batch, "seconds": args.seconds}
    rows = measure_decode(**settings)
    return "decode", "Speed of decoding and augmentation", "made-up pictures and videos", settings, rows, cells(rows)


def measure_decode(*, workers, batch, seconds):
    """A dictionary for each kind of data and number of workers: samples_per_s, and cores that were busy on average."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_images(folder / "small", side=32, suffix="png")
        write_images(folder / "large", side=(500, 375), suffix="jpg")
        videos = write_videos(folder)
        kinds = {  # cached: decoded once, then kept
            "images, 32 px, shifts and mirrors (cached)": lambda n: images(folder / "small", 32, SHIFTS, n),
            "images, 500 x 375 px JPEG to 224 px, RandAugment and erasing": lambda n: images(
                folder / "large", 224, RECIPE, n
            ),
            "clips, 8 frames of stride 8 of 640 x 480 px to 224 px": lambda n: clips(videos, n),
        }
        cases = list(itertools.product(kinds, workers))
        for kind, count in tqdm(cases, desc="decoding", unit="case", leave=False, dynamic_ncols=True):
            data = kinds[kind](count)
            size = max(batch // 8, 1) if isinstance(data, VideoDataset) else batch
            rows.append({"kind": kind, "workers": count, **_rate(data, size, seconds)})
    return rows


def images(folder, size, augment, workers):
    """The training images of ``folder``."""
    return ImageDataset(open_images(folder, "train"), image_size=size, augment=augment, workers=workers)


def clips(paths, workers):
    """Clips of the videos ``paths``."""
    labels = np.zeros(len(paths), dtype=np.int64)
    options = {"frames": 8, "sampling": "strided", "stride": 8, "image_size": 224, "jitter": (256, 320)}
    return VideoDataset(paths, labels, classes=["any"], workers=workers, **options)


def _rate(data, batch, seconds):
    """Samples a second after the first batches, and processor seconds a second, of ``data`` in batches of ``batch``."""
    order = itertools.cycle(range(len(data)))
    requests = ([(next(order), number) for _ in range(batch)] for number in itertools.count())
    stream = data.stream(requests)
    for _ in range(2 * data.workers + 1):  # those that the workers make ahead
        next(stream)
    start, busy, samples = time.perf_counter(), _processor_seconds(), 0
    while not samples or time.perf_counter() - start < seconds:
        samples += len(next(stream)["label"])
    busy = _processor_seconds() - busy  # what ended workers used would count at their end alone
    took = time.perf_counter() - start
    stream.close()
    return {"samples_per_s": samples / took, "busy_cores": busy / took}


def _processor_seconds():
    """Processor seconds that this process and its children have used so far, where the system tells (Linux)."""
    ticks = 0
    pids = [os.getpid()]
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # ended meanwhile, or no Linux
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# Data --------------------------------------------------------------------------------------------------------------


def write_images(folder, *, side, suffix):
    """IMAGES pictures of smooth shapes and a little noise below ``folder``/train."""
    width, height = (side, side) if isinstance(side, int) else side
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / "train" / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_picture(rng, width, height)).save(place / f"{number}.{suffix}")


def write_videos(folder):
    """VIDEOS files of FRAMES frames, drifting shapes."""
    rng, paths = np.random.default_rng(0), []
    for number in range(VIDEOS):
        paths.append(folder / f"{number}.mp4")
        scene = _picture(rng, 1280, 480)
        with av.open(str(paths[-1]), "w") as container:
            stream = container.add_stream("h264", rate=30, options={"crf": "23"})
            stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
            for shift in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, shift : shift + 640]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return paths


def _picture(rng, width, height):
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-8, 9, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def cells(rows):
    """Cells of the Markdown table, a row a measurement."""
    lines = [["what", "workers", "samples/s", "cores busy"]]
    for row in rows:
        lines.append([row["kind"], f"{row['workers']}", f"{row['samples_per_s']:,.1f}", f"{row['busy_cores']:.2f}"])
    return lines
