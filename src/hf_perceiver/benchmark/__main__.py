"""Time, memory and error of the released architectures, beside transformers' built-in Perceiver if asked:

    python -m hf_perceiver.benchmark --models optical-flow --against builtin --json flow.json --plot flow.png
    python -m hf_perceiver.benchmark --training --against builtin
    python -m hf_perceiver.benchmark --scaling inputs outputs latents --fast-attention auto never
    python -m hf_perceiver.benchmark --read flow.json others.json --plot all.png

Weights are random, the same on both sides, and rounded to bfloat16 in every dtype. What the two compute is compared
first; a row whose `max_error` is above the bound of its dtype is not timed, has an `error`, and the exit code is 1. Then
both run in turns. Memory is what one run in a process of its own holds at its peak beyond what it held before, with
weights and inputs loaded; where the built-in needs several passes, what one of them holds.

--json writes a list of rows; what was not measured is null:

    work                     inference, training or scaling
    model, dtype             what ran
    backend, fast_attention  how: the attention implementation, and the config's `fast_attention`
    compiled, tf32           whether through torch.compile; whether a GPU multiplied float32 as TF32
    seconds                  one example, its whole output: the fastest repeat; median_seconds: the median
    builtin_seconds          the same of the built-in, and builtin_median_seconds
    builtin_dtype            what the built-in ran in: float32 where it fails in `dtype`
    builtin_passes           how many passes it needs; builtin_passes_timed of them are timed, and scaled to all
    ratio                    builtin_seconds / seconds
    max_error, error_bound   the largest difference from the built-in in float32 / the largest value of that output
    memory, builtin_memory   bytes; memory_ratio = memory / builtin_memory
    direct_flops             what the direct form needs for the whole output: matrix products, convolutions, attention,
                             a multiplication and an addition being two; counted without numbers, on the meta device
    executed_flops           what ran, less where a fast form did; counted in the run that is compared. Of compiled code,
                             which cannot be watched, the direct form's; kernels of other packages are not seen
    direct_gflops_per_second, executed_gflops_per_second     those by `seconds`
    peak_gflops_per_second   the fastest matrix product of this run in this dtype: a large square, or the latent tower's
                             own shapes, tried after each repeat
    peak_fraction            executed_gflops_per_second / peak_gflops_per_second
    error                    why the row is incomplete
    sizes, repeats, threads, device, torch, transformers     what it was measured on

masked-lm-60 asks our model for the 9 masked places of a sentence; the built-in always answers at all 2,048. For
masked-lm-60-padded it also reads 2,048, as its documentation has it.
--compile is torch.compile of our model for fixed sizes; the built-in is as transformers ships it. --training and
--scaling: see training.py and scaling.py here. --read shows what was measured before.

On a GPU; written for one, and not run on one yet. Float32 with TF32 is a run of its own:

    python -m hf_perceiver.benchmark --device cuda --dtypes float32 bfloat16 --backends eager sdpa flex_attention
        --compile no yes --fast-attention never always --against builtin --json cuda.json
    python -m hf_perceiver.benchmark --device cuda --tf32 --compile no yes --against builtin --json cuda-tf32.json
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .comparison import ERROR_BOUNDS, Comparison
from .measures import use_tf32
from .report import Row, check_plot, plot, read_json, table, write_json
from .scaling import SIZES, scaling_rows
from .training import TRAINING_DTYPES, TrainingComparison
from .workloads import WORKLOADS, Workload


def make_parser(workloads: dict[str, Workload]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_perceiver.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(workloads), metavar="MODEL", help=", ".join(workloads))
    parser.add_argument("--dtypes", nargs="+", choices=list(ERROR_BOUNDS), default=["float32"], metavar="DTYPE")
    parser.add_argument("--backends", nargs="+", default=["sdpa"], metavar="BACKEND", help="attention implementations")
    parser.add_argument(
        "--fast-attention",
        nargs="+",
        choices=["auto", "always", "never"],
        default=["auto"],
        metavar="WHEN",
        help="when the exact cheaper forms of reading and writing are taken: auto, always, never",
    )
    parser.add_argument(
        "--compile", nargs="+", choices=["no", "yes"], default=["no"], help="run our model through torch.compile"
    )
    parser.add_argument("--against", choices=["builtin"], help="compare with transformers' own Perceiver")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--training", action="store_true", help="time a training step")
    work.add_argument(
        "--scaling", nargs="+", choices=list(SIZES), metavar="AXIS", help=f"time growing {', '.join(SIZES)}"
    )
    work.add_argument("--read", nargs="+", type=Path, metavar="FILE", help="show the rows of these --json files")
    parser.add_argument("--largest", type=int, metavar="N", help="--scaling: leave out what is larger")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tf32", action="store_true", help="on a GPU, multiply float32 as TF32, on both sides")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--builtin-chunks", type=int, default=4, help="multimodal: how many of its 128 passes are timed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are written")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where a picture is drawn, .png or .svg")
    return parser


def parse(argv: Sequence[str] | None, workloads: dict[str, Workload]) -> argparse.Namespace:
    """Checked arguments; exits with code 2 and one line that says what is wrong."""
    parser = make_parser(workloads)
    arguments = parser.parse_args(argv)
    known = ["eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())]
    for backend in arguments.backends:
        if backend not in known:
            parser.error(f"unknown backend {backend!r}; transformers has {', '.join(known)}")
    for name in ("threads", "repeats", "builtin_chunks", "largest"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is a whole number from 1, not {value}")
    if arguments.builtin_chunks > (most := max(workload.builtin_passes for workload in workloads.values())):
        parser.error(f"--builtin-chunks is at most {most}, not {arguments.builtin_chunks}")
    if arguments.scaling:
        for name in ("models", "against"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} does not go with --scaling, which has a model of its own; leave it out")
        for axis in arguments.scaling:
            if arguments.largest is not None and arguments.largest < SIZES[axis][0]:
                parser.error(f"--largest {arguments.largest}: {axis} start at {SIZES[axis][0]}")
    elif arguments.largest is not None:
        parser.error("--largest goes with --scaling")
    # Of a step for a few answers there is no use.
    trainable = [name for name, workload in workloads.items() if workload.output_points is None]
    if arguments.models is None:
        arguments.models = trainable if arguments.training else list(workloads)
    if arguments.training:
        for name in arguments.models:
            if name not in trainable:
                parser.error(f"--training has no {name}; it has {', '.join(trainable)}")
        for dtype in arguments.dtypes:
            if dtype not in TRAINING_DTYPES:
                parser.error(f"--training runs in {' and '.join(TRAINING_DTYPES)}, not in {dtype}")
    for name in ("models", "dtypes", "backends", "fast_attention", "compile", "scaling"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name) or [])))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave the option out to run on the CPU")
    if arguments.tf32 and arguments.device != "cuda":
        parser.error("--tf32 is of GPUs; add --device cuda")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f"--{name} {path}: is a folder or lies in none; name a file in a folder that exists")
    try:
        arguments.rows = read_json(arguments.read or ())
        if arguments.plot is not None:
            check_plot(arguments.plot, arguments.rows)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def measure(arguments: argparse.Namespace, workloads: dict[str, Workload]) -> Iterator[list[Row]]:
    """Rows as they are measured, a few at a time, with a line that says what is done and since when."""
    compiled = [choice == "yes" for choice in arguments.compile]
    ways = (arguments.backends, arguments.fast_attention, compiled)
    with tqdm(file=sys.stderr, bar_format="{elapsed} {desc}") as progress:
        shared = {
            "device": arguments.device,
            "tf32": arguments.tf32,
            "repeats": arguments.repeats,
            "step": progress.set_description_str,
        }
        if arguments.scaling:
            use_tf32(arguments.tf32)
            yield from scaling_rows(arguments.scaling, arguments.dtypes, *ways, largest=arguments.largest, **shared)
            return
        for name in arguments.models:
            compare = TrainingComparison if arguments.training else Comparison
            comparison = compare(
                name,
                workloads[name],
                against=arguments.against,
                builtin_passes_timed=arguments.builtin_chunks,
                **shared,
            )
            for dtype in arguments.dtypes:
                yield comparison.rows(dtype, *ways)


def main(argv: Sequence[str] | None = None, workloads: dict[str, Workload] = WORKLOADS) -> int:
    arguments = parse(argv, workloads)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for more in [arguments.rows] if arguments.read else measure(arguments, workloads):
        rows += more
        if arguments.json is not None:
            write_json(rows, arguments.json)
    print(table(rows))
    if arguments.plot is not None and any(row["seconds"] for row in rows):
        plot(rows, arguments.plot)
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
