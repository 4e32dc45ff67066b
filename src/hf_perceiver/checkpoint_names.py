"""Names: ours <-> those of transformers' built-in Perceiver (`model_type="perceiver"`), for configs and for weights.

The built-in has one class per task and builds most of each from constants in its code; a config.json names the class in
`architectures`. Here the same architecture is the config's specs. Source: transformers models/perceiver, read at 5.23.
Only dicts and strings: `checkpoint_weights` renames tensors with these tables, `builtin` writes files with them.
"""

import copy
from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import StrictDataclassError

NUMERICS = ("builtin", "deepmind")
Spec = dict[str, Any]


def is_builtin_config(config_dict: dict[str, Any]) -> bool:
    """Whether a config.json describes transformers' own Perceiver."""
    return config_dict.get("model_type") == "perceiver"


def builtin_to_config(
    config_dict: dict[str, Any], numerics: str | None = None, architecture: str | None = None
) -> dict[str, Any]:
    """A built-in config.json -> the fields of PerceiverIOConfig.

    numerics: "builtin" (default) keeps the numbers of transformers' code, "deepmind" those of the original, see
    `apply_numerics`. architecture: the built-in class, where config.json does not say which of them it was.
    Raises ValueError for an unknown or ambiguous class and for another word than these two.
    """
    _check_numerics(numerics)
    architecture = _architecture(config_dict, architecture)
    builtin = _builtin_config(config_dict)
    own = {name for name in type(builtin).__dataclass_fields__ if name not in _BASE_FIELDS}
    fields = {name: value for name, value in config_dict.items() if name not in own}
    fields |= {name: copy.deepcopy(getattr(builtin, name)) for name in SHARED_FIELDS}
    fields |= {
        "model_type": "perceiver_io",
        "architectures": [ARCHITECTURES[architecture][0]],
        "attention_dropout": builtin.attention_probs_dropout_prob,
        "dropout": 0.0,
        # The file's layer_norm_eps (1e-12) is read by nothing in the built-in, whose LayerNorms keep torch's default.
        "layer_norm_eps": 1e-5,
        "zero_masked_rows": False,
        "cross_attend_before_blocks": [0],
        "cross_attend_sharing": "all",
        "block_sharing": "all",
        "decoder_widening_factor": 1,
        # The language model shares its embedding whatever the file says.
        "tie_word_embeddings": True,
    }
    fields |= ARCHITECTURES[architecture][1](builtin)
    return fields if numerics != "deepmind" else fields | _numerics_changes(fields, numerics)


def apply_numerics(config: Any, numerics: str) -> Any:
    """A copy of a PerceiverIOConfig with the numerics of the original, "deepmind", or of transformers, "builtin".

    They differ in: GELU (tanh form, erf); attention over masked elements only (0, the mean); text queries at masked
    positions (read nothing, read as any other); the conv stem's padding ("same", "builtin"); the query residual of the
    decoder behind learned ImageNet positions (without, with). For a model about to be built: weights stay as they are.
    """
    _check_numerics(numerics)
    config = copy.deepcopy(config)
    names = ("hidden_act", "preprocessor", "output_query", "postprocessor", "decoder_use_query_residual")
    for name, value in _numerics_changes({name: getattr(config, name) for name in names}, numerics).items():
        setattr(config, name, value)
    return config


def _numerics_changes(fields: dict[str, Any], numerics: str) -> dict[str, Any]:
    deepmind = numerics == "deepmind"
    changes: dict[str, Any] = {"zero_masked_rows": deepmind}
    gelus = ("gelu", "gelu_pytorch_tanh")
    if fields["hidden_act"] in gelus:
        changes["hidden_act"] = gelus[deepmind]
    preprocessor, query = copy.deepcopy(fields["preprocessor"]), copy.deepcopy(fields["output_query"])
    for spec in _by_modality(preprocessor):
        if (spec.get("stem") or {}).get("kind") == "conv":
            spec["stem"]["padding"] = "same" if deepmind else "builtin"
    if query and query["kind"] in ("position", "input"):
        query["use_input_mask"] = deepmind
    changes |= {"preprocessor": preprocessor, "output_query": query}
    if _is_learned_imagenet(preprocessor, query):
        changes["decoder_use_query_residual"] = not deepmind
    return changes


def _by_modality(spec: Spec) -> list[Spec]:
    return list(spec["modalities"].values()) if spec["kind"] == "multimodal" else [spec]


def _is_learned_imagenet(preprocessor: Spec, query: Spec | None) -> bool:
    position = preprocessor.get("position") or {}
    position = position.get("position", {}) if position.get("kind") == "projected" else position
    return (
        (preprocessor.get("stem") or {}).get("kind") == "conv1x1"
        and position.get("kind") == "trainable"
        and (query or {}).get("kind") == "tasks"
    )


def _check_numerics(numerics: str | None) -> None:
    if numerics is not None and numerics not in NUMERICS:
        raise ValueError(f"numerics={numerics!r} must be one of {', '.join(NUMERICS)}")


# What any transformers config has, kept as the file has it.
_BASE_FIELDS = frozenset(
    "transformers_version output_hidden_states return_dict dtype chunk_size_feed_forward is_encoder_decoder id2label "
    "label2id problem_type".split()
)

# Fields of one name and one meaning on both sides.
SHARED_FIELDS = (
    "num_latents",
    "d_latents",
    "num_blocks",
    "num_self_attends_per_block",
    "num_self_attention_heads",
    "num_cross_attention_heads",
    "qk_channels",
    "v_channels",
    "cross_attention_shape_for_attention",
    "self_attention_widening_factor",
    "cross_attention_widening_factor",
    "use_query_residual",
    "hidden_act",
    "initializer_range",
    "vocab_size",
)


def _builtin_config(config_dict: dict[str, Any]) -> Any:
    # Old files leave fields out; their values are the defaults of the built-in's class.
    from transformers import PerceiverConfig

    try:
        return PerceiverConfig.from_dict(dict(config_dict))
    except StrictDataclassError as error:
        raise ValueError(f"transformers' own PerceiverConfig refuses this config.json: {error}") from error


def _architecture(config_dict: dict[str, Any], architecture: str | None) -> str:
    named = [architecture] if architecture is not None else config_dict.get("architectures") or ["PerceiverModel"]
    known = sorted({name for name in named if name in ARCHITECTURES})
    if len(known) == 1:
        return known[0]
    problem = "is ambiguous" if known else "names no class of transformers' Perceiver"
    raise ValueError(
        f"architectures={named} {problem}, and config.json says nothing else about what reads the input and what is "
        f"asked; pass architecture=... with the class that wrote it: {', '.join(ARCHITECTURES)}"
    )


# The specs of each built-in class, from what its constructor hard-codes.


def _text(c: Any) -> Spec:
    return {"kind": "text", "channels": c.d_model, "position": _text_position(c)}


def _text_position(c: Any) -> Spec:
    return {"kind": "trainable", "num_positions": c.max_position_embeddings, "channels": c.d_model}


def _text_model(c: Any) -> dict[str, Any]:
    """The latents of a text; decoder widths as in the language model, for a head put on it."""
    return {**_masked_lm(c), "output_query": None, "postprocessor": None}


def _masked_lm(c: Any) -> dict[str, Any]:
    return {
        "preprocessor": _text(c),
        "output_query": {"kind": "position", "position": _text_position(c), "use_input_mask": False},
        "postprocessor": {"kind": "tokens"},
        **_decoder(heads=8, qk=8 * 32, v=c.d_model, residual=False),
    }


def _sequence_classification(c: Any) -> dict[str, Any]:
    return {"preprocessor": _text(c), **_classification(c)}


def _image_learned(c: Any) -> dict[str, Any]:
    height, width = _image_sides(c)
    table = {"kind": "trainable", "num_positions": height * width, "channels": 256, "grid": [height, width]}
    stem = {"kind": "conv1x1", "in_channels": 3, "channels": 256}
    position = {"kind": "projected", "position": table, "channels": 256}
    return {"preprocessor": {"kind": "grid", "stem": stem, "position": position}, **_classification(c)}


def _image_fourier(c: Any) -> dict[str, Any]:
    position = _fourier(64, [224, 224])
    stem = {"kind": "pixels", "in_channels": 3}
    return {"preprocessor": {"kind": "grid", "stem": stem, "position": position}, **_classification(c)}


def _image_conv(c: Any) -> dict[str, Any]:
    position = _fourier(64, [56, 56])
    stem = {"kind": "conv", "in_channels": 3, "channels": 64, "padding": "builtin"}
    return {"preprocessor": {"kind": "grid", "stem": stem, "position": position}, **_classification(c)}


def _optical_flow(c: Any) -> dict[str, Any]:
    stem = {"kind": "patches", "in_channels": 27, "temporal_downsample": 2, "project": 64}
    position = _fourier(64, list(c.train_size))
    return {
        "preprocessor": {"kind": "grid", "stem": stem, "position": position},
        "output_query": {"kind": "input", "use_input_mask": False},
        "postprocessor": {"kind": "flow", "rescale_factor": 100.0},
        **_decoder(qk=_decoder_width(c, 64 + _channels(position)), residual=False),
    }


def _multimodal(c: Any) -> dict[str, Any]:
    samples = c.num_frames * c.audio_samples_per_frame
    video, sound = _fourier(32, [c.num_frames, *_image_sides(c)]), _fourier(192, [samples])
    asked = {"rule": "sampled"}
    label_channels = c._label_trainable_num_channels
    patches = samples // c.samples_per_patch
    return {
        "preprocessor": {
            "kind": "multimodal",
            "min_padding_size": 4,
            "mask_probs": {"image": 0.0, "audio": 0.0, "label": 1.0},
            "modalities": {
                "audio": {
                    "kind": "grid",
                    "stem": {"kind": "audio_patches", "samples_per_patch": c.samples_per_patch},
                    "position": sound,
                },
                "image": {
                    "kind": "grid",
                    "stem": {"kind": "patches", "in_channels": 3, "spatial_downsample": 4},
                    "position": video,
                },
                "label": {"kind": "vector", "channels": c.num_labels},
            },
        },
        "output_query": {
            "kind": "multimodal",
            "min_padding_size": 2,
            # The built-in asks a fixed grid, whatever it has read.
            "modalities": {
                "audio": {"kind": "position", "position": {**sound, **asked}, "grid": [patches]},
                "image": {"kind": "position", "position": {**video, **asked}, "grid": list(c.output_shape[1:])},
                "label": {"kind": "tasks", "channels": label_channels},
            },
        },
        "postprocessor": {
            "kind": "multimodal",
            "channels": c.output_num_channels,
            "modalities": {
                "audio": {"kind": "audio", "samples_per_patch": c.samples_per_patch},
                "image": {"kind": "projection", "num_outputs": 3, "on_grid": True},
                "label": {"kind": "classification"},
            },
        },
        **_decoder(qk=_decoder_width(c, max(_channels(video), _channels(sound), label_channels) + 2), residual=False),
    }


def _classification(c: Any) -> dict[str, Any]:
    return {
        "output_query": {"kind": "tasks", "channels": c.d_latents},
        "postprocessor": {"kind": "classification"},
        **_decoder(qk=_decoder_width(c, c.d_latents), residual=True),
    }


def _decoder(*, heads: int = 1, qk: int | None, v: int | None = None, residual: bool) -> dict[str, Any]:
    return {
        "decoder_num_heads": heads,
        "decoder_qk_channels": qk,
        "decoder_v_channels": v,
        "decoder_use_query_residual": residual,
    }


def _decoder_width(c: Any, query_channels: int) -> int | None:
    # In the built-in the encoder's option rules its decoders too, except the language model's.
    return query_channels if c.cross_attention_shape_for_attention == "q" else None


def _fourier(num_bands: int, max_resolution: list[int]) -> Spec:
    return {"kind": "fourier", "num_bands": num_bands, "max_resolution": max_resolution}


def _channels(fourier: Spec) -> int:
    return len(fourier["max_resolution"]) * (2 * fourier["num_bands"] + 1)


def _image_sides(c: Any) -> tuple[int, int]:
    height, width = (c.image_size, c.image_size) if isinstance(c.image_size, int) else c.image_size
    return height, width


# Built-in class -> our class, the specs of its config.
ARCHITECTURES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "PerceiverModel": ("PerceiverIOModel", _text_model),
    "PerceiverForMaskedLM": ("PerceiverIOForMaskedLM", _masked_lm),
    "PerceiverForSequenceClassification": ("PerceiverIOForSequenceClassification", _sequence_classification),
    "PerceiverForImageClassificationLearned": ("PerceiverIOForImageClassification", _image_learned),
    "PerceiverForImageClassificationFourier": ("PerceiverIOForImageClassification", _image_fourier),
    "PerceiverForImageClassificationConvProcessing": ("PerceiverIOForImageClassification", _image_conv),
    "PerceiverForOpticalFlow": ("PerceiverIOForOpticalFlow", _optical_flow),
    "PerceiverForMultimodalAutoencoding": ("PerceiverIOForMultimodalAutoencoding", _multimodal),
}


# Names of weights: (built-in, ours), each up to a dot or the end; `#` is a layer's number. Neither side has the
# "perceiver." in front that the heads put there.

Names = list[tuple[str, str]]

_MLP: Names = [
    ("attention.output.dense", "{}.o_proj"),
    ("attention.self.query", "{}.q_proj"),
    ("attention.self.key", "{}.k_proj"),
    ("attention.self.value", "{}.v_proj"),
    ("layernorm", "mlp_norm"),
    ("mlp.dense1", "mlp.up_proj"),
    ("mlp.dense2", "mlp.down_proj"),
]
_SELF_ATTEND: Names = [("attention.self.layernorm1", "attn_norm")]
_CROSS_ATTEND: Names = [("attention.self.layernorm1", "query_norm"), ("attention.self.layernorm2", "context_norm")]

_MODALITIES = ("audio", "image", "label")

_PREPROCESSORS: dict[str, Names] = {
    "text": [
        ("input_preprocessor.embeddings", "preprocessor.embedding"),
        ("input_preprocessor.position_embeddings.weight", "preprocessor.position.embeddings"),
    ],
    "learned": [
        ("input_preprocessor.convnet_1x1", "preprocessor.stem.conv"),
        ("input_preprocessor.position_embeddings.position_embeddings", "preprocessor.position.position.embeddings"),
        ("input_preprocessor.positions_projection", "preprocessor.position.project"),
    ],
    "conv": [
        ("input_preprocessor.convnet.conv", "preprocessor.stem.convs.0"),
        ("input_preprocessor.convnet.batchnorm", "preprocessor.stem.norms.0"),
    ],
    "flow": [("input_preprocessor.conv_after_patches", "preprocessor.stem.linear")],
}

# Vectors here, matrices of one row there.
ROW_NAMES: Names = [
    (f"{there}.{modality}", f"{here}.{modality}")
    for there, here in (
        ("input_preprocessor.padding", "preprocessor.padding"),
        ("input_preprocessor.mask", "preprocessor.mask_tokens"),
        ("decoder.padding", "output_query.padding"),
    )
    for modality in _MODALITIES
]

# The last linear of the decoders; the one name of theirs that is several of ours, by kind of postprocessor.
FINAL_LAYER = "decoder.decoder.final_layer"
FINAL_LAYERS = {
    "classification": "postprocessor.classifier",
    "flow": "postprocessor.projection",
    "multimodal": "postprocessor.shared",
}


def weight_names(architecture: str) -> Names:
    """(built-in, ours) for every weight of a built-in class, those of ROW_NAMES included."""
    masked_lm = architecture == "PerceiverForMaskedLM"
    names = [("embeddings.latents", "encoder.latents.weight")]
    names += _layer("encoder.cross_attention", "encoder.cross_attends.0", _CROSS_ATTEND, "cross_attn")
    names += _layer("encoder.self_attends.#", "encoder.blocks.0.#", _SELF_ATTEND, "self_attn")
    if architecture != "PerceiverModel":
        decoder = "decoder" if masked_lm else "decoder.decoder"
        names += _layer(f"{decoder}.decoding_cross_attention", "decoder.cross_attend", _CROSS_ATTEND, "cross_attn")
    return names + _OWN_NAMES[architecture]


def _layer(there: str, here: str, norms: Names, attention: str) -> Names:
    return [(f"{there}.{a}", f"{here}.{b.format(attention)}") for a, b in norms + _MLP]


_CLASS_QUERY: Names = [
    ("decoder.decoder.output_position_encodings.position_embeddings", "output_query.task_queries"),
    (FINAL_LAYER, FINAL_LAYERS["classification"]),
]

_OWN_NAMES: dict[str, Names] = {
    "PerceiverModel": _PREPROCESSORS["text"],
    "PerceiverForMaskedLM": [
        *_PREPROCESSORS["text"],
        ("decoder.output_position_encodings.position_embeddings", "output_query.position.embeddings"),
        ("embedding_decoder", "postprocessor.output_embedding"),
    ],
    "PerceiverForSequenceClassification": _PREPROCESSORS["text"] + _CLASS_QUERY,
    "PerceiverForImageClassificationLearned": _PREPROCESSORS["learned"] + _CLASS_QUERY,
    "PerceiverForImageClassificationFourier": _CLASS_QUERY,
    "PerceiverForImageClassificationConvProcessing": _PREPROCESSORS["conv"] + _CLASS_QUERY,
    "PerceiverForOpticalFlow": [*_PREPROCESSORS["flow"], (FINAL_LAYER, FINAL_LAYERS["flow"])],
    "PerceiverForMultimodalAutoencoding": [
        *ROW_NAMES,
        (
            "decoder.modalities.label.decoder.output_position_encodings.position_embeddings",
            "output_query.modalities.label.task_queries",
        ),
        (FINAL_LAYER, FINAL_LAYERS["multimodal"]),
        ("output_postprocessor.modalities.audio.classifier", "postprocessor.modalities.audio.projection"),
        ("output_postprocessor.modalities.image.classifier", "postprocessor.modalities.image.projection"),
        ("output_postprocessor.modalities.label.classifier", "postprocessor.modalities.label.classifier"),
    ],
}
