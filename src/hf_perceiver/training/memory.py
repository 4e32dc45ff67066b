"""How much memory training takes, computed without taking it: python -m hf_perceiver.training.memory --help

A training step runs on torch's meta device, where tensors have sizes and no contents; what is alive at one time is added
up. Weights, gradients and the optimizer's two moments (AdamW, LAMB) are float32, as Trainer keeps them also with `--bf16`.
"""

import argparse
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import recipes
from ..attention import CrossAttentionLayer, SelfAttentionLayer
from ..configuration_perceiver_io import PerceiverIOConfig
from ..modeling_perceiver_io import PerceiverIOModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTIONS = ("fused", "eager")
# What CUDA's autocast computes in 16 bits, and what in 32 whatever comes in.
NARROW = {F.linear, F.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__}
WIDE = {F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, Tensor.log_softmax}


@dataclass
class Memory:
    """Bytes on each device; `gathered`: the weights of others that FSDP holds at one time, 0 on a single device.

    inputs: the shape of one example's, that of its modalities.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0
    inputs: str = ""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered


def training_memory(
    config: PerceiverIOConfig,
    batch_size: int,
    *,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    attention: str = "fused",
    shards: int = 1,
) -> Memory:
    """What one step of Trainer holds at most, on each of `shards` devices, with `batch_size` examples on each.

    dtype: "bfloat16" is autocast's. attention: "fused" keeps no attention weights, as flash and memory-efficient kernels;
    "eager" keeps them. shards: FSDP2, layer by layer. Raises ValueError for an unknown choice.
    """
    for what, value, known in (("dtype", dtype, DTYPES), ("attention", attention, ATTENTIONS)):
        if value not in known:
            raise ValueError(f"{what}={value!r} must be one of {', '.join(known)}")
    for what, count in (("batch_size", batch_size), ("shards", shards)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{what} is a whole number from 1, not {count!r}")
    config = PerceiverIOConfig.from_dict(config.to_dict())
    with torch.device("meta"):
        model = PerceiverIOModel(config).train()
    model.config._attn_implementation = "eager" if attention == "eager" else "sized_only"
    if gradient_checkpointing:
        # The mode is not there in a backward, where layers are computed again, casts and all.
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), Autocast(DTYPES[dtype], keep=False))}
        # Its name from transformers 5.2x on; the older one is going.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(options)
    inputs = example_inputs(model, config.preprocessor, batch_size)
    shapes = describe(next(iter(inputs.values())))
    activations = measure(model, inputs, dtype)
    weights = count_bytes(model)
    gathered = 0
    if shards > 1:
        layers = [
            count_bytes(layer)
            for layer in model.modules()
            if isinstance(layer, (SelfAttentionLayer, CrossAttentionLayer))
        ]
        # The layer at work and the next one, and all that is in no layer.
        gathered = 2 * max(layers) + weights - sum(layers)
    share = math.ceil(weights / shards)
    return Memory(share, share, 2 * share, activations, gathered, shapes)


def describe(given: Any) -> str:
    """Shapes of one example: "3x224x224", "audio 30720x1, image 16x3x224x224"."""
    if isinstance(given, dict):
        return ", ".join(f"{name} {describe(value)}" for name, value in sorted(given.items()))
    return "x".join(map(str, given.shape[1:]))


def count_bytes(module: nn.Module) -> int:
    """Of its parameters, in float32."""
    return sum(4 * p.numel() for p in module.parameters())


def measure(model: Any, inputs: dict[str, Any], dtype: str) -> int:
    """Bytes that are alive at once in a step, beside weights and gradients; on the device on which model and inputs are."""
    # Gradients are there from the step before, and are not counted: each is added to, and let go.
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    live = LiveBytes([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())])
    with live, Autocast(DTYPES[dtype]) as autocast:
        logits = model(**inputs, output_points=loss_points(model, inputs)).logits
        # Every loss keeps one tensor of the outputs' size, in float32.
        loss: Any = sum(values.float().square().sum() for values in tree_leaves(logits))
        del logits
        autocast.forget()
        loss.backward()
    return live.peak


def loss_points(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor | None] | None:
    """Points of each modality that are decoded in training, where the config draws some of them."""
    counts = {name: n for name, n in (getattr(model.postprocessor, "num_loss_points", None) or {}).items() if n}
    if not counts or not isinstance(next(iter(inputs.values())), dict):
        return None
    (given,) = inputs.values()
    first = next(iter(given.values()))
    asked: dict[str, Tensor | None] = dict.fromkeys(model.output_query.modalities)
    for name, count in counts.items():
        asked[name] = torch.zeros(len(first), count, dtype=torch.long, device=first.device)
    return asked


def example_inputs(model: Any, preprocessor: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Inputs of the size that a config's positions are made for, on the model's device."""
    name = model.main_input_name if preprocessor["kind"] != "multimodal" else "inputs"
    return {name: make_input(preprocessor, batch_size, next(model.parameters()).device)}


def make_input(spec: dict[str, Any], batch_size: int, device: torch.device) -> Any:
    """What a preprocessor of this spec reads; ValueError where its positions do not say the size."""
    kind = spec["kind"]
    if kind == "multimodal":
        return {name: make_input(part, batch_size, device) for name, part in spec["modalities"].items()}
    if kind == "vector":
        return torch.zeros(batch_size, spec["channels"], device=device)
    sizes = grid_of(spec.get("position"))
    if sizes and kind == "text":
        return torch.zeros(batch_size, sizes[0], dtype=torch.long, device=device)
    if sizes and kind == "grid":
        shape = input_shape(spec["stem"], sizes)
        if shape:
            return torch.zeros(batch_size, *shape, device=device)
    raise ValueError(f"the size of the inputs does not follow from this preprocessor: {spec}")


def grid_of(position: dict[str, Any] | None) -> list[int]:
    """The sizes of the grid that a position is made for."""
    position = position or {}
    position = position.get("position", position)  # a projected one holds another
    count = position.get("num_positions")
    return list(position.get("max_resolution") or position.get("grid") or ([count] if count else []))


def input_shape(stem: dict[str, Any], grid: list[int]) -> tuple[int, ...]:
    """Of one example, whose stem gives features on `grid`; empty for a stem that is not known here."""
    kind = stem["kind"]
    if kind == "permuted":
        return input_shape(stem["stem"], grid) if "stem" in stem else ()
    if kind == "audio_patches":
        # The resolution is the number of patches, or in DeepMind's autoencoder that of the samples.
        patch = stem.get("samples_per_patch", 96)
        return (grid[0] if grid[0] > 4096 and grid[0] % patch == 0 else grid[0] * patch), 1
    if kind == "spectrogram":
        return (grid[0], 1) if stem.get("flatten") else tuple(grid)
    if kind not in ("pixels", "conv1x1", "patches", "conv"):
        return ()
    *time, height, width = grid
    # A convolution and a pooling, each of which halves.
    step = 4 ** stem.get("num_layers", 1) if kind == "conv" else stem.get("spatial_downsample", 1)
    frames = stem.get("temporal_downsample", 1) * (time[0] if time else 1)
    return (*([frames] if time or frames > 1 else []), stem.get("in_channels", 3), height * step, width * step)


class LiveBytes(TorchDispatchMode):
    """Adds up what is alive: `now`, and at most so far, `peak`; without the tensors that it is given."""

    def __init__(self, without: Sequence[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known: Any = WeakIdKeyDictionary()
        for tensor in without:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self._see, func(*args, **(kwargs or {})))

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._let_go, storage.nbytes())
        return tensor

    def _let_go(self, count: int) -> None:
        self.now -= count


class Autocast(TorchFunctionMode):
    """What torch.autocast does on CUDA, on the meta device, which it does not know: weights are cast once in a forward."""

    def __init__(self, dtype: torch.dtype, keep: bool = True):
        super().__init__()
        self.dtype = dtype
        self.casts: dict[Tensor, Tensor] | None = {} if keep else None

    def forget(self) -> None:
        """At the end of the forward."""
        self.casts = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and (func in NARROW or func in WIDE):
            wanted = self.dtype if func in NARROW else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda t: self._cast(t, wanted), (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor, wanted: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == wanted:
            return tensor
        if self.casts is None or not tensor.is_leaf or not tensor.requires_grad:
            return tensor.to(wanted)
        if tensor not in self.casts:
            self.casts[tensor] = tensor.to(wanted)
        return self.casts[tensor]


class SizedOnly(torch.autograd.Function):
    """The sizes of a fused attention: it keeps queries, keys, values, its output, and one number of each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def sized_only(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    return SizedOnly.apply(q, k, v).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("sized_only", sized_only)


def size(count: int) -> str:
    """1234567890 -> "1.23 GB" """
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def table(rows: list[tuple[str, Memory]], shards: int) -> str:
    """Markdown, one row a model."""
    heads = [
        "model",
        "inputs",
        "weights",
        "gradients",
        "optimizer",
        *(["gathered"] if shards > 1 else []),
        "activations",
        "total",
    ]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for name, memory in rows:
        lines.append([name, memory.inputs, *(size(getattr(memory, column)) for column in heads[2:])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def published() -> dict[str, Callable[[], PerceiverIOConfig]]:
    """The recipes by name."""
    return {name: value for name, value in vars(recipes).items() if callable(value) and name[0].islower()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hf_perceiver.training.memory",
        description="Memory that training takes, computed: weights, gradients, optimizer state, activations.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", nargs="+", metavar="NAME", help="published architectures, see hf_perceiver.recipes")
    what.add_argument("--model", metavar="DIR", help="a folder with a config.json, or a name on the Hub")
    parser.add_argument("--batch_size", type=int, default=1, help="examples on each device (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 is what Trainer's --bf16 does")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="keep the layers' inputs alone")
    parser.add_argument("--attention", choices=ATTENTIONS, default="fused", help="eager keeps attention weights")
    parser.add_argument("--shards", type=int, default=1, help="devices among which FSDP2 divides the weights")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    known = published()
    if unknown := [name for name in asked.recipe or () if name not in known]:
        print(f"error: no recipe {', '.join(unknown)}; there are: {', '.join(sorted(known))}", file=sys.stderr)
        return 1
    rows = []
    try:
        if asked.model:
            configs: dict[str, Any] = {asked.model: lambda: PerceiverIOConfig.from_pretrained(asked.model)}
        else:
            configs = {name: known[name] for name in asked.recipe}
        for name, make in tqdm(configs.items(), disable=len(configs) < 2):
            memory = training_memory(
                make(),
                asked.batch_size,
                dtype=asked.dtype,
                gradient_checkpointing=asked.gradient_checkpointing,
                attention=asked.attention,
                shards=asked.shards,
            )
            rows.append((name, memory))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows, asked.shards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
