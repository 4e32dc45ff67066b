"""transformers' Trainer on every head that has a loss: accumulation, resuming, the best model, evaluation, collators."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import CHECKPOINTING, PIXELS, config_of, enlarge, fourier, grid, head_inputs, tiny
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils.generic import find_labels

import hf_perceiver
from hf_perceiver import (
    PerceiverIOForAudioClassification,
    PerceiverIOForAudioVisualClassification,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForMultipleChoice,
    PerceiverIOForOpticalFlow,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOForVideoClassification,
    PerceiverIOTokenizer,
)
from hf_perceiver.training.modalities import ModalityCollator

TOKEN_HEADS = (PerceiverIOForMaskedLM, PerceiverIOForTokenClassification)
POSITIONS = ["start_positions", "end_positions"]
ROWS = torch.arange(8)

SOUND = grid({"kind": "audio_patches", "samples_per_patch": 4}, fourier(5))
VIDEO = grid({**PIXELS, "spatial_downsample": 2, "temporal_downsample": 2}, fourier(2, 3, 2, bands=2))
BOTH = {"kind": "multimodal", "modalities": {"audio": SOUND, "image": VIDEO}}
CLASSES = {"output_query": {"kind": "tasks", "channels": 16}, "postprocessor": {"kind": "classification"}}


def sound_and_video(batch: int) -> dict[str, Any]:
    return {"inputs": {"audio": torch.randn(batch, 20, 1), "image": torch.randn(batch, 4, 3, 6, 4)}}


@dataclass
class Problem:
    """A head on a tiny model, and eight labelled examples of what it is to learn.

    shape: of one example's predictions. collate: what makes a batch. near_zero: as which share of its first value the loss
    is near zero, after `steps` steps on the same examples.
    """

    head: type
    case: str | dict[str, Any]
    shape: tuple[int, ...] | dict[str, tuple[int, ...]]
    inputs: Callable[[int], dict[str, Any]] | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    collate: Any = default_collate
    near_zero: float = 0.02
    steps: int = 60

    def model(self, *, large: bool = True, seed: int = 0, **changes: Any) -> Any:
        changes = self.changes | changes
        if isinstance(self.case, str):
            return tiny(self.case).model(self.head, large=large, seed=seed, **changes).train()
        torch.manual_seed(seed)
        model = self.head(config_of(**{**CLASSES, **copy.deepcopy(self.case), **changes}))
        return (enlarge(model, seed) if large else model).train()

    def batch(self, count: int = 8, seed: int = 0) -> dict[str, Any]:
        torch.manual_seed(seed)
        if self.inputs is not None:
            labels = {} if self.head is PerceiverIOForMultimodalAutoencoding else {"labels": torch.arange(count) % 5}
            return {**self.inputs(count), **labels, **self.labels}
        batch = head_inputs(tiny(str(self.case)), self.head, batch=count, labels=True) | self.labels
        if "attention_mask" in batch:  # of 9 to 6 tokens, so that no two texts are alike
            rows = torch.arange(count).view(-1, *[1] * (batch["attention_mask"].ndim - 1))
            batch["attention_mask"] = (torch.arange(9) < 9 - rows % 4).long().expand_as(batch["attention_mask"])
        if (
            self.head in TOKEN_HEADS
        ):  # labels are missing where there is no text, and as many as the example's number says
            labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
            batch["labels"] = labels.masked_fill(torch.arange(9) < torch.arange(count)[:, None] % 5, -100)
        return batch

    def examples(self, count: int = 8, seed: int = 0) -> list[dict[str, Any]]:
        batch = self.batch(count, seed)
        return [
            {
                name: {n: v[row] for n, v in values.items()} if isinstance(values, dict) else values[row]
                for name, values in batch.items()
            }
            for row in range(count)
        ]


def plain_clips(batch: int) -> dict[str, Any]:
    """Of one colour and one level each."""
    image, audio = torch.rand(batch, 1, 3, 1, 1).expand(-1, 2, 3, 4, 6), torch.randn(batch, 1, 1).expand(-1, 8, 1)
    return {"inputs": {**tiny("multimodal").inputs(batch)["inputs"], "image": image, "audio": audio}}


# One for all pixels of a pair.
MOTION = torch.randn(8, 1, 1, 2, generator=torch.Generator().manual_seed(1)).expand(8, 4, 6, 2)
SEQUENCE, IMAGE = PerceiverIOForSequenceClassification, PerceiverIOForImageClassification
SOFT = {"labels": torch.rand(8, 5, generator=torch.Generator().manual_seed(0)).mul(20).softmax(-1)}
MANY = {"labels": (ROWS[:, None] % torch.arange(1, 6) == 0).float()}
PROBLEMS: dict[str, Problem] = {
    "masked_lm": Problem(PerceiverIOForMaskedLM, "language", (9, 30)),
    "sequence": Problem(SEQUENCE, "language", (5,)),
    "sequence_many_labels": Problem(
        SEQUENCE, "language", (5,), labels=MANY, changes={"problem_type": "multi_label_classification"}
    ),
    "sequence_number": Problem(SEQUENCE, "language", (1,), labels={"labels": ROWS / 4.0}, changes={"num_labels": 1}),
    "sequence_numbers": Problem(
        SEQUENCE,
        "language",
        (5,),
        labels={"labels": ROWS[:, None] / torch.arange(1, 6)},
        changes={"problem_type": "regression"},
    ),
    "token": Problem(PerceiverIOForTokenClassification, "language", (9, 5)),
    "question_answering": Problem(
        PerceiverIOForQuestionAnswering,
        "language",
        (9,),
        labels={"start_positions": ROWS % 3, "end_positions": 3 + ROWS % 3},
    ),
    "multiple_choice": Problem(PerceiverIOForMultipleChoice, "language", (2,)),
    "image": Problem(IMAGE, "imagenet_fourier", (5,)),
    "image_unlabelled": Problem(
        IMAGE, "imagenet_learned", (5,), labels={"labels": torch.where(ROWS % 3 == 0, -100, ROWS % 5)}
    ),
    "image_soft_labels": Problem(
        IMAGE, "imagenet_fourier", (5,), labels=SOFT, changes={"problem_type": "single_label_classification"}
    ),
    "image_conv": Problem(IMAGE, "imagenet_conv", (5,)),
    "original_perceiver": Problem(IMAGE, "original_shared", (5,)),
    "flow": Problem(PerceiverIOForOpticalFlow, "flow", (4, 6, 2), labels={"labels": MOTION}, near_zero=0.1, steps=150),
    "autoencoding": Problem(
        PerceiverIOForMultimodalAutoencoding,
        "multimodal",
        {"audio": (8,), "image": (2, 4, 6, 3), "label": (5,)},
        inputs=plain_clips,
        collate=ModalityCollator(reconstruct=["audio", "image", "label"]),
        near_zero=0.1,
        steps=150,
    ),
    "audio": Problem(
        PerceiverIOForAudioClassification,
        {"preprocessor": SOUND},
        (5,),
        inputs=lambda batch: {"input_values": torch.randn(batch, 20, 1)},
    ),
    "video": Problem(
        PerceiverIOForVideoClassification,
        {"preprocessor": VIDEO},
        (5,),
        inputs=lambda batch: {"pixel_values": torch.randn(batch, 4, 3, 6, 4)},
    ),
    "audio_visual": Problem(
        PerceiverIOForAudioVisualClassification,
        {"preprocessor": BOTH},
        (5,),
        inputs=sound_and_video,
        collate=ModalityCollator(),
    ),
}
EVERY = pytest.mark.parametrize("name", PROBLEMS)
HEADS = {problem.head: name for name, problem in reversed(PROBLEMS.items())}  # one problem of each head
EVERY_HEAD = pytest.mark.parametrize("name", HEADS.values())


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


def trainer_of(name: str, folder, model: Any = None, count: int = 8, metrics: Any = None, **changes: Any) -> Trainer:
    problem = PROBLEMS[name]
    data = problem.examples(count)
    return Trainer(
        model=problem.model() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data,
        data_collator=problem.collate,
        compute_metrics=metrics,
    )


# Labels


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_trainer_finds_the_labels(head):
    """Every argument of forward with "label" in its name is one to Trainer, which then expects it in every batch."""
    assert find_labels(head) == (POSITIONS if head is PerceiverIOForQuestionAnswering else ["labels"])


def test_every_head_is_here_or_in_a_file_of_its_own():
    heads = {name for name in vars(hf_perceiver) if name.startswith("PerceiverIOFor")}
    own = {"PerceiverIOForMultitaskSequenceClassification"}  # test_heads_text.py
    assert heads - own == {head.__name__ for head in HEADS}


def test_heads_whose_labels_trainer_cannot_count():
    """It counts the tensors that are called labels: dicts and the places of answers are left out.

    Their losses are means of a batch, which Trainer then averages over those it accumulates: the large batch's loss where
    the batches hold equally many labelled examples.
    """
    assert PerceiverIOForMultimodalAutoencoding.accepts_loss_kwargs is False
    problem = PROBLEMS["question_answering"]
    model, batch = problem.model().eval(), problem.batch()
    assert model(**batch).loss == model(**batch, num_items_in_batch=3).loss


# Learning


@pytest.mark.medium
@EVERY
def test_the_loss_comes_near_zero_on_a_fixed_batch(name, tmp_path):
    """As initialised for training; labels are at random, so that all has to be learned by heart.

    Soft labels cost their own entropy at least. Under Trainer's bf16, which leaves the weights in float32, as well.
    """
    problem = PROBLEMS[name]
    losses = {}
    for bf16 in (False, True):
        model = problem.model(large=False, d_latents=32, num_latents=8)
        trainer = trainer_of(
            name,
            tmp_path,
            model,
            max_steps=problem.steps if not bf16 else 20,
            learning_rate=1e-2,
            weight_decay=0.0,
            max_grad_norm=1.0,
            include_num_input_tokens_seen="all",
            bf16=bf16,
        )
        least = 0.0
        if name == "image_soft_labels":
            labels = problem.labels["labels"]
            least = -(labels * labels.log()).sum(dim=-1).mean().item()
        losses[bf16] = [loss - least for loss in self_measured(trainer)]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        if problem.head in TOKEN_HEADS:
            assert trainer.state.num_input_tokens_seen == 8 * 9 * trainer.state.global_step
    assert losses[False][1] < problem.near_zero * losses[False][0]
    assert losses[True][1] < 0.9 * losses[True][0]


def self_measured(trainer: Trainer) -> tuple[float, float]:
    """The loss on all examples before and after training."""
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


# Accumulation and checkpointing


def gradient(name: str, folder, size: int = 8, accumulated: int = 1, **changes: Any) -> dict[str, Tensor]:
    """One step of plain gradient descent at rate 1: what changes in the weights is the gradient."""
    model = PROBLEMS[name].model()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer_of(
        name,
        folder,
        model,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        **changes,
    ).train()
    return {key: before[key] - p.detach() for key, p in model.named_parameters()}


def assert_same_step(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """To 1e-5 of the largest entry: float32, summed in another order."""
    largest = max(step.abs().max() for step in want.values())
    assert largest > 1e-3, "a gradient of nothing would prove nothing"
    for key, step in want.items():
        torch.testing.assert_close(got[key], step, rtol=0, atol=1e-5 * largest.item(), msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.medium
@EVERY
def test_four_batches_of_two_give_the_gradient_of_one_batch_of_eight(name, tmp_path):
    """And so does gradient checkpointing. Batch norm sees the examples of one batch alone, and differs."""
    whole = gradient(name, tmp_path)
    assert_same_step(gradient(name, tmp_path, **{CHECKPOINTING: True}), whole)
    if name != "image_conv":
        assert_same_step(gradient(name, tmp_path, 2, 4), whole)


# Saving and resuming


@pytest.mark.medium
@EVERY_HEAD
def test_a_resumed_run_ends_where_the_straight_run_does_and_the_best_model_comes_back(name, tmp_path):
    """Bit for bit, with dropout, so that random states count. The score falls from the first evaluation on, so that the
    best checkpoint is the first and not the last.
    """
    problem = PROBLEMS[name]
    fields: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    scores = itertools.count(0, -1)
    straight = trainer_of(
        name,
        tmp_path,
        problem.model(dropout=0.1, attention_dropout=0.1),
        metrics=lambda predictions: {"score": float(next(scores))},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **fields,
    )
    straight.train()
    assert straight.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    resumed = trainer_of(name, tmp_path / "b", problem.model(seed=1, dropout=0.1, attention_dropout=0.1), **fields)
    begin = {key: value.clone() for key, value in resumed.model.state_dict().items()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_holds(straight.model, best)
    assert_holds(resumed.model, last)
    assert sum(not torch.equal(last[key], best[key]) for key in last) > len(last) / 2
    assert all(not torch.equal(last[key], begin[key]) for key, _ in resumed.model.named_parameters() if key in last)


def assert_holds(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """All of a model's tensors are those of a checkpoint, which leaves out what is tied to another."""
    state = model.state_dict()
    tied = set(state) - set(saved)
    assert tied <= set(model.all_tied_weights_keys)
    if isinstance(model, PerceiverIOForMaskedLM):
        assert tied and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for key, value in saved.items():
        assert torch.equal(state[key], value), key


@pytest.mark.medium
def test_checkpoints_hold_our_own_names(tmp_path):
    """Trainer reads them back by name, without the conversion that from_pretrained would apply."""
    trainer = trainer_of("masked_lm", tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    with safe_open(tmp_path / "checkpoint-3" / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    tied = {"perceiver.postprocessor.output_embedding.weight"}
    assert saved == set(trainer.model.state_dict()) - tied


@pytest.mark.medium
def test_training_stops_early(tmp_path):
    """After two evaluations that are no better than the second."""
    scores = iter([1.0, 2.0, 1.5, 1.9, 3.0, 4.0])
    trainer = trainer_of(
        "image",
        tmp_path,
        metrics=lambda predictions: {"score": next(scores)},
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 4
    assert_holds(trainer.model, load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


# Evaluation


@pytest.mark.parametrize("extra", [{}, {"output_hidden_states": True}], ids=["plain", "hidden_states"])
@EVERY
def test_predictions_are_the_logits_alone(name, extra, tmp_path):
    """`keys_to_ignore_at_inference` leaves out the latents, hidden states, attentions and losses by modality."""
    problem = PROBLEMS[name]
    model, data = problem.model(**extra), problem.examples()[:6]
    predictions = Trainer(model=model, args=arguments(tmp_path), data_collator=problem.collate).predict(data)
    batch = problem.collate(data)
    with torch.no_grad():
        outputs = model.eval()(**batch)
    if problem.head is PerceiverIOForQuestionAnswering:
        start, end = predictions.predictions
        assert start.shape == end.shape == (6, *problem.shape)
        torch.testing.assert_close(torch.tensor(end), outputs.end_logits)
        assert [labels.shape for labels in predictions.label_ids] == [(6,), (6,)]
    elif isinstance(problem.shape, dict):
        assert {key: values.shape[1:] for key, values in predictions.predictions.items()} == problem.shape
        for key, values in predictions.predictions.items():
            torch.testing.assert_close(torch.tensor(values), outputs.logits[key], rtol=1e-5, atol=1e-5)
            assert predictions.label_ids[key].shape == batch["labels"][key].shape
    else:
        assert predictions.predictions.shape == (6, *problem.shape)
        torch.testing.assert_close(torch.tensor(predictions.predictions), outputs.logits, rtol=1e-5, atol=1e-5)
        assert predictions.label_ids.shape == batch["labels"].shape
    if problem.head not in TOKEN_HEADS and name != "image_unlabelled":
        # Trainer weighs batches, here of 4 and of 2, by their examples, and so cannot by their labels.
        assert predictions.metrics["test_loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


# Collators that pad

TEXTS = [
    "A latent array.",
    "Short",
    "Attention reads what it is asked, and nothing else.",
    "Byte after byte after byte",
]


def texts(**labels: Any) -> list[dict[str, Any]]:
    """Four texts of unequal length as bytes; a column that no model reads is dropped by Trainer."""
    tokenizer = PerceiverIOTokenizer()
    return [
        {"input_ids": tokenizer(text)["input_ids"], "text": text, **{key: values[i] for key, values in labels.items()}}
        for i, text in enumerate(TEXTS)
    ]


def padding_problems() -> dict[str, tuple[type, Any, list[dict[str, Any]]]]:
    tokenizer = PerceiverIOTokenizer()
    choices = [
        {**{key: [row[key], other[key]] for key in ("input_ids", "text")}, "labels": i % 2}
        for i, (row, other) in enumerate(zip(texts(), reversed(texts()), strict=True))
    ]
    tags = [[-100 if i % 7 == 0 else i % 5 for i in range(len(text.encode()) + 2)] for text in TEXTS]
    return {
        "sequence": (SEQUENCE, DataCollatorWithPadding(tokenizer), texts(labels=[0, 1, 4, 2])),
        "question_answering": (
            PerceiverIOForQuestionAnswering,
            DataCollatorWithPadding(tokenizer),
            texts(start_positions=[1, 2, 9, 3], end_positions=[3, 4, 20, 5]),
        ),
        "token": (
            PerceiverIOForTokenClassification,
            DataCollatorForTokenClassification(tokenizer),
            texts(labels=tags),
        ),
        "multiple_choice": (PerceiverIOForMultipleChoice, DataCollatorForMultipleChoice(tokenizer), choices),
        "masked_lm": (
            PerceiverIOForMaskedLM,
            DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=5),
            texts(),
        ),
    }


def byte_model(head: type) -> Any:
    """The language model, long enough for the texts."""
    case = tiny("language")
    for side in (case.config.preprocessor, case.config.output_query):
        side["position"] = {**side["position"], "num_positions": 64}
    return case.model(head, vocab_size=262)


@pytest.mark.parametrize("name", ["sequence", "question_answering", "token", "multiple_choice", "masked_lm"])
def test_padding_by_transformers_collators_changes_no_answer(name):
    head, collate, data = padding_problems()[name]
    model = byte_model(head)
    rows = [{key: value for key, value in row.items() if key != "text"} for row in data]
    batch = collate(copy.deepcopy(rows))
    if name == "multiple_choice":
        alone = [collate([copy.deepcopy(row)]) for row in rows]
    else:
        lengths = [len(row["input_ids"]) for row in rows]
        alone = [
            {key: v[i : i + 1, :length] if v.ndim == 2 else v[i : i + 1] for key, v in batch.items()}
            for i, length in enumerate(lengths)
        ]
        assert len(set(lengths)) == 4 and not batch["attention_mask"].all()
    with torch.no_grad():
        whole, single = model(**batch), [model(**row) for row in alone]
    for i, out in enumerate(single):
        for key in ("logits", "start_logits", "end_logits"):
            if key in out:
                want = out[key][0]
                torch.testing.assert_close(whole[key][i][: len(want)], want, rtol=1e-5, atol=1e-5)
    if name != "question_answering":  # whose scores of padding are scores
        counts = torch.tensor([float((row["labels"] != -100).sum()) for row in alone])
        losses = torch.stack([out.loss if n else out.loss.new_zeros(()) for out, n in zip(single, counts, strict=True)])
        torch.testing.assert_close(whole.loss, (losses * counts).sum() / counts.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["sequence", "question_answering", "token", "multiple_choice", "masked_lm"])
def test_trainer_pads_and_gathers_texts_of_unequal_length(name, tmp_path):
    """In training, and in predictions, which Trainer pads to the longest of all batches."""
    head, collate, data = padding_problems()[name]
    trainer = Trainer(
        model=byte_model(head),
        args=arguments(
            tmp_path,
            max_steps=20,
            learning_rate=3e-3,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )
    before, after = self_measured(trainer)
    if name != "masked_lm":  # whose masks are drawn anew each time
        assert after < before
    result = trainer.predict(data)
    longest = max(len(text.encode()) for text in TEXTS) + 2
    sizes = {"sequence": (4, 5), "token": (4, longest, 5), "multiple_choice": (4, 2), "masked_lm": (4, longest, 262)}
    if name == "question_answering":
        assert [p.shape for p in result.predictions] == [(4, longest)] * 2
    else:
        assert result.predictions.shape == sizes[name]
    if name in ("token", "masked_lm"):
        assert result.label_ids.shape == (4, longest)
        shorter = len(TEXTS[1].encode()) + 2
        assert (result.label_ids[1, shorter:] == -100).all()
