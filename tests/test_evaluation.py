"""Metrics against numpy, intervals against known distributions, scores against planted features."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tclib as tc
from tclib import evaluation, text
from tclib.activations import mlp_activations
from tclib.evaluation import baselines, fronts, ground_truth, matching, stats
from tclib.evaluation.metrics import check
from tclib.interventions import ablate_mlp, run
from tests.tiny import make_model, make_transcoder

BOS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture(scope="module")
def tokens():
    rows = torch.randint(0, 40, (24, 16), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = BOS
    rows[3, 9] = BOS  # a document ends inside the row
    return rows


@pytest.fixture(scope="module")
def transcoders():
    return {layer: make_transcoder(layer) for layer in range(3)}


@pytest.fixture(scope="module")
def measured(model, transcoders, tokens):
    return evaluation.measure(tc.ReplacementModel(model, transcoders), tokens, replicates=50)


# ---- metrics


def test_reconstruction_with_and_without_bos_against_numpy(model, transcoders, tokens):
    acts = next(mlp_activations(model, tokens, [1], batch_size=64))[1]
    for bos in (False, True):
        keep = (tokens != BOS).numpy() | bos
        x, y = acts.x.numpy()[keep].astype(float), acts.y.numpy()[keep].astype(float)
        t = transcoders[1]
        z = np.maximum(x @ t.W_enc.numpy() + t.b_enc.numpy(), 0)
        imitation = z @ t.W_dec.numpy() + t.b_dec.numpy()
        m = evaluation.measure(tc.ReplacementModel(model, {1: t}), tokens, batch_size=7, groups={}, bos=bos)
        row = m.layers.iloc[0]
        assert row["tokens"] == keep.sum()
        assert row["l0"] == pytest.approx((z > 0).sum(1).mean(), rel=1e-6)
        assert row["fvu"] == pytest.approx(((y - imitation) ** 2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-4)
        cosine = (y * imitation).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(imitation, axis=1)
        assert row["cosine"] == pytest.approx(cosine.mean(), rel=1e-4)
        np.testing.assert_allclose(m.firing[1].numpy(), (z > 0).mean(0), atol=1e-6)
        assert row["dead"] == (~(z > 0).any(0)).mean()


def test_replacement_against_logits(model, transcoders, tokens):
    hooks = evaluation.replacement_hooks(0, transcoders[0]) + evaluation.replacement_hooks(1, transcoders[1])
    log_p, log_q = (run(model, tokens, h)[:, :-1].log_softmax(-1).double() for h in ([], hooks))
    targets = tokens[:, 1:]
    keep = targets != BOS
    table = evaluation.measure(tc.ReplacementModel(model, transcoders), tokens, batch_size=5).groups.set_index("layer")
    assert list(table.index) == [0, 1, 2, "up to 1", "all"]
    row = table.loc["up to 1"]
    assert row["ce"] == pytest.approx(-log_p.gather(-1, targets[..., None])[..., 0][keep].mean().item(), rel=1e-5)
    assert row["ce_replaced"] == pytest.approx(
        -log_q.gather(-1, targets[..., None])[..., 0][keep].mean().item(), rel=1e-5
    )
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert row["kl"] == pytest.approx(kl[keep].mean().item(), rel=1e-4)
    assert row["top1"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1))[keep].double().mean().item(), abs=1e-6)


def test_one_pass_agrees_with_its_parts(model, transcoders, tokens, measured):
    plain = measured.layers[measured.layers["replicate"] == 0].drop(columns="replicate").reset_index(drop=True)
    pd.testing.assert_frame_equal(
        plain, evaluation.reconstruction(tc.ReplacementModel(model, transcoders), tokens, batch_size=5), rtol=1e-6
    )
    both = evaluation.evaluate(tc.ReplacementModel(model, transcoders), tokens)
    assert list(both["layer"]) == [0, 1, 2] and {"l0", "kl", "recovered"} <= set(both)
    zero = evaluation.faithfulness(model, tokens, {"edited": ablate_mlp(1)})["ce"].iloc[1]
    assert both["ce_zero"][1] == pytest.approx(zero, rel=1e-6)


def test_a_perfect_transcoder_loses_nothing_and_zero_recovers_nothing(model, tokens):
    # An MLP whose output is constant is imitated by a bias.
    nothing = make_transcoder(0)
    for parameter in nothing.parameters():
        parameter.zero_()
    row = evaluation.measure(tc.ReplacementModel(model, {0: nothing}), tokens).groups.iloc[0]
    assert row["recovered"] == pytest.approx(0, abs=1e-5) and row["kl"] > 0
    identity = tc.Transcoder(
        make_transcoder(1, d_features=64).config.model_copy(
            update={"hook_in": "blocks.1.hook_mlp_out", "hook_out": "blocks.1.hook_mlp_out"}
        )
    ).requires_grad_(False)
    eye = torch.eye(32)
    identity.W_enc.copy_(torch.cat([eye, -eye], dim=1))
    identity.W_dec.copy_(torch.cat([eye, -eye], dim=0))
    row = evaluation.evaluate(tc.ReplacementModel(model, {1: identity}), tokens).iloc[0]
    assert row["fvu"] == pytest.approx(0, abs=1e-9) and row["cosine"] == pytest.approx(1)
    assert row["recovered"] == pytest.approx(1) and row["top1"] == 1 and row["kl"] == pytest.approx(0, abs=1e-6)


def test_positions_add_up_to_the_whole(measured, tokens):
    for layer, part in measured.positions.groupby("layer"):
        whole = measured.layers[(measured.layers["layer"] == layer) & (measured.layers["replicate"] == 0)].iloc[0]
        part = part[part["tokens"] > 0]
        assert part["position"].min() == 1  # BOS is out
        for name in ("l0", "fvu", "cosine"):
            assert np.average(part[name], weights=part["tokens"]) == pytest.approx(whole[name], rel=1e-5)
    alone = measured.positions[measured.positions["layer"] == 2]["ce_increase"]
    group = measured.groups[(measured.groups["layer"] == 2) & (measured.groups["replicate"] == 0)].iloc[0]
    assert np.isnan(alone.iloc[-1])  # the last position predicts nothing
    predicted = (tokens[:, 1:] != BOS).sum(0).numpy()
    mean = np.average(alone.iloc[:-1], weights=predicted)
    assert mean == pytest.approx(group["ce_replaced"] - group["ce"], rel=1e-4, abs=1e-6)


def test_memory_does_not_grow_with_the_text(model, transcoders, tokens, measured):
    longer = evaluation.measure(tc.ReplacementModel(model, transcoders), tokens.repeat(3, 1), replicates=50)
    for name in ("layers", "groups", "positions"):
        assert getattr(longer, name).shape == getattr(measured, name).shape
    first = longer.layers[longer.layers["replicate"] == 0]["fvu"].to_numpy()
    np.testing.assert_allclose(first, measured.layers[measured.layers["replicate"] == 0]["fvu"], rtol=1e-6)


# ---- intervals


def test_replicates_do_not_depend_on_the_batch_size_and_are_paired(model, transcoders, tokens, measured):
    again = evaluation.measure(tc.ReplacementModel(model, transcoders), tokens, batch_size=5, replicates=50)
    pd.testing.assert_frame_equal(again.layers, measured.layers, rtol=1e-5)
    alone = evaluation.faithfulness(
        model, tokens, {"x": evaluation.replacement_hooks(2, transcoders[2])}, replicates=50
    )
    paired = measured.groups[measured.groups["layer"] == 2]["ce_replaced"].to_numpy()
    np.testing.assert_allclose(alone[alone["name"] == "x"]["ce"], paired, rtol=1e-6)


def test_interval_over_rows_is_that_of_the_mean(model, tokens, transcoders):
    table = evaluation.measure(
        tc.ReplacementModel(model, {0: transcoders[0]}), tokens, groups={}, replicates=2000
    ).layers
    found = stats.over_rows(table, ["layer"]).set_index("metric")
    keep = tokens != BOS
    z = transcoders[0].encode(next(mlp_activations(model, tokens, [0], 64))[0].x)
    per_row = torch.stack([(z[i][keep[i]] > 0).sum(-1).double().mean() for i in range(len(tokens))])
    error = (per_row.std() / len(tokens) ** 0.5).item()
    width = found.loc["l0", "high"] - found.loc["l0", "low"]
    assert found.loc["l0", "value"] == pytest.approx(per_row.mean().item(), rel=1e-2)
    assert width == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert "dead" not in found.index
    assert stats.shown(found.reset_index())[0].count("[") == 1


def test_interval_over_seeds_is_students():
    table = pd.DataFrame({"name": ["a"] * 3 + ["b"] * 3, "v": [1.0, 2.0, 3.0, 5.0, 5.0, 5.0]})
    found = stats.over_seeds(table, ["name"], "v").set_index("name")
    half = 4.302652729911275 / 3**0.5
    assert found.loc["a", ["value", "low", "high"]].tolist() == pytest.approx([2, 2 - half, 2 + half], abs=1e-3)
    assert found.loc["b", "low"] == found.loc["b", "high"] == 5
    assert list(found.columns) == ["value", "low", "high", "seeds"]
    with pytest.raises(ValueError, match="2 to 10"):
        stats.over_seeds(table.head(1), ["name"], "v")


def test_intervals_need_replicates(model, transcoders, tokens):
    with pytest.raises(ValueError, match="no replicates"):
        stats.over_rows(evaluation.reconstruction(tc.ReplacementModel(model, transcoders), tokens), ["layer"])


# ---- fronts and controls


def test_fronts_are_read_where_they_reach_and_nowhere_else():
    front = pd.DataFrame({"name": "a", "l0": [4.0, 16.0, 64.0], "ce_increase": [0.4, 0.2, 0.1]})
    read = fronts.at_l0(front, [4, 8, 64, 65], ["name"])["ce_increase"]
    np.testing.assert_allclose(read[:3], [0.4, 0.3, 0.1])
    assert np.isnan(read[3])
    with pytest.raises(ValueError, match="positive"):
        fronts.at_l0(front, 0, ["name"])


@given(st.floats(-0.5, 0.5), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_gap_of_shifted_fronts_is_the_shift(shift, seed):
    rng = np.random.default_rng(seed)
    l0 = np.sort(rng.uniform(2, 200, 6))
    loss = -np.log(l0)
    front = pd.concat(
        pd.DataFrame({"name": name, "seed": 0, "layer": 1, "l0": l0, "ce_increase": loss + move})
        for name, move in (("a", shift), ("b", 0.0), ("c", 9.0))
    )
    found = fronts.gap(front, "a", "b", ["layer", "seed"])
    assert found["gap"][0] == pytest.approx(shift, abs=1e-9)
    assert found[["layer", "seed"]].iloc[0].tolist() == [1, 0]


def test_fronts_that_share_no_l0():
    front = pd.DataFrame({"name": ["a", "a", "b", "b"], "l0": [1, 2, 3, 4], "ce_increase": [1.0, 1, 1, 1]})
    with pytest.raises(ValueError, match="share no L0"):
        fronts.shared_l0(front)


def test_top_neurons(model, tokens):
    names = [baselines.neuron_hook(1)]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    mean = cache[names[0]].mean((0, 1))
    every = baselines.top_neurons(model, 1, len(mean), mean)
    torch.testing.assert_close(run(model, tokens, every), model(tokens))
    seen = {}
    with model.hooks(
        fwd_hooks=[*baselines.top_neurons(model, 1, 5, mean), (names[0], lambda a, hook: seen.update(a=a))]
    ):
        model(tokens)
    assert ((seen["a"] != mean).sum(-1) <= 5).all()
    kl = evaluation.faithfulness(
        model, tokens, {k: baselines.top_neurons(model, 1, k, mean) for k in (2, 32, 128)}
    ).set_index("name")["kl"]
    assert kl[2] > kl[32] > kl[128]


def test_random_directions_fire_as_asked_and_beat_the_mean(model, tokens):
    acts = next(mlp_activations(model, tokens, [1], 64))[1]
    keep = tokens != BOS
    x, y = acts.x[keep], acts.y[keep]
    t = baselines.random_directions(1, x, y, k=12, d_features=96)
    assert (t.encode(x) > 0).sum(1).double().mean().item() == pytest.approx(12, rel=0.02)
    fvu = ((y - t(x)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()).item()
    assert fvu < 1
    again, other = (baselines.random_directions(1, x, y, 12, 96, seed) for seed in (0, 1))
    assert torch.equal(again.W_enc, t.W_enc) and not torch.equal(other.W_enc, t.W_enc)


# ---- ground truth


def planted(seed: int, n: int = 4000) -> tuple[torch.Tensor, pd.DataFrame]:
    """Inputs that are sums of label directions: ``a`` alone; ``b`` in two halves; ``c``, half of it a special case."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 8, (n,), generator=g)
    flags = {"a": kind == 1, "b1": kind == 2, "b2": kind == 3, "c": kind == 4, "c special": kind == 5}
    x = sum(6.0 * flag[:, None] * torch.eye(32)[i] for i, flag in enumerate(flags.values()))
    x = x + 0.3 * torch.randn(n, 32, generator=g)
    truth = {"a": flags["a"], "b": flags["b1"] | flags["b2"], "c": flags["c"] | flags["c special"]}
    return x, pd.DataFrame({name: flag.numpy() for name, flag in truth.items()})


@pytest.fixture(scope="module")
def planted_scores():
    """A transcoder with a feature for a, one for each half of b, one for c that is silent on its special case."""
    t = make_transcoder(0, d_features=12, seed=5)
    t.W_enc.mul_(0.1)  # the other features are noise
    t.b_enc.fill_(-0.5)
    t.W_enc[:, :5] = torch.eye(32)[:, :5]
    t.b_enc[:5] = -3
    t.b_enc[5] = -1e3  # dead
    (x1, truth1), (x2, truth2) = planted(1), planted(2)
    return ground_truth.score(t.encode(x1).numpy(), truth1, t.encode(x2).numpy(), truth2)


def test_scorer_finds_planted_features(planted_scores):
    units = planted_scores.units.set_index("unit")
    assert units["label"][0] == "a" and units["label"][1] == units["label"][2] == "b"
    assert units["label"][3] == units["label"][4] == "c"
    assert units.loc[0, ["f1", "auroc", "precision", "recall"]].tolist() == pytest.approx([1, 1, 1, 1], abs=0.01)
    assert units.loc[0, "selectivity"] > 0.95
    assert units.loc[1, "recall"] == pytest.approx(0.5, abs=0.05) and units.loc[1, "precision"] > 0.99
    assert pd.isna(units["label"][5]) and units["f1"][5] == 0


def test_scorer_sees_split_and_absorbed_labels(planted_scores):
    table = planted_scores.labels.set_index("label")
    assert table.loc["a", "covered"] and table.loc["a", "unit"] == 0
    assert not table.loc["a", "split"] and table.loc["a", "absorbed"] == pytest.approx(0, abs=0.01)
    assert table.loc["b", "split"] and table.loc["b", "devoted"] == 2
    # Half of c is the special case, on which c's own feature is silent and the other one fires.
    assert table.loc["c", "absorbed"] == pytest.approx(0.5, abs=0.06)
    assert planted_scores.summary()["covered"] == 1


def test_shuffled_labels_are_not_found(planted_scores):
    t = make_transcoder(0, d_features=12)
    (x1, truth1), (x2, truth2) = planted(1), planted(2)
    rng = np.random.default_rng(0)
    shuffled = truth2.iloc[rng.permutation(len(truth2))].reset_index(drop=True)
    found = ground_truth.score(t.encode(x1).numpy(), truth1, t.encode(x2).numpy(), shuffled)
    assert found.summary()["auroc"] == pytest.approx(0.5, abs=0.05)
    assert found.summary()["f1"] < planted_scores.summary()["f1"] - 0.2


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_best_f1_and_auroc_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    values = np.round(np.maximum(rng.normal(size=60), 0), 1)[:, None]
    truth = rng.random((60, 2)) < 0.3
    truth[0], truth[1] = True, False
    f1, at = ground_truth.best_f1(values, truth)
    for label in range(2):
        best = 0.0
        for threshold in np.unique(values)[1:]:
            fired = values[:, 0] >= threshold
            hits = (fired & truth[:, label]).sum()
            best = max(best, 2 * hits / (fired.sum() + truth[:, label].sum()))
        assert f1[0, label] == pytest.approx(best)
        pairs = values[truth[:, label]][:, None, 0] - values[~truth[:, label]][None, :, 0]
        area = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
        assert ground_truth.auroc(values[:, 0], truth[:, label]) == pytest.approx(area)


def test_truth_of_chronicle(tmp_path):
    labelled = text.LabelledText(
        torch.zeros(1, 6),
        np.array([["bos", "plain", "span.end.year", "life.end.year", "plain", "place"]], dtype=object),
    )
    table = ground_truth.truth(labelled, least=1)
    assert len(table) == 5 and not any("plain" in name or "bos" in name for name in table)
    assert table["any year"].tolist() == [False, True, True, False, False]
    assert table["next span.end.year"].tolist() == [True, False, False, False, False]
    assert table["next place"].tolist() == [False, False, False, True, False]


def test_scoring_refuses_what_does_not_fit():
    units, truth = np.zeros((5, 2)), pd.DataFrame({"a": [True] * 5})
    with pytest.raises(ValueError, match="5 tokens of activations but 4 of labels"):
        ground_truth.score(units, truth.head(4), units, truth)
    with pytest.raises(ValueError, match="share no label"):
        ground_truth.score(units, truth, units, truth.rename(columns={"a": "b"}))
    with pytest.raises(ValueError, match="NaN"):
        ground_truth.score(units + np.nan, truth, units, truth)


# ---- matching


def test_match_finds_a_permutation():
    a, b = make_transcoder(0), make_transcoder(0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    b.W_dec.copy_(2 * a.W_dec[order])
    found = matching.match(a, b)
    assert (order.numpy()[found["match"]] == found["feature"]).all()
    assert found["mutual"].all() and np.allclose(found["cosine"], 1, atol=1e-6)
    unrelated = matching.match(a, make_transcoder(0, seed=9))
    assert unrelated["cosine"].median() < 0.7
    live = torch.zeros(64, dtype=torch.bool)
    live[[3, 5]] = True
    assert matching.match(a, b, live_a=live)["feature"].tolist() == [3, 5]
    with pytest.raises(ValueError, match="no feature is live"):
        matching.match(a, b, live_a=~torch.ones(64, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot be matched"):
        matching.match(a, make_transcoder(0, d_model=8))


# ---- what the script of the fronts wrote


def test_fronts_file_is_complete_and_fair():
    script = json.loads(tc.data_path("fronts.json").read_text(encoding="utf-8"))
    points, gaps, scores = (pd.DataFrame(**script[name]) for name in ("points", "gaps", "labels"))
    assert points["seed"].nunique() >= 3 and set(points["text"]) == {"chronicle", "real"}
    kinds = {"transcoder", "skip transcoder", "SAE on MLP input", "SAE on MLP output"}
    controls_ = {"top-k neurons", "random directions"}
    counts = points.groupby(["text", "layer", "seed"])["name"].agg(lambda names: frozenset(names))
    assert set(counts) == {frozenset(kinds | controls_)} and len(counts) == 2 * 3 * points["seed"].nunique()
    assert set(scores["name"]) == kinds | {"neurons", "random directions"} and scores["units"].nunique() == 1
    assert (gaps["low"] <= gaps["value"]).all() and (gaps["value"] <= gaps["high"]).all()
    # The gaps follow from the points.
    one = points.query("text == 'real' and layer == 1 and seed == 0")
    gap = fronts.gap(one, "transcoder", "SAE on MLP output", ["layer", "seed"])["gap"][0]
    row = gaps.query("text == 'real' and layer == 1 and seed == 0 and ours == 'transcoder'").set_index("other")
    assert row.loc["SAE on MLP output", "value"] == pytest.approx(gap, abs=1e-4)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, x: (t, x[:0]), "there is no text"),
        (lambda t, x: (t, x[:, :1]), "give rows .row, pos. of 2 to 16 tokens"),
        (lambda t, x: (t, x[0]), "give rows .row, pos. of 2 to 16 tokens"),
        (lambda t, x: (t, torch.full((2, 8), BOS)), "nothing but BOS"),
        (lambda t, x: (t, x.repeat(1, 2)), "2 to 16 tokens"),
        (lambda t, x: ({}, x), "layers 0 to 2"),
        (lambda t, x: ({7: t[0]}, x), "layers 0 to 2"),
        (lambda t, x: ({0: t[0].to("meta")}, x), "layer 0 is on meta, but the model is on cpu"),
        (lambda t, x: ({1: t[0]}, x), "reads blocks.0.ln2.* a transcoder of this layer reads blocks.1"),
    ],
)
def test_bad_input_gets_one_sentence(model, tokens, change, message):
    fresh = {layer: make_transcoder(layer) for layer in range(2)}
    transcoders, rows = change(fresh, tokens)
    with pytest.raises(ValueError, match=message) as error:
        evaluation.evaluate(tc.ReplacementModel(model, transcoders), rows)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_and_missing_layers(model, tokens, transcoders):
    broken = make_transcoder(1)
    for bad in ([math.nan], [math.inf], [math.inf, -math.inf]):
        broken.W_dec[0, : len(bad)] = torch.tensor(bad)
        with pytest.raises(ValueError, match="W_dec of the transcoder of layer 1 holds NaN"):
            evaluation.evaluate(tc.ReplacementModel(model, {0: transcoders[0], 1: broken}), tokens)
    broken.W_dec[0] = 3e38  # their sum is infinite, but none of them
    check(tc.ReplacementModel(model, {1: broken}), tokens)
    with pytest.raises(ValueError, match="layer 2 has no transcoder"):
        evaluation.measure(tc.ReplacementModel(model, {0: transcoders[0]}), tokens, groups={"both": [0, 2]})


def test_text_shorter_than_one_context(model, tmp_path):
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "short.txt").write_text("w1 w2 w3", encoding="utf-8")
    for name in ("empty", "short"):
        with pytest.raises(ValueError, match="fills 0 rows of 16 tokens, but 1 were asked for"):
            tc.load_text(model, str(tmp_path / f"{name}.txt"), 1)
