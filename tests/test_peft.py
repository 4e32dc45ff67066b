"""Training a part of a model, saving little of it, and running one that does not fit: LoRA, frozen encoders, offloading."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, head_inputs, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from hf_perceiver import (
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForOpticalFlow,
    PerceiverIOForSequenceClassification,
)
from hf_perceiver.training.modalities import ModalityCollator

MODELS: dict[str, tuple[str, type]] = {
    "masked_lm": ("language", PerceiverIOForMaskedLM),
    "sequence": ("language", PerceiverIOForSequenceClassification),
    "image": ("imagenet_fourier", PerceiverIOForImageClassification),
    "image_conv": ("imagenet_conv", PerceiverIOForImageClassification),
    "flow": ("flow", PerceiverIOForOpticalFlow),
    "multimodal": ("multimodal", PerceiverIOForMultimodalAutoencoding),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Adapters and hooks take the direct form of attention, plain weights the cheaper one, which sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
COLLATE = ModalityCollator(reconstruct=["audio", "image", "label"])


def model_of(name: str, **changes: Any) -> Any:
    case, head = MODELS[name]
    return tiny(case).model(head, **changes)


def examples(name: str) -> list[dict[str, Any]]:
    case, head = MODELS[name]
    if name == "multimodal":
        inputs = tiny(case).inputs(4)["inputs"]
        return [{"inputs": {key: values[i] for key, values in inputs.items()}} for i in range(4)]
    torch.manual_seed(2)
    batch = head_inputs(tiny(case), head, batch=4, labels=True)
    return [{key: values[i] for key, values in batch.items()} for i in range(4)]


def collate(name: str) -> Any:
    return COLLATE if name == "multimodal" else default_collate


def batch_of(name: str) -> dict[str, Any]:
    return collate(name)(examples(name))


def train(name: str, model: Any, folder: Any, steps: int = 6) -> float:
    """Train on all examples and save -> how much of the loss is left."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=3e-3 if name == "flow" else 3e-2,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=steps,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = examples(name)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate(name))
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    return trainer.evaluate(data)["eval_loss"] / before


def outputs(model: Any, name: str) -> Any:
    with torch.no_grad():
        return model.eval()(**batch_of(name)).logits


def size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


# LoRA


@pytest.mark.medium
@pytest.mark.parametrize("name", ["masked_lm", "image", "flow", "multimodal"])
def test_lora_learns_saves_its_own_weights_alone_and_merges(name, tmp_path):
    base = model_of(name)
    base.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=PROJECTIONS))
    assert train(name, model, tmp_path / "run") < 0.97
    saved = tmp_path / "run" / "checkpoint-6"
    adapter = load_file(saved / "adapter_model.safetensors")
    assert not list(saved.glob("model*.safetensors")) and all(".lora_" in key for key in adapter)
    layers = sum(key.rpartition(".")[2] in PROJECTIONS for key, m in base.named_modules() if hasattr(m, "lora_A"))
    assert layers and len(adapter) == 2 * layers
    want = outputs(model, name)
    # Onto fresh weights, then as one model without PEFT, which is saved and loaded as any.
    loaded = PeftModel.from_pretrained(MODELS[name][1].from_pretrained(tmp_path / "base"), saved)
    assert_same(outputs(loaded, name), want, **CLOSE)
    merged = loaded.merge_and_unload()
    assert type(merged) is MODELS[name][1]
    assert_same(outputs(merged, name), want, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    again = MODELS[name][1].from_pretrained(tmp_path / "merged")
    assert_same(outputs(again, name), want, **CLOSE)
    unloaded = model.unload().state_dict()
    assert all(torch.equal(unloaded[key], value) for key, value in before.items())


@pytest.mark.medium
def test_lora_beside_a_new_head(tmp_path):
    """What is trained in full is named in `modules_to_save`; the rest of the model asks it for its parts."""
    base = model_of("sequence")
    base.save_pretrained(tmp_path / "base")
    new = ["output_query", "decoder", "postprocessor"]
    wanted = LoraConfig(r=2, target_modules=r".*encoder.*\.self_attn\.(q|v)_proj", modules_to_save=new)
    model = get_peft_model(base, wanted)
    assert train("sequence", model, tmp_path / "run") < 0.9
    saved = tmp_path / "run" / "checkpoint-6"
    kept = {key.split("perceiver.")[1].split(".")[0] for key in load_file(saved / "adapter_model.safetensors")}
    assert kept == {"encoder", *new}
    fresh = MODELS["sequence"][1].from_pretrained(tmp_path / "base")
    assert_same(outputs(PeftModel.from_pretrained(fresh, saved), "sequence"), outputs(model, "sequence"), **CLOSE)


def test_an_adapter_of_the_released_size_is_a_hundredth_of_the_model():
    """Rank 8 on all four projections of the language model, on the meta device: 1.98M of 201.1M parameters."""
    with torch.device("meta"):
        base = PerceiverIOForMaskedLM(PerceiverIOForMaskedLM.config_class())
        model = get_peft_model(base, LoraConfig(r=8, target_modules=PROJECTIONS))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.01 * 201_108_230


# Frozen encoders

FROZEN = ("perceiver.preprocessor.", "perceiver.encoder.")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["masked_lm", "sequence", "image_conv", "flow", "multimodal"])
def test_a_frozen_encoder_stays_as_it_is_and_the_rest_learns(name, tmp_path):
    """Statistics of batch norms too. What was trained can be saved alone; Trainer's checkpoints hold the whole model."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.freeze_encoder()
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and trained == {key for key, _ in model.named_parameters() if not key.startswith(FROZEN)}
    assert train(name, model, tmp_path / "run") < 0.97
    tied = set(model.all_tied_weights_keys)
    for key, value in model.state_dict().items():
        if key.startswith(FROZEN) or key in tied:
            assert torch.equal(value, before[key]), key
    assert sum(not torch.equal(model.state_dict()[key], before[key]) for key in trained) > len(trained) / 2
    weights = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    save_file(weights, tmp_path / "trained.safetensors")
    assert size(tmp_path, "trained.safetensors") < 0.7 * size(tmp_path / "base", "model.safetensors")
    # The optimizer has moments of what is trained alone.
    state = torch.load(tmp_path / "run" / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(trained)
    fresh = MODELS[name][1].from_pretrained(tmp_path / "base")
    assert not fresh.load_state_dict(load_file(tmp_path / "trained.safetensors"), strict=False).unexpected_keys
    assert_same(outputs(fresh, name), outputs(model, name), **CLOSE)


def gradients(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    model(**batch_of(name)).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["masked_lm", "image", "flow", "multimodal"])
def test_gradients_above_a_frozen_encoder_are_those_of_the_whole_model(name):
    """1e-4 of the largest: the encoder runs by inference's cheaper forms, whose sums are in another order."""
    want, model = (
        gradients(model_of(name, fast_attention="never").train(), name),
        model_of(name, fast_attention="always"),
    )
    model.freeze_encoder()
    got = gradients(model.train(), name)
    assert got and set(got) == {key for key in want if not key.startswith(FROZEN)}
    largest = max(want[key].abs().max().item() for key in got)
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, want[key], rtol=0, atol=1e-4 * largest, msg=lambda m, k=key: f"{k}: {m}")


def test_a_frozen_encoder_has_no_dropout_and_keeps_no_graph():
    model = model_of("image", dropout=0.5, attention_dropout=0.5)
    model.freeze_encoder()
    model.train()
    batch = batch_of("image")
    latents = model.encode(batch["pixel_values"]).latents
    assert torch.equal(latents, model.encode(batch["pixel_values"]).latents) and not latents.requires_grad
    assert model.perceiver.decoder.training and not model.perceiver.encoder.training


def test_what_is_trained_inside_or_before_a_frozen_encoder_gets_gradients():
    """Adapters that are added later, latents given as a prompt, inputs."""
    model = model_of("image")
    model.freeze_encoder()
    pixels = batch_of("image")["pixel_values"].requires_grad_()
    model(pixel_values=pixels).logits.sum().backward()
    assert pixels.grad.any()
    prompt = model.perceiver.encoder.latents().detach().clone().requires_grad_()
    model(pixel_values=pixels.detach(), latents=prompt).logits.sum().backward()
    assert prompt.grad.any()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))
    adapted(pixel_values=pixels.detach()).logits.sum().backward()
    (first,) = [m for key, m in model.named_modules() if key.endswith("blocks.0.0.self_attn.o_proj")]
    assert first.lora_B["default"].weight.grad.any()


# Models in pieces


@pytest.mark.parametrize("name", ["masked_lm", "image_conv", "flow", "multimodal"])
def test_a_checkpoint_in_shards_runs_with_a_part_of_it_on_the_disk(name, tmp_path):
    """device_map="auto", with room for half of the weights."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    shards = list((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model" / "model.safetensors.index.json").is_file()
    room = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that some is on the disk
        loaded = MODELS[name][1].from_pretrained(
            tmp_path / "model", device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path / "offloaded"
        )
    places = set(loaded.hf_device_map.values())
    assert places == {"cpu", "disk"} and any(p.is_meta for p in loaded.parameters())
    whole = MODELS[name][1].from_pretrained(tmp_path / "model", device_map="auto")
    want = outputs(copy.deepcopy(model), name)
    assert_same(outputs(whole, name), want, **CLOSE)
    assert_same(outputs(loaded, name), want, **CLOSE)
