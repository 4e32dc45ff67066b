"""What `conversion.inspect` says of the stored pickles, of folders made from them, and of damaged ones."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builtin_models import NAMES, RELEASED, builtin_case, released_config
from parity.deepmind import MODELS, PARITY
from safetensors.torch import save_file

from conversion import convert_haiku, inspect
from conversion.unpickle import ArrayEntry


def manifest_entries(name: str) -> list[ArrayEntry]:
    """The parameter tree of a released model, written down from the original code."""
    tree = json.loads((PARITY / "manifests" / f"{name}.json").read_text())
    return [
        ArrayEntry(section, module, array, tuple(entry["shape"]), entry["dtype"])
        for section in ("params", "state")
        for module, arrays in tree[section].items()
        for array, entry in arrays.items()
    ]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "extra_concat_query"])
def test_each_released_tree_is_known_as_that_model_alone(name):
    assert inspect.which_released(manifest_entries(name))[0] == [MODELS[name]]


def test_one_other_size_is_no_released_model_but_still_its_architecture():
    entries = manifest_entries("masked_lm")
    at = next(i for i, entry in enumerate(entries) if entry.module == "embedding_decoder")
    entries[at] = entries[at]._replace(shape=(263,))
    assert inspect.which_released(entries) == ([], ["masked-lm"])


@pytest.mark.parametrize("name", ["masked_lm", "imagenet_conv", "multimodal", "optical_flow"])
def test_a_pickle_is_listed_counted_and_named(name, capsys):
    assert inspect.main([str(PARITY / f"{name}_a.pystate")]) == 0
    said = capsys.readouterr().out
    described = json.loads((PARITY / f"{name}_a.json").read_text())
    for module, arrays in described["params"].items():
        assert all(f"{module}/{array} " in said for array in arrays)
    assert f"{described['total_params']:,} numbers" in said and "float32" in said
    assert f"the names are those of {MODELS[name]}" in said
    assert ("params and state" in said) == (name == "imagenet_conv")


def test_a_pickle_of_something_else_matches_no_released_model(tmp_path, capsys):
    path = tmp_path / "other.pystate"
    path.write_bytes(pickle.dumps({"a/linear": {"w": np.zeros((2, 3), np.float32)}}, protocol=4))
    assert inspect.main([str(path)]) == 0
    assert "neither names nor sizes" in capsys.readouterr().out


def test_a_converted_folder_holds_the_numbers_of_its_pickle(tmp_path, capsys):
    arguments = ["--model", "masked-lm", "--deepmind-config", str(PARITY / "masked_lm_a.json")]
    pystate = str(PARITY / "masked_lm_a.pystate")
    assert convert_haiku.main([pystate, *arguments, "--output", str(tmp_path / "out")]) == 0
    assert inspect.main([str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors: 89 arrays, 206,438 numbers" in said
    assert "PerceiverIOForMaskedLM" in said and "the names are those of masked-lm" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_the_built_in_is_listed_by_its_own_names(name, tmp_path, capsys):
    builtin_case(name).model().save_pretrained(tmp_path)
    assert inspect.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "built-in Perceiver" in said and "perceiver.embeddings.latents" in said and "by its config" in said


@pytest.mark.parametrize("name", RELEASED)
def test_the_built_ins_released_configs_are_the_released_models(name, tmp_path, capsys):
    released_config(name).save_pretrained(tmp_path)
    save_file({"perceiver.embeddings.latents": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    assert inspect.main([str(tmp_path)]) == 0
    released = dict(zip(RELEASED, inspect.RELEASED, strict=True))
    assert f"by its config; released model: {released[name]}" in capsys.readouterr().out


def test_an_old_bin_is_listed_too(tmp_path, capsys):
    torch.save({"a.weight": torch.zeros(2, 3, dtype=torch.float16)}, tmp_path / "pytorch_model.bin")
    assert inspect.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "a.weight" in said and "float16" in said and "6 numbers" in said


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm-done"),))


def test_nothing_in_a_bin_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    assert inspect.main([str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / "harm-done").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"{", b"\x02" + b"\x00" * 7 + b"[]"]
)
def test_a_damaged_safetensors_file_is_refused(content, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert inspect.main([str(tmp_path)]) == 2
    assert "error: model.safetensors" in capsys.readouterr().err


def test_a_safetensors_file_that_is_cut_off_is_refused(tmp_path, capsys):
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    assert inspect.main([str(tmp_path)]) == 2
    assert "cut off" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    for name in ("empty", "text", "missing"):
        assert inspect.main([str(tmp_path / name)]) == 2
        assert "error: " in capsys.readouterr().err
