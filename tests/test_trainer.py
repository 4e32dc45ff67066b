"""transformers' Trainer on every head that has a loss: accumulation, resuming, the best model, evaluation."""

import itertools
from typing import Any

import pytest
import torch
from helpers import HEADS, head_inputs, tiny
from safetensors import safe_open
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from hf_perceiver import (
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForMultipleChoice,
    PerceiverIOForOpticalFlow,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
)

LABELLED = {
    PerceiverIOForMaskedLM: "language",
    PerceiverIOForSequenceClassification: "language",
    PerceiverIOForTokenClassification: "language",
    PerceiverIOForQuestionAnswering: "language",
    PerceiverIOForMultipleChoice: "language",
    PerceiverIOForImageClassification: "imagenet_fourier",
    PerceiverIOForOpticalFlow: "flow",
}
TOKEN_HEADS = (PerceiverIOForMaskedLM, PerceiverIOForTokenClassification)
POSITIONS = ["start_positions", "end_positions"]


def arguments(folder, **changes: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,  # clipping would hide a gradient of the wrong size
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**fields, **changes})


def examples(head: type, count: int = 8, seed: int = 0, **labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """`count` labelled examples; of the tokens' labels, as many are missing as the example's number says."""
    torch.manual_seed(seed)
    batch = head_inputs(tiny(LABELLED[head]), head, batch=count, labels=True) | labels
    if head in TOKEN_HEADS:
        for row in range(count):
            batch["labels"][row, : row % batch["labels"].shape[1]] = -100
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def head_model(head: type, **changes: Any):
    return tiny(LABELLED[head]).model(head, **changes).train()


# Labels


@pytest.mark.parametrize("head", LABELLED, ids=lambda head: head.__name__)
def test_trainer_finds_the_labels(head):
    assert find_labels(head) == (POSITIONS if head is PerceiverIOForQuestionAnswering else ["labels"])


def test_every_head_is_here_or_in_a_file_of_its_own():
    heads = {head for _, head in HEADS}
    assert heads - set(LABELLED) == {PerceiverIOForMultimodalAutoencoding}
    # Its labels are a dict, see test_multimodal_trainer.py.
    assert PerceiverIOForMultimodalAutoencoding.accepts_loss_kwargs is False


# Accumulation

ROWS = torch.arange(8)
PROBLEMS = [
    *((head, {}, {}) for head in LABELLED),
    (
        PerceiverIOForSequenceClassification,
        {"problem_type": "multi_label_classification"},
        {"labels": (ROWS[:, None] % torch.arange(1, 6) == 0).float()},
    ),
    (PerceiverIOForSequenceClassification, {"num_labels": 1}, {"labels": ROWS / 4.0}),
    (
        PerceiverIOForSequenceClassification,
        {"problem_type": "regression"},
        {"labels": ROWS[:, None] / torch.arange(1, 6)},
    ),
    (PerceiverIOForImageClassification, {}, {"labels": torch.where(ROWS % 3 == 0, -100, ROWS % 5)}),
    (
        PerceiverIOForImageClassification,
        {"problem_type": "single_label_classification"},  # soft labels
        {"labels": torch.rand(8, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)},
    ),
]


def problem_name(problem: Any) -> str:
    head, changes, labels = problem
    kind = changes.get("problem_type") or ("regression" if changes.get("num_labels") == 1 else "")
    return "-".join(part for part in (head.__name__.removeprefix("PerceiverIOFor"), kind, *labels) if part)


@pytest.mark.medium
@pytest.mark.parametrize("problem", PROBLEMS, ids=problem_name)
def test_four_batches_of_two_give_the_gradient_of_one_batch_of_eight(problem, tmp_path):
    """One step of plain gradient descent at rate 1: what changes in the weights is the gradient.

    1e-5 of the largest entry: float32, summed in another order.
    """
    head, changes, labels = problem
    steps = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = head_model(head, **changes)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = Trainer(
            model=model,
            args=arguments(
                tmp_path,
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulated,
            ),
            train_dataset=examples(head, **labels),
        )
        trainer.train()
        steps.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
    largest = max(step.abs().max() for step in steps[0].values())
    assert largest > 1e-3, "a gradient of nothing would prove nothing"
    for name, step in steps[0].items():
        torch.testing.assert_close(
            steps[1][name], step, rtol=0, atol=1e-5 * largest.item(), msg=lambda m, n=name: f"{n}: {m}"
        )


# Saving and resuming


def language_trainer(folder, seed: int, **changes: Any) -> Trainer:
    """The masked language model, whose output embedding is the input's; with dropout, so that random states count."""
    model = tiny("language").model(PerceiverIOForMaskedLM, seed=seed, dropout=0.1, attention_dropout=0.1)
    fields: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    data = examples(PerceiverIOForMaskedLM, 16)
    metrics = changes.pop("compute_metrics", None)
    return Trainer(
        model=model,
        args=arguments(folder, **{**fields, **changes}),
        train_dataset=data,
        eval_dataset=data[:4],
        compute_metrics=metrics,
    )


def assert_tied(model: PerceiverIOForMaskedLM) -> None:
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.medium
def test_a_resumed_run_ends_where_the_straight_run_does_bit_for_bit(tmp_path):
    straight = language_trainer(tmp_path, seed=0)
    straight.train()
    resumed = language_trainer(tmp_path, seed=1)  # starts elsewhere
    start = {name: p.detach().clone() for name, p in resumed.model.named_parameters()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_tied(resumed.model)
    for (name, got), want in zip(resumed.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(got, want), name
        assert not torch.equal(got, start[name]), name


@pytest.mark.medium
def test_checkpoints_hold_our_own_names(tmp_path):
    """Trainer reads them back by name, without the conversion that from_pretrained would apply."""
    trainer = language_trainer(tmp_path, seed=0, max_steps=3)
    trainer.train()
    with safe_open(tmp_path / "checkpoint-3" / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    tied = {"perceiver.postprocessor.output_embedding.weight"}
    assert saved == set(trainer.model.state_dict()) - tied


@pytest.mark.medium
def test_the_best_model_comes_back_whole(tmp_path):
    """The score falls from the first evaluation on, so that the best checkpoint is the first and not the last."""
    scores = itertools.count(0, -1)
    trainer = language_trainer(
        tmp_path,
        seed=0,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=lambda predictions: {"score": float(next(scores))},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_tied(trainer.model)
    best, last = (PerceiverIOForMaskedLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (2, 6))
    for (name, got), want, other in zip(
        trainer.model.named_parameters(), best.parameters(), last.parameters(), strict=True
    ):
        assert torch.equal(got, want), name
        assert not torch.equal(got, other), name


# Evaluation

SHAPES = {
    PerceiverIOForMaskedLM: (9, 30),
    PerceiverIOForSequenceClassification: (5,),
    PerceiverIOForTokenClassification: (9, 5),
    PerceiverIOForQuestionAnswering: (9,),
    PerceiverIOForMultipleChoice: (2,),
    PerceiverIOForImageClassification: (5,),
    PerceiverIOForOpticalFlow: (4, 6, 2),
}


@pytest.mark.parametrize("extra", [{}, {"output_hidden_states": True}], ids=["plain", "hidden_states"])
@pytest.mark.parametrize("head", LABELLED, ids=lambda head: head.__name__)
def test_predictions_are_the_logits_alone(head, extra, tmp_path):
    """`keys_to_ignore_at_inference` leaves out the latents, hidden states and attentions."""
    model, data = head_model(head, **extra), examples(head, 6)
    predictions = Trainer(model=model, args=arguments(tmp_path), eval_dataset=data).predict(data)
    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    outputs = model.eval()(**batch)
    if head is PerceiverIOForQuestionAnswering:
        start, end = predictions.predictions
        assert start.shape == end.shape == (6, *SHAPES[head])
        torch.testing.assert_close(torch.tensor(end), outputs.end_logits)
        assert [labels.shape for labels in predictions.label_ids] == [(6,), (6,)]
    else:
        assert predictions.predictions.shape == (6, *SHAPES[head])
        torch.testing.assert_close(torch.tensor(predictions.predictions), outputs.logits, rtol=1e-5, atol=1e-5)
        assert predictions.label_ids.shape == batch["labels"].shape
    if head not in TOKEN_HEADS:
        # Trainer weighs batches, here of 4 and of 2, by their examples, and so cannot by their tokens.
        assert predictions.metrics["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


def test_texts_of_unequal_length_are_gathered_in_evaluation(tmp_path):
    """Logits are as long as each batch's longest text; Trainer pads them to the longest of all."""
    head = PerceiverIOForTokenClassification
    model, data = head_model(head), examples(head, 8)
    for example in data[:4]:
        for name in example:
            example[name] = example[name][:6]
    result = Trainer(model=model, args=arguments(tmp_path)).predict(data)
    assert result.predictions.shape == (8, 9, 5)
    assert (result.predictions[:4, 6:] == -100).all() and (result.label_ids[:4, 6:] == -100).all()
