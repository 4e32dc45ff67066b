"""`pipeline("optical-flow", model=...)`: frames, folders, videos, endless generators -> flow in pixels."""

import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.image_utils import is_pil_image
from transformers.pipelines import Pipeline

from .image_processing_perceiver_io import FlowStitcher, check_memory, is_pair
from .registry import STEMS

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Of the input array, while the direct form reads it; the fast forms take less than one. Measured on the CPU: the process
# grew by 4.2 copies of it at 184x248 and 368x496 in float32, by 4.0 in bfloat16; decoding takes no more.
ARRAY_COPIES = 4


class OpticalFlowPipeline(Pipeline):
    """Frames -> `{"flow": (H, W, 2) float32 in pixels, x then y}`, from each frame to the next.

    A tuple of two frames gives its flow at once, a list of such pairs a list. A list of frames, a folder of images (in
    natural order), a video file (`pip install hf-perceiver[video]`), or any iterator of frames or of pairs, endless ones
    too, gives a generator: n frames, n - 1 flows, made as they are asked for. A frame is an image, an array, a tensor or
    the path of an image; what the values may be, see PerceiverIOFlowImageProcessor.

    batch_size: tiles that the model reads at a time, of one pair or several. chunk_size: pixels that it decodes at a
        time, for bounded memory. render: add "picture" (H, W, 3) uint8, the flow in the colours of Middlebury's wheel, where
        `max_magnitude` pixels are full colour (by default each flow's longest). progress: a bar.

    Raises ValueError for a model and a processor that disagree, and for input that cannot be used. A sequence that fails
    at frame n has given all flows before it; the error names n.
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        name = type(self.image_processor).__name__
        if not hasattr(self.image_processor, "stitcher"):
            raise ValueError(f"optical flow needs a PerceiverIOFlowImageProcessor, not a {name}; give image_processor=")
        read_out = getattr(self.model.config, "postprocessor", None)
        if not read_out or self.model.main_input_name != "pixel_values":
            raise ValueError(
                f"optical flow needs a PerceiverIOForOpticalFlow, not a {type(self.model).__name__}; a checkpoint of "
                "transformers' own Perceiver loads as one"
            )
        trained = read_out.get("scale_factor", 20.0)
        if trained != self.image_processor.flow_scale_factor:
            raise ValueError(
                f"the model's flow times {trained} is in pixels (its postprocessor's scale_factor), and the image processor "
                f"multiplies by {self.image_processor.flow_scale_factor} (its flow_scale_factor); make them equal"
            )

    def _sanitize_parameters(
        self,
        progress: bool | None = None,
        chunk_size: int | None = None,
        render: bool | None = None,
        max_magnitude: float | None = None,
    ) -> tuple[dict, dict, dict]:
        given = {"progress": progress}, {"chunk_size": chunk_size}, {"render": render, "max_magnitude": max_magnitude}
        before, during, after = ({k: v for k, v in options.items() if v is not None} for options in given)
        return before, during, after

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        """As the class says; batch_size, chunk_size, render, max_magnitude and progress for this call only."""
        batch_size = next(size for size in (batch_size, self._batch_size, 1) if size is not None)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is a whole number of tiles from 1")
        given = zip(
            (self._preprocess_params, self._forward_params, self._postprocess_params),
            self._sanitize_parameters(**kwargs),
            strict=True,
        )
        before, during, after = ({**always, **now} for always, now in given)
        self._check_memory(num_tiles=1)
        frames, total, found = _source(inputs)
        results = self._flows(frames, total, batch_size, before.get("progress", False), during, after)
        if found == "frames":
            return results
        return list(results) if found == "pairs" else next(results)

    def _flows(
        self, frames: Iterable[Any], total: int | None, batch_size: int, progress: bool, during: dict, after: dict
    ) -> Iterator[dict[str, np.ndarray]]:
        """Results in order; what waits is one batch of tiles, and the pairs that they are of."""
        pairs = self.image_processor.pairs(map(open_frame, frames))
        batch: list[tuple[np.ndarray, FlowStitcher]] = []
        waiting: deque[FlowStitcher] = deque()
        failure = None
        with tqdm(total=total, desc="flow", unit="pair", disable=not progress) as bar:

            def finished() -> Iterator[dict[str, np.ndarray]]:
                while waiting and waiting[0].complete:
                    result = self.postprocess(waiting.popleft().flow(), **after)
                    bar.update()
                    yield result

            while True:
                try:
                    first, second = next(pairs)
                except StopIteration:
                    break
                except ValueError as error:
                    # Pairs before it come first, though they wait for a batch to be full.
                    failure = error
                    break
                waiting.append(self.image_processor.stitcher(*first.shape[1:]))
                for tile in self.image_processor.tiles(first, second):
                    batch.append((tile, waiting[-1]))
                    if len(batch) == batch_size:
                        self._run(batch, during)
                        batch = []
                        yield from finished()
            if batch:
                self._run(batch, during)
            yield from finished()
        if failure is not None:
            raise failure

    def _run(self, batch: list[tuple[np.ndarray, FlowStitcher]], during: dict) -> None:
        """Give each tile's flow to its pair."""
        flows = self.forward(self.preprocess([tile for tile, _ in batch]), **during)["logits"]
        for flow, (_, stitcher) in zip(flows, batch, strict=True):
            stitcher.add(flow)

    def preprocess(self, tiles: list[np.ndarray]) -> dict[str, Tensor]:
        """(2, C, h, w) each -> the model's input (tiles, 2, C, h, w)"""
        self._check_memory(len(tiles))
        return {"pixel_values": torch.from_numpy(np.stack(tiles)).to(self.model.dtype)}

    def _check_memory(self, num_tiles: int) -> None:
        """Raise ValueError where so many tiles need more memory, beyond the weights, than the device has."""
        if self.device.type not in ("cpu", "cuda"):
            return
        height, width = self.image_processor.tile_size["height"], self.image_processor.tile_size["width"]
        features = (1, 2, 3 * self.image_processor.patch_size**2, height, width)
        elements = height * width
        if self.model.config.preprocessor["kind"] == "grid":
            with torch.device("meta"):
                elements = STEMS.build(self.model.config.preprocessor["stem"])(torch.empty(features))[..., 0].numel()
        base: Any = getattr(self.model, "perceiver", self.model)
        values = math.prod(features) + ARRAY_COPIES * elements * base.preprocessor.channels
        is_cuda = self.device.type == "cuda"
        check_memory(
            num_tiles * values * self.model.dtype.itemsize,
            f"{num_tiles} tile{'s' * (num_tiles > 1)} of {height}x{width}",
            "take a smaller batch_size, or an image processor whose tile_size is nearer to the model's training size",
            torch.cuda.get_device_properties(self.device).total_memory if is_cuda else None,
        )

    def _forward(self, model_inputs: dict[str, Tensor], **forward_parameters: Any) -> dict[str, Tensor]:
        return {"logits": self.model(**model_inputs, **forward_parameters).logits}

    def postprocess(
        self, flow: Tensor, render: bool = False, max_magnitude: float | None = None
    ) -> dict[str, np.ndarray]:
        """(H, W, 2) in pixels -> the result"""
        result = {"flow": flow.numpy()}
        if render:
            from .flow_files import render_flow

            result["picture"] = render_flow(result["flow"], max_magnitude=max_magnitude)
        return result


def _source(inputs: Any) -> tuple[Iterable[Any], int | None, str]:
    """What was given -> its frames or pairs, how many flows that makes where it is known, and "pair", "pairs" or "frames"

    Raises ValueError for what can be told before the first frame is opened.
    """
    if isinstance(inputs, (str, os.PathLike)):
        path = Path(inputs)
        if path.is_dir():
            files = frame_files(path)
            return files, len(files) - 1, "frames"
        if not path.is_file():
            raise ValueError(f"there is no file or folder {path}")
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{path} is one frame, and flow needs two; give a pair, a folder or a video")
        from .media_files import read_frames, video_info

        count = video_info(path).num_frames
        return read_frames(path), None if count is None else count - 1, "frames"
    if isinstance(inputs, tuple):
        if len(inputs) != 2:
            raise ValueError(f"a tuple is a pair of frames, and this has {len(inputs)}; give a list of frames in order")
        return [inputs], 1, "pair"
    if is_pil_image(inputs) or getattr(inputs, "ndim", None) in (2, 3):
        raise ValueError("one frame is given, and flow needs two; give a tuple of two, or frames in order")
    if getattr(inputs, "ndim", None) == 5 or (isinstance(inputs, list) and inputs and is_pair(inputs[0])):
        return inputs, len(inputs), "pairs"
    if isinstance(inputs, dict) or not (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")):
        raise ValueError(f"frames are a pair, a list, a folder, a video or an iterator, not {type(inputs).__name__}")
    if not hasattr(inputs, "__len__"):
        return inputs, None, "frames"
    if len(inputs) < 2:
        raise ValueError(f"{len(inputs) or 'no'} frame{'s' * (len(inputs) != 1)} given, and flow needs two")
    return inputs, len(inputs) - 1, "frames"


def frame_files(folder: str | os.PathLike) -> list[Path]:
    """The images of a folder in natural order, frame2 before frame10. ValueError for less than two."""
    files = [p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if len(files) < 2:
        raise ValueError(
            f"{folder} has {len(files) or 'no'} frame{'s' * (len(files) != 1)}, and flow needs two; frames are files "
            f"named {', '.join('*' + suffix for suffix in IMAGE_SUFFIXES)}"
        )
    return sorted(files, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[Any]:
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)] + [name]


def open_frame(item: Any) -> Any:
    """Paths of images -> the images, in a pair too; anything else as it is."""
    if is_pair(item) and isinstance(item, (list, tuple)):
        return [open_frame(frame) for frame in item]
    if not isinstance(item, (str, os.PathLike)):
        return item
    from PIL import Image, ImageOps

    try:
        with Image.open(item) as image:
            return ImageOps.exif_transpose(image)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"{item}: {reason}") from error
