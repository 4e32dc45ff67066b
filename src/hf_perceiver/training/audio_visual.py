"""Training and evaluating models of sound and video: SpecAugment, several clips of a video, mAP, top-k and PSNR.

Sources: Perceiver (arXiv 2103.03206), section 4.2; Perceiver IO (arXiv 2107.14795), section 4.3 and appendix C. What both
drop, 30 % of the videos and 10 % of the spectrograms, is the preprocessor's option `dropout_probs`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from transformers import EvalPrediction

from ..losses import IGNORED, has_target, targets_of_points

# Of video in [0, 1], and of sound in [-1, 1]: the largest amplitude. With its range, 2, sound would have 6.02 dB more.
PEAKS = {"image": 1.0, "audio": 1.0}


class SpecAugment:
    """Log-mel spectrograms (B, time, bands) or (time, bands) -> with stripes of time and frequency at their mean.

    Each stripe's width is drawn from 0 to the largest, its place from all that fit it. The first Perceiver does not say
    its own sizes; the number of stripes is SpecAugment's (arXiv 1904.08779), their widths are set for 60 x 80 values.
    """

    def __init__(
        self, num_times: int = 2, largest_time: int = 10, num_frequencies: int = 2, largest_frequency: int = 16
    ):
        for value in (num_times, largest_time, num_frequencies, largest_frequency):
            if value < 0:
                raise ValueError(f"numbers and widths of stripes are whole numbers from 0, not {value}")
        self.time = (num_times, largest_time)
        self.frequency = (num_frequencies, largest_frequency)

    def __call__(self, spectrogram: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if spectrogram.ndim not in (2, 3):
            raise ValueError(f"a spectrogram is (batch, time, bands) or (time, bands), not {tuple(spectrogram.shape)}")
        rows = spectrogram if spectrogram.ndim == 3 else spectrogram[None]
        hidden = stripes(*self.time, len(rows), rows.shape[1], generator).to(rows.device)[:, :, None]
        hidden = hidden | stripes(*self.frequency, len(rows), rows.shape[2], generator).to(rows.device)[:, None]
        return torch.where(hidden, rows.mean(dim=(1, 2), keepdim=True), rows).reshape(spectrogram.shape)


def stripes(count: int, largest: int, batch: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """(batch, length) bool, True in `count` stripes of up to `largest` places"""
    if not count:
        return torch.zeros(batch, length, dtype=torch.bool)
    width = (torch.rand(batch, count, 1, generator=generator) * (min(largest, length) + 1)).long()
    start = (torch.rand(batch, count, 1, generator=generator) * (length - width + 1)).long()
    places = torch.arange(length)
    return ((places >= start) & (places < start + width)).any(dim=1)


def clip_starts(num_frames: int, clip_frames: int = 32, num_clips: int = 16) -> list[int]:
    """First frames of `num_clips` clips spread evenly over a video, from its first frame to its last.

    Raises ValueError for a video shorter than a clip.
    """
    if num_frames < clip_frames:
        raise ValueError(f"a video of {num_frames} frames is shorter than a clip of {clip_frames}; pad it, or loop it")
    if num_clips < 1:
        raise ValueError(f"num_clips is a whole number from 1, not {num_clips}")
    if num_clips == 1:
        return [(num_frames - clip_frames) // 2]
    return [round(i * (num_frames - clip_frames) / (num_clips - 1)) for i in range(num_clips)]


def clips_of(image: Any, audio: Any = None, clip_frames: int = 32, num_clips: int = 16) -> dict[str, Any]:
    """A video (T, ...) and its sound (samples, ...) -> clips image (num_clips, clip_frames, ...), audio alike.

    Sound is cut where the frames are; it has the same number of samples for each of them. Arrays or tensors.
    """
    starts = clip_starts(len(image), clip_frames, num_clips)
    join = torch.stack if isinstance(image, Tensor) else np.stack
    clips = {"image": join([image[start : start + clip_frames] for start in starts])}
    if audio is not None:
        per_frame = len(audio) // len(image)
        if not per_frame or len(audio) % len(image):
            raise ValueError(
                f"{len(audio)} samples are not as many for each of {len(image)} frames; cut or pad the sound to a multiple"
            )
        cut = [audio[start * per_frame : (start + clip_frames) * per_frame] for start in starts]
        clips["audio"] = (torch.stack if isinstance(audio, Tensor) else np.stack)(cut)
    return clips


def average_clips(logits: Any, num_clips: int, problem_type: str | None = None) -> np.ndarray:
    """Scores (videos * num_clips, K), the clips of a video one after another -> its mean probabilities (videos, K)"""
    logits = torch.as_tensor(logits).float()
    if logits.ndim != 2 or len(logits) % num_clips:
        raise ValueError(f"scores are (videos * {num_clips} clips, classes), not {tuple(logits.shape)}")
    several = problem_type == "multi_label_classification"
    probabilities = logits.sigmoid() if several else logits.softmax(dim=-1)
    return probabilities.unflatten(0, (-1, num_clips)).mean(dim=1).numpy()


def mean_average_precision(labels: Any, scores: Any) -> float:
    """mAP of labels (N, K) zeros and ones and scores (N, K): average precision over the examples, mean over the classes.

    Classes that no example has are left out. Over the examples, each ranking its classes, it would be another number:
    the transposition that the first paper corrects in its section F.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.shape != scores.shape or labels.ndim != 2:
        raise ValueError(f"labels and scores are (examples, classes) both, not {labels.shape} and {scores.shape}")
    present = labels.any(axis=0)
    if not present.any():
        raise ValueError("no example has a label; there is no precision to average")
    return float(average_precision_score(labels[:, present], scores[:, present], average="macro"))


def classification_metrics(
    num_clips: int = 1, problem_type: str | None = None, top_k: Sequence[int] = (1, 5)
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's `compute_metrics`: mAP for "multi_label_classification", top-k accuracy otherwise.

    num_clips: the evaluation set holds that many clips of each video, one after another, with the video's labels.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        scores = average_clips(prediction.predictions, num_clips, problem_type)
        labels = np.asarray(prediction.label_ids)
        by_clip = labels.reshape(len(scores), num_clips, *labels.shape[1:])
        if (by_clip != by_clip[:, :1]).any():
            raise ValueError(
                f"clips of one video have one label; these sets of {num_clips} differ, do not shuffle them"
            )
        labels = by_clip[:, 0]
        if problem_type == "multi_label_classification":
            return {"mean_average_precision": mean_average_precision(labels, scores)}
        known = labels != IGNORED
        return {f"top_{k}_accuracy": top_k_accuracy(labels[known], scores[known], k) for k in top_k}

    return compute


def top_k_accuracy(labels: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Share of the classes (N,) that are among the k highest of scores (N, K)"""
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((highest == labels[:, None]).any(axis=1).mean())


def psnr(predicted: Tensor, target: Tensor, peak: float = 1.0) -> Tensor:
    """(B, ...) and (B, ...) -> (B,) in dB, 10 log10(peak^2 / mean squared error) of each example"""
    if predicted.shape != target.shape:
        raise ValueError(f"PSNR compares arrays of one shape, not {tuple(predicted.shape)} and {tuple(target.shape)}")
    error = (predicted.float() - target.float()).square().flatten(1).mean(dim=1)
    return 20 * math.log10(peak) - 10 * error.log10()


def autoencoding_scores(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], peaks: Mapping[str, float] = PEAKS
) -> dict[str, Tensor]:
    """Outputs and labels by modality -> (B,) each: "image_psnr", "audio_psnr" in dB, "label_accuracy" 0 or 1.

    Outputs that are in `peaks` are values, others classes; NaN where an example has no label. As Trainer's
    `preprocess_logits_for_metrics` it keeps one number of each clip instead of the clip; `mean_scores` averages them.
    """
    scores = {}
    for name, given in labels.items():
        output, target = logits[name], given.to(logits[name].device)
        if name not in peaks:
            classes = target.argmax(dim=-1) if target.is_floating_point() else target
            right = (output.argmax(dim=-1) == classes).float()
            known = target.flatten(1).any(dim=1) if target.is_floating_point() else classes != IGNORED
            scores[f"{name}_accuracy"] = right.where(known, torch.nan)
            continue
        points = output if output.ndim > 2 else output[..., None]
        grid = tuple(points.shape[1:-1])
        flat = targets_of_points("l1", target, math.prod(grid), points.shape[-1], grid)
        known = has_target(flat).any(dim=1)
        scores[f"{name}_psnr"] = psnr(points.flatten(1, -2), flat, peaks[name]).where(known, torch.nan)
    return scores


def mean_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Trainer's `compute_metrics` after `autoencoding_scores`: the mean of each score over the examples that have it."""
    found: Any = prediction.predictions
    return {name: float(np.nanmean(values)) for name, values in found.items()}
