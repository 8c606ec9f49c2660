"""Today's families of models: on tiny random ones of each, processed and not, everything is as exact as on GPT-2."""

from __future__ import annotations

import copy
from functools import cache

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import tclib as tc
from tclib import connections, factorisation, features, interventions, linearity, targets, ui
from tclib.activations import mlp_out
from tclib.blocks import Block, embeddings
from tclib.circuits import attention, graph, validation
from tclib.circuits.one_step import prompt_graph
from tclib.evaluation.baselines import top_neurons
from tclib.features import FeatureActivations, connect, dashboard
from tclib.tasks.shared_prefix import SharedPrefix
from tclib.ui import dashboard_page
from tests.tiny import FAMILIES, make_model, make_transcoder

LAYERS, WORDS, HELD = 3, 8, ["patterns", "scales", "values", "mlps"]
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function of family, whether processed, and whether in float64; each model is made once."""

    @cache
    def make(family: str, processed: bool = False, double: bool = False):
        if double:
            return copy.deepcopy(make(family, processed)).double()
        folder = tmp_path_factory.mktemp(family)
        return make_model(folder, layers=LAYERS, seed=3, blocks=family, processed=processed)

    return make


def make_trace(models, family, processed=False, double=False, missing=1, before_norm=False, seed=0, **config):
    model = models(family, processed, double)
    transcoders = {layer: make_transcoder(layer, seed=seed, **config) for layer in range(LAYERS) if layer != missing}
    for layer, transcoder in transcoders.items():
        if before_norm:
            transcoder.config = transcoder.config.model_copy(update={"hook_out": mlp_out(layer)})
        transcoder.to(model.W_E.dtype)
    ids = torch.randint(0, 40, (WORDS,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tc.trace(tc.ReplacementModel(model, transcoders), " ".join(f"w{i}" for i in ids), check_fit=False)


question = {
    "family": st.sampled_from(sorted(FAMILIES)),
    "processed": st.booleans(),
    "missing": st.sampled_from([None, 0, 1]),
    "before_norm": st.booleans(),
    "skip": st.booleans(),
    "seed": st.integers(0, 1000),
    "position": st.integers(0, WORDS),
    "data": st.data(),
}


def any_target(trace, position, data):
    reader = torch.randn(32, generator=torch.Generator().manual_seed(5)).to(trace.like)
    places = [("attn_in", 0), ("attn_in", 2), ("mlp_in", 1), ("final", 0)]
    candidates = [targets.logit(trace, "w3", position), targets.logit_difference(trace, "w1", "w2", position)]
    candidates += [targets.feature(trace, layer, 5, position) for layer in trace.transcoders]
    candidates += [targets.direction(trace, reader, place, layer, position) for place, layer in places]
    return data.draw(st.sampled_from(candidates), label="target")


def check(trace, target, tolerance):
    """Balance, autograd and the freeze; then one head opened."""
    table = tc.attribute(trace, target)
    size = table["contribution"].abs().sum()
    assert table["contribution"].sum() == pytest.approx(target.value(trace), abs=tolerance * size)
    again = linearity.by_autograd(trace, target, table)
    assert again.to_numpy() == pytest.approx(table["contribution"].to_numpy(float), abs=tolerance * size)
    assert linearity.self_test(trace) < tolerance
    return table


@settings(max_examples=25, deadline=None)
@given(**question)
def test_contributions_balance_and_autograd_agrees(
    models, family, processed, missing, before_norm, skip, seed, position, data
):
    trace = make_trace(models, family, processed, False, missing, before_norm, seed, skip=skip)
    check(trace, any_target(trace, position, data), 1e-5)


@settings(max_examples=20, deadline=None)
@given(**question)
def test_in_float64_they_are_exact(models, family, processed, missing, before_norm, skip, seed, position, data):
    trace = make_trace(models, family, processed, True, missing, before_norm, seed, skip=skip)
    target = any_target(trace, position, data)
    heads = check(trace, target, 1e-10).query("kind == 'head'")
    for row in heads.head(2).itertuples():
        opened = tc.attribute(trace, targets.head_source(trace, target, row.layer, row.head, row.position))
        size = opened["contribution"].abs().sum()
        assert opened["contribution"].sum() == pytest.approx(row.contribution, abs=1e-10 * size)


@settings(max_examples=20, deadline=None)
@given(**question)
def test_a_search_steps_through_the_same_tables(
    models, family, processed, missing, before_norm, skip, seed, position, data
):
    """One-step tables of a batch are those of `attribute`, and what stands behind a source sums to what it brought."""
    trace = make_trace(models, family, processed, True, missing, before_norm, seed, skip=skip)
    target = any_target(trace, position, data)
    found = prompt_graph(trace)
    (table,) = found.tables(root := found.root(target))
    values = table.values[0] * table.valid[0]
    expected = tc.attribute(trace, target)["contribution"]
    size = expected.abs().sum()
    assert values.sum().item() == pytest.approx(target.value(trace), abs=1e-10 * size)
    assert values.abs().sort(descending=True).values[: len(expected)].numpy() == pytest.approx(
        expected.abs().sort_values(ascending=False).to_numpy(float)[: len(values)], abs=1e-10 * size
    )
    onward = [i for i, source in enumerate(table.sources.tolist()) if table.valid[0, i] and found.node(source).goes_on]
    if not onward:
        return
    parents = root[torch.zeros(len(onward), dtype=torch.long)]
    states = found.follow(parents, table.sources[onward], values[onward])
    for part in found.tables(states):
        inner = part.values * part.valid
        brought = values[onward][part.states]
        assert ((inner.sum(1) - brought).abs() <= 1e-9 * (inner.abs().sum(1) + brought.abs())).all()


@settings(max_examples=20, deadline=None)
@given(**question)
def test_queries_and_keys_sum_to_scores(models, family, processed, missing, before_norm, skip, seed, position, data):
    trace = make_trace(models, family, processed, True, missing, before_norm, seed, skip=skip)
    layer, head = data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, 3))
    seen = trace.cache[f"blocks.{layer}.attn.hook_pattern"][head, position].nonzero().squeeze(-1).tolist()
    source = data.draw(st.sampled_from(seen))
    terms = attention.score_terms(trace, layer, head, position, source)  # raises UnbalancedError otherwise
    pattern = trace.cache[f"blocks.{layer}.attn.hook_pattern"][head, position, terms.keys]
    assert terms.cap.softmax(terms.scores).numpy() == pytest.approx(pattern.numpy(), abs=1e-6)
    assert terms.query.scores.sum(0).numpy() == pytest.approx(terms.scores.numpy(), abs=1e-9)
    for side in ("query", "key"):
        target = attention.score_target(trace, layer, head, position, source, side)
        value = terms.value if side == "query" else terms.scores[terms.keys == source].item()
        assert target.value(trace) == pytest.approx(value, abs=1e-9)
        tc.attribute(trace, target)
    logit = targets.logit(trace, "w3", position)
    effects = attention.output_terms(trace, logit, layer, head).removals("query")
    small = effects[effects["effect"].abs() < 1e-3 * effects["effect"].abs().max()]
    assert effects["effect"].notna().all() and len(small) < len(effects)


@each_family
@pytest.mark.parametrize("before_norm", [False, True])
def test_edits_do_what_is_predicted_in_the_frozen_model(models, family, before_norm):
    trace = make_trace(models, family, double=True, before_norm=before_norm, skip=True)
    rows = [
        {"layer": layer, "position": WORDS, "feature": int(trace.features[layer][WORDS].nonzero()[0])}
        for layer in trace.transcoders
    ]
    wanted = [targets.logit(trace, "w3"), targets.feature(trace, 2, 5)]
    table = validation.compare(trace, pd.DataFrame(rows), wanted, HELD)
    assert len(table) == 3 and table["predicted"].to_numpy() == pytest.approx(table["measured"].to_numpy(), abs=1e-10)


@each_family
@pytest.mark.parametrize("processed", [False, True])
def test_everything_else_runs_and_adds_up(models, family, processed):
    trace = make_trace(models, family, processed, before_norm=family == "gemma2", skip=True)
    found = graph.build_graph(trace)  # checks every row
    assert {"feature", "error", "mlp", "embedding"} <= set(found.nodes["kind"])
    target, direction = targets.feature(trace, 2, 5), torch.randn(32, generator=torch.Generator().manual_seed(1))
    whole = (trace.cache["blocks.0.hook_mlp_out"][3] @ direction).item()
    for table in (
        factorisation.by_features(trace, 0, 3, direction), factorisation.by_neurons(trace, 0, 3, direction),
    ):  # fmt: skip
        assert table["contribution"].sum() == pytest.approx(whole, abs=1e-5 * table["contribution"].abs().sum())
    one_step = tc.attribute(trace, target).query("kind == 'feature'").iloc[0]
    invariant = connections.pullback(trace, target, one_step["layer"])[one_step["feature"]]
    assert invariant == pytest.approx(one_step["input_invariant"], rel=1e-4, abs=1e-6)
    row = tc.attribute(trace, target).query("kind == 'embedding'").iloc[0]
    direct = connections.de_embed(trace, target)[trace.token_strings[-1]]
    assert row["contribution"] * target.scale(trace) == pytest.approx(direct, rel=1e-4, abs=1e-5)


@each_family
@pytest.mark.parametrize("processed", [False, True])
def test_the_traced_model_is_transformers_own(models, family, processed):
    trace = make_trace(models, family, processed)
    theirs = AutoModelForCausalLM.from_pretrained(trace.model.cfg.model_name).eval()
    with torch.no_grad():
        expected = theirs(trace.tokens[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(trace.logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embeddings(trace.model)[trace.tokens], trace.cache["hook_embed"])
    name = targets.logit(trace, "w3").name
    assert ("before the cap at 3" in name) == (family == "gemma2")


@each_family
def test_every_norm_is_frozen_by_its_name(models, family):
    """A norm whose hook the trace misses would stay free, and a value would depend on it."""
    trace = make_trace(models, family)
    held = {name for name, _ in linearity.freeze(trace)}
    scales = {name for name in trace.model.hook_dict if name.endswith("hook_scale")}
    assert scales and scales <= held
    block = Block.of(trace.model, 0)
    norms = [block.before_attn, block.before_mlp, block.after_attn, block.after_mlp]
    after = family in ("gemma2", "gemma3_text", "olmo2")
    assert [norm is not None for norm in norms] == [family != "olmo2", family != "olmo2", after, after]
    assert block.group == 2 and not any(norm.centres for norm in norms if norm)


def test_what_lies_outside_a_sliding_window_is_refused(models):
    trace = make_trace(models, "mistral")
    assert attention.score_terms(trace, 1, 0, WORDS, WORDS - 2).keys.tolist() == list(range(WORDS - 3, WORDS + 1))
    with pytest.raises(ValueError, match="position 1 is outside the sliding window of layer 1 at position 8"):
        attention.score_terms(trace, 1, 0, WORDS, 1)


@pytest.fixture(scope="module")
def tokens():
    rows = torch.randint(0, 40, (48, 16), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 40
    return rows


@each_family
def test_training_evaluation_index_and_explorers(models, tokens, family, tmp_path):
    model = models(family)
    config = tc.TrainConfig(d_features=64, activation="topk", k=8, steps=40, batch_rows=8, lr=3e-3)
    trained, _ = tc.train(model, tokens, [0, 2], config)
    table = tc.evaluate(tc.ReplacementModel(model, trained), tokens[:16])
    assert table["fvu"].max() < 0.9 and table["ce_replaced"].notna().all()
    # Neurons of a gated MLP are what its last matrix reads: keeping all of them changes nothing.
    every = top_neurons(model, 0, model.cfg.d_mlp, torch.zeros(model.cfg.d_mlp))
    torch.testing.assert_close(interventions.run(model, tokens[:2], every), model(tokens[:2]))
    built = features.build_index(tc.ReplacementModel(model, trained), tokens, tmp_path / "index")
    check_connections(model, trained, tokens, built)
    check_explorers(model, trained, built)


def check_explorers(model, transcoders, built):
    """Each shows what it is for; what it could not do would stand in its status line."""
    summary, prompt = features.summarise(built), " ".join(f"w{i}" for i in range(WORDS))
    feature = int(summary.features.query("layer == 2")["count"].argmax())
    shown = {
        "Microscope": ui.Microscope(tc.ReplacementModel(model, transcoders), prompt),
        "Browser": ui.Browser(tc.ReplacementModel(model, transcoders), summary, built),
        "Walker": ui.Walker(tc.ReplacementModel(model, transcoders), prompt, "w3", "w1"),
        "Editor": ui.Editor(tc.ReplacementModel(model, transcoders), prompt, "w3", "w1"),
        "Weights": ui.Weights(transcoders, built, 2, feature),
    }
    for name, explorer in shown.items():
        assert explorer.status.value and "Not possible" not in explorer.status.value, (name, explorer.status.value)
    page = dashboard_page.dashboard_html(dashboard.collect(tc.ReplacementModel(model, transcoders), built, 2, feature))
    assert f"mlp2[{feature}]" in page


def check_connections(model, transcoders, tokens, built):
    """What `connect` reads from an index, both ways, is what a pass over the text gives."""
    feature = int((transcoders[2].encode(_inputs(model, tokens, 2)) > 0).sum(0).argmax())
    theirs = connections.data_weighted(tc.ReplacementModel(model, transcoders), tokens, 0, 2, feature)
    ours = connect.incoming(FeatureActivations(built, 2, feature), transcoders).query("layer == 0").set_index("feature")
    some = int(theirs["target_weighted"].abs().argmax())
    back = connect.outgoing(FeatureActivations(built, 0, some), transcoders).query("layer == 2").set_index("feature")
    for column in ("input_invariant", "input_x_gradient", "target_weighted"):
        assert ours[column].to_numpy() == pytest.approx(theirs[column].to_numpy(), rel=2e-2, abs=2e-3)
        assert back[column][feature] == pytest.approx(theirs[column][some], rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_connections_through_a_norm_after_the_mlp(models, tokens, family, tmp_path):
    """sparsify's transcoders give the MLP's own output; what is read from an index of them passes the norm's gain and
    its scale at every token, and shards merge into the bytes of a single run."""
    trace = make_trace(models, family, before_norm=True, missing=None, activation="topk", k=8)
    model, transcoders = trace.model, trace.transcoders
    built = features.build_index(tc.ReplacementModel(model, transcoders), tokens, tmp_path / "whole")
    check_connections(model, transcoders, tokens, built)
    assert (
        len(dashboard.collect(tc.ReplacementModel(model, transcoders), built, 1, 3).outgoing)
        == transcoders[2].config.d_features
    )
    shards = [
        features.build_index(tc.ReplacementModel(model, transcoders), tokens, tmp_path / f"{i}", (i, 2)).folder
        for i in range(2)
    ]
    merged = features.merge(shards, tmp_path / "merged")
    assert all(path.read_bytes() == (merged.folder / path.name).read_bytes() for path in built.folder.iterdir())


@each_family
def test_the_sweep_of_greater_than_says_which_property_it_does_not_compute(models, tokens, family):
    with pytest.raises(
        ValueError, match="this sweep runs GPT-2's blocks by itself, and its positions are rotary"
    ) as said:
        SharedPrefix(models(family), tokens, 0)
    assert "\n" not in str(said.value)


def _inputs(model, tokens, layer):
    _, seen = model.run_with_cache(tokens, names_filter=lambda name: name == f"blocks.{layer}.ln2.hook_normalized")
    return seen[f"blocks.{layer}.ln2.hook_normalized"][:, 1:].flatten(0, 1)


@pytest.mark.slow
def test_a_table_of_the_largest_deviations(models, tokens, capsys):
    """Relative to the summed absolute values, over processed and plain models; and what a short training explains."""
    rows = {family: deviations(models, tokens, family) for family in FAMILIES}
    table = pd.DataFrame(rows).T
    with capsys.disabled():
        print(f"\n{table.to_string(float_format=lambda value: f'{value:.2g}')}")
    for column, bound in (("balance", 1e-5), ("autograd", 1e-5), ("graph", 1e-5), ("query-key", 1e-5)):
        assert table[column].max() < bound and table[f"{column}, float64"].max() < 1e-10
    assert table[["FVU, trained", "FVU, evaluated"]].max().max() < 0.9


def deviations(models, tokens, family) -> dict[str, float]:
    largest = {}
    for double in (False, True):
        found = []
        for processed in (False, True):
            trace = make_trace(models, family, processed, double, skip=True)
            for target in (targets.logit_difference(trace, "w1", "w2"), targets.feature(trace, 2, 5)):
                table = tc.attribute(trace, target)
                size, own = table["contribution"].abs().sum(), table["contribution"]
                again = linearity.by_autograd(trace, target, table)
                found.append(
                    {
                        "balance": abs(own.sum() - target.value(trace)) / size,
                        "autograd": (again - own).abs().max() / size,
                    }
                )
            whole = graph.build_graph(trace)
            explained = whole.nodes["kind"].isin(["feature", "target"]).to_numpy()
            effects = whole.adjacency.double()[torch.tensor(explained)]
            value = torch.from_numpy(whole.nodes["value"].to_numpy(float)[explained])
            terms = attention.score_terms(trace, 2, 1, WORDS, WORDS - 1)
            products = (terms.query.vectors @ terms.key.vectors.T).double()
            found.append({
                "graph": ((effects.sum(1) - value).abs() / effects.abs().sum(1)).max().item(),
                "query-key": abs(products.sum().item() - terms.value) / products.abs().sum().item(),
            })  # fmt: skip
        largest |= {f"{name}{', float64' * double}": worst for name, worst in pd.DataFrame(found).max().items()}
    config = tc.TrainConfig(d_features=64, activation="topk", k=8, steps=40, batch_rows=8, lr=3e-3)
    trained, history = tc.train(models(family), tokens, [0, 2], config)
    largest["FVU, trained"] = history.groupby("layer")["fvu"].last().max()
    replacement = tc.ReplacementModel(models(family), trained)
    return largest | {"FVU, evaluated": tc.evaluate(replacement, tokens[:16])["fvu"].max()}
