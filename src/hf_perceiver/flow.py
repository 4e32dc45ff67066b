"""Optical flow from the command line: frames in, files, pictures and numbers out.

    python -m hf_perceiver.flow A.png B.png --output DIR
    python -m hf_perceiver.flow FOLDER --output DIR --formats flo png warped video
    python -m hf_perceiver.flow VIDEO.mp4 --output DIR --formats video --max-magnitude 20
    python -m hf_perceiver.flow A.png B.png --output DIR --ground-truth A.flo
    python -m hf_perceiver.flow --dataset sintel ROOT

The files of a pair are named like its first frame (a video's frames: 000000, 000001, ...): DIR/flo/NAME.flo
(Middlebury), DIR/kitti/NAME.png (KITTI's 16-bit PNG), DIR/png/NAME.png (colours of Middlebury's wheel),
DIR/warped/NAME.png (the second frame, warped back to the first; black where the flow leads out of the picture), and for
the sequence DIR/flow.mp4 (first frame, flow, warped frame). Metrics are printed and written to DIR/metrics.json.

If a sequence fails at one frame, what was written before is kept and named. The exit code is then 2, as for wrong input.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, pipeline

from .bundled import bundled_checkpoint
from .flow_files import (
    kitti_pairs,
    read_flow,
    render_flow,
    sintel_pairs,
    warp,
    write_flo,
    write_kitti_flow,
    write_whole,
)
from .flow_metrics import FlowMetrics
from .heads_vision import PerceiverIOForOpticalFlow
from .image_processing_perceiver_io import PerceiverIOFlowImageProcessor
from .media_files import VideoWriter, read_frames, video_info, write_image
from .pipeline_optical_flow import IMAGE_SUFFIXES, frame_files, open_frame

FORMATS = ("flo", "kitti", "png", "warped", "video")
IMAGES_PER_SECOND = 10.0

# Columns of a table; shares are printed in percent.
SHARES = {"1px": ">1 px", "3px": ">3 px", "5px": ">5 px", "fl_all": "Fl-all"}
COLUMNS = {"epe": "EPE", **SHARES, "epe_s0_10": "s0-10", "epe_s10_40": "s10-40", "epe_s40": "s40+"}


class Source(NamedTuple):
    """Frames to read, with the names of their files; names and number are None where only reading tells."""

    frames: Iterable[tuple[str, Any]]
    names: list[str] | None
    num_frames: int | None
    frames_per_second: float


class Part(NamedTuple):
    """A pair of a data set, and its true flow by the line of the table that it counts in."""

    frame1: Path
    frame2: Path
    flows: dict[str, Path]


def open_source(paths: list[Path], frames_per_second: float | None) -> Source:
    """Two or more images, a folder of them, or a video. ValueError for what cannot make a pair."""
    first = paths[0]
    if len(paths) == 1 and not first.exists():
        raise ValueError(f"there is no file or folder {first}")
    if len(paths) == 1 and first.is_file():
        if first.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{first} is one frame, and flow needs two; give a second one, a folder or a video")
        info = video_info(first)
        decoded = read_frames(first, frames_per_second=frames_per_second)
        return Source(
            ((f"{index:06d}", frame) for index, frame in enumerate(decoded)),
            None,
            info.num_frames if frames_per_second is None else None,
            frames_per_second or info.frames_per_second,
        )
    files = frame_files(first) if len(paths) == 1 else paths
    for path in files:
        if not path.is_file():
            raise ValueError(f"there is no image {path}; give images, or one folder, or one video")
    names = [path.stem for path in files]
    if len(set(names[:-1])) < len(names) - 1:
        twice = next(name for name in names[:-1] if names[:-1].count(name) > 1)
        raise ValueError(f"two frames are called {twice!r}, and so would be the files of their flow; rename one")
    frames = ((path.stem, open_frame(path)) for path in files)
    return Source(frames, names, len(files), frames_per_second or IMAGES_PER_SECOND)


def find_truth(path: Path, source: Source) -> Callable[[str], Path]:
    """Pair's name -> file of its true flow: `path` itself, or NAME.flo or NAME.png in it.

    Raises ValueError for a missing file, at once where the names are known.
    """

    def file_of(name: str) -> Path:
        candidates = [path / f"{name}{suffix}" for suffix in (".flo", ".png")] if path.is_dir() else [path]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            raise ValueError(f"no true flow for {name}: {' or '.join(map(str, candidates))} is missing")
        return found

    if path.is_file() and source.num_frames != 2:
        raise ValueError(f"{path} is the true flow of one pair; for a sequence give a folder with NAME.flo or NAME.png")
    for name in (source.names or [])[:-1]:
        file_of(name)
    return file_of


class Outputs:
    """The files of a run in the formats asked for; a context manager, for the video."""

    def __init__(self, folder: Path, formats: list[str], max_magnitude: float | None, frames_per_second: float):
        self.folder, self.formats, self.max_magnitude = folder, set(formats), max_magnitude
        self.frames_per_second = frames_per_second
        self.names: list[str] = []
        self.video: VideoWriter | None = None

    def __enter__(self) -> "Outputs":
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.formats - {"video"}:
            (self.folder / name).mkdir(exist_ok=True)
        if "video" in self.formats:
            self.video = VideoWriter(self.folder / "flow.mp4", frames_per_second=self.frames_per_second)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.video is not None:
            self.video.__exit__(kind, error, trace)

    def write(self, name: str, first: np.ndarray, second: np.ndarray, flow: np.ndarray) -> None:
        """Frames (H, W, 3) uint8, flow (H, W, 2)"""
        if "flo" in self.formats:
            write_flo(self.folder / "flo" / f"{name}.flo", flow)
        if "kitti" in self.formats:
            write_kitti_flow(self.folder / "kitti" / f"{name}.png", flow)
        picture = render_flow(flow, max_magnitude=self.max_magnitude)
        if "png" in self.formats:
            write_image(self.folder / "png" / f"{name}.png", picture)
        warped, _ = warp(second, flow)
        if "warped" in self.formats:
            write_image(self.folder / "warped" / f"{name}.png", warped)
        if self.video is not None:
            self.video.write_frame(np.concatenate([first, picture, warped], axis=1))
        self.names.append(name)

    def kept(self) -> str:
        """What there is, in words."""
        count = len(self.names)
        names = self.names[0] if count == 1 else f"{self.names[0]} to {self.names[-1]} ({count} pairs)"
        return f"{', '.join(format for format in FORMATS if format in self.formats)} of {names} in {self.folder}"


def estimate_sequence(arguments: argparse.Namespace) -> None:
    """Flow of the frames asked for, into files, and what it is worth where the truth is given."""
    source = open_source(arguments.frames, arguments.frames_per_second)
    truth = find_truth(arguments.ground_truth, source) if arguments.ground_truth else None
    estimate = load_pipeline(arguments)
    waiting: deque[tuple[str, Any]] = deque()
    metrics, of_pairs = FlowMetrics(), {}
    failure = None

    def frames() -> Iterator[Any]:
        for name, frame in source.frames:
            waiting.append((name, frame))
            yield frame

    total = None if source.num_frames is None else source.num_frames - 1
    outputs = Outputs(arguments.output, arguments.formats, arguments.max_magnitude, source.frames_per_second)
    with outputs:
        try:
            for result in tqdm(estimate(frames()), total=total, desc="flow", unit="pair"):
                name, first = waiting.popleft()
                first, second = (as_picture(estimate.image_processor, frame) for frame in (first, waiting[0][1]))
                outputs.write(name, first, second, result["flow"])
                if truth is not None:
                    of_pairs[name] = measure(metrics, result["flow"], truth(name))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            # Kept are also the frames of the video: it is closed as if this were its end.
            if not outputs.names:
                raise
            failure = error
    if of_pairs:
        report({"": metrics}, arguments.output, of_pairs)
    if failure is not None:
        raise ValueError(f"{failure}\nWritten before, and kept: {outputs.kept()}") from failure
    print(f"Written: {outputs.kept()}")


def evaluate_data_set(arguments: argparse.Namespace) -> None:
    """The table of a data set's metrics."""
    name, root = arguments.dataset
    parts = DATA_SETS[name](Path(root))
    estimate = load_pipeline(arguments)
    metrics = {line: FlowMetrics() for part in parts for line in part.flows}
    pairs = ([open_frame(part.frame1), open_frame(part.frame2)] for part in parts)
    failure, done = None, 0
    try:
        for result in tqdm(estimate(pairs), total=len(parts), desc=name, unit="pair"):
            for line, path in parts[done].flows.items():
                measure(metrics[line], result["flow"], path)
            done += 1
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if not done:
            raise
        failure = error
    report(metrics, arguments.output)
    print(
        "Papers give: MPI Sintel's EPE over all pixels; KITTI's EPE as the mean of pairs, its Fl-all over all pixels."
    )
    if failure is not None:
        raise ValueError(f"{failure}\nThe table is over the first {done} of {len(parts)} pairs") from failure


def sintel_parts(root: Path) -> list[Part]:
    """Both render passes; every pixel counts, as on MPI Sintel's own tables."""
    return [
        Part(pair.frame1, pair.frame2, {render_pass: pair.flow})
        for render_pass in ("clean", "final")
        for pair in sintel_pairs(root, render_pass=render_pass)
        if pair.flow
    ]


def kitti_parts(root: Path, year: int = 2015) -> list[Part]:
    """All pixels with a known flow, and those whose flow stays in the picture."""
    return [
        Part(pair.frame1, pair.frame2, {"occ": pair.flow, "noc": pair.flow_noc})
        for pair in kitti_pairs(root, year=year)
        if pair.flow and pair.flow_noc
    ]


DATA_SETS: dict[str, Callable[[Path], list[Part]]] = {
    "sintel": sintel_parts,
    "kitti": kitti_parts,
    "kitti2012": partial(kitti_parts, year=2012),
}


def load_pipeline(arguments: argparse.Namespace) -> Any:
    """The pipeline of the model asked for, or of the bundled checkpoint."""
    model = arguments.model
    if model is None:
        try:
            model = bundled_checkpoint("flow")
        except ValueError as error:
            raise ValueError(f"{error}; say --model, a folder or a name on the Hub") from error
    if arguments.device is not None:
        try:
            torch.empty(0, device=arguments.device)
        except (RuntimeError, AssertionError) as error:  # torch's own for a wrong name, and for a build without CUDA
            raise ValueError(f"--device {arguments.device} cannot be used: {error}") from error
    try:
        # Checkpoints of transformers' own Perceiver bring no processor; the defaults are for the one that was released.
        built_in = AutoConfig.from_pretrained(model).model_type == "perceiver"
        # Loaded here: what goes wrong with it in `pipeline` is told with pages of tracebacks.
        network = PerceiverIOForOpticalFlow.from_pretrained(model, dtype=arguments.dtype)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{model} cannot be used for optical flow: {error}") from error
    return pipeline(
        "optical-flow",
        model=network,
        image_processor=PerceiverIOFlowImageProcessor() if built_in else model,
        device=arguments.device,
        batch_size=arguments.batch_size,
        chunk_size=arguments.chunk_size,
    )


def as_picture(processor: PerceiverIOFlowImageProcessor, frame: Any) -> np.ndarray:
    """Any frame the model reads -> (H, W, 3) uint8"""
    pixels = processor.read_frame(frame)  # (3, H, W) in [-1, 1]
    return np.rint((np.moveaxis(pixels, 0, -1) + 1) * 127.5).astype(np.uint8)


def measure(metrics: FlowMetrics, flow: np.ndarray, truth: Path) -> dict[str, float | None]:
    """One pair's metrics, which also count in `metrics`."""
    target, valid = read_flow(truth)
    try:
        return metrics.update(flow, target, valid)
    except ValueError as error:
        raise ValueError(f"{truth}: {error}") from error


def report(metrics: dict[str, FlowMetrics], folder: Path | None, of_pairs: dict[str, Any] | None = None) -> None:
    """Print a table of both averages for each entry, and write it to metrics.json in the folder, if there is one."""
    averages: dict[str, dict[str, float | None]] = {}
    for name, measured in metrics.items():
        before = f"{name}, " if name else ""
        if len(measured):
            averages[f"{before}all pixels"] = {**measured.per_pixel(), "num_pairs": len(measured)}
        if len(measured) > 1:
            averages[f"{before}mean of pairs"] = {**measured.per_pair(), "num_pairs": len(measured)}
    print(table(averages))
    if folder is not None:
        content = {"averages": averages, **({"pairs": of_pairs} if of_pairs else {})}
        write_whole(folder / "metrics.json", (json.dumps(content, indent=1) + "\n").encode())


def table(lines: dict[str, dict[str, float | None]]) -> str:
    """Metrics by their line's name -> text in columns: pixels, shares in percent, "-" for what is over no pixel."""
    cells = [["", *COLUMNS.values(), "pairs", "pixels"]]
    for name, values in lines.items():
        numbers = ["-" if (v := values[c]) is None else f"{v:.2%}" if c in SHARES else f"{v:.3f}" for c in COLUMNS]
        cells.append([name, *numbers, f"{values['num_pairs']:,}", f"{values['num_pixels']:,}"])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )


def positive(number: type) -> Callable[[str], Any]:
    """A number of that type above 0, for argparse."""

    def parse(text: str) -> Any:
        value = number(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = number.__name__  # argparse says "invalid int value"
    return parse


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hf_perceiver.flow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("frames", nargs="*", type=Path, help="two or more images in order, a folder of images, or a video")
    add("--output", type=Path, help="folder to write; files of the same name are replaced")
    add("--model", help="folder or Hub name of an optical flow model; default: the bundled one")
    add("--formats", nargs="+", choices=FORMATS, help="default: flo png")
    add("--max-magnitude", type=positive(float), help="pixels of full colour; default: each flow's longest")
    add("--frames-per-second", type=positive(float), help="of flow.mp4 (images: 10), and to read a video at")
    add("--ground-truth", type=Path, help="true flow, .flo or KITTI's .png, or for sequences a folder with NAME.flo")
    add("--dataset", nargs=2, metavar=("|".join(DATA_SETS), "ROOT"), help="measure on a data set's training split")
    add("--device", help="cpu, cuda, cuda:1, ...; default: the accelerator if there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the checkpoint's")
    add("--batch-size", type=positive(int), default=1, help="tiles that the model reads at once")
    add("--chunk-size", type=positive(int), help="pixels that it decodes at once; default: a whole tile")
    arguments = parser.parse_args(argv)
    if bool(arguments.frames) == bool(arguments.dataset):
        parser.error("give frames, or --dataset with its name and folder")
    if arguments.frames and arguments.output is None:
        parser.error("say where to write by --output")
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a file; name a folder")
    if arguments.dataset and arguments.dataset[0] not in DATA_SETS:
        parser.error(f"no data set {arguments.dataset[0]!r}; there are: {', '.join(DATA_SETS)}")
    for name in ("formats", "max_magnitude", "frames_per_second", "ground_truth"):
        if arguments.dataset and getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for frames, not for --dataset")
    arguments.formats = arguments.formats or ["flo", "png"]
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        (evaluate_data_set if arguments.dataset else estimate_sequence)(arguments)
    except torch.OutOfMemoryError as error:
        print(f"error: {error}; take a smaller --batch-size or --chunk-size, or --dtype bfloat16", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
