import numpy as np
import pytest
import torch

from hf_perceiver.heads_text import PerceiverIOForMaskedLM
from hf_perceiver.training.first_guess import start_from_frequencies
from hf_perceiver.training.train_language import language_config


def fresh_model() -> PerceiverIOForMaskedLM:
    torch.manual_seed(0)
    return PerceiverIOForMaskedLM(language_config(num_self_attends_per_block=2)).eval()


def test_the_first_guess_is_the_bytes_frequency():
    model = fresh_model()
    counts = np.zeros(256)
    counts[[32, 101]] = 900, 100
    start_from_frequencies(model, counts)
    with torch.no_grad():
        logits = model(input_ids=torch.randint(6, 262, (2, 128))).logits
    assert (logits.argmax(-1) == 32 + 6).float().mean() > 0.95
    # The bias alone gives 0.71: 901 of 1,262 with one for each token.
    assert logits.softmax(-1)[..., 32 + 6].mean().item() == pytest.approx(0.71, abs=0.1)


def test_other_counts_are_refused():
    with pytest.raises(ValueError, match=r"256 bytes, not \(262,\)"):
        start_from_frequencies(fresh_model(), np.zeros(262))
