"""Tiny models of every architecture and kind, for every test file: `from helpers import TINY, tiny`.

case = tiny("language")         # a fresh Case each time; nothing is shared between tests
model = case.model()            # PerceiverIOModel, or case.model(PerceiverIOForMaskedLM)
outputs = model(**case.inputs(batch=3))
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_perceiver import (
    PerceiverIOConfig,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForMultipleChoice,
    PerceiverIOForOpticalFlow,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOModel,
)

VOCAB, LENGTH = 30, 12

# The later name of gradient checkpointing in transformers, or the one that is going.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)


@dataclass
class Case:
    """A tiny architecture: its config, the inputs it reads, the heads that can be put on it."""

    name: str
    config: PerceiverIOConfig
    make_inputs: Callable[[int], dict[str, Any]]
    heads: tuple[type, ...] = ()

    def inputs(self, batch: int = 2, seed: int = 1) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            return self.make_inputs(batch)
        finally:
            torch.set_rng_state(state)

    def model(self, cls: type = PerceiverIOModel, *, large: bool = True, seed: int = 0, **changes: Any) -> Any:
        """A model in evaluation mode; `large` makes every weight matter (see `enlarge`); changes go to the config."""
        config = copy.deepcopy(self.config)
        for name, value in changes.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        model = cls(config)
        return (enlarge(model, seed) if large else model).eval()


def enlarge(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Redraw every parameter so large that none is idle: attention far from uniform, biases and norms not trivial.

    With transformers' usual standard deviation of 0.02 two implementations agree to 1e-9 even when one is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim > 1 and "weight" in name and "latents" not in name and "embedding.weight" not in name:
                parameter.copy_(1.5 * noise / math.sqrt(parameter[0].numel()))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.7 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def config_of(**changes: Any) -> PerceiverIOConfig:
    """A tiny config: 4 latents of 16 channels, 2 blocks of 2 self-attends, 5 labels; `changes` are fields."""
    fields: dict[str, Any] = {
        "num_latents": 4,
        "d_latents": 16,
        "num_blocks": 2,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
        "qk_channels": None,
        "v_channels": None,
        "decoder_num_heads": 1,
        "decoder_qk_channels": None,
        "decoder_v_channels": None,
        "num_labels": 5,
        "vocab_size": VOCAB,
    }
    return PerceiverIOConfig(**{**fields, **changes})


def fourier(*max_resolution: int, bands: int = 3, **options: Any) -> dict[str, Any]:
    return {"kind": "fourier", "num_bands": bands, "max_resolution": list(max_resolution), **options}


def trainable(num_positions: int, channels: int, **options: Any) -> dict[str, Any]:
    return {"kind": "trainable", "num_positions": num_positions, "channels": channels, **options}


def grid(stem: dict[str, Any], position: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"kind": "grid", "stem": stem, "position": position, **options}


PIXELS = {"kind": "pixels", "in_channels": 3}
CLASSES = {"output_query": {"kind": "tasks", "channels": 16}, "postprocessor": {"kind": "classification"}}


def text_inputs(batch: int, length: int = 9) -> dict[str, Tensor]:
    """Token ids and a mask with fewer valid tokens in each row, at least one."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, max(1, length - 2 * row) :] = 0
    return {"input_ids": torch.randint(6, VOCAB, (batch, length)), "attention_mask": mask}


def image_inputs(height: int = 6, width: int = 5) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {"pixel_values": torch.randn(batch, 3, height, width)}


def multimodal_inputs(batch: int) -> dict[str, Any]:
    modalities = {
        "image": torch.randn(batch, 2, 3, 4, 6),
        "audio": torch.randn(batch, 8, 1),
        "label": torch.nn.functional.one_hot(torch.arange(batch) % 5, 5).float(),
    }
    return {"inputs": modalities}


def _language(**changes: Any) -> PerceiverIOConfig:
    """As released: added trained positions, qk and v widths of their own, tied tokens, masked queries."""
    fields: dict[str, Any] = {
        "num_blocks": 1,
        "qk_channels": 8,
        "v_channels": 16,
        "num_cross_attention_heads": 2,
        "decoder_num_heads": 2,
        "decoder_qk_channels": 8,
        "decoder_v_channels": 12,
        "preprocessor": {"kind": "text", "channels": 12, "position": trainable(LENGTH, 12)},
        "output_query": {"kind": "position", "position": trainable(LENGTH, 12), "use_input_mask": True},
        "postprocessor": {"kind": "tokens"},
    }
    return config_of(**{**fields, **changes})


def _multimodal() -> PerceiverIOConfig:
    video, sound = fourier(2, 2, 3, bands=2), fourier(8, bands=3)
    return config_of(
        num_blocks=1,
        preprocessor={
            "kind": "multimodal",
            "min_padding_size": 2,
            "mask_probs": {"image": 0.0, "audio": 0.0, "label": 1.0},
            "modalities": {
                "image": grid({"kind": "patches", "in_channels": 3, "spatial_downsample": 2}, video),
                "audio": grid({"kind": "audio_patches", "samples_per_patch": 4}, sound),
                "label": {"kind": "vector", "channels": 5},
            },
        },
        output_query={
            "kind": "multimodal",
            "min_padding_size": 2,
            "modalities": {
                "image": {"kind": "position", "position": {**video, "rule": "sampled"}, "scale": [1, 2, 2]},
                "audio": {"kind": "position", "position": {**sound, "rule": "sampled"}},
                "label": {"kind": "tasks", "channels": 20},
            },
        },
        postprocessor={
            "kind": "multimodal",
            "channels": 14,
            "modalities": {
                "image": {"kind": "projection", "num_outputs": 3, "on_grid": True},
                "audio": {"kind": "audio", "samples_per_patch": 4},
                "label": {"kind": "classification"},
            },
        },
    )


def _original(**changes: Any) -> PerceiverIOConfig:
    fields: dict[str, Any] = {
        "num_blocks": 3,
        "num_self_attends_per_block": 1,
        "cross_attend_before_blocks": [0, 1, 2],
        "cross_attend_sharing": "after_first",
        "preprocessor": grid(PIXELS, fourier(6, 5)),
        "output_query": None,
        "postprocessor": {"kind": "average"},
    }
    return config_of(**{**fields, **changes})


_TEXT_HEADS = (
    PerceiverIOForMaskedLM,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForMultipleChoice,
)
_IMAGE_HEADS = (PerceiverIOForImageClassification,)

# name -> () -> (config, inputs, heads)
TINY: dict[str, Callable[[], tuple[Any, ...]]] = {
    # The six released architectures.
    "language": lambda: (_language(), text_inputs, _TEXT_HEADS),
    "imagenet_learned": lambda: (
        config_of(
            preprocessor=grid(
                {"kind": "conv1x1", "in_channels": 3, "channels": 8},
                {"kind": "projected", "position": trainable(30, 7, grid=[6, 5]), "channels": 9},
            ),
            **CLASSES,
        ),
        image_inputs(),
        _IMAGE_HEADS,
    ),
    "imagenet_fourier": lambda: (
        config_of(decoder_use_query_residual=True, preprocessor=grid(PIXELS, fourier(6, 5)), **CLASSES),
        image_inputs(),
        _IMAGE_HEADS,
    ),
    "imagenet_conv": lambda: (
        config_of(
            decoder_use_query_residual=True,
            preprocessor=grid({"kind": "conv", "in_channels": 3, "channels": 8}, fourier(4, 3)),
            **CLASSES,
        ),
        image_inputs(15, 10),
        _IMAGE_HEADS,
    ),
    "flow": lambda: (
        config_of(
            num_blocks=1,
            preprocessor=grid(
                {"kind": "patches", "in_channels": 27, "temporal_downsample": 2, "project": 9}, fourier(4, 6)
            ),
            output_query={"kind": "input"},
            postprocessor={"kind": "flow", "rescale_factor": 100.0},
        ),
        lambda batch: {"pixel_values": torch.randn(batch, 2, 27, 4, 6)},
        (PerceiverIOForOpticalFlow,),
    ),
    "flow_separate": lambda: (
        config_of(
            num_blocks=1,
            preprocessor=grid({"kind": "patches", "in_channels": 5, "project": 9}, fourier(2, 4, 6, bands=2)),
            output_query={"kind": "input", "first_frame": True},
            postprocessor={"kind": "flow"},
        ),
        lambda batch: {"pixel_values": torch.randn(batch, 2, 5, 4, 6)},
        (PerceiverIOForOpticalFlow,),
    ),
    "flow_upsampled": lambda: (
        config_of(
            num_blocks=1,
            preprocessor=grid(
                {"kind": "conv", "channels": 6, "temporal_downsample": 2, "exact_sizes": True}, fourier(2, 3)
            ),
            output_query={"kind": "input"},
            postprocessor={"kind": "convex_upsampling", "channels": 7},
        ),
        lambda batch: {"pixel_values": torch.randn(batch, 2, 3, 8, 12)},
        (PerceiverIOForOpticalFlow,),
    ),
    "multimodal": lambda: (_multimodal(), multimodal_inputs, (PerceiverIOForMultimodalAutoencoding,)),
    # The original Perceiver: several reads, the mean latent as read-out.
    "original_shared": lambda: (_original(), image_inputs(), _IMAGE_HEADS),
    "original_unshared": lambda: (
        _original(cross_attend_sharing="none", block_sharing="none"),
        image_inputs(),
        _IMAGE_HEADS,
    ),
    "reads_by_list": lambda: (
        _original(
            cross_attend_before_blocks=[0, 0, 2, 2],
            cross_attend_sharing=[0, 1, 0, 2],
            block_sharing=[0, 1, 0],
            use_query_residual=False,
            cross_attention_shape_for_attention="q",
            cross_attention_widening_factor=2,
            self_attention_widening_factor=3,
            **CLASSES,
        ),
        image_inputs(),
        _IMAGE_HEADS,
    ),
    # Every other kind and option.
    "text_fourier": lambda: (
        _language(
            qk_channels=6,
            v_channels=10,
            decoder_qk_channels=10,
            decoder_v_channels=6,
            decoder_widening_factor=2,
            decoder_use_query_residual=True,
            preprocessor={
                "kind": "text",
                "channels": 9,
                "position": fourier(LENGTH, rule="index"),
                "combine": "concat",
            },
            output_query={"kind": "position", "position": fourier(LENGTH, rule="index"), "use_input_mask": True},
            postprocessor={"kind": "tokens", "tied": False},
        ),
        text_inputs,
        _TEXT_HEADS,
    ),
    "text_untied": lambda: (_language(tie_word_embeddings=False), text_inputs, (PerceiverIOForMaskedLM,)),
    "text_classes": lambda: (
        _language(
            output_query={"kind": "tasks", "channels": 16}, postprocessor={"kind": "classification", "hidden": 7}
        ),
        text_inputs,
        (PerceiverIOForSequenceClassification,),
    ),
    "text_average": lambda: (
        _language(output_query=None, postprocessor={"kind": "average", "zero_init": False}),
        text_inputs,
        (PerceiverIOForSequenceClassification,),
    ),
    "text_tasks": lambda: (
        _language(
            output_query={"kind": "tasks", "channels": 16, "num_tasks": 3}, postprocessor={"kind": "classification"}
        ),
        text_inputs,
        (),
    ),
    "text_set": lambda: (
        _language(
            preprocessor={"kind": "text", "channels": 12, "position": {"kind": "none"}},
            output_query={"kind": "input"},
            postprocessor={"kind": "projection"},
        ),
        text_inputs,
        (),
    ),
    "features_only": lambda: (_language(output_query=None, postprocessor=None), text_inputs, ()),
    "concat_query": lambda: (
        config_of(
            preprocessor=grid(
                PIXELS, {"kind": "projected", "position": fourier(6, 5, sine_only=True), "num_extra_mlps": 2}
            ),
            output_query={"kind": "position", "position": fourier(6, 5, concat_pos=False), "concat_input": True},
            postprocessor={"kind": "projection", "num_outputs": 2, "on_grid": True},
        ),
        image_inputs(),
        (),
    ),
    "added_positions": lambda: (
        config_of(
            preprocessor=grid(
                {"kind": "conv1x1", "in_channels": 3, "channels": 8, "spatial_downsample": 2},
                {"kind": "projected", "position": fourier(3, 3), "channels": 8},
                combine="add",
            ),
            output_query={"kind": "position", "position": fourier(6, 6), "grid": [4, 3]},
            postprocessor={"kind": "projection", "num_outputs": 1},
        ),
        image_inputs(),
        (),
    ),
    "deep_conv": lambda: (
        config_of(
            preprocessor=grid(
                {"kind": "conv", "in_channels": 3, "channels": 6, "num_layers": 2, "use_batchnorm": False},
                {"kind": "fourier", "num_bands": 2, "num_axes": 2},
            ),
            **CLASSES,
        ),
        image_inputs(33, 18),
        _IMAGE_HEADS,
    ),
    "video": lambda: (
        config_of(
            preprocessor=grid({**PIXELS, "spatial_downsample": 2, "temporal_downsample": 2}, fourier(2, 2, 3, bands=2)),
            output_query={
                "kind": "position",
                "position": fourier(2, 2, 3, bands=2, rule="sampled"),
                "scale": [2, 1, 1],
            },
            postprocessor={"kind": "projection", "num_outputs": 3, "on_grid": True},
        ),
        lambda batch: {"pixel_values": torch.randn(batch, 4, 3, 4, 5)},
        (),
    ),
    "audio": lambda: (
        config_of(
            preprocessor=grid({"kind": "audio_patches", "samples_per_patch": 3}, fourier(5)),
            output_query={"kind": "position", "position": fourier(5, rule="sampled")},
            postprocessor={"kind": "audio", "samples_per_patch": 3},
        ),
        lambda batch: {"inputs": torch.randn(batch, 15, 1)},
        (),
    ),
    "values": lambda: (
        config_of(
            preprocessor=grid({"kind": "values", "channels": 4}, fourier(3, 4, bands=2)),
            output_query={"kind": "input"},
            postprocessor={"kind": "projection"},
        ),
        lambda batch: {"inputs": torch.randn(batch, 3, 4, 4)},
        (),
    ),
    "points": lambda: (
        config_of(
            preprocessor={"kind": "points", "position": fourier(16, 16, 16, bands=2), "feature_channels": 2},
            output_query={"kind": "input"},
            postprocessor={"kind": "projection"},
        ),
        lambda batch: {
            "inputs": torch.cat([torch.rand(batch, 7, 3) * 2 - 1, torch.randn(batch, 7, 2)], dim=-1),
            "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 1] * 3 + [0]])[torch.arange(batch) % 3],
        },
        (),
    ),
    "bare_points": lambda: (
        config_of(preprocessor={"kind": "points", "position": fourier(16, 16, bands=2)}, **CLASSES),
        lambda batch: {"inputs": torch.rand(batch, 7, 2) * 2 - 1},
        (PerceiverIOForImageClassification,),
    ),
    "vector": lambda: (
        config_of(preprocessor={"kind": "vector", "channels": 5}, **CLASSES),
        lambda batch: {"inputs": torch.randn(batch, 5)},
        (),
    ),
}


def tiny(name: str) -> Case:
    config, make_inputs, heads = TINY[name]()
    return Case(name, config, make_inputs, heads)


# Every head on every tiny architecture that it can be put on: (name, head).
HEADS = [(name, head) for name in TINY for head in TINY[name]()[2]]


def head_inputs(case: Case, head: type, batch: int = 2, labels: bool = False) -> dict[str, Any]:
    """Keyword arguments of a head's forward, with labels that give a loss if asked for."""
    given = case.inputs(batch)
    if head is PerceiverIOForMultipleChoice:
        given = {name: torch.stack([value, value.flip(1)], dim=1) for name, value in given.items()}
    if not labels:
        return given
    length = given["input_ids"].shape[-1] if "input_ids" in given else 0
    if head is PerceiverIOForOpticalFlow:
        return {**given, "labels": torch.randn(batch, *given["pixel_values"].shape[-2:], 2)}
    targets: dict[type, dict[str, Tensor]] = {
        PerceiverIOForMaskedLM: {"labels": torch.randint(0, VOCAB, (batch, length))},
        PerceiverIOForTokenClassification: {"labels": torch.randint(0, 5, (batch, length))},
        PerceiverIOForMultipleChoice: {"labels": torch.randint(0, 2, (batch,))},
        PerceiverIOForSequenceClassification: {"labels": torch.randint(0, 5, (batch,))},
        PerceiverIOForImageClassification: {"labels": torch.randint(0, 5, (batch,))},
        PerceiverIOForQuestionAnswering: {
            "start_positions": torch.zeros(batch, dtype=torch.long),
            "end_positions": torch.full((batch,), length - 1),
        },
    }
    return {**given, **targets.get(head, {})}


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors(value)]
    return []


def assert_same(got: Any, want: Any, **tolerance: Any) -> None:
    """Nested outputs have the same tensors; bitwise unless a tolerance is given."""
    got, want = tensors(got), tensors(want)
    assert len(got) == len(want) and want
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))
