"""The demo runs on the bundled checkpoints, prints what it did and writes its picture."""

import numpy as np
import pytest
from PIL import Image

from hf_perceiver import bundled_checkpoint, demo


@pytest.mark.medium
def test_demo_prints_candidates_and_writes_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    assert "one byte:" in printed and "the word:" in printed and "%" in printed
    assert str(tmp_path / "digits.png") in printed
    with Image.open(tmp_path / "digits.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[0] > 300 and pixels.std() > 10
    assert [p.name for p in tmp_path.iterdir()] == ["digits.png"]


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
