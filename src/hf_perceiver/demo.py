"""The main job on the checkpoints that ship with the package: `python -m hf_perceiver.demo [--output DIR]`.

Fills masked bytes and words in sentences the language model was never trained on, names digits it has never seen, tells
the motion between two frames of a photo it does not know, and puts a video, its sound and its class through 72 latents;
the last three are drawn as pictures.
"""

import argparse
import json
import os
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForPreTraining, pipeline

from . import bundled_checkpoint
from .tokenization_perceiver_io import decode_bytes

# What a byte looks like in print.
SHOWN = {" ": "␣", "\n": "⏎"}
# Streams of a clip, with the range that their PSNR is measured against.
SIGNALS = {"image": 1.0, "audio": 2.0}


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
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Write a figure whole, and close it."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
    return path


def show_flow(directory: str, output: Path) -> Path:
    """Flow of pairs whose motion is known, beside the truth: a turned and a shifted photo, and layers that move apart."""
    from .flow_files import render_flow
    from .training.flow import held_out_pairs
    from .training.flow_synthesis import PHOTOS

    estimate = pipeline("optical-flow", model=directory)
    pairs = {
        "shifted photo": moved_photo(PHOTOS[1], angle=0.0, scale=1.0, shift=(5.0, -2.0)),
        "turned and enlarged photo": moved_photo(PHOTOS[1], angle=2.0, scale=1.03, shift=(1.0, 1.0)),
    }
    layers = held_out_pairs(0.15, count=1, scale=2)[0]
    pairs["layers that move apart"] = (layers.frames, layers.flow)
    rows, titles = [], []
    print("Optical flow of pairs with a known motion:")
    for name, (frames, truth) in pairs.items():
        flow = estimate((frames[0], frames[1]))["flow"]
        error, still = (float(np.linalg.norm(a - truth, axis=-1).mean()) for a in (flow, np.zeros_like(truth)))
        longest = float(np.linalg.norm(truth, axis=-1).max())
        rows.append([*frames, *(render_flow(field, max_magnitude=longest) for field in (truth, flow))])
        titles.append([f"{name}: first frame", "second frame", "true flow", f"estimate, EPE {error:.2f} px"])
        print(f"  {name}: end-point error {error:.2f} px (zero flow {still:.2f} px)")
    path = draw_rows(rows, titles, output / "flow.png")
    print(f"  picture: {path}")
    return path


def moved_photo(
    name: str, angle: float, scale: float, shift: tuple[float, float], height: int = 120, width: int = 160
) -> tuple[np.ndarray, np.ndarray]:
    """A sample photo before and after turning (degrees), scaling and shifting (pixels): frames (2, H, W, 3), flow (H, W, 2)"""
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image(name)).resize((width * 3 // 2, height * 3 // 2), Image.Resampling.LANCZOS)
    turn = scale * np.exp(1j * np.radians(angle))
    # In the picture's plane, x + iy about its middle: the second frame shows at `there` what the first shows at `here`.
    rows, columns = np.mgrid[:height, :width]
    here = (columns - (width - 1) / 2) + 1j * (rows - (height - 1) / 2)
    there = here * turn + complex(*shift)
    flow = np.stack([(there - here).real, (there - here).imag], axis=-1)
    corner = complex((photo.width - width) / 2, (photo.height - height) / 2)
    middle = complex((width - 1) / 2, (height - 1) / 2)
    frames = []
    for factor, moved in ((1.0, 0.0), (turn, complex(*shift))):
        # Pillow wants where each output pixel comes from, x' = a x + b y + c and y' = d x + e y + f, of pixels' centres.
        back = 1 / factor
        start = (-(middle + moved)) * back + middle + corner + complex(0.5, 0.5) - back * complex(0.5, 0.5)
        data = (back.real, -back.imag, start.real, back.imag, back.real, start.imag)
        frames.append(photo.transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC))
    return np.stack([np.asarray(frame) for frame in frames]), flow.astype(np.float32)


def show_video(directory: str, output: Path, count: int = 6) -> Path:
    """Put held-out clips through the autoencoder: a sheet of frames and reconstructions, and the classes it tells."""
    from .training.audio_visual import psnr
    from .training.clip_synthesis import CLASSES
    from .training.video import contact_sheet, held_out_clips, reconstruct

    model = AutoModelForPreTraining.from_pretrained(directory).eval()
    clips = held_out_clips(count)
    made = reconstruct(model, clips)
    print(f"Video: {count} held-out clips of 16 frames with sound, each through {model.config.num_latents} latents")
    for i in range(count):
        named, truth = CLASSES[int(made["label"][i].argmax())], CLASSES[int(clips["label"][i])]
        video, sound = (float(psnr(made[m][i : i + 1], clips[m][i : i + 1], peak=p)) for m, p in SIGNALS.items())
        verdict = "right" if named == truth else f"it is {truth}"
        print(f"  clip {i + 1}: {named} ({verdict}); PSNR video {video:.1f} dB, sound {sound:.1f} dB")
    before, after = ((values["image"].movedim(2, -1) * 255).round().byte().numpy() for values in (clips, made))
    path = contact_sheet(before, after, output / "video.png")
    print(f"  above the originals, below them what was made of the latents: {path}")
    return path


def draw_rows(rows: list[list[np.ndarray]], titles: list[list[str]], path: Path) -> Path:
    """Rows of pictures with a title above each, written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(3.0 * len(rows[0]), 2.5 * len(rows)), squeeze=False)
    for axis, picture, title in zip(axes.flat, chain(*rows), chain(*titles), strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for the pictures")
    arguments = parser.parse_args()
    started = time.perf_counter()
    show_language(bundled_checkpoint("language"))
    show_digits(bundled_checkpoint("digits"), arguments.output)
    show_flow(bundled_checkpoint("flow"), arguments.output)
    show_video(bundled_checkpoint("video"), arguments.output)
    print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
