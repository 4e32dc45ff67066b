"""Attention head by head and tile by tile, with an online softmax: memory that grows neither with queries nor with keys.

Registered with transformers as `attn_implementation="tiled"`. Any head widths, those of keys and values may differ;
masks; inference only, for a gradient would need every tile again: with gradients or dropout sdpa takes over. Sums are
in float32. On the CPU it is also the faster one in bfloat16, and in float32 where keys and values differ in width, see
docs/performance.md; "sdpa" hands such arrays over to it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

TILED = "tiled"
# Scores of one tile stay in the cache of a core; fewer queries or more keys at once are slower.
QUERY_TILE, KEY_TILE = 512, 2048
# With fewer scores in a tile for each thread, what the loop costs is more than what it saves.
FEWEST_SCORES = 1 << 15
LOG2_E = 1 / math.log(2)


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
    dtype = value.dtype
    if dtype == torch.float16 and value.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()  # float16 matrix products take 20 times as long
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    batch, heads, asked = query.shape[:3]
    out = value.new_empty(batch, asked, heads, value.shape[-1], dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            mask = None if attention_mask is None else attention_mask[b, h if len(attention_mask[b]) > 1 else 0]
            for start in range(0, asked, QUERY_TILE):
                rows = slice(start, start + QUERY_TILE)
                out[b, rows, h] = _attend(
                    query[b, h, rows], key[b, h], value[b, h], None if mask is None else mask[rows]
                )
    return out, None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Some queries (n, E), already scaled, to all keys (M, E) -> (n, V)"""
    if len(key) <= KEY_TILE:
        scores = query @ key.T
        if mask is not None:
            scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1) @ value
    exact = torch.promote_types(query.dtype, torch.float32)
    lowest = torch.finfo(exact).min
    highest = query.new_full((len(query), 1), lowest, dtype=exact)
    total = torch.zeros_like(highest)
    summed = query.new_zeros(len(query), value.shape[-1], dtype=exact)
    for start in range(0, len(key), KEY_TILE):
        keys = slice(start, start + KEY_TILE)
        # To base 2: torch's exp2 takes a third of the time of its exp.
        scores = (query @ key[keys].T).to(exact).mul_(LOG2_E)
        if mask is not None:
            scores = scores.masked_fill_(~mask[:, keys], lowest)
        peak = torch.maximum(scores.amax(dim=-1, keepdim=True), highest)
        weights = scores.sub_(peak).exp2_()
        faded = (highest - peak).exp2_()
        total = total * faded + weights.sum(dim=-1, keepdim=True)
        summed = summed * faded + weights.to(value.dtype) @ value[keys]
        highest = peak
    return (summed / total).to(value.dtype)


def needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def pays(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether "sdpa" had better be tiled: on the CPU, in bfloat16 or where torch's kernel does not do unequal widths.

    Never with gradients or dropout.
    """
    unequal = query.shape[-1] != value.shape[-1] and query.dtype != torch.float16
    scores = min(query.shape[2], QUERY_TILE) * min(key.shape[2], KEY_TILE)
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and (unequal or query.dtype == torch.bfloat16)
        and scores >= FEWEST_SCORES * torch.get_num_threads()
        and not dropout
        and not needs_gradients(query, key, value)
    )


AttentionInterface.register(TILED, tiled_attention_forward)
