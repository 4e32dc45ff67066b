"""Linear maps at inference on the CPU by oneDNN, one of the two libraries that torch is built with.

torch gives float32 products to the other, MKL, which on an AMD EPYC is 3 to 21 % slower at the shapes of the released models,
see docs/performance.md; on Intel's processors they were not compared. Both round as float32 does, in another order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Fewer rows than this are no slower in MKL.
FEWEST_ROWS = 128
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: (..., K), (E, K), (E,) -> (..., E)"""
    if not suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def apply(layer: Any, x: Tensor) -> Tensor:
    """layer(x); a plain linear layer by `product`."""
    # Adapters, quantised and sharded weights are other classes, and what watches a layer wants to be called.
    if torch.is_grad_enabled() or type(layer) is not nn.Linear or is_watched(layer):
        return layer(x)
    if type(layer.weight) is not nn.Parameter:
        return layer(x)
    return product(x, layer.weight, layer.bias)


def is_watched(module: nn.Module) -> bool:
    """Whether something hangs on the calls of a module."""
    # transformers leaves its recorders in place; they see nothing unless attention maps are asked for.
    hooks = [h for h in module._forward_hooks.values() if getattr(h, "__name__", "") != "output_capturing_hook"]
    return bool(hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or "forward" in vars(module))


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may be asked, and is no slower."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    if not (HAS_ONEDNN and torch.backends.mkldnn.enabled) or torch.is_autocast_enabled("cpu"):
        return False
    known = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype in (torch.float32, torch.bfloat16)
    return known and weight.is_contiguous() and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
