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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.deepmind import MODELS, PARITY, relative
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageToImage,
    AutoModelForPreTraining,
    AutoProcessor,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from conversion import convert_haiku, repository, verify
from conversion.dump_reference import draw_inputs, draw_weights
from hf_perceiver import PerceiverIOFlowImageProcessor

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


# --- from frames and sound to DeepMind's numbers, through what the folder holds

TOLERANCE = 1e-5  # relative L2, the issue's; positions of these small grids are rounded by far less


@pytest.fixture(scope="module")
def stored() -> Callable[[str], dict[str, np.ndarray]]:
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(PARITY / f"{name}_a.npz") as arrays:
            return dict(arrays.items())

    return load


def assert_close(got: Any, want: np.ndarray) -> None:
    assert relative(torch.as_tensor(got).reshape(want.shape), torch.as_tensor(want)) <= TOLERANCE


def test_frames_through_a_flow_folder_give_deepminds_flow(tmp_path, stored):
    assert small("optical_flow", tmp_path / "out") == 0
    expected = stored("optical_flow")
    # The reference's frames are in [-1, 1], a processor's in [0, 1]; its flow is in pixels.
    pairs = (expected["images"] + 1) / 2
    pipe = pipeline("optical-flow", model=str(tmp_path / "out"))
    assert type(pipe.image_processor) is PerceiverIOFlowImageProcessor
    assert_close(np.stack([pipe(tuple(pair))["flow"] for pair in pairs]), expected["outputs"])

    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageToImage.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        flows = processor.post_process_optical_flow(model(**processor(pairs, return_tensors="pt")))
    assert_close(torch.stack(flows), expected["outputs"])


def test_clips_through_a_multimodal_folder_give_deepminds_reconstruction(tmp_path, stored):
    assert small("multimodal", tmp_path / "out") == 0
    expected = stored("multimodal")
    points = {name: torch.from_numpy(expected[f"subsample_{name}"]) for name in ("image", "audio")}
    pipe = pipeline("multimodal-autoencoding", model=str(tmp_path / "out"))
    for index, (frames, sound) in enumerate(zip(expected["images"], expected["audio"], strict=True)):
        clip = {"frames": frames, "sound": sound, "sampling_rate": 800}  # 32 samples for each of 25 frames
        result = pipe(clip, output_points=points, outputs=["label"])
        for name in points:
            assert_close(result[name][0], expected[f"outputs_{name}"][index])
        scores = torch.from_numpy(expected["outputs_label"][index]).softmax(-1)
        assert result["label"][0]["score"] == pytest.approx(float(scores.max()), rel=1e-4)
        assert result["label"][0]["label"] == f"LABEL_{int(scores.argmax())}"

    # All examples at once; the original reads any label as its mask token.
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    made = processor(list(expected["images"]), list(expected["audio"]), [3, 12], sampling_rate=800)
    with torch.no_grad():
        logits = model(**made, output_points={**points, "label": None}).logits
    for name in logits:
        assert_close(logits[name], expected[f"outputs_{name}"])


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_perceiver"] = None  # importing it fails, wherever it is installed
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageToImage, AutoModelForPreTraining, AutoProcessor


def assert_close(got, want):
    want = torch.from_numpy(want)
    got = got.reshape(want.shape)
    assert float((got - want).norm() / want.norm()) <= 1e-5


trust = {"trust_remote_code": True}
flow = dict(np.load(sys.argv[1] + "/optical_flow_a.npz"))
clips = dict(np.load(sys.argv[1] + "/multimodal_a.npz"))
for source in ("./{}", "./{}_again"):
    folder = source.format("flow")
    processor = AutoImageProcessor.from_pretrained(folder, **trust)
    model = AutoModelForImageToImage.from_pretrained(folder, **trust)
    with torch.no_grad():
        outputs = model(**processor((flow["images"] + 1) / 2, return_tensors="pt"))
    assert_close(torch.stack(processor.post_process_optical_flow(outputs)), flow["outputs"])
    for part in (model, processor):
        assert type(part).__module__.startswith("transformers_modules.")
        part.save_pretrained("flow_again")  # with its code

    folder = source.format("clips")
    processor = AutoProcessor.from_pretrained(folder, **trust)
    model = AutoModelForPreTraining.from_pretrained(folder, **trust)
    made = processor(list(clips["images"]), list(clips["audio"]), sampling_rate=800)
    points = {name: torch.from_numpy(clips["subsample_" + name]) for name in ("image", "audio")}
    with torch.no_grad():
        logits = model(**made, output_points={**points, "label": None}).logits
    for name in logits:
        assert_close(logits[name], clips["outputs_" + name])
    for part in (model, processor):
        assert type(part).__module__.startswith("transformers_modules.")
        part.save_pretrained("clips_again")
    for part in (processor.image_processor, processor.feature_extractor):
        assert type(part).__module__.startswith("transformers_modules.")
"""


@pytest.mark.medium
def test_models_and_processors_of_the_folders_run_without_the_package(tmp_path):
    assert small("optical_flow", tmp_path / "flow") == 0 and small("multimodal", tmp_path / "clips") == 0
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, PARITY],
        cwd=tmp_path,
        env={**env, "HF_HOME": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# --- compared before it is published


def test_with_a_reference_the_card_says_the_numbers_of_this_file(tmp_path, capsys):
    reference = ("--reference", str(PARITY / "optical_flow_a.npz"))
    assert small("optical_flow", tmp_path / "out", *reference) == 0
    assert "which gives the numbers of optical_flow_a.npz" in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    report = verify.verify(tmp_path / "out", PARITY / "optical_flow_a.npz")
    assert verify.described(report) in card, "as the folder is measured now"
    assert "Measured on this file" in card and "`--tolerance 1e-05`" in card and "nothing was measured" not in card
    assert "--reference optical_flow_a.npz" in card and str(PARITY) not in card and str(tmp_path) not in card


def test_without_a_reference_the_card_says_what_was_measured_on_which_weights(tmp_path):
    assert small("optical_flow", tmp_path / "out") == 0
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "On a small model of this kind with random weights" in card and "For this file itself nothing was" in card


def test_a_file_that_does_not_give_the_references_numbers_is_not_published(tmp_path, capsys, monkeypatch):
    def change(params: Any) -> None:
        params["perceiver_encoder/~/cross_attention/attention/linear_2"]["w"][0, 0] += 0.1

    checkpoint = bare_checkpoint(tmp_path, change)
    monkeypatch.setattr(repository, "push", lambda *args, **kwargs: pytest.fail("pushed"))
    options = ["--reference", str(PARITY / "masked_lm_a.npz"), "--push-to-hub", "me/mine"]
    assert convert(checkpoint, "masked-lm", tmp_path / "out", *options, config=PARITY / "masked_lm_a.json") == 1
    said = capsys.readouterr().err
    assert "after the read" in said and "above its bound: after the read;" in said and "Traceback" not in said
    assert "out was not written: it does not give the numbers of masked_lm_a.npz" in said
    assert left_in(tmp_path) == [checkpoint.name]


def test_rounded_weights_need_a_tolerance_of_their_own(tmp_path):
    # bfloat16 keeps 8 bits: 2e-3 of a weight, and as much again in each layer.
    options = ("--dtype", "bfloat16", "--reference", str(PARITY / "masked_lm_a.npz"))
    assert small("masked_lm", tmp_path / "out", *options) == 1
    assert small("masked_lm", tmp_path / "out", *options, "--tolerance", "0.03") == 0
    assert "--tolerance 0.03" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tolerance", "1e-4"], "--tolerance is about the comparison with a --reference"),
        (["--reference", "masked_lm", "--tolerance", "2"], "--tolerance 2.0 must lie between 0 and 1"),
        (["--reference", "absent"], "No such file"),
    ],
)
def test_what_cannot_be_compared_with_is_refused_before_anything_is_read(options, told, tmp_path, capsys):
    given = [str(PARITY / f"{word}_a.npz") if word in ("masked_lm", "absent") else word for word in options]
    assert convert(tmp_path / "does_not_exist.pystate", "masked-lm", tmp_path / "out", *given) == 2
    said = capsys.readouterr().err
    assert told in said and "does_not_exist" not in said and left_in(tmp_path) == []


def test_another_models_reference_is_refused(tmp_path, capsys):
    assert small("masked_lm", tmp_path / "out", "--reference", str(PARITY / "optical_flow_a.npz")) == 2
    assert "cannot be compared with optical_flow_a.npz" in capsys.readouterr().err and left_in(tmp_path) == []


# --- configurations


def test_bare_arguments_and_a_whole_description_are_the_same_config(tmp_path):
    described = json.loads((PARITY / "optical_flow_a.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps(described["config"]))
    assert convert_haiku.read_arguments(tmp_path / "bare.json") == described["config"]
    assert convert_haiku.read_arguments(PARITY / "optical_flow_a.json") == described["config"]


def test_deepminds_flow_scale_and_training_size_reach_model_and_processor(tmp_path):
    described = json.loads((PARITY / "optical_flow_a.json").read_text())["config"]
    changed = {**described, "flow_scale_factor": 10, "train_size": [48, 64]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    pickle_file, config = PARITY / "optical_flow_a.pystate", tmp_path / "config.json"
    assert convert(pickle_file, "optical-flow", tmp_path / "out", config=config) == 0
    pipe = pipeline("optical-flow", model=str(tmp_path / "out"))  # refuses two that disagree
    assert pipe.model.config.postprocessor["scale_factor"] == pipe.image_processor.flow_scale_factor == 10
    assert pipe.image_processor.tile_size == {"height": 48, "width": 64}


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
