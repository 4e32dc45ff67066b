"""The recipe for images: labels, sizes, permutations, what is written and what is refused."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PerceiverImageProcessorPil, pipeline

from hf_perceiver import PerceiverIOConfig, PerceiverIOForImageClassification, bundled_checkpoint, recipes
from hf_perceiver.training.image_augmentation import ImageNetAugmentation
from hf_perceiver.training.image_classification import (
    ImageArguments,
    ImageTrainingArguments,
    PictureCollator,
    TrainingCollator,
    TrainingSampler,
    best_classes,
    check_reads,
    image_trainer,
    main,
    moving_permutation,
    open_classifier,
    open_processor,
    permute_pixels,
    picture_size,
    resize_positions,
    sized_preprocessor,
    top_accuracies,
)
from hf_perceiver.training.image_data import Pictures, made_up_pictures
from hf_perceiver.training.recipe import ModelArguments, run

FOURIER = {"kind": "fourier", "num_bands": 4, "max_resolution": [8, 8]}
TRAINED = {"kind": "trainable", "num_positions": 64, "channels": 6, "grid": [8, 8]}


def small(position=FOURIER, stem=None, num_labels=3, seed=0):
    torch.manual_seed(seed)
    config = PerceiverIOConfig(
        num_latents=4,
        d_latents=16,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        qk_channels=None,
        v_channels=None,
        decoder_num_heads=1,
        decoder_qk_channels=None,
        decoder_v_channels=None,
        num_labels=num_labels,
        problem_type="single_label_classification",
        preprocessor={"kind": "grid", "stem": stem or {"kind": "pixels"}, "position": position},
        output_query={"kind": "tasks", "channels": 16},
        postprocessor={"kind": "classification"},
    )
    model = PerceiverIOForImageClassification(config)
    with torch.no_grad():  # fresh biases are zero, and the positions so small that nothing depends on them
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def processor(size=8):
    sides = {"height": size, "width": size}
    return PerceiverImageProcessorPil(size=sides, crop_size=sides)


def examples(count=6):
    data = made_up_pictures()[0]
    return [data[i] for i in range(count)]


def training(folder, **options):
    quick = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "eval_strategy": "no"}
    return ImageTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{**quick, **options}
    )


# --- the recipe


def test_the_defaults_are_the_papers(tmp_path):
    """Perceiver IO, A.1; label smoothing, betas and epsilon from DeepMind's training code."""
    given = ImageTrainingArguments(output_dir=str(tmp_path))
    assert (given.optimizer, given.learning_rate, given.flat_share, given.warmup_steps) == ("lamb", 2e-3, 0.5, 0)
    assert (given.num_train_epochs, given.weight_decay, given.max_grad_norm) == (110, 0.1, 10)
    assert (given.label_smoothing_factor, given.adam_beta1, given.adam_beta2) == (0.1, 0.9, 0.999)
    assert given.adam_epsilon == 1e-6
    images = ImageArguments()
    assert (images.randaugment_layers, images.randaugment_magnitude, images.mix) == (4, 5, "both")


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for name in ("image_folder", "dataset", "image_size", "permute", "mix", "architecture", "smoke_test", "flat_share"):
        assert f"--{name}" in told


def test_pictures_are_read_by_the_processor_that_is_saved():
    given = examples()
    batch = TrainingCollator(processor(), 3)(given)
    wanted = processor()([example["image"] for example in given], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], wanted)
    assert batch["labels"].tolist() == [example["label"] for example in given]
    assert torch.equal(PictureCollator(processor(), 3)(given)["pixel_values"], wanted)


def test_smoothed_labels_give_torchs_smoothed_loss():
    model, given = small(), examples()
    soft = TrainingCollator(processor(), 3, smoothing=0.1)(given)
    hard = TrainingCollator(processor(), 3)(given)["labels"]
    assert soft["labels"].shape == (6, 3)
    output = model(**soft)
    wanted = torch.nn.functional.cross_entropy(output.logits, hard, label_smoothing=0.1)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-6, atol=0)


def test_mixed_labels_are_smoothed_once():
    torch.manual_seed(0)
    labels = TrainingCollator(processor(), 3, mix="mixup", smoothing=0.3)(examples())["labels"]
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(6))
    assert labels.min() >= 0.1 - 1e-6, "0.3 spread over three classes"
    assert ((labels - 0.1).clamp(min=0) > 1e-6).sum(dim=1).max() == 2, "two pictures each"


def test_a_label_out_of_range_is_told():
    with pytest.raises(ValueError, match=r"label 5 is outside 0..2"):
        PictureCollator(processor(), 3)([{"image": Image.new("RGB", (8, 8)), "label": 5}])


def test_accuracies_count_the_best_and_the_five_best():
    logits = torch.tensor([[0.0, 5, 4, 3, 2, 1, 0], [9, 1, 2, 3, 4, 5, 0], [1, 0.5, -1, 0.2, 0.3, 0.4, 9]])
    labels = np.array([1, 2, 2])
    measured = top_accuracies(
        type("P", (), {"predictions": best_classes((logits, None), None).numpy(), "label_ids": labels})
    )
    assert measured == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}
    few = type("P", (), {"predictions": best_classes(logits[:, :3], None).numpy(), "label_ids": labels})
    assert set(top_accuracies(few)) == {"top1"}, "five of three are always right"


def test_accumulated_soft_labels_give_the_large_batchs_step(tmp_path):
    """Trainer counts every number of a soft label as an item. 1e-5: float32 sums in another order."""
    steps = []
    for index, (size, times) in enumerate([(8, 1), (2, 4)]):
        model, (train, _) = small(), made_up_pictures()
        arguments = training(
            tmp_path / str(index),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            optimizer="adamw",
            learning_rate=1.0,
            adam_epsilon=1e6,  # the step is then in proportion to the gradient
            weight_decay=0.0,
            flat_share=0.0,
        )
        trainer = image_trainer(
            model, processor(), arguments, train, None, ImageArguments(augmentation="none", mix="none")
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train()
        steps.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name in steps[0]:
        scale = max(float(steps[0][name].abs().max()), 1e-12)
        torch.testing.assert_close(steps[1][name], steps[0][name], rtol=0, atol=max(1e-4 * scale, 2e-8), msg=name)


def test_an_epoch_is_drawn_from_seed_and_number_alone():
    sampler, again = TrainingSampler(50, seed=1), TrainingSampler(50, seed=1)
    first = list(sampler)
    assert sorted(index for index, _ in first) == list(range(50)) and list(again) == first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first and list(TrainingSampler(50, seed=2)) != first


def test_a_batch_depends_on_its_draw_and_on_nothing_before_it():
    given = [{**example, "draw": 7} for example in examples()]
    collator = TrainingCollator(processor(), 3, augment=ImageNetAugmentation(), mix="both")
    first = collator(given)
    random.random(), torch.rand(1)
    state = random.getstate(), torch.random.get_rng_state()
    again = collator(given)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    other = collator([{**example, "draw": 8} for example in given])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


@pytest.mark.medium
def test_a_run_that_is_taken_up_again_equals_the_straight_one(tmp_path):
    """Order, augmentation and mixing are drawn by epoch and place: equal bit by bit on a CPU."""
    train, held_out = made_up_pictures()
    weights = []
    for name, resume in (("straight", None), ("again", str(tmp_path / "straight" / "checkpoint-9"))):
        arguments = training(tmp_path / name, max_steps=11, save_strategy="steps", save_steps=9)
        trainer = image_trainer(small(), processor(), arguments, train, held_out)
        trainer.train(resume_from_checkpoint=resume)
        weights.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.medium
def test_a_smoke_test_needs_no_data_and_writes_what_a_pipeline_reads(tmp_path):
    metrics = main(["--smoke_test", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"])
    assert 0 <= metrics["eval_top1"] <= 1
    answers = pipeline("image-classification", model=str(tmp_path / "out"))(made_up_pictures()[1][0]["image"])
    assert {answer["label"] for answer in answers} == {"disc", "box", "cross"}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "out" / "learning_curve.csv").is_file()


# --- trained models


def test_a_head_with_other_classes_is_new_and_the_rest_is_kept(tmp_path):
    small().save_pretrained(tmp_path)
    before = PerceiverIOForImageClassification.from_pretrained(tmp_path).state_dict()
    model = open_classifier(ModelArguments(model=str(tmp_path)), ["a", "b", "c", "d"], (8, 8))
    changed = [name for name, value in model.state_dict().items() if value.shape != before[name].shape]
    assert changed and all("postprocessor" in name for name in changed)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if n not in changed)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    with pytest.raises(ValueError, match="knows 3 classes and the data has 4"):
        open_classifier(ModelArguments(model=str(tmp_path)), ["a", "b", "c", "d"], (8, 8), train=False)


def test_a_model_that_knows_the_classes_keeps_their_order(tmp_path):
    """Its folder names are sorted, the model's own order is not: measured against the pipeline's own answers."""
    model = small()
    model.config.id2label, model.config.label2id = {0: "cross", 1: "disc", 2: "box"}, {"cross": 0, "disc": 1, "box": 2}
    model.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    _, data = made_up_pictures()
    for index in range(len(data)):
        name = data.classes[data[index]["label"]]
        for part in ("train", "val"):
            path = tmp_path / "data" / part / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data[index]["image"].save(path)
    command = ["--model", str(tmp_path / "model"), "--image_folder", str(tmp_path / "data"), "--no_do_train"]
    metrics = main([*command, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"])
    answer = pipeline("image-classification", model=str(tmp_path / "model"), top_k=1)
    right = [answer(data[i]["image"])[0]["label"] == data.classes[data[i]["label"]] for i in range(len(data))]
    assert metrics["eval_top1"] == pytest.approx(np.mean(right))


# --- sizes


@pytest.mark.parametrize("name", ["imagenet_fourier", "imagenet_learned", "imagenet_conv", "imagenet_config_b"])
def test_fresh_positions_are_made_for_the_size(name):
    spec = getattr(recipes, name)().preprocessor
    assert sized_preprocessor(spec, (224, 224)) == spec, "the published ones"
    smaller = json.dumps(sized_preprocessor(spec, (64, 64)))
    grid = "16, 16" if name == "imagenet_conv" else "64, 64"
    assert f"[{grid}]" in smaller and "224" not in smaller and "56" not in smaller.replace("256", "")


@pytest.mark.parametrize("kind", ["trainable", "projected"])
def test_trained_positions_are_interpolated_once_for_good(kind, tmp_path):
    position = TRAINED if kind == "trainable" else {"kind": "projected", "position": TRAINED, "channels": 5}
    model, pixels = small(position), torch.randn(2, 3, 12, 12)
    wanted = model(pixel_values=pixels, interpolate_pos_encoding=True).logits
    resize_positions(model, (12, 12))
    model.save_pretrained(tmp_path)
    again = PerceiverIOForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(pixel_values=pixels).logits, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="8x8"):
        check_reads(again, (8, 8))


def test_fourier_bands_stay_when_a_trained_model_reads_another_size():
    """The corners and the middle of 9x9 and 17x17 pictures are the same places, and have the same codes."""
    model = small()
    position = model.perceiver.preprocessor.position
    resize_positions(model, (17, 17))
    assert model.config.preprocessor["position"] == FOURIER
    small_grid, large_grid = (
        position.encode((n, n), device="cpu", dtype=torch.float32).dense(0, n * n)[0].reshape(n, n, -1) for n in (9, 17)
    )
    torch.testing.assert_close(large_grid[::2, ::2], small_grid, rtol=0, atol=1e-5)


def test_the_processor_follows_the_size_with_its_crop(tmp_path):
    resized = open_processor(None, 384)
    assert picture_size(resized) == (384, 384) and dict(resized.crop_size)["height"] == 439  # 384 * 256 / 224
    resized.save_pretrained(tmp_path)
    assert picture_size(open_processor(str(tmp_path), None)) == (384, 384)
    assert picture_size(open_processor("bundled:digits", 16)) == (16, 16)


@pytest.mark.medium
def test_the_bundled_digits_are_finetuned_at_twice_the_size(tmp_path):
    command = ["--model", "bundled:digits", "--dataset", "digits", "--image_size", "16", "--max_steps", "1"]
    options = ["--per_device_train_batch_size", "4", "--save_strategy", "no", "--eval_strategy", "no", "--use_cpu"]
    main([*command, *options, "--learning_rate", "0", "--output_dir", str(tmp_path / "out"), "--report_to", "none"])
    classify = pipeline("image-classification", model=str(tmp_path / "out"), top_k=1)
    assert picture_size(classify.image_processor) == (16, 16)
    assert classify(Image.new("L", (16, 16)))[0]["label"] in "0123456789"


# --- permuted pixels


def test_a_permutation_becomes_part_of_the_folder_and_the_pipeline(tmp_path):
    """The pipeline gets true pictures; what it answers is what the trained model says of permuted ones."""
    train, held_out = made_up_pictures()
    images = ImageArguments(permute="pixels", permute_seed=5, mix="none")
    trainer = image_trainer(small(), processor(), training(tmp_path / "out"), train, held_out, images)
    plain = small()
    metrics = run(trainer, None)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["preprocessor"]["stem"]
    assert saved == {"kind": "permuted", "stem": {"kind": "pixels"}, "grid": [8, 8], "seed": 5}
    classify = pipeline("image-classification", model=str(tmp_path / "out"))
    right = [max(classify(held_out[i]["image"]), key=lambda a: a["score"])["label"] for i in range(len(held_out))]
    names = trainer.model.config.id2label
    assert np.mean([name == names[held_out.labels[i]] for i, name in enumerate(right)]) == pytest.approx(
        metrics["eval_top1"]
    )
    # Without the permutation the same weights are another model.
    loaded = classify.model
    plain.load_state_dict(
        {n.replace("stem.stem.", "stem."): v for n, v in loaded.state_dict().items() if "permutation" not in n}
    )
    batch = PictureCollator(processor(), 3)(examples())["pixel_values"]
    assert not torch.allclose(plain(pixel_values=batch).logits, loaded(pixel_values=batch).logits, atol=1e-4)
    places = loaded.perceiver.preprocessor.stem.permutation
    moved = batch.flatten(-2)[..., places].unflatten(-1, (8, 8))
    torch.testing.assert_close(plain(pixel_values=moved).logits, loaded(pixel_values=batch).logits)


def test_pixels_that_take_their_positions_along_are_the_same_picture():
    """The first paper's claim, exact: a Perceiver reads a set. 1e-5: float32 sums in another order."""
    model = small()
    collator = PictureCollator(processor(), 3, moving_permutation(model, (8, 8), seed=1))
    moved, still = collator(examples()), PictureCollator(processor(), 3)(examples())
    assert not torch.allclose(moved["pixel_values"], still["pixel_values"], atol=0.1)
    torch.testing.assert_close(model(**moved).logits, model(**still).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**moved).loss, model(**still).loss, rtol=0, atol=1e-5)


def test_permuting_twice_or_at_another_size_is_refused():
    model = small(stem={"kind": "conv1x1", "channels": 4})
    permute_pixels(model, (8, 8), seed=1)
    with pytest.raises(ValueError, match="permuted already"):
        permute_pixels(model, (8, 8), seed=2)
    with pytest.raises(ValueError, match="no other size"):
        resize_positions(model, (16, 16))


@pytest.mark.parametrize(
    ("position", "stem", "told"),
    [
        (TRAINED, None, "takes Fourier positions"),
        (FOURIER, {"kind": "patches", "spatial_downsample": 2}, "not one of patches"),
    ],
)
def test_positions_that_cannot_move_with_their_pixels_are_refused(position, stem, told):
    with pytest.raises(ValueError, match=told):
        moving_permutation(small(position, stem), (8, 8), seed=1)


# --- bad input


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image_folder": "a", "dataset": "digits"}, "not both"),
        ({"image_size": 0}, "image_size=0"),
        ({"mixup_alpha": 0.0}, "mixup_alpha=0.0"),
        ({"permute_seed": 0}, "permute_seed=0"),
    ],
)
def test_options_that_contradict_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        ImageArguments(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor=1.0"),
    ],
)
def test_training_options_that_cannot_be_are_refused(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        training(tmp_path, **options)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--architecture", "imagenet_fourier"], "give --image_folder or --dataset"),
        (["--dataset", "digits", "--architecture", "nothing"], "architecture 'nothing' is not known"),
        (["--dataset", "digits", "--architecture", "language_bytes"], "kind 'text' reads no pictures"),
        (["--dataset", "digits", "--model", "bundled:language"], "has no image processor"),
        (["--dataset", "digits", "--model", "bundled:flow"], "PerceiverIOFlowImageProcessor"),
        (["--image_folder", "nowhere", "--architecture", "imagenet_fourier"], "is no folder"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_written(tmp_path, command, told):
    with pytest.raises(ValueError, match=told):
        main([*command, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"])
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["language", "flow"])
def test_a_model_of_another_kind_is_refused(name):
    with pytest.raises(ValueError, match=r"kind 'text'|does not read pictures of 8x8"):
        open_classifier(ModelArguments(model=f"bundled:{name}"), ["a", "b"], (8, 8))


def test_a_model_for_another_number_of_classes_is_refused(tmp_path):
    data = Pictures([Image.new("L", (8, 8))] * 2, [0, 1], ["a", "b"], Image.Image.copy)
    with pytest.raises(ValueError, match="the model has 3 classes and the data 2"):
        image_trainer(small(), processor(), training(tmp_path), data)


def test_trained_positions_of_another_size_say_what_to_give():
    with pytest.raises(
        ValueError, match=r"does not read pictures of 12x12 pixels: 64 trained positions .*--image_size"
    ):
        check_reads(small(TRAINED), (12, 12))


def test_the_bundled_folder_is_what_the_recipe_reads():
    assert picture_size(open_processor("bundled:digits", None)) == (8, 8)
    check_reads(PerceiverIOForImageClassification.from_pretrained(bundled_checkpoint("digits")), (8, 8))
