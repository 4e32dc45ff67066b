"""Video, sound and pictures through files that the tests write themselves, with PyAV's own encoders."""

import os
import sys
from fractions import Fraction

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hf_perceiver import media_files
from hf_perceiver.media_files import (
    VideoInfo,
    VideoWriter,
    check_sound,
    frames_at_rate,
    read_frames,
    read_sound,
    resample,
    stream_sound,
    video_info,
    write_image,
    write_wav,
)

av = pytest.importorskip("av")
pytest.importorskip("soxr")

# What H.264 at a constant rate factor of 18 does to smooth pictures, in steps of 255; measured here: at most 5.
CODED = 8
# Of a sound's root mean square, what AAC changes; measured here: 0.04.
CODED_SOUND = 0.1


def smooth_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frame k tells k by two flat halves, in steps far larger than what coding changes; the colours are not grey."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for k, frame in enumerate(frames):
        frame[:, : width // 2] = (30 * (k // 8), 30 * (k // 8), 90)
        frame[:, width // 2 :] = (30 * (k % 8), 60, 30 * (k % 8))
    return list(frames)


def smooth_sound(samples: int, seed: int = 0) -> np.ndarray:
    """Noise of low frequencies in [-0.3, 0.3]; unlike a tone, it fits itself at one place only."""
    steps = np.random.default_rng(seed).normal(size=samples + 200).cumsum()
    sound = steps - np.convolve(steps, np.ones(200) / 200, "same")
    sound = np.convolve(sound, np.hanning(60), "same")[100:-100]
    return (0.3 * sound / np.abs(sound).max()).astype(np.float32)


def write_clip(path, frames, sound=None, frames_per_second=25.0, sampling_rate=48_000, **options):
    rate = None if sound is None else sampling_rate
    with VideoWriter(path, frames_per_second=frames_per_second, sampling_rate=rate, **options) as writer:
        for frame in frames:
            writer.write_frame(frame)
        if sound is not None:
            writer.write_sound(sound)
    return path


def write_at_times(path, milliseconds, rotation=0, codec="libx264", options=None):
    """A clip whose frames stand at the given times, its k-th frame being smooth_frames' k-th."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for frame, time in zip(smooth_frames(len(milliseconds)), milliseconds, strict=True):
            if rotation:
                frame = frame.copy()
                frame[:10] = 255  # the top, as stored
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def assert_same_sound(got: np.ndarray, want: np.ndarray) -> None:
    """Equal but for the coding, and not one sample too early or too late, which would be further off."""
    assert got.shape == want.shape
    errors = [np.sqrt(np.mean((np.roll(got, shift, axis=0) - want)[1:-1] ** 2)) for shift in (-1, 0, 1)]
    assert errors[1] < CODED_SOUND * np.sqrt(np.mean(want**2))
    assert errors[1] == min(errors)


def number_of(frame: np.ndarray) -> int:
    """Which of the first 50 smooth_frames this is."""
    return 8 * round(frame[4:-4, 4:-36, 0].mean() / 30) + round(frame[4:-4, 36:-4, 0].mean() / 30)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of frames and sound, in a file whose name is not ASCII."""
    sound = smooth_sound(96_000)
    path = tmp_path_factory.mktemp("média 漢字") / "clip é.mp4"
    return write_clip(path, smooth_frames(50), sound), sound


def test_a_clip_comes_back_as_it_was_written(clip):
    path, sound = clip
    frames = list(read_frames(path))
    assert len(frames) == 50 and all(f.shape == (48, 64, 3) and f.dtype == np.uint8 for f in frames)
    assert np.abs(np.stack(frames).astype(int) - np.stack(smooth_frames(50))).max() <= CODED
    samples, rate = read_sound(path)
    assert rate == 48_000 and samples.dtype == np.float32 and samples.shape[1] == 1
    # AAC comes in blocks of 1,024 samples; up to one is added at the end.
    assert 96_000 <= len(samples) < 96_000 + 1024
    assert_same_sound(samples[:96_000, 0], sound)


def test_what_a_file_says_of_itself(clip):
    assert video_info(clip[0]) == VideoInfo(64, 48, 25.0, 50, 48_000, False)


def test_paths_may_be_text(clip):
    assert video_info(str(clip[0])) == video_info(clip[0])


def test_stereo_keeps_its_channels_apart(tmp_path):
    sound = np.stack([smooth_sound(48_000, 1), 0 * smooth_sound(48_000)], axis=1)
    path = write_clip(tmp_path / "stereo.mov", smooth_frames(25), sound, channels=2)
    samples, _ = read_sound(path)
    assert samples.shape[1] == 2
    assert_same_sound(samples[:48_000], sound)


@pytest.mark.parametrize("size", [(7, 9), (8, 9), (7, 10), (2, 2)])
def test_frames_of_any_size_are_written(size, tmp_path):
    flat = [np.full((*size, 3), (50 * k, 100, 90), np.uint8) for k in range(3)]
    path = write_clip(tmp_path / "odd.mp4", flat)
    assert np.abs(np.stack(list(read_frames(path))).astype(int) - np.stack(flat)).max() <= CODED


@pytest.mark.parametrize("rate", [29.97, 24_000 / 1001, 12.5, 1.0])
def test_frame_rates_that_are_no_whole_numbers_are_kept(rate, tmp_path):
    path = write_clip(tmp_path / "rate.mp4", smooth_frames(6), frames_per_second=rate)
    assert video_info(path).frames_per_second == pytest.approx(rate, rel=1e-6)
    assert not video_info(path).variable_frame_rate


def test_a_rate_that_aac_lacks_is_written_at_the_next_one(tmp_path):
    path = write_clip(tmp_path / "slow.mp4", smooth_frames(25), smooth_sound(1_600), sampling_rate=1_600)
    samples, rate = read_sound(path)
    assert rate == 7_350
    back = resample(samples, rate, 1_600)[:1_600, 0]
    # Over the middle: at the ends the resamplers see silence that was not there.
    assert np.corrcoef(back[100:1_500], smooth_sound(1_600)[100:1_500])[0, 1] > 0.98


def test_sound_that_is_too_loud_is_clipped(tmp_path):
    loud = 3 * np.sin(np.arange(48_000) * 0.05)
    path = write_clip(tmp_path / "loud.mp4", smooth_frames(25), loud)
    assert 0.9 < np.abs(read_sound(path)[0]).max() < 1.5, "coding overshoots, but not threefold"


def test_sound_may_come_before_the_frames_and_in_pieces(clip, tmp_path):
    path, _ = clip
    sound = smooth_sound(96_000)
    with VideoWriter(tmp_path / "pieces.mp4", frames_per_second=25, sampling_rate=48_000) as writer:
        writer.write_sound(sound[:7])
        writer.write_sound(sound[7:5_000])
        for k, frame in enumerate(smooth_frames(50)):
            writer.write_frame(frame)
            writer.write_sound(sound[5_000 + 1_820 * k : 5_000 + 1_820 * (k + 1)])
    assert_array_equal(read_sound(tmp_path / "pieces.mp4")[0], read_sound(path)[0])


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (25, list(range(50))),
        (12.5, list(range(0, 50, 2))),
        (50, [k // 2 for k in range(100)]),
        # Each new frame shows the old one nearest in time: 0, 2.5 (the earlier of two), 5, 7.5 frames.
        (10, [round(2.5 * k - 0.01) for k in range(20)]),
    ],
)
def test_frames_are_resampled_in_time_by_the_nearest(rate, expected, clip):
    numbers = [number_of(frame) for frame in read_frames(clip[0], frames_per_second=rate)]
    if rate == 50:  # a new frame halfway between two may take either
        assert len(numbers) == 100 and numbers[::2] == expected[::2]
        assert all(a in (b, b + 1) for a, b in zip(numbers, expected, strict=True))
    else:
        assert numbers == expected


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_frame_rate_is_seen_and_made_constant(suffix, tmp_path):
    path = write_at_times(tmp_path / f"vfr{suffix}", [0, 40, 80, 200, 220, 400, 600, 640])
    assert video_info(path).variable_frame_rate
    assert len(list(read_frames(path))) == 8
    numbers = [number_of(frame) for frame in read_frames(path, frames_per_second=25)]
    # At 0, 40, ... 640 ms the nearest of those times; the last one is shown for 40 ms, as the one before.
    assert numbers == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5, 5, 6, 6, 6, 7]


def test_frames_in_memory_are_resampled_alike():
    timed = [(10.0 + 0.1 * k, k) for k in range(6)]
    assert list(frames_at_rate(timed, 5, 0.1)) == [0, 2, 4]
    assert list(frames_at_rate(timed, 30, 0.1)) == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 5]
    assert list(frames_at_rate(timed[:1], 20, 0.1)) == [0, 0]
    assert list(frames_at_rate(timed[:1], 1, 0.1)) == [0], "at least one"
    assert list(frames_at_rate([*timed, (10.5, 6)], 10, 0.1)) == [0, 1, 2, 3, 4, 5], "two frames at one time"
    assert list(frames_at_rate([], 10, 0.1)) == []


@pytest.mark.parametrize("rate", [30, 120])
def test_a_rounded_clock_is_no_variable_frame_rate(rate, tmp_path):
    """Matroska's clock ticks in milliseconds: 30 frames a second stand 33 and 34 of them apart, 120 stand 8 and 9."""
    path = write_at_times(tmp_path / "clip.mkv", [round(k * 1000 / rate) for k in range(30)])
    assert not video_info(path).variable_frame_rate
    assert len(list(read_frames(path, frames_per_second=rate))) == 30


def test_a_long_video_of_constant_rate_is_none_either(clip, monkeypatch):
    """Only its first frames are looked at, and they do not come in the order of their times."""
    for probed in range(20, 50):
        monkeypatch.setattr(media_files, "PROBED_FRAMES", probed)
        assert not video_info(clip[0]).variable_frame_rate, probed


@pytest.mark.parametrize(("degrees", "side"), [(90, "left"), (-90, "right"), (180, "bottom")])
def test_frames_are_turned_as_the_file_says(degrees, side, tmp_path):
    """A counter-clockwise turn takes the stored top to the left."""
    path = write_at_times(tmp_path / "turned.mp4", [0, 40, 80], rotation=degrees)
    frame = next(read_frames(path))
    assert frame.shape == ((48, 64, 3) if degrees == 180 else (64, 48, 3))
    edges = {"left": frame[:, :8], "right": frame[:, -8:], "bottom": frame[-8:], "top": frame[:8]}
    assert [name for name, edge in edges.items() if edge.min() > 230] == [side]
    info = video_info(path)
    assert (info.height, info.width) == frame.shape[:2]


def test_sound_that_begins_after_the_first_frame_follows_silence(tmp_path):
    sound = smooth_sound(24_000)
    with av.open(str(tmp_path / "late.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=48_000, layout="mono")
        for frame in smooth_frames(25):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        block = av.AudioFrame.from_ndarray((sound[None] * 32767).astype(np.int16), format="s16", layout="mono")
        block.sample_rate, block.pts, block.time_base = 48_000, 12_000, Fraction(1, 48_000)
        container.mux(audio.encode(block))
        container.mux(audio.encode())
        container.mux(video.encode())
    samples, _ = read_sound(tmp_path / "late.mkv")
    assert samples.shape == (36_000, 1) and not samples[:12_000].any()
    assert_allclose(samples[12_000:, 0], sound, atol=1e-4)  # 16 bits


def test_streamed_sound_is_the_sound_resampled(clip):
    blocks = list(stream_sound(clip[0], 16_000))
    assert len(blocks) > 10
    samples, rate = read_sound(clip[0])
    whole = resample(samples, rate, 16_000)
    joined = np.concatenate(blocks)
    assert abs(len(joined) - len(whole)) <= 1
    assert_allclose(joined[: len(whole)], whole[: len(joined)], atol=1e-6)
    assert_array_equal(np.concatenate(list(stream_sound(clip[0], rate))), samples)


def test_resampling_keeps_a_tone_and_its_channels():
    times = np.arange(44_100) / 44_100
    sound = np.stack([np.sin(2 * np.pi * 440 * times), np.cos(2 * np.pi * 100 * times)], axis=1)
    got = resample(sound, 44_100, 48_000)
    times = np.arange(48_000) / 48_000
    expected = np.stack([np.sin(2 * np.pi * 440 * times), np.cos(2 * np.pi * 100 * times)], axis=1)
    assert got.shape == (48_000, 2) and got.dtype == np.float32
    # soxr's high quality is 20 bits; not at the ends, where the tone breaks off.
    assert_allclose(got[500:-500], expected[500:-500], atol=1e-4)
    assert_array_equal(resample(sound[:, 0], 44_100, 44_100), sound[:, 0].astype(np.float32))
    assert resample(np.zeros(0), 8_000, 16_000).shape == (0,)


@pytest.mark.parametrize("shape", [(1_000,), (1_000, 2)])
def test_a_wav_file_comes_back_to_16_bits(shape, tmp_path):
    sound = np.random.default_rng(0).uniform(-1, 1, shape)
    write_wav(tmp_path / "sound.wav", sound, 22_050)
    samples, rate = read_sound(tmp_path / "sound.wav")
    assert rate == 22_050
    assert_allclose(samples, sound.reshape(1_000, -1), atol=0.51 / 32768)  # half a step, and float32's own


def test_a_wav_file_may_be_written_in_blocks(tmp_path):
    sound = smooth_sound(1_000)
    write_wav(tmp_path / "whole.wav", sound, 8_000)
    write_wav(tmp_path / "blocks.wav", iter([sound[:300], sound[300:301, None], sound[301:]]), 8_000)
    assert (tmp_path / "blocks.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()
    for blocks, message in (([], "no sound was given"), ([sound, np.zeros((5, 2))], "a block of 2 channels")):
        with pytest.raises(ValueError, match=message):
            write_wav(tmp_path / "x.wav", iter(blocks), 8_000)
    assert sorted(os.listdir(tmp_path)) == ["blocks.wav", "whole.wav"]


def test_a_wav_file_clips_what_is_too_loud(tmp_path):
    write_wav(tmp_path / "loud.wav", np.array([-3.0, -1.0, 1.0, 3.0]), 8_000)
    assert_allclose(read_sound(tmp_path / "loud.wav")[0][:, 0], [-1, -1, 1, 1], atol=1 / 32768)


def test_a_picture_comes_back_bit_for_bit(tmp_path):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_image(tmp_path / "picture.png", picture)
    assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), picture)


def test_without_x264_mpeg4_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    path = write_clip(tmp_path / "mpeg4.mp4", smooth_frames(5))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec.name == "mpeg4"
    assert [number_of(frame) for frame in read_frames(path)] == list(range(5))


# Bad input


def damaged(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def fast_start(tmp_path_factory):
    """A video whose index comes first, so that its pictures can be cut and broken; noise, so that they are large."""
    path = tmp_path_factory.mktemp("files") / "whole.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(50):
            picture = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("read", [video_info, read_frames, read_sound], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.mp4", None, "there is no file .*missing.mp4"),
        ("text.mp4", b"hello " * 1000, "text.mp4 is no video or sound file"),
        ("empty.mp4", b"", "empty.mp4 is no video or sound file"),
        ("notes.txt", b"hello " * 1000, "notes.txt is no video or sound file"),
    ],
)
def test_what_is_no_media_file_is_named_at_once(read, name, data, message, tmp_path):
    if data is not None:
        damaged(tmp_path / name, data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        video_info(tmp_path)


def test_a_file_without_its_index_is_damaged(clip, tmp_path):
    data = clip[0].read_bytes()  # this writer's index comes last
    with pytest.raises(ValueError, match="is no video or sound file that can be read, or a damaged one"):
        read_frames(damaged(tmp_path / "half.mp4", data[: len(data) // 2]))


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("read", [video_info, read_frames])
def test_a_video_that_is_cut_off_is_refused_at_once(read, part, fast_start, tmp_path):
    with pytest.raises(ValueError, match=r"cut.mp4 is cut off: [\d,]+ bytes of at least"):
        read(damaged(tmp_path / "cut.mp4", fast_start[: int(len(fast_start) * part)]))


def test_a_broken_video_says_at_which_frame(fast_start, tmp_path):
    data = bytearray(fast_start)
    middle = len(data) // 2
    data[middle : middle + 3_000] = np.random.default_rng(0).bytes(3_000)
    with pytest.raises(ValueError, match=r"broken.mp4 is damaged.* at frame (1\d|2\d)"):
        list(read_frames(damaged(tmp_path / "broken.mp4", bytes(data))))


def test_a_sound_without_video_and_a_video_without_sound(tmp_path):
    write_wav(tmp_path / "sound.wav", smooth_sound(800), 8_000)
    for read in (video_info, read_frames):
        with pytest.raises(ValueError, match=r"sound.wav has no video in it"):
            read(tmp_path / "sound.wav")
    write_clip(tmp_path / "silent.mp4", smooth_frames(2))
    assert video_info(tmp_path / "silent.mp4").sampling_rate is None
    with pytest.raises(ValueError, match=r"silent.mp4 has no sound in it"):
        read_sound(tmp_path / "silent.mp4")
    with pytest.raises(ValueError, match=r"silent.mp4 has no sound in it"):
        next(stream_sound(tmp_path / "silent.mp4", 16_000))


def test_a_songs_cover_is_no_video(tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(tmp_path / "cover.jpg")
    with av.open(str(tmp_path / "song.mp4"), "w") as container, av.open(str(tmp_path / "cover.jpg")) as cover:
        audio = container.add_stream("aac", rate=48_000, layout="mono")
        picture = container.add_stream_from_template(cover.streams.video[0])
        picture.disposition = av.stream.Disposition.attached_pic
        block = av.AudioFrame.from_ndarray(smooth_sound(48_000)[None], format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = 48_000, 0, Fraction(1, 48_000)
        packet = next(cover.demux())
        packet.stream = picture
        container.mux(packet)
        container.mux(audio.encode(block))
        container.mux(audio.encode())
    with pytest.raises(ValueError, match=r"song.mp4 has no video in it"):
        video_info(tmp_path / "song.mp4")
    assert_same_sound(read_sound(tmp_path / "song.mp4")[0][:48_000, 0], smooth_sound(48_000))


def test_an_empty_sound_is_said(tmp_path):
    write_wav(tmp_path / "empty.wav", np.zeros(0), 8_000)
    with pytest.raises(ValueError, match=r"the sound of .*empty.wav is (empty|damaged)"):
        read_sound(tmp_path / "empty.wav")


@pytest.mark.parametrize("rate", [0, -25, float("nan"), float("inf")])
def test_a_frame_rate_is_a_positive_number(rate, clip, tmp_path):
    with pytest.raises(ValueError, match="frames_per_second"):
        read_frames(clip[0], frames_per_second=rate)
    with pytest.raises(ValueError, match="frames_per_second"):
        VideoWriter(tmp_path / "x.mp4", frames_per_second=rate)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("rate", [0, -1, 44.1, "48000", True])
def test_a_sampling_rate_is_a_whole_number(rate, tmp_path):
    sound = np.zeros(100, np.float32)
    for call in (
        lambda: resample(sound, rate, 8_000),
        lambda: resample(sound, 8_000, rate),
        lambda: write_wav(tmp_path / "x.wav", sound, rate),
        lambda: VideoWriter(tmp_path / "x.mp4", frames_per_second=25, sampling_rate=rate),
    ):
        with pytest.raises(ValueError, match="a sampling rate is a whole number of Hz"):
            call()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(5, np.int16), "divide 16-bit integers by 32768"),
        (np.zeros((5, 2, 2)), "sound is"),
        (np.zeros((5, 0)), "sound is"),
        (np.array([0, np.nan, np.nan]), r"not finite at sample 1 \(2 such values\)"),
        (np.array([0, 0, np.inf]), "not finite at sample 2"),
    ],
)
def test_sound_is_finite_floats(sound, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_sound(sound)
    with pytest.raises(ValueError, match=message):
        write_wav(tmp_path / "x.wav", sound, 8_000)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "frame",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_a_picture_is_uint8_rgb(frame, tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_image(tmp_path / "x.png", frame)
    with (
        pytest.raises(ValueError, match="uint8"),
        VideoWriter(tmp_path / "x.mp4", frames_per_second=25) as writer,
    ):
        writer.write_frame(frame)
    assert not os.listdir(tmp_path)


def test_an_error_while_writing_leaves_nothing_and_spares_an_older_file(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", smooth_frames(3))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="out of ideas"), VideoWriter(path, frames_per_second=25) as writer:
        writer.write_frame(smooth_frames(1)[0])
        raise RuntimeError("out of ideas")
    with pytest.raises(ValueError, match="frame 1 is 24x24, the first one was 48x64"):
        write_clip(path, [smooth_frames(1)[0], np.zeros((24, 24, 3), np.uint8)])
    with pytest.raises(ValueError, match="no frame was written"):
        write_clip(path, [])
    with pytest.raises(ValueError, match="2 channels of sound for a file with 1"):
        write_clip(path, smooth_frames(1), np.zeros((10, 2)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_sound_needs_a_rate(tmp_path):
    with (
        pytest.raises(ValueError, match="give VideoWriter its sampling_rate"),
        VideoWriter(tmp_path / "x.mp4", frames_per_second=25) as writer,
    ):
        writer.write_sound(np.zeros(10))
    with pytest.raises(ValueError, match="channels=3"):
        VideoWriter(tmp_path / "x.mp4", frames_per_second=25, channels=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/x.mp4", "there is no folder"),
        ("x.nonsense", "name a writable .mp4"),
        ("x", "name a writable .mp4"),
        ("folder.mp4", "it is a folder"),
    ],
)
def test_where_nothing_can_be_written_is_said_at_once(name, message, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / name, frames_per_second=25)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    for name in ("av", "soxr", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    for library, call in (
        ("PyAV", lambda: VideoWriter(tmp_path / "x.mp4", frames_per_second=25)),
        ("PyAV", lambda: video_info(tmp_path / "x.mp4")),
        ("soxr", lambda: resample(np.zeros(9), 8_000, 9_000)),
        ("Pillow", lambda: write_image(tmp_path / "x.png", np.zeros((2, 2, 3), np.uint8))),
    ):
        with pytest.raises(ValueError, match=rf"needs {library}, .* pip install hf-perceiver\[video\]"):
            call()


@pytest.mark.medium
def test_long_files_are_read_in_bounded_memory(tmp_path):
    """Three minutes at 48 kHz are 35 MB of samples; streaming holds a few blocks."""
    import tracemalloc

    write_wav(tmp_path / "long.wav", np.zeros(180 * 48_000, np.float32), 48_000)
    blocks = stream_sound(tmp_path / "long.wav", 16_000)
    tracemalloc.start()
    try:
        total = sum(len(block) for block in blocks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert abs(total - 180 * 16_000) <= 1
    assert peak < 4e6
