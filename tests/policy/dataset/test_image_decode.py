"""Pictures of every mode are what they show: Pillow and torchvision's ImageFolder are the references."""

import io
import os
import re
import zlib

import numpy as np
import pytest
from image_files import TWO_SPLITS, encoded, picture, placed
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from policy.dataset.image import trees
from policy.dataset.image.dataset import ImageDataset
from policy.dataset.image.sources import open_images

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
SHAPES = (RAMP // 16 + 2 * (RAMP % 16)).astype(np.uint8)  # no symmetry
COLOURS = np.dstack([RAMP, RAMP.T, RAMP[::-1]])
ALPHA = np.dstack([COLOURS, RAMP.T])


def saved(image, kind, **options):
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, kind, **options)
    return content.getvalue()


def over_white(colours, alpha):
    share = alpha[..., None].astype(float) / 255
    return colours * share + 255 * (1 - share)


def palette(**options):
    image = Image.fromarray(RAMP // 64)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    return saved(image, "PNG", **options)


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])
SIXTEEN = RAMP.astype(np.uint16) * 257
GREY = np.dstack([RAMP] * 3)
FADED = np.dstack([RAMP, RAMP.T])
HIDDEN = np.where(RAMP[..., None] == 7, 255, GREY)  # level 7 is transparent
PGM = b"P5 16 16 65535\n" + SIXTEEN.astype(">u2").tobytes()
ONE_BIT = np.dstack([(RAMP > 99) * 255] * 3)
FRAMES = {"save_all": True, "append_images": [Image.fromarray(RAMP.T)]}
# {file: (its bytes, what it shows)}
KINDS = {
    "grey.png": (saved(RAMP, "PNG"), GREY),
    "grey16.png": (saved(SIXTEEN, "PNG"), GREY),
    "grey16.tiff": (saved(SIXTEEN, "TIFF"), GREY),
    "grey16big.tif": (saved(Image.frombytes("I;16B", (16, 16), SIXTEEN.astype(">u2").tobytes()), "TIFF"), GREY),
    "grey16white0.tif": (saved(SIXTEEN, "TIFF", tiffinfo={262: 0}), 255 - GREY),
    "grey16.pgm": (PGM, GREY),
    "grey16hidden.png": (saved(SIXTEEN, "PNG", transparency=7 * 257), HIDDEN),
    "hidden.png": (saved(RAMP, "PNG", transparency=7), HIDDEN),
    "bit.png": (saved(Image.fromarray(RAMP > 99), "PNG"), ONE_BIT),
    "faded.png": (saved(FADED, "PNG"), over_white(GREY, RAMP.T)),
    "colours.bmp": (saved(COLOURS, "BMP"), COLOURS),
    "alpha.png": (saved(ALPHA, "PNG"), over_white(COLOURS, RAMP.T)),
    "alpha.tiff": (saved(ALPHA, "TIFF"), over_white(COLOURS, RAMP.T)),
    "alpha.webp": (saved(ALPHA, "WEBP", lossless=True, exact=True), over_white(COLOURS, RAMP.T)),
    "named.png": (saved(COLOURS, "PNG", transparency=tuple(map(int, COLOURS[3, 5]))), None),
    "palette.png": (palette(), PALETTE[RAMP // 64]),
    "palette1.png": (palette(transparency=1), np.array([*PALETTE[:1], [255] * 3, *PALETTE[2:]])[RAMP // 64]),
    "palettes.png": (palette(transparency=b"\x00\xff\x80"), None),
    "cmyk.jpg": (saved(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"), None),
    "cmyk.tif": (saved(Image.fromarray(COLOURS).convert("CMYK"), "TIFF"), COLOURS),
    "film.gif": (saved(RAMP, "GIF", **FRAMES), GREY),
    "pages.tif": (saved(RAMP, "TIFF", **FRAMES), GREY),
}  # fmt: skip


def shown(tmp_path, name, content, *, place="pets", once=False):
    """uint8 (h, w, 3) of the first training image, called ``name``."""
    others = {"train/dog/0.png": encoded(picture(0)), "test/dog/0.png": encoded(picture(1))}
    source = open_images(placed({f"train/cat/{name}": content, **others}, tmp_path / place), "train")
    if once:
        source = source.subset([0, 0])
        source.decode_once()
    assert once == (source.pixels is not None)
    return np.asarray(source.image(0))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("place", "once"), [("pets", False), ("pets", True), ("pets.zip", False)])
def test_every_kind_of_picture(tmp_path, name, place, once):
    content, expected = KINDS[name]
    found = shown(tmp_path, name, content, place=place, once=once)
    if expected is None:  # as Pillow puts it on white
        layer = Image.open(io.BytesIO(content))
        layer = layer.convert("RGB" if layer.mode == "CMYK" else "RGBA").convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    assert np.abs(found.astype(float) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("kind", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"quality": 100} if kind == ".jpg" else {"lossless": True} if kind == ".webp" else {})
    content = saved(SHAPES[:, :10] * 5, Image.registered_extensions()[kind], **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    found = shown(tmp_path, f"0{kind}", content)
    assert found.shape[:2] == expected.shape[:2] == ((16, 10) if orientation < 5 else (10, 16))
    assert np.abs(found[..., 0].astype(int) - expected.reshape(*expected.shape[:2], -1)[..., 0]).max() <= 3
    assert (found[0, 0] == 0).all() == (orientation in (1, 5))


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    content = saved(COLOURS, "PNG", exif=b"Exif\0\0no such thing")
    np.testing.assert_array_equal(shown(tmp_path, "0.png", content), COLOURS)


def chunk(name, content):
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def png_of_size(width, height):
    """The start of a PNG, which claims to be so large."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


REFUSED = {
    "float.tiff": saved(RAMP.astype(np.float32) / 255, "TIFF"),
    "integers.tiff": saved(RAMP.astype(np.int32) * 1000, "TIFF"),
    "large.png": png_of_size(20_000, 5001),
    "bomb.png": png_of_size(10**6, 10**6),
    "long.png": png_of_size(2, 5000),
    "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    "empty.png": b"",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["pets", "pets.zip"])
def test_what_has_no_known_range_or_size_is_refused(tmp_path, place, name):
    with pytest.raises(ValueError, match=re.escape(f"train/cat/{name}")) as error:
        shown(tmp_path, name, REFUSED[name], place=place)
    assert "\n" not in str(error.value)


def test_bombs_and_pipes_are_not_read(tmp_path, monkeypatch):
    path = placed(TWO_SPLITS, tmp_path / "pets")
    with open(path / "train/cat/0.png", "wb") as file:
        file.truncate(2**40)  # takes no room
    os.mkfifo(path / "train/cat/00.png")
    bomb = placed({**TWO_SPLITS, "train/cat/0.png": encoded(picture(0, (99, 99)))}, tmp_path / "bomb.zip")
    for place, index, most in ((path, 0, trees.MOST_BYTES), (path, 1, trees.MOST_BYTES), (bomb, 0, 9999)):
        monkeypatch.setattr(trees, "MOST_BYTES", most)
        with pytest.raises(ValueError, match="cat/00?.png"):
            open_images(place, "train").image(index)
    future = bomb.read_bytes()
    place = future.index(b"PK\1\2") + 6  # the version of the format that it needs
    (tmp_path / "future.zip").write_bytes(future[:place] + b"\xff\0" + future[place + 2 :])
    with pytest.raises(ValueError, match="future.zip"):
        open_images(tmp_path / "future.zip", "train")
    deep = placed({**TWO_SPLITS, "train/cat/" + "a/" * 30_000 + "0.png": b""}, tmp_path / "deep.zip")
    with pytest.raises(ValueError, match="deep.zip"):
        open_images(deep, "train")


# Which files ---------------------------------------------------------------------------------------------------------

NESTED = ["", "a/", "a/x/", "a-b/", "z/"]
SUFFIXES = [".jpg", ".JPG", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".TIFF", ".webp"]  # ImageFolder's


@pytest.mark.parametrize("place", ["pets", "pets.zip"])
def test_images_are_those_of_image_folder_in_its_order(tmp_path, place):
    files = dict(TWO_SPLITS)
    for number, (folder, suffix) in enumerate((folder, suffix) for folder in NESTED for suffix in SUFFIXES):
        pixels = picture(number)[..., 0] if suffix == ".pgm" else picture(number)
        files[f"train/cat/{folder}{number % 7}{suffix}"] = encoded(pixels, ".ppm" if suffix == ".pgm" else suffix)
    files["train/dog/notes.txt"] = files["train/loose.png"] = files["train/dog/sub/film.mp4"] = b""
    reference = ImageFolder(placed(files, tmp_path / "reference") / "train")
    path = placed(files, tmp_path / place)
    with pytest.warns(UserWarning, match="3 files not used.*loose.png.*notes.txt") as warned:
        source = open_images(path, "train")
    assert len(warned) == 1 and source.classes == reference.classes
    assert len(source) == len(reference) == 56 and source.labels.tolist() == reference.targets
    for index, (name, _) in enumerate(reference.samples):
        assert source.name(index) == name.replace(str(tmp_path / "reference"), str(path))
        np.testing.assert_array_equal(source.image(index), reference[index][0])


def test_links_are_followed_but_not_in_circles(tmp_path):
    path = placed(TWO_SPLITS, tmp_path / "pets")
    placed({"0.png": encoded(picture(5))}, tmp_path / "elsewhere")
    (path / "train/cat/link").symlink_to(tmp_path / "elsewhere")
    (path / "train/cat/circle").symlink_to(path / "train/cat")
    source = open_images(path, "train")
    names = [source.name(index).removeprefix(f"{path}/train/") for index in range(len(source))]
    assert names == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/link/0.png", "dog/0.png", "dog/1.png", "dog/2.png"]


@pytest.mark.parametrize("place", ["pets", "pets.zip"])
@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing"), ("train", "Validation")]
)
def test_names_of_splits_in_other_letters(tmp_path, place, names):
    files = {name.replace("train", names[0]).replace("test", names[1]): data for name, data in TWO_SPLITS.items()}
    path = placed(files, tmp_path / place)
    for split, count in (("train", 6), ("test", 4)):
        source = open_images(path, split)
        assert source.classes == ["cat", "dog"] and len(source) == count


@pytest.mark.parametrize("names", [("train", "Train"), ("train", "training"), ("train_data", "test_data")])
def test_names_that_could_be_splits_or_classes_are_refused(tmp_path, names):
    files = {name.replace("train", names[0]).replace("test", names[1]): data for name, data in TWO_SPLITS.items()}
    with pytest.raises(ValueError, match="|".join(names)):
        open_images(placed(files, tmp_path / "pets"), "train")


@pytest.mark.parametrize("size", [(30, 50), (500, 41), (9, 9)])
def test_images_of_any_size_come_at_the_asked_one(tmp_path, size):
    files = {**TWO_SPLITS, "train/cat/0.png": encoded(picture(0, size)), "train/cat/1.png": encoded(RAMP)}
    data = ImageDataset(open_images(placed(files, tmp_path / "pets"), "train"), image_size=24, resize=32)
    assert data.batch([0, 1, 5])["image"].shape == (3, 3, 24, 24)
