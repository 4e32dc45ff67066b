"""The recipes' common ground: options, LAMB and its schedules, models to start from, runs that are taken up again."""

import json
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from pytorch_optimizer import Lamb
from torch.utils.data import Dataset

from hf_perceiver import PerceiverIOForImageClassification, PerceiverIOForSequenceClassification, bundled_checkpoint
from hf_perceiver.training.recipe import (
    ModelArguments,
    RecipeArguments,
    RecipeTrainer,
    check_output,
    check_weights_come_whole,
    fresh_config,
    last_checkpoint,
    learning_curve,
    model_folder,
    open_model,
    optimizer_of,
    parse,
    run,
    save_final,
)
from hf_perceiver.training.train_digits import digits_config, image_processor


class Noise(Dataset):
    """Twelve pictures of noise with labels, the same each time."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {
            "pixel_values": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index)),
            "labels": index % 10,
        }


def arguments(folder, **options):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True, "report_to": []}
    return RecipeArguments(output_dir=str(folder), disable_tqdm=True, **{**defaults, **options})


def trainer(folder, **options):
    torch.manual_seed(0)
    model = PerceiverIOForImageClassification(small_config())
    return RecipeTrainer(model, args=arguments(folder, **options), train_dataset=Noise(), eval_dataset=Noise())


def small_config():
    config = digits_config()
    config.update({"num_latents": 4, "num_blocks": 1, "cross_attend_before_blocks": [0]})
    return config


def rates(folder, steps, **options):
    """The learning rate of each of `steps` steps."""
    made = trainer(folder, max_steps=steps, learning_rate=1.0, **options)
    made.create_optimizer_and_scheduler(steps)
    found = []
    for _ in range(steps):
        found.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.lr_scheduler.step()
    return found


def test_lamb_decays_neither_biases_nor_norms(tmp_path):
    made = trainer(tmp_path, weight_decay=0.1)
    made.create_optimizer()
    assert isinstance(made.optimizer, Lamb)
    decayed, kept = ({id(p) for p in group["params"]} for group in made.optimizer.param_groups)
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.1, 0.0]
    assert not any("norm" in names[p] or names[p].endswith("bias") for p in decayed)
    assert all("norm" in names[p] or names[p].endswith("bias") for p in kept)
    assert len(decayed) + len(kept) == len(names)


@pytest.mark.parametrize(("weight_decay", "bound"), [(0.0, 1e-3), (0.1, 0.1)])
def test_lamb_steps_as_the_paper_writes_it(tmp_path, weight_decay, bound):
    """LAMB (arXiv 1904.00962), algorithm 2, in float64; a matrix of norm 24, where pytorch-optimizer's own is off by half.

    It corrects the bias of the first moment alone. That cancels in the trusted update but for the decay, which weighs less
    in the first steps: 0.05 after these 40.
    """
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(200, 300, dtype=torch.float64, generator=generator)
    gradients = [torch.randn(200, 300, dtype=torch.float64, generator=generator) for _ in range(40)]
    kind, options = optimizer_of(arguments(tmp_path, learning_rate=2e-3, adam_epsilon=1e-6))
    weight = torch.nn.Parameter(start.clone())
    optimizer = kind([weight], weight_decay=weight_decay, **options)
    wanted, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for step, gradient in enumerate(gradients, 1):
        weight.grad = gradient.clone()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-6)
        update = corrected + weight_decay * wanted
        wanted = wanted - 2e-3 * wanted.norm() / update.norm() * update
    assert (weight.detach() - wanted).norm() < bound * (wanted - start).norm()


def test_adamw_is_torchs(tmp_path):
    made = trainer(tmp_path, optimizer="adamw", learning_rate=0.5, adam_beta2=0.98)
    made.create_optimizer()
    assert type(made.optimizer) is torch.optim.AdamW
    assert made.optimizer.defaults["lr"] == 0.5 and made.optimizer.defaults["betas"] == (0.9, 0.98)


def test_cosine_begins_after_the_warm_up(tmp_path):
    assert rates(tmp_path, 10, warmup_steps=2)[:3] == [0.0, 0.5, 1.0]
    assert rates(tmp_path, 10, warmup_steps=2)[6] == pytest.approx(0.5)  # half-way down the cosine of eight steps


def test_flat_share_holds_the_rate_before_the_cosine(tmp_path):
    found = rates(tmp_path, 10, flat_share=0.5)
    assert found[:6] == [1.0] * 6
    assert found[6:] == sorted(found[6:], reverse=True) and 0 < found[-1] < 0.2


def test_a_run_writes_model_processor_metrics_and_curve(tmp_path, capsys):
    made = trainer(tmp_path / "run")
    metrics = run(made, None, saved=[image_processor()])
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "metrics.json",
        "learning_curve.csv",
    } <= written
    assert ".final.tmp" not in written
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert metrics["eval_loss"] > 0 and "eval_loss:" in capsys.readouterr().out
    loaded = PerceiverIOForImageClassification.from_pretrained(tmp_path / "run")
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_broken_off_run_goes_on_from_its_last_whole_checkpoint(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = trainer(straight, max_steps=6)
    run(whole, None)
    run(trainer(broken, max_steps=6, save_steps=2), None)
    # As if the machine had stopped while step 6 was being written.
    (broken / "checkpoint-6" / "trainer_state.json").unlink()
    resumed = arguments(broken, max_steps=6, resume_from_checkpoint="last")
    where = check_output(resumed)
    assert where == str(broken / "checkpoint-4")
    again = trainer(broken, max_steps=6)
    run(again, where)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_the_newest_whole_checkpoint_is_the_last(tmp_path):
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_disk_that_fills_up_keeps_what_was_written_and_says_so(tmp_path, monkeypatch):
    made = trainer(tmp_path, save_steps=2)
    save = made._save_optimizer_and_scheduler

    def full(folder):
        if folder.endswith("checkpoint-4"):
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(made, "_save_optimizer_and_scheduler", full)
    with pytest.raises(
        OSError, match=r"checkpoint-4 could not be written .*No space.*checkpoint-2 is whole.*Make room"
    ):
        run(made, None)
    assert not (tmp_path / "checkpoint-4").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_too_little_room_is_found_before_the_first_step(tmp_path, monkeypatch):
    made = trainer(tmp_path, save_steps=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"0.0 GB free; 3 checkpoints .*lower save_total_limit"):
        run(made, None)
    assert made.state.global_step == 0


def test_shards_that_would_never_be_joined_are_refused():
    check_weights_come_whole(None)
    check_weights_come_whole(SimpleNamespace(state_dict_type="StateDictType.FULL_STATE_DICT"))
    with pytest.raises(ValueError, match=r"SHARDED_STATE_DICT leaves no weights to load; set FULL_STATE_DICT"):
        check_weights_come_whole(SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT"))


def test_a_final_save_that_fails_leaves_no_half_model(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space")

    made = trainer(tmp_path)
    with pytest.raises(OSError, match="no space"):
        save_final(made, [Broken()])
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        check_output(arguments(tmp_path))
    assert check_output(arguments(tmp_path, do_train=False)) is None


def test_nothing_to_go_on_from_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint to go on from"):
        check_output(arguments(tmp_path, resume_from_checkpoint="last"))
    with pytest.raises(ValueError, match=r"is no whole checkpoint; it lacks trainer_state.json"):
        check_output(arguments(tmp_path, resume_from_checkpoint=str(tmp_path)))


def test_overrides_change_a_published_architecture():
    config = fresh_config("language_bytes", '{"num_latents": 8}', num_self_attends_per_block=2)
    assert (config.num_latents, config.num_self_attends_per_block, config.d_latents) == (8, 2, 1280)


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("imagenet", None, r"architecture 'imagenet' is not known; there are: .*imagenet_conv.*language_bytes"),
        ("language_bytes", "{num_latents: 8}", "is not JSON"),
        ("language_bytes", '{"latents": 8}', r"\['latents'\] are no fields of the config; there are: .*num_latents"),
        ("language_bytes", "[8]", "are no fields of the config"),
        ("annotations", None, "is not known"),
    ],
)
def test_architectures_that_cannot_be_built_are_named(architecture, overrides, message):
    with pytest.raises(ValueError, match=message):
        fresh_config(architecture, overrides)


def test_a_trained_model_gets_a_new_head():
    model = open_model(PerceiverIOForSequenceClassification, ModelArguments(model="bundled:language"), num_labels=3)
    assert model.config.num_labels == 3
    assert model_folder("bundled:language") == bundled_checkpoint("language")
    assert model_folder("someone/model") == "someone/model"


def test_a_checkpoint_without_the_encoders_weights_is_of_another_architecture(tmp_path):
    model = PerceiverIOForImageClassification(small_config())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_self_attends_per_block": 9}))
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the encoder .*of another architecture"):
        open_model(PerceiverIOForImageClassification, ModelArguments(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "a", "architecture": "b"}, "not both"),
        ({"model": "a", "config_overrides": "{}"}, "keeps its own config"),
    ],
)
def test_sources_of_weights_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**options)
    with pytest.raises(ValueError, match="give --model to start from trained weights, or --architecture"):
        open_model(PerceiverIOForImageClassification, ModelArguments())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flat_share": 1.0}, "flat_share=1.0 is a share"),
        ({"flat_share": 0.5, "lr_scheduler_type": "linear"}, "flat_share goes with the cosine"),
        ({"output_dir": None}, "give --output_dir"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RecipeArguments(**{"output_dir": str(tmp_path), **options})


@dataclass
class Own:
    """A recipe's own options."""

    words: int = field(default=3, metadata={"help": "how many words"})


def test_options_come_from_the_command_line_or_from_one_file(tmp_path):
    own, given = parse([Own, RecipeArguments], ["--words", "5", "--output_dir", "x", "--optimizer", "adamw"], "about")
    assert own.words == 5 and given.optimizer == "adamw" and given.do_train
    (tmp_path / "options.json").write_text(json.dumps({"words": 7, "output_dir": "y", "flat_share": 0.5}))
    own, given = parse([Own, RecipeArguments], [str(tmp_path / "options.json")], "about")
    assert own.words == 7 and given.flat_share == 0.5


def test_help_names_the_recipes_options_and_trainers(capsys):
    with pytest.raises(SystemExit):
        parse([Own, ModelArguments, RecipeArguments], ["--help"], "about words")
    text = capsys.readouterr().out
    assert all(
        name in text for name in ("about words", "--words", "--architecture", "--flat_share", "--bf16", "--fsdp")
    )


def test_a_smoke_test_is_short(tmp_path):
    short = arguments(tmp_path, smoke_test=True, max_steps=1000, per_device_train_batch_size=64)
    assert short.max_steps <= 10 and short.per_device_train_batch_size <= 4


def test_learning_curve_has_one_row_per_logged_step():
    history = [
        {"step": 1, "loss": 2.0, "epoch": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5, "eval_runtime": 3},
    ]
    assert learning_curve(history).splitlines() == ["step,epoch,eval_loss,loss", "1,0.5,,2.0", "2,,1.5,1.0"]
