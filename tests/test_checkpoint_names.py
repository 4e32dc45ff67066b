"""The standard is transformers' own Perceiver, run beside ours on the same random weights in float64.

Two orders of summation differ by about 1e-15 there; 1e-12 leaves room for a few layers of sharp attention. Its Fourier
positions are float32 and are met bit by bit.
"""

import json
import re

import pytest
import torch
import transformers
from builtin_models import (
    CASES,
    IMAGE_NAMES,
    MULTIMODAL,
    NAMES,
    POINTS,
    RELEASED,
    TEXT,
    assert_same_outputs,
    builtin_case,
    builtin_outputs,
    relative_l2,
    released_config,
)
from helpers import TINY, tiny
from safetensors import safe_open
from transformers import AutoModel, PerceiverConfig, PerceiverForMaskedLM, PerceiverModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.perceiver import modeling_perceiver as builtin_code

from hf_perceiver import (
    PerceiverIOConfig,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOModel,
    apply_numerics,
    recipes,
)
from hf_perceiver.checkpoint_names import ARCHITECTURES, builtin_to_config, weight_names
from hf_perceiver.checkpoint_weights import final_layer_renamings
from hf_perceiver.position_encoding import FourierPositionEncoding


def saved(name, folder, **changes):
    """A built-in model and the folder it was saved in."""
    model = builtin_case(name).model(**changes)
    model.save_pretrained(folder)
    return model


def assert_whole(info):
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


# Options of the built-in that change numbers, on the classes where they are easy to see.
OPTIONS = {
    "PerceiverForMaskedLM": [
        {"use_query_residual": False, "cross_attention_widening_factor": 3},
        {"hidden_act": "relu", "self_attention_widening_factor": 2, "num_blocks": 1},
        {"qk_channels": None, "v_channels": None, "cross_attention_shape_for_attention": "q"},
        {"hidden_act": "gelu_pytorch_tanh", "num_latents": 13},
    ],
    "PerceiverForSequenceClassification": [{"num_labels": 1}, {"qk_channels": None, "v_channels": None}],
    "PerceiverForImageClassificationFourier": [{"cross_attention_shape_for_attention": "q"}],
    "PerceiverForOpticalFlow": [{"cross_attention_shape_for_attention": "q"}],
    "PerceiverForMultimodalAutoencoding": [
        {"cross_attention_shape_for_attention": "q"},
        {"_label_trainable_num_channels": 500, "num_blocks": 1},
    ],
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in NAMES] + [(name, c) for name in OPTIONS for c in OPTIONS[name]],
    ids=str,
)
def test_a_builtin_checkpoint_gives_the_builtins_numbers(name, changes, tmp_path):
    case = builtin_case(name)
    theirs = saved(name, tmp_path, **changes)
    ours, info = case.ours.from_pretrained(tmp_path, output_loading_info=True)
    assert_whole(info)
    assert ours.dtype == torch.float64 and not ours.training
    with torch.no_grad():
        outputs = ours(**case.our_inputs())
    assert_same_outputs(outputs, *builtin_outputs(theirs, case.inputs()))


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_model_reads_every_builtin_class(name, tmp_path):
    case = builtin_case(name)
    theirs = saved(name, tmp_path)
    ours, info = PerceiverIOModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_whole(info)
    with torch.no_grad():
        outputs = ours(**case.our_inputs())
    assert_same_outputs(outputs, *builtin_outputs(theirs, case.inputs()))


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_far_from_uniform_in_these_comparisons(name):
    # Otherwise they would agree without the queries and keys taking part.
    case = builtin_case(name)
    inputs = case.inputs()
    inputs.pop("attention_mask", None)
    with torch.no_grad():
        outputs = case.model()(**inputs, output_attentions=True)
    for weights in (*outputs.attentions, *outputs.cross_attentions):
        # 1 / M were uniform; the least here is twice that, over 6 latents.
        assert weights.max(dim=-1).values.mean() > 1.8 / weights.shape[-1]


@pytest.mark.parametrize("length", [1, 4, 9, 20])
def test_padded_texts_of_any_length_agree(length, tmp_path):
    # Shorter and longer than the 6 latents, up to all 20 positions.
    theirs = saved("PerceiverForMaskedLM", tmp_path)
    ours = PerceiverIOForMaskedLM.from_pretrained(tmp_path)
    ids, mask = torch.randint(6, 30, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    mask[2] = 0
    with torch.no_grad():
        outputs = ours(input_ids=ids, attention_mask=mask)
    assert outputs.logits.shape == (3, length, 30)
    assert_same_outputs(outputs, *builtin_outputs(theirs, {"input_ids": ids, "attention_mask": mask}))


def test_masked_pixels_agree(tmp_path):
    case = builtin_case("PerceiverForImageClassificationFourier")
    theirs = saved(case.name, tmp_path)
    ours = case.ours.from_pretrained(tmp_path)
    mask = (torch.rand(2, 9 * 14) < 0.4).long()
    inputs = {**case.inputs(), "attention_mask": mask}
    with torch.no_grad():
        outputs = ours(**inputs)
    assert_same_outputs(outputs, *builtin_outputs(theirs, inputs))


def test_interpolated_positions_agree(tmp_path):
    theirs = saved("PerceiverForImageClassificationLearned", tmp_path)
    ours = PerceiverIOForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 11, 6, dtype=torch.float64)
    with torch.no_grad():
        a = ours(pixel_values=pixels, interpolate_pos_encoding=True).logits
        b = theirs(pixel_values=pixels, interpolate_pos_encoding=True).logits
    assert relative_l2(a, b) <= 1e-12


def test_a_full_decode_is_the_builtins_answer_to_all_points(tmp_path):
    # The built-in itself can only be asked for points that are named.
    theirs = saved("PerceiverForMultimodalAutoencoding", tmp_path)
    ours = PerceiverIOForMultimodalAutoencoding.from_pretrained(tmp_path)
    inputs = builtin_case("PerceiverForMultimodalAutoencoding").inputs()["inputs"]
    everything = {"image": torch.arange(2 * 16 * 16), "audio": torch.arange(8), "label": None}
    with torch.no_grad():
        logits = ours(inputs=inputs).logits
        want = theirs(inputs=inputs, subsampled_output_points=everything).logits
    assert logits["image"].shape == (2, 2, 16, 16, 3)
    assert relative_l2(logits["image"].flatten(1, 3), want["image"]) <= 1e-12
    assert relative_l2(logits["audio"], want["audio"]) <= 1e-12
    assert relative_l2(logits["label"], want["label"]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("bands", "resolution", "grid"),
    [
        (64, (224, 224), (224, 224)),
        (64, (56, 56), (55, 55)),
        (192, (30_720,), (1920,)),
        (32, (16, 56, 56), (4, 56, 56)),
    ],
    ids=str,
)
def test_fourier_positions_are_bitwise_the_builtins(bands, resolution, grid, dtype):
    theirs = builtin_code.PerceiverFourierPositionEncoding(num_bands=bands, max_resolution=resolution)
    ours = FourierPositionEncoding(num_bands=bands, max_resolution=resolution)
    code = ours.encode(grid, device=torch.device("cpu"), dtype=dtype)
    want = theirs(grid, 1, torch.device("cpu"), dtype)
    assert torch.equal(code.dense(0, code.length), want)


def test_sampled_queries_are_bitwise_the_builtins(tmp_path):
    theirs = saved("PerceiverForMultimodalAutoencoding", tmp_path)
    ours = PerceiverIOModel.from_pretrained(tmp_path)
    inputs = builtin_case("PerceiverForMultimodalAutoencoding").inputs()["inputs"]
    with torch.no_grad():
        array, sizes, without = theirs.perceiver.input_preprocessor(inputs)
        want = theirs.perceiver.decoder.decoder_query(array, sizes, without, subsampled_points=POINTS)
        made = ours.preprocessor(inputs)
        query = ours.output_query(made, POINTS)
    assert torch.equal(made.dense(), array)
    assert torch.equal(query.dense().expand(2, -1, -1), want)


# numerics="deepmind"


def test_deepmind_numerics_are_the_recipes():
    # The recipes hold the original's constructor arguments, typed from its notebooks.
    made = {
        "PerceiverForMaskedLM": recipes.language_bytes(),
        "PerceiverForImageClassificationLearned": recipes.imagenet_learned(),
        "PerceiverForImageClassificationFourier": recipes.imagenet_fourier(),
        "PerceiverForImageClassificationConvProcessing": recipes.imagenet_conv(),
        "PerceiverForOpticalFlow": recipes.optical_flow(),
        "PerceiverForMultimodalAutoencoding": recipes.multimodal_autoencoder(),
    }
    assert made.keys() == RELEASED.keys()
    for name, recipe in made.items():
        config = PerceiverIOConfig.from_dict(released_config(name).to_dict(), numerics="deepmind")
        got, want = config.to_dict(), recipe.to_dict()
        if name == "PerceiverForOpticalFlow":
            want["output_query"]["use_input_mask"] = True  # the default, spelt out
        if name == "PerceiverForImageClassificationConvProcessing":
            want["preprocessor"]["stem"]["padding"] = "same"  # likewise
        if name == "PerceiverForMultimodalAutoencoding":
            # The recipe's grids follow the input; these are the same on inputs of the released size.
            asked = want["output_query"]["modalities"]
            assert asked["image"].pop("scale") == [1, 4, 4]
            asked["image"]["grid"], asked["audio"]["grid"] = [16, 224, 224], [1920]
        if name != "PerceiverForMaskedLM":
            for field in ("vocab_size", "decoder_qk_channels"):
                got.pop(field), want.pop(field)
        # Dropout is the file's own; labels of the recipes have no names.
        for field in ("attention_dropout", "architectures", "transformers_version", "_name_or_path"):
            got.pop(field, None), want.pop(field, None)
        assert got == want, name


def test_deepmind_numerics_change_what_they_should(tmp_path):
    saved("PerceiverForMaskedLM", tmp_path)
    inputs = builtin_case("PerceiverForMaskedLM").inputs()
    theirs = PerceiverIOForMaskedLM.from_pretrained(tmp_path)
    original = PerceiverIOForMaskedLM.from_pretrained(tmp_path, numerics="deepmind")
    assert original.config.hidden_act == "gelu_pytorch_tanh" and original.config.zero_masked_rows
    with torch.no_grad():
        a, b = theirs(**inputs), original(**inputs)
    # tanh GELU: close to erf's, not equal. 4.7e-4 per activation, amplified by the large weights.
    assert 1e-6 < relative_l2(b.logits[0], a.logits[0]) < 0.1
    # A masked query reads nothing: what it answers depends on its position alone.
    assert relative_l2(b.logits[1, 5:], b.logits[2, 5:]) < 1e-12
    assert relative_l2(b.logits[1, 5:], a.logits[1, 5:]) > 0.1
    # A text without a valid token leaves the latents as another such text does.
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    with torch.no_grad():
        assert relative_l2(original(**other).last_hidden_state[2], b.last_hidden_state[2]) < 1e-12
        assert relative_l2(theirs(**other).last_hidden_state[2], a.last_hidden_state[2]) > 1e-3


def test_deepmind_numerics_change_only_gelu_where_there_is_no_mask(tmp_path):
    case = builtin_case("PerceiverForImageClassificationFourier")
    saved(case.name, tmp_path, hidden_act="gelu_pytorch_tanh")
    with torch.no_grad():
        logits = [
            case.ours.from_pretrained(tmp_path, numerics=numerics)(**case.inputs()).logits
            for numerics in (None, "builtin", "deepmind")
        ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_deepmind_numerics_leave_another_activation_alone():
    config = builtin_case("PerceiverForMaskedLM").config(hidden_act="relu")
    assert PerceiverIOConfig.from_dict(config.to_dict(), numerics="deepmind").hidden_act == "relu"


def test_deepmind_numerics_drop_the_residual_behind_learned_positions_only():
    found = {}
    for name in IMAGE_NAMES:
        fields = {**builtin_case(name).config().to_dict(), "architectures": [name]}
        made = [
            builtin_to_config(fields, numerics)["decoder_use_query_residual"] for numerics in ("builtin", "deepmind")
        ]
        found[name.removeprefix("PerceiverForImageClassification")] = made
    assert found == {"Learned": [True, False], "Fourier": [True, True], "ConvProcessing": [True, True]}


def test_the_conv_stem_pads_as_its_numerics_say(tmp_path):
    saved("PerceiverForImageClassificationConvProcessing", tmp_path)
    pixels = torch.randn(1, 3, 32, 24, dtype=torch.float64)
    grids = []
    for numerics in ("builtin", "deepmind"):
        model = PerceiverIOModel.from_pretrained(tmp_path, numerics=numerics)
        grids.append(model.encode(pixels).input_array.part.grid)
    # As 55 and 56 for 224 pixels.
    assert grids == [(7, 5), (8, 6)]


def test_numerics_can_be_changed_on_a_config_and_back():
    config = PerceiverIOConfig.from_dict(released_config("PerceiverForImageClassificationLearned").to_dict())
    before = config.to_dict()
    original = apply_numerics(config, "deepmind")
    assert config.to_dict() == before
    assert (original.hidden_act, original.zero_masked_rows) == ("gelu_pytorch_tanh", True)
    assert not original.decoder_use_query_residual
    assert apply_numerics(original, "builtin").to_dict() == before


def test_own_checkpoints_keep_the_numerics_they_were_loaded_with(tmp_path):
    saved("PerceiverForMaskedLM", tmp_path / "theirs")
    for numerics in ("builtin", "deepmind"):
        model = PerceiverIOForMaskedLM.from_pretrained(tmp_path / "theirs", numerics=numerics)
        model.save_pretrained(tmp_path / numerics)
        again = PerceiverIOForMaskedLM.from_pretrained(tmp_path / numerics)
        inputs = builtin_case("PerceiverForMaskedLM").inputs()
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        with safe_open(tmp_path / numerics / "model.safetensors", "pt") as file:
            assert "perceiver.encoder.latents.weight" in file.keys()  # noqa: SIM118, no mapping
        with pytest.raises(ValueError, match="already a perceiver_io checkpoint"):
            PerceiverIOForMaskedLM.from_pretrained(tmp_path / numerics, numerics="deepmind")


def test_unknown_numerics_are_refused(tmp_path):
    saved("PerceiverForMaskedLM", tmp_path)
    with pytest.raises(ValueError, match="numerics='torch' must be one of builtin, deepmind"):
        PerceiverIOForMaskedLM.from_pretrained(tmp_path, numerics="torch")
    with pytest.raises(ValueError, match="numerics='torch' must be one of"):
        apply_numerics(PerceiverIOConfig(), "torch")


# Configs


def test_fields_that_any_config_has_are_carried_over(tmp_path):
    names = {0: "bad", 1: "good", 2: "other"}
    case = builtin_case("PerceiverForSequenceClassification")
    theirs = case.model(
        id2label=names,
        label2id={v: k for k, v in names.items()},
        problem_type="multi_label_classification",
        attention_probs_dropout_prob=0.25,
        initializer_range=0.5,
        num_labels=3,
        pad_token_id=7,
        finetuning_task="sst2",
    )
    theirs.save_pretrained(tmp_path)
    config = PerceiverIOConfig.from_pretrained(tmp_path)
    assert config.id2label == names and config.label2id["good"] == 1 and config.num_labels == 3
    assert config.problem_type == "multi_label_classification"
    assert config.attention_dropout == 0.25 and config.dropout == 0
    assert config.initializer_range == 0.5 and config.pad_token_id == 7
    assert config.dtype == torch.float64 and config.finetuning_task == "sst2"
    assert config.vocab_size == 30 and config.mask_token_id == 3
    assert config.architectures == ["PerceiverIOForSequenceClassification"]
    # What the specs say now is not said twice.
    for name in ("d_model", "max_position_embeddings", "image_size", "attention_probs_dropout_prob"):
        assert not hasattr(config, name)


def test_the_layer_norm_epsilon_of_the_file_is_ignored_as_it_is_there(tmp_path):
    theirs = saved("PerceiverForMaskedLM", tmp_path, layer_norm_eps=0.5)
    ours = PerceiverIOForMaskedLM.from_pretrained(tmp_path)
    assert ours.config.layer_norm_eps == 1e-5
    assert {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_an_old_file_without_newer_fields_takes_the_builtins_defaults():
    config = PerceiverIOConfig.from_dict({"model_type": "perceiver", "architectures": ["PerceiverForMaskedLM"]})
    assert config.preprocessor["position"]["num_positions"] == 2048
    assert config.attention_dropout == 0.1 and config.qk_channels is None


def test_the_image_size_may_be_a_pair():
    fields = {"model_type": "perceiver", "image_size": [6, 10]}
    config = PerceiverIOConfig.from_dict(fields, architecture="PerceiverForImageClassificationLearned")
    table = config.preprocessor["position"]["position"]
    assert (table["num_positions"], table["grid"]) == (60, [6, 10])
    video = builtin_to_config({**fields, "num_frames": 3}, architecture="PerceiverForMultimodalAutoencoding")
    assert video["preprocessor"]["modalities"]["image"]["position"]["max_resolution"] == [3, 6, 10]


def test_a_value_the_builtin_would_refuse_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="d_latents"):
        PerceiverIOConfig.from_dict({"model_type": "perceiver", "d_latents": "wide"})


@pytest.mark.parametrize(
    ("architectures", "problem"),
    [
        (["PerceiverForImageClassification"], "names no class of transformers' Perceiver"),
        (["PerceiverForImageClassificationLearned", "PerceiverForImageClassificationFourier"], "is ambiguous"),
    ],
)
def test_an_unclear_class_asks_for_the_architecture(architectures, problem, tmp_path):
    case = builtin_case("PerceiverForImageClassificationFourier")
    theirs = saved(case.name, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": architectures}))
    with pytest.raises(ValueError, match=f"{problem}.*architecture=.*PerceiverForImageClassificationConvProcessing"):
        case.ours.from_pretrained(tmp_path)
    ours = case.ours.from_pretrained(tmp_path, architecture=case.name)
    with torch.no_grad():
        assert_same_outputs(ours(**case.inputs()), *builtin_outputs(theirs, case.inputs()))


# Weights


@pytest.mark.parametrize("name", ["PerceiverForMaskedLM", "PerceiverForMultimodalAutoencoding"])
def test_an_old_bin_file_and_shards_load(name, tmp_path):
    case = builtin_case(name)
    theirs = case.model()
    want = builtin_outputs(theirs, case.inputs())
    theirs.config.architectures = [name]
    theirs.config.dtype = torch.float64
    theirs.config.save_pretrained(tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("bin", "shards"):
        ours, info = case.ours.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert_whole(info)
        with torch.no_grad():
            assert_same_outputs(ours(**case.our_inputs()), *want)


def test_weights_without_the_heads_prefix_load(tmp_path):
    case = builtin_case("PerceiverForImageClassificationConvProcessing")
    theirs = case.model()
    theirs.config.architectures = [case.name]
    theirs.config.dtype = torch.float64
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.perceiver.state_dict(), tmp_path / "pytorch_model.bin")
    for cls in (case.ours, PerceiverIOModel):
        ours, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert_whole(info)
        with torch.no_grad():
            assert_same_outputs(ours(**case.inputs()), *builtin_outputs(theirs, case.inputs()))


def test_dtype_and_device_map_are_as_for_any_checkpoint(tmp_path):
    saved("PerceiverForMultimodalAutoencoding", tmp_path)
    ours = PerceiverIOForMultimodalAutoencoding.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


def test_the_bare_builtin_model_is_a_text_encoder_whose_embedding_is_new(tmp_path, caplog):
    theirs = PerceiverModel(PerceiverConfig(**TEXT)).double().eval()
    theirs.save_pretrained(tmp_path)
    ours, info = PerceiverIOModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"preprocessor.embedding.weight", "preprocessor.position.embeddings"}
    assert not info["unexpected_keys"]
    assert ours(input_ids=torch.arange(6, 12)[None]).last_hidden_state.shape == (1, 6, 24)
    # With its own preprocessor the file holds these too.
    text = PerceiverModel(theirs.config, input_preprocessor=builtin_code.PerceiverTextPreprocessor(theirs.config))
    text.double().eval().save_pretrained(tmp_path / "text")
    ours, info = PerceiverIOModel.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert_whole(info)
    ids = torch.randint(6, 30, (2, 7))
    with torch.no_grad():
        assert relative_l2(ours(input_ids=ids).last_hidden_state, text(inputs=ids).last_hidden_state) <= 1e-12
    assert PerceiverIOForSequenceClassification.from_pretrained(tmp_path / "text")(input_ids=ids).logits.shape == (2, 5)


def test_the_bare_builtin_model_on_any_array_is_the_points_kind(tmp_path):
    theirs = PerceiverModel(PerceiverConfig(**TEXT)).double().eval()
    theirs.save_pretrained(tmp_path)
    array = {"kind": "points", "feature_channels": 16}
    ours, info = PerceiverIOModel.from_pretrained(tmp_path, preprocessor=array, output_loading_info=True)
    assert_whole(info)
    inputs, mask = torch.randn(2, 11, 16, dtype=torch.float64), torch.ones(2, 11)
    mask[1, 4:] = 0
    with torch.no_grad():
        got = ours(inputs=inputs, attention_mask=mask).last_hidden_state
        want = theirs(inputs=inputs, attention_mask=mask).last_hidden_state
    assert relative_l2(got, want) <= 1e-12


@pytest.mark.parametrize("head", [PerceiverIOForSequenceClassification, PerceiverIOForTokenClassification])
def test_a_new_head_keeps_encoder_and_decoder(head, tmp_path):
    saved("PerceiverForMaskedLM", tmp_path)
    old = PerceiverIOForMaskedLM.from_pretrained(tmp_path).state_dict()
    new, info = head.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    # Token classification asks at the language model's own positions.
    asked = {"perceiver.output_query.task_queries"} if head is PerceiverIOForSequenceClassification else set()
    read_out = "classifier" if head is PerceiverIOForSequenceClassification else "projection"
    fresh = {f"perceiver.postprocessor.{read_out}.{kind}" for kind in ("weight", "bias")}
    assert info["missing_keys"] == asked | fresh and not info["mismatched_keys"]
    kept = [key for key in new.state_dict() if key.split(".")[1] in ("preprocessor", "encoder", "decoder")]
    assert len(kept) > 60
    assert all(torch.equal(new.state_dict()[key], old[key]) for key in kept)
    assert new(input_ids=torch.randint(6, 30, (2, 9))).logits.shape[-1] == 3


def test_another_number_of_classes_is_a_new_read_out(tmp_path):
    case = builtin_case("PerceiverForImageClassificationFourier")
    saved(case.name, tmp_path)
    ours, info = case.ours.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {
        "perceiver.postprocessor.classifier.weight",
        "perceiver.postprocessor.classifier.bias",
    }
    assert ours(**case.inputs()).logits.shape == (2, 3)


def test_our_names_match_no_pattern():
    for name in TINY:
        case = tiny(name)
        patterns = get_checkpoint_conversion_mapping("perceiver_io") + final_layer_renamings(case.config)
        for cls in (PerceiverIOModel, *case.heads):
            for key in case.model(cls, large=False).state_dict():
                matches = [p.source_patterns for p in patterns if p.rename_source_key(key) != (key, None)]
                assert not matches, key


def test_every_pattern_is_needed():
    # By some weight of some built-in class; and each name of a class leads to one of ours, and no two to the same.
    used = set()
    for name, case in CASES.items():
        names = weight_names(name)
        assert len({ours for _, ours in names}) == len({theirs for theirs, _ in names}) == len(names)
        keys = [key.removeprefix("perceiver.") for key in case.model().state_dict()]
        for pair in names:
            pattern = re.escape(pair[0]).replace(r"\#", r"\d+") + r"(\.|$)"
            assert any(re.match(pattern, key) for key in keys), f"{name} has no {pair[0]}"
            used.add(pair)
    assert used == {pair for name in ARCHITECTURES for pair in weight_names(name)}


@pytest.mark.parametrize("name", NAMES)
def test_full_size_models_have_the_same_weights(name):
    # Names and shapes only; the counts of the released models are recipes' tests.
    config = released_config(name) if name in RELEASED else PerceiverConfig(architectures=[name])
    with torch.device("meta"):
        theirs = getattr(transformers, name)(config)
        ours = CASES[name].ours(PerceiverIOConfig.from_dict(config.to_dict()))
    wanted = {key.removeprefix("perceiver."): tuple(t.shape) for key, t in ours.state_dict().items()}
    wanted.pop("postprocessor.output_embedding.weight", None)  # tied
    patterns = get_checkpoint_conversion_mapping("perceiver_io") + final_layer_renamings(ours.config)
    renamed = {}
    for key, tensor in theirs.state_dict().items():
        for pattern in patterns:
            key, _ = pattern.rename_source_key(key)
        shape = tuple(tensor.shape)
        renamed[key.removeprefix("perceiver.")] = shape[1:] if ".padding." in key or ".mask_tokens." in key else shape
    assert renamed == wanted
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_builtin_loads_through_its_own_auto_class_as_before(tmp_path):
    saved("PerceiverForMaskedLM", tmp_path)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)) is PerceiverForMaskedLM
    assert type(AutoModel.from_pretrained(tmp_path)) is PerceiverModel


def test_multimodal_options_reach_the_specs():
    config = PerceiverIOConfig.from_dict({**PerceiverConfig(**MULTIMODAL).to_dict(), "architectures": [NAMES[-1]]})
    pre, asked = config.preprocessor["modalities"], config.output_query["modalities"]
    assert pre["audio"]["stem"]["samples_per_patch"] == 8 and pre["audio"]["position"]["max_resolution"] == [64]
    assert pre["image"]["position"]["max_resolution"] == [2, 4, 4] and pre["label"]["channels"] == 5
    assert asked["image"]["grid"] == [2, 16, 16] and asked["audio"]["grid"] == [8]
    assert asked["label"]["channels"] == 10 and config.postprocessor["channels"] == 12
