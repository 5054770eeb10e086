"""Images as files, folders and zips."""

import io
import itertools
import zipfile

import numpy as np
from PIL import Image


def picture(seed, size=(8, 8)):
    """Noise (h, w, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(pixels, suffix=".png"):
    """An image file as bytes; .png and .bmp keep the pixels exactly."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, Image.registered_extensions()[suffix.lower()])
    return content.getvalue()


def class_folders(prefix, classes, count, seed=0):
    """{name: bytes} of ``count`` images a class."""
    numbers = itertools.count(seed * 1000)
    return {f"{prefix}{name}/{i}.png": encoded(picture(next(numbers))) for name in classes for i in range(count)}


def placed(files, path):
    """``path`` as a folder that holds the files, or as a zip of them when it is called .zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    for name, data in files.items():
        place = path / name
        (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        if not place.is_dir():
            place.write_bytes(data)
    return path


# two classes, three images to train and two to test
TWO_SPLITS = {**class_folders("train/", ("dog", "cat"), 3), **class_folders("test/", ("dog", "cat"), 2, seed=1)}
