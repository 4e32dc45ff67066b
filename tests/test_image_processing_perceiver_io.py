"""PerceiverIOFlowImageProcessor: frames of every kind and size to features, tiles, and flow back to frames.

DeepMind's rules are restated here from its optical_flow.ipynb. Tiles are small; the rules know no size.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from parity.deepmind import PARITY
from PIL import Image
from transformers import PerceiverImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from conversion import convert_haiku
from conversion.verify import flow_patches
from hf_perceiver import PerceiverIOConfig, PerceiverIOFlowImageProcessor, PerceiverIOForOpticalFlow
from hf_perceiver.image_processing_perceiver_io import check_memory, memory_limit

TILE, OVERLAP = (7, 9), 3


def small(**changes) -> PerceiverIOFlowImageProcessor:
    given = {"tile_size": {"height": TILE[0], "width": TILE[1]}, "min_overlap": OVERLAP, **changes}
    return PerceiverIOFlowImageProcessor(**given)


def random_frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def deepmind_positions(size: int, tile: int, overlap: int) -> list[int]:
    """`compute_grid_indices` along one axis: some may repeat, or leave the frame."""
    positions = list(range(0, size, tile - overlap))
    positions[-1] = size - tile
    return positions


def deepmind_flow(tiles: list[np.ndarray], corners: list[tuple[int, int]], size: tuple[int, int]) -> np.ndarray:
    """The notebook's weighted mean of tiles."""
    height, width = tiles[0].shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    weight = np.minimum(np.minimum(x + 1, width - x), np.minimum(y + 1, height - y))[..., None]
    total, count = np.zeros((*size, 2)), np.zeros((*size, 1))
    for tile, (top, left) in zip(tiles, corners, strict=True):
        total[top : top + height, left : left + width] += tile * weight
        count[top : top + height, left : left + width] += weight
    return total / count


# Features


def test_levels_become_what_the_notebook_makes_of_them():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = (levels / 255 * 2 - 1).astype(np.float32)
    assert (small().read_frame(levels) == expected).all()


def test_features_are_deepminds_patches_bit_for_bit():
    processor = small(tile_size={"height": 5, "width": 8}, min_overlap=0)
    frames = random_frames(2, 5, 8, 3)
    features = processor(frames, return_tensors="pt").pixel_values
    pixels = torch.from_numpy((frames / 255 * 2 - 1).astype(np.float32)).movedim(-1, 1)
    expected = flow_patches(pixels[None])
    assert features.shape == (1, 2, 27, 5, 8)
    assert torch.equal(features, expected)


def test_patches_end_at_the_tile_not_at_the_frame():
    """The notebook cuts tiles of the normalised frame, and makes patches of each."""
    frames = random_frames(2, 10, 15, 3)
    features = small()(frames).pixel_values
    pixels = np.moveaxis((frames / 255 * 2 - 1).astype(np.float32), -1, 1)
    for tile, (top, left) in zip(features, small().tile_corners(10, 15), strict=True):
        cut = np.pad(pixels[:, :, top : top + 7, left : left + 9], ((0, 0), (0, 0), (1, 1), (1, 1)))
        for ph, pw, c in itertools.product(range(3), range(3), range(3)):
            assert (tile[:, (ph * 3 + pw) * 3 + c] == cut[:, c, ph : ph + 7, pw : pw + 9]).all()


def test_patches_of_one_pixel_are_the_colours():
    frames = random_frames(2, 10, 9, 3)
    features = small(patch_size=1)(frames).pixel_values
    assert features.shape == (2, 2, 3, 7, 9)
    whole = small()(frames).pixel_values
    assert (features == whole[:, :, 12:15]).all(), "the middle of the 3x3"


def test_a_model_of_deepminds_weights_gives_its_pixels_through_the_processor(tmp_path):
    """The stored small model, from frames to pixels; 1e-5 is the bound of all its comparisons (parity/README)."""
    arguments = ["--model", "optical-flow", "--deepmind-config", str(PARITY / "optical_flow_a.json")]
    assert (
        convert_haiku.main([str(PARITY / "optical_flow_a.pystate"), *arguments, "--output", str(tmp_path / "m")]) == 0
    )
    model = PerceiverIOForOpticalFlow.from_pretrained(tmp_path / "m")
    with np.load(PARITY / "optical_flow_a.npz") as stored:
        images, pixels = stored["images"], torch.from_numpy(stored["outputs"])  # images in [-1, 1]
    processor = PerceiverIOFlowImageProcessor(tile_size={"height": 16, "width": 24}, min_overlap=5)
    frames = (images.astype(np.float64) + 1) / 2
    features = processor(frames, return_tensors="pt")
    with torch.no_grad():
        flows = processor.post_process_optical_flow(model(**features))
    for flow, reference in zip(flows, pixels, strict=True):
        assert (flow - reference).norm() <= 1e-5 * reference.norm()


# Kinds of frames


def kinds() -> dict[str, tuple]:
    """Name -> the same 6x11 picture (here with three equal channels where it says grey) in another form, and its RGB."""
    rgb = random_frames(6, 11, 3)
    grey = rgb[..., 0]
    alpha = random_frames(6, 11, 1, seed=1)
    rgba, la = np.concatenate([rgb, alpha], -1), np.stack([grey, alpha[..., 0]], -1)
    grey_rgb = np.repeat(grey[..., None], 3, -1)
    tensor = torch.from_numpy(rgb).movedim(-1, 0)
    palette = Image.fromarray(rgb).quantize(16)
    sixteen = grey.astype(np.uint16) * 257  # 255 * 257 = 65535
    return {
        "numpy RGB": (rgb, rgb),
        "numpy RGB first": (np.moveaxis(rgb, -1, 0), rgb),
        "numpy not contiguous": (np.asfortranarray(rgb), rgb),
        "numpy RGBA": (rgba, rgb),
        "numpy LA": (la, grey_rgb),
        "numpy grey": (grey, grey_rgb),
        "numpy grey with an axis": (grey[..., None], grey_rgb),
        "numpy uint16": (sixteen, grey_rgb),
        "numpy uint16 of the other byte order": (sixteen.astype(">u2"), grey_rgb),
        "numpy int64": (rgb.astype(np.int64), rgb),
        "numpy float64": (rgb / 255, rgb),
        "numpy float32": ((rgb / 255).astype(np.float32), rgb),
        "torch uint8": (tensor, rgb),
        "torch channels last": (tensor.movedim(0, -1), rgb),
        "torch float with gradient": ((tensor / 255).requires_grad_(), rgb),
        "torch float64": (tensor.double() / 255, rgb),
        "torch grey": (torch.from_numpy(grey), grey_rgb),
        "PIL RGB": (Image.fromarray(rgb), rgb),
        "PIL RGBA": (Image.fromarray(rgba), rgb),
        "PIL LA": (Image.fromarray(la, "LA"), grey_rgb),
        "PIL L": (Image.fromarray(grey), grey_rgb),
        "PIL P": (palette, np.asarray(palette.convert("RGB"))),
        "PIL 1": (Image.fromarray(grey > 127), np.repeat(255 * (grey[..., None] > 127), 3, -1)),
        "PIL I;16": (Image.fromarray(sixteen), grey_rgb),
        "PIL I": (Image.fromarray(sixteen.astype(np.int32)), grey_rgb),
        "PIL F": (Image.fromarray((grey / 255).astype(np.float32)), grey_rgb),
    }


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", kinds())
def test_frames_of_every_kind_are_read_alike(name):
    frame, rgb = kinds()[name]
    expected = np.moveaxis((rgb / 255 * 2 - 1).astype(np.float32), -1, 0)
    got = small().read_frame(frame)
    assert got.dtype == np.float32 and got.shape == (3, 6, 11) and got.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7)  # two roundings of a number up to 1


def test_half_precision_frames_lose_no_more_than_they_had_lost():
    frame = torch.rand(3, 4, 5)
    for dtype in (torch.float16, torch.bfloat16):
        got = small().read_frame(frame.to(dtype))
        assert (got == (frame.to(dtype).float() * 2 - 1).numpy()).all()


def test_channels_are_where_the_caller_says():
    frame = random_frames(3, 5, 4)  # 3x5 RGBA, or a 5x4 RGB
    assert small().read_frame(frame).shape == (3, 3, 5)
    assert small().read_frame(torch.from_numpy(frame)).shape == (3, 5, 4)
    assert small().read_frame(frame, input_data_format="channels_first").shape == (3, 5, 4)
    pair = small()([frame, frame], input_data_format="channels_first")
    assert (pair.pixel_values == small()(np.moveaxis(np.stack([frame, frame]), 1, -1)).pixel_values).all()


def test_pairs_can_be_given_in_every_form():
    frames = random_frames(4, 6, 8, 3)
    sequence = small()(list(frames), return_tensors="np").pixel_values
    pairs = [(a, b) for a, b in itertools.pairwise(frames)]
    tensor = torch.from_numpy(frames).movedim(-1, 1)
    assert len(sequence) == 3
    for same in (frames, tuple(frames), pairs, [list(p) for p in pairs], np.stack(pairs), tensor, iter(frames)):
        assert (small()(same).pixel_values == sequence).all()
    assert (small()(pairs[0]).pixel_values == sequence[:1]).all()
    assert (small()([np.stack(pairs[0])]).pixel_values == sequence[:1]).all()


def test_pairs_of_different_sizes_stand_one_after_the_other():
    pairs = [tuple(random_frames(2, *size, 3)) for size in ((6, 8), (12, 20), (7, 9), (1, 1))]
    together = small()(pairs).pixel_values
    assert (together == np.concatenate([small()(pair).pixel_values for pair in pairs])).all()
    assert len(together) == 1 + 3 * 3 + 1 + 1


# Contrast


def test_contrast_is_made_equal_over_both_frames_of_a_pair():
    frames = random_frames(2, 12, 20, 3) // 8 + 100
    processor = small(contrast_normalize=True, patch_size=1, tile_size={"height": 12, "width": 20})
    values = processor(frames).pixel_values
    assert values.mean() == pytest.approx(0, abs=1e-6) and values.std() == pytest.approx(1, abs=1e-6)
    plain = frames / 255 * 2 - 1
    expected = np.moveaxis((plain - plain.mean()) / plain.std(), -1, 1)
    np.testing.assert_allclose(values[0], expected, rtol=0, atol=1e-5)
    flat = processor(np.full((2, 12, 20, 3), 77, np.uint8)).pixel_values
    assert (flat == 0).all()


# Tiles


@pytest.mark.parametrize(
    ("size", "tops", "lefts"),
    [  # paper-facts: 6 tiles for Sintel and KITTI; the training size once, which DeepMind runs four times
        ((436, 1024), [0, 68], [0, 476, 528]),
        ((375, 1242), [0, 7], [0, 476, 746]),
        ((368, 496), [0], [0]),
        ((369, 497), [0, 1], [0, 1]),
        ((367, 495), [0], [0]),
        ((367, 497), [0], [0, 1]),
        ((1, 1), [0], [0]),
        ((716, 972), [0, 348], [0, 476]),
        ((717, 973), [0, 348, 349], [0, 476, 477]),
        ((697, 953), [0, 329], [0, 457]),
    ],
)
def test_tiles_of_known_sizes(size, tops, lefts):
    assert PerceiverIOFlowImageProcessor().tile_corners(*size) == list(itertools.product(tops, lefts))


@given(st.integers(368, 5000), st.sampled_from([(368, 20), (496, 20), (496, 0), (496, 495)]))
def test_tiles_stand_where_deepminds_do(size, rule):
    tile, overlap = rule
    size = max(size, tile)
    processor = PerceiverIOFlowImageProcessor(tile_size={"height": tile, "width": tile}, min_overlap=overlap)
    tops = [top for top, _ in processor.tile_corners(size, tile)]
    theirs = deepmind_positions(size, tile, overlap)
    # What leaves the frame fails in the notebook; what repeats is left out.
    assert tops == sorted({position for position in theirs if position + tile <= size})


def test_sizes_that_fail_in_the_notebook_are_the_documented_ones():
    failing = [n for n in range(368, 1000) if any(p + 368 > n for p in deepmind_positions(n, 368, 20))]
    assert failing == list(range(697, 716))


@given(st.integers(1, 60), st.integers(1, 60))
def test_tiles_cover_a_frame_of_any_size_and_overlap_enough(height, width):
    corners = small().tile_corners(height, width)
    assert len(set(corners)) == len(corners)
    for axis, (size, tile) in enumerate(zip((height, width), TILE, strict=True)):
        starts = sorted({corner[axis] for corner in corners})
        assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
        assert all(b - a <= tile - OVERLAP for a, b in itertools.pairwise(starts))


@given(st.integers(1, 25), st.integers(1, 25))
def test_lazy_tiles_are_the_eager_ones(height, width):
    frames = random_frames(2, height, width, 3)
    processor = small()
    [(first, second)] = processor.pairs(frames)
    lazily = list(processor.tiles(first, second))
    assert (np.stack(lazily) == processor(frames).pixel_values).all()
    assert len(lazily) == len(processor.tile_corners(height, width))


def test_a_small_frame_is_continued_by_its_last_row_and_column():
    frames = random_frames(2, 4, 5, 3)
    continued = np.pad(frames, ((0, 0), (0, 3), (0, 4), (0, 0)), mode="edge")
    assert (small()(frames).pixel_values == small()(continued).pixel_values).all()
    tile = torch.randn(1, *TILE, 2)
    [flow] = small().post_process_optical_flow(tile, [(4, 5)])
    assert torch.equal(flow, tile[0, :4, :5] * 20)


# Stitching


def test_a_frame_of_the_tiles_size_gets_the_models_flow_as_it_is():
    logits = torch.randn(3, *TILE, 2)
    flows = small().post_process_optical_flow(logits)
    assert torch.equal(torch.stack(flows), logits * 20)
    assert flows[0].dtype == torch.float32
    assert torch.equal(small(flow_scale_factor=1.0).post_process_optical_flow(logits)[0], logits[0])


@given(st.integers(1, 40), st.integers(1, 40))
def test_constant_and_affine_fields_come_back_bit_for_bit(height, width):
    """Each tile holds its part of one field of the frame, as float32."""
    processor = small(flow_scale_factor=1)
    y, x = np.mgrid[: max(height, TILE[0]), : max(width, TILE[1])].astype(np.float32)
    affine = np.stack([0.7 + 1.3 * x - 0.4 * y, -2.1 - 0.3 * x + 0.9 * y], -1).astype(np.float32)
    constant = np.broadcast_to(np.float32([1 / 3, -7 / 9]), affine.shape)
    for field in (affine, constant):
        corners = processor.tile_corners(height, width)
        tiles = np.stack([field[top : top + 7, left : left + 9] for top, left in corners])
        [flow] = processor.post_process_optical_flow(tiles, [(height, width)])
        assert (flow.numpy() == field[:height, :width]).all()


@given(st.integers(7, 40), st.integers(9, 40))
def test_tiles_are_averaged_as_in_the_notebook(height, width):
    rows, columns = deepmind_positions(height, 7, OVERLAP), deepmind_positions(width, 9, OVERLAP)
    corners = [
        corner for corner in itertools.product(rows, columns) if corner[0] + 7 <= height and corner[1] + 9 <= width
    ]
    once = list(dict.fromkeys(corners))
    rng = np.random.default_rng(height * 100 + width)
    flow_at = {corner: rng.standard_normal((7, 9, 2)).astype(np.float32) for corner in once}
    ours = small().post_process_optical_flow(np.stack([flow_at[c] for c in sorted(once)]), [(height, width)])[0]
    theirs = 20 * deepmind_flow([flow_at[c] for c in once], once, (height, width))
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-5)  # flows up to 80, rounded once to float32
    if len(once) == 1:
        # The notebook runs the one tile up to four times, to the same result.
        repeated = 20 * deepmind_flow([flow_at[c] for c in corners], corners, (height, width))
        np.testing.assert_allclose(ours.numpy(), repeated, rtol=0, atol=1e-5)


def test_sizes_are_given_for_each_pair_or_once_for_all():
    processor = small()
    logits = torch.randn(18, *TILE, 2)  # 9 tiles each
    once = processor.post_process_optical_flow(logits, (12, 20))
    each = processor.post_process_optical_flow(logits, torch.tensor([[12, 20], [12, 20]]))
    assert len(once) == 2 and all(flow.shape == (12, 20, 2) for flow in once)
    assert all(torch.equal(a, b) for a, b in zip(once, each, strict=True))
    mixed = processor.post_process_optical_flow(logits[:11], [(12, 20), (3, 4), (7, 9)])
    assert [tuple(flow.shape) for flow in mixed] == [(12, 20, 2), (3, 4, 2), (7, 9, 2)]
    assert torch.equal(mixed[0], once[0])


def test_the_models_output_goes_straight_back():
    model = tiny("flow").model(PerceiverIOForOpticalFlow)
    processor = small(tile_size={"height": 4, "width": 6}, min_overlap=1)
    features = processor(random_frames(3, 9, 13, 3), return_tensors="pt")
    with torch.no_grad():
        flows = processor.post_process_optical_flow(model(**features), (9, 13))
    assert len(flows) == 2 and all(flow.shape == (9, 13, 2) for flow in flows)


def test_flow_in_half_precision_is_put_together_in_float32():
    logits = torch.randn(9, *TILE, 2).bfloat16()
    [flow] = small().post_process_optical_flow(logits, [(12, 20)])
    assert flow.dtype == torch.float32
    assert torch.equal(flow, small().post_process_optical_flow(logits.float(), [(12, 20)])[0])


# Saving


def test_it_is_saved_and_found_beside_the_model(tmp_path):
    made = small(patch_size=1, flow_scale_factor=8.0, contrast_normalize=True)
    PerceiverIOConfig().save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    for loaded in (
        PerceiverIOFlowImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
        AutoImageProcessor.from_pretrained(tmp_path, backend="torchvision"),
    ):
        assert type(loaded) is PerceiverIOFlowImageProcessor
        assert loaded.to_dict() == made.to_dict()
        assert loaded.tile_size == {"height": 7, "width": 9} and loaded.patch_size == 1
    assert AutoImageProcessor.from_pretrained(tmp_path, patch_size=3).patch_size == 3
    with pytest.raises(ValueError, match="patch_size=2"):
        AutoImageProcessor.from_pretrained(tmp_path, patch_size=2)


def test_imagenets_processor_is_still_found_beside_its_model(tmp_path):
    """Both belong to one configuration class; the file says which it is."""
    PerceiverIOConfig().save_pretrained(tmp_path)
    PerceiverImageProcessorPil().save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is PerceiverImageProcessorPil


def test_a_plain_save_does_not_promise_code(tmp_path):
    made = small(auto_map={"AutoImageProcessor": "image_processing_perceiver_io.PerceiverIOFlowImageProcessor"})
    made.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]


# Bad input


GOOD = random_frames(6, 8, 3)


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (GOOD, "one frame is given, and flow needs two"),
        (Image.fromarray(GOOD), "one frame is given, and flow needs two"),
        ([GOOD], "1 frame given, and flow needs two"),
        ([], "no frames given, and flow needs two"),
        (np.zeros((0, 6, 8, 3), np.uint8), "no frames given"),
        ([GOOD, GOOD, GOOD[:5]], r"frame 2 .*the first is 0.* 6x8 and 5x8; crop or resize"),
        ([(GOOD, GOOD), (GOOD, GOOD[:, :7])], "pair 1 .* 6x8 and 6x7"),
        ([(GOOD, GOOD, GOOD)], "pair 0 .* has 3 frames; a pair has two"),
        ([(GOOD, GOOD), GOOD], "frame 1 .* a pair came before"),
        ([GOOD, GOOD, (GOOD, GOOD)], "pair 2 .* a frame came before"),
        ([GOOD, np.where(GOOD.max() == GOOD, np.nan, GOOD / 255)], r"frame 1 .* NaN or infinity, \d+ values of 144"),
        ([np.full((6, 8), np.inf), GOOD], "frame 0 .* NaN or infinity"),
        ([GOOD * 1.0, GOOD], r"float64 holds 0\.\.1, and this has 0.*\.\.255.*divide"),
        ([GOOD / 127.5 - 1, GOOD], r"float64 holds 0\.\.1, and this has -1"),
        ([GOOD.astype(int) + 256, GOOD], r"holds 0\.\.255, and this has 25\d\.\.5\d\d"),
        ([GOOD > 3, GOOD], "integers 0..255 or floats 0..1, not bool"),
        ([random_frames(6, 8, 5), GOOD], r"1 \(grey\), 2 .* 3 .* 4 .* channels, last or first; this has the shape \(6, 8, 5\)"),
        ([np.zeros((0, 8, 3), np.uint8)] * 2, "frame 0 .* empty, 0x8"),
        ([np.zeros((6, 0), np.uint8)] * 2, "frame 0 .* empty, 6x0"),
        ([np.uint8(3), GOOD], r"frame 0 .*shape \(\)"),
        (["a.png", "b.png"], "frame 0 .* 'a.png' is no frame but its name; open it first"),
        ([Image.fromarray(np.full((6, 8), 70000, np.int32)), GOOD], r"mode I holds 0\.\.65535, not 70000\.\.70000"),
    ],
)  # fmt: skip
def test_bad_frames_are_refused_by_number_with_the_way_out(frames, told):
    with pytest.raises(ValueError, match=told):
        small()(frames)


def test_an_unknown_data_format_is_refused():
    with pytest.raises(ValueError, match="input_data_format='last' is one of channels_first, channels_last"):
        small()([GOOD, GOOD], input_data_format="last")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tile_size": {"height": 0, "width": 9}}, "at least 1x1"),
        ({"tile_size": {"height": 7}}, "tile_size is .*'height': 368"),
        ({"tile_size": {"height": 7.0, "width": 9}}, "tile_size is"),
        ({"min_overlap": 7}, "min_overlap=7 .* less than a tile's side; tiles are 7x9"),
        ({"min_overlap": -1}, "min_overlap=-1"),
        ({"tile_size": {"height": 16, "width": 24}, "min_overlap": 20}, "tiles are 16x24"),
        ({"patch_size": 5}, "patch_size=5 is 3"),
        ({"flow_scale_factor": 0}, "flow_scale_factor=0"),
        ({"flow_scale_factor": float("nan")}, "flow_scale_factor=nan"),
        ({"tile_sise": {"height": 7, "width": 9}}, "no option 'tile_sise'; did you mean 'tile_size'"),
    ],
)
def test_impossible_options_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        small(**options)


def test_options_set_later_are_checked_too():
    processor = small()
    processor.min_overlap = 9
    with pytest.raises(ValueError, match="min_overlap=9"):
        processor([GOOD, GOOD])


@pytest.mark.parametrize(
    ("logits", "sizes", "told"),
    [
        (torch.zeros(1, 7, 8, 2), None, r"flow of tiles is \(tiles, 7, 9, 2\), not \(1, 7, 8, 2\)"),
        (torch.zeros(1, 63, 2), None, r"not \(1, 63, 2\)"),
        (torch.zeros(5, 7, 9, 2), (12, 20), "5 tiles are given; frames of 12x20 have 9"),
        (torch.zeros(10, 7, 9, 2), (12, 20), "10 tiles are given; frames of 12x20 have 9"),
        (torch.zeros(7, 7, 9, 2), [(12, 20), (7, 9), (7, 9)], "frames of 12x20, 7x9, 7x9 have 11"),
        (torch.zeros(1, 7, 9, 2), [(0, 9)], "at least 1x1, not 0x9"),
    ],
)
def test_flow_that_does_not_fit_its_frames_is_refused(logits, sizes, told):
    with pytest.raises(ValueError, match=told):
        small().post_process_optical_flow(logits, sizes)


def test_a_stitcher_takes_its_tiles_and_no_others():
    stitcher = small().stitcher(7, 10)
    with pytest.raises(ValueError, match=r"the flow of a tile is \(7, 9, 2\), not \(7, 9\)"):
        stitcher.add(torch.zeros(7, 9))
    stitcher.add(torch.zeros(7, 9, 2))
    with pytest.raises(ValueError, match="1 of 2 tiles were added"):
        stitcher.flow()
    stitcher.add(torch.zeros(7, 9, 2))
    with pytest.raises(ValueError, match="all 2 tiles of a 7x10 frame are there"):
        stitcher.add(torch.zeros(7, 9, 2))


def test_more_than_the_machine_has_is_refused_with_the_size_it_would_need():
    side = 200_000  # 2 * 27 * side^2 floats are 8,047 GiB
    with pytest.raises(ValueError, match=r"1 tiles of 200000x200000: 8,046\.6 GiB of memory would be needed, of \d"):
        PerceiverIOFlowImageProcessor(tile_size={"height": side, "width": side})([GOOD, GOOD])


def test_the_memory_of_this_machine_is_known():
    limit = memory_limit()
    assert limit is None or 2**28 < limit < 2**50
    check_memory(2**40, "a tebibyte", "no way", limit=2**40)
    with pytest.raises(
        ValueError, match=r"a tebibyte: 1,024\.0 GiB of memory would be needed, of 1,023\.0 GiB; no way"
    ):
        check_memory(2**40, "a tebibyte", "no way", limit=1023 * 2**30)
