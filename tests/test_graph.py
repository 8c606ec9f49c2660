"""All-paths graphs: another route gives the same numbers, rows add up, pruning keeps what it says."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tclib as tc
from tclib import targets
from tclib.activations import hook_in, hook_out
from tclib.attribution import UnbalancedError
from tclib.circuits import graph, pruning
from tests.tiny import make_model, make_transcoder

ARCHITECTURES = [
    {"activation": "relu"},
    {"activation": "relu", "skip": True},
    {"activation": "topk", "k": 8},
    {"activation": "jumprelu"},
    {"activation": "batchtopk", "k": 8, "skip": True},
]
KINDS = [("gpt2", 1, True), ("gpt2", 2, False), ("gpt2", 3, True), ("gpt2", 4, False)]
KINDS += [("neox", 3, False), ("neox", 2, True), ("neox-sequential", 3, False)]
KINDS += [("llama", 3, True), ("gemma2", 2, False), ("olmo2", 3, False)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [
        make_model(tmp_path_factory.mktemp("model"), layers=layers, seed=layers, blocks=blocks, processed=processed)
        for blocks, layers, processed in KINDS
    ]


def make_trace(model, architecture=0, seed=0, without=None, words=4):
    transcoders = {
        layer: make_transcoder(layer, d_features=24, seed=seed, **ARCHITECTURES[architecture])
        for layer in range(model.cfg.n_layers)
        if layer != without
    }
    ids = torch.randint(0, 40, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tc.trace(tc.ReplacementModel(model, transcoders), " ".join(f"w{i}" for i in ids), check_fit=False)


def by_autograd(trace, targets):
    """The model itself, patterns and scales held, each MLP a free input plus its transcoder's affine part.

    Returns the gradient of each target at every MLP's output and at the embeddings, as (layer or name) -> [pos, d].
    """
    writes, places = {}, {}

    def hold(name):
        return lambda value, hook: trace.cache[name][None]

    def free(name, layer=None):
        def hook_fn(value, hook):
            writes[name] = trace.cache[name][None].clone().requires_grad_(True)
            transcoder = trace.transcoders.get(layer)
            if transcoder is None or transcoder.W_skip is None:
                return writes[name]
            skip = places["mlp_in", layer] @ transcoder.W_skip
            return writes[name] + skip - skip.detach()

        return hook_fn

    def keep(*place):
        return lambda value, hook: places.__setitem__(place, value)

    layers = range(trace.model.cfg.n_layers)
    held = [n for n in trace.cache if n.endswith(("hook_pattern", "hook_scale"))]
    hooks = [(n, hold(n)) for n in held]
    hooks += [(hook_in(layer), keep("mlp_in", layer)) for layer in layers]
    hooks += [(hook_out(layer), free(hook_out(layer), layer)) for layer in layers]
    hooks += [(n, free(n)) for n in ("hook_embed", "hook_pos_embed") if n in trace.cache]
    hooks.append(("ln_final.hook_normalized", keep("final", trace.model.cfg.n_layers)))
    rows = []
    with torch.enable_grad(), trace.model.hooks(fwd_hooks=hooks):
        trace.model(trace.tokens[None])
        for target in targets:
            reader = target.reader * trace.gain(target.place, target.layer)[0]
            value = places[target.place, target.layer][0, target.position] @ reader
            found = torch.autograd.grad(value, list(writes.values()), retain_graph=True, allow_unused=True)
            grads = {
                n: torch.zeros_like(w[0]) if f is None else f[0]
                for (n, w), f in zip(writes.items(), found, strict=True)
            }
            rows.append(grads)
    return rows


def expected_row(trace, gradients, nodes):
    """What a row must hold: each source's written vector times the gradient where it was written."""
    names = {"embedding": "hook_embed", "position": "hook_pos_embed"}
    row = []
    for node in nodes.itertuples():
        if node.kind in names:
            row.append(gradients[names[node.kind]][node.position] @ trace.cache[names[node.kind]][node.position])
        elif node.kind in ("feature", "error", "mlp"):
            layer, here = node.layer, node.position
            vector = trace.cache[hook_out(layer)][here]
            if node.kind == "feature":
                vector = node.activation * trace.transcoders[layer].W_dec[node.feature]
            elif node.kind == "error":
                x = trace.cache[hook_in(layer)][here]
                vector = vector - trace.transcoders[layer].decode(trace.features[layer][here], x)
            row.append(gradients[hook_out(layer)][here] @ vector)
        else:
            row.append(torch.tensor(0.0))
    return torch.stack(row)


@settings(max_examples=20, deadline=None)
@given(
    kind=st.integers(0, len(KINDS) - 1),
    architecture=st.integers(0, len(ARCHITECTURES) - 1),
    seed=st.integers(0, 1000),
    without=st.sampled_from([None, 0, 1]),
)
def test_agrees_with_autograd_through_the_frozen_model(models, kind, architecture, seed, without):
    trace = make_trace(models[kind], architecture, seed, without)
    g = graph.build_graph(trace)  # raises UnbalancedError if a row does not sum to its node
    rows = g.nodes[g.nodes["value"].notna()]
    chosen = rows.sample(min(8, len(rows)), random_state=seed)
    roots = [target for target, _ in graph.salient_logits(trace)]
    first = len(g.nodes) - len(roots)
    explained = [
        roots[i - first] if node.kind == "target" else targets.feature(trace, node.layer, node.feature, node.position)
        for i, node in zip(chosen.index, chosen.itertuples(), strict=True)
    ]
    quiet = ~g.nodes["kind"].isin(["bias", "target"]).to_numpy(copy=True)
    for index, gradients in zip(chosen.index, by_autograd(trace, explained), strict=True):
        expected = expected_row(trace, gradients, g.nodes).detach().numpy()
        found = g.adjacency[index].numpy()
        size = float(np.abs(found).max())
        assert found[quiet] == pytest.approx(expected[quiet], abs=2e-5 * size)


def test_values_are_the_models_own(models):
    trace = make_trace(models[2])
    g = graph.build_graph(trace)
    feature = g.nodes[g.nodes["kind"] == "feature"]
    assert feature["value"].to_numpy() == pytest.approx(feature["activation"].to_numpy(), rel=1e-3, abs=1e-4)
    logits = trace.logits[-1] - trace.logits[-1].mean()
    likely = logits.sort(descending=True).values
    found = g.nodes.loc[g.nodes["kind"] == "target", "value"].to_numpy()
    assert found == pytest.approx(likely[: len(found)].numpy(), rel=1e-3, abs=1e-3)
    assert (g.adjacency < 0).any() and (g.adjacency > 0).any()


def test_salient_logits_stop_at_the_mass_or_the_most(models):
    trace = make_trace(models[2])
    assert len(graph.salient_logits(trace, mass=1e-6)) == 1
    assert len(graph.salient_logits(trace, mass=1.0, most=3)) == 3
    held = sum(p for _, p in graph.salient_logits(trace, mass=0.5, most=41))
    assert held >= 0.5


def test_a_budget_keeps_the_influential_and_the_sums(models):
    trace = make_trace(models[2], seed=3)
    whole = graph.build_graph(trace)
    small = graph.build_graph(trace, max_features=20)
    assert (small.nodes["kind"] == "feature").sum() == 20
    assert (small.nodes["kind"] == "remainder").sum() == 1
    keys = ["layer", "position", "feature"]
    kept = whole.nodes.reset_index().merge(small.nodes.loc[small.nodes["kind"] == "feature", keys], on=keys)["index"]
    assert len(kept) == 20
    ours = small.adjacency[:20, :20].numpy()
    assert ours == pytest.approx(whole.adjacency[kept.tolist()][:, kept.tolist()].numpy(), abs=1e-5)
    influence = pruning.influence(whole)[: (whole.nodes["kind"] == "feature").sum()]
    at_random = influence.mean().item() * 20
    assert influence[kept.tolist()].sum().item() > 1.5 * at_random


def test_the_plan_is_what_comes_out(models):
    trace = make_trace(models[1])
    for budget in (None, 10):
        plan = graph.plan(trace, budget, targets=len(graph.salient_logits(trace)))
        g = graph.build_graph(trace, max_features=budget)
        assert plan.rows == (g.nodes["kind"] == "feature").sum()
        assert plan.nodes == len(g.nodes)
        assert plan.bytes > g.adjacency.numel() * 4


def definition(g):
    """Influence by the inverse, as in Ameisen et al. 2025; the scores from it."""
    a = g.adjacency.double().abs().numpy()
    a[:, (g.nodes["kind"] == "bias").to_numpy()] = 0
    n = a / np.maximum(a.sum(1, keepdims=True), 1e-10)
    weights = g.nodes["weight"].fillna(0).to_numpy()
    influence = weights @ (np.linalg.inv(np.eye(len(n)) - n) - np.eye(len(n)))
    error = g.nodes["kind"].isin(["error", "mlp", "remainder"]).to_numpy()
    inputs = g.nodes["kind"].isin(["embedding", "position"]).to_numpy()
    replacement = influence[inputs].sum() / (influence[inputs].sum() + influence[error].sum())
    reached = influence + weights
    completeness = ((1 - n[:, error].sum(1)) * reached).sum() / reached.sum()
    return influence, replacement, completeness


@pytest.mark.parametrize("budget", [None, 30])
def test_scores_are_their_definitions(models, budget):
    g = graph.build_graph(make_trace(models[3], seed=5, without=1), max_features=budget)
    influence, replacement, completeness = definition(g)
    assert pruning.influence(g).numpy() == pytest.approx(influence, rel=1e-4, abs=1e-6)
    assert pruning.replacement_score(g) == pytest.approx(replacement, rel=1e-4)
    assert pruning.completeness_score(g) == pytest.approx(completeness, rel=1e-4)
    assert 0 < replacement < completeness < 1


def test_pruning_balances_and_grows_with_its_thresholds(models):
    g = graph.build_graph(make_trace(models[2], seed=6))
    sizes = []
    for fraction in (0.3, 0.6, 0.9):
        small = pruning.prune(g, nodes=fraction)  # a Graph checks its rows when it is made
        sizes.append(len(small.nodes))
        features = torch.tensor((small.nodes["kind"] == "feature").tolist())
        assert (small.adjacency[:, features] != 0).any(0).all()
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] < len(g.nodes)
    again = pruning.prune(small)
    assert (again.nodes["kind"] == "remainder").sum() == 1


def test_networkx_has_signs_and_balances(models):
    small = pruning.prune(graph.build_graph(make_trace(models[2], seed=7)))
    result = pruning.to_networkx(small)
    assert nx.is_directed_acyclic_graph(result)
    for index, node in result.nodes(data=True):
        if "value" in node:
            incoming = sum(edge["weight"] for *_, edge in result.in_edges(index, data=True))
            assert incoming == pytest.approx(node["value"], rel=1e-3, abs=1e-3)
            assert abs(node["balance"]) < 1e-2
    assert {edge["sign"] for *_, edge in result.edges(data=True)} == {-1, 1}


def test_a_row_that_does_not_add_up_is_an_error(models):
    g = graph.build_graph(make_trace(models[1]))
    wrong = g.adjacency.clone()
    wrong[0, -20] += 1
    with pytest.raises(UnbalancedError, match="do not sum to"):
        graph.Graph(g.nodes, wrong)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda t: graph.build_graph(t, targets=[]), "nothing to explain"),
        (lambda t: graph.build_graph(t, max_features=0), "max_features is 0"),
        (lambda t: pruning.prune(graph.build_graph(t), nodes=1.5), "nodes is 1.5"),
        (lambda t: graph.salient_logits(t, position=9), "position 9 is outside"),
    ],
)
def test_wrong_questions_get_one_sentence(models, ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(make_trace(models[0]))
