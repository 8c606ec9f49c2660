"""Units kept: the fast sweep against hooks in the model, its limits, crossings, and the steps that units make."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from tclib.evaluation import stats
from tclib.interventions import keep_features
from tclib.model import load_model
from tclib.tasks import greater_than as gt
from tclib.tasks import unit_sweep
from tclib.tasks.shared_prefix import SharedPrefix
from tests.test_greater_than import make_tokenizer
from tests.tiny import make_transcoder

LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("model")
    bos = tokenizer.bos_token_id
    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=20,
            n_embd=32,
            n_layer=LAYERS,
            n_head=4,
            bos_token_id=bos,
            eos_token_id=bos,
        )
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def prompts(model):
    """Two lengths, two centuries."""
    return gt.prompts(model.tokenizer, ["war", "long siege"], [11, 17], range(2, 99, 8))


def mean_difference(answers, prompts):
    return gt.probability_difference(answers, prompts.years).mean().item()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_shared_prefix_changes_nothing(model, prompts, layer):
    for tokens in prompts.groups:
        run = SharedPrefix(model, tokens, layer)
        _, cache = model.run_with_cache(tokens)
        mid = cache[f"blocks.{layer}.hook_resid_mid"]
        shared = len(run.prefix)
        assert_close(run.prefix.expand(len(tokens), -1, -1), mid[:, :shared], atol=1e-5, rtol=1e-4)
        assert_close(run.rest, mid[:, shared:], atol=1e-5, rtol=1e-4)
        final = cache["ln_final.hook_normalized"][:, -1]
        prefix, rest = (part + run.mlp(layer, part) for part in (run.prefix, run.rest))
        assert_close(run.finish(prefix, rest), final, atol=1e-5, rtol=1e-4)
        assert_close(run.finish(None, rest[:, -1:]), final, atol=1e-5, rtol=1e-4)


def test_batches_are_alike_and_complete(prompts):
    rows = [prompts.frame.iloc[rows] for _, rows in unit_sweep.alike(prompts)]
    assert all(len(part[["noun", "century"]].drop_duplicates()) == 1 for part in rows)
    assert pd.concat(rows).equals(prompts.frame)
    tokens = [row for part, _ in unit_sweep.alike(prompts) for row in part]
    assert all(torch.equal(a, b) for a, b in zip(tokens, [r for g in prompts.groups for r in g], strict=True))


@pytest.mark.parametrize("rest", ["mean", "zero"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_kept_features_are_those_of_the_hooks(model, prompts, layer, skip, rest):
    """The running sum gives what the patched model gives, prompt by prompt."""
    transcoder = make_transcoder(layer, skip=skip)
    ranked = unit_sweep.rank_units(model, prompts, layer, transcoder)
    answers = unit_sweep.keep_units(model, prompts, layer, [0, 5, 64], ranked, transcoder, rest)
    mean = gt.mean_over_years(unit_sweep.units_at_last_token(model, prompts, layer, transcoder), prompts)
    for k, answer in zip((0, 5, 64), answers, strict=True):
        if rest == "mean":
            hooks = lambda rows, k=k: keep_features(layer, transcoder, ranked[:k], mean[rows], -1)  # noqa: E731
        else:
            hooks = keep_features(layer, transcoder, ranked[:k])
        assert_close(gt.run(model, prompts, hooks), answer, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rest", ["mean", "zero"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_kept_neurons_are_those_of_the_hooks(model, prompts, layer, rest):
    name = f"blocks.{layer}.mlp.hook_post"
    ranked = unit_sweep.rank_units(model, prompts, layer)
    answers = unit_sweep.keep_units(model, prompts, layer, [0, 7, 128], ranked, rest=rest)
    mean = gt.mean_over_years(unit_sweep.units_at_last_token(model, prompts, layer), prompts)
    for k, answer in zip((0, 7, 128), answers, strict=True):

        def hold(post, hook, rows, k=k):
            held, where = post.clone(), slice(None) if rest == "zero" else slice(-1, None)
            others = ranked[k:]
            held[:, where, others] = 0.0 if rest == "zero" else mean[rows][:, None, others]
            return held

        slow = gt.run(model, prompts, lambda rows, hold=hold: [(name, partial(hold, rows=rows))])
        assert_close(slow, answer, atol=1e-6, rtol=0)
    assert_close(answers[-1], gt.run(model, prompts), atol=1e-6, rtol=0)


def test_orders(model, prompts):
    transcoder = make_transcoder(2)
    units = unit_sweep.units_at_last_token(model, prompts, 2, transcoder)
    swing = (units - gt.mean_over_years(units, prompts)).square().mean(0)
    variance = unit_sweep.rank_units(model, prompts, 2, transcoder)
    assert (swing[variance].diff() <= 0).all()
    one, same, other = (unit_sweep.rank_units(model, prompts, 2, transcoder, "random", seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    for order in (variance, one):
        assert order.sort().values.tolist() == list(range(64))
    moving = int((swing > 1e-12).sum())
    assert set(one[:moving].tolist()) == set((swing > 1e-12).nonzero()[:, 0].tolist())


def test_the_table_of_a_sweep(model, prompts):
    table = unit_sweep.sweep(model, prompts, 1, [3], order="random")
    assert table.columns.tolist() == ["k", "kind", "noun", "century", "probability_difference"]
    assert sorted(table["k"].unique()) == [0, 3, 128] and set(table["kind"]) == {"random neurons"}
    assert len(table) == 3 * 4
    curve = unit_sweep.curve(table)
    assert curve.iloc[-1] == pytest.approx(mean_difference(gt.run(model, prompts), prompts), abs=1e-6)
    assert unit_sweep.recovered(table, 0) == 0 and unit_sweep.recovered(table, 128) == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, p: unit_sweep.sweep(m, p, 0, [-1]), "128"),
        (lambda m, p: unit_sweep.sweep(m, p, 0, [129]), "128"),
        (lambda m, p: unit_sweep.sweep(m, p, LAYERS, [1]), "layers 0 to 3"),
        (lambda m, p: unit_sweep.sweep(m, p, 0, [1], order="size"), "'variance' or 'random'"),
        (lambda m, p: unit_sweep.sweep(m, p, 0, [1], rest="median"), "'mean' or 'zero'"),
    ],
)
def test_impossible_sweeps_are_refused(model, prompts, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, prompts)


# ---------------------------------------------------------------- crossings and intervals


def table_of(curve: dict[int, float]) -> pd.DataFrame:
    """A sweep of two nouns and two centuries that follow ``curve``."""
    rows = [
        {"k": k, "noun": noun, "century": century, "probability_difference": value}
        for k, value in curve.items()
        for noun in ("war", "siege")
        for century in (11, 12)
    ]
    return pd.DataFrame(rows)


def test_a_crossing_is_the_first_overtaking():
    features = table_of({0: 0.1, 1: 0.3, 2: 0.5, 3: 0.5, 9: 0.6})
    neurons = table_of({0: 0.2, 1: 0.2, 2: 0.4, 3: 0.55, 7: 0.9})
    assert unit_sweep.crossing(features, neurons) == 3


def test_no_crossing_is_none_and_a_lead_from_the_start_is_none():
    better, worse = table_of({0: 0.1, 1: 0.5, 2: 0.6, 5: 0.7}), table_of({0: 0.1, 1: 0.2, 2: 0.3, 5: 0.7})
    assert unit_sweep.crossing(better, worse) is None
    assert unit_sweep.crossing(worse, better) is None  # neurons led all along: nothing is overtaken
    with pytest.raises(ValueError, match="no k in common"):
        unit_sweep.crossing(table_of({0: 0.1, 1: 0.2}), table_of({0: 0.1, 2: 0.2}))


def test_cells_are_means_of_their_prompts(prompts):
    values = torch.arange(len(prompts.frame)).float()
    cells = stats.cell_means(values, prompts.frame)
    assert cells.shape == (2, 2)
    pick = (prompts.frame["noun"] == "war") & (prompts.frame["century"] == 17)
    assert cells.loc["war", 17] == pytest.approx(values.numpy()[pick].mean())


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.floats(-10, 10), st.integers(0, 99))
def test_the_bootstrap_moves_with_its_numbers(nouns, centuries, shift, seed):
    cells = np.random.default_rng(seed).normal(size=(nouns, centuries))
    means = stats.bootstrap(cells, 50, seed)
    assert_close(stats.bootstrap(cells + shift, 50, seed), means + shift)
    assert means.min() >= cells.min() - 1e-12 and means.max() <= cells.max() + 1e-12
    assert stats.bootstrap(np.full((nouns, centuries), shift), 50) == pytest.approx(shift)


def test_the_bootstrap_crosses_its_factors():
    """What differs between nouns only must vary as much as a mean of n nouns does, however many centuries there are."""
    by_noun = np.repeat(np.array([[0.0], [1.0], [0.0], [1.0]]), 50, axis=1)
    spread = stats.bootstrap(by_noun, 4000).std()
    assert spread == pytest.approx(0.5 / 2, rel=0.1)  # not 0.5 / sqrt(200), as if prompts were independent
    table = stats.interval(pd.DataFrame(by_noun))
    assert table["low"] < table["mean"] == 0.5 < table["high"]
    assert stats.interval(pd.DataFrame([[0.3]])).tolist() == pytest.approx([0.3] * 3)


def test_a_bootstrap_with_holes_is_refused():
    with pytest.raises(ValueError, match="every noun in every century"):
        stats.bootstrap(np.array([[0.1, np.nan]]))


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("place", [3, 50, 95])
@pytest.mark.parametrize("height", [2.0, -1.5])
def test_a_pure_step_is_found(place, height):
    curve = torch.where(torch.arange(100) > place, height, 0.0) + 7
    found = unit_sweep.fit_steps(curve[None]).iloc[0]
    assert found["location"] == place
    assert found["r2"] == pytest.approx(1)


def test_a_straight_line_is_no_step():
    found = unit_sweep.fit_steps(torch.arange(100.0)[None]).iloc[0]
    assert found["location"] in (49, 50)
    assert found["r2"] == pytest.approx(0.75, abs=0.01)
