"""What optical flow is measured by: end-point error and shares of outliers, of one pair and of a data set."""

from typing import Any

import numpy as np

from .flow_files import check_flow

OUTLIER_THRESHOLDS = (1, 3, 5)  # pixels
# By the length of the true flow in pixels: MPI Sintel's s0-10, s10-40 and s40+.
SPEEDS = {"epe_s0_10": (0, 10), "epe_s10_40": (10, 40), "epe_s40": (40, np.inf)}


def flow_metrics(predicted: Any, target: Any, valid: Any = None) -> dict[str, float | None]:
    """Predicted and true flow (H, W, 2) in pixels, valid (H, W) or None -> the metrics of one pair

    "epe": mean distance of the two flows' end points in pixels; "epe_s0_10", "epe_s10_40", "epe_s40": the same where the
    true flow is [0, 10), [10, 40), [40, inf) px long. "1px", "3px", "5px": share (0 to 1) of the pixels that are off by
    more; "fl_all": by more than 3 px and more than 5 % of the true length. "num_pixels": how many are valid. What would
    be over no pixel is None.
    Raises ValueError for other shapes, for a predicted flow that is not finite, wherever it stands, and for a true one
    that is not finite where it is valid.
    """
    return _means(_sums(predicted, target, valid))


class FlowMetrics:
    """The metrics of a data set: `update` with pair after pair, then `per_pixel` and `per_pair`.

    Benchmarks differ in what they average. EPE on MPI Sintel and KITTI 2015's Fl-all are over all pixels of the data set
    (`per_pixel`; Sintel masks none out). EPE on KITTI is in papers, since RAFT's evaluation, the mean of the pairs' EPEs
    (`per_pair`): their numbers of valid pixels differ.
    """

    def __init__(self) -> None:
        self._pairs: list[dict[str, tuple[float, int]]] = []

    def __len__(self) -> int:
        """Pairs so far."""
        return len(self._pairs)

    def update(self, predicted: Any, target: Any, valid: Any = None) -> dict[str, float | None]:
        """Add one pair; returns its own metrics, those of `flow_metrics`."""
        self._pairs.append(_sums(predicted, target, valid))
        return _means(self._pairs[-1])

    def per_pixel(self) -> dict[str, float | None]:
        """Every valid pixel counts the same."""
        return _means(
            {name: (sum(total for total, _ in s), sum(n for _, n in s)) for name, s in self._by_name().items()}
        )

    def per_pair(self) -> dict[str, float | None]:
        """Every pair counts the same; one without a pixel for a metric is left out of that metric."""
        each = {name: [total / n for total, n in sums if n] for name, sums in self._by_name().items()}
        means: dict[str, float | None] = {name: sum(v) / len(v) if v else None for name, v in each.items()}
        return {**means, "num_pixels": self.per_pixel()["num_pixels"]}

    def _by_name(self) -> dict[str, list[tuple[float, int]]]:
        if not self._pairs:
            raise ValueError("no pair was measured yet; call update(predicted, target) for each")
        return {name: [pair[name] for pair in self._pairs] for name in self._pairs[0]}


def _sums(predicted: Any, target: Any, valid: Any) -> dict[str, tuple[float, int]]:
    """For each metric its sum over the pixels it is about, and their number."""
    target, valid = check_flow(target, valid, "target flow")
    predicted, _ = check_flow(predicted, name="predicted flow")
    if predicted.shape != target.shape:
        raise ValueError(f"the predicted flow is {predicted.shape}, the target flow {target.shape}; they must be alike")
    predicted, target = predicted[valid].astype(np.float64), target[valid].astype(np.float64)  # (pixels, 2)
    error, length = np.hypot(*(predicted - target).T), np.hypot(*target.T)
    values = {"epe": error}
    values |= {f"{limit}px": error > limit for limit in OUTLIER_THRESHOLDS}
    values["fl_all"] = (error > 3) & (error > 0.05 * length)
    values |= {name: error[(length >= low) & (length < high)] for name, (low, high) in SPEEDS.items()}
    return {name: (float(v.sum()), len(v)) for name, v in values.items()}


def _means(sums: dict[str, tuple[float, int]]) -> dict[str, float | None]:
    means = {name: total / n if n else None for name, (total, n) in sums.items()}
    return {**means, "num_pixels": sums["epe"][1]}
