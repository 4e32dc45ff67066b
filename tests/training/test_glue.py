"""Fine-tuning on GLUE, on made-up files in its format, with a language model of two layers."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction

from hf_perceiver import PerceiverIOConfig, PerceiverIOForMaskedLM, PerceiverIOModel, PerceiverIOTokenizer
from hf_perceiver.recipes import GLUE_TASKS
from hf_perceiver.training import glue
from hf_perceiver.training.glue_data import TASKS, Example, write_made_up
from hf_perceiver.training.recipe import ModelArguments

TINY = {
    "num_latents": 4,
    "d_latents": 16,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "qk_channels": None,
    "v_channels": None,
    "decoder_num_heads": 1,
    "decoder_qk_channels": None,
    "decoder_v_channels": None,
    "preprocessor": {
        "kind": "text",
        "channels": 16,
        "position": {"kind": "trainable", "num_positions": 64, "channels": 16},
    },
    "output_query": {
        "kind": "position",
        "position": {"kind": "trainable", "num_positions": 64, "channels": 16},
        "use_input_mask": True,
    },
}
FEW = ["CoLA", "MNLI", "STS-B"]


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> str:
    """A language model's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    PerceiverIOForMaskedLM(PerceiverIOConfig(**TINY)).save_pretrained(folder)
    PerceiverIOTokenizer(model_max_length=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_made_up(tmp_path_factory.mktemp("glue"), rows=8))


def command(output, *options: str, steps: int = 2) -> dict[str, float]:
    fixed = f"--max_steps {steps} --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --warmup_steps 1"
    return glue.main(["--output_dir", str(output), *fixed.split(), "--use_cpu", "--disable_tqdm", "True", *options])


def opened(language: str, variant: str, tasks=tuple(TASKS)):
    """(model, tokenizer, first tokens) as the command opens them."""
    arguments = ModelArguments(model=language)
    config = glue.source_config(arguments)
    tokenizer = glue.open_tokenizer(arguments, config)
    model, first = glue.open_glue_model(arguments, variant, tasks, tokenizer, config)
    return model, tokenizer, first


# The command


@pytest.mark.medium
@pytest.mark.parametrize("variant", ["query", "shared_token", "task_token"])
def test_one_model_learns_three_tasks_and_answers_their_tests(variant, language, data, tmp_path, capsys):
    options = ["--model", language, "--data_dir", data, "--variant", variant, "--tasks", *FEW]
    metrics = command(tmp_path / "run", *options, "--do_predict")
    names = ["CoLA_matthews", "MNLI-m_accuracy", "MNLI-mm_accuracy", "STS-B_pearson"]
    cola, matched, mismatched, sts = (metrics[f"eval_{name}"] for name in names)
    assert metrics["eval_average"] == pytest.approx((cola + (matched + mismatched) / 2 + sts) / 3)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["eval_average"] == metrics["eval_average"]
    assert "average  3 tasks" in capsys.readouterr().out
    written = sorted((tmp_path / "run" / "predictions").iterdir())
    assert [path.name for path in written] == ["CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "STS-B.tsv"]
    assert all(len(path.read_text().splitlines()) == 9 for path in written)
    # What was trained is measured again, from its own folder: the same figures, the weights being in float32.
    again = ["--model", str(tmp_path / "run"), "--data_dir", data, "--variant", variant, "--tasks", "STS-B"]
    second = command(tmp_path / "again", *again, "--no_do_train")
    assert second["eval_STS-B_loss"] == pytest.approx(metrics["eval_STS-B_loss"], rel=1e-5)
    whole = AutoModel.from_pretrained(tmp_path / "run")
    assert isinstance(whole, PerceiverIOModel) and whole.postprocessor.names == FEW
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == (265 if variant == "task_token" else 262)


@pytest.mark.medium
@pytest.mark.parametrize(("task", "labels"), [("MNLI", GLUE_TASKS["MNLI"]), ("STS-B", ["score"])])
def test_a_model_of_one_task_loads_as_any_text_classifier(task, labels, language, data, tmp_path):
    options = ["--model", language, "--data_dir", data, "--variant", "single", "--tasks", task]
    metrics = command(tmp_path / "run", *options)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert list(model.config.id2label.values()) == labels
    assert model.config.problem_type == ("regression" if task == "STS-B" else "single_label_classification")
    assert model.perceiver.postprocessor.hidden.out_features == 16, "the tanh layer, as wide as the query"
    assert metrics["eval_average"] == glue.task_scores(metrics)[task]
    # A task of other classes goes on from it, as RTE does from MNLI: the classifier alone is new.
    command(
        tmp_path / "next", "--model", str(tmp_path / "run"), "--data_dir", data, "--variant", "single", "--tasks", "RTE"
    )


@pytest.mark.medium
def test_a_resumed_mixture_ends_where_the_straight_run_does_bit_for_bit(language, data, tmp_path):
    """Three tasks drawn alike, over the end of an epoch: 24 examples are six steps."""
    options = ["--model", language, "--data_dir", data, "--tasks", *FEW, "--sampling_power", "0", "--no_do_eval"]
    options += ["--save_strategy", "steps", "--save_steps", "4", "--learning_rate", "1e-2"]
    command(tmp_path / "straight", *options, steps=8)
    # The same schedule, broken off after the first checkpoint.
    folder = tmp_path / "resumed"
    (tmp_path / "straight" / "checkpoint-4").rename(tmp_path / "kept")
    folder.mkdir()
    (tmp_path / "kept").rename(folder / "checkpoint-4")
    command(folder, *options, "--resume_from_checkpoint", "last", steps=8)
    straight, resumed = (AutoModel.from_pretrained(tmp_path / name) for name in ("straight", "resumed"))
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.medium
def test_the_smoke_test_needs_neither_data_nor_a_model(tmp_path):
    metrics = glue.main(["--smoke_test", "--output_dir", str(tmp_path), "--use_cpu", "--tasks", "RTE", "STS-B"])
    assert {"eval_RTE_accuracy", "eval_STS-B_pearson", "eval_average"} <= set(metrics)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 128, "the bundled language model's"


def test_runs_are_summed_up_as_in_the_papers_table(tmp_path, capsys):
    """The best run of each task; of MNLI the run with the best mean, not the best of each set."""
    runs = [
        {"eval_RTE_accuracy": 0.6},
        {"eval_RTE_accuracy": 0.7, "eval_average": 0.7},
        {"eval_MNLI-m_accuracy": 0.8, "eval_MNLI-mm_accuracy": 0.6},
        {"eval_MNLI-m_accuracy": 0.75, "eval_MNLI-mm_accuracy": 0.7},
    ]
    for index, metrics in enumerate(runs):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "metrics.json").write_text(json.dumps(metrics))
    scores = glue.main(["--summarize", "--variant", "single", "--output_dir", str(tmp_path)])
    assert scores == pytest.approx({"MNLI": 0.725, "RTE": 0.7})
    assert capsys.readouterr().out.splitlines()[-1] == "average  2 tasks     71.25"
    with pytest.raises(ValueError, match=r"holds no metrics\.json of a GLUE run"):
        glue.summarize(tmp_path / "0" / "deeper")


def test_the_defaults_are_the_papers(tmp_path, language):
    """Perceiver IO, table 13."""
    _, _, training = glue.parse(
        [glue.GlueArguments, ModelArguments, glue.FineTuning], ["--output_dir", str(tmp_path)], ""
    )
    assert (training.num_train_epochs, training.warmup_steps, training.weight_decay) == (10, 200, 0.01)
    assert training.optimizer == "lamb"
    assert training.learning_rate in (1e-4, 5e-5, 2e-5, 1e-5) and training.per_device_train_batch_size in (16, 32, 64)


def test_help_is_whole(capsys):
    with pytest.raises(SystemExit) as stopped:
        glue.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options = (
        "data_dir",
        "tasks",
        "variant",
        "sampling_power",
        "max_bad_share",
        "summarize",
        "model",
        "optimizer",
        "do_predict",
    )
    assert all(f"--{option}" in text for option in options)


# Batches


def batch_of(tokenizer, examples, **options):
    return glue.GlueCollator(tokenizer, 16, **options)(examples)


def test_a_batch_mixes_tasks_texts_and_pairs():
    tokenizer = PerceiverIOTokenizer()
    examples = [Example("CoLA", "ab", None, 1), Example("STS-B", "ab", "c", 2.5)]
    batch = batch_of(tokenizer, examples, task_ids={"CoLA": 0, "STS-B": 1})
    cls, sep, a, b, c = 4, 5, 103, 104, 105  # byte + 6
    assert batch["input_ids"].tolist() == [[cls, a, b, sep, 0, 0], [cls, a, b, sep, c, sep]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["task_ids"].tolist() == [0, 1] and batch["task_ids"].dtype == torch.int64
    assert batch["labels"].tolist() == [1.0, 2.5] and batch["labels"].dtype == torch.float32
    alone = batch_of(tokenizer, examples[:1])
    assert set(alone) == {"input_ids", "attention_mask", "labels"} and alone["labels"].dtype == torch.int64
    assert "labels" not in batch_of(tokenizer, [examples[0]._replace(label=None)])


def test_the_longer_of_a_pair_is_cut():
    tokenizer = PerceiverIOTokenizer()
    pair = Example("RTE", "a" * 40, "b" * 3, 0)
    ids = batch_of(tokenizer, [pair])["input_ids"][0].tolist()
    assert tokenizer.decode(ids) == "[CLS]" + "a" * 10 + "[SEP]bbb[SEP]"


def test_the_tasks_token_stands_where_cls_does():
    tokenizer = PerceiverIOTokenizer()
    ids = batch_of(tokenizer, [Example("RTE", "a", "b", 0)], first_tokens={"RTE": 262})["input_ids"]
    assert ids.tolist() == [[262, 103, 5, 104, 5]]


def test_padding_follows_the_tokenizers_side():
    tokenizer = PerceiverIOTokenizer(padding_side="left")
    batch = batch_of(tokenizer, [Example("CoLA", "abc", None, 0), Example("CoLA", "a", None, 0)])
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]


def test_a_task_that_the_model_has_not_is_named():
    with pytest.raises(ValueError, match="examples of RTE; the model has CoLA"):
        batch_of(PerceiverIOTokenizer(), [Example("RTE", "a", "b", 0)], task_ids={"CoLA": 0})


# The mixture


@pytest.mark.parametrize(("power", "share"), [(0.0, 1 / 2), (0.5, 3 / 4), (1.0, 9 / 10)])
def test_tasks_are_drawn_in_proportion_to_a_power_of_their_sizes(power, share):
    """9,000 examples against 1,000. 0.02 is four standard deviations of 10,000 draws."""
    sampler = glue.MixtureSampler(["large"] * 9000 + ["small"] * 1000, power, seed=0)
    drawn = np.array(list(sampler))
    assert len(drawn) == len(sampler) == 10_000
    assert (drawn < 9000).mean() == pytest.approx(share, abs=0.02)


def test_every_epoch_draws_others_and_a_seed_the_same_again():
    sampler, same = (glue.MixtureSampler(["a"] * 20 + ["b"] * 4, 0.5, seed=3) for _ in range(2))
    first = list(sampler)
    assert first == list(same) == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


# What is measured


def test_scores_become_a_class_of_the_task_or_a_number():
    scores = np.array([[0.5, 0.1, 9.0], [0.1, 0.2, 9.0]])
    assert glue.answers("RTE", scores).tolist() == [0, 1], "the third is no class of RTE"
    assert glue.answers("MNLI", scores).tolist() == [2, 2]
    assert glue.answers("STS-B", scores).tolist() == [0.5, 0.1]


def test_a_set_is_measured_as_the_task_that_its_ids_say():
    scores, labels = np.array([[3.0, 0, 0], [1.0, 0, 0], [2.0, 0, 0]]), np.array([5.0, 1.0, 3.0])
    of = glue.glue_metrics(FEW)
    assert of(EvalPrediction(scores, (labels, np.array([2, 2, 2]))))["pearson"] == pytest.approx(1)
    with pytest.raises(ValueError, match="holds one task, this one holds several"):
        of(EvalPrediction(scores, (labels, np.array([2, 1, 2]))))


# The model


def test_task_tokens_begin_as_the_shared_one(language):
    model, tokenizer, first = opened(language, "task_token")
    assert first == {name: 262 + index for index, name in enumerate(TASKS)}
    assert model.config.vocab_size == len(tokenizer) == 270
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[262:], weight[4].expand(8, -1))
    assert tokenizer("[RTE]").input_ids == [4, first["RTE"], 5]


def test_a_trained_multitask_model_keeps_its_tasks_and_variant(language, tmp_path):
    model, tokenizer, _ = opened(language, "query", ("CoLA", "RTE"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _, _ = opened(str(tmp_path), "query", ("RTE",))
    assert again.tasks == ["CoLA", "RTE"]
    with pytest.raises(ValueError, match="the model's tasks are CoLA, RTE, with other classes or without MNLI"):
        opened(str(tmp_path), "query", ("RTE", "MNLI"))
    with pytest.raises(ValueError, match="made for --variant query, not shared_token"):
        opened(str(tmp_path), "shared_token", ("RTE",))


def test_fresh_weights_of_the_papers_architectures_come_with_the_byte_tokenizer():
    for name, variant in (("language_bytes", "single"), ("glue_task_tokens", "task_token")):
        arguments = ModelArguments(architecture=name, config_overrides=json.dumps(TINY))
        config = glue.source_config(arguments)
        tokenizer = glue.open_tokenizer(arguments, config)
        model, _ = glue.open_glue_model(
            arguments, variant, ["RTE"] if variant == "single" else TASKS, tokenizer, config
        )
        assert model.config.vocab_size == len(tokenizer)
        with pytest.raises(ValueError, match=r"no tokenizer ships for the [\d]+ tokens of .*; give --tokenizer"):
            glue.open_tokenizer(
                ModelArguments(architecture="language_sentencepiece"), PerceiverIOConfig(vocab_size=32_000)
            )


# Bad input


def test_nothing_is_read_before_the_options_are_checked(tmp_path, data):
    with pytest.raises(ValueError, match="--variant single trains one task, not CoLA, RTE"):
        glue.main(["--output_dir", str(tmp_path), "--variant", "single", "--tasks", "CoLA", "RTE"])
    with pytest.raises(ValueError, match=r"tasks \['cola'\]: choose"):
        glue.main(["--output_dir", str(tmp_path), "--tasks", "cola"])
    with pytest.raises(ValueError, match=r"sampling_power=2\.0 is a power from 0 to 1"):
        glue.main(["--output_dir", str(tmp_path), "--sampling_power", "2"])
    with pytest.raises(ValueError, match="give --data_dir, a folder that holds CoLA/, MNLI/"):
        glue.main(["--output_dir", str(tmp_path / "new"), "--model", "bundled:language"])
    with pytest.raises(ValueError, match="give --model to start from trained weights"):
        glue.main(["--output_dir", str(tmp_path / "new"), "--data_dir", data])


def test_a_tokenizer_of_another_vocabulary_is_refused(language, tmp_path):
    tokenizer = PerceiverIOTokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "longer")
    arguments = ModelArguments(model=language)
    config = glue.source_config(arguments)
    with pytest.raises(
        ValueError, match=r"has 263 tokens, .* the model 262, .*Take the one that the model was trained with"
    ):
        glue.open_tokenizer(arguments, config, str(tmp_path / "longer"))
    config.cls_token_id = 5
    with pytest.raises(ValueError, match=r"'cls_token_id': 4.* the model 262, .*'cls_token_id': 5"):
        glue.open_tokenizer(arguments, config)


def test_tokens_need_their_place_and_their_training(language):
    arguments = ModelArguments(model=language)
    config = glue.source_config(arguments)
    bare = PerceiverIOTokenizer(add_cls_and_sep=False)
    with pytest.raises(ValueError, match=r"asks at the place of \[CLS\], and this tokenizer puts none"):
        glue.open_glue_model(arguments, "shared_token", FEW, bare, config)
    with pytest.raises(ValueError, match="trains tokens of the input; leave out --freeze_encoder"):
        frozen = ModelArguments(model=language, freeze_encoder=True)
        glue.open_glue_model(frozen, "task_token", FEW, PerceiverIOTokenizer(), config)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert', another architecture"):
        glue.source_config(ModelArguments(model=str(tmp_path)))
