"""What the heads train on. Every loss is a sum over labelled items divided by their number: the batch's own, or
`num_items_in_batch` over all accumulated batches and devices, which Trainer passes so that accumulation changes nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_perceiver_io import PROBLEM_TYPES

IGNORED = -100


def cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """(..., K) scores against (...) class indices, -100 = no label; in float32 or wider.

    Raises ValueError for a label outside 0 .. K - 1.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels have the shape {tuple(logits.shape[:-1])} here, not {tuple(labels.shape)}")
    check_classes(labels, logits.shape[-1])
    total = F.cross_entropy(
        _wide(logits).flatten(0, -2), labels.to(logits.device).flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = (labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None, num_items_in_batch: Tensor | int | None = None
) -> tuple[Tensor, str]:
    """Scores (B, K) and labels -> the loss and the problem type, told from the labels where it is None.

    "regression": (B,) or (B, K) numbers; "single_label_classification": (B,) indices or (B, K) soft labels that sum to
    one; "multi_label_classification": (B, K) zeros and ones.
    """
    num_labels = logits.shape[-1]
    if problem_type is None:
        if num_labels == 1:
            problem_type = "regression"
        elif labels.is_floating_point():
            problem_type = "multi_label_classification"
        else:
            problem_type = "single_label_classification"
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type={problem_type!r} must be one of {', '.join(PROBLEM_TYPES)}, or None")
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification" and not labels.is_floating_point():
        return cross_entropy(logits, labels, num_items_in_batch), problem_type
    wanted = logits.shape if labels.ndim == logits.ndim or num_labels != 1 else logits.shape[:-1]
    if labels.shape != wanted:
        raise ValueError(f"labels for {problem_type} have the shape {tuple(wanted)} here, not {tuple(labels.shape)}")
    logits = _wide(logits)
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        losses = F.mse_loss(logits, labels, reduction="none")
    elif problem_type == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    else:
        losses = -(labels * logits.log_softmax(dim=-1))
        # Trainer counts every entry of a (B, K) label as an item.
        count = labels.shape[0] if num_items_in_batch is None else num_items_in_batch / num_labels
        return losses.sum() / count, problem_type
    return losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch), problem_type


def _wide(logits: Tensor) -> Tensor:
    # Sums over a vocabulary or a batch lose too much in 16 bits.
    return logits.float() if logits.dtype.itemsize < 4 else logits


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a class index outside 0 .. num_classes - 1 that is not -100."""
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return  # reading values back would break the graph or stall the device, where the kernel asserts itself
    bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if bad.numel():
        raise ValueError(f"label {int(bad[0])} is outside 0..{num_classes - 1}; -100 marks what has no label")
