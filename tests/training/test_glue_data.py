"""GLUE's own files: formats, bad rows, metrics, the paper's average, the server's files."""

import numpy as np
import pytest

from hf_perceiver.training.glue_data import (
    TASKS,
    Example,
    average,
    check_names,
    read_task,
    score,
    task_scores,
    write_made_up,
    write_predictions,
)

# A row of each task's training file as GLUE distributes it: columns and their order, with made-up text; and what it says.
REAL = {
    "CoLA": (None, 'gj04\t0\t*\tThe "quoted boat sank them.', ('The "quoted boat sank them.', None, 0)),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
        "sentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt rains.\tIt is wet.\tneutral\tcontradiction",
        ("It rains.", "It is wet.", 2),
    ),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t702876\t702977\tHe said "no .\tNo , he said .',
        ('He said "no .', "No , he said .", 1),
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        "0\tWho sank?\tThe boat sank.\tnot_entailment",
        ("Who sank?", "The boat sank.", 1),
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tWhy \u2028 us?\tWhy me?\t0",
        ("Why \u2028 us?", "Why me?", 0),
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tA boat sank.\tBoats float.\tentailment",
        ("A boat sank.", "Boats float.", 0),
    ),
    "SST-2": ("sentence\tlabel", "a dull boat \t0", ("a dull boat ", None, 0)),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012test\t0001\tnone\tnone\tA boat.\tA ship.\t3.800",
        ("A boat.", "A ship.", 3.8),
    ),
}


def put(folder, task, file, *lines):
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / file).write_bytes("".join(line + "\n" for line in lines if line is not None).encode())


# Reading


@pytest.mark.parametrize("task", REAL)
def test_a_row_of_the_real_format_is_read(task, tmp_path):
    header, row, (first, second, label) = REAL[task]
    put(tmp_path, task, "train.tsv", header, row, "")
    assert read_task(tmp_path, task, "train") == {task: [Example(task, first, second, label)]}


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path):
    header, row, _ = REAL["MRPC"]
    put(tmp_path, "MRPC", "train.tsv", "\ufeff" + header + "\r", row + "\r")
    (example,) = read_task(tmp_path, "MRPC", "train")["MRPC"]
    assert example.second == "No , he said ."


def test_mnli_has_two_sets_to_measure_on_and_two_to_predict(tmp_path):
    write_made_up(tmp_path, rows=3)
    assert {name: len(rows) for name, rows in read_task(tmp_path, "MNLI", "dev").items()} == {"MNLI-m": 3, "MNLI-mm": 3}
    assert list(read_task(tmp_path, "MNLI", "test")) == ["MNLI-m", "MNLI-mm"]
    assert list(read_task(tmp_path, "MNLI", "train")) == ["MNLI"]


def test_mrpc_is_read_as_its_authors_distribute_it(tmp_path):
    header = REAL["MRPC"][0]
    put(tmp_path, "MRPC", "msr_paraphrase_train.txt", header, "1\t1\t2\ta\tb", "0\t3\t4\tc\td", "1\t5\t6\te\tf")
    put(tmp_path, "MRPC", "msr_paraphrase_test.txt", header, "1\t7\t8\tg\th")
    put(tmp_path, "MRPC", "dev_ids.tsv", "3\t4")
    firsts = {
        split: [e.first for e in read_task(tmp_path, "MRPC", split)["MRPC"]] for split in ("train", "dev", "test")
    }
    assert firsts == {"train": ["a", "e"], "dev": ["c"], "test": ["g"]}
    assert read_task(tmp_path, "MRPC", "test")["MRPC"][0].label is None, "its authors' labels are not for the server"


@pytest.mark.parametrize("task", TASKS)
def test_made_up_files_have_the_real_columns_and_every_class(task, tmp_path):
    write_made_up(tmp_path, rows=12)
    header, row, _ = REAL[task]
    lines = (tmp_path / task / "train.tsv").read_text().splitlines()
    assert len(lines) == 12 + (header is not None)
    assert header is None or lines[0] == header
    assert {line.count("\t") for line in lines} == {row.count("\t")}
    (examples,) = read_task(tmp_path, task, "train").values()
    assert len({example.label for example in examples}) == (6 if task == "STS-B" else 3 if task == "MNLI" else 2)
    for rows in read_task(tmp_path, task, "test").values():
        assert len(rows) == 12 and {example.label for example in rows} == {None}


# Bad files

SST = "sentence\tlabel"


def test_missing_files_are_named_with_what_is_there(tmp_path):
    with pytest.raises(ValueError, match=r"RTE needs its files .*looked for .*RTE/train.tsv; .*RTE is not there"):
        read_task(tmp_path, "RTE", "train")
    put(tmp_path, "MRPC", "msr_paraphrase_train.txt", "x")
    with pytest.raises(
        ValueError,
        match=r"MRPC/train.tsv, or msr_paraphrase_train.txt and dev_ids.tsv; .*MRPC holds msr_paraphrase_train.txt",
    ):
        read_task(tmp_path, "MRPC", "train")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a boat", "line 3: 1 columns instead of 2"),
        ("a\tboat\t1", "line 3: 3 columns instead of 2"),
        ("a boat\t2", "line 3: label '2' is not one of 0, 1"),
        (" \t1", "line 3: sentence is empty"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(row, problem, tmp_path):
    put(tmp_path, "SST-2", "train.tsv", SST, "a boat\t1", row)
    with pytest.raises(
        ValueError, match=rf"SST-2/train.tsv: 1 of 2 rows are bad \({problem}\); mend them, or raise max_bad"
    ):
        read_task(tmp_path, "SST-2", "train")


def test_a_few_bad_rows_are_left_out_and_reported(tmp_path, caplog):
    put(tmp_path, "SST-2", "train.tsv", SST, *["a boat\t1"] * 999, "a boat")
    found = read_task(tmp_path, "SST-2", "train")["SST-2"]
    assert len(found) == 999
    assert "1 bad rows of 1000 are left out (line 1001: 1 columns instead of 2)" in caplog.text
    put(tmp_path, "SST-2", "train.tsv", SST, *["a boat\t1"] * 998, "a boat")
    with pytest.raises(ValueError, match="1 of 999 rows are bad"):  # more than a thousandth
        read_task(tmp_path, "SST-2", "train")


def test_a_byte_that_is_no_text_spoils_its_own_row_only(tmp_path):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_bytes(b"sentence\tlabel\na b\xffat\t1\na boat\t1\n")
    with pytest.raises(ValueError, match="line 2: byte 3 is not UTF-8"):
        read_task(tmp_path, "SST-2", "train")
    assert len(read_task(tmp_path, "SST-2", "train", max_bad_share=0.5)["SST-2"]) == 1


@pytest.mark.parametrize("value", ["5.1", "-0.1", "nan", "high"])
def test_scores_are_from_0_to_5(value, tmp_path):
    header, row, _ = REAL["STS-B"]
    put(tmp_path, "STS-B", "train.tsv", header, row.replace("3.800", value))
    with pytest.raises(ValueError, match=f"score '{value}' is not a number from 0 to 5"):
        read_task(tmp_path, "STS-B", "train")


def test_a_test_set_has_to_be_whole(tmp_path):
    put(tmp_path, "RTE", "test.tsv", "index\tsentence1\tsentence2", *["0\ta\t"] * 2000)
    assert len(read_task(tmp_path, "RTE", "test")["RTE"]) == 2000, "an empty text wants an answer, too"
    put(tmp_path, "RTE", "test.tsv", "index\tsentence1\tsentence2", *["0\ta\tb"] * 2000, "1\tc")
    with pytest.raises(ValueError, match=r"line 2002: 2 columns instead of 3.*a test set has to be whole"):
        read_task(tmp_path, "RTE", "test")


def test_a_file_of_other_columns_and_an_empty_one_are_refused(tmp_path):
    put(tmp_path, "RTE", "train.tsv", "index\tpremise\thypothesis\tlabel", "0\ta\tb\tentailment")
    with pytest.raises(ValueError, match=r"line 1: no column \['sentence1', 'sentence2'\]; it has"):
        read_task(tmp_path, "RTE", "train")
    put(tmp_path, "RTE", "train.tsv", "index\tsentence1\tsentence2\tlabel")
    with pytest.raises(ValueError, match="has no example of RTE for train"):
        read_task(tmp_path, "RTE", "train")


def test_unknown_tasks_and_splits_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"tasks \['WNLI'\]: choose at least one, among CoLA, MNLI,"):
        check_names(["RTE", "WNLI"])
    with pytest.raises(ValueError, match=r"tasks \[\]"):
        check_names([])
    with pytest.raises(ValueError, match="split='valid' must be train, dev or test"):
        read_task(tmp_path, "RTE", "valid")
    assert check_names(["STS-B", "CoLA", "STS-B"]) == ["CoLA", "STS-B"]


# Metrics


def test_metrics_are_those_of_their_definition():
    truth, guess = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1, 1])
    tp, fp, fn, tn = 3, 1, 1, 1
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("CoLA", guess, truth) == pytest.approx({"matthews": matthews, "accuracy": 4 / 6})
    assert score("MRPC", guess, truth) == pytest.approx({"accuracy": 4 / 6, "f1": 2 * tp / (2 * tp + fp + fn)})
    x, y = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.5, 0.0, 3.0, 3.5])
    found = score("STS-B", y, x)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["spearman"] == pytest.approx(0.8)  # ranks 1 2 3 4 against 2 1 3 4: 1 - 6 * 2 / (4 * 15)
    assert score("STS-B", np.ones(4), x) == {"pearson": 0.0, "spearman": 0.0}, "not NaN, which would be the average's"


# Perceiver IO, table 14: each row's figures and the average it prints.
TABLE = {
    "BERT Base (test)": (52.10, (84.60, 83.40), 84.80, 90.50, 89.20, 66.40, 93.50, 87.10, 80.95),
    "Perceiver IO Base": (47.11, (84.53, 85.03), 87.25, 92.12, 90.22, 65.23, 94.38, 88.18, 81.16),
    "Perceiver IO bytes": (50.19, (83.22, 83.89), 87.24, 91.71, 90.12, 64.84, 93.17, 86.81, 80.95),
    "Perceiver IO++": (52.54, (84.13, 84.91), 86.03, 92.06, 90.46, 66.54, 93.98, 87.93, 81.76),
    "shared token": (47.43, (82.03, 82.65), 89.58, 90.18, 89.20, 82.03, 93.17, 77.95, 81.49),
    "task tokens": (49.06, (82.14, 82.64), 89.84, 90.53, 89.40, 79.69, 93.17, 80.02, 81.76),
    "multitask query": (47.88, (82.05, 82.77), 90.36, 90.37, 89.49, 80.08, 93.75, 79.95, 81.79),
}


@pytest.mark.parametrize("row", TABLE)
def test_the_average_is_the_papers(row):
    """From its own figures: MNLI's two first, then the eight tasks. 0.011: they are rounded to two digits."""
    *figures, printed = TABLE[row]
    metrics = {}
    for (_, of), figure in zip(TASKS.items(), figures, strict=True):
        values = figure if isinstance(figure, tuple) else (figure,)
        for name, value in zip(of.dev, values, strict=True):
            metrics[f"eval_{name}_{of.metrics[0]}"] = value
    scores = task_scores(metrics)
    assert list(scores) == list(TASKS)
    assert average(scores) == pytest.approx(printed, abs=0.011)


def test_half_of_mnli_is_no_figure_of_mnli():
    assert task_scores({"eval_MNLI-m_accuracy": 0.5, "eval_RTE_accuracy": 0.25}) == {"RTE": 0.25}


# The server's files


@pytest.mark.parametrize(
    ("task", "predictions", "lines"),
    [
        ("CoLA", [1, 0], ["0\t1", "1\t0"]),
        ("MNLI", [2, 0, 1], ["0\tcontradiction", "1\tentailment", "2\tneutral"]),
        ("QNLI", [1], ["0\tnot_entailment"]),
        ("STS-B", [-0.5, 2.34567, 7.0], ["0\t0.000", "1\t2.346", "2\t5.000"]),
    ],
)
def test_predictions_are_written_as_the_server_reads_them(task, predictions, lines, tmp_path):
    path = write_predictions(tmp_path / "new" / "x.tsv", task, predictions)
    assert path.read_text().splitlines() == ["index\tprediction", *lines]
