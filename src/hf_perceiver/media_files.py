"""Video, sound and picture files <-> arrays, streaming: PyAV for files, soxr for sampling rates, Pillow for pictures.

Frames are (H, W, 3) uint8 RGB, sound is (samples, channels) float32 in [-1, 1]. What cannot be read or written is a
ValueError that names the file. Files are written under a temporary name, then renamed.
"""

import contextlib
import itertools
import os
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

# So many frames, 40 s at 25 a second, tell whether a video's frame rate varies.
PROBED_FRAMES = 1_000
# The first packets of a video may arrive out of order by as many as a decoder holds back.
REORDERED_FRAMES = 16
# What AAC, the sound of an .mp4, knows.
AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself: sizes as shown (after rotation), frames a second, sound in Hz.

    num_frames and sampling_rate are None where the file does not say, and where it has no sound.
    """

    width: int
    height: int
    frames_per_second: float
    num_frames: int | None
    sampling_rate: int | None
    variable_frame_rate: bool


def video_info(path: str | os.PathLike) -> VideoInfo:
    """Sizes and rates of a video file, from its header, its first frame and the times of its first 1,000 frames.

    Raises ValueError where `read_frames` would: no file, no media file, no video in it, a damaged first frame.
    """
    with _opened(path) as container:
        stream = _video_stream(container, path)
        times = _frame_times(container, stream)
    with _opened(path) as container:
        stream = _video_stream(container, path)
        first = next(_decoded(container, stream, path))[1]
        sound = container.streams.audio
        return VideoInfo(
            width=first.shape[1],
            height=first.shape[0],
            frames_per_second=float(_frame_rate(stream)),
            num_frames=stream.frames or None,
            sampling_rate=sound[0].rate if sound else None,
            variable_frame_rate=_varies(times, float(stream.time_base)),
        )


def read_frames(path: str | os.PathLike, *, frames_per_second: float | None = None) -> Iterator[np.ndarray]:
    """The frames of a video, (H, W, 3) uint8 each, one in memory at a time.

    frames_per_second: the video is resampled in time, each new frame being the old one nearest to its time; repeated
    frames are the same array. So is one of variable frame rate made constant. None gives the frames as they are.

    Raises ValueError at once for what is no video, and while reading for a frame that is damaged, by its number.
    """
    if frames_per_second is not None and not 0 < frames_per_second < np.inf:
        raise ValueError(
            f"frames_per_second={frames_per_second} is a positive number, or None for the frames as stored"
        )
    video_info(path)
    return _read_frames(path, frames_per_second)


def _read_frames(path: str | os.PathLike, frames_per_second: float | None) -> Iterator[np.ndarray]:
    with _opened(path) as container:
        stream = _video_stream(container, path)
        frames = _decoded(container, stream, path)
        if frames_per_second is None:
            yield from (frame for _, frame in frames)
            return
        yield from frames_at_rate(frames, frames_per_second, 1 / float(_frame_rate(stream)))


def frames_at_rate(
    timed_frames: Iterable[tuple[float, Any]], frames_per_second: float, usual_duration: float
) -> Iterator[Any]:
    """(seconds, frame) in order of time -> frames at a constant rate, each the one nearest to its time.

    usual_duration: seconds that a frame is shown; the last one is shown so long, or as briefly as the one before it.
    """
    frames = iter(timed_frames)
    try:
        start, before = next(frames)
    except StopIteration:
        return
    shown, duration, asked = start, usual_duration, 0  # asked: frames of the new rate so far
    for time, frame in frames:
        # A new frame belongs to the older of two neighbours up to the middle between them.
        while start + asked / frames_per_second <= (shown + time) / 2:
            yield before
            asked += 1
        duration = min(usual_duration, time - shown) if time > shown else usual_duration
        shown, before = time, frame
    # At least one; and a quarter of a frame is left out, so that times rounded to a file's clock do not add one.
    while asked < max((shown - start + duration) * frames_per_second - 0.25, 1):
        yield before
        asked += 1


def read_sound(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The sound of a video or sound file: (samples, channels) float32 in [-1, 1], and its rate in Hz

    In a video the first sample is at the time of the first frame: sound that begins later follows silence.
    Raises ValueError where there is no sound, or a damaged one. For hours of it see `stream_sound`.
    """
    with _opened(path) as container:
        rate = _sound_stream(container, path).rate
        return np.concatenate(list(_decoded_sound(container, path))), rate


def stream_sound(path: str | os.PathLike, sampling_rate: int) -> Iterator[np.ndarray]:
    """What `read_sound` reads, resampled to `sampling_rate`, as blocks (some samples, channels) in bounded memory."""
    with _opened(path) as container:
        rate = _sound_stream(container, path).rate
        resampler = _Resampler(rate, sampling_rate)
        for block in _decoded_sound(container, path):
            yield resampler(block)
        yield resampler.rest()


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(samples, channels) or (samples,) at `rate` Hz -> the same float32 sound at `new_rate` Hz, by soxr."""
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or samples.dtype.kind != "f":
        raise ValueError(f"sound is (samples,) or (samples, channels) floats, not {samples.shape} {samples.dtype}")
    _check_rates(rate, new_rate)
    if rate == new_rate or not len(samples):
        return samples.astype(np.float32)
    return _import_soxr().resample(samples.astype(np.float32), rate, new_rate)


class VideoWriter:
    """Writes a video file frame by frame, with sound where `sampling_rate` is given; the suffix names the format.

    with VideoWriter("clip.mp4", frames_per_second=25, sampling_rate=48_000) as writer:
        writer.write_frame(frame)  # (H, W, 3) uint8
        writer.write_sound(samples)  # (samples,) or (samples, channels) floats in [-1, 1]

    Frames and sound may come in any order. The file appears under its name when the block ends well, and not at all
    when it ends in an error. channels: of the sound, 1 or 2. A rate that AAC lacks is resampled to the next higher one.
    Video is H.264 (frames of odd size in 4:4:4, which some players lack), or MPEG-4 where PyAV was built without x264.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        frames_per_second: float,
        sampling_rate: int | None = None,
        channels: int = 1,
    ):
        if not 0 < frames_per_second < np.inf:
            raise ValueError(f"frames_per_second={frames_per_second} is a positive number")
        if channels not in (1, 2):
            raise ValueError(f"channels={channels}: sound is written in 1 channel or 2")
        if sampling_rate is not None:
            _check_rates(sampling_rate)
        av = _import_av()
        self.path, self.channels, self.sampling_rate = Path(path), channels, sampling_rate
        self._partial = _partial_name(self.path)
        try:
            self._container = av.open(str(self._partial), mode="w")
        except (ValueError, OSError) as error:
            self._partial.unlink(missing_ok=True)
            raise ValueError(
                f"cannot write {self.path}: {_reason(error)}; name a writable .mp4, .mkv or .mov"
            ) from error
        self._rate = Fraction(frames_per_second).limit_denominator(1001)
        self._video: Any = None
        self._sound: Any = None
        self._frames = self._samples = 0
        self._early_sound: list[np.ndarray] = []
        if sampling_rate is not None:
            sound_rate = next((rate for rate in AAC_RATES if rate >= sampling_rate), AAC_RATES[-1])
            self._resampler = _Resampler(sampling_rate, sound_rate)
            self._sound = self._container.add_stream("aac", rate=sound_rate, layout=("mono", "stereo")[channels - 1])

    def write_frame(self, frame: np.ndarray) -> None:
        """(H, W, 3) uint8, of the same size as the first."""
        av = _import_av()
        frame = np.asarray(frame)
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or not frame.size:
            raise ValueError(f"a frame is (H, W, 3) uint8, not {frame.shape} {frame.dtype}")
        if self._video is None:
            self._video = self._add_video(*frame.shape[:2])
        if (self._video.height, self._video.width) != frame.shape[:2]:
            raise ValueError(
                f"frame {self._frames} is {frame.shape[0]}x{frame.shape[1]}, the first one was "
                f"{self._video.height}x{self._video.width}"
            )
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self._frames, 1 / self._rate
        self._container.mux(self._video.encode(picture))
        self._frames += 1
        # A file begins with its list of streams, so sound waits for the first frame.
        for samples in self._early_sound:
            self._encode_sound(samples)
        self._early_sound.clear()

    def write_sound(self, samples: np.ndarray) -> None:
        """(samples,) or (samples, channels) floats; what is beyond [-1, 1] is clipped."""
        if self._sound is None:
            raise ValueError("this file was begun without sound; give VideoWriter its sampling_rate")
        samples = check_sound(samples)
        if samples.shape[1] != self.channels:
            raise ValueError(f"{samples.shape[1]} channels of sound for a file with {self.channels}; set channels")
        if self._video is None:
            self._early_sound.append(samples)
        else:
            self._encode_sound(samples)

    def _add_video(self, height: int, width: int) -> Any:
        av = _import_av()
        codecs = av.codecs_available
        codec, options = ("libx264", {"crf": "18"}) if "libx264" in codecs else ("mpeg4", {"qmax": "4"})
        stream = self._container.add_stream(codec, rate=self._rate, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if codec == "libx264" and (width % 2 or height % 2) else "yuv420p"
        stream.codec_context.time_base = 1 / self._rate
        return stream

    def _encode_sound(self, samples: np.ndarray, last: bool = False) -> None:
        av = _import_av()
        blocks = [self._resampler(samples)] + ([self._resampler.rest()] if last else [])
        for block in blocks:
            if not len(block):
                continue
            planes = np.ascontiguousarray(block.clip(-1, 1).T)
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=self._sound.layout.name)
            frame.sample_rate, frame.pts = self._sound.rate, self._samples
            frame.time_base = Fraction(1, self._sound.rate)
            self._container.mux(self._sound.encode(frame))
            self._samples += len(block)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                if not self._frames:
                    raise ValueError(f"no frame was written to {self.path}")
                if self._sound is not None:
                    self._encode_sound(np.zeros((0, self.channels), np.float32), last=True)
                    self._container.mux(self._sound.encode(None))
                self._container.mux(self._video.encode(None))
            with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
                self._container.close()
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def write_wav(path: str | os.PathLike, samples: np.ndarray | Iterator[np.ndarray], rate: int) -> None:
    """(samples,) or (samples, channels) floats, or an iterator of such blocks -> a .wav file of 16 bits

    What is beyond [-1, 1] is clipped.
    """
    _check_rates(rate)
    blocks = map(check_sound, samples if isinstance(samples, Iterator) else [samples])
    first = next(blocks, None)
    if first is None:
        raise ValueError(f"no sound was given to write to {os.fspath(path)}")
    partial = _partial_name(Path(path))
    try:
        with wave.open(str(partial), "wb") as file:
            file.setnchannels(first.shape[1])
            file.setsampwidth(2)
            file.setframerate(rate)
            for block in itertools.chain([first], blocks):
                if block.shape[1] != first.shape[1]:
                    raise ValueError(
                        f"a block of {block.shape[1]} channels of sound, those before had {first.shape[1]}"
                    )
                file.writeframes(np.clip(np.rint(block * 32768), -32768, 32767).astype("<i2").tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_image(path: str | os.PathLike, picture: np.ndarray) -> None:
    """(H, W, 3) uint8 -> a .png file"""
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("Pillow") from error
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(f"a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    partial = _partial_name(Path(path))
    try:
        Image.fromarray(picture).save(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_sound(samples: Any) -> np.ndarray:
    """(samples,) or (samples, channels) finite floats -> (samples, channels) float32"""
    samples = np.asarray(samples)
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or not samples.shape[1] or samples.dtype.kind != "f":
        raise ValueError(
            f"sound is (samples,) or (samples, channels) floats in [-1, 1], not {samples.shape} {samples.dtype}; divide "
            "16-bit integers by 32768"
        )
    bad = ~np.isfinite(samples)
    if bad.any():
        raise ValueError(
            f"sound is not finite at sample {int(np.argwhere(bad)[0][0])} ({int(bad.sum()):,} such values)"
        )
    return samples.astype(np.float32)


class _Resampler:
    """Resamples a sound that comes in blocks (samples, channels): what it returns, joined, is the whole."""

    def __init__(self, rate: int, new_rate: int):
        _check_rates(rate, new_rate)
        self.rates = rate, new_rate
        self._stream: Any = None
        self._channels = 1

    def __call__(self, block: np.ndarray) -> np.ndarray:
        self._channels = block.shape[1]
        if self.rates[0] == self.rates[1]:
            return block
        if self._stream is None:
            self._stream = _import_soxr().ResampleStream(*self.rates, self._channels, dtype="float32")
        return self._stream.resample_chunk(block)

    def rest(self) -> np.ndarray:
        """The end, which the resampler holds back until it knows that there is no more."""
        nothing = np.zeros((0, self._channels), np.float32)
        return nothing if self._stream is None else self._stream.resample_chunk(nothing, last=True)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    """A file opened by PyAV; whatever goes wrong with it is a ValueError that names it."""
    av = _import_av()
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {os.fspath(path)}")
    try:
        container = av.open(os.fspath(path))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{os.fspath(path)} is no video or sound file that can be read, or a damaged one ({_reason(error)})"
        ) from error
    with container:
        # To FFmpeg any text is the recording of a terminal.
        if container.format.name == "tty":
            raise ValueError(f"{os.fspath(path)} is no video or sound file but a text")
        yield container


def _video_stream(container: Any, path: str | os.PathLike) -> Any:
    av = _import_av()
    # A song's cover is a video stream, too.
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise ValueError(f"{os.fspath(path)} has no video in it")
    if "mp4" in container.format.name:
        # Its index knows where every frame lies; a reader of the frames would just find fewer.
        needed = max((entry.pos + entry.size for entry in streams[0].index_entries), default=0)
        if needed > os.path.getsize(path):
            raise ValueError(f"{os.fspath(path)} is cut off: {os.path.getsize(path):,} bytes of at least {needed:,}")
    return streams[0]


def _sound_stream(container: Any, path: str | os.PathLike) -> Any:
    if not container.streams.audio:
        raise ValueError(f"{os.fspath(path)} has no sound in it")
    return container.streams.audio[0]


def _frame_rate(stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    return rate or Fraction(25)


def _decoded(container: Any, stream: Any, path: str | os.PathLike) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, frame (H, W, 3)) of a video stream; at least one."""
    rate, shape, index = _frame_rate(stream), None, 0
    frames = container.decode(stream)
    while True:
        try:
            picture = next(frames, None)
        except (ValueError, OSError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged or cut off at frame {index} ({_reason(error)})") from error
        if picture is None:
            break
        if picture.is_corrupt:
            raise ValueError(f"{os.fspath(path)} is damaged at frame {index}")
        # Telephones store what they film sideways and say so.
        frame = np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90))
        if shape is not None and frame.shape != shape:
            raise ValueError(
                f"frame {index} of {os.fspath(path)} is {frame.shape[0]}x{frame.shape[1]}, those before were "
                f"{shape[0]}x{shape[1]}; cut the file where the size changes"
            )
        shape = frame.shape
        yield (float(index / rate) if picture.time is None else picture.time), np.ascontiguousarray(frame)
        index += 1
    if not index:
        raise ValueError(f"{os.fspath(path)} holds no frames")


def _decoded_sound(container: Any, path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Blocks (some samples, channels) float32 of the sound, from the video's first frame on; at least one sample."""
    av = _import_av()
    stream = _sound_stream(container, path)
    video = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    origin = float((video[0].start_time or 0) * video[0].time_base) if video else None
    converter = av.AudioResampler(format="fltp")
    missing, count = None, 0  # samples of silence to put before the sound; less than 0: to take away
    frames = container.decode(stream)
    while True:
        try:
            frame = next(frames, None)
        except (ValueError, OSError) as error:
            seconds = count / stream.rate
            raise ValueError(
                f"the sound of {os.fspath(path)} is damaged or cut off at {seconds:.2f} s ({_reason(error)})"
            ) from error
        if missing is None and frame is not None:
            missing = 0 if origin is None or frame.time is None else round((frame.time - origin) * stream.rate)
        for converted in converter.resample(frame):
            block = np.ascontiguousarray(converted.to_ndarray().T)
            if missing and missing > 0:
                block = np.concatenate([np.zeros((missing, block.shape[1]), np.float32), block])
                missing = 0
            elif missing:
                drop = min(-missing, len(block))
                block, missing = block[drop:], missing + drop
            count += len(block)
            yield block
        if frame is None:
            break
    if not count:
        raise ValueError(f"the sound of {os.fspath(path)} is empty")


def _frame_times(container: Any, stream: Any) -> list[float]:
    """Seconds at which the first PROBED_FRAMES frames are shown, without decoding them."""
    try:
        packets = itertools.islice(container.demux(stream), PROBED_FRAMES)
        times = sorted(float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None)
    except (ValueError, OSError):  # damaged later on, which is for the reader of that frame to say
        return []
    return times[:-REORDERED_FRAMES] if len(times) >= PROBED_FRAMES - 1 else times


def _varies(times: list[float], tick: float) -> bool:
    """Whether frames stand at unequal distances, more so than rounding to the file's clock explains."""
    distances = np.diff(times)
    if len(distances) < 2:
        return False
    usual = float(np.median(distances))
    return bool(np.abs(distances - usual).max() > max(0.1 * usual, 1.5 * tick))


def _check_rates(*rates: Any) -> None:
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or rate < 1:
            raise ValueError(f"a sampling rate is a whole number of Hz from 1, not {rate!r}")


def _partial_name(path: Path) -> Path:
    """A temporary name beside `path`; ValueError where nothing can be written there."""
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def _reason(error: Exception) -> str:
    # FFmpeg's own words are long: they end in its last log line.
    return getattr(error, "strerror", None) or str(error)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise _missing("PyAV") from error
    return av


def _import_soxr() -> Any:
    try:
        import soxr
    except ImportError as error:
        raise _missing("soxr") from error
    return soxr


def _missing(library: str) -> ValueError:
    return ValueError(f"this needs {library}, which is not installed: pip install hf-perceiver[video]")
