"""The flow head: its loss, points drawn in training, and the published variants at a small size, not square."""

import itertools
from typing import Any

import pytest
import torch
from helpers import config_of, fourier, grid

from hf_perceiver import PerceiverIOForOpticalFlow, recipes

PATCHES = {"kind": "patches", "in_channels": 3, "temporal_downsample": 2, "project": 9}


def flow_model(stem: dict[str, Any] = PATCHES, **postprocessor: Any) -> PerceiverIOForOpticalFlow:
    """Reads pairs of RGB frames of any size, pixel by pixel; starts with a flow of zero, in training mode."""
    torch.manual_seed(0)
    config = config_of(
        num_latents=16,
        num_blocks=1,
        preprocessor=grid(stem, fourier(4, 6)),
        output_query={"kind": "input"},
        postprocessor={"kind": "flow", **postprocessor},
    )
    return PerceiverIOForOpticalFlow(config).train()


def lively(model: PerceiverIOForOpticalFlow) -> PerceiverIOForOpticalFlow:
    """With flow of a few pixels in float64, so that the loss depends on every weight."""
    read_out = model.perceiver.postprocessor
    linear = read_out.projection if hasattr(read_out, "projection") else read_out.flow
    torch.nn.init.normal_(linear.weight, std=10)
    return model.double()


def pairs(batch: int, height: int = 2, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame pairs and labels in float64."""
    frames = torch.randn(batch, 2, 3, height, width, dtype=torch.float64)
    return frames, 4 * torch.randn(batch, height, width, 2, dtype=torch.float64)


def gradients(model: PerceiverIOForOpticalFlow, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# --- the loss


@pytest.mark.parametrize("kind", ["epe", "l1", "charbonnier"])
@pytest.mark.parametrize("num_loss_points", [None, 6])
def test_flow_is_learned(kind, num_loss_points):
    """Two random pairs that move as a whole: of 3 to 6 pixels of error, at most 0.3 % was left with nine other seeds."""
    model = flow_model(flow_loss=kind, num_loss_points=num_loss_points)
    # torch 2.11 draws other weights than 2.13; these pairs are the same. There 3.8 % was left of the pairs of seed 0.
    torch.manual_seed(103)
    frames = torch.randn(2, 2, 3, 4, 6)
    labels = (3 * torch.randn(2, 1, 1, 2)).repeat(1, 4, 6, 1)
    labels[0, :2] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    first = model.eval()(frames, labels).loss.item()
    model.train()
    for _ in range(150):
        loss = model(frames, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert 2 < first < 8
    assert model.eval()(frames, labels).loss < 0.02 * first


def test_the_loss_is_stated_in_pixels():
    """Zero flow: the mean length of the labels, whatever a logit is worth."""
    frames, labels = pairs(2)
    for scale_factor in (20.0, 1.0):
        loss = flow_model(scale_factor=scale_factor).double()(frames, labels).loss
        torch.testing.assert_close(loss, labels.norm(dim=-1).mean())
    model = lively(flow_model(scale_factor=7.0))
    out = model(frames, labels)
    torch.testing.assert_close(out.loss, (7 * out.logits - labels).norm(dim=-1).mean())
    assert next(iter(out)) == "loss"


def test_the_loss_is_saved_with_the_model(tmp_path):
    flow_model(flow_loss="l1", scale_factor=5, num_loss_points=4).save_pretrained(tmp_path)
    loaded = PerceiverIOForOpticalFlow.from_pretrained(tmp_path)
    frames, labels = (x.float() for x in pairs(2))
    out = loaded.train()(frames, labels)
    assert out.logits.shape == (2, 4, 2)
    torch.testing.assert_close(loaded.eval()(frames, labels).loss, labels.abs().sum(dim=-1).mean())
    assert loaded.config.postprocessor["scale_factor"] == 5


def test_labels_that_are_invalid_or_masked_teach_nothing():
    model, (frames, labels) = lively(flow_model()), pairs(3)
    mask = torch.rand(3, 2, 3) < 0.5
    assert mask.any(dim=(1, 2)).all() and not mask.all()
    minus = torch.where(mask[..., None], labels, -100.0)
    nan = torch.where(mask[..., None], labels, float("nan"))
    want = (model(frames).logits * 20 - labels).norm(dim=-1)[mask].mean()
    slope = gradients(model, want)
    for loss in (model(frames, minus).loss, model(frames, nan, valid_mask=mask).loss):
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradients(model, loss), slope, rtol=1e-9, atol=1e-12)


def test_labels_may_stand_at_output_points():
    model, (frames, labels) = lively(flow_model()), pairs(2)
    flow = 20 * model(frames).logits
    for points in (torch.tensor([5, 0, 3, 3]), torch.tensor([[5, 0, 3, 3], [1, 2, 4, 0]])):
        rows = [points if points.ndim == 1 else points[i] for i in range(2)]
        at = torch.stack([labels[i].flatten(0, 1)[row] for i, row in enumerate(rows)])
        at[0, 0] = -100
        errors = torch.stack([(flow[i].flatten(0, 1)[row] - at[i]).norm(dim=-1) for i, row in enumerate(rows)])
        loss = model(frames, at, output_points=points).loss
        torch.testing.assert_close(loss, errors.flatten()[1:].mean())
        torch.testing.assert_close(model(frames, at, output_points=points, chunk_size=3).loss, loss)


def test_labels_may_be_of_a_coarser_output_than_the_frames():
    stem = {**PATCHES, "spatial_downsample": 2}
    model, (frames, _) = lively(flow_model(stem)), pairs(2, 4, 6)
    labels = pairs(2)[1]
    torch.testing.assert_close(model(frames, labels).loss, (20 * model(frames).logits - labels).norm(dim=-1).mean())
    assert torch.isfinite(model(frames, labels, num_loss_points=4).loss)


@pytest.mark.parametrize("num_loss_points", [None, 2])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 3, 2, 2), r"flow labels have the shape \(2, 2, 3, 2\) here, not \(2, 3, 2, 2\)"),
        (torch.zeros(2, 1, 3, 2), r"flow labels have the shape \(2, 2, 3, 2\) here, not \(2, 1, 3, 2\)"),
        (torch.zeros(2, 6, 2), r"here, not \(2, 6, 2\)"),
        (torch.zeros(1, 2, 3, 2), r"here, not \(1, 2, 3, 2\)"),
        (torch.zeros(2, 2, 2, 3), "channels last"),
        (torch.zeros(2, 2, 3, 2, dtype=torch.int16), "torch.int16"),
        (torch.full((2, 2, 3, 2), float("nan")), "NaN or infinite at 12 points"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message, num_loss_points):
    frames = pairs(2)[0].float()
    with pytest.raises(ValueError, match=message):
        flow_model()(frames, labels, num_loss_points=num_loss_points)


# --- points drawn in training


def test_drawn_points_are_decoded_in_training_only():
    frames, labels = pairs(2)
    model = lively(flow_model(num_loss_points=4))
    assert model(frames, labels).logits.shape == (2, 4, 2)
    assert model(frames, labels, num_loss_points=3).logits.shape == (2, 3, 2)
    assert model(frames, labels, num_loss_points=6).logits.shape == (2, 2, 3, 2), "all there are"
    assert model(frames).logits.shape == (2, 2, 3, 2), "nothing to learn"
    points = torch.tensor([0, 5])
    assert model(frames, labels.flatten(1, 2)[:, points], output_points=points).logits.shape == (2, 2, 2)
    model.eval()
    assert model(frames, labels).logits.shape == (2, 2, 3, 2)
    torch.testing.assert_close(model(frames, labels).loss, (20 * model(frames).logits - labels).norm(dim=-1).mean())


def test_flow_is_asked_at_the_points_that_were_drawn():
    """As many labels as points: nothing is left to chance, and every flow meets its own label."""
    model, (frames, labels) = lively(flow_model()), pairs(3)
    keep = torch.stack([torch.randperm(6) for _ in range(3)]).argsort(dim=1).reshape(3, 2, 3) < 4
    labels = torch.where(keep[..., None], labels, -100.0)
    torch.testing.assert_close(model(frames, labels, num_loss_points=4).loss, model(frames, labels).loss)


@pytest.mark.parametrize("num_items_in_batch", [None, 100])
def test_loss_and_gradient_of_drawn_points_are_those_of_all_points_on_average(monkeypatch, num_items_in_batch):
    """Over every possible draw of 2 points. Each example has 4 labels, and so 6 draws; the last has one label alone."""
    model, (frames, labels) = lively(flow_model()), pairs(3)
    keep = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0]]).bool()
    labels = torch.where(keep.reshape(3, 2, 3, 1), labels, -100.0)
    whole = model(frames, labels, num_items_in_batch=num_items_in_batch).loss
    draws = [list(itertools.combinations(row.nonzero().flatten().tolist(), 2)) for row in keep[:2]]
    losses, slopes = [], []
    for first, second in zip(*draws, strict=True):
        keys = torch.zeros(3, 6, dtype=torch.long)
        keys[0, list(first)] = keys[1, list(second)] = 1
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *args, keys=keys, **kwargs: keys)
            loss = model(frames, labels, num_loss_points=2, num_items_in_batch=num_items_in_batch).loss
        losses.append(loss.detach())
        slopes.append(gradients(model, loss))
    assert len(losses) == 6 and torch.stack(losses).std() > 0.01 * whole
    # float64, a few dozen terms.
    torch.testing.assert_close(torch.stack(losses).mean(), whole.detach(), rtol=1e-12, atol=0)
    want = gradients(model, whole)
    assert (torch.stack(slopes).mean(dim=0) - want).norm() <= 1e-12 * want.norm()
    assert (slopes[0] - want).norm() > 0.01 * want.norm()


def test_the_loss_of_drawn_points_is_right_on_average():
    """400 random draws of 2 of up to 6 points in each of 4 examples; five standard errors of their mean."""
    model, (frames, labels) = lively(flow_model()), pairs(4)
    mask = torch.rand(4, 2, 3) < 0.7
    with torch.no_grad():
        whole = model(frames, labels, valid_mask=mask).loss
        draws = torch.stack([model(frames, labels, valid_mask=mask, num_loss_points=2).loss for _ in range(400)])
    assert (draws.mean() - whole).abs() < 5 * draws.std() / 20
    assert draws.std() > 0.01 * whole


@pytest.mark.medium
def test_drawing_points_compiles_in_one_graph():
    frames, labels = (x.float() for x in pairs(2))
    model = flow_model(num_loss_points=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for run in (model, compiled):
        torch.manual_seed(0)
        losses.append(run(frames, labels).loss)
    losses[1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert torch.isfinite(model.perceiver.postprocessor.projection.weight.grad).all()


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "all"])
def test_a_count_that_is_none_is_refused(count):
    frames, labels = pairs(1)
    with pytest.raises(ValueError, match="num_loss_points is a whole number of points from 1, or None, not"):
        flow_model().double()(frames, labels, num_loss_points=count)
    with pytest.raises(ValueError, match="num_loss_points"):
        flow_model(num_loss_points=count)


# --- the published variants, small

VARIANTS = [name for name in vars(recipes) if name.startswith("optical_flow")]


def small(name: str, **postprocessor: Any) -> PerceiverIOForOpticalFlow:
    """A recipe with 8 latents of 48 channels and 2 bands; what it reads and asks stays."""
    config = getattr(recipes, name)()
    config.num_latents, config.d_latents, config.num_self_attends_per_block = 8, 48, 2
    config.num_self_attention_heads = 4
    config.preprocessor["position"]["num_bands"] = 2
    config.postprocessor.update(postprocessor)
    torch.manual_seed(0)
    return PerceiverIOForOpticalFlow(config).train()


def variant_frames(model: PerceiverIOForOpticalFlow, batch: int = 2, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(batch, 2, model.config.preprocessor["stem"]["in_channels"], height, width)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_saves_and_loads(name, tmp_path):
    model = small(name)
    frames, labels = variant_frames(model), 3 * torch.randn(2, 8, 12, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        out = model(frames, labels)
        assert out.logits.shape == (2, 8, 12, 2)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        used = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    # What is left has a gradient of zero by nature: biases of keys shift all scores of a query alike.
    assert {n for n, _ in model.named_parameters() if "k_proj.bias" not in n} <= used
    model.eval().save_pretrained(tmp_path)
    loaded = PerceiverIOForOpticalFlow.from_pretrained(tmp_path)
    for side in ("preprocessor", "output_query", "postprocessor"):
        assert getattr(loaded.config, side) == getattr(model.config, side)
    torch.testing.assert_close(loaded(frames).logits, model(frames).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_in_half_precision(name):
    model = small(name).bfloat16()
    out = model(variant_frames(model), 30 * torch.randn(2, 8, 12, 2))
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_decoded_in_chunks(name):
    model = lively(small(name)).float().eval()
    frames = variant_frames(model)
    whole = model(frames).logits
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(model(frames, chunk_size=5).logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_separate_frames_are_read_twice_as_often_and_asked_once(name):
    model = small(name)
    encoding = model.encode(variant_frames(model))
    queries = model.perceiver.output_query(encoding.input_array)
    cells = 96 // 16 if "conv" in name or "light" in name else 96
    assert queries.length == cells
    assert encoding.input_array.length == cells * (2 if "separate" in name else 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variants_flow_depends_on_both_frames(name):
    model = lively(small(name)).float().eval()
    frames = variant_frames(model)
    flow = model(frames).logits
    for frame in (0, 1):
        changed = frames.clone()
        changed[:, frame] += torch.randn_like(changed[:, frame])
        assert (model(changed).logits - flow).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["optical_flow_conv", "optical_flow_conv_separate", "optical_flow_light"])
def test_upsampled_variants_say_what_they_cannot_do(name):
    model = small(name)
    labels = torch.zeros(2, 8, 12, 2)
    with pytest.raises(ValueError, match="8x13 pixels are no multiples of 4; pad them below and on the right to 8x16"):
        model(variant_frames(model, width=13))
    with pytest.raises(ValueError, match="num_loss_points=5: ConvexUpsamplingPostprocessor reads out the whole grid"):
        model(variant_frames(model), labels, num_loss_points=5)
    with pytest.raises(ValueError, match="leave out output_points"):
        model(variant_frames(model), output_points=[0, 1])
    with pytest.raises(ValueError, match="unknown option 'num_loss_points' for postprocessor kind 'convex_upsampling'"):
        small(name, num_loss_points=5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_start_aligned_to_positions(name):
    config = small(name).config
    config.initializer = "position_aligned"
    config.d_latents = 48
    torch.manual_seed(0)
    model = PerceiverIOForOpticalFlow(config).eval()
    code = model.perceiver.preprocessor.position
    latents = model.perceiver.encoder.latents.weight
    assert latents[:, : code.channels].abs().max() > 0.5, "latents hold a code, of sines and cosines"
    flow = model(variant_frames(model)).logits
    assert torch.equal(flow, torch.zeros_like(flow))
