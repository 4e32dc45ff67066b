"""Attention tile by tile: the same as in one piece, whatever the sizes, and chosen where it pays."""

import pytest
import torch
from helpers import tiny
from torch import nn

from hf_perceiver import tiled_attention
from hf_perceiver.attention import Attention, eager_attention_forward
from hf_perceiver.tiled_attention import pays, tiled_attention_forward

# Two ways to sum the same float32 numbers.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def arrays(queries, keys, *, batch=2, heads=3, width=5, value_width=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, width), (keys, width), (keys, value_width))
    return [torch.randn(batch, heads, *shape, generator=generator).to(dtype) * 2 for shape in shapes]


def eager(query, key, value, mask=None):
    return eager_attention_forward(nn.Module(), query, key, value, mask, scaling=query.shape[-1] ** -0.5)[0]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_attention, "QUERY_TILE", 4)
    monkeypatch.setattr(tiled_attention, "KEY_TILE", 8)


@pytest.mark.parametrize("queries", [1, 4, 9])
@pytest.mark.parametrize("keys", [1, 8, 21])
@pytest.mark.parametrize("value_width", [5, 7, 1])
def test_tiles_that_fit_and_tiles_that_do_not_give_the_whole(small_tiles, queries, keys, value_width):
    given = arrays(queries, keys, value_width=value_width)
    out, weights = tiled_attention_forward(nn.Module(), *given, None)
    assert weights is None
    torch.testing.assert_close(out, eager(*given), **CLOSE)


@pytest.mark.parametrize("heads", [1, 3])
def test_masks_may_empty_a_tile_or_differ_by_row_and_head(small_tiles, heads):
    given = arrays(6, 21)
    mask = torch.rand(2, heads, 6, 21, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., :8] = False  # the first tile of keys
    mask[0, :, 2, :] = False
    mask[0, :, 2, 20] = True  # one key, in the last tile
    out, _ = tiled_attention_forward(nn.Module(), *given, mask)
    torch.testing.assert_close(out, eager(*given, mask), **CLOSE)
    torch.testing.assert_close(out[0, 2], given[2][0, :, 20], **CLOSE)


def test_a_row_without_keys_gives_the_mean_of_the_values(small_tiles):
    given = arrays(3, 21)
    out, _ = tiled_attention_forward(nn.Module(), *given, torch.zeros(2, 1, 3, 21, dtype=torch.bool))
    torch.testing.assert_close(out, given[2].mean(dim=2)[:, None].expand(-1, 3, -1, -1), **CLOSE)


def test_scores_beyond_the_range_of_exp_are_no_matter(small_tiles):
    query, key, value = arrays(6, 21)
    given = (query * 100, key, value)
    out, _ = tiled_attention_forward(nn.Module(), *given, None)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, eager(*given), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_sums_in_float32(small_tiles, dtype):
    given = arrays(6, 200, dtype=dtype)
    out, _ = tiled_attention_forward(nn.Module(), *given, None)
    assert out.dtype == dtype
    exact = eager(*(x.double() for x in given))
    # Scores, weights and values are rounded to 8 bits; the sums of 25 tiles are not.
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)


def test_with_gradients_or_dropout_sdpa_takes_over(monkeypatch):
    asked = []

    def stand_in(module, query, *rest, **options):
        asked.append(options["dropout"])
        return query.transpose(1, 2), None

    monkeypatch.setattr(tiled_attention, "sdpa_attention_forward", stand_in)
    query, key, value = arrays(2, 3)
    tiled_attention_forward(nn.Module(), query.requires_grad_(), key, value, None)
    tiled_attention_forward(nn.Module(), query.detach(), key, value, None, dropout=0.5)
    assert asked == [0.0, 0.5]
    with torch.no_grad():
        tiled_attention_forward(nn.Module(), query, key, value, None)
    assert len(asked) == 2


def test_a_mask_to_add_is_refused():
    with pytest.raises(ValueError, match=r"mask of booleans, True = attend, not of torch.float32"):
        tiled_attention_forward(nn.Module(), *arrays(2, 3), torch.zeros(2, 1, 2, 3))


def test_a_model_takes_it_by_name():
    case = tiny("language")
    inputs, model = case.inputs(), case.model()
    outputs = []
    for name in ("eager", "tiled"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outputs.append(model(**inputs).last_hidden_state)
    torch.testing.assert_close(*outputs, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_that_fit_one_tile_take_the_plain_softmax(dtype):
    """Of the arrays of a released latent tower, with masks of rows and of keys."""
    given = arrays(70, 130, batch=1, heads=2, width=32, value_width=48, dtype=dtype)
    mask = torch.rand(1, 1, 70, 130, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 3, :] = False
    out, _ = tiled_attention_forward(nn.Module(), *given, mask)
    exact = eager(*(x.double() for x in given), mask)
    # As the eager backend of the same dtype, which rounds its scores too.
    error, usual = ((x.double() - exact).norm() / exact.norm() for x in (out, eager(*given, mask)))
    assert error <= 1.5 * usual + 1e-6, (error, usual)


def test_float16_is_computed_in_float32_on_the_cpu():
    """Its matrix products take some 20 times as long there; only what comes in and goes out is rounded."""
    given = arrays(6, 200, dtype=torch.float16)
    out, _ = tiled_attention_forward(nn.Module(), *given, None)
    torch.testing.assert_close(out, eager(*(x.double() for x in given)).half(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "threads", "expected"),
    [
        ({}, 1, True),
        ({"value_width": 5}, 1, False),  # torch's own kernel does it
        ({"value_width": 5, "dtype": torch.bfloat16}, 1, True),
        ({"dtype": torch.bfloat16}, 1, True),
        ({"dtype": torch.float16}, 1, False),
        ({"queries": 64}, 1, True),
        ({"queries": 63}, 1, False),
        ({"queries": 64}, 2, False),
        ({}, 16, False),
    ],
)
def test_sdpa_is_tiled_where_torch_has_no_fast_kernel_of_its_own(change, threads, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = arrays(**{"queries": 512, "keys": 512, "batch": 1, "heads": 1, **change})
    assert pays(*given, dropout=0.0) is expected
    assert pays(*given, dropout=0.1) is False


def test_the_choice_is_made_in_the_model(monkeypatch):
    used = []
    monkeypatch.setattr("hf_perceiver.attention.pays", lambda *given: True)
    get = tiled_attention.tiled_attention_forward
    monkeypatch.setitem(
        tiled_attention.AttentionInterface._global_mapping, "tiled", lambda *a, **k: used.append(1) or get(*a, **k)
    )
    case = tiny("language")
    model = case.model()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(**case.inputs())
    layers = sum(isinstance(module, Attention) for module in model.modules())
    assert len(used) == layers + (model.config.num_blocks - 1) * model.config.num_self_attends_per_block
