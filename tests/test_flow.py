"""The command: what it writes, what it measures, and what it says when it cannot."""

import json
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from hf_perceiver import PerceiverIOFlowImageProcessor, PerceiverIOForOpticalFlow, flow
from hf_perceiver.flow_files import read_flo, read_kitti_flow, render_flow, warp, write_flo, write_kitti_flow
from hf_perceiver.flow_metrics import flow_metrics

HEIGHT, WIDTH, SHIFT = 18, 26, (-2, 1)  # frames of several tiles; x, y
EVERYTHING = ["flo", "kitti", "png", "warped", "video"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a tiny model with random weights, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    tiny("flow").model(PerceiverIOForOpticalFlow).save_pretrained(folder)
    PerceiverIOFlowImageProcessor(tile_size={"height": 12, "width": 16}, min_overlap=4).save_pretrained(folder)
    return str(folder)


def shifted_frames(count):
    """Cut-outs of a random scene; from each to the next the scene moves by SHIFT."""
    scene = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    corners = [(20 - SHIFT[1] * i, 20 - SHIFT[0] * i) for i in range(count)]
    return [scene[y : y + HEIGHT, x : x + WIDTH] for y, x in corners]


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(shifted_frames(4)):
        Image.fromarray(frame).save(folder / f"frame{i + 8}.png")  # 8, 9, 10, 11: natural order
    return folder


@pytest.fixture
def truth(tmp_path):
    folder = tmp_path / "truth"
    true_flow = np.broadcast_to(np.array(SHIFT, np.float32), (HEIGHT, WIDTH, 2))
    write_flo(folder / "frame8.flo", true_flow)
    write_flo(folder / "frame9.flo", true_flow)
    write_kitti_flow(folder / "frame10.png", true_flow)
    return folder


class KnownFlow:
    """In the pipeline's place: every pair moves by SHIFT, and one pair fails where that is asked for.

    It reads ahead by two pairs, as batches of tiles do.
    """

    image_processor = PerceiverIOFlowImageProcessor()

    def __init__(self, fail_at=None, error=None):
        self.fail_at, self.error = fail_at, error

    def __call__(self, items):
        waiting = deque()
        for count, (first, _) in enumerate(self.image_processor.pairs(items)):
            waiting.append(np.broadcast_to(np.array(SHIFT, np.float32), (*first.shape[1:], 2)))
            if count == self.fail_at:
                raise self.error
            if len(waiting) > 2:
                yield {"flow": waiting.popleft()}
        yield from ({"flow": known} for known in waiting)


def use_known_flow(monkeypatch, **options):
    monkeypatch.setattr(flow, "load_pipeline", lambda arguments: KnownFlow(**options))


def run(*arguments):
    return flow.main([str(argument) for argument in arguments])


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# what it writes


def test_a_pair_becomes_the_files_asked_for_named_like_its_first_frame(frames, model, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    formats = ["flo", "kitti", "png", "warped"]
    assert (
        run(frames / "frame8.png", frames / "frame9.png", "--output", out, "--model", model, "--formats", *formats) == 0
    )
    assert files_in(out) == ["flo/frame8.flo", "kitti/frame8.png", "png/frame8.png", "warped/frame8.png"]
    assert f"Written: flo, kitti, png, warped of frame8 in {out}" in capsys.readouterr().out
    estimated, valid = read_flo(out / "flo/frame8.flo")
    assert estimated.shape == (HEIGHT, WIDTH, 2) and valid.all() and estimated.std() > 0.01
    # KITTI's steps are 1/64 px.
    assert np.abs(read_kitti_flow(out / "kitti/frame8.png")[0] - estimated).max() <= 1 / 128 + 1e-5
    np.testing.assert_array_equal(picture(out / "png/frame8.png"), render_flow(estimated))
    second = picture(frames / "frame9.png")
    np.testing.assert_array_equal(picture(out / "warped/frame8.png"), warp(second, estimated)[0])


def test_the_flow_written_is_the_pipelines(frames, model, tmp_path):
    from transformers import pipeline

    estimate = pipeline("optical-flow", model=model)
    assert run(frames, "--output", tmp_path / "out", "--model", model) == 0
    assert files_in(tmp_path / "out") == [
        *(f"flo/frame{i}.flo" for i in (10, 8, 9)),
        *(f"png/frame{i}.png" for i in (10, 8, 9)),
    ]
    for i in (8, 9, 10):
        pair = picture(frames / f"frame{i}.png"), picture(frames / f"frame{i + 1}.png")
        np.testing.assert_array_equal(read_flo(tmp_path / f"out/flo/frame{i}.flo")[0], estimate(pair)["flow"])


def flows_of_options(frames, model, folder, *options):
    assert run(frames, "--output", folder, "--model", model, "--formats", "flo", *options) == 0
    return np.stack([read_flo(path)[0] for path in sorted(folder.glob("flo/*.flo"))])


def test_batches_and_chunks_change_nothing(frames, model, tmp_path):
    whole = flows_of_options(frames, model, tmp_path / "a")
    parts = flows_of_options(frames, model, tmp_path / "b", "--batch-size", 3, "--chunk-size", 50, "--device", "cpu")
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)  # float32 sums in another order, times 20


def test_half_precision_changes_little(frames, model, tmp_path):
    whole = flows_of_options(frames, model, tmp_path / "a")
    half = flows_of_options(frames, model, tmp_path / "b", "--dtype", "bfloat16")
    # 8 bits of mantissa, through a model whose weights are drawn large.
    assert 0 < np.abs(half - whole).max() < 0.15 * np.abs(whole).max()


def test_known_flow_warps_the_second_frame_onto_the_first(frames, tmp_path, monkeypatch):
    use_known_flow(monkeypatch)
    assert run(frames, "--output", tmp_path / "out", "--formats", "warped") == 0
    for i in (8, 9, 10):
        first, warped = picture(frames / f"frame{i}.png"), picture(tmp_path / f"out/warped/frame{i}.png")
        # What moved by (-2, 1) left the picture at the first two columns and the last row.
        np.testing.assert_array_equal(warped[:-1, 2:], first[:-1, 2:])
        assert not warped[-1].any() and not warped[:, :2].any()


def test_a_video_in_gives_numbered_files_and_a_video_out(tmp_path, monkeypatch):
    pytest.importorskip("av")
    from hf_perceiver.media_files import VideoWriter, read_frames, video_info

    use_known_flow(monkeypatch)
    with VideoWriter(tmp_path / "clip.mp4", frames_per_second=12) as writer:
        for frame in shifted_frames(5):
            writer.write_frame(frame)
    assert run(tmp_path / "clip.mp4", "--output", tmp_path / "out", "--formats", "png", "video") == 0
    assert files_in(tmp_path / "out") == ["flow.mp4", *(f"png/{i:06d}.png" for i in range(4))]
    assert video_info(tmp_path / "out/flow.mp4").frames_per_second == 12
    shown = list(read_frames(tmp_path / "out/flow.mp4"))
    assert [frame.shape for frame in shown] == [(HEIGHT, 3 * WIDTH, 3)] * 4
    first = next(read_frames(tmp_path / "clip.mp4"))
    # Side by side: frame, flow, warped frame; compression costs some levels.
    assert np.abs(shown[0][:, :WIDTH].astype(int) - first).mean() < 12
    colour = picture(tmp_path / "out/png/000000.png")[0, 0].astype(int)
    assert np.abs(shown[0][4:-4, WIDTH + 4 : 2 * WIDTH - 4].mean(axis=(0, 1)) - colour).max() < 12


def test_frames_per_second_resamples_a_video_and_paces_images(frames, tmp_path, monkeypatch):
    pytest.importorskip("av")
    from hf_perceiver.media_files import VideoWriter, video_info

    use_known_flow(monkeypatch)
    with VideoWriter(tmp_path / "clip.mp4", frames_per_second=12) as writer:
        for frame in shifted_frames(6):
            writer.write_frame(frame)
    for source, number in ((tmp_path / "clip.mp4", 2), (frames, 3)):
        assert run(source, "--output", tmp_path / "out", "--formats", "video", "--frames-per-second", 6) == 0
        info = video_info(tmp_path / "out/flow.mp4")
        assert (info.frames_per_second, info.num_frames) == (6, number)


def test_max_magnitude_sets_the_scale_of_the_colours(frames, tmp_path, monkeypatch):
    use_known_flow(monkeypatch)
    assert run(frames, "--output", tmp_path / "out", "--formats", "png", "--max-magnitude", 20) == 0
    wanted = render_flow(np.array([[SHIFT]], float), max_magnitude=20)[0, 0]
    assert (picture(tmp_path / "out/png/frame8.png") == wanted).all()


def test_frames_of_any_kind_are_shown_as_8_bit_colour(tmp_path, monkeypatch):
    use_known_flow(monkeypatch)
    grey = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
    for name in ("a", "b"):
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    assert run(tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "out", "--formats", "warped") == 0
    warped = picture(tmp_path / "out/warped/a.png")
    moved = np.rint(grey[1:, :-2] / 257)  # 65535 is 255
    np.testing.assert_array_equal(warped[:-1, 2:], np.repeat(moved[..., None], 3, axis=-1))


# what it measures


def test_metrics_are_printed_and_written(frames, truth, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(frames, "--output", out, "--model", model, "--ground-truth", truth) == 0
    written = json.loads((out / "metrics.json").read_text())
    true_flow = np.broadcast_to(np.array(SHIFT, np.float32), (HEIGHT, WIDTH, 2))
    of_pairs = {f"frame{i}": flow_metrics(read_flo(out / f"flo/frame{i}.flo")[0], true_flow) for i in (8, 9, 10)}
    assert written["pairs"] == of_pairs
    epe = np.mean([metrics["epe"] for metrics in of_pairs.values()])
    assert written["averages"]["mean of pairs"]["epe"] == pytest.approx(epe)
    assert written["averages"]["all pixels"]["num_pixels"] == 3 * HEIGHT * WIDTH
    printed = capsys.readouterr().out
    assert re.search(rf"^all pixels +{epe:.3f} .* - +- +3 +1,404$", printed, flags=re.MULTILINE)
    assert "EPE" in printed and "Fl-all" in printed and "%" in printed


def test_a_right_flow_has_no_error(frames, truth, tmp_path, monkeypatch, capsys):
    use_known_flow(monkeypatch)
    files = [frames / "frame8.png", frames / "frame9.png"]
    assert run(*files, "--output", tmp_path / "out", "--ground-truth", truth / "frame8.flo") == 0
    averages = json.loads((tmp_path / "out/metrics.json").read_text())["averages"]
    assert list(averages) == ["all pixels"]  # of one pair both averages are the same
    assert averages["all pixels"]["epe"] == 0
    assert re.search(
        r"^all pixels( +0\.000)( +0\.00%){4} +0\.000 +- +- +1 +468$", capsys.readouterr().out, re.MULTILINE
    )


def test_table_lines_up_and_marks_what_is_over_no_pixel():
    metrics = flow_metrics(np.zeros((30, 50, 2)), np.full((30, 50, 2), 3.0))
    lines = flow.table({"one": {**metrics, "num_pairs": 1}, "a longer name": {**metrics, "num_pairs": 1200}}).split(
        "\n"
    )
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == "one 4.243 100.00% 100.00% 0.00% 100.00% 4.243 - - 1 1,500".split()
    assert lines[2].split()[-2:] == ["1,200", "1,500"]


def sintel_like(root):
    for render_pass in ("clean", "final"):
        for i, frame in enumerate(shifted_frames(3)):
            path = root / f"training/{render_pass}/alley_1/frame_{i + 1:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(path)
    for i in (1, 2):
        known = np.full((HEIGHT, WIDTH, 2), SHIFT, np.float32)
        known[0] += (0, 4 * i)
        write_flo(root / f"training/flow/alley_1/frame_{i:04d}.flo", known)


def test_sintel_is_measured_in_both_passes(tmp_path, monkeypatch, capsys):
    use_known_flow(monkeypatch)
    sintel_like(tmp_path / "sintel")
    assert run("--dataset", "sintel", tmp_path / "sintel", "--output", tmp_path / "out") == 0
    averages = json.loads((tmp_path / "out/metrics.json").read_text())["averages"]
    assert list(averages) == [f"{p}, {a}" for p in ("clean", "final") for a in ("all pixels", "mean of pairs")]
    # One row of 18 is wrong by 4, then by 8 pixels.
    assert averages["final, all pixels"]["epe"] == pytest.approx(6 / HEIGHT)
    assert averages["clean, all pixels"]["5px"] == pytest.approx(0.5 / HEIGHT)
    assert averages["clean, all pixels"]["num_pairs"] == 2
    printed = capsys.readouterr().out
    assert "clean, all pixels" in printed and "Papers give" in printed


@pytest.mark.parametrize(("name", "folder"), [("kitti", "image_2"), ("kitti2012", "colored_0")])
def test_kitti_is_measured_on_its_valid_pixels(tmp_path, monkeypatch, name, folder):
    use_known_flow(monkeypatch)
    root = tmp_path / "kitti"
    (root / "training" / folder).mkdir(parents=True)
    first, second = shifted_frames(2)
    for i, (height, share) in enumerate(((HEIGHT, 1), (HEIGHT - 4, 2))):
        for number, frame in ((10, first), (11, second)):
            Image.fromarray(frame[:height]).save(root / f"training/{folder}/{i:06d}_{number}.png")
        known = np.full((height, WIDTH, 2), SHIFT, np.float32)
        known[0] += 6
        valid = np.arange(height * WIDTH).reshape(height, WIDTH) % share == 0
        write_kitti_flow(root / f"training/flow_occ/{i:06d}_10.png", known, valid)
        valid[0] = False
        write_kitti_flow(root / f"training/flow_noc/{i:06d}_10.png", known, valid)
    assert run("--dataset", name, root, "--output", tmp_path / "out") == 0
    averages = json.loads((tmp_path / "out/metrics.json").read_text())["averages"]
    wrong, pixels = WIDTH * 1.5, WIDTH * HEIGHT + WIDTH * (HEIGHT - 4) / 2
    assert averages["occ, all pixels"]["num_pixels"] == pixels
    assert averages["occ, all pixels"]["fl_all"] == pytest.approx(wrong / pixels)
    assert averages["occ, mean of pairs"]["fl_all"] == pytest.approx((1 / HEIGHT + 1 / (HEIGHT - 4)) / 2)
    assert averages["noc, all pixels"]["epe"] == 0 and averages["noc, all pixels"]["num_pixels"] == pixels - wrong


def test_a_data_set_that_stops_is_measured_up_to_there(tmp_path, monkeypatch, capsys):
    use_known_flow(monkeypatch)
    sintel_like(tmp_path)
    (tmp_path / "training/final/alley_1/frame_0003.png").write_bytes(b"no image")
    assert run("--dataset", "sintel", tmp_path) == 2
    captured = capsys.readouterr()
    assert "clean, all pixels" in captured.out
    assert "pair 3 cannot be had" in captured.err and "frame_0003.png" in captured.err
    assert re.search("The table is over the first 1 of 4 pairs", captured.err)


# what it says when it cannot


def test_what_was_written_before_a_damaged_frame_is_kept_and_named(frames, model, tmp_path, capsys):
    pytest.importorskip("av")
    from hf_perceiver.media_files import read_frames

    damaged = frames / "frame10.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    out = tmp_path / "out"
    assert run(frames, "--output", out, "--model", model, "--formats", "flo", "video", "--batch-size", 64) == 2
    said = capsys.readouterr().err
    assert f"error: frame 2 cannot be had (the first is 0): {damaged}" in said
    assert f"Written before, and kept: flo, video of frame8 in {out}" in said
    assert files_in(out) == ["flo/frame8.flo", "flow.mp4"]
    assert len(list(read_frames(out / "flow.mp4"))) == 1


def test_a_file_that_cannot_hold_a_flow_stops_with_what_was_written(frames, tmp_path, monkeypatch, capsys):
    class GrowingFlow(KnownFlow):
        def __call__(self, items):
            yield from ({"flow": result["flow"] * 400**i} for i, result in enumerate(super().__call__(items)))

    monkeypatch.setattr(flow, "load_pipeline", lambda arguments: GrowingFlow())
    assert run(frames, "--output", tmp_path / "out", "--formats", "kitti", "png") == 2
    said = capsys.readouterr().err
    assert "[-800.0, 400.0] px; KITTI's PNG holds -512 to 511.98 px" in said
    assert "kept: kitti, png of frame8 in" in said


def test_nothing_is_left_behind_when_the_first_pair_fails(frames, tmp_path, monkeypatch, capsys):
    use_known_flow(monkeypatch)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(frames / "frame9.png")
    formats = ["flo"]
    try:
        import av  # noqa: F401

        formats.append("video")
    except ImportError:
        pass
    assert run(frames, "--output", tmp_path / "out", "--formats", *formats) == 2
    said = capsys.readouterr().err
    assert "frame 1 cannot be used" in said and "18x26 and 4x4" in said and "kept" not in said
    assert files_in(tmp_path / "out") == []


def test_no_memory_names_the_options_that_need_less(frames, tmp_path, monkeypatch, capsys):
    import torch

    use_known_flow(monkeypatch, fail_at=0, error=torch.OutOfMemoryError("CUDA out of memory"))
    assert run(frames, "--output", tmp_path / "out") == 2
    assert "smaller --batch-size or --chunk-size, or --dtype bfloat16" in capsys.readouterr().err


def test_without_a_model_the_bundled_one_is_taken(frames, model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(flow, "bundled_checkpoint", lambda name: asked.append(name) or model)
    assert run(frames, "--output", tmp_path / "out") == 0
    assert asked == ["flow"]


def test_a_bundled_model_that_is_not_there_is_said(frames, tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ValueError(f"no bundled checkpoint {name!r}; there are: digits, language")

    monkeypatch.setattr(flow, "bundled_checkpoint", missing)
    assert run(frames, "--output", tmp_path / "out") == 2
    assert "no bundled checkpoint 'flow'; there are: digits, language; say --model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_transformers_own_perceiver_is_read_in_its_tiles(tmp_path):
    from builtin_models import CASES

    CASES["PerceiverForOpticalFlow"].model().save_pretrained(tmp_path)
    estimate = flow.load_pipeline(flow.parse(["a", "b", "--output", "c", "--model", str(tmp_path)]))
    assert isinstance(estimate.model, PerceiverIOForOpticalFlow)
    assert estimate.image_processor.tile_size == {"height": 368, "width": 496}  # the released one's


@pytest.mark.parametrize("name", ["language", "digits"])
def test_a_model_for_another_task_is_refused(frames, tmp_path, capsys, name):
    from hf_perceiver import bundled_checkpoint

    assert run(frames, "--output", tmp_path / "out", "--model", bundled_checkpoint(name)) == 2
    assert f"{bundled_checkpoint(name)} cannot be used for optical flow: " in capsys.readouterr().err


def test_inputs_that_make_no_pair_are_told_before_the_model_is_loaded(frames, truth, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flow, "load_pipeline", lambda arguments: pytest.fail("loaded"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "text.txt").write_text("no video")
    (tmp_path / "twice").mkdir()
    for suffix in ("png", "bmp", "jpg"):
        Image.fromarray(shifted_frames(1)[0]).save(tmp_path / f"twice/a.{suffix}")
    pair = [frames / "frame8.png", frames / "frame9.png"]
    cases = [
        ([tmp_path / "nowhere"], "there is no file or folder"),
        ([frames / "frame8.png"], "is one frame, and flow needs two"),
        ([frames / "frame8.png", tmp_path / "no.png"], "there is no image"),
        ([frames, frames], "there is no image"),
        ([empty], "has no frames, and flow needs two"),
        ([tmp_path / "twice"], "two frames are called 'a'"),
        ([*pair, "--ground-truth", tmp_path / "no.flo"], "no true flow for frame8"),
        ([*pair, "--ground-truth", empty], "frame8.flo or "),
        ([frames, "--ground-truth", truth / "frame8.flo"], "is the true flow of one pair"),
        (["--dataset", "sintel", empty], "give the folder that MPI Sintel was unpacked in"),
        (["--dataset", "kitti", empty], "training/image_2"),
    ]
    try:
        import av  # noqa: F401

        cases.append(([tmp_path / "text.txt"], "text.txt is no video"))
    except ImportError:
        pass
    for arguments, message in cases:
        assert run(*arguments, "--output", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said, said
    assert not (tmp_path / "out").exists()


def test_a_true_flow_of_another_size_is_named(frames, tmp_path, monkeypatch, capsys):
    use_known_flow(monkeypatch)
    write_flo(tmp_path / "small.flo", np.zeros((2, 2, 2)))
    pair = [frames / "frame8.png", frames / "frame9.png"]
    assert run(*pair, "--output", tmp_path / "out", "--ground-truth", tmp_path / "small.flo") == 2
    said = capsys.readouterr().err
    assert "small.flo: the predicted flow is (18, 26, 2), the target flow (2, 2, 2)" in said


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there_is_named(frames, model, tmp_path, capsys, device):
    assert run(frames, "--output", tmp_path / "out", "--model", model, "--device", device) == 2
    assert f"--device {device} cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give frames, or --dataset"),
        (["a", "b", "--dataset", "sintel", "x"], "give frames, or --dataset"),
        (["a", "b"], "say where to write by --output"),
        (["--dataset", "sintl", "x"], "no data set 'sintl'; there are: sintel, kitti, kitti2012"),
        (["--dataset", "sintel", "x", "--formats", "flo"], "--formats is for frames"),
        (["--dataset", "sintel", "x", "--ground-truth", "y"], "--ground-truth is for frames"),
        (["a", "b", "--output", __file__], "is a file; name a folder"),
        (["a", "b", "--output", "c", "--formats", "gif"], "invalid choice: 'gif'"),
        (["a", "b", "--output", "c", "--batch-size", "0"], "0 is not above 0"),
        (["a", "b", "--output", "c", "--chunk-size", "1.5"], "invalid int value: '1.5'"),
        (["a", "b", "--output", "c", "--max-magnitude", "nan"], "nan is not above 0"),
    ],
)
def test_wrong_options_are_told_with_the_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        flow.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.medium
def test_the_command_ends_with_code_2_and_without_a_traceback(frames, model, tmp_path):
    (frames / "frame11.png").write_bytes(b"")
    command = [sys.executable, "-m", "hf_perceiver.flow", str(frames), "--output", str(tmp_path), "--model", model]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(flow.__file__).parent.parent)
    assert ended.returncode == 2
    assert "frame 3 cannot be had" in ended.stderr and "kept: flo, png of frame8 to frame9 (2 pairs)" in ended.stderr
    assert "2/3" in ended.stderr  # the progress bar
    assert "Traceback" not in ended.stderr
