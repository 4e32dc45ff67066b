"""Two tasks made of documentation: what becomes of markup and names, splits by file, figures by hand, results that are kept."""

import numpy as np
import pytest

from hf_perceiver.training.documentation import Document, Documentation
from hf_perceiver.training.documentation_tasks import (
    PACKAGES,
    Passage,
    Result,
    Training,
    code_figures,
    code_items,
    code_pieces,
    data_sha256,
    example_of,
    kept,
    measure,
    package_figures,
    package_passages,
    package_pieces,
)

SENTENCE = "This function of the module gives what is asked for and no more than that to all who call it here."


def test_markup_tells_code_and_is_struck_out():
    string = """Return ``x + 1`` where :class:`~a.B` is in the `links <https://a.b>`_ of *all* that `name` has [1]_, as it is.

    >>> f(  1 )
    2
    >>> g()
    >>> h()
    """
    ((text, marks),) = code_items(string)
    assert text == "Return x + 1 where a.B is in the links of all that name has, as it is. f( 1 ) g()"
    assert len(marks) == len(text)
    runs = [text[begin:end] for begin, end in _runs(marks)]
    assert runs == ["x + 1", "a.B", "name", "f( 1 )", "g()"]


def _runs(marks: str) -> list[tuple[int, int]]:
    edges = [i for i in range(len(marks) + 1) if (marks[i - 1 : i] == "c") != (marks[i : i + 1] == "c")]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize(
    "string", [SENTENCE, "``x = 1`` ``y = 2`` ``z``", "Über ``x`` there is what we have to say to all of you."]
)
def test_paragraphs_without_marked_code_or_without_prose_or_beyond_ascii_are_left_out(string):
    assert list(code_items(string)) == []


def test_passages_keep_each_bytes_mark_and_stay_short():
    text, marks = f"{SENTENCE} abc def {SENTENCE}", ""
    marks = "".join("c" if len(SENTENCE) < i < len(SENTENCE) + 8 else "." for i in range(len(text)))
    (passage,) = code_pieces(text, marks, "a/b.py")  # the second one has no code
    assert passage.text.startswith(SENTENCE) and len(passage.text) <= 126
    assert [passage.text[begin:end] for begin, end in _runs(passage.label)] == ["abc def"]
    example = example_of(passage)
    assert [
        example.text[b:e] for (b, e), label in zip(example.words, example.labels, strict=True) if label == "code"
    ] == [
        "abc",
        "def",
    ]


def test_names_of_packages_are_struck_out():
    document = Document(
        "torch/a.py", "Like PyTorch's tensors, those of scipy.sparse and sklearn are sums of things in Python and more."
    )
    (passage,) = package_pieces(document, "torch")
    assert passage.text == "Like 's tensors, those of .sparse and are sums of things in and more."
    assert (passage.label, passage.document) == ("torch", "torch/a.py")


def documentation() -> Documentation:
    documents = [Document(f"{p}/{i}.py", f"{SENTENCE} {p} {i} " * 2) for p in PACKAGES for i in range(40)]
    return Documentation(documents[::2], documents[1::2])


def test_parts_are_of_different_files_and_as_large_as_asked():
    split = package_passages(documentation(), 20, seed=0)
    files = {part: {p.document for p in passages} for part, passages in split.items()}
    assert not files["train"] & files["validation"] and not (files["train"] | files["validation"]) & files["test"]
    assert [sum(p.label == name for p in split["train"]) for name in PACKAGES] == [20] * len(PACKAGES)
    assert data_sha256(split) == data_sha256(package_passages(documentation(), 20, seed=0))
    assert data_sha256(split) != data_sha256(package_passages(documentation(), 20, seed=1))


def test_a_package_that_is_not_installed_is_named():
    held = documentation()
    held.train = [d for d in held.train if not d.name.startswith("sympy")]
    with pytest.raises(ValueError, match=r"no documentation of sympy \(train\); install"):
        package_passages(held, 20, seed=0)


def test_package_figures_by_hand():
    """Passages 0 and 1 are of one file: 0.6 * 0.6 beats 0.4 * 0.4, and 0.1 * 0.6 loses to 0.9 * 0.4."""
    test = [
        Passage("a", "x", "f"),
        Passage("b", "x", "f"),
        Passage("c", "y", "g"),
        Passage("d", "x", "h"),
        Passage("e", "x", "h"),
    ]
    first = np.array([0.6, 0.6, 0.2, 0.1, 0.6])
    figures = package_figures({"test": test}, ["x", "y"], Result(np.stack([first, 1 - first], 1), 0, [], ""))
    assert figures["accuracy"] == pytest.approx(4 / 5)
    assert figures["macro_f1"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert figures["file_accuracy"] == pytest.approx(2 / 3)


def test_code_figures_by_hand():
    """Bytes: 3 of 5 of code found and 1 false; runs: the first has both borders right, the second one not."""
    test = [Passage("ab cd", "cc.cc", "f"), Passage("efg", "..c", "g")]
    guessed = np.array([1, 1, 0, 1, 0, 0, 1, 0], float)
    figures = code_figures({"test": test}, ["O", "code"], Result(np.stack([1 - guessed, guessed], 1), 0, [], ""))
    assert figures["accuracy"] == pytest.approx(5 / 8)
    assert figures["code_f1"] == pytest.approx(2 * 3 / (4 + 5))
    assert figures["run_f1"] == pytest.approx(2 * 1 / (3 + 3))


def test_a_result_is_made_once_and_only_for_the_same_data(tmp_path):
    path = tmp_path / "a.npz"
    made = kept(path, "data", lambda: Result(np.array([[0.25, 0.75]]), 0.5, [{"step": 1, "validation": 0.5}], "C=1"))
    again = kept(path, "data", lambda: pytest.fail("made again"))
    assert np.array_equal(again.probabilities, made.probabilities) and again.curve == made.curve
    assert (again.validation, again.note) == (0.5, "C=1")
    with pytest.raises(ValueError, match="measured on other data or settings"):
        kept(path, "other", lambda: pytest.fail("made again"))


@pytest.mark.medium
@pytest.mark.parametrize("task", ["package", "code"])
def test_every_method_is_measured_and_drawn(task, tmp_path):
    """Two steps on a handful of passages: what is written, not how good it is."""
    if task == "package":
        split = package_passages(documentation(), 3, seed=0)
        split["test"] = split["test"][::20]
        split["validation"] = split["validation"] or split["train"][::3]
    else:
        passages = [Passage("abc def", "ccc....", f"{i}.py") for i in range(8)]
        split = {"train": passages, "validation": passages[:2], "test": passages[:3]}
    rows = measure(task, split, tmp_path, Training(steps=2, batch_size=2, learning_rate=1e-3, seed=0))
    assert {"bundled Perceiver", "scratch Perceiver"} < {row["method"] for row in rows}
    assert all(0 <= row["macro_f1"] <= 1 for row in rows)
    written = {path.name for path in tmp_path.iterdir()}
    assert {f"{task}.csv", f"{task}_curve.csv", f"text_{task}_curves.png"} <= written
    assert len((tmp_path / f"{task}.csv").read_text().splitlines()) == len(rows) + 1
