"""docs/experiments.md, checked against the code: every table of the papers, configuration, count, command and option."""

import importlib
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from hf_perceiver import (
    PerceiverIOForAudioClassification,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForOpticalFlow,
    PerceiverIOForSequenceClassification,
    PerceiverIOForVideoClassification,
    PerceiverIOModel,
    recipes,
)
from hf_perceiver.heads_multimodal import PerceiverIOForAudioVisualClassification
from hf_perceiver.heads_text import PerceiverIOForMultitaskSequenceClassification
from hf_perceiver.training.image_classification import sized_preprocessor
from hf_perceiver.training.recipe import ModelArguments, RecipeArguments, fresh_config

PAGE = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
# Perceiver IO has 17 tables, Perceiver 7; two figures of the latter are experiments of their own.
TABLES = [*(f"IO T{n}" for n in range(1, 18)), *(f"P1 T{n}" for n in range(1, 8)), "P1 Fig. 5", "P1 Fig. 6"]
COLUMNS = ["id", "configuration", "command", "the paper states", "left open; ours", "figure", "here"]
ID = re.compile(r"[A-Z]\d+[a-f]?")


def tables():
    """The header and the rows of each table of the page, cells without the spaces around them."""
    found = []
    for match in re.finditer(r"(?:^\|.*\|\n)+", PAGE, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in match.group().splitlines()]
        found.append((rows[0], rows[2:]))
    return found


ROWS = {row[0]: dict(zip(COLUMNS, row, strict=True)) for header, rows in tables() if header == COLUMNS for row in rows}


def configurations():
    """(function of recipes, overrides, parameters) of each configuration that the page names with its count."""
    found = set()
    for row in ROWS.values():
        for name, overrides, count in re.findall(
            r"`([a-z0-9_]+)`(?: with `(\{.*?\})`)? (\d[\d,]+)", row["configuration"] + row["here"]
        ):
            found.add((name, overrides, int(count.replace(",", ""))))
    return sorted(found)


def commands():
    """(id, devices, module, options) of each command of the page."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        of = None
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("#"):
                of = ID.search(line).group()
                continue
            words = shlex.split(line)
            devices = int(words[2]) if words[:2] == ["torchrun", "--nproc_per_node"] else 1
            assert words[: words.index("-m")] in (["python"], ["torchrun", "--nproc_per_node", str(devices)]), line
            at = words.index("-m") + 1
            found.append((of, devices, words[at], words[at + 1 :]))
    return found


class Parsed(Exception):
    """What a command's options are read as: raised in place of what the command does with it."""


def parsed(module, options, folder, monkeypatch):
    """The command's options, as its own parser reads and checks them."""

    def read(parser, *arguments, **others):
        raise Parsed(parse(parser, *arguments, **others))

    monkeypatch.chdir(folder)
    # The devices that the commands are for have it, whatever runs the tests.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    parse = HfArgumentParser.parse_args_into_dataclasses
    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", read)
    with pytest.raises(Parsed) as found:
        importlib.import_module(module).main(options)
    return found.value.args[0]


def test_the_page_is_read():
    assert len(ROWS) > 50 and len(configurations()) > 50 and len(commands()) > 20


def test_every_table_of_the_papers_has_its_rows():
    ((_, index),) = [(header, rows) for header, rows in tables() if header == ["table", "what", "rows"]]
    assert [row[0] for row in index] == TABLES
    for table, _, where in index:
        # "F1 to F7" names the ends of a run of rows.
        named = ID.findall(where)
        assert set(named) <= set(ROWS), f"{table} points at rows that are not there"
        assert named or where.startswith("all"), f"{table} is nowhere"


def test_every_experiment_says_everything():
    for name, row in ROWS.items():
        assert ID.fullmatch(name) and all(row.values()), f"{name} has an empty cell"


def test_every_published_configuration_is_an_experiment():
    made = {n for n in vars(recipes) if n[0].islower() and getattr(recipes, n).__module__ == recipes.__name__}
    assert made == {name for name, _, _ in configurations()}


@pytest.mark.medium
@pytest.mark.parametrize(("name", "overrides", "count"), configurations())
def test_configurations_exist_and_have_the_parameters_that_the_page_gives(name, overrides, count):
    with torch.device("meta"):
        assert PerceiverIOModel(fresh_config(name, overrides or None)).num_parameters() == count


def small_step(config):
    """Head and batch for a small model of the configuration's parts: few latents, layers, pixels, samples."""
    config.num_latents, config.d_latents = 8, 32
    config.num_self_attends_per_block = min(config.num_self_attends_per_block, 1)
    config.vocab_size = min(config.vocab_size, 300)
    spec, read_out = config.preprocessor, config.postprocessor["kind"]
    tokens = torch.randint(6, 262, (2, 12))
    if read_out == "tokens":
        return PerceiverIOForMaskedLM, {"input_ids": tokens, "labels": tokens}
    if read_out == "multitask":
        batch = {"task_ids": torch.tensor([0, 7]), "labels": torch.tensor([1.0, 4.5])}
        return PerceiverIOForMultitaskSequenceClassification, {"input_ids": tokens, **batch}
    if spec["kind"] == "text":
        return PerceiverIOForSequenceClassification, {"input_ids": tokens, "labels": torch.tensor([0, 1])}
    if read_out in ("flow", "convex_upsampling"):
        frames = torch.rand(1, 2, spec["stem"]["in_channels"], 16, 24)
        return PerceiverIOForOpticalFlow, {"pixel_values": frames, "labels": torch.randn(1, 16, 24, 2)}
    if spec["kind"] == "points":
        return PerceiverIOForImageClassification, {"inputs": torch.randn(2, 20, 3), "labels": torch.tensor([0, 39])}
    if read_out == "multimodal" and "entities" in spec["modalities"]:
        inputs = {"entities": torch.randn(2, 12, 256)}
        batch = {"inputs": inputs, "attention_mask": {"entities": torch.arange(12).expand(2, -1) < 9}}
        return PerceiverIOForMultimodalAutoencoding, {**batch, "labels": {"entities": torch.randn(2, 12, 128)}}
    images, labels = torch.rand(2, 4, 3, 16, 16), (torch.rand(2, 527) < 0.1).float()
    if read_out == "multimodal":
        inputs = {"image": images, "audio": torch.rand(2, 320, 1), "label": torch.eye(700)[:2]}
        return PerceiverIOForMultimodalAutoencoding, {"inputs": inputs, "labels": inputs}
    if spec["kind"] == "multimodal":
        spectrogram = spec["modalities"]["audio"]["stem"]["kind"] == "spectrogram"
        inputs = {"image": images, "audio": torch.rand(2, 5, 80) if spectrogram else torch.rand(2, 256, 1)}
        return PerceiverIOForAudioVisualClassification, {"inputs": inputs, "labels": labels}
    sound = {"audio_patches": (2, 256, 1), "spectrogram": (2, 5, 80)}.get(spec["stem"]["kind"])
    if sound:
        return PerceiverIOForAudioClassification, {"input_values": torch.rand(sound), "labels": labels}
    if config.num_labels == 527:
        return PerceiverIOForVideoClassification, {"pixel_values": images, "labels": labels}
    config.preprocessor = sized_preprocessor(spec, (16, 16))
    return PerceiverIOForImageClassification, {"pixel_values": images[:, 0], "labels": torch.tensor([0, 999])}


@pytest.mark.medium
@pytest.mark.parametrize(("name", "overrides"), [given[:2] for given in configurations()])
def test_a_small_model_of_each_configuration_learns(name, overrides):
    """Read-outs that start at zero hide all else from the first step: here nothing does."""
    torch.manual_seed(0)
    config = fresh_config(name, overrides or None, initializer="normal")
    head, batch = small_step(config)
    assert head._claim(config) is config, "the configuration is this head's as it is"
    model = head(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    encoder = [p.grad for name, p in model.named_parameters() if ".encoder." in name]
    assert all(grad is not None and grad.isfinite().all() for grad in encoder)
    assert any(grad.any() for grad in encoder)


def test_commands_are_of_experiments():
    assert {of for of, *_ in commands()} <= set(ROWS)
    for of, row in ROWS.items():
        has = of in {of for of, *_ in commands()}
        if row["command"].startswith("`"):
            assert has, f"{of} names a command that is not below its table"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("of", "devices", "module", "options"), [pytest.param(*c, id=f"{c[0]}-{i}") for i, c in enumerate(commands())]
)
def test_commands_are_read_by_their_own_parsers(of, devices, module, options, tmp_path, monkeypatch):
    given = parsed(module, options, tmp_path, monkeypatch)
    row = ROWS[of]
    assert module.rsplit(".", 1)[1] in row["command"]
    for part in given:
        if isinstance(part, ModelArguments) and part.architecture:
            assert f"`{part.architecture}`" in row["configuration"]
            fresh_config(part.architecture, part.config_overrides)


# What the papers state: IO T12 (batch, steps, rate, warm-up, decay), IO A.1 (epochs), A.2 (second part of config B).
LANGUAGE = {"batch": 2048, "max_steps": 500_000, "learning_rate": 1.25e-3, "warmup_steps": 1000, "weight_decay": 0.01}
IMAGENET = {"batch": 1024, "num_train_epochs": 110, "learning_rate": 2e-3, "flat_share": 0.5, "weight_decay": 0.1}
IMAGENET |= {"max_grad_norm": 10.0, "warmup_steps": 0, "label_smoothing_factor": 0.1}
FINE_TUNED = {**IMAGENET, "num_train_epochs": None, "max_steps": 131_000, "flat_share": 70 / 131}
GLUE = {"num_train_epochs": 10, "warmup_steps": 200, "weight_decay": 0.01, "learning_rate": 1e-4}
STATED = {
    **{of: LANGUAGE for of in ("L1", "L2", "L3", "L4a", "L4b")},
    **{of: IMAGENET for of in ("I1", "I2", "I3", "I6", "I7", "I8", "O3")},
    "I4": FINE_TUNED,
    "I5": {**FINE_TUNED, "learning_rate": 2e-4},
    "L5": {**GLUE, "batch": 16},
    **{of: {**GLUE, "batch": 64} for of in ("L6", "L7", "L8")},
}


def test_every_training_command_is_compared_with_its_paper():
    """Those of flow and video say their figures themselves, in their own options."""
    assert set(STATED) == {of for of, *_ in commands()} - {"F1", "M1", "M2", "M3", "M4"}


@pytest.mark.medium
@pytest.mark.parametrize("of", STATED)
def test_commands_have_the_papers_hyper_parameters(of, tmp_path, monkeypatch):
    devices, module, options = next(command[1:] for command in commands() if command[0] == of)
    (training,) = [p for p in parsed(module, options, tmp_path, monkeypatch) if isinstance(p, RecipeArguments)]
    assert training.optimizer == "lamb" and training.lr_scheduler_type == "cosine"
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.999)
    for name, wanted in STATED[of].items():
        if name == "batch":
            made = training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
        else:
            made = getattr(training, name)
        assert wanted is None or math.isclose(made, wanted, rel_tol=1e-6), f"{of}: {name} is {made}, not {wanted}"
