"""The demo runs on the bundled checkpoints, prints what it did and writes its pictures."""

import numpy as np
import pytest
from PIL import Image

from hf_perceiver import bundled_checkpoint, demo
from hf_perceiver.flow_files import warp


@pytest.mark.medium
def test_demo_prints_candidates_and_writes_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    assert "one byte:" in printed and "the word:" in printed and "%" in printed
    assert "end-point error" in printed and "zero flow" in printed and "PSNR video" in printed
    names = ["digits.png", "flow.png", "video.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in names:
        assert str(tmp_path / name) in printed
        with Image.open(tmp_path / name) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 10, name


@pytest.mark.parametrize(
    ("angle", "scale", "shift"), [(0.0, 1.0, (5.0, -2.0)), (2.0, 1.03, (1.0, 1.0)), (7.0, 0.9, (2, 3))]
)
def test_a_moved_photo_and_its_flow_belong_together(angle, scale, shift):
    """Looked up where the flow leads, the second frame is the first but for what two interpolations blur."""
    (first, second), flow = demo.moved_photo("china.jpg", angle, scale, shift)
    warped, valid = warp(second, flow)
    still, moved = (np.abs(frame.astype(int) - first)[valid].mean() for frame in (second, warped))
    assert valid.mean() > 0.7 and moved < 0.25 * still
    if (angle, scale) == (0.0, 1.0):
        assert moved == 0  # whole pixels


def test_word_candidates_are_as_long_as_the_gap_and_ranked():
    from transformers import pipeline

    fill = pipeline("fill-mask", model=bundled_checkpoint("language"))
    candidates = demo.fill_word(fill, "Return the number of elements.", 11, 17)
    scores = [score for _, score in candidates]
    assert all(len(word.encode()) == 6 or "\N{REPLACEMENT CHARACTER}" in word for word, _ in candidates)
    assert scores == sorted(scores, reverse=True) and 0 < scores[0] <= 1


def test_mark_says_the_rank_or_that_there_is_none():
    assert "rank 2" in demo.mark([("a", 0.5), ("b", 0.2)], "b")
    assert "not among" in demo.mark([("a", 0.5)], "z")
