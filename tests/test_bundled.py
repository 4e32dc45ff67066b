"""The checkpoints that ship with the package are what their cards say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM, AutoTokenizer, pipeline

from hf_perceiver import bundled_checkpoint

MEGABYTE = 1_000_000


@pytest.mark.parametrize("name", ["language", "digits"])
def test_checkpoint_is_small_complete_and_has_a_card(name):
    folder = Path(bundled_checkpoint(name))
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 8 * MEGABYTE
    assert json.loads((folder / "config.json").read_text())["model_type"] == "perceiver_io"
    assert json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")  # the Hub's metadata
    assert f"hf_perceiver.training.train_{name}" in card


def test_unknown_checkpoint_is_told_which_there_are():
    with pytest.raises(ValueError, match="digits, flow, language, video"):
        bundled_checkpoint("flwo")


def test_digits_are_named_rightly():
    """At least 97 % of the held-out fifth (360 images), the floor this checkpoint was trained to."""
    from hf_perceiver.training.train_digits import accuracy, load_digits

    data = load_digits()
    model = AutoModelForImageClassification.from_pretrained(bundled_checkpoint("digits"))
    stated = json.loads((Path(bundled_checkpoint("digits")) / "metrics.json").read_text())["test_accuracy"]
    reached = accuracy(model, data["test_images"], data["test_labels"])
    assert reached >= 0.97
    assert abs(reached - stated) < 0.004  # one image of 360, for another machine's rounding


def test_digits_through_the_pipeline_equal_the_arrays():
    from PIL import Image

    from hf_perceiver.training.train_digits import load_digits, to_pixels

    images = load_digits()["test_images"][:8]
    classify = pipeline("image-classification", model=bundled_checkpoint("digits"))
    answers = classify([Image.fromarray(image).convert("RGB") for image in images], top_k=1)
    direct = classify.model(pixel_values=to_pixels(images)).logits.softmax(-1).max(-1)
    assert [int(a[0]["label"]) for a in answers] == direct.indices.tolist()
    assert [a[0]["score"] for a in answers] == pytest.approx(direct.values.tolist(), abs=1e-4)


def test_language_fills_held_out_words_better_than_chance():
    """Sentences of held-out documents that come with the checkpoint; single masked letters, one at a time.

    The card's accuracy on single bytes is over thousands of them; here are a few dozen, hence the wide margin.
    """
    folder = Path(bundled_checkpoint("language"))
    stated = json.loads((folder / "metrics.json").read_text())["held_out"]["model"]["single_bytes"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    right = total = 0
    for sentence in json.loads((folder / "held_out.json").read_text()):
        ids = tokenizer(sentence["text"], return_tensors="pt")["input_ids"]
        places = torch.arange(2, ids.shape[1] - 1, 3)
        rows = ids.repeat(len(places), 1)
        truth = rows[range(len(places)), places].clone()
        rows[range(len(places)), places] = tokenizer.mask_token_id
        with torch.no_grad():
            guesses = model(input_ids=rows).logits[range(len(places)), places].argmax(-1)
        right, total = right + int((guesses == truth).sum()), total + len(places)
    assert total > 100
    assert abs(right / total - stated) < 0.15


def test_language_takes_any_length_up_to_its_maximum():
    folder = bundled_checkpoint("language")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    texts = ["A", "Return the number of bytes.", "x" * 126]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits
        for row, text in enumerate(texts):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="129"):
        model(**tokenizer("x" * 127, return_tensors="pt"))
