"""A fresh language model's first guess: how often each byte occurs in the text that it is going to learn.

The one part of a good start that needs the data, and so is no initialiser: it saves the steps in which a model would
learn these frequencies first. What else starts a small model well is `initializer="position_aligned"`.
"""

from typing import Any

import numpy as np
import torch

READ_OUT_GAIN = 0.3  # the read-out's weights start small, or they would drown the bias


@torch.no_grad()
def start_from_frequencies(model: Any, byte_counts: np.ndarray) -> None:
    """Let a PerceiverIOForMaskedLM over bytes start out telling these 256 counts, whatever it reads.

    Raises ValueError for another number of counts.
    """
    if byte_counts.shape != (256,):
        raise ValueError(f"byte_counts is one number for each of the 256 bytes, not {byte_counts.shape}")
    read_out = model.perceiver.postprocessor.output_embedding
    read_out.weight *= READ_OUT_GAIN
    # One for each token, those before the bytes too, so that none is impossible.
    counts = torch.ones(len(read_out.bias), dtype=torch.float64)
    counts[-256:] += torch.as_tensor(byte_counts)
    read_out.bias.copy_(torch.log(counts / counts.sum()))
