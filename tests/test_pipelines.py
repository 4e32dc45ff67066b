"""transformers' pipelines on saved folders: their results are the model's, and a batch changes nothing.

Models are random and enlarged (helpers.enlarge): with small weights every answer would be the same one. float32 in
batches of other shapes differs by rounding, a few 1e-7 on numbers of the size of 1: hence 1e-5.
"""

import numpy as np
import pytest
import torch
from helpers import config_of, enlarge, fourier, grid, trainable
from transformers import AutoTokenizer, PerceiverImageProcessorPil, pipeline

# From its file: transformers 5.17 gives it at the top level only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_perceiver import (
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOModel,
    PerceiverIOTokenizer,
)

LENGTH = 96
TOLERANCE = 1e-5
# Of unequal length, so that a batch is padded; the last one is the shortest.
TEXTS = ["The cat sat on the mat.", "Grüße aus Köln, 漢字 and all of it a good deal longer than the rest", "No", "ab"]
TAGS = ["O", "B-X", "I-X", "B-Y", "I-Y"]


def text_config(**changes):
    position = trainable(LENGTH, 16)
    fields = {
        "vocab_size": 262,
        "preprocessor": {"kind": "text", "channels": 16, "position": position},
        "output_query": {"kind": "position", "position": position, "use_input_mask": True},
        "postprocessor": {"kind": "tokens"},
        # So that positions differ in what they answer.
        "decoder_use_query_residual": True,
    }
    return config_of(**{**fields, **changes})


def named(*labels: str) -> dict:
    to_id = {label: i for i, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": to_id}


def saved_text_model(folder, head, **changes):
    """A folder with model and tokenizer, and the two."""
    model = enlarge(head(text_config(**changes))).eval()
    if hasattr(model.perceiver.output_query, "position"):
        # An answer depends on its place about as much as on the text.
        model.perceiver.output_query.position.embeddings.data.mul_(4)
    tokenizer = PerceiverIOTokenizer(model_max_length=LENGTH)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


def flat(results) -> list:
    """A pipeline's nested results as one list of (key, value)."""
    if isinstance(results, dict):
        return [pair for key in results for pair in flat_value(key, results[key])]
    return [pair for result in results for pair in flat(result)]


def flat_value(key, value) -> list:
    return [(key, v) for v in value] if isinstance(value, list) else [(key, value)]


def assert_same_results(got, want) -> None:
    """The same keys and values; numbers within TOLERANCE."""
    got, want = flat(got), flat(want)
    assert [key for key, _ in got] == [key for key, _ in want]
    for (key, a), (_, b) in zip(got, want, strict=True):
        if isinstance(b, (float, np.floating)):
            assert a == pytest.approx(b, abs=TOLERANCE), key
        else:
            assert a == b, key


# fill-mask


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    torch.manual_seed(0)
    folder, model, tokenizer = saved_text_model(tmp_path_factory.mktemp("mlm"), PerceiverIOForMaskedLM)
    return pipeline("fill-mask", model=folder), model, tokenizer


def test_fill_mask_gives_the_models_own_probabilities(masked_lm):
    fill, model, tokenizer = masked_lm
    text = "caf[MASK] au lait"
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded.input_ids[0, 4] == tokenizer.mask_token_id == 3
    best = model(**encoded).logits[0, 4].softmax(-1).topk(5)
    results = fill(text)
    assert [r["token"] for r in results] == best.indices.tolist()
    assert [r["score"] for r in results] == pytest.approx(best.values.tolist(), abs=TOLERANCE)
    for r in results:
        whole = b"caf" + bytes([r["token"] - 6]) + b" au lait" if r["token"] >= 6 else b"caf au lait"
        assert r["sequence"] == whole.decode(errors="replace")


def test_several_masks_are_each_answered_by_themselves(masked_lm):
    fill, model, tokenizer = masked_lm
    text = "[MASK]ne, tw[MASK][MASK]"
    ids = tokenizer(text, return_tensors="pt")
    best = model(**ids).logits[0, ids.input_ids[0] == 3].softmax(-1).max(-1)
    results = fill(text, top_k=1)
    assert [r[0]["token"] for r in results] == best.indices.tolist()
    assert len(set(best.values.tolist())) == 3, "otherwise the test cannot tell one mask from another"
    assert [r[0]["score"] for r in results] == pytest.approx(best.values.tolist(), abs=TOLERANCE)


def test_targets_limit_the_answers(masked_lm):
    fill, model, tokenizer = masked_lm
    scores = model(**tokenizer("ab[MASK]", return_tensors="pt")).logits[0, 3].softmax(-1)
    results = fill("ab[MASK]", targets=["x", "y"])
    assert {r["token_str"]: r["score"] for r in results} == pytest.approx(
        {c: scores[ord(c) + 6].item() for c in "xy"}, rel=1e-4
    )


def test_fill_mask_in_a_batch_equals_one_by_one(masked_lm):
    fill, _, _ = masked_lm
    texts = [text + "[MASK]" for text in TEXTS] + ["[MASK]", TEXTS[1] + "[MASK] and [MASK]"]
    assert_same_results(fill(texts, batch_size=4), [fill(text) for text in texts])


def test_text_longer_than_the_model_says_so_or_is_cut_on_request(masked_lm):
    fill, _, _ = masked_lm
    with pytest.raises(ValueError, match=f"{LENGTH + 1} elements are more than the {LENGTH} trained positions"):
        fill("[MASK]" + "x" * (LENGTH - 2))
    assert len(fill("[MASK]" + "x" * (LENGTH - 3))) == 5
    cut = fill("[MASK]" + "x" * 500, tokenizer_kwargs={"truncation": True})
    assert_same_results(cut, fill("[MASK]" + "x" * (LENGTH - 3)))


# text-classification, zero-shot-classification


def test_text_classification_gives_the_models_own_scores_in_batches_too(tmp_path):
    folder, model, tokenizer = saved_text_model(
        tmp_path, PerceiverIOForSequenceClassification, **named("sad", "glad", "neither")
    )
    classify = pipeline("text-classification", model=folder, top_k=None)
    single = [classify([text])[0] for text in TEXTS]
    for text, results in zip(TEXTS, single, strict=True):
        scores = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        expected = dict(zip(["sad", "glad", "neither"], scores.tolist(), strict=True))
        assert {r["label"]: r["score"] for r in results} == pytest.approx(expected, abs=TOLERANCE)
    assert len({round(results[0]["score"], 3) for results in single}) == len(TEXTS), "texts must tell apart"
    assert_same_results(classify(TEXTS, batch_size=4), single)


@pytest.mark.parametrize(
    ("problem_type", "function"), [("multi_label_classification", "sigmoid"), ("regression", None)]
)
def test_text_classification_knows_the_problem_type(problem_type, function, tmp_path):
    changes = {**named("a", "b"), "problem_type": problem_type}
    folder, model, tokenizer = saved_text_model(tmp_path, PerceiverIOForSequenceClassification, **changes)
    logits = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0]
    expected = logits if problem_type == "regression" else logits.sigmoid()
    results = pipeline("text-classification", model=folder, top_k=None)(TEXTS[:1])[0]
    got = [r["score"] for r in sorted(results, key=lambda r: r["label"])]
    assert got == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_zero_shot_classification_asks_for_entailment(tmp_path):
    labels = ("contradiction", "neutral", "entailment")
    folder, model, tokenizer = saved_text_model(tmp_path, PerceiverIOForSequenceClassification, **named(*labels))
    classify = pipeline("zero-shot-classification", model=folder)
    topics = ["sport", "politics", "art"]
    texts = ["A goal!", "The vote is on Monday, they say"]
    single = [classify(text, candidate_labels=topics) for text in texts]
    for text, result in zip(texts, single, strict=True):
        pairs = [tokenizer(text, f"This example is {topic}.", return_tensors="pt") for topic in topics]
        entailment = torch.stack([model(**pair).logits[0, 2] for pair in pairs]).softmax(-1)
        expected = dict(zip(topics, entailment.tolist(), strict=True))
        assert dict(zip(result["labels"], result["scores"], strict=True)) == pytest.approx(expected, abs=TOLERANCE)
    assert_same_results(classify(texts, candidate_labels=topics, batch_size=4), single)


# token-classification


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    torch.manual_seed(0)
    folder, model, tokenizer = saved_text_model(
        tmp_path_factory.mktemp("tags"), PerceiverIOForTokenClassification, **named(*TAGS)
    )
    return pipeline("token-classification", model=folder, ignore_labels=[]), model, tokenizer


def test_every_byte_is_tagged_with_its_characters_place(tagger):
    tag, model, tokenizer = tagger
    text = TEXTS[1]
    best = model(**tokenizer(text, return_tensors="pt")).logits[0, 1:-1].softmax(-1).max(-1)
    assert len(set(best.indices.tolist())) >= 3, "tags must vary for the test to see anything"
    results = tag(text)
    assert [r["entity"] for r in results] == [TAGS[i] for i in best.indices]
    assert [float(r["score"]) for r in results] == pytest.approx(best.values.tolist(), abs=TOLERANCE)
    places = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    assert [(r["start"], r["end"]) for r in results] == places


def test_simple_aggregation_joins_neighbours_of_one_tag(tagger):
    tag, model, tokenizer = tagger
    text = TEXTS[0]  # ASCII: a byte is a character, and a group cannot begin inside one
    tags = [TAGS[i] for i in model(**tokenizer(text, return_tensors="pt")).logits[0, 1:-1].argmax(-1)]
    groups = []
    for i, name in enumerate(tags):
        kind = name.split("-")[-1]
        if groups and groups[-1][0] == kind and not name.startswith("B-"):
            groups[-1][2] = i + 1
        else:
            groups.append([kind, i, i + 1])
    results = tag(text, aggregation_strategy="simple")
    assert [[r["entity_group"], r["start"], r["end"]] for r in results] == groups
    assert [r["word"] for r in results] == [text[start:end] for _, start, end in groups]


@pytest.mark.parametrize("strategy", ["first", "average", "max"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_word_aggregation_never_cuts_a_word(strategy, tagger):
    """Except where a word begins with a character of several bytes: the pipeline tells words by the blank before them,
    and each of those bytes has one."""
    tag, _, _ = tagger
    for text in [TEXTS[0], "Grüße aus Köln, José: x漢字y", "No"]:
        results = tag(text, aggregation_strategy=strategy)
        assert "".join(text[r["start"] : r["end"]] for r in results) == text
        for r in results:
            assert r["word"] == text[r["start"] : r["end"]]
            assert r["start"] == 0 or " " in text[r["start"] - 1 : r["start"] + 1]


def test_token_classification_in_a_batch_equals_one_by_one(tagger):
    tag, _, _ = tagger
    assert_same_results(tag(TEXTS, batch_size=4), [tag(text) for text in TEXTS])
    simple = {"aggregation_strategy": "simple"}
    assert_same_results(tag(TEXTS, batch_size=4, **simple), [tag(text, **simple) for text in TEXTS])


# feature-extraction


def test_features_are_the_latents_in_batches_too(masked_lm):
    fill, model, tokenizer = masked_lm
    extract = pipeline("feature-extraction", model=fill.model.name_or_path)
    single = [torch.tensor(extract(text)) for text in TEXTS]
    for text, features in zip(TEXTS, single, strict=True):
        assert features.shape == (1, 4, 16)
        torch.testing.assert_close(features, model(**tokenizer(text, return_tensors="pt")).last_hidden_state)
    assert min((a - b).abs().max() for i, a in enumerate(single) for b in single[:i]) > 0.01
    together = [torch.tensor(features) for features in extract(TEXTS, batch_size=4)]
    torch.testing.assert_close(together, single, rtol=0, atol=TOLERANCE)


def test_features_need_not_pay_for_answers(masked_lm, caplog):
    """A model without an output side is a pipeline's way to skip the decoder, and says nothing of left-out weights."""
    folder = masked_lm[0].model.name_or_path
    with caplog.at_level("WARNING"):
        extract = pipeline(
            "feature-extraction", model=folder, model_kwargs={"output_query": None, "postprocessor": None}
        )
    assert extract.model.decoder is None and extract.model.output_query is None
    assert "UNEXPECTED" not in caplog.text
    assert extract(TEXTS[0]) == pipeline("feature-extraction", model=folder)(TEXTS[0])


# Images


def images():
    from PIL import Image

    rng = np.random.default_rng(0)
    sizes = [(9, 12), (20, 10), (8, 8), (31, 17)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def saved_image_model(folder, head):
    config = config_of(
        preprocessor=grid({"kind": "pixels", "in_channels": 3}, fourier(8, 8)),
        output_query={"kind": "tasks", "channels": 16},
        postprocessor={"kind": "classification"},
        **named("cat", "dog", "eel"),
    )
    model = enlarge(head(config)).eval()
    # ImageNet's 224 and 256, in small.
    processor = PerceiverImageProcessorPil(crop_size={"height": 10, "width": 10}, size={"height": 8, "width": 8})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder), model, processor


def test_the_built_in_image_processor_is_found_beside_the_model(tmp_path):
    folder, _, processor = saved_image_model(tmp_path, PerceiverIOForImageClassification)
    loaded = AutoImageProcessor.from_pretrained(folder)
    assert type(loaded) is PerceiverImageProcessorPil
    for image in images():
        pixels = loaded(image, return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, 8, 8)
        assert torch.equal(pixels, processor(image, return_tensors="pt").pixel_values)


def test_image_classification_gives_the_models_own_scores_in_batches_too(tmp_path):
    folder, model, processor = saved_image_model(tmp_path, PerceiverIOForImageClassification)
    classify = pipeline("image-classification", model=folder)
    single = [classify(image) for image in images()]
    for image, results in zip(images(), single, strict=True):
        scores = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
        expected = dict(zip(["cat", "dog", "eel"], scores.tolist(), strict=True))
        assert {r["label"]: r["score"] for r in results} == pytest.approx(expected, abs=TOLERANCE)
    assert len({round(results[0]["score"], 3) for results in single}) == 4, "images must tell apart"
    assert_same_results(classify(images(), batch_size=4), single)


def test_image_features_are_the_latents_or_their_mean(tmp_path):
    folder, model, processor = saved_image_model(tmp_path, PerceiverIOModel)
    extract = pipeline("image-feature-extraction", model=folder)
    for image in images():
        outputs = model(**processor(image, return_tensors="pt"))
        torch.testing.assert_close(torch.tensor(extract(image)), outputs.last_hidden_state)
        torch.testing.assert_close(torch.tensor(extract(image, pool=True)), outputs.last_hidden_state.mean(1))
    together = [torch.tensor(features) for features in extract(images(), batch_size=4)]
    torch.testing.assert_close(together, [torch.tensor(extract(i)) for i in images()], rtol=0, atol=TOLERANCE)


# Tokenizers


def test_the_tokenizer_beside_the_model_is_found(masked_lm):
    loaded = AutoTokenizer.from_pretrained(masked_lm[0].model.name_or_path)
    assert type(loaded) is PerceiverIOTokenizer
    assert loaded.model_max_length == LENGTH
