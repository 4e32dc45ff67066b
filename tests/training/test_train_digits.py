"""Training the digits checkpoint: data, augmentation, writing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_perceiver import PerceiverIOForImageClassification
from hf_perceiver.training import train_digits


def test_split_is_fixed_stratified_and_disjoint():
    data, again = train_digits.load_digits(), train_digits.load_digits()
    assert len(data["train_labels"]) + len(data["test_labels"]) == 1797
    assert len(data["test_labels"]) == 360
    assert np.array_equal(data["test_images"], again["test_images"])
    shares = np.bincount(data["test_labels"]) / np.bincount(data["train_labels"])
    assert shares.min() > 0.23 and shares.max() < 0.27  # a fifth against four fifths, in every class


def test_arrays_become_what_the_image_processor_gives():
    images = train_digits.load_digits()["test_images"][:5]
    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    processed = train_digits.image_processor()(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, train_digits.to_pixels(images), atol=1e-6, rtol=0)


def test_augmentation_keeps_digits_and_background():
    pixels = train_digits.to_pixels(train_digits.load_digits()["train_images"][:64])
    changed = train_digits.augment(pixels, torch.Generator().manual_seed(0))
    assert changed.shape == pixels.shape
    assert changed.min() >= -1 - 1e-5 and changed.max() <= 1 + 1e-5
    ink, before = (changed + 1).sum(dim=(1, 2, 3)), (pixels + 1).sum(dim=(1, 2, 3))
    assert ((ink / before) > 0.6).all() and not torch.allclose(changed, pixels, atol=0.1)


@pytest.mark.medium
def test_training_writes_a_whole_checkpoint_and_repeats_from_its_seed(tmp_path):
    metrics = train_digits.train(tmp_path / "a", epochs=1, seed=3)
    train_digits.train(tmp_path / "b", epochs=1, seed=3)
    a, b = (PerceiverIOForImageClassification.from_pretrained(tmp_path / name) for name in "ab")
    for (name, first), second in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["test_accuracy"] == metrics["test_accuracy"]
    assert (tmp_path / "a" / "preprocessor_config.json").is_file()
    assert not (tmp_path / "a.tmp").exists()
    assert train_digits.evaluate(tmp_path / "a")["test_accuracy"] == metrics["test_accuracy"]


def test_training_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        train_digits.train(tmp_path, epochs=1, seed=0)
    assert (tmp_path / "notes.txt").read_text() == "mine"
