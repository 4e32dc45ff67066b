"""Training on two processes (gloo, on the CPU) gives what one process gives: DDP, FSDP2, tensor parallelism.

Starting processes takes seconds, so each launch runs all that one kind of parallelism is to show: a `worker_...` function
of this file, in both processes, writes what it got, and the tests compare.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import CHECKPOINTING, head_inputs, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_perceiver import (
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
)
from hf_perceiver.attention import CrossAttentionLayer, SelfAttentionLayer
from hf_perceiver.training.modalities import ModalityCollator

try:
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
except ImportError:  # transformers 5.17
    from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

ROOT = Path(__file__).parent.parent
# What is to be sharded: text with a shared embedding, an image that is read several times, several modalities.
SHARDED = ("masked_lm", "shared_reads", "multimodal")
# name -> tiny architecture, head. Their blocks are run twice, so that layers are called twice in a step.
MODELS: dict[str, tuple[str, type]] = {
    "masked_lm": ("language", PerceiverIOForMaskedLM),
    "image": ("imagenet_fourier", PerceiverIOForImageClassification),
    "shared_reads": ("original_shared", PerceiverIOForImageClassification),
    "multimodal": ("multimodal", PerceiverIOForMultimodalAutoencoding),
}


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """Three steps on all eight examples each, however they are divided: two at a time on each of two processes, twice.

    Without clipping, which would hide a gradient of the wrong size.
    """
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.03,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    of_one = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    of_two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    return TrainingArguments(**{**fields, **(of_two if "WORLD_SIZE" in os.environ else of_one), **changes})


def start(name: str) -> Any:
    case, head = MODELS[name]
    return tiny(case).model(head).train()


def data(name: str, missing: bool = True) -> list[dict[str, Any]]:
    """Eight examples, whose labels are unequal in number: -100 in text and images, missing modalities if asked for."""
    case, head = MODELS[name]
    torch.manual_seed(4)
    if name == "multimodal":
        inputs = tiny(case).inputs(8)["inputs"]
        examples = [{"inputs": {key: values[i] for key, values in inputs.items()}} for i in range(8)]
        for i in (0, 3, 6) if missing else ():
            examples[i]["inputs"]["label"] = None
        examples[1]["inputs"]["audio"] = None if missing else examples[1]["inputs"]["audio"]
        return examples
    batch = head_inputs(tiny(case), head, batch=8, labels=True)
    for row in range(8):
        if batch["labels"].ndim == 2:
            batch["labels"][row, : row % 5] = -100
        elif row % 3 == 0:
            batch["labels"][row] = -100
    return [{key: values[row] for key, values in batch.items()} for row in range(8)]


def collator(name: str) -> Any:
    return ModalityCollator(reconstruct=["audio", "image", "label"]) if name == "multimodal" else default_collate


def train(
    name: str,
    folder: Any,
    model: Any = None,
    *,
    missing: bool = True,
    kind: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    trainer = kind(
        model=start(name) if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=data(name, missing),
        data_collator=collator(name),
    )
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    return trainer


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by name, gathered where it is sharded."""
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write(folder: Any, name: str, model: nn.Module) -> None:
    weights = whole(model)  # by all processes
    if dist.get_rank() == 0:
        save_file(weights, Path(folder) / f"{name}.safetensors")


def write_facts(folder: Any, facts: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        (Path(folder) / "facts.json").write_text(json.dumps(facts))


def assert_same_training(name: str, got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """To 1e-6, of weights of size 1 that three steps moved by far more; sums are taken in another order."""
    before = whole(start(name))
    assert set(got) == set(want) == set(before)
    assert max(float((want[key] - before[key]).abs().max()) for key in want) > 1e-2
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def launch(worker: str, folder: Path, *launcher: str) -> dict[str, Any]:
    """Run a function of this file on two processes -> the facts that it wrote."""
    script = folder / "script.py"
    script.write_text(
        "import sys\nimport torch\nimport test_distributed\n"
        "torch.set_num_threads(1)\n"
        f"test_distributed.{worker}(sys.argv[1])\n"
    )
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *(launcher or torchrun), str(script), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    facts = folder / "facts.json"
    return json.loads(facts.read_text()) if facts.is_file() else {}


# DDP


def worker_ddp(folder: str) -> None:
    facts: dict[str, Any] = {}
    for name in ("masked_lm", "image", "multimodal"):
        trainer = train(name, folder)
        assert trainer.args.world_size == 2
        facts[name] = type(trainer.model_wrapped).__name__
        write(folder, name, trainer.model)
    trainer = Trainer(model=start("masked_lm"), args=arguments(folder, per_device_eval_batch_size=1))
    result = trainer.predict(unequal_texts())
    facts["predictions"], facts["label_ids"] = result.predictions.tolist(), result.label_ids.tolist()
    write(folder, "checkpointed", train("masked_lm", folder, **{CHECKPOINTING: True}).model)
    missing = {CHECKPOINTING: True, "ddp_find_unused_parameters": True}
    write(folder, "checkpointed_missing", train("multimodal", folder, **missing).model)
    write(folder, "frozen", train("masked_lm", folder, frozen()).model)
    write_facts(folder, facts)


def unequal_texts() -> list[dict[str, torch.Tensor]]:
    """Seven, an odd number for two processes, of 9, 8, 7 and 6 tokens."""
    return [{key: value[: 9 - i % 4] for key, value in e.items()} for i, e in enumerate(data("masked_lm")[:7])]


def frozen() -> Any:
    model = start("masked_lm")
    model.freeze_encoder()
    return model


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, launch("worker_ddp", folder)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["masked_lm", "image", "multimodal"])
def test_data_parallel_training_is_that_of_one_process(name, ddp, tmp_path):
    """With accumulation. Some of the multimodal batches leave parameters unused, on one of the processes."""
    folder, facts = ddp
    assert facts[name] == "DistributedDataParallel"
    assert_same_training(name, load_file(folder / f"{name}.safetensors"), whole(train(name, tmp_path).model))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("file", "name"), [("checkpointed", "masked_lm"), ("checkpointed_missing", "multimodal")], ids=["used", "unused"]
)
def test_data_parallel_training_with_gradient_checkpointing(file, name, ddp, tmp_path):
    """Trainer then expects every parameter to be used; where modalities may be missing it is told so."""
    assert_same_training(name, load_file(ddp[0] / f"{file}.safetensors"), whole(train(name, tmp_path).model))


@pytest.mark.medium
def test_data_parallel_training_of_a_frozen_encoder(ddp, tmp_path):
    want = whole(train("masked_lm", tmp_path, frozen()).model)
    assert_same_training("masked_lm", load_file(ddp[0] / "frozen.safetensors"), want)


@pytest.mark.medium
def test_texts_of_unequal_length_are_gathered_from_all_processes(ddp, tmp_path):
    """Each process pads to the longest of all, with -100, and keeps the order of the examples."""
    trainer = Trainer(model=start("masked_lm"), args=arguments(tmp_path, per_device_eval_batch_size=1))
    want = trainer.predict(unequal_texts())
    got = ddp[1]
    assert want.predictions.shape[:2] == (7, 9)
    torch.testing.assert_close(torch.tensor(got["predictions"]), torch.tensor(want.predictions), rtol=1e-5, atol=1e-5)
    assert got["label_ids"] == want.label_ids.tolist()


# FSDP2


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch` tells its processes about docs/accelerate/fsdp2.yaml."""
    parser = launch_command_parser()
    parsed = parser.parse_args(["--config_file", str(ROOT / "docs/accelerate/fsdp2.yaml"), "script.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    return {key: value for key, value in prepare_multi_gpu_env(parsed).items() if key.startswith("FSDP")}


class FSDPTrainer(Trainer):
    """Trainer as it is where there are GPUs: on a CPU, accelerate takes DDP in place of FSDP without a word."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        os.environ.update(fsdp_environment())
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # As AcceleratorState itself does.
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def worker_fsdp(folder: str) -> None:
    facts: dict[str, Any] = {}
    for name in SHARDED:
        trainer = train(name, folder, kind=FSDPTrainer, missing=False)
        facts[name] = [key for key, p in trainer.model.named_parameters() if not isinstance(p, DTensor)]
        facts[f"{name}_layers"] = sum(
            isinstance(m, FSDPModule) and isinstance(m, (SelfAttentionLayer, CrossAttentionLayer))
            for m in trainer.model.modules()
        )
        write(folder, name, trainer.model)
    adam = {"optim": "adamw_torch", "learning_rate": 0.01}
    straight = train("masked_lm", folder, kind=FSDPTrainer, save_strategy="steps", save_steps=2, **adam)
    write(folder, "straight", straight.model)
    straight.save_model(str(Path(folder) / "final"))
    resumed = train(
        "masked_lm", folder, kind=FSDPTrainer, resume_from_checkpoint=f"{folder}/checkpoint-2", save_steps=2, **adam
    )
    facts["resumed_at"] = resumed.state.global_step
    write(folder, "resumed", resumed.model)
    # transformers' own FSDP, from the plan of the config.
    for name in SHARDED:
        model = sharded(name, folder, fsdp_size=2)
        facts[f"own_{name}"] = [key for key, p in model.named_parameters() if not isinstance(p, DTensor)]
        trainer = train(name, folder, model, missing=False)
        write(folder, f"own_{name}", trainer.model)
        trainer.save_model(str(Path(folder) / f"own_{name}"))
    write_facts(folder, facts)


def sharded(name: str, folder: str, **sizes: int) -> Any:
    """The model of `start`, divided among the processes while it is loaded."""
    saved = Path(folder) / f"start_{name}"
    if dist.get_rank() == 0:
        start(name).save_pretrained(saved)
    dist.barrier()
    return MODELS[name][1].from_pretrained(saved, distributed_config=DistributedConfig(**sizes)).train()


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, launch("worker_fsdp", folder)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["", "own_"], ids=["accelerate", "transformers"])
@pytest.mark.parametrize("name", SHARDED)
def test_fully_sharded_training_is_that_of_one_process(name, kind, fsdp, tmp_path):
    """Every parameter is sharded: by the layers that docs/accelerate/fsdp2.yaml names, and by the config's own plan.

    No modality is missing: processes that use different weights would wait for one another's, or mistake them.
    """
    folder, facts = fsdp
    assert facts[f"{kind}{name}"] == []
    want = whole(train(name, tmp_path, missing=False).model)
    assert_same_training(name, load_file(folder / f"{kind}{name}.safetensors"), want)


@pytest.mark.medium
def test_each_layer_is_gathered_on_its_own(fsdp):
    for name in SHARDED:
        layers = [m for m in start(name).modules() if isinstance(m, (SelfAttentionLayer, CrossAttentionLayer))]
        assert fsdp[1][f"{name}_layers"] == len(layers)


@pytest.mark.medium
def test_a_fully_sharded_run_is_resumed_bit_for_bit_and_its_checkpoint_is_an_ordinary_one(fsdp):
    folder, facts = fsdp
    straight, resumed = (load_file(folder / f"{name}.safetensors") for name in ("straight", "resumed"))
    assert facts["resumed_at"] == 3
    model = PerceiverIOForMaskedLM.from_pretrained(folder / "final")
    middle = PerceiverIOForMaskedLM.from_pretrained(folder / "checkpoint-2")
    for (key, loaded), early in zip(model.named_parameters(), middle.parameters(), strict=True):
        assert torch.equal(resumed[key], straight[key]) and torch.equal(loaded, straight[key]), key
        assert not torch.equal(early, straight[key]), key


@pytest.mark.medium
@pytest.mark.parametrize("name", SHARDED)
def test_a_model_that_was_sharded_while_it_was_loaded_is_saved_whole(name, fsdp):
    loaded = whole(MODELS[name][1].from_pretrained(fsdp[0] / f"own_{name}"))
    trained = load_file(fsdp[0] / f"own_{name}.safetensors")
    assert set(loaded) == set(trained) and all(torch.equal(loaded[key], trained[key]) for key in trained)


# Tensor parallelism


def worker_tp(folder: str) -> None:
    """By hand: on a CPU, accelerate refuses tensor parallelism, and with it Trainer."""
    dist.init_process_group("gloo")
    facts: dict[str, Any] = {}
    for name in SHARDED:
        model = sharded(name, folder, tp_size=2)
        facts[name] = [key for key, p in model.named_parameters() if isinstance(p, DTensor)]
        facts[f"{name}_local"] = {
            key: list(p.to_local().shape) for key, p in model.named_parameters() if isinstance(p, DTensor)
        }
        with torch.no_grad():
            logits = outputs(model.eval()(**batch(name)).logits)
        descend(model.train(), name)
        write(folder, name, model)
        model.save_pretrained(Path(folder) / name)
        if dist.get_rank() == 0:
            save_file({str(i): full(t).contiguous() for i, t in enumerate(logits)}, Path(folder) / f"{name}_logits")
    write_facts(folder, facts)


def batch(name: str) -> dict[str, Any]:
    return collator(name)(data(name))


def outputs(logits: Any) -> list[torch.Tensor]:
    return list(logits.values()) if isinstance(logits, dict) else [logits]


def descend(model: Any, name: str) -> None:
    """Three steps of plain gradient descent on the whole batch."""
    for _ in range(3):
        model.zero_grad()
        model(**batch(name)).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.03 * p.grad


@pytest.fixture(scope="module")
def tp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    return folder, launch("worker_tp", folder)


@pytest.mark.medium
@pytest.mark.parametrize("name", SHARDED)
def test_a_latent_tower_divided_by_heads_and_columns_computes_and_learns_as_a_whole_one(name, tp):
    folder, facts = tp
    model = start(name)
    latent = [key for key, _ in model.named_parameters() if ".blocks." in key and "norm" not in key]
    assert facts[name] == latent
    for key, shape in facts[f"{name}_local"].items():
        whole_shape = list(model.get_parameter(key).shape)
        # Biases of what adds up the halves are whole.
        added = key.endswith(("o_proj.bias", "down_proj.bias"))
        assert shape == whole_shape if added else sum(shape) < sum(whole_shape), key
    with torch.no_grad():
        want = outputs(model.eval()(**batch(name)).logits)
    got = load_file(folder / f"{name}_logits")
    for i, values in enumerate(want):
        torch.testing.assert_close(got[str(i)], values, rtol=1e-5, atol=1e-5)
    descend(model.train(), name)
    trained = load_file(folder / f"{name}.safetensors")
    assert_same_training(name, trained, whole(model))
    loaded = whole(MODELS[name][1].from_pretrained(folder / name))
    assert all(torch.equal(loaded[key], trained[key]) for key in trained)


# Plans


@pytest.mark.parametrize("name", MODELS)
def test_plans_name_what_is_in_the_model(name):
    """transformers puts a star in place of a layer's number, but not of the second of two that follow each other."""
    model = start(name)
    names = {replace_layer_number_by_wildcard(key) for key, _ in model.named_modules()}
    assert set(model.tp_plan) <= names and set(model.fsdp_plan) <= names
    assert len(model.tp_plan) == 6 * model.config.num_self_attends_per_block
    expanded = model._expand_parallel_plan(model.fsdp_plan)
    layers = {key for key, m in model.named_modules() if isinstance(m, (SelfAttentionLayer, CrossAttentionLayer))}
    assert set(expanded) == {key for key in layers if ".encoder." in key}


@pytest.mark.parametrize("name", MODELS)
def test_modules_that_are_not_split_are_in_the_model(name):
    """accelerate's FSDP stops at others."""
    model = start(name)
    assert set(model._no_split_modules) <= {type(m).__name__ for m in model.modules()}
    assert {"SelfAttentionLayer", "CrossAttentionLayer"} <= set(model._no_split_modules)


# accelerate launch

CONFIGS = sorted((ROOT / "docs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_configs_are_read_by_accelerate(path):
    """It refuses keys that it does not know."""
    config = load_config_from_file(str(path))
    assert config.num_processes == {"cpu": 2, "one-node": 8, "two-nodes": 16, "fsdp2": 8}[path.stem]
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    parsed, _, mixed_precision = _validate_launch_command(parsed)
    assert mixed_precision and parsed.num_machines == (2 if path.stem == "two-nodes" else 1)
    assert parsed.use_fsdp == (path.stem == "fsdp2")


def test_the_layers_of_the_fsdp_config_are_in_the_model():
    wrapped = fsdp_environment()["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    for name in MODELS:
        assert set(wrapped) <= {type(m).__name__ for m in start(name).modules()}


def worker_launched(folder: str) -> None:
    trainer = train("image", folder)
    assert trainer.args.world_size == 2
    write(folder, "image", trainer.model)


@pytest.mark.medium
def test_accelerate_launch_trains_on_two_processes(tmp_path):
    (path,) = [path for path in CONFIGS if path.stem == "cpu"]
    # Port 0: any that is free, where the default may be taken.
    command = ("accelerate.commands.launch", "--config_file", str(path), "--main_process_port", "0")
    launch("worker_launched", tmp_path, *command)
    assert_same_training("image", load_file(tmp_path / "image.safetensors"), whole(train("image", tmp_path).model))
