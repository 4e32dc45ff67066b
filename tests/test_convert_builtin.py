"""convert_builtin.py and export_builtin.py: there and back bitwise, whose numbers, and what is refused with exit code 2.

The checkpoints are tiny ones of transformers' own classes (builtin_models.py); the published ones were never fetched.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import hub_standin
import numpy as np
import pytest
import torch
import transformers
from builtin_models import (
    CASES,
    NAMES,
    assert_same_outputs,
    builtin_case,
    builtin_outputs,
    relative_l2,
    released_config,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PerceiverImageProcessorPil,
    PerceiverTokenizer,
    pipeline,
)

import hf_perceiver
from conversion import convert_builtin, export_builtin
from conversion.convert_builtin import described
from conversion.repository import make_processors, sha256_of
from hf_perceiver.checkpoint_names import builtin_to_config

ROOT = Path(__file__).parent.parent
CONV = "PerceiverForImageClassificationConvProcessing"
TEXT = "PerceiverForMaskedLM"
TEXTS = (TEXT, "PerceiverForSequenceClassification")


def saved(name: str, folder: Path, **changes) -> Path:
    builtin_case(name).model(**changes).save_pretrained(folder)
    return folder


def run(command, *argv) -> int:
    return command.main([str(word) for word in argv])


def converted(source: Path, output: Path, *options) -> Path:
    assert run(convert_builtin, source, "--output", output, *options) == 0
    return output


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def refusal(capsys, *argv, command=convert_builtin) -> str:
    """What a refused command says, and that it says it so: exit code 2, one line, no traceback."""
    capsys.readouterr()
    assert run(command, *argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


# There and back


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_is_bitwise_and_the_numbers_are_the_builtins(name, tmp_path):
    case = builtin_case(name)
    theirs = case.model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    model = case.ours.from_pretrained(ours).eval()
    with torch.no_grad():
        assert_same_outputs(model(**case.our_inputs()), *builtin_outputs(theirs, case.inputs()))

    assert run(export_builtin, ours, "--output", tmp_path / "back") == 0
    assert_same_weights(tmp_path / "theirs", tmp_path / "back")
    again, info = getattr(transformers, name).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for field, value in case.fields.items():
        # The image, flow and multimodal classes have no use for the text's fields, and a round trip so loses them.
        if name in TEXTS or field not in ("vocab_size", "d_model", "max_position_embeddings"):
            assert getattr(again.config, field) == value, field
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours", "back"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_dtype_stays_unless_another_is_asked_for(dtype, tmp_path):
    builtin_case(TEXT).model().to(dtype).save_pretrained(tmp_path / "theirs")
    weights = load_file(converted(tmp_path / "theirs", tmp_path / "ours") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    out = converted(tmp_path / "theirs", tmp_path / "half", "--dtype", "float16")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("name", [TEXT, CONV])
def test_an_old_bin_file_is_converted(name, tmp_path):
    saved(name, tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "old").mkdir()
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    old = converted(tmp_path / "old", tmp_path / "from_bin")
    assert_same_weights(old, converted(tmp_path / "theirs", tmp_path / "from_safetensors"))
    assert sha256_of(tmp_path / "old" / "pytorch_model.bin") in (old / "README.md").read_text()


def test_shards_are_converted_and_each_is_named_with_its_digest(tmp_path):
    theirs = builtin_case(TEXT).model()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="60kB")
    theirs.save_pretrained(tmp_path / "whole")
    out = converted(tmp_path / "sharded", tmp_path / "ours")
    assert_same_weights(out, converted(tmp_path / "whole", tmp_path / "same"))
    card = (out / "README.md").read_text()
    shards = list((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(f"`{p.name}`: sha256 `{sha256_of(p)}`" in card for p in shards)


def test_text_models_bring_their_tokenizers(tmp_path):
    saved(TEXT, tmp_path / "theirs", vocab_size=262)
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(ours).model_max_length == 20
    run(export_builtin, ours, "--output", tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert isinstance(tokenizer, PerceiverTokenizer) and tokenizer.model_max_length == 20
    assert tokenizer("é").input_ids == AutoTokenizer.from_pretrained(ours)("é").input_ids


def test_an_image_processor_of_its_own_stays(tmp_path):
    saved(CONV, tmp_path / "theirs")
    mine = PerceiverImageProcessorPil(size={"height": 32, "width": 40}, image_mean=[0.1, 0.2, 0.3])
    mine.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    run(export_builtin, ours, "--output", tmp_path / "back")
    for folder in ("ours", "back"):
        loaded = AutoImageProcessor.from_pretrained(tmp_path / folder)
        assert loaded.size["width"] == 40 and list(loaded.image_mean) == [0.1, 0.2, 0.3]


FLOW, CLIPS = "PerceiverForOpticalFlow", "PerceiverForMultimodalAutoencoding"


def test_frames_through_a_flow_folder_give_the_builtins_flow(tmp_path):
    theirs = builtin_case(FLOW).model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 10, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(ours)
    assert processor.tile_size == {"height": 6, "width": 10}, "the built-in's train_size"
    with torch.no_grad():
        expected = theirs(inputs=processor(frames, return_tensors="pt").pixel_values.double()).logits[0]
    flow = pipeline("optical-flow", model=str(ours))(tuple(frames))["flow"]
    assert relative_l2(torch.from_numpy(flow).double(), 20 * expected) <= 1e-6  # the processor's flow is float32


def test_clips_through_a_multimodal_folder_give_the_builtins_reconstruction(tmp_path):
    case = builtin_case(CLIPS)
    theirs = case.model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(ours)
    assert (processor.image_processor.num_frames, processor.feature_extractor.num_samples) == (2, 64)
    assert processor.image_processor.size == {"height": 16, "width": 16} and processor.num_labels == 5
    rng = np.random.default_rng(0)
    made = processor(rng.random((2, 16, 16, 3)), rng.uniform(-1, 1, 64), sampling_rate=800).to(torch.float64)
    model = case.ours.from_pretrained(ours).eval()
    with torch.no_grad():
        outputs = model(**made, output_points=case.points)
        assert_same_outputs(outputs, *builtin_outputs(theirs, {**made, "subsampled_output_points": case.points}))


def test_the_published_sizes_get_the_processors_of_deepminds_models():
    """Configurations alone; the published weights were never fetched."""
    for name, task, recipe in (
        (FLOW, "optical-flow", hf_perceiver.recipes.optical_flow()),
        (CLIPS, "multimodal", hf_perceiver.recipes.multimodal_autoencoder()),
    ):
        config = hf_perceiver.PerceiverIOConfig(**builtin_to_config(released_config(name).to_dict()))
        (made,), (expected,) = make_processors(config, task), make_processors(recipe, task)
        assert made.to_dict() == expected.to_dict()


@pytest.mark.parametrize("name", [FLOW, CLIPS])
def test_processors_that_transformers_does_not_have_stay_behind(name, tmp_path):
    ours = converted(saved(name, tmp_path / "theirs"), tmp_path / "ours")
    assert any(path.name.endswith("processor_config.json") for path in ours.iterdir())
    assert run(export_builtin, ours, "--output", tmp_path / "back") == 0
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", "model.safetensors"}


def test_names_of_labels_stay(tmp_path):
    model = builtin_case(CONV).model()
    model.config.id2label = dict(enumerate("abcde"))
    model.config.label2id = {label: i for i, label in enumerate("abcde")}
    model.save_pretrained(tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((ours / "config.json").read_text())["id2label"]["4"] == "e"


# DeepMind's numerics


def test_deepmind_numerics_are_stored_in_the_config(tmp_path):
    saved(CONV, tmp_path / "theirs")
    config = hf_perceiver.PerceiverIOConfig.from_pretrained(
        converted(tmp_path / "theirs", tmp_path / "ours", "--numerics", "deepmind")
    )
    assert config.hidden_act == "gelu_pytorch_tanh" and config.zero_masked_rows
    assert config.preprocessor["stem"]["padding"] == "same"


def test_unswapping_exchanges_height_and_width_of_the_stems_kernel_and_nothing_else(tmp_path):
    saved(CONV, tmp_path / "theirs")
    deepmind = ("--numerics", "deepmind")
    plain = converted(tmp_path / "theirs", tmp_path / "plain", *deepmind)
    other = converted(tmp_path / "theirs", tmp_path / "unswapped", *deepmind, "--unswap-conv-kernel")
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, other))
    (kernel,) = [name for name in before if before[name].shape[-2:] == (7, 7)]
    assert not torch.equal(before[kernel], after[kernel])
    assert torch.equal(before[kernel].mT, after[kernel])
    assert all(torch.equal(before[name], after[name]) for name in before if name != kernel)
    card = " ".join((other / "README.md").read_text().split())
    assert "inferred from the script, not measured" in card
    assert "--unswap-conv-kernel" not in (plain / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        (CONV, ["--unswap-conv-kernel"], "is for --numerics deepmind"),
        (TEXT, ["--unswap-conv-kernel", "--numerics", "deepmind"], f"is for {CONV}; "),
    ],
)
def test_unswapping_elsewhere_is_refused(name, options, told, tmp_path, capsys):
    saved(name, tmp_path / "theirs")
    assert told in refusal(capsys, tmp_path / "theirs", "--output", tmp_path / "ours", *options)
    assert not (tmp_path / "ours").exists()


def test_deepminds_padding_cannot_go_back(tmp_path, capsys):
    saved(CONV, tmp_path / "theirs")
    ours = converted(tmp_path / "theirs", tmp_path / "ours", "--numerics", "deepmind")
    said = refusal(capsys, ours, "--output", tmp_path / "back", command=export_builtin)
    assert "cannot express this model" in said and "padding" in said
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours"}


# Refusals


@pytest.mark.parametrize("command", [convert_builtin, export_builtin])
def test_sources_that_are_none_are_refused(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": ')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "config.json").write_text('{"model_type": "perceiver"}')
    for source, told in {
        tmp_path / "absent": "there is no folder",
        "./absent": "there is no folder",
        "no/such/thing": "cannot be a Hub id",
        "someone/absent": "there is no folder someone/absent, and the Hub was not reached",
        tmp_path / "empty": "has no config.json",
        tmp_path / "file": "is a file; give the folder",
        tmp_path / "damaged": "config.json is not JSON",
        tmp_path / "list": "must hold a mapping",
        tmp_path / "light": "holds no weights",
    }.items():
        assert told in refusal(capsys, source, "--output", tmp_path / "out", command=command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [convert_builtin, export_builtin])
def test_the_wrong_side_is_refused(command, tmp_path, capsys):
    theirs = saved(TEXT, tmp_path / "theirs")
    ours = converted(theirs, tmp_path / "ours")
    source, told = (ours, "loads it as it is") if command is convert_builtin else (theirs, "transformers' own already")
    assert told in refusal(capsys, source, "--output", tmp_path / "out", command=command)


@pytest.mark.parametrize("command", [convert_builtin, export_builtin])
def test_an_output_with_files_is_refused_before_the_source_is_looked_at(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    said = refusal(capsys, "nowhere", "--output", tmp_path / "out", command=command)
    assert "exists and is not empty" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def edited(folder: Path, edit) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


BIAS = "embedding_decoder.bias"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda tensors: tensors.pop(BIAS), "1 missing from the file: "),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "1 of the file have no place in the model: extra"),
        (lambda tensors: tensors.update({BIAS: torch.zeros(7)}), "1 of another shape: "),
    ],
)
def test_weights_left_over_missing_or_of_another_shape_are_listed(edit, told, tmp_path, capsys):
    theirs = edited(saved(TEXT, tmp_path / "theirs"), edit)
    assert told in refusal(capsys, theirs, "--output", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_code_in_a_bin_file_is_refused_and_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = saved(TEXT, tmp_path / "theirs")
    (theirs / "model.safetensors").unlink()
    for write in (lambda f: torch.save({"a": Malicious()}, f), lambda f: f.write_bytes(pickle.dumps(Malicious()))):
        write(theirs / "pytorch_model.bin")
        assert "cannot be read" in refusal(capsys, theirs, "--output", tmp_path / "ours")
        assert not (tmp_path / "executed").exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_refused(name, tmp_path, capsys):
    theirs = saved(TEXT, tmp_path / "theirs")
    whole = theirs / "model.safetensors"
    if name.endswith(".bin"):
        torch.save(load_file(whole), theirs / name)
        whole.unlink()
    data = (theirs / name).read_bytes()
    for count in (0, 5, len(data) // 2):
        (theirs / name).write_bytes(data[:count])
        said = refusal(capsys, theirs, "--output", tmp_path / "ours")
        assert "cannot be read" in said or "damaged" in said


@pytest.mark.parametrize(
    ("shard", "told"),
    [
        ("../model.safetensors", "no file of weights"),
        ("model-00009.safetensors", "which is missing"),
        ("x.py", "no file"),
    ],
)
def test_an_index_names_files_beside_it(shard, told, tmp_path, capsys):
    theirs = saved(TEXT, tmp_path / "theirs")
    (theirs / "model.safetensors").rename(tmp_path / "model.safetensors")
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert told in refusal(capsys, theirs, "--output", tmp_path / "ours")


def test_a_config_that_names_no_class_asks_for_it(tmp_path, capsys):
    theirs = saved(CONV, tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    config["architectures"] = ["Mine"]
    (theirs / "config.json").write_text(json.dumps(config))
    assert "architecture" in refusal(capsys, theirs, "--output", tmp_path / "ours")
    out = converted(theirs, tmp_path / "ours", "--architecture", CONV)
    assert_same_weights(out, converted(saved(CONV, tmp_path / "named"), tmp_path / "same"))


# The command


def test_the_card_names_no_folder_of_the_users_machine(tmp_path):
    theirs = saved(TEXT, tmp_path / "theirs")
    card = (converted(theirs, tmp_path / "ours") / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "`python -m conversion.convert_builtin theirs --output DIR`" in card
    assert sha256_of(theirs / "model.safetensors") in card
    argv = ["someone/model", "--output=../mine/x", "--dtype", "float16"]
    assert described("convert_builtin", argv, "someone/model") == (
        "python -m conversion.convert_builtin someone/model --output=DIR --dtype float16"
    )


@pytest.mark.medium
def test_the_commands_run_as_modules_and_take_hub_ids(tmp_path):
    """From a Hub id of the stand-in (hub_standin.py), to the stand-in, and back; no real Hub. Four processes."""
    theirs = saved(TEXT, tmp_path / "theirs", vocab_size=262)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))}
    env |= {"HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "none"}
    env |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    with hub_standin.HubStandIn() as hub:
        hub.create("someone/theirs")
        hub.repos["someone/theirs"].append(("a" * 40, {p.name: p.read_bytes() for p in theirs.iterdir()}))
        env["HF_ENDPOINT"] = hub.endpoint

        def command(*argv) -> subprocess.CompletedProcess:
            return subprocess.run(
                [sys.executable, "-m", *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
            )

        push = ("--push-to-hub", "tester/ours")
        done = command("conversion.convert_builtin", "someone/theirs", "--output", "ours", *push)
        assert done.returncode == 0, done.stderr
        assert "sha256" in (tmp_path / "ours" / "README.md").read_text()
        assert f"revision `{'a' * 40}`" in (tmp_path / "ours" / "README.md").read_text()
        done = command("conversion.export_builtin", "tester/ours", "--output", "back")
        assert done.returncode == 0, done.stderr
        assert_same_weights(theirs, tmp_path / "back")
        done = command("conversion.convert_builtin", "someone/absent", "--output", "none")
        assert done.returncode == 2 and "no model of that name" in done.stderr and "Traceback" not in done.stderr
        done = command("conversion.convert_builtin", "someone/theirs", "--output", "ours")
        assert done.returncode == 2 and "exists and is not empty" in done.stderr
        assert hub.unknown == []


def test_every_task_class_is_covered_here():
    assert set(CASES) | {"PerceiverModel"} == set(convert_builtin.TASKS)
