"""Attention tile by tile with an online softmax: memory that grows neither with queries nor with keys.

Registered with transformers as `attn_implementation="tiled"`. Any head widths, those of keys and values may differ;
masks; inference only, for a gradient would need every tile again: with gradients or dropout sdpa takes over. Sums are
in float32. On the CPU in half precision it is also the faster one for large arrays, see docs/performance.md, and
"sdpa" hands such arrays over to it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

TILED = "tiled"
# Scores of one tile stay in the cache of a core; fewer queries or more keys at once are slower.
QUERY_TILE, KEY_TILE = 512, 2048
# Below so many scores per head, what the loop costs is more than what it saves.
FEWEST_SCORES = 1 << 18
# From this width of heads on, torch's own kernel is behind in half precision.
WIDE_HEADS = 128


def tiled_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, H, N, E), (B, H, M, E), (B, H, M, V) -> (B, N, H, V), no weights

    attention_mask: None, or booleans (B, 1 or H, N, M), True = attend to it. A row without any key gives the mean of
    the values, as other backends do.
    """
    if needs_gradients(query, key, value) or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(f"tiled attention takes a mask of booleans, True = attend, not of {attention_mask.dtype}")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    out = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    for start in range(0, query.shape[2], QUERY_TILE):
        rows = slice(start, start + QUERY_TILE)
        mask = None if attention_mask is None else attention_mask[:, :, rows]
        out[:, rows] = _attend(query[:, :, rows], key, value, mask).transpose(1, 2)
    return out, None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Some queries (B, H, n, E), already scaled, to all keys -> (B, H, n, V)"""
    exact = torch.promote_types(query.dtype, torch.float32)
    lowest = torch.finfo(exact).min
    highest = query.new_full((*query.shape[:-1], 1), lowest, dtype=exact)
    total = torch.zeros_like(highest)
    summed = query.new_zeros((*query.shape[:-1], value.shape[-1]), dtype=exact)
    for start in range(0, key.shape[2], KEY_TILE):
        keys = slice(start, start + KEY_TILE)
        scores = (query @ key[:, :, keys].transpose(-1, -2)).to(exact)
        if mask is not None:
            scores = scores.masked_fill_(~mask[..., keys], lowest)
        peak = torch.maximum(scores.amax(dim=-1, keepdim=True), highest)
        weights = scores.sub_(peak).exp_()
        faded = (highest - peak).exp_()
        total = total * faded + weights.sum(dim=-1, keepdim=True)
        summed = summed * faded + weights.to(value.dtype) @ value[:, :, keys]
        highest = peak
    return (summed / total).to(value.dtype)


def needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def pays(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether "sdpa" had better be tiled: on the CPU, where torch has no fast kernel for the widths that it is given.

    That is where keys and values differ in width, and for wide heads in half precision. Never with gradients or dropout.
    """
    wide = query.dtype.itemsize < 4 and query.shape[-1] >= WIDE_HEADS
    return (
        query.device.type == "cpu"
        and (wide or query.shape[-1] != value.shape[-1])
        and query.shape[2] * key.shape[2] >= FEWEST_SCORES
        and not dropout
        and not needs_gradients(query, key, value)
        and not torch.compiler.is_compiling()
    )


AttentionInterface.register(TILED, tiled_attention_forward)
