"""Train or fine-tune an image classifier with the recipe of Perceiver IO's ImageNet models.

    python -m hf_perceiver.training.image_classification --image_folder DIR --architecture imagenet_fourier --output_dir OUT
    python -m hf_perceiver.training.image_classification --image_folder DIR --model NAME --image_size 384 --output_dir OUT
    python -m hf_perceiver.training.image_classification --dataset digits --augmentation gentle --mix none --output_dir OUT
    python -m hf_perceiver.training.image_classification --smoke_test --output_dir OUT

LAMB at 2e-3 for half of the steps, then a cosine to 0, no warm-up, gradients clipped at norm 10, weight decay 0.1 but not on
biases and norms, labels smoothed by 0.1, Inception crops, RandAugment, MixUp and CutMix; no EMA, as in the paper. The
paper's batch is 1,024. What is written is a folder for `pipeline("image-classification", OUT)`.
Source: Perceiver IO, A.1; where it is silent, deepmind-research perceiver/train.
"""

import contextlib
import copy
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoConfig, AutoImageProcessor, EvalPrediction, PerceiverImageProcessorPil, TrainerCallback

from ..heads_vision import PerceiverIOForImageClassification
from ..position_encoding import FourierPositionEncoding, TrainablePositionEncoding
from ..registry import STEMS
from ..stems import PermutedStem, draw_permutation, permute_places
from . import train_digits
from .image_augmentation import GentleAugmentation, ImageNetAugmentation, Mix, mix_batch, seeded
from .image_data import check_pictures, in_order, made_up_pictures, read_digits, read_folder, read_named, to_rgb
from .recipe import (
    ModelArguments,
    RecipeArguments,
    RecipeTrainer,
    fresh_config,
    model_folder,
    open_model,
    parse,
    run,
    start,
)

Permute = Literal["none", "pixels", "pixels_and_positions"]

# Wide enough to run every part, small enough for a CPU.
SMOKE_CONFIG = {"num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 1}
SMOKE_SIZE = 32
TOP = 5


@dataclass
class ImageArguments:
    """The pictures, and what is done to them in training."""

    image_folder: str | None = field(
        default=None, metadata={"help": "train/CLASS/... and val/CLASS/..., or CLASS/... of which a share is held out"}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "digits (scikit-learn's), or a data set of the package `datasets`, by name"}
    )
    held_out_share: float = field(
        default=0.1, metadata={"help": "of an --image_folder without train and val: what is kept to evaluate on"}
    )
    max_unreadable_share: float = field(
        default=0.01, metadata={"help": "files that are no pictures are named and left out, up to this share"}
    )
    check_images: bool = field(default=True, metadata={"help": "read the header of every file before the start"})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "height and width that the model reads; 224 for fresh weights, by default a trained model's own. Another "
            "one for a trained model keeps its Fourier bands and interpolates trained positions"
        },
    )
    augmentation: Literal["imagenet", "gentle", "none"] = field(
        default="imagenet",
        metadata={"help": "imagenet: crop, flip, RandAugment; gentle: small turns, scales and shifts, for digits"},
    )
    randaugment_layers: int = field(default=4, metadata={"help": "operations that RandAugment may apply to a picture"})
    randaugment_magnitude: float = field(default=5.0, metadata={"help": "how strong they are, 0 to 10"})
    mix: Mix = field(default="both", metadata={"help": "mix pairs of pictures: MixUp and CutMix on half a batch each"})
    mixup_alpha: float = field(default=0.2, metadata={"help": "MixUp's shares are drawn from Beta(alpha, alpha)"})
    permute: Permute = field(
        default="none",
        metadata={
            "help": "pixels: one permutation of the pixels of all pictures, after augmentation, positions stay in place; it "
            "becomes part of the model. pixels_and_positions: they move together, as in the first paper"
        },
    )
    permute_seed: int = field(default=1, metadata={"help": "what the permutation is drawn from, a number from 1"})

    def __post_init__(self) -> None:
        if self.image_folder and self.dataset:
            raise ValueError("give --image_folder or --dataset, not both")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} is a number of pixels from 1")
        if not self.mixup_alpha > 0:
            raise ValueError(f"mixup_alpha={self.mixup_alpha} is more than 0; --mix none mixes nothing")
        if self.permute_seed < 1:
            raise ValueError(f"permute_seed={self.permute_seed} is a number from 1")


@dataclass
class ImageTrainingArguments(RecipeArguments):
    """RecipeArguments with the values of Perceiver IO, A.1; betas and epsilon are those of DeepMind's code."""

    num_train_epochs: float = field(default=110, metadata={"help": "passes over the pictures"})
    learning_rate: float = field(default=2e-3, metadata={"help": "the paper's, for batches of 1,024 in all"})
    flat_share: float = field(
        default=0.5, metadata={"help": "share of the steps at the full learning rate, before the cosine begins"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "not on biases and norms"})
    max_grad_norm: float = field(default=10.0, metadata={"help": "gradients are clipped at this norm, all together"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "LAMB's epsilon"})
    label_smoothing_factor: float = field(
        default=0.1, metadata={"help": "share of every label that is spread evenly, after mixing"}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save: no, steps, epoch or best"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay off: pictures become the model's input in the collator"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns takes the pictures away before they are read; leave it off")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} is a share from 0 to below 1")


class PictureCollator:
    """Examples {"image", "label"} -> pixel_values (B, 3, H, W) and labels (B,), by the model's own image processor.

    permutation: of the pixels, whose coordinates `input_coordinates` (H * W, 2) then move with them.
    """

    def __init__(self, processor: Any, num_labels: int, permutation: Tensor | None = None):
        self.processor, self.num_labels, self.permutation = processor, num_labels, permutation

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return self.batch(self.read([to_rgb(example["image"]) for example in examples]), self.labels(examples))

    def read(self, images: list[Any], **options: Any) -> Tensor:
        return self.processor(images, return_tensors="pt", **options)["pixel_values"]

    def labels(self, examples: Sequence[dict[str, Any]]) -> Tensor:
        labels = torch.tensor([int(example["label"]) for example in examples])
        if bad := [label for label in labels.tolist() if not 0 <= label < self.num_labels]:
            raise ValueError(f"label {bad[0]} is outside 0..{self.num_labels - 1}, the classes of this model")
        return labels

    def batch(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        batch = {"pixel_values": pixels, "labels": labels}
        if self.permutation is not None:
            axes = [torch.linspace(-1, 1, n) for n in pixels.shape[-2:]]
            batch["pixel_values"] = permute_places(pixels, self.permutation)
            batch["input_coordinates"] = torch.cartesian_prod(*axes)[self.permutation]
        return batch


class TrainingCollator(PictureCollator):
    """PictureCollator with augmentation, mixing and smoothing: labels are soft, (B, num_labels), where they need be.

    All of a batch is drawn from its first example's "draw", where it has one, see TrainingSampler.
    Smoothing and mixing are both linear, so that their order is the same: (1 - s) times the mixed label, plus s / K.
    """

    def __init__(
        self,
        processor: Any,
        num_labels: int,
        permutation: Tensor | None = None,
        *,
        augment: Any = None,
        mix: Mix = "none",
        mixup_alpha: float = 0.2,
        smoothing: float = 0.0,
    ):
        super().__init__(processor, num_labels, permutation)
        self.augment, self.mix, self.mixup_alpha, self.smoothing = augment, mix, mixup_alpha, smoothing

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        images = [to_rgb(example["image"]) for example in examples]
        seed = examples[0].get("draw")
        with contextlib.nullcontext() if seed is None else seeded(seed):
            return self.batch(*self.augmented(images, self.labels(examples)))

    def augmented(self, images: list[Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        options = {}
        if self.augment is not None:
            images = [self.augment(image) for image in images]
            if self.augment.crops:
                options["do_center_crop"] = False
        pixels = self.read(images, **options)
        if self.mix != "none" or self.smoothing:
            soft = nn.functional.one_hot(labels, self.num_labels).float()
            pixels, soft = mix_batch(pixels, soft, self.mix, self.mixup_alpha)
            labels = soft * (1 - self.smoothing) + self.smoothing / self.num_labels
        return pixels, labels


class TrainingSampler(Sampler):
    """Pairs (index, draw): the order of an epoch, and a number that augmentation draws from, by (seed, epoch) alone.

    So a run that is taken up again sees what it would have seen, with any number of workers. Trainer's checkpoints alone do
    not give that: their random state is that of a batch that was read ahead.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # torch's generator looks at 32 bits of its seed: both numbers have to be in them.
        mixed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(self.length, generator=generator)
        draws = torch.randint(2**62, (self.length,), generator=generator)
        return zip(order.tolist(), draws.tolist(), strict=True)


class DrawnExamples(Dataset):
    """Another data set's examples by the sampler's pairs, with the "draw" beside."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        index, draw = pair
        return {**self.data[index], "draw": draw}


class EpochOfSampler(TrainerCallback):
    """Tells the sampler the epoch: Trainer's own way ends at the wrappers of a run that is resumed on several processes."""

    def __init__(self, sampler: TrainingSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class ImageTrainer(RecipeTrainer):
    """RecipeTrainer that augments what it trains on, and measures top-1 and top-5 accuracy.

    data_collator reads what is evaluated; train_collator what is trained on, and it smooths the labels.
    """

    def __init__(
        self,
        *arguments: Any,
        train_dataset: Any,
        data_collator: PictureCollator,
        train_collator: PictureCollator,
        **options: Any,
    ):
        measures = {"compute_metrics": top_accuracies, "preprocess_logits_for_metrics": best_classes}
        super().__init__(
            *arguments,
            train_dataset=DrawnExamples(train_dataset),
            data_collator=data_collator,
            **{**measures, **options},
        )
        self.train_collator, self.evaluation_collator = train_collator, data_collator
        self.train_sampler = TrainingSampler(len(train_dataset), self.args.seed)
        self.add_callback(EpochOfSampler(self.train_sampler))
        # transformers' own takes hard labels only.
        self.label_smoother = None

    def get_train_dataloader(self) -> DataLoader:
        self.data_collator = self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = self.evaluation_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> TrainingSampler:
        return self.train_sampler


def best_classes(logits: Any, labels: Tensor) -> Tensor:
    """Scores (B, K), or a tuple that begins with them -> the five best classes (B, 5), best first, all that is kept."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(TOP, logits.shape[-1])).indices


def top_accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy; five of five classes or fewer are always right, and not counted."""
    right = np.asarray(prediction.predictions) == np.asarray(prediction.label_ids)[:, None]
    accuracies = {"top1": float(right[:, 0].mean())}
    return {**accuracies, "top5": float(right.any(axis=1).mean())} if right.shape[1] == TOP else accuracies


def image_trainer(
    model: PerceiverIOForImageClassification,
    processor: Any,
    arguments: ImageTrainingArguments,
    train: Any,
    held_out: Any = None,
    images: ImageArguments | None = None,
    **options: Any,
) -> ImageTrainer:
    """A trainer of any map-style data of {"image": PIL, "label": int}; options: Trainer's, callbacks and so on.

    Raises ValueError for a model that cannot read the processor's pictures, and where it has not the data's classes.
    """
    images = images or ImageArguments()
    classes = check_pictures(train, held_out)
    if model.config.num_labels != len(classes):
        raise ValueError(
            f"the model has {model.config.num_labels} classes and the data {len(classes)}; open it with num_labels="
            f"{len(classes)}, its other weights are kept"
        )
    check_reads(model, picture_size(processor))
    augment: Any = None
    if images.augmentation == "imagenet":
        augment = ImageNetAugmentation(images.randaugment_layers, images.randaugment_magnitude)
    elif images.augmentation == "gentle":
        augment = GentleAugmentation()
    permutation = None
    if images.permute == "pixels":
        permute_pixels(model, picture_size(processor), images.permute_seed)
    elif images.permute == "pixels_and_positions":
        permutation = moving_permutation(model, picture_size(processor), images.permute_seed)
    return ImageTrainer(
        model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,  # saved with every checkpoint
        data_collator=PictureCollator(processor, len(classes), permutation),
        train_collator=TrainingCollator(
            processor,
            len(classes),
            permutation,
            augment=augment,
            mix=images.mix,
            mixup_alpha=images.mixup_alpha,
            smoothing=arguments.label_smoothing_factor,
        ),
        **options,
    )


# --- what is read


def read_pictures(images: ImageArguments, seed: int, smoke_test: bool = False) -> tuple[Any, Any]:
    """The data to train on and to evaluate on; made-up pictures in a smoke test without any."""
    if images.image_folder:
        return read_folder(
            images.image_folder,
            held_out_share=images.held_out_share,
            seed=seed,
            max_unreadable_share=images.max_unreadable_share,
            check=images.check_images,
        )
    if images.dataset == "digits":
        return read_digits()
    if images.dataset:
        return read_named(images.dataset)
    if smoke_test:
        return made_up_pictures()
    raise ValueError("give --image_folder or --dataset; --smoke_test makes up some pictures")


def open_processor(name: str | None, image_size: int | None, dataset: str | None = None, **options: Any) -> Any:
    """A trained model's image processor, or ImageNet's for fresh weights, for pictures of this size; it is saved beside
    the weights. With its centre crop it keeps the shares: 224 of 256, 384 of 439.
    """
    processor: Any
    if name is None:
        processor = train_digits.image_processor() if dataset == "digits" else PerceiverImageProcessorPil()
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(model_folder(name), **options)
        except OSError as error:
            raise ValueError(
                f"{name} has no image processor beside its weights: take a model of images, or save the one it was trained "
                "with there"
            ) from error
    if image_size is not None:
        height, width = picture_size(processor)
        crop = dict(processor.crop_size)
        processor.crop_size = {
            "height": round(crop["height"] * image_size / height),
            "width": round(crop["width"] * image_size / width),
        }
        processor.size = {"height": image_size, "width": image_size}
    return processor


def picture_size(processor: Any) -> tuple[int, int]:
    """(height, width) that the processor makes of every picture; ValueError where it makes no one size."""
    size = dict(getattr(processor, "size", None) or {})
    if not size.get("height") or not size.get("width"):
        raise ValueError(
            f"{type(processor).__name__} gives pictures of different sizes, {size}; set its height and width"
        )
    return size["height"], size["width"]


# --- the model


def open_classifier(
    models: ModelArguments, classes: Sequence[str], size: tuple[int, int], *, resize: bool = False, train: bool = True
) -> PerceiverIOForImageClassification:
    """A model for these classes that reads pictures of (height, width): trained weights or fresh ones.

    Fresh weights get positions for that size; trained ones are fitted to it with `resize`. A trained head is kept where it
    has as many classes, else it is drawn anew, which is for training only.
    """
    named: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        "problem_type": "single_label_classification",
    }
    head = PerceiverIOForImageClassification
    if models.model is None:
        if models.architecture:
            config = fresh_config(models.architecture, models.config_overrides)
            if "preprocessor" not in json.loads(models.config_overrides or "{}"):
                named["preprocessor"] = sized_preprocessor(config.preprocessor, size)
        model = open_model(head, models, **named)
    else:
        before = _config(models).num_labels
        if before != len(classes):
            if not train:
                raise ValueError(
                    f"{models.model} knows {before} classes and the data has {len(classes)}; train it on them"
                )
            named["ignore_mismatched_sizes"] = True
        model = open_model(head, models, **named)
        if resize:
            resize_positions(model, size)
    check_reads(model, size)
    return model


def known_order(models: ModelArguments, classes: Sequence[str]) -> list[str]:
    """The classes in the order of a trained model that knows the same names; as they are where it knows others."""
    known = _config(models).id2label
    ordered = [str(known[index]) for index in sorted(known)]
    return ordered if sorted(ordered) == sorted(classes) else list(classes)


def stem_grid(spec: dict[str, Any], size: tuple[int, int]) -> tuple[int, ...]:
    """The grid of features that a preprocessor's stem makes of pictures (height, width)."""
    stem = STEMS.build(spec["stem"]).eval()
    with torch.no_grad():
        return tuple(stem(torch.zeros(1, 3, *size)).shape[1:-1])


def sized_preprocessor(spec: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """A grid preprocessor's spec with positions for pictures of (height, width), for weights that are not trained yet.

    Fourier bands go up to the grid's own resolution, as in the papers; trained positions are as many as its points.
    """
    spec = copy.deepcopy(spec)
    if spec.get("kind") != "grid":
        raise ValueError(
            f"a preprocessor of kind {spec.get('kind')!r} reads no pictures; take an imagenet architecture"
        )
    grid = stem_grid(spec, size)
    for position in _nested(spec.get("position")):
        if position["kind"] == "fourier":
            position["max_resolution"] = list(grid)
        elif position["kind"] == "trainable":
            position.update(num_positions=math.prod(grid), grid=list(grid))
    return spec


def resize_positions(model: PerceiverIOForImageClassification, size: tuple[int, int]) -> None:
    """Make a trained model read pictures of (height, width), weights and config.

    Trained positions are interpolated once, bicubically, so that what is saved needs no interpolate_pos_encoding. Fourier
    codes are left alone: coordinates are spread over [-1, 1] whatever the grid, so that a place in the picture keeps its
    code, while bands up to the new resolution would give every channel another meaning than the one that was learned.
    """
    spec = copy.deepcopy(model.config.preprocessor)
    if spec.get("kind") != "grid":
        raise ValueError(f"a preprocessor of kind {spec.get('kind')!r} has no grid of pixels to resize")
    if any(stem["kind"] == "permuted" and tuple(stem["grid"]) != size for stem in _nested(spec["stem"], "stem")):
        raise ValueError(
            f"the model's pixels are permuted on {spec['stem']['grid']}; that permutation has no other size"
        )
    grid = stem_grid(spec, size)
    module: Any = getattr(model.perceiver.preprocessor, "position", None)
    for position in _nested(spec.get("position")):
        if isinstance(module, TrainablePositionEncoding):
            table = module.embeddings
            code = module.encode(grid, device=table.device, dtype=table.dtype, interpolate=True)
            module.embeddings = nn.Parameter(code.dense(0, code.length)[0].detach().clone())
            module.num_positions, module.grid = math.prod(grid), grid
            position.update(num_positions=module.num_positions, grid=list(grid))
        module = getattr(module, "position", None)
    model.config.preprocessor = spec


def check_reads(model: PerceiverIOForImageClassification, size: tuple[int, int]) -> None:
    """Raise ValueError for a model that does not read pictures (3, height, width)."""
    preprocessor: Any = model.perceiver.preprocessor
    like = next(model.parameters())
    before = preprocessor.training
    try:
        with torch.no_grad():
            preprocessor.eval()(torch.zeros(1, 3, *size, device=like.device))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the model does not read pictures of {size[0]}x{size[1]} pixels: {error}. Give the --image_size that it reads "
            "or is to be fitted to, and a model of images"
        ) from error
    finally:
        preprocessor.train(before)


def permute_pixels(model: PerceiverIOForImageClassification, size: tuple[int, int], seed: int) -> None:
    """Put one permutation of the pixels before the model's stem, into weights and config: whoever loads it has it too."""
    preprocessor: Any = model.perceiver.preprocessor
    if isinstance(preprocessor.stem, PermutedStem):
        raise ValueError("the model's pixels are permuted already; leave --permute out to go on with that permutation")
    inner = preprocessor.stem
    spec = {"kind": "permuted", "stem": model.config.preprocessor["stem"], "grid": list(size), "seed": seed}
    preprocessor.stem = STEMS.build(spec).to(next(model.parameters()).device)
    preprocessor.stem.stem = inner
    model.config.preprocessor = {**model.config.preprocessor, "stem": spec}


def moving_permutation(model: PerceiverIOForImageClassification, size: tuple[int, int], seed: int) -> Tensor:
    """A permutation (H * W,) of pixels that take their positions along: to a Perceiver the same pictures.

    Raises ValueError for a stem that makes of pixels anything but one element each, and for positions without coordinates.
    """
    preprocessor: Any = model.perceiver.preprocessor
    position: Any = preprocessor.position
    while hasattr(position, "position"):
        position = position.position
    if not isinstance(position, FourierPositionEncoding):
        raise ValueError(
            "--permute pixels_and_positions takes Fourier positions, which have coordinates; trained ones are by their place "
            "alone: with them --permute pixels is that experiment"
        )
    if stem_grid(model.config.preprocessor, size) != size:
        raise ValueError(
            "--permute pixels_and_positions takes a stem that reads every pixel by itself, not one of patches"
        )
    return draw_permutation(math.prod(size), seed)


def _config(models: ModelArguments) -> Any:
    return AutoConfig.from_pretrained(
        model_folder(str(models.model)), revision=models.revision, trust_remote_code=models.trust_remote_code
    )


def _nested(spec: dict[str, Any] | None, name: str = "position") -> list[dict[str, Any]]:
    """A spec and those within it, outermost first."""
    found = []
    while spec:
        found.append(spec)
        spec = spec.get(name)
    return found


# --- the command


def train(models: ModelArguments, images: ImageArguments, arguments: ImageTrainingArguments) -> dict[str, float]:
    """Run the recipe; -> its metrics, which are written to output_dir with the model and its image processor."""
    resume = start(arguments)
    made_up = arguments.smoke_test and not (models.model or models.architecture or images.dataset)
    if made_up:
        models = ModelArguments(architecture="imagenet_fourier", freeze_encoder=models.freeze_encoder)
    size = images.image_size
    if arguments.smoke_test and models.architecture:
        fresh_config(models.architecture, models.config_overrides)  # what is wrong there is told in the user's words
        models = copy.copy(models)
        models.config_overrides = json.dumps({**SMOKE_CONFIG, **json.loads(models.config_overrides or "{}")})
        size = size or SMOKE_SIZE
    train_set, held_out = read_pictures(images, arguments.seed, arguments.smoke_test)
    classes = check_pictures(train_set, held_out)
    if models.model:
        classes = known_order(models, classes)
        train_set, held_out = in_order(train_set, classes), in_order(held_out, classes)
    options = {"revision": models.revision, "trust_remote_code": models.trust_remote_code} if models.model else {}
    processor = open_processor(models.model, size, images.dataset, **options)
    model: Any
    if images.dataset == "digits" and not (models.model or models.architecture):
        config = train_digits.digits_config()
        config.problem_type = "single_label_classification"
        if size is not None:
            config.preprocessor = sized_preprocessor(config.preprocessor, (size, size))
        model = PerceiverIOForImageClassification(config)
        if models.freeze_encoder:
            model.freeze_encoder()
    else:
        model = open_classifier(
            models, classes, picture_size(processor), resize=size is not None, train=arguments.do_train
        )
    trainer = image_trainer(model, processor, arguments, train_set, held_out, images)
    return run(trainer, resume)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    kinds = (ModelArguments, ImageArguments, ImageTrainingArguments)
    models, images, training = parse(kinds, arguments, __doc__.split("\n")[0])
    return train(models, images, training)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
