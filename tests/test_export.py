"""Exported files answer as the model does, at sizes other than the traced ones; what cannot be exported is refused first."""

import importlib.util
import json
import math

import pytest
import torch
from helpers import HEADS, TINY, config_of, enlarge, fourier, grid, tiny

from hf_perceiver import (
    PerceiverIOConfig,
    PerceiverIOForAudioClassification,
    PerceiverIOForAudioVisualClassification,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForMultipleChoice,
    PerceiverIOForMultitaskSequenceClassification,
    PerceiverIOForOpticalFlow,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOForVideoClassification,
    PerceiverIOModel,
    bundled_checkpoint,
    export,
    traced_attention,
)
from hf_perceiver.benchmark.workloads import WORKLOADS, redraw
from hf_perceiver.export import Mismatch, export_model, largest_error, load, main, sizes_to_check
from hf_perceiver.export_inputs import axes_of, choose_axes, inputs_of
from hf_perceiver.position_encoding import FourierPositionEncoding, linspace
from hf_perceiver.stems import PatchStem

# What is traced takes as long as it is deep.
SHORT = {"num_blocks": 1, "num_self_attends_per_block": 1}
CLASSES = {"output_query": {"kind": "tasks", "channels": 16}, "postprocessor": {"kind": "classification"}}


def audio_classifier():
    sound = grid({"kind": "audio_patches", "samples_per_patch": 3}, fourier(5))
    return enlarge(PerceiverIOForAudioClassification(config_of(preprocessor=sound, **CLASSES, **SHORT))).eval()


def video_classifier():
    video = grid({"kind": "patches", "spatial_downsample": 2, "temporal_downsample": 2}, fourier(2, 3, 4, bands=2))
    return enlarge(PerceiverIOForVideoClassification(config_of(preprocessor=video, **CLASSES, **SHORT))).eval()


def audio_visual_classifier():
    config = tiny("multimodal").config
    config.preprocessor = {
        "kind": "multimodal",
        "modalities": {name: config.preprocessor["modalities"][name] for name in ("audio", "image")},
    }
    config.output_query, config.postprocessor = CLASSES["output_query"], CLASSES["postprocessor"]
    return enlarge(PerceiverIOForAudioVisualClassification(config)).eval()


def multitask():
    config = tiny("language").config
    config.output_query = {"kind": "tasks", "channels": 16, "num_tasks": 2}
    config.postprocessor = {"kind": "multitask", "tasks": {"two": ["a", "b"], "three": ["a", "b", "c"]}}
    return enlarge(PerceiverIOForMultitaskSequenceClassification(config)).eval()


# Every class once. Those on text differ in their heads only, so that some are enough where time is short.
MODELS = {
    "masked-lm": lambda: tiny("language").model(PerceiverIOForMaskedLM, **SHORT),
    "sequence": lambda: tiny("text_classes").model(PerceiverIOForSequenceClassification, **SHORT),
    "tokens": lambda: tiny("language").model(PerceiverIOForTokenClassification, **SHORT),
    "answers": lambda: tiny("language").model(PerceiverIOForQuestionAnswering, **SHORT),
    "choices": lambda: tiny("language").model(PerceiverIOForMultipleChoice, **SHORT),
    "multitask": multitask,
    "image": lambda: tiny("imagenet_fourier").model(PerceiverIOForImageClassification, **SHORT),
    "flow": lambda: tiny("flow").model(PerceiverIOForOpticalFlow, **SHORT),
    "autoencoding": lambda: tiny("multimodal").model(PerceiverIOForMultimodalAutoencoding, **SHORT),
    "audio": audio_classifier,
    "video": video_classifier,
    "audio-visual": audio_visual_classifier,
    "features": lambda: tiny("features_only").model(PerceiverIOModel, **SHORT),
}


def axes(model, **options):
    return {name: str(axis) for name, axis in axes_of(choose_axes(inputs_of(model), **options)).items()}


@pytest.fixture
def every_grid_is_large(monkeypatch):
    """Tiny grids are read and written by the forms that large ones pay for."""
    monkeypatch.setattr(traced_attention, "FEWEST_SCORES", 1)


# What is read, what may vary.


def test_a_text_may_be_as_long_as_its_positions():
    assert axes(MODELS["masked-lm"]()) == {"batch": "batch from 1", "length": "length from 1 to 12"}
    assert [given.name for given in inputs_of(MODELS["masked-lm"]())] == ["input_ids", "attention_mask"]


def test_choices_are_an_axis():
    assert list(axes(MODELS["choices"]())) == ["batch", "choices", "length"]


def test_fourier_positions_take_any_size_and_trained_ones_theirs():
    assert axes(MODELS["image"]()) == {
        "batch": "batch from 1",
        "height": "height from 2",
        "width": "width from 2",
    }
    learned = tiny("imagenet_learned").model()
    assert axes(learned) == {"batch": "batch from 1", "height": "height 6", "width": "width 5"}
    with pytest.raises(ValueError, match="height cannot be dynamic, it is 6: its positions are trained for one grid"):
        axes(learned, dynamic=["height"])


def test_flow_is_of_two_frames():
    assert axes(MODELS["flow"]())["frames"] == "frames 2"
    assert axes(tiny("flow_separate").model(PerceiverIOForOpticalFlow))["frames"] == "frames 2"


def test_patches_are_whole():
    assert axes(MODELS["video"]()) == {
        "batch": "batch from 1",
        "frames": "frames from 4, multiples of 2",
        "height": "height from 4, multiples of 2",
        "width": "width from 4, multiples of 2",
    }
    assert axes(audio_classifier())["samples"] == "samples from 6, multiples of 3"


def test_modalities_have_names_and_what_is_always_masked_is_no_input():
    model = MODELS["autoencoding"]()
    assert [given.name for given in inputs_of(model)] == ["inputs.audio", "inputs.image"]
    masked = [given.name for given in inputs_of(model, masks=True)]
    assert masked == ["inputs.audio", "inputs.image", "attention_mask.audio", "attention_mask.image"]
    assert axes(model, dynamic=["batch", "height"])["image.height"] == "image.height from 4, multiples of 2"
    assert axes(model, dynamic=["batch", "height"])["image.width"] == "image.width 6"


def test_index_positions_limit_a_text():
    assert axes(tiny("text_fourier").model())["length"] == "length from 1 to 12"


def test_a_query_with_the_inputs_features_and_a_grid_fixes_the_size():
    query = {"kind": "position", "position": fourier(6, 5), "grid": [6, 5], "concat_input": True}
    config = config_of(
        preprocessor=grid({"kind": "pixels"}, fourier(9, 9)),
        output_query=query,
        postprocessor={"kind": "projection", "num_outputs": 2},
    )
    assert axes(PerceiverIOModel(config)) == {"batch": "batch from 1", "height": "height 6", "width": "width 5"}


def test_a_permuted_image_has_one_size():
    stem = {"kind": "permuted", "stem": {"kind": "pixels"}, "grid": [6, 5]}
    model = PerceiverIOForImageClassification(config_of(preprocessor=grid(stem, fourier(6, 5)), **CLASSES))
    assert axes(model) == {"batch": "batch from 1", "height": "height 6", "width": "width 5"}


def test_sizes_fix_what_is_not_dynamic():
    chosen = axes(MODELS["image"](), dynamic=["batch"], sizes={"height": 20, "width": 30})
    assert chosen == {"batch": "batch from 1", "height": "height 20", "width": "width 30"}


def test_files_are_run_at_their_own_size_half_of_it_and_the_least():
    def checked(**options):
        return [
            list(sizes.values()) for _, sizes in sizes_to_check(choose_axes(inputs_of(MODELS["video"]()), **options))
        ]

    # batch, frames, height, width
    large = {"frames": 16, "height": 20, "width": 24}
    assert checked(sizes=large) == [[1, 16, 20, 24], [3, 8, 10, 12], [1, 4, 4, 4]]
    assert checked(sizes=large, dynamic=["height"]) == [[2, 16, 20, 24], [2, 16, 10, 24], [2, 16, 4, 24]]
    assert checked(sizes=large, dynamic=[]) == [[2, 16, 20, 24]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic": ["depth"]}, "unknown axis 'depth'; the inputs have batch, frames, height, width"),
        ({"sizes": {"height": 5}}, "height=5 cannot be; it is height from 4, multiples of 2"),
        ({"sizes": {"sides": 5}}, "unknown axis 'sides'"),
    ],
)
def test_impossible_axes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        axes(MODELS["video"](), **options)


def test_masks_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="pixel_values has no mask to export"):
        inputs_of(MODELS["image"](), masks=True)


def test_parts_of_ones_own_are_refused():
    model = MODELS["image"]()
    model.perceiver.preprocessor = torch.nn.Identity()
    model.perceiver.preprocessor.main_input_name = "pixel_values"
    with pytest.raises(ValueError, match="what a Identity reads is not known here"):
        inputs_of(model)


def test_coordinates_and_bands_are_the_same_while_traced(monkeypatch):
    cpu = torch.device("cpu")
    lines = [(-1.0, 1.0, n) for n in (1, 2, 3, 7, 16, 56, 224, 368, 496, 1024, 30_720)]
    # Bands of the released models, audio's among them, and others.
    lines += [(1.0, n / 2, bands) for n in (2, 7, 224, 368, 496, 999, 30_720) for bands in (1, 2, 7, 64, 192, 256)]
    want = [linspace(*line, cpu) for line in lines]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for line, numbers in zip(lines, want, strict=True):
        # Bit for bit, for a frequency of hundreds makes much of the last bit.
        assert torch.equal(linspace(*line, cpu), numbers), line


@pytest.mark.medium
@pytest.mark.parametrize("resolution", [[30_720], [16, 56, 56], None])
def test_positions_are_as_exact_in_onnxruntime(resolution, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoding = FourierPositionEncoding(
                num_bands=64, max_resolution=resolution, num_axes=len(resolution or [1])
            )

        def forward(self, x):
            return tuple(table for _, table in self.encoding.encode(x.shape, device=x.device, dtype=x.dtype).blocks)

    positions, given = Positions(), torch.zeros([9, 7, 12][: len(resolution or [1])])
    sizes = ({i: torch.export.Dim(f"size{i}", min=2) for i in range(given.ndim)},)
    program = torch.export.export(positions, (given,), dynamic_shapes=sizes, strict=True)
    onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    # onnxruntime before 1.29 has none in float64, where angles are.
    assert "Cos" not in {node.op_type for node in onnx_program.model.graph}
    onnx_program.save(tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for shape in ((9, 7, 12), (16, 56, 40)):
        given = torch.zeros(shape[: given.ndim])
        tables = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        for table, want in zip(tables, positions(given), strict=True):
            # A last bit of the highest band, 15,360, would turn its sine by 3e-3.
            torch.testing.assert_close(torch.from_numpy(table), want, rtol=0, atol=1.2e-7)


# Files. Each is compared with the model, at one example, at three of other sizes, and at the least, before it is there.


def check_written(exported, file):
    assert exported.file == file and file.is_file()
    assert list(exported.errors) == [what for what, _ in sizes_to_check(exported.inputs)]
    assert len(exported.errors) >= 2 and all(error <= 1e-4 for error in exported.errors.values())
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.medium
@pytest.mark.parametrize("name", ["masked-lm", "image"])
def test_an_onnx_file_answers_as_the_model(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = MODELS[name]()
    check_written(export_model(model, tmp_path / "x.onnx"), tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    read = [given.shape for given in session.get_inputs()]
    assert read == ([["batch", "length"]] * 2 if name == "masked-lm" else [["batch", 3, "height", "width"]])
    about = session.get_modelmeta().custom_metadata_map
    assert b"site-packages" not in (tmp_path / "x.onnx").read_bytes(), "lines of this machine's files"
    assert about["model_type"] == "perceiver_io" and about["class"] == type(model).__name__
    assert PerceiverIOConfig(**json.loads(about["config"])).id2label == model.config.id2label


@pytest.mark.medium
def test_a_flow_file_reads_and_writes_row_by_row(tmp_path, every_grid_is_large):
    onnx = pytest.importorskip("onnx")
    exported = export_model(MODELS["flow"](), tmp_path / "x.onnx", dynamic=["batch", "height"])
    check_written(exported, tmp_path / "x.onnx")
    assert sum(node.op_type == "Scan" for node in onnx.load(tmp_path / "x.onnx").graph.node) == 2


@pytest.mark.medium
def test_a_torch_file_answers_as_the_model(tmp_path):
    exported = export_model(MODELS["answers"](), tmp_path / "x.pt2", format="torch")
    check_written(exported, tmp_path / "x.pt2")
    assert exported.outputs == ["start_logits", "end_logits"]
    about = {"class": ""}
    torch.export.load(tmp_path / "x.pt2", extra_files=about)
    assert about["class"] in ("PerceiverIOForQuestionAnswering", b"PerceiverIOForQuestionAnswering")


def test_exported_patches_take_one_example():
    """A video of channels before height and width, as it comes: whether its strides can be split is checked when it runs."""
    dynamic, even = torch.export.Dim.DYNAMIC(min=1), torch.export.Dim.DYNAMIC(min=4)
    sizes = ({0: dynamic, 1: even, 3: even, 4: even},)
    stem = PatchStem(spatial_downsample=2, temporal_downsample=2)
    program = torch.export.export(stem, (torch.randn(2, 4, 3, 6, 8),), dynamic_shapes=sizes, strict=True)
    for shape in ((1, 4, 3, 6, 8), (1, 6, 3, 4, 4), (5, 4, 3, 8, 4)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), stem(x)), shape


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_every_class_is_exported(name, format, tmp_path):
    check_written(export_model(MODELS[name](), tmp_path / "x", format=format), tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize(("name", "head"), [*HEADS, *((name, PerceiverIOModel) for name in TINY)])
def test_every_architecture_is_exported(name, head, format, tmp_path, every_grid_is_large):
    check_written(export_model(tiny(name).model(head), tmp_path / "x", format=format), tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", ["autoencoding", "audio", "audio-visual", "masked-lm"])
def test_masks_may_be_inputs_or_not(name, masks, tmp_path):
    exported = export_model(MODELS[name](), tmp_path / "x.onnx", masks=masks)
    check_written(exported, tmp_path / "x.onnx")
    assert any("mask" in given.name for given in exported.inputs) == masks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "language", "flow", "video"])
def test_bundled_checkpoints_are_exported(name, tmp_path):
    check_written(export_model(load(bundled_checkpoint(name)), tmp_path / "x.onnx"), tmp_path / "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKLOADS if "-60" not in name])
def test_released_models_are_exported_at_full_size(name, tmp_path):
    torch.manual_seed(0)
    model = WORKLOADS[name].ours()
    redraw(model)  # those it starts with would hide what is wrong
    check_written(export_model(model, tmp_path / "x.onnx"), tmp_path / "x.onnx")


@pytest.mark.medium
def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "LARGEST_ONNX", 0)
    exported = export_model(tiny("vector").model(**SHORT), tmp_path / "x.onnx")
    assert exported.data == tmp_path / "x.onnx.data" and exported.data.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    onnxruntime.InferenceSession(tmp_path / "x.onnx")


@pytest.mark.medium
def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch, capsys):
    def wrong(file, inputs, outputs):
        run = export.run_torch(file, inputs, outputs)
        return lambda values: {name: tensor * 1.001 for name, tensor in run(values).items()}

    monkeypatch.setitem(export.RUNNERS, "torch", wrong)
    model = tiny("vector").model(**SHORT)
    (tmp_path / "old").write_text("old")
    with pytest.raises(Mismatch, match=r"off by 1\.0e-03 of the largest value"):
        export_model(model, tmp_path / "old", format="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "old"

    monkeypatch.setattr(export, "load", lambda source, head: model)
    assert main(["folder", "--format", "torch", "--output", str(tmp_path / "new")]) == 1
    assert "it was not kept" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_errors_are_relative_and_infinities_must_agree():
    want = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([2.0, -math.inf])}
    assert largest_error({"a": torch.tensor([1.0, -4.4]), "b": want["b"]}, want) == pytest.approx(0.1)
    assert largest_error({"a": want["a"], "b": torch.tensor([2.0, 1.0])}, want) == math.inf
    assert largest_error({"a": torch.tensor([math.nan, 1.0]), "b": want["b"]}, want) == math.inf
    assert largest_error({"a": want["a"][:1], "b": want["b"]}, want) == math.inf


# What is refused, before anything is traced.


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ValueError, match=r"ONNX needs onnxscript; pip install hf-perceiver\[export\]"):
        export_model(tiny("vector").model(**SHORT), tmp_path / "x.onnx")


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"float32 on the CPU: model.float\(\).cpu\(\)"):
        export_model(tiny("vector").model(**SHORT).bfloat16(), tmp_path / "x", format="torch")


def test_unknown_formats_and_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="format='tflite' must be one of onnx, torch"):
        export_model(tiny("vector").model(**SHORT), tmp_path / "x", format="tflite")
    with pytest.raises(ValueError, match="Linear is none of PerceiverIOModel"):
        export_model(torch.nn.Linear(2, 2), tmp_path / "x", format="torch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--output", "{folder}/none/x.onnx"], "is a folder or lies in none"),
        (["{folder}", "--output", "{folder}"], "is a folder or lies in none"),
        (["{folder}", "--output", "{folder}/x.onnx"], "has no config.json"),
        (["{folder}/other", "--output", "{folder}/x.onnx"], "is of model_type 'bert'"),
        (["{digits}", "--output", "{folder}/x.onnx", "--head", "PerceiverIOForMaskedLM"], "reads text input"),
        (["{digits}", "--output", "{folder}/x.onnx", "--dynamic", "length"], "unknown axis 'length'"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    places = {"folder": tmp_path, "digits": bundled_checkpoint("digits")}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_command_wants_whole_sizes(capsys):
    with pytest.raises(SystemExit):
        main(["folder", "--output", "x", "--sizes", "height=1.5"])
    assert "--sizes takes AXIS=N" in capsys.readouterr().err


def test_a_head_without_weights_is_refused():
    with pytest.raises(ValueError, match="has no weights for"):
        load(bundled_checkpoint("language"), "PerceiverIOForSequenceClassification")


@pytest.mark.medium
def test_the_command_exports_a_checkpoint(tmp_path, capsys):
    file = tmp_path / "digits.pt2"
    assert main([bundled_checkpoint("digits"), "--format", "torch", "--output", str(file), "--dynamic", "batch"]) == 0
    told = capsys.readouterr().out
    assert "dynamic: batch from 1" in told and "largest relative error" in told and "digits.pt2" in told
    assert file.is_file()
