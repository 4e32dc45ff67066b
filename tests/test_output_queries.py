import pytest
import torch
from helpers import VOCAB, config_of, fourier, grid, tiny, trainable
from torch import nn

from hf_perceiver.arrays import ArrayPart, InputArray, QueryArray
from hf_perceiver.output_queries import check_points
from hf_perceiver.position_encoding import AxisCode, take_rows
from hf_perceiver.registry import OUTPUT_QUERIES, PREPROCESSORS

PIXELS = grid({"kind": "pixels", "in_channels": 3}, fourier(6, 5))


def built(spec, preprocessor=PIXELS):
    """An output query and the preprocessor of its input, with drawn weights."""
    config = config_of()
    reads = PREPROCESSORS.build(preprocessor, config=config).eval()
    query = OUTPUT_QUERIES.build(spec, config=config, preprocessor=reads)
    for parameter in (*query.parameters(), *reads.parameters()):
        nn.init.normal_(parameter)
    return query.eval(), reads


def image(reads, batch=2, height=4, width=3, mask=None):
    return InputArray.of(reads(torch.randn(batch, 3, height, width), mask))


def asked(query, *args, **kwargs):
    made = query(*args, **kwargs)
    made = QueryArray.of(made)
    assert made.dense().shape[2] == query.channels
    return made


# --- positions


def test_the_grid_is_the_inputs():
    query, reads = built({"kind": "position", "position": fourier(6, 5)})
    for height, width in ((4, 3), (6, 5), (1, 9)):
        made = asked(query, image(reads, height=height, width=width))
        want = query.position.encode((height, width), device=torch.device("cpu"), dtype=torch.float32)
        assert torch.equal(made.dense(), want.dense(0, height * width))
        assert made.part.grid == (height, width)


def test_the_grid_can_be_a_multiple_of_the_inputs():
    query, reads = built({"kind": "position", "position": fourier(6, 5), "scale": [3, 1]})
    assert asked(query, image(reads)).part.grid == (12, 3)


def test_the_grid_can_be_fixed():
    query, reads = built({"kind": "position", "position": fourier(6, 5), "grid": [2, 2]})
    assert asked(query, image(reads)).part.grid == (2, 2)


def test_a_fixed_grid_serves_inputs_without_one():
    query, _ = built({"kind": "position", "position": fourier(6, 5), "grid": [2, 2], "scale": [2, 2]})
    a_set = InputArray.of(torch.randn(2, 7, 3))
    assert asked(query, a_set).part.grid == (2, 2)


@pytest.mark.parametrize("rule", ["dense", "sampled", "index"])
def test_chosen_points_keep_the_rule(rule):
    """Asking for points never changes where a point lies: chunks equal the whole."""
    query, reads = built({"kind": "position", "position": fourier(8, 8, rule=rule)})
    array = image(reads)
    whole = asked(query, array).dense()
    for points in (torch.tensor([11, 0, 5]), torch.tensor([[11, 0, 5], [1, 1, 2]]), [3, 2]):
        made = asked(query, array, output_points=points)
        want = take_rows(whole, torch.as_tensor(points))
        torch.testing.assert_close(made.dense(), want, rtol=0, atol=1e-6)
        assert made.part.grid is None


@pytest.mark.parametrize("batch", [None, 2])
def test_free_coordinates_make_finer_grids(batch):
    query, reads = built({"kind": "position", "position": fourier(6, 5)})
    array = image(reads)
    coordinates = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in (7, 5)], indexing="ij"), -1).reshape(
        -1, 2
    )
    given = coordinates if batch is None else coordinates.expand(batch, -1, -1)
    fine = asked(query, array, coordinates=given).dense()
    # Every second point of a 7 x 5 grid is a point of the input's 4 x 3 grid.
    coarse = fine.unflatten(1, (7, 5))[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(coarse, asked(query, array).dense().expand(coarse.shape), rtol=0, atol=1e-5)


def test_masked_elements_are_masked_queries_on_request():
    mask = torch.rand(2, 12) > 0.5
    for use, want in ((True, mask), (False, None)):
        query, reads = built({"kind": "position", "position": fourier(6, 5), "use_input_mask": use})
        made = asked(query, image(reads, mask=mask))
        assert (made.mask() is None) if want is None else torch.equal(made.mask(), want)
    query, reads = built({"kind": "position", "position": fourier(6, 5), "use_input_mask": True})
    points = torch.tensor([[11, 0, 5], [1, 1, 2]])
    assert torch.equal(asked(query, image(reads, mask=mask), points).mask(), mask.gather(1, points))
    with pytest.raises(ValueError, match="use_input_mask: 12 input elements for 24 queries"):
        query, reads = built({"kind": "position", "position": fourier(6, 5), "use_input_mask": True, "scale": [2, 1]})
        query(image(reads, mask=mask))


def test_the_inputs_features_can_come_first():
    query, reads = built({"kind": "position", "position": fourier(6, 5, concat_pos=False), "concat_input": True})
    array = image(reads)
    made = asked(query, array)
    code = query.position.encode((4, 3), device=torch.device("cpu"), dtype=torch.float32).dense(0, 12)
    # Without their own position, as DeepMind's inputs_without_pos.
    assert torch.equal(made.dense(), torch.cat([array.part.features, code.expand(2, -1, -1)], dim=-1))
    points = torch.tensor([[11, 0], [1, 2]])
    torch.testing.assert_close(asked(query, array, points).dense(), take_rows(made.dense(), points), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="holds the input's features cannot be asked at free coordinates"):
        query(array, coordinates=torch.zeros(1, 2))
    fixed, _ = built({"kind": "position", "position": fourier(6, 5), "concat_input": True, "grid": [2, 2]})
    with pytest.raises(ValueError, match="concat_input needs one input element per query: 12 for 4"):
        fixed(array)


def test_trained_queries_follow_a_shorter_text():
    text = {"kind": "text", "channels": 6, "position": trainable(8, 6)}
    query, reads = built({"kind": "position", "position": trainable(8, 5)}, text)
    array = InputArray.of(reads(torch.randint(0, VOCAB, (2, 3))))
    assert torch.equal(asked(query, array).dense()[0], query.position.embeddings[:3])


def test_trained_queries_can_be_interpolated():
    query, reads = built({"kind": "position", "position": trainable(12, 5, grid=[4, 3])})
    array = image(reads, height=5, width=5)
    with pytest.raises(ValueError, match="12 trained positions cannot label a 5x5 grid"):
        query(array)
    assert asked(query, array, interpolate_pos_encoding=True).length == 25


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"coordinates": torch.zeros(1, 2), "output_points": [0]}, "give output_points or coordinates, not both"),
        ({}, {"coordinates": torch.zeros(1, 3)}, "has 3 axes, the fourier position codes 2"),
        ({}, {"output_points": [12]}, "output_points 12..12 lie outside the output grid of 12 points"),
        ({}, {"output_points": [-1, 3]}, "output_points -1..3 lie outside"),
        ({}, {"output_points": [0.5]}, r"flat integer indices \(n,\) or \(batch, n\), not \(1,\) torch.float32"),
        ({}, {"output_points": torch.ones(12, dtype=torch.bool)}, "flat integer indices .* torch.bool"),
        ({}, {"output_points": torch.zeros(1, 2, 3, dtype=torch.long)}, r"not \(1, 2, 3\)"),
        ({"scale": [2]}, {}, r"scale=\[2\] has not the 2 axes of the input's grid"),
        ({"position": {"kind": "none"}}, {}, "a position query needs a position"),
        ({"position": trainable(9, 4)}, {}, "9 trained positions cannot label a 4x3 grid"),
        ({"position": trainable(12, 4)}, {"coordinates": torch.zeros(1, 2)}, "cannot be asked at coordinates"),
    ],
)
def test_bad_questions_are_refused(options, call, message):
    with pytest.raises(ValueError, match=message):
        query, reads = built({"kind": "position", "position": fourier(6, 5), **options})
        query(image(reads), **call)


def test_a_set_has_no_grid_to_ask_at():
    query, _ = built({"kind": "position", "position": fourier(6)})
    array = InputArray.of(torch.randn(2, 7, 3))
    with pytest.raises(
        ValueError, match=r"takes its grid from the input, which has none here .* grid=\[...\], or ask at"
    ):
        query(array)
    assert asked(query, array, coordinates=torch.zeros(4, 1)).length == 4


# --- tasks


def test_tasks_are_learned_queries_for_any_input():
    query, reads = built({"kind": "tasks", "channels": 6, "num_tasks": 3})
    array = image(reads)
    assert torch.equal(asked(query, array).dense(), query.task_queries[None])
    assert torch.equal(asked(query, array, [2, 0]).dense(), query.task_queries[None, [2, 0]])
    by_example = torch.tensor([[1], [2]])
    assert torch.equal(asked(query, array, by_example).dense(), query.task_queries[by_example])
    with pytest.raises(ValueError, match="task queries have no coordinates; choose tasks with output_points"):
        query(array, coordinates=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"output_points 3..3 lie outside the output grid of 3 points"):
        query(array, [3])


@pytest.mark.parametrize("options", [{"num_tasks": 0}, {"channels": 0}])
def test_there_is_a_task(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        built({"kind": "tasks", "channels": 6, **options})


# --- the input itself


def test_the_input_array_itself_asks():
    query, reads = built({"kind": "input"})
    mask = torch.rand(2, 12) > 0.5
    array = image(reads, mask=mask)
    made = asked(query, array)
    assert torch.equal(made.dense(), array.dense())
    assert torch.equal(made.mask(), mask)
    points = torch.tensor([[11, 0], [1, 2]])
    torch.testing.assert_close(asked(query, array, points).dense(), take_rows(array.dense(), points), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="made of the input's features cannot be asked at free coordinates"):
        query(array, coordinates=torch.zeros(1, 2))


def test_the_inputs_mask_can_be_left_out():
    query, reads = built({"kind": "input", "use_input_mask": False})
    array = image(reads, mask=torch.zeros(2, 12))
    assert asked(query, array).mask() is None
    assert array.mask() is not None  # the encoder's own is not touched


# --- several modalities


def several(**options):
    """Inputs a (a vector), b (a grid); asks b by position and c by tasks."""
    reads = {
        "kind": "multimodal",
        "mask_probs": {"a": 1.0, "b": 0.5},
        "modalities": {
            "a": {"kind": "vector", "channels": 3},
            "b": grid({"kind": "values", "channels": 4}, fourier(6)),
        },
    }
    spec = {
        "kind": "multimodal",
        "modalities": {
            "c": {"kind": "tasks", "channels": 9, "num_tasks": 2},
            "b": {"kind": "position", "position": fourier(6, rule="sampled"), "scale": [2]},
        },
        **options,
    }
    query, reads = built(spec, reads)
    inputs = {"a": torch.randn(2, 3), "b": torch.randn(2, 5, 4)}
    return query, reads, inputs


def test_modalities_are_asked_in_order_and_padded():
    query, reads, inputs = several(min_padding_size=3)
    made = asked(query, reads(inputs))
    assert query.channels == 9 + 3
    assert made.sizes == {"b": 10, "c": 2}
    code = query.modalities["b"].position.encode((10,), device=torch.device("cpu"), dtype=torch.float32).dense(0, 10)
    b = torch.cat([code, query.padding("b").expand(1, 10, -1)], dim=-1)
    c = torch.cat([query.modalities["c"].task_queries[None], query.padding("c").expand(1, 2, -1)], dim=-1)
    assert torch.equal(made.dense(), torch.cat([b, c], dim=1))


def test_only_what_is_named_is_asked():
    query, reads, inputs = several()
    array = reads(inputs)
    whole = asked(query, array)
    assert asked(query, array, {}).sizes == whole.sizes
    only = asked(query, array, {"c": None})
    assert only.sizes == {"c": 2}
    some = asked(query, array, {"b": torch.tensor([9, 0]), "c": [1]})
    assert some.sizes == {"b": 2, "c": 1}
    torch.testing.assert_close(some.parts["b"].dense(), whole.parts["b"].dense()[:, [9, 0]], rtol=0, atol=1e-6)
    mixed = asked(query, array, {"c": None}, {"b": torch.zeros(4, 1)})
    assert mixed.sizes == {"b": 4, "c": 2}


def test_unknown_modalities_are_refused():
    query, reads, inputs = several()
    array = reads(inputs)
    with pytest.raises(ValueError, match="unknown modality 'a' in output_points; known: b, c"):
        query(array, {"a": None})
    with pytest.raises(ValueError, match="unknown modality 'd' in coordinates; known: b, c"):
        query(array, None, {"d": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="output_points of a multimodal model is a dict by modality, not list"):
        query(array, [0])


def test_a_missing_modality_has_no_grid_rather_than_anothers():
    spec = {
        "kind": "multimodal",
        "modalities": {
            "a": {"kind": "position", "position": fourier(4)},
            "b": {"kind": "position", "position": fourier(6)},
        },
    }
    values = {"kind": "values", "channels": 4}
    reads = {"kind": "multimodal", "modalities": {"a": grid(values, fourier(4)), "b": grid(values, fourier(6))}}
    query, reads = built(spec, reads)
    array = reads({"b": torch.randn(2, 5, 4)})
    with pytest.raises(ValueError, match=r"which has none here .* a missing modality"):
        query(array)
    assert asked(query, array, {"b": None}).sizes == {"b": 5}
    assert asked(query, array, None, {"a": torch.zeros(3, 1)}).sizes == {"a": 3}
    spec["modalities"]["a"]["grid"] = [7]
    assert asked(
        built(
            spec, {"kind": "multimodal", "modalities": {"a": grid(values, fourier(4)), "b": grid(values, fourier(6))}}
        )[0],
        array,
    ).sizes == {
        "a": 7,
        "b": 5,
    }


def test_an_input_can_ask_beside_others_masked_as_it_was_read():
    query, reads, inputs = several(modalities={"b": {"kind": "input"}, "c": {"kind": "tasks", "channels": 20}})
    array = reads.train()(inputs)
    replaced = array.parts["b"].replaced
    assert replaced.any() and not replaced.all()
    rows = asked(query, array).parts["b"].dense()
    own = array.parts["b"].dense()[..., : query.modalities["b"].channels]  # masked as the encoder saw it
    assert torch.equal(rows[..., : own.shape[-1]], own)
    assert torch.equal(rows[..., own.shape[-1] :], query.padding("b").expand(2, 5, -1))
    missing = reads.eval()({"a": inputs["a"]})
    with pytest.raises(ValueError, match="need that input; it is missing here"):
        query(missing)


def test_one_input_can_be_asked_for_several_outputs():
    spec = {
        "kind": "multimodal",
        "modalities": {
            "depth": {"kind": "position", "position": fourier(6, 5)},
            "label": {"kind": "tasks", "channels": 4},
        },
    }
    query, reads = built(spec)
    assert asked(query, image(reads)).sizes == {"depth": 12, "label": 1}


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({}, "needs at least one modality"),
        ({"a.b": {"kind": "tasks", "channels": 1}}, "modality name 'a.b' must be"),
        ({"a": {"kind": "task"}}, "unknown output query kind 'task'; known kinds: input, multimodal, position, tasks"),
    ],
)
def test_bad_multimodal_queries_are_refused(modalities, message):
    with pytest.raises(ValueError, match=message):
        several(modalities=modalities)


def test_points_come_as_tensors_lists_or_arrays():
    import numpy as np

    for points in (torch.tensor([1, 2], dtype=torch.int32), [1, 2], (1, 2), np.array([1, 2])):
        got = check_points(points, 3, torch.device("cpu"))
        assert got.dtype == torch.long and got.tolist() == [1, 2]
    assert check_points(torch.zeros(0, dtype=torch.long), 3, torch.device("cpu")).shape == (0,)


# --- the first frame of the input


def frames(position, batch=2, frames=2, mask=None, **options):
    """A query of the first frame, a preprocessor, and what it makes of a video of 4 x 3 pixels."""
    reads = grid({"kind": "patches", "in_channels": 3, "project": 5}, position, **options)
    query, reads = built({"kind": "input", "first_frame": True}, reads)
    return query, reads, InputArray.of(reads(torch.randn(batch, frames, 3, 4, 3), mask))


POSITIONS = {
    "fourier": fourier(2, 4, 3),
    "trainable": trainable(24, 6, grid=[2, 4, 3]),
    "projected": {"kind": "projected", "position": fourier(2, 4, 3), "channels": 5},
    "none": None,
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_first_frame_asks_with_what_the_encoder_reads_of_it(kind):
    query, _, array = frames(POSITIONS[kind])
    made = asked(query, array)
    torch.testing.assert_close(made.dense(), array.dense()[:, :12], rtol=0, atol=0)
    assert made.part.grid == (4, 3)
    points = torch.tensor([[11, 0, 5], [1, 1, 2]])
    some = asked(query, array, output_points=points)
    torch.testing.assert_close(some.dense(), take_rows(made.dense(), points), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"output_points 3..12 lie outside the output grid of 12 points"):
        query(array, [3, 12])


def test_the_first_frames_code_stays_one_table_for_each_axis():
    query, _, array = frames(fourier(2, 4, 3))
    code = query(array).position
    assert isinstance(code, AxisCode) and code.points is None
    assert [len(values) for axis, values in code.blocks if axis == 0] == [1, 1, 1]
    chunks = torch.cat([code.dense(0, 5), code.dense(5, 12)], dim=1)
    assert torch.equal(chunks, code.dense(0, 12))


def test_the_first_frame_of_a_longer_video_asks_alone():
    query, _, array = frames(fourier(3, 4, 3), frames=3)
    assert torch.equal(asked(query, array).dense(), array.dense()[:, :12])


def test_the_first_frame_keeps_its_mask():
    mask = torch.rand(2, 2, 4, 3) < 0.5
    query, _, array = frames(fourier(2, 4, 3), mask=mask)
    assert torch.equal(query(array).mask, mask[:, 0].flatten(1))
    assert array.part.length == 24 and array.part.grid == (2, 4, 3), "the input array itself is not changed"


def test_the_first_frame_of_a_modality_asks_masked_as_it_was_read():
    several = {
        "kind": "multimodal",
        "mask_probs": {"video": 0.5},
        "modalities": {
            "video": grid({"kind": "patches", "in_channels": 3}, fourier(2, 4, 3)),
            "label": {"kind": "vector", "channels": 4},
        },
    }
    spec = {"kind": "multimodal", "modalities": {"video": {"kind": "input", "first_frame": True}}}
    query, reads = built(spec, several)
    array = reads.train()({"video": torch.randn(2, 2, 3, 4, 3), "label": torch.randn(2, 4)})
    width = query.modalities["video"].channels
    assert array.parts["video"].replaced.any()
    rows = asked(query, array).dense()
    assert torch.equal(rows[..., :width], array.parts["video"].dense()[:, :12, :width])


def test_an_input_of_merged_frames_has_no_first_one():
    query, reads = built({"kind": "input", "first_frame": True})
    with pytest.raises(
        ValueError, match=r"a grid \(time, height, width\), and the input has \(4, 3\); give it a video"
    ):
        query(image(reads))
    with pytest.raises(ValueError, match="the input has None"):
        query(InputArray.of(torch.randn(2, 7, query.channels)))


@pytest.mark.parametrize("name", ["flow", "points", "values", "text_set"])
def test_tiny_models_that_ask_with_their_input(name):
    case = tiny(name)
    model = case.model()
    (given, *_), mask = (
        [v for n, v in case.inputs().items() if n != "attention_mask"],
        case.inputs().get("attention_mask"),
    )
    encoding = model.encode(given, attention_mask=mask)
    assert torch.equal(QueryArray.of(model.output_query(encoding.input_array)).dense(), encoding.input_array.dense())


def test_a_users_query_may_be_a_tensor_or_a_part():
    for made in (torch.randn(1, 3, 4), ArrayPart(features=torch.randn(1, 3, 4))):
        assert QueryArray.of(made).sizes == {"": 3}


def test_a_spread_is_not_negative():
    position = {**trainable(4, 6), "init_scale": -1.0}
    with pytest.raises(ValueError, match=r"init_scale is a standard deviation, 0 or more, not -1\.0"):
        built({"kind": "position", "position": position})
    with pytest.raises(ValueError, match=r"init_scale is a standard deviation, 0 or more, not -0\.5"):
        built({"kind": "tasks", "channels": 6, "init_scale": -0.5})
