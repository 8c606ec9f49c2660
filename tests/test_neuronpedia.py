"""Attribution graphs for Neuronpedia and circuit-tracer: every field as they want it, every effect where it belongs."""

import json

import pytest
import torch

import tclib as tc
from tclib import targets
from tclib.circuits import graph, pruning
from tclib.circuits.neuronpedia import neuronpedia_url, save_graph_json
from tests.tiny import make_model, make_transcoder

TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
FIELDS = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float,
    "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("model"))
    trace = tc.trace(
        tc.ReplacementModel(model, {0: make_transcoder(0), 1: make_transcoder(1)}), "w1 w2 w3 w4", check_fit=False
    )
    whole = graph.build_graph(trace)
    folder = tmp_path_factory.mktemp("graphs")
    path = save_graph_json(trace, whole, folder, "a-graph", "gpt2-small", "tres-dc")
    return trace, whole, json.loads(path.read_text(encoding="utf-8")), folder


def test_every_field(made):
    trace, _, content, _ = made
    assert set(content) == {"metadata", "qParams", "nodes", "links"}
    assert set(content["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    meta = content["metadata"]
    assert meta["node_threshold"] == 1.0
    assert meta["schema_version"] == 1 and meta["slug"] == "a-graph" and meta["scan"] == "gpt2-small"
    assert meta["prompt_tokens"] == trace.token_strings and meta["prompt"] == "w1 w2 w3 w4"
    assert meta["transcoder_list"] == [] and meta["feature_details"] == {"neuronpedia_source_set": "tres-dc"}
    for node in content["nodes"]:
        assert {name: type(node[name]) for name in FIELDS} == FIELDS
        assert node["feature_type"] in TYPES and 0 <= node["ctx_idx"] < len(trace.tokens)
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(ids) == len(set(ids))
    for link in content["links"]:
        assert set(link) == {"source", "target", "weight"}
        assert {link["source"], link["target"]} <= set(ids) and isinstance(link["weight"], float)


def test_ids_and_pairing(made):
    trace, whole, content, _ = made
    by_type = {kind: [n for n in content["nodes"] if n["feature_type"] == kind] for kind in TYPES}
    for node in by_type["cross layer transcoder"]:
        layer, index, position = map(int, node["node_id"].split("_"))
        assert node["layer"] == str(layer) and node["ctx_idx"] == position
        assert node["feature"] == (layer + index) * (layer + index + 1) // 2 + index
        assert node["activation"] == pytest.approx(trace.features[layer][position, index].item())
    assert len(by_type["cross layer transcoder"]) == (whole.nodes["kind"] == "feature").sum()
    tokens = trace.tokens.tolist()
    assert {n["node_id"] for n in by_type["embedding"]} == {f"E_{t}_{p}" for p, t in enumerate(tokens)}
    assert {n["layer"] for n in by_type["logit"]} == {"3"}  # n_layers + 1
    probabilities = trace.logits[-1].softmax(-1)
    for node in by_type["logit"]:
        token = int(node["node_id"].split("_")[1])
        assert node["token_prob"] == pytest.approx(probabilities[token].item(), abs=1e-5)
    assert [n["is_target_logit"] for n in by_type["logit"]].count(True) == 1


def test_no_effect_is_lost(made):
    """Effects into each node sum to its value without the bias, position embeddings joined to their tokens."""
    _, whole, content, _ = made
    row = whole.nodes.query("kind == 'target'").index[0]
    bias = whole.nodes.query("kind == 'bias'").index
    logit = next(n["node_id"] for n in content["nodes"] if n["is_target_logit"])
    into = sum(link["weight"] for link in content["links"] if link["target"] == logit)
    expected = whole.adjacency[row].sum() - whole.adjacency[row, torch.tensor(bias)].sum()
    assert into == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def test_influence_is_cumulative(made):
    _, _, content, _ = made
    known = [n["influence"] for n in content["nodes"] if n["influence"] is not None]
    assert all(0 < value <= 1.0001 for value in known) and max(known) == pytest.approx(1, abs=1e-4)


def test_an_error_node_never_takes_the_id_of_a_feature(tmp_path):
    """Feature 1 of layer 0 is called as the error of layer 1 in circuit-tracer."""
    model = make_model(tmp_path)
    transcoders = {0: make_transcoder(0), 1: make_transcoder(1)}
    with torch.no_grad():
        transcoders[0].b_enc[1] += 50  # active everywhere
    trace = tc.trace(tc.ReplacementModel(model, transcoders), "w1 w2", check_fit=False)
    content = json.loads(save_graph_json(trace, graph.build_graph(trace), tmp_path, "x", "tiny").read_bytes())
    ids = [node["node_id"] for node in content["nodes"]]
    assert {"0_1_2", "error_1_2"} <= set(ids) and len(ids) == len(set(ids))


def test_pruned_graphs_without_transcoders_and_other_targets(made, tmp_path):
    trace, whole, content, _ = made
    small = json.loads(save_graph_json(trace, pruning.prune(whole, 0.5), tmp_path, "x", "tiny").read_bytes())
    assert len(small["nodes"]) < len(content["nodes"])
    bare = tc.trace(tc.ReplacementModel(trace.model, {}), "w1 w2")
    chosen = [(targets.logit_difference(bare, "w3", "w4"), 1.0)]
    path = save_graph_json(bare, graph.build_graph(bare, chosen), tmp_path, "bare", "tiny")
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    assert sum(n["feature_type"] == "mlp reconstruction error" for n in nodes) == 2 * 3  # whole MLPs
    (logit,) = [n for n in nodes if n["feature_type"] == "logit"]
    assert logit["feature"] >= trace.model.cfg.d_vocab and "w3" in logit["clerp"]


def test_the_list_of_graphs_is_kept(made):
    trace, whole, _, folder = made
    for slug in ("b", "b", "c"):
        save_graph_json(trace, whole, folder, slug, "tiny")
    listed = json.loads((folder / "graph-metadata.json").read_text(encoding="utf-8"))["graphs"]
    assert [entry["slug"] for entry in listed] == ["a-graph", "b", "c"]


@pytest.mark.parametrize("slug", ["../x", "a/b", "", "a b", "a.json"])
def test_slugs_stay_in_the_folder(made, tmp_path, slug):
    trace, whole, _, _ = made
    with pytest.raises(ValueError, match="not a plain name"):
        save_graph_json(trace, whole, tmp_path, slug, "tiny")


def test_links_to_the_published_features():
    assert neuronpedia_url(8, 355) == "https://www.neuronpedia.org/gpt2-small/8-tres-dc/355"
