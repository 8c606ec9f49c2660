"""Path search against brute force by one-step tables, which share no code with it."""

import copy
import json
import math

import matplotlib.pyplot as plt
import networkx as nx
import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tclib as tc
from tclib import targets
from tclib.attribution import UnbalancedError
from tclib.circuits import drawing, graph_files, layout
from tclib.circuits.one_step import Node, prompt_graph
from tclib.circuits.path_bounds import suffix_bounds
from tclib.circuits.path_graph import check_flows, merge
from tclib.circuits.path_search import PathFilter, best_first, greedy
from tests.tiny import make_model, make_transcoder

ARCHITECTURES = [
    {"activation": "relu"},
    {"activation": "relu", "skip": True},
    {"activation": "topk", "k": 3},
    {"activation": "jumprelu"},
]
MODELS = [(2, "gpt2", True), (2, "gpt2", False), (2, "neox", False), (3, "gpt2", True)]  # layers, blocks, processed
MODELS += [(2, "llama", True), (2, "gemma2", False)]


class Models(list):
    """A list that hypothesis prints in one word."""

    def __repr__(self):
        return "models"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(
        make_model(
            tmp_path_factory.mktemp("model"), n, d_model=16, heads=2, seed=n, blocks=blocks, processed=processed
        ).double()
        for n, blocks, processed in MODELS
    )


def make_trace(models, which, architecture, seed, skip_layer=None, words=2):
    model = models[which]
    transcoders = {
        layer: make_transcoder(layer, 16, 8, seed=seed, **ARCHITECTURES[architecture]).double()
        for layer in range(model.cfg.n_layers)
        if layer != skip_layer
    }
    ids = torch.randint(0, 40, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tc.trace(tc.ReplacementModel(model, transcoders), " ".join(f"w{i}" for i in ids), check_fit=False)


def any_target(trace, which):
    if which == 0:
        return targets.logit_difference(trace, "w1", "w2")
    if which == 1:
        return targets.feature(trace, max(trace.transcoders), 5)
    reader = torch.randn(16, generator=torch.Generator().manual_seed(5)).double()
    return targets.direction(trace, reader, "attn_in", 1, 1)


def brute_force(trace, target, length, factor=1.0, nodes=(), tables=None):
    """{path: contribution} of all paths that end within ``length`` edges, and of all partial ones of just that many."""
    paths, tables = {}, {} if tables is None else tables
    features = [i for i, node in enumerate(nodes) if node.kind == "feature"]
    key = nodes[features[-1] :] if features else ("target", *nodes)  # what a table depends on
    if key not in tables:
        tables[key] = tc.attribute(trace, target)
    for row in tables[key].itertuples():
        if row.kind in ("target_bias", "norm_bias"):
            node = Node(row.kind, *nodes[-1][1:]) if nodes else Node(row.kind)
        else:
            columns = (row.layer, row.head, row.position, row.feature)
            node = Node(row.kind, *(None if pd.isna(value) else int(value) for value in columns))
        if node.goes_on and len(nodes) + 1 < length:
            if row.contribution == 0:
                continue
            if node.kind == "feature":
                inner = targets.feature(trace, node.layer, node.feature, node.position)
            else:
                inner = targets.head_source(trace, target, node.layer, node.head, node.position)
            scale = factor * row.contribution / inner.value(trace)
            paths |= brute_force(trace, inner, length, scale, (*nodes, node), tables)
        else:
            paths[(*nodes, node)] = factor * row.contribution
    return paths


question = {
    "which": st.integers(0, len(MODELS) - 1),
    "architecture": st.integers(0, len(ARCHITECTURES) - 1),
    "seed": st.integers(0, 1000),
    "skip_layer": st.sampled_from([None, 0]),
    "kind": st.integers(0, 2),
}


@settings(max_examples=12, deadline=None)
@given(length=st.integers(1, 3), **question)
def test_all_paths_are_those_of_brute_force_and_sum_to_the_target(
    models, which, architecture, seed, skip_layer, kind, length
):
    trace = make_trace(models, which, architecture, seed, skip_layer)
    target = any_target(trace, kind)
    expected = {path: c for path, c in brute_force(trace, target, length).items() if c != 0}
    found = best_first(prompt_graph(trace), target, 0.0, max_length=length, limit=10**6)
    contributions = {path.nodes: path.contribution for path in found.paths if path.contribution != 0}
    assert contributions.keys() == expected.keys()
    for path, contribution in expected.items():
        assert math.isclose(contributions[path], contribution, rel_tol=1e-6, abs_tol=1e-9)
    sizes = sum(map(abs, expected.values()))
    assert abs(sum(contributions.values()) - target.value(trace)) < 1e-9 * sizes
    assert found.absolute == found.remainder == 0


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.001, 0.5), length=st.sampled_from([None, 2, 4]), **question)
def test_no_path_above_the_threshold_is_missed(models, which, architecture, seed, skip_layer, kind, share, length):
    trace = make_trace(models, which, architecture, seed, skip_layer, words=1)
    target, graph = any_target(trace, kind), prompt_graph(make_trace(models, which, architecture, seed, skip_layer, 1))
    everything = best_first(graph, target, 0.0, max_length=length, limit=10**6)
    assume(everything.paths)
    threshold = share * abs(everything.paths[0].contribution)
    found = best_first(graph, target, threshold, max_length=length)
    expected = {path.nodes for path in everything.paths if abs(path.contribution) >= threshold * (1 + 1e-9)}
    assert expected <= {path.nodes for path in found.paths}
    assert all(abs(path.contribution) >= threshold for path in found.paths)
    assert found.guarantee == threshold
    listed = sum(path.contribution for path in found.paths)
    assert abs(listed + found.remainder - target.value(trace)) < 1e-9 * (abs(listed) + found.absolute + 1)
    assert abs(found.remainder) <= found.absolute + 1e-12


def test_gains_can_exceed_one_so_that_pruning_by_size_alone_would_miss_paths(models):
    """The reason for the bounds: a control that follows only what is itself above the threshold loses paths."""
    lost = 0
    for seed in range(6):
        trace = make_trace(models, 3, 0, seed)
        graph, target = prompt_graph(trace), any_target(trace, 0)
        gains = suffix_bounds(graph).gains
        everything = best_first(graph, target, 0.0, max_length=3, limit=10**6).paths
        partial = {p.nodes: abs(p.contribution) for n in (1, 2) for p in
                   best_first(graph, target, 0.0, max_length=n, limit=10**6).paths}  # fmt: skip
        assert (gains > 1).any()
        threshold = 0.05 * abs(everything[0].contribution)
        for path in everything:
            prefixes = [partial[path.nodes[:n]] for n in range(1, len(path)) if path.nodes[:n] in partial]
            lost += abs(path.contribution) >= threshold and min(prefixes, default=threshold) < threshold
    assert lost > 0


def test_a_limit_is_reported_honestly(models):
    trace = make_trace(models, 3, 0, 1)
    graph, target = prompt_graph(trace), any_target(trace, 0)
    whole = best_first(graph, target, 0.0, max_length=4, limit=10**6)
    threshold = 0.001 * abs(whole.paths[0].contribution)
    found = best_first(graph, target, threshold, max_length=4, limit=10)
    assert found.expanded <= 10 and found.guarantee > threshold
    listed = {path.nodes for path in found.paths}
    assert all(abs(p.contribution) <= found.guarantee for p in whole.paths if p.nodes not in listed)
    assert abs(sum(p.contribution for p in found.paths) + found.remainder - target.value(trace)) < 1e-9


@settings(max_examples=15, deadline=None)
@example(which=0, architecture=0, seed=242, skip_layer=None, kind=1, steps=3, branches=5)  # a negative path
@given(steps=st.integers(1, 3), branches=st.integers(1, 6), **question)
def test_greedy_keeps_the_best_extensions(models, which, architecture, seed, skip_layer, kind, steps, branches):
    """The rules of the paper's code, written out over one-step tables."""
    trace = make_trace(models, which, architecture, seed, skip_layer)
    target, heads = any_target(trace, kind), trace.model.cfg.n_heads
    kept = [((), target, 1.0)]
    for paths in greedy(prompt_graph(trace), target, steps, branches):
        found = []
        for nodes, here, factor in kept:
            if here is None:
                continue
            table = tc.attribute(trace, here)
            table["contribution"] *= factor  # behind a negative path, what is largest turns round
            own = table[table["kind"] == "feature"].nlargest(branches, "contribution")
            read = table[(table["kind"] == "head") & (table["position"] > 0)]
            read = read.sort_values("contribution", ascending=False).groupby("layer").head(min(branches, heads))
            both = table[table["kind"].isin(["embedding", "position"])]["contribution"].sum()
            options = [(Node("embedding", position=here.position), both)]
            options += [(Node("feature", int(r.layer), None, int(r.position), int(r.feature)), r.contribution)
                        for r in own.itertuples()]  # fmt: skip
            options += [(Node("head", int(r.layer), int(r.head), int(r.position)), r.contribution)
                        for r in read.itertuples()]  # fmt: skip
            found += [((*nodes, node), c, here) for node, c in options]
        found = sorted(found, key=lambda item: -item[1])[:branches]
        assert [p.nodes for p in paths] == [nodes for nodes, *_ in found]
        assert all(abs(p.contribution - c) < 1e-8 * (1 + abs(c)) for p, (_, c, _) in zip(paths, found, strict=True))
        kept = []
        for nodes, contribution, reader in found:
            node, inner = nodes[-1], None
            if node.kind == "feature":
                inner = targets.feature(trace, node.layer, node.feature, node.position)
            elif node.kind == "head" and node.layer > 0:
                inner = targets.head_source(trace, reader, node.layer, node.head, node.position)
            kept.append((nodes, inner, contribution / inner.value(trace) if inner else 0.0))


def test_a_cap_limits_by_the_last_feature(models):
    trace = make_trace(models, 3, 0, 2)
    graph, target = prompt_graph(trace), any_target(trace, 1)
    value = target.value(trace)
    free, capped = (greedy(graph, target, 2, 5, cap=cap) for cap in (False, True))
    assert max(p.contribution for p in free[0]) > max(value, 0)
    assert all(p.contribution <= max(value, 0.0) for level in capped for p in level)


def test_filters(models):
    trace = make_trace(models, 3, 0, 3)
    graph, target = prompt_graph(trace), any_target(trace, 0)
    everything = best_first(graph, target, 0.0, max_length=3, limit=10**6).paths

    def feature(node):
        return node.kind == "feature"

    def head(node):
        return node.kind == "head"

    for only, wanted in [
        (PathFilter(first=[head]), lambda n: head(n[0])),
        (PathFilter(first=[head, feature]), lambda n: len(n) > 1 and head(n[0]) and feature(n[1])),
        (PathFilter(last=[head, feature]), lambda n: len(n) > 1 and head(n[-2]) and feature(n[-1])),
        (PathFilter(inside=[feature]), lambda n: any(map(feature, n))),
        (
            PathFilter(inside=[feature, head]),
            lambda n: any(feature(a) and head(b) for a, b in zip(n, n[1:], strict=False)),
        ),
        (PathFilter(never=lambda node: node.layer == 0), lambda n: all(node.layer != 0 for node in n)),
    ]:
        found = best_first(graph, target, 0.0, max_length=3, only=only, limit=10**6)
        assert {p.nodes for p in found.paths} == {p.nodes for p in everything if wanted(p.nodes)}
        listed = sum(p.contribution for p in found.paths)
        assert abs(listed + found.remainder - target.value(trace)) < 1e-8
    kept = greedy(graph, target, 2, 4, only=PathFilter(never=head))
    assert kept[0] and not any(head(node) for level in kept for p in level for node in p.nodes)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.01, 0.5), length=st.sampled_from([None, 2]), **question)
def test_merged_paths_balance(models, which, architecture, seed, skip_layer, kind, share, length):
    trace = make_trace(models, which, architecture, seed, skip_layer)
    graph, target = prompt_graph(trace), any_target(trace, kind)
    bounds = suffix_bounds(graph, length is not None)
    found = best_first(graph, target, share * abs(target.value(trace)), length, limit=200, bounds=bounds)
    assume(found.paths)
    circuit = merge(graph, target, found.paths)
    assert nx.is_directed_acyclic_graph(circuit)
    assert {node.name for path in found.paths for node in path.nodes} <= set(circuit)
    entering = sum(weight for *_, weight in circuit.in_edges(target.name, data="weight"))
    assert abs(entering - target.value(trace)) < 1e-8 * (1 + abs(entering))
    table = tc.attribute(trace, target)
    for path in found.paths:  # edges into the target are rows of its table
        first = path.nodes[0]
        if first.kind == "feature":
            row = table[(table["layer"] == first.layer) & (table["feature"] == first.feature)].iloc[0]
            weight = circuit.edges[first.name, target.name]["weight"]
            assert abs(weight - row["contribution"]) < 1e-8 * (1 + abs(weight))
    broken = copy.deepcopy(circuit)
    edge = max(broken.edges, key=lambda e: abs(broken.edges[e]["weight"]))
    broken.edges[edge]["weight"] *= 1.5
    with pytest.raises(UnbalancedError, match="enters"):
        check_flows(broken)


def test_wrong_questions_get_one_sentence(models):
    trace = make_trace(models, 0, 0, 0)
    graph, target = prompt_graph(trace), any_target(trace, 0)
    with pytest.raises(ValueError, match="threshold -1"):
        best_first(graph, target, -1)
    with pytest.raises(ValueError, match="at least 1"):
        best_first(graph, target, 1, max_length=0)
    with pytest.raises(ValueError, match="0 steps"):
        greedy(graph, target, steps=0)
    with pytest.raises(ValueError, match="no paths"):
        merge(graph, target, [])


@pytest.fixture(scope="module")
def circuit(models):
    trace = make_trace(models, 3, 1, 4)
    graph, target = prompt_graph(trace), any_target(trace, 0)
    return merge(graph, target, best_first(graph, target, 0.02 * abs(target.value(trace))).paths)


def test_the_figure_draws_the_largest_nodes_apart_from_each_other(circuit):
    plan = layout.layout(circuit, 30)
    assert 20 < len(plan.places) <= 31
    places = sorted(plan.places.values())
    assert len(set(places)) == len(places)
    by_row = [[x for x, row in places if row == y] for y in sorted({y for _, y in places})]
    assert all(b - a > 0.9 for xs in by_row for a, b in zip(xs, xs[1:], strict=False))
    for source, reader in circuit.edges:  # time runs upwards
        if {source, reader} <= plan.places.keys():
            assert plan.places[source][1] < plan.places[reader][1]
    ax = drawing.circuit_figure(circuit, "a title", 30)
    assert ax.get_title() == "a title" and len(ax.texts) >= len(plan.places)
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="at least 1"):
        layout.layout(circuit, 0)


@pytest.mark.parametrize("ending", [".graphml", ".json"])
def test_files_keep_everything(circuit, tmp_path, ending):
    path = tmp_path / f"circuit{ending}"
    graph_files.save_graph(circuit, path)
    if ending == ".json":
        back = nx.node_link_graph(json.loads(path.read_text(encoding="utf-8")), edges="edges")
    else:
        back = nx.read_graphml(path)
        back.graph["tokens"] = json.loads(back.graph["tokens"])
    assert dict(back.nodes(data=True)) == dict(circuit.nodes(data=True))
    assert {e: back.edges[e]["weight"] for e in back.edges} == {e: circuit.edges[e]["weight"] for e in circuit.edges}
    assert back.graph["tokens"] == circuit.graph["tokens"]


def test_other_file_endings_are_refused(circuit, tmp_path):
    with pytest.raises(ValueError, match="neither .graphml nor .json"):
        graph_files.save_graph(circuit, tmp_path / "circuit.pkl")
