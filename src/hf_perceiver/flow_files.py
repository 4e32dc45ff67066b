"""Optical flow in files and pictures: .flo, KITTI's 16-bit PNG, the colour wheel, warped frames, data set folders.

A flow is (H, W, 2) in pixels, x (to the right) then y (down); `valid` is (H, W) bool, False where the flow is not
known. Files are written under a temporary name, then renamed.
"""

import os
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# No frame is larger; a header that says so is corrupt.
MAX_SIDE = 99_999

FLO_MAGIC = b"PIEH"  # 202021.25 as a little-endian float32
FLO_UNKNOWN = 1e9  # anything larger is no flow
FLO_UNKNOWN_WRITTEN = 1e10

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_PIXEL_BYTES = 6  # three channels of 16 bits
MAX_PACKED = 1100  # deflate makes nothing smaller than 1/1032

# KITTI stores flow * 64 + 2^15, so flows in [-512, 512) px in steps of 1/64 px.
KITTI_SCALE = 64.0
KITTI_OFFSET = 32768.0

# From one colour to the next in so many steps, 55 in all: the eye tells apart more hues between some than others.
WHEEL_COLOURS = [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255), (255, 0, 0)]
WHEEL_STEPS = [15, 6, 4, 11, 13, 6]


def check_flow(flow: Any, valid: Any = None, name: str = "flow") -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 2), (H, W) or None -> the flow as floats, 0 where it is not valid, and the mask as bool

    Raises ValueError for other shapes and for NaN or infinity at a valid pixel, naming the first such pixel.
    """
    flow = np.asarray(flow)
    if flow.ndim != 3 or flow.shape[-1] != 2 or flow.size == 0:
        raise ValueError(f"{name} is (H, W, 2), x then y, not {flow.shape}")
    if flow.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds numbers in pixels, not {flow.dtype}")
    if flow.dtype not in (np.float32, np.float64):
        flow = flow.astype(np.float32)
    valid = np.ones(flow.shape[:2], bool) if valid is None else np.asarray(valid) != 0
    if valid.shape != flow.shape[:2]:
        raise ValueError(f"the valid mask of a {flow.shape[:2]} {name} is (H, W) like it, not {valid.shape}")
    bad = valid & ~np.isfinite(flow).all(axis=-1)
    if bad.any():
        y, x = np.argwhere(bad)[0]
        raise ValueError(
            f"{name} is {flow[y, x].tolist()} at row {y}, column {x} ({bad.sum():,} such pixels); "
            "mark pixels without a known flow in the valid mask"
        )
    return np.where(valid[..., None], flow, flow.dtype.type(0)), valid


def read_flow(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Flow (H, W, 2) float32 and valid (H, W) bool of a .flo file or a KITTI .png, by the file's extension."""
    readers = {".flo": read_flo, ".png": read_kitti_flow}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is no flow file: {' (Middlebury) and '.join(readers)} (KITTI) are known")
    return reader(path)


def read_flo(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Flow (H, W, 2) float32 and valid (H, W) bool of a Middlebury .flo file; unknown flow reads as 0, not valid.

    Raises ValueError naming the file for a wrong magic, a size that cannot be, or a length that does not fit the size.
    Source: the flow-code of vision.middlebury.edu/flow; unknown is NaN or a component beyond 1e9.
    """
    try:
        with open(path, "rb") as file:
            header, length = file.read(12), os.fstat(file.fileno()).st_size
            if header[:4] != FLO_MAGIC or len(header) < 12:
                raise ValueError(f"{path} is no .flo file: it begins with {header[:4]!r}, not {FLO_MAGIC!r} and a size")
            width, height = struct.unpack("<ii", header[4:])
            _check_sides(path, width, height)
            expected = 12 + 8 * width * height
            if length != expected:
                raise ValueError(f"{path} has {length:,} bytes, a {width}x{height} flow has {expected:,}")
            data = file.read(expected - 12)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    flow = np.frombuffer(data, "<f4").reshape(height, width, 2).astype(np.float32)
    valid = np.all(np.abs(flow) <= FLO_UNKNOWN, axis=-1)  # False for NaN as well
    flow[~valid] = 0
    return flow, valid


def write_flo(path: str | os.PathLike, flow: Any, valid: Any = None) -> None:
    """Flow (H, W, 2), valid (H, W) or None -> a Middlebury .flo file; unknown flow is written as 1e10."""
    flow, valid = check_flow(flow, valid)
    height, width = flow.shape[:2]
    _check_sides(path, width, height)
    _check_range(flow, np.abs(flow) <= FLO_UNKNOWN, f"a .flo file means 'unknown' by what is beyond {FLO_UNKNOWN:g}")
    data = np.where(valid[..., None], flow, FLO_UNKNOWN_WRITTEN).astype("<f4")
    write_whole(path, FLO_MAGIC + struct.pack("<ii", width, height) + data.tobytes())


def read_kitti_flow(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Flow (H, W, 2) float32 and valid (H, W) bool of a KITTI flow PNG; flow that is not valid reads as 0.

    Raises ValueError naming the file for what is no 16-bit RGB PNG, and for a damaged one.
    Source: readme of the KITTI 2012 and 2015 development kits; their blue channel is the mask.
    """
    stored = _read_png16(path)
    valid = stored[..., 2] > 0
    flow = (stored[..., :2].astype(np.float32) - np.float32(KITTI_OFFSET)) / np.float32(KITTI_SCALE)
    flow[~valid] = 0
    return flow, valid


def write_kitti_flow(path: str | os.PathLike, flow: Any, valid: Any = None) -> None:
    """Flow (H, W, 2), valid (H, W) or None -> a KITTI flow PNG, rounded to 1/64 px

    Raises ValueError for a valid flow outside [-512, 512) px, which the format cannot hold.
    """
    flow, valid = check_flow(flow, valid)
    stored = np.rint(flow.astype(np.float64) * KITTI_SCALE + KITTI_OFFSET)
    fits = (stored >= 0) & (stored <= 65535)
    _check_range(flow, fits, "KITTI's PNG holds -512 to 511.98 px; write a .flo file, or mark such pixels as not valid")
    mask = valid[..., None]
    # The development kit writes three zeros where there is no flow.
    _write_png16(path, np.concatenate([np.where(mask, stored, 0), mask], axis=-1).astype(np.uint16))


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Bytes under a temporary name, then renamed; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def render_flow(flow: Any, valid: Any = None, max_magnitude: float | None = None) -> np.ndarray:
    """(H, W, 2) -> (H, W, 3) uint8 in the colours of Middlebury's wheel, black where it is not valid

    The hue is the direction (right is red, down yellow, left cyan, up violet), white is no motion, full colour is
    `max_magnitude` pixels or the longest valid flow; what is longer than `max_magnitude` is darker.
    Source: Baker et al. 2011, "A Database and Evaluation Methodology for Optical Flow", its flow-code.
    """
    flow, valid = check_flow(flow, valid)
    if max_magnitude is not None and not 0 < max_magnitude < np.inf:
        raise ValueError(f"max_magnitude={max_magnitude} is a positive number of pixels, or None for the longest flow")
    # -0.0 + 0.0 is 0.0: the angle of a flow straight to the right has one sign.
    u, v = np.moveaxis(flow.astype(np.float64), -1, 0) + 0.0
    radius = np.hypot(u, v)
    radius /= max_magnitude or radius.max() or 1.0

    wheel = _colour_wheel()
    # 54 steps for 55 colours, as Middlebury has it: a full turn ends one colour short of the red it began with.
    place = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)  # 0 .. 54
    first = place.astype(int)
    share = (place - first)[..., None]
    colour = (1 - share) * wheel[first] + share * wheel[(first + 1) % len(wheel)]  # (H, W, 3)
    length = radius[..., None]
    colour = np.where(length <= 1, 255 - length * (255 - colour), 0.75 * colour)
    return np.where(valid[..., None], colour, 0).astype(np.uint8)


def colour_wheel_legend(size: int = 151) -> np.ndarray:
    """(size, size, 3) uint8: at each place the colour of the flow that points there from the middle; black outside."""
    if size < 3:
        raise ValueError(f"size={size} of the legend is 3 pixels or more")
    axis = np.linspace(-1, 1, size)
    flow = np.stack(np.meshgrid(axis, axis), axis=-1)
    return render_flow(flow, valid=np.hypot(*np.moveaxis(flow, -1, 0)) <= 1, max_magnitude=1.0)


def warp(frame: Any, flow: Any) -> tuple[np.ndarray, np.ndarray]:
    """Second frame (H, W, 3) uint8, flow (H, W, 2) -> what the first should look like (H, W, 3) uint8, valid (H, W)

    Each pixel is looked up where its flow leads, bilinearly; not valid, and black, where that is outside the frame.
    What the second frame hides is wrong: it shows what stands in front.
    """
    flow, _ = check_flow(flow)
    frame = np.asarray(frame)
    height, width = flow.shape[:2]
    if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
        raise ValueError(
            f"a {height}x{width} flow warps a {(height, width, 3)} uint8 frame, not {frame.shape} {frame.dtype}"
        )
    x = np.arange(width) + flow[..., 0].astype(np.float64)
    y = np.arange(height)[:, None] + flow[..., 1].astype(np.float64)
    valid = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = np.where(valid, x, 0), np.where(valid, y, 0)
    left, top = x.astype(int), y.astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    x_share, y_share = (x - left)[..., None], (y - top)[..., None]
    upper = (1 - x_share) * frame[top, left] + x_share * frame[top, right]
    lower = (1 - x_share) * frame[bottom, left] + x_share * frame[bottom, right]
    warped = np.rint((1 - y_share) * upper + y_share * lower)
    return np.where(valid[..., None], warped, 0).astype(np.uint8), valid


class SintelPair(NamedTuple):
    """Files of one pair of MPI Sintel; None where the split or the download has none."""

    frame1: Path
    frame2: Path
    flow: Path | None
    invalid: Path | None
    occlusions: Path | None


class KittiPair(NamedTuple):
    """Files of one pair of KITTI; `flow` is flow_occ, which `flow_noc` is the part of that stays in the picture."""

    frame1: Path
    frame2: Path
    flow: Path | None
    flow_noc: Path | None


def sintel_pairs(root: str | os.PathLike, *, split: str = "training", render_pass: str = "clean") -> list[SintelPair]:
    """Pairs of ROOT/training/clean/SCENE/frame_0001.png and the next, with flow/SCENE/frame_0001.flo, in order.

    The split "test" has no flow. Raises ValueError for a missing folder, no frames, or a training pair without flow.
    """
    _check_choice("split", split, ("training", "test"))
    _check_choice("render_pass", render_pass, ("clean", "final", "albedo"))
    base = Path(root) / split
    scenes = sorted(path for path in _folder(base / render_pass, "MPI Sintel").iterdir() if path.is_dir())
    pairs = []
    for scene in scenes:
        frames = sorted(scene.glob("frame_*.png"))
        for first, second in pairwise(frames):
            flow, invalid, occlusions = (
                base / kind / scene.name / (first.stem + extension)
                for kind, extension in (("flow", ".flo"), ("invalid", ".png"), ("occlusions", ".png"))
            )
            pairs.append(
                SintelPair(first, second, _needed(flow, first, split), _if_there(invalid), _if_there(occlusions))
            )
    if not pairs:
        raise ValueError(f"{base / render_pass} has no SCENE/frame_*.png pairs")
    return pairs


def kitti_pairs(root: str | os.PathLike, *, split: str = "training", year: int = 2015) -> list[KittiPair]:
    """Pairs of ROOT/training/image_2/000000_10.png and _11.png (2012: colored_0) with flow_occ and flow_noc, in order.

    The split "testing" has no flow. Raises ValueError for a missing folder, no frames, a frame without its second, or
    a training pair without flow.
    """
    _check_choice("split", split, ("training", "testing"))
    _check_choice("year", year, (2015, 2012))
    base = Path(root) / split
    frames = _folder(base / ("image_2" if year == 2015 else "colored_0"), f"KITTI {year}")
    pairs = []
    for first in sorted(frames.glob("*_10.png")):
        second = first.with_name(first.name.replace("_10.png", "_11.png"))
        if not second.is_file():
            raise ValueError(f"{first} has no second frame {second.name}")
        flows = (_needed(base / kind / first.name, first, split) for kind in ("flow_occ", "flow_noc"))
        pairs.append(KittiPair(first, second, *flows))
    if not pairs:
        raise ValueError(f"{frames} has no *_10.png frames")
    return pairs


def _colour_wheel() -> np.ndarray:
    """(55, 3) float64, 0 to 255"""
    wheel = []
    for (start, end), steps in zip(pairwise(WHEEL_COLOURS), WHEEL_STEPS, strict=True):
        direction = np.sign(np.subtract(end, start))
        wheel += [start + direction * (255 * step // steps) for step in range(steps)]
    return np.array(wheel, np.float64)


def _check_sides(path: str | os.PathLike, width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ValueError(f"{path}: a size of {width}x{height} is not within 1 to {MAX_SIDE} pixels a side")


def _check_range(flow: np.ndarray, fits: np.ndarray, limit: str) -> None:
    if not fits.all():
        y, x = np.argwhere(~fits)[0][:2]
        raise ValueError(f"the flow at row {y}, column {x} is {flow[y, x].tolist()} px; {limit}")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is one of {', '.join(map(repr, choices))}")


def _folder(path: Path, data_set: str) -> Path:
    if not path.is_dir():
        raise ValueError(
            f"no folder {path}; give the folder that {data_set} was unpacked in, as its archives lay it out"
        )
    return path


def _needed(flow: Path, frame: Path, split: str) -> Path | None:
    """The path of a pair's flow, or None in a split that has none."""
    if split == "training" and not flow.is_file():
        raise ValueError(f"{frame} has no flow {flow}")
    return flow if split == "training" else None


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


# Pillow cuts 16-bit colour to 8 bits; FFmpeg's codec does not.


def _write_png16(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """(H, W, 3) uint16 -> a PNG of 16-bit RGB"""
    av = _av()
    height, width = pixels.shape[:2]
    _check_sides(path, width, height)
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "rgb48be", Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le").reformat(format="rgb48be")
    write_whole(path, b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None))))


def _read_png16(path: str | os.PathLike) -> np.ndarray:
    """A PNG of 16-bit RGB -> (H, W, 3) uint16"""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if data[:8] != PNG_SIGNATURE:
        raise ValueError(f"{path} is no PNG: it begins with {data[:8]!r}")
    # Before anything is allocated: the size, the depth and the kind of colour stand in the first chunk.
    if len(data) < 29 or data[12:16] != b"IHDR":
        raise ValueError(f"{path} is a damaged PNG: it begins with {data[12:16]!r}, not a header")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if (depth, colour) != (16, 2):
        raise ValueError(f"{path} is no KITTI flow: those are 16-bit RGB, not {depth}-bit of PNG colour type {colour}")
    _check_sides(path, width, height)
    if width * height * PNG_PIXEL_BYTES > MAX_PACKED * len(data):
        raise ValueError(f"{path} is a damaged PNG: {len(data):,} bytes cannot hold {width}x{height} pixels")
    av = _av()
    decoder = av.CodecContext.create("png", "r")
    decoder.options = {"err_detect": "crccheck+explode"}
    try:
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(f"{path} is a damaged PNG: {error}") from error
    if len(frames) != 1 or (frames[0].width, frames[0].height) != (width, height):
        raise ValueError(f"{path} is a damaged PNG: it does not hold {height} rows of {width} pixels")
    return frames[0].to_ndarray(format="rgb48le")


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("KITTI's 16-bit PNG needs PyAV: pip install hf-perceiver[video]") from None
    return av
