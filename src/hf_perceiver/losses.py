"""What the heads train on. Every loss is a sum over labelled items divided by their number: the batch's own, or
`num_items_in_batch` over all accumulated batches and devices, which Trainer passes so that accumulation changes nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_perceiver_io import PROBLEM_TYPES

IGNORED = -100
# What a modality's output can be compared by.
POINT_LOSSES = ("l1", "mse", "cross_entropy")
FLOW_LOSSES = ("epe", "l1", "charbonnier")


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
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    # Of nothing labelled, which chance brings about too, the loss is 0.
    return total / (count.to(total.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


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


def flow_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    kind: str = "epe",
    scale_factor: float = 20.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Logits (..., 2), labels (..., 2) in pixels, a weight for each point (...) -> the mean error in pixels.

    Logits times `scale_factor` are pixels. In float32 or wider. kind: "epe", the distance |e|; "l1", |e_x| + |e_y|;
    "charbonnier", (|e|^2 + 0.001^2)^0.45, in which far-off points count for less (Sun, Roth and Black, 2014).
    num_items_in_batch counts both channels of a labelled point, as Trainer does.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"flow labels have the shape {tuple(logits.shape)} here, not {tuple(labels.shape)}")
    flow = _wide(logits) * scale_factor
    weights = weights.to(flow.device)
    # Where nothing counts there may be anything, and 0 times NaN is NaN.
    error = flow - labels.to(flow).where(weights[..., None] != 0, 0)
    if kind == "epe":
        # Its gradient at no error is 0 in torch, where that of a square root would be NaN.
        errors = torch.linalg.vector_norm(error, dim=-1)
    elif kind == "l1":
        errors = error.abs().sum(dim=-1)
    elif kind == "charbonnier":
        errors = (error.square().sum(dim=-1) + 1e-6) ** 0.45
    else:
        raise ValueError(f"flow_loss={kind!r} must be one of {', '.join(FLOW_LOSSES)}")
    total = (errors * weights.to(errors.dtype)).sum()
    count = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch) / 2
    return total / count.to(total.device).clamp(min=1)


def labelled_points(labels: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """Flow labels (..., 2) -> (...) bool: a label is not -100 in both channels, and valid in the mask.

    Raises ValueError for labels that are no flow, and for NaN or infinity where the mask does not say False.
    """
    if not labels.is_floating_point() or labels.ndim < 3 or labels.shape[-1] != 2:
        hint = "; move the channels last" if labels.ndim == 4 and labels.shape[1] == 2 else ""
        raise ValueError(
            f"flow labels are floating-point pixels (batch, height, width, 2), x then y, not {tuple(labels.shape)} "
            f"{labels.dtype}{hint}"
        )
    valid = (labels != IGNORED).any(dim=-1)
    if valid_mask is not None:
        if valid_mask.shape != valid.shape:
            raise ValueError(f"valid_mask has the labels' shape {tuple(valid.shape)}, not {tuple(valid_mask.shape)}")
        valid = valid & (valid_mask.to(valid.device) != 0)
    if not (labels.is_meta or torch.compiler.is_compiling()):
        bad = int((valid & ~labels.isfinite().all(dim=-1)).sum())
        if bad:
            raise ValueError(
                f"flow labels are NaN or infinite at {bad} points; where there is no label put -100 into both channels, or "
                "False into valid_mask"
            )
    return valid


def draw_labelled(valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` flat indices (B, count) of valid points (B, P), at random without repeats, and a weight for each.

    Weighted so, a sum over the drawn points is on average the sum over all valid ones: each stands for its share of
    them. Where an example has fewer, all are drawn, and others beside them that weigh nothing.
    """
    keys = torch.randint(2**62, valid.shape, device=valid.device).masked_fill(~valid, -1)
    points = keys.topk(count, dim=1).indices
    total = valid.sum(dim=1, keepdim=True)  # (B, 1)
    share = total / total.clamp(min=1, max=count)
    return points, valid.gather(1, points) * share


def point_loss(kind: str, predicted: Tensor, targets: Tensor) -> Tensor:
    """Outputs (B, n, K) against values (B, n, K), or class indices (B, n) -> (B, n), the mean over K for "l1" and "mse".

    0 where there is no target: class -100, or -100 in all K values. Raises ValueError for targets that are no numbers.
    """
    predicted, targets = _wide(predicted), targets.to(predicted.device)
    if kind == "cross_entropy" and not targets.is_floating_point():
        check_classes(targets, predicted.shape[-1])
        return F.cross_entropy(predicted.movedim(-1, 1), targets.long(), ignore_index=IGNORED, reduction="none")
    targets = targets.to(predicted.dtype)
    if _readable(targets) and targets.isnan().any():
        raise ValueError("labels hold NaN; mark what has no target with -100 in all its values")
    if kind == "cross_entropy":
        losses = -(targets * predicted.log_softmax(dim=-1)).sum(dim=-1)
    else:
        distance = F.l1_loss if kind == "l1" else F.mse_loss
        losses = distance(predicted, targets, reduction="none").mean(dim=-1)
    return losses.masked_fill(~has_target(targets), 0.0)


def has_target(targets: Tensor) -> Tensor:
    """Values (B, n, K), or class indices (B, n) -> (B, n) bool"""
    return (targets != IGNORED).any(dim=-1) if targets.ndim == 3 else targets != IGNORED


def modality_loss(kind: str, predicted: Tensor, targets: Tensor, labelled_share: Tensor | None = None) -> Tensor:
    """The mean over the examples of each one's mean over its labelled points; 0 for an example that has none.

    It is divided by the examples, labelled or not, so that batches of one size average to the large batch's loss,
    accumulated or on several devices. labelled_share (B,): of the points that these were drawn from, by default theirs.
    """
    losses = point_loss(kind, predicted, targets)
    share = has_target(targets).float().mean(dim=1) if labelled_share is None else labelled_share.to(losses.device)
    # Unbiased for drawn points: the share is the whole's, and not that of the draw.
    return (losses.mean(dim=1) / torch.where(share > 0, share, 1.0)).mean()


def targets_of_points(
    kind: str, labels: Tensor, num_points: int, channels: int, grid: tuple[int, ...] | None = None
) -> Tensor:
    """A modality's labels (B, ...) in any usual layout -> values (B, num_points, channels), or classes (B, num_points)

    Values are laid out as the output, channels last, or as the input: images with channels before height and width,
    sound in one row. For "cross_entropy", integers without channels are classes. Raises ValueError for another shape.
    """
    grid = grid or (num_points,)
    batch, shape = labels.shape[0], tuple(labels.shape[1:])
    of_points = {grid, (num_points,)} | ({()} if num_points == 1 else set())
    # A picture 3 pixels high and wide is both; the model's inputs have their channels first.
    if len(grid) > 1 and shape == (*grid[:-2], channels, *grid[-2:]):
        return labels.movedim(-3, -1).reshape(batch, num_points, channels)
    if kind == "cross_entropy" and shape in of_points and not labels.is_floating_point():
        return labels.reshape(batch, num_points)
    rows = {(num_points * channels,), (num_points * channels, 1)}
    if shape in {(*points, channels) for points in of_points} | rows | (of_points if channels == 1 else set()):
        return labels.reshape(batch, num_points, channels)
    classes = f", or class indices {(batch, *grid)} of an integer type" if kind == "cross_entropy" else ""
    raise ValueError(
        f"labels of the shape {tuple(labels.shape)} do not fit an output of {'x'.join(map(str, grid))} points of "
        f"{channels} values; give values {(batch, *grid, channels)}{classes}"
    )


def draw_points(num_points: int, num_drawn: int, batch_size: int, device: torch.device) -> Tensor:
    """(B, num_drawn) different indices below num_points for each example, every one of them equally likely.

    One from each of `num_drawn` stretches, all turned by a random step: even cover, and no table of all points.
    """
    edges = torch.arange(num_drawn + 1, device=device) * num_points // num_drawn
    start, width = edges[:-1], edges.diff()
    within = (torch.rand(batch_size, num_drawn, device=device) * width).long().minimum(width - 1)
    turn = torch.randint(num_points, (batch_size, 1), device=device)
    return (start + within + turn) % num_points


def _wide(logits: Tensor) -> Tensor:
    # Sums over a vocabulary or a batch lose too much in 16 bits.
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _readable(values: Tensor) -> bool:
    # Reading values back would break the graph or stall the device, where the kernel asserts itself.
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a class index outside 0 .. num_classes - 1 that is not -100."""
    if not _readable(labels):
        return
    bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if bad.numel():
        raise ValueError(f"label {int(bad[0])} is outside 0..{num_classes - 1}; -100 marks what has no label")
