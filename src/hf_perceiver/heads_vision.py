"""Heads that read images: their classes, and the motion between two frames."""

from typing import Any

from torch import Tensor
from transformers.utils import can_return_tuple

from .modeling_perceiver_io import PerceiverIOHead, PerceiverIOHeadOutput, classify, head_output, refuse_labels


class PerceiverIOForImageClassification(PerceiverIOHead):
    """Images (B, 3, H, W) -> class scores (B, num_labels); one class for every stem and position encoding."""

    main_input_name = "pixel_values"
    preprocessor_kinds = ("grid", "points", "multimodal")
    query_kind = "tasks"
    postprocessor_kinds = ("classification", "average")

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """labels (B,), or (B, num_labels) soft or multi-label; interpolate_pos_encoding resizes trained positions."""
        outputs = self.perceiver(
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            inputs=inputs,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        loss = classify(self.config, outputs.logits, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))


class PerceiverIOForOpticalFlow(PerceiverIOHead):
    """Patches of two frames (B, 2, 27, H, W) -> flow (B, H, W, 2), x then y; times 20 it is in pixels."""

    main_input_name = "pixel_values"
    preprocessor_kinds = ("grid",)
    query_kind = "input"
    postprocessor_kinds = ("flow",)
    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        inputs: Tensor | None = None,
        output_points: Any = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """output_points (n,) or (B, n) flat pixel indices -> (B, n, 2); chunk_size bounds the decoder's memory."""
        refuse_labels(type(self).__name__, kwargs)
        outputs = self.perceiver(
            pixel_values=pixel_values, inputs=inputs, output_points=output_points, chunk_size=chunk_size, **kwargs
        )
        return PerceiverIOHeadOutput(**head_output(outputs, None, logits=outputs.logits))
