import pytest
import torch
import torch.nn.functional as F

from hf_perceiver.losses import check_classes, classification_loss, cross_entropy


def test_cross_entropy_is_the_mean_over_what_is_labelled():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [-100, -100, 0]])
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_nothing_labelled_costs_nothing():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100))
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
