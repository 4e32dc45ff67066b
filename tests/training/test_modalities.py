import numpy as np
import pytest
import torch

from hf_perceiver.training.modalities import ModalityCollator


def example(**inputs):
    return {"inputs": inputs}


def test_complete_examples_are_stacked_without_masks():
    examples = [example(image=torch.rand(2, 3), label=2), example(image=np.ones((2, 3), np.float32), label=np.int64(0))]
    batch = ModalityCollator()(examples)
    assert set(batch) == {"inputs"}
    assert torch.equal(batch["inputs"]["image"][1], torch.ones(2, 3))
    assert batch["inputs"]["image"].dtype == torch.float32
    assert torch.equal(batch["inputs"]["label"], torch.tensor([2, 0]))


def test_what_an_example_lacks_is_masked():
    examples = [
        example(image=torch.ones(2, 3), sound=None),
        example(sound=torch.ones(4)),
        example(image=torch.ones(2, 3)),
    ]
    batch = ModalityCollator()(examples)
    assert torch.equal(batch["attention_mask"]["image"], torch.tensor([True, False, True]))
    assert torch.equal(batch["attention_mask"]["sound"], torch.tensor([False, True, False]))
    assert batch["inputs"]["image"].sum(dim=(1, 2)).tolist() == [6, 0, 6]
    # What no example has is not there at all.
    assert set(ModalityCollator()([example(image=torch.ones(1), sound=None)])["inputs"]) == {"image"}


def test_unequal_lengths_are_padded_and_masked():
    batch = ModalityCollator()([example(text=[5, 6, 7]), example(text=[8]), example(image=torch.ones(1))])
    assert batch["inputs"]["text"].tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert batch["attention_mask"]["text"].int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert batch["attention_mask"]["image"].tolist() == [False, False, True]


def test_an_examples_own_mask_is_kept():
    """Over elements, whether the input is whole, shorter, or missing."""
    masked = {**example(text=[5, 6, 7]), "attention_mask": {"text": [1, 0, 1]}}
    for other, want in (
        (example(text=[8, 9, 4]), [1, 1, 1]),
        (example(text=[8]), [1, 0, 0]),
        (example(a=1), [0, 0, 0]),
    ):
        mask = ModalityCollator()([masked, other])["attention_mask"]["text"]
        assert mask.dtype == torch.bool and mask.int().tolist() == [[1, 0, 1], want]


def test_reconstructed_outputs_have_their_inputs_as_labels():
    examples = [example(image=torch.rand(2), label=3), example(image=None, label=1), example(image=torch.rand(2))]
    batch = ModalityCollator(reconstruct=["image", "label"])(examples)
    assert torch.equal(batch["labels"]["image"][0], batch["inputs"]["image"][0])
    assert batch["labels"]["image"][1].tolist() == [-100, -100]
    assert batch["labels"]["label"].tolist() == [3, 1, -100]
    assert batch["inputs"]["label"].tolist() == [3, 1, 0]
    assert batch["attention_mask"]["label"].tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_a_missing_label_is_marked_in_any_type(dtype):
    examples = [example(image=torch.ones(2, dtype=dtype)), example(image=None, a=1)]
    labels = ModalityCollator(reconstruct=["image"])(examples)["labels"]["image"]
    assert labels.tolist() == [[1, 1], [-100, -100]]


def test_labels_may_be_a_dict_or_numbers():
    examples = [{**example(a=1), "labels": {"action": 2}}, {**example(a=1), "labels": {"path": torch.ones(2, 2)}}]
    labels = ModalityCollator()(examples)["labels"]
    assert labels["action"].tolist() == [2, -100]
    assert labels["path"].tolist() == [[[-100, -100], [-100, -100]], [[1, 1], [1, 1]]]
    numbers = [{**example(a=1), "labels": 2}, {**example(a=1), "labels": 0}, example(a=1)]
    assert ModalityCollator()(numbers)["labels"].tolist() == [2, 0, -100]
    several = [{**example(a=1), "labels": [0.0, 1.0]}, {**example(a=1), "labels": [1.0, 1.0]}]
    assert ModalityCollator()(several)["labels"].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"image": 1}], r"an example holds a dict of modalities as 'inputs'; this one has \['image'\]"),
        ([example(a=torch.ones(2, 3)), example(a=torch.ones(2, 4))], r"a have shapes that cannot be stacked: \[\(2, 3\), \("),
        ([example(a=torch.ones(2)), example(a=torch.ones(()))], "a have shapes that cannot be stacked"),
        ([{**example(a=1), "labels": {"b": 1}}, {**example(a=1), "labels": 1}], "labels are a dict by output in every"),
    ],
)  # fmt: skip
def test_what_cannot_be_stacked_is_named(examples, message):
    with pytest.raises(ValueError, match=message):
        ModalityCollator()(examples)
