import csv
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_perceiver.heads_text import PerceiverIOForMaskedLM
from hf_perceiver.training import train_language
from hf_perceiver.training.byte_masking import IGNORED, MASK, ByteMasker, Windows, WindowSampler
from hf_perceiver.training.documentation import Document, Documentation
from hf_perceiver.training.train_language import (
    Settings,
    compare,
    evaluate_model,
    evaluation_sets,
    language_config,
    learning_rate,
    main,
    score,
    train,
    training_batch,
    words_share,
)

LENGTH = 48
QUICK = Settings(batch_size=4, warmup_steps=4, words_from_step=2, words_all_by_step=4, points_per_window=12)


def small_config():
    position = {"kind": "fourier", "num_bands": 8, "max_resolution": [LENGTH], "rule": "index"}
    return language_config(
        num_latents=12,
        d_latents=32,
        qk_channels=32,
        v_channels=32,
        num_self_attends_per_block=1,
        decoder_qk_channels=32,
        decoder_v_channels=32,
        preprocessor={"kind": "text", "channels": 15, "position": position, "combine": "concat"},
        output_query={"kind": "position", "position": dict(position), "concat_input": True},
    )


@pytest.fixture(scope="module")
def documentation() -> Documentation:
    words = (
        "the list of all items is read when it was made and then each one of them can be used for what it does".split()
    )
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=12)).capitalize() + "." for _ in range(300)]
    train_part = [Document(f"a{n}", "\n".join(texts[n * 10 : n * 10 + 10])) for n in range(25)]
    return Documentation(train_part, [Document("b", "\n".join(texts[250:]))], {"python": "3"})


def quiet(line: str) -> None:
    pass


def test_the_bundled_architecture_fits_its_file():
    with torch.device("meta"):
        model = PerceiverIOForMaskedLM(language_config())
    # 8 MB in bfloat16, with room for the header.
    assert sum(p.numel() for p in model.parameters()) < 3_990_000


def test_learning_rate_rises_stays_and_falls_over_the_last_quarter():
    settings = Settings(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate(step, settings, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:76] == pytest.approx([1.0] * 67)
    assert all(a > b for a, b in itertools.pairwise(rates[75:])) and 0 < rates[-1] < 0.05
    assert rates[:75] == [learning_rate(step, settings, None) for step in range(75)]


def test_whole_words_come_in_little_by_little():
    settings = Settings(words_share=0.6, words_from_step=10, words_all_by_step=20)
    assert [words_share(step, settings) for step in (0, 10, 15, 20, 99)] == pytest.approx([0, 0, 0.3, 0.6, 0.6])


def test_a_batch_asks_hidden_bytes_first_and_depends_on_seed_and_step(documentation):
    sampler = WindowSampler([d.text for d in documentation.train], LENGTH - 2)
    masker = ByteMasker(LENGTH)
    first, again, next_step = (training_batch(sampler, masker, step, QUICK) for step in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], next_step["input_ids"])
    asked = first["input_ids"].gather(1, first["points"])
    assert torch.equal(asked == MASK, first["hidden"])
    # As many hidden bytes as there are, up to the number of points, before any visible one.
    total = (first["input_ids"] == MASK).sum(1)
    assert torch.equal(first["hidden"].sum(1), total.clamp(max=QUICK.points_per_window))
    visible = ~first["hidden"] & (first["labels"] != IGNORED)
    assert visible.any() and torch.equal(asked[visible], first["labels"][visible])


def test_training_learns_writes_everything_and_repeats(documentation, tmp_path):
    runs = []
    for name in ("one", "two"):
        torch.manual_seed(7)  # a run depends on its own seed only
        torch.rand(len(name) + len(runs))
        run = train(
            documentation,
            tmp_path / name,
            settings=QUICK,
            config=small_config(),
            steps=12,
            evaluate_every=6,
            report=quiet,
        )
        runs.append(run)
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert runs[0]["held_out"] == runs[1]["held_out"]
    assert {p.name for p in one.iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("metrics.json", "README.md", "learning_curve.csv", "learning_curve.png"),
    }
    assert not list(one.glob("*partial*"))
    assert {tensor.dtype for tensor in load_file(one / "model.safetensors").values()} == {torch.bfloat16}
    assert PerceiverIOForMaskedLM.from_pretrained(one).dtype == torch.float32
    with open(one / "learning_curve.csv", newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [6, 12]
    metrics = json.loads((one / "metrics.json").read_text())
    assert metrics["steps"] == 12 and metrics["text"]["sha256"] == documentation.sha256()
    card = (one / "README.md").read_text()
    assert "--seed 0 --steps 12" in card and documentation.sha256() in card


def test_an_interrupted_run_ends_as_the_straight_one(documentation, tmp_path):
    options = {"settings": QUICK, "config": small_config(), "evaluate_every": 4, "report": quiet}
    train(documentation, tmp_path / "straight", steps=12, **options)

    def stop(line: str) -> None:
        if line.startswith("held-out") and (tmp_path / "broken" / "state" / "training.pt").exists():
            raise KeyboardInterrupt  # at step 8, with the state of step 4 on disk

    with pytest.raises(KeyboardInterrupt):
        train(documentation, tmp_path / "broken", steps=12, **{**options, "report": stop})
    train(documentation, tmp_path / "broken", steps=12, resume=True, **options)
    straight, resumed = (tmp_path / name / "model.safetensors" for name in ("straight", "broken"))
    assert straight.read_bytes() == resumed.read_bytes()


def test_minutes_choose_steps_that_repeat_the_run(documentation, tmp_path):
    options = {"settings": QUICK, "config": small_config(), "evaluate_every": 1000, "report": quiet}
    timed = train(documentation, tmp_path / "timed", minutes=0.02, **options)
    counted = train(documentation, tmp_path / "counted", steps=timed["steps"], **options)
    assert timed["steps"] > 4 and counted["steps"] == timed["steps"]
    timed_file, counted_file = (tmp_path / name / "model.safetensors" for name in ("timed", "counted"))
    assert timed_file.read_bytes() == counted_file.read_bytes()


def test_score_counts_bytes_and_wholly_right_words():
    windows = Windows(np.frombuffer(b"ab cd ef", np.uint8)[None].repeat(2, 0), np.array([8, 8]))
    masked = np.zeros((2, 8), bool)
    masked[0, [0, 1, 6, 7]] = True
    masked[1, [0, 1]] = True  # after another row's last word: still a word of its own
    guesses = np.frombuffer(b"abeXXb", np.uint8)
    assert score(windows, masked, guesses) == {"bytes": 4 / 6, "words": 1 / 3, "count": 6}
    with pytest.raises(ValueError, match="nothing is masked"):
        score(windows, np.zeros((2, 8), bool), guesses[:0])


class Parrot(torch.nn.Module):
    """Says byte 97 + i at place i, surer the further right; wrong where the byte to the right is hidden."""

    config = small_config()

    def forward(self, input_ids, attention_mask):
        places = torch.arange(input_ids.shape[1])
        next_ids = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)
        said = torch.where(next_ids == MASK, 6, 97 + places - 1 + 6)
        sureness = (1 + 0.01 * places).expand(said.shape)
        logits = torch.zeros(*input_ids.shape, 262).scatter_(2, said[..., None], sureness[..., None])
        return SimpleNamespace(logits=logits)


def test_filling_in_rounds_begins_with_the_most_confident_byte():
    windows = Windows((97 + np.arange(20, dtype=np.uint8))[None], np.array([20]))
    masked = np.zeros((1, 20), bool)
    masked[0, 4:8] = True
    assert evaluate_model(Parrot(), windows, masked)["bytes"] == 0.25
    assert evaluate_model(Parrot(), windows, masked, rounds=4)["bytes"] == 1.0
    assert evaluate_model(Parrot(), windows, masked, rounds=2)["bytes"] == 0.5


def test_evaluation_sets_are_the_same_each_time(documentation):
    one, two = (evaluation_sets(documentation, LENGTH, 20) for _ in range(2))
    for kind in one:
        assert (one[kind][1] == two[kind][1]).all() and (one[kind][0].text == two[kind][0].text).all()


def test_the_command_evaluates_a_saved_model(documentation, tmp_path, monkeypatch, capsys):
    train(documentation, tmp_path, settings=QUICK, config=small_config(), steps=2, evaluate_every=2, report=quiet)
    monkeypatch.setattr(train_language, "read_documentation", lambda: documentation)
    main(["--evaluate", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("model", "n-gram, order 5", "unigram"))
    table = compare(tmp_path, documentation, report=quiet)
    # The n-gram knows 23 words by heart, the unigram knows that a space comes most often.
    assert table["n-gram, order 5"]["single_bytes"] > table["unigram"]["single_bytes"] > 0.1


def test_bad_requests_are_named(documentation, tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        train(documentation, tmp_path, settings=QUICK, steps=1, minutes=1)
    with pytest.raises(ValueError, match="no run to resume"):
        train(documentation, tmp_path, settings=QUICK, config=small_config(), steps=1, resume=True, report=quiet)
    with pytest.raises(ValueError, match=r"words_share=1\.5"):
        Settings(words_share=1.5)
    train(documentation, tmp_path, settings=QUICK, config=small_config(), steps=1, evaluate_every=1, report=quiet)
    other = Documentation(documentation.held_out, documentation.train, {})
    with pytest.raises(ValueError, match="begun on another text"):
        train(other, tmp_path, settings=QUICK, config=small_config(), steps=1, resume=True, report=quiet)
