import json

import pytest

from hf_perceiver.training.documentation import (
    Document,
    Documentation,
    is_prose,
    paragraphs,
    read_documentation,
    source_strings,
    split_documents,
    standard_library_strings,
    unique_documents,
)

PROSE = "This function returns the number of items that are in the list, and it does not change any of them."
OTHER = "When the file cannot be read, an error is raised, and the caller has to decide what should be done next."


def test_wrapped_lines_become_one_paragraph_without_markup():
    text = """Summary of
    the ``thing`` that :class:`~package.Thing` and *others* use.

    Second paragraph."""
    assert list(paragraphs(text)) == ["Summary of the thing that Thing and others use.", "Second paragraph."]


def test_bullets_and_described_arguments_keep_their_description_only():
    text = """Arguments:

    count (int, *optional*): The number of items
        to be read.
    - A bullet that goes
      on here.
    x : array
        Described below its name."""
    assert list(paragraphs(text)) == [
        "Arguments:",
        "The number of items to be read.",
        "A bullet that goes on here.",
        "x : array",
        "Described below its name.",
    ]


def test_fenced_code_is_left_out():
    assert list(paragraphs("Before.\n```python\nx = 1\n```\nAfter.")) == ["Before.", "After."]


@pytest.mark.parametrize(
    "line",
    [
        "Too short to tell.",
        ">>> print('This is what the function returns when it is called with the list of all items.')",
        "See https://example.org for the list of all the functions that are in this module and what they do.",
        "alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota, kappa, lambda, mu, nu, xi, omicron, pi.",
        "lower case at its start, this sentence is a fragment of the one before it, which was cut off there.",
        PROSE.replace("list", "liste équilibrée"),
    ],
)
def test_what_is_not_english_prose_is_dropped(line):
    assert is_prose(PROSE)
    assert not is_prose(line)


def test_strings_come_in_source_order_and_broken_source_gives_none():
    source = f'def f():\n    """{PROSE}"""\n\nx = "short"\nadd_doc("g", """\n{OTHER}\n""")\n'
    assert [s.strip() for s in source_strings(source)] == [PROSE, OTHER]
    assert source_strings("def broken(:\n") == []


def test_equal_paragraphs_are_kept_once_over_all_files():
    again = PROSE.upper().capitalize()
    documents = list(unique_documents([("a", [PROSE]), ("b", [again + " ", OTHER]), ("c", [PROSE])]))
    assert documents == [Document("a", PROSE), Document("b", OTHER)]


def test_held_out_text_does_not_occur_in_training_text():
    sentences = [
        f"{PROSE} It is number {n} {'and so on ' * (n % 7)}in a row of many others that are much the same."
        for n in range(300)
    ]
    documents = [Document(f"file{n}", f"{s}\n{s} {OTHER}") for n, s in enumerate(sentences)]
    train, held_out = split_documents(documents, 0.2)
    assert not {d.name for d in train} & {d.name for d in held_out}
    # They share far more than a fifth of their 8-word sequences.
    assert held_out == []
    own = " ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60))
    documents += [Document(f"own{n}", f"{chr(97 + n)}x {own.replace('word', chr(97 + n))}") for n in range(20)]
    train, held_out = split_documents(documents, 0.2)
    # Binomial(20, 0.2) misses zero with probability 0.99; the names' hashes are fixed, so this cannot flicker.
    assert held_out and all(d.name.startswith("own") for d in held_out)


def test_split_depends_on_names_only():
    documents = [Document(f"file{n}", f"{chr(97 + n % 26)} text {n}") for n in range(100)]
    train, _ = split_documents(documents, 0.1)
    again, _ = split_documents(documents[::-1], 0.1)
    assert {d.name for d in train} == {d.name for d in again}
    assert 75 <= len(train) <= 99  # 90 expected, standard deviation 3


def test_fingerprint_tells_texts_apart():
    one = Documentation([Document("a", PROSE)], [Document("b", OTHER)], {"python": "3"})
    two = Documentation([Document("a", PROSE), Document("b", OTHER)], [], {"python": "3"})
    assert one.sha256() != two.sha256()
    summary = json.loads(json.dumps(one.summary()))
    assert (summary["train_bytes"], summary["held_out_bytes"]) == (len(PROSE), len(OTHER))


def test_standard_library_gives_the_same_text_twice():
    first, second = (
        [next(found) for _ in range(5)] for found in (standard_library_strings(), standard_library_strings())
    )
    assert first == second
    assert all(name.startswith("python/") and name.endswith(".py") for name, _ in first)


def test_installed_packages_are_read_and_absent_ones_passed_over():
    documentation = read_documentation(("pytest", "not-installed-anywhere"), 0.1, standard_library=False)
    assert set(documentation.versions) == {"python", "pytest"}
    # pytest 9.2 alone holds 117 kB of prose.
    assert documentation.summary()["train_bytes"] > 50_000
    known = {line for d in documentation.train for line in d.text.split("\n")}
    held_out = [line for d in documentation.held_out for line in d.text.split("\n")]
    assert held_out and not known.intersection(held_out)
    assert all(line.isascii() for line in known)
    with pytest.raises(ValueError, match="no English documentation"):
        read_documentation((), standard_library=False)


def test_bad_fraction_is_an_error():
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        read_documentation(held_out_fraction=1.5)
