"""Outputs of DeepMind's original code on small models with the options that no released model uses.

    python -m conversion.dump_reference DEEPMIND tests/reference/parity/options

DEEPMIND is a folder that holds DeepMind's `perceiver` package (perceiver.py, io_processors.py, position_encoding.py of
deepmind-research, unchanged). It also takes `pip install jax dm-haiku einops`; nothing else in this repository does.
Writes OUT.npz (results) and OUT.json (keyword arguments, parameter shapes). Weights and inputs are not stored: both are
drawn from their names, from numpy's RandomState, whose stream never changes (NEP 19).
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, dict[str, np.ndarray]]


def _fourier(bands: int, size: list[int] | None = None, **options: Any) -> dict[str, Any]:
    kwargs = {"num_bands": bands, "max_resolution": size, **options}
    return {"position_encoding_type": "fourier", "fourier_position_encoding_kwargs": kwargs}


def _trainable(channels: int) -> dict[str, Any]:
    return {
        "position_encoding_type": "trainable",
        "trainable_position_encoding_kwargs": {"num_channels": channels, "init_scale": 0.02},
    }


def _encoder(**changes: Any) -> dict[str, Any]:
    small = {"z_index_dim": 6, "num_z_channels": 24, "num_blocks": 1, "num_self_attends_per_block": 1}
    return {**small, "num_self_attend_heads": 4, **changes}


def _imagenet(shape: list[int], preprocessor: dict, encoder: dict | None = None, **changes: Any) -> dict[str, Any]:
    config = {"num_classes": 5, "input_preprocessor": preprocessor, "encoder": encoder or _encoder()}
    decoder = {} if "projection_decoder" in changes else {"decoder": {**_trainable(16), "use_query_residual": True}}
    return {"wiring": "imagenet-fourier", "config": {**config, **decoder, **changes}, "inputs": {"images": shape}}


def _dense(shape: list[int], preprocessor: dict, decoder: dict, encoder: dict | None = None) -> dict[str, Any]:
    config = {"input_preprocessor": preprocessor, "encoder": encoder or _encoder(), "decoder": decoder}
    return {"wiring": "dense", "config": config, "inputs": {"images": shape}}


def _text(decoder: dict, encoder: dict | None = None) -> dict[str, Any]:
    query = {"output_index_dims": [20], "output_num_channels": 21, "final_project": False, **decoder}
    config = {"vocab_size": 40, "d_model": 21, "max_seq_len": 20, "encoder": encoder or _encoder(), "decoder": query}
    return {"wiring": "masked-lm", "config": config, "inputs": {"inputs": [3, 20], "input_mask": [3, 20]}}


def _flow(preprocessor: dict, decoder: dict | None = None, encoder: dict | None = None) -> dict[str, Any]:
    config = {
        "train_size": [5, 8],
        "input_preprocessor": {
            "prep_type": "patches",
            "spatial_downsample": 1,
            "temporal_downsample": 2,
            **preprocessor,
        },
        "encoder": encoder or _encoder(),
        # Built and used by nothing: the queries are the inputs.
        "decoder": {**_fourier(2, [5, 8]), **(decoder or {})},
    }
    return {"wiring": "optical-flow", "config": config, "inputs": {"images": [2, 2, 5, 8, 3]}}


def _multimodal(
    image: dict | None = None,
    audio: dict | None = None,
    both: dict | None = None,
    decoder: dict | None = None,
    *,
    image_decoder: dict | None = None,
    audio_decoder: dict | None = None,
    label_decoder: dict | None = None,
    frames: int = 4,
    size: int = 8,
    points: dict[str, int] | None = None,
) -> dict[str, Any]:
    config = {
        "num_frames": frames,
        "audio_samples_per_frame": 12,
        "samples_per_patch": 4,
        "num_classes": 7,
        "image": {
            "preprocessor": {
                "prep_type": "patches",
                "spatial_downsample": 4,
                **_fourier(2, [4, 2, 2]),
                **(image or {}),
            },
            "decoder": {"output_num_channels": 20, **_fourier(2, [4, 2, 2]), **(image_decoder or {})},
        },
        "audio": {
            "preprocessor": {"samples_per_patch": 4, **_fourier(3, [48]), **(audio or {})},
            "decoder": {"output_num_channels": 20, **_fourier(3, [48]), **(audio_decoder or {})},
        },
        "label": {"decoder": {**_trainable(10), **(label_decoder or {})}},
        "multimodal": {
            "preprocessor_min_padding_size": 2,
            "mask_probs": None,
            "decoder": {"output_num_channels": 20, **(decoder or {})},
            **(both or {}),
        },
        "encoder": _encoder(name="encoder"),
    }
    points = {"image": 25, "audio": 5} if points is None else points
    inputs = {"images": [2, frames, size, size, 3], "audio": [2, 12 * frames, 1], "label": [2, 7]}
    return {"wiring": "multimodal", "config": config, "inputs": inputs, "points": points}


PIXELS = {"prep_type": "pixels", "spatial_downsample": 1}

# Case -> wiring, the original constructors' keyword arguments, shapes of the inputs. Between them, every option that
# changes numbers takes every value, or two; the released models' values are covered by their own references.
CASES: dict[str, dict[str, Any]] = {
    # Attention
    "shape_q": _imagenet([2, 5, 7, 3], {**PIXELS, **_fourier(3, [5, 7])}, _encoder(cross_attention_shape_for_attn="q")),
    "heads_widening_blocks": _imagenet(
        [2, 6, 4, 3],
        {**PIXELS, **_fourier(3, [6, 4])},
        _encoder(
            cross_attention_shape_for_attn="q",
            num_cross_attend_heads=3,
            cross_attend_widening_factor=2,
            self_attend_widening_factor=4,
            num_blocks=2,
            num_self_attends_per_block=2,
            use_query_residual=False,
        ),
    ),
    "heads_kv": _imagenet(
        [2, 6, 4, 3], {**PIXELS, **_fourier(4, [6, 4]), "project_pos_dim": 9}, _encoder(num_cross_attend_heads=4)
    ),
    "qk_and_v": _imagenet(
        [2, 6, 4, 3],
        {**PIXELS, **_fourier(3, [6, 4])},
        _encoder(qk_channels=20, v_channels=24, num_cross_attend_heads=2),
        decoder={**_trainable(16), "qk_channels": 12, "v_channels": 18, "num_heads": 3, "use_query_residual": False},
    ),
    "v_only": _imagenet(
        [2, 6, 4, 3],
        {**PIXELS, **_fourier(3, [6, 4])},
        _encoder(v_channels=24, num_self_attends_per_block=11),
        decoder={**_trainable(16), "v_channels": 10, "num_heads": 2, "use_query_residual": True},
    ),
    "no_self_attends": _imagenet(
        [2, 4, 4, 3], {**PIXELS, **_fourier(2, [4, 4])}, _encoder(num_self_attends_per_block=0)
    ),
    # Stems
    "conv_two_layers": _imagenet(
        [1, 35, 50, 3], {"prep_type": "conv", "spatial_downsample": 16, "num_channels": 6, **_fourier(2, [3, 4])}
    ),
    "conv_no_batchnorm": _imagenet(
        [2, 13, 18, 3], {"conv2d_use_batchnorm": False, "num_channels": 6, **_fourier(2, [4, 5])}
    ),
    "conv_odd": _imagenet([2, 15, 9, 3], {"num_channels": 6, **_fourier(2, None)}),
    "conv_no_layer": _imagenet([2, 5, 4, 3], {"prep_type": "conv", "spatial_downsample": 1, **_fourier(2, [5, 4])}),
    "conv1x1_strided": _imagenet(
        [2, 11, 14, 3], {"prep_type": "conv1x1", "spatial_downsample": 3, "num_channels": 6, **_fourier(2, [4, 5])}
    ),
    "pixels_strided": _imagenet([2, 9, 13, 3], {"prep_type": "pixels", "spatial_downsample": 2, **_fourier(2, [5, 7])}),
    "patches": _imagenet([2, 6, 9, 3], {"prep_type": "patches", "spatial_downsample": 3, **_fourier(2, [2, 3])}),
    "patches_linear": _imagenet(
        [2, 6, 8, 3],
        {
            "prep_type": "patches",
            "spatial_downsample": 2,
            "temporal_downsample": 2,  # passed over: these are images
            "conv_after_patching": True,
            "num_channels": 10,
            **_fourier(2, [3, 4]),
        },
    ),
    # Positions
    "sine_only": _imagenet([2, 5, 4, 3], {**PIXELS, **_fourier(3, [5, 4], sine_only=True)}),
    "no_raw_positions": _imagenet([2, 5, 4, 3], {**PIXELS, **_fourier(3, [9, 12], concat_pos=False)}),
    "sine_only_no_raw_positions": _imagenet(
        [2, 5, 4, 3], {**PIXELS, **_fourier(1, [5, 4], concat_pos=False, sine_only=True)}
    ),
    "own_resolution": _imagenet([2, 5, 4, 3], {**PIXELS, **_fourier(3, None)}),
    "extra_mlp_1": _imagenet([2, 5, 4, 3], {**PIXELS, **_fourier(2, [5, 4]), "n_extra_pos_mlp": 1}),
    "extra_mlp_2_trained": _imagenet([2, 5, 4, 3], {**PIXELS, **_trainable(6), "n_extra_pos_mlp": 2}),
    "extra_mlp_3_projected": _imagenet(
        [2, 5, 4, 3], {**PIXELS, **_fourier(2, [5, 4]), "n_extra_pos_mlp": 3, "project_pos_dim": 7}
    ),
    "add_projected_fourier": _imagenet(
        [2, 5, 4, 3],
        {
            "prep_type": "conv1x1",
            "spatial_downsample": 1,
            "num_channels": 12,
            "concat_or_add_pos": "add",
            "project_pos_dim": 12,
            **_fourier(3, [5, 4]),
        },
    ),
    "add_trained": _imagenet(
        [2, 6, 4, 3],
        {"prep_type": "patches", "spatial_downsample": 2, "concat_or_add_pos": "add", **_trainable(12)},
    ),
    "project_trained": _imagenet([2, 5, 4, 3], {**PIXELS, **_trainable(6), "project_pos_dim": 9}),
    "free_positions": {
        **_imagenet([2, 5, 4, 3], {**PIXELS, **_fourier(3, [5, 4])}),
        "inputs": {"images": [2, 5, 4, 3], "pos": [2, 20, 2]},
    },
    "masked_pixels": {
        **_imagenet([3, 5, 4, 3], {**PIXELS, **_fourier(3, [5, 4])}),
        "inputs": {"images": [3, 5, 4, 3], "input_mask": [3, 20]},
    },
    # Read-outs of one class query, and none
    "average": _imagenet([2, 5, 4, 3], {**PIXELS, **_fourier(3, [5, 4])}, projection_decoder={}),
    "class_query_fourier": _imagenet(
        [2, 5, 4, 3],
        {**PIXELS, **_fourier(3, [5, 4])},
        decoder={**_fourier(4, [8]), "project_pos_dim": 16, "use_query_residual": True},
    ),
    "class_query_projected": _imagenet(
        [2, 5, 4, 3], {**PIXELS, **_fourier(3, [5, 4])}, decoder={**_trainable(6), "project_pos_dim": 16}
    ),
    # Dense outputs
    "dense_trained": _dense(
        [2, 5, 4, 3],
        {**PIXELS, **_fourier(3, [5, 4])},
        {**_trainable(14), "output_index_dims": [3, 6], "output_num_channels": 4, "num_heads": 2},
    ),
    "dense_own_resolution": _dense(
        [2, 5, 4, 3],
        {**PIXELS, **_fourier(3, None)},
        {**_fourier(3, None), "output_index_dims": [7, 3], "output_num_channels": 4, "project_pos_dim": 11},
    ),
    "dense_features": _dense(
        [2, 5, 4, 3],
        {**PIXELS, **_fourier(3, [5, 4])},
        {**_trainable(14), "output_index_dims": 9, "output_num_channels": 4, "final_project": False},
    ),
    "dense_concat_conv": _dense(
        [2, 16, 12, 3],
        {"num_channels": 6, **_fourier(2, [4, 3])},
        {
            **_trainable(8),
            "output_index_dims": [4, 3],
            "output_num_channels": 4,
            "concat_preprocessed_input": True,
            "use_query_residual": True,
        },
    ),
    "dense_concat_added": _dense(
        [2, 6, 4, 3],
        {"prep_type": "patches", "spatial_downsample": 2, "concat_or_add_pos": "add", **_trainable(12)},
        {
            **_fourier(2, [3, 2]),
            "output_index_dims": [3, 2],
            "output_num_channels": 4,
            "concat_preprocessed_input": True,
        },
    ),
    "dense_video": _dense(
        [2, 4, 6, 4, 3],
        {"prep_type": "patches", "spatial_downsample": 2, "temporal_downsample": 2, **_fourier(2, [2, 3, 2])},
        {**_fourier(2, [4, 6, 4]), "output_index_dims": [4, 6, 4], "output_num_channels": 2},
    ),
    "dense_video_strided_pixels": _dense(
        [2, 5, 5, 7, 3],
        {"prep_type": "pixels", "spatial_downsample": 3, "temporal_downsample": 2, **_fourier(2, [3, 2, 3])},
        {**_trainable(14), "output_index_dims": [6], "output_num_channels": 2},
    ),
    "dense_video_conv": _dense(
        [2, 3, 9, 6, 3],
        {"prep_type": "conv", "num_channels": 6, **_fourier(2, [3, 3, 2])},
        {**_trainable(14), "output_index_dims": [6], "output_num_channels": 2},
    ),
    "dense_video_conv1x1": _dense(
        [2, 3, 5, 6, 3],
        {"prep_type": "conv1x1", "spatial_downsample": 2, "num_channels": 6, **_fourier(2, [3, 3, 3])},
        {**_trainable(14), "output_index_dims": [6], "output_num_channels": 2},
    ),
    "dense_video_merged": _dense(
        [2, 2, 4, 6, 3],
        {"prep_type": "patches", "spatial_downsample": 2, "temporal_downsample": 2, **_fourier(2, [2, 3])},
        {**_trainable(14), "output_index_dims": [6], "output_num_channels": 2},
    ),
    # Text
    "text_fourier_query": _text(_fourier(10, [20])),
    "text_two_axes_query": _text(
        {**_fourier(4, [4, 5], concat_pos=False), "output_index_dims": [4, 5], "project_pos_dim": 21}
    ),
    "text_read_out": _text(
        {**_trainable(15), "final_project": True, "num_heads": 3, "use_query_residual": True},
        _encoder(cross_attention_shape_for_attn="q", num_blocks=2),
    ),
    "text_projected_query": _text(
        {**_trainable(9), "project_pos_dim": 21, "qk_channels": 16, "v_channels": 12, "num_heads": 4},
        _encoder(qk_channels=16, v_channels=24, num_cross_attend_heads=8, cross_attend_widening_factor=2),
    ),
    # Flow
    "flow_no_linear": _flow(
        {**_fourier(3, [5, 8]), "n_extra_pos_mlp": 2},
        {"rescale_factor": 50.0, "output_num_channels": 3, "use_query_residual": True},
    ),
    "flow_trained": _flow(
        {**_trainable(7), "project_pos_dim": 10, "conv_after_patching": True, "num_channels": 12},
        {"qk_channels": 16, "v_channels": 24, "num_heads": 4},
    ),
    "flow_added": _flow(
        {
            **_fourier(3, None),
            "project_pos_dim": 12,
            "conv_after_patching": True,
            "num_channels": 12,
            "concat_or_add_pos": "add",
        },
        encoder=_encoder(num_cross_attend_heads=3, cross_attention_shape_for_attn="kv"),
    ),
    # Several modalities
    "multimodal_no_masks": _multimodal(both={"preprocessor_min_padding_size": 0}, decoder={"min_padding_size": 0}),
    "multimodal_masks": _multimodal(
        both={"mask_probs": {"image": 1.0, "audio": 0.0, "label": 0.0}, "preprocessor_min_padding_size": 5}
    ),
    "multimodal_video_patches": _multimodal(
        {
            "spatial_downsample": 2,
            "temporal_downsample": 2,
            "conv_after_patching": True,
            "num_channels": 10,
            "n_extra_pos_mlp": 1,
            **_fourier(2, None),
        },
        image_decoder=_fourier(2, None),
        decoder={"num_heads": 2, "qk_channels": 12, "v_channels": 20, "use_query_residual": True},
    ),
    "multimodal_video_pixels": _multimodal(
        {"prep_type": "pixels", "spatial_downsample": 2, "temporal_downsample": 2, **_fourier(2, [2, 4, 4])}
    ),
    "multimodal_video_conv": _multimodal(
        {"prep_type": "conv", "num_channels": 5}, image_decoder={"project_pos_dim": 9}
    ),
    "multimodal_merged_frames": {
        **_multimodal({"temporal_downsample": 2, **_fourier(3, [2, 2])}, frames=2),
        "image_size": [8, 8],
    },
    "multimodal_trained_audio": _multimodal(
        audio={**_trainable(6), "project_pos_dim": 8, "n_extra_pos_mlp": 2, "samples_per_patch": 8},
        label_decoder={"project_pos_dim": 12},
    ),
    "multimodal_added_audio": _multimodal(
        audio={**_trainable(4), "concat_or_add_pos": "add"}, audio_decoder={"project_pos_dim": 6}
    ),
    "multimodal_concat": _multimodal(
        {"prep_type": "conv1x1", "spatial_downsample": 1, "num_channels": 5, **_trainable(6)},
        size=3,
        image_decoder={**_trainable(6), "concat_preprocessed_input": True},
        audio_decoder={"concat_preprocessed_input": True},
        label_decoder={"concat_preprocessed_input": True},
        decoder={"final_project": False},
        points={},
    )
    | {"image_size": [3, 3]},
}


# --- weights and inputs, drawn from their names


def _normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return random.standard_normal(shape).astype(np.float32)


def draw_weights(shapes: Mapping[str, Mapping[str, Any]]) -> tuple[Arrays, Arrays]:
    """Haiku's module path -> name -> shape -> params and state, all of them far from their initial values."""
    params: Arrays = {}
    state: Arrays = {}
    for module, arrays in shapes.items():
        for name, shape in arrays.items():
            value = _normal(f"{module}/{name}", tuple(shape))
            moment = module.rpartition("/")[2]
            if moment in ("mean_ema", "var_ema"):
                if name == "counter":
                    value = np.array(7, np.int32)
                elif moment == "var_ema":
                    value = 1 + np.abs(value)
                state.setdefault(module, {})[name] = value
                continue
            if name == "w":
                value = value * np.float32(max(np.prod(shape[:-1]), 1) ** -0.5)
            elif name == "scale":
                value = 1 + np.float32(0.2) * value
            elif name in ("pos_embs", "embeddings"):
                value = np.float32(0.7) * value
            else:
                value = np.float32(0.2) * value
            params.setdefault(module, {})[name] = value
    return params, state


def draw_inputs(name: str, case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays in DeepMind's layout, channels last: images, audio, label, pos, or inputs; input_mask; subsample_*."""
    arrays = {}
    for what, shape in case["inputs"].items():
        value = _normal(f"{name}/{what}", tuple(shape))
        if what == "inputs":
            value = (np.abs(value) * 1000).astype(np.int32) % case["config"]["vocab_size"]
        elif what == "input_mask":
            value = (value > -0.5).astype(np.int32)
            value[-1] = 0  # no valid element
        elif what == "pos":
            value = np.tanh(value)
        arrays[what] = value
    grids = {"image": case["inputs"].get("images", [])[1:-1]}
    if "audio" in case["inputs"]:
        grids["audio"] = [case["inputs"]["audio"][1] // case["config"]["samples_per_patch"]]
    for what, count in case.get("points", {}).items():
        random = np.random.RandomState(zlib.crc32(f"{name}/points/{what}".encode()))
        arrays[f"subsample_{what}"] = random.permutation(int(np.prod(grids[what])))[:count].astype(np.int32)
    return arrays


# --- the original


def run_original(deepmind: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every case through DeepMind's code -> arrays by "case/what", and the description of each case."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(deepmind))
    import haiku as hk
    import jax

    arrays: dict[str, Any] = {}
    described = {}
    for name, case in CASES.items():
        inputs = draw_inputs(name, case)
        seen: dict[str, Any] = {}
        # Batch norm has no state before its first training step.
        start = hk.transform_with_state(lambda inputs, case=case: _forward(case, inputs, {}, is_training=True))
        forward = hk.transform_with_state(lambda inputs, case=case, seen=seen: _forward(case, inputs, seen))
        key = jax.random.PRNGKey(0)
        shapes: dict[str, dict[str, list[int]]] = {}
        for tree in jax.eval_shape(start.init, key, inputs):
            for module, members in tree.items():
                shapes.setdefault(module, {}).update({n: list(value.shape) for n, value in members.items()})
        outputs, _ = forward.apply(*draw_weights(shapes), key, inputs)
        outputs = outputs if isinstance(outputs, dict) else {"": outputs}
        seen.update({f"outputs_{what}" if what else "outputs": value for what, value in outputs.items()})
        arrays.update({f"{name}/{what}": np.asarray(value) for what, value in seen.items()})
        described[name] = {**case, "shapes": shapes}
    return arrays, described


def _forward(
    case: Mapping[str, Any], inputs: Mapping[str, Any], seen: dict[str, Any], is_training: bool = False
) -> Any:
    """One model, wired as in the notebooks; `seen` takes what goes on inside."""
    import haiku as hk

    def watch(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        kind = type(context.module).__name__
        if kind == "PerceiverEncoder" and context.method_name == "__call__":
            seen.update(encoder_inputs=args[0], z=result)
        # The outermost decoder comes last.
        if context.method_name == "decoder_query" and result is not None:
            seen["decoder_query"] = result
        return result

    with hk.intercept_methods(watch):
        return _MODELS[case["wiring"]](case, inputs, is_training)


def _perceiver(inputs: Any, decoder: Any, case: Mapping[str, Any], **options: Any) -> Any:
    from perceiver import perceiver

    encoder = perceiver.PerceiverEncoder(**case["config"]["encoder"])
    call = options.pop("call")
    return perceiver.Perceiver(encoder=encoder, decoder=decoder, **options)(inputs, **call)


def _masked_lm(case: Mapping[str, Any], inputs: Mapping[str, Any], is_training: bool) -> Any:
    import haiku as hk
    from perceiver import io_processors, perceiver, position_encoding

    config, mask = case["config"], inputs["input_mask"]
    embedding = hk.Embed(vocab_size=config["vocab_size"], embed_dim=config["d_model"])
    position = position_encoding.TrainablePositionEncoding(config["max_seq_len"], num_channels=config["d_model"])
    embedded = embedding(inputs["inputs"]) + position(mask.shape[0])
    call = {"input_mask": mask, "query_mask": mask, "is_training": is_training}
    decoded = _perceiver(embedded, perceiver.BasicDecoder(**config["decoder"]), case, call=call)
    return io_processors.EmbeddingDecoder(embedding.embeddings)(decoded)


def _images(case: Mapping[str, Any], inputs: Mapping[str, Any], is_training: bool) -> Any:
    from perceiver import io_processors, perceiver

    config, images = case["config"], inputs["images"]
    if case["wiring"] == "dense":
        decoder = perceiver.BasicDecoder(**config["decoder"])
    elif case["wiring"] == "optical-flow":
        images = io_processors.patches_for_flow(images)
        decoder = perceiver.FlowDecoder(config["train_size"], **config["decoder"])
    elif "projection_decoder" in config:
        decoder = perceiver.ProjectionDecoder(config["num_classes"], **config["projection_decoder"])
    else:
        decoder = perceiver.ClassificationDecoder(config["num_classes"], **config["decoder"])
    preprocessor = io_processors.ImagePreprocessor(**config["input_preprocessor"])
    call = {name: inputs[name] for name in ("pos", "input_mask") if name in inputs}
    call["is_training"] = is_training
    return _perceiver(images, decoder, case, input_preprocessor=preprocessor, call=call)


def _modalities(case: Mapping[str, Any], inputs: Mapping[str, Any], is_training: bool) -> Any:
    from perceiver import io_processors, perceiver

    config, both = case["config"], case["config"]["multimodal"]
    images, audio = inputs["images"], inputs["audio"]
    patches = audio.shape[1] // config["samples_per_patch"]
    points = {what: inputs[f"subsample_{what}"] for what in ("image", "audio") if f"subsample_{what}" in inputs}
    whole = {"image": int(np.prod(images.shape[1:4])), "audio": patches, "label": 1}
    preprocessor = io_processors.MultimodalPreprocessor(
        min_padding_size=both["preprocessor_min_padding_size"],
        modalities={
            "audio": io_processors.AudioPreprocessor(**config["audio"]["preprocessor"]),
            "image": io_processors.ImagePreprocessor(**config["image"]["preprocessor"]),
            "label": io_processors.OneHotPreprocessor(),
        },
        mask_probs=both["mask_probs"],
    )
    decoder = perceiver.MultimodalDecoder(
        # Given also when every point is asked for: without them the original cuts the outputs at the inputs' sizes.
        subsampled_index_dims={**whole, **{what: chosen.shape[0] for what, chosen in points.items()}},
        modalities={
            "audio": perceiver.BasicDecoder(output_index_dims=(patches,), **config["audio"]["decoder"]),
            "image": perceiver.BasicVideoAutoencodingDecoder(
                output_shape=images.shape[:4], **config["image"]["decoder"]
            ),
            "label": perceiver.ClassificationDecoder(num_classes=config["num_classes"], **config["label"]["decoder"]),
        },
        num_outputs=None,
        **both["decoder"],
    )
    postprocessor = io_processors.MultimodalPostprocessor(
        modalities={
            "audio": io_processors.AudioPostprocessor(samples_per_patch=config["samples_per_patch"]),
            "image": io_processors.ProjectionPostprocessor(num_outputs=3),
            "label": io_processors.ClassificationPostprocessor(num_classes=config["num_classes"]),
        }
    )
    return _perceiver(
        {"image": images, "audio": audio, "label": inputs["label"]},
        decoder,
        case,
        input_preprocessor=preprocessor,
        output_postprocessor=postprocessor,
        call={"subsampled_output_points": points, "is_training": is_training},
    )


_MODELS = {
    "masked-lm": _masked_lm,
    "imagenet-fourier": _images,
    "optical-flow": _images,
    "dense": _images,
    "multimodal": _modalities,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deepmind", type=Path, help="folder that holds DeepMind's `perceiver` package")
    parser.add_argument("out", type=Path, help="where to write, without the ending")
    arguments = parser.parse_args()
    arrays, described = run_original(arguments.deepmind)
    partial = arguments.out.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(arguments.out.with_suffix(".npz"))
    partial = arguments.out.with_suffix(".partial.json")
    partial.write_text(_compact(described))
    partial.replace(arguments.out.with_suffix(".json"))
    print(f"{len(described)} cases, {len(arrays)} arrays -> {arguments.out}.npz, .json")


def _compact(described: Mapping[str, Any]) -> str:
    """JSON with one line per case."""
    lines = (f"{json.dumps(name)}: {json.dumps(case)}" for name, case in described.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
