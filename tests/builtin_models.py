"""Tiny models of transformers' own Perceiver, one per task class, for the tests that compare with it.

case = builtin_case("PerceiverForMaskedLM")
theirs = case.model()                       # float64, weights so large that none is idle
theirs.save_pretrained(folder)
ours = case.ours.from_pretrained(folder)    # of this package
ours(**case.our_inputs()); theirs(**case.inputs())
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PerceiverConfig

import hf_perceiver

VOCAB, POSITIONS, LABELS = 30, 20, 5

SIZES: dict[str, Any] = {
    "num_latents": 6,
    "d_latents": 24,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "num_labels": LABELS,
    "vocab_size": VOCAB,
    "d_model": 16,
    "max_position_embeddings": POSITIONS,
}
# As the language model's: several heads, widths of their own.
TEXT = {**SIZES, "num_cross_attention_heads": 2, "qk_channels": 8, "v_channels": 24}
MULTIMODAL = {
    **SIZES,
    "num_frames": 2,
    "audio_samples_per_frame": 32,
    "samples_per_patch": 8,
    "image_size": 4,
    "output_shape": [1, 2, 16, 16],
    "output_num_channels": 12,
    "_label_trainable_num_channels": 10,
}


@dataclass
class BuiltinCase:
    """A built-in class, its tiny config, ours for it, and inputs for the two, which may be named differently."""

    name: str
    fields: dict[str, Any]
    ours: Any
    make_inputs: Callable[[], dict[str, Any]]
    points: dict[str, Any] | None = None

    def config(self, **changes: Any) -> PerceiverConfig:
        return PerceiverConfig(**{**self.fields, **changes})

    def model(self, *, seed: int = 0, **changes: Any) -> Any:
        model = getattr(transformers, self.name)(self.config(**changes)).double()
        return enlarge(model, seed).eval()

    def inputs(self, seed: int = 1) -> dict[str, Any]:
        """For the built-in's forward; images, sound and frames in float64."""
        torch.manual_seed(seed)
        made = self.make_inputs()
        return made if self.points is None else {**made, "subsampled_output_points": self.points}

    def our_inputs(self, seed: int = 1) -> dict[str, Any]:
        made = self.inputs(seed)
        return made if self.points is None else {"inputs": made["inputs"], "output_points": self.points}


def text_inputs() -> dict[str, Tensor]:
    """A full row, a padded one, and one that is masked throughout."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2] = 0
    return {"input_ids": torch.randint(6, VOCAB, (3, 9)), "attention_mask": mask}


def images(height: int, width: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, height, width, dtype=torch.float64)}


def multimodal_inputs() -> dict[str, Any]:
    made = {"image": torch.randn(2, 2, 3, 16, 16), "audio": torch.randn(2, 64, 1), "label": torch.randn(2, LABELS)}
    return {"inputs": {name: tensor.double() for name, tensor in made.items()}}


# The first, the last and some points between of 2x16x16 pixels and of 8 audio patches; the label whole.
POINTS = {
    "image": torch.tensor([0, 3, 17, 100, 255, 256, 400, 511]),
    "audio": torch.tensor([0, 2, 5, 7]),
    "label": None,
}

CASES = {
    case.name: case
    for case in [
        BuiltinCase("PerceiverForMaskedLM", TEXT, hf_perceiver.PerceiverIOForMaskedLM, text_inputs),
        BuiltinCase(
            "PerceiverForSequenceClassification", TEXT, hf_perceiver.PerceiverIOForSequenceClassification, text_inputs
        ),
        BuiltinCase(
            "PerceiverForImageClassificationLearned",
            {**SIZES, "image_size": 8},
            hf_perceiver.PerceiverIOForImageClassification,
            images(8, 8),
        ),
        BuiltinCase(
            "PerceiverForImageClassificationFourier",
            SIZES,
            hf_perceiver.PerceiverIOForImageClassification,
            images(9, 14),
        ),
        BuiltinCase(
            "PerceiverForImageClassificationConvProcessing",
            SIZES,
            hf_perceiver.PerceiverIOForImageClassification,
            images(33, 26),
        ),
        BuiltinCase(
            "PerceiverForOpticalFlow",
            {**SIZES, "train_size": [6, 10]},
            hf_perceiver.PerceiverIOForOpticalFlow,
            lambda: {"inputs": torch.randn(2, 2, 27, 6, 10, dtype=torch.float64)},
        ),
        BuiltinCase(
            "PerceiverForMultimodalAutoencoding",
            MULTIMODAL,
            hf_perceiver.PerceiverIOForMultimodalAutoencoding,
            multimodal_inputs,
            POINTS,
        ),
    ]
}
NAMES = list(CASES)
IMAGE_NAMES = [name for name in NAMES if "Image" in name]

# The sizes of the released checkpoints, from the files that transformers' converter writes.
RELEASED: dict[str, dict[str, Any]] = {
    "PerceiverForMaskedLM": {"qk_channels": 8 * 32, "v_channels": 1280},
    "PerceiverForImageClassificationLearned": {"image_size": 224},
    "PerceiverForImageClassificationFourier": {},
    "PerceiverForImageClassificationConvProcessing": {},
    "PerceiverForOpticalFlow": {
        "num_latents": 2048,
        "d_latents": 512,
        "num_self_attends_per_block": 24,
        "num_self_attention_heads": 16,
        "num_cross_attention_heads": 1,
    },
    "PerceiverForMultimodalAutoencoding": {
        "num_latents": 28 * 28,
        "d_latents": 512,
        "num_self_attends_per_block": 8,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 1,
        "num_labels": 700,
    },
}
for _name in IMAGE_NAMES:
    RELEASED[_name] |= {
        "num_latents": 512,
        "d_latents": 1024,
        "num_blocks": 8,
        "num_self_attends_per_block": 6,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 1,
        "num_labels": 1000,
    }


def released_config(name: str) -> PerceiverConfig:
    return PerceiverConfig(**RELEASED[name], architectures=[name])


def builtin_case(name: str) -> BuiltinCase:
    return CASES[name]


def enlarge(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter of a built-in model: attention far from uniform, norms and statistics not trivial.

    With the usual 0.02 two implementations agree to 1e-9 even when one of them is wrong.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "layernorm" in name or "batchnorm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("weight") and "embeddings" not in name:
                parameter.copy_(2 * noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def builtin_outputs(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Latents, which only the inner model gives, and logits of a built-in task model."""
    renamed = {"inputs" if name in ("input_ids", "pixel_values") else name: value for name, value in inputs.items()}
    with torch.no_grad():
        return model.perceiver(**renamed).last_hidden_state, model(**inputs).logits


def relative_l2(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


def assert_same_outputs(ours: Any, latents: Tensor, logits: Any, tolerance: float = 1e-12) -> None:
    """`ours` is an output of this package; its text logits have the input's length, the built-in's the maximum."""
    assert relative_l2(ours.last_hidden_state, latents) <= tolerance
    if isinstance(logits, dict):
        assert ours.logits.keys() == logits.keys()
        for name in logits:
            assert relative_l2(ours.logits[name], logits[name]) <= tolerance, name
    elif logits.ndim == 3:
        assert relative_l2(ours.logits, logits[:, : ours.logits.shape[1]]) <= tolerance
    else:
        assert relative_l2(ours.logits, logits) <= tolerance
