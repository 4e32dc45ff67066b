"""What the parity tests share: DeepMind's inputs at our boundary, and every intermediate of a forward pass."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversion.deepmind_config import config_from_deepmind
from conversion.haiku_names import convert_params
from hf_perceiver import PerceiverIOModel
from hf_perceiver.arrays import InputArray, QueryArray
from hf_perceiver.position_encoding import TableCode

PARITY = Path(__file__).parent.parent / "reference" / "parity"

# Stored model -> the wiring it was made with.
MODELS = {
    "masked_lm": "masked-lm",
    "imagenet_learned": "imagenet-learned",
    "imagenet_fourier": "imagenet-fourier",
    "imagenet_conv": "imagenet-conv",
    "optical_flow": "optical-flow",
    "multimodal": "multimodal",
    "extra_concat_query": "dense",
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, L2 norms in float64; shapes must be equal."""
    assert ours.shape == theirs.shape, (tuple(ours.shape), tuple(theirs.shape))
    ours, theirs = ours.detach().double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def build(wiring: str, config: Mapping[str, Any], params: Any, state: Any = None, **known: Any) -> PerceiverIOModel:
    """DeepMind's arguments and parameters -> our model, every name accounted for."""
    ours = config_from_deepmind(wiring, config, params=params, **known)
    model = PerceiverIOModel(ours).eval()
    model.load_state_dict(convert_params(params, state, ours), strict=True)
    return model


def at_the_boundary(wiring: str, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """DeepMind's input arrays, channels last -> keyword arguments of our model, channels first."""
    if wiring == "masked-lm":
        return {"input_ids": arrays["inputs"].long(), "attention_mask": arrays["input_mask"]}
    mask = {"attention_mask": arrays["input_mask"]} if "input_mask" in arrays else {}
    images = arrays["images"].movedim(-1, -3) if "images" in arrays else None  # (B, ..., C, H, W)
    if wiring == "optical-flow":
        return {"pixel_values": flow_patches(images), **mask}
    if wiring != "multimodal":
        return {"pixel_values": images, **mask}
    inputs = {"image": images, "audio": arrays.get("audio"), "label": arrays.get("label")}
    points = {name: arrays.get(f"subsample_{name}") for name, given in inputs.items() if given is not None}
    return {"inputs": {name: given for name, given in inputs.items() if given is not None}, "output_points": points}


def flow_patches(frames: Tensor) -> Tensor:
    """(B, 2, 3, H, W) -> (B, 2, 27, H, W): the 3x3 neighbourhood of each pixel, zeros outside, in (h, w, c) order."""
    b, t, c, h, w = frames.shape
    patches = F.unfold(frames.flatten(0, 1), kernel_size=3, padding=1)  # (B*2, c*3*3, H*W)
    return patches.reshape(b, t, c, 9, h, w).transpose(2, 3).reshape(b, t, 9 * c, h, w)


class Stored(nn.Module):
    """In place of a preprocessor: its parts, with a stored encoder input (B, M, C) as their contents."""

    def __init__(self, preprocessor: nn.Module, encoder_inputs: Tensor):
        super().__init__()
        self.preprocessor, self.encoder_inputs = preprocessor, encoder_inputs

    def forward(self, *args: Any, **kwargs: Any) -> InputArray:
        parts, start = {}, 0
        for name, part in InputArray.of(self.preprocessor(*args, **kwargs)):
            rows = self.encoder_inputs[:, start : start + part.length]
            start += part.length
            if part.replaced is not None and part.replaced.all():
                parts[name] = part  # nothing but its mask token
                continue
            # Features and the rest stay apart: some output queries are made of the features alone.
            features, width, padding = part.features, part.features.shape[-1], part.constant
            if part.combine == "add":
                rest = rows[..., :width] - features
            else:
                features, rest, padding = rows[..., :width], rows[..., width:], None
            changes = {"features": features, "position": TableCode(rest), "constant": padding}
            parts[name] = replace(part, token=None, replaced=None, **changes)
        assert start == self.encoder_inputs.shape[1]
        return InputArray(parts)


Keep = Callable[[str, Tensor], Any]


@torch.no_grad()
def run(
    model: PerceiverIOModel, *, encoder_inputs: Tensor | None = None, keep: Keep = lambda name, x: x, **inputs: Any
) -> dict[str, Any]:
    """A forward pass and its intermediates under the names of the stored references, each as `keep` leaves it.

    encoder_inputs replace what the preprocessor makes.
    """
    got: dict[str, Any] = {}
    real = model.preprocessor
    if encoder_inputs is not None:
        model.preprocessor = Stored(real, encoder_inputs)
    try:
        with recording(model, got, keep):
            outputs = model(**inputs)
    finally:
        model.preprocessor = real
    got["z"] = keep("z", outputs.last_hidden_state)
    for name in ("decoder_cross_out", "decoder_out"):
        if name in got:
            got[name] = keep(name, torch.cat(got[name], dim=1))
    logits = outputs.logits if isinstance(outputs.logits, dict) else {"": outputs.logits}
    return {**got, **{f"outputs_{name}" if name else "outputs": value for name, value in logits.items()}}


@contextlib.contextmanager
def recording(model: PerceiverIOModel, got: dict[str, Any], keep: Keep) -> Iterator[None]:
    """Fill `got` while the model runs."""
    handles = []

    def on(module: nn.Module | None, take: Callable[[Any, Any], None]) -> None:
        if module is not None:
            handles.append(module.register_forward_hook(lambda module, args, output: take(args, output)))

    def put(name: str, value: Tensor) -> None:
        got[name] = keep(name, value)

    def stem(args: Any, output: Tensor) -> None:
        put("convnet_out", output)
        put("image_without_pos", output.flatten(1, -2))

    def preprocessed(args: Any, output: Any) -> None:
        for name, part in InputArray.of(output):
            put(f"preprocessed_{name or 'image'}", replace(part, constant=None, replaced=None).dense())

    def read(args: Any, output: Any) -> None:
        put("encoder_inputs", args[0].dense().expand(args[0].batch_size, -1, -1))

    def latents(args: Any, output: Tensor) -> None:
        put("latents_init", args[0].expand(output.shape[0], -1, -1))
        put("z_after_cross", output)

    def layer(args: Any, output: Tensor) -> None:
        put(f"z_after_self_{sum(name.startswith('z_after_self') for name in got):03d}", output)

    def query(args: Any, output: Any) -> None:
        array, batch = QueryArray.of(output), args[0].batch_size
        put("decoder_query", array.dense().expand(batch, -1, -1))
        for name, part in array:
            # Without the padding.
            put(f"decoder_query_{name}", replace(part, constant=None).dense().expand(batch, -1, -1))

    def piece(name: str) -> Callable[[Any, Any], None]:
        return lambda args, output: got.setdefault(name, []).append(output)

    real = model.preprocessor.preprocessor if isinstance(model.preprocessor, Stored) else model.preprocessor
    image = real.modalities["image"] if hasattr(real, "modalities") else real
    on(getattr(image, "stem", None), stem)
    on(real, preprocessed)
    on(model.encoder, read)
    on(model.encoder.cross_attends[0], latents)
    for self_attend in model.encoder.blocks[0]:
        on(self_attend, layer)
    on(model.output_query, query)
    on(model.decoder, piece("decoder_cross_out"))
    on(getattr(model.postprocessor, "shared", None), piece("decoder_out"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
