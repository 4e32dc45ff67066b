"""DeepMind's pickles -> Hub folders, by the command, and the folders against DeepMind's numbers.

Checkpoints and references: tests/reference/parity, see parity/test_small_models.py and parity/test_options.py for where
they come from. Each folder is judged by `conversion.verify` at its default tolerance, the issue's 1e-5.
"""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.deepmind import MODELS, PARITY
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from conversion import convert_haiku, verify
from conversion.dump_reference import draw_inputs, draw_weights

ROOT = Path(__file__).parent.parent
CONVERT = [sys.executable, "-m", "conversion.convert_haiku"]
OPTIONS: dict[str, Any] = json.loads((PARITY / "options.json").read_text())


def convert(checkpoint: Path, model: str, output: Path, *more: str, config: Path | None = None) -> int:
    chosen = [] if config is None else ["--deepmind-config", str(config)]
    return convert_haiku.main([str(checkpoint), "--model", model, *chosen, "--output", str(output), *more])


def small(name: str, output: Path, *more: str) -> int:
    """Convert a stored model."""
    return convert(PARITY / f"{name}_a.pystate", MODELS[name], output, *more, config=PARITY / f"{name}_a.json")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what it is for


@pytest.mark.parametrize("pickle_file", sorted(PARITY.glob("*.pystate")), ids=lambda path: path.name)
def test_every_stored_checkpoint_becomes_a_folder_that_gives_deepminds_numbers(pickle_file, tmp_path):
    name = pickle_file.name.split("_a.")[0]
    config = PARITY / f"{name}_a.json"
    assert convert(pickle_file, MODELS[name], tmp_path / "out", config=config) == 0
    assert {"config.json", "model.safetensors", "README.md"} <= set(left_in(tmp_path / "out"))
    assert left_in(tmp_path) == ["out"]
    assert verify.main([str(tmp_path / "out"), "--reference", str(PARITY / f"{name}_a.npz")]) == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_no_released_model_uses_convert_and_give_deepminds_numbers(name, tmp_path):
    case = OPTIONS[name]
    params, state = draw_weights(case["shapes"])
    checkpoint = tmp_path / "checkpoint.pystate"
    checkpoint.write_bytes(pickle.dumps({"params": params, "state": state} if state else params, protocol=4))
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    with np.load(PARITY / "options.npz") as results:
        stored = {path.split("/")[1]: results[path] for path in results.files if path.startswith(f"{name}/")}
    np.savez(tmp_path / "reference.npz", **stored, **draw_inputs(name, case))
    size = ["--image-size", *map(str, case["image_size"])] if "image_size" in case else []
    assert convert(checkpoint, case["wiring"], tmp_path / "out", *size, config=tmp_path / "config.json") == 0
    assert verify.main([str(tmp_path / "out"), "--reference", str(tmp_path / "reference.npz")]) == 0


@pytest.mark.medium
def test_both_commands_run_as_the_readme_writes_them(tmp_path):
    name = "masked_lm"
    options = ["--model", "masked-lm", "--deepmind-config", PARITY / f"{name}_a.json", "--output", tmp_path / "out"]
    made = subprocess.run(
        [*CONVERT, PARITY / f"{name}_a.pystate", *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == "" and "wrote" in made.stderr
    compared = subprocess.run(
        [sys.executable, "-m", "conversion.verify", tmp_path / "out", "--reference", PARITY / f"{name}_a.npz"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "every stage is within its bound" in compared.stdout


# --- configurations


def test_bare_arguments_and_a_whole_description_are_the_same_config(tmp_path):
    described = json.loads((PARITY / "optical_flow_a.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps(described["config"]))
    assert convert_haiku.read_arguments(tmp_path / "bare.json") == described["config"]
    assert convert_haiku.read_arguments(PARITY / "optical_flow_a.json") == described["config"]


def test_the_card_says_where_the_weights_come_from(tmp_path):
    assert small("imagenet_fourier", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "imagenet_fourier_a.pystate" in card and "conversion.convert_haiku" in card
    assert str(PARITY) not in card and str(tmp_path) not in card


def test_image_size_records_the_grid_of_trained_positions(tmp_path):
    # 12 x 12 pixels; without the option the number of positions is known, their grid is not.
    assert small("imagenet_learned", tmp_path / "without") == 0
    assert small("imagenet_learned", tmp_path / "with", "--image-size", "12", "12") == 0

    def grid(folder: str) -> Any:
        return AutoConfig.from_pretrained(tmp_path / folder).preprocessor["position"]["position"].get("grid")

    assert grid("without") is None and grid("with") == [12, 12]


def test_an_image_size_that_is_not_the_checkpoints_is_refused(tmp_path, capsys):
    assert small("imagenet_learned", tmp_path / "out", "--image-size", "12", "13") == 2
    assert "156" in capsys.readouterr().err and left_in(tmp_path) == []


def test_the_dtype_is_that_of_the_file_and_of_the_loaded_model(tmp_path):
    assert small("multimodal", tmp_path / "out", "--dtype", "bfloat16") == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


# --- what is refused, and that nothing is written then


def bare_checkpoint(tmp_path: Path, change: Any) -> Path:
    """The small language model's parameters, changed, as a pickle of plain dicts."""
    params = convert_haiku.load_haiku_checkpoint(PARITY / "masked_lm_a.pystate").params
    change(params)
    path = tmp_path / "checkpoint.pystate"
    path.write_bytes(pickle.dumps(params, protocol=4))
    return path


def refused(checkpoint: Path, model: str, tmp_path: Path, capsys: Any, config: str | None = "masked_lm") -> str:
    folder = tmp_path / "made"
    folder.mkdir()
    chosen = None if config is None else PARITY / f"{config}_a.json"
    assert convert(checkpoint, model, folder / "out", config=chosen) == 2
    assert left_in(folder) == []
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message


def test_missing_and_left_over_names_are_listed(tmp_path, capsys):
    def change(params: Any) -> None:
        params["perceiver_encoder/~/self_attention_7/mlp/linear"] = {"w": np.zeros((2, 2), np.float32)}
        del params["embedding_decoder"]

    message = refused(bare_checkpoint(tmp_path, change), "masked-lm", tmp_path, capsys)
    assert "perceiver_encoder/~/self_attention_7/mlp/linear/w" in message
    assert "postprocessor.output_embedding.bias" in message


def test_another_shape_is_named(tmp_path, capsys):
    def change(params: Any) -> None:
        params["embedding_decoder"]["bias"] = np.zeros(7, np.float32)

    message = refused(bare_checkpoint(tmp_path, change), "masked-lm", tmp_path, capsys)
    assert "embedding_decoder/bias (7,)" in message


def test_a_wrong_model_is_refused_and_the_right_one_named(tmp_path, capsys):
    message = refused(PARITY / "masked_lm_a.pystate", "optical-flow", tmp_path, capsys, config="optical_flow")
    assert "--model masked-lm" in message


def test_released_sizes_on_a_small_checkpoint_point_to_the_option(tmp_path, capsys):
    message = refused(PARITY / "masked_lm_a.pystate", "masked-lm", tmp_path, capsys, config=None)
    assert "--deepmind-config" in message


def test_a_batch_norm_checkpoint_without_its_state_is_refused(tmp_path, capsys):
    params = convert_haiku.load_haiku_checkpoint(PARITY / "imagenet_conv_a.pystate").params
    path = tmp_path / "checkpoint.pystate"
    path.write_bytes(pickle.dumps(params, protocol=4))
    assert "running_mean" in refused(path, "imagenet-conv", tmp_path, capsys, config="imagenet_conv")


def test_dense_needs_its_arguments(tmp_path, capsys):
    message = refused(PARITY / "extra_concat_query_a.pystate", "dense", tmp_path, capsys, config=None)
    assert "--deepmind-config" in message


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    path = tmp_path / "checkpoint.pystate"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(path, "masked-lm", tmp_path, capsys)


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert convert(tmp_path / "does_not_exist", "masked-lm", tmp_path / "out") == 2
    assert "out" in capsys.readouterr().err and left_in(tmp_path / "out") == ["mine.txt"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"config": 3}', '{"vocab": 3, "d_model": 48, "max_seq_len": 64, "decoder": {}}']
)
def test_a_config_file_that_is_none_is_refused(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    config = tmp_path / "config.json"
    assert convert(PARITY / "masked_lm_a.pystate", "masked-lm", tmp_path / "out", config=config) == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_private_without_a_repository_is_refused(tmp_path, capsys):
    assert small("masked_lm", tmp_path / "out", "--private") == 2
    assert "--push-to-hub" in capsys.readouterr().err


# --- memory and time

WRITE = """
import pickle, sys, types
from parity.test_full_size import manifest, regenerate

# Haiku's container as it was pickled in 2021, without Haiku.
class FlatMapping:
    __module__, __qualname__ = "haiku._src.data_structures", "FlatMapping"
    def __init__(self, mapping): self.mapping = mapping
    def __reduce__(self): return FlatMapping, (self.mapping,)

for name in ("haiku", "haiku._src", "haiku._src.data_structures"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["haiku._src.data_structures"].FlatMapping = FlatMapping
params, _ = regenerate(manifest("masked_lm")["params"])
with open(sys.argv[1], "wb") as file:
    pickle.dump(FlatMapping({module: FlatMapping(arrays) for module, arrays in params.items()}), file, protocol=4)
"""
# The process's own peak: what getrusage tells of a child also counts its parent before exec.
MEASURED = """
import sys
from conversion.convert_haiku import main
status = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_the_released_language_model_converts_in_20_seconds_and_two_and_a_half_times_its_size(tmp_path, capsys):
    checkpoint = tmp_path / "language_perceiver_io_bytes.pickle"
    subprocess.run([sys.executable, "-c", WRITE, checkpoint], cwd=ROOT, env=environment(), check=True)
    size = checkpoint.stat().st_size
    started = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, checkpoint, "--model", "masked-lm", "--output", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1]) * 1024
    with capsys.disabled():
        print(f"\n  {size / 1e6:.0f} MB: {seconds:.1f} s, peak {peak / 1e6:.0f} MB, {peak / size:.2f} times the file")
    # 201,108,230 numbers, float32.
    assert size > 804_432_920 and sum(t.numel() for t in load_file(tmp_path / "out/model.safetensors").values())
    assert peak < 2.5 * size
    assert seconds < 20
