"""Small checkpoints are halved in the file and whole in use."""

import json

import torch
from helpers import tiny
from safetensors.torch import load_file

from hf_perceiver import PerceiverIOModel
from hf_perceiver.training.storage import save_halved, write_text


def test_saved_in_bfloat16_and_loaded_in_float32(tmp_path):
    model = PerceiverIOModel(tiny("imagenet_fourier").config)
    save_halved(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = PerceiverIOModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16).float()), name


def test_text_appears_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a" / "notes.txt", "one")
    write_text(tmp_path / "a" / "notes.txt", "two")
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["notes.txt"]
    assert (tmp_path / "a" / "notes.txt").read_text() == "two"
