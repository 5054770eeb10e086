"""Labelled images by name or place: published sets, folders of classes, and zips of such folders, read in place."""

import copy
import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from policy.files import digest
from policy.registry import choose

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm")
SPLITS = ("train", "test")
HELD_OUT = ("test", "val", "valid", "validation")  # folders that may hold the test split, the first one counts
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
            with Image.open(io.BytesIO(self._read(os.fsdecode(self._members[index])))) as image:
                return image.convert("RGB")
        except Exception as error:  # PIL, zipfile and zlib each have their own ways to fail on broken files
            raise ValueError(f"{self.name(index)}: got no readable image ({error}), allowed: whole images") from error

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

    A path is a folder, or a zip of one, with train/<class>/* and test|val|valid|validation/<class>/*, or with
    <class>/* alone, of which one image in five of each class is then held out. Classes are the sorted folder names of
    the training split. download: fetch CIFAR where it is missing.

    Raises FileNotFoundError for what is missing, ValueError for a damaged zip, no classes, classes without images and
    test classes that training lacks.
    """
    choose("split", split, SPLITS)
    if data in CIFAR:
        return _open_cifar(data, split, root, download)
    if download:
        raise ValueError(f"download: got true for {data}, allowed: true for {', '.join(CIFAR)}")
    path = _locate(data, root)
    tree = _Folder(path) if path.is_dir() else _Zip(path)
    listed = "imagenet100.txt" if data == "imagenet100" else None
    classes, members = _find_images(tree, split, listed)
    found = [(label, member) for label, name in enumerate(classes) for member in members.get(name, ())]
    if not found:
        raise ValueError(f"{path}: got no images to {split}, allowed: images of {', '.join(classes) or 'some class'}")
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


class _Folder:
    """The files below a folder."""

    def __init__(self, path):
        self.path = path

    def list(self, place):
        """Sorted names (folders, files) directly in ``place``, without hidden ones."""
        with os.scandir(self.path / place) as entries:
            shown = sorted((entry.name, entry.is_dir()) for entry in entries if not _is_hidden(entry.name))
        return [name for name, is_folder in shown if is_folder], [name for name, is_folder in shown if not is_folder]

    def read(self, member):
        return (self.path / member).read_bytes()


class _Zip:
    """The files of a zip, read in place; every process opens its own handle."""

    def __init__(self, path):
        self.path = path
        self._file, self._owner = self._open(), os.getpid()
        self._entries = {"": (set(), set())}
        for name in self._file.namelist():
            parts = name.split("/")
            if any(_is_hidden(part) for part in parts):
                continue
            for depth, part in enumerate(parts[:-1]):
                self._entries["/".join(parts[:depth])][0].add(part)
                self._entries.setdefault("/".join(parts[: depth + 1]), (set(), set()))
            if parts[-1]:
                self._entries["/".join(parts[:-1])][1].add(parts[-1])

    def _open(self):
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: got no whole zip ({error}), allowed: a folder or .zip of images") from error

    def list(self, place):
        """Sorted names (folders, files) directly in ``place``, without hidden ones."""
        folders, files = self._entries[place]
        return sorted(folders), sorted(files)

    def read(self, member):
        if self._owner != os.getpid():  # a forked handle would share its position in the file
            self._file, self._owner = self._open(), os.getpid()
        return self._file.read(member)


def _is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def _find_images(tree, split, listed):
    """(classes, {class: its images in ``split``}) of a tree; listed: a file of the classes to keep, or None."""
    top = _top(tree)
    folders, files = tree.list(top)
    # One that holds images directly is a class of that name.
    splits = [name for name in ("train", *HELD_OUT) if name in folders and tree.list(_join(top, name))[0]]
    if "train" not in splits:
        if splits or not folders:
            raise ValueError(
                f"{_join(tree.path, top)}: got {', '.join(folders) or 'no folders'},"
                " allowed: train/<class>/* and test/<class>/*, or <class>/*"
            )
        return folders, {name: _part(tree, _join(top, name), split) for name in _bar(folders)}
    known = classes = tree.list(_join(top, "train"))[0]
    if listed in files:
        classes = sorted(set(tree.read(_join(top, listed)).decode().split()))
        _check_known(classes, known, _join(tree.path, top, listed))
    if split == "train":
        return classes, {name: _images(tree, _join(top, "train", name)) for name in _bar(classes)}
    if "val" in splits and "val_annotations.txt" in tree.list(_join(top, "val"))[1]:
        return classes, _annotated(tree, _join(top, "val"), known)
    if len(splits) == 1:
        raise ValueError(f"{_join(tree.path, top)}: got train alone, allowed: also one of {', '.join(HELD_OUT)}")
    found = tree.list(_join(top, splits[1]))[0]
    _check_known(found, known, _join(tree.path, top, splits[1]))
    return classes, {name: _images(tree, _join(top, splits[1], name)) for name in _bar(found) if name in classes}


def _join(*parts):
    return "/".join(str(part) for part in parts if str(part))


def _bar(classes):
    return tqdm(
        classes, desc="listing images", unit="class", disable=len(classes) < 50, leave=False, dynamic_ncols=True
    )


def _top(tree):
    """Where the splits or classes lie: the root, or its only folder where that one holds further folders."""
    folders, _ = tree.list("")
    if len(folders) == 1 and folders[0] not in ("train", *HELD_OUT) and tree.list(folders[0])[0]:
        return folders[0]
    return ""


def _check_known(classes, known, place):
    unknown = sorted(set(classes) - set(known))
    if unknown:
        raise ValueError(
            f"{place}: got classes that train lacks ({', '.join(unknown[:5])}),"
            f" allowed: {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
        )


def _images(tree, folder):
    """Members that are the images of a class; Tiny ImageNet has them in a folder ``images``."""
    folders, files = tree.list(folder)
    if "images" in folders:
        folder = _join(folder, "images")
        files = tree.list(folder)[1]
    images = [_join(folder, name) for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise ValueError(f"{_join(tree.path, folder)}: got no images, allowed: files {', '.join(IMAGE_SUFFIXES)}")
    return images


def _part(tree, folder, split):
    """Members of a class that are in ``split`` where no folders tell: the lowest fifth by hash is for testing."""
    images = _images(tree, folder)
    if len(images) < 2:
        raise ValueError(f"{_join(tree.path, folder)}: got 1 image, allowed: at least 2, one of them is held out")
    ranked = sorted(images, key=lambda member: digest(os.fsencode(member.rsplit("/", 1)[-1])))
    held_out = set(ranked[: max(1, len(images) // 5)])
    return [member for member in images if (member in held_out) == (split == "test")]


def _annotated(tree, folder, known):
    """{class: images} of Tiny ImageNet's validation split, listed in lines of: file, class, box."""
    lines = tree.read(_join(folder, "val_annotations.txt")).decode().splitlines()
    members = {}
    for file, name, *_ in (line.split() for line in lines if line.strip()):
        members.setdefault(name, []).append(_join(folder, "images", file))
    _check_known(members, known, _join(tree.path, folder, "val_annotations.txt"))
    return members
