"""Pictures and clips of a replay buffer with the classes that a simulator gave them.

A label set is a zarr (folder or .zip): data/label_<task> (F,), the class of a frame or of the clip that starts there,
-1 for none; meta/episode_ends; attributes classes {task: names}, images, the path from its folder of the zarr that
holds data/img (default: itself), and span {task: frames that a clip must cover}, where it matters.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from policy.dataset.replay_buffer import ReplayBuffer
from policy.dataset.windows import observed, split_episodes
from policy.dataset.zarr_checks import find_array, open_zarr
from policy.encoder.observation import to_unit
from policy.registry import lookup


class LabelledFrames:
    """Single frames with classes: {"image": (B, 3, s, s) float32 in [-1, 1], "label": (B,) int64}.

    frames: numbers (N,) in ``buffer``; classes: names; image_size: side s in px, None for that of the buffer; pad: px
    that ``stream`` shifts pictures by at most, edges repeated. They are never mirrored, which would change the class.
    """

    def __init__(self, buffer, *, frames, classes, image_key="image", label_key="label", image_size=None, pad=0):
        if pad < 0 or (image_size is not None and image_size < 1):
            raise ValueError(f"image_size, pad: got {image_size}, {pad}, allowed: image_size >= 1 or null, pad >= 0")
        self.buffer, self.image_key = buffer, image_key
        self.frames, self.classes = np.asarray(frames), list(classes)
        self.image_size, self.pad = image_size, pad
        self.labels = torch.as_tensor(buffer.take(label_key, self.frames)).cpu().numpy().astype(np.int64)

    def __len__(self):
        return len(self.frames)

    @property
    def num_classes(self):
        return len(self.classes)

    def batch(self, indices):
        """The samples ``indices``, as they are."""
        return self._samples(indices, None)

    def stream(self, requests):
        """A batch for each of ``requests``, lists of (index, seed): shifted as a function of both, not without seed."""
        for request in requests:
            indices, seeds = zip(*request, strict=True)
            yield self._samples(indices, None if set(seeds) == {None} else seeds)

    def _samples(self, indices, seeds):
        return {"image": self._pictures(indices, seeds), "label": torch.from_numpy(self.labels[np.asarray(indices)])}

    def _pictures(self, indices, seeds):
        """(B, ..., 3, s, s) of the samples ``indices``; seeds: one a sample, or None for no shift at all."""
        frames = self.frames[np.asarray(indices)]
        images = to_unit(observed(torch.as_tensor(self.buffer.take(self.image_key, frames.ravel()))))
        if self.image_size not in (None, images.shape[-1]):
            images = F.interpolate(images, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        samples = images.unflatten(0, frames.shape)
        return samples if seeds is None else self._shifted(samples, indices, seeds)

    def _shifted(self, samples, indices, seeds):
        """``samples`` (B, ..., 3, s, s), each cut out of itself with its edges repeated; the middle without a seed."""
        size, pad = samples.shape[-1], self.pad
        cut = []
        for sample, index, seed in zip(samples, indices, seeds, strict=True):
            y, x = (pad, pad) if seed is None else np.random.default_rng([seed, index]).integers(2 * pad + 1, size=2)
            cut.append(F.pad(sample, [pad] * 4, mode="replicate")[..., y : y + size, x : x + size])
        return torch.stack(cut)


class LabelledClips(LabelledFrames):
    """Clips with classes: {"video": (B, F, 3, s, s), "label": (B,)}, from ``batch`` (B, 1, F, 3, s, s): one view.

    starts: first frames (N,), whose label is the clip's; frames, stride: how many, and how far apart.
    """

    def __init__(self, buffer, *, starts, frames, stride, **options):
        if frames < 1 or stride < 1:
            raise ValueError(f"frames, stride: got {frames}, {stride}, allowed: >= 1")
        super().__init__(buffer, frames=starts, **options)
        self.frames = self.frames[:, None] + stride * np.arange(frames)

    def _samples(self, indices, seeds):
        clips = self._pictures(indices, seeds)
        video = clips[:, None] if seeds is None else clips
        return {"video": video, "label": torch.from_numpy(self.labels[np.asarray(indices)])}


def open_labelled(
    path,
    task,
    *,
    split,
    clip=None,
    image_size=None,
    pad=0,
    balanced=False,
    val_ratio=0.2,
    seed=0,
    storage="ram",
    cache_dir=None,
):
    """``LabelledFrames`` of ``task`` of the label set at ``path``, or ``LabelledClips`` with clip {"frames", "stride"}.

    split: "train" or "test", which share no episode. clip may name "every": one clip of so many is used. balanced: of
    each class only as many as there are of the rarest, evenly spread. storage, cache_dir: as of ``ReplayBuffer.open``;
    "mmap" is shared by the splits. Raises FileNotFoundError or ValueError for what is not a label set, for labels out
    of range and for a class that one of the splits lacks.
    """
    path = Path(path)
    attributes = open_zarr(path).attrs.asdict()
    if not isinstance(attributes.get("classes"), dict):
        raise ValueError(f"{path}: got no attribute classes, allowed: a label set")
    classes = lookup("task", task, attributes["classes"])
    span, every = _check_clip(clip, task, attributes.get("span", {}).get(task))
    buffer = _open_buffer(path, attributes.get("images", path.name), task, storage, cache_dir)
    labels = _check_labels(buffer.arrays["label"], classes, f"{path}: data/label_{task}")
    train, test = split_episodes(buffer.num_episodes, val_ratio=val_ratio, seed=seed)
    episodes = {"train": train, "test": test}
    splits = {name: _starts(buffer, part, span)[::every] for name, part in episodes.items()}
    starts = lookup("split", split, splits)
    short = int((np.diff(buffer.episode_ends, prepend=0)[episodes[split]] < span).sum())
    if short:
        print(
            f"{path}: {short:,} of {len(episodes[split]):,} {split} episodes are shorter than {span} frames and unused"
        )
    for name, frames in splits.items():
        missing = [str(kind) for number, kind in enumerate(classes) if number not in labels[frames]]
        if missing:
            raise ValueError(
                f"{path}: got no {', '.join(missing)} of {task} in split {name}, allowed: every class in both"
                f" (val_ratio {val_ratio} of {buffer.num_episodes} episodes, seed {seed})"
            )
    if balanced:
        starts = _balance(starts, labels[starts])
    options = {"classes": classes, "image_size": image_size, "pad": pad}
    if clip is None:
        return LabelledFrames(buffer, frames=starts, **options)
    return LabelledClips(buffer, starts=starts, frames=clip["frames"], stride=clip["stride"], **options)


def _check_clip(clip, task, covered):
    """(frames from the first to the last of a sample, how many samples share one that is used); ValueError."""
    if clip is None:
        span, every = 1, 1
    elif {"frames", "stride"} <= set(clip) <= {"frames", "stride", "every"}:
        span, every = (clip["frames"] - 1) * clip["stride"] + 1, clip.get("every", 1)
    else:
        raise ValueError(f"clip: got {', '.join(clip) or 'nothing'}, allowed: frames, stride and perhaps every")
    if every < 1:
        raise ValueError(f"clip.every: got {every}, allowed: >= 1")
    if covered not in (None, span):
        raise ValueError(
            f"clip: got one of {span} frames from first to last, allowed: {covered}, which labels of {task} are of"
        )
    return span, every


def _open_buffer(path, images, task, storage, cache_dir):
    """Replay buffer with "image" of data/img of the zarr ``images``, seen from beside ``path``, and "label"."""
    images = path.parent / images
    array = find_array(open_zarr(images), "data/img", images)
    shape = () if array is None else array.shape[1:]
    if len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3:
        raise ValueError(f"{images}: data/img: got shape per frame {shape}, allowed: (s, s, 3)")
    image = {"source": "img", "type": "rgb", "shape": (shape[2], *shape[:2])}
    label = {"source": f"label_{task}", "type": "low_dim", "shape": ()}
    pictures = ReplayBuffer.open(images, {"image": image}, storage=storage, cache_dir=cache_dir)
    labels = ReplayBuffer.open(path, {"label": label})
    return ReplayBuffer(pictures.arrays | labels.arrays, labels.episode_ends, path)


def _check_labels(labels, classes, name):
    """The labels (F,) as int64; ValueError names the first frame with one that is no class."""
    numbers = labels.astype(np.int64)
    wrong = (numbers != labels) | (numbers < -1) | (numbers >= len(classes))
    if wrong.any():
        frame = int(wrong.argmax())
        raise ValueError(f"{name}: got {labels[frame]:g} in frame {frame}, allowed: -1 (none) to {len(classes) - 1}")
    return numbers


def _starts(buffer, episodes, span):
    """First frames of all samples of ``span`` frames that lie within one of ``episodes`` and have a label."""
    frames = np.arange(buffer.num_frames)
    episode = np.searchsorted(buffer.episode_ends, frames, side="right")
    inside = np.isin(episode, episodes) & (frames + span <= buffer.episode_ends[episode])
    return np.flatnonzero(inside & (buffer.arrays["label"] >= 0))


def _balance(starts, labels):
    """As many of ``starts`` of each of ``labels``, spread evenly over those there are."""
    groups = [starts[labels == kind] for kind in np.unique(labels)]
    fewest = min(len(group) for group in groups)
    return np.sort(np.concatenate([group[np.arange(fewest) * len(group) // fewest] for group in groups]))
