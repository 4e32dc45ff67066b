"""Heads that read text: masked tokens, classes of a text or of its tokens, answers, choices."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .configuration_perceiver_io import PerceiverIOConfig
from .losses import IGNORED, cross_entropy
from .modeling_perceiver_io import PerceiverIOHead, PerceiverIOHeadOutput, classify, head_output, one_input, query_width
from .preprocessors import values_known


@dataclass
class PerceiverIOQuestionAnsweringOutput(ModelOutput):
    """start_logits and end_logits (B, L); the rest as PerceiverIOHeadOutput."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class PerceiverIOForMaskedLM(PerceiverIOHead):
    """Tokens (B, L) -> scores of every token at every position (B, L, vocab_size)."""

    main_input_name = "input_ids"
    preprocessor_kinds = ("text",)
    query_kind = "position"
    postprocessor_kinds = ("tokens",)

    @classmethod
    def _default_sides(cls, config: PerceiverIOConfig) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        query, post = super()._default_sides(config)
        asked = copy.deepcopy(config)
        asked.output_query = query
        channels = config.preprocessor.get("channels")
        if channels and post.get("tied", True) and query_width(asked) != channels:
            post.setdefault("project", channels)  # tied tokens are as wide as the embedding
        return query, post

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs: Tensor | None = None,
        output_points: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """labels (B, L), or (B, n) with output_points; -100 where there is nothing to learn."""
        outputs = self.perceiver(
            input_ids=input_ids, attention_mask=attention_mask, inputs=inputs, output_points=output_points, **kwargs
        )
        loss = None if labels is None else cross_entropy(outputs.logits, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))


class PerceiverIOForSequenceClassification(PerceiverIOHead):
    """Tokens (B, L) -> class scores (B, num_labels)."""

    main_input_name = "input_ids"
    preprocessor_kinds = ("text",)
    query_kind = "tasks"
    postprocessor_kinds = ("classification", "average")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """labels (B,) class indices or numbers, or (B, num_labels); the loss follows config.problem_type."""
        outputs = self.perceiver(input_ids=input_ids, attention_mask=attention_mask, inputs=inputs, **kwargs)
        loss = classify(self.config, outputs.logits, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))


class PerceiverIOForTokenClassification(PerceiverIOHead):
    """Tokens (B, L) -> class scores of every token (B, L, num_labels)."""

    main_input_name = "input_ids"
    preprocessor_kinds = ("text",)
    query_kind = "position"
    postprocessor_kinds = ("projection",)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """labels (B, L), -100 where there is none."""
        outputs = self.perceiver(input_ids=input_ids, attention_mask=attention_mask, inputs=inputs, **kwargs)
        loss = None if labels is None else cross_entropy(outputs.logits, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))


class PerceiverIOForQuestionAnswering(PerceiverIOHead):
    """Question and text as tokens (B, L) -> scores of the answer's first and last token, (B, L) each."""

    main_input_name = "input_ids"
    preprocessor_kinds = ("text",)
    query_kind = "position"
    postprocessor_kinds = ("projection",)
    postprocessor_options: ClassVar[dict[str, Any]] = {"num_outputs": 2}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        inputs: Tensor | None = None,
        **kwargs: Any,
    ) -> PerceiverIOQuestionAnsweringOutput:
        """start_positions and end_positions (B,): token indices; one past the end or -100 is left out of the loss."""
        kwargs.pop("num_items_in_batch", None)  # Trainer counts "labels" only, of which there are none here
        outputs = self.perceiver(input_ids=input_ids, attention_mask=attention_mask, inputs=inputs, **kwargs)
        start, end = outputs.logits.unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start.shape[1]
            targets = [p.reshape(-1) for p in (start_positions, end_positions)]
            targets = [torch.where((p >= 0) & (p < length), p, -100) for p in targets]
            loss = (cross_entropy(start, targets[0]) + cross_entropy(end, targets[1])) / 2
        logits = {"start_logits": start, "end_logits": end}
        return PerceiverIOQuestionAnsweringOutput(**head_output(outputs, loss, **logits))


class PerceiverIOForMultipleChoice(PerceiverIOHead):
    """Tokens of every choice (B, choices, L) -> a score for each (B, choices)."""

    main_input_name = "input_ids"
    preprocessor_kinds = ("text",)
    query_kind = "tasks"
    postprocessor_kinds = ("classification",)
    postprocessor_options: ClassVar[dict[str, Any]] = {"num_outputs": 1}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """labels (B,): index of the right choice."""
        tokens = one_input(input_ids=input_ids, inputs=inputs)
        if tokens.ndim != 3:
            raise ValueError(f"multiple choice reads (batch, choices, length) tokens, not {tuple(tokens.shape)}")
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        outputs = self.perceiver(input_ids=tokens.flatten(0, 1), attention_mask=mask, **kwargs)
        scores = outputs.logits.reshape(tokens.shape[:2])
        loss = None if labels is None else cross_entropy(scores, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=scores))


class PerceiverIOForMultitaskSequenceClassification(PerceiverIOHead):
    """Tokens (B, L) and which task each is for (B,) -> scores of its classes (B, K), or its number first, then -inf.

    Without task_ids every task is answered, (B, T, K), for the cost of one reading. K, the tasks and their order: see
    `postprocessors.MultitaskPostprocessor`; give the config `postprocessor={"kind": "multitask", "tasks": {...}}`. The query
    is the task's own, or with `at_first_token` that of the first token, all of whose weights a language model has.
    Source: Perceiver IO, section 4.1 and table 2.
    """

    main_input_name = "input_ids"
    preprocessor_kinds = ("text",)
    query_kind = "tasks"
    postprocessor_kinds = ("multitask",)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks; a task id is the place in this list."""
        return list(self.perceiver.postprocessor.names)

    @classmethod
    def _fits(cls, config: PerceiverIOConfig) -> bool:
        query, post = config.output_query or {}, config.postprocessor or {}
        if post.get("kind") != "multitask":
            return super()._fits(config)
        if post.get("at_first_token"):
            return query.get("kind") == "position"
        return query.get("kind") == "tasks" and query.get("num_tasks", 1) == len(post.get("tasks") or ())

    @classmethod
    def _default_sides(cls, config: PerceiverIOConfig) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        post = dict(config.postprocessor or {})
        if post.get("kind") != "multitask":
            raise ValueError(
                f"{cls.__name__} needs to know its tasks: give the config, or from_pretrained, "
                'postprocessor={"kind": "multitask", "tasks": {name: [class, ...]}}'
            )
        if not post.get("at_first_token"):
            return {"kind": "tasks", "channels": query_width(config), "num_tasks": len(post.get("tasks") or ())}, post
        position = config.preprocessor.get("position")
        if not position:
            raise ValueError("at_first_token asks at a position, and this config's preprocessor has none to copy")
        return {"kind": "position", "position": copy.deepcopy(position), "use_input_mask": True}, post

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        inputs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """task_ids (B,): places in `tasks`. labels (B,), of any type: class indices, numbers where the task is one,
        -100 where there is none. The loss is the mean over the batch of cross-entropies and squared errors.
        """
        post: Any = self.perceiver.postprocessor
        if task_ids is not None:
            check_tasks(task_ids, one_input(input_ids=input_ids, inputs=inputs).shape[0], post.names)
        elif labels is not None:
            raise ValueError(f"labels need task_ids (batch,) beside them, places in {', '.join(post.names)}")
        points: Any = None
        if post.at_first_token:
            points = [0]
        elif task_ids is not None:
            points = task_ids[:, None]
        outputs = self.perceiver(
            input_ids=input_ids, attention_mask=attention_mask, inputs=inputs, output_points=points, **kwargs
        )
        logits, loss = outputs.logits, None
        if task_ids is not None:
            task_ids = task_ids.to(logits.device).long()
            logits = logits.gather(1, task_ids[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0]
            if labels is not None:
                loss = multitask_loss(logits, labels, task_ids, post.num_classes, num_items_in_batch, post.names)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=logits))


def check_tasks(task_ids: Tensor, batch_size: int, names: list[str]) -> None:
    """Raise ValueError unless task_ids are (B,) integers, each the place of a task in `names`."""
    if task_ids.shape != (batch_size,) or task_ids.is_floating_point() or task_ids.dtype == torch.bool:
        raise ValueError(
            f"task_ids are one integer for each of {batch_size} examples, not {tuple(task_ids.shape)} {task_ids.dtype}"
        )
    if values_known(task_ids) and (bad := task_ids[(task_ids < 0) | (task_ids >= len(names))]).numel():
        known = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        raise ValueError(f"task id {int(bad[0])} is unknown; the tasks are {known}")


def multitask_loss(
    logits: Tensor,
    labels: Tensor,
    task_ids: Tensor,
    num_classes: list[int],
    num_items_in_batch: Tensor | int | None = None,
    names: list[str] | None = None,
) -> Tensor:
    """Scores (B, K), labels (B,), tasks (B,) -> the mean of cross-entropies, and of squared errors where num_classes is 0.

    Raises ValueError for a label that is no class of its task, or no number.
    """
    if labels.shape != task_ids.shape:
        raise ValueError(f"labels have the shape {tuple(task_ids.shape)} here, not {tuple(labels.shape)}")
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    labels = labels.to(logits.device)
    classes = torch.tensor(num_classes, device=logits.device)[task_ids]
    labelled, is_number = labels != IGNORED, classes == 0
    if values_known(labels):
        of_class = (labels >= 0) & (labels < classes) & (labels == labels.long())
        if (bad := labelled & ~torch.where(is_number, labels.isfinite(), of_class)).any():
            row = int(bad.nonzero()[0])
            task = names[int(task_ids[row])] if names else f"task {int(task_ids[row])}"
            allowed = "a number" if is_number[row] else f"a class from 0 to {int(classes[row]) - 1}"
            raise ValueError(f"label {labels[row].item():g} of {task} is not {allowed}; -100 marks what has no label")
    targets = torch.where(labelled & ~is_number, labels, IGNORED).long()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    total = total + (logits[:, 0] - labels.to(logits.dtype)).masked_fill(~(labelled & is_number), 0.0).square().sum()
    count = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
