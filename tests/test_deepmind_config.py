"""conversion/deepmind_config.py: the released arguments give the recipes, and nothing is passed over in silence.

What each option does to the numbers is in tests/parity/test_options.py. The released arguments below are those of
deepmind-research perceiver/colabs, whose sizes the parameter trees in tests/reference/parity/manifests confirm.
"""

import copy
import inspect
import json
from typing import Any

import pytest
import torch
from parity.deepmind import MODELS, PARITY

from conversion.deepmind_config import WIRINGS, config_from_deepmind
from hf_perceiver import PerceiverIOConfig, PerceiverIOModel, recipes
from hf_perceiver.registry import OUTPUT_QUERIES, POSITION_ENCODINGS, POSTPROCESSORS, PREPROCESSORS, STEMS

IMAGENET_ENCODER = {
    "num_self_attends_per_block": 6,
    "num_blocks": 8,
    "z_index_dim": 512,
    "num_z_channels": 1024,
    "num_cross_attend_heads": 1,
    "num_self_attend_heads": 8,
    "cross_attend_widening_factor": 1,
    "self_attend_widening_factor": 1,
    "dropout_prob": 0,
    "z_pos_enc_init_scale": 0.02,
    "cross_attention_shape_for_attn": "kv",
    "use_query_residual": True,
}
VIDEO = {"concat_pos": True, "max_resolution": [16, 56, 56], "num_bands": 32, "sine_only": False}
SOUND = {"concat_pos": True, "max_resolution": [30_720], "num_bands": 192, "sine_only": False}


def trained(channels: int) -> dict[str, Any]:
    return {
        "position_encoding_type": "trainable",
        "trainable_position_encoding_kwargs": {"num_channels": channels, "init_scale": 0.02},
    }


def fourier(**kwargs: Any) -> dict[str, Any]:
    return {"position_encoding_type": "fourier", "fourier_position_encoding_kwargs": kwargs}


def imagenet(preprocessor: dict[str, Any], use_query_residual: bool = True) -> dict[str, Any]:
    decoder = {"num_z_channels": 1024, **trained(1024), "use_query_residual": use_query_residual}
    return {
        "num_classes": 1000,
        "input_preprocessor": preprocessor,
        "encoder": IMAGENET_ENCODER,
        "decoder": decoder,
    }


# model -> its recipe, and the released arguments
RELEASED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "masked-lm": (
        recipes.language_bytes,
        {
            "vocab_size": 262,
            "d_model": 768,
            "max_seq_len": 2048,
            "encoder": {
                "num_self_attends_per_block": 26,
                "num_blocks": 1,
                "z_index_dim": 256,
                "num_z_channels": 1280,
                "num_self_attend_heads": 8,
                "num_cross_attend_heads": 8,
                "qk_channels": 8 * 32,
                "v_channels": 1280,
                "use_query_residual": True,
                "cross_attend_widening_factor": 1,
                "self_attend_widening_factor": 1,
            },
            "decoder": {
                "output_num_channels": 1280,
                **trained(768),
                "output_index_dims": 2048,
                "num_z_channels": 1280,
                "qk_channels": 8 * 32,
                "v_channels": 768,
                "num_heads": 8,
                "final_project": False,
                "use_query_residual": False,
            },
        },
        {},
    ),
    "imagenet-learned": (
        recipes.imagenet_learned,
        imagenet(
            {
                **trained(256),
                "prep_type": "conv1x1",
                "project_pos_dim": 256,
                "num_channels": 256,
                "spatial_downsample": 1,
                "concat_or_add_pos": "concat",
            },
            use_query_residual=False,
        ),
        {"image_size": (224, 224)},
    ),
    "imagenet-fourier": (
        recipes.imagenet_fourier,
        imagenet(
            {
                **fourier(concat_pos=True, max_resolution=[224, 224], num_bands=64, sine_only=False),
                "prep_type": "pixels",
                "spatial_downsample": 1,
            }
        ),
        {},
    ),
    "imagenet-conv": (
        recipes.imagenet_conv,
        imagenet(
            {**fourier(concat_pos=True, max_resolution=[56, 56], num_bands=64, sine_only=False), "prep_type": "conv"}
        ),
        {},
    ),
    "optical-flow": (
        recipes.optical_flow,
        {
            "train_size": [368, 496],
            "input_preprocessor": {
                **fourier(num_bands=64, max_resolution=[368, 496], sine_only=False, concat_pos=True),
                "n_extra_pos_mlp": 0,
                "prep_type": "patches",
                "spatial_downsample": 1,
                "conv_after_patching": True,
                "temporal_downsample": 2,
            },
            "encoder": {
                "num_self_attends_per_block": 24,
                "num_blocks": 1,
                "z_index_dim": 2048,
                "num_cross_attend_heads": 1,
                "num_z_channels": 512,
                "num_self_attend_heads": 16,
                "cross_attend_widening_factor": 1,
                "self_attend_widening_factor": 1,
                "dropout_prob": 0.0,
                "name": "perceiver_encoder",
            },
            "decoder": {
                "rescale_factor": 100.0,
                "use_query_residual": False,
                "output_num_channels": 2,
                **fourier(concat_pos=True, max_resolution=[368, 496], num_bands=64, sine_only=False),
            },
        },
        {},
    ),
    "multimodal": (
        recipes.multimodal_autoencoder,
        {
            "num_frames": 16,
            "audio_samples_per_frame": 48_000 // 25,
            "samples_per_patch": 16,
            "num_classes": 700,
            "audio": {
                "preprocessor": {
                    **fourier(**SOUND),
                    "n_extra_pos_mlp": 0,
                    "prep_type": "patches",
                    "samples_per_patch": 16,
                },
                "decoder": {"output_num_channels": 512, "use_query_residual": False, **fourier(**SOUND)},
            },
            "image": {
                "preprocessor": {
                    **fourier(**VIDEO),
                    "n_extra_pos_mlp": 0,
                    "prep_type": "patches",
                    "spatial_downsample": 4,
                    "temporal_downsample": 1,
                },
                "decoder": {"output_num_channels": 512, "use_query_residual": False, **fourier(**VIDEO)},
            },
            "label": {"decoder": {"use_query_residual": False, **trained(1024)}},
            "multimodal": {
                "preprocessor_min_padding_size": 4,
                "mask_probs": {"image": 0.0, "audio": 0.0, "label": 1.0},
                "decoder": {"output_num_channels": 512, "use_query_residual": False},
            },
            "encoder": {
                "num_self_attends_per_block": 8,
                "num_blocks": 1,
                "z_index_dim": 28 * 28,
                "num_z_channels": 512,
                "num_cross_attend_heads": 1,
                "num_self_attend_heads": 8,
                "cross_attend_widening_factor": 1,
                "self_attend_widening_factor": 1,
                "name": "encoder",
            },
        },
        {},
    ),
}
REGISTRIES = (PREPROCESSORS, STEMS, POSITION_ENCODINGS, OUTPUT_QUERIES, POSTPROCESSORS)


def written_out(spec: Any) -> Any:
    """A spec with every option that its class would take by default."""
    if isinstance(spec, list | tuple):
        return [written_out(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    spec = {name: written_out(value) for name, value in spec.items()}
    for registry in REGISTRIES:
        if spec.get("kind") in registry.classes and set(spec) - {"kind"} <= set(registry.options(spec["kind"])):
            options = registry.options(spec["kind"])
            defaults = {n: p.default for n, p in options.items() if p.default is not inspect.Parameter.empty}
            return {**defaults, **spec}
    return spec


def small(model: str) -> tuple[str, dict[str, Any]]:
    """The wiring and the arguments of a stored small model, to be changed."""
    return MODELS[model], copy.deepcopy(json.loads((PARITY / f"{model}_a.json").read_text())["config"])


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    inner = config
    *way, last = path.split(".")
    for name in way:
        inner = inner[name]
    inner[last] = value
    return config


# --- what comes out


@pytest.mark.parametrize("model", RELEASED)
def test_the_released_arguments_give_the_recipe(model):
    recipe, arguments, known = RELEASED[model]
    ours, theirs = config_from_deepmind(model, arguments, **known), recipe()
    sides = ("preprocessor", "output_query", "postprocessor")
    for side in sides:
        assert written_out(getattr(ours, side)) == written_out(getattr(theirs, side))
    a, b = (config.to_dict() for config in (ours, theirs))
    assert {k: v for k, v in a.items() if k not in sides} == {k: v for k, v in b.items() if k not in sides}


@pytest.mark.parametrize("model", RELEASED)
def test_the_config_survives_the_way_through_json(model):
    _, arguments, known = RELEASED[model]
    config = config_from_deepmind(model, arguments, **known)
    again = PerceiverIOConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()


def test_arguments_that_are_not_given_have_deepminds_defaults():
    config = config_from_deepmind(
        "imagenet-conv",
        {
            "num_classes": 3,
            "input_preprocessor": fourier(num_bands=2, max_resolution=[4, 4]),
            "decoder": {"trainable_position_encoding_kwargs": {}},
        },
    )
    encoder = {"num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6}
    heads = {"num_self_attention_heads": 8, "num_cross_attention_heads": 1, "decoder_num_heads": 1}
    widening = {"self_attention_widening_factor": 1, "cross_attention_widening_factor": 1, "decoder_widening_factor": 1}
    widths = {name: None for name in ("qk_channels", "v_channels", "decoder_qk_channels", "decoder_v_channels")}
    residuals = {"use_query_residual": True, "decoder_use_query_residual": False}
    for name, value in {**encoder, **heads, **widening, **widths, **residuals}.items():
        assert getattr(config, name) == value, name
    assert config.preprocessor["stem"] == {"kind": "conv"}  # 64 channels, one layer, batch norm
    assert config.output_query == {"kind": "tasks", "channels": 128}


def test_image_positions_are_counted_from_the_size_or_from_the_checkpoint():
    wiring, arguments = small("imagenet_learned")
    table = torch.zeros(144, 24)
    path = "image_preprocessor/~_build_network_inputs/trainable_position_encoding"
    by_params = config_from_deepmind(wiring, arguments, params={path: {"pos_embs": table}})
    by_size = config_from_deepmind(wiring, arguments, image_size=(9, 16))
    assert by_params.preprocessor["position"]["position"] == {"kind": "trainable", "num_positions": 144, "channels": 24}
    # The size tells the layout too, which interpolation needs.
    assert by_size.preprocessor["position"]["position"]["grid"] == [9, 16]
    with pytest.raises(ValueError, match=r"image_size=\(height, width\), or the checkpoint's params"):
        config_from_deepmind(wiring, arguments)
    with pytest.raises(ValueError, match="100 points, the checkpoint trained 144"):
        config_from_deepmind(wiring, arguments, image_size=(10, 10), params={path: {"pos_embs": table}})


def test_images_of_other_channels():
    wiring, arguments = small("imagenet_fourier")
    with torch.device("meta"):
        model = PerceiverIOModel(config_from_deepmind(wiring, arguments, image_channels=5))
    assert model.preprocessor.channels == 5 + 2 * (2 * 6 + 1)


def test_a_modality_may_be_left_out():
    wiring, arguments = small("multimodal")
    del arguments["audio"], arguments["audio_samples_per_frame"], arguments["samples_per_patch"]
    config = config_from_deepmind(wiring, arguments)
    assert set(config.preprocessor["modalities"]) == set(config.output_query["modalities"]) == {"image", "label"}


def test_what_only_initialises_or_names_changes_nothing():
    wiring, arguments = small("extra_concat_query")
    plain = config_from_deepmind(wiring, arguments).to_dict()
    for path, value in {
        "decoder.output_w_init": "zeros",
        "decoder.name": "basic_decoder",
        "decoder.subsampled_index_dims": [3],
        "decoder.num_z_channels": 5,
        "encoder.name": "encoder",
        "input_preprocessor.name": "images",
    }.items():
        changed(arguments, path, value)
    assert config_from_deepmind(wiring, arguments).to_dict() == plain


# --- what is refused


@pytest.mark.parametrize("model", MODELS)
def test_an_unknown_argument_is_named_wherever_it_stands(model):
    wiring, arguments = small(model)
    places = [""] + [name + "." for name, value in arguments.items() if isinstance(value, dict)]
    for place in places:
        broken = changed(copy.deepcopy(arguments), f"{place}num_layer", 3)
        with pytest.raises(ValueError, match="no argument 'num_layer'"):
            config_from_deepmind(wiring, broken, image_size=(12, 12))


@pytest.mark.parametrize(
    ("model", "path", "value", "message"),
    [
        ("imagenet_fourier", "input_preprocessor.prep_type", "pixel", "prep_type='pixel' must be one of conv, patches"),
        (
            "imagenet_fourier",
            "input_preprocessor.concat_or_add_pos",
            "sum",
            "concat_or_add_pos='sum' must be concat or add",
        ),
        (
            "imagenet_fourier",
            "input_preprocessor.position_encoding_type",
            "sine",
            "'sine' must be trainable or fourier",
        ),
        ("imagenet_fourier", "decoder.position_encoding_type", "none", "'none' must be trainable or fourier"),
        ("imagenet_fourier", "input_preprocessor.fourier_position_encoding_kwargs", None, "needs fourier_position"),
        ("imagenet_fourier", "input_preprocessor.fourier_position_encoding_kwargs", {}, "needs num_bands"),
        ("imagenet_conv", "input_preprocessor.spatial_downsample", 8, "power of 4, not by spatial_downsample=8"),
        ("imagenet_conv", "input_preprocessor.temporal_downsample", 2, "cannot have temporal_downsample=2"),
        ("imagenet_fourier", "encoder.cross_attention_shape_for_attn", "v", "cross_attention_shape_for_attention"),
        ("imagenet_fourier", "encoder.num_self_attend_heads", 5, "num_self_attention_heads=5"),
        ("imagenet_fourier", "decoder.final_project", False, "without the layer that gives its output"),
        ("optical_flow", "decoder.final_project", False, "without the layer that gives its output"),
        ("optical_flow", "input_preprocessor.temporal_downsample", 1, "two frames must be merged"),
        ("optical_flow", "input_preprocessor.prep_type", "pixels", "two frames must be merged"),
        ("optical_flow", "input_preprocessor.spatial_downsample", 5, "do not divide"),
        ("masked_lm", "decoder.output_index_dims", 32, "not max_seq_len=64 queries"),
        ("masked_lm", "decoder.concat_preprocessed_input", True, "the text model has none"),
        ("extra_concat_query", "decoder.output_index_dims", None, "needs output_index_dims"),
        ("extra_concat_query", "encoder", 3, "encoder is a dict of keyword arguments, not 3"),
        ("multimodal", "multimodal.mask_probs", {"image": 0.5, "audio": 0.1}, "'label' is missing"),
        ("multimodal", "audio.preprocessor.prep_type", "conv", "prep_type='conv' must be patches"),
        ("multimodal", "audio.preprocessor.samples_per_patch", 9, "not a whole number of patches"),
        ("multimodal", "num_frames", None, "needs num_frames"),
        ("multimodal", "image.preprocessor.temporal_downsample", 3, "do not divide"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(model, path, value, message):
    wiring, arguments = small(model)
    with pytest.raises(ValueError, match=message):
        config_from_deepmind(wiring, changed(arguments, path, value))


def test_positions_of_another_number_of_axes_are_refused():
    wiring, arguments = small("multimodal")
    changed(
        arguments, "image.preprocessor.fourier_position_encoding_kwargs", {"num_bands": 2, "max_resolution": [4, 4]}
    )
    with pytest.raises(ValueError, match=r"max_resolution=\[4, 4\] must have 3 numbers"):
        config_from_deepmind(wiring, arguments)


def test_a_missing_argument_is_named():
    for model in ("imagenet_fourier", "masked_lm", "optical_flow"):
        wiring, arguments = small(model)
        name = next(iter(arguments))
        del arguments[name]
        with pytest.raises(ValueError, match=f"the config needs {name}"):
            config_from_deepmind(wiring, arguments)


def test_two_decoders_are_refused():
    wiring, arguments = small("imagenet_fourier")
    with pytest.raises(ValueError, match="both decoder and projection_decoder"):
        config_from_deepmind(wiring, {**arguments, "projection_decoder": {}})


def test_unknown_models_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'imagenet'; known: masked-lm, .*dense"):
        config_from_deepmind("imagenet", {})
    assert set(MODELS.values()) == set(WIRINGS)


def test_a_video_query_whose_grid_nothing_tells_asks_for_the_size():
    # Frames merged into one leave no grid in time to be refined.
    wiring, arguments = small("multimodal")
    changed(arguments, "image.preprocessor.temporal_downsample", 4)
    changed(
        arguments, "image.preprocessor.fourier_position_encoding_kwargs", {"num_bands": 2, "max_resolution": [4, 4]}
    )
    with pytest.raises(ValueError, match=r"pass image_size=\(height, width\)"):
        config_from_deepmind(wiring, arguments)
    config = config_from_deepmind(wiring, arguments, image_size=(16, 16))
    assert config.output_query["modalities"]["image"]["grid"] == [4, 16, 16]
