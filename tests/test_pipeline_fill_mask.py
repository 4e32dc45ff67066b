"""`pipeline("fill-mask")` of our models: transformers' results, for the price of the masked positions.

Models and texts are those of test_pipelines.py, so are the tolerances.
"""

import copy

import pytest
import torch
from test_pipelines import TEXTS, assert_same_results, saved_text_model, text_config
from transformers import BertConfig, BertForMaskedLM, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import PipelineException
from transformers.pipelines.fill_mask import FillMaskPipeline

from hf_perceiver import OutputQuery, PerceiverIOForMaskedLM, PerceiverIOTokenizer, register, register_output_query
from hf_perceiver.pipeline_fill_mask import PerceiverIOFillMaskPipeline, register_fill_mask
from hf_perceiver.registry import OUTPUT_QUERIES

MASKED = [text + "[MASK]" for text in TEXTS] + ["[MASK]", "[MASK]" + TEXTS[1] + "[MASK] and [MASK]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return saved_text_model(tmp_path_factory.mktemp("mlm"), PerceiverIOForMaskedLM)[0]


@pytest.fixture(scope="module")
def ours(folder):
    return pipeline("fill-mask", model=folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return pipeline("fill-mask", model=folder, pipeline_class=FillMaskPipeline)


def decoded(pipe, *args, **kwargs) -> list[tuple[int, int]]:
    """The batch and the number of queries of each decoding that a call takes."""
    seen = []
    layer = pipe.model.perceiver.decoder.cross_attend.cross_attn.q_proj
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    try:
        pipe(*args, **kwargs)
    finally:
        hook.remove()
    return seen


def test_our_models_need_no_word_to_get_it(ours, theirs):
    assert type(ours) is PerceiverIOFillMaskPipeline
    assert type(theirs) is FillMaskPipeline
    assert isinstance(ours, FillMaskPipeline)


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (MASKED[0], {}),
        (MASKED[-1], {}),  # three masks
        (MASKED, {}),
        (MASKED[:1], {}),  # a list of one is answered like its one text
        (MASKED, {"batch_size": 4}),
        (MASKED, {"top_k": 2}),
        (MASKED[-1], {"targets": ["x", "y", "z"], "top_k": 2}),
        (MASKED, {"targets": "x", "batch_size": 3}),
        ("[MASK]" + "x" * 500, {"tokenizer_kwargs": {"truncation": True}}),
    ],
)
def test_results_are_those_of_transformers_pipeline(texts, options, ours, theirs):
    assert_same_results(ours(texts, **options), theirs(texts, **options))


def test_only_masked_positions_are_decoded(ours, theirs):
    length = len(ours.tokenizer(MASKED[0]).input_ids)
    assert decoded(ours, MASKED[0]) == [(1, 1)]
    assert decoded(theirs, MASKED[0]) == [(1, length)]
    assert decoded(ours, MASKED[-1]) == [(1, 3)]


def test_a_batch_decodes_as_many_positions_as_its_text_with_the_most_masks(ours):
    assert decoded(ours, MASKED, batch_size=6) == [(6, 3)]
    assert decoded(ours, MASKED, batch_size=4) == [(4, 1), (2, 3)]


@pytest.mark.medium
def test_the_compiled_model_answers_alike(folder, ours):
    pipe = pipeline("fill-mask", model=folder)
    pipe.model.forward = torch.compile(pipe.model.forward, backend="eager")
    assert_same_results(pipe(MASKED[0]), ours(MASKED[0]))


def test_a_model_in_half_precision_answers_in_it(folder):
    pipes = [
        pipeline("fill-mask", model=folder, dtype=torch.bfloat16, pipeline_class=kind)
        for kind in (None, FillMaskPipeline)
    ]
    assert all(pipe.model.dtype == torch.bfloat16 for pipe in pipes)
    best = [pipe(MASKED[0], top_k=1)[0] for pipe in pipes]
    # Other shapes round otherwise: 2^-8 of scores around 10.
    assert best[0]["score"] == pytest.approx(best[1]["score"], abs=0.1)
    assert best[0]["token"] == best[1]["token"]


def test_a_text_without_a_mask_is_refused_as_ever(ours):
    with pytest.raises(PipelineException, match=r"No mask_token \(\[MASK\]\) found on the input"):
        ours("nothing to fill")


def test_a_saved_pipeline_loads_without_trust(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    again = pipeline("fill-mask", model=str(tmp_path))
    assert type(again) is PerceiverIOFillMaskPipeline
    assert_same_results(again(MASKED[0]), ours(MASKED[0]))


def test_a_copy_is_the_same_pipeline(ours):
    twin = copy.copy(ours)
    assert type(twin) is PerceiverIOFillMaskPipeline and twin.model is ours.model
    assert_same_results(twin(MASKED[0]), ours(MASKED[0]))


# Other models


def test_other_models_get_transformers_pipeline_itself():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=262, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bert, tokenizer = BertForMaskedLM(config).eval(), PerceiverIOTokenizer()
    pipe = pipeline("fill-mask", model=bert, tokenizer=tokenizer, top_k=3)
    assert type(pipe) is FillMaskPipeline and pipe.task == "fill-mask"
    assert_same_results(pipe(MASKED), FillMaskPipeline(bert, tokenizer=tokenizer, top_k=3)(MASKED))
    assert type(PerceiverIOFillMaskPipeline(bert, tokenizer)) is FillMaskPipeline


def test_a_wrapped_model_gets_transformers_pipeline(ours):
    pipe = PerceiverIOFillMaskPipeline(torch.compile(ours.model, backend="eager"), tokenizer=ours.tokenizer)
    assert type(pipe) is FillMaskPipeline


def test_an_output_query_of_ones_own_is_asked_whole(monkeypatch):
    """It may know nothing of points."""
    monkeypatch.setattr(OUTPUT_QUERIES, "classes", dict(OUTPUT_QUERIES.classes))

    @register_output_query("my-places")
    class Places(OutputQuery):
        def __init__(self):
            super().__init__()
            self.channels = 16
            self.places = torch.nn.Parameter(torch.randn(1, 96, 16))

        def forward(self, input_array, output_points=None, coordinates=None, **kwargs):
            assert output_points is None
            return self.places[:, : input_array.length]

    model = PerceiverIOForMaskedLM(text_config(output_query={"kind": "my-places"})).eval()
    pipe = pipeline("fill-mask", model=model, tokenizer=PerceiverIOTokenizer())
    assert type(pipe) is FillMaskPipeline
    assert len(pipe(MASKED[0])) == 5


@pytest.mark.parametrize("form", ["class", "dotted name"])
def test_the_registrys_entry_is_taken_over_however_it_is_written(form):
    name = f"{FillMaskPipeline.__module__}.{FillMaskPipeline.__name__}"
    entry = {"impl": FillMaskPipeline if form == "class" else name}
    register_fill_mask(entry)
    register_fill_mask(entry)
    assert entry == {"impl": PerceiverIOFillMaskPipeline}


def test_somebody_elses_pipeline_stays_registered():
    class Theirs(FillMaskPipeline):
        pass

    entry = {"impl": Theirs}
    register_fill_mask(entry)
    assert entry == {"impl": Theirs}


def test_registering_again_changes_nothing():
    before = dict(PIPELINE_REGISTRY.supported_tasks["fill-mask"])
    register()
    assert PIPELINE_REGISTRY.supported_tasks["fill-mask"] == before
    assert before["impl"] is PerceiverIOFillMaskPipeline
