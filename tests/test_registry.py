import typing

import pytest
from torch import nn

from hf_perceiver import registry
from hf_perceiver.registry import (
    OUTPUT_QUERIES,
    POSITION_ENCODINGS,
    POSTPROCESSORS,
    PREPROCESSORS,
    STEMS,
    Registry,
    check_spec,
)

# What ships; a kind that goes is a checkpoint that no longer loads.
KINDS = {
    "stem": (STEMS, {"pixels", "conv", "conv1x1", "patches", "audio_patches", "spectrogram", "permuted", "values"}),
    "position encoding": (POSITION_ENCODINGS, {"fourier", "trainable", "projected", "none"}),
    "preprocessor": (PREPROCESSORS, {"text", "grid", "vector", "points", "multimodal"}),
    "output query": (OUTPUT_QUERIES, {"position", "tasks", "input", "multimodal"}),
    "postprocessor": (
        POSTPROCESSORS,
        {
            "tokens",
            "classification",
            "projection",
            "audio",
            "flow",
            "convex_upsampling",
            "multimodal",
            "average",
            "identity",
        },
    ),
}


class Gadget(nn.Module):
    def __init__(
        self,
        *,
        size: int,
        scale: float = 1.0,
        mode: typing.Literal["a", "b"] = "a",
        widths: list[int] | None = None,
        parts: dict[str, dict] | None = None,
        flag: bool = False,
        name: str = "",
        anything=None,
        config: typing.Any = None,
    ):
        super().__init__()
        self.size, self.config, self.anything = size, config, anything


@pytest.fixture
def gadgets():
    made = Registry("gadget", context=("config",))
    made.register("plain")(Gadget)
    return made


@pytest.mark.parametrize("part", KINDS)
def test_every_shipped_kind_is_known_and_protected(part):
    table, kinds = KINDS[part]
    assert table.part == part
    assert kinds <= set(table.classes)
    assert kinds <= table.packaged


@pytest.mark.parametrize("part", KINDS)
def test_every_part_has_its_register_function(part):
    register = getattr(registry, f"register_{part.replace(' ', '_')}")
    assert register == KINDS[part][0].register


@pytest.mark.parametrize("part", KINDS)
def test_an_unknown_kind_is_told_the_known_ones_and_how_to_bring_ones_own(part):
    table, kinds = KINDS[part]
    with pytest.raises(ValueError, match=f"unknown {part} kind 'nope'") as error:
        table.build({"kind": "nope"})
    message = str(error.value)
    assert all(kind in message for kind in kinds)
    assert f"register_{part.replace(' ', '_')}('nope')" in message
    assert "save_with_code" in message


def test_an_unknown_option_is_told_the_known_ones(gadgets):
    with pytest.raises(
        ValueError, match="unknown option 'sise' for gadget kind 'plain'; its options: size, scale, mode"
    ):
        gadgets.build({"kind": "plain", "sise": 3})


def test_what_the_model_gives_is_no_option(gadgets):
    assert "config" not in gadgets.options("plain")
    with pytest.raises(ValueError, match="unknown option 'config'"):
        gadgets.build({"kind": "plain", "size": 3, "config": 1}, config="the model's")


def test_a_missing_option_is_named(gadgets):
    with pytest.raises(ValueError, match="gadget kind 'plain' needs the option 'size'"):
        gadgets.build({"kind": "plain"})


def test_the_model_gives_only_what_a_constructor_asks_for(gadgets):
    assert gadgets.build({"kind": "plain", "size": 3}, config="the model's", preprocessor="not asked for").config == (
        "the model's"
    )


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("size", [3], ["3", 3.0, None, True, [3]]),
        ("scale", [1, 0.5], ["1", None, False]),
        ("mode", ["a", "b"], ["c", 1]),
        ("widths", [None, [], [1, 2], (1, 2)], [3, "12", ["1"], [1.5], {"1": 1}]),
        ("parts", [None, {}, {"a": {"kind": "b"}}], [[], "a", {"a": "b"}]),
        ("flag", [True, False], [0, "yes", None]),
        ("name", ["x"], [1, None]),
        ("anything", [1, "x", None, [1]], []),
    ],
)
def test_an_option_of_another_type_is_refused(gadgets, option, good, bad):
    for value in good:
        gadgets.build({"kind": "plain", "size": 3, option: value})
    for value in bad:
        with pytest.raises(ValueError, match=f"option '{option}' of gadget kind 'plain' must be of type") as error:
            gadgets.build({"kind": "plain", "size": 3, option: value})
        assert repr(value) in str(error.value)


def test_annotations_as_text_check_nothing_and_break_nothing():
    made = Registry("gadget")

    @made.register("text")
    class Text(nn.Module):
        def __init__(self, *, size: "int"):
            super().__init__()

    made.build({"kind": "text", "size": "three"})


def test_a_constructor_that_takes_any_option_gets_them_all():
    made = Registry("gadget")

    @made.register("open")
    class Open(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

    assert made.build({"kind": "open", "a": 1, "b": [2]}).options == {"a": 1, "b": [2]}


def test_a_users_kind_may_be_registered_again(gadgets):
    gadgets.register("mine")(Gadget)

    class Other(Gadget):
        pass

    gadgets.register("mine")(Other)
    assert type(gadgets.build({"kind": "mine", "size": 1})) is Other


def test_a_shipped_kind_cannot_be_replaced(gadgets):
    gadgets.seal()

    class Other(nn.Module):
        pass

    with pytest.raises(ValueError, match="gadget kind 'plain' ships with hf_perceiver; choose another name"):
        gadgets.register("plain")(Other)
    gadgets.register("plain")(Gadget)  # the same class, as when a module is imported again


def test_a_namesake_of_a_shipped_class_cannot_replace_it_either():
    namesake = type("PixelStem", (nn.Module,), {"__module__": "my_stems"})
    with pytest.raises(ValueError, match="ships with hf_perceiver"):
        STEMS.register("pixels")(namesake)
    # From the Hub the package's own files come as modules of another package.
    again = type("PixelStem", (STEMS.classes["pixels"],), {"__module__": "transformers_modules.repo.stems"})
    before = STEMS.classes["pixels"]
    try:
        STEMS.register("pixels")(again)
    finally:
        STEMS.classes["pixels"] = before


@pytest.mark.parametrize("kind", ["", None, 3])
def test_a_kind_is_a_word(gadgets, kind):
    with pytest.raises(ValueError, match="a gadget kind is a non-empty string"):
        gadgets.register(kind)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text", "the stem is described by a dict such as {'kind': ...}, not 'text'"),
        (None, "not None"),
        ({}, "needs a 'kind' that is a string"),
        ({"kind": 3}, "needs a 'kind' that is a string"),
        ({"kind": "a", "b": {1, 2}}, "must fit into config.json"),
        ({"kind": "a", "b": float("nan")}, "must fit into config.json"),
        ({"kind": "a", "b": nn.ReLU()}, "must fit into config.json"),
    ],
)
def test_a_spec_is_a_json_dict_with_a_kind(spec, message):
    with pytest.raises(ValueError) as error:
        check_spec("stem", spec)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("table", "spec", "message"),
    [
        (STEMS, {"kind": "pixels", "in_channels": 0}, "'in_channels' of stem kind 'pixels' must be at least 1, not 0"),
        (STEMS, {"kind": "patches", "project": 0}, "'project' .* at least 1, not 0; leave it out, or null, for none"),
        (STEMS, {"kind": "values", "channels": -4}, "'channels' .* at least 1, not -4"),
        (PREPROCESSORS, {"kind": "vector", "channels": 0}, "'channels' .* at least 1, not 0"),
        (PREPROCESSORS, {"kind": "text", "channels": -1}, "'channels' .* at least 1, not -1"),
        (PREPROCESSORS, {"kind": "points", "feature_channels": -3}, "'feature_channels' .* at least 0, not -3"),
        (
            POSITION_ENCODINGS,
            {"kind": "projected", "position": {"kind": "none"}, "num_extra_mlps": -1},
            "'num_extra_mlps' .* at least 0, not -1",
        ),
        (
            OUTPUT_QUERIES,
            {"kind": "position", "position": {"kind": "none"}, "grid": [0, 3]},
            r"'grid' of output query kind 'position' must hold sizes of at least 1, one or more, not \[0, 3\]",
        ),
        (OUTPUT_QUERIES, {"kind": "position", "position": {"kind": "none"}, "scale": []}, "'scale' .* one or more"),
        (POSTPROCESSORS, {"kind": "projection", "num_outputs": 0}, "'num_outputs' .* at least 1, not 0; leave it out"),
        (POSTPROCESSORS, {"kind": "audio", "samples_per_patch": 0}, "'samples_per_patch' .* at least 1, not 0"),
        (POSTPROCESSORS, {"kind": "classification", "hidden": -2}, "'hidden' .* at least 1, not -2"),
    ],
)
def test_sizes_that_nothing_can_have_are_refused(table, spec, message):
    with pytest.raises(ValueError, match=message):
        table.build(spec, config=None, preprocessor=None, in_channels=4)


def test_a_users_part_may_count_from_anywhere():
    table = Registry("gadget")
    table.register("mine")(Gadget)
    assert table.build({"kind": "mine", "size": -1}).size == -1
