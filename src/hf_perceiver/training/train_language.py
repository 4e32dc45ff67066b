"""Train the small byte language model that ships with the package, from a seed, on documentation that is installed.

    python -m hf_perceiver.training.train_language --output DIR --minutes 60
    python -m hf_perceiver.training.train_language --output DIR --steps 12000     the same run again
    python -m hf_perceiver.training.train_language --resume DIR                   go on after an interruption
    python -m hf_perceiver.training.train_language --evaluate DIR                 model, n-gram and unigram

The learning rate rises, stays, and falls over the last quarter of the steps. `--minutes` starts the fall when three
quarters of the time are over; how many steps that made stands in metrics.json, and `--steps` with that number repeats
the run whatever the speed of the machine. Each step draws its windows and masks from (seed, step) alone, so an
interrupted run that is resumed equals one that was not.
"""

import argparse
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration_perceiver_io import PerceiverIOConfig
from ..heads_text import PerceiverIOForMaskedLM
from ..tokenization_perceiver_io import PerceiverIOTokenizer
from .byte_masking import (
    IGNORED,
    MASK,
    NUM_SPECIAL,
    ByteMasker,
    Windows,
    WindowSampler,
    held_out_windows,
    mask_bytes,
    mask_words,
)
from .documentation import Documentation, read_documentation
from .first_guess import start_from_frequencies
from .ngram import WHITESPACE, ByteNGram
from .storage import save_halved, write_text

MAX_LENGTH = 128  # tokens, [CLS] and [SEP] included
EVALUATION_SEED = 20_000  # of windows and masks; never a training step's
STATE = Path("state") / "training.pt"
ROUNDS = 8  # of filling in, in the second figure for whole words


@dataclass
class Settings:
    """What a run depends on, besides the text and the number of steps."""

    seed: int = 0
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    mask_rate: float = 0.15
    # Single bytes first: what stands next to a byte is learnt before whole words can be.
    words_share: float = 0.6
    words_from_step: int = 600
    words_all_by_step: int = 2000
    # Visible bytes that the model has to tell too, per window; they teach it early where things are.
    points_per_window: int = 32
    visible_weight: float = 0.1
    without_special_tokens: float = 0.1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.points_per_window < 1:
            raise ValueError(f"batch_size={self.batch_size} and points_per_window={self.points_per_window}: at least 1")
        if not 0 <= self.words_share <= 1:
            raise ValueError(f"words_share={self.words_share} is a share of the windows, 0 to 1")


def language_config(**changes: Any) -> PerceiverIOConfig:
    """The bundled model's architecture; `changes` are fields of the config."""
    position = {"kind": "fourier", "num_bands": 32, "max_resolution": [MAX_LENGTH], "rule": "index"}
    fields: dict[str, Any] = {
        "num_latents": 64,
        "d_latents": 256,
        "num_blocks": 1,
        "num_self_attends_per_block": 5,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 8,
        "qk_channels": 256,
        "v_channels": 256,
        "self_attention_widening_factor": 2,
        "cross_attention_widening_factor": 2,
        "decoder_num_heads": 8,
        "decoder_qk_channels": 256,
        "decoder_v_channels": 256,
        "decoder_widening_factor": 2,
        "decoder_use_query_residual": True,
        "initializer": "position_aligned",
        "preprocessor": {"kind": "text", "channels": 191, "position": position, "combine": "concat"},
        "output_query": {"kind": "position", "position": dict(position), "concat_input": True},
        # The queries hold the position next to the features, so they are wider than the embedding.
        "postprocessor": {"kind": "tokens", "tied": False},
        "tie_word_embeddings": False,
    }
    return PerceiverIOConfig(**{**fields, **changes})


def learning_rate(step: int, settings: Settings, steps: int | None) -> float:
    """Up over `warmup_steps`, level, then down as 1 - sqrt over the last quarter of `steps` (None: not yet known)."""
    rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
    if steps is None or step < steps * 3 // 4:
        return rate
    fallen = (step - steps * 3 // 4) / max(steps - steps * 3 // 4, 1)
    return rate * (1 - math.sqrt(fallen))


def words_share(step: int, settings: Settings) -> float:
    """Share of a step's windows that have whole words masked instead of single bytes."""
    span = max(settings.words_all_by_step - settings.words_from_step, 1)
    return settings.words_share * min(max((step - settings.words_from_step) / span, 0.0), 1.0)


def training_batch(sampler: WindowSampler, masker: ByteMasker, step: int, settings: Settings) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` (B, L); `points`, `labels` and whether `hidden`, (B, n): what is asked."""
    rng = np.random.default_rng([settings.seed, step])
    windows = sampler.sample(settings.batch_size, rng)
    by_word = rng.random(settings.batch_size) < words_share(step, settings)
    words = mask_words(windows, settings.mask_rate, rng)
    masked = np.where(by_word[:, None], words, mask_bytes(windows, settings.mask_rate, rng))
    special = rng.random(settings.batch_size) >= settings.without_special_tokens
    batch = masker(windows, masked, rng, special)
    hidden = batch["labels"] != IGNORED
    # Hidden bytes first, in random order, then visible ones.
    draws = torch.from_numpy(rng.random(hidden.shape))
    points = (
        (draws + hidden.double() * 2 + (batch["attention_mask"] > 0) * 1.0)
        .topk(min(settings.points_per_window, hidden.shape[1]), dim=1)
        .indices
    )
    hidden = hidden.gather(1, points)
    known = batch["input_ids"].where(batch["input_ids"] >= NUM_SPECIAL, IGNORED)
    batch["labels"] = batch["labels"].gather(1, points).where(hidden, known.gather(1, points))
    return {**batch, "points": points, "hidden": hidden}


def train(
    documentation: Documentation,
    output: Path,
    *,
    settings: Settings,
    config: PerceiverIOConfig | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    evaluate_every: int = 1000,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, write the model to `output`, return its metrics. Give `steps` or `minutes`.

    Raises ValueError for both or neither, or if a run to resume was begun on another text.
    """
    if (steps is None) == (minutes is None):
        raise ValueError(f"steps={steps} and minutes={minutes}: give one of them")
    config = config or language_config()
    torch.manual_seed(settings.seed)
    model = PerceiverIOForMaskedLM(config)
    # In bfloat16 on a CPU the fused attention's backward pass is several times slower than the plain one.
    model.set_attn_implementation("eager")
    text = "\n".join(d.text for d in documentation.train).encode()
    start_from_frequencies(model, np.bincount(np.frombuffer(text, np.uint8), minlength=256))
    optimizer = _optimizer(model, settings)
    run: dict[str, Any] = {"step": 0, "seconds": 0.0, "steps": steps, "curve": [], "text": documentation.sha256()}
    if resume:
        run = _load_state(output, model, optimizer, run)
    length = _max_length(config)
    sampler = WindowSampler([d.text for d in documentation.train], length - 2)
    masker = ByteMasker(length)
    quick = evaluation_sets(documentation, length, count=192)
    start = time.monotonic() - run["seconds"]
    loss_sum, loss_count = 0.0, 0
    model.train()
    while run["steps"] is None or run["step"] < run["steps"]:
        step = run["step"]
        if run["steps"] is None and minutes is not None and time.monotonic() - start >= 0.75 * 60 * minutes:
            # The smallest number whose fall begins no earlier than here, so that `steps` repeats what was done.
            run["steps"] = next(n for n in itertools.count(step + 1) if n * 3 // 4 >= step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings, run["steps"])
        loss = _train_step(model, optimizer, training_batch(sampler, masker, step, settings), settings)
        loss_sum, loss_count = loss_sum + loss, loss_count + 1
        run["step"] = step + 1
        run["seconds"] = time.monotonic() - start
        if run["step"] % 100 == 0:
            left = "?" if run["steps"] is None else run["steps"]
            per_second = settings.batch_size * run["step"] / run["seconds"]
            report(
                f"step {run['step']}/{left}  {run['seconds'] / 60:.1f} min  loss {loss_sum / loss_count:.3f}  "
                f"{per_second:.0f} windows/s  lr {optimizer.param_groups[0]['lr']:.2e}"
            )
        if run["step"] % evaluate_every == 0 or run["step"] == run["steps"]:
            scores = {kind: evaluate_model(model, *quick[kind], autocast=True)["bytes"] for kind in quick}
            row = {
                "step": run["step"],
                "seconds": round(run["seconds"]),
                "loss": loss_sum / max(loss_count, 1),
                **scores,
            }
            run["curve"].append(row)
            loss_sum, loss_count = 0.0, 0
            report(f"held-out: single bytes {scores['single']:.4f}, whole words {scores['words']:.4f}")
            _save_state(output, model, optimizer, run, settings)
            write_curve(output, run["curve"])
            model.train()
            start = time.monotonic() - run["seconds"]  # evaluating does not count as training
    write_model(model, output)
    metrics = {
        "steps": run["steps"],
        "training_seconds": round(run["seconds"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": asdict(settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "text": documentation.summary(),
        "held_out": compare(output, documentation, report=report),
    }
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_text(output / "README.md", model_card(metrics))
    write_examples(documentation, output)
    return metrics


def evaluation_sets(documentation: Documentation, length: int, count: int) -> dict[str, tuple[Windows, np.ndarray]]:
    """Fixed windows and masks: "single" bytes at 15 %, whole "words" at 15 %; the same for every model."""
    windows = held_out_windows([d.text for d in documentation.held_out], length - 2, count, EVALUATION_SEED)
    return {
        "single": (windows, mask_bytes(windows, 0.15, np.random.default_rng(EVALUATION_SEED + 1))),
        "words": (windows, mask_words(windows, 0.15, np.random.default_rng(EVALUATION_SEED + 2))),
    }


def evaluate_model(
    model: Any, windows: Windows, masked: np.ndarray, *, rounds: int = 1, autocast: bool = False, batch_size: int = 64
) -> dict[str, float]:
    """Top-1 accuracy of `bytes` and of `words` (all masked bytes of it right).

    rounds=1 tells all masked bytes at once; more rounds fill in the most confident bytes of each window first.
    """
    guesses = []
    model.eval()
    for start in range(0, len(windows.text), batch_size):
        rows = slice(start, start + batch_size)
        part = windows.select(rows)
        batch = ByteMasker(_max_length(model.config))(part, masked[rows])
        asked = batch["labels"] != IGNORED
        ids = _fill(model, batch["input_ids"], batch["attention_mask"], rounds, autocast)
        guesses.append((ids[asked] - NUM_SPECIAL).numpy())
    return score(windows, masked, np.concatenate(guesses))


def score(windows: Windows, masked: np.ndarray, guesses: np.ndarray) -> dict[str, float]:
    """Guessed bytes at the masked places, in row-major order -> share of right bytes and of wholly right words."""
    right = guesses == windows.text[masked]
    if not len(right):
        raise ValueError("nothing is masked, so there is nothing to score")
    begins = masked & ~np.concatenate([np.zeros((len(masked), 1), bool), masked[:, :-1]], axis=1)
    runs = np.cumsum(begins.reshape(-1)).reshape(begins.shape)[masked] - 1
    wrong = np.bincount(runs, weights=~right)
    return {"bytes": float(right.mean()), "words": float((wrong == 0).mean()), "count": len(right)}


def compare(
    output: Path, documentation: Documentation, count: int = 2048, report: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """Held-out accuracy of the model in `output` as it was saved, of the n-gram and of the unigram, as a table."""
    model = PerceiverIOForMaskedLM.from_pretrained(output)
    sets = evaluation_sets(documentation, _max_length(model.config), count)
    single, words = sets["single"], sets["words"]
    ngram = ByteNGram(order=5).fit("\n".join(d.text for d in documentation.train).encode())
    no_space = ngram.unigram.copy()
    no_space[WHITESPACE] = 0
    constant = (int(ngram.unigram.argmax()), int(no_space.argmax()))
    rows: dict[str, tuple[dict | None, dict]] = {
        "model": (evaluate_model(model, *single), evaluate_model(model, *words)),
        "model, most confident first": (None, evaluate_model(model, *words, rounds=ROUNDS)),
        "n-gram, order 5": (
            score(*single, ngram.predict_bytes(single[0].text, single[1])),
            score(*words, ngram.fill_words(words[0].text, words[1])),
        ),
        "unigram": (
            score(*single, np.full(single[1].sum(), constant[0])),
            score(*words, np.full(words[1].sum(), constant[1])),
        ),
    }
    table = {}
    report(f"{'held-out accuracy':<30}{'single bytes':>14}{'bytes of words':>16}{'whole words':>13}")
    for name, (alone, in_words) in rows.items():
        figures = {"bytes_of_words": in_words["bytes"], "whole_words": in_words["words"]}
        if alone is not None:
            figures = {"single_bytes": alone["bytes"], **figures}
        table[name] = figures
        shown = f"{figures['single_bytes']:.4f}" if alone is not None else "-"
        report(f"{name:<30}{shown:>14}{figures['bytes_of_words']:>16.4f}{figures['whole_words']:>13.4f}")
    table["masked_bytes"] = {"single": single[1].sum().item(), "words": words[1].sum().item()}
    return table


def write_model(model: Any, output: Path) -> None:
    """config.json, model.safetensors in bfloat16 and the tokenizer, each renamed into place when it is whole.

    The config says float32: loaded weights compute in float32, the file is half as large.
    """
    partial = output / "state" / "model"
    save_halved(model, partial)
    PerceiverIOTokenizer(model_max_length=_max_length(model.config)).save_pretrained(partial)
    for file in sorted(partial.iterdir()):
        os.replace(file, output / file.name)
    partial.rmdir()


def write_examples(documentation: Documentation, output: Path, count: int = 6, seed: int = EVALUATION_SEED) -> None:
    """held_out.json: sentences of held-out documents, drawn by `seed`, each with a word to mask, for the demo.

    `[{"text": ..., "word": [start, stop]}]`; a word has four to ten letters and stands within the sentence.
    """
    sentences = []
    for document in documentation.held_out:
        for sentence in re.findall(
            r"(?:^|(?<=[.] ))[A-Z][A-Za-z ,'-]{58,108}[.](?= |$)", document.text, flags=re.MULTILINE
        ):
            words = [m.span() for m in re.finditer(r"(?<= )[a-z]{4,10}(?= )", sentence)]
            if len(words) >= 3:
                sentences.append((sentence, words))
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(sentences))[:count]
    examples = []
    for text, words in (sentences[i] for i in sorted(chosen)):
        examples.append({"text": text, "word": list(words[rng.integers(len(words))])})
    write_text(output / "held_out.json", json.dumps(examples, indent=1) + "\n")


def write_curve(output: Path, curve: list[dict]) -> None:
    """learning_curve.csv, and learning_curve.png where matplotlib is installed."""
    lines = [",".join(curve[0])] + [
        ",".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()) for row in curve
    ]
    write_text(output / "learning_curve.csv", "\n".join(lines) + "\n")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in curve]
    axes.plot(steps, [row["single"] for row in curve], label="single bytes")
    axes.plot(steps, [row["words"] for row in curve], label="bytes of whole words")
    axes.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
    axes.legend()
    partial = output / "learning_curve.partial.png"
    figure.savefig(partial, dpi=100, metadata={"Software": None})
    os.replace(partial, output / "learning_curve.png")


def model_card(metrics: dict[str, Any]) -> str:
    """README.md of a trained model: what it is, what it learnt from, how well, how to repeat it."""
    text, settings = metrics["text"], metrics["settings"]
    held_out = dict(metrics["held_out"])
    masked = held_out.pop("masked_bytes")
    names = {"model": "this model", "model, most confident first": f"this model, {ROUNDS} rounds, most confident first"}
    rows = "\n".join(
        f"| {names.get(name, name)} | {_percent(row.get('single_bytes'))} | {_percent(row['bytes_of_words'])} | "
        f"{_percent(row['whole_words'])} |"
        for name, row in held_out.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in text["versions"].items())
    single, words, parameters = masked["single"], masked["words"], metrics["parameters"]
    steps, minutes, threads = metrics["steps"], metrics["training_seconds"] / 60, metrics["threads"]
    batch_size, warmup, share = settings["batch_size"], settings["warmup_steps"], settings["words_share"]
    begin, all_by = settings["words_from_step"], settings["words_all_by_step"]
    note = "\n" + metrics["note"] if "note" in metrics else ""
    train_bytes, train_files = text["train_bytes"], text["train_documents"]
    held_out_bytes, held_out_files = text["held_out_bytes"], text["held_out_documents"]
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: fill-mask
---
# A small Perceiver IO language model on bytes

{parameters:,} parameters, stored in bfloat16; up to {MAX_LENGTH} tokens: [CLS], {MAX_LENGTH - 2} bytes, [SEP].
It tells masked bytes in the English of software documentation. It is an example to try the library
with, not a general language model: it knows few facts, no other language, and its text was ASCII only.

```python
from hf_perceiver import PerceiverIOForMaskedLM, bundled_checkpoint

model = PerceiverIOForMaskedLM.from_pretrained(bundled_checkpoint("language"))
```

## Held-out accuracy

| | single bytes | bytes of whole words | whole words |
|---|---|---|---|
{rows}

Top-1, on files that training did not see, without paragraphs that share more than a fifth of their
8-word sequences with the training text.

- Single bytes: 15 % of the bytes are masked one by one, {single:,} bytes in all.
- Bytes of whole words: 15 % of the words are masked with all their bytes, {words:,} bytes in all,
  and told at once (or in rounds). Whole words: the share of these words with every byte right.
- The n-gram (Witten-Bell, five bytes of context, same training text) sees the true bytes on the left of
  a single byte. In a word it goes on from its own guesses and is told that words hold no white space.
- The unigram always says the commonest byte, the space; in words the commonest that is none.

## Data

{train_bytes:,} bytes of prose from {train_files:,} files for training, {held_out_bytes:,} bytes from
{held_out_files:,} files held out: doc strings of Python's standard library and of installed packages,
cleaned by `hf_perceiver.training.documentation`. The packages' licences are their own.

SHA-256 of the text: `{text["sha256"]}`

Made from {versions}.

## Recipe

{steps:,} steps of {batch_size} windows in {minutes:.0f} minutes on {threads} CPU thread(s), PyTorch {metrics["torch"]},
bfloat16 autocast. AdamW at {settings["learning_rate"]:g}, rising over {warmup} steps, falling over the last quarter.
Single bytes alone for {begin:,} steps, then more and more whole words, {share:.0%} of the windows from step
{all_by:,} on. Position-aligned initialisation; the first guess is the bytes' frequencies
(`hf_perceiver.training.first_guess`). All settings: `metrics.json`; the course: `learning_curve.csv`.{note}

```
python -m hf_perceiver.training.train_language --output DIR --seed {settings["seed"]} --steps {steps}
python -m hf_perceiver.training.train_language --evaluate DIR
```

The same package versions give the same text. Floating-point sums differ between machines and numbers of
threads, so the weights come out alike in quality, not bit for bit.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hf_perceiver.training.train_language", description=__doc__.split("\n")[0]
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="folder to write the model to")
    where.add_argument("--resume", type=Path, help="folder of an interrupted run to go on with")
    where.add_argument("--evaluate", type=Path, help="folder of a trained model to compare with the n-gram")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="train this many steps")
    length.add_argument("--minutes", type=float, help="train about this long (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps between evaluations and saved states")
    given = parser.parse_args(arguments)
    print("reading the documentation of the installed packages ...", flush=True)
    documentation = read_documentation()
    sizes = documentation.summary()
    print(
        f"{sizes['train_bytes']:,} bytes to train on, {sizes['held_out_bytes']:,} held out, "
        f"sha256 {sizes['sha256'][:16]}"
    )
    if given.evaluate:
        compare(given.evaluate, documentation)
        return
    settings = Settings(seed=given.seed)
    if given.resume:
        saved = torch.load(given.resume / STATE, weights_only=True)
        settings = Settings(**saved["settings"])
    minutes = given.minutes if given.steps is not None or given.minutes is not None else 60.0
    train(
        documentation,
        given.resume or given.output,
        settings=settings,
        steps=given.steps,
        minutes=minutes,
        resume=given.resume is not None,
        evaluate_every=given.evaluate_every,
        report=_report,
    )


def _train_step(model: Any, optimizer: Any, batch: dict[str, Tensor], settings: Settings) -> float:
    """One update; returns the mean loss of the hidden bytes alone."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_points=batch["points"]
        ).logits
    each = F.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="none"
    )
    hidden = batch["hidden"].flatten()
    seen = ~hidden & (batch["labels"].flatten() != IGNORED)
    loss = each[hidden].mean()
    total = loss + settings.visible_weight * each[seen].sum() / seen.sum().clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
    optimizer.step()
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss became {value}; a lower learning rate than {settings.learning_rate} may help"
        )
    return value


def _optimizer(model: Any, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; biases, norms, latents and embeddings do not decay."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "latents" not in name and "embedding." not in name
        (decayed if matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def _fill(model: Any, ids: Tensor, attention_mask: Tensor, rounds: int, autocast: bool) -> Tensor:
    """Replace every [MASK] by a byte, the most confident ones of each row first."""
    ids = ids.clone()
    for round_ in range(rounds):
        hidden = ids == MASK
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=attention_mask).logits
        confidence, best = logits[..., NUM_SPECIAL:].float().softmax(-1).max(-1)
        count = torch.ceil(hidden.sum(1) / (rounds - round_)).long()  # (B,)
        order = confidence.masked_fill(~hidden, -1.0).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(ids.shape[1]).expand_as(order))
        now = hidden & (rank < count[:, None])
        ids = torch.where(now, best + NUM_SPECIAL, ids)
    return ids


def _max_length(config: PerceiverIOConfig) -> int:
    return config.preprocessor["position"]["max_resolution"][0]


def _save_state(output: Path, model: Any, optimizer: Any, run: dict, settings: Settings) -> None:
    path = output / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run, "settings": asdict(settings)}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load_state(output: Path, model: Any, optimizer: Any, run: dict) -> dict:
    path = output / STATE
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so there is no run to resume; start one with --output {output}")
    state = torch.load(path, weights_only=True)
    saved = state["run"]
    if saved["text"] != run["text"]:
        raise ValueError(
            f"the run in {output} was begun on another text (sha256 {saved['text'][:16]}, here {run['text'][:16]}): "
            "install the package versions of its metrics, or start anew with --output"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    saved["steps"] = run["steps"] or saved["steps"]
    return saved


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
