"""What the benchmark runs: released architectures on one example each, ours and transformers' built-in.

Weights are random, the same on both sides, and rounded to bfloat16 in every dtype.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ..arrays import InputArray, QueryArray
from ..builtin import builtin_config, export_builtin
from ..checkpoint_names import apply_numerics
from ..configuration_perceiver_io import PerceiverIOConfig
from ..heads_multimodal import PerceiverIOForMultimodalAutoencoding
from ..heads_text import PerceiverIOForMaskedLM
from ..heads_vision import PerceiverIOForImageClassification, PerceiverIOForOpticalFlow
from ..recipes import (
    imagenet_conv,
    imagenet_fourier,
    imagenet_learned,
    language_bytes,
    multimodal_autoencoder,
    optical_flow,
)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A released architecture and one example of the size it was released for.

    builtin_passes: in how many passes the built-in answers all its queries, each of which reads the inputs again.
    output_points: the places that are asked about, where not all are; the built-in always answers all.
    builtin_length: what a text is padded to for the built-in, with a mask.
    training_points: how many points of each output a training step learns from, where not all.
    """

    recipe: Callable[[], PerceiverIOConfig]
    head: Callable[[PerceiverIOConfig], Any]
    make_inputs: Callable[[], Inputs]
    builtin_passes: int = 1
    output_points: range | None = None
    builtin_length: int | None = None
    training_points: tuple[tuple[str, int], ...] = ()

    def ours(self) -> Any:
        """Our model, initialised as always, with the numerics that the built-in has."""
        return self.head(apply_numerics(self.recipe(), "builtin")).eval()

    def builtin(self) -> Any:
        """The built-in of these sizes, with weights of its own."""
        architecture, config = builtin_config(apply_numerics(self.recipe(), "builtin"))
        return getattr(transformers, architecture)(config).eval()

    def question(self) -> Inputs:
        """What our model is given beside the inputs."""
        return {} if self.output_points is None else {"output_points": torch.tensor(list(self.output_points))}

    def builtin_inputs(self, inputs: Inputs) -> Inputs:
        """What the built-in is given for these inputs of ours."""
        if self.builtin_length is None:
            return inputs
        # Token 0 is the padding.
        return {name: F.pad(ids, (0, self.builtin_length - ids.shape[1])) for name, ids in inputs.items()}


def make_text(length: int, vocab_size: int) -> Inputs:
    """Token ids (1, length), as a tokenizer gives them with their mask."""
    return {"inputs": torch.randint(0, vocab_size, (1, length)), "attention_mask": torch.ones(1, length).long()}


def make_grid(*shape: int) -> Inputs:
    """Normal numbers (1, *shape), rounded to bfloat16."""
    return {"inputs": torch.randn(1, *shape).bfloat16().float()}


def make_clip(frames: int, side: int, samples: int, classes: int) -> Inputs:
    """Video, sound, and the empty label that the documentation gives."""
    image, audio = make_grid(frames, 3, side, side)["inputs"], make_grid(samples, 1)["inputs"]
    return {"inputs": {"image": image, "audio": audio, "label": torch.zeros(1, classes)}}


# With a word of 9 letters masked, as in DeepMind's notebook.
SENTENCE = Workload(language_bytes, PerceiverIOForMaskedLM, partial(make_text, 60, 262), output_points=range(50, 59))

WORKLOADS = {
    "masked-lm": Workload(language_bytes, PerceiverIOForMaskedLM, partial(make_text, 2048, 262)),
    "masked-lm-60": SENTENCE,
    # As the documentation of the built-in calls it.
    "masked-lm-60-padded": replace(SENTENCE, builtin_length=2048),
    "imagenet-learned": Workload(imagenet_learned, PerceiverIOForImageClassification, partial(make_grid, 3, 224, 224)),
    "imagenet-fourier": Workload(imagenet_fourier, PerceiverIOForImageClassification, partial(make_grid, 3, 224, 224)),
    "imagenet-conv": Workload(imagenet_conv, PerceiverIOForImageClassification, partial(make_grid, 3, 224, 224)),
    "optical-flow": Workload(optical_flow, PerceiverIOForOpticalFlow, partial(make_grid, 2, 27, 368, 496)),
    "multimodal": Workload(
        multimodal_autoencoder,
        PerceiverIOForMultimodalAutoencoding,
        partial(make_clip, 16, 224, 30_720, 700),
        # As its documentation does; it fails on all queries at once.
        builtin_passes=128,
        # As the paper trains it.
        training_points=(("image", 512), ("audio", 512)),
    ),
}


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Random weights with which every part shapes the output, rounded to bfloat16, so that dtypes share them.

    Those a model starts with are so small, or zero, that two models agree even when one of them is wrong.
    """
    for name, parameter in model.named_parameters():
        module, noise = model.get_submodule(name.rpartition(".")[0]), torch.randn(parameter.shape)
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif name.endswith("bias"):
            noise = 0.1 * noise
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            noise = noise / math.sqrt(parameter[0].numel())
        parameter.copy_(noise.bfloat16())


def zeros(make: Callable[[], Any], device: str, dtype: str) -> Any:
    """A model all of whose weights are 0, made without a trace of how weights are drawn in the memory it leaves."""
    model = on_meta(make).to(getattr(torch, dtype))
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    return model


def on_meta(make: Callable[[], Any]) -> Any:
    """A model without numbers, for counting."""
    with torch.device("meta"):
        return make()


def builtin_of(model: Any) -> Any:
    """transformers' own Perceiver with the weights of our `model`."""
    architecture, _ = builtin_config(model.config)
    with tempfile.TemporaryDirectory() as folder:
        export_builtin(model, folder)
        return getattr(transformers, architecture).from_pretrained(folder).eval()


def cast(inputs: Any, device: str, dtype: torch.dtype) -> Any:
    """The tensors of nested dicts on a device, floating point ones in a dtype; what is no tensor stays."""
    if isinstance(inputs, dict):
        return {name: cast(value, device, dtype) for name, value in inputs.items()}
    if not isinstance(inputs, Tensor):
        return inputs
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def choose(model: Any, backend: str, fast_attention: str) -> None:
    """Have our model run by these from now on."""
    model.set_attn_implementation(backend)
    model.config.fast_attention = fast_attention


@torch.inference_mode()
def run_ours(model: Any, inputs: Inputs) -> Any:
    """Our logits, whole, or those that are asked for."""
    return model(**inputs).logits


@torch.inference_mode()
def run_builtin(model: Any, inputs: Inputs, index: int, passes: int) -> Any:
    """The built-in's logits of one pass."""
    if passes == 1:
        return model(**inputs).logits
    return model(**inputs, subsampled_output_points=chunk_points(model.config, index, passes)).logits


def output_counts(config: Any) -> dict[str, int]:
    """How many places the built-in's multimodal config has for each output that may be asked for in part."""
    patches = config.num_frames * config.audio_samples_per_frame // config.samples_per_patch
    return {"audio": patches, "image": math.prod(config.output_shape)}


def chunk_points(config: Any, index: int, passes: int) -> dict[str, Tensor | None]:
    """What the built-in is asked in pass `index`: a stretch of the pixels and of the audio patches, and the label."""
    counts = output_counts(config)
    stretches = {name: torch.arange(n * index // passes, n * (index + 1) // passes) for name, n in counts.items()}
    return {**stretches, "label": None}


def part_of(logits: Any, config: Any, index: int, passes: int) -> Any:
    """What the built-in answers in one pass, out of our logits."""
    if passes == 1:
        return logits
    points = chunk_points(config, index, passes)
    audio = logits["audio"].unflatten(1, (-1, config.samples_per_patch))[:, points["audio"]].flatten(1)
    return {"audio": audio, "image": logits["image"].flatten(1, -2)[:, points["image"]], "label": logits["label"]}


def largest_error(got: Any, want: Any) -> float:
    """The largest difference as a part of the largest wanted value; of several outputs, the worst. NaN is the worst."""
    if isinstance(want, dict):
        return worst_of(largest_error(got[name], want[name]) for name in want)
    if got.shape != want.shape:
        return math.nan
    want = want.float()
    return float((got.float() - want).abs().max() / want.abs().max())


def worst_of(errors: Any) -> float:
    """The largest of some errors; NaN if one of them is."""
    errors = list(errors)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@torch.inference_mode()
def count_sizes(model: Any, inputs: Inputs) -> dict[str, Any]:
    """Parameters, and how many elements are read, thought with and asked."""
    inner = model.perceiver
    array: Any = InputArray.of(inner.preprocessor(inputs["inputs"], inputs.get("attention_mask")))
    return {
        "parameters": model.num_parameters(),
        "batch": array.batch_size,
        "inputs": array.length,
        "latents": [model.config.num_latents, model.config.d_latents],
        "outputs": QueryArray.of(inner.output_query(array, inputs.get("output_points"))).length,
    }
