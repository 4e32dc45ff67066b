"""The main job on the checkpoints that ship with the package: `python -m hf_perceiver.demo [--output DIR]`.

Fills masked bytes and words in sentences the language model was never trained on, and names digits it has never seen,
drawn as a picture.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

from . import bundled_checkpoint
from .tokenization_perceiver_io import decode_bytes

# What a byte looks like in print.
SHOWN = {" ": "␣", "\n": "⏎"}


def fill_bytes(fill: Any, text: str, position: int) -> list[tuple[str, float]]:
    """The five likeliest bytes for one masked byte of an ASCII text, with their probabilities."""
    masked = text[:position] + fill.tokenizer.mask_token + text[position + 1 :]
    return [(answer["token_str"], answer["score"]) for answer in fill(masked, top_k=5)]


def fill_word(fill: Any, text: str, start: int, stop: int) -> list[tuple[str, float]]:
    """The likeliest fillings of a masked word, (word, product of its bytes' probabilities), by beam search."""
    tokenizer, model = fill.tokenizer, fill.model
    encoded = tokenizer(text[:start] + tokenizer.mask_token * (stop - start) + text[stop:], return_tensors="pt")
    beams = [(encoded["input_ids"][0], 1.0)]
    for _ in range(stop - start):
        # The place the model is surest of is filled first, then it looks again.
        rows = torch.stack([ids for ids, _ in beams])
        with torch.no_grad():
            probabilities = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits.softmax(-1)
        grown: dict[tuple[int, ...], float] = {}
        for (ids, score), row in zip(beams, probabilities, strict=True):
            places = (ids == tokenizer.mask_token_id).nonzero()[:, 0]
            place = places[row[places].max(-1).values.argmax()]
            for probability, token in zip(*row[place].topk(5), strict=True):
                filled = ids.clone()
                filled[place] = token
                key = tuple(filled.tolist())
                grown[key] = max(grown.get(key, 0.0), score * float(probability))
        best = sorted(grown.items(), key=lambda item: -item[1])[:5]
        beams = [(torch.tensor(ids), score) for ids, score in best]
    offset = int((encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0])
    return [(decode_bytes(ids[offset : offset + stop - start].numpy()), score) for ids, score in beams]


def show_language(directory: str) -> None:
    """Print candidates for a masked byte and a masked word in each held-out sentence."""
    fill = pipeline("fill-mask", model=directory)
    sentences = json.loads((Path(directory) / "held_out.json").read_text())
    print("\nLanguage: sentences from held-out documentation\n")
    for sentence in sentences:
        text, (start, stop) = sentence["text"], sentence["word"]
        middle = (start + stop) // 2
        candidates = fill_bytes(fill, text, middle)
        print(f"  {text[:middle]}[?]{text[middle + 1 :]}")
        print(
            "    one byte:  "
            + "   ".join(f"{SHOWN.get(c, c)} {p:.1%}" for c, p in candidates)
            + mark(candidates, text[middle])
        )
        words = fill_word(fill, text, start, stop)
        print(f"  {text[:start]}{'_' * (stop - start)}{text[stop:]}")
        print("    the word:  " + "   ".join(f"{w!r} {p:.1%}" for w, p in words) + mark(words, text[start:stop]))
        print()


def mark(candidates: list[tuple[str, float]], truth: str) -> str:
    """What stood there, and the rank it was given."""
    ranks = [rank for rank, (candidate, _) in enumerate(candidates, start=1) if candidate == truth]
    return f"   (it was {truth!r}: {f'rank {ranks[0]}' if ranks else 'not among these'})"


def show_digits(directory: str, output: Path, count: int = 60) -> Path:
    """Classify held-out digits and draw them, green frames for right answers and red for wrong ones."""
    from .training.train_digits import load_digits

    data = load_digits()
    images, labels = data["test_images"][:count], data["test_labels"][:count]
    classify = pipeline("image-classification", model=directory)
    # Ink on paper: the data set holds it bright on black, which is what the model reads.
    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    answers = [answer[0] for answer in classify(pictures, batch_size=20, top_k=1)]
    right = sum(answer["label"] == str(label) for answer, label in zip(answers, labels, strict=True))
    path = draw(images, labels, answers, output / "digits.png")
    print(f"Digits: {right} of {count} held-out digits named rightly; picture: {path}")
    return path


def draw(images: np.ndarray, labels: np.ndarray, answers: list[dict], path: Path, columns: int = 12) -> Path:
    """A sheet of the images with the answers beneath, written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 0.85, rows * 1.1), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label, answer in zip(axes.flat, images, labels, answers, strict=False):
        right = answer["label"] == str(label)
        axis.imshow(255 - image, cmap="gray", vmin=0, vmax=255)
        text = f"{answer['label']}  {answer['score']:.0%}" + ("" if right else f"\nis {label}")
        axis.set_title(text, fontsize=8, color="tab:green" if right else "tab:red")
    figure.suptitle("Held-out digits, the model's answer and its probability", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for the picture")
    arguments = parser.parse_args()
    started = time.perf_counter()
    show_language(bundled_checkpoint("language"))
    show_digits(bundled_checkpoint("digits"), arguments.output)
    print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
