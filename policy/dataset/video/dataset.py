"""Video classification: lists of labelled video files to batches of clips.

The recipe is that of TimeSformer (arXiv 2102.05095, section 4) and SlowFast (arXiv 1812.03982, section 4), with which
Fibottention (arXiv 2406.19391) was trained on Smarthome, NTU and NUCLA.
"""

import csv
import itertools
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from policy.dataset.stream import stream_batches
from policy.dataset.text.corpus import read_text
from policy.dataset.video.decode import SAMPLINGS, clip_numbers, frame_index, read_clip
from policy.encoder.observation import to_unit
from policy.registry import choose, within

# What a first line that is a header calls its first and last column.
HEADER_PATHS = ("path", "file", "filename", "file_name", "video", "video_path", "video_name", "clip", "name")
HEADER_LABELS = ("label", "labels", "label_id", "class", "class_id", "class_name", "category", "action")
MOST_CLASSES = 100_000
SHOWN, LINE = 5, 100  # file names, and characters of a line, in a message that could list thousands


# Lists of videos ------------------------------------------------------------------------------------------------------


def open_videos(folder, split, *, root=None, num_classes=None):
    """(paths, labels, classes) of ``folder``: train.csv for split "train", test.csv or else val.csv for "test".

    classes: the lines of classes.txt, else the names that train.csv has as labels, sorted, or, where its labels are
    numbers, those below ``num_classes`` or up to the largest. Raises ValueError for a label beyond the classes,
    FileNotFoundError for a missing list.
    """
    choose("split", split, ("train", "test"))
    if num_classes is not None:
        within(1, MOST_CLASSES, num_classes=num_classes)
    folder = Path(folder)
    train = folder / "train.csv"
    classes, known = _classes(folder / "classes.txt", train, num_classes)
    if num_classes not in (None, len(classes)):
        raise ValueError(f"num_classes: got {num_classes}, allowed: {len(classes)}, the classes of {folder}")
    path = train
    if split == "test":
        path = folder / "test.csv" if (folder / "test.csv").exists() else folder / "val.csv"
    return *read_csv(path, root=root, known=known), classes


def _classes(names, train, num_classes):
    """(names of the classes, {label: its number}) of the file ``names`` or, without it, of the labels in ``train``."""
    if names.exists():
        classes = read_text(names).strip().splitlines()
        if not classes or "" in classes or len(set(classes)) < len(classes) or len(classes) > MOST_CLASSES:
            allowed = f"one name a line, at most {MOST_CLASSES:,}"
            raise ValueError(f"{names}: got an empty or repeated name, or too many, allowed: {allowed}")
        numbers = range(len(classes))
        return classes, dict(zip(classes, numbers, strict=True)) | dict(zip(numbers, numbers, strict=True))
    labels = {label for _, _, label in _read_rows(train)}
    named = any(isinstance(label, str) for label in labels)
    labels = sorted(labels) if named else range(num_classes or max(labels) + 1)
    return [str(label) for label in labels], {label: number for number, label in enumerate(labels)}


def read_csv(path, *, root=None, known=None):
    """(paths (n,), labels (n,) int64) of a list with ``path label``, ``path,label`` or ``path,pose,label`` a line.

    known: {label, a number or a name: number of its class}; by default a number stands for itself, and names for their
    places among the sorted ones of the list. Relative paths start at ``root``, or at the list's folder. Empty lines,
    lines that start with # and a header are left out, and so are, with one warning, videos that are not there. Raises
    ValueError, naming file and line, for another label; FileNotFoundError when no video is there.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    rows, videos, labels, missing = _read_rows(path), [], [], []
    if known is None:
        found = sorted({label for _, _, label in rows})
        known = {label: label if isinstance(label, int) else number for number, label in enumerate(found)}
    for number, name, label in tqdm(rows, desc="looking for videos", leave=False, dynamic_ncols=True, delay=1):
        if label not in known:
            allowed = ", ".join(map(str, itertools.islice(known, SHOWN))) + (", ..." if len(known) > SHOWN else "")
            raise ValueError(f"{path}:{number}: got label {str(label)[:LINE]!r}, allowed: {allowed}")
        video = str(root / name)
        if os.path.isfile(video):
            videos.append(video)
            labels.append(known[label])
        else:
            missing.append(video)
    if missing:
        names = ", ".join(video[-LINE:] for video in missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        summary = f"{path}: got {len(missing)} of {len(missing) + len(videos)} videos missing: {names}"
        if not videos:
            raise FileNotFoundError(f"{summary}, allowed: paths relative to {root}")
        warnings.warn(summary, stacklevel=2)
    return videos, np.array(labels, dtype=np.int64)


def _read_rows(path):
    """[(line number, path, label)] of a list of videos; labels are all numbers or all names."""
    lines = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip() and not line.strip().startswith("#") and (lines or not _is_header(line)):
            lines.append((number, line.strip()))
    if not lines:
        raise ValueError(f"{path}: got no videos, allowed: at least one line of path and label")
    numbered = [_numbered(line) for _, line in lines]
    commas = all(_split_at_commas(line) for _, line in lines)
    named = [_named(line, commas=commas) for _, line in lines]
    found = named if not all(numbered) and (all(named) or not numbered[0]) else numbered
    for (number, line), row in zip(lines, found, strict=True):
        if row is None or isinstance(row[1], int) and row[1] >= MOST_CLASSES:
            raise ValueError(
                f"{path}:{number}: got {line[:LINE]!r}, allowed: 'path label', 'path,label' or 'path,pose,label' with"
                f" labels that are all names or all whole numbers from 0 to {MOST_CLASSES - 1:,}"
            )
    return [(number, *row) for (number, _), row in zip(lines, found, strict=True)]


def _is_header(line):
    words = re.split(r"[\s,]+", line.strip().lower())
    return len(words) in (2, 3) and words[0] in HEADER_PATHS and words[-1] in HEADER_LABELS


def _split_at_commas(line):
    """[path, label] of "path,label" or "path,pose,label", or None."""
    try:
        fields = [field.strip() for field in next(csv.reader([line]))]
    except csv.Error:  # a field of more than 131,072 characters
        return None
    return [fields[0], fields[-1]] if len(fields) in (2, 3) and fields[0] and fields[-1] else None


def _numbered(line):
    """(path, number) of a line, or None."""
    for fields in (_split_at_commas(line), line.rsplit(maxsplit=1)):
        if fields and len(fields) == 2 and re.fullmatch("[0-9]{1,18}", fields[1]):
            return fields[0], int(fields[1])
    return None


def _named(line, *, commas):
    """(path, name) of a line, or None; commas: what stands between them, else white space."""
    fields = _split_at_commas(line) if commas else line.rsplit(maxsplit=1)
    if len(fields) < 2 or re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", fields[1], re.IGNORECASE):
        return None
    return tuple(fields)


# Pixels ---------------------------------------------------------------------------------------------------------------


def scale_short_side(clip, size):
    """Clip (F, 3, h, w) uint8 with its shorter side scaled to ``size`` px and its proportions kept."""
    height, width = clip.shape[-2:]
    factor = size / min(height, width)
    shape = (round(height * factor), round(width * factor))
    return F.interpolate(clip, shape, mode="bilinear", antialias=True)


def spatial_crops(clip, size, views):
    """Squares (views, F, 3, size, size) of clip (F, 3, h, w): the middle or, for 3 views, both ends and the middle."""
    rows, columns = (side - size for side in clip.shape[-2:])
    crops = []
    for place in (0.5,) if views == 1 else (0, 0.5, 1):
        top, left = (rows // 2, int(columns * place)) if columns >= rows else (int(rows * place), columns // 2)
        crops.append(clip[..., top : top + size, left : left + size])
    return torch.stack(crops)


# The data set ---------------------------------------------------------------------------------------------------------


class VideoDataset:
    """Clips of videos as batches {"video": float32 in [-1, 1], "label": (B,) int64}.

    paths: n video files; labels: (n,) from 0; classes: their names. frames: F of a clip; sampling, stride: see
    ``clip_positions``; target_fps: see ``clip_numbers``. jitter: (shortest, longest) short side in px that training
    scales a clip to before cutting out ``image_size`` px at random, evaluation always to the shortest; None for
    image_size itself. flip: probability of a mirrored clip. Evaluation sees temporal_views x spatial_views (1, or 3:
    both ends and the middle of the longer side) clips of a video. workers: processes that decode, 0 for none. Raises
    ValueError for options that make no sense.

    Videos that cannot be read end up in ``unreadable`` {path: reason}: evaluation leaves them out of its batches, and
    training takes another one that depends on nothing but (seed, index).
    """

    def __init__(
        self,
        paths,
        labels,
        *,
        classes,
        frames,
        sampling="uniform",
        stride=1,
        target_fps=None,
        image_size=224,
        jitter=(256, 320),
        flip=0.5,
        temporal_views=1,
        spatial_views=1,
        workers=0,
    ):
        self.paths, self.labels = list(paths), np.asarray(labels, dtype=np.int64)
        self.classes, self.num_classes = list(classes), len(classes)
        self.frames, self.sampling, self.stride, self.target_fps = frames, sampling, stride, target_fps
        self.image_size, self.flip = image_size, flip
        self.jitter = (image_size, image_size) if jitter is None else tuple(jitter)
        self.temporal_views, self.spatial_views, self.workers = temporal_views, spatial_views, workers
        self.unreadable = {}
        self._check()

    def _check(self):
        within(1, 10_000, frames=self.frames, image_size=self.image_size, temporal_views=self.temporal_views)
        within(1, 10**9, stride=self.stride)
        within(0, 1000, workers=self.workers)
        choose("sampling", self.sampling, SAMPLINGS)
        if self.target_fps is not None and not 0 < self.target_fps <= 1000:
            raise ValueError(f"target_fps: got {self.target_fps}, allowed: null, or above 0 up to 1,000")
        choose("spatial_views", self.spatial_views, (1, 3))
        if len(self.jitter) != 2 or not self.image_size <= self.jitter[0] <= self.jitter[1] <= 10_000:
            allowed = f"null or [shortest, longest], image_size {self.image_size} to 10,000"
            raise ValueError(f"jitter: got {list(self.jitter)} px, allowed: {allowed}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: got {self.flip}, allowed: 0 to 1")
        if len(self.paths) == 0 or len(self.paths) != len(self.labels):
            raise ValueError(
                f"labels: got {len(self.labels)} for {len(self.paths)} videos, allowed: one for each of >= 1"
            )
        wrong = self.labels[(self.labels < 0) | (self.labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"labels: got {wrong[0]}, allowed: 0 to {self.num_classes - 1}, the classes")

    def __len__(self):
        return len(self.paths)

    def batch(self, indices):
        """{"video": (B, V, F, 3, s, s), "label": (B,)} of the readable ones among the videos ``indices``."""
        return self._finish(self._make_batch((index, None) for index in indices))

    def stream(self, requests):
        """Yield a batch for every list of (index, seed) pairs in ``requests``, in their order.

        Training, seed an integer: {"video": (B, F, 3, s, s), "label": (B,)}; seed None: what ``batch`` gives.
        """
        yield from map(self._finish, stream_batches(self._make_batch, requests, workers=self.workers))

    def report_unreadable(self):
        """Text: how many of the videos met so far could not be read, which and why."""
        lines = [f"{len(self.unreadable)} of {len(self)} videos could not be read"]
        return "\n".join(lines + [f"  {path}: {reason}" for path, reason in sorted(self.unreadable.items())])

    def _sample(self, index, seed):
        """(clips uint8 or None, label, {path: reason} of the videos that could not be read)."""
        failed = {}
        for candidate in self._candidates(index, seed):
            path = self.paths[candidate]
            rng = None if seed is None else np.random.default_rng([seed, candidate])
            clip = self._read(path, rng)
            if clip is not None:
                return self._cut(clip, rng), self.labels[candidate], failed
            failed[path] = self.unreadable[path]
        return None, self.labels[index], failed

    def _candidates(self, index, seed):
        """``index`` and, in training, all videos in an order of its own to replace it."""
        yield index
        if seed is not None:
            yield from np.random.default_rng([seed, index, 1]).permutation(len(self)).tolist()

    def _read(self, path, rng):
        """Clip (K * F, 3, h, w) uint8 that training with ``rng``, or evaluation, sees; None where it is unreadable."""
        if path in self.unreadable:
            return None
        options = {"frames": self.frames, "sampling": self.sampling, "stride": self.stride}
        options |= {"target_fps": self.target_fps, "views": self.temporal_views, "rng": rng}
        try:
            positions = clip_numbers(frame_index(path), **options)
            return torch.from_numpy(read_clip(path, positions.ravel())).movedim(-1, -3)
        except (ValueError, OSError) as error:
            self.unreadable[path] = str(error).removeprefix(f"{path}: ")

    def _cut(self, clip, rng):
        """Clip (K * F, 3, h, w) to (V, F, 3, s, s), with ``rng`` to one augmented clip (F, 3, s, s)."""
        low, high = self.jitter
        size = self.image_size
        if rng is None:
            crops = spatial_crops(scale_short_side(clip, low), size, self.spatial_views)  # (S, K * F, 3, s, s)
            return crops.unflatten(1, (self.temporal_views, self.frames)).transpose(0, 1).flatten(0, 1)
        clip = scale_short_side(clip, int(rng.integers(low, high + 1)))
        top, left = (int(rng.integers(side - size + 1)) for side in clip.shape[-2:])
        clip = clip[..., top : top + size, left : left + size]
        return clip.flip(-1) if rng.random() < self.flip else clip

    def _make_batch(self, request):
        """What goes from a worker to ``_finish``; videos are still uint8 here, a quarter of the bytes."""
        clips, labels, failed = zip(*(self._sample(int(index), seed) for index, seed in request), strict=True)
        read = [number for number, clip in enumerate(clips) if clip is not None]
        views = self.temporal_views * self.spatial_views
        none = torch.empty((0, views, self.frames, 3, self.image_size, self.image_size), dtype=torch.uint8)
        return {
            "video": torch.stack([clips[number] for number in read]).contiguous() if read else none,
            "label": torch.tensor([labels[number] for number in read], dtype=torch.int64),
            "unreadable": {path: reason for part in failed for path, reason in part.items()},
        }

    def _finish(self, batch):
        """What the consumer sees of a batch of ``_make_batch``; keeps its record of unreadable videos."""
        self.unreadable |= batch.pop("unreadable")
        if all(path in self.unreadable for path in self.paths):
            path, reason = next(iter(self.unreadable.items()))
            raise ValueError(
                f"videos: got none of {len(self)} that can be read, allowed: at least one ({path}: {reason})"
            )
        return {**batch, "video": to_unit(batch["video"])}
