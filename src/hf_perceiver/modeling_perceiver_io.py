"""Perceiver IO: read any input array into latents, think there, answer any output query.

`PerceiverIOModel.forward` is five lines: preprocessor, encoder, output query, decoder, postprocessor.
Papers: Perceiver IO (arXiv 2107.14795), Perceiver (arXiv 2103.03206). Numbers: deepmind-research perceiver/perceiver.py.
"""

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .arrays import ArrayPart, InputArray, PerceiverArray, QueryArray
from .attention import Attention, CrossAttentionLayer, SelfAttentionLayer
from .checkpoint_weights import final_layer_renamings
from .configuration_perceiver_io import PerceiverIOConfig
from .custom_modules import import_custom_modules, note_custom_modules
from .fast_reading import read
from .fast_writing import FastWriter
from .losses import classification_loss
from .output_queries import OutputQuery
from .position_encoding import truncated_normal_
from .postprocessors import Postprocessor  # noqa: F401 - fills the table
from .preprocessors import Preprocessor, element_mask
from .products import is_watched
from .registry import OUTPUT_QUERIES, POSTPROCESSORS, PREPROCESSORS
from .weight_init import align_positions, init_module

logger = logging.get_logger(__name__)

# Size of the widest tensor of a chunk of queries, in numbers, where nobody says how many to decode at a time. Measured
# on a CPU: 1,024 queries of the video model and 2,048 of flow cost 11 and 9 % less than 16,384. Accelerators get more,
# unmeasured.
CHUNK_NUMBERS = {"cpu": 2**20, "other": 2**24}


@dataclass
class PerceiverIOOutput(ModelOutput):
    """
    last_hidden_state: latents (B, N, D); pooler_output: their mean (B, D); logits: the postprocessor's
    output, a tensor or a dict by modality; hidden_states: latents before each self-attend and after the last;
    attentions, cross_attentions: (B, heads, N, M) of every call, with eager attention.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    logits: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class PerceiverIOHeadOutput(ModelOutput):
    """As PerceiverIOOutput, with the loss and the logits first, as Trainer and the pipelines want them."""

    loss: Tensor | None = None
    logits: Any = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class Encoding:
    """What an input became: latents (B, N, D), and the input array, which some output queries are made of."""

    latents: Tensor
    input_array: InputArray


class Latents(nn.Module):
    """The trained start of the latent array: -> (1, N, D)"""

    def __init__(self, config: PerceiverIOConfig):
        super().__init__()
        self.init_scale = config.latents_init_scale
        self.weight = nn.Parameter(torch.empty(config.num_latents, config.d_latents))

    def reset_own_parameters(self) -> None:
        truncated_normal_(self.weight, self.init_scale)

    def forward(self) -> Tensor:
        return self.weight[None]


class Encoder(nn.Module):
    """Latents read the input array, then attend to each other: (B, M, C) -> (B, N, D)

    Weights that are used more than once are held once; `plan` says what runs after what.
    """

    def __init__(self, config: PerceiverIOConfig, input_channels: int):
        super().__init__()
        self.latents = Latents(config)
        reads, blocks = config.weight_indices("cross_attend"), config.weight_indices("block")
        of_kv = config.cross_attention_shape_for_attention == "kv"
        self.cross_attends = nn.ModuleList(
            CrossAttentionLayer(
                config,
                query_channels=config.d_latents,
                context_channels=input_channels,
                num_heads=config.num_cross_attention_heads,
                heads_name="num_cross_attention_heads",
                qk_channels=config.qk_channels or (input_channels if of_kv else config.d_latents),
                v_channels=config.v_channels,
                widening_factor=config.cross_attention_widening_factor,
                use_query_residual=config.use_query_residual,
                dropout=config.dropout,
            )
            for _ in range(max(reads) + 1)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(SelfAttentionLayer(config) for _ in range(config.num_self_attends_per_block))
            for _ in range(max(blocks) + 1)
        )
        self.plan: list[tuple[str, int]] = []
        for position, block in enumerate(blocks):
            before = [r for r, b in zip(reads, config.cross_attend_before_blocks, strict=True) if b == position]
            self.plan += [("read", read) for read in before] + [("block", block)]

    def forward(self, input_array: InputArray, latents: Tensor | None = None, **kwargs: Any) -> Tensor:
        latents = self.latents() if latents is None else latents
        context = None
        for step, index in self.plan:
            if step == "read":
                layer: Any = self.cross_attends[index]
                exported = getattr(layer, "traced_reader", None)  # see traced_attention.py
                fast = exported(latents, input_array) if exported else read(layer, latents, input_array, **kwargs)
                if fast is None and context is None:
                    context, mask = input_array.dense(), input_array.mask()
                latents = layer(latents, context, mask, **kwargs) if fast is None else fast
            else:
                for layer in self.blocks[index]:  # type: ignore[attr-defined]
                    latents = layer(latents, **kwargs)
        return latents


class Decoder(nn.Module):
    """Output queries read the latents: (B, O, E), (B, N, D) -> (B, O, E)"""

    def __init__(self, config: PerceiverIOConfig, query_channels: int):
        super().__init__()
        self.cross_attend = CrossAttentionLayer(
            config,
            query_channels=query_channels,
            context_channels=config.d_latents,
            num_heads=config.decoder_num_heads,
            heads_name="decoder_num_heads",
            # DeepMind's decoders take the latents' width for queries and keys.
            qk_channels=config.decoder_qk_channels or config.d_latents,
            v_channels=config.decoder_v_channels,
            widening_factor=config.decoder_widening_factor,
            use_query_residual=config.decoder_use_query_residual,
            dropout=0.0,
        )

    def project(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) -> keys and values, once for any number of queries"""
        # FSDP gathers a layer's weights for calls of it alone. Elsewhere hooks on calls are to see queries' outputs only.
        sharded = hasattr(self.cross_attend, "unshard")
        return self.cross_attend(None, latents) if sharded else self.cross_attend.project(latents)

    def forward(
        self, query: Tensor, key_value: tuple[Tensor, Tensor], query_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        return self.cross_attend(query, None, None, query_mask, *key_value, **kwargs)


class PerceiverIOPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation for every head; see transformers' PreTrainedModel."""

    config: PerceiverIOConfig
    config_class = PerceiverIOConfig
    base_model_prefix = "perceiver"
    main_input_name = "inputs"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = [
        "SelfAttentionLayer",
        "CrossAttentionLayer",
        "TextPreprocessor",
        "GridPreprocessor",
        "MultimodalPreprocessor",
        "MultimodalQuery",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": SelfAttentionLayer,
        "attentions": OutputRecorder(Attention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(Attention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: PerceiverIOConfig, *args: Any, **kwargs: Any):
        config.validate()  # fields may have been set since it was made
        note_custom_modules(config)
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        # accelerate's FSDP stops at a name that is not in the model.
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules if name in there]  # type: ignore[misc]
        super().post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In code that is not its own, transformers passes by modules whose own tensors were all loaded, and so those
        # that have none. Ours draw for their children (attention, mask tokens, zero heads), looking at each one's flag.
        has_own = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        super()._initialize_weights(module, is_custom_code and has_own)

    def freeze_encoder(self) -> None:
        """Keep preprocessor, encoder and latents as they are: the output query, the decoder and the read-out are trained.

        The frozen parts stay in evaluation mode, without dropout and with the stored statistics of batch norms, and run
        without gradients, by inference's cheaper forms. An embedding that the read-out shares is the preprocessor's.
        """
        model: Any = getattr(self, self.base_model_prefix, self)
        for part in (model.preprocessor, model.encoder):
            part.requires_grad_(False)
        model.has_frozen_encoder = True
        self.train(self.training)

    def enable_input_require_grads(self) -> None:
        """As in transformers; where there are no token embeddings, the latents are where gradients start."""
        if self.get_input_embeddings() is not None:
            super().enable_input_require_grads()
            return
        model: Any = getattr(self, self.base_model_prefix, self)
        hook = model.encoder.latents.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        self._require_grads_hook, self._require_grads_hooks = hook, [hook]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_module(module, self.config)
        if isinstance(module, PerceiverIOModel) and self.config.initializer == "position_aligned":
            align_positions(module)

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, always in this package's own names.

        Trainer reads its checkpoints back without the conversion, so the built-in's names would be lost on resume;
        `export_builtin` writes what transformers' own Perceiver loads. Code stays behind, see `save_with_code`.
        """
        if not self.is_remote_code() and getattr(self.config, "auto_map", None):
            # Files that are not written would be asked for by everyone who lacks this package.
            self.config.auto_map = {auto: ref for auto, ref in self.config.auto_map.items() if "--" in str(ref)}
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; trust_remote_code=True also runs the parts that a checkpoint brings along."""
        if kwargs.get("trust_remote_code"):
            import_custom_modules(pretrained_model_name_or_path, cls.config_class, **kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"a weights file of {pretrained_model_name_or_path} is damaged or no safetensors file ({error}); copy or "
                "download it again"
            ) from error

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Registered conversions know a model's type, not its parts.
        load_config.weight_mapping.extend(final_layer_renamings(model.config))
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


class PerceiverIOModel(PerceiverIOPreTrainedModel):
    """The whole model: any preprocessor, encoder, output query, decoder, postprocessor that a config names.

    Without an output query and a postprocessor it stops at the latents: features of any checkpoint without the cost of
    its answers are `AutoModel.from_pretrained(checkpoint, output_query=None, postprocessor=None)`, in a pipeline
    `model_kwargs={"output_query": None, "postprocessor": None}`.
    """

    # That of the default config; each model has its preprocessor's.
    main_input_name = "input_ids"
    has_frozen_encoder = False  # see freeze_encoder

    def __init__(self, config: PerceiverIOConfig):
        super().__init__(config)
        self.preprocessor: Preprocessor = PREPROCESSORS.build(config.preprocessor, config=config)  # type: ignore[assignment]
        self.encoder = Encoder(config, self.preprocessor.channels)
        self.output_query: OutputQuery | None = None
        self.decoder: Decoder | None = None
        self.postprocessor: Any = None
        read_out_channels = config.d_latents
        if config.output_query is not None:
            query = OUTPUT_QUERIES.build(config.output_query, config=config, preprocessor=self.preprocessor)
            self.output_query = query  # type: ignore[assignment]
            read_out_channels = self.output_query.channels  # type: ignore[union-attr]
            self.decoder = Decoder(config, read_out_channels)
        if config.postprocessor is not None:
            kind = config.postprocessor["kind"]
            reads_latents = getattr(POSTPROCESSORS.classes.get(kind), "reads_latents", False)
            if kind in POSTPROCESSORS.classes and reads_latents != (config.output_query is None):
                raise ValueError(
                    f"postprocessor kind {kind!r} reads the latents themselves; set output_query=None"
                    if reads_latents
                    else f"postprocessor kind {kind!r} reads decoded queries; give the config an output_query"
                )
            self.postprocessor = POSTPROCESSORS.build(
                config.postprocessor, config=config, in_channels=read_out_channels, preprocessor=self.preprocessor
            )
            asked, read_out = (getattr(part, "modalities", ()) for part in (self.output_query, self.postprocessor))
            if without := set(asked) - set(read_out) if read_out else set():
                raise ValueError(
                    f"the output query asks for {', '.join(sorted(without))}, which the postprocessor does not read out; "
                    f"it has {', '.join(read_out)}"
                )
        if config.output_query is None and config.postprocessor is None:
            # Left out on purpose, nothing to report.
            self._keys_to_ignore_on_load_unexpected = [r"^(perceiver\.)?(output_query|decoder|postprocessor)\."]
        self.main_input_name = getattr(self.preprocessor, "main_input_name", "inputs")
        if getattr(self.postprocessor, "tied", False) and config.tie_word_embeddings:
            tied = {"postprocessor.output_embedding.weight": "preprocessor.embedding.weight"}
            self._tied_weights_keys = tied
        self.post_init()

    def train(self, mode: bool = True) -> "PerceiverIOModel":
        super().train(mode)
        if self.has_frozen_encoder:
            self.preprocessor.eval()
            self.encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        return getattr(self.preprocessor, "embedding", None)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.preprocessor.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self.postprocessor, "output_embedding", None)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.postprocessor.output_embedding = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        pixel_values: Tensor | None = None,
        inputs: Any = None,
        input_coordinates: Any = None,
        latents: Tensor | None = None,
        output_points: Any = None,
        coordinates: Any = None,
        chunk_size: int | None = None,
        query_mask: Any = None,
        interpolate_pos_encoding: bool = False,
        decode: bool = True,
        **kwargs: Any,
    ) -> PerceiverIOOutput:
        """One of input_ids, pixel_values and inputs -> latents, and the answers to the output query.

        Arguments as in `encode` and `decode`; decode=False stops at the latents.
        """
        given = one_input(input_ids=input_ids, pixel_values=pixel_values, inputs=inputs)
        encoding = self.encode(
            given,
            attention_mask=attention_mask,
            input_coordinates=input_coordinates,
            latents=latents,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        logits = None
        if decode and self.postprocessor is not None:
            logits = self.decode(
                encoding,
                output_points,
                coordinates,
                chunk_size,
                query_mask=query_mask,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **kwargs,
            )
        return PerceiverIOOutput(
            last_hidden_state=encoding.latents, pooler_output=encoding.latents.mean(dim=1), logits=logits
        )

    def encode(
        self,
        inputs: Any,
        attention_mask: Any = None,
        input_coordinates: Any = None,
        latents: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Encoding:
        """Whatever the preprocessor reads -> latents (B, N, D) and the input array.

        attention_mask (B, M), 1 = valid, or a dict by modality; input_coordinates (M, d) or (B, M, d) in place of the
        input's grid; latents (N, D) or (B, N, D) in place of the trained ones.
        """
        options = {"coordinates": input_coordinates, "interpolate_pos_encoding": interpolate_pos_encoding}
        options = {name: value for name, value in options.items() if value is not None and value is not False}
        input_array: Any = InputArray.of(self.preprocessor(inputs, attention_mask, **options))
        batch = input_array.batch_size
        if not batch:
            raise ValueError("the batch is empty; give at least one example")
        if latents is not None:
            latents = latents if latents.ndim == 3 else latents[None]
            if latents.ndim != 3 or latents.shape[-1] != self.config.d_latents:
                raise ValueError(f"latents are (batch, N, {self.config.d_latents}), not {tuple(latents.shape)}")
            if len({batch, len(latents)} - {1}) > 1:
                raise ValueError(f"{len(latents)} latent arrays for a batch of {batch}; give one, or one for each")
            batch = max(batch, len(latents))
        with torch.no_grad() if self._encodes_without_gradients(input_array, latents) else nullcontext():
            z = self.encoder(input_array, latents, **kwargs)
        return Encoding(latents=z.expand(batch, -1, -1), input_array=input_array)

    def _encodes_without_gradients(self, input_array: InputArray, latents: Tensor | None) -> bool:
        if not self.has_frozen_encoder:
            return False
        # Adapters may have come since, and inputs or latents be trained themselves.
        given = [tensor for tensor in (latents, *(part.features for _, part in input_array)) if tensor is not None]
        trained = chain(given, self.preprocessor.parameters(), self.encoder.parameters())
        return not any(tensor.requires_grad for tensor in trained)

    def decode(
        self,
        encoding: Encoding,
        output_points: Any = None,
        coordinates: Any = None,
        chunk_size: int | None = None,
        query_mask: Any = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Ask an encoding: all of the output query, or some of it -> the postprocessor's output.

        output_points: flat indices (n,) or (B, n) into the output grid; coordinates: (n, d) or (B, n, d) in [-1, 1];
        dicts by modality where there are several. chunk_size: queries decoded at a time, for bounded memory; None takes
        a bounded number where there are no gradients, and all at once where there are. The latents' keys and values are
        projected once. query_mask (B, O), 1 = asked, over the queries asked for: a masked query attends to nothing.
        interpolate_pos_encoding resizes the queries' trained positions.
        output_points may be a function that makes them of the encoding.
        """
        if self.postprocessor is None:
            raise ValueError("this config has no postprocessor; there is nothing to decode, use encode()")
        if self.output_query is None or self.decoder is None:
            if output_points is not None or coordinates is not None:
                raise ValueError(
                    "this model reads its output from the latents, not from queries: there are no output_points or "
                    "coordinates to choose"
                )
            return self.postprocessor.read_out(encoding.latents)
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(
                f"chunk_size is a whole number of queries from 1, or None for all at once, not {chunk_size!r}"
            )
        if callable(output_points):
            output_points = output_points(encoding)
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        query: PerceiverArray = QueryArray.of(
            self.output_query(encoding.input_array, output_points, coordinates, **options)
        )
        examples = encoding.latents.shape[0]
        for _, part in query:
            if examples != 1 and part.batch_size not in (1, examples):
                raise ValueError(
                    f"output_points or coordinates for {part.batch_size} examples, and an encoding of {examples}; give "
                    "one set for all, or one for each"
                )
        if query_mask is not None:
            query = mask_queries(query, query_mask, encoding.latents.shape[0])
        key_value = self.decoder.project(encoding.latents)
        writer = None
        if not is_watched(self.decoder):
            writer = FastWriter.make(self.decoder.cross_attend, *key_value, **kwargs)
        points = {name: self._answer(name, part, key_value, chunk_size, writer, **kwargs) for name, part in query}
        if getattr(self.postprocessor, "read_out", None) is None:
            return self.postprocessor(torch.cat(list(points.values()), dim=1), query)
        return self.postprocessor.arrange(points, query)

    def _answer(
        self,
        name: str,
        part: ArrayPart,
        key_value: tuple[Tensor, Tensor],
        chunk_size: int | None,
        writer: FastWriter | None,
        **kwargs: Any,
    ) -> Tensor:
        """Queries of one modality, chunk by chunk -> their read-out (B, O, K), or (B, O, E) where that needs all."""
        read_out = getattr(self.postprocessor, "read_out", None)
        if writer is not None:
            linear = linear_read_out(self.postprocessor, name)
            then = None if read_out is None or linear is not None else lambda decoded: read_out(decoded, name)
            written = writer.write(part, linear, then, chunk_size)
            if written is not None:
                return written
        if torch.compiler.is_compiling() and chunk_size is None:
            exported = getattr(self.decoder, "traced_writers", {}).get(name)  # see traced_attention.py
            if exported is not None:
                return exported(part, *key_value)
            # A traced loop over chunks would be fixed to its number of queries.
            decoded = self.decoder(part.dense(), key_value, part.mask, **kwargs)  # type: ignore[misc]
            return decoded if read_out is None else read_out(decoded, name)
        chunk_size = chunk_size or self._chunk_size(part, key_value, **kwargs)
        # At least one chunk: no points asked are an empty answer of the right width.
        starts = range(0, max(part.length, 1), chunk_size)
        chunks, whole = [], None
        for start in starts:
            stop = min(start + chunk_size, part.length)
            mask = None if part.mask is None else part.mask[:, start:stop]
            chunk = self.decoder(part.dense(start, stop), key_value, mask, **kwargs)  # type: ignore[misc]
            chunk = chunk if read_out is None else read_out(chunk, name)
            if len(starts) == 1 or torch.is_grad_enabled():
                chunks.append(chunk)
                continue
            if whole is None:
                # Filled in place: joined chunks would be there twice.
                whole = chunk.new_empty(chunk.shape[0], part.length, *chunk.shape[2:])
            whole[:, start:stop] = chunk
        if whole is not None:
            return whole
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)

    def _chunk_size(self, part: ArrayPart, key_value: tuple[Tensor, Tensor], **kwargs: Any) -> int:
        """How many queries to decode at a time where the caller does not say."""
        of_attentions = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        # Gradients keep every chunk's tensors anyway.
        if torch.is_grad_enabled() or of_attentions:
            return max(part.length, 1)
        keys, values = key_value
        query_width = self.decoder.cross_attend.query_norm.normalized_shape[0]  # type: ignore[union-attr]
        width = max(query_width, keys[0, :, 0].numel(), values[0, :, 0].numel())
        batch = max(part.batch_size, keys.shape[0])
        return max(CHUNK_NUMBERS["cpu" if keys.device.type == "cpu" else "other"] // (batch * width), 1)


class PerceiverIOHead(PerceiverIOPreTrainedModel):
    """Base of heads: a PerceiverIOModel whose output side is the one this task needs.

    A config made for another head gets this head's defaults in place of what does not fit, and says so once.
    """

    preprocessor_kinds: ClassVar[tuple[str, ...]] = ()
    query_kind: ClassVar[str] = ""
    postprocessor_kinds: ClassVar[tuple[str, ...]] = ()
    # Options of the postprocessor that make it this head's.
    postprocessor_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: PerceiverIOConfig):
        config = self._claim(config)
        super().__init__(config)
        self.perceiver = PerceiverIOModel(config)
        self.post_init()

    def encode(self, *args: Any, **kwargs: Any) -> Encoding:
        """See PerceiverIOModel.encode."""
        return self.perceiver.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """See PerceiverIOModel.decode."""
        return self.perceiver.decode(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.perceiver.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.perceiver.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.perceiver.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.perceiver.set_output_embeddings(value)

    @classmethod
    def _claim(cls, config: PerceiverIOConfig) -> PerceiverIOConfig:
        """The config, or a copy with this head's output side where the one there does not fit."""
        kind = config.preprocessor["kind"]
        if cls.preprocessor_kinds and kind in PREPROCESSORS.packaged and kind not in cls.preprocessor_kinds:
            raise ValueError(
                f"{cls.__name__} reads {' or '.join(cls.preprocessor_kinds)} input, this config's preprocessor is of kind "
                f"{kind!r}; take a config whose preprocessor fits, for instance from hf_perceiver.recipes"
            )
        if cls._fits(config):
            return config
        config = copy.deepcopy(config)
        old = [(side or {}).get("kind") for side in (config.output_query, config.postprocessor)]
        config.output_query, config.postprocessor = cls._default_sides(config)
        new = [(side or {}).get("kind") for side in (config.output_query, config.postprocessor)]
        logger.warning(
            f"{cls.__name__}: output query {old[0]!r} and postprocessor {old[1]!r} of the config are for another task; "
            f"using {new[0]!r} and {new[1]!r}, newly initialised where the checkpoint has no weights for them"
        )
        return config

    @classmethod
    def _fits(cls, config: PerceiverIOConfig) -> bool:
        query, post = config.output_query or {}, config.postprocessor or {}
        if post.get("kind") is not None and post["kind"] not in POSTPROCESSORS.packaged:
            return True  # a user's own part knows what it is for
        if post.get("kind") not in cls.postprocessor_kinds:
            return False
        if any(post.get(name) != value for name, value in cls.postprocessor_options.items()):
            return False
        of_labels = post["kind"] in ("classification", "projection", "average") and not cls.postprocessor_options
        if of_labels and post.get("num_outputs") not in (None, config.num_labels):
            return False
        if post["kind"] == "average":
            return not query
        if cls.query_kind == "tasks" and query.get("kind") == "position" and math.prod(query.get("grid") or [0]) == 1:
            return True  # one query at a place of its own, a class query as well
        return query.get("kind") == cls.query_kind or query.get("kind") not in {None, *OUTPUT_QUERIES.packaged}

    @classmethod
    def _default_sides(cls, config: PerceiverIOConfig) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        query, post = config.output_query, config.postprocessor or {}
        if post.get("kind") not in cls.postprocessor_kinds:
            post = {"kind": cls.postprocessor_kinds[0]}
        # What stays is the same read-out of another width, which num_labels or this head decides.
        post = {name: value for name, value in post.items() if name != "num_outputs"} | cls.postprocessor_options
        if post["kind"] == "average":
            return None, post
        if query is None or query.get("kind") != cls.query_kind:
            query = cls._default_query(config)
        return query, post

    @classmethod
    def _default_query(cls, config: PerceiverIOConfig) -> dict[str, Any]:
        if cls.query_kind == "tasks":
            # The width the decoder already has, so that its weights fit.
            return {"kind": "tasks", "channels": query_width(config)}
        if cls.query_kind == "position":
            position = config.preprocessor.get("position")
            if not position:
                raise ValueError(
                    f"{cls.__name__} asks at the input's positions, and this config's preprocessor has none to copy; "
                    "give the config an output_query"
                )
            return {"kind": "position", "position": copy.deepcopy(position), "use_input_mask": True}
        return {"kind": cls.query_kind}


def linear_read_out(postprocessor: Any, modality: str) -> tuple[Tensor, Tensor] | None:
    """The weight (K, E) and bias (K,) of a read-out that is one linear map, None for another."""
    found = getattr(postprocessor, "linear_read_out", None)
    return None if found is None or is_watched(postprocessor) else found(modality)


def mask_queries(query: PerceiverArray, query_mask: Any, batch_size: int) -> QueryArray:
    """The queries with a mask (B, O), or a dict of them by modality, added to what masks they have."""
    masks = query_mask if isinstance(query_mask, Mapping) else dict.fromkeys(query.parts, query_mask)
    parts = dict(query.parts)
    for name, given in masks.items():
        if name not in parts:
            known = ", ".join(parts).strip() or "no named modality; give the mask as one tensor"
            raise ValueError(f"unknown modality {name!r} in the query mask; asked for: {known}")
        mask, own = element_mask(given, (batch_size, parts[name].length)), parts[name].mask
        parts[name] = replace(parts[name], mask=mask if own is None or mask is None else own & mask)
    return QueryArray(parts)


def query_width(config: PerceiverIOConfig) -> int:
    """Width of the config's output query, or of the latents where it has none."""
    if config.output_query is None:
        return config.d_latents
    with torch.device("meta"):
        preprocessor = PREPROCESSORS.build(config.preprocessor, config=config)
        query = OUTPUT_QUERIES.build(config.output_query, config=config, preprocessor=preprocessor)
    return query.channels  # type: ignore[return-value]


def one_input(**given: Any) -> Any:
    """The one of several names for the input that was given; ValueError for none or two."""
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        what = " and ".join(named) if named else "none of them"
        raise ValueError(f"give exactly one of {', '.join(given)}; got {what}")
    return next(iter(named.values()))


def head_output(outputs: PerceiverIOOutput, loss: Tensor | None, **logits: Any) -> dict[str, Any]:
    return {
        "loss": loss,
        **logits,
        "last_hidden_state": outputs.last_hidden_state,
        "hidden_states": outputs.hidden_states,
        "attentions": outputs.attentions,
        "cross_attentions": outputs.cross_attentions,
    }


def classify(
    config: PerceiverIOConfig, logits: Tensor, labels: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor | None:
    if labels is None:
        return None
    loss, config.problem_type = classification_loss(logits, labels, config.problem_type, num_items_in_batch)
    return loss
