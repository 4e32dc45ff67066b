"""What the parity tests share: the stored models, and how DeepMind's arguments and parameters become one of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.deepmind_config import config_from_deepmind
from conversion.haiku_names import convert_params
from conversion.verify import at_the_boundary, flow_patches, relative, run
from hf_perceiver import PerceiverIOModel

__all__ = ["MODELS", "PARITY", "at_the_boundary", "build", "flow_patches", "relative", "run"]

PARITY = Path(__file__).parent.parent / "reference" / "parity"

# Stored model -> the wiring it was made with.
MODELS = {
    "masked_lm": "masked-lm",
    "imagenet_learned": "imagenet-learned",
    "imagenet_fourier": "imagenet-fourier",
    "imagenet_conv": "imagenet-conv",
    "optical_flow": "optical-flow",
    "multimodal": "multimodal",
    "extra_concat_query": "dense",
}


def build(wiring: str, config: Mapping[str, Any], params: Any, state: Any = None, **known: Any) -> PerceiverIOModel:
    """DeepMind's arguments and parameters -> our model, every name accounted for."""
    ours = config_from_deepmind(wiring, config, params=params, **known)
    model = PerceiverIOModel(ours).eval()
    model.load_state_dict(convert_params(params, state, ours), strict=True)
    return model
