"""Attention through transformers' attention interface, and the two layers the model is made of.

Source: deepmind-research perceiver.py (Attention, MLP, SelfAttention, CrossAttention): pre-LayerNorm, GELU MLP, masked
rows that give zero, a query residual that adds the un-normalised query.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_perceiver_io import PerceiverIOConfig, check_heads
from .products import apply
from .tiled_attention import TILED, pays


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """(B, H, N, E), (B, H, M, E), (B, H, M, V) -> (B, N, H, V), (B, H, N, M)"""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32 if scores.dtype.itemsize < 4 else None).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Multi-head attention from queries (B, N, Q) to a context (B, M, C): -> (B, N, out_channels)

    qk_channels default to the queries' width, v_channels to qk_channels. Raises ValueError when a width cannot be
    divided by the heads.
    """

    def __init__(
        self,
        config: PerceiverIOConfig,
        *,
        query_channels: int,
        context_channels: int,
        num_heads: int,
        heads_name: str = "num_heads",
        qk_channels: int | None = None,
        v_channels: int | None = None,
        out_channels: int | None = None,
    ):
        super().__init__()
        qk_channels = qk_channels or query_channels
        v_channels = v_channels or qk_channels
        check_heads("query and key width", qk_channels, heads_name, num_heads)
        check_heads("value width", v_channels, heads_name, num_heads)
        self.config = config
        self.is_causal = False  # the interface's default is True
        self.qk_head_dim, self.v_head_dim = qk_channels // num_heads, v_channels // num_heads
        self.scaling = self.qk_head_dim**-0.5
        self.q_proj = nn.Linear(query_channels, qk_channels)
        self.k_proj = nn.Linear(context_channels, qk_channels)
        self.v_proj = nn.Linear(context_channels, v_channels)
        self.o_proj = nn.Linear(v_channels, out_channels or query_channels)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> keys (B, H, M, E), values (B, H, M, V)"""
        keys, values = apply(self.k_proj, context), apply(self.v_proj, context)
        return self._heads(keys, self.qk_head_dim), self._heads(values, self.v_head_dim)

    def _heads(self, x: Tensor, head_dim: int) -> Tensor:
        # Counted here: under tensor parallelism each rank holds some of the heads.
        return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(1 or B, N, Q), projected keys and values, masks (B, M) and (B, N), True = valid -> (B, N, out), weights

        A row whose query is masked, or that has no valid key, gives the output bias alone.
        """
        batch = max(query.shape[0], key.shape[0], *(m.shape[0] for m in (key_mask, query_mask) if m is not None))
        q = self._heads(apply(self.q_proj, query), self.qk_head_dim).expand(batch, -1, -1, -1)
        key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
        keep = None if query_mask is None else query_mask[..., None]  # (B, N, 1)
        mask = None
        if key_mask is not None:
            some_valid = key_mask.any(dim=1)  # (B,)
            # Backends disagree on a row without any key (0, mean or NaN): let it see every key, then decide here.
            mask = (key_mask | ~some_valid[:, None])[:, None, None, :].expand(-1, 1, q.shape[2], -1)
            if self.config.zero_masked_rows:
                keep = some_valid[:, None, None] if keep is None else keep & some_valid[:, None, None]
            else:
                q = q * some_valid[:, None, None, None]  # equal scores: the mean of the values
        out, weights = self._attend(q, key, value, mask, **kwargs)
        out = out.flatten(2)  # (B, N, H * V)
        if keep is not None:
            out = out.masked_fill(~keep, 0.0)
        return apply(self.o_proj, out), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Any]:
        if not q.shape[2]:  # no output point asked for; some backends refuse
            return v.new_zeros(q.shape[0], 0, *v.shape[1::2]), None
        name = self.config._attn_implementation
        if name is not None and name.startswith("flash") and (mask is not None or q.shape[-1] != v.shape[-1]):
            # transformers' flash path slices the key mask to the number of queries and crops wider values.
            name = "sdpa"
        if name == "flex_attention" and mask is not None:
            # As scores to add, it crashes torch's CPU kernel.
            keep = mask[:, 0, 0].contiguous()  # (B, M)
            blocks: Any = create_block_mask(
                lambda b, h, i, j: keep[b, j], len(keep), None, q.shape[2], k.shape[2], device=str(q.device)
            )
            mask = blocks
        dropout = self.config.attention_dropout if self.training else 0.0
        if name == "sdpa" and pays(q, k, v, dropout):
            name = TILED
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        return attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)


class MLP(nn.Module):
    """(B, N, C) -> (B, N, C), widened in between."""

    def __init__(self, config: PerceiverIOConfig, channels: int, widening_factor: int):
        super().__init__()
        self.up_proj = nn.Linear(channels, widening_factor * channels)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(widening_factor * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return apply(self.down_proj, self.act(apply(self.up_proj, x)))


class SelfAttentionLayer(GradientCheckpointingLayer):
    """Latents attend to each other: (B, N, D) -> (B, N, D)"""

    def __init__(self, config: PerceiverIOConfig):
        super().__init__()
        channels = config.d_latents
        self.attn_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.self_attn = Attention(
            config,
            query_channels=channels,
            context_channels=channels,
            num_heads=config.num_self_attention_heads,
            heads_name="num_self_attention_heads",
            qk_channels=config.qk_channels,
            v_channels=config.v_channels,
        )
        self.mlp_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = MLP(config, channels, config.self_attention_widening_factor)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, latents: Tensor, **kwargs: Any) -> Tensor:
        normed = self.attn_norm(latents)
        attended, _ = self.self_attn(normed, *self.self_attn.project(normed), **kwargs)
        latents = latents + self.dropout(attended)
        return latents + self.dropout(self.mlp(self.mlp_norm(latents)))


class CrossAttentionLayer(GradientCheckpointingLayer):
    """Queries (B, N, Q) read a context (B, M, C): -> (B, N, Q)"""

    def __init__(
        self,
        config: PerceiverIOConfig,
        *,
        query_channels: int,
        context_channels: int,
        num_heads: int,
        heads_name: str,
        qk_channels: int | None,
        v_channels: int | None,
        widening_factor: int,
        use_query_residual: bool,
        dropout: float,
    ):
        super().__init__()
        self.query_norm = nn.LayerNorm(query_channels, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(context_channels, eps=config.layer_norm_eps)
        self.cross_attn = Attention(
            config,
            query_channels=query_channels,
            context_channels=context_channels,
            num_heads=num_heads,
            heads_name=heads_name,
            qk_channels=qk_channels,
            v_channels=v_channels,
        )
        self.mlp_norm = nn.LayerNorm(query_channels, eps=config.layer_norm_eps)
        self.mlp = MLP(config, query_channels, widening_factor)
        self.dropout = nn.Dropout(dropout)
        self.use_query_residual = use_query_residual

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, C) -> keys and values, to be used by any number of calls"""
        # Raw inputs and their codes come in whatever dtype the user has; norms are never quantised.
        return self.cross_attn.project(self.context_norm(context.to(self.context_norm.weight.dtype)))

    def forward(
        self,
        query: Tensor | None,
        context: Tensor | None,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Either the context (B, M, C), or its projected keys and values; without a query, these are what is returned."""
        if query is None:
            return self.project(context)  # type: ignore[arg-type]
        # One by one, for re-entrant checkpointing sees no tensor inside a tuple.
        if keys is None or values is None:
            if context is None:
                raise ValueError("give the context or its projected keys and values")
            keys, values = self.project(context)
        query = query.to(self.query_norm.weight.dtype)
        attended, _ = self.cross_attn(self.query_norm(query), keys, values, key_mask, query_mask, **kwargs)
        attended = self.dropout(attended)
        x = query + attended if self.use_query_residual else attended
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
