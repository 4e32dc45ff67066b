"""The flow head through transformers' Trainer: accumulation, several processes, points drawn, every variant."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_heads_vision import VARIANTS, flow_model, small, variant_frames
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from hf_perceiver import PerceiverIOForOpticalFlow

TESTS = Path(__file__).parent


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


def examples(count: int = 8, height: int = 4, width: int = 6) -> list[dict[str, torch.Tensor]]:
    """Frame pairs with labels; in the nth, 2 n of the 24 pixels have none, so that batches hold unequal numbers."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(count, 2, 3, height, width, generator=generator)
    labels = 4 * torch.randn(count, height, width, 2, generator=generator)
    for i in range(count):
        labels[i].flatten(0, 1)[: 2 * i] = -100
    return [{"pixel_values": frames[i], "labels": labels[i]} for i in range(count)]


def start(**postprocessor: Any) -> PerceiverIOForOpticalFlow:
    """Not at zero flow, where only the last linear would have a gradient."""
    model = flow_model(**postprocessor)
    torch.nn.init.normal_(model.perceiver.postprocessor.projection.weight, std=10)
    return model


def step(model: PerceiverIOForOpticalFlow, folder: Any, data: Any = None, **changes: Any) -> dict[str, torch.Tensor]:
    """The gradient of one step of Trainer, by parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(model=model, args=arguments(folder, **changes), train_dataset=data or examples()).train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_same_step(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest entry: float32, summed in another order, read off weights of size 1."""
    largest = max(values.abs().max().item() for values in want.values())
    assert largest > 1e-2, "a gradient of nothing would prove nothing"
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


def test_trainer_finds_the_labels():
    """An argument with "label" in its name that a batch lacks would leave evaluation without a loss."""
    assert find_labels(PerceiverIOForOpticalFlow) == ["labels"]


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["epe", "l1", "charbonnier"])
def test_four_batches_of_two_give_the_gradient_of_one_batch_of_eight(kind, tmp_path):
    whole = step(start(flow_loss=kind), tmp_path)
    parts = step(start(flow_loss=kind), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_step(parts, whole)


def test_the_gradient_is_that_of_the_mean_over_all_labelled_pixels(tmp_path):
    """Computed without Trainer and without the head's loss."""
    data, model = examples(), start()
    frames, labels = (torch.stack([example[name] for example in data]) for name in ("pixel_values", "labels"))
    errors = (20 * model(frames).logits - labels).norm(dim=-1)[labels[..., 0] != -100]
    assert len(errors) == 8 * 24 - 2 * sum(range(8))
    errors.mean().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same_step(step(start(), tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=4), want)


@pytest.mark.medium
def test_drawn_points_give_the_same_gradient_on_average_through_trainer(tmp_path):
    """Every pixel has the error of its frame, whatever is drawn: zero flow, one label for all labelled pixels.

    Then the bias of the last linear, the same for all points, has the same gradient for any draw.
    """
    data = examples()
    for i, example in enumerate(data):
        example["labels"] = torch.where(example["labels"] == -100, -100.0, torch.tensor([1.0 + i, -2.0]))
    name = "perceiver.postprocessor.projection.bias"
    whole = step(flow_model(), tmp_path, data)
    drawn = step(
        flow_model(num_loss_points=5), tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    torch.testing.assert_close(drawn[name], whole[name], rtol=1e-5, atol=0)


@pytest.mark.medium
def test_a_mask_is_one_of_trainers_columns(tmp_path):
    """Accumulated as well as whole; labels it masks still count in Trainer's number of items."""
    data = examples()
    for i, example in enumerate(data):
        example["valid_mask"] = torch.arange(24).reshape(4, 6) % (i + 2) != 0
    whole = step(start(), tmp_path, data)
    assert_same_step(step(start(), tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=4), whole)
    without = step(start(), tmp_path, examples())
    name = "perceiver.postprocessor.projection.weight"
    assert not torch.allclose(without[name], whole[name], rtol=1e-2)


def test_evaluation_gives_the_whole_flow_and_its_loss(tmp_path):
    data, model = examples(6), start(num_loss_points=3)
    result = Trainer(model=model, args=arguments(tmp_path, per_device_eval_batch_size=6)).predict(data)
    frames, labels = (torch.stack([example[name] for example in data]) for name in ("pixel_values", "labels"))
    outputs = model.eval()(frames, labels)
    torch.testing.assert_close(torch.tensor(result.predictions), outputs.logits, rtol=1e-5, atol=1e-5)
    assert result.predictions.shape == result.label_ids.shape == (6, 4, 6, 2)
    assert result.metrics["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_a_step(name, tmp_path):
    model = small(name)
    frames, labels = variant_frames(model, 4), 3 * torch.randn(4, 8, 12, 2)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(frames, labels, strict=True)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2),
        train_dataset=data,
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    # The last linear starts at zero, so that all other weights have their first gradient in the second step.
    read_out = {n for n in before if "postprocessor" in n}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= read_out


DISTRIBUTED = """
import sys
import torch
from test_flow_trainer import arguments, examples, start
from transformers import Trainer

torch.set_num_threads(1)
model = start()
trainer = Trainer(
    model=model,
    args=arguments(sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo"),
    train_dataset=examples(),
)
assert trainer.args.world_size == 2
trainer.train()
if trainer.is_world_process_zero():
    model.save_pretrained(sys.argv[1])
"""


@pytest.mark.medium
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """Each with two accumulated batches of two; the examples' numbers of labelled pixels all differ."""
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
    model = start()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = load_file(tmp_path / "model.safetensors")
    assert_same_step({name: before[name] - after[name] for name in before}, step(model, tmp_path))
