"""Flow files to the byte, the colour wheel, warping, and the folders of data sets."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_perceiver import flow_files
from hf_perceiver.flow_files import (
    check_flow,
    colour_wheel_legend,
    kitti_pairs,
    read_flo,
    read_flow,
    read_kitti_flow,
    render_flow,
    sintel_pairs,
    warp,
    write_flo,
    write_kitti_flow,
)

# Written by hand from the format: magic, width 2, height 2, then (x, y) per pixel as little-endian float32.
FLO_BYTES = bytes.fromhex(
    "50494548 02000000 02000000"
    "0000c03f 000000c0"  # 1.5, -2
    "f9021550 f9021550"  # 1e10, 1e10: unknown
    "00000000 0000c07f"  # 0, NaN: unknown
    "0000803e 00000000"  # 0.25, 0
)

# A 2x1 16-bit RGB PNG by hand: one stored block, filter 0. x = 1.5 is 32768 + 96 = 0x8060, y = -2 is 0x7f80, valid.
KITTI_BYTES = bytes.fromhex(
    "89504e470d0a1a0a"
    "0000000d 49484452 00000002 00000001 10 02 00 00 00 2bd0349e"
    "00000018 49444154 7801 01 0d00 f2ff 00 8060 7f80 0001 0000 0000 0000 13aa01e1 d4cfaaf2"
    "00000000 49454e44 ae426082"
)


def random_flow(height=5, width=7, seed=0, scale=20.0):
    return (np.random.default_rng(seed).normal(size=(height, width, 2)) * scale).astype(np.float32)


def png16(height, width, filters, rows):
    """A PNG of 16-bit RGB from already filtered rows of bytes, by the standard library."""
    data = b"".join(bytes([f]) + bytes(row) for f, row in zip(filters, rows, strict=True))
    return png([(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(data))])


def png(chunks):
    chunks = [*chunks, (b"IEND", b"")]
    coded = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(coded)


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# .flo


def test_flo_written_by_hand_reads_to_the_bit(tmp_path):
    (tmp_path / "a.flo").write_bytes(FLO_BYTES)
    flow, valid = read_flo(tmp_path / "a.flo")
    assert flow.dtype == np.float32 and valid.dtype == bool
    assert flow.tolist() == [[[1.5, -2.0], [0, 0]], [[0, 0], [0.25, 0]]]
    assert valid.tolist() == [[True, False], [False, True]]
    flow[0, 0] = 7  # what was read can be changed


def test_flo_is_written_as_by_hand(tmp_path):
    flow = np.array([[[1.5, -2.0], [3, 4]], [[np.nan, 0], [0.25, 0]]])
    write_flo(tmp_path / "a.flo", flow, [[1, 0], [0, 1]])
    # Every unknown pixel is written as twice 1e10.
    assert (tmp_path / "a.flo").read_bytes() == FLO_BYTES.replace(bytes(6) + bytes.fromhex("c07f"), FLO_BYTES[20:28])


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(2)),
        elements=st.floats(-1e9, 1e9, width=32),
    ),
    st.integers(0, 2**36 - 1),
)
def test_flo_round_trip_is_exact(tmp_path_factory, flow, bits):
    valid = np.array([bits >> i & 1 for i in range(flow[..., 0].size)], bool).reshape(flow.shape[:2])
    path = tmp_path_factory.getbasetemp() / "round.flo"
    write_flo(path, flow, valid)
    again, again_valid = read_flo(path)
    np.testing.assert_array_equal(again_valid, valid)
    np.testing.assert_array_equal(again, np.where(valid[..., None], flow, 0))


def test_flo_agrees_with_opencv_both_ways(tmp_path):
    cv2 = pytest.importorskip("cv2")
    flow = random_flow()
    write_flo(tmp_path / "ours.flo", flow)
    np.testing.assert_array_equal(cv2.readOpticalFlow(str(tmp_path / "ours.flo")), flow)
    assert cv2.writeOpticalFlow(str(tmp_path / "theirs.flo"), flow)
    assert (tmp_path / "theirs.flo").read_bytes() == (tmp_path / "ours.flo").read_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with b''"),
        (b"PIEH\2\0", "and a size"),
        (b"HEIP" + FLO_BYTES[4:], "begins with b'HEIP', not b'PIEH'"),
        (FLO_BYTES[:-1], "has 43 bytes, a 2x2 flow has 44"),
        (FLO_BYTES + b"\0", "has 45 bytes"),
        (b"PIEH" + struct.pack("<ii", 0, 2), "size of 0x2"),
        (b"PIEH" + struct.pack("<ii", 2, -2), "size of 2x-2"),
        (b"PIEH" + struct.pack("<ii", 2**31 - 1, 2**31 - 1), "size of 2147483647x2147483647"),
        (b"PIEH" + struct.pack("<ii", 99_999, 99_999), "a 99999x99999 flow has 79,998,400,020"),
    ],
)
def test_a_damaged_flo_is_refused_before_memory_is_taken(tmp_path, data, message):
    (tmp_path / "bad.flo").write_bytes(data)

    def read():
        with pytest.raises(ValueError, match="bad") as error:
            read_flo(tmp_path / "bad.flo")
        assert message in str(error.value)

    assert peak_memory(read) < 2e6


def test_flow_that_flo_would_call_unknown_is_not_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"row 0, column 1 is \[2e\+09, 0.0\]|row 0, column 1 is \[2000000000.0, 0.0\]"
    ):
        write_flo(tmp_path / "a.flo", np.array([[[1, 1], [2e9, 0]]]))
    assert not list(tmp_path.iterdir())


# KITTI


def test_kitti_png_written_by_hand_reads_to_the_bit(tmp_path):
    (tmp_path / "a.png").write_bytes(KITTI_BYTES)
    flow, valid = read_kitti_flow(tmp_path / "a.png")
    assert flow.dtype == np.float32 and valid.dtype == bool
    assert flow.tolist() == [[[1.5, -2.0], [0, 0]]]
    assert valid.tolist() == [[True, False]]


def test_kitti_png_holds_flow_times_64_plus_32768(tmp_path):
    cv2 = pytest.importorskip("cv2")
    flow = random_flow(30, 40)
    valid = np.random.default_rng(1).random((30, 40)) < 0.5
    write_kitti_flow(tmp_path / "a.png", flow, valid)
    stored = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]  # OpenCV's order is blue first
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored[..., 2], valid)
    np.testing.assert_array_equal(stored[valid][:, :2], np.rint(flow[valid].astype(np.float64) * 64 + 32768))
    assert (stored[~valid] == 0).all()


@pytest.mark.parametrize("name", ["NONE", "SUB", "UP", "AVG", "PAETH"])
def test_pngs_of_opencv_read_right_with_every_filter(tmp_path, name):
    cv2 = pytest.importorskip("cv2")
    y, x = np.mgrid[:23, :31]
    smooth = np.stack([32768 + 90 * x + 7 * y, 32768 - 300 * y + x * y, (x + y) % 2], axis=-1).astype(np.uint16)
    noise = np.random.default_rng(0).integers(0, 65536, (23, 31, 3), np.uint16)
    for picture in (smooth, noise):
        options = [cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{name}")]
        assert cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1], options)
        flow, valid = read_kitti_flow(tmp_path / "a.png")
        np.testing.assert_array_equal(valid, picture[..., 2] > 0)
        np.testing.assert_array_equal(flow[valid], (picture[valid][:, :2] - 32768.0) / 64)


def filtered_by_the_letter(rows, filters):
    """PNG's filters on rows of bytes, byte by byte as the specification states them."""
    result = []
    for y, (row, rule) in enumerate(zip(rows, filters, strict=True)):
        out = []
        for i, byte in enumerate(row):
            a = row[i - 6] if i >= 6 else 0
            b = rows[y - 1][i] if y else 0
            c = rows[y - 1][i - 6] if y and i >= 6 else 0
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            out.append((byte - [0, a, b, (a + b) // 2, paeth][rule]) % 256)
        result.append(out)
    return result


@given(st.data())
def test_any_mix_of_filters_is_undone(tmp_path_factory, data):
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    filters = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    pixels = data.draw(hnp.arrays(np.uint16, (height, width, 3)))
    rows = [list(row.astype(">u2").tobytes()) for row in pixels]
    path = tmp_path_factory.getbasetemp() / "filters.png"
    path.write_bytes(png16(height, width, filters, filtered_by_the_letter(rows, filters)))
    flow, valid = read_kitti_flow(path)
    np.testing.assert_array_equal(valid, pixels[..., 2] > 0)
    np.testing.assert_array_equal(flow[valid], (pixels[valid][:, :2] - 32768.0) / 64)


@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(2))))
def test_kitti_round_trip_is_exact_on_64ths(tmp_path_factory, stored):
    flow = (stored - 32768.0) / 64
    path = tmp_path_factory.getbasetemp() / "round.png"
    write_kitti_flow(path, flow)
    again, valid = read_kitti_flow(path)
    assert valid.all()
    np.testing.assert_array_equal(again, flow)


def test_kitti_rounds_to_the_nearest_64th(tmp_path):
    flow = random_flow(40, 50)
    write_kitti_flow(tmp_path / "a.png", flow)
    # Half a step, and float32's own rounding of numbers below 128.
    assert np.abs(read_kitti_flow(tmp_path / "a.png")[0] - flow).max() <= 1 / 128 + 1e-5


@pytest.mark.parametrize("value", [-512.01, 511.995, 1e30])
def test_flow_that_kitti_cannot_hold_is_refused_unless_not_valid(tmp_path, value):
    flow = np.zeros((2, 3, 2))
    flow[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"row 1, column 2 .*-512 to 511.98 px; write a .flo file"):
        write_kitti_flow(tmp_path / "a.png", flow)
    assert not list(tmp_path.iterdir())
    valid = flow[..., 0] == 0
    write_kitti_flow(tmp_path / "a.png", flow, valid)
    np.testing.assert_array_equal(read_kitti_flow(tmp_path / "a.png")[1], valid)


def test_a_png_that_ends_within_its_data_is_refused(tmp_path):
    for length in range(KITTI_BYTES.index(b"IEND") - 4):
        (tmp_path / "bad.png").write_bytes(KITTI_BYTES[:length])
        with pytest.raises(ValueError, match=r"bad.png is (no|a damaged) PNG"):
            read_kitti_flow(tmp_path / "bad.png")


def test_a_png_with_any_byte_changed_is_refused(tmp_path):
    for position in range(len(KITTI_BYTES)):
        changed = bytearray(KITTI_BYTES)
        changed[position] ^= 0x15
        (tmp_path / "bad.png").write_bytes(changed)
        with pytest.raises(ValueError, match=r"bad.png"):
            read_kitti_flow(tmp_path / "bad.png")


HEADER = (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "begins with b'IEND'"),
        ([(b"IHDR", b"")], "no KITTI flow"),
        ([(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0))], "are 16-bit RGB, not 8-bit of PNG colour type 2"),
        ([(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0))], "not 16-bit of PNG colour type 0"),
        ([(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 1))], "damaged PNG"),
        ([(b"IHDR", struct.pack(">IIBBBBB", 2**31, 2**31, 16, 2, 0, 0, 0))], "size of 2147483648x2147483648"),
        ([(b"IHDR", struct.pack(">IIBBBBB", 0, 1, 16, 2, 0, 0, 0))], "size of 0x1"),
        ([(b"IHDR", struct.pack(">IIBBBBB", 99_999, 99_999, 16, 2, 0, 0, 0))], "cannot hold 99999x99999"),
        ([HEADER], "damaged PNG"),
        ([HEADER, (b"IDAT", zlib.compress(bytes(12)))], "damaged PNG"),
        ([HEADER, (b"IDAT", zlib.compress(bytes(13))[:4])], "damaged PNG"),
        ([HEADER, (b"IDAT", b"no zlib")], "damaged PNG"),
    ],
)
def test_a_hostile_png_is_refused_before_memory_is_taken(tmp_path, chunks, message):
    (tmp_path / "bad.png").write_bytes(png(chunks))

    def read():
        with pytest.raises(ValueError, match="bad") as error:
            read_kitti_flow(tmp_path / "bad.png")
        assert message in str(error.value)

    assert peak_memory(read) < 2e6


def test_data_beyond_the_picture_is_passed_over(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png([HEADER, (b"IDAT", zlib.compress(bytes(100_000_000), 9))]))
    assert read_kitti_flow(tmp_path / "bomb.png")[0].shape == (1, 2, 2)


def test_chunks_that_are_not_needed_are_passed_over(tmp_path):
    data = zlib.compress(bytes.fromhex("00 8060 7f80 0001 0000 0000 0000"))
    chunks = [HEADER, (b"gAMA", bytes(4)), (b"IDAT", data[:5]), (b"IDAT", data[5:]), (b"tEXt", b"a\0b")]
    (tmp_path / "a.png").write_bytes(png(chunks))
    assert read_kitti_flow(tmp_path / "a.png")[0].tolist() == [[[1.5, -2.0], [0, 0]]]


# both


@pytest.mark.parametrize("name", ["a.flo", "a.png", "A.FLO"])
def test_a_flow_is_read_by_its_extension(tmp_path, name):
    flow = np.array([[[1.5, -2.0]]])
    (write_kitti_flow if name == "a.png" else write_flo)(tmp_path / name, flow)
    np.testing.assert_array_equal(read_flow(tmp_path / name)[0], flow)


def test_other_extensions_and_missing_files_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"a.pfm is no flow file: .flo \(Middlebury\) and .png \(KITTI\)"):
        read_flow(tmp_path / "a.pfm")
    for name in ("a.flo", "a.png"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}: No such file"):
            read_flow(tmp_path / name)
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"cannot read .*{name}: Is a directory"):
            read_flow(tmp_path / name)


@pytest.mark.parametrize("write", [write_flo, write_kitti_flow])
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch, write):
    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    path = tmp_path / "new" / "a.file"
    write(path, random_flow())
    before = path.read_bytes()
    monkeypatch.setattr(flow_files.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(path, random_flow(seed=1))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flow", "valid", "message"),
    [
        (np.zeros((3, 2)), None, r"is \(H, W, 2\), x then y, not \(3, 2\)"),
        (np.zeros((2, 3, 3)), None, r"not \(2, 3, 3\)"),
        (np.zeros((0, 3, 2)), None, r"not \(0, 3, 2\)"),
        (np.zeros((2, 3, 2), complex), None, "not complex128"),
        (np.zeros((2, 3, 2)), np.ones((3, 2)), r"valid mask of a \(2, 3\) flow is .* not \(3, 2\)"),
        ([[[0, 0], [np.inf, 1]]], None, r"\[inf, 1.0\] at row 0, column 1 \(1 such pixels\); mark"),
    ],
)
def test_what_is_no_flow_is_told_what_a_flow_is(flow, valid, message):
    with pytest.raises(ValueError, match=message):
        check_flow(flow, valid)


# pictures


def test_known_directions_have_known_colours():
    """Of Middlebury's wheel of 55 colours: right is its first, the others lie 13.5, 27 and 40.5 places on."""
    right, down, left, up, still = (1, 0), (0, 1), (-1, 0), (0, -1), (0, 0)
    picture = render_flow(np.array([[right, down, left, up, still]], float))
    # 13.5 is half way from (255, 221, 0) to (255, 238, 0), 27 is two steps of eleven from cyan to blue, 40.5 is half way
    # from the fourth to the fifth of thirteen steps from blue to magenta.
    assert picture[0].tolist() == [[255, 0, 0], [255, 229, 0], [0, 209, 255], [88, 0, 255], [255, 255, 255]]
    assert render_flow(np.array([[[1, -0.0]]]))[0, 0].tolist() == [255, 0, 0]


def test_length_is_saturation_and_what_is_too_long_is_darker():
    flow = np.array([[[4, 0], [2, 0], [8, 0]]], float)
    assert render_flow(flow, max_magnitude=4)[0].tolist() == [[255, 0, 0], [255, 127, 127], [191, 0, 0]]
    assert render_flow(flow)[0].tolist() == [[255, 127, 127], [255, 191, 191], [255, 0, 0]]


def test_what_is_not_valid_is_black_and_does_not_set_the_scale():
    flow = np.array([[[1, 0], [np.nan, 0], [1e30, 0]]])
    assert render_flow(flow, valid=[[1, 0, 0]])[0].tolist() == [[255, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_every_colour_is_the_one_of_the_definition():
    """Restated pixel by pixel from Baker et al.'s flow-code; the last bit of a float may fall to the other side of a
    whole number."""
    segments = [(15, "r+g"), (6, "-r"), (4, "+b"), (11, "-g"), (13, "+r"), (6, "-b")]
    wheel = []
    for steps, change in segments:
        for i in range(steps):
            step = 255 * i // steps
            wheel.append(
                {
                    "r+g": (255, step, 0),
                    "-r": (255 - step, 255, 0),
                    "+b": (0, 255, step),
                    "-g": (0, 255 - step, 255),
                    "+r": (step, 0, 255),
                    "-b": (255, 0, 255 - step),
                }[change]
            )
    flow = random_flow(12, 15).astype(np.float64)
    picture = render_flow(flow, max_magnitude=25.0)
    for y, x in np.ndindex(12, 15):
        u, v = flow[y, x] / 25
        radius = (u * u + v * v) ** 0.5
        place = (np.arctan2(-v, -u) / np.pi + 1) / 2 * 54
        low = int(place)
        for channel in range(3):
            share = place - low
            colour = ((1 - share) * wheel[low][channel] + share * wheel[(low + 1) % 55][channel]) / 255
            colour = 1 - radius * (1 - colour) if radius <= 1 else 0.75 * colour
            assert abs(int(picture[y, x, channel]) - int(255 * colour)) <= 1


@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])
def test_a_scale_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match=r"max_magnitude=.* positive number"):
        render_flow(np.zeros((2, 2, 2)), max_magnitude=bad)


def test_the_legend_shows_each_direction_where_it_points():
    legend = colour_wheel_legend(101)
    assert legend.shape == (101, 101, 3) and legend.dtype == np.uint8
    assert legend[50, 100].tolist() == [255, 0, 0] and legend[100, 50].tolist() == [255, 229, 0]
    assert legend[50, 0].tolist() == [0, 209, 255] and legend[0, 50].tolist() == [88, 0, 255]
    assert legend[50, 50].tolist() == [255, 255, 255] and (legend[0, 0] == 0).all()
    with pytest.raises(ValueError, match="size=2"):
        colour_wheel_legend(2)


# warping


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (3, 0), (0, -2), (-4, 5)])
def test_warping_back_a_known_shift_is_exact(dx, dy):
    scene = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    first, second = scene[10:50, 10:60], scene[10 - dy : 50 - dy, 10 - dx : 60 - dx]
    warped, valid = warp(second, np.broadcast_to(np.array([dx, dy], np.float32), (40, 50, 2)))
    np.testing.assert_array_equal(warped[valid], first[valid])
    assert (warped[~valid] == 0).all()
    assert valid.sum() == (40 - abs(dy)) * (50 - abs(dx))


def test_warping_is_linear_between_pixels():
    frame = np.zeros((2, 2, 3), np.uint8)
    frame[0, 1], frame[1, 0], frame[1, 1] = 40, 80, 200
    flow = np.zeros((2, 2, 2))
    flow[0, 0] = 0.25, 0.5
    warped, _ = warp(frame, flow)
    # 0.375 * 0 + 0.125 * 40 + 0.375 * 80 + 0.125 * 200
    assert warped[0, 0].tolist() == [60, 60, 60]


def test_warping_agrees_with_torch():
    import torch

    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    flow = random_flow(20, 30, scale=3)
    warped, valid = warp(frame, flow)
    y, x = np.mgrid[:20, :30]
    grid = np.stack([(x + flow[..., 0]) / 29 * 2 - 1, (y + flow[..., 1]) / 19 * 2 - 1], axis=-1)
    sampled = torch.nn.functional.grid_sample(
        torch.from_numpy(frame).permute(2, 0, 1)[None].double(), torch.from_numpy(grid)[None], align_corners=True
    )[0].permute(1, 2, 0)
    # Rounding to whole numbers is half a step off.
    assert np.abs(warped[valid] - sampled.numpy()[valid]).max() <= 0.5 + 1e-6
    assert 0.3 < valid.mean() < 1


def test_flow_out_of_any_bounds_leaves_the_frame():
    warped, valid = warp(np.full((1, 2, 3), 9, np.uint8), np.array([[[3e38, -3e38], [0, 0]]]))
    assert valid.tolist() == [[False, True]]
    assert warped[0].tolist() == [[0, 0, 0], [9, 9, 9]]


@pytest.mark.parametrize(
    "frame", [np.zeros((4, 5), np.uint8), np.zeros((5, 4, 3), np.uint8), np.zeros((4, 5, 3), np.float32)]
)
def test_a_frame_that_does_not_fit_the_flow_is_refused(frame):
    with pytest.raises(ValueError, match=r"4x5 flow warps a \(4, 5, 3\) uint8 frame, not"):
        warp(frame, np.zeros((4, 5, 2)))


# data sets


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def sintel(tmp_path):
    for scene, count in (("bamboo_1", 2), ("alley_1", 3)):
        for i in range(1, count + 1):
            touch(tmp_path, *(f"training/{p}/{scene}/frame_{i:04d}.png" for p in ("clean", "final")))
        for i in range(1, count):
            touch(tmp_path, f"training/flow/{scene}/frame_{i:04d}.flo")
    touch(tmp_path, "training/occlusions/alley_1/frame_0001.png", "training/invalid/alley_1/frame_0001.png")
    touch(tmp_path, *(f"test/clean/temple_1/frame_{i:04d}.png" for i in (1, 2)))
    return tmp_path


def test_sintel_pairs_are_neighbours_within_a_scene(sintel):
    pairs = sintel_pairs(sintel, render_pass="final")
    scenes = [(pair.frame1.parent.name, pair.frame1.stem, pair.frame2.stem, pair.flow.name) for pair in pairs]
    assert scenes == [
        ("alley_1", "frame_0001", "frame_0002", "frame_0001.flo"),
        ("alley_1", "frame_0002", "frame_0003", "frame_0002.flo"),
        ("bamboo_1", "frame_0001", "frame_0002", "frame_0001.flo"),
    ]
    assert all(pair.frame1.parent.parent.name == "final" and pair.flow.is_file() for pair in pairs)
    assert pairs[0].occlusions.is_file() and pairs[0].invalid.parent.parent.name == "invalid"
    assert pairs[1].occlusions is None and pairs[1].invalid is None


def test_sintels_test_split_has_no_flow(sintel):
    assert [pair.flow for pair in sintel_pairs(sintel, split="test")] == [None]


def test_sintel_says_what_is_missing(sintel):
    with pytest.raises(ValueError, match=r"no folder .*nowhere/training/clean; give the folder that MPI Sintel"):
        sintel_pairs(sintel / "nowhere")
    with pytest.raises(ValueError, match="split='val' is one of 'training', 'test'"):
        sintel_pairs(sintel, split="val")
    with pytest.raises(ValueError, match="render_pass='dirty' is one of"):
        sintel_pairs(sintel, render_pass="dirty")
    (sintel / "training/flow/alley_1/frame_0002.flo").unlink()
    with pytest.raises(ValueError, match=r"clean/alley_1/frame_0002.png has no flow .*flow/alley_1/frame_0002.flo"):
        sintel_pairs(sintel)
    for path in sintel.glob("training/clean/*/*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"training/clean has no SCENE/frame_\*.png pairs"):
        sintel_pairs(sintel)


@pytest.mark.parametrize(("year", "frames"), [(2015, "image_2"), (2012, "colored_0")])
def test_kitti_pairs_are_frames_10_and_11(tmp_path, year, frames):
    for i in (1, 0):
        touch(tmp_path, *(f"training/{frames}/{i:06d}_{j}.png" for j in (9, 10, 11, 12)))
        touch(tmp_path, *(f"training/{kind}/{i:06d}_10.png" for kind in ("flow_occ", "flow_noc")))
    touch(tmp_path, *(f"testing/{frames}/000000_{j}.png" for j in (10, 11)))
    pairs = kitti_pairs(tmp_path, year=year)
    assert [(p.frame1.name, p.frame2.name) for p in pairs] == [
        ("000000_10.png", "000000_11.png"),
        ("000001_10.png", "000001_11.png"),
    ]
    assert [(p.flow.parent.name, p.flow_noc.parent.name) for p in pairs] == [("flow_occ", "flow_noc")] * 2
    assert [(p.flow, p.flow_noc) for p in kitti_pairs(tmp_path, year=year, split="testing")] == [(None, None)]


def test_kitti_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*training/image_2; give the folder that KITTI 2015"):
        kitti_pairs(tmp_path)
    with pytest.raises(ValueError, match="year=2013 is one of 2015, 2012"):
        kitti_pairs(tmp_path, year=2013)
    (tmp_path / "training/image_2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"image_2 has no \*_10.png frames"):
        kitti_pairs(tmp_path)
    touch(tmp_path, "training/image_2/000000_10.png")
    with pytest.raises(ValueError, match=r"000000_10.png has no second frame 000000_11.png"):
        kitti_pairs(tmp_path)
    touch(tmp_path, "training/image_2/000000_11.png", "training/flow_occ/000000_10.png")
    with pytest.raises(ValueError, match=r"000000_10.png has no flow .*flow_noc"):
        kitti_pairs(tmp_path)
