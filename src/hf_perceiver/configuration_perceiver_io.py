"""PerceiverIOConfig: the whole architecture, as config.json holds it."""

import contextvars
import difflib
import functools
from dataclasses import field, fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .checkpoint_names import builtin_to_config, is_builtin_config
from .registry import check_spec

logger = logging.get_logger(__name__)

# True while a config is made from a file: a key that looks misspelt there is a warning, not an error.
_from_file = contextvars.ContextVar("_from_file", default=False)

SHARING = ("all", "after_first", "none")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

TENSOR_PARALLEL = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}


def _language_preprocessor() -> dict:
    position = {"kind": "trainable", "num_positions": 2048, "channels": 768}
    return {"kind": "text", "channels": 768, "position": position}


def _language_query() -> dict:
    position = {"kind": "trainable", "num_positions": 2048, "channels": 768}
    return {"kind": "position", "position": position, "use_input_mask": True}


def _value_errors(cls: type) -> type:
    # strict dataclasses raise an error type of their own; users expect ValueError from a constructor.
    def wrap(method: Any) -> Any:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except StrictDataclassError as error:
                cause = error.__cause__
                raise ValueError(str(cause) if isinstance(cause, ValueError) else str(error)) from error

        return call

    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, wrap(getattr(cls, name)))
    return cls


@_value_errors
@strict
class PerceiverIOConfig(PretrainedConfig):
    r"""
    A Perceiver IO: what reads (`preprocessor`), what thinks (latents), what is asked (`output_query`) and what is read
    out (`postprocessor`). Each side is a spec dict whose `kind` names a class and whose other entries are its keyword
    arguments. The default is the released language model (201,108,230 parameters).

    num_latents, d_latents (`int`): N and D of the latent array (B, N, D).
    num_blocks, num_self_attends_per_block (`int`): the encoder runs `num_blocks` blocks of self-attends.
    num_self_attention_heads, num_cross_attention_heads (`int`): heads in the encoder.
    qk_channels, v_channels (`int`, *optional*): widths of queries/keys and of values in the encoder; by default
        queries' or inputs' width (`cross_attention_shape_for_attention`), and that of the queries/keys.
    cross_attention_shape_for_attention (`"kv"` or `"q"`): whose width the encoder's cross-attention takes.
    use_query_residual (`bool`): the encoder's cross-attention adds its query.
    cross_attend_before_blocks (`list[int]`): the encoder reads the input array before each of these blocks, in this
        order; `[0]` is Perceiver IO, `[0, 1, ..., 7]` the original Perceiver. A block may be named several times.
    cross_attend_sharing, block_sharing (`"all"`, `"after_first"`, `"none"` or `list[int]`): which of them share
        weights; a list gives the index of its weights to each.
    decoder_num_heads, decoder_qk_channels, decoder_v_channels, decoder_widening_factor, decoder_use_query_residual:
        the same for the decoder's cross-attention; widths default to the latents'.
    zero_masked_rows (`bool`): attention over no valid element gives 0 (DeepMind) instead of the mean (transformers).
    hidden_act (`str`): DeepMind's GELU is the tanh form, `gelu_pytorch_tanh`.
    fast_attention (`str`): whether inference may read and write by exact cheaper forms, see fast_attention.py: "auto"
        where that is less work, on a CPU; "always" where it is possible; "never".
    dropout, attention_dropout (`float`): on every sub-layer's output; on attention probabilities.
    latents_init_scale (`float`): standard deviation of the latents' truncated normal.
    initializer (`"deepmind"`, `"normal"`, `"position_aligned"`): how fresh weights are drawn: as DeepMind's; as
        transformers', normals of `initializer_range`; or so that heads begin by looking at places near their own, for
        one modality with a fourier position of one to three axes. See `docs/initialization.md`.
    initializer_range (`float`): standard deviation of `initializer="normal"`.
    preprocessor, output_query, postprocessor (`dict`): the three specs; the last two may be None (features only).
    vocab_size, num_labels: owned by this level, parts refer to them.
    custom_modules (`list[str]`, *optional*): which modules registered the parts that are not this package's; filled in
        by the model, and by `save_with_code` with the files that it puts beside the weights.

    Raises ValueError that names the value and what is allowed.
    """

    model_type = "perceiver_io"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "last_hidden_state",
        "hidden_states",
        "attentions",
        "cross_attentions",
        "losses",
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_latents",
        "num_attention_heads": "num_self_attention_heads",
    }

    num_latents: int = 256
    d_latents: int = 1280
    num_blocks: int = 1
    num_self_attends_per_block: int = 26
    num_self_attention_heads: int = 8
    num_cross_attention_heads: int = 8
    qk_channels: int | None = 256
    v_channels: int | None = 1280
    cross_attention_shape_for_attention: Literal["kv", "q"] = "kv"
    self_attention_widening_factor: int = 1
    cross_attention_widening_factor: int = 1
    use_query_residual: bool = True
    cross_attend_before_blocks: list[int] | tuple[int, ...] = (0,)
    cross_attend_sharing: str | list[int] | tuple[int, ...] = "all"
    block_sharing: str | list[int] | tuple[int, ...] = "all"

    decoder_num_heads: int = 8
    decoder_qk_channels: int | None = 256
    decoder_v_channels: int | None = 768
    decoder_widening_factor: int = 1
    decoder_use_query_residual: bool = False

    zero_masked_rows: bool = True
    fast_attention: Literal["auto", "always", "never"] = "auto"
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float | int = 1e-5
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    latents_init_scale: float | int = 0.02
    initializer: Literal["deepmind", "normal", "position_aligned"] = "deepmind"
    initializer_range: float | int = 0.02

    preprocessor: dict[str, Any] = field(default_factory=_language_preprocessor)
    output_query: dict[str, Any] | None = field(default_factory=_language_query)
    postprocessor: dict[str, Any] | None = field(default_factory=lambda: {"kind": "tokens"})
    custom_modules: list[str] | None = None

    vocab_size: int = 262
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    mask_token_id: int | None = 3
    cls_token_id: int | None = 4
    sep_token_id: int | None = 5
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any):
        self._refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_hidden_layers":
            if value != self.num_hidden_layers:
                raise ValueError(
                    f"num_hidden_layers={value} cannot be set: it is num_blocks * num_self_attends_per_block, "
                    f"{self.num_hidden_layers} here; set those"
                )
            return
        # As config.json gives them back, so that a config equals its reloaded self; and a copy, not the caller's dict.
        super().__setattr__(name, _as_json(value) if name in _JSON_FIELDS else value)

    @classmethod
    def _refuse_misspelt(cls, unknown: dict[str, Any]) -> None:
        known = {f.name for f in fields(cls)} | set(cls.attribute_map)
        for name in unknown:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if not close or name in known or name in _LET_THROUGH:
                continue
            message = f"PerceiverIOConfig has no field {name!r}; did you mean {close[0]!r}?"
            if not _from_file.get():
                raise ValueError(message)
            logger.warning(message)

    @property
    def num_hidden_layers(self) -> int:
        return self.num_blocks * self.num_self_attends_per_block

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the latents' own layers, by heads and columns; the rest is small, and on all."""
        return {f"{layer}.{name}": style for layer in self._latent_layers() for name, style in TENSOR_PARALLEL.items()}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """Nothing: transformers 5.17 would add `embed_tokens`, which there is none of."""

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """What FSDP gathers one after the other; what is in none of these is a group of its own, with the model."""
        return dict.fromkeys(["encoder.cross_attends.*", *self._latent_layers()], "free_full_weight")

    def _latent_layers(self) -> list[str]:
        # transformers puts its star in place of the first of two numbers that follow each other.
        return [f"encoder.blocks.*.{layer}" for layer in range(self.num_self_attends_per_block)]

    def weight_indices(self, part: Literal["cross_attend", "block"]) -> list[int]:
        """For each cross-attend (or block) in running order, the index of the weights it uses."""
        count = len(self.cross_attend_before_blocks) if part == "cross_attend" else self.num_blocks
        sharing = self.cross_attend_sharing if part == "cross_attend" else self.block_sharing
        if not isinstance(sharing, str):
            return list(sharing)
        return {
            "all": [0] * count,
            "after_first": [min(i, 1) for i in range(count)],
            "none": list(range(count)),
        }[sharing]

    def validate_sizes(self) -> None:
        positive = (
            "num_latents",
            "d_latents",
            "num_blocks",
            "num_self_attention_heads",
            "num_cross_attention_heads",
            "self_attention_widening_factor",
            "cross_attention_widening_factor",
            "decoder_num_heads",
            "decoder_widening_factor",
            "vocab_size",
        )
        optional = ("qk_channels", "v_channels", "decoder_qk_channels", "decoder_v_channels")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if isinstance(getattr(self, name), bool):  # older huggingface_hub lets True pass for 1
                raise ValueError(f"{name} expected int, got bool ({getattr(self, name)})")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("latents_init_scale", "initializer_range", "layer_norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.num_self_attends_per_block < 0:
            raise ValueError(f"num_self_attends_per_block must be 0 or more, not {self.num_self_attends_per_block}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a probability in [0, 1), not {getattr(self, name)}")
        qk = self.qk_channels or self.d_latents
        for name, width in (("qk_channels", qk), ("v_channels", self.v_channels or qk)):
            check_heads(f"{name} of the self-attends", width, "num_self_attention_heads", self.num_self_attention_heads)
        qk = self.decoder_qk_channels or self.d_latents
        for name, width in (("decoder_qk_channels", qk), ("decoder_v_channels", self.decoder_v_channels or qk)):
            if self.output_query is not None:
                check_heads(name, width, "decoder_num_heads", self.decoder_num_heads)

    def validate_problem_type(self) -> None:
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type={self.problem_type!r} must be one of {', '.join(PROBLEM_TYPES)}, or None")

    def validate_hidden_act(self) -> None:
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} must be one of {', '.join(sorted(ACT2FN))}")

    # Validators run in the order of their names; this one builds on the sizes.
    def validate_weight_sharing(self) -> None:
        before = list(self.cross_attend_before_blocks)
        if not before or any(not 0 <= block < self.num_blocks for block in before) or before != sorted(before):
            raise ValueError(
                f"cross_attend_before_blocks={before} must name blocks 0 to {self.num_blocks - 1} in rising order, at "
                "least one (num_blocks says how many there are)"
            )
        if before[0] != 0:
            raise ValueError(f"cross_attend_before_blocks={before} must begin with 0: the latents read first")
        for name, count in (("cross_attend_sharing", len(before)), ("block_sharing", self.num_blocks)):
            sharing = getattr(self, name)
            if isinstance(sharing, str):
                if sharing not in SHARING:
                    raise ValueError(f"{name}={sharing!r} must be one of {', '.join(SHARING)} or a list of indices")
            elif len(sharing) != count or sorted(set(sharing)) != list(range(len(set(sharing)))):
                raise ValueError(f"{name}={sharing} must give {count} indices that use 0, 1, ... without gaps")

    def validate_specs(self) -> None:
        check_spec("preprocessor", self.preprocessor)
        for name in ("output_query", "postprocessor"):
            if getattr(self, name) is not None:
                check_spec(name.replace("_", " "), getattr(self, name))

    def validate_custom_modules(self) -> None:
        for name in self.custom_modules or []:
            if not all(word.isidentifier() for word in name.split(".")):
                raise ValueError(f"custom_modules names Python modules; {name!r} cannot be one")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # Translated here as well as in from_dict: from_pretrained compares the model type in between.
        if cls.model_type == "perceiver_io" and is_builtin_config(config_dict):
            config_dict = builtin_to_config(config_dict, kwargs.pop("numerics", None), kwargs.pop("architecture", None))
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a built-in Perceiver's dict is translated, `numerics="builtin"` (default) or "deepmind".

        architecture: the built-in class that wrote it, where the dict does not tell.
        """
        if is_builtin_config(config_dict):
            config_dict = builtin_to_config(config_dict, kwargs.pop("numerics", None), kwargs.pop("architecture", None))
        elif "numerics" in kwargs:
            raise ValueError(
                f"numerics={kwargs['numerics']!r} chooses how a checkpoint of transformers' own Perceiver is read; this "
                "one is already a perceiver_io checkpoint, whose numerics are the fields of its config"
            )
        # These come from the caller; what the file holds is looked at below.
        cls._refuse_misspelt(kwargs)
        token = _from_file.set(True)
        try:
            made = super().from_dict(config_dict, **kwargs)
        finally:
            _from_file.reset(token)
        (made[0] if isinstance(made, tuple) else made).validate()  # once more: the caller's changes were set one by one
        return made


# Close to a field's name by accident, and put there by transformers.
_LET_THROUGH = frozenset(
    {"num_labels", "output_attentions", "attn_implementation", "tie_encoder_decoder", "unk_token_id"}
)
# Fields that JSON gives back as something else.
_JSON_FIELDS = frozenset(
    {
        "preprocessor",
        "output_query",
        "postprocessor",
        "cross_attend_before_blocks",
        "cross_attend_sharing",
        "block_sharing",
    }
)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def check_heads(name: str, channels: int, heads_name: str, num_heads: int) -> None:
    """Raise ValueError if `channels` cannot be split into `num_heads` heads; the message gives the nearest widths."""
    if channels % num_heads:
        below = channels // num_heads * num_heads
        nearest = f"{below} or {below + num_heads}" if below else f"{num_heads}"
        raise ValueError(
            f"{name}={channels} cannot be divided by {heads_name}={num_heads}; nearest widths: {nearest}, or choose "
            "another number of heads"
        )
