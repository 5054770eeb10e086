"""Labelled images: folders, zips and published sets; what cannot be read is named; sets that fit are decoded once."""

import hashlib
import io
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from image_files import TWO_SPLITS, class_folders, encoded, picture, placed
from PIL import Image

from policy.dataset.image import sources as image_sources
from policy.dataset.image.dataset import ImageDataset
from policy.dataset.image.sources import CIFAR, open_images


@pytest.fixture
def folder(tmp_path):
    return placed(TWO_SPLITS, tmp_path / "pets")


@pytest.mark.parametrize("top", ["", "pets/"])
@pytest.mark.parametrize("place", ["pets", "pets.zip"])
@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_folders_and_zips_of_splits(tmp_path, top, place, held_out):
    files = {f"{top}{name.replace('test/', f'{held_out}/')}": data for name, data in TWO_SPLITS.items()}
    path = placed(files, tmp_path / place)
    for split, count, prefix in (("train", 3, "train"), ("test", 2, held_out)):
        source = open_images(path, split)
        assert source.classes == ["cat", "dog"] and source.labels.dtype == np.int64
        assert source.labels.tolist() == [0] * count + [1] * count
        assert source.name(count) == f"{path}/{top}{prefix}/dog/0.png"
        for index in range(len(source)):
            data = files[source.name(index).removeprefix(f"{path}/")]
            np.testing.assert_array_equal(source.image(index), Image.open(io.BytesIO(data)))
    assert os.listdir(tmp_path) == [place]  # nothing is unpacked


@pytest.mark.parametrize("place", ["pets", "pets.zip"])
def test_only_images_that_show_count(tmp_path, place):
    noise = ["train/cat/notes.txt", "train/cat/.hidden.png", "train/.cache/a.png"]
    noise += ["__MACOSX/train/cat/0.png", "train/__MACOSX/0.png", "readme.png"]
    kinds = (".jpg", ".JPEG", ".png", ".BMP", ".gif", ".webp", ".ppm")
    extra = {f"train/cat/x{kind}": encoded(picture(7), kind) for kind in kinds}
    source = open_images(placed({**TWO_SPLITS, **dict.fromkeys(noise, b""), **extra}, tmp_path / place), "train")
    assert source.classes == ["cat", "dog"]
    assert np.bincount(source.labels).tolist() == [3 + len(kinds), 3]
    assert all(source.image(index).mode == "RGB" for index in range(len(source)))


@pytest.mark.parametrize("place", ["pets", "pets.zip"])
def test_without_splits_a_fifth_of_each_class_is_held_out(tmp_path, place):
    files = {**class_folders("", ("cat",), 23), **class_folders("", ("train",), 2)}  # a class may be called train
    path = placed(files, tmp_path / place)
    train, test = (open_images(path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "train"]
    shown, held_out = ({s.name(i).removeprefix(f"{path}/") for i in range(len(s))} for s in (train, test))
    assert not shown & held_out and shown | held_out == set(files)
    ranked = sorted((f"{i}.png" for i in range(23)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert {name for name in held_out if name.startswith("cat")} == {f"cat/{name}" for name in ranked[:4]}
    assert np.bincount(test.labels).tolist() == [4, 1]


def test_test_labels_are_numbers_of_training_classes(folder):
    shutil.rmtree(folder / "test" / "cat")
    source = open_images(folder, "test")
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [1, 1]


@pytest.mark.parametrize("place", ["tiny-imagenet-200", "tiny-imagenet-200.zip"])
def test_tiny_imagenet(tmp_path, place):
    top = "tiny-imagenet-200/" if place.endswith("zip") else ""
    files = {f"{top}train/{w}/images/{w}_{i}.JPEG": encoded(picture(i)) for w in ("n02", "n01") for i in range(3)}
    files |= {f"{top}val/images/val_{i}.JPEG": encoded(picture(10 + i)) for i in range(3)}
    files |= {f"{top}test/images/test_0.JPEG": encoded(picture(20))}  # published without labels
    lines = [f"val_{i}.JPEG\t{w}\t0\t32\t44\t62" for i, w in enumerate(("n02", "n01", "n02"))]
    files[f"{top}val/val_annotations.txt"] = "\n".join(lines).encode()
    placed(files, tmp_path / place)
    train, test = (open_images("tiny_imagenet", split, root=tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ["n01", "n02"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1, 1]
    for index, number in enumerate((11, 10, 12)):
        np.testing.assert_array_equal(test.image(index), picture(number))


def test_imagenet_and_the_list_of_a_hundred(tmp_path):
    for name in ("imagenet", "imagenet100"):
        files = {**class_folders("train/", ("n1", "n2", "n3"), 2), **class_folders("val/", ("n1", "n2", "n3"), 1)}
        placed({**files, "imagenet100.txt": b"n3\nn1\n"}, tmp_path / name)
    assert open_images("imagenet", "train", root=tmp_path).classes == ["n1", "n2", "n3"]
    for split, each in (("train", 2), ("test", 1)):
        source = open_images("imagenet100", split, root=tmp_path)
        assert source.classes == ["n1", "n3"]
        assert source.labels.tolist() == [0] * each + [1] * each
        assert not any("n2" in source.name(index) for index in range(len(source)))
    for content, message in (("n1\nn9\n", "imagenet100.txt.*n9"), ("", "no images")):
        (tmp_path / "imagenet100" / "imagenet100.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_images("imagenet100", "train", root=tmp_path)
    (tmp_path / "imagenet100" / "imagenet100.txt").unlink()
    assert len(open_images("imagenet100", "train", root=tmp_path).classes) == 3


def test_imagenette_of_160_px_comes_first(tmp_path):
    for name in ("imagenette2", "imagenette2-320", "imagenette2-160"):
        placed(class_folders("train/", (name,), 1), tmp_path / name)
    (tmp_path / "imagenette2-160.tgz").touch()
    assert open_images("imagenette", "train", root=tmp_path).classes == ["imagenette2-160"]
    (tmp_path / "imagenette2-160").rename(tmp_path / "other")
    assert open_images("imagenette", "train", root=tmp_path).classes == ["imagenette2"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of six images in a batch, with the MD5 sums that torchvision then expects."""
    folder = tmp_path / CIFAR["cifar10"].base_folder
    folder.mkdir()

    def batch(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def images_of(seed):
        return {
            "data": np.stack([picture(seed + i, (32, 32)).transpose(2, 0, 1).ravel() for i in range(6)]),
            "labels": [2, 0, 1, 1, 0, 2],
        }

    name, md5 = batch("batches.meta", {"label_names": ["a", "b", "c"]})
    monkeypatch.setattr(CIFAR["cifar10"], "train_list", [batch("data_batch_1", images_of(0))])
    monkeypatch.setattr(CIFAR["cifar10"], "test_list", [batch("test_batch", images_of(50))])
    monkeypatch.setattr(CIFAR["cifar10"], "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def test_cifar(cifar):
    for split, seed in (("train", 0), ("test", 50)):
        source = open_images("cifar10", split, root=cifar.parent)
        assert source.classes == ["a", "b", "c"] and source.name(3) == f"{cifar}/{split}/3"
        assert source.labels.tolist() == [2, 0, 1, 1, 0, 2]
        for index in range(6):
            np.testing.assert_array_equal(source.image(index), picture(seed + index, (32, 32)))


def test_missing_and_damaged_cifar_says_where_it_comes_from(tmp_path, cifar):
    (cifar / "data_batch_1").write_bytes(b"\x80")
    for name, archive in (("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")):
        with pytest.raises(FileNotFoundError, match=f"download=true.*{archive}"):
            open_images(name, "train", root=tmp_path)


def test_cifar_is_downloaded_on_request_only(cifar, monkeypatch):
    asked = []
    monkeypatch.setattr(CIFAR["cifar10"], "download", lambda self: asked.append(self.root))
    open_images("cifar10", "train", root=cifar.parent)
    assert not asked
    open_images("cifar10", "train", root=cifar.parent, download=True)
    assert asked == [cifar.parent]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (TWO_SPLITS, "val", "split"),
        ({"notes.txt": b""}, "train", "{path}: got no folders"),
        ({"train/": b"", "test/": b""}, "train", "{path}/t[a-z]*: got no images"),
        ({**TWO_SPLITS, "train/eel/": b""}, "train", "{path}/train/eel"),
        ({**TWO_SPLITS, "train/eel/a.txt": b""}, "train", "{path}/train/eel"),
        ({**TWO_SPLITS, "test/cat2/0.png": b""}, "test", "{path}/test: .*cat2"),
        (class_folders("train/", ("cat", "dog"), 2), "test", "{path}: got train alone"),
        (class_folders("val/", ("cat", "dog"), 2), "test", "{path}: got val"),
        (class_folders("", ("cat", "dog"), 1), "train", "{path}/cat: got 1 image"),
    ],
)
@pytest.mark.parametrize("place", ["pets", "pets.zip"])
def test_unusable_folders(tmp_path, place, files, split, message):
    path = placed(files, tmp_path / place)
    with pytest.raises(ValueError, match=message.format(path=re.escape(str(path)))) as error:
        open_images(path, split)
    assert "\n" not in str(error.value)


def test_missing_and_unusable_paths(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="data: got cifar11, .*cifar10"):
        open_images("cifar11", "train")
    with pytest.raises(FileNotFoundError, match="imagenette2-160.*https://"):
        open_images("imagenette", "train", root=tmp_path)
    with pytest.raises(ValueError, match="download"):
        open_images(folder, "train", download=True)
    whole = placed(TWO_SPLITS, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half.zip"):
        open_images(tmp_path / "half.zip", "train")


@pytest.mark.parametrize("place", ["pets", "pets.zip"])
def test_an_unreadable_image_is_named(tmp_path, place):
    """Cut off, no image at all, or with a byte changed, which the checksum of a zip tells."""
    whole = encoded(picture(0, (64, 64)), ".jpg")
    files = {**TWO_SPLITS, "train/cat/cut.jpg": whole[: len(whole) // 2], "train/cat/none.png": b"no image"}
    changed = bytearray(files["train/dog/0.png"])
    changed[changed.index(b"IDAT") + 10] ^= 255
    path = placed(files, tmp_path / place)
    content = path.read_bytes() if path.suffix else None
    if content:
        path.write_bytes(content.replace(files["train/dog/0.png"], changed))
    else:
        (path / "train/dog/0.png").write_bytes(changed)
    source = open_images(path, "train")
    for index, name in ((3, "cat/cut.jpg"), (4, "cat/none.png"), (5, "dog/0.png")):
        with pytest.raises(ValueError, match=re.escape(f"{path}/train/{name}")) as error:
            source.image(index)
        assert "\n" not in str(error.value)


def test_subsets_keep_classes_and_pixels(folder):
    whole = open_images(folder, "train")
    for _ in range(2):
        part = whole.subset([4, 0])
        assert part.classes == whole.classes and part.labels.tolist() == [1, 0]
        for index, original in enumerate((4, 0)):
            assert part.name(index) == whole.name(original)
            np.testing.assert_array_equal(part.image(index), whole.image(original))
        whole.decode_once()


def test_small_sets_are_decoded_once(folder, monkeypatch):
    monkeypatch.setattr(image_sources, "BLOCK_IMAGES", 2)
    source = open_images(folder, "train")
    before = [np.asarray(source.image(index)) for index in range(len(source))]
    ImageDataset(source, image_size=8)
    shutil.rmtree(folder / "train")
    source.decode_once()
    for index, expected in enumerate(before):
        np.testing.assert_array_equal(source.image(index), expected)


@pytest.mark.parametrize("reason", ["too large", "several sizes", "broken"])
def test_other_sets_are_decoded_at_each_access(folder, monkeypatch, reason):
    monkeypatch.setattr(image_sources, "BLOCK_IMAGES", 2)
    if reason == "too large":
        monkeypatch.setattr(image_sources, "DECODED_BYTES", 6 * 8 * 8 * 3 - 1)
    else:
        content = encoded(picture(0, (8, 9))) if reason == "several sizes" else b""
        (folder / "train" / "dog" / "1.png").write_bytes(content)
    source = open_images(folder, "train")
    if reason == "broken":
        with pytest.raises(ValueError, match="dog/1.png"):
            source.decode_once()
        return
    source.decode_once()
    assert source.pixels is None and len(ImageDataset(source, image_size=8).batch(np.arange(6))["label"]) == 6
