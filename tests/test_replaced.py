"""Greater-than with MLPs made of a set's features: by hand, with few features and under ablations."""

from __future__ import annotations

import pytest
import torch

import tclib as tc
from tclib import interventions, targets
from tclib.activations import hook_in, hook_out
from tclib.circuits import graph, pruning
from tclib.evaluation import ground_truth
from tclib.tasks import greater_than as gt
from tclib.tasks import replaced
from tclib.text import chronicle
from tests.tiny import make_transcoder


@pytest.fixture(scope="module")
def laboratory():
    """The bundled model, a random cross-layer set for it, and a few prompts."""
    lm = tc.load_model(device="cpu")
    parts = {layer: make_transcoder(layer, lm.cfg.d_model, 48, n_writes=3 - layer) for layer in range(3)}
    for part in parts.values():
        part.W_dec *= 0.1
    return lm, parts, gt.prompts(lm.tokenizer, ["war", "siege"], [17], range(10, 90, 20))


def test_few_features_are_exchanged_at_the_last_token_alone(laboratory):
    lm, parts, prompts = laboratory
    table = replaced.few_features(tc.ReplacementModel(lm, parts), prompts, 2, [3, 10_000])
    assert list(table["k"]) == [3, 10_000]
    _, cache = lm.run_with_cache(prompts.tokens)
    out = parts[2].b_dec + sum(parts[k].encode(cache[hook_in(k)][:, -1]) @ parts[k].W_dec[:, 2 - k] for k in range(3))
    answers = gt.run(lm, prompts, lambda rows: interventions.ablate_mlp(2, out[rows], -1))
    expected = gt.probability_difference(answers, prompts.years).mean().item()
    assert table["difference"].iloc[1] == pytest.approx(expected, abs=1e-5)
    at_random = replaced.few_features(tc.ReplacementModel(lm, parts), prompts, 2, [3], seed=1)
    again = replaced.few_features(tc.ReplacementModel(lm, parts), prompts, 2, [3], seed=1)
    assert at_random.equals(again)


def test_a_model_replaced_by_itself_agrees_under_every_ablation(laboratory):
    lm, parts, prompts = laboratory
    table = replaced.under_ablations(tc.ReplacementModel(lm, parts), prompts)
    assert table["ablated"].nunique() == 3 * (lm.cfg.n_heads + 1)
    same = replaced.agreement(table, "model", "model")
    assert same == {"correlation": pytest.approx(1.0), "error": 0.0}
    z = lm.run_with_cache(prompts.tokens)[1]["blocks.1.attn.hook_z"].mean(0)[:, 2]
    answers = [gt.run(lm, prompts, hooks) for hooks in ([], interventions.ablate_head(1, 2, z))]
    base, ablated = (gt.mean_logit_difference(a, prompts.years) for a in answers)
    measured = table.loc[table["ablated"] == "head 1.2", "model"].to_numpy()
    assert measured == pytest.approx((ablated - base).numpy(), abs=1e-4)


def test_early_features_know_nothing_of_what_is_ablated_after_them(laboratory):
    lm, parts, prompts = laboratory
    cut = interventions.ablate_mlp(1)
    change = replaced.answer_of_mlp(tc.ReplacementModel(lm, parts), prompts, 2, cut)
    assert change["early"].abs().max() < 1e-4 < change["model"].abs().max()
    assert (change["imitated"] - change["early"]).abs().max() > 1e-4
    writes = replaced.late_writes(tc.ReplacementModel(lm, parts), prompts, 2, cut)
    assert set(writes["layer"]) == {0, 1} and (writes["activation"] - writes["ablated"]).abs().max() < 1e-4
    assert (writes["model"] - writes["model_ablated"]).abs().max() > 1e-4
    row = parts[0].rows(2)[int(writes.query("layer == 0").iloc[0]["feature"])]
    y = lm.run_with_cache(prompts.tokens)[1][hook_out(2)][:, -1].mean(0)
    expected = (y @ row / row.square().sum()).item()
    assert writes.query("layer == 0").iloc[0]["model"] == pytest.approx(expected, rel=1e-3)


def test_early_share(laboratory):
    _, parts, _ = laboratory
    z = {layer: torch.rand(5, 48) for layer in parts}
    shares = replaced.early_share(parts, z)
    sizes = [(z[k] @ parts[k].W_dec[:, 2 - k]).square().sum().item() for k in range(3)]
    assert shares[0] == 0 and shares[2] == pytest.approx((sizes[0] + sizes[1]) / sum(sizes))


def test_removals_and_graphs_by_layer(laboratory):
    lm, parts, _ = laboratory
    trace = tc.trace(
        tc.ReplacementModel(lm, parts), "The war lasted from the year 1735 to the year 17", check_fit=False
    )
    answer = targets.logit_difference(trace, "45", "20")
    whole = graph.build_graph(trace, [(answer, 1.0)])
    table = replaced.removals(trace, whole, answer, 5)
    effects = whole.adjacency[-1, : int((whole.nodes["kind"] == "feature").sum())]
    assert -table["predicted"].to_numpy() == pytest.approx(effects[effects.abs().topk(5).indices].numpy(), abs=1e-4)
    assert table["free"].notna().all() and table["constrained"].notna().all()
    shares = pruning.by_layer(whole)
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert shares.loc["features 0", "features 1"] == 0 < shares.loc["target", "features 0"]
    # Two edges at least from a feature's tokens to the answer, one from tokens that reach it directly.
    assert 1 <= pruning.path_length(whole) <= 4


def test_units_of_a_set_stand_side_by_side(laboratory):
    lm, parts, _ = laboratory
    texts = [chronicle(lm, 4, seed=s) for s in (1, 2)]
    found = ground_truth.score_set(tc.ReplacementModel(lm, parts), *texts)
    assert len(found.units) == 3 * 48
    _, cache = lm.run_with_cache(texts[1].tokens)
    z = parts[1].encode(cache[hook_in(1)])[torch.from_numpy(texts[1].labels != "bos")][:, 7].numpy()
    row = found.units.iloc[48 + 7]
    if row["label"] is not None:
        assert row["auroc"] == pytest.approx(
            ground_truth.auroc(z, ground_truth.truth(texts[1])[row["label"]].to_numpy())
        )
