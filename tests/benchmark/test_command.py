"""The benchmark compares before it times, and says what it measured; and what keeps decoding cheap, without a clock."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from builtin_models import builtin_case
from helpers import TINY, assert_same, config_of, fourier, grid, tiny
from small_workloads import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from hf_perceiver import InputArray, PerceiverIOModel, modeling_perceiver_io, recipes
from hf_perceiver.benchmark import __main__ as benchmark
from hf_perceiver.benchmark import comparison as benchmark_comparison
from hf_perceiver.benchmark import measures as benchmark_measures
from hf_perceiver.benchmark import report as benchmark_report
from hf_perceiver.benchmark import workloads as benchmark_workloads
from hf_perceiver.benchmark.comparison import Comparison
from hf_perceiver.benchmark.workloads import WORKLOADS, make_grid
from hf_perceiver.modeling_perceiver_io import CHUNK_NUMBERS, Encoding


@pytest.fixture
def no_memory(monkeypatch):
    """Without the processes in which memory is measured, which take seconds to start, and the large product of the peak."""
    monkeypatch.setitem(benchmark_measures.SQUARE, "cpu", 64)
    monkeypatch.setattr(benchmark_comparison, "in_fresh_process", lambda function, *arguments: None)


def run(*arguments, workloads=SMALL):
    return benchmark.main(list(arguments), workloads)


# --- the command


def test_every_released_architecture_has_its_workload():
    assert list(WORKLOADS) == list(SMALL)
    released = {name for name in vars(recipes) if "Released:" in (getattr(getattr(recipes, name), "__doc__", "") or "")}
    assert {workload.recipe.__name__ for workload in WORKLOADS.values()} == released
    # The sentence is 60 bytes for both, or padded for the built-in.
    for name, length in (("masked-lm-60", 60), ("masked-lm-60-padded", 2048)):
        inputs = WORKLOADS[name].make_inputs()
        assert inputs["inputs"].shape == (1, 60)
        padded = WORKLOADS[name].builtin_inputs(inputs)
        assert padded["attention_mask"].shape == (1, length) and padded["attention_mask"].sum() == 60
    # The task's own numbers: 2,048 bytes; 224 x 224; one tile; 16 frames and 30,720 samples.
    assert WORKLOADS["masked-lm"].make_inputs()["inputs"].shape == (1, 2048)
    assert WORKLOADS["imagenet-conv"].make_inputs()["inputs"].shape == (1, 3, 224, 224)
    assert WORKLOADS["optical-flow"].make_inputs()["inputs"].shape == (1, 2, 27, 368, 496)
    clip = WORKLOADS["multimodal"].make_inputs()["inputs"]
    shapes = {"image": (1, 16, 3, 224, 224), "audio": (1, 30_720, 1), "label": (1, 700)}
    assert {name: tuple(tensor.shape) for name, tensor in clip.items()} == shapes


@pytest.mark.parametrize("model", SMALL)
def test_both_sides_get_the_same_weights_and_give_the_same_numbers(model, no_memory, tmp_path, capsys):
    path = tmp_path / "rows.json"
    asked = ["--models", model, "--dtypes", "float32", "bfloat16", "--backends", "sdpa", "eager"]
    asked += ["--fast-attention", "never", "always"]
    assert run(*asked, "--against", "builtin", "--repeats", "2", "--json", str(path)) == 0
    rows = json.loads(path.read_text())
    assert [(r["dtype"], r["backend"], r["fast_attention"]) for r in rows] == [
        (dtype, backend, fast)
        for dtype in ("float32", "bfloat16")
        for backend in ("sdpa", "eager")
        for fast in ("never", "always")
    ]
    for row in rows:
        # Other orders of summation round otherwise: 1e-5 is far above that, and far below any wrong number.
        assert 0 < row["max_error"] < (1e-5 if row["dtype"] == "float32" else row["error_bound"])
        assert row["ratio"] == pytest.approx(row["builtin_seconds"] / row["seconds"])
        assert 0 < row["seconds"] <= row["median_seconds"] and row["builtin_seconds"] <= row["builtin_median_seconds"]
        assert row["error"] is None and row["sizes"]["batch"] == 1 and row["torch"] == torch.__version__
        # Backends do the same work in the same form; what is counted of the tiny fast forms is no promise.
        if row["fast_attention"] == "never":
            assert row["executed_flops"] == row["direct_flops"] > 0
        assert row["executed_gflops_per_second"] == pytest.approx(1e-9 * row["executed_flops"] / row["seconds"])
        assert row["direct_gflops_per_second"] == pytest.approx(1e-9 * row["direct_flops"] / row["seconds"])
        assert row["peak_fraction"] == row["executed_gflops_per_second"] / row["peak_gflops_per_second"]
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 9 and "repeat 2" in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_the_built_in_stands_in_in_float32_where_it_fails(no_memory):
    """Its multimodal model mixes float32 positions with bfloat16 weights."""
    dtypes = {}
    for model in ("multimodal", "masked-lm"):
        (row,) = Comparison(model, SMALL[model], against="builtin", repeats=1).rows("bfloat16")
        dtypes[model] = row["builtin_dtype"]
    assert dtypes == {"multimodal": "float32", "masked-lm": "bfloat16"}


def test_without_the_built_in_only_times_and_memory_are_measured(no_memory):
    (row,) = Comparison("optical-flow", SMALL["optical-flow"]).rows("float32")
    assert row["seconds"] > 0
    compared = ("builtin_seconds", "builtin_dtype", "ratio", "max_error", "builtin_memory", "memory_ratio")
    assert not any(row[name] for name in compared)
    assert row["sizes"] == {"parameters": row["sizes"]["parameters"], "batch": 1, "inputs": 60, "latents": [6, 24]} | {
        "outputs": 60
    }


@pytest.mark.parametrize("model", ["masked-lm", "multimodal"])
def test_a_wrong_answer_is_not_timed(model, no_memory, monkeypatch, capsys, tmp_path):
    """One weight of ours off by a hundredth of the others' size, after the built-in took them all."""
    exported = benchmark_comparison.builtin_of

    def spoilt(ours):
        theirs = exported(ours)
        with torch.no_grad():
            next(iter(ours.perceiver.encoder.blocks.parameters())).add_(0.01)
        return theirs

    monkeypatch.setattr(benchmark_comparison, "builtin_of", spoilt)
    path = tmp_path / "rows.json"
    assert run("--models", model, "--against", "builtin", "--json", str(path)) == 1
    (row,) = json.loads(path.read_text())
    assert row["max_error"] > row["error_bound"] == 1e-4
    assert row["seconds"] is None and row["ratio"] is None and "a wrong answer is not timed" in row["error"]
    assert row["error"] in capsys.readouterr().out


def test_nan_is_a_wrong_answer(no_memory, monkeypatch):
    comparison = Comparison("masked-lm", SMALL["masked-lm"], against="builtin")
    monkeypatch.setattr(benchmark_comparison, "run_ours", lambda model, inputs: comparison.wanted[0] * math.nan)
    (row,) = comparison.rows("float32")
    assert row["max_error"] is None and row["seconds"] is None and "max_error nan" in row["error"]
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    assert math.isnan(benchmark_workloads.largest_error(bad, good))
    assert math.isnan(benchmark_workloads.largest_error({"a": good, "b": bad}, {"a": good, "b": good}))
    assert math.isnan(benchmark_workloads.largest_error(torch.ones(3), good))  # another shape


def test_errors_are_relative_to_the_largest_value_of_their_output():
    want = {"loud": torch.tensor([100.0, 0.0]), "quiet": torch.tensor([0.01, 0.0])}
    got = {"loud": torch.tensor([100.0, 1.0]), "quiet": torch.tensor([0.01, 0.001])}
    assert benchmark_workloads.largest_error(got, want) == pytest.approx(0.1)


def test_the_built_ins_passes_are_scaled_to_the_whole(no_memory, monkeypatch):
    """2 of 8 passes are timed; with a clock on which every run takes a second the whole takes 8, and ours 1."""
    monkeypatch.setattr(benchmark_comparison, "measure_seconds", lambda run, device: 1.0)
    comparison = Comparison("multimodal", SMALL["multimodal"], against="builtin", repeats=1, builtin_passes_timed=2)
    (row,) = comparison.rows("float32")
    assert (row["seconds"], row["builtin_seconds"], row["ratio"]) == (1, 8, 8)
    assert (row["builtin_passes"], row["builtin_passes_timed"]) == (8, 2)


@pytest.mark.parametrize(("count", "chosen", "indices"), [(128, 4, [0, 42, 84, 127]), (8, 8, [*range(8)]), (9, 1, [0])])
def test_timed_passes_are_spread_over_all(count, chosen, indices):
    assert benchmark_comparison.spread(count, chosen) == indices


def test_passes_together_ask_every_point_once():
    config = builtin_case("PerceiverForMultimodalAutoencoding").config()
    asked = [benchmark_workloads.chunk_points(config, index, 5) for index in range(5)]
    # 2 x 16 x 16 pixels and 2 x 32 samples in patches of 8, which 5 does not divide.
    assert torch.cat([points["image"] for points in asked]).tolist() == [*range(512)]
    assert torch.cat([points["audio"] for points in asked]).tolist() == [*range(8)]


def test_a_backend_that_fails_costs_only_its_row(no_memory, capsys):
    """flash_attention_2 is known to transformers and needs a package and a GPU."""
    assert run("--models", "masked-lm", "--backends", "flash_attention_2", "sdpa", "--repeats", "1") == 1
    out = capsys.readouterr().out
    failed, timed = out.splitlines()[1:3]
    assert failed.split()[4:6] == ["-", "-"] and timed.split()[4] != "-"
    assert "masked-lm float32 flash_attention_2 auto: ImportError" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt"], "invalid choice: 'gpt'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--backends", "quick"], "unknown backend 'quick'; transformers has eager, "),
        (["--fast-attention", "no"], "invalid choice: 'no'"),
        (["--against", "jax"], "invalid choice: 'jax'"),
        (["--repeats", "0"], "--repeats is a whole number from 1, not 0"),
        (["--threads", "-1"], "--threads is a whole number from 1, not -1"),
        (["--builtin-chunks", "0"], "--builtin-chunks is a whole number from 1, not 0"),
        (["--builtin-chunks", "9"], "--builtin-chunks is at most 8, not 9"),
        (["--json", "no/such/folder/x.json"], "name a file in a folder that exists"),
        (["--json", "."], "name a file in a folder that exists"),
        (["--plot", "no/such/folder/x.png"], "name a file in a folder that exists"),
        (["--plot", "x.pdf"], "x.pdf: a plot ends in .png or .svg"),
        (["--compile", "maybe"], "invalid choice: 'maybe'"),
        (["--tf32"], "--tf32 is of GPUs"),
        (["--training", "--models", "masked-lm-60"], "--training has no masked-lm-60; it has masked-lm, "),
        (["--training", "--dtypes", "float16"], "--training runs in float32 and bfloat16, not in float16"),
        (["--training", "--scaling", "inputs"], "not allowed with"),
        (["--scaling", "width"], "invalid choice: 'width'"),
        (["--scaling", "inputs", "--models", "masked-lm"], "--models does not go with --scaling"),
        (["--scaling", "inputs", "--against", "builtin"], "--against does not go with --scaling"),
        (["--scaling", "inputs", "--largest", "100"], "--largest 100: inputs start at 4096"),
        (["--largest", "100"], "--largest goes with --scaling"),
        (["--read", "no-such.json"], "no-such.json cannot be read as rows of this benchmark: FileNotFoundError"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message, monkeypatch, capsys):
    for name in ("Comparison", "TrainingComparison", "scaling_rows"):
        monkeypatch.setattr(benchmark, name, lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as refused:
        run(*arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_report, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "Comparison", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(SystemExit):
        run("--plot", "rows.png")
    assert "pip install hf-perceiver[train]" in capsys.readouterr().err


def test_files_of_rows_are_shown_together(no_memory, tmp_path, capsys):
    """Nothing is measured again: not a number of the two tables changes."""
    paths, tables = [tmp_path / "a.json", tmp_path / "b.json"], []
    for model, path in zip(("masked-lm", "optical-flow"), paths, strict=True):
        run("--models", model, "--repeats", "1", "--json", str(path))
        tables.append(capsys.readouterr().out.splitlines())
    both, picture = tmp_path / "both.json", tmp_path / "both.svg"
    assert run("--read", *map(str, paths), "--json", str(both), "--plot", str(picture)) == 0
    assert json.loads(both.read_text()) == [*json.loads(paths[0].read_text()), *json.loads(paths[1].read_text())]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[1:] == [line.split() for table in tables for line in table[1:]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json", "both.json", "both.svg"]


@pytest.mark.parametrize("text", ["[1]", "{}", '[{"model": "masked-lm"}]', "no json"])
def test_other_files_are_no_rows(text, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        run("--read", str(path))
    assert "x.json" in (err := capsys.readouterr().err) and "rows of this benchmark" in err


def test_fast_forms_execute_less_than_the_direct_form(no_memory):
    """Counted on real runs: keys and values of 64 x 64 elements of 261 channels, which reading by pieces never forms."""
    workload = replace(SMALL["imagenet-fourier"], make_inputs=partial(make_grid, 3, 64, 64))
    never, always = Comparison("imagenet-fourier", workload, repeats=1).rows(
        "float32", fast_attention=("never", "always")
    )
    assert never["executed_flops"] == never["direct_flops"] == always["direct_flops"]
    assert always["executed_flops"] < never["executed_flops"] / 2


def test_a_gpus_tf32_is_set_for_all_but_the_wanted_answers(no_memory, monkeypatch):
    """On the CPU the setting changes nothing, so that only when it is set can be seen here."""
    set_to = []
    monkeypatch.setattr(benchmark_comparison, "use_tf32", set_to.append)
    answers = Comparison._builtin_answers
    monkeypatch.setattr(Comparison, "_builtin_answers", lambda self: set_to.append("answers") or answers(self))
    comparison = Comparison("masked-lm", SMALL["masked-lm"], against="builtin", tf32=True, repeats=1)
    assert set_to == [False, "answers", True]
    (row,) = comparison.rows("float32")
    # 10 bits of mantissa, as float16.
    assert row["error_bound"] == 1e-2 and row["tf32"]
    (row,) = comparison.rows("bfloat16")
    assert row["error_bound"] == 5e-2


def test_a_run_on_a_gpu_is_asked_of_it_alone(no_memory, monkeypatch):
    """Without a GPU: what `--device cuda` hands on."""
    asked = {}

    class Seen:
        def __init__(self, name, workload, **options):
            asked.update(options)

        def rows(self, dtype, *ways):
            asked.update(dtype=dtype, ways=ways)
            return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "Comparison", Seen)
    arguments = ["--models", "masked-lm", "--device", "cuda", "--tf32", "--compile", "no", "yes"]
    assert run(*arguments, "--backends", "sdpa", "flex_attention") == 0
    assert asked["device"] == "cuda" and asked["tf32"] is True
    assert asked["ways"] == (["sdpa", "flex_attention"], ["auto"], [False, True])


@pytest.mark.slow
def test_a_compiled_model_is_a_row_of_its_own(no_memory):
    """Half a minute of the C++ compiler."""
    plain, compiled = Comparison("masked-lm", SMALL["masked-lm"], against="builtin", repeats=1).rows(
        "float32", compiled=(False, True)
    )
    if compiled["error"] is not None:
        assert not shutil.which("g++"), compiled["error"]
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    # Fused operations round otherwise.
    assert compiled["compiled"] and compiled["max_error"] < 1e-5
    assert compiled["executed_flops"] == plain["executed_flops"] and compiled["seconds"] > 0


def test_a_model_that_does_not_compile_costs_only_its_row(no_memory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: fail)
    plain, compiled = Comparison("masked-lm", SMALL["masked-lm"], repeats=1).rows("float32", compiled=(False, True))
    assert compiled["error"] == "RuntimeError: no compiler" and compiled["seconds"] is None
    assert plain["error"] is None and plain["seconds"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        run("--device", "cuda")
    assert refused.value.code == 2 and "torch sees no GPU here" in capsys.readouterr().err


def test_threads_are_set_and_said(no_memory, tmp_path):
    before = torch.get_num_threads()
    try:
        path = tmp_path / "rows.json"
        assert run("--models", "masked-lm", "--threads", "1", "--repeats", "1", "--json", str(path)) == 0
        assert torch.get_num_threads() == json.loads(path.read_text())[0]["threads"] == 1
    finally:
        torch.set_num_threads(before)


# --- memory


@pytest.mark.medium
def test_memory_is_measured_in_a_process_for_each_side(tmp_path):
    workload = replace(SMALL["imagenet-fourier"], make_inputs=partial(make_grid, 3, 192, 192))
    workloads = {**SMALL, "imagenet-fourier": workload}
    path = tmp_path / "rows.json"
    asked = ["--models", "imagenet-fourier", "--fast-attention", "never", "--repeats", "1", "--json", str(path)]
    assert run(*asked, "--against", "builtin", workloads=workloads) == 0
    (row,) = json.loads(path.read_text())
    if row["memory"] is None:
        pytest.skip("the peak of a process can be set back on Linux only")
    # The dense array of 261 channels is 38 MB, and so are its normed form, keys and values; twice that is too much.
    dense = 4 * 192 * 192 * 261
    assert 3 * dense < row["memory"] < 8 * dense and row["builtin_memory"] > 3 * dense
    assert row["memory_ratio"] == row["memory"] / row["builtin_memory"]


# --- what keeps decoding cheap


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def with_chunks_of(queries, model, monkeypatch):
    """The default chunk size becomes so many queries of this model, for one example."""
    cross_attn = model.decoder.cross_attend.cross_attn
    width = max(model.output_query.channels, cross_attn.k_proj.out_features, cross_attn.v_proj.out_features)
    monkeypatch.setitem(CHUNK_NUMBERS, "cpu", queries * width)


ANSWERING = [name for name in TINY if tiny(name).config.output_query is not None]


@pytest.mark.parametrize("name", ANSWERING)
@torch.no_grad()
def test_without_gradients_queries_come_in_chunks_by_themselves(name, monkeypatch):
    case = tiny(name)
    model = case.model().double()
    inputs = {n: _double(value) for n, value in case.inputs(3).items()}
    want = model(**inputs, chunk_size=10**6).logits
    with_chunks_of(4 * 3, model, monkeypatch)  # 4 queries of 3 examples
    queries = count_calls(model.decoder.cross_attend.cross_attn.q_proj)
    once = [count_calls(part) for part in (model.encoder, model.preprocessor, model.output_query)]
    once += [count_calls(getattr(model.decoder.cross_attend.cross_attn, part)) for part in ("k_proj", "v_proj")]
    got = model(**inputs).logits
    # Float64; other shapes may sum in another order.
    assert_same(got, want, rtol=1e-9, atol=1e-10)
    assert [len(calls) for calls in once] == [1] * 5
    sizes = model.output_query(model.encode(**_encoded(inputs)).input_array)
    assert len(queries) == sum(-(-n // 4) for n in modeling_perceiver_io.QueryArray.of(sizes).sizes.values())


def _double(value):
    if isinstance(value, dict):
        return {name: _double(inner) for name, inner in value.items()}
    return value.double() if value.is_floating_point() else value


def _encoded(inputs):
    """Arguments of `encode`, from those of `forward`."""
    return {{"input_ids": "inputs", "pixel_values": "inputs"}.get(name, name): value for name, value in inputs.items()}


@pytest.mark.parametrize("of", ["gradients", "attention maps", "a compiled graph"])
def test_all_queries_come_at_once_where_chunks_save_nothing_or_would_show(of, monkeypatch):
    case = tiny("flow")
    model = case.model(attn_implementation="eager") if of == "attention maps" else case.model()
    model.set_attn_implementation("eager")
    with_chunks_of(5, model, monkeypatch)
    queries = count_calls(model.decoder.cross_attend.cross_attn.q_proj)
    if of == "gradients":
        model(**case.inputs(1))
    elif of == "attention maps":
        with torch.no_grad():
            maps = model(**case.inputs(1), output_attentions=True).cross_attentions
        assert [m.shape[2] for m in maps] == [4, 24]  # latents that read, queries that write
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with torch.no_grad():
            model(**case.inputs(1))
    assert len(queries) == 1


class LargestTensor(TorchDispatchMode):
    """Numbers of the largest tensor that any operation returned, but for those in `but_for`."""

    def __init__(self, but_for=()):
        super().__init__()
        self.numbers, self.but_for = 0, but_for

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.but_for:
                self.numbers = max(self.numbers, tensor.numel())
        return out


POSITION = fourier(6, 5, bands=2)
QUERIES = {
    "grid": {"kind": "position", "position": POSITION},
    "input": {"kind": "input"},
    "features": {"kind": "position", "position": POSITION, "concat_input": True},
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("query", [*QUERIES, "points", "coordinates"])
@torch.no_grad()
def test_memory_of_decoding_is_flat_in_the_number_of_queries(query, backend, monkeypatch):
    """The answer grows, and what asks for it; every other tensor is as large as for a quarter of the queries."""
    config = config_of(
        preprocessor=grid({"kind": "pixels", "in_channels": 3}, POSITION),
        output_query=QUERIES.get(query, QUERIES["grid"]),
        postprocessor={"kind": "projection", "num_outputs": 2},
        fast_attention="never",
    )
    model = PerceiverIOModel(config).eval()
    model.set_attn_implementation(backend)
    with_chunks_of(64, model, monkeypatch)
    width = max(model.output_query.channels, config.d_latents)
    largest = []
    for side in (40, 80):
        count = side * side
        encoding = model.encode(torch.rand(1, 3, side, side))
        asked = {}
        if query == "points":
            asked["output_points"] = torch.arange(count)
        if query == "coordinates":
            asked["coordinates"] = torch.rand(count, 2) * 2 - 1
        # The answer; of chosen places, their indices or coordinates, checked once.
        known = {(1, count, 2), (count,), (1, count), (count, 2)}
        with LargestTensor(but_for=known) as seen:
            answer = model.decode(encoding, **asked)
        assert answer.shape == (1, count, 2)
        largest.append(seen.numbers)
    assert largest[0] == largest[1] <= 64 * width


# --- at the released sizes


def _close(got, want):
    # Float32: blocks of other heights are summed in another order; 1e-5 is some ten times what was seen.
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_clip_is_its_128_chunks():
    """7.2 TFLOP twice, a minute or two each, and a third of that: 802,816 pixels, 1,920 audio patches and the label."""
    model = PerceiverIOModel(recipes.multimodal_autoencoder()).eval()
    benchmark_workloads.redraw(model)
    clip = WORKLOADS["multimodal"].make_inputs()["inputs"]
    encoding = Encoding(torch.randn(1, 784, 512), InputArray.of(model.preprocessor(clip)))
    chunks = []
    for index in range(128):
        image, audio = (torch.arange(n * index, n * (index + 1)) for n in (6272, 15))
        chunks.append(model.decode(encoding, output_points={"image": image, "audio": audio, "label": None}))
    image, audio = (torch.cat([chunk[name] for chunk in chunks], dim=1) for name in ("image", "audio"))
    for model.config.fast_attention in ("never", "auto"):
        whole = model.decode(encoding)
        shapes = {"audio": (1, 30_720), "image": (1, 16, 224, 224, 3), "label": (1, 700)}
        assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == shapes
        _close(whole["image"].flatten(1, 3), image)
        _close(whole["audio"], audio)
        _close(whole["label"], chunks[77]["label"])


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_flow_tile_is_its_chunks():
    model = PerceiverIOModel(recipes.optical_flow()).eval()
    benchmark_workloads.redraw(model)
    tile = WORKLOADS["optical-flow"].make_inputs()["inputs"]
    encoding = Encoding(torch.randn(1, 2048, 512), InputArray.of(model.preprocessor(tile)))
    model.config.fast_attention = "never"
    at_once = model.decode(encoding, chunk_size=368 * 496)
    for model.config.fast_attention in ("never", "auto"):
        _close(model.decode(encoding), at_once)
