"""Augmentation of DeepMind's ImageNet recipe: Inception crops, RandAugment, MixUp and CutMix; and a gentle one.

Pictures are PIL, before they are resized, as in DeepMind's; Python's `random` draws for one picture and torch for a
batch, both from one number within `seeded`. Source: Perceiver IO, A.1, and deepmind-research
perceiver/train (dataset.py, autoaugment.py).

kornia's RandAugment is another one, which is why Pillow does the work here: it draws one list of operations for the
whole batch, without repeats, applies each for sure, has no Cutout, shears by 27 degrees where 0.15, 8.5 degrees, is
meant, keeps 6 bits where Posterize keeps 2, and fills with black. Its MixUp draws even shares, not those of a Beta
distribution. Its CutMix is the paper's, but for boxes that lie within the picture where DeepMind's are cut by its edge.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

GREY = (128, 128, 128)
Mix = Literal["both", "mixup", "cutmix", "none"]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What Python and torch draw within, on the CPU, depends on the seed alone; after it both go on as if nothing had been."""
    state = random.getstate()
    random.seed(seed)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(state)


def inception_crop(
    image: Image.Image, area: tuple[float, float] = (0.08, 1.0), aspect: tuple[float, float] = (3 / 4, 4 / 3)
) -> Image.Image:
    """A random part of the picture, of a share of its area and an aspect ratio within bounds; the whole after 10 tries."""
    width, height = image.size
    for _ in range(10):
        pixels = random.uniform(*area) * width * height
        ratio = random.uniform(*aspect)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return image.crop((left, top, left + w, top + h))
    return image


def rand_augment(image: Image.Image, layers: int = 4, magnitude: float = 5.0) -> Image.Image:
    """`layers` operations, each drawn from all 16 and applied with a probability of 0.2 to 0.8; magnitude 0 to 10.

    At magnitude 5 colour, contrast, brightness and sharpness stay as they are: their factor is 1 there, as in the paper.
    """
    for _ in range(layers):
        operation = random.choice(OPERATIONS)
        if random.random() < random.uniform(0.2, 0.8):
            image = operation(image, magnitude / 10)
    return image


def _signed(value: float) -> float:
    return value if random.random() < 0.5 else -value


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)


def _shift(side: int, level: float) -> float:
    # 100 pixels at most, meant for ImageNet's sizes: small pictures keep something of themselves.
    return _signed(level * min(100, side))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    added = int(level * 110)
    return image.point(lambda value: min(value + added, 255) if value < 128 else value)


def _cutout(image: Image.Image, level: float) -> Image.Image:
    width, height = image.size
    half = int(level * min(40, width / 2, height / 2))
    x, y = random.randrange(width), random.randrange(height)
    image = image.copy()
    image.paste(GREY, (max(x - half, 0), max(y - half, 0), min(x + half, width), min(y + half, height)))
    return image


def _factor(level: float) -> float:
    return 0.1 + 1.8 * level


OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, level: ImageOps.autocontrast(image),
    lambda image, level: ImageOps.equalize(image),
    lambda image, level: ImageOps.invert(image),
    lambda image, level: image.rotate(_signed(30 * level), fillcolor=GREY),
    lambda image, level: ImageOps.posterize(image, max(int(4 * level), 1)),
    lambda image, level: ImageOps.solarize(image, int(256 * level)),
    lambda image, level: ImageEnhance.Color(image).enhance(_factor(level)),
    lambda image, level: ImageEnhance.Contrast(image).enhance(_factor(level)),
    lambda image, level: ImageEnhance.Brightness(image).enhance(_factor(level)),
    lambda image, level: ImageEnhance.Sharpness(image).enhance(_factor(level)),
    lambda image, level: _affine(image, 1, _signed(0.3 * level), 0, 0, 1, 0),
    lambda image, level: _affine(image, 1, 0, 0, _signed(0.3 * level), 1, 0),
    lambda image, level: _affine(image, 1, 0, _shift(image.width, level), 0, 1, 0),
    lambda image, level: _affine(image, 1, 0, 0, 0, 1, _shift(image.height, level)),
    _cutout,
    _solarize_add,
)


class ImageNetAugmentation:
    """A crop, a flip by even chance, RandAugment on the crop: PIL -> PIL of another size."""

    crops = True

    def __init__(self, layers: int = 4, magnitude: float = 5.0):
        if layers < 0 or not 0 <= magnitude <= 10:
            raise ValueError(
                f"RandAugment has 0 or more layers and a magnitude of 0 to 10, not {layers} and {magnitude}"
            )
        self.layers, self.magnitude = layers, magnitude

    def __call__(self, image: Image.Image) -> Image.Image:
        image = inception_crop(image)
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        return rand_augment(image, self.layers, self.magnitude)


class GentleAugmentation:
    """Turns up to 10 degrees, scales by up to 8 % and shifts by up to 6 %; black comes in from outside. PIL -> PIL

    For pictures that a flip or a crop makes something else, such as digits. Source: train_digits.
    """

    crops = False

    def __call__(self, image: Image.Image) -> Image.Image:
        angle, zoom = math.radians(random.uniform(-10, 10)), 1 + random.uniform(-0.08, 0.08)
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        x, y = image.width / 2, image.height / 2
        right, down = (random.uniform(-0.06, 0.06) * side for side in image.size)
        # From places in the new picture to places in the old one, about the middle.
        matrix = (cos, -sin, x - cos * x + sin * y + right, sin, cos, y - sin * x - cos * y + down)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


def mix_batch(pixels: Tensor, labels: Tensor, mix: Mix, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Pixels (B, C, H, W) and soft labels (B, K) -> the same, mixed pair by pair within the batch.

    "both": MixUp in the first half and CutMix in the second. MixUp's shares are Beta(alpha, alpha), those of CutMix even;
    a label's share is that of the pixels. DeepMind's pairs are drawn from twice the pictures, ours from the batch.
    """
    if mix == "both":
        half = len(pixels) // 2
        parts = [
            mix_batch(pixels[:half], labels[:half], "mixup", alpha),
            mix_batch(pixels[half:], labels[half:], "cutmix"),
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    if mix == "none" or len(pixels) < 2:
        return pixels, labels
    if mix == "cutmix":
        return _cutmix(pixels, labels)
    share = torch.distributions.Beta(alpha, alpha).sample((len(pixels),)).to(pixels)
    other = torch.randperm(len(pixels))
    return (
        torch.lerp(pixels[other], pixels, share[:, None, None, None]),
        torch.lerp(labels[other], labels, share[:, None]),
    )


def _cutmix(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    from kornia.augmentation import RandomCutMixV2

    mixer = RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)
    mixed, pairs = mixer(pixels, torch.arange(len(pixels)))
    _, other, share = pairs[0].unbind(-1)  # of each: itself, the one it is mixed with, its own share
    return mixed, torch.lerp(labels[other.long()], labels, share[:, None])
