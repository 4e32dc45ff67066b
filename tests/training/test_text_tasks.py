"""What the text recipes share refuses what does not fit before any work is done."""

import json

import pytest
from helpers import config_of, trainable
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from hf_perceiver import PerceiverIOForTokenClassification, PerceiverIOTokenizer
from hf_perceiver.training import question_answering, text_classification, token_classification
from hf_perceiver.training.recipe import ModelArguments, open_model
from hf_perceiver.training.text_tasks import (
    check_labels,
    checkpoint_fields,
    class_names,
    json_lines,
    load_tokenizer,
    open_tokenizer,
    window_length,
)


def text_config(**changes):
    position = trainable(40, 16)
    fields = {
        "vocab_size": 262,
        "preprocessor": {"kind": "text", "channels": 16, "position": position},
        "output_query": {"kind": "position", "position": position},
        "postprocessor": {"kind": "tokens"},
    }
    return config_of(**{**fields, **changes})


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert', another architecture"):
        checkpoint_fields(ModelArguments(model=str(tmp_path)))
    assert checkpoint_fields(ModelArguments(model="bundled:language"))["model_type"] == "perceiver_io"


def test_classes_are_those_of_the_data_with_outside_first():
    fresh = ModelArguments(model="bundled:language")
    assert class_names(fresh, PerceiverIOForTokenClassification, ["B-X", "A", "O"]) == ["O", "A", "B-X"]
    with pytest.raises(ValueError, match=r"1 classes \(O\); two are the least"):
        class_names(fresh, PerceiverIOForTokenClassification, ["O", "O"])


def test_a_trained_head_keeps_its_classes_and_refuses_others(tmp_path):
    names = {"num_labels": 2, "id2label": {0: "z", 1: "a"}, "label2id": {"z": 0, "a": 1}}
    PerceiverIOForTokenClassification(text_config(**names)).save_pretrained(tmp_path)
    trained = ModelArguments(model=str(tmp_path))
    assert class_names(trained, PerceiverIOForTokenClassification, ["a"]) == ["z", "a"]
    with pytest.raises(ValueError, match=r"unknown labels 'q'; .* has learnt z, a"):
        class_names(trained, PerceiverIOForTokenClassification, ["a", "q"])


def test_unknown_labels_are_named():
    with pytest.raises(ValueError, match="unknown labels 'B-Y'; the classes are O, B-X"):
        check_labels({"O", "B-Y"}, ["O", "B-X"], "the classes are")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    tokenizer = PerceiverIOTokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="263 tokens, the model 262"):
        open_tokenizer(ModelArguments(model="bundled:language"), text_config(), str(tmp_path))
    with pytest.raises(ValueError, match="no tokenizer ships for the 30 tokens"):
        open_tokenizer(ModelArguments(architecture="language_bytes"), text_config(vocab_size=30))


def test_the_models_revision_is_its_own_tokenizers_and_no_others(monkeypatch):
    asked = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda place, **how: asked.append((place, how)))
    models = ModelArguments(model="someone/model", revision="v2", trust_remote_code=True)
    load_tokenizer(models, text_config())
    load_tokenizer(models, text_config(), "other/tokenizer")
    assert asked == [
        ("someone/model", {"trust_remote_code": True, "revision": "v2"}),
        ("other/tokenizer", {"trust_remote_code": True}),
    ]


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    inner = AutoTokenizer.from_pretrained(_saved(tmp_path / "a"))._tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="no padding token"):
        open_tokenizer(ModelArguments(model="bundled:language"), text_config(), str(tmp_path / "b"))


def _saved(folder):
    PerceiverIOTokenizer().save_pretrained(folder)
    return folder


def test_the_bytes_tokenizer_of_fresh_weights_is_as_long_as_the_model():
    assert open_tokenizer(ModelArguments(architecture="language_bytes"), text_config()).model_max_length == 40


@pytest.mark.parametrize(
    ("wanted", "stride", "message"),
    [
        (41, 0, "max_length=41: this model reads windows of 3 to 40 tokens"),
        (2, 0, "max_length=2"),
        (10, 8, "cannot share 8; choose 0 to 7"),
        (None, -1, "cannot share -1"),
    ],
)
def test_windows_fit_the_model_and_move_on(wanted, stride, message):
    with pytest.raises(ValueError, match=message):
        window_length(text_config(), PerceiverIOTokenizer(model_max_length=64), wanted, stride)


def test_windows_are_as_long_as_both_model_and_tokenizer_read():
    config = text_config()
    assert window_length(config, PerceiverIOTokenizer(model_max_length=64), None) == 40
    assert window_length(config, PerceiverIOTokenizer(model_max_length=24), None) == 24
    assert window_length(config, PerceiverIOTokenizer(model_max_length=24), 30, 27) == 30


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"a.jsonl:3 is not a JSON object but list"):
        list(json_lines(path))
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"a.jsonl:1 is not JSON"):
        list(json_lines(path))
    path.write_text(json.dumps({"ä": "ü"}, ensure_ascii=False), encoding="utf-8")
    assert list(json_lines(path)) == [(1, {"ä": "ü"})]


def test_an_image_model_is_refused():
    with pytest.raises(ValueError, match="reads text input"):
        open_model(PerceiverIOForTokenClassification, ModelArguments(model="bundled:digits"), num_labels=2)


@pytest.mark.parametrize("recipe", [text_classification, token_classification, question_answering])
def test_the_help_lists_the_options(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    shown = capsys.readouterr().out
    for option in ("--train_file", "--model", "--max_length", "--learning_rate", "--smoke_test", "--tokenizer"):
        assert option in shown
