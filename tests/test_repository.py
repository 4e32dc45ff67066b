"""repository.py: what a converted folder holds, that it appears whole or not at all, and that it loads after a push.

The Hub here is a stand-in on the loopback interface (hub_standin.py); the real one was never asked.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub_standin
import numpy as np
import pytest
import torch
import yaml
from helpers import CLASSES, PIXELS, config_of, fourier, grid, tiny, trainable
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForMaskedLM, AutoTokenizer

from conversion import repository
from conversion.repository import (
    Provenance,
    PushError,
    check_options,
    check_output,
    input_size,
    make_processors,
    model_card,
    read_labels,
    set_labels,
    sha256_of,
    write_repository,
)
from hf_perceiver import (
    PerceiverIOConfig,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForOpticalFlow,
    PerceiverIOModel,
    recipes,
)
from hf_perceiver.media_files import VideoWriter

ROOT = Path(__file__).parent.parent
DEEPMIND = Provenance("deepmind", "weights.pickle", "ab" * 32, "python -m conversion.convert_haiku weights.pickle")


def byte_model(seed: int = 0) -> PerceiverIOForMaskedLM:
    return tiny("language").model(PerceiverIOForMaskedLM, seed=seed, vocab_size=262)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


# Labels


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        # Read off the lists in DeepMind's notebooks; the order is that of the classes' read-outs.
        (
            "imagenet1k",
            1000,
            {0: "tench, Tinca tinca", 134: "crane", 517: "crane", 999: "toilet tissue, toilet paper,"},
        ),
        ("kinetics700", 700, {0: "abseiling", 9: "archery", 699: "zumba"}),
    ],
)
def test_label_files_hold_one_name_a_line_in_order(name, count, some):
    labels = read_labels(name)
    assert len(labels) == count
    assert all(label and label == label.strip() for label in labels)
    for index, start in some.items():
        assert labels[index].startswith(start)


def test_labels_are_set_where_their_number_is_the_released_one():
    config = config_of(**CLASSES, preprocessor=grid(PIXELS, fourier(8, 8)), num_labels=1000)
    set_labels(config, "imagenet-fourier")
    assert config.id2label[1] == "goldfish, Carassius auratus" and config.num_labels == 1000
    assert config.label2id["crane"] == 134, "two classes have this name; it gives the first"
    assert all(config.id2label[index] == label for label, index in config.label2id.items())
    config = recipes.multimodal_autoencoder()
    set_labels(config, "multimodal")
    assert config.id2label[699] == "zumba"


@pytest.mark.parametrize(("task", "count"), [("imagenet-conv", 5), ("multimodal", 1000), ("masked-lm", 1000)])
def test_other_numbers_of_labels_keep_generic_names(task, count):
    config = config_of(num_labels=count)
    set_labels(config, task)
    assert config.id2label[4] == "LABEL_4"


def test_names_of_its_own_stay():
    config = config_of(num_labels=1000)
    config.id2label = {i: f"thing {i}" for i in range(1000)}
    set_labels(config, "imagenet-conv")
    assert config.id2label[3] == "thing 3"


# Processors


def test_texts_of_bytes_get_a_tokenizer_as_long_as_the_trained_positions():
    (tokenizer,) = make_processors(byte_model().config, "masked-lm")
    assert tokenizer.model_max_length == 12  # helpers.LENGTH
    assert make_processors(tiny("language").config, "masked-lm") == [], "30 ids are not bytes"
    (tokenizer,) = make_processors(recipes.language_bytes(), "masked-lm")
    assert tokenizer.model_max_length == 2048


@pytest.mark.parametrize(
    ("preprocessor", "size"),
    [
        (recipes.imagenet_learned().preprocessor, (224, 224)),
        (recipes.imagenet_fourier().preprocessor, (224, 224)),
        (recipes.imagenet_conv().preprocessor, (224, 224)),  # positions of 56x56, four pixels each way
        (grid({"kind": "conv", "channels": 4, "num_layers": 2}, fourier(3, 2)), (48, 32)),
        (grid({"kind": "conv1x1", "channels": 4, "spatial_downsample": 2}, fourier(3, 5)), (6, 10)),
        (grid(PIXELS, trainable(12, 6, grid=[3, 4])), (3, 4)),
        (grid(PIXELS, fourier(8, 8) | {"max_resolution": None, "num_axes": 2}), None),
    ],
)
def test_the_image_size_is_that_of_the_positions_times_the_stems_stride(preprocessor, size):
    config = config_of(preprocessor=preprocessor, **CLASSES)
    assert input_size(preprocessor) == size
    (processor,) = make_processors(config, "imagenet-fourier")
    height, width = size or (224, 224)
    assert (processor.size["height"], processor.size["width"]) == (height, width)
    # DeepMind's notebook keeps 224 of 256 parts of the shorter side; sizes are whole pixels.
    assert abs(processor.crop_size["height"] - height * 256 / 224) <= 0.5


@pytest.mark.parametrize(
    ("config", "deepmind", "expected"),
    [
        # Tile, overlap, neighbours: DeepMind's notebook for the first two, halves of small tiles for the others.
        (recipes.optical_flow(), {}, ((368, 496), 20, 3)),
        (recipes.optical_flow_pixels(), {}, ((368, 496), 20, 1)),
        (recipes.optical_flow_conv(), {}, ((368, 496), 20, 1)),  # positions of 92x124, four pixels each way
        (tiny("flow").config, {}, ((4, 6), 2, 3)),
        (tiny("flow").config, {"train_size": [64, 50]}, ((64, 50), 20, 3)),
        (tiny("flow_upsampled").config, {}, ((8, 12), 4, 1)),
    ],
)
def test_flow_gets_its_tiles_and_patches(config, deepmind, expected):
    (processor,) = make_processors(config, "optical-flow", deepmind)
    tile = (processor.tile_size["height"], processor.tile_size["width"])
    assert (tile, processor.min_overlap, processor.patch_size) == expected
    assert processor.flow_scale_factor == 20


def test_the_flow_processor_agrees_with_the_models_scale():
    config = tiny("flow").config
    config.postprocessor = {"kind": "flow", "scale_factor": 5.0}
    assert make_processors(config, "optical-flow")[0].flow_scale_factor == 5


MERGED = {"kind": "patches", "in_channels": 3, "spatial_downsample": 4, "temporal_downsample": 2}


def clip_config(image: dict | None = None, audio: dict | None = None, **modalities: dict) -> PerceiverIOConfig:
    """The tiny autoencoder's inputs, some of them others."""
    config = tiny("multimodal").config
    for name, spec in {"image": image, "audio": audio, **modalities}.items():
        if spec is not None:
            config.preprocessor["modalities"][name] = spec
    return config


PATCHES = {"kind": "audio_patches", "samples_per_patch": 4}


@pytest.mark.parametrize(
    ("config", "deepmind", "expected"),
    [
        # Frames, height, width; samples, their rate; classes. 25 frames a second in DeepMind's notebook, 1,920 samples each.
        (recipes.multimodal_autoencoder(), {}, ((16, 224, 224), (30_720, 48_000), 700)),
        (clip_config(), {}, ((2, 4, 6), (8, 100), 5)),
        (clip_config(), {"num_frames": 4, "audio_samples_per_frame": 8}, ((4, 4, 6), (32, 200), 5)),
        (clip_config(image=grid(MERGED, fourier(3, 2))), {}, ((2, 12, 8), (8, 100), 5)),
        (clip_config(image=grid(MERGED, fourier(4, 3, 2))), {}, ((8, 12, 8), (8, 25), 5)),
        (clip_config(audio=grid(PATCHES, trainable(7, 6))), {}, ((2, 4, 6), (28, 350), 5)),
    ],
)
def test_clips_get_as_many_frames_and_samples_as_the_positions_were_made_for(config, deepmind, expected):
    (processor,) = make_processors(config, "multimodal", deepmind)
    video, sound = processor.image_processor, processor.feature_extractor
    sizes = (video.num_frames, video.size["height"], video.size["width"])
    assert (sizes, (sound.num_samples, sound.sampling_rate), processor.num_labels) == expected
    assert video.frames_per_second == 25


def test_frames_and_samples_are_equally_long_at_any_count():
    (processor,) = make_processors(clip_config(audio=grid(PATCHES, fourier(5))), "multimodal")
    video, sound = processor.image_processor, processor.feature_extractor
    assert (sound.num_samples, sound.sampling_rate) == (5, 62)  # not 62.5
    assert video.num_frames / video.frames_per_second == pytest.approx(5 / 62, rel=1e-12)


def test_clips_without_a_label_get_none():
    config = clip_config()
    del config.preprocessor["modalities"]["label"]
    assert make_processors(config, "multimodal")[0].num_labels is None


OPEN = {"max_resolution": None, "num_axes": 3}


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("optical-flow", tiny("flow_separate").config),  # five channels
        ("optical-flow", config_of(preprocessor=grid({"kind": "patches", "in_channels": 27}, None), **CLASSES)),
        ("multimodal", clip_config(image=grid(PIXELS, fourier(2, 2, 3) | OPEN))),
        ("multimodal", clip_config(audio=grid(PATCHES, fourier(8) | {"max_resolution": None, "num_axes": 1}))),
        ("multimodal", clip_config(depth=grid(PIXELS, fourier(2, 3)))),
        ("dense", tiny("flow").config),
        ("features", tiny("imagenet_conv").config),
    ],
)
def test_where_the_config_does_not_say_enough_there_is_no_processor(task, config):
    assert make_processors(config, task) == []


# The folder


def test_a_text_folder_is_complete(tmp_path):
    model = byte_model()
    write_repository(model, tmp_path / "out", task="masked-lm", provenance=DEEPMIND)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert "modeling_perceiver_io.py" in names, "code for trust_remote_code"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    encoded = AutoTokenizer.from_pretrained(tmp_path / "out")("ab é", return_tensors="pt")
    assert torch.equal(loaded(**encoded).logits, model(**encoded).logits)


def test_an_image_folder_is_complete(tmp_path):
    model = tiny("imagenet_fourier").model(PerceiverIOForImageClassification, num_labels=1000)
    write_repository(model, tmp_path / "out", task="imagenet-fourier", provenance=DEEPMIND)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["0"] == "tench, Tinca tinca"
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 6  # of its positions


def test_a_bare_model_is_written_too(tmp_path):
    case = tiny("flow")
    model = case.model()
    write_repository(model, tmp_path / "out", task="optical-flow", provenance=DEEPMIND)
    loaded = PerceiverIOModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(**case.inputs()).logits, model(**case.inputs()).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card and "AutoImageProcessor" in card
    assert "pipeline" not in card, "it needs the task's head"


def test_a_folder_without_a_processor_says_so(tmp_path):
    write_repository(tiny("flow_separate").model(), tmp_path / "out", task="optical-flow", provenance=DEEPMIND)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No processor is included: the model takes tensors." in card and "Processor" not in card.split("## Where")[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_floating_tensors_only(dtype, tmp_path):
    model = tiny("imagenet_conv").model(PerceiverIOForImageClassification)
    write_repository(model, tmp_path / "out", task="imagenet-conv", provenance=DEEPMIND, dtype=dtype)
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    counters = {name for name in dtypes if name.endswith("num_batches_tracked")}
    assert counters and all(dtypes[name] == torch.int64 for name in counters)
    assert {dtypes[name] for name in dtypes.keys() - counters} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert f"stored in {dtype}" in (tmp_path / "out" / "README.md").read_text()


def test_shards_are_as_small_as_asked(tmp_path):
    model = byte_model()
    write_repository(model, tmp_path / "out", task="masked-lm", provenance=DEEPMIND, max_shard_size="20kB")
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 30_000 for shard in shards)  # headers come on top
    loaded = PerceiverIOForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_an_output_that_exists_is_refused_before_any_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, told in (("full", "exists and is not empty"), ("file", "is a file")):
        with pytest.raises(ValueError, match=told):
            write_repository(None, tmp_path / name, task="dense", provenance=DEEPMIND)
    assert (tmp_path / "full" / "note").read_text() == "mine"
    assert check_output(tmp_path / "empty") == tmp_path / "empty"
    write_repository(byte_model(), tmp_path / "empty", task="masked-lm", provenance=DEEPMIND)
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"task": "speech"}, "task='speech' must be one of masked-lm"),
        ({"dtype": "int8"}, "dtype='int8' must be one of float32"),
        ({"max_shard_size": "big"}, "must be a size like 2GB"),
        ({"max_shard_size": "0GB"}, "must be a size like 2GB"),
        ({"push_to_hub": "a/b/c"}, "must be a repository's name"),
        ({"push_to_hub": "../b"}, "Repo id must use"),
        ({"private": True}, "give its name with --push-to-hub"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        check_options(**options)
    with pytest.raises(ValueError, match=told):
        write_repository(None, tmp_path / "out", **{"task": "dense", "provenance": DEEPMIND, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(failure, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(repository, "model_card", fail)
    with pytest.raises(type(failure)):
        write_repository(byte_model(), tmp_path / "out", task="masked-lm", provenance=DEEPMIND)
    assert list(tmp_path.iterdir()) == []


def test_what_is_measured_on_the_folder_goes_into_its_card(tmp_path):
    def measure(folder: Path) -> str:
        assert type(PerceiverIOForMaskedLM.from_pretrained(folder)) is PerceiverIOForMaskedLM
        assert not (folder / "README.md").exists() and not (tmp_path / "out").exists()
        return "Measured: 1e-7."

    write_repository(byte_model(), tmp_path / "out", task="masked-lm", provenance=DEEPMIND, measure=measure)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Measured: 1e-7." in card and "Not measured" not in card


def test_a_measurement_that_fails_leaves_and_pushes_nothing(tmp_path, monkeypatch):
    def measure(folder: Path) -> str:
        raise ArithmeticError("too far")

    monkeypatch.setattr(repository, "push", lambda *args, **kwargs: pytest.fail("pushed"))
    about = {"task": "masked-lm", "provenance": DEEPMIND, "push_to_hub": "me/mine"}
    with pytest.raises(ArithmeticError):
        write_repository(byte_model(), tmp_path / "out", measure=measure, **about)
    assert list(tmp_path.iterdir()) == []


# A real full disk says ENOSPC where this limit says EFBIG, in the same system call.
LIMITED = """
import os, resource, signal, sys
from pathlib import Path
from conversion import repository
from conversion.repository import Provenance, write_repository
from hf_perceiver import PerceiverIOForMaskedLM
from helpers import tiny

model = tiny("language").model(PerceiverIOForMaskedLM, vocab_size=262)
about = Provenance("deepmind", "weights.pickle", None, "a command")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    write_repository(model, "full", task="masked-lm", provenance=about)
except Exception as error:
    assert "File too large" in str(error), error
else:
    raise AssertionError("the limit was not felt")
assert not list(Path().iterdir()), list(Path().iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
repository.model_card = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
write_repository(model, "killed", task="masked-lm", provenance=about)
"""


@pytest.mark.medium
def test_a_full_disk_and_a_kill_leave_nothing_that_looks_finished(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".killed.") and left.name.endswith(".tmp")


# The card


def test_the_card_of_deepminds_weights_says_where_they_come_from(tmp_path):
    provenance = Provenance(**{**vars(DEEPMIND), "parity": "Logits: relative L2 3e-7.", "notes": ("a note",)})
    write_repository(byte_model(), tmp_path / "out", task="masked-lm", provenance=provenance)
    text = (tmp_path / "out" / "README.md").read_text()
    header = front_matter(text)
    assert header["license"] == "cc-by-4.0" and header["pipeline_tag"] == "fill-mask"
    assert header["library_name"] == "transformers"
    for part in (
        "sha256 `" + "ab" * 32,
        "`weights.pickle`",
        "python -m conversion.convert_haiku weights.pickle",
        "Logits: relative L2 3e-7.",
        "python -m conversion.verify DIR --reference FILE.npz",
        "a note",
        "DeepMind's, released",
        'AutoModelForMaskedLM.from_pretrained("out")',
        "12 positions",
    ):
        assert part in text, part
    assert str(tmp_path) not in text


def test_the_card_of_transformers_checkpoints_states_both_licences(tmp_path):
    provenance = Provenance("transformers", "someone/model", None, "a command")
    card = model_card(byte_model(), tmp_path, task="masked-lm", provenance=provenance, repo_id="me/mine")
    text = " ".join(card.split())
    assert front_matter(card)["license"] == "other"
    assert "say Apache-2.0; the authors' bucket" in text and "CC BY 4.0" in text
    assert "Not measured for this file." in text and "no single file" in text
    assert 'from_pretrained("me/mine")' in text


@pytest.mark.parametrize(
    ("task", "case", "head", "changes"),
    [
        ("masked-lm", "language", PerceiverIOForMaskedLM, {"vocab_size": 262}),
        ("imagenet-conv", "imagenet_conv", PerceiverIOForImageClassification, {}),
        ("optical-flow", "flow", PerceiverIOForOpticalFlow, {}),
        ("multimodal", "multimodal", PerceiverIOForMultimodalAutoencoding, {}),
        ("features", "language", PerceiverIOModel, {}),
    ],
)
def test_the_cards_code_runs(task, case, head, changes, tmp_path, monkeypatch):
    write_repository(tiny(case).model(head, **changes), tmp_path / "out", task=task, provenance=DEEPMIND)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (5, 9, 13, 3), dtype=np.uint8)
    found = {"frame": frames[0], "next_frame": frames[1]}
    if task == "multimodal":
        pytest.importorskip("av")
        with VideoWriter("clip.mp4", frames_per_second=25, sampling_rate=8000) as writer:
            for frame in np.repeat(np.repeat(frames, 16, axis=1), 16, axis=2):
                writer.write_frame(frame)
            writer.write_sound(np.zeros(5 * 320, np.float32))
    exec(code, found)
    assert type(found["model"]) is head
    if task == "optical-flow":
        assert found["flow"].shape == (9, 13, 2)
    if task == "multimodal":
        assert Path("reconstruction.mp4").stat().st_size and found["result"]["num_frames"] == 5


def test_an_unknown_origin_is_refused(tmp_path):
    with pytest.raises(ValueError, match="origin='flax' must be one of deepmind, transformers"):
        write_repository(
            None, tmp_path / "out", task="dense", provenance=Provenance(**{**vars(DEEPMIND), "origin": "flax"})
        )


def test_the_digest_is_that_of_the_whole_file(tmp_path):
    data = os.urandom(repository.CHUNK + 17)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# Pushing


def test_a_push_that_fails_leaves_the_complete_folder_and_says_how_to_go_on(tmp_path):
    # Every test runs with HF_HUB_OFFLINE=1 (conftest.py).
    with pytest.raises(PushError, match=r"is complete, but pushing it to me/mine failed: .*hf upload me/mine"):
        write_repository(byte_model(), tmp_path / "out", task="masked-lm", provenance=DEEPMIND, push_to_hub="me/mine")
    assert PerceiverIOForMaskedLM.from_pretrained(tmp_path / "out").config.vocab_size == 262


def test_private_never_uploads_to_a_public_repository(tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "repo_info", lambda self, repo_id: SimpleNamespace(private=False))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: uploads.append(kwargs))
    with pytest.raises(PushError, match="exists and is public"):
        repository.push(tmp_path, "me/mine", private=True)
    assert uploads == []


PUSH = """
import torch
from conversion.repository import Provenance, write_repository
from hf_perceiver import PerceiverIOForImageClassification, PerceiverIOForMaskedLM
from helpers import tiny

text = tiny("language").model(PerceiverIOForMaskedLM, vocab_size=262)
image = tiny("imagenet_conv").model(PerceiverIOForImageClassification, num_labels=1000)
inputs = [torch.randint(6, 262, (2, 9)), torch.randn(2, 3, 40, 36)]
logits = []
for model, task, x in ((text, "masked-lm", inputs[0]), (image, "imagenet-conv", inputs[1])):
    about = Provenance("deepmind", "weights.pickle", None, "a command")
    write_repository(model, task, task=task, provenance=about, push_to_hub="tester/" + task, private=True)
    # Products of matrices may differ in the last bit where memory is aligned otherwise, and a file's tensors are mapped
    # as they lie in it: the folder's logits are what the pushed copy must repeat, its weights are the model's.
    loaded = type(model).from_pretrained("./" + task).eval()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    logits.append(loaded(inputs=x).logits.detach())
    torch.testing.assert_close(logits[-1], model(inputs=x).logits, rtol=1e-4, atol=1e-4)
torch.save([inputs, *logits], "was.pt")
"""

LOAD = """
import sys
{first}
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForMaskedLM, AutoTokenizer

inputs, text, image = torch.load("was.pt")
model = AutoModelForMaskedLM.from_pretrained("tester/masked-lm"{trust})
assert torch.equal(model(input_ids=inputs[0]).logits, text)
assert type(model).__module__.startswith({module!r}), type(model)
assert AutoTokenizer.from_pretrained("tester/masked-lm"{trust})("a").input_ids == [4, 103, 5]
model = AutoModelForImageClassification.from_pretrained("tester/imagenet-conv"{trust})
assert torch.equal(model(pixel_values=inputs[1]).logits, image)
assert model.config.id2label[999].startswith("toilet tissue")
print(AutoImageProcessor.from_pretrained("tester/imagenet-conv"{trust}).size)
"""


def fresh_process(script: str, folder: Path, endpoint: str, cache: str, *paths: Path) -> str:
    """A new process in `folder`, with an empty HF_HOME and the stand-in for the Hub."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / cache), "HF_TOKEN": "none", "OMP_NUM_THREADS": "1"}
    env |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


LARGE = 20_000  # bytes; the Hub's own limit is 10 MB


@pytest.mark.medium
def test_what_is_pushed_loads_in_a_fresh_process_with_and_without_the_package_bit_for_bit(tmp_path):
    """Against the stand-in; the real Hub was never asked. Three processes, half a minute."""
    # Of the two kinds of upload each has its files: here weights, labels and the longest sources are large.
    with hub_standin.HubStandIn(large=LARGE) as hub:
        fresh_process(PUSH, tmp_path, hub.endpoint, "pushing", ROOT / "src", ROOT, ROOT / "tests")
        assert sorted(hub.repos) == ["tester/imagenet-conv", "tester/masked-lm"]
        for task in ("imagenet-conv", "masked-lm"):
            sizes = {path.name: path.stat().st_size for path in (tmp_path / task).iterdir()}
            assert sizes["model.safetensors"] > LARGE > sizes["README.md"]
            assert sha256_of(tmp_path / task / "model.safetensors") in hub.large_files
        asked = [request.split("/")[0:2] for request in hub.requests]
        assert ["PUT ", "large"] in asked and ["POST ", "large"] in asked, "stored, and the storing checked"
        for repo_id in hub.repos:
            files = hub.at(repo_id, "main")[1]
            folder = tmp_path / repo_id.split("/")[1]
            assert {name: data for name, data in files.items() if name != ".gitattributes"} == {
                path.name: path.read_bytes() for path in folder.iterdir()
            }
        package = LOAD.format(first="import hf_perceiver", trust="", module="hf_perceiver.")
        out = fresh_process(package, tmp_path, hub.endpoint, "with", ROOT / "src")
        assert "height" in out
        # Importing it fails, wherever it is installed.
        without = LOAD.format(
            first='sys.modules["hf_perceiver"] = None', trust=", trust_remote_code=True", module="transformers_modules."
        )
        out = fresh_process(without, tmp_path, hub.endpoint, "without")
        assert "height" in out
        assert hub.unknown == [], "what the stand-in does not know was asked for"
