"""What we write must load in transformers' own Perceiver and give its numbers; what it cannot give must be refused."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers
from builtin_models import CASES, NAMES, TEXT, assert_same_outputs, builtin_case, builtin_outputs, relative_l2
from helpers import CLASSES, PIXELS, config_of, fourier, grid, tiny, trainable
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PerceiverConfig,
    PerceiverForMaskedLM,
    PerceiverModel,
    PerceiverTokenizer,
    pipeline,
)
from transformers.models.perceiver.modeling_perceiver import PerceiverTextPreprocessor

from hf_perceiver import (
    PerceiverIOConfig,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultipleChoice,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOModel,
    apply_numerics,
    builtin,
    export_builtin,
    override_builtin,
    recipes,
    restore_builtin,
)


@pytest.fixture
def overridden():
    override_builtin()
    yield
    restore_builtin()


@pytest.fixture
def warnings(caplog):
    """Texts of this module's warnings; transformers' loggers do not reach the root by themselves."""
    logger = logging.getLogger("hf_perceiver.builtin")
    logger.addHandler(caplog.handler)
    yield lambda: [r.getMessage() for r in caplog.records if r.name == logger.name and r.levelno == logging.WARNING]
    logger.removeHandler(caplog.handler)


def assert_same_files(a, b):
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# Fields of the built-in's config that its task classes have no use for, and that a round trip so loses.
UNUSED = {
    "Image": {"d_model", "max_position_embeddings", "vocab_size"},
    "Flow": {"d_model", "max_position_embeddings"},
    "Multimodal": {"d_model", "max_position_embeddings"},
}


@pytest.mark.parametrize("whole", [False, True], ids=["head", "PerceiverIOModel"])
@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_is_bitwise(name, whole, tmp_path):
    case = builtin_case(name)
    names = {i: f"class {i}" for i in range(5)}
    theirs = case.model(id2label=names, label2id={v: k for k, v in names.items()}, attention_probs_dropout_prob=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = (PerceiverIOModel if whole else case.ours).from_pretrained(tmp_path / "theirs")
    export_builtin(ours, tmp_path / "exported")
    assert_same_files(tmp_path / "exported", tmp_path / "theirs")
    configs = [PerceiverConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("exported", "theirs")]
    lost = set().union(*(fields for word, fields in UNUSED.items() if word in name))
    for config in configs:
        for field in [*lost, *(key for key in config if key.endswith("_token_id"))]:
            config.pop(field, None)
    assert configs[0] == configs[1]
    again = type(theirs).from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        got, want = again(**case.inputs()).logits, theirs(**case.inputs()).logits
    for a, b in zip(*((x.values() if isinstance(x, dict) else [x]) for x in (got, want)), strict=True):
        # Not bitwise: a mapped file's tensors are aligned otherwise, and matrix products sum in another order.
        assert relative_l2(a, b) < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_a_model_made_here_gives_its_numbers_there(name, tmp_path):
    case = builtin_case(name)
    config = PerceiverIOConfig.from_dict({**case.config().to_dict(), "architectures": [name]})
    config.hidden_act = "gelu_pytorch_tanh"  # the built-in knows it by this name too
    ours = case.ours(config).double().eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    export_builtin(ours, tmp_path / "exported")
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.dtype == torch.float64 and theirs.config.architectures == [name]
    with torch.no_grad():
        outputs = ours(**case.our_inputs())
    assert_same_outputs(outputs, *builtin_outputs(theirs, case.inputs()))


def test_config_json_holds_every_field_of_the_builtin(tmp_path):
    model = tiny_language()
    export_builtin(model, tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    base = PerceiverConfig.__mro__[1].__dataclass_fields__
    own = {name for name in PerceiverConfig.__dataclass_fields__ if name not in base}
    assert own <= written.keys()
    assert written["model_type"] == "perceiver" and written["architectures"] == ["PerceiverForMaskedLM"]
    assert written["mask_token_id"] == 3 and "preprocessor" not in written


def tiny_language(**changes):
    fields = {**PerceiverConfig(**TEXT).to_dict(), "architectures": ["PerceiverForMaskedLM"]}
    config = PerceiverIOConfig.from_dict(fields)
    for name, value in changes.items():
        setattr(config, name, value)
    return PerceiverIOForMaskedLM(config).eval()


def test_a_resized_vocabulary_is_exported(tmp_path):
    model = tiny_language()
    model.resize_token_embeddings(41)
    export_builtin(model, tmp_path / "exported")
    theirs = PerceiverForMaskedLM.from_pretrained(tmp_path / "exported")
    ids = torch.tensor([[40, 7, 12]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits[:, :3], atol=1e-6)


def test_text_encoders_are_exported_for_the_bare_model(tmp_path):
    config = tiny_language().config
    config.output_query = config.postprocessor = None
    ours = PerceiverIOModel(config).double().eval()
    export_builtin(ours, tmp_path / "text")
    builtin_config = PerceiverConfig.from_pretrained(tmp_path / "text")
    text = PerceiverTextPreprocessor(builtin_config).double()
    theirs, info = PerceiverModel.from_pretrained(tmp_path / "text", input_preprocessor=text, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(6, 30, (2, 8))
    with torch.no_grad():
        assert relative_l2(ours(input_ids=ids).last_hidden_state, theirs(inputs=ids).last_hidden_state) < 1e-12


def test_feature_readers_are_exported_as_the_bare_model(tmp_path):
    config = tiny_language(preprocessor=tiny_language().config.preprocessor).config
    config.preprocessor = {"kind": "points", "feature_channels": 11}
    config.output_query = config.postprocessor = None
    ours = PerceiverIOModel(config).double().eval()
    export_builtin(ours, tmp_path / "points")
    theirs, info = PerceiverModel.from_pretrained(tmp_path / "points", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    array = torch.randn(2, 7, 11, dtype=torch.float64)
    with torch.no_grad():
        assert relative_l2(ours(inputs=array).last_hidden_state, theirs(inputs=array).last_hidden_state) < 1e-12


# What the built-in cannot express


def released(recipe):
    return apply_numerics(recipe(), "builtin")


def changed(recipe, **changes):
    config = released(recipe)
    for path, value in changes.items():
        *outer, last = path.split("__")
        spec = config
        for name in outer:
            spec = getattr(spec, name) if isinstance(spec, PerceiverIOConfig) else spec[name]
        if isinstance(spec, dict):
            spec[last] = value
        else:
            setattr(spec, last, value)
    return config


LANGUAGE, FOURIER, LEARNED = recipes.language_bytes, recipes.imagenet_fourier, recipes.imagenet_learned
CONV, FLOW, VIDEO = recipes.imagenet_conv, recipes.optical_flow, recipes.multimodal_autoencoder
CANNOT = [
    (FOURIER, {"cross_attend_before_blocks": [0, 3]}, r"cross_attends is \[0, 0\], there \[0\]"),
    (FOURIER, {"block_sharing": "none"}, r"blocks is \[0, 1, 2, 3, 4, 5, 6, 7\], there \[0, 0, 0, 0, 0, 0, 0, 0\]"),
    (FOURIER, {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06, there 1e-05"),
    (FOURIER, {"v_channels": 512}, "v_channels is 512, there 1024"),
    (FOURIER, {"decoder_use_query_residual": False}, "decoder_use_query_residual is False, there True"),
    (FOURIER, {"decoder_num_heads": 4}, "decoder_num_heads is 4, there 1"),
    (FOURIER, {"decoder_widening_factor": 4}, "decoder_widening_factor is 4, there 1"),
    (FOURIER, {"decoder_qk_channels": 64}, "decoder_qk_channels is 64, there 1024"),
    (FOURIER, {"output_query__channels": 512}, "output_query.channels is 512, there 1024"),
    (FOURIER, {"output_query__num_tasks": 8}, "output_query.num_tasks is 8, there 1"),
    (FOURIER, {"postprocessor__hidden": 64}, "postprocessor.hidden is 64, there None"),
    (FOURIER, {"postprocessor__num_outputs": 7}, "postprocessor.num_outputs is 7, there 1000"),
    (FOURIER, {"preprocessor__stem__in_channels": 1}, "preprocessor.stem.in_channels is 1, there 3"),
    (FOURIER, {"preprocessor__stem__spatial_downsample": 2}, "preprocessor.stem.spatial_downsample is 2, there 1"),
    (FOURIER, {"preprocessor__position__num_bands": 32}, "preprocessor.position.num_bands is 32, there 64"),
    (
        FOURIER,
        {"preprocessor__position__max_resolution": [56, 56]},
        r"max_resolution is \[56, 56\], there \[224, 224\]",
    ),
    (FOURIER, {"preprocessor__position__sine_only": True}, "preprocessor.position.sine_only is True, there False"),
    (FOURIER, {"preprocessor__position": None}, "preprocessor.position.kind is None, there 'fourier'"),
    (FOURIER, {"preprocessor__combine": "add"}, "preprocessor.combine is 'add', there 'concat'"),
    (CONV, {"preprocessor__stem__padding": "same"}, "preprocessor.stem.padding is 'same', there 'builtin'"),
    (CONV, {"preprocessor__stem__num_layers": 2}, "preprocessor.stem.num_layers is 2, there 1"),
    (CONV, {"preprocessor__stem__use_batchnorm": False}, "preprocessor.stem.use_batchnorm is False, there True"),
    (
        LEARNED,
        {"preprocessor__position__position__grid": [112, 448]},
        r"position.grid is \[112, 448\], there \[224, 224\]",
    ),
    (LEARNED, {"preprocessor__position__num_extra_mlps": 2}, "num_extra_mlps is 2, there 0"),
    (LANGUAGE, {"output_query__concat_input": True}, "output_query.concat_input is True, there False"),
    (LANGUAGE, {"output_query__position__num_positions": 7}, "output_query.position.num_positions is 7, there 2048"),
    (LANGUAGE, {"preprocessor__position": fourier(2048)}, "preprocessor.position.kind is 'fourier', there 'trainable'"),
    (LANGUAGE, {"postprocessor__tied": False}, "postprocessor.tied is False, there True"),
    (LANGUAGE, {"tie_word_embeddings": False}, "tie_word_embeddings is False, there True"),
    (LANGUAGE, {"decoder_v_channels": 256}, "decoder_v_channels is 256, there 768"),
    (FLOW, {"postprocessor__rescale_factor": 20.0}, "postprocessor.rescale_factor is 20.0, there 100.0"),
    (FLOW, {"preprocessor__stem__project": 32}, "preprocessor.stem.project is 32, there 64"),
    (VIDEO, {"preprocessor__min_padding_size": 2}, "preprocessor.min_padding_size is 2, there 4"),
    (VIDEO, {"preprocessor__mask_probs": None}, "preprocessor.mask tokens is False, there True"),
    (VIDEO, {"preprocessor__masked_at_inference": []}, r"masked_at_inference is \[\], there \['label'\]"),
    (
        VIDEO,
        {"output_query__modalities__audio__position__rule": "dense"},
        "audio.position.rule is 'dense', there 'sampled'",
    ),
    (VIDEO, {"output_query__modalities__audio__scale": [2]}, r"modalities.audio.grid is \[3840\], there \[1920\]"),
    (VIDEO, {"preprocessor__modalities__label__channels": 10}, "modalities.label.channels is 10, there 700"),
    (VIDEO, {"num_labels": 10}, "modalities.label.channels is 700, there 10"),
    (VIDEO, {"preprocessor__modalities__audio__position__max_resolution": [30_721]}, r"is \[30721\], there \[30720\]"),
]


@pytest.mark.parametrize(("recipe", "changes", "message"), CANNOT, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_the_builtin_cannot_express_is_named(recipe, changes, message):
    builtin.builtin_config(released(recipe))  # nothing but the change is in the way
    with pytest.raises(ValueError, match=f"cannot express this model: .*{message}"):
        builtin.builtin_config(changed(recipe, **changes))


@pytest.mark.parametrize("name", ["PerceiverForMaskedLM", "PerceiverForMultimodalAutoencoding"])
def test_every_released_size_goes_there_and_back(name):
    recipe = {"PerceiverForMaskedLM": LANGUAGE, "PerceiverForMultimodalAutoencoding": VIDEO}[name]
    architecture, config = builtin.builtin_config(released(recipe))
    assert architecture == name
    again = PerceiverIOConfig.from_dict(config.to_dict())
    assert builtin.builtin_config(again)[1].to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("head", "kinds"),
    [
        (PerceiverIOForTokenClassification, "text, -, position, projection"),
        (PerceiverIOForMultipleChoice, "num_outputs is 1, there 5"),
        # A class query as wide as the language model's queries, so that its decoder stays of use.
        (PerceiverIOForSequenceClassification, "output_query.channels is 16, there 24"),
    ],
)
def test_heads_that_the_builtin_lacks_are_refused(head, kinds, tmp_path):
    model = head(tiny_language().config)
    with pytest.raises(ValueError, match=kinds):
        export_builtin(model, tmp_path / "exported")
    assert not any(tmp_path.iterdir())


def test_parts_that_the_builtin_lacks_are_refused():
    for name in ("original_shared", "text_average", "points", "video", "audio", "vector"):
        with pytest.raises(ValueError, match="has no class for a model of the kinds"):
            builtin.builtin_config(tiny(name).config)
    with pytest.raises(ValueError, match=r"position\.kind is 'projected', there 'fourier'"):
        position = {"kind": "projected", "position": fourier(4, 4), "channels": 8}
        builtin.builtin_config(config_of(preprocessor=grid(PIXELS, position), **CLASSES))


def test_what_the_builtin_lacks_at_the_edges_is_a_warning(warnings, tmp_path):
    model = tiny_language()
    export_builtin(model, tmp_path / "a")
    assert not warnings()
    config = apply_numerics(model.config, "deepmind")
    config.dropout = 0.1
    export_builtin(PerceiverIOForMaskedLM(config), tmp_path / "b")
    text = "\n".join(warnings())
    assert "gets the mean of the values there, not 0" in text
    assert "queries at masked positions are answered like any other" in text
    assert "only attention probabilities are dropped" in text
    builtin.builtin_config(
        changed(VIDEO, preprocessor__mask_probs={"label": 0.5}, preprocessor__masked_at_inference=["label"])
    )
    text = "\n".join(warnings())
    assert "masks in training are of probability 1" in text and "output grid stays the one written" in text


def test_pixels_without_masks_need_no_warning_about_them(warnings):
    builtin.builtin_config(recipes.imagenet_fourier())
    builtin.builtin_config(recipes.optical_flow())
    assert not warnings()


def test_a_model_without_its_weights_is_refused(tmp_path):
    with torch.device("meta"):
        model = PerceiverIOForMaskedLM(tiny_language().config)
    with pytest.raises(ValueError, match="meta device"):
        export_builtin(model, tmp_path / "exported")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    model = tiny_language()
    model.perceiver.encoder.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"perceiver\.encoder\.extra\.bias: \(2,\), there nothing"):
        export_builtin(model, tmp_path / "exported")


# Folders


def test_a_folder_with_files_is_left_alone_unless_asked(tmp_path):
    model, folder = tiny_language(), tmp_path / "exported"
    folder.mkdir()
    export_builtin(model, folder)  # an empty one is as good as none
    before = (folder / "model.safetensors").read_bytes()
    for name in (
        "tokenizer.json",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (folder / name).write_text("old")
    other = tiny_language()
    with pytest.raises(ValueError, match="not an empty folder; choose another or pass overwrite=True"):
        export_builtin(other, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    export_builtin(other, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_builtin(tiny_language(), tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(builtin, "save_torch_state_dict", full)
    with pytest.raises(OSError, match="no space"):
        export_builtin(tiny_language(), tmp_path / "deep" / "exported")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["deep"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_what_the_user_lets_them_read(tmp_path):
    export_builtin(tiny_language(), tmp_path / "exported")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "exported").stat().st_mode == (tmp_path / "plain").stat().st_mode


# override_builtin


@pytest.mark.medium
def test_importing_the_package_changes_nothing_for_the_builtin():
    code = """
        import transformers
        from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModelForMaskedLM, PerceiverConfig
        import hf_perceiver
        assert CONFIG_MAPPING["perceiver"] is PerceiverConfig
        assert MODEL_MAPPING[PerceiverConfig] is transformers.PerceiverModel
        config = transformers.AutoConfig.for_model("perceiver", d_latents=8, num_self_attends_per_block=1)
        assert type(config) is PerceiverConfig
        assert type(AutoModelForMaskedLM.from_config(config)) is transformers.PerceiverForMaskedLM
        assert transformers.conversion_mapping.get_checkpoint_conversion_mapping("perceiver") is None
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_overriding_and_restoring_can_be_repeated():
    assert type(AutoConfig.for_model("perceiver")) is PerceiverConfig
    restore_builtin()
    for _ in range(2):
        override_builtin()
        override_builtin()
        assert AutoConfig.for_model("perceiver").model_type == "perceiver_io"
        restore_builtin()
        restore_builtin()
        assert type(AutoConfig.for_model("perceiver")) is PerceiverConfig
        assert "perceiver" not in transformers.CONFIG_MAPPING._extra_content


def test_restoring_gives_back_what_someone_else_had_registered():
    class Other(PerceiverConfig):
        pass

    transformers.CONFIG_MAPPING.register("perceiver", Other, exist_ok=True)
    try:
        override_builtin()
        restore_builtin()
        assert transformers.CONFIG_MAPPING["perceiver"] is Other
    finally:
        del transformers.CONFIG_MAPPING._extra_content["perceiver"]


AUTO = {
    "PerceiverForMaskedLM": AutoModelForMaskedLM,
    "PerceiverForSequenceClassification": AutoModelForSequenceClassification,
    "PerceiverForImageClassificationLearned": AutoModelForImageClassification,
    "PerceiverForImageClassificationFourier": AutoModelForImageClassification,
    "PerceiverForImageClassificationConvProcessing": AutoModelForImageClassification,
    "PerceiverForOpticalFlow": AutoModel,
    "PerceiverForMultimodalAutoencoding": AutoModel,
}


@pytest.mark.parametrize("name", NAMES)
def test_auto_classes_load_the_builtins_checkpoints_as_ours(name, overridden, tmp_path):
    case = CASES[name]
    theirs = case.model()
    theirs.save_pretrained(tmp_path)
    ours = AUTO[name].from_pretrained(tmp_path)
    assert type(ours) is (PerceiverIOModel if AUTO[name] is AutoModel else case.ours)
    with torch.no_grad():
        assert_same_outputs(ours(**case.our_inputs()), *builtin_outputs(theirs, case.inputs()))


def test_auto_classes_take_the_numerics(overridden, tmp_path):
    builtin_case("PerceiverForMaskedLM").model().save_pretrained(tmp_path)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config.hidden_act == "gelu"
    original = AutoModelForMaskedLM.from_pretrained(tmp_path, numerics="deepmind")
    assert original.config.hidden_act == "gelu_pytorch_tanh"
    assert AutoConfig.from_pretrained(tmp_path, numerics="deepmind").zero_masked_rows
    pixels = builtin_case("PerceiverForImageClassificationFourier")
    pixels.model().config.save_pretrained(tmp_path / "config")  # names no class
    with pytest.raises(ValueError, match="reads grid or points or multimodal input"):
        AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path / "config"))
    config = AutoConfig.from_pretrained(tmp_path / "config", architecture=pixels.name)
    assert type(AutoModelForImageClassification.from_config(config)) is PerceiverIOForImageClassification


def test_fill_mask_on_a_builtin_repository_gives_our_class_and_its_answers(tmp_path):
    model = builtin_case("PerceiverForMaskedLM").model(vocab_size=262, max_position_embeddings=64)
    model.save_pretrained(tmp_path)
    PerceiverTokenizer(model_max_length=64).save_pretrained(tmp_path)
    text = "some words are[MASK] missing"
    theirs = pipeline("fill-mask", model=str(tmp_path))
    assert type(theirs.model) is PerceiverForMaskedLM
    want = theirs(text)
    override_builtin()
    try:
        ours = pipeline("fill-mask", model=str(tmp_path))
        assert type(ours.model) is PerceiverIOForMaskedLM
        ids = AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
        got = ours(text)
    finally:
        restore_builtin()
    assert ids == PerceiverTokenizer()(text).input_ids
    assert [a["token"] for a in got] == [a["token"] for a in want]
    assert [a["score"] for a in got] == pytest.approx([a["score"] for a in want], rel=1e-9)


def test_another_scale_of_the_video_is_another_output_shape():
    _, config = builtin.builtin_config(changed(VIDEO, output_query__modalities__image__scale=[1, 2, 4]))
    assert config.output_shape == [1, 16, 112, 224]


def test_a_trainable_text_query_of_another_table_is_refused():
    config = tiny_language().config
    config.output_query["position"] = trainable(20, 16, grid=[4, 5])
    with pytest.raises(ValueError, match=r"output_query.position.grid is \[4, 5\], there None"):
        builtin.builtin_config(config)
