"""hub.py and custom_modules.py: what code travels with a checkpoint, what is refused, loading it without the package.

The Hub here is a stand-in on the loopback interface (hub_standin.py); the real one was never asked.
"""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import hub_standin
import pytest
import torch
from helpers import tiny
from torch import nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_perceiver
from hf_perceiver import PerceiverIOConfig, PerceiverIOForMaskedLM, PerceiverIOModel, save_with_code
from hf_perceiver.custom_modules import missing_kinds
from hf_perceiver.feature_extraction_perceiver_io import PerceiverIOFeatureExtractor
from hf_perceiver.hub import auto_map, code_files
from hf_perceiver.processing_perceiver_io import PerceiverIOProcessor
from hf_perceiver.registry import PREPROCESSORS
from hf_perceiver.video_processing_perceiver_io import PerceiverIOVideoProcessor

SOURCE = Path(hf_perceiver.__file__).parent.parent

LATENTS = {
    "num_latents": 4,
    "d_latents": 16,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "qk_channels": None,
    "v_channels": None,
    "decoder_num_heads": 2,
    "decoder_qk_channels": None,
    "decoder_v_channels": None,
}
POSITION = {"kind": "trainable", "num_positions": 48, "channels": 16}
TEXT = {
    "preprocessor": {"kind": "text", "channels": 16, "position": POSITION},
    "output_query": {"kind": "position", "position": POSITION, "use_input_mask": True},
}
IMAGE = {
    "preprocessor": {
        "kind": "grid",
        "stem": {"kind": "pixels", "in_channels": 3},
        "position": {"kind": "fourier", "num_bands": 3, "max_resolution": [8, 8]},
    },
    "output_query": {"kind": "tasks", "channels": 16},
    "postprocessor": {"kind": "classification"},
    "num_labels": 5,
}
DOTS = {
    "preprocessor": {"kind": "dots", "channels": 16},
    "output_query": {"kind": "input"},
    "postprocessor": {"kind": "projection"},
    "num_labels": 3,
}

# A user's part in two files, the first of which needs the second.
DOTS_PY = '''
"""Dots on a plane."""
import torch
from dot_layers import widen
from hf_perceiver import (
    ArrayPart,
    Preprocessor,
    register_preprocessor as register,  # by another name
)


@register("dots")
class DotPreprocessor(Preprocessor):
    def __init__(self, *, channels: int):
        super().__init__()
        self.channels, self.embed = channels, widen(channels)

    def forward(self, inputs, mask=None):
        from hf_perceiver.preprocessors import element_mask

        return ArrayPart(features=torch.sin(self.embed(inputs)), mask=element_mask(mask, inputs.shape[:2]))
'''
DOT_LAYERS_PY = """
from torch import nn


def widen(channels):
    return nn.Linear(2, channels)
"""


def text_model(**changes) -> PerceiverIOForMaskedLM:
    return PerceiverIOForMaskedLM(PerceiverIOConfig(**{**LATENTS, **TEXT, **changes})).eval()


@pytest.fixture
def user_modules(tmp_path, monkeypatch):
    """dots.py and dot_layers.py in a folder of the user's, imported; forgotten afterwards."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "dots.py").write_text(DOTS_PY)
    (folder / "dot_layers.py").write_text(DOT_LAYERS_PY)
    monkeypatch.syspath_prepend(folder)
    before = dict(PREPROCESSORS.classes)
    yield [importlib.import_module(name) for name in ("dots", "dot_layers")]
    PREPROCESSORS.classes = before
    for name in ("dots", "dot_layers", "hf_perceiver.dots", "hf_perceiver.dot_layers"):
        sys.modules.pop(name, None)


def dots_model() -> PerceiverIOModel:
    return PerceiverIOModel(PerceiverIOConfig(**LATENTS, **DOTS)).eval()


def write(folder: Path, name: str, code: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def refused(code: str, folder: Path) -> str:
    """What a module of this text is told."""
    with pytest.raises(ValueError) as error:
        code_files([write(folder, "part.py", code)])
    return str(error.value)


# What travels


def test_the_model_takes_its_own_files_and_no_others():
    files, modules = code_files([])
    assert modules == []
    assert {"modeling_perceiver_io.py", "configuration_perceiver_io.py", "registry.py", "stems.py"} <= set(files)
    assert not {"__init__.py", "hub.py", "bundled.py", "tokenization_perceiver_io.py"} & set(files)
    for name, text in files.items():
        assert text == (SOURCE / "hf_perceiver" / name).read_text(encoding="utf-8")


def test_a_module_and_what_it_needs_are_imported_by_the_modeling_file_in_order(user_modules):
    files, modules = code_files(user_modules)
    assert modules == ["dot_layers", "dots"]
    tail = files["modeling_perceiver_io.py"].splitlines()[-2:]
    assert [line.split(" import ")[0] for line in tail] == ["from .dot_layers", "from .dots"]


def test_imports_of_the_package_and_of_each_other_become_relative(user_modules):
    text = code_files(user_modules)[0]["dots.py"]
    expected = DOTS_PY.replace("from dot_layers", "from .dot_layers")
    expected = expected.replace("from hf_perceiver.preprocessors", "from .preprocessors")
    start, end = expected.index("from hf_perceiver import ("), expected.index("\n\n\n@register")
    lines = ["from .arrays import ArrayPart", "from .preprocessors import Preprocessor"]
    lines.append("from .registry import register_preprocessor as register")
    assert text == expected[:start] + "\n".join(lines) + expected[end:]


def test_text_beyond_ascii_before_an_import_does_not_shift_it(tmp_path):
    code = 's = "äöü 漢字"\nif True:\n    from hf_perceiver import Stem, OutputQuery\nt = 1\n'
    text = code_files([write(tmp_path, "part.py", code)])[0]["part.py"]
    relative = "    from .stems import Stem\n    from .output_queries import OutputQuery\n"
    assert text == 's = "äöü 漢字"\nif True:\n' + relative + "t = 1\n"


def test_modules_of_a_users_package_travel_as_single_files(tmp_path):
    write(tmp_path, "mine/__init__.py", "")
    parts = write(tmp_path, "mine/parts.py", "from mine.layers import layer\nfrom .shapes import shape\n")
    others = [write(tmp_path, f"mine/{n}.py", f"{n[:-1]} = 1\n") for n in ("layers", "shapes")]
    assert code_files([parts, *others])[0]["parts.py"] == "from .layers import layer\nfrom .shapes import shape\n"


def test_files_of_the_package_that_only_a_custom_module_needs_travel_too(tmp_path):
    part = write(tmp_path, "part.py", "from hf_perceiver import PerceiverIOTokenizer\n")
    assert "tokenization_perceiver_io.py" in code_files([part])[0]


def test_every_auto_class_that_reads_the_input_is_mapped():
    model = {"AutoModel": "modeling_perceiver_io.PerceiverIOModel"}
    text = {name: f"heads_text.PerceiverIO{name.removeprefix('AutoModel')}" for name in text_auto_classes()}
    expected = {"AutoConfig": "configuration_perceiver_io.PerceiverIOConfig", **text, **model}
    assert auto_map(text_model()) == expected
    images = auto_map(PerceiverIOModel(PerceiverIOConfig(**LATENTS, **IMAGE)))
    assert images["AutoModelForImageClassification"] == "heads_vision.PerceiverIOForImageClassification"
    assert "AutoModelForMaskedLM" not in images


def text_auto_classes() -> list[str]:
    heads = "MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice".split()
    return [f"AutoModelFor{head}" for head in heads]


# What is refused


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os\nimport hf_perceiver as hp\n", "line 2: write `from hf_perceiver import name`"),
        ("from hf_perceiver import recipes\n", "'recipes' is not defined in one file"),
        ("from hf_perceiver import *\n", "'*' is not defined in one file"),
        ("from hf_perceiver.training.schedules import x\n", "'training.schedules' is none of them"),
        ("from . import helpers\n", "write `from .module import helpers`, not `from . import helpers`"),
        ("from ..above import x\n", "not `from ..above import x`"),
        ("x = 1; from hf_perceiver import Stem\n", "on a line of its own"),
        ("from hf_perceiver import Stem; x = 1\n", "on a line of its own"),
        ("from neighbour import x\n", "neighbour.py; add that to extra_modules"),
        ("from .neighbour import x\n", "neighbour.py; add that to extra_modules"),
        ("import neighbour\n", "line 1: write `from neighbour import name`"),
        ('"""Read\n\nfrom .nowhere import it carefully.\n"""\n', "imports .nowhere, which does not travel"),
    ],
)
def test_an_import_that_cannot_travel_is_refused_with_its_line(code, told, tmp_path):
    write(tmp_path, "neighbour.py", "x = 1\n")
    assert told in refused(code, tmp_path)


def test_modules_that_are_not_one_importable_file_are_refused(tmp_path):
    write(tmp_path, "pack/__init__.py", "")
    cases = {
        tmp_path / "absent.py": "there is no file",
        tmp_path / "pack" / "__init__.py": "single .py files",
        write(tmp_path, "my-part.py", ""): "rename it to a Python identifier",
        write(tmp_path, "stems.py", ""): "is a file of this package",
        sys.modules["builtins"]: "has no file",
    }
    for module, told in cases.items():
        with pytest.raises(ValueError, match=told):
            code_files([module])


def test_two_files_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"would both be part\.py"):
        code_files([write(tmp_path, "a/part.py", ""), write(tmp_path, "b/part.py", "")])


def test_modules_that_import_each_other_are_refused(tmp_path):
    a, b = write(tmp_path, "a.py", "from b import x\n"), write(tmp_path, "b.py", "from a import y\n")
    with pytest.raises(ValueError, match="in a circle: "):
        code_files([a, b])


def test_a_part_defined_in_a_notebook_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PREPROCESSORS, "classes", dict(PREPROCESSORS.classes))

    @hf_perceiver.register_preprocessor("cell")
    class Cell(hf_perceiver.Preprocessor):
        def __init__(self):
            super().__init__()
            self.channels = 4

    Cell.__module__ = "__main__"
    model = PerceiverIOModel(PerceiverIOConfig(**LATENTS, **{**DOTS, "preprocessor": {"kind": "cell"}}))
    with pytest.raises(ValueError, match="put its parts into a file of their own"):
        save_with_code(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_other_packages_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a torch\.nn\.modules\.linear\.Linear"):
        save_with_code(nn.Linear(2, 2), tmp_path / "out")


# The folder


def test_the_folder_appears_complete_or_not_at_all(tmp_path):
    class Unsaveable:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    model, out = text_model(), tmp_path / "out"
    with pytest.raises(OSError, match="disk full"):
        save_with_code(model, out, processors=[Unsaveable()])
    assert list(tmp_path.iterdir()) == []

    save_with_code(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        save_with_code(text_model(), out, processors=[Unsaveable()])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_saving_over_another_form_of_the_weights_leaves_none_of_it(tmp_path):
    first, second, out = text_model(), text_model(), tmp_path / "out"
    save_with_code(first, out, max_shard_size="4kB")
    assert (out / "model.safetensors.index.json").exists()
    (out / "README.md").write_text("a card")
    for model, size in ((second, "1GB"), (first, "4kB")):
        save_with_code(model, out, max_shard_size=size)
        loaded = PerceiverIOForMaskedLM.from_pretrained(out)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert not (out / "model.safetensors").exists()
    assert (out / "README.md").read_text() == "a card"


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = text_model()
    save_with_code(model, tmp_path / "out")
    assert not hasattr(model.config, "auto_map")
    model.save_pretrained(tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"config.json", "model.safetensors"}


def test_a_later_plain_save_does_not_promise_code_that_it_leaves_behind(tmp_path):
    """With the package installed a checkpoint with code loads through the package, and saves as any other."""
    save_with_code(text_model(), tmp_path / "out")
    model = PerceiverIOForMaskedLM.from_pretrained(tmp_path / "out")
    model.config.auto_map["AutoProcessor"] = "someone/else--processing.Processor"
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "someone/else--processing.Processor"}


# Processors


def flow_model_and_processor():
    model = tiny("flow").model(hf_perceiver.PerceiverIOForOpticalFlow)
    processor = hf_perceiver.PerceiverIOFlowImageProcessor(tile_size={"height": 4, "width": 6}, min_overlap=1)
    return model, processor


def test_a_processor_of_the_package_travels_with_its_code(tmp_path):
    model, processor = flow_model_and_processor()
    save_with_code(model, tmp_path / "out", processors=[processor])
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    name = "image_processing_perceiver_io.PerceiverIOFlowImageProcessor"
    assert saved["auto_map"] == {"AutoImageProcessor": name}
    file = "image_processing_perceiver_io.py"
    assert (tmp_path / "out" / file).read_text() == (SOURCE / "hf_perceiver" / file).read_text()

    # Where the package is installed it is the package's own, and a plain save promises no code.
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(processor) and loaded.to_dict() == processor.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())


def test_a_processor_of_several_parts_travels_with_the_code_of_each(tmp_path):
    model = tiny("multimodal").model(hf_perceiver.PerceiverIOForMultimodalAutoencoding)
    processor = PerceiverIOProcessor(num_labels=5)
    save_with_code(model, tmp_path / "out", processors=[processor])
    saved = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    expected = {
        "AutoProcessor": ("processing_perceiver_io", PerceiverIOProcessor, saved),
        "AutoImageProcessor": ("video_processing_perceiver_io", PerceiverIOVideoProcessor, saved["image_processor"]),
        "AutoFeatureExtractor": (
            "feature_extraction_perceiver_io",
            PerceiverIOFeatureExtractor,
            saved["feature_extractor"],
        ),
    }
    for auto_class, (module, processor_class, entry) in expected.items():
        assert entry["auto_map"] == {auto_class: f"{module}.{processor_class.__name__}"}
        file = f"{module}.py"
        assert (tmp_path / "out" / file).read_text() == (SOURCE / "hf_perceiver" / file).read_text()
    assert (tmp_path / "out" / "media_files.py").is_file(), "what they import comes along"

    loaded = PerceiverIOProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded.image_processor) is PerceiverIOVideoProcessor
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in (tmp_path / "again" / "processor_config.json").read_text()


def test_processors_of_others_are_saved_without_code(tmp_path):
    from transformers import PerceiverImageProcessorPil

    model = PerceiverIOModel(PerceiverIOConfig(**LATENTS, **IMAGE))
    tokenizer = hf_perceiver.PerceiverIOTokenizer()
    PerceiverImageProcessorPil().save_pretrained(tmp_path / "plain")
    save_with_code(model, tmp_path / "out", processors=[PerceiverImageProcessorPil(), tokenizer])
    file = "preprocessor_config.json"
    assert (tmp_path / "out" / file).read_text() == (tmp_path / "plain" / file).read_text()
    assert "auto_map" not in json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert not {"image_processing_perceiver_io.py", "tokenization_perceiver_io.py"} & set(os.listdir(tmp_path / "out"))


# Parts that nobody has imported


def forget(*names: str) -> None:
    for name in names:
        sys.modules.pop(name, None)
    PREPROCESSORS.classes.pop("dots", None)


def test_a_part_that_nobody_imported_is_named_with_the_module_it_came_from(user_modules, tmp_path):
    dots_model().save_pretrained(tmp_path / "out")
    forget("dots", "dot_layers")
    with pytest.raises(ValueError, match=r"out uses preprocessor kind 'dots', registered by dots: import that first"):
        PerceiverIOModel.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="registered by dots"):
        PerceiverIOModel.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_trusted_parts_run_from_the_checkpoint_where_the_package_is_installed(user_modules, tmp_path):
    model, points = dots_model(), torch.randn(2, 7, 2)
    save_with_code(model, tmp_path / "out", extra_modules=[user_modules[1]])
    forget("dots", "dot_layers")
    with pytest.raises(ValueError, match="trust_remote_code=True to run it"):
        PerceiverIOModel.from_pretrained(tmp_path / "out")
    assert "hf_perceiver.dots" not in sys.modules
    loaded = PerceiverIOModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded(inputs=points).logits, model(inputs=points).logits)

    # Such a model's code travels on.
    save_with_code(loaded, tmp_path / "again")
    for name in ("dots.py", "dot_layers.py", "modeling_perceiver_io.py"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_a_module_that_fails_is_not_left_half_imported(user_modules, tmp_path):
    save_with_code(dots_model(), tmp_path / "out", extra_modules=user_modules)
    forget("dots", "dot_layers")
    (tmp_path / "out" / "dots.py").write_text("raise RuntimeError('broken part')")
    with pytest.raises(RuntimeError, match="broken part"):
        PerceiverIOModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert "hf_perceiver.dots" not in sys.modules


def test_parts_that_the_user_imported_are_not_replaced(user_modules, tmp_path):
    save_with_code(dots_model(), tmp_path / "out", extra_modules=user_modules)
    loaded = PerceiverIOModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded.preprocessor) is user_modules[0].DotPreprocessor


def test_parts_within_parts_are_found(user_modules):
    modalities = {"a": DOTS["preprocessor"], "b": {"kind": "grid", "stem": {"kind": "mine"}, "position": None}}
    config = PerceiverIOConfig(**LATENTS, **{**DOTS, "preprocessor": {"kind": "multimodal", "modalities": modalities}})
    assert missing_kinds(config) == ["stem kind 'mine'"]
    # A user's option that merely looks like a spec is none.
    config.preprocessor = {"kind": "dots", "channels": 4, "noise": {"kind": "gaussian"}}
    assert missing_kinds(config) == []


@pytest.mark.parametrize("name", ["../evil", "a b", ""])
def test_a_config_cannot_name_modules_outside_its_folder(name):
    with pytest.raises(ValueError, match="custom_modules names Python modules"):
        PerceiverIOConfig(custom_modules=[name])


# From one process to another, through the stand-in

PUSH = """
import importlib, sys, torch
sys.path.insert(0, {user!r})
import dots, dot_layers
import hf_perceiver as hp

torch.manual_seed(0)
inputs = {{"text": torch.randint(6, 262, (2, 20)), "image": torch.rand(2, 3, 8, 8), "dots": torch.randn(2, 9, 2)}}
heads = [hp.PerceiverIOForMaskedLM, hp.PerceiverIOForImageClassification, hp.PerceiverIOModel]
tokenizer = hp.PerceiverIOTokenizer()
logits = {{}}
for name, head in zip(inputs, heads):
    model = head(hp.PerceiverIOConfig(**{configs!r}[name])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # scores of the size of 1
    logits[name] = model(inputs=inputs[name]).logits.detach()
    hp.save_with_code(
        model, name, extra_modules=[dot_layers] if name == "dots" else [], repo_id="tester/" + name,
        processors=[tokenizer] if name == "text" else [],
    )
    if name == "text":
        model.push_to_hub("tester/plain")
        tokenizer.push_to_hub("tester/plain")
torch.save([inputs, logits], "expected.pt")
"""

LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_perceiver"] = None  # importing it fails, wherever it is installed
import torch
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedLM, AutoTokenizer, pipeline

inputs, logits = torch.load("expected.pt")
trust = {"trust_remote_code": True}
auto = {"text": AutoModelForMaskedLM, "image": AutoModelForImageClassification, "dots": AutoModel}
for name, auto_class in auto.items():
    model = auto_class.from_pretrained("tester/" + name, **trust)
    assert torch.equal(model(inputs=inputs[name]).logits, logits[name]), name
    assert type(model).__module__.startswith("transformers_modules."), type(model)

# From a folder; and what was loaded so saves its code along.
model.save_pretrained("again")
for source in ("./dots", "./again"):
    model = AutoModel.from_pretrained(source, **trust)
    assert torch.equal(model(inputs=inputs["dots"]).logits, logits["dots"]), source

tokenizer = AutoTokenizer.from_pretrained("tester/text", **trust)
assert tokenizer("a\\u00e9[MASK]").input_ids == [4, 103, 201, 175, 3, 5], tokenizer("a\\u00e9[MASK]")
guess = pipeline("fill-mask", model="tester/text", **trust)("ab[MASK]d")[0]
encoded = tokenizer("ab[MASK]d", return_tensors="pt")
scores = AutoModelForMaskedLM.from_pretrained("tester/text", **trust)(**encoded).logits[0, 3].softmax(-1)
assert guess["token"] == int(scores.argmax()) and abs(guess["score"] - float(scores.max())) < 1e-6

try:
    AutoModelForMaskedLM.from_pretrained("tester/plain", **trust)
except ValueError as error:
    assert "perceiver_io" in str(error), error
else:
    raise AssertionError("a checkpoint without code loaded without the package")
print("loaded without the package")
"""

LOAD_WITH_THE_PACKAGE = """
import torch, hf_perceiver
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedLM, AutoTokenizer

inputs, logits = torch.load("expected.pt")
auto = {"text": AutoModelForMaskedLM, "plain": AutoModelForMaskedLM, "image": AutoModelForImageClassification}
for name, auto_class in auto.items():
    model = auto_class.from_pretrained("tester/" + name)
    assert type(model).__module__.startswith("hf_perceiver.heads_"), type(model)
    same = name.replace("plain", "text")
    assert torch.equal(model(inputs=inputs[same]).logits, logits[same]), name
for name in ("text", "plain"):
    assert isinstance(AutoTokenizer.from_pretrained("tester/" + name), hf_perceiver.PerceiverIOTokenizer)
try:
    AutoModel.from_pretrained("tester/dots")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("untrusted code ran")
model = AutoModel.from_pretrained("tester/dots", trust_remote_code=True)
assert torch.equal(model(inputs=inputs["dots"]).logits, logits["dots"])
print("loaded with the package")
"""


def run(script: str, folder: Path, endpoint: str, cache: str, package: bool) -> str:
    """A fresh process in `folder`, with an empty HF_HOME and the stand-in for the Hub."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / cache), "HF_TOKEN": "none"}
    env |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    if package:
        env["PYTHONPATH"] = str(SOURCE)
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


FLOW_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_perceiver"] = None
import json, torch
from transformers import AutoImageProcessor, AutoModelForImageToImage

frames, expected_features, expected = torch.load("expected.pt")
for source in ("./out", "./again"):
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForImageToImage.from_pretrained(source, trust_remote_code=True)
    features = processor(frames, return_tensors="pt")
    assert torch.equal(features.pixel_values, expected_features), source
    with torch.no_grad():
        [flow] = processor.post_process_optical_flow(model(**features), (9, 13))
    # Flow of about 1 pixel; torch's sums depend on where in memory the weights lie.
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-5)
    # What was loaded so saves its code along.
    model.save_pretrained("again")
    processor.save_pretrained("again")
    assert type(processor).__module__.startswith("transformers_modules.")
print("flow without the package")
"""


@pytest.mark.medium
def test_the_flow_processors_code_runs_in_a_fresh_process(tmp_path):
    model, processor = flow_model_and_processor()
    frames = torch.randint(0, 256, (2, 3, 9, 13), dtype=torch.uint8)
    features = processor(frames, return_tensors="pt")
    with torch.no_grad():
        [flow] = processor.post_process_optical_flow(model(**features), (9, 13))
    save_with_code(model, tmp_path / "out", processors=[processor])
    torch.save([frames, features.pixel_values, flow], tmp_path / "expected.pt")
    with hub_standin.HubStandIn() as hub:
        out = run(FLOW_WITHOUT_THE_PACKAGE, tmp_path, hub.endpoint, "flow", package=False)
        assert "flow without the package" in out
        assert hub.unknown == []


@pytest.mark.medium
def test_pushed_code_loads_in_a_fresh_process_bit_for_bit(tmp_path):
    """Language head with tokenizer, image head, custom part; three processes, half a minute."""
    write(tmp_path, "mine/dots.py", DOTS_PY)
    write(tmp_path, "mine/dot_layers.py", DOT_LAYERS_PY)
    configs = {"text": {**LATENTS, **TEXT}, "image": {**LATENTS, **IMAGE}, "dots": {**LATENTS, **DOTS}}
    push = PUSH.format(user=str(tmp_path / "mine"), configs=configs)
    with hub_standin.HubStandIn(large=10_000) as hub:
        run(push, tmp_path, hub.endpoint, "pushing", package=True)
        assert hub.large_files
        assert sorted(hub.repos) == ["tester/dots", "tester/image", "tester/plain", "tester/text"]
        assert "dots.py" in hub.at("tester/dots", "main")[1]
        assert "modeling_perceiver_io.py" not in hub.at("tester/plain", "main")[1]
        out = run(LOAD_WITHOUT_THE_PACKAGE, tmp_path, hub.endpoint, "without", package=False)
        assert "loaded without the package" in out
        out = run(LOAD_WITH_THE_PACKAGE, tmp_path, hub.endpoint, "with", package=True)
        assert "loaded with the package" in out
        assert hub.unknown == [], "what the stand-in does not know was asked for"
