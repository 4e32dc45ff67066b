import copy
import json

import pytest
from helpers import TINY, config_of, tiny
from transformers import AutoConfig, PretrainedConfig

from hf_perceiver import PerceiverIOConfig, PerceiverIOModel, recipes

RECIPES = [
    name for name in vars(recipes) if name[0].islower() and getattr(recipes, name).__module__ == recipes.__name__
]


def written(config, tmp_path):
    config.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def entries_of(config):
    """What a config says, without where it was read from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def rewritten(config, tmp_path, **changes):
    """A folder whose config.json has these entries besides."""
    entries = written(config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**entries, **changes}))
    return tmp_path


# --- round trips


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_config_survives_its_file(name, tmp_path):
    config = tiny(name).config
    config.save_pretrained(tmp_path)
    for load in (PerceiverIOConfig.from_pretrained, AutoConfig.from_pretrained):
        again = load(tmp_path)
        assert type(again) is PerceiverIOConfig
        assert entries_of(again) == entries_of(config)
        assert again.to_json_string() == config.to_json_string()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_file(name, tmp_path):
    config = getattr(recipes, name)()
    config.save_pretrained(tmp_path)
    assert entries_of(PerceiverIOConfig.from_pretrained(tmp_path)) == entries_of(config)


@pytest.mark.parametrize("name", TINY)
def test_a_config_survives_its_dict(name):
    config = tiny(name).config
    assert PerceiverIOConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert PerceiverIOConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_the_default_is_the_released_language_model():
    assert PerceiverIOConfig().to_dict() == recipes.language_bytes().to_dict()


def test_the_file_holds_the_architecture_itself(tmp_path):
    entries = written(tiny("flow").config, tmp_path)
    assert entries["model_type"] == "perceiver_io"
    assert entries["preprocessor"]["stem"] == {
        "kind": "patches",
        "in_channels": 27,
        "temporal_downsample": 2,
        "project": 9,
    }
    assert entries["output_query"] == {"kind": "input"}
    assert entries["cross_attend_before_blocks"] == [0]


def test_tuples_become_the_lists_that_the_file_gives_back(tmp_path):
    stem = {"kind": "pixels"}
    position = {"kind": "fourier", "num_bands": 2, "max_resolution": (6, 5)}
    config = config_of(
        preprocessor={"kind": "grid", "stem": stem, "position": position},
        cross_attend_before_blocks=(0, 1),
        cross_attend_sharing=(0, 1),
        block_sharing=(0, 0),
    )
    assert config.preprocessor["position"]["max_resolution"] == [6, 5]
    assert (config.cross_attend_before_blocks, config.cross_attend_sharing) == ([0, 1], [0, 1])
    config.output_query = {"kind": "position", "position": position, "grid": (2, 2)}
    config.save_pretrained(tmp_path)
    assert entries_of(PerceiverIOConfig.from_pretrained(tmp_path)) == entries_of(config)


def test_a_config_shares_nothing_with_the_dicts_it_is_made_of_or_gives():
    spec = {"kind": "text", "channels": 8, "position": {"kind": "trainable", "num_positions": 4, "channels": 8}}
    config = config_of(preprocessor=spec)
    spec["position"]["num_positions"] = 99
    config.to_dict()["preprocessor"]["position"]["num_positions"] = 98
    twin = copy.deepcopy(config)
    twin.preprocessor["position"]["num_positions"] = 97
    assert config.preprocessor["position"]["num_positions"] == 4


def test_two_default_configs_share_nothing():
    a, b = PerceiverIOConfig(), PerceiverIOConfig()
    a.preprocessor["channels"] = 1
    a.cross_attend_before_blocks.append(0)
    assert b.preprocessor["channels"] == 768
    assert b.cross_attend_before_blocks == [0]


def test_every_recipe_gives_a_config_of_its_own():
    recipes.language_bytes().preprocessor["channels"] = 1
    assert recipes.language_bytes().preprocessor["channels"] == 768


def test_num_labels_and_label_names_survive(tmp_path):
    config = config_of(num_labels=3)
    assert config.num_labels == 3
    config.id2label, config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    config.save_pretrained(tmp_path)
    assert PerceiverIOConfig.from_pretrained(tmp_path).id2label == {0: "a", 1: "b", 2: "c"}
    assert PerceiverIOConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7


def test_generic_names_are_aliases():
    config = config_of(hidden_size=24, num_attention_heads=3)
    assert (config.d_latents, config.num_self_attention_heads) == (24, 3)
    assert (config.hidden_size, config.num_attention_heads) == (24, 3)


def test_the_number_of_layers_follows_from_blocks():
    config = config_of(num_blocks=3, num_self_attends_per_block=2)
    assert config.num_hidden_layers == 6
    assert PerceiverIOConfig(**{**config.to_dict(), "num_hidden_layers": 6}).num_hidden_layers == 6
    with pytest.raises(ValueError, match=r"num_blocks . num_self_attends_per_block, 6 here; set those"):
        config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="num_hidden_layers=5 cannot be set"):
        config_of(num_hidden_layers=5)


# --- misspelt fields


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num_latent", "num_latents"),
        ("d_latent", "d_latents"),
        ("preprocesor", "preprocessor"),
        ("num_self_attend_per_block", "num_self_attends_per_block"),
        ("use_query_residuals", "use_query_residual"),
        ("vocabsize", "vocab_size"),
        ("latent_init_scale", "latents_init_scale"),
        ("hidden_sizes", "hidden_size"),
    ],
)
def test_a_misspelt_field_from_code_is_refused(wrong, right, tmp_path):
    message = f"has no field '{wrong}'; did you mean '{right}'"
    with pytest.raises(ValueError, match=message):
        PerceiverIOConfig(**{wrong: 4})
    config = config_of()
    config.save_pretrained(tmp_path)
    for load in (PerceiverIOConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **{wrong: 4})
    with pytest.raises(ValueError, match=message):
        PerceiverIOConfig.from_dict(config.to_dict(), **{wrong: 4})


def test_a_misspelt_field_in_from_pretrained_of_a_model_is_refused(tmp_path):
    tiny("language").model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'num_latents'"):
        PerceiverIOModel.from_pretrained(tmp_path, num_latent=4)


def test_a_misspelt_field_in_a_file_is_a_warning(tmp_path, caplog):
    folder = rewritten(config_of(), tmp_path, num_latent=4)
    config = PerceiverIOConfig.from_pretrained(folder)
    assert config.num_latents == 4
    assert "no field 'num_latent'; did you mean 'num_latents'" in caplog.text
    caplog.clear()
    with pytest.raises(ValueError):
        PerceiverIOConfig(num_latent=4)  # from code again


@pytest.mark.parametrize(
    "key",
    # What older versions of transformers, its tools and a user write, and hub arguments that come along.
    """_name_or_path transformers_version architectures auto_map custom_pipelines torch_dtype dtype attn_implementation
    tie_encoder_decoder is_encoder_decoder pruned_heads finetuning_task task_specific_params problem_type
    output_attentions output_hidden_states return_dict chunk_size_feed_forward tokenizer_class prefix max_length
    num_beams top_k temperature decoder_start_token_id unk_token_id use_cache gradient_checkpointing
    quantization_config trust_remote_code revision token cache_dir device_map max_memory my_own_note""".split(),
)
def test_keys_of_others_are_let_through(key, tmp_path, caplog):
    # What is a field in some version of transformers has a value that fits there.
    folder = rewritten(config_of(), tmp_path, **{key: getattr(PretrainedConfig(), key, None)})
    PerceiverIOConfig.from_pretrained(folder)
    assert "did you mean" not in caplog.text


def test_a_users_own_key_is_kept(tmp_path):
    config = config_of(my_note="kept")
    config.save_pretrained(tmp_path)
    assert PerceiverIOConfig.from_pretrained(tmp_path).my_note == "kept"


# --- bad values


@pytest.mark.parametrize(
    "field",
    """num_latents d_latents num_blocks num_self_attention_heads num_cross_attention_heads qk_channels v_channels
    self_attention_widening_factor cross_attention_widening_factor decoder_num_heads decoder_qk_channels
    decoder_v_channels decoder_widening_factor vocab_size""".split(),
)
@pytest.mark.parametrize("value", [0, -8])
def test_sizes_are_positive(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not {value}"):
        PerceiverIOConfig(**{field: value})


def test_no_self_attends_is_a_model_that_only_reads():
    assert config_of(num_self_attends_per_block=0).num_hidden_layers == 0
    with pytest.raises(ValueError, match="must be 0 or more, not -1"):
        config_of(num_self_attends_per_block=-1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_latents": 20}, ["qk_channels of the self-attends=20", "num_self_attention_heads=8", "16 or 24"]),
        ({"qk_channels": 12}, ["qk_channels of the self-attends=12", "num_self_attention_heads=8", "8 or 16"]),
        ({"v_channels": 12}, ["v_channels of the self-attends=12", "num_self_attention_heads=8", "8 or 16"]),
        ({"v_channels": 4}, ["v_channels of the self-attends=4", "nearest widths: 8"]),
        ({"decoder_qk_channels": 12}, ["decoder_qk_channels=12", "decoder_num_heads=8", "8 or 16"]),
        ({"decoder_v_channels": 20}, ["decoder_v_channels=20", "decoder_num_heads=8", "16 or 24"]),
    ],
)
def test_widths_that_heads_do_not_divide_are_told_the_nearest(changes, words):
    fields = {"num_self_attention_heads": 8, "decoder_num_heads": 8, "d_latents": 32, **changes}
    with pytest.raises(ValueError) as error:
        config_of(**fields)
    assert all(word in str(error.value) for word in words)


def test_cross_attention_widths_are_checked_when_the_input_is_known():
    case = tiny("imagenet_fourier")  # 3 + 2 * 7 = 17 channels
    case.config.num_cross_attention_heads = 2
    with pytest.raises(
        ValueError, match="=17 cannot be divided by num_cross_attention_heads=2; nearest widths: 16 or 18"
    ):
        PerceiverIOModel(case.config)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_latents", "x", ["num_latents", "expected int", "'x'"]),
        ("num_latents", 3.0, ["num_latents", "expected int", "3.0"]),
        ("num_blocks", True, ["num_blocks", "expected int", "True"]),
        ("d_latents", None, ["d_latents", "expected int", "None"]),
        ("use_query_residual", 1, ["use_query_residual", "expected bool", "1"]),
        ("dropout", "0.1", ["dropout", "float", "'0.1'"]),
        ("preprocessor", "text", ["preprocessor", "expected a dict, got str"]),
        ("preprocessor", None, ["preprocessor", "expected a dict, got NoneType"]),
        ("output_query", ["position"], ["output_query", "dict"]),
        ("cross_attend_before_blocks", [0, "1"], ["cross_attend_before_blocks", "'1'"]),
        ("cross_attend_before_blocks", 0, ["cross_attend_before_blocks", "list"]),
        ("initializer", "xavier", ["initializer", "'deepmind', 'normal', 'position_aligned'", "xavier"]),
        ("cross_attention_shape_for_attention", "v", ["cross_attention_shape_for_attention", "'kv', 'q'"]),
    ],
)
def test_a_field_of_another_type_is_refused(field, value, words):
    with pytest.raises(ValueError) as error:
        config_of(**{field: value})
    assert all(word in str(error.value) for word in words)
    config = config_of()
    with pytest.raises(ValueError):
        setattr(config, field, value)


def test_whole_numbers_are_welcome_where_fractions_are():
    assert config_of(dropout=0, layer_norm_eps=1, latents_init_scale=1).layer_norm_eps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 1}, r"dropout is a probability in \[0, 1\), not 1"),
        ({"attention_dropout": -0.1}, r"attention_dropout is a probability in \[0, 1\), not -0.1"),
        ({"problem_type": "guess"}, "problem_type.*'guess'.*'?regression'?, '?single_label_classification"),
        ({"latents_init_scale": -1.0}, "latents_init_scale must be 0 or more, not -1.0"),
        ({"initializer_range": -1.0}, "initializer_range must be 0 or more"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps must be 0 or more"),
        ({"hidden_act": "glu"}, "hidden_act='glu' must be one of .*gelu_pytorch_tanh.*relu"),
        ({"cross_attend_before_blocks": []}, "must name blocks 0 to 1 in rising order, at least one"),
        ({"cross_attend_before_blocks": [1]}, r"\[1\] must begin with 0: the latents read first"),
        ({"cross_attend_before_blocks": [0, 2]}, r"\[0, 2\] must name blocks 0 to 1"),
        ({"cross_attend_before_blocks": [0, 1, 0]}, "in rising order"),
        ({"cross_attend_before_blocks": [0, -1]}, "must name blocks 0 to 1"),
        (
            {"cross_attend_sharing": "some"},
            "cross_attend_sharing='some' must be one of all, after_first, none or a list",
        ),
        ({"block_sharing": "some"}, "block_sharing='some' must be one of all, after_first, none or a list"),
        ({"block_sharing": [0]}, r"block_sharing=\[0\] must give 2 indices that use 0, 1, ... without gaps"),
        ({"block_sharing": [0, 2]}, "without gaps"),
        ({"block_sharing": [-1, 0]}, "without gaps"),
        ({"cross_attend_sharing": [0, 1]}, "cross_attend_sharing=.* must give 1 indices"),
        ({"preprocessor": {}}, "the preprocessor spec {} needs a 'kind'"),
        ({"output_query": {"kin": "input"}}, "the output query spec {'kin': 'input'} needs a 'kind'"),
        ({"postprocessor": {"kind": None}}, "the postprocessor spec .* needs a 'kind'"),
        ({"postprocessor": {"kind": "flow", "rescale_factor": float("inf")}}, "must fit into config.json"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_values_set_later_are_checked_by_the_file_and_the_model(tmp_path):
    config = tiny("language").config
    config.num_latents = 0
    with pytest.raises(ValueError, match="num_latents must be at least 1"):
        PerceiverIOModel(config)
    with pytest.raises(ValueError, match="num_latents must be at least 1"):
        config.save_pretrained(tmp_path)


def test_values_given_to_from_pretrained_are_checked(tmp_path):
    config_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_latents must be at least 1"):
        PerceiverIOConfig.from_pretrained(tmp_path, num_latents=0)
    assert PerceiverIOConfig.from_pretrained(tmp_path, num_latents=9).num_latents == 9


def test_only_keywords_are_taken():
    with pytest.raises((TypeError, ValueError)):
        PerceiverIOConfig(256)


# --- sharing


@pytest.mark.parametrize(
    ("sharing", "indices"),
    [("all", [0, 0, 0]), ("after_first", [0, 1, 1]), ("none", [0, 1, 2]), ([0, 1, 0], [0, 1, 0])],
)
def test_sharing_says_which_weights_are_used(sharing, indices):
    config = config_of(
        num_blocks=3, cross_attend_before_blocks=[0, 1, 2], cross_attend_sharing=sharing, block_sharing=sharing
    )
    assert config.weight_indices("cross_attend") == indices
    assert config.weight_indices("block") == indices


def test_no_field_is_taken_for_a_nested_config():
    """transformers' get_text_config() looks for fields of certain names, and then resizes embeddings there."""
    config = config_of()
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config


def test_what_transformers_adds_to_the_plan_of_tensor_parallelism_is_left_out():
    """5.17 sets it on every config with tied embeddings, with a name that is in none of our models."""
    config = config_of()
    plan = config.base_model_tp_plan
    config.base_model_tp_plan = {**plan, "embed_tokens": "embedding_rowwise"}
    assert config.base_model_tp_plan == plan
