"""Computed memory: against what torch's allocator really gave out on the CPU, and what is known of it without measuring."""

from typing import Any

import pytest
import torch
from helpers import CHECKPOINTING, config_of, fourier, grid, tiny
from torch.profiler import ProfilerActivity, profile

from hf_perceiver import PerceiverIOConfig, PerceiverIOModel, recipes
from hf_perceiver.training.memory import LiveBytes, example_inputs, main, make_input, published, training_memory

META = torch.device("meta")


def text(**changes: Any) -> PerceiverIOConfig:
    """Heads as wide for keys as for values, without which torch's CPU kernel is not a fused one."""
    position = {"kind": "trainable", "num_positions": 96, "channels": 32}
    fields: dict[str, Any] = {
        "num_latents": 32,
        "d_latents": 64,
        "vocab_size": 50,
        "preprocessor": {"kind": "text", "channels": 32, "position": position},
        "output_query": {"kind": "position", "position": position},
        "postprocessor": {"kind": "tokens"},
    }
    return config_of(**{**fields, **changes})


def image(**changes: Any) -> PerceiverIOConfig:
    position = fourier(12, 10)
    return config_of(
        num_latents=16,
        d_latents=64,
        decoder_num_heads=1,
        preprocessor=grid({"kind": "conv", "in_channels": 3, "channels": 16}, position),
        output_query={"kind": "position", "position": position},
        postprocessor={"kind": "projection", "num_outputs": 3},
        **changes,
    )


def given_out(config: PerceiverIOConfig, batch_size: int, attention: str, checkpointing: bool) -> int:
    """Bytes at most that the CPU's allocator gave out in a step, as the profiler saw it."""
    model = PerceiverIOModel(config).train()
    model.set_attn_implementation(attention)
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")()
    inputs = example_inputs(model, config.preprocessor, batch_size)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        logits = model(**inputs).logits
        loss = logits.float().square().sum()
        del logits
        loss.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.medium
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("attention", ["fused", "eager"])
@pytest.mark.parametrize("make", [text, image])
def test_activations_are_what_the_allocator_really_gave_out(make, attention, checkpointing):
    """To a tenth. What kernels need for themselves for a moment is not seen on the meta device."""
    computed = training_memory(make(), 8, attention=attention, gradient_checkpointing=checkpointing).activations
    measured = given_out(make(), 8, "sdpa" if attention == "fused" else "eager", checkpointing)
    assert computed == pytest.approx(measured, rel=0.1)


def test_weights_gradients_and_moments_are_counted_by_parameter():
    """201,108,230 parameters of 4 bytes, the released language model's."""
    memory = training_memory(recipes.language_bytes(), 1)
    assert memory.weights == memory.gradients == memory.optimizer // 2 == 4 * 201_108_230
    assert memory.total == 4 * memory.weights + memory.activations and memory.gathered == 0


def test_activations_grow_with_the_batch_and_shrink_by_checkpointing_and_16_bits():
    one, two = (training_memory(text(), n).activations for n in (8, 16))
    assert two == pytest.approx(2 * one, rel=0.05)
    less = training_memory(text(), 8, gradient_checkpointing=True).activations
    half = training_memory(text(), 8, dtype="bfloat16").activations
    whole = training_memory(text(), 8, attention="eager").activations
    # Norms and residuals stay in 32 bits.
    assert less < 0.7 * one and 0.5 * one < half < 0.9 * one and whole > one
    assert training_memory(text(), 8, dtype="bfloat16", gradient_checkpointing=True).activations < less


def test_a_repeated_block_is_held_once_and_its_activations_each_time():
    once, twice = (training_memory(text(num_blocks=n), 4) for n in (1, 2))
    assert once.weights == twice.weights and twice.activations > 1.2 * once.activations


def test_shards_divide_all_but_activations_and_a_few_layers():
    whole, quarter = (training_memory(recipes.language_bytes(), 1, shards=n) for n in (1, 4))
    assert quarter.weights * 4 == pytest.approx(whole.weights, abs=4)
    assert quarter.activations == whole.activations
    assert 0 < quarter.gathered < whole.weights / 4
    assert quarter.total < whole.total


def test_autoencoders_decode_the_points_that_are_drawn():
    config = tiny("multimodal").config
    whole = training_memory(config, 4).activations
    config.postprocessor["num_loss_points"] = {"image": 3}
    assert training_memory(config, 4).activations < whole


@pytest.mark.parametrize("name", sorted(published()))
def test_inputs_of_every_recipe_have_the_size_of_their_positions(name):
    """Or it is said that they have none."""
    config = published()[name]()
    try:
        given = make_input(config.preprocessor, 2, META)
    except ValueError as error:
        assert "does not follow" in str(error)
        assert name in {"starcraft_entities", "original_perceiver_modelnet40"}
        return
    shapes = {k: tuple(v.shape) for k, v in given.items()} if isinstance(given, dict) else tuple(given.shape)
    known = {
        "language_bytes": (2, 2048),
        "imagenet_conv": (2, 3, 224, 224),
        "imagenet_learned": (2, 3, 224, 224),
        "optical_flow": (2, 2, 27, 368, 496),
        "optical_flow_conv": (2, 2, 3, 368, 496),
        "multimodal_autoencoder_88x": {"image": (2, 16, 3, 224, 224), "audio": (2, 30_720, 1), "label": (2, 700)},
        "audioset_raw": {"image": (2, 32, 3, 224, 224), "audio": (2, 61_440, 1)},
        "audioset_mel": {"image": (2, 32, 3, 224, 224), "audio": (2, 4800, 1)},
    }
    assert shapes == known.get(name, shapes)


def test_what_is_let_go_is_no_longer_counted():
    kept = torch.empty(10)
    with LiveBytes([kept]) as live:
        a = torch.empty(100)
        b = a + 1
        view = a[:50]
        assert live.now == live.peak == 800
        del a, b
        assert live.now == 400, "the view holds the first"
        del view
        kept += 1
    assert (live.now, live.peak) == (0, 800)


def test_the_command_prints_a_table(capsys, tmp_path):
    text().save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--batch_size", "4", "--shards", "2"]) == 0
    heads, _, row = capsys.readouterr().out.strip().splitlines()
    assert [h.strip() for h in heads.strip("|").split("|")] == [
        "model", "inputs", "weights", "gradients", "optimizer", "gathered", "activations", "total"
    ]  # fmt: skip
    memory = training_memory(text(), 4, shards=2)
    assert f"| 96 | {memory.weights / 1e6:.2f} MB |" in row
    assert f"| {memory.activations / 1e6:.2f} MB | {memory.total / 1e6:.2f} MB |" in row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "language_byte"], "no recipe language_byte; there are: "),
        (["--recipe", "language_bytes", "--batch_size", "0"], "batch_size is a whole number from 1, not 0"),
        (["--recipe", "original_perceiver_modelnet40"], "does not follow from this preprocessor"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_computed_is_said(arguments, said, capsys):
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="dtype='float8' must be one of float32, bfloat16"):
        training_memory(text(), 1, dtype="float8")
    with pytest.raises(ValueError, match="attention='flash' must be one of fused, eager"):
        training_memory(text(), 1, attention="flash")
