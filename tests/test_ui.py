"""Explorers without a browser: their functions, and shells whose controls are set as a hand would move them."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Any

import ipywidgets as w
import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tclib as tc
from benchmarks.explorers import OTHER, PROMPT, measure
from tclib import connections, interventions, targets, ui
from tclib.circuits import editing, graph
from tclib.circuits.layout import layout
from tclib.circuits.one_step import prompt_graph
from tclib.circuits.path_search import best_first
from tclib.features import Summary, build_index, load_summary, summarise
from tclib.features.feature_activations import FeatureActivations
from tclib.features.naming import Names
from tclib.plots import NEGATIVE, POSITIVE
from tclib.tasks import greater_than as gt
from tclib.ui import answers, base, browser, lab, markup, microscope, walker, weights
from tests.conftest import COMMITTED, REPO
from tests.tiny import make_model, make_transcoder

COPIES = REPO / "build" / "nbmake"
VIEW = "application/vnd.jupyter.widget-view+json"
SLOWEST = 300  # milliseconds
HELD = list(editing.FROZEN)
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple:
    model, transcoders = tc.load_model(device="cpu"), tc.load_transcoders(device="cpu")
    tokens = tc.load_text(model, "chronicle", 32)
    index = build_index(tc.ReplacementModel(model, transcoders), tokens, tmp_path_factory.mktemp("index") / "i")
    return model, transcoders, load_summary(tc.ReplacementModel(model, transcoders)), index


@pytest.fixture(scope="module")
def traced(parts):
    return tc.trace(tc.ReplacementModel(*parts[:2]), PROMPT)


@pytest.fixture(scope="module")
def answer(traced):
    return targets.logit_difference(traced, "45", "20")


@pytest.fixture(scope="module")
def circuit(traced, answer):
    return editing.search(prompt_graph(traced), answer, 0.03)[1]


@pytest.fixture(scope="module")
def shells(parts) -> dict[str, base.Explorer]:
    model, transcoders, summary, index = parts
    return {
        "microscope": ui.Microscope(tc.ReplacementModel(model, transcoders), PROMPT),
        "browser": ui.Browser(tc.ReplacementModel(model, transcoders), summary),
        "walker": ui.Walker(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20"),
        "editor": ui.Editor(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20"),
        "weights": ui.Weights(transcoders, index, 2, 1334),
        "lab": ui.Lab(tc.ReplacementModel(model, transcoders), nouns=["war", "siege"]),
    }


def tree(widget: w.Widget) -> list[w.Widget]:
    return [widget, *(below for child in getattr(widget, "children", ()) for below in tree(child))]


def views(explorer: base.Explorer) -> list[str]:
    return [part.value for part in tree(explorer.box) if isinstance(part, w.HTML) and part is not explorer.status]


def wrong(explorer: base.Explorer) -> bool:
    return "Not possible" in explorer.status.value


# functions


def test_grid_counts_what_is_active(traced):
    table = microscope.grid(traced)
    assert len(table) == len(traced.tokens) * len(traced.transcoders)
    for row in table.itertuples():
        z = traced.features[row.layer][row.position]
        assert row.active == int((z > 0).sum())
        assert z[row.strongest] == z.max() and row.activation == pytest.approx(z.max().item())


def test_grid_of_silence(tmp_path):
    model = make_model(tmp_path)
    silent = make_transcoder(0)
    silent.b_enc.fill_(-1e6)
    table = microscope.grid(tc.trace(tc.ReplacementModel(model, {0: silent}), "w1 w2", check_fit=False))
    assert (table["active"] == 0).all() and table["strongest"].isna().all()
    assert "mlp0" in microscope.grid_html(table, 0, 1)


def test_what_a_feature_writes_is_its_row_in_the_table(traced):
    layer = max(traced.transcoders)
    feature = int(traced.active(-1).query("layer == @layer")["feature"].iloc[0])
    written = microscope.writes(traced, layer, feature)
    for token in ("45", "20"):
        table = tc.attribute(traced, targets.logit(traced, token))
        row = table.query("kind == 'feature' and layer == @layer and feature == @feature").iloc[0]
        assert written[token] == pytest.approx(row["contribution"], abs=1e-4)


def test_a_walk_carries_what_the_path_search_finds(traced, answer):
    found = best_first(prompt_graph(traced), answer, 0.05 * abs(answer.value(traced)))
    for path in found.paths[:10]:
        walk = walker.begin(traced, answer)
        for node in path.nodes[:-1]:
            table = walk[-1].table
            same = table["kind"] == node.kind
            for name in ("layer", "head", "feature", "position"):
                if getattr(node, name) is not None:
                    same &= table[name].eq(getattr(node, name)).fillna(False).astype(bool)
            (row,) = table.index[same]
            walk = walker.down(traced, walk, row)
        ends = walk[-1].table
        rows = ends[ends["kind"] == path.nodes[-1].kind]
        assert np.isclose(rows["on_path"], path.contribution, atol=1e-3).any()


def test_every_step_of_a_walk_balances(traced, answer):
    walk = walker.begin(traced, answer)
    for _ in range(4):
        walk = walker.down(traced, walk, walker.goes_on(walk[-1].table)[0][1])
        step = walk[-1]
        sizes = step.table["contribution"]
        assert abs(sizes.sum() - step.table.attrs["value"]) <= 1e-5 * sizes.abs().sum()
        into = walk[-2].table.loc[walker.goes_on(walk[-2].table)[0][1], "on_path"]
        assert step.table["on_path"].sum() == pytest.approx(into, abs=1e-4)
    assert len(walker.walked(walk)) == 5


def test_a_walk_ends_at_tokens_and_biases(traced, answer):
    walk = walker.begin(traced, answer)
    table = walk[0].table
    with pytest.raises(ValueError, match="is where a path ends"):
        walker.down(traced, walk, int(table.index[table["kind"] == "error"][0]))
    with pytest.raises(ValueError, match="has no row"):
        walker.down(traced, walk, len(table))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_contraction_loses_no_flow(circuit, data):
    inner = [n for n, d in circuit.nodes(data=True) if d["kind"] != "target"]
    nodes = data.draw(st.sets(st.sampled_from(sorted(inner)), min_size=2))
    (target,) = [n for n, d in circuit.nodes(data=True) if d["kind"] == "target"]
    joined = editing.contract(circuit, nodes, "all of these", kind="x")
    assert editing.imbalance(joined) < 1e-4
    assert joined.in_degree(target, weight="weight") == pytest.approx(circuit.in_degree(target, weight="weight"))
    untouched = [n for n in circuit if n not in nodes]
    for node in untouched:
        assert joined.in_degree(node, weight="weight") == pytest.approx(circuit.in_degree(node, weight="weight"))
        assert joined.out_degree(node, weight="weight") == pytest.approx(circuit.out_degree(node, weight="weight"))


@settings(max_examples=20, deadline=None)
@given(top=st.integers(1, 40), data=st.data())
def test_pruning_keeps_pins_and_balance(circuit, top, data):
    inner = sorted(n for n, d in circuit.nodes(data=True) if d["kind"] in ("feature", "head", "embedding"))
    pins = data.draw(st.sets(st.sampled_from(inner), max_size=3))
    small = editing.prune(circuit, top, pins)
    assert pins <= set(small)
    assert editing.imbalance(small) < 1e-4
    (target,) = [n for n, d in small.nodes(data=True) if d["kind"] == "target"]
    for pin in pins:
        assert nx.has_path(small.subgraph(set(small) - {"remainder"}), pin, target)


def test_wrong_edits(circuit, traced, answer):
    with pytest.raises(ValueError, match="no node 'nonsense'"):
        editing.prune(circuit, 5, {"nonsense"})
    with pytest.raises(ValueError, match="at least two nodes"):
        editing.group(circuit, ["embedding@8"], "g")
    with pytest.raises(ValueError, match="cannot be part of a group"):
        editing.group(circuit, ["embedding@8", answer.name], "g")
    with pytest.raises(ValueError, match="no feature to take out"):
        editing.ablation(traced, answer, [], "all else frozen")


def test_predictions_are_exact_where_all_else_is_frozen(circuit, traced, answer):
    features = [
        (d["layer"], d["position"], d["feature"]) for _, d in circuit.nodes(data=True) if d["kind"] == "feature"
    ]
    frozen = editing.ablation(traced, answer, features, "all else frozen")
    assert list(frozen["without"])[-1] == "all of them"
    np.testing.assert_allclose(frozen["predicted"], frozen["measured"], atol=1e-3)
    free = editing.ablation(traced, answer, features, "all else answers")
    assert (free["predicted"] - free["measured"]).abs().max() > 0.1


def test_free_measurement_is_the_models_own(traced, answer, parts):
    """All of them at once, against the library's own intervention: the features of one layer set to zero."""
    model, transcoders = parts[:2]
    active = traced.active(-1).query("layer == 2")["feature"].tolist()[:3]
    here = len(traced.tokens) - 1
    rows = editing.ablation(traced, answer, [(2, here, f) for f in active], "all else answers")
    hooks = interventions.set_features(2, transcoders[2], active, 0.0, here)
    logits = interventions.run(model, traced.tokens[None], hooks)[0, -1]
    ids = [model.tokenizer(t, add_special_tokens=False).input_ids[0] for t in ("45", "20")]
    change = (logits[ids[0]] - logits[ids[1]]).item() - answer.value(traced)
    assert rows["measured"].iloc[-1] == pytest.approx(change, abs=1e-3)


def test_rankings_begin_with_the_pullback(parts, traced):
    _, transcoders, _, index = parts
    table = weights.rankings(FeatureActivations(index, 2, 1334), transcoders, 1)
    pullback = connections.pullback(traced, targets.feature(traced, 2, 1334), 1)
    np.testing.assert_allclose(table["input_invariant"], pullback.loc[table.index], atol=1e-4)
    shared = weights.agreement(table, "input_invariant")
    assert (shared["overlap"] == 1).all() and (shared["chance"] < 0.2).all()
    with pytest.raises(ValueError, match="the source comes first"):
        weights.rankings(FeatureActivations(index, 1, 3), transcoders, 2)


def test_lab_agrees_with_the_model(parts):
    model, transcoders = parts[:2]
    prompts = gt.prompts(model.tokenizer, ["war"], [17])
    whole = gt.run(model, prompts)
    assert torch.allclose(lab.whole_model(model, prompts, 1), whole, atol=1e-5)
    ranked = lab.rank_units(model, prompts, 2, transcoders[2])
    few = lab.answers(model, prompts, 2, ranked, 8, [], transcoders[2])
    without = lab.answers(model, prompts, 2, ranked, 8, ranked[:8].tolist(), transcoders[2])
    none = lab.answers(model, prompts, 2, ranked, 0, [], transcoders[2])
    assert torch.allclose(without, none, atol=1e-6) and not torch.allclose(few, none, atol=1e-2)


def test_searches_of_the_browser(parts):
    model, transcoders, summary, _ = parts
    often = browser.by_frequency(summary, 1, 0.001, 0.01)
    assert often["frequency"].between(0.001, 0.01).all() and often["frequency"].is_monotonic_decreasing
    found = browser.by_token(model, summary, 0, "war")
    assert {model.tokenizer.decode([t]) for t in found["token"]} <= {"war", " war"}
    label = browser.of_layer(summary, 0)["label"].dropna().iloc[0]
    assert browser.by_label(summary, 0, label)["label"].str.contains(label, regex=False).all()
    near = browser.similar(transcoders, summary, 2, 1334)
    W = transcoders[2].W_dec
    assert near["cosine"].iloc[0] == pytest.approx(
        torch.cosine_similarity(W[1334], W[near.index[0]], dim=0).item(), abs=1e-5
    )
    shown = browser.examples(model, summary, 2, 1334)
    assert (shown["band"] == 0).any()
    row = shown.loc[shown["activation"].idxmax()]

    assert 0 <= row["centre"] < len(row["tokens"]) <= 20


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        (lambda model, summary: browser.by_token(model, summary, 0, " "), "the search is empty"),
        (lambda model, summary: browser.by_token(model, summary, 0, "warfarexyz"), "is several tokens"),
        (lambda model, summary: browser.by_label(summary, 0, ""), "the search is empty"),
        (lambda model, summary: browser.by_label(summary, 0, "zzz"), "'zzz' in its name: there are"),
        (lambda model, summary: browser.by_frequency(summary, 0, 0.99, 1.0), "widen the range"),
        (lambda model, summary: browser.of_layer(summary, 7), r"layer 7 is not in this summary, which has layers \[0"),
    ],
)
def test_empty_searches(parts, search, sentence):
    with pytest.raises(ValueError, match=sentence):
        search(parts[0], parts[2])


def test_summary_without_labels(parts):
    model, transcoders, _, index = parts
    bare = parts[2].features.assign(label=None)
    with pytest.raises(ValueError, match="was not labelled"):
        browser.by_label(Summary(parts[2].about, bare, parts[2].examples, parts[2].tokens), 0, "x")


# shells: a control is moved, the view changes


def moves(name: str, shell: Any) -> list[tuple[w.Widget, Any]]:
    return {
        "microscope": lambda: [
            (shell.feature, shell.feature.options[2][1]), (shell.token, 8), (shell.layer, 0), (shell.prompt, OTHER)
        ],
        "browser": lambda: [
            (shell.list, shell.list.options[3][1]), (shell.range, (0.0, 1e-3)), (shell.number, "107"), (shell.layer, 1),
            (shell.by, "similarity"),
        ],
        "walker": lambda: [
            (shell.source, shell.source.options[3][1]), (shell.down, None), (shell.up, None), (shell.other, ""),
            (shell.token, "60"), (shell.prompt, PROMPT.replace("war", "siege")),
        ],
        "editor": lambda: [
            (shell.asked, said(shell, edits=[[strongest(shell)[0], 0]])), (shell.asked, said(shell, edits=[])),
            (shell.prompt, PROMPT.replace("war", "siege")), (shell.other, ""), (shell.token, ""),
        ],
        "weights": lambda: [
            (shell.feature, "107"), (shell.by, "input_x_gradient"), (shell.source, 0), (shell.layer, 1)
        ],
        "lab": lambda: [
            (shell.year, 60), (shell.kept, 2), (shell.out, (shell.out.options[0][1],)), (shell.units, "neurons"),
            (shell.units, "random features"), (shell.noun, "siege"), (shell.century, 12), (shell.layer, 0),
        ],
    }[name]()  # fmt: skip


@pytest.mark.parametrize("name", ["microscope", "browser", "walker", "editor", "weights", "lab"])
def test_moving_a_control_changes_the_view(shells, name):
    shell = shells[name]
    for control, value in moves(name, shell):
        before = views(shell)
        control.click() if value is None else setattr(control, "value", value)
        assert views(shell) != before, f"{name}: {control.description} changed nothing"
        assert not wrong(shell), shell.status.value


def strongest(shell) -> list[str]:
    """The features of an editor's graph, by node id, the most influential first."""
    features = [node for node in shell.file["nodes"] if node["activation"] is not None]
    return [node["node_id"] for node in sorted(features, key=lambda node: node["influence"])]


def said(shell, **state) -> str:
    """What the page of an editor sends when its state becomes this."""
    return json.dumps({"n": next(NUMBERS), "of": shell._sent, "state": {**shell.state, **state}})


def told(part: w.HTML) -> dict:
    """What an editor sends to its page."""
    return json.loads(re.search('<script type="application/json">(.*)</script>', part.value, re.S)[1])


def place(name: str) -> tuple[int, int, int]:
    layer, feature, position = map(int, name.split("_"))
    return layer, position, feature


def test_the_graph_that_the_page_gets(parts):
    model, transcoders, *_ = parts
    names = Names(tc.ReplacementModel(model, transcoders), tc.load_text(model, "chronicle", 8))
    shell = ui.Editor(tc.ReplacementModel(model, transcoders), PROMPT, names=names)
    sent = told(shell.data)
    assert sent["file"] == shell.file and sent["modes"] == list(editing.FROZEN)
    targets_of = [node for node in shell.file["nodes"] if node["feature_type"] == "logit"]
    best = shell.trace.logits[-1].softmax(-1).topk(len(targets_of))
    assert [node["feature"] for node in targets_of] == best.indices.tolist()
    for node in shell.file["nodes"]:
        if node["activation"] is not None:
            layer, position, feature = place(node["node_id"])
            assert node["activation"] == pytest.approx(shell.trace.features[layer][position, feature].item())
            name, card = names(layer, feature), sent["cards"][f"{layer}_{feature}"]
            assert node["clerp"] == ("" if name in ("various", "silent") else name)
            lens = connections.logit_lens(shell.trace, layer, feature)
            same = [a == b or "\ufffd" in b for a, b in zip(card["up"], lens.index, strict=False)]  # pieces of letters
            assert all(same) and len(same) == 6
            assert [text[at] for text, at in card["examples"]] == [t[a] for t, a in names.examples(layer, feature)]


def test_measured_by_hand(parts):
    """What the page is told, against the library's own intervention."""
    model, transcoders = parts[:2]
    shell = ui.Editor(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20")
    here = len(shell.trace.tokens) - 1
    name = next(n for n in strongest(shell) if n.startswith("2_") and n.endswith(f"_{here}"))
    shell.asked.value = said(shell, pinnedIds=[name], edits=[[name, 12.5]])
    assert not wrong(shell) and "Measured, all else answers" in shell.status.value
    result, (layer, position, feature) = told(shell.result), place(name)
    before, predicted, measured = result["after"][name]
    assert before == pytest.approx(shell.trace.features[layer][position, feature].item())
    assert predicted == pytest.approx(12.5) and measured == 12.5
    hooks = interventions.set_features(layer, transcoders[layer], [feature], 12.5, position)
    after = interventions.run(model, shell.trace.tokens[None], hooks)[0, -1]
    best = after.softmax(-1).topk(5)
    np.testing.assert_allclose([row[2] for row in result["tokens"]], best.values, atol=1e-4)
    assert result["tokens"][0][0] == repr(model.tokenizer.decode([int(best.indices[0])]))
    ids = [model.tokenizer(t, add_special_tokens=False).input_ids[0] for t in ("45", "20")]
    (answer,) = [values for node, values in result["after"].items() if node.startswith("4_")]
    assert answer[2] == pytest.approx((after[ids[0]] - after[ids[1]]).item(), abs=1e-3)
    shell.asked.value = said(shell, frozen=HELD[-1])
    (answer,) = [values for node, values in told(shell.result)["after"].items() if node.startswith("4_")]
    assert answer[1] == pytest.approx(answer[2], abs=1e-3) and answer[0] != pytest.approx(answer[2], abs=0.1)
    shell.asked.value = said(shell, edits=[])
    assert "after" not in told(shell.result) and "Nothing is edited" in shell.status.value
    shell.asked.value = said(shell, edits=[["2_9999_3", 0.0]])
    assert wrong(shell) and "no active feature of this graph" in shell.status.value


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_graph_predicts_exactly_what_nothing_answers(traced, answer, data):
    """With all else frozen: the answer, and what every other feature would read."""
    whole = graph.build_graph(traced, [(answer, 1.0)])
    features = whole.nodes.query("kind == 'feature' and position > 0").index.tolist()
    rows = data.draw(st.lists(st.sampled_from(features), min_size=1, max_size=6, unique=True))
    values = [data.draw(st.floats(0, 30)) for _ in rows]
    check_frozen(traced, whole, answer, rows, values)


def check_frozen(traced, whole, answer, rows, values):
    places = list(whole.nodes.loc[rows, ["layer", "position", "feature"]].astype(int).itertuples(index=False))
    change = editing.predict(traced, whole, dict(zip(rows, values, strict=True)), HELD[-1])
    after = editing.edited_trace(traced, places, values, HELD[-1])
    size = whole.adjacency[-1].abs().sum().item() + abs(change[-1].item())
    assert change[-1].item() == pytest.approx(answer.value(after) - answer.value(traced), abs=1e-4 * size)
    for row, node in whole.nodes.query("kind == 'feature'").iterrows():
        if row not in rows:
            now = after.features[node["layer"]][node["position"], node["feature"]].item()
            off = abs(node["activation"] + change[row].item() - now)
            competes = traced.transcoders[node["layer"]].config.activation == "topk"
            assert (competes and now == 0) or off < 1e-3 * (1 + whole.adjacency[row].abs().sum().item())


def test_cross_layer_and_other_transcoders_are_edited_too(parts, tmp_path):
    model = parts[0]
    for kind in ("cross_layer", "skip"):
        shell = ui.Editor(
            tc.ReplacementModel(model, tc.load_transcoders(tc.data_path("clt", kind), device="cpu")), PROMPT, "45", "20"
        )
        names = strongest(shell)[:3]
        shell.asked.value = said(shell, edits=[[name, 0] for name in names], frozen=HELD[1])
        assert not wrong(shell) and set(names) <= told(shell.result)["after"].keys(), shell.status.value
        shell.asked.value = said(shell, frozen=HELD[-1])
        if kind == "skip":
            assert wrong(shell) and "skip paths" in shell.status.value
        else:
            rows = [shell.rows[name] for name in names]
            check_frozen(shell.trace, shell.graph, shell.targets[0], rows, [0.0] * 3)


def test_later_features_answer_by_their_own_threshold(traced, answer):
    """Freeing features makes the prediction of the answer better, where attention is frozen; and one at the last layer,
    which no feature can answer, stays exact."""
    whole = graph.build_graph(traced, [(answer, 1.0)])
    nodes = whole.nodes.query("kind == 'feature' and position > 0")
    strong = whole.adjacency[-1][nodes.index.tolist()].abs().argsort(descending=True)[:30].tolist()
    off = {mode: [] for mode in HELD[1:]}
    for row in nodes.index[strong]:
        spot = tuple(nodes.loc[row, ["layer", "position", "feature"]].astype(int))
        after = editing.edited_trace(traced, [spot], [0.0], HELD[1])
        measured = answer.value(after) - answer.value(traced)
        for mode, found in off.items():
            found.append(abs(editing.predict(traced, whole, {row: 0.0}, mode)[-1].item() - measured))
        if spot[0] == max(traced.features):
            assert found[-1] < 1e-3
    assert np.median(off[HELD[1]]) <= np.median(off[HELD[2]])


def test_an_edited_feature_keeps_its_value_under_earlier_edits(traced, parts):
    """Two layers at once: the later feature is clamped, not moved by as much as before."""
    model, transcoders = parts[:2]
    first, second = (int(traced.active(-1).query("layer == @layer")["feature"].iloc[0]) for layer in (0, 2))
    here = len(traced.tokens) - 1
    after = editing.edited_trace(traced, [(0, here, first), (2, here, second)], [0.0, 3.0], HELD[0])
    hooks = interventions.set_features(0, transcoders[0], [first], 0.0, here)
    hooks += interventions.set_features(2, transcoders[2], [second], 3.0, here)
    logits = interventions.run(model, traced.tokens[None], hooks)[0, -1]
    torch.testing.assert_close(after.logits[-1], logits, atol=1e-4, rtol=1e-4)


def test_a_group_of_heads_stands_among_heads(circuit):
    heads = [n for n, d in circuit.nodes(data=True) if d["kind"] == "head" and d["layer"] == 2][:2]
    joined = editing.group(circuit, heads, "movers")
    plan = layout(joined, len(joined))
    rows = {name: height for height, name in plan.rows}
    assert plan.places["movers"][1] == pytest.approx(rows["attn2"])
    assert all(plan.places[s][1] < plan.places[r][1] for s, r in joined.edges if {s, r} <= plan.places.keys())


def test_no_state_of_a_graph_that_is_gone(parts):
    shell = ui.Editor(tc.ReplacementModel(*parts[:2]), PROMPT, "45", "20")
    late = said(shell, pinnedIds=strongest(shell)[:1])
    shell.prompt.value = OTHER
    shell.asked.value = late
    assert not shell.state["pinnedIds"] and not wrong(shell)


def test_another_prompt_lets_go_of_nodes_at_other_tokens(parts):
    shell = ui.Editor(tc.ReplacementModel(*parts[:2]), PROMPT, "45", "20")
    last = [name for name in strongest(shell) if name.endswith("_12")][:3]
    weak = next(name for name in reversed(strongest(shell)) if name not in last)
    shell.asked.value = said(
        shell, pinnedIds=[*last, weak], supernodes=[["late", *last[:2]]], edits=[[last[0], 0.0]], pruningThreshold=0.7
    )
    shell.prompt.value = PROMPT.replace("war", "siege")  # the last token is the same
    kept = {*shell.state["pinnedIds"], *(name for _, *ids in shell.state["supernodes"] for name in ids)}
    assert kept and kept <= {*last, weak} & {node["node_id"] for node in shell.file["nodes"]}
    assert shell.state["pruningThreshold"] == 0.7 and told(shell.data)["file"]["qParams"] == shell.state
    assert ("after" in told(shell.result)) == ("edits" in shell.state)
    shell.prompt.value = OTHER
    assert shell.trace.token_strings[12:13] != ["17"]
    assert not any(shell.state.get(key) for key in ("pinnedIds", "supernodes", "edits"))
    assert "No longer pinned" in shell.status.value


def opened(shell, file: dict) -> str:
    """What the page sends when a file is opened in it."""
    features = [[n["node_id"], int(n["layer"]), int(n["node_id"].split("_")[1]), n["ctx_idx"], n["activation"]]
                for n in file["nodes"] if n["activation"] is not None]  # fmt: skip
    more = {"open": {"metadata": file["metadata"], "features": features}}
    return json.dumps({"n": next(NUMBERS), "of": shell._sent, "state": file["qParams"], **more})


def test_a_file_is_measured_if_it_is_of_this_model(parts, tmp_path):
    shell = ui.Editor(tc.ReplacementModel(*parts[:2]), PROMPT.replace("war", "siege"), "45", "20")
    name = strongest(shell)[0]
    shell.asked.value = said(shell, pinnedIds=[name], edits=[[name, 0.0]])
    file, measured = shell.file | {"qParams": shell.state}, told(shell.result)["after"][name]
    other = ui.Editor(tc.ReplacementModel(*parts[:2]), PROMPT)
    other.asked.value = opened(other, file)
    assert not wrong(other) and "can be edited" in other.status.value and other.token.value == "45"
    assert other.state == file["qParams"] and told(other.result)["after"][name] == measured
    before = other.trace
    unknown = file["metadata"] | {"prompt": "x", "prompt_tokens": ["<bos>", "nothing", "here"]}
    twice = [n | {"activation": n["activation"] and 2 * n["activation"]} for n in file["nodes"]]
    changed = {"another model or tokenizer": {"metadata": unknown}, "other transcoders": {"nodes": twice}}
    for sentence, part in changed.items():
        other.asked.value = opened(other, file | part)
        assert sentence in other.status.value and told(other.result)["fits"] is False and other.trace is before
        other.asked.value = said(other, edits=[[name, 1.0]])
        assert wrong(other) and "no active feature of this graph" in other.status.value


def test_a_link_brings_its_prompt_along(parts):
    shell = ui.Editor(tc.ReplacementModel(*parts[:2]), PROMPT, "45", "20")
    name = strongest(shell)[0]
    link = {"prompt": PROMPT, "answer": "45", "other": "20", "pinnedIds": name, "supernodes": json.dumps([["g", name]]),
            "edits": json.dumps([[name, 0.0]]), "frozen": HELD[1], "pruningThreshold": "0.5"}  # fmt: skip
    shell.prompt.value = OTHER
    shell.asked.value = json.dumps({"n": 99, "of": shell._sent, "state": shell.state, "question": link})
    assert not wrong(shell) and shell.prompt.value == PROMPT and "Measured, attention frozen" in shell.status.value
    assert shell.state["supernodes"] == [["g", name]] and shell.state["pruningThreshold"] == 0.5
    before = shell.state
    shell.asked.value = json.dumps({"n": 100, "of": shell._sent, "state": before, "question": link | {"prompt": ""}})
    assert wrong(shell) and "the prompt is empty" in shell.status.value and shell.state is before


def test_the_likeliest_next_tokens_are_one_click_away(parts, traced):
    best = traced.logits[-1].softmax(-1).topk(5)
    for shell in (
        ui.Walker(tc.ReplacementModel(*parts[:2]), PROMPT, "45"),
        ui.Editor(tc.ReplacementModel(*parts[:2]), PROMPT, "45"),
    ):
        row = shell.question.likeliest
        texts = [repr(parts[0].tokenizer.decode([i])) for i in best.indices.tolist()]
        for button, text, share in zip(row, texts, best.values.tolist(), strict=True):
            assert button.description == f"{text} {share:.0%}"
        row[1].click()
        assert shell.token.value == parts[0].tokenizer.decode([int(best.indices[1])]) and not wrong(shell)
        before = row[0].description
        shell.prompt.value = "The war"
        assert row[0].description != before and not wrong(shell)


def test_every_token_can_be_asked_for(parts):
    model = parts[0]
    for index in range(model.cfg.d_vocab):
        token = answers.read_token(model, answers.written(model, index))
        assert token == index or model.tokenizer(token, add_special_tokens=False).input_ids == [index]


def test_pieces_of_letters_are_shown_as_bytes(parts):
    traced = tc.trace(tc.ReplacementModel(*parts[:2]), "a \u65e5")
    text = "".join(traced.token_strings[1:])
    assert "\ufffd" not in text and re.search(r"<[0-9A-F]{2}( [0-9A-F]{2})*>", text)
    grid = microscope.grid_html(microscope.grid(traced), 0, 1)
    assert "&#x27;" in grid and "\ufffd" not in grid


def test_prompts_of_several_lines(parts):
    shell = ui.Walker(tc.ReplacementModel(*parts[:2]), PROMPT, "45")
    shell.prompt.value = "The war ended.\nThe siege lasted"
    assert not wrong(shell) and any("\n" in token for token in shell.trace.token_strings)


def test_one_selection_for_all(parts):
    model, transcoders, summary, index = parts
    selected = ui.Selected(tc.ReplacementModel(model, transcoders))
    scope = ui.Microscope(tc.ReplacementModel(model, transcoders), PROMPT, selected)
    found = ui.Browser(tc.ReplacementModel(model, transcoders), summary, index, selected)
    walk = ui.Walker(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20", selected)
    edit = ui.Editor(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20", selected)
    by_weights = ui.Weights(transcoders, index, 2, 1334, selected)
    assert selected.feature is None and selected.card.value == ""
    for shell in (scope, walk, edit, by_weights):
        assert selected.card in tree(shell.box)
    feature = scope.feature.options[2][1]
    scope.feature.value = feature
    assert selected.feature == (2, feature)
    assert f"mlp2[{feature}]" in selected.card.value and f"mlp2[{feature}]" in found.card.value
    assert by_weights.feature.value == str(feature) == found.number.value
    source = next(row for text, row in walk.source.options if text.startswith("mlp") and "[283]" in text)
    walk.source.value = source
    assert selected.feature[1] == 283 and "[283]" in found.card.value
    name = next(n for n in strongest(edit) if n.startswith("0_"))
    edit.asked.value = said(edit, clickedId=name)
    assert selected.feature == (0, place(name)[2])
    assert "chosen in another explorer" in by_weights.status.value and not wrong(by_weights)
    found.number.value = "5"
    assert selected.feature == (0, 5) and not any(map(wrong, (scope, found, walk, edit, by_weights)))


def test_cards_explain_bands_and_have_a_histogram(parts):
    model, transcoders, summary, index = parts
    text = browser.card(tc.trace(tc.ReplacementModel(model, transcoders), PROMPT), summary, 2, 1334, index)
    assert "band 1 of 5" in text and "cut into 5 parts of equal number, band 1 the strongest" in text
    section = text[text.index("its activations on") :]
    counts = [int(n.replace(",", "")) for n in re.findall(r"text-align: right[^>]*>([\d,]+)</td>", section)]
    assert len(counts) == browser.BINS and sum(counts) == FeatureActivations(index, 2, 1334).count


def test_work_can_be_cancelled():
    """Between two steps of a piece of work, the button is heard; nothing that is shown has changed."""
    shell, done = base.Explorer("test", [], [w.HTML()]), []

    def work():
        for number in range(100):
            done.append(number)
            yield number / 100
        return "through"

    async def press() -> None:
        shell.attempt(lambda: None)
        shell._work = work()
        task = asyncio.ensure_future(shell.work_in_turns(shell._work))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert shell._under_way.layout.display == "flex"
        shell.cancel.click()
        await task

    asyncio.run(press())
    assert len(done) < 5 and "Cancelled" in shell.status.value and shell._under_way.layout.display == "none"
    shell.attempt(work)  # called by a cell: to its end
    assert "through" in shell.status.value and len(done) > 100


def test_many_paths_are_cut(parts, traced, monkeypatch):
    target = targets.logit_difference(traced, "45", "20")
    graph = prompt_graph(traced)
    whole, _ = editing.search(graph, target, 0.02)
    monkeypatch.setattr(editing, "MOST_PATHS", 10)
    found, circuit = editing.search(graph, target, 0.02)
    assert found.paths == whole.paths[:10] and found.guarantee == abs(whole.paths[10].contribution)
    assert sum(p.contribution for p in found.paths) + found.remainder == pytest.approx(found.value, abs=1e-3)
    assert editing.imbalance(circuit) < 1e-4


@pytest.mark.parametrize("kind", ["Walker", "Editor"])
def test_half_a_change_is_none(parts, kind):
    """A new prompt with a token that is none: nothing of the new prompt may mix with the old view."""
    shell = getattr(ui, kind)(tc.ReplacementModel(*parts[:2]), PROMPT, "45", "20")
    before = shell.trace
    with shell.answering():
        shell.token.value = "not one token"
    shell.prompt.value = OTHER
    assert wrong(shell) and shell.trace is before
    shell.token.value = "50"
    assert not wrong(shell) and shell.trace.token_strings[2] == " siege"


def test_up_goes_back_to_the_very_same_view(parts):
    shell = ui.Walker(tc.ReplacementModel(*parts[:2]), PROMPT, "45", "20")
    shell.source.value = shell.source.options[1][1]
    before = shell.path.value
    shell.down.click()
    assert shell.path.value != before
    shell.up.click()
    assert shell.path.value == before and len(shell.walk) == 1


BAD = [
    ("microscope", "prompt", "  ", "the prompt is empty"),
    ("microscope", "prompt", "war " * 200, "reads at most 128"),
    ("walker", "prompt", "", "the prompt is empty"),
    ("walker", "prompt", "war " * 200, "reads at most 128"),
    ("walker", "token", "two words here", "one token is needed"),
    ("walker", "up", None, "where the walk began"),
    ("editor", "prompt", "", "the prompt is empty"),
    ("editor", "other", "not one token", "one token is needed"),
    ("walker", "token", "20", "so their difference is always 0"),
    ("editor", "token", "20", "so their difference is always 0"),
    ("weights", "feature", "1000000", "from 0 to 2047"),
    ("weights", "feature", "-1", "from 0 to 2047"),
    ("weights", "feature", "1e3", "from 0 to 2047"),
    ("weights", "feature", "", "from 0 to 2047"),
    ("browser", "number", "1000000", "from 0 to 2047"),
    ("browser", "number", "1e3", "from 0 to 2047"),
]


@pytest.mark.parametrize(("name", "control", "value", "sentence"), BAD)
def test_bad_input_is_one_sentence_and_the_view_stays(parts, name, control, value, sentence):
    model, transcoders, summary, index = parts
    shell = {
        "microscope": lambda: ui.Microscope(tc.ReplacementModel(model, transcoders), PROMPT),
        "walker": lambda: ui.Walker(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20"),
        "editor": lambda: ui.Editor(tc.ReplacementModel(model, transcoders), PROMPT, "45", "20"),
        "weights": lambda: ui.Weights(transcoders, index, 2, 1334),
        "browser": lambda: ui.Browser(tc.ReplacementModel(model, transcoders), summary),
    }[name]()
    before, moved = views(shell), getattr(shell, control)
    moved.click() if value is None else setattr(moved, "value", value)
    assert wrong(shell) and sentence in shell.status.value
    assert views(shell) == before
    # and it goes on from there
    fixed = {"prompt": OTHER, "token": "50", "other": "30", "feature": "107", "number": "107"}
    if control in fixed:
        moved.value = fixed[control]
        assert not wrong(shell) and views(shell) != before


def test_a_feature_that_never_fired(parts):
    model, transcoders, summary, index = parts
    dead = summary.features.query("layer == 2 and count == 0")["feature"]
    silent = next(f for f in range(2048) if not FeatureActivations(index, 2, f).count)
    shell = ui.Weights(transcoders, index, 2, silent)
    assert "never fired" in shell.status.value and not wrong(shell) and "by weights alone" in shell.invariant.value
    shell.feature.value = "1334"
    assert "fired on" in shell.status.value
    if len(dead):
        shell = ui.Browser(tc.ReplacementModel(model, transcoders), summary)
        shell.number.value = str(dead.iloc[0])
        assert "never fired" in shell.status.value and "never fired" in shell.card.value


def test_wrong_arguments_are_raised(parts):
    with pytest.raises(ValueError, match="prompt is empty"):
        ui.Walker(tc.ReplacementModel(*parts[:2]), "", "45")
    with pytest.raises(ValueError, match="at least two layers"):
        ui.Weights({0: parts[1][0]}, parts[3], 0, 1)


def test_other_models_have_explorers_too(tmp_path):
    model = make_model(tmp_path / "m")
    transcoders = {layer: make_transcoder(layer) for layer in (0, 1)}
    tokens = torch.randint(0, 40, (8, 16))
    tokens[:, 0] = model.tokenizer.bos_token_id
    index = build_index(tc.ReplacementModel(model, transcoders), tokens, tmp_path / "i")
    shell = ui.Browser(tc.ReplacementModel(model, transcoders), summarise(index))
    assert "fit" in shell.status.value
    assert "mlp0" in ui.Weights(transcoders, index, 1, 3).invariant.value
    with pytest.raises(ValueError, match="cannot do greater-than"):
        ui.Lab(tc.ReplacementModel(model, transcoders))


# the frame


def test_nothing_is_lost_in_a_callback():
    control, button = w.IntText(0, description="x"), w.Button(description="go")
    shell = base.Explorer("test", [(control, button)], [w.HTML()])

    def fail():
        raise KeyError("a bug")

    shell.watch(fail, control, button)
    with pytest.raises(KeyError):
        control.value = 1
    assert base.UNEXPECTED in shell.status.value and "a bug" in shell.status.value
    shell.status.value = ""
    button.click()  # ipywidgets logs what a button's handler raises, and goes on
    assert base.UNEXPECTED in shell.status.value
    shell.attempt(lambda: "well")
    assert "well" in shell.status.value and base.UNEXPECTED not in shell.status.value


def test_text_is_escaped(parts):
    shell = ui.Microscope(tc.ReplacementModel(*parts[:2]), "the <b>war</b> & <script>")
    assert "<script>" not in "".join(views(shell)) and "&lt;" in "".join(views(shell))


@pytest.mark.parametrize("name", ["microscope", "browser", "walker", "editor", "weights", "lab"])
def test_controls_and_views_are_labelled(shells, name):
    shell = shells[name]
    containers = (w.Box, w.HTML)
    controls = [part for part in tree(shell.box) if not isinstance(part, containers)]
    assert controls
    for control in controls:
        assert control.description, control
    text = "".join(views(shell))
    assert "kernel was restarted" in text and "jupyter-widgets-disconnected" in text
    assert 'role="status"' in shell.status.value and "aria-live" in shell.status.value
    for image in re.findall(r"<img[^>]*>", text):
        assert re.search(r'alt="[^"]{10,}', image)
    assert text.count("<table") == text.count("<caption")
    shown = shell._repr_mimebundle_()
    assert shown["text/plain"].endswith("run this notebook to use it") and VIEW in shown


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#111111"])  # JupyterLab's, light and dark
def test_bars_stand_out_in_both_themes(background):
    """WCAG 2.1 asks for 3:1 of what is not text. Text is in the theme's own colour."""
    for color in (POSITIVE, NEGATIVE):
        assert contrast(color, background) > 3


def test_every_interaction_answers_at_once(parts):
    table = measure(*parts, repeats=2)
    print(table.round(0).to_string())
    # On a machine that is busy with other tests, time on the processor tells what a free one would take.
    slow = table[table[["best", "cpu"]].min(axis=1) > SLOWEST]
    assert slow.empty, slow.round(0).to_string()


# executed notebooks


def swallowed(notebook: dict[str, Any]) -> list[str]:
    """Errors that widgets of an executed notebook hold, in captured outputs or status lines."""
    found = []
    states = notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    for entry in states.get("state", {}).values():
        state = entry["state"]
        found += [out["ename"] for out in state.get("outputs", ()) if out["output_type"] == "error"]
        if base.UNEXPECTED in str(state.get("value", "")):
            found.append(state["value"])
    return found


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_no_error_hides_in_a_widget(path):
    if not (COPIES / path.name).is_file():
        pytest.skip("build/nbmake is absent: run `python -m tclib test`")
    assert swallowed(json.loads((COPIES / path.name).read_text(encoding="utf-8"))) == []


def test_a_planted_error_is_found():
    def holding(**state):
        entry = {"model_name": "x", "state": state}
        return {"metadata": {"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {"1": entry}}}}}

    assert swallowed(holding(outputs=[{"output_type": "error", "ename": "KeyError"}])) == ["KeyError"]
    assert len(swallowed(holding(value=f"<b>{base.UNEXPECTED}, KeyError"))) == 1
    assert swallowed(holding(value="fine", outputs=[{"output_type": "stream"}])) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_no_dead_widget_is_committed(path):
    """Ids of widgets differ at every run; what stays is the sentence that says how to use them."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            assert VIEW not in output.get("data", {})


def test_tables_of_numbers_and_gaps():
    text = markup.table(pd.DataFrame({"a_b": [1.23456, float("nan")], "c": ["<x>", "y"]}), "told")
    assert "a b" in text and "1.235" in text and "none" in text and "&lt;x&gt;" in text
    assert "0 other" in markup.bars([("0 other", 0.0)], "nothing", "none")
