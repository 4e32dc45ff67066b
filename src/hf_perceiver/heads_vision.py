"""Heads that read images: their classes, and the motion between two frames."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.utils import can_return_tuple

from .arrays import QueryArray
from .losses import draw_labelled, flow_loss, labelled_points
from .modeling_perceiver_io import Encoding, PerceiverIOHead, PerceiverIOHeadOutput, classify, head_output
from .position_encoding import take_rows


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
    """Features of two frames (B, 2, C, H, W) -> flow (B, H, W, 2), x then y; times `scale_factor`, 20, it is in pixels.

    The released model reads 3x3 patches, C = 27.
    """

    main_input_name = "pixel_values"
    preprocessor_kinds = ("grid",)
    query_kind = "input"
    postprocessor_kinds = ("flow", "convex_upsampling")

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        valid_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        output_points: Any = None,
        num_loss_points: int | None = None,
        chunk_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """labels (B, H, W, 2) in pixels, or (B, n, 2) at output_points; -100 in both channels where there is none.

        valid_mask (B, H, W) or (B, n) says the same, 1 = valid; Trainer divides by the number of labels that are not
        -100, whatever the mask says. output_points (n,) or (B, n) flat pixel indices -> (B, n, 2); chunk_size bounds the
        decoder's memory. num_loss_points: in training, that many points of each example are drawn from those with a
        label, decoded and learned from, which leaves loss and gradient the same on average; None takes the number of the
        config's postprocessor, if it has one.
        """
        read_out = self.perceiver.postprocessor
        weights, asked = None, output_points
        if labels is not None:
            weights = labelled_points(labels, valid_mask)
            count = self._count_loss_points(num_loss_points)
            if count is not None and output_points is None and self.training and count < weights.shape[1:].numel():
                points, weights = draw_labelled(weights.flatten(1), count)
                asked = self._on_grid(points, tuple(labels.shape))
                labels = take_rows(labels.flatten(1, -2), points)
        outputs = self.perceiver(
            pixel_values=pixel_values, inputs=inputs, output_points=asked, chunk_size=chunk_size, **kwargs
        )
        loss = None
        if labels is not None and weights is not None:
            loss = flow_loss(
                outputs.logits,
                labels,
                weights,
                kind=getattr(read_out, "flow_loss", "epe"),
                scale_factor=getattr(read_out, "scale_factor", 20.0),
                num_items_in_batch=num_items_in_batch,
            )
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))

    def _count_loss_points(self, given: int | None) -> int | None:
        read_out = self.perceiver.postprocessor
        if given is None:
            return getattr(read_out, "num_loss_points", None)
        if type(given) is not int or given < 1:
            raise ValueError(f"num_loss_points is a whole number of points from 1, or None, not {given!r}")
        if not hasattr(read_out, "num_loss_points"):
            raise ValueError(
                f"num_loss_points={given}: {type(read_out).__name__} reads out the whole grid; leave it out, or use a "
                "postprocessor of kind 'flow'"
            )
        return given

    def _on_grid(self, points: Tensor, labels_shape: tuple[int, ...]) -> Callable[[Encoding], Tensor]:
        """What gives the points drawn from labels (B, H, W, 2), or ValueError when the output has another grid."""

        def choose(encoding: Encoding) -> Tensor:
            query: Any = self.perceiver.output_query
            grid = QueryArray.of(query(encoding.input_array)).part.grid or ()
            wanted = (encoding.latents.shape[0], *grid, 2)
            if labels_shape != wanted:
                raise ValueError(f"flow labels have the shape {wanted} here, not {labels_shape}")
            return points

        return choose
