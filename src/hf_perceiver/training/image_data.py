"""Pictures with classes: an ImageNet-style folder, a data set of `datasets`, scikit-learn's digits, made-up ones.

All of them are map-style data sets of {"image": PIL, "label": int} that know their `classes`; any other that gives such
examples is as good.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from . import train_digits

EVALUATION_FOLDERS = ("val", "validation", "test")
# Shorter listings are read too fast for a bar.
SHOW_PROGRESS_FROM = 5_000


class Pictures(Dataset):
    """Examples {"image": PIL, "label": int}; `read` makes the picture of an item when it is asked for."""

    def __init__(self, items: Any, labels: Iterable[int], classes: Sequence[str], read: Callable[[Any], Image.Image]):
        self.items, self.labels, self.classes, self.read = items, [int(n) for n in labels], list(classes), read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.read(self.items[index]), "label": self.labels[index]}


class Reordered(Dataset):
    """Another data set's examples, with labels in the order of `classes`."""

    def __init__(self, data: Any, classes: Sequence[str]):
        self.data, self.classes = data, list(classes)
        self.label_of = [self.classes.index(name) for name in class_names(data)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.data[index]
        return {"image": example["image"], "label": self.label_of[example["label"]]}


def in_order(data: Any, classes: Sequence[str]) -> Any:
    """The data with labels that count `classes`, the same names as its own in any order, or others in their place."""
    own = class_names(data)
    return Reordered(data, classes) if own != list(classes) and sorted(own) == sorted(classes) else data


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image -> upright RGB of 8 bits, as transformers' pipelines make it; 16 bits are scaled, not cut off.

    The EXIF orientation is applied, alpha is dropped, grey, palette and CMYK are converted. Raises ValueError for what
    is no picture, and for floating point, whose range nobody knows.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"an example's image is a PIL image, not {type(image).__name__}; use PIL.Image.fromarray()")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("a picture of floating-point pixels (mode F) has no known range; scale it to 0..255 first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        # Pillow opens some 16-bit files as 32 bits.
        if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
            raise ValueError(f"a picture of mode {image.mode} holds 0..65535, not {levels.min()}..{levels.max()}")
        image = Image.fromarray((levels.astype(np.uint32) // 257).astype(np.uint8))
    return image.convert("RGB")


def read_picture(path: str | Path) -> Image.Image:
    """A picture file -> RGB; ValueError that names it where it cannot be read."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as a picture ({error}); repair or remove it, and go on with "
            "--resume_from_checkpoint last"
        ) from error


def read_folder(
    root: str | Path,
    *,
    held_out_share: float = 0.1,
    seed: int = 0,
    max_unreadable_share: float = 0.01,
    check: bool = True,
) -> tuple[Pictures, Pictures]:
    """ROOT/train/CLASS/... and ROOT/val/CLASS/..., or ROOT/CLASS/... -> pictures to train on and to evaluate on.

    val may also be called validation or test; files may lie in folders below their class; classes are sorted by name.
    Of one folder for all, `held_out_share` of every class is kept for evaluation, drawn from `seed`. With `check` every
    file's header is read; those that are no pictures are named, counted and left out.
    Raises ValueError for folders without pictures, for fewer than two classes, where the two parts have different
    classes, and for more unreadable files than the share.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give one that holds train/CLASS/... and val/CLASS/..., or CLASS/...")
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share={held_out_share} is a share of the pictures between 0 and 1")
    if (root / "train").is_dir():
        held_out = next((root / name for name in EVALUATION_FOLDERS if (root / name).is_dir()), None)
        if held_out is None:
            raise ValueError(f"{root} holds train but none of {', '.join(EVALUATION_FOLDERS)}; add one to evaluate on")
        train = list_classes(root / "train")
        other = list_classes(held_out)
        if set(train) != set(other):
            only = {root / "train": sorted(set(train) - set(other)), held_out: sorted(set(other) - set(train))}
            told = "; ".join(f"only {folder} has {', '.join(names[:5])}" for folder, names in only.items() if names)
            raise ValueError(f"the classes to train on and to evaluate on differ: {told}")
    else:
        train = list_classes(root)
        generator = torch.Generator().manual_seed(seed)
        other = {}
        for name, paths in train.items():
            count = max(round(held_out_share * len(paths)), 1)
            if count >= len(paths):
                raise ValueError(
                    f"class {name!r} in {root} has {len(paths)} picture(s); it takes some to train on and some to hold out"
                )
            order = torch.randperm(len(paths), generator=generator).tolist()
            other[name] = sorted(paths[i] for i in order[:count])
            train[name] = sorted(paths[i] for i in order[count:])
    if len(train) < 2:
        raise ValueError(f"{root} has one class, {next(iter(train))!r}; there must be two or more to tell apart")
    classes = list(train)
    return tuple(_of_files(part, classes, max_unreadable_share, check) for part in (train, other))  # type: ignore[return-value]


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """FOLDER/CLASS/... -> the picture files of each class, both sorted; ValueError for no classes and for empty ones."""
    Image.init()
    endings = set(Image.registered_extensions())
    found = {
        child.name: sorted(path for path in child.rglob("*") if path.suffix.lower() in endings and path.is_file())
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
    }
    if not found:
        raise ValueError(f"{folder} holds no folders; put the pictures of each class into one of its own, CLASS/...")
    if empty := [name for name, paths in found.items() if not paths]:
        raise ValueError(f"{folder}: no pictures in {', '.join(empty[:5])}; remove the empty folder, or fill it")
    return found


def _of_files(found: dict[str, list[Path]], classes: Sequence[str], max_share: float, check: bool) -> Pictures:
    paths = [path for name in classes for path in found[name]]
    labels = [index for index, name in enumerate(classes) for _ in found[name]]
    if check:
        bad = unreadable(paths)
        if bad:
            shown = "; ".join(f"{path} ({error})" for path, error in itertools.islice(bad.items(), 5))
            told = f"{len(bad)} of {len(paths)} files cannot be read as pictures: {shown}" + "; ..." * (len(bad) > 5)
            if len(bad) > max_share * len(paths):
                raise ValueError(f"{told}. Remove them, or raise --max_unreadable_share ({max_share})")
            print(f"{told}. They are left out", file=sys.stderr)
            kept = [(path, label) for path, label in zip(paths, labels, strict=True) if path not in bad]
            paths, labels = [path for path, _ in kept], [label for _, label in kept]
    return Pictures(paths, labels, classes, read_picture)


def unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """Files whose header is no picture's, and why. Pixels are not looked at: that takes a hundred times as long."""
    bad = {}
    for path in tqdm(paths, desc="check pictures", file=sys.stderr, disable=len(paths) < SHOW_PROGRESS_FROM):
        try:
            with Image.open(path):
                pass
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            bad[path] = str(error) or type(error).__name__
    return bad


def read_digits() -> tuple[Pictures, Pictures]:
    """scikit-learn's digits, 8x8 and grey: 1,437 to train on and the 360 that the bundled model never saw."""
    data = train_digits.load_digits()
    parts = (
        Pictures(data[f"{part}_images"], data[f"{part}_labels"], [str(n) for n in range(10)], Image.fromarray)
        for part in ("train", "test")
    )
    return tuple(parts)  # type: ignore[return-value]


def read_named(name: str) -> tuple[Dataset, Dataset]:
    """A data set of the package `datasets`, with columns image and label -> its parts to train and to evaluate on.

    Raises ValueError where the package, a part or a column is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--dataset {name} is read by the package `datasets`, which is not installed: pip install datasets; digits, "
            "and pictures in an --image_folder, need none"
        ) from error
    parts = datasets.load_dataset(name)
    held_out = next((part for part in ("validation", "val", "test") if part in parts), None)
    if "train" not in parts or held_out is None:
        raise ValueError(f"--dataset {name} has the parts {', '.join(parts)}; it takes train, and validation or test")
    for part in ("train", held_out):
        if lacking := {"image", "label"} - set(parts[part].column_names):
            raise ValueError(
                f"--dataset {name} has no column {' and no '.join(sorted(lacking))} in {part}, but "
                f"{', '.join(parts[part].column_names)}; rename its columns"
            )
    return parts["train"], parts[held_out]


def made_up_pictures(count: int = 48, size: int = 40, seed: int = 0) -> tuple[Pictures, Pictures]:
    """Discs, boxes and crosses in any colour, on noise: to try a recipe without data. A third is to evaluate on."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    items = []
    for label in labels:
        image = Image.fromarray(rng.integers(0, 90, (size, size, 3), dtype=np.uint8))
        colour = tuple(int(n) for n in rng.integers(130, 256, 3))
        left, top = (int(n) for n in rng.integers(0, size // 2, 2))
        box = (left, top, left + size // 2, top + size // 2)
        draw = ImageDraw.Draw(image)
        if label == 0:
            draw.ellipse(box, fill=colour)
        elif label == 1:
            draw.rectangle(box, fill=colour)
        else:
            draw.line(box, fill=colour, width=size // 8)
            draw.line((box[0], box[3], box[2], box[1]), fill=colour, width=size // 8)
        items.append(image)
    classes, held = ["disc", "box", "cross"], count // 3
    return (
        Pictures(items[held:], labels[held:].tolist(), classes, Image.Image.copy),
        Pictures(items[:held], labels[:held].tolist(), classes, Image.Image.copy),
    )


def class_names(data: Any) -> list[str]:
    """The classes of a data set: its `classes`, or the names of a `datasets` label; ValueError where it knows none."""
    known = getattr(data, "classes", None)
    if known is None:
        known = getattr((getattr(data, "features", None) or {}).get("label"), "names", None)
    if known is None:
        raise ValueError(
            f"{type(data).__name__} does not know its classes: give it an attribute `classes`, their names in the order of "
            "the labels"
        )
    return [str(name) for name in known]


def check_pictures(train: Any, held_out: Any | None = None) -> list[str]:
    """The classes of data to train on and to evaluate on, after a look at both.

    Raises ValueError for no examples, fewer than two classes, classes that differ, and for labels outside of them where
    these can be told without the pictures (`labels`, or a `datasets` column).
    """
    classes = class_names(train)
    for what, data in (("train", train), ("evaluate", held_out)):
        if data is None:
            continue
        if not len(data):
            raise ValueError(f"the data to {what} on is empty; give at least one example")
        if (other := class_names(data)) != classes:
            raise ValueError(f"the classes to train on and to evaluate on differ: {classes[:8]} and {other[:8]}")
        labels = getattr(data, "labels", None)
        if labels is None and "label" in (getattr(data, "column_names", None) or ()):
            labels = data["label"]
        for label in Counter(labels or ()):
            if not 0 <= label < len(classes):
                raise ValueError(f"a label of the data to {what} on is {label}; its classes are 0..{len(classes) - 1}")
    if len(classes) < 2:
        raise ValueError(f"there is one class, {classes[0]!r}; it takes two or more to tell apart")
    if repeated := [name for name, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"two classes have one name: {', '.join(repeated[:5])}; rename one")
    return classes
