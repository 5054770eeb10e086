"""Labelled images by name or place: published sets, folders of classes, and zips of such folders, read in place."""

import copy
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from policy.dataset.image.decode import decode_image
from policy.dataset.image.trees import Folder, Zip, join
from policy.files import digest
from policy.registry import choose

SPLITS = ("train", "test")
# Names, in upper or lower case, of folders that may hold a split; of the test splits the first one counts.
TRAINING, HELD_OUT = ("train", "training"), ("test", "testing", "val", "valid", "validation")
SHOWN = 5  # file names in a message that could list thousands
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# Places of the published sets under ``root``, the first that exists counts, and where they come from.
PUBLISHED = {
    "imagenet": (("imagenet", "imagenet.zip"), "https://image-net.org, as train/<wnid>/* and val/<wnid>/*"),
    "imagenet100": (("imagenet100", "imagenet100.zip"), "https://image-net.org, as train/<wnid>/* and val/<wnid>/*"),
    "imagenette": (
        ("imagenette2-160", "imagenette2*"),
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
    ),
    "tiny_imagenet": (
        ("tiny-imagenet-200", "tiny-imagenet-200.zip"),
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
}
DECODED_BYTES = 10**9  # a set that is smaller once decoded stays in memory
BLOCK_IMAGES = 256  # decoded by a thread at a time


class ImageSource:
    """Images and their labels: classes (list of str), labels int64 (n,).

    read(member) gives the encoded bytes of an image, whose place in ``path`` is ``member``; pixels: uint8
    (n, h, w, 3), what has been decoded already, or None.
    """

    def __init__(self, path, classes, labels, members, *, read=None, pixels=None):
        self.path, self.classes, self.pixels = path, classes, pixels
        self.labels = np.asarray(labels, dtype=np.int64)
        # One array: worker processes would copy a list of str, page by page, merely by counting references.
        self._members = np.array([os.fsencode(member) for member in members])
        self._read = read

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        """Where image ``index`` comes from, for messages."""
        return f"{self.path}/{os.fsdecode(self._members[index])}"

    def image(self, index):
        """Image ``index`` as RGB (PIL); ValueError names a file that cannot be read."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index])
        try:
            return decode_image(self._read(os.fsdecode(self._members[index])))
        except Exception as error:  # PIL, zipfile and zlib each have their own ways to fail on broken files
            allowed = "a whole image of 8 or 16 bits a channel"
            raise ValueError(f"{self.name(index)}: got no such image ({error}), allowed: {allowed}") from error

    def subset(self, indices):
        """The images ``indices`` with the same classes."""
        part = copy.copy(self)
        part.labels, part._members = self.labels[indices], self._members[indices]
        part.pixels = None if self.pixels is None else self.pixels[indices]
        return part

    def decode_once(self):
        """Keep the pixels of all images, if these have one size and fit into DECODED_BYTES."""
        if self.pixels is not None:
            return
        size = self.image(0).size
        if len(self) * size[0] * size[1] * 3 > DECODED_BYTES:
            return
        pixels = np.empty((len(self), size[1], size[0], 3), dtype=np.uint8)

        def fill(start):
            for index in range(start, min(start + BLOCK_IMAGES, len(self))):
                image = self.image(index)
                if image.size != size:
                    return False
                pixels[index] = image
            return True

        starts = range(0, len(self), BLOCK_IMAGES)
        bar = {"desc": f"decoding {Path(self.path).name}", "unit": "block", "disable": len(starts) < 8, "leave": False}
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            filled = tqdm(threads.map(fill, starts), total=len(starts), dynamic_ncols=True, **bar)
            if all(filled):
                self.pixels = pixels
            threads.shutdown(cancel_futures=True)
            filled.close()


def open_images(data, split, *, root="data", download=False):
    """The ImageSource of ``split`` ("train" or "test") of ``data``, a published set under ``root`` or any path.

    A path is a folder, or a zip of one, with train/<class>/** and test|val|.../<class>/**, or with <class>/** alone, of
    which one image in five of each class is then held out. Classes are the sorted folder names of the training split.
    A warning counts and names the files that are no images by their suffix. download: fetch CIFAR where it is missing.

    Raises FileNotFoundError for what is missing, ValueError for a damaged zip, no classes, classes without images and
    test classes that training lacks.
    """
    choose("split", split, SPLITS)
    if data in CIFAR:
        return _open_cifar(data, split, root, download)
    if download:
        raise ValueError(f"download: got true for {data}, allowed: true for {', '.join(CIFAR)}")
    path = _locate(data, root)
    tree = Folder(path) if path.is_dir() else Zip(path)
    listed = "imagenet100.txt" if data == "imagenet100" else None
    classes, members = _find_images(tree, split, listed)
    found = [(label, member) for label, name in enumerate(classes) for member in members.get(name, ())]
    if not found:
        raise ValueError(f"{path}: got no images to {split}, allowed: images of {', '.join(classes) or 'some class'}")
    if tree.unused:
        names = ", ".join(tree.unused[:SHOWN]) + (", ..." if len(tree.unused) > SHOWN else "")
        warnings.warn(f"{path}: {len(tree.unused):,} files not used, no images by their names: {names}", stacklevel=2)
    return ImageSource(path, classes, *zip(*found, strict=True), read=tree.read)


def _open_cifar(data, split, root, download):
    kind = CIFAR[data]
    folder = Path(root) / kind.base_folder
    try:
        images = kind(root, train=split == "train", download=download)  # compares MD5 sums before it reads
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{folder}: got no whole copy of {data}; download=true fetches it, or unpack {kind.url} in {root}"
        ) from error
    names = [f"{split}/{index}" for index in range(len(images))]
    return ImageSource(folder, images.classes, images.targets, names, pixels=images.data)


def _locate(data, root):
    """The path of ``data``, a name of PUBLISHED or a path."""
    if data not in PUBLISHED:
        if not Path(data).exists():
            names = ", ".join([*CIFAR, *PUBLISHED])
            raise FileNotFoundError(
                f"data: got {data}, which does not exist, allowed: {names}, or a folder or .zip of images"
            )
        return Path(data)
    places, origin = PUBLISHED[data]
    for pattern in places:
        found = sorted(path for path in Path(root).glob(pattern) if path.is_dir() or path.suffix == ".zip")
        if found:
            return found[0]
    raise FileNotFoundError(f"{Path(root) / places[0]}: does not exist; {data} comes from {origin}")


def _find_images(tree, split, listed):
    """(classes, {class: its images in ``split``}) of a tree; listed: a file of the classes to keep, or None."""
    top = _top(tree)
    folders, files = tree.list(top)
    splits = _splits(tree, top, folders)
    if "train" not in splits:
        if splits or not folders:
            raise ValueError(
                f"{join(tree.path, top)}: got {', '.join(folders) or 'no folders'},"
                " allowed: train/<class>/* and test/<class>/*, or <class>/*"
            )
        tree.unused += files
        return folders, {name: _part(tree, join(top, name), split) for name in _bar(folders)}
    known = classes = tree.list(splits["train"])[0]
    if listed in files:
        classes = sorted(set(" ".join(tree.lines(join(top, listed))).split()))
        _check_known(classes, known, join(tree.path, top, listed))
    if split == "train":
        return classes, _labelled(tree, splits["train"], classes)
    if "val" in splits and "val_annotations.txt" in tree.list(splits["val"])[1]:
        return classes, _annotated(tree, splits["val"], known)
    if len(splits) == 1:
        raise ValueError(f"{join(tree.path, top)}: got train alone, allowed: also one of {', '.join(HELD_OUT)}")
    held_out = next(splits[name] for name in HELD_OUT if name in splits)
    found = tree.list(held_out)[0]
    _check_known(found, known, join(tree.path, held_out))
    return classes, _labelled(tree, held_out, [name for name in found if name in classes])


def _bar(classes):
    return tqdm(
        classes, desc="listing images", unit="class", disable=len(classes) < 50, leave=False, dynamic_ncols=True
    )


def _top(tree):
    """Where the splits or classes lie: the root, or, as long as a folder holds one folder alone, that one."""
    top = ""
    while True:
        folders, _ = tree.list(top)
        if len(folders) != 1 or _split_of(folders[0]) or not tree.list(join(top, folders[0]))[0]:
            return top
        top = join(top, folders[0])


def _split_of(name):
    """ "train" or one of HELD_OUT for the name of a folder that may hold it, else None."""
    name = name.lower()
    return "train" if name in TRAINING else name if name in HELD_OUT else None


def _splits(tree, top, folders):
    """{"train" and those of HELD_OUT that there are: folder}; one that holds images directly is a class instead.

    Raises ValueError where two folders have one meaning, and for names that are splits only nearly, such as
    train_data and test_data, which would become two classes.
    """
    found, nearly = {}, []
    for name in folders:
        if not tree.list(join(top, name))[0]:
            continue
        split = _split_of(name)
        if split in found:
            raise ValueError(f"{join(tree.path, top)}: got {found[split]} and {name}, allowed: one of them")
        if split:
            found[split] = join(top, name)
        nearly += [(name, part) for part in map(_split_of, re.split("[^A-Za-z]+", name)) if part and not split]
    if len({part == "train" for _, part in nearly}) == 2:
        names = ", ".join(dict(nearly))
        raise ValueError(f"{join(tree.path, top)}: got {names}, allowed: train/<class>/* and test/<class>/*")
    return found


def _check_known(classes, known, place):
    unknown = sorted(set(classes) - set(known))
    if unknown:
        raise ValueError(
            f"{place}: got classes that train lacks ({', '.join(unknown[:SHOWN])}),"
            f" allowed: {', '.join(known[:SHOWN])}{', ...' if len(known) > SHOWN else ''}"
        )


def _labelled(tree, folder, classes):
    """{class: its images} of folders in ``folder``."""
    tree.unused += [join(folder, name) for name in tree.list(folder)[1]]
    return {name: tree.images(join(folder, name)) for name in _bar(classes)}


def _part(tree, folder, split):
    """Members of a class that are in ``split`` where no folders tell: the lowest fifth by hash is for testing."""
    images = tree.images(folder)
    if len(images) < 2:
        raise ValueError(f"{join(tree.path, folder)}: got 1 image, allowed: at least 2, one of them is held out")
    ranked = sorted(images, key=lambda member: digest(os.fsencode(member.rsplit("/", 1)[-1])))
    held_out = set(ranked[: max(1, len(images) // 5)])
    return [member for member in images if (member in held_out) == (split == "test")]


def _annotated(tree, folder, known):
    """{class: images} of Tiny ImageNet's validation split, listed in lines of: file, class, box."""
    place, members = join(folder, "val_annotations.txt"), {}
    for number, line in enumerate(tree.lines(place), start=1):
        file, name, *_ = [*line.split(), "", ""]
        if line.strip() and not name:
            raise ValueError(f"{join(tree.path, place)}:{number}: got {line[:80]!r}, allowed: file and class")
        if name:
            members.setdefault(name, []).append(join(folder, "images", file))
    _check_known(members, known, join(tree.path, place))
    return members
