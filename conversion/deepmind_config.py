"""The keyword arguments of DeepMind's constructors -> PerceiverIOConfig.

A model is described by a dict of those arguments, wired as in DeepMind's notebooks: for instance {"num_classes": 1000,
"input_preprocessor": {...}, "encoder": {...}, "decoder": {...}} for ImageNet. An argument that is not given has the
original's default; one that only initialises weights or names Haiku modules is accepted and changes nothing.
Source: deepmind-research perceiver/{perceiver,io_processors,position_encoding}.py and perceiver/colabs.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_perceiver import PerceiverIOConfig
from hf_perceiver.registry import OUTPUT_QUERIES, POSITION_ENCODINGS, POSTPROCESSORS, PREPROCESSORS, STEMS, Registry

Arguments = Mapping[str, Any]
Spec = dict[str, Any]
# Sizes of a grid, one per axis; None where no argument tells.
Dims = tuple[int | None, ...]

REQUIRED: Any = object()

# --- DeepMind's classes: argument -> default

POSITION = {
    "project_pos_dim": -1,
    "trainable_position_encoding_kwargs": None,
    "fourier_position_encoding_kwargs": None,
}
TRAINABLE_POSITION = {"num_channels": 128, "init_scale": 0.02}
FOURIER_POSITION = {"num_bands": REQUIRED, "concat_pos": True, "max_resolution": None, "sine_only": False}
IMAGE_PREPROCESSOR = {
    "prep_type": "conv",
    "spatial_downsample": 4,
    "temporal_downsample": 1,
    "position_encoding_type": "fourier",
    "n_extra_pos_mlp": 0,
    "num_channels": 64,
    "conv_after_patching": False,
    "conv2d_use_batchnorm": True,
    "concat_or_add_pos": "concat",
    "name": None,
    **POSITION,
}
AUDIO_PREPROCESSOR = {
    "prep_type": "patches",
    "samples_per_patch": 96,
    "position_encoding_type": "fourier",
    "n_extra_pos_mlp": 0,
    "concat_or_add_pos": "concat",
    "name": None,
    **POSITION,
}
ENCODER = {
    "num_self_attends_per_block": 6,
    "num_blocks": 8,
    "z_index_dim": 512,
    "num_z_channels": 1024,
    "qk_channels": None,
    "v_channels": None,
    "num_cross_attend_heads": 1,
    "num_self_attend_heads": 8,
    "cross_attend_widening_factor": 1,
    "self_attend_widening_factor": 1,
    "dropout_prob": 0.0,
    "z_pos_enc_init_scale": 0.02,
    "cross_attention_shape_for_attn": "kv",
    "use_query_residual": True,
    "name": None,
}
# The output's sub-sampled sizes, the latents' width and the decoder's own name are taken, and used for nothing here.
BASIC_DECODER = {
    "output_num_channels": REQUIRED,
    "position_encoding_type": "trainable",
    "output_index_dims": None,
    "subsampled_index_dims": None,
    "num_z_channels": None,
    "qk_channels": None,
    "v_channels": None,
    "use_query_residual": False,
    "output_w_init": None,
    "concat_preprocessed_input": False,
    "num_heads": 1,
    "name": None,
    "final_project": True,
    **POSITION,
}


def _without(arguments: Arguments, *names: str) -> dict[str, Any]:
    return {name: default for name, default in arguments.items() if name not in names}


CLASSIFICATION_DECODER = {**_without(BASIC_DECODER, "output_num_channels", "output_index_dims"), "num_classes": None}
PROJECTION_DECODER = {"num_classes": None, "final_avg_before_project": False, "name": None}
FLOW_DECODER = {**BASIC_DECODER, "output_num_channels": 2, "output_image_shape": None, "rescale_factor": 100.0}
VIDEO_DECODER = {**_without(BASIC_DECODER, "output_index_dims"), "output_shape": None}
MULTIMODAL_DECODER = {
    **_without(BASIC_DECODER, "output_index_dims", "position_encoding_type", *POSITION),
    "modalities": None,
    "num_outputs": None,
    "min_padding_size": 2,
}

# --- the notebooks' wiring: top level of each model's dict -> default

MASKED_LM = {"vocab_size": REQUIRED, "d_model": REQUIRED, "max_seq_len": REQUIRED, "encoder": {}, "decoder": REQUIRED}
IMAGENET = {
    "num_classes": REQUIRED,
    "input_preprocessor": {},
    "encoder": {},
    "decoder": None,
    "projection_decoder": None,
}
# The scale factor turns the output into pixels, outside the model; its loss and the processor know it.
OPTICAL_FLOW = {
    "train_size": REQUIRED,
    "flow_scale_factor": 20,
    "input_preprocessor": {},
    "encoder": {},
    "decoder": {},
}
MULTIMODAL = {
    "num_frames": None,
    "audio_samples_per_frame": None,
    "samples_per_patch": None,
    "num_classes": None,
    "audio": None,
    "image": None,
    "label": None,
    "multimodal": REQUIRED,
    "encoder": {},
}
MODALITY: dict[str, Any] = {"preprocessor": {}, "decoder": {}}
LABEL: dict[str, Any] = {"decoder": {}}
BOTH_SIDES = {"preprocessor_min_padding_size": 2, "mask_probs": None, "decoder": REQUIRED}
DENSE = {"input_preprocessor": {}, "encoder": {}, "decoder": REQUIRED}


def config_from_deepmind(
    model: str,
    config: Arguments,
    *,
    image_size: Sequence[int] | None = None,
    image_channels: int = 3,
    params: Mapping[str, Mapping[str, Any]] | None = None,
) -> PerceiverIOConfig:
    """The config of the model that DeepMind's classes make of these keyword arguments.

    model: "masked-lm"; "imagenet-learned", "imagenet-fourier", "imagenet-conv" (one wiring; "projection_decoder" may
    stand in for "decoder"); "optical-flow"; "multimodal"; "dense", an answer for every point of a grid.
    image_size (H, W) or (T, H, W), image_channels: what the original sees in its input, where no argument tells.
    params: the checkpoint's parameters, which know the number of trained image positions when image_size is not given.

    Raises ValueError for an unknown model, argument or value, and for a size that is needed and not known.
    """
    if model not in WIRINGS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(WIRINGS)}")
    if image_size is not None and (len(image_size) not in (2, 3) or min(image_size) < 1):
        raise ValueError(f"image_size={tuple(image_size)} must be (height, width) or (frames, height, width)")
    table = (params or {}).get("image_preprocessor/~_build_network_inputs/trainable_position_encoding", {})
    trained = int(table["pos_embs"].shape[0]) if table else None
    size = None if image_size is None else tuple(image_size)
    return PerceiverIOConfig(**WIRINGS[model](config, size, image_channels, trained))


def _masked_lm(config: Arguments, size: Dims | None, channels: int, trained: int | None) -> dict[str, Any]:
    given = _arguments("the config", config, MASKED_LM)
    decoder = _arguments("decoder", given["decoder"], BASIC_DECODER)
    length = given["max_seq_len"]
    dims = _dims("decoder", decoder)
    if math.prod(dims) != length:
        raise ValueError(f"decoder: output_index_dims={dims} are not max_seq_len={length} queries, one per token")
    if decoder["concat_preprocessed_input"]:
        raise ValueError("decoder: concat_preprocessed_input=True needs an input preprocessor; the text model has none")
    position = _spec(POSITION_ENCODINGS, "trainable", num_positions=length, channels=given["d_model"])
    query = {"position": _position("decoder", decoder, dims), "use_input_mask": True}
    if decoder["position_encoding_type"] == "fourier":
        # A shorter text asks the first points of the grid that the model was trained on.
        query["grid"] = list(dims)
    read_out = {"project": decoder["output_num_channels"]} if decoder["final_project"] else {}
    return {
        "vocab_size": given["vocab_size"],
        **_encoder(given["encoder"]),
        **_decoder(decoder),
        "preprocessor": _spec(PREPROCESSORS, "text", channels=given["d_model"], position=position),
        "output_query": _spec(OUTPUT_QUERIES, "position", **query),
        "postprocessor": _spec(POSTPROCESSORS, "tokens", **read_out),
    }


def _imagenet(config: Arguments, size: Dims | None, channels: int, trained: int | None) -> dict[str, Any]:
    given = _arguments("the config", config, IMAGENET)
    dims = (None, None) if size is None else size[-2:]
    preprocessor, _ = _image_preprocessor(given["input_preprocessor"], dims, channels, trained)
    common = {"num_labels": given["num_classes"], **_encoder(given["encoder"]), "preprocessor": preprocessor}
    if given["projection_decoder"] is not None:
        if given["decoder"] is not None:
            raise ValueError("the config has both decoder and projection_decoder; a model has one")
        # final_avg_before_project is read by nothing in the original either: it always averages.
        _arguments("projection_decoder", given["projection_decoder"], PROJECTION_DECODER)
        unused = {"decoder_qk_channels": None, "decoder_v_channels": None, "decoder_num_heads": 1}
        return {**common, **unused, "output_query": None, "postprocessor": _spec(POSTPROCESSORS, "average")}
    decoder = _arguments("decoder", given["decoder"] or {}, CLASSIFICATION_DECODER)
    _needs_read_out("decoder", decoder)
    return {
        **common,
        **_decoder(decoder),
        "output_query": _class_query("decoder", decoder),
        "postprocessor": _spec(POSTPROCESSORS, "classification"),
    }


def _optical_flow(config: Arguments, size: Dims | None, channels: int, trained: int | None) -> dict[str, Any]:
    given = _arguments("the config", config, OPTICAL_FLOW)
    decoder = _arguments("decoder", given["decoder"], FLOW_DECODER)
    _needs_read_out("decoder", decoder)
    # Each of the two frames comes as the 3x3 neighbourhood of every pixel.
    frames = (2, *given["train_size"])
    reading = _arguments("input_preprocessor", given["input_preprocessor"], IMAGE_PREPROCESSOR)
    if reading["prep_type"] != "patches" or reading["temporal_downsample"] != 2:
        raise ValueError(
            "input_preprocessor: the flow decoder asks one query per pixel, so the two frames must be merged: "
            "prep_type='patches' with temporal_downsample=2"
        )
    preprocessor, _ = _image_preprocessor(reading, frames, 9 * channels, trained)
    read_out = {
        "num_outputs": decoder["output_num_channels"],
        "rescale_factor": decoder["rescale_factor"],
        "scale_factor": given["flow_scale_factor"],
    }
    return {
        **_encoder(given["encoder"]),
        **_decoder(decoder),
        "preprocessor": preprocessor,
        "output_query": _spec(OUTPUT_QUERIES, "input"),
        "postprocessor": _spec(POSTPROCESSORS, "flow", **read_out),
    }


def _dense(config: Arguments, size: Dims | None, channels: int, trained: int | None) -> dict[str, Any]:
    given = _arguments("the config", config, DENSE)
    decoder = _arguments("decoder", given["decoder"], BASIC_DECODER)
    dims = size or _guess_dims(_arguments("input_preprocessor", given["input_preprocessor"], IMAGE_PREPROCESSOR))
    preprocessor, _ = _image_preprocessor(given["input_preprocessor"], dims, channels, trained)
    read_out = _spec(POSTPROCESSORS, "identity")
    if decoder["final_project"]:
        read_out = _spec(POSTPROCESSORS, "projection", num_outputs=decoder["output_num_channels"])
    return {
        **_encoder(given["encoder"]),
        **_decoder(decoder),
        "preprocessor": preprocessor,
        "output_query": _grid_query("decoder", decoder, _dims("decoder", decoder)),
        "postprocessor": read_out,
    }


def _multimodal(config: Arguments, size: Dims | None, channels: int, trained: int | None) -> dict[str, Any]:
    given = _arguments("the config", config, MULTIMODAL)
    both = _arguments("multimodal", given["multimodal"], BOTH_SIDES)
    decoder = _arguments("multimodal.decoder", both["decoder"], MULTIMODAL_DECODER)
    inputs: dict[str, Spec] = {}
    queries: dict[str, Spec] = {}
    read_outs: dict[str, Spec] = {}

    def needed(name: str, modality: str) -> Any:
        if given[name] is None:
            raise ValueError(f"the config has {modality!r} and needs {name}")
        return given[name]

    if given["audio"] is not None:
        audio = _arguments("audio", given["audio"], MODALITY)
        samples_per_patch = needed("samples_per_patch", "audio")
        samples = needed("num_frames", "audio") * needed("audio_samples_per_frame", "audio")
        inputs["audio"], patches = _audio_preprocessor(audio["preprocessor"], samples)
        asked = _arguments("audio.decoder", audio["decoder"], BASIC_DECODER)
        if asked["output_index_dims"] is None:
            asked["output_index_dims"] = samples // samples_per_patch
        output = _dims("audio.decoder", asked)
        scale = [output[0] // patches] if len(output) == 1 and output[0] % patches == 0 else None
        queries["audio"] = _grid_query("audio.decoder", asked, output, scale, sampled=True)
        read_outs["audio"] = _spec(POSTPROCESSORS, "audio", samples_per_patch=samples_per_patch)
    if given["image"] is not None:
        image = _arguments("image", given["image"], MODALITY)
        asked = _arguments("image.decoder", image["decoder"], VIDEO_DECODER)
        shape = asked["output_shape"]  # (batch, frames, height, width)
        space = size[-2:] if size is not None else tuple(shape[2:]) if shape is not None else (None, None)
        frames = (needed("num_frames", "image"), *space)
        inputs["image"], scale = _image_preprocessor(
            image["preprocessor"], frames, channels, trained, "image.preprocessor"
        )
        queries["image"] = _grid_query("image.decoder", asked, frames, scale, sampled=True)
        read_outs["image"] = _spec(POSTPROCESSORS, "projection", num_outputs=channels, on_grid=True)
    if given["label"] is not None:
        label = _arguments("label", given["label"], LABEL)
        asked = _arguments("label.decoder", label["decoder"], CLASSIFICATION_DECODER)
        inputs["label"] = _spec(PREPROCESSORS, "vector", channels=needed("num_classes", "label"))
        queries["label"] = _class_query("label.decoder", asked)
        read_outs["label"] = _spec(POSTPROCESSORS, "classification", num_outputs=None)
    masks = both["mask_probs"]
    for name in inputs if masks is not None else ():
        if name not in masks:
            raise ValueError(f"multimodal: mask_probs={masks} must name every modality; {name!r} is missing")
    reading = {"min_padding_size": both["preprocessor_min_padding_size"], "mask_probs": masks}
    read_out = {"channels": decoder["output_num_channels"] if decoder["final_project"] else None}
    return {
        **({} if given["num_classes"] is None else {"num_labels": given["num_classes"]}),
        **_encoder(given["encoder"]),
        **_decoder(decoder),
        "preprocessor": _spec(PREPROCESSORS, "multimodal", modalities=inputs, **reading),
        "output_query": _spec(
            OUTPUT_QUERIES, "multimodal", modalities=queries, min_padding_size=decoder["min_padding_size"]
        ),
        "postprocessor": _spec(POSTPROCESSORS, "multimodal", modalities=read_outs, **read_out),
    }


WIRINGS = {
    "masked-lm": _masked_lm,
    "imagenet-learned": _imagenet,
    "imagenet-fourier": _imagenet,
    "imagenet-conv": _imagenet,
    "optical-flow": _optical_flow,
    "multimodal": _multimodal,
    "dense": _dense,
}


# --- parts


def _encoder(arguments: Arguments) -> dict[str, Any]:
    given = _arguments("encoder", arguments, ENCODER)
    return {
        "num_latents": given["z_index_dim"],
        "d_latents": given["num_z_channels"],
        "num_blocks": given["num_blocks"],
        "num_self_attends_per_block": given["num_self_attends_per_block"],
        "num_self_attention_heads": given["num_self_attend_heads"],
        "num_cross_attention_heads": given["num_cross_attend_heads"],
        "qk_channels": given["qk_channels"],
        "v_channels": given["v_channels"],
        "cross_attention_shape_for_attention": given["cross_attention_shape_for_attn"],
        "self_attention_widening_factor": given["self_attend_widening_factor"],
        "cross_attention_widening_factor": given["cross_attend_widening_factor"],
        "use_query_residual": given["use_query_residual"],
        "dropout": given["dropout_prob"],
        "latents_init_scale": given["z_pos_enc_init_scale"],
    }


def _decoder(given: Arguments) -> dict[str, Any]:
    return {
        "decoder_num_heads": given["num_heads"],
        "decoder_qk_channels": given["qk_channels"],
        "decoder_v_channels": given["v_channels"],
        "decoder_widening_factor": 1,
        "decoder_use_query_residual": given["use_query_residual"],
    }


def _image_preprocessor(
    arguments: Arguments, dims: Dims, channels: int, trained: int | None, where: str = "input_preprocessor"
) -> tuple[Spec, list[int] | None]:
    """Images or videos of `dims` -> the spec, and how many times finer the input is than the stem's grid.

    None where it is not a whole number of times on each axis, or where a video of one patch in time became an image.
    """
    given = _arguments(where, arguments, IMAGE_PREPROCESSOR)
    kind, space, time = given["prep_type"], given["spatial_downsample"], given["temporal_downsample"]
    if kind not in ("conv", "patches", "pixels", "conv1x1"):
        raise ValueError(f"{where}: prep_type={kind!r} must be one of conv, patches, pixels, conv1x1")
    if kind in ("conv", "conv1x1") and time != 1:
        raise ValueError(f"{where}: prep_type={kind!r} cannot have temporal_downsample={time}, only 1")
    # The original passes over the temporal factor when it sees a single image.
    factors = (space, space) if len(dims) == 2 else (time, space, space)
    options: dict[str, Any] = {"in_channels": channels}
    if kind == "conv":
        layers = 0
        while 4**layers < space:
            layers += 1
        if 4**layers != space:
            raise ValueError(f"{where}: prep_type='conv' shrinks by a power of 4, not by spatial_downsample={space}")
        if layers:
            options |= {"channels": given["num_channels"], "num_layers": layers}
            options |= {"use_batchnorm": given["conv2d_use_batchnorm"]}
        else:
            kind = "pixels"  # no layer leaves the pixels as they are
    else:
        options["spatial_downsample"] = space
        if kind == "conv1x1":
            options["channels"] = given["num_channels"]
        elif len(dims) == 3:
            options["temporal_downsample"] = time
        if kind == "patches" and given["conv_after_patching"]:
            options["project"] = given["num_channels"]
    grid: Dims = tuple(None if n is None else -(-n // f) for n, f in zip(dims, factors, strict=True))
    whole = all(n is None or n % f == 0 for n, f in zip(dims, factors, strict=True))
    if kind == "patches" and not whole:
        raise ValueError(f"{where}: patches of {factors} do not divide inputs of {dims}")
    merged = kind == "patches" and len(grid) == 3 and grid[0] == 1
    spec = _placed(where, given, _spec(STEMS, kind, **options), grid[1:] if merged else grid, trained)
    return spec, list(factors) if whole and not merged else None


def _audio_preprocessor(arguments: Arguments, samples: int) -> tuple[Spec, int]:
    """Sound of so many samples -> the spec, and the number of its patches."""
    where = "audio.preprocessor"
    given = _arguments(where, arguments, AUDIO_PREPROCESSOR)
    if given["prep_type"] != "patches":
        raise ValueError(f"{where}: prep_type={given['prep_type']!r} must be patches")
    per_patch = given["samples_per_patch"]
    if samples % per_patch:
        raise ValueError(
            f"{where}: {samples} samples are not a whole number of patches of samples_per_patch={per_patch}"
        )
    stem = _spec(STEMS, "audio_patches", samples_per_patch=per_patch)
    patches = samples // per_patch
    return _placed(where, given, stem, (patches,)), patches


def _placed(where: str, given: Arguments, stem: Spec, grid: Dims, trained: int | None = None) -> Spec:
    """A stem with its positions."""
    combine = given["concat_or_add_pos"]
    if combine not in ("concat", "add"):
        raise ValueError(f"{where}: concat_or_add_pos={combine!r} must be concat or add")
    position = _position(where, given, grid, trained=trained, extra=given["n_extra_pos_mlp"])
    return _spec(PREPROCESSORS, "grid", stem=stem, position=position, combine=combine)


def _grid_query(
    where: str, given: Arguments, dims: Dims, scale: list[int] | None = None, *, sampled: bool = False
) -> Spec:
    """A query for each point of `dims`, told by `scale` times the input's grid where that is known.

    sampled: the original asks this decoder at sub-sampled points, where its coordinates follow another rule.
    """
    concat = given["concat_preprocessed_input"]
    # It cannot sub-sample queries that hold the input's features.
    rule = "sampled" if sampled and not concat else "dense"
    grid: dict[str, Any] = {}
    if scale is None:
        if None in dims:
            raise ValueError(f"{where}: no argument gives the images' size; pass image_size=(height, width)")
        grid = {"grid": list(dims)}
    elif set(scale) != {1}:
        grid = {"scale": scale}
    position = _position(where, given, dims, rule=rule)
    return _spec(OUTPUT_QUERIES, "position", position=position, concat_input=concat, **grid)


def _class_query(where: str, given: Arguments) -> Spec:
    """The one query of a ClassificationDecoder."""
    trainable = given["position_encoding_type"] == "trainable" and given["project_pos_dim"] <= 0
    if not trainable or given["concat_preprocessed_input"]:
        return _grid_query(where, given, (1,))
    position = _position(where, given, (1,))
    options = {name: position[name] for name in ("channels", "init_scale") if name in position}
    return _spec(OUTPUT_QUERIES, "tasks", **options)


def _position(
    where: str, given: Arguments, dims: Dims, *, rule: str = "dense", trained: int | None = None, extra: int = 0
) -> Spec:
    """The position encoding of a grid of `dims`, with projection and extra layers."""
    kind = given["position_encoding_type"]
    if kind not in ("trainable", "fourier"):
        raise ValueError(f"{where}: position_encoding_type={kind!r} must be trainable or fourier")
    name = f"{kind}_position_encoding_kwargs"
    if given[name] is None:
        raise ValueError(f"{where}: position_encoding_type={kind!r} needs {name}")
    if kind == "fourier":
        options = _arguments(f"{where}.{name}", given[name], FOURIER_POSITION)
        bands: dict[str, Any] = {"max_resolution": options["max_resolution"] and list(options["max_resolution"])}
        if not bands["max_resolution"]:
            # The original takes the grid's own size.
            bands = {"max_resolution": None, "num_axes": len(dims)}
        elif len(bands["max_resolution"]) != len(dims):
            raise ValueError(f"{where}: max_resolution={bands['max_resolution']} must have {len(dims)} numbers")
        options = {**_without(options, "max_resolution"), **bands, "rule": rule}
    else:
        options = _arguments(f"{where}.{name}", given[name], TRAINABLE_POSITION)
        known = None if None in dims else math.prod(n for n in dims if n is not None)
        if known is None and trained is None:
            raise ValueError(
                f"{where}: the number of trained positions follows from the images, and no argument gives their size; "
                "pass image_size=(height, width), or the checkpoint's params"
            )
        if known is not None and trained is not None and known != trained:
            raise ValueError(f"{where}: a grid of {dims} has {known} points, the checkpoint trained {trained}")
        options = {
            "num_positions": known or trained,
            "channels": options["num_channels"],
            "init_scale": options["init_scale"],
            "grid": list(dims) if known is not None and len(dims) > 1 else None,
        }
    spec = _spec(POSITION_ENCODINGS, kind, **options)
    channels = given["project_pos_dim"] if given["project_pos_dim"] > 0 else None
    if channels is None and not extra:
        return spec
    return _spec(POSITION_ENCODINGS, "projected", position=spec, channels=channels, num_extra_mlps=extra)


def _dims(where: str, decoder: Arguments) -> tuple[int, ...]:
    dims = decoder["output_index_dims"]
    if dims is None:
        raise ValueError(f"{where} needs output_index_dims")
    return (dims,) if isinstance(dims, int) else tuple(dims)


def _guess_dims(given: Arguments) -> Dims:
    """Image or video, as far as the preprocessor's arguments tell."""
    fourier = given["fourier_position_encoding_kwargs"] or {}
    axes = len(fourier.get("max_resolution") or (0, 0))
    frames = given["temporal_downsample"]
    # Two axes of positions, and frames to merge: they are merged into one.
    return (frames, None, None) if axes == 2 and frames != 1 else (None,) * axes


def _needs_read_out(where: str, decoder: Arguments) -> None:
    if not decoder["final_project"]:
        raise ValueError(f"{where}: final_project=False leaves this decoder without the layer that gives its output")


def _arguments(where: str, given: Any, defaults: Arguments) -> dict[str, Any]:
    """Defaults with what is given; ValueError for an argument that does not exist or is missing."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is a dict of keyword arguments, not {given!r}")
    for name in given:
        if name not in defaults:
            close = difflib.get_close_matches(str(name), defaults, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{where} has no argument {name!r}; {hint}its arguments: {', '.join(defaults)}")
    values = {**defaults, **given}
    missing = [name for name, value in values.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}")
    return values


def _spec(registry: Registry, kind: str, **options: Any) -> Spec:
    """A spec without the options that say what the class does anyway."""
    known = registry.options(kind)
    return {"kind": kind, **{name: value for name, value in options.items() if value != known[name].default}}
