"""Heads on dicts of modalities through transformers' Trainer: accumulation, several processes, missing modalities."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import config_of, enlarge, tiny
from safetensors.torch import load_file
from test_heads_multimodal import BOTH, QUERY, autoencoder, robot_batch, robot_config
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from hf_perceiver import PerceiverIOForMultimodalAutoencoding
from hf_perceiver.heads_multimodal import PerceiverIOForAudioVisualClassification
from hf_perceiver.training.audio_visual import autoencoding_scores, classification_metrics, mean_scores
from hf_perceiver.training.modalities import ModalityCollator

TESTS = Path(__file__).parent
COLLATE = ModalityCollator(reconstruct=["audio", "image", "label"])


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    """One step of plain gradient descent at rate 1: what changes in the weights is the gradient."""
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # clipping would hide a gradient of the wrong size
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**fields, **changes})


def clips(count: int = 8, missing: bool = True) -> list[dict[str, Any]]:
    """Clips, of which every third has no label and one neither sound nor its label as class."""
    inputs = tiny("multimodal").inputs(count)["inputs"]
    examples = [{"inputs": {name: values[i] for name, values in inputs.items()}} for i in range(count)]
    for i in range(0, count if missing else 0, 3):
        examples[i]["inputs"]["label"] = None
    if missing:
        examples[1]["inputs"]["audio"] = None
    return examples


def start() -> PerceiverIOForMultimodalAutoencoding:
    return autoencoder().float()


def gradient_of(model: torch.nn.Module, folder: Any, data: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """The gradient of one step of Trainer, by parameter."""
    collate = changes.pop("data_collator", COLLATE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(model=model, args=arguments(folder, **changes), train_dataset=data, data_collator=collate).train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_same_step(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest entry: float32, summed in another order, read off weights of size 1."""
    largest = max(values.abs().max().item() for values in want.values())
    assert largest > 1e-2, "a gradient of nothing would prove nothing"
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", [PerceiverIOForMultimodalAutoencoding, PerceiverIOForAudioVisualClassification])
def test_trainer_finds_the_labels(head):
    assert find_labels(head) == ["labels"]


@pytest.mark.medium
def test_four_batches_of_two_give_the_gradient_of_one_batch_of_eight(tmp_path):
    """With labels and sounds missing here and there; and it is that of the loss over all eight, without Trainer."""
    data, model = clips(), start()
    whole = gradient_of(start(), tmp_path, data)
    assert_same_step(
        gradient_of(start(), tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=4), whole
    )
    model.train()(**COLLATE(data)).loss.backward()
    assert_same_step(whole, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})


DISTRIBUTED = """
import sys
import torch
from test_multimodal_trainer import COLLATE, arguments, clips, start
from transformers import Trainer

torch.set_num_threads(1)
model = start()
trainer = Trainer(
    model=model,
    args=arguments(sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo"),
    train_dataset=clips(),
    data_collator=COLLATE,
)
assert trainer.args.world_size == 2
trainer.train()
if trainer.is_world_process_zero():
    model.save_pretrained(sys.argv[1])
"""


@pytest.mark.medium
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Each with two accumulated batches of two; some have no sound, or no label, at all."""
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    before = {name: p.detach().clone() for name, p in start().named_parameters()}
    after = load_file(tmp_path / "model.safetensors")
    assert_same_step({name: before[name] - after[name] for name in before}, gradient_of(start(), tmp_path, clips()))


@pytest.mark.medium
def test_evaluation_decodes_everything_and_keeps_one_number_of_each_clip(tmp_path):
    """Points are drawn in training alone. The whole reconstructions need not stay in memory."""
    model, data = autoencoder(num_loss_points={"image": 5, "audio": 1}).float(), clips(6, missing=False)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=3),
        train_dataset=data,
        eval_dataset=data,
        data_collator=COLLATE,
    )
    trainer.train()
    result = trainer.predict(data)
    batch = COLLATE(data)
    outputs = model.eval()(**batch)
    assert result.metrics["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)
    for name, values in outputs.logits.items():
        assert result.predictions[name].shape == values.shape
        torch.testing.assert_close(torch.tensor(result.predictions[name]), values, rtol=1e-4, atol=1e-4)
        assert result.label_ids[name].shape == batch["labels"][name].shape
    trainer.preprocess_logits_for_metrics, trainer.compute_metrics = partial(autoencoding_scores), mean_scores
    measured = trainer.evaluate()
    for name, values in autoencoding_scores(outputs.logits, batch["labels"]).items():
        assert measured[f"eval_{name}"] == pytest.approx(values.mean().item(), rel=1e-3)


@pytest.mark.medium
def test_a_model_of_free_names_is_trained_saved_and_resumed(tmp_path):
    """Depth, motion and text -> an action and a path; torch's own collator is enough where nothing is missing."""
    given = robot_batch(8)
    given["labels"]["trajectory"] = torch.randn(8, 1, 2) * torch.linspace(0, 1, 10)[:, None]  # straight paths
    data = [
        {part: {name: values[i] for name, values in batch.items()} for part, batch in given.items()} for i in range(8)
    ]

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        return Trainer(
            model=PerceiverIOForMultimodalAutoencoding(robot_config(num_latents=8, d_latents=32)),
            args=arguments(
                tmp_path,
                optim="adamw_torch",
                learning_rate=1e-2,
                max_steps=steps,
                save_strategy="steps",
                save_steps=75,
                per_device_train_batch_size=4,
            ),
            train_dataset=data,
            data_collator=default_collate,
        )

    whole = trainer(150)
    first = whole.evaluate(data)["eval_loss"]
    whole.train()
    assert whole.evaluate(data)["eval_loss"] < first / 2
    resumed = trainer(150)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-75"))
    loaded = PerceiverIOForMultimodalAutoencoding.from_pretrained(tmp_path / "checkpoint-150")
    for (name, p), other, third in zip(
        whole.model.named_parameters(), resumed.model.parameters(), loaded.parameters(), strict=True
    ):
        assert torch.equal(p, other) and torch.equal(p, third), name


@pytest.mark.medium
def test_sound_and_video_are_classified(tmp_path):
    """Dropped videos in training, mAP over two clips of each of four videos in evaluation; eight batches of one are one
    of eight where nothing is dropped.
    """
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [1, 1, 0, 0, 0]])
    clips = torch.randn(8, 20, 1), torch.rand(8, 4, 3, 6, 4)
    data = [
        {"inputs": {"audio": clips[0][i], "image": clips[1][i]}, "labels": labels[i // 2].tolist()} for i in range(8)
    ]

    def model(**changes: Any) -> PerceiverIOForAudioVisualClassification:
        torch.manual_seed(0)
        config = config_of(preprocessor={**BOTH, **changes}, problem_type="multi_label_classification", **QUERY)
        return PerceiverIOForAudioVisualClassification(config)

    collate = ModalityCollator()
    trainer = Trainer(
        model=model(),
        args=arguments(tmp_path, optim="adamw_torch", learning_rate=1e-2, max_steps=60),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        compute_metrics=classification_metrics(2, "multi_label_classification"),
    )
    before = trainer.evaluate()["eval_mean_average_precision"]
    trainer.train()
    after = trainer.evaluate()["eval_mean_average_precision"]
    assert before < after and after > 0.9
    whole, parts = (
        gradient_of(enlarge(model(dropout_probs={})), tmp_path, data, data_collator=collate, **sizes)
        for sizes in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8})
    )
    assert_same_step(parts, whole)
