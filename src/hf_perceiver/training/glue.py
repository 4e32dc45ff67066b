"""Fine-tune on GLUE: one task, or all eight in one model by the paper's three multitask variants.

    python -m hf_perceiver.training.glue --data_dir glue_data --model bundled:language --output_dir run

Source: Perceiver IO (arXiv 2107.14795), sections 4.1 and F.4, tables 2, 13 and 14: ten epochs, batches of 16, 32 or 64,
LAMB at 1e-4 to 1e-5, 200 steps of warm-up, weight decay 0.01, the best figure on the dev set for each task. Left open there and
chosen here: the cosine after the warm-up; in the mixture, examples of all tasks alike (tasks in proportion to their
sizes) and the plain mean of their losses, with STS-B's squared error in its own units, 0 to 5; pairs as
[CLS] first [SEP] second [SEP], the longer one cut first.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, WeightedRandomSampler
from transformers import EvalPrediction

from ..configuration_perceiver_io import PerceiverIOConfig
from ..heads_text import PerceiverIOForMultitaskSequenceClassification, PerceiverIOForSequenceClassification
from ..modeling_perceiver_io import query_width
from ..recipes import GLUE_TASKS
from .glue_data import (
    TASKS,
    Example,
    average,
    check_names,
    read_task,
    score,
    task_scores,
    write_made_up,
    write_predictions,
)
from .recipe import ModelArguments, RecipeTrainer, fresh_config, model_folder, open_model, parse, run, start
from .text_tasks import FineTuning, checkpoint_fields, load_tokenizer, prepare_smoke_test, window_length


@dataclass
class GlueArguments:
    """Tasks, their files, and how one model answers several."""

    data_dir: str | None = field(
        default=None, metadata={"help": "folder that holds CoLA/, MNLI/, MRPC/ ... with the TSV files of GLUE"}
    )
    tasks: list[str] = field(
        default_factory=lambda: list(TASKS), metadata={"help": f"which of {', '.join(TASKS)}; all by default"}
    )
    variant: Literal["query", "shared_token", "task_token", "single"] = field(
        default="query",
        metadata={
            "help": "query: a learned query for each task; shared_token: all asked at the place of [CLS]; task_token: at "
            "that of a token of the task's own; single: one task, by a model of its own"
        },
    )
    sampling_power: float = field(
        default=1.0,
        metadata={
            "help": "a task is drawn in proportion to its size to this power: 1 every example alike, 0 every task alike"
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a text or pair, longer ones are cut; by default all the model reads"}
    )
    max_bad_share: float = field(
        default=0.001, metadata={"help": "share of a file's rows that may be bad; they are left out and reported"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "another tokenizer than the model's own"})
    summarize: bool = field(
        default=False,
        metadata={"help": "no run: the best of all runs under output_dir for each task, and the paper's average"},
    )

    def __post_init__(self) -> None:
        self.tasks = check_names(self.tasks)
        if self.variant == "single" and len(self.tasks) != 1 and not self.summarize:
            raise ValueError(f"--variant single trains one task, not {', '.join(self.tasks)}; give --tasks with one")
        if not 0 <= self.sampling_power <= 1:
            raise ValueError(f"sampling_power={self.sampling_power} is a power from 0 to 1")
        if not 0 <= self.max_bad_share < 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} is a share from 0 to below 1")


class GlueCollator:
    """Examples -> input_ids, attention_mask (B, L), with labels (B,) and, for several tasks, task_ids (B,).

    task_ids: the id of each task of a multitask model, whose labels are then floats, of classes too. first_tokens: the
    token that stands in the place of [CLS] for each task.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        task_ids: Mapping[str, int] | None = None,
        first_tokens: Mapping[str, int] | None = None,
    ):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.task_ids, self.first_tokens = task_ids, first_tokens

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [self.encode(example) for example in examples]
        length = max(map(len, rows))
        side = self.tokenizer.padding_side
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            ids[index, place], mask[index, place] = torch.tensor(row), 1
        batch = {"input_ids": ids, "attention_mask": mask}
        labels = [example.label for example in examples]
        if None not in labels:
            kind = torch.float32 if self.task_ids or isinstance(labels[0], float) else torch.int64
            batch["labels"] = torch.tensor(labels, dtype=kind)
        if self.task_ids:
            unknown = {example.task for example in examples} - set(self.task_ids)
            if unknown:
                raise ValueError(f"examples of {', '.join(sorted(unknown))}; the model has {', '.join(self.task_ids)}")
            batch["task_ids"] = torch.tensor([self.task_ids[example.task] for example in examples])
        return batch

    def encode(self, example: Example) -> list[int]:
        """Token ids of a text or a pair, the longer of two cut first."""
        ids = self.tokenizer(
            example.first, example.second, truncation="longest_first", max_length=self.max_length
        ).input_ids
        return ids if self.first_tokens is None else [self.first_tokens[example.task], *ids[1:]]


class MixtureSampler(Sampler[int]):
    """Indices of examples, with repeats, each task in proportion to its size to a power; others in every epoch."""

    def __init__(self, tasks: Sequence[str], power: float, seed: int):
        sizes = {name: tasks.count(name) for name in dict.fromkeys(tasks)}
        self.weights = [sizes[name] ** (power - 1.0) for name in tasks]
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.weights)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(WeightedRandomSampler(self.weights, len(self), generator=generator))


class GlueTrainer(RecipeTrainer):
    """RecipeTrainer whose evaluation of several sets ends with the paper's average of those tasks."""

    def __init__(self, *arguments: Any, sampling_power: float = 1.0, **options: Any):
        self.sampling_power = sampling_power
        super().__init__(*arguments, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.sampling_power == 1.0:
            return super()._get_train_sampler(train_dataset)
        examples = self.train_dataset if train_dataset is None else train_dataset
        return MixtureSampler([example.task for example in examples], self.sampling_power, self.args.seed)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if several and (scores := task_scores(metrics, metric_key_prefix)):
            metrics[f"{metric_key_prefix}_average"] = average(scores)
            self.log({f"{metric_key_prefix}_average": average(scores)})
        return metrics


def answers(task: str, scores: np.ndarray) -> np.ndarray:
    """A model's scores (N, K) -> a class or a number for each example (N,)."""
    count = len(GLUE_TASKS[task])
    return scores[:, :count].argmax(axis=-1) if count else scores[:, 0]


def glue_metrics(tasks: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's compute_metrics: a set holds one task, the only one of `tasks`, or told by its task_ids.

    Raises ValueError for a set of several tasks.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labels, ids = prediction.label_ids, np.zeros(1, dtype=int)
        if isinstance(labels, tuple):
            labels, ids = labels
        if (ids != ids[0]).any():
            raise ValueError("a set to measure on holds one task, this one holds several; split it by its task_ids")
        task = tasks[int(ids[0])]
        return score(task, answers(task, np.asarray(prediction.predictions)), np.asarray(labels))

    return compute


def source_config(arguments: ModelArguments) -> PerceiverIOConfig:
    """The config of what `open_model` starts from. Raises ValueError for another architecture, and for none."""
    if arguments.model:
        checkpoint_fields(arguments)  # refuses other architectures
        return PerceiverIOConfig.from_pretrained(
            model_folder(arguments.model), revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
        )
    if not arguments.architecture:
        raise ValueError(
            "give --model to start from trained weights (bundled:language ships), or --architecture for fresh ones "
            "(language_bytes is the paper's)"
        )
    return fresh_config(arguments.architecture, arguments.config_overrides)


def open_tokenizer(arguments: ModelArguments, config: PerceiverIOConfig, name: str | None = None) -> Any:
    """The tokenizer called `name`, the model's own, or the bytes' for fresh weights; ValueError where the ids differ."""
    place, tokenizer = load_tokenizer(arguments, config, name, added=len(GLUE_TASKS))
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    differ = [name for name, id in ids.items() if getattr(config, name) not in (None, id)]
    if len(tokenizer) > config.vocab_size or differ or tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer {place} has {len(tokenizer)} tokens, with {ids}; the model "
            f"{config.vocab_size}, with { {name: getattr(config, name) for name in ids} }. Take the one that the model was "
            "trained with, and one that has a padding token"
        )
    return tokenizer


def glue_fields(config: PerceiverIOConfig, variant: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Fields of the config that make a language model one of GLUE; heads have the width of its queries.

    Raises ValueError for a multitask model of other tasks, or of another variant.
    """
    post, width = config.postprocessor or {}, query_width(config)
    if variant == "single":
        names = GLUE_TASKS[tasks[0]] or ["score"]
        hidden = post.get("hidden", width) if post.get("kind") == "classification" else width
        return {
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification" if len(names) > 1 else "regression",
            "output_query": {"kind": "tasks", "channels": width},
            "postprocessor": {"kind": "classification", "hidden": hidden},
        }
    at_first_token = variant != "query"
    if post.get("kind") != "multitask":
        chosen = {name: GLUE_TASKS[name] for name in tasks}
        made = {"kind": "multitask", "tasks": chosen, "hidden": width, "at_first_token": at_first_token}
        return {"postprocessor": made}
    has = sorted(post["tasks"])
    if missing := [name for name in tasks if post["tasks"].get(name) != GLUE_TASKS[name]]:
        raise ValueError(f"the model's tasks are {', '.join(has)}, with other classes or without {', '.join(missing)}")
    if bool(post.get("at_first_token")) != at_first_token:
        fitting = "shared_token or task_token" if post.get("at_first_token") else "query"
        raise ValueError(f"the model was made for --variant {fitting}, not {variant}")
    return {"postprocessor": post}


def open_glue_model(
    model_arguments: ModelArguments, variant: str, tasks: Sequence[str], tokenizer: Any, config: PerceiverIOConfig
) -> tuple[Any, dict[str, int] | None]:
    """The model to fine-tune, and for "task_token" the first token of each task, which the tokenizer then has too."""
    if variant == "task_token" and model_arguments.freeze_encoder:
        raise ValueError("--variant task_token trains tokens of the input; leave out --freeze_encoder")
    if variant in ("shared_token", "task_token") and tokenizer("a").input_ids[0] != tokenizer.cls_token_id:
        raise ValueError(f"--variant {variant} asks at the place of [CLS], and this tokenizer puts none before a text")
    fields = glue_fields(config, variant, tasks)
    single = variant == "single"
    # A fine-tuned model may go on with a task of other classes, MNLI's before RTE.
    also = {"ignore_mismatched_sizes": True} if model_arguments.model and single else {}
    head = PerceiverIOForSequenceClassification if single else PerceiverIOForMultitaskSequenceClassification
    model = open_model(head, model_arguments, **fields, **also)
    if variant != "task_token":
        return model, None
    names = [f"[{name}]" for name in model.tasks]
    added = tokenizer.add_tokens(names, special_tokens=True)
    tokens = dict(zip(model.tasks, tokenizer.convert_tokens_to_ids(names), strict=True))
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if added:
        weight = model.get_input_embeddings().weight
        with torch.no_grad():  # they begin as what they stand for, and differ from there
            weight[list(tokens.values())] = weight[tokenizer.cls_token_id].clone()
    return model, tokens


def predict(trainer: GlueTrainer, tests: Mapping[str, Sequence[Example]], folder: Path) -> list[Path]:
    """Write a file for GLUE's server for each test set; its WNLI and AX, which are no tasks here, are not among them."""
    written = []
    for name, examples in tests.items():
        found = trainer.predict(examples, metric_key_prefix=f"test_{name}")
        if trainer.is_world_process_zero():
            task = examples[0].task
            given = answers(task, np.asarray(found.predictions))
            written.append(write_predictions(folder / f"{name}.tsv", task, given.tolist()))
    return written


def table(scores: Mapping[str, float]) -> str:
    """Each task's figure in percent and their average, as the paper's table 14 has them."""
    rows = [f"{task:8} {TASKS[task].metrics[0]:10} {100 * value:6.2f}" for task, value in scores.items()]
    return "\n".join([*rows, f"{'average':8} {f'{len(scores)} tasks':10} {100 * average(scores):6.2f}"])


def summarize(folder: str | Path) -> dict[str, float]:
    """The best of all runs in a folder, by their metrics.json, for each task; ValueError where there is none."""
    best: dict[str, float] = {}
    for path in sorted(Path(folder).rglob("metrics.json")):
        for task, value in task_scores(json.loads(path.read_text(encoding="utf-8"))).items():
            best[task] = max(value, best.get(task, -math.inf))
    if not best:
        raise ValueError(f"{folder} holds no metrics.json of a GLUE run; looked in all folders below it, too")
    return {task: best[task] for task in TASKS if task in best}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the command; -> the metrics, or with --summarize one figure for each task."""
    glue, models, training = parse([GlueArguments, ModelArguments, FineTuning], arguments, __doc__ or "")
    if glue.summarize:
        scores = summarize(training.output_dir)
        print(table(scores))
        return scores
    resume = start(training)
    with tempfile.TemporaryDirectory() as made_up:
        prepare_smoke_test(models, training)
        if training.smoke_test and glue.data_dir is None:
            glue.data_dir = str(write_made_up(made_up, rows=8))
        if glue.data_dir is None:
            raise ValueError(f"give --data_dir, a folder that holds {', '.join(f'{name}/' for name in glue.tasks)}")
        read = {
            split: {
                name: examples
                for task in glue.tasks
                for name, examples in read_task(glue.data_dir, task, split, max_bad_share=glue.max_bad_share).items()
            }
            for split, needed in (
                ("train", training.do_train),
                ("dev", training.do_eval),
                ("test", training.do_predict),
            )
            if needed
        }
    config = source_config(models)
    tokenizer = open_tokenizer(models, config, glue.tokenizer)
    max_length = window_length(config, tokenizer, glue.max_length)
    model, first_tokens = open_glue_model(models, glue.variant, glue.tasks, tokenizer, config)
    several = glue.variant != "single"
    names = model.tasks if several else glue.tasks
    collator = GlueCollator(
        tokenizer,
        max_length,
        task_ids={name: index for index, name in enumerate(names)} if several else None,
        first_tokens=first_tokens,
    )
    training.remove_unused_columns = False  # examples are not made of the model's arguments
    training.label_names = ["labels", "task_ids"] if several else ["labels"]
    trainer = GlueTrainer(
        model,
        args=training,
        sampling_power=glue.sampling_power,
        data_collator=collator,
        processing_class=tokenizer,
        train_dataset=[example for examples in read.get("train", {}).values() for example in examples],
        eval_dataset=read.get("dev"),
        compute_metrics=glue_metrics(names),
    )
    metrics = run(trainer, resume, saved=[tokenizer])
    if training.do_predict:
        predict(trainer, read["test"], Path(training.output_dir) / "predictions")
    if trainer.is_world_process_zero() and (scores := task_scores(metrics)):
        print(table(scores))
    return metrics


if __name__ == "__main__":
    main()
