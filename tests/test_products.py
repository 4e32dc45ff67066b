"""Linear maps by oneDNN: the same numbers, and only where nothing else has a say in the layer."""

import pytest
import torch
import torch.nn.functional as F
from helpers import config_of
from torch import nn

from hf_perceiver import products
from hf_perceiver.attention import SelfAttentionLayer
from hf_perceiver.products import apply, product, suits_onednn


@pytest.fixture
def asked(monkeypatch):
    """The shapes that oneDNN was asked for."""
    shapes, ask = [], torch.ops.mkldnn._linear_pointwise

    def spy(x, *rest):
        shapes.append(tuple(x.shape))
        return ask(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return shapes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_those_of_torch(dtype, tolerance, with_bias, asked):
    """Two orders of summation of 33 terms; bfloat16 has 8 bits."""
    x, weight, bias = torch.randn(3, 50, 33), torch.randn(7, 33), torch.randn(7)
    given = [tensor.to(dtype) for tensor in (x, weight, bias)]
    bias = given[2] if with_bias else None
    exact = F.linear(given[0].double(), given[1].double(), None if bias is None else bias.double())
    with torch.no_grad():
        for view in (given[0], given[0].transpose(0, 1).contiguous().transpose(0, 1)):
            out = product(view, given[1], bias)
            assert out.dtype == dtype
            assert (out.double() - exact).abs().max() <= tolerance * exact.abs().max()
    assert asked == [(3, 50, 33), (3, 50, 33)]


def test_a_batch_of_one_that_is_shared_is_read_as_it_is(asked):
    x, weight = torch.randn(1, 130, 5).expand(4, -1, -1), torch.randn(6, 5)
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight), F.linear(x, weight))
    assert asked


def test_gradients_other_dtypes_few_rows_and_other_devices_are_torchs(asked):
    layer, x = nn.Linear(5, 6), torch.randn(200, 5)
    apply(layer, x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        apply(layer, x[:127])
        apply(layer.double(), x.double())
        apply(layer.half(), x.half())
        product(x.to("meta"), torch.empty(6, 5, device="meta"))
        product(x[:0], torch.empty(6, 5))
        product(x, torch.randn(5, 6).T)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        apply(layer.float(), x)
    assert not asked


def hooked(layer):
    layer.register_forward_hook(lambda module, args, out: 2 * out)


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def adapted(layer):
    layer.__class__ = type(
        "Adapted", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight, self.bias)}
    )


@pytest.mark.parametrize("change", [hooked, patched, adapted])
def test_a_watched_or_changed_layer_is_called(change, asked):
    layer, x = nn.Linear(5, 6), torch.randn(200, 5)
    with torch.no_grad():
        before = apply(layer, x)
        asked.clear()
        change(layer)
        torch.testing.assert_close(apply(layer, x), 2 * before)
    assert not asked


def test_what_torch_lacks_or_has_switched_off_is_not_asked(monkeypatch):
    x, weight = torch.randn(200, 5), torch.randn(6, 5)
    with torch.no_grad():
        assert suits_onednn(x, weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not suits_onednn(x, weight)
        monkeypatch.setattr(products, "HAS_ONEDNN", False)
        assert not suits_onednn(x, weight)
        torch.testing.assert_close(product(x, weight), F.linear(x, weight))


def test_the_layers_of_a_model_multiply_by_it(asked):
    """Four projections and the MLP's two, of 130 latents; with gradients none."""
    layer = SelfAttentionLayer(config_of(d_latents=16, self_attention_widening_factor=2)).eval()
    latents = torch.randn(1, 130, 16)
    wanted = layer(latents)
    assert not asked
    with torch.no_grad():
        torch.testing.assert_close(layer(latents), wanted)
    assert sorted(asked) == [(1, 130, 16)] * 5 + [(1, 130, 32)]
