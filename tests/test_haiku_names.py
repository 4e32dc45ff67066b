"""conversion/haiku_names.py: every Haiku array finds its place, by value and layout, and nothing is left over unsaid.

tests/parity checks the same table by the models' outputs; here are the values that no output can show (the biases of
keys: softmax does not see them), and what is told when names or shapes do not fit.
"""

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from parity.deepmind import MODELS, PARITY

from conversion.deepmind_config import config_from_deepmind
from conversion.haiku_names import (
    KINDS,
    ROWS,
    TABLE,
    ConversionError,
    candidates,
    convert_params,
    match_names,
)
from conversion.unpickle import HaikuCheckpoint, load_haiku_checkpoint
from hf_perceiver import PerceiverIOConfig, PerceiverIOForMaskedLM, PerceiverIOModel


def load(name: str) -> tuple[HaikuCheckpoint, PerceiverIOConfig]:
    checkpoint = load_haiku_checkpoint(PARITY / f"{name}_a.pystate")
    config = json.loads((PARITY / f"{name}_a.json").read_text())["config"]
    return checkpoint, config_from_deepmind(MODELS[name], config, params=checkpoint.params)


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- the right place


@pytest.mark.parametrize("name", MODELS)
def test_all_values_arrive_and_the_model_lacks_none(name):
    checkpoint, config = load(name)
    converted = convert_params(checkpoint.params, checkpoint.state, config)
    PerceiverIOModel(config).load_state_dict(converted, strict=True)
    # Layout aside, the same numbers: sums of absolute values, of everything and by name of the array.
    theirs = sum(float(np.abs(value).sum()) for names in checkpoint.params.values() for value in names.values())
    moments = [name for name in converted if "running" in name or "num_batches" in name]
    tied = ["postprocessor.output_embedding.weight"] if name == "masked_lm" else []
    ours = sum(float(value.abs().sum()) for key, value in converted.items() if key not in [*moments, *tied])
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(value.dtype == torch.float32 for key, value in converted.items() if "num_batches" not in key)


@pytest.mark.parametrize("name", ["masked_lm", "optical_flow"])
def test_key_biases_which_no_output_shows_arrive_by_value(name):
    checkpoint, config = load(name)
    converted = convert_params(checkpoint.params, checkpoint.state, config)
    theirs = {m: names["b"] for m, names in checkpoint.params.items() if m.endswith("attention/linear_1")}
    assert len(theirs) == config.num_self_attends_per_block + 2
    for module, bias in theirs.items():
        number = re.search(r"self_attention_?(\d*)/", module)
        if number:
            target = f"encoder.blocks.0.{number[1] or 0}.self_attn.k_proj.bias"
        else:
            target = (
                "decoder.cross_attend" if "decoder" in module else "encoder.cross_attends.0"
            ) + ".cross_attn.k_proj.bias"
        np.testing.assert_array_equal(converted[target].numpy(), bias)


def test_the_eleventh_layer_is_not_sorted_after_the_first():
    assert candidates("perceiver_encoder/~/self_attention/mlp/linear")[0][1] == "encoder.blocks.0.0.mlp.up_proj"
    assert candidates("perceiver_encoder/~/self_attention_2/mlp/linear")[0][1] == "encoder.blocks.0.2.mlp.up_proj"
    assert candidates("perceiver_encoder/~/self_attention_10/mlp/linear")[0][1] == "encoder.blocks.0.10.mlp.up_proj"
    names = [f"perceiver_encoder/~/self_attention{n}/mlp/linear" for n in ("_10", "_2", "", "_1")]
    moves = match_names([(m, "b") for m in names], [f"encoder.blocks.0.{n}.mlp.up_proj.bias" for n in (0, 1, 2, 10)])
    assert [move.module for move in moves] == [names[2], names[3], names[1], names[0]]


def test_layouts_are_turned():
    w, kernel, vector = array(0, 2, 3), array(1, 7, 5, 3, 4), array(2, 1, 6)
    np.testing.assert_array_equal(KINDS["linear"]["w"].convert(w), w.T)
    turned = KINDS["conv"]["w"].convert(kernel)
    assert turned.shape == (4, 3, 7, 5) and turned[3, 2, 6, 4] == kernel[6, 4, 2, 3]
    assert KINDS["vector"]["pos_embs"].convert(vector).shape == (6,)
    assert KINDS["batch_norm"]["scale"].convert(array(3, 1, 1, 1, 4)).shape == (4,)


def test_batch_norm_evaluates_with_the_corrected_average_and_counts_its_updates():
    checkpoint, config = load("imagenet_conv")
    state = copy.deepcopy(checkpoint.state)
    module = "image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/"
    for moment, value in (("mean_ema", 3.0), ("var_ema", 5.0)):
        state[module + moment]["hidden"] = np.full((1, 1, 1, 16), -99.0, np.float32)
        state[module + moment]["average"] = np.full((1, 1, 1, 16), value, np.float32)
        state[module + moment]["counter"] = np.array(41, np.int32)
    converted = convert_params(checkpoint.params, state, config)
    assert torch.equal(converted["preprocessor.stem.norms.0.running_mean"], torch.full((16,), 3.0))
    assert torch.equal(converted["preprocessor.stem.norms.0.running_var"], torch.full((16,), 5.0))
    assert converted["preprocessor.stem.norms.0.num_batches_tracked"] == 41


def test_a_head_gets_its_prefix_and_tied_weights_are_one():
    checkpoint, config = load("masked_lm")
    head = PerceiverIOForMaskedLM(config)
    converted = convert_params(checkpoint.params, None, head)
    assert all(name.startswith("perceiver.") for name in converted)
    embedding = converted["perceiver.preprocessor.embedding.weight"]
    assert converted["perceiver.postprocessor.output_embedding.weight"] is embedding
    head.load_state_dict(converted, strict=True)
    assert head.get_output_embeddings().weight is head.get_input_embeddings().weight


def test_other_types_and_read_only_arrays_become_float32_of_their_own():
    checkpoint, config = load("extra_concat_query")
    params = {m: {n: v.astype(np.float64) for n, v in names.items()} for m, names in checkpoint.params.items()}
    for names in params.values():
        for value in names.values():
            value.flags.writeable = False
    converted = convert_params(params, {}, config)
    converted["encoder.latents.weight"].zero_()
    assert converted["encoder.latents.weight"].dtype == torch.float32
    assert params["perceiver_encoder/~/trainable_position_encoding"]["pos_embs"].any()


# --- nothing left over


def test_what_is_missing_and_what_is_too_much_is_listed_together():
    checkpoint, config = load("imagenet_fourier")
    params = dict(checkpoint.params)
    params["perceiver_encoder/~/surprise"] = {"w": array(0, 2, 2)}
    params["perceiver_encoder/~/self_attention_7/mlp/linear"] = {"w": array(0, 32, 32)}
    del params["classification_decoder/~/basic_decoder/output"]
    with pytest.raises(ConversionError) as error:
        convert_params(params, {}, config)
    message = str(error.value)
    assert "perceiver_encoder/~/surprise/w is in no row of the table" in message
    assert "self_attention_7/mlp/linear/w belongs to encoder.blocks.0.7.mlp.up_proj.weight" in message
    assert "nothing gives postprocessor.classifier.weight" in message
    assert "nothing gives postprocessor.classifier.bias" in message


def test_an_unknown_array_of_a_known_module_is_listed():
    checkpoint, config = load("extra_concat_query")
    params = copy.deepcopy(checkpoint.params)
    params["basic_decoder/output"]["gain"] = array(0, 5)
    with pytest.raises(ConversionError, match="basic_decoder/output/gain is in no row"):
        convert_params(params, {}, config)


def test_two_arrays_for_one_place_are_refused():
    checkpoint, config = load("extra_concat_query")
    params = copy.deepcopy(checkpoint.params)
    params["encoder/~/trainable_position_encoding"] = params["perceiver_encoder/~/trainable_position_encoding"]
    with pytest.raises(
        ConversionError, match=r"encoder\.latents\.weight would come from encoder/~/.* and perceiver_encoder/~/"
    ):
        convert_params(params, {}, config)


def test_other_sizes_are_refused_with_both_shapes():
    checkpoint, config = load("imagenet_fourier")
    config.num_labels = 12
    expected = r"basic_decoder/output/w \(32, 11\) gives postprocessor\.classifier\.weight \(11, 32\), not \(12, 32\)"
    with pytest.raises(ConversionError, match=expected):
        convert_params(checkpoint.params, {}, config)


def test_a_square_matrix_is_transposed_too():
    # Shapes cannot tell; the outputs in tests/parity do, and this does so directly.
    checkpoint, config = load("imagenet_fourier")
    name = "perceiver_encoder/~/self_attention/attention/linear"
    converted = convert_params(checkpoint.params, {}, config)
    square = checkpoint.params[name]["w"]
    assert square.shape == (32, 32)
    np.testing.assert_array_equal(converted["encoder.blocks.0.0.self_attn.q_proj.weight"].numpy(), square.T)


def test_long_lists_are_cut():
    checkpoint, config = load("masked_lm")
    with pytest.raises(ConversionError) as error:
        convert_params({}, {}, config)
    assert re.search(r"and \d+ more$", str(error.value)) and len(str(error.value).splitlines()) == 22
    assert isinstance(error.value, ValueError)
    assert checkpoint.state == {}


def test_every_row_of_the_table_is_used_by_a_stored_model():
    # A row that nothing needs would be a guess.
    described: dict[str, Any] = json.loads((PARITY / "options.json").read_text())
    modules = {module for case in described.values() for module in case["shapes"]}
    modules |= {module for name in MODELS for module in json.loads((PARITY / f"{name}_a.json").read_text())["params"]}
    unused = [row.haiku.pattern for row in ROWS if not any(row.haiku.fullmatch(module) for module in modules)]
    assert not unused
    assert all(kind in (*KINDS, "in") for kind in re.findall(r"^(\w+) ", TABLE, flags=re.MULTILINE))
