"""The video autoencoder's recipe: its measures and baselines, its options, a short run, and what ships."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_perceiver import bundled_checkpoint
from hf_perceiver.heads_multimodal import PerceiverIOForMultimodalAutoencoding
from hf_perceiver.processing_perceiver_io import PerceiverIOProcessor
from hf_perceiver.training import video
from hf_perceiver.training.clip_synthesis import make_clips
from hf_perceiver.training.video import (
    CLIP,
    COMPRESSIONS,
    VideoRecipe,
    baselines,
    bicubic,
    bicubic_grids,
    clip_processor,
    contact_sheet,
    evaluate,
    held_out_clips,
    mean_frame,
    model_card,
    new_optimizer,
    psnr,
    reconstruct,
    score,
    table,
    train,
    video_config,
)


@pytest.fixture(scope="module")
def clips():
    return held_out_clips(4)


def test_psnr_is_ten_log_of_peak_squared_over_mean_squared_error():
    original, off = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.1)
    torch.testing.assert_close(psnr(off, original), torch.full((2,), 20.0))  # 0.1^2 is 20 dB below 1
    torch.testing.assert_close(psnr(off, original, peak=2.0), torch.full((2,), 20 + 20 * math.log10(2)))


def test_the_mean_frame_is_the_best_still_picture(clips):
    image = clips["image"]
    still = mean_frame(image)
    assert torch.equal(still[:, 0], still[:, -1])
    assert (psnr(still, image) >= psnr(image[:, :1].expand_as(image), image)).all()


def test_bicubic_sampling_at_full_size_changes_nothing(clips):
    torch.testing.assert_close(bicubic(clips["image"], (16, 32)), clips["image"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(16, 16), (4, 32), (4, 16)])
def test_bicubic_sampling_keeps_what_is_smooth_in_space_and_time(grid):
    axis = torch.linspace(0, 1, 32)
    time = torch.linspace(0.2, 0.8, 16)[:, None, None]
    smooth = (time * (0.5 + 0.2 * axis[:, None] + 0.2 * axis)).expand(1, 3, 16, 32, 32).movedim(1, 2)
    # Borders bend a little: 34 to 45 dB.
    assert psnr(bicubic(smooth, grid), smooth).item() > 30


def test_more_floats_make_bicubic_sampling_better(clips):
    qualities = [psnr(bicubic(clips["image"], (16, side)), clips["image"]).mean() for side in (8, 12, 16, 24)]
    assert all(a < b for a, b in itertools.pairwise(qualities))


@pytest.mark.parametrize("floats", [2304, 4608, 9216])
def test_bicubic_grids_use_the_floats_there_are_and_no_more(floats):
    grids = bicubic_grids(floats)
    assert grids
    for frames, side in grids:
        assert 3 * frames * side**2 <= floats
        assert side == CLIP.size or 3 * frames * (side + 1) ** 2 > floats


def test_baselines_are_measured_on_every_clip(clips):
    rows = baselines(clips, 9216)
    videos = {name: row["video"] for name, row in rows.items() if row["video"] is not None}
    assert rows["the best of these for each clip"]["video"] == max(videos.values())
    assert rows["chance"]["label"] == 1 / 16
    power = clips["audio"].square().flatten(1).mean(1)
    assert rows["silence"]["audio"] == pytest.approx((10 * torch.log10(4 / power)).mean().item(), abs=1e-4)


@pytest.mark.parametrize("compression", sorted(COMPRESSIONS))
def test_compression_divides_the_latents_as_the_paper_does(compression):
    config = video_config(compression)
    # 784, 392 and 196 latents in the paper.
    assert config.num_latents == 72 * 88 // compression
    with torch.device("meta"):
        model = PerceiverIOForMultimodalAutoencoding(config)
    assert model.num_parameters() < 4_000_000  # 8 MB in bfloat16


def test_the_label_is_masked_half_of_the_time_and_always_afterwards():
    spec = video_config().preprocessor
    assert spec["mask_probs"] == {"image": 0.0, "audio": 0.0, "label": 0.5}
    assert spec["masked_at_inference"] == ["label"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"output": "a", "evaluate": "b"}, "give one of"),
        ({"output": "a", "compression": 100}, "compression=100 must be one of 88, 176, 352"),
        ({"output": "a", "minutes": 0}, "minutes=0 must be more than 0"),
        ({"output": "a", "pixels": -1}, "pixels=-1"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VideoRecipe(**options)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        train(VideoRecipe(output=str(tmp_path), smoke_test=True))
    with pytest.raises(ValueError, match="holds no interrupted run"):
        train(VideoRecipe(resume=str(tmp_path)))


def test_help_says_what_every_option_does(capsys):
    with pytest.raises(SystemExit):
        video.main(["--help"])
    shown = capsys.readouterr().out
    for name in VideoRecipe.__dataclass_fields__:
        assert f"--{name}" in shown


def test_latents_and_norms_do_not_decay_and_self_attends_learn_faster():
    with torch.device("meta"):
        model = PerceiverIOForMultimodalAutoencoding(video_config())
    recipe = VideoRecipe(output="a", optimizer="lamb")
    groups = new_optimizer(model, recipe).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    perceiver = model.perceiver
    assert of[id(perceiver.encoder.latents.weight)]["weight_decay"] == 0
    block = of[id(perceiver.encoder.blocks[0][0].self_attn.q_proj.weight)]
    assert block["lr"] == pytest.approx(3 * recipe.rate) and block["weight_decay"] == 0.01
    norm = of[id(perceiver.decoder.cross_attend.query_norm.weight)]
    assert norm["lr"] == recipe.rate and norm["weight_decay"] == 0


def test_the_best_state_is_good_at_all_three():
    assert score({"video": 24, "audio": 28, "label": 0.9}) > score({"video": 25, "audio": 28, "label": 0.1})
    assert score({"video": 25, "audio": 28, "label": 0.9}) > score({"video": 24, "audio": 29, "label": 0.9})


def test_the_processor_makes_what_the_model_reads():
    made = make_clips(1, seed=0)
    frames = (made["image"][0].transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    inputs = clip_processor()(frames, made["audio"][0], frames_per_second=25, sampling_rate=8000)["inputs"]
    # Rounded to 8 bits; the sound goes through as it is.
    np.testing.assert_allclose(inputs["image"][0], made["image"][0], atol=0.51 / 255)
    np.testing.assert_allclose(inputs["audio"][0], made["audio"][0], atol=1e-6)
    assert inputs["label"].shape == (1, 16)


def test_a_contact_sheet_has_two_rows_for_each_clip(tmp_path):
    clips = np.zeros((2, 16, 32, 32, 3), np.uint8)
    path = contact_sheet(clips, clips + 255, tmp_path / "sheets" / "sheet.png", frames=4, enlarge=2)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * (2 * 33 * 2 + 4), 4 * 33 * 2, 3)
    assert picture[0, 0].max() == 0 and picture[66, 0].min() == 255
    assert os.listdir(path.parent) == ["sheet.png"]


@pytest.mark.parametrize("other", [(2, 8, 32, 32, 3), (2, 16, 32, 32, 1)])
def test_a_contact_sheet_of_unlike_clips_is_refused(tmp_path, other):
    with pytest.raises(ValueError, match="uint8 twice"):
        contact_sheet(np.zeros((2, 16, 32, 32, 3), np.uint8), np.zeros(other, np.uint8), tmp_path / "sheet.png")


@pytest.mark.medium
def test_a_short_run_writes_a_model_that_can_be_measured_and_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "HELD_OUT_CLIPS", 2)
    folder = tmp_path / "run"
    metrics = train(VideoRecipe(output=str(folder), smoke_test=True))
    assert metrics["steps"] == 20
    names = {"config.json", "model.safetensors", "processor_config.json", "README.md", "metrics.json", "curves.png"}
    assert names <= set(os.listdir(folder))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert [row["step"] for row in video.read_course(folder)] == [0, 10, 20]
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    model = PerceiverIOForMultimodalAutoencoding.from_pretrained(folder)
    assert reconstruct(model, held_out_clips(1))["image"].shape == (1, 16, 3, 32, 32)
    # A run that was interrupted after its first saved state.
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**recipe, "smoke_test": False, "steps": 22}))
    assert train(VideoRecipe(resume=str(folder)))["steps"] == 22
    assert [row["step"] for row in video.read_course(folder)] == [0, 10, 20, 22]


def test_the_card_shows_the_figures_and_the_command():
    directory = bundled_checkpoint("video")
    metrics = json.loads((Path(directory) / "metrics.json").read_text())
    card = (Path(directory) / "README.md").read_text()
    assert card == model_card(metrics)
    assert table(metrics["held_out"]) in card
    assert f"--steps {metrics['steps']}" in card


def test_what_ships_is_small_and_whole():
    directory = Path(bundled_checkpoint("video"))
    assert (directory / "model.safetensors").stat().st_size <= 8_000_000
    assert (directory / "curves.png").is_file()
    processor = PerceiverIOProcessor.from_pretrained(directory)
    assert processor.image_processor.num_frames == 16 and processor.feature_extractor.num_samples == 5120


@pytest.mark.medium
def test_what_ships_does_what_its_card_says():
    rows = evaluate(Path(bundled_checkpoint("video")), count=32)
    metrics = json.loads((Path(bundled_checkpoint("video")) / "metrics.json").read_text())
    stated, found = metrics["held_out"]["this model"], rows["this model"]
    # 32 clips of the card's 256: video differs by about 3 dB from clip to clip and sound by 6, so their means by half a
    # dB and one; labels by a few percent.
    assert found["video"] == pytest.approx(stated["video"], abs=1.5)
    assert found["audio"] == pytest.approx(stated["audio"], abs=3.0)
    assert found["label"] == pytest.approx(stated["label"], abs=0.1)
