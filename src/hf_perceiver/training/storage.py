"""Writing small checkpoints: bfloat16 in the file, float32 in use."""

import json
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel


def save_halved(model: PreTrainedModel, directory: Path) -> None:
    """config.json and model.safetensors in bfloat16; the config says float32, so that loaded weights compute in it."""
    halved = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=halved)
    config = json.loads((directory / "config.json").read_text())
    config["dtype"] = "float32"
    write_text(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
