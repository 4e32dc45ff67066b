"""Beside transformers' built-in Perceiver: write checkpoints that it loads, and take over its model type on request."""

import math
import os
import re
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import CONFIG_MAPPING, PerceiverConfig, PretrainedConfig
from transformers.utils import logging

from .checkpoint_names import ROW_NAMES, SHARED_FIELDS, Spec, weight_names
from .configuration_perceiver_io import PerceiverIOConfig
from .registry import OUTPUT_QUERIES, POSITION_ENCODINGS, POSTPROCESSORS, PREPROCESSORS, STEMS, Registry

logger = logging.get_logger(__name__)

# The kinds of preprocessor, stem, output query and postprocessor that a built-in class is made of.
_CLASSES = {
    ("text", None, None, None): "PerceiverModel",
    ("points", None, None, None): "PerceiverModel",
    ("text", None, "position", "tokens"): "PerceiverForMaskedLM",
    ("text", None, "tasks", "classification"): "PerceiverForSequenceClassification",
    ("grid", "conv1x1", "tasks", "classification"): "PerceiverForImageClassificationLearned",
    ("grid", "pixels", "tasks", "classification"): "PerceiverForImageClassificationFourier",
    ("grid", "conv", "tasks", "classification"): "PerceiverForImageClassificationConvProcessing",
    ("grid", "patches", "input", "flow"): "PerceiverForOpticalFlow",
    ("multimodal", None, "multimodal", "multimodal"): "PerceiverForMultimodalAutoencoding",
}

# Options that say how weights start, how outputs are laid out or what is trained on: nothing that a stored model
# computes.
_WITHOUT_NUMBERS = {
    "init_scale",
    "zero_init",
    "on_grid",
    "scale_factor",
    "flow_loss",
    "losses",
    "loss_weights",
    "num_loss_points",
    "dropout_probs",
}
# What the built-in lacks but a model is still of use without; a warning says so.
_WARNED = {
    "zero_masked_rows": "a row whose mask has no valid element gets the mean of the values there, not 0",
    "use_input_mask": "queries at masked positions are answered like any other there",
    "dropout": "only attention probabilities are dropped in its training",
    "mask_probs": "its masks in training are of probability 1 for the label and 0 for the rest",
    "adaptive": "its output grid stays the one written to its config.json, whatever it reads",
}

_WEIGHT_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)


def export_builtin(model: Any, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write config.json and safetensors that transformers' own Perceiver classes load, with the same numbers.

    A new folder appears whole or not at all. In one that already holds files, refused unless overwrite=True, config and
    weights are replaced file by file and the rest (a tokenizer, a model card) stays.
    Raises ValueError that lists what the built-in cannot express; what it merely lacks at the edges is a warning.
    """
    target = Path(directory).resolve()
    if target.exists() and not (target.is_dir() and (overwrite or not any(target.iterdir()))):
        raise ValueError(f"{directory} exists and is not an empty folder; choose another or pass overwrite=True")
    architecture, config = builtin_config(model.config)
    tensors = _builtin_tensors(model.state_dict(), architecture)
    _check_tensors(tensors, architecture, config, model.config)
    config.dtype = model.dtype
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = scratch / "checkpoint"  # mkdtemp's own folder is closed to others
        made.mkdir()
        config.save_pretrained(made)
        save_torch_state_dict(tensors, made, metadata={"format": "pt"})
        if target.exists() and any(target.iterdir()):
            _replace_files(made, target)
        else:
            if target.exists():
                target.rmdir()
            made.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def builtin_config(config: PerceiverIOConfig) -> tuple[str, PerceiverConfig]:
    """The built-in class that computes what this config does, and its config.

    Raises ValueError that lists every difference where there is none.
    """
    architecture, builtin = _nearest(config)
    like = PerceiverIOConfig.from_dict(builtin.to_dict())
    if config.preprocessor["kind"] == "points":
        # transformers' bare PerceiverModel: whatever is put in front of it gives (B, M, d_model).
        like.preprocessor = {"kind": "points", "feature_channels": builtin.d_model}
    ours, theirs = _numbers(config, architecture), _numbers(like, architecture)
    # There the self-attends' output is as wide as their values, and added to the latents.
    ours["v_channels"] = config.v_channels or config.qk_channels or config.d_latents
    theirs["v_channels"] = config.d_latents
    differing = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    other_kinds = {name for name in differing if name.endswith(".kind")}
    wrong, warned = [], []
    for name in sorted(differing):
        word = name.rsplit(".", 1)[-1]
        if any(name != kind and name.startswith(kind.removesuffix("kind")) for kind in other_kinds):
            continue  # where the kinds differ, their options are not worth a word
        if word in _WARNED:
            warned.append(_WARNED[word])
        else:
            wrong.append(f"{name} is {ours.get(name)!r}, there {theirs.get(name)!r}")
    if wrong:
        raise ValueError(
            f"transformers' {architecture}, the nearest class, cannot express this model: {'; '.join(wrong)}. "
            "save_pretrained() keeps all of it"
        )
    for sentence in dict.fromkeys(warned):
        logger.warning(f"transformers' {architecture} differs: {sentence}")
    return architecture, builtin


def override_builtin() -> None:
    """From now on `model_type="perceiver"` means this package's config to the Auto classes and pipelines.

    Checkpoints of transformers' own Perceiver then load as ours by AutoModelFor... and `pipeline`. Its classes
    themselves stay as they are; `restore_builtin` undoes it. Harmless again.
    """
    registered = CONFIG_MAPPING._extra_content
    if registered.get("perceiver") is not PerceiverIOConfig:
        _registered_before.append(registered.get("perceiver"))
        CONFIG_MAPPING.register("perceiver", PerceiverIOConfig, exist_ok=True)


def restore_builtin() -> None:
    """Undo `override_builtin`; harmless without it."""
    registered = CONFIG_MAPPING._extra_content
    if registered.get("perceiver") is PerceiverIOConfig:
        before = _registered_before.pop() if _registered_before else None
        if before is None:
            del registered["perceiver"]
        else:
            registered["perceiver"] = before


# What someone else had registered for the built-in's model type when it was overridden, usually None.
_registered_before: list[Any] = []


def _nearest(config: PerceiverIOConfig) -> tuple[str, PerceiverConfig]:
    """The built-in class of these kinds of parts, and its config with everything taken over that has a place there."""
    pre, query, post = config.preprocessor, config.output_query or {}, config.postprocessor or {}
    kinds = (pre["kind"], (pre.get("stem") or {}).get("kind"), query.get("kind"), post.get("kind"))
    architecture = _CLASSES.get(kinds)
    if architecture is None:
        known = "; ".join(f"{name}: {', '.join(k or '-' for k in parts)}" for parts, name in _CLASSES.items())
        raise ValueError(
            "transformers' Perceiver has no class for a model of the kinds "
            f"{', '.join(k or '-' for k in kinds)} (preprocessor, stem, output query, postprocessor); it has {known}"
        )
    own = {f.name for f in fields(PerceiverIOConfig)} - {f.name for f in fields(PretrainedConfig)}
    tokens = {name: getattr(config, name) for name in own if name.endswith("_token_id") and pre["kind"] == "text"}
    others = {name: value for name, value in config.to_dict().items() if name not in own}
    for name in ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path"):
        others.pop(name, None)
    taken = {name: getattr(config, name) for name in SHARED_FIELDS}
    taken["attention_probs_dropout_prob"] = config.attention_dropout
    taken |= {name: value for name, value in _sizes(pre, query, post, architecture).items() if value is not None}
    return architecture, PerceiverConfig(**{**others, **tokens, **taken}, architectures=[architecture])


def _sizes(pre: Spec, query: Spec, post: Spec, architecture: str) -> dict[str, Any]:
    """The built-in's fields that stand in our specs; what does not fit is found when the two are compared."""
    position = pre.get("position") or {}
    if pre["kind"] == "text":
        return {"d_model": pre["channels"], "max_position_embeddings": position.get("num_positions")}
    if pre["kind"] == "points":
        return {"d_model": pre.get("feature_channels") or None}
    if architecture == "PerceiverForImageClassificationLearned":
        table = position.get("position") or position
        return {"image_size": math.isqrt(table.get("num_positions", 0)) or None}
    if architecture == "PerceiverForOpticalFlow":
        return {"train_size": position.get("max_resolution")}
    if pre["kind"] != "multimodal":
        return {}
    image, audio = (pre["modalities"].get(name, {}) for name in ("image", "audio"))
    video = (image.get("position") or {}).get("max_resolution") or [1, 1]
    sound = (audio.get("position") or {}).get("max_resolution") or [1]
    samples = (audio.get("stem") or {}).get("samples_per_patch")
    asked = query["modalities"]
    grid = _query_grid(asked.get("image", {}), pre["modalities"].get("image", {}))
    return {
        "num_frames": video[0],
        "image_size": video[-1],
        "audio_samples_per_frame": sound[0] // video[0],
        "samples_per_patch": samples,
        "output_shape": None if grid is None else [1, *grid],
        "output_num_channels": post.get("channels"),
        "_label_trainable_num_channels": asked.get("label", {}).get("channels"),
    }


def _numbers(config: PerceiverIOConfig, architecture: str) -> dict[str, Any]:
    """What decides a config's numbers and has no field of its own in the built-in, by dotted name."""
    found: dict[str, Any] = {
        "layer_norm_eps": config.layer_norm_eps,
        "dropout": config.dropout,
        "cross_attends": config.weight_indices("cross_attend"),
        "blocks": config.weight_indices("block"),
        "preprocessor": _whole(config.preprocessor, PREPROCESSORS, config),
        "output_query": _whole(config.output_query, OUTPUT_QUERIES, config),
        "postprocessor": _whole(config.postprocessor, POSTPROCESSORS, config),
    }
    if architecture != "PerceiverModel":
        qk = config.decoder_qk_channels or config.d_latents
        found["decoder_qk_channels"] = qk
        found["decoder_v_channels"] = config.decoder_v_channels or qk
        for name in ("decoder_num_heads", "decoder_widening_factor", "decoder_use_query_residual"):
            found[name] = getattr(config, name)
    if architecture == "PerceiverForMaskedLM":
        found["tie_word_embeddings"] = config.tie_word_embeddings
    if architecture == "PerceiverForMultimodalAutoencoding":
        _fix_grids(found)
    if config.preprocessor["kind"] in ("text", "points"):
        found["zero_masked_rows"] = config.zero_masked_rows
    elif found["output_query"]:
        found["output_query"].pop("use_input_mask", None)  # nobody masks pixels
    return _flat(found)


def _whole(spec: Spec | None, registry: Registry, config: PerceiverIOConfig) -> Spec | None:
    """A spec with the defaults of its parts filled in, less what has no bearing on numbers."""
    if spec is None or spec["kind"] == "none":
        return None
    options = {name: p.default for name, p in registry.options(spec["kind"]).items() if p.default is not p.empty}
    whole: Spec = {name: value for name, value in {**options, **spec}.items() if name not in _WITHOUT_NUMBERS}
    for name, inner in (("stem", STEMS), ("position", POSITION_ENCODINGS)):
        if name in whole:
            whole[name] = _whole(whole[name], inner, config)
    if "modalities" in whole:
        whole["modalities"] = {name: _whole(part, registry, config) for name, part in whole["modalities"].items()}
    if spec["kind"] == "classification":
        whole["num_outputs"] = whole["num_outputs"] or config.num_labels
    if spec["kind"] == "fourier":
        whole["num_axes"] = len(whole["max_resolution"] or ()) or whole["num_axes"]
    if spec["kind"] == "projected" and whole["position"] and whole["position"].get("grid", ()) is None:
        side = math.isqrt(whole["position"]["num_positions"])
        whole["position"]["grid"] = [side, side]
    if spec["kind"] == "multimodal" and registry is PREPROCESSORS:
        probs = whole["mask_probs"]
        whole["mask tokens"] = probs is not None
        if whole["masked_at_inference"] is None:
            whole["masked_at_inference"] = [name for name, p in (probs or {}).items() if p == 1]
    return whole


def _fix_grids(found: dict[str, Any]) -> None:
    # Queries whose grid follows the input are those of the built-in on inputs of the size it was configured for.
    for name, asked in found["output_query"]["modalities"].items():
        source = found["preprocessor"]["modalities"].get(name)
        if asked and asked["kind"] == "position" and asked["grid"] is None:
            found["adaptive"] = True
            asked["grid"] = _query_grid(asked, source or {})
        if asked and asked["kind"] == "position":
            asked["scale"] = None


def _query_grid(query: Spec, source: Spec) -> list[int] | None:
    if query.get("grid") is not None:
        return list(query["grid"])
    grid = list((source.get("position") or {}).get("max_resolution") or ())
    stem = source.get("stem") or {}
    if stem.get("kind") == "audio_patches":
        # Its positions count samples, its elements are patches.
        grid = [n // stem.get("samples_per_patch", 96) for n in grid]
    scale = query.get("scale") or [1] * len(grid)
    return [n * s for n, s in zip(grid, scale, strict=True)] if grid and len(grid) == len(scale) else None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = (_flat(inner, f"{name}.{key}" if name else key) for key, inner in value.items() if key != "mask_probs")
        flat = {key: inner for part in parts for key, inner in part.items()}
        return flat | ({f"{name}.mask_probs": value["mask_probs"]} if "mask_probs" in value else {})
    return {name: list(value) if isinstance(value, tuple) else value}


def _builtin_tensors(state: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Our state dict, of a head or of a PerceiverIOModel, under the built-in's names; tied weights once."""
    patterns = [
        (re.compile(re.escape(here).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), there.replace("#", r"\1"), (there, here))
        for there, here in weight_names(architecture)
    ]
    tensors = {}
    for key, tensor in state.items():
        name = key.removeprefix("perceiver.")
        if name == "postprocessor.output_embedding.weight":
            continue
        for pattern, there, pair in patterns:
            if match := pattern.match(name):
                name = match.expand(there) + name[match.end() :]
                tensor = tensor[None] if pair in ROW_NAMES else tensor
                break
        bare = architecture == "PerceiverModel" or name.startswith("embedding_decoder.")
        tensors[name if bare else f"perceiver.{name}"] = tensor
    return tensors


def _check_tensors(
    tensors: dict[str, Tensor], architecture: str, config: PerceiverConfig, ours: PerceiverIOConfig
) -> None:
    """Raise ValueError unless the built-in class takes exactly these names and shapes."""
    from transformers.models.perceiver import modeling_perceiver

    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("some weights are on the meta device (offloaded?); load the model whole before exporting it")
    extra = {}
    with torch.device("meta"):
        if architecture == "PerceiverModel" and ours.preprocessor["kind"] == "text":
            extra["input_preprocessor"] = modeling_perceiver.PerceiverTextPreprocessor(config)
        builtin = getattr(transformers, architecture)(config, **extra)
    wanted = {name: tuple(tensor.shape) for name, tensor in builtin.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [n for n in sorted(wanted.keys() | given.keys()) if wanted.get(n) != given.get(n)]
    if wrong:
        lines = [f"{n}: {given.get(n, 'nothing')}, there {wanted.get(n, 'nothing')}" for n in wrong[:5]]
        raise ValueError(
            f"{len(wrong)} weights have no counterpart in transformers' {architecture}: {'; '.join(lines)}"
        )


def _replace_files(made: Path, target: Path) -> None:
    new = {path.name for path in made.iterdir()}
    for path in made.iterdir():
        path.replace(target / path.name)
    # An old file of another kind would be found first and loaded instead.
    for pattern in _WEIGHT_FILES:
        for path in target.glob(pattern):
            if path.name not in new:
                path.unlink()
