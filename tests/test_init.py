"""What `import hf_perceiver` does to transformers, and what it must not do."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from helpers import HEADS, tiny
from transformers import AutoConfig, AutoModel, AutoTokenizer

# From its file: transformers 5.17 gives it at the top level only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_perceiver
from hf_perceiver import AUTO_CLASSES, PerceiverIOConfig, PerceiverIOModel, PerceiverIOTokenizer

SOURCE = Path(hf_perceiver.__file__).parent.parent

# For every Auto class, a tiny architecture that its head fits.
NAMES = {
    "AudioVisual": "multimodal",
    "Audio": "audio",
    "Video": "video",
    "Image": "imagenet_fourier",
    "Flow": "flow",
    "Multimodal": "multimodal",
}
CASES = [
    (auto, head, next((name for word, name in NAMES.items() if word in head.__name__), "language"))
    for auto, head in AUTO_CLASSES.items()
]


def fresh_process(script: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=fresh_environment()
    )
    assert done.returncode == 0, done.stderr
    return done


def fresh_environment() -> dict[str, str]:
    return {"PYTHONPATH": str(SOURCE), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("auto", "head", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_auto_classes_build_and_load_our_heads(auto, head, name, tmp_path):
    config = tiny(name).config
    assert type(auto.from_config(config)) is head
    head(config).save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is head
    assert type(loaded.config) is PerceiverIOConfig and loaded.config.architectures == [head.__name__]


def test_every_head_has_an_auto_class():
    mapped = {head.__name__ for head in AUTO_CLASSES.values()}
    heads = {name for name in vars(hf_perceiver) if name.startswith("PerceiverIOFor")}
    # transformers has none for sound and video together, and none that is near.
    assert heads - mapped == {
        "PerceiverIOForAudioVisualClassification",
        "PerceiverIOForMultitaskSequenceClassification",
    }
    assert PerceiverIOModel.__name__ in mapped


def test_auto_config_knows_the_type(tmp_path):
    PerceiverIOConfig(num_latents=7).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PerceiverIOConfig and loaded.num_latents == 7
    assert type(AutoConfig.for_model("perceiver_io")) is PerceiverIOConfig


def test_auto_tokenizer_knows_ours_and_the_built_in_beside_our_model(tmp_path):
    PerceiverIOConfig().save_pretrained(tmp_path)
    PerceiverIOTokenizer().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is PerceiverIOTokenizer
    (tmp_path / "tokenizer.json").unlink()
    transformers.PerceiverTokenizer().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is transformers.PerceiverTokenizer


def test_auto_image_processor_reuses_the_built_in(tmp_path):
    PerceiverIOConfig().save_pretrained(tmp_path)
    transformers.PerceiverImageProcessorPil(crop_size={"height": 9, "width": 9}).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is transformers.PerceiverImageProcessorPil
    assert loaded.crop_size["height"] == 9


@pytest.mark.parametrize("head", [*sorted({head for _, head in HEADS}, key=lambda h: h.__name__), PerceiverIOModel])
def test_the_main_input_is_forwards_first_argument(head):
    """Trainer counts tokens by it, and gradient checkpointing chooses by it."""
    assert head.main_input_name == list(inspect.signature(head.forward).parameters)[1]


def test_the_whole_model_has_its_preprocessors_main_input():
    assert tiny("language").model().main_input_name == "input_ids"
    assert tiny("imagenet_fourier").model().main_input_name == "pixel_values"
    assert tiny("multimodal").model().main_input_name == "inputs"


def test_registering_again_is_harmless():
    hf_perceiver.register()
    assert type(AutoModel.from_config(tiny("language").config)) is PerceiverIOModel


def test_the_names_of_the_package_are_its_own():
    """No library comes along by accident; submodules and the Auto classes that __init__ itself registers aside."""
    names = {name: value for name, value in vars(hf_perceiver).items() if not name.startswith("_")}
    foreign = {
        name
        for name, value in names.items()
        if not inspect.ismodule(value)
        and not str(getattr(value, "__module__", "hf_perceiver")).startswith(("hf_perceiver", "transformers"))
    }
    assert foreign == set()
    modules = {value.__name__ for value in names.values() if inspect.ismodule(value)}
    assert all(name.startswith("hf_perceiver.") for name in modules)


BUILT_IN = """
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMaskedLM, PerceiverConfig
from transformers.models.auto import modeling_auto

def state():
    config = PerceiverConfig(d_model=16, d_latents=16, num_latents=4, num_self_attends_per_block=1,
                             num_self_attention_heads=2, num_cross_attention_heads=2)
    auto = [a for n, a in sorted(vars(modeling_auto).items())
            if n.startswith("AutoModel") and getattr(a, "_model_mapping", None) is not None]
    heads = [str(a._model_mapping[PerceiverConfig]) for a in auto if PerceiverConfig in a._model_mapping]
    return [type(AutoModelForMaskedLM.from_config(config)), AutoConfig.for_model("perceiver").__class__, heads,
            CONFIG_MAPPING["perceiver"]]

before = state()
assert before[0] is transformers.PerceiverForMaskedLM and len(before[2]) >= 3, before
types = set(CONFIG_MAPPING)
import hf_perceiver
after = state()
assert after == before, (before, after)
assert set(CONFIG_MAPPING) - types == {"perceiver_io"}, set(CONFIG_MAPPING) - types
print("unchanged")
"""


@pytest.mark.medium
def test_importing_changes_nothing_for_the_built_in_perceiver():
    assert "unchanged" in fresh_process(BUILT_IN).stdout


IMPORT = """
import sys, time, torch
import transformers.modeling_utils  # what it imports in turn may print
print("now hf_perceiver", file=sys.stderr)
random = torch.get_rng_state()
from transformers import AutoTokenizer, AutoModelForMaskedLM, PreTrainedModel, TokenizersBackend
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.masking_utils import create_bidirectional_mask
known, start = set(sys.modules), time.process_time()
import hf_perceiver
seconds = time.process_time() - start
new = {name.split(".")[0] for name in set(sys.modules) - known}
heavy = new & {"sklearn", "matplotlib", "scipy", "pandas", "datasets", "torchvision", "soundfile", "av", "onnx"}
assert not heavy, heavy
assert torch.equal(torch.get_rng_state(), random), "importing drew random numbers"
assert not [name for name in sys.modules if name.startswith("hf_perceiver.training")]
print(f"seconds {seconds:.2f}")
"""


@pytest.mark.medium
def test_importing_prints_nothing_and_costs_little_more_than_transformers():
    """Measured: 0.6 s of processor time after transformers' own 4.4 s; 3 s would be something new at import."""
    done = fresh_process(IMPORT)
    assert done.stderr.endswith("now hf_perceiver\n"), done.stderr
    (line,) = done.stdout.splitlines()
    assert float(line.removeprefix("seconds ")) < 3
