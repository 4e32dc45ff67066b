import pytest
import torch
from helpers import fourier

from hf_perceiver.arrays import ArrayPart, InputArray, PerceiverArray, QueryArray
from hf_perceiver.position_encoding import TableCode, build_position_encoding, take_rows


def code(n=6, batch=None):
    module = build_position_encoding(fourier(6))
    if batch is None:
        return module.encode((n,), device=torch.device("cpu"), dtype=torch.float32)
    return module.encode_at(torch.rand(batch, n, 1) * 2 - 1, dtype=torch.float32)


def parts():
    """Every mixture of features, position, padding, mask token; six elements each."""
    features, replaced = torch.randn(2, 6, 3), torch.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()
    return {
        "features": ArrayPart(features=features, grid=(6,)),
        "shared features": ArrayPart(features=features[:1]),
        "position": ArrayPart(position=code(), grid=(6,)),
        "position by example": ArrayPart(position=code(batch=2)),
        "features and position": ArrayPart(features=features, position=code()),
        "features and position by example": ArrayPart(features=features[:1], position=code(batch=2)),
        "added": ArrayPart(features=torch.randn(2, 6, 7), position=code(), combine="add"),
        "padded": ArrayPart(features=features, position=code(), constant=torch.randn(2)),
        "padded position": ArrayPart(position=code(), constant=torch.randn(2)),
        "padded by nothing": ArrayPart(features=features, constant=torch.empty(0)),
        "replaced": ArrayPart(features=features, constant=torch.randn(2), token=torch.randn(5), replaced=replaced),
        "replaced, shared": ArrayPart(position=code(), token=torch.randn(7), replaced=replaced),
        "token of no use": ArrayPart(features=features, token=torch.randn(3)),
        "masked": ArrayPart(position=code(), mask=torch.ones(2, 6, dtype=torch.bool)),
    }


@pytest.mark.parametrize("name", parts())
def test_rows_of_a_part_are_rows_of_the_dense_part(name):
    part = parts()[name]
    whole = part.dense()
    assert whole.shape[:2] == (whole.shape[0], part.length) and part.length == 6
    for start, stop in ((0, 6), (0, 1), (2, 5), (5, 6), (4, 99)):
        assert torch.equal(part.dense(start, stop), whole[:, start:stop])


@pytest.mark.parametrize("name", parts())
@pytest.mark.parametrize("points", [torch.tensor([5, 0, 0]), torch.tensor([[5, 0, 0], [1, 2, 3]])])
def test_chosen_elements_are_rows_of_the_dense_part(name, points):
    part = parts()[name]
    part.mask = torch.rand(2, 6) > 0.5
    chosen = part.select(points)
    whole = part.dense()
    want = take_rows(whole, points)
    torch.testing.assert_close(chosen.dense().expand(want.shape), want, rtol=0, atol=1e-6)
    assert torch.equal(chosen.mask, take_rows(part.mask[..., None], points)[..., 0])
    assert chosen.grid is None
    assert chosen.length == 3


def test_the_dense_part_is_features_then_position_then_padding():
    features, constant = torch.randn(2, 6, 3), torch.randn(2)
    part = ArrayPart(features=features, position=code(), constant=constant)
    want = torch.cat([features, code().dense(0, 6).expand(2, -1, -1), constant.expand(2, 6, 2)], dim=-1)
    assert torch.equal(part.dense(), want)


def test_added_positions_are_added():
    features = torch.randn(2, 6, 7)
    part = ArrayPart(features=features, position=code(), combine="add")
    assert torch.equal(part.dense(), features + code().dense(0, 6))


def test_a_mask_token_takes_all_channels_of_an_element():
    replaced = torch.tensor([[True, False], [False, False]])
    token = torch.randn(5)
    part = ArrayPart(features=torch.randn(2, 2, 3), constant=torch.randn(2), token=token, replaced=replaced)
    assert torch.equal(part.dense()[0, 0], token)
    assert torch.equal(part.dense()[1], torch.cat([part.features[1], part.constant.expand(2, 2)], dim=-1))


def test_a_token_alone_stands_in_for_missing_elements():
    token = torch.randn(5)
    one = ArrayPart(token=token)
    assert one.length == 1
    assert torch.equal(one.dense(), token[None, None])
    three = ArrayPart(token=token, replaced=torch.ones(1, 3, dtype=torch.bool))
    assert three.length == 3
    assert torch.equal(three.dense(), token.expand(1, 3, 5))


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("features", 2),
        ("shared features", 1),
        ("position", 1),
        ("position by example", 2),
        ("features and position by example", 2),
        ("masked", 2),
        ("replaced, shared", 2),
    ],
)
def test_the_batch_is_that_of_whatever_differs_by_example(name, batch):
    assert parts()[name].batch_size == batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_part_has_its_features_dtype(dtype):
    part = ArrayPart(features=torch.randn(2, 6, 3).to(dtype), position=code(), constant=torch.randn(2))
    assert part.dense().dtype == dtype


def test_modalities_follow_each_other():
    a = ArrayPart(features=torch.randn(2, 3, 4))
    b = ArrayPart(position=TableCode(torch.randn(1, 2, 4)))
    c = ArrayPart(token=torch.randn(4))
    array = InputArray({"a": a, "b": b, "c": c})
    assert array.sizes == {"a": 3, "b": 2, "c": 1}
    assert (array.length, array.batch_size) == (6, 2)
    want = torch.cat([a.dense(), b.dense().expand(2, -1, -1), c.dense().expand(2, -1, -1)], dim=1)
    assert torch.equal(array.dense(), want)


def test_a_mask_of_some_modality_leaves_the_others_valid():
    mask = torch.tensor([[True, False], [True, True]])
    array = InputArray(
        {"a": ArrayPart(features=torch.zeros(2, 2, 4), mask=mask), "b": ArrayPart(features=torch.zeros(1, 3, 4))}
    )
    assert torch.equal(array.mask(), torch.cat([mask, torch.ones(2, 3, dtype=torch.bool)], dim=1))
    assert InputArray({"b": array.parts["b"]}).mask() is None


def test_a_mask_may_be_shared_by_the_batch():
    mask = torch.tensor([[True, False]])
    array = InputArray({"": ArrayPart(features=torch.zeros(3, 2, 4), mask=mask)})
    assert array.mask().shape == (3, 2)


def test_plain_tensors_and_parts_become_arrays():
    tensor = torch.randn(2, 3, 4)
    assert torch.equal(QueryArray.of(tensor).dense(), tensor)
    part = ArrayPart(features=tensor)
    array = InputArray.of(part)
    assert isinstance(array, InputArray) and array.part is part
    assert PerceiverArray.of(array) is array
    with pytest.raises(ValueError, match=r"an array is \(B, M, C\), not \(2, 3\)"):
        QueryArray.of(torch.randn(2, 3))


def test_the_only_part_of_several_is_refused():
    part = ArrayPart(features=torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="reads one modality; the array has a, b"):
        _ = InputArray({"a": part, "b": part}).part


@pytest.mark.parametrize("name", parts())
def test_an_element_tells_device_and_dtype(name):
    part = parts()[name]
    like = InputArray({"": part}).like
    assert like.dtype == part.dense().dtype
    assert like.shape[1:] == (1, part.dense().shape[2])
