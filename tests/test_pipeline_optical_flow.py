"""`pipeline("optical-flow")`: what it takes, what it gives and when, what it refuses. Tiny models, tiles of 4x6 pixels."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image
from transformers import PerceiverImageProcessorPil, pipeline

from hf_perceiver import (
    OpticalFlowPipeline,
    PerceiverIOFlowImageProcessor,
    PerceiverIOForMaskedLM,
    PerceiverIOForOpticalFlow,
    register,
)
from hf_perceiver.flow_files import render_flow
from hf_perceiver.pipeline_optical_flow import frame_files

TILE = {"height": 4, "width": 6}
TILES = 9  # of a 9x13 frame: 3 x 3
# float32, and other batch sizes take other kernels; flows here are about 1 pixel.
TOLERANCE = 1e-5


def processor(**changes) -> PerceiverIOFlowImageProcessor:
    return PerceiverIOFlowImageProcessor(**{"tile_size": TILE, "min_overlap": 1, **changes})


def random_frames(count: int = 4, height: int = 9, width: int = 13, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("flow")
    tiny("flow").model(PerceiverIOForOpticalFlow).save_pretrained(path)
    processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pipe(folder) -> OpticalFlowPipeline:
    return pipeline("optical-flow", model=folder)


@pytest.fixture(scope="module")
def reference(pipe):
    """(first, second) -> what the model and the processor give by themselves."""

    def flow(first, second) -> np.ndarray:
        features = pipe.image_processor((first, second), return_tensors="pt")
        with torch.no_grad():
            [flow] = pipe.image_processor.post_process_optical_flow(pipe.model(**features), np.asarray(first).shape[:2])
        return flow.numpy()

    return flow


def assert_flows(results, frames, reference) -> None:
    results = list(results)
    assert len(results) == len(frames) - 1
    for result, pair in zip(results, itertools.pairwise(frames), strict=True):
        assert set(result) == {"flow"} and result["flow"].dtype == np.float32
        np.testing.assert_allclose(result["flow"], reference(*pair), rtol=0, atol=TOLERANCE)


# What it takes


def test_the_task_finds_pipeline_model_and_processor(pipe):
    register()  # again does no harm
    assert type(pipe) is OpticalFlowPipeline
    assert type(pipe.model) is PerceiverIOForOpticalFlow
    assert type(pipe.image_processor) is PerceiverIOFlowImageProcessor
    assert pipe.image_processor.tile_size == TILE


def test_a_pair_gives_its_flow(pipe, reference):
    first, second = random_frames(2)
    result = pipe((first, second))
    assert result["flow"].shape == (9, 13, 2)
    assert np.abs(result["flow"]).max() > 0.1, "otherwise the tolerance says nothing"
    assert_flows([result], [first, second], reference)


def test_the_order_of_frames_matters(pipe):
    first, second = random_frames(2)
    assert np.abs(pipe((first, second))["flow"] - pipe((second, first))["flow"]).max() > 0.01


def test_pairs_of_any_sizes_give_a_list(pipe, reference):
    pairs = [tuple(random_frames(2, *size)) for size in ((9, 13), (1, 1), (4, 6), (30, 2))]
    forms = (pairs, [list(pair) for pair in pairs], [np.stack(pair) for pair in pairs])
    for given, batch_size in zip(forms, (1, 4, 100), strict=True):
        results = pipe(given, batch_size=batch_size)
        assert isinstance(results, list) and len(results) == 4
        for result, (first, second) in zip(results, pairs, strict=True):
            assert_flows([result], [first, second], reference)
    stacked = np.stack([np.stack(random_frames(2, seed=seed)) for seed in range(3)])
    assert [result["flow"].shape for result in pipe(stacked)] == [(9, 13, 2)] * 3


@pytest.mark.parametrize("batch_size", [1, 2, TILES, TILES + 1, 1000])
def test_batches_of_tiles_across_pairs_change_nothing(batch_size, pipe, reference):
    frames = random_frames(4)
    assert_flows(pipe(frames, batch_size=batch_size), frames, reference)


def test_sequences_come_in_every_form(pipe, reference):
    frames = random_frames(3)
    images = [Image.fromarray(frame) for frame in frames]
    tensor = torch.from_numpy(np.stack(frames)).movedim(-1, 1)
    pairs = (pair for pair in itertools.pairwise(frames))
    for given in (frames, images, np.stack(frames), tensor, iter(frames), (f for f in frames), pairs):
        assert_flows(pipe(given), frames, reference)


def test_a_folder_is_read_in_natural_order(pipe, reference, tmp_path):
    frames = random_frames(4)
    names = ["frame1.png", "Frame2.PNG", "frame10.bmp", "frame010.tiff"]
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._frame1.png").write_text("what some systems leave")
    found = [path.name for path in frame_files(tmp_path)]
    assert found == names
    assert_flows(pipe(tmp_path), frames, reference)
    assert_flows(pipe(str(tmp_path)), frames, reference)


def test_frames_can_be_paths(pipe, reference, tmp_path):
    frames = random_frames(3)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    assert_flows(pipe(paths), frames, reference)
    assert_flows(pipe([(str(a), b) for a, b in itertools.pairwise(paths)]), frames, reference)
    assert_flows([pipe((paths[0], frames[1]))], frames[:2], reference)


def test_a_turned_photo_is_read_as_it_is_shown(pipe, reference, tmp_path):
    frames = random_frames(2)
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by a quarter
    for name, frame in zip("ab", frames, strict=True):
        Image.fromarray(frame).save(tmp_path / f"{name}.png", exif=exif)
    turned = [np.rot90(frame, -1) for frame in frames]
    assert_flows(pipe(tmp_path), turned, reference)


def test_a_video_file_gives_the_flow_of_its_frames(pipe, reference, tmp_path):
    pytest.importorskip("av")
    from hf_perceiver.media_files import VideoWriter, read_frames

    with VideoWriter(tmp_path / "clip.mp4", frames_per_second=10) as video:
        for frame in random_frames(4, 16, 24):
            video.write_frame(frame)
    frames = list(read_frames(tmp_path / "clip.mp4"))
    assert len(frames) == 4
    assert_flows(pipe(tmp_path / "clip.mp4"), frames, reference)


# What it gives, and when


def test_an_endless_generator_is_read_as_its_flows_are_asked_for(pipe):
    """One frame ahead at most, and older frames are let go."""
    made, frames = [], []

    class Frame(np.ndarray):
        pass

    def endless():
        for i in itertools.count():
            frame = random_frames(1, 4, 6, seed=i)[0].view(Frame)
            frames.append(weakref.ref(frame))
            made.append(i)
            yield frame

    flows = pipe(endless())
    assert made == []
    for n in range(1, 30):
        next(flows)
        assert len(made) == n + 1
    gc.collect()
    assert sum(frame() is not None for frame in frames) <= 2
    flows.close()
    for batch_size in (3, 7):
        made.clear()
        flows = pipe(endless(), batch_size=batch_size)
        next(flows)
        assert len(made) == batch_size + 1  # one tile a pair: the first batch is full with that many pairs


def test_a_picture_is_added_on_request(pipe):
    frames = random_frames(3)
    plain = [result["flow"] for result in pipe(frames)]
    for options in ({}, {"max_magnitude": 3.0}):
        for result, flow in zip(pipe(frames, render=True, **options), plain, strict=True):
            assert (result["flow"] == flow).all()
            assert result["picture"].shape == (9, 13, 3) and result["picture"].dtype == np.uint8
            assert (result["picture"] == render_flow(flow, **options)).all()


def test_options_can_be_given_once_or_for_each_call(folder):
    pipe = pipeline("optical-flow", model=folder, render=True, batch_size=4, chunk_size=5)
    pair = tuple(random_frames(2))
    assert set(pipe(pair)) == {"flow", "picture"}
    assert set(pipe(pair, render=False)) == {"flow"}
    with pytest.raises(TypeError, match="rendr"):
        pipe(pair, rendr=True)


def test_decoding_in_chunks_reaches_the_model_and_changes_nothing(pipe, reference, monkeypatch):
    pair, seen = random_frames(2), []
    decode = type(pipe.model.perceiver).decode

    def spy(self, encoding, output_points=None, coordinates=None, chunk_size=None, **kwargs):
        seen.append(chunk_size)
        return decode(self, encoding, output_points, coordinates, chunk_size, **kwargs)

    monkeypatch.setattr(type(pipe.model.perceiver), "decode", spy)
    assert_flows([pipe(tuple(pair), chunk_size=5)], pair, reference)
    assert seen == [5] * TILES + [None]


def test_a_model_in_half_precision_gives_float32_flow_near_to_the_others(folder, reference):
    pipe = pipeline("optical-flow", model=folder, dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16
    frames = random_frames(2)
    flow, expected = pipe(tuple(frames))["flow"], reference(*frames)
    assert flow.dtype == np.float32
    # bfloat16 has 8 bits: its sums here lose some percent.
    assert 0 < np.linalg.norm(flow - expected) < 0.1 * np.linalg.norm(expected)


def test_no_gradients_are_kept(pipe):
    with torch.enable_grad():
        pipe(tuple(random_frames(2)))
    assert all(parameter.grad is None for parameter in pipe.model.parameters())
    assert not pipe.forward(pipe.preprocess([np.zeros((2, 27, 4, 6), np.float32)]))["logits"].requires_grad


def test_a_bar_shows_how_far_a_sequence_is(pipe, capsys):
    list(pipe(random_frames(4), progress=True))
    assert "3/3" in capsys.readouterr().err
    list(pipe(random_frames(4)))
    assert capsys.readouterr().err == ""


def test_a_saved_pipeline_is_one_again_and_asks_for_no_trust(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("optical-flow", model=str(tmp_path))
    pair = tuple(random_frames(2))
    assert (again(pair)["flow"] == pipe(pair)["flow"]).all()


# What fails


def bad_at(n: int, bad) -> list:
    frames = random_frames(n + 2)
    return [*frames[:n], bad, *frames[n + 1 :]]


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (np.full((9, 13, 3), np.nan), "frame 3 .*NaN"),
        (np.zeros((9, 12, 3), np.uint8), "frame 3 .*9x13 and 9x12"),
        ("nowhere.png", "frame 3 .*nowhere.png: there is no such file"),
        ((np.zeros((9, 13, 3), np.uint8),) * 2, "pair 3 .*a frame came before"),
        (None, "frame 3 "),
    ],
)
def test_a_sequence_that_fails_at_frame_n_gives_what_came_before_and_names_n(bad, told, batch_size, pipe, reference):
    frames = bad_at(3, bad)
    results = []
    with pytest.raises(ValueError, match=told):
        for result in pipe(frames, batch_size=batch_size):
            results.append(result)
    assert_flows(results, frames[:3], reference)


def test_a_generator_that_fails_is_named_with_its_frame_and_cause(pipe, reference):
    frames = random_frames(3)

    def camera():
        yield from frames
        raise ConnectionError("unplugged")

    results = []
    with pytest.raises(ValueError, match=r"frame 3 cannot be had .*: unplugged") as error:
        for result in pipe(camera(), batch_size=1000):
            results.append(result)
    assert isinstance(error.value.__cause__, ConnectionError)
    assert_flows(results, frames, reference)


def test_a_damaged_image_is_named_with_its_file(pipe, tmp_path):
    for i, frame in enumerate(random_frames(4, 40, 40)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    flows = pipe(tmp_path)
    next(flows)
    with pytest.raises(ValueError, match=r"frame 2 .*2\.png: .*truncated"):
        next(flows)


def test_too_few_frames_are_refused_before_anything_is_read(pipe, tmp_path):
    frame = random_frames(1)[0]
    Image.fromarray(frame).save(tmp_path / "0.png")
    (tmp_path / "empty").mkdir()
    refused = {
        "one frame is given, and flow needs two": [frame, Image.fromarray(frame), torch.zeros(3, 4, 6)],
        "1 frame given": [[frame], frame[None]],
        "no frames? given": [[], frame[None][:0]],
        "this has 3; give a list": [(frame,) * 3],
        "has 1 frame, and flow needs two; frames are files named": [tmp_path],
        r"has no frames, .*\*\.png": [tmp_path / "empty"],
        r"0\.png is one frame": [tmp_path / "0.png"],
        "there is no file or folder .*absent": [tmp_path / "absent", str(tmp_path / "absent.mp4")],
        "not int": [7],
        "not NoneType": [None],
        "not dict": [{"a": frame}],
    }
    for told, inputs in refused.items():
        for given in inputs:
            with pytest.raises(ValueError, match=told):
                pipe(given)


def test_too_few_frames_of_a_generator_are_refused_when_it_ends(pipe):
    for count, told in ((0, "no frames given"), (1, "1 frame given")):
        with pytest.raises(ValueError, match=told):
            next(pipe(iter(random_frames(count))))


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_a_batch_size_is_a_number_of_tiles(batch_size, pipe):
    with pytest.raises(ValueError, match=f"batch_size={batch_size!r} is a whole number of tiles from 1"):
        pipe(tuple(random_frames(2)), batch_size=batch_size)


def test_model_and_processor_must_agree_on_pixels(folder):
    with pytest.raises(ValueError, match=r"times 20\.0 is in pixels .* multiplies by 8\.0 .*make them equal"):
        pipeline("optical-flow", model=folder, image_processor=processor(flow_scale_factor=8.0))
    model = tiny("flow").model(PerceiverIOForOpticalFlow)
    model.config.postprocessor["scale_factor"] = 8.0
    with pytest.raises(ValueError, match=r"times 8\.0 .* by 20\.0"):
        OpticalFlowPipeline(model=model, image_processor=processor())
    OpticalFlowPipeline(model=model, image_processor=processor(flow_scale_factor=8))


def test_other_processors_and_models_are_refused(folder):
    with pytest.raises(ValueError, match="needs a PerceiverIOFlowImageProcessor, not a PerceiverImageProcessorPil"):
        pipeline("optical-flow", model=folder, image_processor=PerceiverImageProcessorPil())
    with pytest.raises(ValueError, match="needs a PerceiverIOForOpticalFlow, not a PerceiverIOForMaskedLM"):
        OpticalFlowPipeline(model=tiny("language").model(PerceiverIOForMaskedLM), image_processor=processor())


def test_features_of_another_patch_size_are_refused(folder):
    with pytest.raises(ValueError, match="27"):
        pipeline("optical-flow", model=folder, image_processor=processor(patch_size=1))(tuple(random_frames(2)))


def test_a_tile_larger_than_memory_is_refused_with_its_size(folder):
    """Before anything of that size is made. The features have 54 channels, the input array 35, four times."""
    side = 100_000
    pipe = pipeline("optical-flow", model=folder, image_processor=processor(tile_size={"height": side, "width": side}))
    channels = pipe.model.perceiver.preprocessor.channels
    needed = 4 * side**2 * (54 + 4 * channels) / 2**30
    with pytest.raises(ValueError, match=f"1 tile of 100000x100000: {needed:,.1f} GiB of memory would be needed, of "):
        pipe(tuple(random_frames(2)))


def test_a_batch_larger_than_memory_is_refused(folder, monkeypatch):
    pipe = pipeline("optical-flow", model=folder)
    one = 4 * 4 * 6 * (54 + 4 * pipe.model.perceiver.preprocessor.channels)
    monkeypatch.setattr("hf_perceiver.image_processing_perceiver_io.memory_limit", lambda: 4 * one)
    pair = tuple(random_frames(2))
    pipe(pair, batch_size=4)
    with pytest.raises(ValueError, match=r"5 tiles of 4x6: .* take a smaller batch_size"):
        pipe(pair, batch_size=5)
