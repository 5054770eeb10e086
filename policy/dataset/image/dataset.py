"""Labelled images as batches: evaluation crops, and augmentation that is a function of a seed and the image alone."""

import itertools

from PIL import Image, ImageOps
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor

from policy.dataset.stream import generators_restored, seed_generators, stream_batches
from policy.registry import check_options, lookup, within

LARGEST = 10_000  # px
LARGE = 96  # px; from here on evaluation leaves out a margin, as on ImageNet


class ImageDataset:
    """The images of an ImageSource as batches {"image": float32 (B, 3, s, s) in [-1, 1], "label": int64 (B,)}.

    image_size: s in px; resize: length of the short side in px before the centre crop of evaluation; augment: options
    of ``augmentation``, or None; workers: processes that prepare the batches of ``stream``, 0 for none.
    """

    def __init__(self, source, *, image_size, augment=None, workers=0, resize=None):
        within(0, 1000, workers=workers)
        crop = evaluation_crop(image_size, resize)
        self._evaluation = transforms.Compose([crop, to_tensor])
        self._training = self._evaluation
        if augment is not None:
            check_options("image", "augment", augment, augmentation, without=("image_size", "evaluation"))
            self._training = augmentation(image_size, crop, **augment)
        self.source, self.workers = source, workers
        source.decode_once()

    def __len__(self):
        return len(self.source)

    @property
    def classes(self):
        return self.source.classes

    @property
    def num_classes(self):
        return len(self.classes)

    def batch(self, indices):
        """The batch of images ``indices`` as evaluation sees them."""
        return self.make_batch((index, None) for index in indices)

    def stream(self, requests):
        """Yield the batch of each request, a list of (index, seed); a seed of None is for no augmentation."""
        return stream_batches(self.make_batch, requests, workers=self.workers)

    def make_batch(self, request):
        """The batch of the pairs (index, seed) in ``request``."""
        with generators_restored():
            return default_collate([self._sample(int(index), seed) for index, seed in request])

    def _sample(self, index, seed):
        if seed is not None:
            seed_generators(seed, index)
        transform = self._evaluation if seed is None else self._training
        return {"image": transform(self.source.image(index)), "label": int(self.source.labels[index])}


# Crops and augmentation --------------------------------------------------------------------------------------------


def to_tensor(image):
    """An RGB image (PIL) as float32 (3, h, w) in [-1, 1]."""
    return pil_to_tensor(image).float().div_(127.5).sub_(1)


def evaluation_crop(image_size, resize=None):
    """Short side to ``resize`` px, then the centre; by default 256/224 of a large image_size, or else image_size."""
    within(1, LARGEST, image_size=image_size)
    if resize is None:
        resize = round(image_size * 256 / 224) if image_size >= LARGE else image_size
    else:
        within(image_size, LARGEST, resize=resize)
    return transforms.Compose([transforms.Resize(resize, InterpolationMode.BICUBIC), transforms.CenterCrop(image_size)])


def augmentation(
    image_size,
    evaluation,
    *,
    crop="none",
    crop_scale=(0.08, 1.0),
    pad=4,
    flip=0.0,
    auto_augment=None,
    color_jitter=None,
    erase=0.0,
):
    """Image (PIL) to a randomly changed float32 (3, s, s) in [-1, 1]; evaluation: the crop that is not random.

    crop: "resized", a box of a share ``crop_scale`` of the area (arXiv 1409.4842, section 6); "pad", a shift by up to
    ``pad`` px over mirrored edges (arXiv 1512.03385, section 4.2); or "none". flip: probability of left for right.
    auto_augment: timm's string, such as "rand-m9-mstd0.5-inc1" (RandAugment, arXiv 1909.13719) or "original"
    (AutoAugment, arXiv 1805.09501). color_jitter: largest relative change of brightness, contrast and saturation.
    erase: probability of a box of noise (arXiv 1708.04896), which is cut off at -1 and 1.
    """
    for name, share in {"flip": flip, "erase": erase}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"augment.{name}: got {share}, allowed: 0 to 1")
    crops = {"resized": _resized_crop, "pad": _padded_crop, "none": lambda *_: evaluation}
    steps = [lookup("augment.crop", crop, crops)(image_size, crop_scale, pad)]
    steps += [transforms.RandomHorizontalFlip(flip)]
    if auto_augment is not None:
        steps += [_auto_augment(auto_augment, image_size)]
    if color_jitter is not None:
        if not 0 <= color_jitter <= 100:
            raise ValueError(f"augment.color_jitter: got {color_jitter}, allowed: 0 to 100, or null")
        steps += [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)]
    steps += [to_tensor]
    if erase:
        steps += [RandomErasing(erase, mode="pixel", device="cpu"), transforms.Lambda(lambda x: x.clamp_(-1, 1))]
    return transforms.Compose(steps)


def _resized_crop(image_size, crop_scale, _pad):
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"augment.crop_scale: got {crop_scale}, allowed: two rising shares above 0, at most 1")
    return RandomResizedCropAndInterpolation(image_size, scale=tuple(crop_scale), interpolation="bicubic")


def _padded_crop(image_size, _crop_scale, pad):
    if not 0 <= pad < image_size:
        raise ValueError(f"augment.pad: got {pad}, allowed: 0 to {image_size - 1}, below image_size")
    return transforms.Compose(
        [
            transforms.Resize(image_size, InterpolationMode.BICUBIC),
            transforms.RandomCrop(image_size, padding=pad, padding_mode="reflect"),
        ]
    )


def _auto_augment(name, image_size):
    """timm's transform of that name with the settings of its create_transform."""
    settings = {
        "translate_const": int(image_size * 0.45),
        "img_mean": (128, 128, 128),
        "interpolation": Image.Resampling.BICUBIC,
    }
    make = rand_augment_transform if name.startswith("rand") else auto_augment_transform
    try:
        transform = make(name, settings)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"augment.auto_augment: got {name!r} ({error}), allowed: as rand-m9-mstd0.5-inc1 or original"
        ) from error
    for operation in transform.ops if hasattr(transform, "ops") else itertools.chain(*transform.policy):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image, bits, **_settings):
    """One bit at least: timm asks for none at the end of its scale, which Pillow 13 refuses."""
    return ImageOps.posterize(image, max(bits, 1))


# Batches prepared ahead --------------------------------------------------------------------------------------------
