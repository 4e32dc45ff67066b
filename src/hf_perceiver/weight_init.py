"""How fresh weights are drawn: as DeepMind's ("deepmind"), as transformers' ("normal"), or aligned to positions.

"position_aligned" is "deepmind" plus a start where attention is local: latent n holds the Fourier code of the n-th of N
evenly spread positions in its first channels, and in every cross-attention the query and the key projection begin with
the same random matrix on the channels that carry the code. A random Perceiver has to discover where things are before
it can learn what they are; this one starts out knowing. `docs/initialization.md` has the measurements.

Tensors that came from a checkpoint are left alone (transformers.initialization).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention import MLP, Attention, CrossAttentionLayer
from .configuration_perceiver_io import PerceiverIOConfig
from .output_queries import InputQuery
from .position_encoding import FourierPositionEncoding, truncated_normal_

# Standard deviation of a normal cut at two standard deviations: Haiku's VarianceScaling divides by it.
TRUNCATED_STD = 0.87962566103423978

# Chosen on small models of masked bytes and of flow: strength of the shared matrix, what the highest band keeps of it, and the
# other channels' share of their usual size.
ALIGNED_GAIN, HIGH_BAND_GAIN, OTHER_GAIN = 3.0, 0.3, 0.3


def init_module(module: nn.Module, config: PerceiverIOConfig) -> None:
    """Draw the parameters that `module` itself holds."""
    if config.initializer == "normal":
        if hasattr(module, "reset_own_parameters"):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=config.initializer_range)
        return
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        truncated_normal_(module.weight, module.weight[0].numel() ** -0.5)
    elif isinstance(module, nn.Embedding):
        truncated_normal_(module.weight, 1.0)
    elif isinstance(module, (Attention, MLP)):
        for linear in module.children():
            if isinstance(linear, nn.Linear):
                truncated_normal_(linear.weight, linear.in_features**-0.5 / TRUNCATED_STD)
    if hasattr(module, "reset_own_parameters"):
        module.reset_own_parameters()  # type: ignore[operator]


def align_positions(model: Any) -> None:
    """Start attention local in a PerceiverIOModel; ValueError when it has no Fourier code to align to."""
    code = _fourier(model.preprocessor)
    if code is None or code.channels > model.config.d_latents:
        width = "none" if code is None else str(code.channels)
        raise ValueError(
            "initializer='position_aligned' needs one modality whose position is of kind 'fourier', at most as wide as "
            f"the latents ({model.config.d_latents}); its width here: {width}. Use initializer='deepmind'"
        )
    latents = model.encoder.latents
    if not getattr(latents.weight, "_is_hf_initialized", False):
        spread = spread_positions(len(latents.weight), code.num_axes)
        latents.weight[:, : code.channels] = code.encode_at(spread, dtype=latents.weight.dtype).dense(0, len(spread))[0]
    start = model.preprocessor.channels - code.channels
    for layer in model.encoder.cross_attends:
        _share(layer, code, query_start=0, key_start=start)
    # An input that asks brings its own code.
    query = code if isinstance(model.output_query, InputQuery) else getattr(model.output_query, "position", None)
    if isinstance(query, FourierPositionEncoding) and _same_code(query, code):
        _share(model.decoder.cross_attend, code, query_start=model.output_query.channels - code.channels, key_start=0)


def spread_positions(count: int, num_axes: int) -> Tensor:
    """(count, num_axes) positions spread evenly over [-1, 1]^d: a grid where `count` is one, else a Kronecker sequence"""
    side = round(count ** (1 / num_axes))
    if side**num_axes == count:
        axis = (torch.arange(side) + 0.5) / side * 2 - 1
        return torch.cartesian_prod(*[axis] * num_axes).reshape(count, num_axes)
    ratio = 1.5
    for _ in range(40):  # the root of x ** (d + 1) = x + 1, the golden ratio's generalisation
        ratio = (1 + ratio) ** (1 / (num_axes + 1))
    steps = torch.tensor([ratio ** -(axis + 1) for axis in range(num_axes)], dtype=torch.float64)
    return (((0.5 + torch.arange(count)[:, None] * steps) % 1) * 2 - 1).float()


def _share(layer: CrossAttentionLayer, code: FourierPositionEncoding, query_start: int, key_start: int) -> None:
    q, k = layer.cross_attn.q_proj.weight, layer.cross_attn.k_proj.weight
    if getattr(q, "_is_hf_initialized", False) or getattr(k, "_is_hf_initialized", False):
        return
    q.mul_(OTHER_GAIN)
    k.mul_(OTHER_GAIN)
    bands = code.code_channels().to(q.device, q.dtype)
    damping = 1 - (1 - HIGH_BAND_GAIN) * bands / code.num_bands
    shared = torch.empty(q.shape[0], code.channels, device=q.device, dtype=q.dtype)
    torch.nn.init.normal_(shared, std=ALIGNED_GAIN / math.sqrt(q.shape[1]))
    q[:, query_start : query_start + code.channels] = shared * damping
    k[:, key_start : key_start + code.channels] = shared * damping


def _same_code(a: FourierPositionEncoding, b: FourierPositionEncoding) -> bool:
    names = ("num_bands", "max_resolution", "num_axes", "sine_only", "concat_pos")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _fourier(preprocessor: Any) -> FourierPositionEncoding | None:
    position = getattr(preprocessor, "position", None)
    concatenated = getattr(preprocessor, "combine", "concat") == "concat"
    return position if isinstance(position, FourierPositionEncoding) and concatenated else None
