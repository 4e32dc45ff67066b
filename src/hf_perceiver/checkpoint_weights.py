"""Weights of transformers' built-in Perceiver, renamed as they are read; our own names match none of the patterns.

Imported by the modeling file, so that a checkpoint loads by code from the Hub as it does by the installed package.
"""

import re
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .checkpoint_names import ARCHITECTURES, FINAL_LAYER, FINAL_LAYERS, ROW_NAMES, weight_names

# Names count from the model's root: a user's part may hold anything further down.
ROOT = r"(?:^|(?<=^perceiver\.))"


class FirstRow(ConversionOps):
    """(1, C) -> (C,), or back."""

    def __init__(self, back: bool = False):
        self.back = back

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Tensor]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {full_layer_name: tensor[None] if self.back else tensor[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        return FirstRow(not self.back)


def renaming(builtin: str, ours: str) -> WeightRenaming:
    """From the built-in's name to ours, up to a dot or the end; `#` is a number."""
    return WeightRenaming(_pattern(builtin), ours.replace("#", r"\1"))


def _pattern(name: str) -> str:
    return ROOT + re.escape(name).replace(r"\#", r"(\d+)")


def final_layer_renamings(config: Any) -> list[WeightRenaming]:
    """The name that transformers cannot tell by itself: what it is depends on the model it is for."""
    kind = (config.postprocessor or {}).get("kind")
    return [renaming(FINAL_LAYER, FINAL_LAYERS[kind])] if kind in FINAL_LAYERS else []


def _conversions() -> list[WeightRenaming | WeightConverter]:
    names = {pair: None for architecture in ARCHITECTURES for pair in weight_names(architecture)}
    made: list[WeightRenaming | WeightConverter] = [
        renaming(*pair) for pair in names if pair not in ROW_NAMES and pair[0] != FINAL_LAYER
    ]
    return made + [WeightConverter(_pattern(builtin), ours, [FirstRow()]) for builtin, ours in ROW_NAMES]


register_checkpoint_conversion_mapping("perceiver_io", _conversions(), overwrite=True)
