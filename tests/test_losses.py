import pytest
import torch
import torch.nn.functional as F

from hf_perceiver.losses import (
    FLOW_LOSSES,
    POINT_LOSSES,
    check_classes,
    classification_loss,
    cross_entropy,
    draw_labelled,
    draw_points,
    flow_loss,
    has_target,
    labelled_points,
    modality_loss,
    point_loss,
    targets_of_points,
)


def test_cross_entropy_is_the_mean_over_what_is_labelled():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [-100, -100, 0]])
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=["own", "number", "tensor"])
def test_nothing_labelled_costs_nothing(count):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100), count)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("as_tensor", [True, False])
def test_accumulated_batches_add_up_to_the_large_batch(as_tensor):
    """Trainer passes the number of labels of all accumulated batches, and adds the losses."""
    logits, labels = torch.randn(4, 3, 5), torch.randint(0, 5, (4, 3))
    labels[0] = -100
    count = torch.tensor(9) if as_tensor else 9
    whole = cross_entropy(logits, labels)
    parts = sum(cross_entropy(logits[i : i + 1], labels[i : i + 1], count) for i in range(4))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification", "soft"])
def test_accumulation_changes_nothing_for_any_problem(problem):
    logits = torch.randn(4, 5)
    labels = {
        "regression": torch.randn(4, 5),
        "single_label_classification": torch.randint(0, 5, (4,)),
        "multi_label_classification": torch.randint(0, 2, (4, 5)).float(),
        "soft": torch.rand(4, 5).softmax(dim=-1),
    }[problem]
    name = "single_label_classification" if problem == "soft" else problem
    count = int((labels != -100).sum())  # as Trainer counts
    whole, _ = classification_loss(logits, labels, name)
    parts = sum(classification_loss(logits[i : i + 1], labels[i : i + 1], name, count)[0] for i in range(4))
    torch.testing.assert_close(parts, whole)


def test_soft_labels_equal_torchs_soft_cross_entropy():
    logits, labels = torch.randn(4, 5), torch.rand(4, 5).softmax(dim=-1)
    loss, _ = classification_loss(logits, labels, "single_label_classification")
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    hard = torch.randint(0, 5, (4,))
    as_soft, _ = classification_loss(logits, F.one_hot(hard, 5).float(), "single_label_classification")
    torch.testing.assert_close(as_soft, F.cross_entropy(logits, hard))


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, torch.randn(4), "regression"),
        (1, torch.tensor([1, 2, 3, 4]), "regression"),
        (5, torch.tensor([0, 1, 2, 3]), "single_label_classification"),
        (5, torch.zeros(4, 5), "multi_label_classification"),
    ],
)
def test_the_problem_is_told_from_the_labels(num_labels, labels, problem):
    loss, told = classification_loss(torch.randn(4, num_labels), labels, None)
    assert told == problem
    assert torch.isfinite(loss)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_number_is_regressed_from_a_row_or_a_column(shape):
    logits, labels = torch.randn(4, 1), torch.randn(4)
    loss, _ = classification_loss(logits, labels.reshape(shape), "regression")
    torch.testing.assert_close(loss, F.mse_loss(logits[:, 0], labels))


def test_several_labels_are_binary_cross_entropy():
    logits, labels = torch.randn(4, 5), torch.randint(0, 2, (4, 5))
    loss, _ = classification_loss(logits, labels, "multi_label_classification")
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, labels.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_summed_in_float32(dtype):
    logits, labels = torch.randn(64, 5).to(dtype), torch.randint(0, 5, (64,))
    assert cross_entropy(logits, labels).dtype == torch.float32
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits.float(), labels))
    assert classification_loss(logits, torch.zeros(64, 5), None)[0].dtype == torch.float32


def test_float64_scores_keep_their_precision():
    logits, labels = torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 5, (8,))
    assert cross_entropy(logits, labels).dtype == torch.float64
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels), rtol=1e-14, atol=0)
    for problem in ("regression", "multi_label_classification", "single_label_classification"):
        assert classification_loss(logits, torch.rand(8, 5), problem)[0].dtype == torch.float64


@pytest.mark.parametrize(("label", "classes"), [(5, 5), (-1, 5), (-99, 5), (300, 262)])
def test_a_label_outside_the_classes_is_named(label, classes):
    with pytest.raises(ValueError, match=f"label {label} is outside 0..{classes - 1}; -100 marks what has no label"):
        cross_entropy(torch.randn(2, classes), torch.tensor([0, label]))


def test_labels_on_the_meta_device_cannot_be_looked_at():
    check_classes(torch.zeros(3, dtype=torch.long, device="meta"), 5)


@pytest.mark.parametrize(
    ("logits", "labels", "problem", "message"),
    [
        ((2, 3, 5), torch.zeros(2, dtype=torch.long), None, r"labels have the shape \(2, 3\) here, not \(2,\)"),
        (
            (2, 5),
            torch.zeros(2, 4),
            None,
            r"labels for multi_label_classification have the shape \(2, 5\) here, not \(2, 4\)",
        ),
        ((2, 5), torch.zeros(2), "regression", r"labels for regression have the shape \(2, 5\) here, not \(2,\)"),
        ((2, 1), torch.zeros(3), "regression", r"labels for regression have the shape \(2,\) here, not \(3,\)"),
        ((2, 5), torch.zeros(2, dtype=torch.long), "guess", "problem_type='guess'"),
    ],
)
def test_bad_labels_are_refused(logits, labels, problem, message):
    with pytest.raises(ValueError, match=message):
        classification_loss(torch.randn(logits), labels, problem)


# --- flow


def flow_case(shape=(2, 3, 4), dtype=torch.float32):
    """Logits, labels of a few pixels, and which points count: not the first two of the first example."""
    logits, labels = torch.randn(*shape, 2, dtype=dtype), 5 * torch.randn(*shape, 2, dtype=dtype)
    labels[0].flatten(0, -2)[:2] = -100
    return logits.requires_grad_(), labels, labelled_points(labels)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("epe", lambda e: e.square().sum(-1).sqrt()),
        ("l1", lambda e: e[..., 0].abs() + e[..., 1].abs()),
        ("charbonnier", lambda e: (e.square().sum(-1) + 0.001**2) ** 0.45),
    ],
)
@pytest.mark.parametrize("scale_factor", [20.0, 1])
def test_flow_is_compared_in_pixels_where_it_is_labelled(kind, error, scale_factor):
    logits, labels, valid = flow_case(dtype=torch.float64)
    assert valid.sum() == 22
    want = error(logits * scale_factor - labels)[valid].mean()
    got = flow_loss(logits, labels, valid, kind=kind, scale_factor=scale_factor)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", FLOW_LOSSES)
def test_flow_without_an_error_has_a_gradient_of_zero(kind):
    """The derivative of a square root at 0 is not a number."""
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    flow_loss(logits, torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2), kind=kind).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("kind", FLOW_LOSSES)
def test_what_is_not_labelled_may_hold_anything(kind):
    """KITTI's and Middlebury's files hold zeros, NaN or 1e10 there."""
    logits, labels, valid = flow_case()
    mask = torch.rand(valid.shape) < 0.6
    want = flow_loss(logits, labels, valid & mask, kind=kind)
    for filling in (float("nan"), float("inf"), 1e10, -100.0):
        filled = torch.where(mask[..., None], labels, filling)
        for given in (mask, mask.long()):
            weights = labelled_points(filled, given)
            assert torch.equal(weights, valid & mask)
        logits.grad = None
        loss = flow_loss(logits, filled, weights, kind=kind)
        loss.backward()
        assert loss == want
        assert torch.isfinite(logits.grad).all()
        assert (logits.grad[~weights] == 0).all()


def test_a_flow_of_minus_100_in_one_channel_is_a_label():
    labels = torch.tensor([[[-100.0, 3.0], [3.0, -100.0], [-100.0, -100.0]]])
    assert labelled_points(labels).tolist() == [[True, True, False]]


@pytest.mark.parametrize("kind", FLOW_LOSSES)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_accumulated_flow_adds_up_to_the_large_batch(kind, as_tensor):
    logits, labels, valid = flow_case((4, 3, 5), dtype=torch.float64)
    labels[2, 1:] = -100
    valid = labelled_points(labels)
    count = (labels != -100).sum()  # as Trainer counts, both channels
    count = count if as_tensor else int(count)
    parts = [
        flow_loss(logits[i : i + 1], labels[i : i + 1], valid[i : i + 1], kind=kind, num_items_in_batch=count)
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), flow_loss(logits, labels, valid, kind=kind), rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_flow_that_is_labelled_nowhere_costs_nothing(count):
    logits = torch.randn(2, 3, 4, 2, requires_grad=True)
    labels = torch.full((2, 3, 4, 2), -100.0)
    loss = flow_loss(logits, labels, labelled_points(labels), num_items_in_batch=count)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("kind", FLOW_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flow_of_half_precision_is_compared_in_float32(kind, dtype):
    """In float16 the square of 300 pixels is infinite, and a sum of a few hundred pixels loses its last digits."""
    logits, labels = (15 * torch.randn(2, 30, 40, 2)).to(dtype), 100 * torch.randn(2, 30, 40, 2)
    loss = flow_loss(logits, labels, labelled_points(labels), kind=kind)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert loss == flow_loss(logits.float(), labels, labelled_points(labels), kind=kind)
    assert torch.isfinite(flow_loss(logits, labels.to(dtype), torch.ones(2, 30, 40), kind=kind))


@pytest.mark.parametrize(
    ("labels", "mask", "message"),
    [
        (torch.zeros(2, 3, 4, 2, dtype=torch.long), None, r"flow labels are floating-point pixels .* torch.int64"),
        (torch.zeros(2, 3, 4, 2, dtype=torch.uint8), None, "torch.uint8"),
        (torch.zeros(2, 2, 3, 4), None, r"not \(2, 2, 3, 4\) torch.float32; move the channels last"),
        (torch.zeros(2, 3, 4, 3), None, r"\(batch, height, width, 2\), x then y, not \(2, 3, 4, 3\)"),
        (torch.zeros(2, 2), None, r"not \(2, 2\)"),
        (torch.zeros(2, 3, 4, 2), torch.ones(2, 1, 3, 4), r"valid_mask has the labels' shape \(2, 3, 4\), not"),
        (torch.zeros(2, 3, 4, 2), torch.ones(3, 4), r"valid_mask has the labels' shape \(2, 3, 4\), not \(3, 4\)"),
        (torch.tensor([[[0.0, float("nan")]]]), None, "NaN or infinite at 1 points; .* put -100 into both channels"),
        (
            torch.full((1, 3, 2), float("inf")),
            torch.tensor([[1, 0, 1]]),
            "infinite at 2 points; .* False into valid_mask",
        ),
    ],
)
def test_labels_that_are_no_flow_are_refused(labels, mask, message):
    with pytest.raises(ValueError, match=message):
        labelled_points(labels, mask)


def test_flow_labels_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"flow labels have the shape \(2, 3, 4, 2\) here, not \(2, 4, 3, 2\)"):
        flow_loss(torch.zeros(2, 3, 4, 2), torch.zeros(2, 4, 3, 2), torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match="flow_loss='l2' must be one of epe, l1, charbonnier"):
        flow_loss(torch.zeros(2, 3, 4, 2), torch.zeros(2, 3, 4, 2), torch.ones(2, 3, 4), kind="l2")


def test_drawn_points_are_labelled_ones_without_repeats():
    valid = torch.rand(50, 30) < 0.5
    points, weights = draw_labelled(valid, 7)
    assert points.shape == weights.shape == (50, 7)
    assert all(len(set(row)) == 7 for row in points.tolist())
    drawn = valid.gather(1, points)
    assert torch.equal(drawn.sum(dim=1), valid.sum(dim=1).clamp(max=7))
    assert torch.equal(weights > 0, drawn)
    # The weights of an example add up to the labelled points it stands for.
    torch.testing.assert_close(weights.sum(dim=1), valid.sum(dim=1).float())


def test_every_labelled_point_is_drawn_as_often():
    """5 of 20 points, 4,000 times: a share of 1/4, with a standard error of 0.007."""
    valid = torch.ones(4000, 24, dtype=torch.bool)
    valid[:, ::6] = False
    points, weights = draw_labelled(valid, 5)
    share = torch.zeros(4000, 24).scatter_add(1, points, weights / 4).mean(dim=0)  # weights are 20 / 5
    torch.testing.assert_close(share[valid[0]], torch.full((20,), 0.25), rtol=0, atol=5 * 0.007)
    assert (share[~valid[0]] == 0).all()


def test_points_are_drawn_from_torchs_generator():
    valid = torch.ones(2, 500, dtype=torch.bool)
    torch.manual_seed(5)
    first, second = draw_labelled(valid, 9)[0], draw_labelled(valid, 9)[0]
    torch.manual_seed(5)
    assert torch.equal(draw_labelled(valid, 9)[0], first)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


# --- modalities


def modality_targets(kind, batch=3, points=4, channels=5):
    return (
        torch.randint(0, channels, (batch, points)) if kind == "cross_entropy" else torch.randn(batch, points, channels)
    )


@pytest.mark.parametrize("kind", POINT_LOSSES)
def test_a_modalitys_loss_is_torchs_mean(kind):
    predicted, targets = torch.randn(3, 4, 5), modality_targets(kind)
    torchs = {"l1": F.l1_loss, "mse": F.mse_loss, "cross_entropy": lambda p, t: F.cross_entropy(p.movedim(-1, 1), t)}
    torch.testing.assert_close(modality_loss(kind, predicted, targets), torchs[kind](predicted, targets))


@pytest.mark.parametrize("kind", POINT_LOSSES)
def test_points_without_a_target_count_for_nothing(kind):
    """Each example is the mean over its own labelled points; one that has none adds 0 and is still counted."""
    predicted, targets = torch.randn(3, 4, 5, requires_grad=True), modality_targets(kind)
    targets[0, 1:] = -100
    targets[1] = -100
    loss = modality_loss(kind, predicted, targets)
    want = (
        point_loss(kind, predicted[:1, :1], targets[:1, :1]) + point_loss(kind, predicted[2:], targets[2:]).mean()
    ) / 3
    torch.testing.assert_close(loss, want[0, 0])
    loss.backward()
    assert torch.equal(predicted.grad.abs().sum(dim=-1) != 0, has_target(targets))


def test_one_channel_of_minus_a_hundred_is_a_target():
    """Only a point of nothing but -100 has none."""
    targets = torch.tensor([[[-100.0, 2.0], [-100.0, -100.0]]])
    assert torch.equal(has_target(targets), torch.tensor([[True, False]]))
    torch.testing.assert_close(point_loss("l1", torch.zeros(1, 2, 2), targets), torch.tensor([[51.0, 0.0]]))


@pytest.mark.parametrize("kind", POINT_LOSSES)
def test_batches_of_one_size_average_to_the_large_batch(kind):
    """Also where their labels are unequally many: what Trainer does without a count of items."""
    predicted, targets = torch.randn(4, 4, 5), modality_targets(kind, batch=4)
    targets[0, :3], targets[1] = -100, -100
    parts = [modality_loss(kind, predicted[i : i + 2], targets[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, modality_loss(kind, predicted, targets))


def test_a_one_hot_label_is_a_class_and_zeros_are_none():
    """The autoencoder's label is its input: one-hot, and zeros where DeepMind's notebook knows none."""
    predicted, classes = torch.randn(3, 1, 5), torch.tensor([[2], [0], [4]])
    one_hot = F.one_hot(classes, 5).float()
    torch.testing.assert_close(
        modality_loss("cross_entropy", predicted, one_hot), modality_loss("cross_entropy", predicted, classes)
    )
    one_hot[1] = 0
    classes[1] = -100
    torch.testing.assert_close(
        modality_loss("cross_entropy", predicted, one_hot), modality_loss("cross_entropy", predicted, classes)
    )


@pytest.mark.parametrize("kind", POINT_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_modalitys_loss_is_summed_in_float32_or_wider(kind, dtype):
    predicted, targets = torch.randn(3, 4, 5).to(dtype), modality_targets(kind)
    assert point_loss(kind, predicted, targets).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_targets_that_are_no_numbers_or_classes_are_named():
    with pytest.raises(ValueError, match=r"labels hold NaN; mark what has no target with -100 in all its values"):
        point_loss("l1", torch.zeros(1, 2, 2), torch.full((1, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"label 5 is outside 0\.\.4"):
        point_loss("cross_entropy", torch.zeros(1, 1, 5), torch.tensor([[5]]))


GRID = (2, 4, 5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 2, 4, 5, 3), None), ((3, 2, 3, 4, 5), (0, 1, 3, 4, 2)), ((3, 40, 3), None), ((3, 120), None)],
    ids=["as the output", "as the input", "points", "row"],
)
def test_values_are_laid_out_as_the_output_or_as_the_input(shape, axes):
    labels = torch.arange(360).reshape(shape)
    last = labels if axes is None else labels.permute(axes)
    got = targets_of_points("l1", labels, 40, 3, GRID)
    assert torch.equal(got, last.reshape(3, 40, 3))


def test_a_square_of_three_pixels_has_its_channels_first():
    """As every input of the model; its shape alone would leave it open."""
    labels = torch.arange(27).reshape(1, 3, 3, 3)
    assert torch.equal(targets_of_points("l1", labels, 9, 3, (3, 3)), labels.flatten(2).mT)


@pytest.mark.parametrize(
    ("kind", "shape", "points", "channels", "grid", "want"),
    [
        ("l1", (3, 8, 1), 2, 4, (2,), (3, 2, 4)),  # sound, in patches of four samples
        ("l1", (3, 2, 4, 5), 40, 1, GRID, (3, 40, 1)),  # depth
        ("cross_entropy", (3, 2, 4, 5), 40, 7, GRID, (3, 40)),  # a class for each pixel
        ("cross_entropy", (3,), 1, 7, (1,), (3, 1)),
        ("cross_entropy", (3, 7), 1, 7, (1,), (3, 1, 7)),
        ("mse", (3, 7), 1, 7, None, (3, 1, 7)),
        ("mse", (3, 6, 2), 6, 2, None, (3, 6, 2)),
    ],
)
def test_every_usual_layout_is_read(kind, shape, points, channels, grid, want):
    labels = torch.zeros(shape, dtype=torch.long) if kind == "cross_entropy" and len(want) == 2 else torch.zeros(shape)
    assert tuple(targets_of_points(kind, labels, points, channels, grid).shape) == want


@pytest.mark.parametrize(("kind", "shape"), [("l1", (2, 5, 4, 3)), ("cross_entropy", (3,)), ("mse", ())])
def test_labels_of_another_shape_are_refused(kind, shape):
    with pytest.raises(ValueError, match=r"of 2x4x5 points of 3 values; give values \(3, 2, 4, 5, 3\)") as error:
        targets_of_points(kind, torch.zeros(3, *shape), 40, 3, GRID)
    assert ("class indices (3, 2, 4, 5) of an integer type" in str(error.value)) == (kind == "cross_entropy")


@pytest.mark.parametrize(("num_points", "num_drawn"), [(7, 3), (12, 4), (5, 5), (1920, 512), (802_816, 512)])
def test_drawn_points_are_different_and_each_example_has_its_own(num_points, num_drawn):
    points = draw_points(num_points, num_drawn, 6, torch.device("cpu"))
    assert points.shape == (6, num_drawn)
    assert points.min() >= 0 and points.max() < num_points
    assert all(len(row.unique()) == num_drawn for row in points)
    if num_drawn < num_points:
        assert not torch.equal(points[0].sort().values, points[1].sort().values)


def test_every_point_is_drawn_equally_often():
    """30,000 draws of 3 in 7: 12,857 each, three standard deviations are 257."""
    points = draw_points(7, 3, 30_000, torch.device("cpu"))
    assert (points.flatten().bincount(minlength=7) - 30_000 * 3 / 7).abs().max() < 257


def test_the_loss_of_drawn_points_is_that_of_all_on_average():
    """Half of the points of the first example have no target; 20,000 draws, three standard errors."""
    predicted, targets = torch.randn(1, 7, 2), torch.randn(1, 7, 2)
    targets[0, :3] = -100
    share = has_target(targets).float().mean(dim=1)
    points = draw_points(7, 3, 20_000, torch.device("cpu"))
    losses = point_loss("l1", predicted[0, points], targets[0, points]).mean(dim=1) / share
    whole = modality_loss("l1", predicted, targets)
    assert (losses.mean() - whole).abs() < 3 * losses.std() / 20_000**0.5
