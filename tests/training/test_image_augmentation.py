"""Augmentation: what each part does to a picture, and to the labels of those that are mixed."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from hf_perceiver.training import image_augmentation
from hf_perceiver.training.image_augmentation import (
    OPERATIONS,
    GentleAugmentation,
    ImageNetAugmentation,
    inception_crop,
    mix_batch,
    rand_augment,
)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def same_draws():
    random.seed(0)
    torch.manual_seed(0)


def test_crops_have_shares_of_the_area_and_aspects_within_bounds():
    crops = [inception_crop(PICTURE).size for _ in range(300)]
    areas, aspects = zip(*((w * h / 5400, w / h) for w, h in crops), strict=True)
    # Rounded to whole pixels; the whole picture, 3:2, is what is left after ten tries.
    assert min(areas) < 0.12 and max(areas) > 0.8 and min(areas) > 0.07
    assert all(0.72 < aspect < 1.37 or size == (90, 60) for aspect, size in zip(aspects, crops, strict=True))


def test_a_strip_that_has_no_such_crop_is_kept_whole():
    assert inception_crop(Image.new("RGB", (500, 3)), area=(0.5, 1.0)).size == (500, 3)


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
@pytest.mark.parametrize("size", [(90, 60), (8, 8)])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_every_operation_keeps_size_and_mode_at_every_level(index, size, level):
    done = OPERATIONS[index](PICTURE.resize(size), level)
    assert done.size == size and done.mode == "RGB"


def test_there_are_the_papers_sixteen_and_four_do_nothing_at_its_magnitude():
    """Colour, contrast, brightness and sharpness by a factor of 0.1 + 1.8 * 5 / 10 = 1."""
    assert len(OPERATIONS) == 16
    dull = PICTURE.point(lambda value: 30 + value // 2)
    unchanged = [i for i, operation in enumerate(OPERATIONS) if np.array_equal(operation(dull, 0.5), dull)]
    assert unchanged == [6, 7, 8, 9]


def test_levels_are_those_of_deepminds_code():
    grey = Image.new("RGB", (101, 101), (100, 100, 100))
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(3, 0)).convert("RGB")
    posterized, solarized, added = (np.asarray(OPERATIONS[i](ramp, 0.5))[0, :, 0] for i in (4, 5, 15))
    assert sorted(set(posterized)) == [0, 64, 128, 192]  # 2 bits
    assert solarized[127] == 127 and solarized[128] == 127 and solarized[255] == 0
    assert added[100] == 155 and added[127] == 182 and added[128] == 128
    cut = [np.asarray(OPERATIONS[14](grey, 0.5)) == 128 for _ in range(50)]
    assert max(mask[..., 0].sum() for mask in cut) == 40 * 40
    shifted = np.asarray(OPERATIONS[12](Image.new("RGB", (200, 4)), 0.5))[0, :, 0]
    assert (shifted == 128).sum() == 50


def test_an_operation_is_applied_half_of_the_time(monkeypatch):
    """With a probability of 0.2 to 0.8, even in between; 4,000 draws are within 0.03 of it with p > 0.999."""
    calls = []
    monkeypatch.setattr(image_augmentation, "OPERATIONS", (lambda image, level: calls.append(level) or image,))
    for _ in range(1000):
        rand_augment(PICTURE, layers=4, magnitude=5)
    assert abs(len(calls) / 4000 - 0.5) < 0.03 and set(calls) == {0.5}


def test_the_same_seed_draws_the_same():
    first = np.asarray(ImageNetAugmentation()(PICTURE))
    random.seed(0)
    assert np.array_equal(first, np.asarray(ImageNetAugmentation()(PICTURE)))


@pytest.mark.parametrize(("layers", "magnitude"), [(-1, 5), (4, 11), (4, -1)])
def test_impossible_strengths_are_refused(layers, magnitude):
    with pytest.raises(ValueError, match="magnitude of 0 to 10"):
        ImageNetAugmentation(layers, magnitude)


def test_the_gentle_one_moves_little():
    """A square of 10 pixels in the middle of 30: turned, scaled and shifted, nine tenths of its middle stay white."""
    picture = np.zeros((30, 30), np.uint8)
    picture[10:20, 10:20] = 255
    for _ in range(20):
        moved = np.asarray(GentleAugmentation()(Image.fromarray(picture)), float) / 255
        assert 80 < moved.sum() < 125
        assert moved[13:17, 13:17].mean() > 0.9 and moved[:4].max() == 0


# --- mixing


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "both"])
@pytest.mark.parametrize("count", [2, 7, 16])
def test_a_label_has_the_share_of_its_pixels(mix, count):
    """Picture i is filled with its one-hot label, so that the mean of what comes out is the label that belongs to it."""
    labels = torch.eye(count)
    pixels = labels[:, :, None, None].expand(-1, -1, 8, 12).clone()
    mixed, soft = mix_batch(pixels, labels, mix)
    assert mixed.shape == pixels.shape
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), soft, rtol=0, atol=1e-5)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(count))
    assert (soft > 0).sum(dim=1).max() <= 2


def test_shares_of_mixup_are_mostly_near_whole_and_those_of_cutmix_even():
    """Beta(0.2, 0.2) puts 0.58 of its mass within 0.05 of 0 or 1 (scipy.stats.beta), an even draw 0.10."""
    labels = torch.eye(600)
    pixels = torch.zeros(600, 1, 64, 64)
    shares = {mix: mix_batch(pixels, labels, mix)[1].diagonal() for mix in ("mixup", "cutmix")}
    near = {mix: float(((share < 0.05) | (share > 0.95)).float().mean()) for mix, share in shares.items()}
    assert abs(near["mixup"] - 0.58) < 0.08 and abs(near["cutmix"] - 0.10) < 0.06


def test_both_mixes_the_first_half_and_cuts_the_second():
    pixels = torch.arange(8.0)[:, None, None, None].expand(-1, 1, 16, 16).clone()
    mixed, _ = mix_batch(pixels, torch.eye(8), "both")
    values = [len(picture.unique()) for picture in mixed]
    assert values[:4] == [1] * 4 and max(values[4:]) == 2


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "both", "none"])
def test_one_picture_has_none_to_mix_with(mix):
    pixels, labels = torch.rand(1, 3, 4, 4), torch.eye(2)[:1]
    mixed, soft = mix_batch(pixels, labels, mix)
    assert torch.equal(mixed, pixels) and torch.equal(soft, labels)
