"""torch.compile: every head is one graph, and one graph serves every size that its model takes.

Sizes that change are marked as dynamic, as torch.compile does by itself when a second call differs from the first; a
graph that fixes one of them is an error, and so is another compilation. Backend "eager" runs what was traced as it is:
what can break is the tracing. Traced models take the direct forms, untraced ones the fast forms, hence the tolerance:
numbers up to about 10 in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_same, tensors, tiny
from test_heads_multimodal import classifier

from hf_perceiver import (
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForMultipleChoice,
    PerceiverIOForMultitaskSequenceClassification,
    PerceiverIOForOpticalFlow,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@dataclass
class Compiled:
    """A head, how to make inputs of a size, and the sizes to try."""

    make: Callable[[], Any]
    inputs: Callable[..., dict[str, Any]]
    sizes: Sequence[tuple[int, ...]]


def text(batch: int, length: int) -> dict[str, Any]:
    mask = (torch.arange(length) < length - torch.arange(batch)[:, None]).long()
    return {"input_ids": torch.randint(6, 30, (batch, length)), "attention_mask": mask}


def choices(batch: int, length: int) -> dict[str, Any]:
    return {name: torch.stack([x, x.flip(1)], dim=1) for name, x in text(batch, length).items()}


def images(batch: int, height: int, width: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, height, width)}


def frames(channels: int) -> Callable[..., dict[str, Any]]:
    return lambda batch, height, width: {"pixel_values": torch.randn(batch, 2, channels, height, width)}


def sound(batch: int, samples: int) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, samples, 1)}


def spectrogram(batch: int, time: int) -> dict[str, Any]:
    return {"input_features": torch.randn(batch, time, 4)}


def video(batch: int, frames: int, height: int, width: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, frames, 3, height, width)}


def clip(batch: int, samples: int, frames: int, height: int, width: int) -> dict[str, Any]:
    inputs = {"audio": torch.randn(batch, samples, 1), "image": torch.randn(batch, frames, 3, height, width)}
    return {"inputs": inputs}


def of(case: str, head: type, **changes: Any) -> Callable[[], Any]:
    return lambda: tiny(case).model(head, num_self_attends_per_block=1, **changes)


TASKS = {"kind": "multitask", "tasks": {"mood": ["sad", "glad", "neither"], "kind": ["verse", "prose"]}}
TEXTS = [(3, 8), (4, 11), (5, 7)]
IMAGES = [(3, 6, 5), (4, 7, 8), (5, 5, 4)]
CASES = {
    "masked-lm": Compiled(of("language", PerceiverIOForMaskedLM), text, TEXTS),
    "text-classes": Compiled(of("language", PerceiverIOForSequenceClassification), text, TEXTS),
    "token-classes": Compiled(of("language", PerceiverIOForTokenClassification), text, TEXTS),
    "answers": Compiled(of("language", PerceiverIOForQuestionAnswering), text, TEXTS),
    "choices": Compiled(of("language", PerceiverIOForMultipleChoice), choices, TEXTS),
    "tasks": Compiled(
        of("language", PerceiverIOForMultitaskSequenceClassification, postprocessor=TASKS),
        lambda batch, length: {**text(batch, length), "task_ids": torch.arange(batch) % 2},
        TEXTS,
    ),
    "image-classes-learned": Compiled(
        of("imagenet_learned", PerceiverIOForImageClassification),
        lambda batch: images(batch, 6, 5),
        [(3,), (4,), (5,)],
    ),
    "image-classes-fourier": Compiled(of("imagenet_fourier", PerceiverIOForImageClassification), images, IMAGES),
    "image-classes-conv": Compiled(
        of("imagenet_conv", PerceiverIOForImageClassification),
        images,
        [(3, 15, 10), (4, 17, 13), (5, 13, 22)],
    ),
    "image-classes-original": Compiled(of("original_shared", PerceiverIOForImageClassification), images, IMAGES),
    "flow": Compiled(of("flow", PerceiverIOForOpticalFlow), frames(27), [(3, 4, 6), (4, 5, 7), (5, 8, 4)]),
    "flow-upsampled": Compiled(
        of("flow_upsampled", PerceiverIOForOpticalFlow),
        frames(3),
        [(3, 8, 12), (4, 12, 16), (5, 20, 8)],
    ),
    "autoencoding": Compiled(
        of("multimodal", PerceiverIOForMultimodalAutoencoding),
        clip,
        [(3, 20, 4, 6, 8), (4, 16, 3, 8, 6), (5, 12, 2, 4, 6)],
    ),
    "classes-of-sound": Compiled(partial(classifier, "samples"), sound, [(3, 20), (4, 24), (5, 12)]),
    "classes-of-log-mel": Compiled(partial(classifier, "log-mel"), spectrogram, [(3, 5), (4, 7), (5, 3)]),
    "classes-of-video": Compiled(
        partial(classifier, "video"),
        video,
        [(3, 4, 6, 4), (4, 6, 8, 10), (5, 8, 4, 6)],
    ),
    "classes-of-both": Compiled(
        partial(classifier, "both"),
        clip,
        [(3, 20, 4, 6, 4), (4, 24, 6, 8, 10), (5, 12, 8, 4, 6)],
    ),
    "points": Compiled(
        of("bare_points", PerceiverIOForImageClassification),
        lambda batch, points: {"inputs": torch.rand(batch, points, 2) * 2 - 1},
        [(3, 8), (4, 11), (5, 7)],
    ),
}

# One of each kind of input; the others, four seconds each, are for `make slow`.
OFTEN = {"masked-lm", "image-classes-fourier", "flow", "autoencoding"}


def mark_changing_sizes(given: dict[str, Any], other: dict[str, Any]) -> None:
    """Tell torch.compile which sizes of `given` are others in `other`."""
    for x, y in zip(tensors(given), tensors(other), strict=True):
        for dim in range(x.ndim):
            if x.shape[dim] != y.shape[dim]:
                torch._dynamo.mark_dynamic(x, dim)


def assert_one_graph(model: Any, givens: list[dict[str, Any]], backend: str = "eager", **tolerance: Any) -> None:
    """The compiled model gives the model's own outputs for all inputs, and is compiled for the first ones only."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    mark_changing_sizes(*givens[:2])
    for number, given in enumerate(givens):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = compiled(**given)
        assert_same(got, model(**given), **(tolerance or CLOSE))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.medium if name in OFTEN else pytest.mark.slow) for name in CASES]
)
def test_one_graph_serves_every_size(name):
    case = CASES[name]
    torch.manual_seed(0)
    with torch.no_grad():
        assert_one_graph(case.make(), [case.inputs(*size) for size in case.sizes])


@pytest.mark.medium
def test_asking_for_some_positions_is_one_graph_for_any_number_of_them():
    """What the fill-mask pipeline does."""
    torch.manual_seed(0)
    model = tiny("language").model(PerceiverIOForMaskedLM, num_self_attends_per_block=1)
    counts = [(3, 8, 2), (4, 11, 5), (5, 7, 6)]
    givens = [{**text(b, n), "output_points": torch.randint(0, n, (b, asked))} for b, n, asked in counts]
    with torch.no_grad():
        assert_one_graph(model, givens)


@pytest.mark.slow
def test_training_is_one_graph_for_every_size():
    torch.manual_seed(0)
    model = tiny("language").model(PerceiverIOForMaskedLM, num_self_attends_per_block=1).train()
    givens = [text(*size) for size in TEXTS]
    assert_one_graph(model, [{**given, "labels": given["input_ids"]} for given in givens], backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked-lm", "flow"])
def test_inductor_computes_the_same(name):
    """The compiler that users get. Its kernels round otherwise than torch's."""
    case = CASES[name]
    torch.manual_seed(0)
    with torch.no_grad():
        givens = [case.inputs(*size) for size in case.sizes]
        assert_one_graph(case.make(), givens, backend="inductor", rtol=1e-3, atol=1e-3)
