"""Heads that read several modalities at once, or sound, or video."""

from typing import Any

from torch import Tensor
from transformers.utils import can_return_tuple

from .configuration_perceiver_io import PerceiverIOConfig
from .modeling_perceiver_io import PerceiverIOHead, PerceiverIOHeadOutput, head_output, refuse_labels


class PerceiverIOForMultimodalAutoencoding(PerceiverIOHead):
    """A dict of modalities -> a dict of reconstructions.

    The released model: image (B, 16, 3, 224, 224), audio (B, 30720, 1), label (B, 700) -> image (B, 802816, 3) or on its
    grid, audio (B, 30720), label (B, 700).
    """

    main_input_name = "inputs"
    preprocessor_kinds = ("multimodal",)
    query_kind = "multimodal"
    postprocessor_kinds = ("multimodal",)
    accepts_loss_kwargs = False

    @classmethod
    def _default_sides(cls, config: PerceiverIOConfig) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        raise ValueError(
            "PerceiverIOForMultimodalAutoencoding cannot guess what to reconstruct; give the config output_query and "
            "postprocessor of kind 'multimodal', as hf_perceiver.recipes.multimodal_autoencoder() does"
        )

    @can_return_tuple
    def forward(
        self,
        inputs: dict[str, Tensor] | None = None,
        attention_mask: dict[str, Tensor] | None = None,
        output_points: dict[str, Any] | None = None,
        coordinates: dict[str, Tensor] | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """output_points and coordinates choose what is decoded, see PerceiverIOModel.decode."""
        refuse_labels(type(self).__name__, kwargs)
        outputs = self.perceiver(
            inputs=inputs,
            attention_mask=attention_mask,
            output_points=output_points,
            coordinates=coordinates,
            chunk_size=chunk_size,
            **kwargs,
        )
        return PerceiverIOHeadOutput(**head_output(outputs, None, logits=outputs.logits))
