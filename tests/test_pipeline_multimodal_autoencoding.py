"""`pipeline("multimodal-autoencoding")` on tiny models: whole clips, parts of them, files, and what can go wrong."""

import os

import numpy as np
import pytest
import torch
from helpers import tiny
from numpy.testing import assert_allclose, assert_array_equal
from transformers import pipeline

from hf_perceiver import (
    MultimodalAutoencodingPipeline,
    PerceiverIOFeatureExtractor,
    PerceiverIOForImageClassification,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOProcessor,
    PerceiverIOVideoProcessor,
)
from hf_perceiver.media_files import VideoWriter, read_frames, read_sound, video_info

# The tiny model reads 2 frames of 4x6, 8 samples and a label of 5 classes.
NAMES = ("crawl", "float", "jump", "roll", "run")


def make_model(**changes):
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    model = tiny("multimodal").model(PerceiverIOForMultimodalAutoencoding, **labels, **changes)
    # So that reconstructions are grey pictures and quiet sounds, not all black, white and loud.
    with torch.no_grad():
        for name, bias in (("image", 0.5), ("audio", 0.0)):
            projection = model.perceiver.postprocessor.modalities[name].projection
            projection.weight.mul_(0.1)
            projection.bias.fill_(bias)
    return model


def make_processor(**options):
    return PerceiverIOProcessor(
        PerceiverIOVideoProcessor(size={"height": 4, "width": 6}, num_frames=2),
        PerceiverIOFeatureExtractor(num_samples=8, sampling_rate=100),
        **{"num_labels": 5, **options},
    )


@pytest.fixture(scope="module")
def reconstruct():
    return MultimodalAutoencodingPipeline(model=make_model(), processor=make_processor())


def make_clip(count: int = 5, seed: int = 0) -> dict:
    """5 frames are 3 windows, of which the last is half padding."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)
    return {"frames": frames, "sound": rng.uniform(-0.5, 0.5, 4 * count).astype(np.float32)}


def windows_of(reconstruct, clip):
    """The model's own logits of each window."""
    windows = reconstruct.processor.windows(clip["frames"], clip["sound"])
    return [(w, reconstruct.model(inputs=w.inputs).logits) for w in windows]


def levels(values: torch.Tensor) -> np.ndarray:
    return (values * 255).round().clamp(0, 255).byte().detach().numpy()


def count_calls(module: torch.nn.Module, monkeypatch) -> list:
    calls, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    return calls


def watch_decode(model, monkeypatch) -> list:
    """What each call of `decode` was asked, and the names it answered."""
    calls, decode = [], model.decode

    def watched(*args, **kwargs):
        logits = decode(*args, **kwargs)
        calls.append((kwargs, set(logits)))
        return logits

    monkeypatch.setattr(model, "decode", watched)
    return calls


# The whole clip


def test_a_clip_is_its_windows_one_after_another_without_padding(reconstruct):
    clip = make_clip()
    result = reconstruct(clip)
    made = windows_of(reconstruct, clip)
    assert (result["num_frames"], result["num_windows"]) == (5, 3)
    image = torch.cat([logits["image"][0] for _, logits in made])[:5]  # (5, 4, 6, 3)
    assert_array_equal(result["image"], levels(image))
    assert result["image"].std() > 5, "pictures must tell apart"
    audio = torch.cat([logits["audio"][0] for _, logits in made])[:20]
    assert_allclose(result["audio"][:, 0], audio.clamp(-1, 1).detach(), atol=1e-6)
    scores = torch.stack([logits["label"][0].softmax(-1) for _, logits in made]).mean(dim=0)
    assert [r["label"] for r in result["label"]] == [NAMES[i] for i in scores.argsort(descending=True)]
    assert [r["score"] for r in result["label"]] == pytest.approx(
        scores.sort(descending=True).values.tolist(), abs=1e-5
    )


def test_each_window_is_encoded_once_however_it_is_decoded(monkeypatch):
    reconstruct = MultimodalAutoencodingPipeline(model=make_model(), processor=make_processor())
    whole = reconstruct(make_clip())
    calls = count_calls(reconstruct.model.perceiver.encoder, monkeypatch)
    decoded = watch_decode(reconstruct.model, monkeypatch)
    result = reconstruct(make_clip(), chunk_size=7)
    assert len(calls) == 3
    assert [asked["chunk_size"] for asked, _ in decoded] == [7, 7, 7]
    # Chunks change float32 in the last bits, which may tip the rounding to 255 levels.
    assert_allclose(result["image"].astype(int), whole["image"].astype(int), atol=1)
    assert_allclose(result["audio"], whole["audio"], atol=1e-5)


def test_the_pipeline_is_found_by_its_name_with_its_processor(reconstruct, tmp_path):
    reconstruct.model.save_pretrained(tmp_path)
    reconstruct.processor.save_pretrained(tmp_path)
    loaded = pipeline("multimodal-autoencoding", model=str(tmp_path), chunk_size=7)
    assert type(loaded) is MultimodalAutoencodingPipeline
    assert type(loaded.model) is PerceiverIOForMultimodalAutoencoding
    assert_allclose(loaded(make_clip())["audio"], reconstruct(make_clip())["audio"], atol=1e-5)


def test_a_list_of_clips_gives_a_list(reconstruct):
    clips = [make_clip(2), make_clip(3, seed=1)]
    together = reconstruct(clips)
    assert [len(result["image"]) for result in together] == [2, 3]
    for got, clip in zip(together, clips, strict=True):
        assert_array_equal(got["image"], reconstruct(clip)["image"])


def test_a_stream_gives_each_window_as_it_is_made(reconstruct):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield make_clip()["frames"][0]

    stream = reconstruct({"frames": endless(), "sound": np.zeros(8, np.float32)}, stream=True)
    results = [next(stream) for _ in range(3)]
    assert [r["window"] for r in results] == [0, 1, 2] and len(taken) == 6
    assert all(r["image"].shape == (2, 4, 6, 3) and r["audio"].shape == (8, 1) for r in results)
    assert all(len(r["label"]) == 5 and set(r["label"][0]) == {"label", "score"} for r in results)
    whole = reconstruct(make_clip())
    streamed = list(reconstruct(make_clip(), stream=True))
    assert [r["num_frames"] for r in streamed] == [2, 2, 1]
    assert_array_equal(np.concatenate([r["image"] for r in streamed]), whole["image"])
    assert_array_equal(np.concatenate([r["audio"] for r in streamed]), whole["audio"])


def test_half_precision(reconstruct, monkeypatch):
    half = MultimodalAutoencodingPipeline(model=make_model().to(torch.bfloat16), processor=make_processor())
    seen, encode = set(), half.model.encode
    monkeypatch.setattr(
        half.model, "encode", lambda inputs, **kwargs: seen.update(v.dtype for v in inputs.values()) or encode(inputs)
    )
    got, want = half(make_clip()), reconstruct(make_clip())
    # bfloat16 has 8 bits; measured: 2 of 255 levels, 0.01.
    assert_allclose(got["image"].astype(int), want["image"].astype(int), atol=8)
    assert_allclose(got["audio"], want["audio"], atol=0.05)
    assert got["image"].dtype == np.uint8 and got["audio"].dtype == np.float32
    assert seen == {torch.bfloat16}


def test_several_labels_have_scores_of_their_own():
    model = make_model(problem_type="multi_label_classification")
    reconstruct = MultimodalAutoencodingPipeline(model=model, processor=make_processor())
    clip = make_clip(2)
    (_, logits), *_ = windows_of(reconstruct, clip)
    result = reconstruct(clip, outputs=["label"], top_k=2)["label"]
    assert [r["score"] for r in result] == pytest.approx(logits["label"][0].sigmoid().topk(2).values.tolist(), abs=1e-5)


def test_a_clip_without_sound_is_masked_if_the_processor_allows_it(reconstruct):
    frames = make_clip()["frames"]
    with pytest.raises(ValueError, match="no sound given"):
        reconstruct({"frames": frames})
    quiet = MultimodalAutoencodingPipeline(model=make_model(), processor=make_processor(require_sound=False))
    first = next(quiet.processor.windows(frames))
    expected = quiet.model(inputs=first.inputs, attention_mask=first.attention_mask).logits["audio"][0]
    assert_allclose(quiet({"frames": frames})["audio"][:8, 0], expected.clamp(-1, 1).detach(), atol=1e-6)


def test_the_label_need_not_be_given_where_it_is_masked(reconstruct):
    without = MultimodalAutoencodingPipeline(model=reconstruct.model, processor=make_processor(num_labels=None))
    got, want = without(make_clip())["label"], reconstruct(make_clip())["label"]
    assert [r["label"] for r in got] == [r["label"] for r in want]
    assert [r["score"] for r in got] == pytest.approx([r["score"] for r in want], abs=1e-6)


# Parts of it


def test_only_what_is_named_is_decoded(monkeypatch):
    reconstruct = MultimodalAutoencodingPipeline(model=make_model(), processor=make_processor())
    whole = reconstruct(make_clip())
    decoded = watch_decode(reconstruct.model, monkeypatch)
    only = reconstruct(make_clip(), outputs=["label"])
    assert set(only) == {"label", "num_frames", "num_windows"}
    assert [names for _, names in decoded] == [{"label"}] * 3
    assert [r["score"] for r in only["label"]] == pytest.approx([r["score"] for r in whole["label"]], abs=1e-6)
    assert set(reconstruct(make_clip(), outputs="audio")) == {"audio", "num_frames", "num_windows"}


def test_only_some_frames(monkeypatch):
    reconstruct = MultimodalAutoencodingPipeline(model=make_model(), processor=make_processor())
    whole = reconstruct(make_clip(11))
    encoded = count_calls(reconstruct.model.perceiver.encoder, monkeypatch)
    some = reconstruct(make_clip(11), outputs=["image"], frames=[10, 3, 2, 3])
    assert some["image"].shape == (3, 4, 6, 3)
    assert_allclose(some["image"].astype(int), whole["image"][[2, 3, 10]].astype(int), atol=1)
    assert len(encoded) == 2, "windows without any of them are not encoded"
    both = reconstruct(make_clip(11), frames=[4])
    assert both["image"].shape == (1, 4, 6, 3) and both["audio"].shape == whole["audio"].shape


def test_only_some_pixels_and_patches(reconstruct):
    clip = make_clip(4)
    points = {"image": torch.tensor([5, 0, 47]), "audio": [1]}
    result = reconstruct(clip, output_points=points)
    made = windows_of(reconstruct, clip)
    image = torch.stack([logits["image"][0].reshape(48, 3)[[5, 0, 47]] for _, logits in made])
    assert set(result) == {"image", "audio", "num_frames", "num_windows"}
    assert result["image"].shape == (2, 3, 3)
    assert_allclose(result["image"], image.detach(), atol=1e-5)
    assert_allclose(result["audio"], torch.stack([logits["audio"][0][4:] for _, logits in made]).detach(), atol=1e-5)
    assert set(reconstruct(clip, output_points=points, outputs=["label"])) == {*result, "label"}


def test_a_finer_grid_meets_the_coarse_one_where_they_share_points(reconstruct):
    """The rule is -1 + 2 i / n: of twice as many points every second one is a point of the input's grid."""
    clip = make_clip()
    finer, whole = reconstruct(clip, output_size=(4, 8, 12)), reconstruct(clip)
    assert finer["image"].shape == (10, 8, 12, 3)  # the last window has one frame, so two of these
    assert_allclose(finer["image"][::2, ::2, ::2].astype(int), whole["image"].astype(int), atol=1)
    assert np.abs(finer["image"][::2, 1::2, ::2].astype(int) - whole["image"]).max() > 2, "between lies something else"
    assert_array_equal(finer["audio"], whole["audio"])


def test_a_dense_grid_is_asked_by_its_own_rule():
    model = make_model()
    query = dict(model.config.output_query)
    query["modalities"]["image"]["position"]["rule"] = "dense"
    model = make_model(output_query=query)
    reconstruct = MultimodalAutoencodingPipeline(model=model, processor=make_processor())
    same, whole = reconstruct(make_clip(), output_size=(2, 4, 6)), reconstruct(make_clip())
    assert_allclose(same["image"].astype(int), whole["image"].astype(int), atol=1)


def test_any_coordinates(reconstruct):
    clip = make_clip(2)
    at = {"image": torch.tensor([[-1.0, -1.0, -1.0], [0.3, 0.1, -0.7]])}
    result = reconstruct(clip, coordinates=at)
    (window, _), *_ = windows_of(reconstruct, clip)
    expected = reconstruct.model(inputs=window.inputs, coordinates=at).logits["image"]
    assert_allclose(result["image"], expected.detach(), atol=1e-6)
    whole = reconstruct(clip)["image"][0, 0, 0]
    assert_allclose(levels(torch.from_numpy(result["image"][0, 0])).astype(int), whole.astype(int), atol=1)


# Files


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """7 frames of 24x36 in other greys, and their sound."""
    pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "clip é.mp4"
    with VideoWriter(path, frames_per_second=25, sampling_rate=8_000) as writer:
        for k in range(7):
            writer.write_frame(np.full((24, 36, 3), 30 * k, np.uint8))
        writer.write_sound(np.random.default_rng(0).uniform(-0.5, 0.5, 7 * 320).astype(np.float32))
    return path


def test_a_file_is_read_and_written_window_by_window(reconstruct, clip_file, tmp_path):
    expected = reconstruct(clip_file)
    result = reconstruct(clip_file, output_file=tmp_path / "again.mp4")
    assert result["file"] == str(tmp_path / "again.mp4")
    assert set(result) == {"file", "label", "num_frames", "num_windows"} and result["num_frames"] == 7
    assert result["label"] == expected["label"]
    frames = np.stack(list(read_frames(tmp_path / "again.mp4")))
    assert frames.shape == expected["image"].shape == (7, 4, 6, 3)
    # Colours of so few pixels are coded coarsely; each frame as a whole is kept.
    assert_allclose(frames.mean(axis=(1, 2)), expected["image"].mean(axis=(1, 2)), atol=12)
    assert video_info(tmp_path / "again.mp4").frames_per_second == 25
    assert video_info(tmp_path / "again.mp4").sampling_rate == 7_350  # the lowest that AAC has
    assert os.listdir(tmp_path) == ["again.mp4"]


def test_sound_alone_goes_to_a_wav_and_frames_are_not_decoded(clip_file, tmp_path, monkeypatch):
    reconstruct = MultimodalAutoencodingPipeline(model=make_model(), processor=make_processor())
    expected = reconstruct(clip_file)["audio"]
    decoded = watch_decode(reconstruct.model, monkeypatch)
    result = reconstruct(clip_file, output_file=str(tmp_path / "again.wav"))
    assert [names for _, names in decoded] == [{"audio", "label"}] * 4
    assert set(result) == {"file", "label", "num_frames", "num_windows"}
    samples, rate = read_sound(tmp_path / "again.wav")
    assert rate == 100
    assert_allclose(samples, expected, atol=1e-4)  # 16 bits


def test_a_finer_grid_in_time_is_shown_as_much_faster(reconstruct, clip_file, tmp_path):
    reconstruct(clip_file, output_size=(6, 8, 12), outputs=["image"], output_file=tmp_path / "fine.mp4")
    info = video_info(tmp_path / "fine.mp4")
    assert (info.frames_per_second, info.height, info.width, info.sampling_rate) == (75, 8, 12, None)
    assert len(list(read_frames(tmp_path / "fine.mp4"))) == 21


def test_what_fails_at_a_window_names_it_and_leaves_nothing(reconstruct, tmp_path, monkeypatch):
    pytest.importorskip("av")
    older = tmp_path / "again.mp4"
    older.write_bytes(b"an older file")
    clip = make_clip()
    broken = {**clip, "frames": [*clip["frames"][:4], np.full((8, 12, 3), np.nan)]}
    for name in ("again.mp4", "again.wav"):
        with pytest.raises(ValueError, match="window 2: frame 4 cannot be used: it holds NaN"):
            reconstruct(broken, output_file=tmp_path / name)
    calls, forward = [], reconstruct.model.perceiver.encoder.forward

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(reconstruct.model.perceiver.encoder, "forward", fails)
    with pytest.raises(RuntimeError, match="window 1: out of memory"):
        reconstruct(clip, output_file=older)
    assert os.listdir(tmp_path) == ["again.mp4"] and older.read_bytes() == b"an older file"


def test_a_reconstruction_that_is_no_number_is_named(tmp_path):
    model = make_model()
    model.perceiver.postprocessor.modalities["image"].projection.bias.data.fill_(np.nan)
    reconstruct = MultimodalAutoencodingPipeline(model=model, processor=make_processor())
    with pytest.raises(ValueError, match="window 0: frames hold NaN"):
        reconstruct(make_clip())
    assert set(reconstruct(make_clip(), outputs=["audio"])) == {"audio", "num_frames", "num_windows"}


def test_a_bar_shows_what_takes_long_and_can_be_turned_off(reconstruct, capsys, monkeypatch):
    from hf_perceiver import pipeline_multimodal_autoencoding as module

    reconstruct(make_clip())
    assert not capsys.readouterr().err, "over before two seconds"
    monkeypatch.setattr(module, "QUIET_SECONDS", 0)
    reconstruct(make_clip())
    assert "3/3" in capsys.readouterr().err
    reconstruct(make_clip(), progress=False)
    assert not capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("nowhere.mp4", "there is no file nowhere.mp4"),
        (7, "a clip is the path of a video, or a dict of frames, sound.*not int"),
        ({"sound": np.zeros(8)}, "a clip is the path of a video, or a dict of frames"),
        ({"frames": make_clip()["frames"], "sounds": np.zeros(8)}, "a clip has no 'sounds'; known: frames, sound"),
        ({"frames": [], "sound": np.zeros(8)}, "window 0: the video has no frames"),
        ({"frames": make_clip()["frames"], "sound": np.full(8, np.nan)}, "window 0: sound is not finite"),
    ],
)
def test_what_is_no_clip_is_refused(clip, message, reconstruct):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=message):
        reconstruct(clip)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": ["label"]}, "no option output; known: .*outputs"),
        ({"outputs": ["smell"]}, "outputs names 'smell'; the model's outputs are audio, image, label"),
        ({"output_points": {"smell": [0]}}, "output_points names 'smell'"),
        ({"output_points": {"image": [48]}}, "window 0: output_points 48..48 lie outside the output grid of 48 points"),
        ({"outputs": ["image"], "output_points": {"image": [0]}}, "image: asked whole and at points"),
        ({"frames": [0], "output_size": (2, 4, 6)}, "give them or output_size, not both"),
        ({"frames": [0], "outputs": ["label"]}, "add 'image' to outputs"),
        ({"frames": []}, "frames are indices of the clip's frames"),
        ({"frames": [-1]}, "frames are indices of the clip's frames"),
        ({"frames": [1, 5]}, "frame 5 is asked for, and the clip has 5"),
        ({"output_size": (4, 6)}, "output_size is"),
        ({"output_size": (0, 4, 6)}, "output_size is"),
        ({"chunk_size": 0}, "window 0: chunk_size is a whole number"),
        ({"top_k": 0}, "top_k=0 is a whole number from 1"),
        ({"stream": True, "output_file": "x.mp4"}, "leave out output_file, or stream"),
        ({"output_file": "x.mp4", "outputs": ["label"]}, "x.mp4 holds all frames; add 'image' to outputs"),
        ({"output_file": "x.mp4", "frames": [0]}, "x.mp4 holds all frames"),
        ({"output_file": "x.wav", "outputs": ["label"]}, "x.wav holds sound; add 'audio' to outputs"),
        ({"output_file": "nowhere/x.mp4"}, "there is no folder nowhere"),
    ],
)
def test_options_are_checked(options, message, reconstruct, tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        reconstruct(make_clip(), **options)
    assert not os.listdir(tmp_path)


def test_files_and_streams_are_of_one_clip(reconstruct):
    with pytest.raises(ValueError, match="are for one clip; call the pipeline for each"):
        reconstruct([make_clip()], stream=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_name": "video"}, "makes, and the model does not read, video; the model reads audio, image, label"),
        ({"audio_name": "sound"}, "makes, and the model does not read, sound"),
        ({"num_labels": 7}, "the model's label has 5 classes, the processor's num_labels=7"),
    ],
)
def test_a_processor_for_another_model_is_refused(options, message, reconstruct):
    with pytest.raises(ValueError, match=message):
        MultimodalAutoencodingPipeline(model=reconstruct.model, processor=make_processor(**options))


def test_a_label_that_is_not_masked_is_needed():
    config = tiny("multimodal").config
    config.preprocessor["mask_probs"] = {"label": 0.5}
    model = PerceiverIOForMultimodalAutoencoding(config)
    with pytest.raises(ValueError, match="the processor lacks label; the model reads audio, image, label"):
        MultimodalAutoencodingPipeline(model=model, processor=make_processor(num_labels=None))


def test_another_kind_of_model_or_processor_is_refused(reconstruct):
    other = tiny("imagenet_fourier").model(PerceiverIOForImageClassification)
    with pytest.raises(ValueError, match="needs a PerceiverIOForMultimodalAutoencoding"):
        MultimodalAutoencodingPipeline(model=other, processor=make_processor())
    with pytest.raises(ValueError, match="a PerceiverIOProcessor is needed, not a PerceiverIOVideoProcessor"):
        MultimodalAutoencodingPipeline(model=reconstruct.model, processor=PerceiverIOVideoProcessor())
