"""What all pictures share: one palette, one kind of figure, labelled rows of images; and reconstructions."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from policy.files import write_whole

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = PALETTE  # Okabe and Ito's, which colour-blind readers can tell apart
GREY = "#5F6B76"  # of what explains
COLUMNS = 8
GAP = 6  # px between images


def new_figure(width, height):
    """An empty figure of so many inches; its parts never overlap."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display; imported late, for it takes a while

    return Figure(figsize=(width, height), layout="constrained")


def new_panels(count, *, width=4.4, height=3.5, below=0):
    """(figure, [axes]) of ``count`` panels of so many inches, at most three in a row; below: more for a legend."""
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows + below)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.axis("off")
    return figure, panels[:count]


def set_scale(axes, scale):
    """The y axis: "share" shows all of 0 to 1, "log" what its limits say with readable numbers, or "linear"."""
    if scale == "share":
        axes.set(ylim=(-0.03, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1])
    elif scale == "log":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 1e3 * low else (1,))
        axes.yaxis.set_minor_formatter("")
    axes.yaxis.set_major_formatter("{x:g}")


def png_of(picture, *, dpi=130, colours=None):
    """Bytes of the PNG of a figure or a PIL image; colours: so many at most, which makes a small file."""
    file = io.BytesIO()
    if hasattr(picture, "savefig"):
        for text in picture.findobj(lambda part: hasattr(part, "set_parse_math") and "$" in part.get_text()):
            text.set_parse_math(False)  # a name with dollars is no formula; no axis of ours has one
        picture.savefig(file, format="png", dpi=dpi)
        if colours is None:
            return file.getvalue()
        picture = Image.open(file)
    if colours is not None:
        picture, file = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE), io.BytesIO()
    picture.save(file, format="PNG", optimize=colours is not None)
    return file.getvalue()


def save_png(picture, path, **options):
    """Write a figure or a PIL image whole or not at all, options as of ``png_of``; returns ``path``."""
    write_whole(path, png_of(picture, **options))
    return path


# Rows of images ------------------------------------------------------------------------------------------------------


def picture_rows(rows, *, caption="", side=144):
    """A PIL image of labelled rows of images, each about ``side`` px high: whole multiples of its pixels, or fewer.

    rows: [(label, images [(h, w, 3) uint8], titles above them)]; a title is text or (text, colour), and there may be
    none. Lines of labels and titles break at "\\n"; what is too wide for its image is cut.
    """
    font, small = _font(15), _font(13)
    rows = [(label, [_scaled(image, side) for image in images], titles) for label, images, titles in rows]
    left = max((_width(label, font) for label, *_ in rows), default=0)
    left = left + 2 * GAP if left else GAP
    widths = [sum(image.width + GAP for image in images) for _, images, _ in rows]
    canvas = Image.new("RGB", (left + max(widths), sum(map(_height, rows)) + GAP), "white")
    draw, top = ImageDraw.Draw(canvas), GAP
    for label, images, titles in rows:
        above = _height((label, images, titles)) - GAP - images[0].height
        middle = (GAP, top + above + images[0].height / 2)
        draw.multiline_text(middle, label, fill=BLACK, font=font, anchor="lm", spacing=3)
        x = left
        for image, title in zip(images, titles or [""] * len(images), strict=True):
            canvas.paste(image, (x, top + above))
            draw.rectangle([x - 1, top + above - 1, x + image.width, top + above + image.height], outline="#B8C0C8")
            text, colour = (title, GREY) if isinstance(title, str) else title
            for number, line in enumerate(reversed(text.split("\n"))):
                place = (x + image.width / 2, top + above - 7 - 16 * number)
                draw.text(place, _cut(line, small, image.width), fill=colour, font=small, anchor="ms")
            x += image.width + GAP
        top += _height((label, images, titles))
    return _with_caption(canvas, caption)


def _with_caption(picture, caption):
    """``picture`` above the words of ``caption``, which are larger below a wide one."""
    if not caption:
        return picture
    size = min(max(picture.width // 95, 13), 22)
    font, lines = _font(size), [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = font.getlength(longer) <= picture.width - 2 * GAP
        lines = [*lines[:-1], longer] if fits or not lines[-1] else [*lines, word]
    canvas = Image.new("RGB", (picture.width, picture.height + round(1.5 * size * len(lines)) + GAP), "white")
    canvas.paste(picture)
    words = "\n".join(lines)
    ImageDraw.Draw(canvas).multiline_text((GAP, picture.height), words, fill=GREY, font=font, spacing=size // 4)
    return canvas


def _height(row):
    """px of a row with its titles and the gap below."""
    _, images, titles = row
    lines = max((1 + (title if isinstance(title, str) else title[0]).count("\n") for title in titles or ()), default=0)
    return images[0].height + GAP + 16 * lines + (4 if lines else 0)


def _scaled(image, side):
    image = Image.fromarray(np.ascontiguousarray(image))
    if image.height > side:
        return image.resize((max(round(image.width * side / image.height), 1), side), Image.Resampling.BOX)
    factor = max(round(side / image.height), 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font(size):
    from matplotlib import get_data_path  # its font knows every alphabet of our data

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _width(text, font):
    return round(max(map(font.getlength, text.split("\n"))))


def _cut(text, font, width):
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def write_reconstructions(path, pairs):
    """A PNG of ``pairs`` {camera: (observed, reconstructed)} (B, To, 3, h, w) in [-1, 1], one above the other.

    Shows the last observed step of the first few of B.
    """
    rows, count = [], 0
    for camera, pair in pairs.items():
        for what, images in zip(("observed", "reconstructed"), pair, strict=True):
            images = images[:COLUMNS, -1].float().cpu().numpy().transpose(0, 2, 3, 1)  # (columns, h, w, 3)
            images, count = np.clip((images + 1) * 127.5, 0, 255).round().astype(np.uint8), len(images)
            titles = None if rows else [f"window {number + 1}" for number in range(count)]
            rows.append((f"{camera}\n{what}", list(images), titles))
    sizes = ", ".join(f"{name} {pair[1].shape[-1]} x {pair[1].shape[-2]} px" for name, pair in pairs.items())
    caption = f"The last observed step of {count} held-out windows, and what the decoder makes of it: {sizes}."
    save_png(picture_rows(rows, caption=caption), path)
