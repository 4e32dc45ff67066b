"""Heads that read text: masked tokens, classes of a text or of its tokens, answers, choices."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .configuration_perceiver_io import PerceiverIOConfig
from .losses import cross_entropy
from .modeling_perceiver_io import PerceiverIOHead, PerceiverIOHeadOutput, classify, head_output, one_input, query_width


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
