import pytest
import torch

from hf_perceiver import PerceiverIOModel, recipes

# Exactly, where the count of DeepMind's own parameter tree is known (tests/reference/parity/manifests) or the paper's
# is exact; in millions as printed otherwise.
RELEASED = {
    "language_bytes": 201_108_230,
    "imagenet_learned": 62_255_848,
    "imagenet_fourier": 48_440_627,
    "imagenet_conv": 48_646_522,
    "optical_flow": 41_057_134,
    "multimodal_autoencoder": 19_858_855,
}
PUBLISHED = {
    "language_sentencepiece": 223.16,
    "language_bytes_plus": 425.61,
    "optical_flow_small": 27.91,
    "original_perceiver_imagenet": 44.91,
    "original_perceiver_imagenet_unshared": 326.24,
}


def count(name):
    with torch.device("meta"):
        model = PerceiverIOModel(getattr(recipes, name)())
    return model.num_parameters()


def test_every_recipe_is_counted():
    made = {n for n in vars(recipes) if n[0].islower() and getattr(recipes, n).__module__ == recipes.__name__}
    assert made == {*RELEASED, *PUBLISHED, "imagenet_config_b"}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_exactly_their_parameters(name):
    assert count(name) == RELEASED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_papers_parameters(name):
    assert round(count(name) / 1e6, 2) == PUBLISHED[name]


def test_config_b_has_a_million_more_than_the_paper_prints():
    # Perceiver IO, appendix A.2 says 212M; nothing in it tells where the other million is.
    assert count("imagenet_config_b") == 213_082_618


@pytest.mark.parametrize("name", [*RELEASED, *PUBLISHED, "imagenet_config_b"])
def test_a_recipe_names_its_source(name):
    assert any(source in getattr(recipes, name).__doc__ for source in (".ipynb", "IO ", "P1 "))


# What the released models read, and what they give: a batch of one on the meta device, where nothing is computed.
SHAPES = {
    "language_bytes": ({"input_ids": (1, 2048)}, (1, 2048, 262)),
    "imagenet_learned": ({"pixel_values": (1, 3, 224, 224)}, (1, 1000)),
    "imagenet_fourier": ({"pixel_values": (1, 3, 224, 224)}, (1, 1000)),
    "imagenet_conv": ({"pixel_values": (1, 3, 224, 224)}, (1, 1000)),
    "imagenet_config_b": ({"pixel_values": (1, 3, 224, 224)}, (1, 1000)),
    "optical_flow": ({"pixel_values": (1, 2, 27, 368, 496)}, (1, 368, 496, 2)),
    "original_perceiver_imagenet": ({"pixel_values": (1, 3, 224, 224)}, (1, 1000)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_inputs_and_outputs_have_the_released_sizes(name):
    inputs, wanted = SHAPES[name]
    with torch.device("meta"):
        model = PerceiverIOModel(getattr(recipes, name)()).eval()
        given = {n: torch.zeros(s, dtype=torch.long if n == "input_ids" else torch.float32) for n, s in inputs.items()}
        with torch.no_grad():
            out = model(**given)
    assert tuple(out.logits.shape) == wanted
    assert tuple(out.last_hidden_state.shape) == (1, model.config.num_latents, model.config.d_latents)


def test_the_autoencoder_reads_and_gives_the_released_sizes():
    with torch.device("meta"):
        model = PerceiverIOModel(recipes.multimodal_autoencoder()).eval()
        inputs = {
            "image": torch.zeros(1, 16, 3, 224, 224),
            "audio": torch.zeros(1, 30_720, 1),
            "label": torch.zeros(1, 700),
        }
        with torch.no_grad():
            encoding = model.encode(inputs)
            assert encoding.input_array.sizes == {"audio": 1920, "image": 50_176, "label": 1}
            assert encoding.input_array.dense().shape == (1, 52_097, 704)
            out = model.decode(encoding, chunk_size=100_000)
    shapes = {name: tuple(values.shape) for name, values in out.items()}
    assert shapes == {"audio": (1, 30_720), "image": (1, 16, 224, 224, 3), "label": (1, 700)}
    assert model.output_query.channels == 1026


def test_the_flow_queries_are_the_input_array():
    with torch.device("meta"):
        model = PerceiverIOModel(recipes.optical_flow())
    assert model.preprocessor.channels == model.output_query.channels == 322
