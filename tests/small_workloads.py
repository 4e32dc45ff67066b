"""The benchmark's workloads in sizes that run in milliseconds; of a module, so that another process can make them too."""

from dataclasses import replace
from functools import partial

from builtin_models import builtin_case

from hf_perceiver import PerceiverIOConfig
from hf_perceiver.benchmark.workloads import WORKLOADS, make_clip, make_grid, make_text


def tiny_config(name):
    """Our config of the tests' tiny built-in; without dropout, as released, for two sides would draw differently."""
    return PerceiverIOConfig.from_dict(builtin_case(name).config(architectures=[name]).to_dict(), attention_dropout=0.0)


def tiny_workload(model, builtin, make_inputs, **changes):
    return replace(WORKLOADS[model], recipe=partial(tiny_config, builtin), make_inputs=make_inputs, **changes)


# As the released six.
SMALL = {
    "masked-lm": tiny_workload("masked-lm", "PerceiverForMaskedLM", partial(make_text, 20, 30)),
    "masked-lm-60": tiny_workload(
        "masked-lm-60", "PerceiverForMaskedLM", partial(make_text, 6, 30), output_points=range(2, 5)
    ),
    "masked-lm-60-padded": tiny_workload(
        "masked-lm-60-padded",
        "PerceiverForMaskedLM",
        partial(make_text, 6, 30),
        output_points=range(2, 5),
        builtin_length=20,
    ),
    "imagenet-learned": tiny_workload(
        "imagenet-learned", "PerceiverForImageClassificationLearned", partial(make_grid, 3, 8, 8)
    ),
    "imagenet-fourier": tiny_workload(
        "imagenet-fourier", "PerceiverForImageClassificationFourier", partial(make_grid, 3, 9, 7)
    ),
    "imagenet-conv": tiny_workload(
        "imagenet-conv", "PerceiverForImageClassificationConvProcessing", partial(make_grid, 3, 33, 26)
    ),
    "optical-flow": tiny_workload("optical-flow", "PerceiverForOpticalFlow", partial(make_grid, 2, 27, 6, 10)),
    "multimodal": tiny_workload(
        "multimodal",
        "PerceiverForMultimodalAutoencoding",
        partial(make_clip, 2, 16, 64, 5),
        builtin_passes=8,
        training_points=(("image", 6), ("audio", 3)),
    ),
}
