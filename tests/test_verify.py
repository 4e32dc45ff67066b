"""`conversion.verify`: what passes, what does not, and what cannot be compared.

Stored models: tests/reference/parity. That every one of them, and 55 others, passes is in test_convert_haiku.py.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.deepmind import MODELS, PARITY
from safetensors.torch import load_file, save_file

from conversion import convert_haiku, verify
from hf_perceiver.fast_writing import FastWriter


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Converted stored models; not to be changed."""
    made = {}
    for name in ("masked_lm", "optical_flow", "imagenet_conv", "multimodal", "imagenet_learned"):
        made[name] = tmp_path_factory.mktemp("verify") / name
        given = ["--model", MODELS[name], "--deepmind-config", str(PARITY / f"{name}_a.json")]
        assert convert_haiku.main([str(PARITY / f"{name}_a.pystate"), *given, "--output", str(made[name])]) == 0
    return made


def compare(folder: Path, reference: Path | str, *more: str) -> int:
    path = PARITY / f"{reference}_a.npz" if isinstance(reference, str) else reference
    return verify.main([str(folder), "--reference", str(path), *more])


def corrupted(folder: Path, tmp_path: Path, name: str, change: Any) -> Path:
    """A copy of a folder in which one tensor is changed."""
    copy = tmp_path / "corrupted"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def changed(name: str, tmp_path: Path, **arrays: Any) -> Path:
    """A copy of a stored reference with arrays replaced, or left out where None is given."""
    with np.load(PARITY / f"{name}_a.npz") as stored:
        kept = {what: value for what, value in stored.items()} | arrays
    path = tmp_path / "reference.npz"
    np.savez(path, **{what: value for what, value in kept.items() if value is not None})
    return path


# --- the table


def test_each_stage_has_its_line_and_the_bound_of_positions_is_stated(folders, capsys):
    assert compare(folders["multimodal"], "multimodal") == 0
    said = capsys.readouterr().out
    for stage in ("encoder input, audio: positions", "query, image: positions", "after the read", "latents", "decoded"):
        assert f"  {stage}" in said
    for stage in ("logits, audio", "logits, image", "logits, label"):
        assert said.count(stage) == 2  # judged, and reported the whole way
    assert "pi * max_resolution / 2" in said and "max abs" in said and "relative L2" in said


def test_the_bound_of_positions_grows_with_the_resolution(folders):
    rows = {row.stage: row for row in verify.verify(folders["multimodal"], PARITY / "multimodal_a.npz").positions}
    spec = json.loads((folders["multimodal"] / "config.json").read_text())["preprocessor"]["modalities"]

    def rounding(modality: str) -> float:
        return 4 * 2**-23 * math.pi / 2 * max(spec[modality]["position"]["max_resolution"])

    for modality in ("audio", "image"):
        row = rows[f"encoder input, {modality}: positions"]
        assert row.measure == "max abs" and row.bound is not None
        # Beside it, 1e-5 of the greatest number, which is a sine's 1.
        assert row.bound == pytest.approx(rounding(modality) + 1e-5, rel=1e-3)
    assert rows["encoder input, label"].measure == "relative L2"


def test_trained_positions_have_no_other_bound_than_the_tolerance(folders):
    rows = verify.verify(folders["imagenet_learned"], PARITY / "imagenet_learned_a.npz", 3e-6).positions
    assert {row.bound for row in rows} == {3e-6} and {row.measure for row in rows} == {"relative L2"}


def test_flow_is_compared_in_pixels(folders, capsys):
    assert compare(folders["optical_flow"], "optical_flow") == 0
    assert "times 20" in capsys.readouterr().out


def test_flow_may_be_stored_as_the_model_gives_it(folders, tmp_path, capsys):
    with np.load(PARITY / "optical_flow_a.npz") as stored:
        path = changed("optical_flow", tmp_path, outputs=stored["outputs"] / 20)
    assert compare(folders["optical_flow"], path) == 0
    assert "times 1" in capsys.readouterr().out


def test_the_whole_way_is_as_users_run_it_and_the_passes_are_not(folders, tmp_path, monkeypatch):
    """Only what nothing watches takes attention's faster forms, here one that is wrong."""
    folder = tmp_path / "always"
    shutil.copytree(folders["optical_flow"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fast_attention": "always"}))
    write = FastWriter.write
    monkeypatch.setattr(FastWriter, "write", lambda *args: None if (out := write(*args)) is None else 2 * out)
    report = verify.verify(folder, PARITY / "optical_flow_a.npz")
    assert report.holds
    assert report.whole[-1].stage == "logits" and report.whole[-1].relative == pytest.approx(1, rel=1e-3)


# --- exit status 1


@pytest.mark.parametrize(
    ("model", "name", "stage"),
    [
        ("masked_lm", "perceiver.preprocessor.position.embeddings", "encoder input"),
        ("masked_lm", "perceiver.encoder.latents.weight", "latents at the start"),
        ("masked_lm", "perceiver.encoder.cross_attends.0.cross_attn.v_proj.weight", "after the read"),
        ("masked_lm", "perceiver.encoder.blocks.0.2.mlp.down_proj.weight", "latents"),
        ("masked_lm", "perceiver.output_query.position.embeddings", "query"),
        ("masked_lm", "perceiver.decoder.cross_attend.mlp.up_proj.weight", "decoded"),
        ("masked_lm", "perceiver.postprocessor.output_embedding.bias", "logits"),
        ("imagenet_conv", "perceiver.preprocessor.stem.norms.0.running_var", "stem (convnet_out)"),
        ("multimodal", "perceiver.preprocessor.padding.image", "encoder input, image: the rest"),
        ("multimodal", "perceiver.preprocessor.mask_tokens.label", "encoder input, label"),
        ("multimodal", "perceiver.output_query.padding.audio", "query, audio: the rest"),
    ],
)
def test_a_weight_that_is_off_by_a_thousandth_is_found_at_its_stage(model, name, stage, folders, tmp_path, capsys):
    folder = corrupted(folders[model], tmp_path, name, lambda tensor: tensor * 1.001)
    assert compare(folder, model) == 1
    said = capsys.readouterr().out
    above = said.split("above its bound: ")[-1].strip().split("; ")
    assert stage in above
    assert "ABOVE ITS BOUND" in said


def test_one_wrong_number_in_a_matrix_is_found(folders, tmp_path):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] += 0.05
        return tensor

    name = "perceiver.encoder.blocks.0.1.self_attn.o_proj.weight"
    assert compare(corrupted(folders["masked_lm"], tmp_path, name, change), "masked_lm") == 1


def test_a_weight_that_is_not_a_number_does_not_pass(folders, tmp_path):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, math.nan)

    name = "perceiver.postprocessor.output_embedding.bias"
    assert compare(corrupted(folders["masked_lm"], tmp_path, name, change), "masked_lm") == 1


def test_a_tolerance_below_float32_is_not_met(folders):
    assert compare(folders["masked_lm"], "masked_lm", "--tolerance", "1e-9") == 1


def test_weights_rounded_to_bfloat16_are_above_the_bound(tmp_path):
    given = ["--model", "masked-lm", "--deepmind-config", str(PARITY / "masked_lm_a.json"), "--dtype", "bfloat16"]
    pystate = str(PARITY / "masked_lm_a.pystate")
    assert convert_haiku.main([pystate, *given, "--output", str(tmp_path / "out")]) == 0
    assert compare(tmp_path / "out", "masked_lm") == 1
    assert compare(tmp_path / "out", "masked_lm", "--tolerance", "0.05") == 0


# --- exit status 2


def test_another_models_reference_cannot_be_compared(folders, capsys):
    for other in ("optical_flow", "imagenet_conv", "multimodal"):
        assert compare(folders["masked_lm"], other) == 2
        assert compare(folders[other], "masked_lm") == 2
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["encoder_inputs", "decoder_query", "outputs", "input_mask"])
def test_an_array_that_is_needed_is_named_when_it_is_missing(name, folders, tmp_path, capsys):
    assert compare(folders["masked_lm"], changed("masked_lm", tmp_path, **{name: None})) == 2
    assert name in capsys.readouterr().err


def test_another_shape_cannot_be_compared(folders, tmp_path, capsys):
    path = changed("masked_lm", tmp_path, outputs=np.zeros((4, 64, 261), np.float32))
    assert compare(folders["masked_lm"], path) == 2
    assert "(4, 64, 261)" in capsys.readouterr().err


def test_what_is_no_folder_or_no_reference_cannot_be_compared(folders, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", encoder_inputs=np.array([{}], dtype=object))
    for name in ("text.npz", "objects.npz", "missing.npz"):
        assert compare(folders["masked_lm"], tmp_path / name) == 2
    assert compare(tmp_path, "masked_lm") == 2
    (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')
    assert compare(tmp_path, "masked_lm") == 2
    assert "convert_builtin" in capsys.readouterr().err


def test_a_folder_with_a_missing_weight_cannot_be_compared(folders, tmp_path, capsys):
    shutil.copytree(folders["masked_lm"], tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    del tensors["perceiver.decoder.cross_attend.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert compare(tmp_path / "copy", "masked_lm") == 2
    assert "decoder.cross_attend.mlp.up_proj.weight" in capsys.readouterr().err
