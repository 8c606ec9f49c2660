"""Names of features: what the strongest examples share, and an honest word where they share nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tclib as tc
from tclib.features import naming
from tclib.features.naming import Names


@pytest.fixture(scope="module")
def bundled():
    lm, transcoders = tc.load_model("bundled"), tc.load_transcoders("bundled")
    return lm, transcoders, tc.load_text(lm, "chronicle", 24, seed=0)


@pytest.fixture(scope="module")
def names(bundled):
    lm, transcoders, tokens = bundled
    return Names(tc.ReplacementModel(lm, transcoders), tokens)


def test_strongest_are_the_largest_activations_of_the_text(bundled):
    lm, transcoders, tokens = bundled
    values, places = naming.strongest(tc.ReplacementModel(lm, {0: transcoders[0]}), tokens, k=5)[0]
    _, cache = lm.run_with_cache(tokens)
    z = transcoders[0].encode(cache["blocks.0.ln2.hook_normalized"])  # [row, pos, feature]
    z[tokens == lm.tokenizer.bos_token_id] = 0
    assert torch.allclose(values, z.flatten(0, 1).T.topk(5).values, atol=1e-4)
    fired = values > 0
    assert torch.allclose(z.flatten(0, 1).T.gather(1, places)[fired], values[fired], atol=1e-4)


def test_what_reads_another_place_is_not_named(bundled):
    lm, transcoders, tokens = bundled
    changes = {"hook_in": "blocks.0.hook_mlp_out", "hook_out": "blocks.0.hook_mlp_out"}
    sae = tc.Transcoder(transcoders[0].config.model_copy(update=changes))
    with pytest.raises(ValueError, match="hook_mlp_out"):
        Names(tc.ReplacementModel(lm, {0: sae}), tokens)


def test_a_model_without_bos_has_its_first_tokens_named_too(bundled):
    lm, transcoders, tokens = bundled
    lm.cfg.default_prepend_bos = False
    try:
        values, places = naming.strongest(tc.ReplacementModel(lm, {0: transcoders[0]}), tokens, k=1)[0]
    finally:
        lm.cfg.default_prepend_bos = True
    assert (places[values > 0] % tokens.shape[1] == 0).any()


def test_a_feature_made_for_words_and_one_made_for_numbers_are_named_so(bundled):
    lm, transcoders, tokens = bundled
    made = tc.Transcoder(transcoders[0].config)
    made.load_state_dict(transcoders[0].state_dict())
    _, cache = lm.run_with_cache(tokens)
    x, flat = cache["blocks.0.ln2.hook_normalized"].flatten(0, 1), tokens.flatten()
    with torch.no_grad():
        for feature, strings in {0: [" war"], 1: ["31", "32", "33"]}.items():
            ids = [lm.tokenizer(s, add_special_tokens=False)["input_ids"][0] for s in strings]
            is_one = torch.isin(flat, torch.tensor(ids))
            if feature == 1:
                assert is_one.any(), "the text has one of these years"
            direction = x[is_one].mean(0) - x[~is_one].mean(0)
            ends = x @ direction
            made.W_enc[:, feature] = direction
            made.b_enc[feature] = -float((ends[is_one].min() + ends[~is_one].max()) / 2)
        made.b_enc[2] = -1e6
    named = Names(tc.ReplacementModel(lm, {0: made}), tokens)
    assert named(0, 0) == "war"
    low, *high = named(0, 1).split("–")
    assert 31 <= int(low) <= int((high or [low])[0]) <= 33
    assert named(0, 2) == "silent"
    assert named.full(0, 0) == 'mlp0[0] "war"'


def test_every_feature_of_a_prompt_has_a_name_and_other_rows_have_none(bundled, names):
    lm, transcoders, _ = bundled
    trace = tc.trace(tc.ReplacementModel(lm, transcoders), "The war lasted from the year 1732 to the year 17")
    table = tc.attribute(trace, tc.targets.logit(trace, "45"))
    column = names.column(table)
    assert (column[table["kind"] == "feature"].str.len() > 0).all()
    assert (column[table["kind"] != "feature"] == "").all()


def test_what_a_feature_promotes_is_its_largest_logits(bundled, names):
    lm, transcoders, _ = bundled
    top = (transcoders[2].W_dec[107] @ lm.W_U).topk(naming.PROMOTED).indices.tolist()
    numbers = [int(lm.tokenizer.decode([i])) for i in top]
    low, high = map(int, names.promotes(2, 107).split("–"))
    assert min(numbers) <= low <= high <= max(numbers)


numbers = st.lists(st.integers(0, 99), min_size=1, max_size=30)


@given(numbers, st.booleans())
def test_a_range_lies_within_its_numbers(values, begins):
    name = naming._numbers([" " * begins + f"{v:02}" for v in values], np.ones(len(values)))
    assert name.endswith("…") == begins
    low, *high = name.rstrip("…").split("–")
    assert min(values) <= int(low) <= int((high or [low])[0]) <= max(values)


@given(st.lists(st.sampled_from([" war", " siege", " king", " the", ","]), min_size=1, max_size=30))
def test_words_cover_the_share_that_they_claim(strings):
    name = naming._words(strings, np.ones(len(strings)), 5)
    covered = sum(s.strip() in name.split(", ") or (s == "," and "," in name) for s in strings)
    assert covered >= naming.ENOUGH * len(strings) - 1e-9


def test_numbers_among_words_are_no_range():
    assert naming._numbers(["31", " war", " war"], np.ones(3)) is None
    assert naming._numbers(["01", "99"], np.ones(2), widest=50) is None
