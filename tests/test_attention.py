import math

import pytest
import torch
from helpers import config_of, enlarge

from hf_perceiver.attention import MLP, Attention, CrossAttentionLayer, SelfAttentionLayer

# Two ways to compute the same float32 attention differ by a few roundings of values of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config_for(implementation, **changes):
    config = config_of(**changes)
    config._attn_implementation = implementation
    return config


def attention(implementation="eager", *, num_heads=2, qk_channels=8, v_channels=12, **changes):
    """Queries of 10 channels, a context of 6."""
    module = Attention(
        config_for(implementation, **changes),
        query_channels=10,
        context_channels=6,
        num_heads=num_heads,
        qk_channels=qk_channels,
        v_channels=v_channels,
    )
    return enlarge(module).eval()


def written_out(module, query, context, key_mask=None, query_mask=None):
    """DeepMind's attend(), head by head and query by query; zeros where there is nothing to attend to."""
    q, k, v = module.q_proj(query), module.k_proj(context), module.v_proj(context)
    heads = q.shape[-1] // module.qk_head_dim
    rows = []
    for b in range(context.shape[0]):
        for n in range(q.shape[1]):
            keys = torch.ones(k.shape[1], dtype=torch.bool) if key_mask is None else key_mask[b]
            asked = query_mask is None or bool(query_mask[b, n])
            columns = []
            for h in range(heads):
                e = slice(h * module.qk_head_dim, (h + 1) * module.qk_head_dim)
                values = v[b, :, h * module.v_head_dim : (h + 1) * module.v_head_dim]
                if not asked or not keys.any():
                    columns.append(torch.zeros(module.v_head_dim))
                    continue
                scores = (k[b, keys, e] @ q[b % q.shape[0], n, e]) / math.sqrt(module.qk_head_dim)
                columns.append(scores.softmax(dim=0) @ values[keys])
            rows.append(torch.cat(columns))
    return module.o_proj(torch.stack(rows).reshape(context.shape[0], q.shape[1], -1))


def masks():
    """(key mask, query mask) by name; three examples, seven keys, five queries. Row 1 has no valid key."""
    keys = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0] * 7, [1] * 7]).bool()
    queries = torch.tensor([[1, 0, 1, 1, 0], [1] * 5, [0] * 5]).bool()
    return {"none": (None, None), "keys": (keys, None), "queries": (None, queries), "both": (keys, queries)}


def tensors():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 5, 10, generator=generator), torch.randn(3, 7, 6, generator=generator)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("which", masks())
@pytest.mark.parametrize(("qk", "v", "heads"), [(8, 12, 2), (8, 8, 4), (5, 3, 1), (None, None, 2)])
def test_attention_is_the_written_out_formula(implementation, which, qk, v, heads):
    module = attention(implementation, num_heads=heads, qk_channels=qk, v_channels=v)
    query, context = tensors()
    key_mask, query_mask = masks()[which]
    got, weights = module(query, *module.project(context), key_mask, query_mask)
    torch.testing.assert_close(got, written_out(module, query, context, key_mask, query_mask), **CLOSE)
    # With such weights attention is far from the mean, so that the comparison means something.
    if weights is not None:
        assert weights[0].amax(dim=-1).mean() > 0.35


@pytest.mark.parametrize("which", masks())
@pytest.mark.parametrize("zero_masked_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backends_agree(which, zero_masked_rows, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    query, context = (x.to(dtype) for x in tensors())
    results = []
    for implementation in ("eager", "sdpa", "tiled"):
        module = attention(implementation, zero_masked_rows=zero_masked_rows).to(dtype).requires_grad_(False)
        results.append(module(query, *module.project(context), *masks()[which])[0])
    assert torch.isfinite(results[0]).all()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("which", masks())
@pytest.mark.parametrize("v_channels", [8, 12])
def test_flex_equals_eager(which, v_channels):
    """Flex attention compiles itself, for most of a minute, and has no gradients on a CPU."""
    query, context = tensors()
    results = []
    for implementation in ("eager", "flex_attention"):
        module = attention(implementation, v_channels=v_channels)
        with torch.no_grad():
            results.append(module(query, *module.project(context), *masks()[which])[0])
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_a_row_without_valid_keys_gives_the_output_bias(implementation):
    module = attention(implementation)
    query, context = tensors()
    key_mask, query_mask = masks()["both"]
    got, _ = module(query, *module.project(context), key_mask, query_mask)
    assert torch.equal(got[1], module.o_proj.bias.expand(5, 10))  # no valid key
    assert torch.equal(got[0, 1], module.o_proj.bias)  # a masked query


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_a_row_without_valid_keys_can_give_the_mean_as_in_the_builtin(implementation):
    module = attention(implementation, zero_masked_rows=False)
    query, context = tensors()
    got, _ = module(query, *module.project(context), masks()["keys"][0])
    mean = module.o_proj(module.v_proj(context[1]).mean(dim=0))
    torch.testing.assert_close(got[1], mean.expand(5, 10), **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_masked_keys_have_no_influence(implementation):
    module = attention(implementation)
    query, context = tensors()
    key_mask = masks()["keys"][0]
    garbage = torch.where(key_mask[..., None], context, 1e4)
    want, _ = module(query, *module.project(context), key_mask)
    got, _ = module(query, *module.project(garbage), key_mask)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_gradients_stay_finite_where_everything_is_masked(implementation):
    module = attention(implementation)
    query, context = tensors()
    context.requires_grad_()
    got, _ = module(query, *module.project(context), *masks()["both"])
    got.square().sum().backward()
    assert torch.isfinite(context.grad).all()
    assert (context.grad[1] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("which", masks())
def test_one_query_array_serves_a_batch(implementation, which):
    """The latents are (1, N, D); masks and contexts are (B, ...)."""
    module = attention(implementation)
    query, context = tensors()
    shared = query[:1]
    got, _ = module(shared, *module.project(context), *masks()[which])
    want, _ = module(shared.expand(3, -1, -1), *module.project(context), *masks()[which])
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_one_context_serves_a_batch_of_queries(implementation):
    module = attention(implementation)
    query, context = tensors()
    got, _ = module(query, *module.project(context[:1]), masks()["keys"][0])
    want, _ = module(query, *module.project(context[:1].expand(3, -1, -1)), masks()["keys"][0])
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_attention_is_never_causal(implementation):
    """transformers' interface takes it for causal unless the module says otherwise."""
    module = attention(implementation)
    assert module.is_causal is False
    query, context = tensors()
    got, _ = module(query, *module.project(context))
    order = torch.randperm(7)
    shuffled, _ = module(query, *module.project(context[:, order]))
    torch.testing.assert_close(got, shuffled, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_no_query_gives_no_row(implementation):
    module = attention(implementation)
    query, context = tensors()
    assert module(query[:, :0], *module.project(context))[0].shape == (3, 0, 10)


def test_a_single_key_is_its_value():
    module = attention()
    query, context = tensors()
    got, weights = module(query, *module.project(context[:, :1]))
    torch.testing.assert_close(got, module.o_proj(module.v_proj(context[:, :1])).expand(3, 5, 10), **CLOSE)
    assert weights.shape == (3, 2, 5, 1)


def test_widths_follow_the_queries_then_the_keys():
    module = attention(qk_channels=None, v_channels=None)
    assert module.q_proj.out_features == module.k_proj.out_features == module.v_proj.out_features == 10
    module = attention(qk_channels=4, v_channels=None)
    assert module.v_proj.out_features == 4
    assert module.o_proj.out_features == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_channels": 9}, "query and key width=9 cannot be divided by num_heads=2; nearest widths: 8 or 10"),
        ({"v_channels": 7}, "value width=7 cannot be divided by num_heads=2; nearest widths: 6 or 8"),
        ({"qk_channels": None, "num_heads": 3}, "query and key width=10 cannot be divided by num_heads=3"),
        ({"v_channels": 3, "num_heads": 4}, "nearest widths: 4, or choose another number of heads"),
    ],
)
def test_widths_that_heads_do_not_divide_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**options)


def test_an_unknown_backend_is_refused():
    module = attention("nope")
    query, context = tensors()
    with pytest.raises((KeyError, ValueError), match="nope"):
        module(query, *module.project(context))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "tiled"])
def test_attention_dropout_acts_in_training_only(implementation):
    module = attention(implementation, attention_dropout=0.5)
    query, context = tensors()
    projected = module.project(context)
    assert torch.equal(module(query, *projected)[0], module(query, *projected)[0])
    module.train()
    assert not torch.equal(module(query, *projected)[0], module(query, *projected)[0])


# --- layers


def cross_layer(implementation="eager", **changes):
    options = {"use_query_residual": True, "widening_factor": 1, "dropout": 0.0, **changes}
    layer = CrossAttentionLayer(
        config_for(implementation),
        query_channels=10,
        context_channels=6,
        num_heads=2,
        heads_name="num_heads",
        qk_channels=8,
        v_channels=12,
        **options,
    )
    return enlarge(layer).eval()


@pytest.mark.parametrize("residual", [True, False])
def test_the_cross_attention_layer_adds_the_query_as_it_came(residual):
    layer = cross_layer(use_query_residual=residual)
    query, context = tensors()
    key_value = layer.cross_attn.project(layer.context_norm(context))
    attended, _ = layer.cross_attn(layer.query_norm(query), *key_value)
    x = query + attended if residual else attended
    want = x + layer.mlp(layer.mlp_norm(x))
    torch.testing.assert_close(layer(query, context), want, rtol=0, atol=0)


def test_keys_and_values_can_be_projected_beforehand():
    layer = cross_layer()
    query, context = tensors()
    assert torch.equal(layer(query, None, None, None, *layer.project(context)), layer(query, context))
    with pytest.raises(ValueError, match="give the context or its projected keys and values"):
        layer(query, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_reads_arrays_of_any_float_type(dtype):
    """Raw pixels and their codes come in the user's dtype, whatever the model's."""
    layer = cross_layer().to(dtype)
    query, context = tensors()
    got = layer(query, context)
    assert got.dtype == dtype
    assert torch.equal(got, layer(query.to(dtype), context.to(dtype)))


def test_the_self_attention_layer_is_two_residual_sublayers():
    layer = enlarge(SelfAttentionLayer(config_for("eager", qk_channels=8, v_channels=12))).eval()
    latents = torch.randn(2, 4, 16)
    normed = layer.attn_norm(latents)
    x = latents + layer.self_attn(normed, *layer.self_attn.project(normed))[0]
    torch.testing.assert_close(layer(latents), x + layer.mlp(layer.mlp_norm(x)), rtol=0, atol=0)


def test_the_mlp_widens_and_uses_the_configured_activation():
    mlp = enlarge(MLP(config_of(), 6, 4))
    x = torch.randn(2, 3, 6)
    hidden = torch.nn.functional.gelu(mlp.up_proj(x), approximate="tanh")  # DeepMind's GELU
    assert mlp.up_proj.out_features == 24
    torch.testing.assert_close(mlp(x), mlp.down_proj(hidden))
    relu = MLP(config_of(hidden_act="relu"), 6, 1)
    torch.testing.assert_close(relu(x), relu.down_proj(relu.up_proj(x).relu()))


def test_dropout_acts_on_both_sublayers_in_training_only():
    layer = SelfAttentionLayer(config_for("eager", dropout=0.5))
    latents = torch.randn(2, 4, 16)
    assert not torch.equal(layer.train()(latents), layer(latents))
    assert torch.equal(layer.eval()(latents), layer(latents))
    for silenced in (layer.self_attn.o_proj, layer.mlp.down_proj):
        torch.nn.init.zeros_(silenced.weight)
        torch.nn.init.ones_(silenced.bias)
    # Each sub-layer now writes ones: dropped they are 0, kept they are 2.
    written = layer.train()(latents) - latents
    assert {round(v) for v in written.flatten().tolist()} == {0, 2, 4}


def test_layer_norms_use_the_configured_epsilon():
    layer = SelfAttentionLayer(config_of(layer_norm_eps=1e-3))
    assert {layer.attn_norm.eps, layer.mlp_norm.eps} == {1e-3}
    assert cross_layer().context_norm.eps == 1e-5
