"""Batches of dicts of modalities, for Trainer and DataLoader, also where examples lack some.

Trainer(model, data_collator=ModalityCollator(reconstruct=["audio", "image", "label"]), ...)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses import IGNORED


class ModalityCollator:
    """Examples {"inputs": {name: array}, "labels": ...} -> a batch of tensors, with masks where something is missing.

    An input that an example leaves out, or has as None, is zeros and False in its mask (B,); one that no example has is
    left out. Inputs of unequal length, texts or sets, are padded with zeros, and their mask is (B, length). Labels are a
    dict too, an array or a number; missing ones are -100. An example may bring its own "attention_mask" by modality.
    reconstruct: outputs whose labels are the inputs of that name themselves, for autoencoding.
    Raises ValueError for inputs that cannot be stacked.
    """

    def __init__(self, reconstruct: Sequence[str] = ()):
        self.reconstruct = tuple(reconstruct)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for example in examples:
            if not isinstance(example.get("inputs"), Mapping):
                raise ValueError(f"an example holds a dict of modalities as 'inputs'; this one has {sorted(example)}")
        inputs, masks = {}, {}
        for name in _names([example["inputs"] for example in examples]):
            values = [_as_tensor(example["inputs"].get(name)) for example in examples]
            inputs[name], there = stack(name, values, 0)
            own = [_as_tensor((example.get("attention_mask") or {}).get(name)) for example in examples]
            if any(mask is not None for mask in own):
                whole = [None if value is None else torch.ones(value.shape[:1], dtype=torch.bool) for value in values]
                own = [a if a is None or b is None else b for a, b in zip(whole, own, strict=True)]
                there = stack(f"the mask of {name}", own, 0)[0] != 0
            if not there.all():
                masks[name] = there
        batch: dict[str, Any] = {"inputs": inputs}
        if masks:
            batch["attention_mask"] = masks
        labels = self._labels(examples)
        if labels is not None:
            batch["labels"] = labels
        return batch

    def _labels(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        given = [example.get("labels") for example in examples]
        if not self.reconstruct and all(labels is None for labels in given):
            return None
        if not self.reconstruct and not any(isinstance(labels, Mapping) for labels in given):
            return stack("labels", [_as_tensor(labels) for labels in given], IGNORED)[0]
        by_name: list[dict[str, Any]] = []
        for example, labels in zip(examples, given, strict=True):
            if labels is not None and not isinstance(labels, Mapping):
                raise ValueError(
                    f"labels are a dict by output in every example, or in none, not {type(labels).__name__}"
                )
            by_name.append({**{name: example["inputs"].get(name) for name in self.reconstruct}, **(labels or {})})
        return {
            name: stack(f"the labels of {name}", [_as_tensor(labels.get(name)) for labels in by_name], IGNORED)[0]
            for name in _names(by_name)
        }


def stack(what: str, values: Sequence[Tensor | None], fill: int) -> tuple[Tensor, Tensor]:
    """Arrays (n, ...) of one example each -> (B, longest n, ...), `fill` where there is nothing, and what is there.

    The second is (B,) bool, or (B, longest n) where lengths differ.
    """
    known = [value for value in values if value is not None]
    shapes = {tuple(value.shape[1:]) for value in known} | {value.ndim for value in known}
    if len(shapes) != 2:
        raise ValueError(f"{what} have shapes that cannot be stacked: {sorted({tuple(v.shape) for v in known})}")
    dtype = known[0].dtype
    if fill < 0 and len(known) < len(values) and not dtype.is_signed:
        dtype = torch.promote_types(dtype, torch.int16)  # which holds the mark that an unsigned one cannot
    lengths = [0 if value is None else (len(value) if value.ndim else 1) for value in values]
    longest, scalar = max(lengths), known[0].ndim == 0
    rows = torch.full((len(values), *(() if scalar else (longest, *known[0].shape[1:]))), fill, dtype=dtype)
    for row, value, length in zip(rows, values, lengths, strict=True):
        if value is not None and scalar:
            row.fill_(value.item())
        elif value is not None:
            row[:length] = value
    if len(set(lengths) - {0}) <= 1:
        return rows, torch.tensor([length > 0 for length in lengths])
    return rows, torch.arange(longest) < torch.tensor(lengths)[:, None]


def _names(dicts: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for given in dicts for name, value in given.items() if value is not None})


def _as_tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value)
