"""The head of several tasks; the other heads of text are tested in test_modeling_perceiver_io.py and test_trainer.py."""

import pytest
import torch
import torch.nn.functional as F
from helpers import text_inputs, tiny, trainable
from transformers import AutoModel, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from hf_perceiver import PerceiverIOForMaskedLM, PerceiverIOModel, recipes
from hf_perceiver.heads_text import PerceiverIOForMultitaskSequenceClassification as Multitask
from hf_perceiver.heads_text import multitask_loss

TASKS = {"grade": [], "mood": ["good", "bad"], "topic": ["a", "b", "c"]}
GRADE, MOOD, TOPIC = range(3)
# Ten examples of mixed tasks, one of them without a label.
TASK_IDS = torch.tensor([TOPIC, GRADE, MOOD, GRADE, TOPIC, MOOD, TOPIC, GRADE, MOOD, TOPIC])
LABELS = torch.tensor([2.0, 3.5, 1.0, -0.25, 0.0, 0.0, -100.0, 4.0, 1.0, 1.0])


def model_of(*, at_first_token: bool = False, large: bool = True, **changes) -> Multitask:
    post = {"kind": "multitask", "tasks": TASKS, "hidden": 12, "at_first_token": at_first_token}
    return tiny("language").model(Multitask, large=large, postprocessor=post, **changes)


def inputs_of(batch: int = 10) -> dict:
    return tiny("language").inputs(batch)


VARIANTS = pytest.mark.parametrize("at_first_token", [False, True], ids=["query", "first_token"])


# What is asked


@VARIANTS
def test_asking_for_one_task_gives_its_row_of_all_answers(at_first_token):
    """1e-5: float32, one query at a time and three."""
    model, inputs = model_of(at_first_token=at_first_token), inputs_of()
    with torch.no_grad():
        everything = model(**inputs).logits  # (10, 3, 3)
        own = model(**inputs, task_ids=TASK_IDS.int()).logits
    assert everything.shape == (10, 3, 3) and own.shape == (10, 3)
    torch.testing.assert_close(own, everything[torch.arange(10), TASK_IDS], rtol=1e-5, atol=1e-5)
    assert (own.isfinite().sum(dim=1) == torch.tensor([1, 2, 3])[TASK_IDS]).all()
    assert model.tasks == ["grade", "mood", "topic"]


def test_each_task_has_a_query_of_its_own():
    model, inputs = model_of(), inputs_of()
    before = model(**inputs).logits
    with torch.no_grad():
        model.perceiver.output_query.task_queries[MOOD] *= -1  # a constant would be gone after the norm
    changed = (model(**inputs).logits != before) & before.isfinite()
    assert changed[:, MOOD, :2].all() and not changed[:, [GRADE, TOPIC]].any()


def test_at_the_first_token_its_place_alone_is_asked():
    """The queries are the language model's; all but the first may be anything."""
    model, inputs = model_of(at_first_token=True), inputs_of()
    before = model(**inputs).logits
    rows = model.perceiver.output_query.position.embeddings
    with torch.no_grad():
        rows[1:] *= -1
    assert torch.equal(model(**inputs).logits, before)
    with torch.no_grad():
        rows[0] *= -1
    assert not torch.equal(model(**inputs).logits, before)


@VARIANTS
def test_it_starts_from_a_language_model(at_first_token, tmp_path):
    """From the first token's place all but the heads is there; queries by task are new, as wide as the decoder's."""
    language = tiny("language").model(PerceiverIOForMaskedLM)
    language.save_pretrained(tmp_path)
    post = {"kind": "multitask", "tasks": TASKS, "at_first_token": at_first_token}
    model, found = Multitask.from_pretrained(tmp_path, postprocessor=post, output_loading_info=True)
    new = {name.split(".")[1] for name in found["missing_keys"]}
    assert new == ({"postprocessor"} if at_first_token else {"postprocessor", "output_query"})
    weights = language.state_dict()
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items() if n not in found["missing_keys"])


def test_without_tasks_it_says_how_to_name_them():
    with pytest.raises(ValueError, match=r'needs to know its tasks: .*"kind": "multitask", "tasks"'):
        tiny("language").model(Multitask)


def test_a_first_token_that_has_no_place_cannot_be_asked():
    text = {"kind": "text", "channels": 12, "position": None}
    with pytest.raises(ValueError, match="at_first_token asks at a position"):
        model_of(at_first_token=True, preprocessor=text, output_query=None)


@VARIANTS
def test_config_json_rebuilds_it(at_first_token, tmp_path):
    model, inputs = model_of(at_first_token=at_first_token), inputs_of()
    model.save_pretrained(tmp_path)
    again = Multitask.from_pretrained(tmp_path)
    assert again.config.postprocessor == model.config.postprocessor
    assert again.config.output_query == model.config.output_query
    assert again.tasks == model.tasks
    own = model(**inputs, task_ids=TASK_IDS).logits
    torch.testing.assert_close(again(**inputs, task_ids=TASK_IDS).logits, own, rtol=1e-5, atol=1e-5)
    whole = AutoModel.from_pretrained(tmp_path)  # without the head's choice of queries
    assert isinstance(whole, PerceiverIOModel)
    torch.testing.assert_close(whole(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["glue_multitask_query", "glue_shared_token", "glue_task_tokens"])
def test_the_papers_glue_models_answer_eight_tasks_of_up_to_three_classes(name):
    config = getattr(recipes, name)()
    assert Multitask._claim(config) is config, "it has this head's output side"
    with torch.device("meta"):
        model = Multitask(config).eval()
        with torch.no_grad():
            logits = model(torch.zeros(1, 30, dtype=torch.long)).logits
    assert logits.shape == (1, 8, 3)
    assert model.tasks == list(recipes.GLUE_TASKS)  # ordered as in the paper's table 14


# The loss


def by_hand(logits: torch.Tensor) -> torch.Tensor:
    """One example at a time."""
    losses = []
    for row, task, label in zip(logits, TASK_IDS, LABELS, strict=True):
        if label == -100:
            continue
        if task == GRADE:
            losses.append((row[0] - label) ** 2)
        else:
            count = 2 if task == MOOD else 3
            losses.append(F.cross_entropy(row[:count], label.long()))
    return torch.stack(losses).mean()


@VARIANTS
def test_the_loss_is_the_mean_over_the_examples_of_all_tasks(at_first_token):
    model = model_of(at_first_token=at_first_token)
    out = model(**inputs_of(), task_ids=TASK_IDS, labels=LABELS)
    torch.testing.assert_close(out.loss, by_hand(out.logits))
    whole = LABELS.where(TASK_IDS != GRADE, 3).long()  # numbers may be whole, and of an integer type
    assert torch.equal(
        model(**inputs_of(), task_ids=TASK_IDS, labels=whole).loss,
        model(**inputs_of(), task_ids=TASK_IDS, labels=whole.float()).loss,
    )


def test_num_items_divides_the_sum():
    out = model_of()(**inputs_of(), task_ids=TASK_IDS, labels=LABELS)
    again = model_of()(**inputs_of(), task_ids=TASK_IDS, labels=LABELS, num_items_in_batch=torch.tensor(18))
    torch.testing.assert_close(again.loss, out.loss / 2)  # nine of the ten are labelled


@pytest.mark.parametrize("task", [GRADE, MOOD])
def test_a_batch_of_one_kind_of_task_has_gradients_without_nan(task):
    """Scores that a task has not are -inf, and 0 times infinity would be NaN."""
    model = model_of().train()
    ids, labels = torch.full((10,), task), torch.arange(10) % 2.0
    model(**inputs_of(), task_ids=ids, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values()), "each one, for DDP counts them"
    other = {GRADE: "topic", MOOD: "grade"}[task]
    assert all(not g.any() for name, g in gradients.items() if f"tasks.{other}" in name)


def test_half_precision_scores_are_compared_in_float32():
    logits = torch.tensor([[100.0, -torch.inf, -torch.inf], [1.0, 2.0, -torch.inf]], dtype=torch.bfloat16)
    loss = multitask_loss(logits, torch.tensor([99.5, 1.0]), torch.tensor([GRADE, MOOD]), [0, 2, 3])
    want = (0.5**2 + F.cross_entropy(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))) / 2
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_ids": None}, r"labels need task_ids \(batch,\) beside them, places in grade, mood, topic"),
        ({"task_ids": TASK_IDS + 1}, "task id 3 is unknown; the tasks are 0 grade, 1 mood, 2 topic"),
        ({"task_ids": TASK_IDS[:4]}, r"task_ids are one integer for each of 10 examples, not \(4,\)"),
        ({"task_ids": TASK_IDS.float()}, r"not \(10,\) torch.float32"),
        ({"labels": LABELS[:, None]}, r"labels have the shape \(10,\) here, not \(10, 1\)"),
        ({"labels": LABELS + 1.5}, "label 3.5 of topic is not a class from 0 to 2; -100 marks what has no label"),
        ({"labels": LABELS.where(TASK_IDS != MOOD, 2)}, "label 2 of mood is not a class from 0 to 1"),
        ({"labels": LABELS.where(TASK_IDS != GRADE, torch.nan)}, "label nan of grade is not a number"),
    ],
)
def test_bad_task_ids_and_labels_are_named(changes, message):
    given = {"task_ids": TASK_IDS, "labels": LABELS, **changes}
    with pytest.raises(ValueError, match=message):
        model_of()(**inputs_of(), **given)


# Training


def data_of(count: int = 8) -> list[dict]:
    batch = {**inputs_of(count), "task_ids": TASK_IDS[:count], "labels": LABELS[:count]}
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def trainer_of(model, folder, data, **changes) -> Trainer:
    fields = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels", "task_ids"],
    }
    arguments = TrainingArguments(str(folder), **{**fields, **changes})
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def test_trainer_finds_the_labels():
    assert find_labels(Multitask) == ["labels"]
    assert Multitask.main_input_name == "input_ids"


@pytest.mark.medium
@VARIANTS
def test_accumulated_batches_give_the_gradient_of_one_large_batch(at_first_token, tmp_path):
    """One step of plain gradient descent at rate 1: what changes in the weights is the gradient. Seven of eight examples are
    labelled, so that a mean of means would be another. 1e-5 of the largest entry: float32, summed in another order.
    """
    steps = []
    for size, accumulated in ((8, 1), (2, 4)):
        model = model_of(at_first_token=at_first_token).train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = trainer_of(
            model,
            tmp_path,
            data_of(),
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        )
        trainer.train()
        steps.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
    largest = max(step.abs().max() for step in steps[0].values())
    assert largest > 1e-3
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], step, rtol=0, atol=1e-5 * largest.item(), msg=name)


@pytest.mark.medium
@VARIANTS
def test_a_fixed_batch_is_learned_by_heart(at_first_token, tmp_path):
    model = model_of(at_first_token=at_first_token, large=False).train()
    trainer = trainer_of(model, tmp_path, data_of(), max_steps=40, learning_rate=1e-2, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1  # from 2.4; the best that knows the task alone is at 1.9


def test_evaluation_returns_scores_labels_and_tasks(tmp_path):
    model, data = model_of(), data_of(6)
    found = trainer_of(model, tmp_path, data, per_device_eval_batch_size=4).predict(data)
    assert found.predictions.shape == (6, 3)
    labels, ids = found.label_ids
    assert torch.equal(torch.tensor(labels), LABELS[:6]) and torch.equal(torch.tensor(ids), TASK_IDS[:6])
    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found.predictions), model(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.medium
def test_it_is_exported_with_its_loss():
    model, inputs = model_of(), inputs_of()
    exported = torch.export.export(
        model, (), kwargs={**inputs, "task_ids": TASK_IDS, "labels": LABELS}, strict=False
    ).module()
    out, want = (m(**inputs, task_ids=TASK_IDS, labels=LABELS) for m in (exported, model))
    torch.testing.assert_close(out["loss"], want.loss)


def test_a_concatenated_input_is_part_of_the_first_tokens_query():
    """Queries that hold the token itself, as the bundled language model's, tell the tasks' tokens apart by themselves."""
    query = {"kind": "position", "position": trainable(12, 12), "use_input_mask": True, "concat_input": True}
    text = {"kind": "text", "channels": 12, "position": trainable(12, 12), "combine": "concat"}
    model = model_of(at_first_token=True, preprocessor=text, output_query=query)
    assert model.perceiver.output_query.channels == 24
    assert model(**text_inputs(3), task_ids=TASK_IDS[:3]).logits.shape == (3, 3)
