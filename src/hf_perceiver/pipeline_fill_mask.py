"""`pipeline("fill-mask", model=...)`: transformers' own pipeline, decoding the masked positions only."""

from typing import Any

from transformers.pipelines.base import GenericTensor
from transformers.pipelines.fill_mask import FillMaskPipeline

from .heads_text import PerceiverIOForMaskedLM


class PerceiverIOFillMaskPipeline(FillMaskPipeline):
    """transformers' FillMaskPipeline with the same arguments and results, without decoding positions that nobody asked.

    For any other model this makes a FillMaskPipeline itself, so that `pipeline("fill-mask")` may name this class for
    every model: other libraries' too, wrapped ones (adapters, compiled models), and a Perceiver IO whose output query
    or read-out is a user's own.
    """

    # Copying an object makes it without arguments.
    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> FillMaskPipeline:
        if model is None or answers_by_position(model):
            return super().__new__(cls)
        return FillMaskPipeline(model, *args, **kwargs)

    def _forward(self, model_inputs: dict[str, GenericTensor]) -> Any:
        masked = model_inputs["input_ids"] == self.tokenizer.mask_token_id  # (B, L)
        # Masked positions first; a text with fewer of them than its neighbours has some other positions answered too.
        order = masked.int().argsort(dim=1, descending=True, stable=True)
        points = order[:, : int(masked.sum(1).max())]
        outputs = self.model(**model_inputs, output_points=points)
        answers = outputs["logits"]  # (B, n, vocab_size)
        # Where the pipeline looks for them.
        logits = answers.new_zeros(*masked.shape, answers.shape[-1])
        outputs["logits"] = logits.scatter_(1, points[..., None].expand_as(answers), answers)
        outputs["input_ids"] = model_inputs["input_ids"]
        return outputs


def answers_by_position(model: Any) -> bool:
    """Whether each position of a text can be asked by itself: our head, with the parts it was made for."""
    if not isinstance(model, PerceiverIOForMaskedLM):
        return False
    kinds = [side["kind"] for side in (model.config.output_query, model.config.postprocessor) if side]
    return kinds == ["position", "tokens"]


def register_fill_mask(entry: dict[str, Any]) -> None:
    """Put the class into the pipelines' entry for "fill-mask", unless somebody else has put theirs there."""
    found = entry["impl"]  # the class, or its dotted name, by version of transformers
    if found in (FillMaskPipeline, f"{FillMaskPipeline.__module__}.{FillMaskPipeline.__qualname__}"):
        entry["impl"] = PerceiverIOFillMaskPipeline
