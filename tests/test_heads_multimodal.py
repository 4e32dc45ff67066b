"""Heads on dicts of modalities, sound and video: losses by modality, drawn points, free names and kinds, classes."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import config_of, enlarge, fourier, grid, multimodal_inputs, tiny, trainable
from transformers import pipeline

from hf_perceiver import PerceiverIOForMultimodalAutoencoding, Postprocessor
from hf_perceiver.feature_extraction_perceiver_io import PerceiverIOFeatureExtractor
from hf_perceiver.heads_multimodal import (
    PerceiverIOForAudioClassification,
    PerceiverIOForAudioVisualClassification,
    PerceiverIOForVideoClassification,
    trained_frames,
)
from hf_perceiver.media_files import VideoWriter
from hf_perceiver.output_queries import MultimodalQuery
from hf_perceiver.registry import POSTPROCESSORS
from hf_perceiver.video_processing_perceiver_io import PerceiverIOVideoProcessor

WEIGHTS = {"image": 0.03, "audio": 1.0, "label": 0.5}
# float64, the same numbers summed in another order.
SHARP = {"rtol": 1e-10, "atol": 1e-12}


def autoencoder(large: bool = True, **postprocessor: Any) -> PerceiverIOForMultimodalAutoencoding:
    """The tiny autoencoder: image (2, 4, 6) of 3 channels, audio of two patches of 4 samples, label of 5; float64."""
    case = tiny("multimodal")
    case.config.postprocessor |= {"loss_weights": WEIGHTS, **postprocessor}
    return case.model(PerceiverIOForMultimodalAutoencoding, large=large).double()


def clips(batch: int = 2) -> dict[str, torch.Tensor]:
    return {name: values.double() for name, values in multimodal_inputs(batch)["inputs"].items()}


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


# --- the loss


def test_the_loss_is_the_weighted_sum_of_what_each_output_misses():
    """Written out from the outputs in evaluation, where everything is decoded."""
    model, x = autoencoder(), clips()
    out = model(inputs=x, labels=x)
    want = {
        "image": (out.logits["image"] - x["image"].movedim(2, -1)).abs().mean(),
        "audio": (out.logits["audio"] - x["audio"][..., 0]).abs().mean(),
        "label": F.cross_entropy(out.logits["label"], x["label"].argmax(dim=-1)),
    }
    for name, loss in want.items():
        torch.testing.assert_close(out.losses[name], loss, **SHARP)
    torch.testing.assert_close(out.loss, sum(WEIGHTS[name] * loss for name, loss in want.items()), **SHARP)
    assert next(iter(out)) == "loss"
    assert "losses" not in model(inputs=x)


def test_losses_are_chosen_by_output():
    model, x = autoencoder(losses={"image": "mse", "audio": "mse"}), clips()
    out = model(inputs=x, labels=x)
    torch.testing.assert_close(out.losses["audio"], F.mse_loss(out.logits["audio"], x["audio"][..., 0]), **SHARP)
    torch.testing.assert_close(out.losses["image"], F.mse_loss(out.logits["image"], x["image"].movedim(2, -1)), **SHARP)


def test_labels_may_be_laid_out_as_the_output_and_classes_be_indices():
    model, x = autoencoder(), clips()
    other = {"image": x["image"].movedim(2, -1), "audio": x["audio"][..., 0], "label": x["label"].argmax(dim=-1)}
    torch.testing.assert_close(model(inputs=x, labels=other).loss, model(inputs=x, labels=x).loss, **SHARP)


@pytest.mark.parametrize("training", [False, True])
def test_what_has_no_labels_adds_nothing(training):
    model, x = autoencoder().train(training), clips()
    whole = model(inputs=x, labels=x)
    for labels in ({"audio": x["audio"]}, {"audio": x["audio"], "image": None}):
        out = model(inputs=x, labels=labels)
        assert list(out.losses) == ["audio"]
        torch.testing.assert_close(out.loss, whole.losses["audio"] * WEIGHTS["audio"], **SHARP)
        # In training nothing else is decoded.
        assert set(out.logits) == ({"audio"} if training else {"audio", "image", "label"})


def test_an_example_without_a_label_adds_nothing_to_the_labels_loss():
    model, x = autoencoder(), clips(3)
    classes = torch.tensor([1, -100, 4])
    out = model(inputs=x, labels={"label": classes})
    want = F.cross_entropy(out.logits["label"][[0, 2]], classes[[0, 2]], reduction="sum") / 3
    torch.testing.assert_close(out.losses["label"], want, **SHARP)
    nothing = model(inputs=x, labels={"label": torch.full((3,), -100)}).loss
    assert nothing == 0 and not gradient(model, nothing).any()


def test_an_example_without_a_video_adds_nothing_to_the_videos_loss():
    model, x = autoencoder(), clips(3)
    missing = {**x, "image": x["image"].clone()}
    missing["image"][1] = -100
    kept = {name: values[[0, 2]] for name, values in x.items()}
    given = {"inputs": x, "labels": {"image": missing["image"]}}
    want = model(inputs=kept, labels={"image": kept["image"]}).loss * 2 / 3
    torch.testing.assert_close(model(**given).loss, want, **SHARP)


def test_batches_of_one_size_average_to_the_large_batch():
    """Loss and gradient, with labels missing here and there: what accumulation and several devices do."""
    model, x = autoencoder(num_loss_points={}), clips(4)
    labels = {**x, "label": torch.tensor([1, -100, 4, 0]), "audio": x["audio"].clone()}
    labels["audio"][3] = -100
    whole = model.train()(inputs=x, labels=labels).loss
    rows = [slice(0, 2), slice(2, 4)]
    parts = [
        model(inputs={n: v[row] for n, v in x.items()}, labels={n: v[row] for n, v in labels.items()}).loss
        for row in rows
    ]
    torch.testing.assert_close(sum(parts) / 2, whole, **SHARP)
    torch.testing.assert_close(
        sum(gradient(model, p) for p in parts) / 2, gradient(model, whole), rtol=1e-9, atol=1e-11
    )


def test_labels_stand_where_the_outputs_are_asked():
    """Whole outputs at points that are chosen, or at free coordinates; what labels have to fit is what comes back."""
    model, x = autoencoder(), clips()
    whole = model(inputs=x).logits["image"]
    points = torch.tensor([[5, 0, 40], [7, 7, 1]])
    at = torch.randn(2, 3, 3, dtype=torch.float64)
    out = model(inputs=x, labels={"image": at}, output_points={"image": points})
    asked = torch.stack([whole[i].flatten(0, 2)[points[i]] for i in range(2)])
    torch.testing.assert_close(out.loss, WEIGHTS["image"] * (asked - at).abs().mean(), **SHARP)
    places = torch.rand(5, 3, dtype=torch.float64) * 2 - 1
    at = torch.randn(2, 5, 3, dtype=torch.float64)
    out = model(inputs=x, labels={"image": at}, coordinates={"image": places})
    torch.testing.assert_close(out.loss, WEIGHTS["image"] * (out.logits["image"] - at).abs().mean(), **SHARP)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2), "labels of PerceiverIOForMultimodalAutoencoding are a dict by output, not Tensor; known: audio, i"),
        ({}, "labels name no output; known: audio, image, label"),
        ({"audio": None}, "labels name no output"),
        ({"video": torch.zeros(2)}, "unknown output 'video' in the labels; known: audio, image, label"),
        ({"label": [1, 2]}, r"labels of 'label' are a tensor with an entry for each example, not \[1, 2\]"),
        ({"label": torch.tensor(1)}, "labels of 'label' are a tensor with an entry for each example"),
        ({"label": torch.zeros(3, 5)}, "labels of 'label' are for 3 examples, and the batch has 2"),
        ({"label": torch.tensor([0, 5])}, "label: label 5 is outside 0..4; -100 marks what has no label"),
        ({"image": torch.zeros(2, 2, 3, 6, 4)}, r"image: labels of the shape \(2, 2, 3, 6, 4\) do not fit an output of 2x4x6"),
        ({"audio": torch.full((2, 8, 1), math.nan)}, "audio: labels hold NaN; mark what has no target with -100"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_labels_that_do_not_fit_are_refused(labels, message, training):
    model = autoencoder(num_loss_points={"image": 5, "audio": 1}).train(training)
    with pytest.raises(ValueError, match=message):
        model(inputs=clips(), labels=labels)


def test_labels_of_what_is_not_asked_are_refused():
    x = clips()
    with pytest.raises(ValueError, match=r"labels hold 'audio', which output_points and coordinates leave out"):
        autoencoder()(inputs=x, labels=x, output_points={"image": None, "label": None})


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"image": [0, 48]}, r"output_points 0\.\.48 lie outside the output grid of 48 points"),
        ({"video": None}, "unknown modality 'video' in output_points; known: audio, image, label"),
    ],
)
def test_points_outside_the_grid_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        autoencoder()(inputs=clips(), output_points=points)


def test_a_postprocessor_of_ones_own_without_losses_takes_no_labels():
    class Bare(Postprocessor):
        def __init__(self, *, in_channels: int):
            super().__init__()

        def arrange(self, points, query):
            return points

    POSTPROCESSORS.register("bare_outputs")(Bare)
    try:
        config = tiny("multimodal").config
        config.postprocessor = {"kind": "bare_outputs"}
        model, x = PerceiverIOForMultimodalAutoencoding(config), multimodal_inputs(2)["inputs"]
        assert set(model(inputs=x).logits) == {"audio", "image", "label"}
        with pytest.raises(
            ValueError, match=r"has losses for a postprocessor of kind 'multimodal', not for .*bare_outputs"
        ):
            model(inputs=x, labels=x)
    finally:
        del POSTPROCESSORS.classes["bare_outputs"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"losses": {"video": "l1"}}, "losses names 'video'; the modalities are audio, image, label"),
        ({"losses": {"image": "l3"}}, r"losses\['image'\]='l3' must be one of l1, mse, cross_entropy"),
        ({"loss_weights": {"image": -1.0}}, r"loss_weights\['image'\] is a number from 0, not -1.0"),
        (
            {"num_loss_points": {"image": 0}},
            r"num_loss_points\['image'\] must be at least 1, not 0; leave it out for all",
        ),
    ],
)
def test_bad_losses_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(**option)


# --- drawn points


def test_in_training_each_example_is_asked_at_points_of_its_own():
    model, x = autoencoder(num_loss_points={"image": 7, "audio": 1}).train(), clips()
    asked: list[Any] = []

    def remember(module, args, output):
        asked.append(output)

    model.perceiver.output_query.register_forward_hook(remember)
    out = model(inputs=x, labels=x)
    assert {name: tuple(v.shape) for name, v in out.logits.items()} == {
        "audio": (2, 4),
        "image": (2, 7, 3),
        "label": (2, 5),
    }
    # The targets are those of the points: of the decoded values nothing else is known.
    points = asked[-1].parts["image"].position.points
    assert points.shape == (2, 7) and not torch.equal(points[0].sort().values, points[1].sort().values)
    flat = x["image"].movedim(2, -1).flatten(1, 3)
    targets = torch.stack([flat[i][points[i]] for i in range(2)])
    torch.testing.assert_close(out.losses["image"], (out.logits["image"] - targets).abs().mean(), **SHARP)
    # Drawn anew each time.
    model(inputs=x, labels=x)
    assert not torch.equal(asked[-1].parts["image"].position.points, points)


def test_drawn_points_change_neither_loss_nor_gradient_on_average():
    """200 draws; three standard errors of the loss, and of the gradient along its own direction."""
    model, x = autoencoder(num_loss_points={"image": 5, "audio": 1}).train(), clips()
    labels = {**x, "image": x["image"].clone()}
    labels["image"][0, 0] = -100  # half of the first clip
    drawn = [model(inputs=x, labels=labels).loss for _ in range(200)]
    slopes = [gradient(model, loss) for loss in drawn]
    model.perceiver.postprocessor.num_loss_points = {}
    whole = model(inputs=x, labels=labels).loss
    slope = gradient(model, whole)
    for values, want in (
        (torch.stack(drawn).detach(), whole),
        (torch.stack([s @ slope for s in slopes]) / (slope @ slope), torch.tensor(1.0)),
    ):
        assert (values.mean() - want).abs() < 3 * values.std() / math.sqrt(len(values))
        assert values.std() > 0


@pytest.mark.parametrize("how", ["evaluation", "without labels", "points are chosen"])
def test_points_are_drawn_for_the_loss_in_training_only(how):
    model, x = autoencoder(num_loss_points={"image": 7}), clips()
    given: dict[str, Any] = {"inputs": x, "labels": x}
    if how != "evaluation":
        model.train()
    if how == "without labels":
        given.pop("labels")
    if how == "points are chosen":
        given |= {"output_points": dict.fromkeys(x)}
    assert model(**given).logits["image"].shape == (2, 2, 4, 6, 3)


def test_more_points_than_there_are_means_all():
    model, x = autoencoder(num_loss_points={"image": 48, "audio": 512}), clips()
    out = model.train()(inputs=x, labels=x)
    torch.testing.assert_close(out.loss, model.eval()(inputs=x, labels=x).loss, **SHARP)


# --- training


@pytest.mark.medium
def test_a_fixed_batch_is_learned():
    """Two clips of one colour each, with random sound. The label is masked for half of the draws and in evaluation, and
    so read from the clip. From about 1 (L1) and 2 (cross-entropy), nine other seeds came to at most 0.02, the sound to
    0.13.
    """
    case = tiny("multimodal")
    case.config.preprocessor |= {"mask_probs": {"label": 0.5}, "masked_at_inference": ["label"]}
    case.config.postprocessor |= {"loss_weights": {"label": 0.1}, "num_loss_points": {"image": 12}}
    model, x = case.model(PerceiverIOForMultimodalAutoencoding, large=False).train(), case.inputs(2)["inputs"]
    x["image"] = torch.randn(2, 1, 3, 1, 1).expand(2, 2, 3, 4, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    for _ in range(200):
        loss = model(inputs=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    losses = model.eval()(inputs=x, labels=x).losses
    assert losses["image"] < 0.05 and losses["label"] < 0.05 and losses["audio"] < 0.2, losses


def test_the_loss_is_taken_in_float32_under_autocast():
    """bfloat16 keeps 8 bits: a hundredth of the outputs' size."""
    model, x = autoencoder().float(), {name: values.float() for name, values in clips().items()}
    want = model(inputs=x, labels=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(inputs=x, labels=x)
    assert out.logits["image"].dtype == torch.bfloat16
    for name, loss in out.losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, want.losses[name], rtol=0.05, atol=0.05)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_label_is_masked_half_of_the_time_in_training_and_always_at_inference():
    """2,000 examples: three standard deviations of a half are 0.034."""
    case = tiny("multimodal")
    case.config.preprocessor |= {"mask_probs": {"label": 0.5}, "masked_at_inference": ["label"]}
    model = case.model(PerceiverIOForMultimodalAutoencoding)
    x = {name: values.expand(2000, *values.shape[1:]) for name, values in case.inputs(1)["inputs"].items()}
    part = model.train().perceiver.preprocessor(x).parts["label"]
    assert abs(part.replaced.float().mean() - 0.5) < 0.034
    assert model.perceiver.preprocessor(x).parts["image"].replaced is None
    part = model.eval().perceiver.preprocessor(x).parts["label"]
    assert part.replaced.all()
    # Whatever the label says, or if there is none: the answer is the same.
    some = {name: values[:2] for name, values in x.items()}
    want = model(inputs=some).logits
    for label in (1 - some["label"], torch.tensor([3, -100]), None):
        got = model(inputs={**some, "label": label}).logits
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_a_modality_that_some_examples_lack_changes_nothing_for_the_others():
    """By its mask over the examples; one without it is as one of a batch that lacks it."""
    model, x = autoencoder(), clips(3)
    query = {"kind": "position", "position": {**fourier(8, bands=3), "rule": "sampled"}, "grid": [2]}
    model.perceiver.output_query.modalities["audio"].grid = tuple(query["grid"])
    there = torch.tensor([True, False, True])
    out = model(inputs=x, attention_mask={"audio": there}).logits
    whole = model(inputs=x).logits
    without = model(inputs={name: values for name, values in x.items() if name != "audio"}).logits
    for name in out:
        torch.testing.assert_close(out[name][there], whole[name][there], **SHARP)
        torch.testing.assert_close(out[name][~there], without[name][~there], **SHARP)


def test_dropped_modalities_are_masked_ones_for_the_whole_model():
    case = tiny("multimodal")
    case.config.preprocessor |= {"dropout_probs": {"image": 0.5, "audio": 0.2}}
    model = case.model(PerceiverIOForMultimodalAutoencoding).double()
    x = clips(12)
    seen: list[Any] = []
    model.perceiver.preprocessor.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.manual_seed(0)
    dropped = model.train()(inputs=x).logits
    masks = {name: seen[0].parts[name].mask for name in ("image", "audio")}
    assert all(0 < mask.any(dim=1).sum() < 12 for mask in masks.values())
    masked = model.eval()(inputs=x, attention_mask=masks).logits
    for name in dropped:
        torch.testing.assert_close(dropped[name], masked[name], **SHARP)


# --- free names and kinds


def robot_config(**changes: Any):
    """Depth on a grid, motion as a series, an instruction as text -> an action's class, the points of a path."""
    fields: dict[str, Any] = {
        "num_labels": 4,
        "vocab_size": 30,
        "preprocessor": {
            "kind": "multimodal",
            "mask_probs": {"text": 0.1},
            "dropout_probs": {"imu": 0.2},
            "modalities": {
                "depth": grid({"kind": "pixels", "in_channels": 1}, fourier(4, 5)),
                "imu": grid({"kind": "values", "channels": 6}, fourier(8)),
                "text": {"kind": "text", "channels": 12, "position": trainable(9, 12)},
            },
        },
        "output_query": {
            "kind": "multimodal",
            "modalities": {
                "action": {"kind": "tasks", "channels": 16},
                "trajectory": {"kind": "position", "position": fourier(10), "grid": [10]},
            },
        },
        "postprocessor": {
            "kind": "multimodal",
            "modalities": {
                "action": {"kind": "classification"},
                "trajectory": {"kind": "projection", "num_outputs": 2},
            },
            "losses": {"trajectory": "mse"},
            "loss_weights": {"trajectory": 2.0},
            "num_loss_points": {"trajectory": 6},
        },
    }
    return config_of(**{**fields, **changes})


def robot_batch(batch: int = 3) -> dict[str, Any]:
    inputs = {
        "depth": torch.rand(batch, 1, 4, 5),
        "imu": torch.randn(batch, 8, 6),
        "text": torch.randint(6, 30, (batch, 7)),
    }
    masks = {"text": (torch.arange(7) < torch.tensor([7, 4, 5])[torch.arange(batch) % 3, None]).long()}
    labels = {"action": torch.arange(batch) % 4, "trajectory": torch.randn(batch, 10, 2)}
    return {"inputs": inputs, "attention_mask": masks, "labels": labels}


def test_names_and_kinds_are_free(tmp_path):
    model, given = enlarge(PerceiverIOForMultimodalAutoencoding(robot_config())).eval(), robot_batch()
    out = model(**given)
    assert {name: tuple(values.shape) for name, values in out.logits.items()} == {
        "action": (3, 4),
        "trajectory": (3, 10, 2),
    }
    want = F.cross_entropy(out.logits["action"], given["labels"]["action"])
    want = want + 2 * F.mse_loss(out.logits["trajectory"], given["labels"]["trajectory"])
    torch.testing.assert_close(out.loss, want)
    assert model.train()(**given).logits["trajectory"].shape == (3, 6, 2)
    model.eval().save_pretrained(tmp_path)
    loaded = PerceiverIOForMultimodalAutoencoding.from_pretrained(tmp_path)
    for side in ("preprocessor", "output_query", "postprocessor"):
        assert getattr(loaded.config, side) == getattr(model.config, side)
    again = loaded(**given)
    for name in out.logits:
        torch.testing.assert_close(again.logits[name], out.logits[name], rtol=1e-4, atol=1e-4)  # float32
    torch.testing.assert_close(again.loss, out.loss)


def test_every_input_and_every_weight_matters():
    model, given = enlarge(PerceiverIOForMultimodalAutoencoding(robot_config())).eval(), robot_batch()
    loss = model(**given).loss
    for name, values in given["inputs"].items():
        other = model(**{**given, "inputs": {**given["inputs"], name: values.flip(0)}}).loss
        assert not torch.isclose(loss, other), name
    loss.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Mask tokens stand in in training only; of positions the last ones, text being shorter, keep a gradient of 0.
    assert idle == {f"perceiver.preprocessor.mask_tokens.{name}" for name in ("depth", "imu", "text")}


def test_a_class_for_each_pixel_is_an_output_too():
    config = robot_config()
    config.output_query["modalities"]["depth"] = {"kind": "position", "position": fourier(4, 5)}
    config.postprocessor["modalities"]["depth"] = {"kind": "projection", "num_outputs": 7, "on_grid": True}
    config.postprocessor["losses"] = {"depth": "cross_entropy"}
    model, given = enlarge(PerceiverIOForMultimodalAutoencoding(config)).eval(), robot_batch()
    classes = torch.randint(0, 7, (3, 4, 5))
    classes[0, :, 0] = -100
    out = model(**{**given, "labels": {"depth": classes}})
    each = F.cross_entropy(out.logits["depth"].movedim(-1, 1), classes, ignore_index=-100, reduction="none")
    want = (each[0].sum() / 16 + each[1].mean() + each[2].mean()) / 3
    torch.testing.assert_close(out.loss, want)


def test_masked_words_are_an_output_too():
    config = robot_config()
    config.output_query["modalities"]["text"] = {
        "kind": "position",
        "position": trainable(9, 12),
        "use_input_mask": True,
    }
    config.postprocessor["modalities"]["text"] = {"kind": "tokens", "tied": False}
    model, given = enlarge(PerceiverIOForMultimodalAutoencoding(config)).eval(), robot_batch()
    words = torch.where(given["attention_mask"]["text"] != 0, given["inputs"]["text"], -100)
    out = model(**{**given, "labels": {"text": words}})
    each = F.cross_entropy(out.logits["text"].movedim(-1, 1), words, ignore_index=-100, reduction="none")
    torch.testing.assert_close(out.loss, (each.sum(dim=1) / (words != -100).sum(dim=1)).mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gps": torch.zeros(3, 2)}, "unknown modality 'gps' in the input; known: depth, imu, text"),
        ({"text": torch.full((3, 7), 30)}, "token ids 30..30 do not fit a vocabulary of 30"),
        ({"imu": torch.zeros(3, 8, 5)}, r"values are \(batch, ..., 6\), not \(3, 8, 5\)"),
    ],
)
def test_what_a_model_cannot_read_is_named(change, message):
    given = robot_batch()
    with pytest.raises(ValueError, match=message):
        PerceiverIOForMultimodalAutoencoding(robot_config())(**{**given, "inputs": {**given["inputs"], **change}})


def test_a_modality_that_is_needed_is_named():
    """The tiny autoencoder's image is asked on its input's grid."""
    model, x = autoencoder(), clips()
    with pytest.raises(ValueError, match=r"takes its grid from the input, .* a missing modality.*grid=\[\.\.\.\]"):
        model(inputs={"audio": x["audio"]})
    assert isinstance(model.perceiver.output_query, MultimodalQuery)


# --- classes of sound and video


SOUND = grid({"kind": "audio_patches", "samples_per_patch": 4}, fourier(5))
MEL = grid({"kind": "spectrogram"}, fourier(5, 4))
VIDEO = grid({"kind": "patches", "spatial_downsample": 2, "temporal_downsample": 2}, fourier(2, 3, 2, bands=2))
BOTH = {"kind": "multimodal", "dropout_probs": {"image": 0.3}, "modalities": {"audio": SOUND, "image": VIDEO}}
QUERY = {"output_query": {"kind": "tasks", "channels": 16}, "postprocessor": {"kind": "classification"}}
MEAN = {"output_query": None, "postprocessor": {"kind": "average", "zero_init": False}}
HEADS = {
    "samples": (PerceiverIOForAudioClassification, SOUND, lambda b: {"input_values": torch.randn(b, 20, 1)}),
    "log-mel": (PerceiverIOForAudioClassification, MEL, lambda b: {"input_features": torch.randn(b, 5, 4)}),
    "video": (PerceiverIOForVideoClassification, VIDEO, lambda b: {"pixel_values": torch.randn(b, 4, 3, 6, 4)}),
    "both": (
        PerceiverIOForAudioVisualClassification,
        BOTH,
        lambda b: {"inputs": {"audio": torch.randn(b, 20, 1), "image": torch.randn(b, 4, 3, 6, 4)}},
    ),
}  # fmt: skip


def classifier(name: str, **changes: Any) -> Any:
    head, preprocessor, _ = HEADS[name]
    return enlarge(head(config_of(preprocessor=copy.deepcopy(preprocessor), **{**QUERY, **changes}))).eval()


@pytest.mark.parametrize("sides", [QUERY, MEAN], ids=["query", "mean"])
@pytest.mark.parametrize("name", HEADS)
def test_sound_and_video_have_classes(name, sides, tmp_path):
    model, given = classifier(name, **sides), HEADS[name][2](3)
    labels = torch.tensor([0, 4, 2])
    out = model(**given, labels=labels)
    assert out.logits.shape == (3, 5)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)(**given).logits
    torch.testing.assert_close(again, out.logits, rtol=1e-4, atol=1e-4)  # float32, and answers of the size of 10


@pytest.mark.parametrize("name", HEADS)
def test_several_labels_at_once(name):
    model, given = classifier(name, problem_type="multi_label_classification"), HEADS[name][2](3)
    labels = torch.randint(0, 2, (3, 5)).float()
    out = model(**given, labels=labels)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, labels))
    # As many items as Trainer counts.
    torch.testing.assert_close(model(**given, labels=labels, num_items_in_batch=30).loss, out.loss / 2)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_takes_what_another_left(name):
    """A config of the same input with another output side gets a class query as wide as the decoder's."""
    model = classifier(name, output_query=None, postprocessor=None)
    assert model.config.output_query == {"kind": "tasks", "channels": 16}
    assert model.config.postprocessor == {"kind": "classification"}


def test_every_name_of_a_sound_is_the_same():
    model, sound = classifier("samples"), torch.randn(2, 20, 1)
    want = model(sound).logits
    for given in ({"input_values": sound[..., 0]}, {"input_features": sound}, {"inputs": sound}):
        assert torch.equal(model(**given).logits, want)
    with pytest.raises(ValueError, match="give exactly one of input_values, input_features, inputs; got none"):
        model()


@pytest.mark.parametrize("name", ["samples", "log-mel"])
def test_padding_of_a_sound_changes_nothing(name):
    """16 of 20 samples, or 4 of 5 times; positions go by the grid, so the shorter one stands at the longer one's places."""
    model, (key, sound) = classifier(name), next(iter(HEADS[name][2](1).items()))
    length = {"samples": 16, "log-mel": 4}[name]
    mask = (torch.arange(sound.shape[1]) < length).long()[None]
    want = model(**{key: sound}, attention_mask=mask).logits
    noise = torch.cat([sound[:, :length], torch.randn_like(sound[:, length:])], dim=1)
    torch.testing.assert_close(model(**{key: noise}, attention_mask=mask).logits, want)
    assert not torch.allclose(model(**{key: noise}).logits, want)


def test_a_video_has_five_axes():
    with pytest.raises(ValueError, match=r"videos are \(batch, time, channels, height, width\), not \(4, 3, 6, 4\)"):
        classifier("video")(torch.randn(4, 3, 6, 4))


@pytest.mark.parametrize(
    ("preprocessor", "frames"),
    [
        (VIDEO, 4),
        (grid({"kind": "pixels"}, fourier(16, 5, 5)), 16),
        (grid({"kind": "pixels"}, trainable(24, 8, grid=[6, 2, 2])), 6),
        (grid({"kind": "pixels"}, {"kind": "projected", "position": fourier(7, 5, 5), "channels": 8}), 7),
        (grid({"kind": "pixels"}, fourier(5, 5)), None),
        (grid({"kind": "pixels"}), None),
    ],
)
def test_the_number_of_frames_is_that_of_the_positions(preprocessor, frames):
    assert trained_frames(config_of(preprocessor=preprocessor, **QUERY)) == frames


def test_the_number_of_frames_stands_in_the_config(tmp_path):
    """transformers' video-classification pipeline samples `config.num_frames`."""
    model = classifier("video")
    assert model.config.num_frames == 4
    model.save_pretrained(tmp_path)
    assert PerceiverIOForVideoClassification.from_pretrained(tmp_path).config.num_frames == 4
    assert classifier("video", num_frames=8).config.num_frames == 8


# --- pipelines


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("name", ["samples", "log-mel"])
def test_the_audio_pipeline_gives_the_models_scores(name, problem):
    """A sound shorter than the model's is padded, and the padding masked."""
    options = {"feature": "log_mel", "frame_length": 32, "num_mel_bins": 4, "max_frequency": 4000}
    extractor = PerceiverIOFeatureExtractor(
        sampling_rate=8000, num_samples=20, hop_length=4, **(options if name == "log-mel" else {})
    )
    model, sound = classifier(name, problem_type=problem), np.sin(np.arange(13)).astype(np.float32)
    found = pipeline("audio-classification", model=model, feature_extractor=extractor)(sound)
    with torch.no_grad():
        logits = model(**extractor(sound, sampling_rate=8000, return_tensors="pt")).logits[0]
    assert_scores(found, logits.softmax(-1) if problem.startswith("single") else logits.sigmoid())


def test_the_video_pipeline_gives_the_models_scores(tmp_path):
    """It takes as many frames of the file as the config says, here 4 of 6."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, frames_per_second=25) as writer:
        for i in range(6):
            writer.write_frame(np.full((16, 16, 3), 40 * i, np.uint8))
    model = classifier("video")
    processor = PerceiverIOVideoProcessor(size={"height": 6, "width": 4}, num_frames=2)
    found = pipeline("video-classification", model=model, video_processor=processor)(str(path))
    with torch.no_grad():
        logits = model(**processor(str(path), num_frames=4, return_tensors="pt")).logits[0]
    assert_scores(found, logits.softmax(-1))


def assert_scores(found: list[dict[str, Any]], probabilities: torch.Tensor) -> None:
    best = probabilities.sort(descending=True)
    assert [entry["label"] for entry in found] == [f"LABEL_{i}" for i in best.indices.tolist()]
    assert [entry["score"] for entry in found] == pytest.approx(best.values.tolist(), rel=1e-3, abs=1e-6)
