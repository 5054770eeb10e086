"""The bytes of an image file to RGB pixels: upright, over white, grey levels of 16 bits scaled to 8."""

import io

import numpy as np
from PIL import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, for which Pillow would run a program
MOST_PIXELS = 10**8
STRETCH = 1000  # times the shorter side; the short side of a long strip would be scaled up to gigabytes
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
UPRIGHT = {  # how to turn what has that orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
OPAQUE = ("1", "L", "RGB", "RGBX", "CMYK", "YCbCr")


def decode_image(content):
    """The image in ``content`` (bytes) as RGB (PIL), the first one of an animation or of several pages.

    Raises ValueError for floats and 32-bit integers, whose range a file does not tell, and for impossible sizes; what
    Pillow raises for anything it cannot read.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MOST_PIXELS or max(image.size) > STRETCH * min(image.size):
            raise ValueError(f"{width} x {height} px, more than {MOST_PIXELS:,} or {STRETCH:,} times longer than wide")
        image.load()
        pixels = _over_white(image)
        turn = UPRIGHT.get(_orientation(image))
        return pixels if turn is None else pixels.transpose(turn)


def _over_white(image):
    """RGB of a loaded ``image`` that lies on white wherever it is transparent."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image).convert("RGB")
    if image.mode in OPAQUE and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _scaled(image):
    """8-bit grey of an ``image`` whose grey levels have 16 bits, or so many as a TIFF says."""
    # Pillow has one mode for integers of 32 bits and for what PPM (and PNG, in its older versions) has in 16.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
        raise ValueError(f"{'floats' if image.mode == 'F' else 'integers'} of 32 bits, whose range no file tells")
    values, tags = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {})
    scaled = (values * (255 / (2 ** tags.get(BITS, (16,))[0] - 1))).round()
    if tags.get(PHOTOMETRIC) == 0:  # white is 0
        scaled = 255 - scaled
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


def _orientation(image):
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # EXIF that cannot be read, for which Pillow has many errors, tells no orientation
        return None
