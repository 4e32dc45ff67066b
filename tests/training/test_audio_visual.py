import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_perceiver.training.audio_visual import (
    SpecAugment,
    autoencoding_scores,
    average_clips,
    classification_metrics,
    clip_starts,
    clips_of,
    mean_average_precision,
    mean_scores,
    psnr,
    stripes,
    top_k_accuracy,
)

# --- SpecAugment


def test_stripes_are_whole_and_not_too_wide():
    hidden = stripes(1, 4, 500, 9)
    edges = torch.nn.functional.pad(hidden.int(), (1, 1)).diff(dim=1)
    assert (edges.abs().sum(dim=1) <= 2).all(), "one stretch, or none"
    widths = hidden.sum(dim=1)
    # Every width from 0 to 4 equally often: 100 each, three standard deviations are 27.
    assert ((widths.bincount(minlength=5) - 100).abs() < 27).all() and widths.max() == 4
    assert hidden.any(dim=0).all()
    assert stripes(2, 100, 50, 9).shape == (50, 9)
    assert not stripes(0, 4, 2, 9).any()


def test_hidden_stripes_are_the_mean_and_the_rest_is_untouched():
    torch.manual_seed(0)
    x = torch.randn(20, 60, 80)
    out = SpecAugment()(x)
    changed = out != x
    rows = changed.all(dim=2).sum(dim=1)
    columns = changed.all(dim=1).sum(dim=1)
    assert 0 < rows.max() <= 20 and 0 < columns.max() <= 32
    torch.testing.assert_close(out[changed], x.mean(dim=(1, 2))[:, None, None].expand_as(x)[changed])
    # Nothing but whole rows and columns.
    stripes_only = changed.all(dim=2, keepdim=True) | changed.all(dim=1, keepdim=True)
    assert torch.equal(changed, stripes_only)


def test_spectrograms_are_hidden_as_the_seed_says():
    x = torch.randn(3, 60, 80)

    def drawn(seed):
        return SpecAugment()(x, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert SpecAugment()(x[0]).shape == (60, 80)
    assert torch.equal(SpecAugment(0, 10, 0, 10)(x), x)
    with pytest.raises(ValueError, match=r"a spectrogram is \(batch, time, bands\) or \(time, bands\), not \(3,\)"):
        SpecAugment()(x[:, 0, 0])
    with pytest.raises(ValueError, match="whole numbers from 0, not -1"):
        SpecAugment(largest_time=-1)


# --- several clips


def test_clips_are_spread_over_the_whole_video():
    """AudioSet: 10 s at 25 fps, 16 overlapping clips of 32 frames."""
    starts = clip_starts(250)
    assert len(starts) == 16 and starts[0] == 0 and starts[-1] == 250 - 32
    assert set(np.diff(starts)) <= {14, 15}
    assert clip_starts(32) == [0] * 16
    assert clip_starts(40, num_clips=1) == [4]
    with pytest.raises(ValueError, match="a video of 31 frames is shorter than a clip of 32; pad it, or loop it"):
        clip_starts(31)
    with pytest.raises(ValueError, match="num_clips is a whole number from 1, not 0"):
        clip_starts(40, num_clips=0)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_the_sound_of_a_clip_is_that_of_its_frames(kind):
    video, sound = np.arange(40), np.arange(40 * 3)
    clips = clips_of(kind(video), kind(sound), clip_frames=8, num_clips=5)
    assert type(clips["image"]) is type(kind(video))
    assert [row.tolist() for row in clips["image"]] == [list(range(s, s + 8)) for s in (0, 8, 16, 24, 32)]
    assert [row.tolist() for row in clips["audio"]] == [list(range(3 * s, 3 * s + 24)) for s in (0, 8, 16, 24, 32)]
    assert set(clips_of(kind(video), clip_frames=8)) == {"image"}
    with pytest.raises(ValueError, match="119 samples are not as many for each of 40 frames"):
        clips_of(kind(video), kind(sound)[:-1], clip_frames=8)


def test_clips_are_averaged_as_probabilities():
    logits = torch.randn(6, 4)
    for problem, squash in ((None, torch.softmax), ("multi_label_classification", lambda x, dim: x.sigmoid())):
        got = average_clips(logits.numpy(), 3, problem)
        want = torch.stack([squash(logits[:3], dim=-1).mean(0), squash(logits[3:], dim=-1).mean(0)])
        np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"scores are \(videos \* 4 clips, classes\), not \(6, 4\)"):
        average_clips(logits, 4)


# --- metrics


def test_average_precision_ranks_the_examples_of_each_class():
    """Worked out by hand: precisions 1 and 2/3 at the positives of the first class, 1/2 of the second; none has the third.

    Over the examples, transposed, it would be the mean of 1, 1/2 and 1/2.
    """
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    scores = np.array([[0.9, 0.1, 0.5], [0.5, 0.2, 0.6], [0.4, 0.3, 0.7]])
    want = ((1 + 2 / 3) / 2 + 1 / 2) / 2
    assert mean_average_precision(labels, scores) == pytest.approx(want)
    assert mean_average_precision(labels, labels * 1.0) == 1
    with pytest.raises(
        ValueError, match=r"labels and scores are \(examples, classes\) both, not \(3, 3\) and \(2, 3\)"
    ):
        mean_average_precision(labels, scores[:2])
    with pytest.raises(ValueError, match="no example has a label"):
        mean_average_precision(labels * 0, scores)


def test_top_k_counts_labels_among_the_highest_scores():
    scores = np.array([[0.1, 0.5, 0.3, 0.2], [0.7, 0.1, 0.15, 0.05]])
    assert top_k_accuracy(np.array([2, 0]), scores, 1) == 0.5
    assert top_k_accuracy(np.array([2, 0]), scores, 2) == 1
    assert top_k_accuracy(np.array([3, 3]), scores, 4) == 1
    assert top_k_accuracy(np.array([1, 0]), scores[:, :2], 1) == 1


def test_metrics_of_videos_average_their_clips():
    """Either clip alone would give the second video the wrong class."""
    logits = np.log(np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.5, 0.45, 0.05], [0.05, 0.45, 0.5]]))
    compute = classification_metrics(num_clips=2, top_k=(1, 2))
    assert compute(EvalPrediction(logits, np.array([0, 0, 1, 1]))) == {"top_1_accuracy": 1.0, "top_2_accuracy": 1.0}
    assert compute(EvalPrediction(logits, np.array([-100, -100, 0, 0])))["top_1_accuracy"] == 0
    with pytest.raises(ValueError, match="clips of one video have one label; these sets of 2 differ"):
        compute(EvalPrediction(logits, np.array([0, 1, 1, 1])))
    several = classification_metrics(2, "multi_label_classification")
    labels = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    assert several(EvalPrediction(logits, labels)) == {"mean_average_precision": 1.0}


def test_psnr_is_that_of_each_example():
    """An error of a tenth of the peak is 20 dB, whatever the peak."""
    target = torch.rand(3, 4, 5)
    error = torch.tensor([0.1, 0.01, 1.0])[:, None, None]
    torch.testing.assert_close(psnr(target + error, target), torch.tensor([20.0, 40.0, 0.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(psnr(2 * target + 2 * error, 2 * target, peak=2.0), psnr(target + error, target))
    assert math.isinf(psnr(target, target)[0])
    with pytest.raises(ValueError, match=r"PSNR compares arrays of one shape, not \(3, 4, 5\) and \(3, 5, 4\)"):
        psnr(target, target.mT)


def test_an_autoencoders_scores_are_taken_by_clip_and_averaged():
    image = torch.rand(2, 2, 3, 4, 5)
    labels = {"image": image.clone(), "audio": torch.zeros(2, 8, 1), "label": torch.tensor([1, -100])}
    labels["image"][1] = -100
    logits = {
        "image": image.movedim(2, -1) + 0.1,
        "audio": torch.tensor([0.1, 0.01])[:, None].expand(2, 8),
        "label": torch.eye(3)[[1, 0]],
    }
    scores = autoencoding_scores(logits, labels)
    assert scores["image_psnr"][0] == pytest.approx(20, abs=1e-3) and scores["image_psnr"][1].isnan()
    assert scores["audio_psnr"].tolist() == pytest.approx([20, 40], abs=1e-3)
    assert scores["label_accuracy"][0] == 1 and scores["label_accuracy"][1].isnan()
    means = mean_scores(EvalPrediction({name: values.numpy() for name, values in scores.items()}, None))
    assert means == pytest.approx({"image_psnr": 20, "audio_psnr": 30, "label_accuracy": 1}, abs=1e-3)
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    again = autoencoding_scores(logits, {"label": one_hot})["label_accuracy"]
    assert again[0] == 1 and again[1].isnan()
