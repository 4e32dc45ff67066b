"""Rows as a table and as a picture."""

import pytest

from hf_perceiver.benchmark.report import empty_row, plot, slope, table


def row(model="flow", work="inference", **numbers):
    return empty_row(work, model, "float32", "sdpa", "auto", False, False) | numbers


def scaling(axis, count, seconds, memory, **numbers):
    sizes = {"inputs": 16, "outputs": 16, "latents": 16, axis: count}
    measured = {"axis": axis, "seconds": seconds, "memory_beyond_output": memory, "output_bytes": 8 * count}
    return row(f"{axis} {count}", "scaling") | sizes | measured | numbers


SCALING = [
    # A second each at every size, and 2^-10 more for every element; memory that does not grow.
    *(scaling("inputs", 2**k, 1 + 2**k / 2**10, 5e6) for k in range(10, 21)),
    *(scaling("latents", 2**k, 4.0**k / 1e6, 1e3 * 2**k) for k in (8, 6, 7)),
]
BARS = [
    row("flow", seconds=5.0, builtin_seconds=25.0, builtin_dtype="float32", ratio=5.0),
    row("language", seconds=0.5, builtin_seconds=0.6, builtin_dtype="bfloat16", ratio=1.2),
    row("images", error="RuntimeError: no"),
]


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_slopes_are_exponents(power):
    xs = [2**k for k in range(5)]
    assert slope(xs, [3 * x**power for x in xs]) == pytest.approx(power)


def test_slopes_are_of_the_upper_half():
    """1 + x grows as x^1 where x is large: between 2^10 and 2^20, within a thousandth."""
    xs = [2**k for k in range(21)]
    assert slope(xs, [1 + x for x in xs]) == pytest.approx(1, abs=1e-3)
    # A lower half of another law does not show.
    assert slope(xs, [x**3 if x < 2**10 else x for x in xs]) == pytest.approx(1)


def test_slopes_need_two_points():
    assert slope([], []) is None
    assert slope([2], [2.0]) is None
    assert slope([4, 4], [2.0, 3.0]) is None
    assert slope([4, 8, 16], [1.0, None, 2.0]) is None
    assert slope([4, 8, 16], [1.0, -5.0, 2.0]) is None
    assert slope([1, 4, 8, 16], [9.0, None, 1.0, 2.0]) == pytest.approx(1)


def test_a_table_says_why_a_row_is_incomplete():
    lines = table(BARS).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["flow", "language", "images"]
    assert lines[1].split()[4:8] == ["5.000", "-", "25.000", "5.00"]
    assert lines[4:] == ["images float32 sdpa auto: RuntimeError: no"]
    assert len({len(line) for line in lines[:4]}) == 1


def test_a_table_names_switches_where_they_are_used():
    assert "compiled" not in table(BARS) and "tf32" not in table(BARS)
    lines = table([*BARS[:2], BARS[0] | {"compiled": True}]).splitlines()
    assert lines[0].split()[4] == "compiled" and [line.split()[4] for line in lines[1:]] == ["no", "no", "yes"]


def test_a_table_states_the_slopes_of_what_was_scaled():
    lines = table([*BARS[:1], *SCALING]).splitlines()
    assert "scaling:" in lines
    inputs, latents = lines[-2:]
    # From 2^15 on: (1 + 2^10) / (1 + 2^5) is 31.06 for 32 times as many, and the points between lie on no straight line.
    assert inputs.startswith("inputs up to 1,048,576, float32 sdpa auto: seconds ~ inputs^0.99, ")
    assert inputs.endswith("memory beyond the output ~ inputs^0.00")
    assert latents.startswith("latents up to 256, float32 sdpa auto: seconds ~ latents^2.00, ")
    assert latents.endswith("~ latents^1.00")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("rows", [BARS, SCALING], ids=["bars", "curves"])
def test_a_plot_is_written_whole(rows, suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_text("an older one")
    plot(rows, path)
    start = path.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def _texts(rows, tmp_path, monkeypatch):
    """The words in a picture; as an SVG's text rather than its outlines."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    plot(rows, tmp_path / "x.svg")
    return (tmp_path / "x.svg").read_text()


def test_bars_bear_their_ratio_and_what_the_built_in_ran_in(tmp_path, monkeypatch):
    text = _texts(BARS, tmp_path, monkeypatch)
    assert "25 s: 5.00x" in text and "0.6 s: 1.20x (bfloat16)" in text and "5.00x (float32)" not in text
    assert "language" in text and "images" not in text  # not timed


def test_curves_bear_their_slopes_and_the_outputs_size(tmp_path, monkeypatch):
    text = _texts(SCALING, tmp_path, monkeypatch)
    for label in ("slope 0.99", "slope 0.00", "slope 2.00", "slope 1.00", "the output itself", "inputs", "latents"):
        assert label in text


def test_what_was_not_measured_leaves_a_gap(tmp_path):
    plot([scaling("inputs", 2**k, 1.0, None if k < 12 else -5) for k in range(10, 14)], tmp_path / "x.png")
    plot([row(seconds=1.0)], tmp_path / "x.png")  # without the built-in


def test_a_plot_shows_one_kind(tmp_path):
    with pytest.raises(ValueError, match="one kind of work, not inference and scaling"):
        plot([*BARS, *SCALING], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.gif: a plot ends in \.png or \.svg"):
        plot(BARS, tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())


def test_a_failed_plot_leaves_nothing_behind(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **_):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot(BARS, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
