"""A model with its transcoders: what is refused when they are joined, and that joining changes nothing."""

import pytest
import torch

import tclib as tc
from tclib import evaluation, ui
from tclib.features import build_index, load_summary
from tclib.features.naming import Names
from tclib.tasks import gated_circuit
from tests.tiny import make_model, make_transcoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def sae(layer: int) -> tc.Transcoder:
    made = make_transcoder(layer)
    made.config = made.config.model_copy(update={"hook_out": made.config.hook_in})
    return made


@pytest.mark.parametrize(
    ("transcoders", "sentence"),
    [
        (lambda: {7: make_transcoder(0)}, "layer 7 is outside the model"),
        (lambda: {1: make_transcoder(0)}, "a transcoder of this layer reads blocks.1"),
        (lambda: {0: make_transcoder(0, d_model=16)}, "reads width 16 .* this model has width 32"),
        (lambda: {0: make_transcoder(0).to(torch.float64)}, "is in torch.float64, but the model computes in"),
        (lambda: {0: make_transcoder(0).to("meta")}, "layer 0 is on meta, but the model is on cpu"),
        (lambda: {0: make_transcoder(0, n_writes=2)}, "the set has no part for layer 1"),
        (lambda: {0: make_transcoder(0, n_writes=1), 1: make_transcoder(1)}, "give one kind"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_joined(model, transcoders, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        tc.ReplacementModel(model, transcoders())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (
            lambda model, rows: tc.ReplacementModel(model, make_transcoder(0)),
            "are of type Transcoder: give them by layer",
        ),
        (lambda model, rows: tc.ReplacementModel(model, None), "are of type NoneType: give them by layer"),
        (lambda model, rows: tc.ReplacementModel("gpt2", {}), "of type str: give what tc.load_model gives"),
        (lambda model, rows: tc.trace(model, rows[0]), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: tc.evaluate(model, rows), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: evaluation.measure(model, rows), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: build_index(model, rows, "nowhere"), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: ui.Browser(model, None), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: ui.Lab(model), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: gated_circuit.Gated(model, None), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: load_summary(model), "a model and its transcoders, not TransformerBridge"),
        (lambda model, rows: Names(model, rows), "a model and its transcoders, not TransformerBridge"),
    ],
)
def test_something_else_than_both_gets_one_sentence(model, ask, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        ask(model, torch.tensor([[40, 1, 2, 3]]))
    assert "\n" not in str(refused.value)


def test_joining_changes_nothing_and_a_part_is_a_replacement_model_too(model):
    tokens = torch.tensor([[40, 1, 2, 3]])
    before = model(tokens)
    given = {0: make_transcoder(0), 1: make_transcoder(1)}
    both = tc.ReplacementModel(model, given)
    assert torch.equal(model(tokens), before) and both.model is model
    del given[1]  # the caller's dictionary is the caller's
    assert list(both.transcoders) == [0, 1] and list(both.only([1]).transcoders) == [1]
    assert both.feature(1, 5) == 5
    with pytest.raises(ValueError, match="layer 1 has no transcoder"):
        both.only([0]).feature(1, 5)
    with pytest.raises(ValueError, match="layer 2 has no transcoder: layers .0, 1. have one"):
        both.only([2])


def test_an_sae_is_compared_but_not_traced(model):
    replacement = tc.ReplacementModel(model, {0: sae(0)})
    rows = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 40
    assert tc.evaluate(replacement, rows)["fvu"].notna().all()
    with pytest.raises(ValueError, match="a transcoder of this layer reads"):
        tc.trace(replacement, rows[0], check_fit=False)


def test_one_that_changed_after_joining_is_refused_and_the_object_is_one_line(model):
    transcoder = make_transcoder(0)
    replacement = tc.ReplacementModel(model, {0: transcoder})
    assert "layers [0]" in repr(replacement) and "\n" not in repr(replacement) and hash(replacement)
    transcoder.to(torch.float64)
    for ask in (tc.evaluate, tc.trace):
        with pytest.raises(ValueError, match="is in torch.float64, but the model computes in"):
            ask(replacement, torch.tensor([[40, 1, 2]])[0 if ask is tc.trace else slice(None)])


def test_a_warning_of_joining_names_the_line_that_joined(model):
    transcoder = make_transcoder(0)
    transcoder.config = transcoder.config.model_copy(update={"hook_out": "blocks.0.mlp.hook_out"})
    with pytest.warns(UserWarning, match="the same place") as said:
        tc.ReplacementModel(model, {0: transcoder})
    assert said[0].filename == __file__
