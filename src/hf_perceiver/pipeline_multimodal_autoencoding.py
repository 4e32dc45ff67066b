"""`pipeline("multimodal-autoencoding", model=...)`: a clip of any length -> its reconstruction, window by window."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.pipelines import Pipeline

from .arrays import QueryArray
from .media_files import VideoWriter, video_info, write_wav
from .processing_perceiver_io import ClipWindow

# A progress bar for less than that would only flicker.
QUIET_SECONDS = 2


@dataclass
class Asked:
    """What is decoded of each window.

    whole: outputs asked whole. frames: of the clip, where the video is asked for these alone. size: (T, H, W) of a grid
    of its own for the video of a window. points, coordinates: of other outputs, as in PerceiverIOModel.decode.
    """

    whole: list[str]
    frames: list[int] | None
    size: tuple[int, int, int] | None
    points: dict[str, Any]
    coordinates: dict[str, Tensor]


class MultimodalAutoencodingPipeline(Pipeline):
    """A clip -> the model's reconstruction of it and its label, window by window, each encoded once.

    A clip is the path of a video file (`pip install hf-perceiver[video]`), or a dict of `frames`, `sound`,
    `frames_per_second` and `sampling_rate`, see PerceiverIOProcessor; a list of clips gives a list of results. A result
    has by output name: the video (frames, H, W, 3) uint8, the sound (samples, 1) float32, and the label, a list of
    `{"label", "score"}` of the `top_k` likeliest classes, averaged over the windows; also `num_frames` and `num_windows`.
    The last window's padding is cut off.

    outputs: names of what is decoded, all by default. frames: indices of the clip's frames, for these alone; windows
        without any are not encoded, unless something else is asked of them. output_size: (T, H, W) of the video in a
        window, another grid than the input's. output_points, coordinates: of each window, dicts by output name as in
        PerceiverIOModel.decode; they give the model's values, (windows, n, ...), and only what they and `outputs` name is
        decoded.
    output_file: the reconstruction goes to this .mp4, .mkv or .mov, or its sound to this .wav, and the result names the
        file instead of holding it. stream=True: a generator of the windows' results, with `window` and the label of each
        alone. Both need memory for one window.
    chunk_size: queries decoded at a time. progress=False: no bar for what takes longer than two seconds.

    Raises ValueError for what cannot be used, and names the window. No file is left half-written.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._check_processor()

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        known = {"outputs", "frames", "output_size", "output_points", "coordinates", "top_k", "chunk_size", "progress"}
        if unknown := set(options) - known:
            raise ValueError(f"no option {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        return {}, options, {}

    def __call__(
        self, clips: Any, *, output_file: str | os.PathLike | None = None, stream: bool = False, **options: Any
    ) -> Any:
        """As the class says; all options for this call only."""
        if isinstance(clips, (list, tuple)):
            if output_file is not None or stream:
                raise ValueError("output_file and stream are for one clip; call the pipeline for each")
            return [self(clip, **options) for clip in clips]
        chosen = {**self._forward_params, **self._sanitize_parameters(**options)[1]}
        progress, top_k = chosen.pop("progress", True), chosen.pop("top_k", 5)
        chunk_size = chosen.pop("chunk_size", None)
        if type(top_k) is not int or top_k < 1:
            raise ValueError(f"top_k={top_k!r} is a whole number from 1")
        kind = None if output_file is None else "sound" if Path(output_file).suffix.lower() == ".wav" else "video"
        asked = self._asked(only_sound=kind == "sound", **chosen)
        self._check_file(kind, output_file, asked, stream)
        results = self._results(clip_arguments(clips), asked, chunk_size, progress)
        if stream:
            return (self._labelled(result, asked, top_k) for result in results)
        return self._labelled(self._written(results, asked, output_file, kind), asked, top_k)

    def _results(
        self, clip: dict[str, Any], asked: Asked, chunk_size: int | None, progress: bool
    ) -> Iterator[dict[str, Any]]:
        """Each window's outputs as numpy, without what is padding; labels as probabilities of all classes."""
        windows = self.processor.windows(**clip)
        length, num_frames = self.processor.image_processor.num_frames, 0
        bar = tqdm(total=self._count(clip), desc="windows", unit="window", disable=not progress, delay=QUIET_SECONDS)
        with bar:
            index = -1
            while True:
                index += 1
                try:
                    window = next(windows, None)
                    if window is None:
                        break
                    num_frames += window.num_frames
                    shown = None
                    if asked.frames is not None:
                        start = index * length
                        shown = [f - start for f in asked.frames if start <= f < start + window.num_frames]
                    if shown or asked.frames is None or asked.whole or asked.points or asked.coordinates:
                        logits = self.forward(self.preprocess(window), asked=asked, shown=shown, chunk_size=chunk_size)
                        yield self.postprocess(logits, asked=asked, window=window)
                except ValueError as error:
                    raise ValueError(f"window {index}: {error}") from error
                except RuntimeError as error:
                    raise RuntimeError(f"window {index}: {error}") from error
                bar.update()
        if asked.frames is not None and asked.frames[-1] >= num_frames:
            raise ValueError(f"frame {asked.frames[-1]} is asked for, and the clip has {num_frames:,}")

    def preprocess(self, window: ClipWindow) -> dict[str, Any]:
        inputs = {name: values.to(self.model.dtype) for name, values in window.inputs.items()}
        return {"inputs": inputs, "attention_mask": window.attention_mask}

    def _forward(
        self, model_inputs: dict[str, Any], asked: Asked, shown: list[int] | None, chunk_size: int | None
    ) -> dict[str, Tensor]:
        """A window -> its outputs, of a batch of 1; the video on its grid where frames of it are asked."""
        encoding = self.model.encode(**model_inputs)
        points: dict[str, Any] = {**dict.fromkeys(asked.whole), **asked.points}
        coordinates = dict(asked.coordinates)
        image = self.processor.image_name
        shape: tuple[int, ...] | None = None
        if asked.size is not None:
            coordinates[image], shape = self._finer_grid(asked.size), asked.size
        elif shown is not None or image in asked.whole:
            grid = self._grid(encoding)
            shape = grid if shown is None else (len(shown), *grid[1:])
            if shown:
                pixels = torch.arange(math.prod(grid[1:]))
                points[image] = (torch.tensor(shown)[:, None] * len(pixels) + pixels).flatten()
        device = encoding.latents.device
        logits = self.model.decode(
            encoding,
            output_points=points or None,
            coordinates={name: torch.as_tensor(at).to(device) for name, at in coordinates.items()} or None,
            chunk_size=chunk_size,
        )
        if shape is not None and image in logits:
            logits[image] = logits[image].reshape(1, *shape, -1)
        return logits

    def postprocess(self, logits: dict[str, Tensor], asked: Asked, window: ClipWindow) -> dict[str, Any]:
        processor, config = self.processor, self.model.config
        length = processor.image_processor.num_frames
        result: dict[str, Any] = {"window": window.index, "num_frames": window.num_frames}
        for name, values in logits.items():
            values = values[0].float()
            if name in asked.points or name in asked.coordinates:
                result[name] = values.numpy()
            elif name == processor.image_name:
                frames = processor.to_frames(values)
                real = len(frames) if asked.frames is not None else -(-len(frames) * window.num_frames // length)
                result[name] = frames[:real]
            elif name == processor.audio_name:
                sound = processor.to_sound(values)
                result[name] = sound[: round(len(sound) * window.num_frames / length)]
            elif name == processor.label_name:
                if not values.isfinite().all():
                    raise ValueError(f"the scores of {name!r} hold NaN or infinity")
                several = config.problem_type == "multi_label_classification"
                result[name] = (values.sigmoid() if several else values.softmax(-1)).numpy()
            else:
                result[name] = values.numpy()
        return result

    def _written(
        self, results: Iterator[dict[str, Any]], asked: Asked, output_file: Any, kind: str | None
    ) -> dict[str, Any]:
        """The windows' results put together, or those of them that do not go to the file."""
        image, audio = self.processor.image_name, self.processor.audio_name
        kept: dict[str, list[Any]] = {}
        counts = {"num_frames": 0, "num_windows": 0}

        def keep() -> Iterator[dict[str, Any]]:
            for result in results:
                counts["num_windows"] += 1
                counts["num_frames"] += result["num_frames"]
                for name in result.keys() - {"window", "num_frames"}:
                    if not (kind == "video" and name in (image, audio)) and not (kind == "sound" and name == audio):
                        kept.setdefault(name, []).append(result[name])
                yield result

        rate = self.processor.feature_extractor.sampling_rate
        if kind == "sound":
            write_wav(output_file, (result[audio] for result in keep()), rate)
        elif kind == "video":
            video = self.processor.image_processor
            fps = video.frames_per_second * (asked.size[0] / video.num_frames if asked.size else 1)
            sampling_rate = rate if audio in asked.whole else None
            with VideoWriter(output_file, frames_per_second=fps, sampling_rate=sampling_rate) as writer:
                for result in keep():
                    for frame in result[image]:
                        writer.write_frame(frame)
                    if sampling_rate is not None:
                        writer.write_sound(result[audio])
        else:
            for _ in keep():
                pass
        whole: dict[str, Any] = dict(counts)
        for name, parts in kept.items():
            if (
                name in asked.points
                or name in asked.coordinates
                or name not in (image, audio, self.processor.label_name)
            ):
                whole[name] = np.stack(parts)
            else:
                whole[name] = np.mean(parts, axis=0) if name == self.processor.label_name else np.concatenate(parts)
        return whole if output_file is None else {"file": os.fspath(output_file), **whole}

    def _labelled(self, result: dict[str, Any], asked: Asked, top_k: int) -> dict[str, Any]:
        """Probabilities -> the likeliest classes by name."""
        name = self.processor.label_name
        if name in asked.whole and np.ndim(result[name]) == 1:
            names = self.model.config.id2label
            order = np.argsort(-result[name], kind="stable")[:top_k].tolist()
            scores = [{"label": names.get(i, str(i)), "score": float(result[name][i])} for i in order]
            result = {**result, name: scores}
        return result

    def _asked(
        self,
        only_sound: bool,
        outputs: Sequence[str] | None = None,
        frames: Sequence[int] | None = None,
        output_size: Sequence[int] | None = None,
        output_points: Mapping[str, Any] | None = None,
        coordinates: Mapping[str, Any] | None = None,
    ) -> Asked:
        """The options, checked before anything is read."""
        known, image = sorted(self.model.config.output_query["modalities"]), self.processor.image_name
        points, places = dict(output_points or {}), dict(coordinates or {})
        if isinstance(outputs, str):
            outputs = [outputs]
        whole = list(outputs or ([] if points or places else known))
        if only_sound and outputs is None:
            whole = [name for name in whole if name != image]
        for what, names in (("outputs", whole), ("output_points", points), ("coordinates", places)):
            for name in names:
                if name not in known:
                    raise ValueError(f"{what} names {name!r}; the model's outputs are {', '.join(known)}")
        if twice := (set(whole) & (set(points) | set(places))) | (set(points) & set(places)):
            raise ValueError(f"{', '.join(sorted(twice))}: asked whole and at points or coordinates; choose one")
        if frames is not None or output_size is not None:
            if frames is not None and output_size is not None:
                raise ValueError("frames are of the input's grid; give them or output_size, not both")
            if image not in whole:
                raise ValueError(f"frames and output_size are of the video; add {image!r} to outputs")
            whole.remove(image)
        return Asked(whole, _check_frames(frames), _check_size(output_size), points, places)

    def _check_file(self, kind: str | None, output_file: Any, asked: Asked, stream: bool) -> None:
        if kind is None:
            return
        image, audio = self.processor.image_name, self.processor.audio_name
        if stream:
            raise ValueError("stream=True gives the windows to you; leave out output_file, or stream")
        if kind == "sound" and audio not in asked.whole:
            raise ValueError(f"{os.fspath(output_file)} holds sound; add {audio!r} to outputs")
        if kind == "video" and not (image in asked.whole or asked.size):
            raise ValueError(f"{os.fspath(output_file)} holds all frames; add {image!r} to outputs, without frames")

    def _grid(self, encoding: Any) -> tuple[int, ...]:
        """(T, H, W) of the video's queries"""
        base: Any = getattr(self.model, "perceiver", self.model)
        name = self.processor.image_name
        grid = QueryArray.of(base.output_query(encoding.input_array, {name: None})).part.grid
        if grid is None or len(grid) != 3:
            raise ValueError(f"the queries of {name!r} stand on no grid (T, H, W); ask output_points")
        return grid

    def _finer_grid(self, size: tuple[int, int, int]) -> Tensor:
        """(T, H, W) -> coordinates (T*H*W, 3), by the rule that the model was trained with"""
        name = self.processor.image_name
        position = self.model.config.output_query["modalities"][name].get("position") or {}
        rule = position.get("rule", "dense")
        if position.get("kind") != "fourier" or rule not in ("dense", "sampled"):
            raise ValueError(
                f"output_size needs queries of kind 'fourier' by the rule 'dense' or 'sampled', not {position or 'none'}"
            )
        # As the position itself: DeepMind's sub-sampled points never reach +1.
        axes = [torch.linspace(-1, 1, n) if rule == "dense" else -1 + 2 * torch.arange(n) / n for n in size]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)

    def _count(self, clip: dict[str, Any]) -> int | None:
        """About how many windows a clip has, for the bar; None where nothing says it."""
        video, settings = clip["video"], self.processor.image_processor
        if isinstance(video, (str, os.PathLike)):
            info = video_info(video)
            count, rate = info.num_frames, info.frames_per_second
        else:
            count = len(video) if hasattr(video, "__len__") else None
            rate = clip.get("frames_per_second") or settings.frames_per_second
        return None if count is None else math.ceil(count * settings.frames_per_second / rate / settings.num_frames)

    def _check_processor(self) -> None:
        """Raise ValueError where the processor makes what the model does not read, or lacks what it needs."""
        processor, config = self.processor, self.model.config
        if not hasattr(processor, "image_name"):
            raise ValueError(f"a PerceiverIOProcessor is needed, not a {type(processor).__name__}; give processor=")
        spec, query = getattr(config, "preprocessor", None) or {}, getattr(config, "output_query", None) or {}
        if spec.get("kind") != "multimodal" or query.get("kind") != "multimodal":
            raise ValueError(
                f"multimodal autoencoding needs a PerceiverIOForMultimodalAutoencoding, not a {type(self.model).__name__}"
            )
        made = {processor.image_name, processor.audio_name}
        if processor.num_labels is not None:
            made.add(processor.label_name)
        masked = spec.get("masked_at_inference")
        if masked is None:
            masked = [name for name, probability in (spec.get("mask_probs") or {}).items() if probability == 1]
        for problem, names in (
            ("makes, and the model does not read,", made - set(spec["modalities"])),
            ("lacks", set(spec["modalities"]) - made - set(masked)),
        ):
            if names:
                raise ValueError(
                    f"the processor {problem} {', '.join(sorted(names))}; the model reads "
                    f"{', '.join(sorted(spec['modalities']))}: set image_name, audio_name, label_name and num_labels"
                )
        classes = spec["modalities"].get(processor.label_name, {}).get("channels", processor.num_labels)
        if processor.num_labels is not None and classes != processor.num_labels:
            raise ValueError(
                f"the model's label has {classes} classes, the processor's num_labels={processor.num_labels}"
            )


def clip_arguments(clip: Any) -> dict[str, Any]:
    """A path or a dict -> keyword arguments of PerceiverIOProcessor.windows"""
    if isinstance(clip, (str, os.PathLike)):
        return {"video": clip}
    known = ("frames", "sound", "frames_per_second", "sampling_rate")
    if not isinstance(clip, Mapping) or "frames" not in clip:
        raise ValueError(f"a clip is the path of a video, or a dict of {', '.join(known)}, not {type(clip).__name__}")
    for name in clip:
        if name not in known:
            raise ValueError(f"a clip has no {name!r}; known: {', '.join(known)}")
    given = {name: value for name, value in clip.items() if value is not None}
    return {"video" if name == "frames" else name: value for name, value in given.items()}


def _check_frames(frames: Any) -> list[int] | None:
    if frames is None:
        return None
    chosen = np.asarray(frames)
    if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu" or (chosen < 0).any():
        raise ValueError(f"frames are indices of the clip's frames from 0, at least one, not {frames!r}")
    return sorted(set(chosen.tolist()))


def _check_size(size: Any) -> tuple[int, int, int] | None:
    if size is None:
        return None
    numbers = tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(numbers) != 3 or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"output_size is (T, H, W), whole numbers from 1, not {size!r}")
    return numbers
