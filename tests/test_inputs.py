"""What enters is checked where it enters: names, tokens, numbers of features and layers, files. One test per kind."""

from __future__ import annotations

import json
import os

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

import tclib as tc
from tclib import checkpoints, connections, evaluation, factorisation, interventions, targets, training
from tclib.activations import hook_in, mlp_activations
from tclib.blind import sealed
from tclib.circuits import attention, graph, neuronpedia, path_search, validation
from tclib.circuits.graph_files import save_graph
from tclib.circuits.neuronpedia import save_graph_json
from tclib.circuits.one_step import prompt_graph
from tclib.circuits.path_search import best_first
from tclib.evaluation import baselines
from tclib.features import FeatureActivations, Index, build_index, connect, dashboard, plan, search
from tclib.inputs import check_tokens
from tclib.model import to_tokens
from tclib.tasks import case_studies
from tclib.tasks import greater_than as gt
from tclib.transcoder import Transcoder
from tclib.ui import microscope
from tests import foreign
from tests.tiny import make_model, make_transcoder


def test_a_dot_belongs_to_the_name(tmp_path):
    first, second = make_transcoder(0, seed=1), make_transcoder(0, seed=2, activation="topk", k=3)
    first.save(tmp_path / "l1_0.5", torch.float32)
    second.save(tmp_path / "l1_0.05", torch.float32)
    names = ["l1_0.05.json", "l1_0.05.safetensors", "l1_0.5.json", "l1_0.5.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, saved in {"l1_0.5": first, "l1_0.05": second}.items():
        loaded = Transcoder.load(tmp_path / name)
        assert loaded.config == saved.config
        assert torch.equal(loaded.W_enc, saved.W_enc)
        assert torch.equal(Transcoder.load(tmp_path / f"{name}.safetensors").W_enc, saved.W_enc)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_weights_never_stand_beside_another_configuration(tmp_path, monkeypatch, fails_at):
    old, new = make_transcoder(0), make_transcoder(0, d_features=32)
    old.save(tmp_path / "layer_0")
    moves, real = [], os.replace

    def replace(source, target):
        moves.append(target)
        if len(moves) == fails_at:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    try:
        new.save(tmp_path / "layer_0")
    except OSError:
        pass
    monkeypatch.undo()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"layer_0.safetensors", "layer_0.json"}
    if "layer_0.safetensors" in left:
        assert tc.load_transcoders(tmp_path)[0].config.d_features in (32, 64)


# ---- targets carry their token's id


@pytest.fixture(scope="module")
def bundled():
    return tc.load_model(), tc.load_transcoders()


def test_targets_whose_texts_are_alike_stay_apart(bundled, tmp_path):
    lm, transcoders = bundled
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer("éèü", add_special_tokens=False)["input_ids"][:2]]
    traced = tc.trace(tc.ReplacementModel(lm, transcoders), torch.tensor(ids), check_fit=False)
    chosen = graph.salient_logits(traced)
    assert len({target.token for target, _ in chosen}) == len({target.name for target, _ in chosen}) == 10
    built = graph.build_graph(traced, max_features=20)
    written = json.loads(save_graph_json(traced, built, tmp_path, "accents", "tiny").read_bytes())
    logits = {node["node_id"]: node for node in written["nodes"] if node["feature_type"] == "logit"}
    assert [node["feature"] for node in logits.values()] == [target.token for target, _ in chosen]
    # Biases and the remainder have no node there; everything else that enters a logit is among its links.
    kept = ~built.nodes["kind"].isin(["bias", "remainder"]).to_numpy()
    for row, name in zip(range(len(built.nodes) - 10, len(built.nodes)), logits, strict=True):
        entering = sum(link["weight"] for link in written["links"] if link["target"] == name)
        assert entering == pytest.approx(built.adjacency[row, torch.from_numpy(kept)].sum().item(), abs=1e-4)
        assert built.adjacency[row].sum().item() == pytest.approx(built.nodes["value"].iloc[row], abs=1e-3)


def test_a_target_given_twice_or_virtual_has_a_node_of_its_own(model, tmp_path):
    traced = tc.trace(tc.ReplacementModel(model, {0: make_transcoder(0)}), "w1 w2", check_fit=False)
    one, difference = targets.logit(traced, "w3"), targets.logit_difference(traced, "w3", "w4")
    assert (one.token, difference.token, targets.logit(traced, 7).token) == (3, None, 7)
    built = graph.build_graph(traced, [(one, 0.4), (one, 0.3), (difference, 0.3)])
    written = json.loads(save_graph_json(traced, built, tmp_path, "x", "tiny").read_bytes())
    assert len([node for node in written["nodes"] if node["feature_type"] == "logit"]) == 3


# ---- tokens


WRONG_TOKENS = {
    "without BOS": (lambda rows: rows[..., 1:], "does not start with BOS"),
    "two BOS": (lambda rows: torch.cat([rows[..., :1], rows[..., :-1]], -1), "starts with two BOS"),
    "outside": (lambda rows: rows.clone().masked_fill_(rows == rows[..., 1:2], 41), "has token 41, but the ids"),
    "negative": (lambda rows: rows.clone().masked_fill_(rows == rows[..., 1:2], -1), "has token -1, but the ids"),
    "floats": (lambda rows: rows.float(), "a tensor of torch.float32"),
    "bytes": (lambda rows: rows.to(torch.uint8), "a tensor of torch.uint8"),
    "lists": (lambda rows: rows.tolist(), "of type list"),
    "arrays": (lambda rows: rows.numpy(), "of type ndarray"),
    "none": (lambda rows: rows[:0], "there is no text|is empty"),
    "too long": (lambda rows: torch.cat([rows, rows[..., 1:]], -1), "16 tokens, BOS included"),
    "shape": (lambda rows: rows[None], "give .*row"),
}


def entrances(model, folder) -> dict:
    """Everything public that takes rows of tokens."""
    transcoders = {0: make_transcoder(0), 1: make_transcoder(1)}
    config = tc.TrainConfig(d_features=8, steps=1, batch_rows=4)
    return {
        "evaluate": lambda rows: tc.evaluate(tc.ReplacementModel(model, transcoders), rows),
        "measure": lambda rows: evaluation.measure(tc.ReplacementModel(model, transcoders), rows, groups={}),
        "faithfulness": lambda rows: evaluation.faithfulness(model, rows, {}),
        "train": lambda rows: tc.train(model, rows, [0], config),
        "cache": lambda rows: training.cache_activations(model, rows, [0], folder / "cache"),
        "index": lambda rows: build_index(tc.ReplacementModel(model, transcoders), rows, folder / "index"),
        "plan": lambda rows: plan(tc.ReplacementModel(model, transcoders), rows),
        "check_fit": lambda rows: checkpoints.check_fit(model, transcoders, rows),
        "activations": lambda rows: list(mlp_activations(model, rows, [0])),
        "data_weighted": lambda rows: connections.data_weighted(tc.ReplacementModel(model, transcoders), rows, 0, 1, 3),
        "run": lambda rows: interventions.run(model, rows, []),
        "sealed": lambda rows: sealed.activations(model, rows, {"x": transcoders[0]}),
        "greater-than": lambda rows: gt.run(
            model, gt.Prompts((rows,), pd.DataFrame(), pd.DataFrame(), torch.arange(9))
        ),
        "at last token": lambda rows: gt.at_last_token(
            model, gt.Prompts((rows,), pd.DataFrame(), pd.DataFrame(), torch.arange(9)), 0, [hook_in(0)]
        ),
    }


def prompt_entrances(model) -> dict:
    transcoders = {0: make_transcoder(0)}
    return {
        "trace": lambda row: tc.trace(tc.ReplacementModel(model, transcoders), row, check_fit=False),
        "cases": lambda row: case_studies.activation(tc.ReplacementModel(model, transcoders), row, 0, 1),
    }


def one_sentence(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        call()
    assert type(refused.value).__module__.split(".")[0] in ("builtins", "tclib") and "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", WRONG_TOKENS)
def test_wrong_tokens_get_one_sentence_wherever_they_enter(model, tokens, tmp_path, wrong):
    change, sentence = WRONG_TOKENS[wrong]
    for call in entrances(model, tmp_path).values():
        one_sentence(lambda call=call: call(change(tokens)), sentence)
    for call in prompt_entrances(model).values():
        one_sentence(lambda call=call: call(change(tokens[0])), sentence)
    assert not list(tmp_path.glob("index*")) and not (tmp_path / "cache" / "cache.json").exists()


def test_a_document_may_end_where_a_row_begins(model, tokens):
    rows = tokens.clone()
    rows[5, 1] = 40
    assert torch.equal(check_tokens(model, rows), rows)
    assert check_tokens(model, rows.int()).dtype == torch.int64


def test_models_without_bos_say_so(tmp_path, tokens):
    lm = make_model(tmp_path)
    rows = torch.where(tokens == 40, 7, tokens)
    transcoders = {0: make_transcoder(0)}
    one_sentence(
        lambda: tc.evaluate(tc.ReplacementModel(lm, transcoders), rows), "model.cfg.default_prepend_bos = False"
    )
    lm.cfg.default_prepend_bos = False
    assert tc.evaluate(tc.ReplacementModel(lm, transcoders), rows)["tokens"].item() == rows.numel()
    assert len(tc.trace(tc.ReplacementModel(lm, transcoders), "w1 w2", check_fit=False).tokens) == 2
    text = tc.load_text(lm, "chronicle", 3)
    assert text.shape == (3, 16) and (text != 40).all()
    build_index(tc.ReplacementModel(lm, transcoders), rows, tmp_path / "index")
    assert Index(tmp_path / "index").n_tokens == rows.numel()
    lm.cfg.default_prepend_bos = True
    lm.tokenizer.bos_token = None
    one_sentence(
        lambda: tc.trace(tc.ReplacementModel(lm, transcoders), "w1"),
        "has no BOS token: if the model was trained without one",
    )


def test_what_bos_is_worth(bundled):
    # The numbers of the prompt of the notebooks: with BOS; without and with two, which are refused.
    lm, transcoders = bundled
    prompt = to_tokens(lm, "The war lasted from the year 1732 to the year 17")
    value = lambda traced: targets.logit_difference(traced, "45", "20").value(traced)  # noqa: E731
    assert value(tc.trace(tc.ReplacementModel(lm, transcoders), prompt)) == pytest.approx(5.337, abs=1e-3)
    lm.cfg.default_prepend_bos = False
    try:
        assert value(tc.trace(tc.ReplacementModel(lm, transcoders), prompt[1:], check_fit=False)) == pytest.approx(
            3.624, abs=1e-3
        )
    finally:
        lm.cfg.default_prepend_bos = True
    one_sentence(lambda: tc.trace(tc.ReplacementModel(lm, transcoders), prompt[1:]), "does not start with BOS")
    one_sentence(
        lambda: tc.trace(tc.ReplacementModel(lm, transcoders), torch.cat([prompt[:1], prompt])), "starts with two BOS"
    )


# ---- numbers of features, heads, layers and positions


WRONG_NUMBERS = [-1, 64, 1.0, 1.5, "1", None, True]  # of a feature: there are 64


@pytest.fixture(scope="module")
def place(model, tokens, tmp_path_factory):
    """A model with transcoders, a trace, an index and a target at the end."""
    transcoders = {0: make_transcoder(0), 1: make_transcoder(1)}
    traced = tc.trace(tc.ReplacementModel(model, transcoders), "w1 w5 w2", check_fit=False)
    built = build_index(tc.ReplacementModel(model, transcoders), tokens, tmp_path_factory.mktemp("index") / "all")
    return model, transcoders, traced, built, targets.logit(traced, "w3"), tokens


FEATURES = {
    "target": lambda p, f: targets.feature(p[2], 0, f),
    "logit_lens": lambda p, f: connections.logit_lens(p[2], 0, f),
    "ov": lambda p, f: connections.ov_connections(p[2], p[4], 0, f),
    "data_weighted": lambda p, f: connections.data_weighted(p[2].replacement, p[5], 0, 1, f),
    "incoming": lambda p, f: connect.incoming(FeatureActivations(p[3], 1, f), p[1]),
    "outgoing": lambda p, f: connect.outgoing(FeatureActivations(p[3], 0, f), p[1]),
    "count": lambda p, f: FeatureActivations(p[3], 0, f).count,
    "top": lambda p, f: FeatureActivations(p[3], 0, f).top(),
    "often": lambda p, f: p[3].often(0, f),
    "co_firing": lambda p, f: search.co_firing(FeatureActivations(p[3], 0, f)),
    "similar": lambda p, f: search.by_similarity(p[1][0], f),
    "dashboard": lambda p, f: dashboard.collect(p[2].replacement, p[3], 0, f),
    "keep": lambda p, f: interventions.keep_features(0, p[1][0], [f]),
    "set": lambda p, f: interventions.set_features(0, p[1][0], [f]),
    "edits": lambda p, f: validation.compare(
        p[2], pd.DataFrame({"layer": [0], "position": [1], "feature": pd.Series([f], dtype=object)}), [p[4]]
    ),
    "case": lambda p, f: case_studies.activation(p[2].replacement, p[2].tokens, 0, f),
    "seal": lambda p, f: sealed.Seal(p[2].replacement, 0, f, p[5], np.ones(tuple(p[5].shape), np.float32)),
    "writes": lambda p, f: microscope.writes(p[2], 0, f),
}
OTHERS = {  # of a layer, a head and a position: what the model of two layers, four heads and four tokens lacks
    "layer": ([-1, 2, 0.0, "0", None, True], {
        "target": lambda p, n: targets.feature(p[2], n, 0),
        "logit_lens": lambda p, n: connections.logit_lens(p[2], n, 0),
        "pullback": lambda p, n: connections.pullback(p[2], p[4], n),
        "reader": lambda p, n: connections.reader(p[2], p[4], [(n, 0)]),
        "head_source": lambda p, n: targets.head_source(p[2], p[4], n, 0, 1),
        "score": lambda p, n: attention.score_terms(p[2], n, 0, 2, 1),
        "output": lambda p, n: attention.output_terms(p[2], p[4], n, 0),
        "neurons": lambda p, n: factorisation.by_neurons(p[2], n, -1, p[4].reader),
        "top neurons": lambda p, n: baselines.top_neurons(p[0], n, 2, torch.zeros(128)),
        "gain": lambda p, n: p[2].gain("attn_in", n),
        "scale": lambda p, n: p[2].scale("mlp_in", n),
        "ablate": lambda p, n: interventions.run(p[0], p[5], interventions.ablate_mlp(n)),
        "activations": lambda p, n: list(mlp_activations(p[0], p[5], [n])),
        "train": lambda p, n: tc.train(p[0], p[5], [n], tc.TrainConfig(batch_rows=4, steps=1, d_features=8)),
        "keyed": lambda p, n: tc.trace(tc.ReplacementModel(p[0], {n: p[1][0]}), "w1 w2"),
        "evaluate": lambda p, n: tc.evaluate(tc.ReplacementModel(p[0], {n: p[1][0]}), p[5]),
        "url": lambda p, n: neuronpedia.neuronpedia_url(-1 if n == 2 else n, 1),
    }),
    "head": ([-1, 4, 1.5, "0", None, True], {
        "reader": lambda p, n: connections.reader(p[2], p[4], [(0, n)]),
        "head_source": lambda p, n: targets.head_source(p[2], p[4], 0, n, 1),
        "score": lambda p, n: attention.score_terms(p[2], 0, n, 2, 1),
        "score target": lambda p, n: attention.score_target(p[2], 0, n, 2, 1, "key"),
        "ablate": lambda p, n: interventions.run(p[0], p[5], interventions.ablate_head(0, n)),
        "patch": lambda p, n: case_studies.patch(p[0], p[2].tokens, 0, n, 1, "v"),
    }),
    "position": ([4, -5, 1.5, "0", None, True], {
        "target": lambda p, n: targets.feature(p[2], 0, 0, n),
        "logit": lambda p, n: targets.logit(p[2], "w3", n),
        "salient": lambda p, n: graph.salient_logits(p[2], n),
        "active": lambda p, n: p[2].active(n),
        "features": lambda p, n: factorisation.by_features(p[2], 0, n, p[4].reader),
        "score": lambda p, n: attention.score_terms(p[2], 0, 0, n, 0),
        "ablate": lambda p, n: interventions.run(p[0], p[2].tokens[None], interventions.ablate_mlp(0, 0.0, [n])),
        "case": lambda p, n: case_studies.activation(p[2].replacement, p[2].tokens, 0, 1, n),
        "writes": lambda p, n: microscope.writes(p[2], 0, 1, n),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_are_not_there(place, name):
    for wrong in WRONG_NUMBERS:
        one_sentence(lambda wrong=wrong: FEATURES[name](place, wrong), "feature .* (is outside|is not a whole number)")


@pytest.mark.parametrize(("what", "name"), [(what, name) for what in OTHERS for name in OTHERS[what][1]])
def test_layers_heads_and_positions_that_are_not_there(place, what, name):
    wrongs, calls = OTHERS[what]
    sentence = "is outside|is not a whole|this model has no|below 0"
    for wrong in wrongs:
        one_sentence(lambda wrong=wrong: calls[name](place, wrong), sentence)


def test_whole_numbers_of_every_kind_are_taken(place):
    for three in (3, np.int64(3), torch.tensor(3)):
        assert targets.feature(place[2], 0, three).name.startswith("feature 0/3 at 3")


def test_a_transcoder_of_another_layer_is_refused_where_a_layer_is_named(place):
    model, transcoders, traced, *_, tokens = place
    other = transcoders[1]
    sae = make_transcoder(1)
    sae.config = sae.config.model_copy(update={"hook_out": sae.config.hook_in})
    for call in (
        lambda: interventions.replace_mlp(0, other),
        lambda: interventions.keep_features(0, other, [1]),
        lambda: interventions.set_features(0, other, [1]),
        lambda: interventions.reencode_input(0, sae),
        lambda: tc.trace(tc.ReplacementModel(model, {0: other}), "w1"),
        lambda: tc.evaluate(tc.ReplacementModel(model, {0: other}), tokens),
        lambda: evaluation.measure(tc.ReplacementModel(model, {0: other}), tokens, groups={}),
        lambda: connections.data_weighted(tc.ReplacementModel(model, {0: other, 1: other}), tokens, 0, 1, 3),
    ):
        one_sentence(call, "reads blocks.1.ln2.hook_normalized")


# ---- files


@pytest.mark.parametrize("token", ["\x0c", "\r", "\x00", "\x1b", "\ufffe", "\n", "\t", " é", "", "]]>"])
def test_a_token_of_a_circuit_comes_back_or_is_refused(tmp_path, token):
    circuit = nx.DiGraph(target="t", value=1.0, tokens=[token, "x"])
    circuit.add_node("embedding@1", kind="embedding", token=token, position=1)
    for path in (tmp_path / "x.json", tmp_path / "x.graphml"):
        try:
            save_graph(circuit, path)
        except ValueError as refused:
            assert "save the circuit as .json" in str(refused) and not path.exists()
            assert path.suffix == ".graphml" and token in "\x0c\r\x00\x1b\ufffe"
            continue
        if path.suffix == ".json":
            loaded = nx.node_link_graph(json.loads(path.read_text(encoding="utf-8")), edges="edges")
        else:
            loaded = nx.read_graphml(path)
            loaded.graph["tokens"] = json.loads(loaded.graph["tokens"])
        assert loaded.nodes["embedding@1"]["token"] == token and loaded.graph["tokens"] == [token, "x"]


def test_an_optimizer_beside_the_layers_is_no_transcoder(tmp_path):
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2, 2))])
    adam.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    adam.step()
    trainer = {"optimizer": adam.state_dict(), "steps": torch.tensor([3]), "where": tmp_path}
    for place in (tmp_path / "ours", tmp_path / "papers", tmp_path / "both"):
        place.mkdir()
    make_transcoder(0).save(tmp_path / "ours" / "layer_0")
    foreign.original(tmp_path / "papers", 3)
    foreign.original(tmp_path / "both", 3)
    make_transcoder(0).save(tmp_path / "both" / "layer_0")
    for place, layers in {"ours": [0], "papers": [3]}.items():
        torch.save(trainer, tmp_path / place / "trainer.pt")
        torch.save(adam.state_dict(), tmp_path / place / "optimizer.pt")
        assert list(tc.load_transcoders(tmp_path / place)) == layers
    one_sentence(lambda: tc.load_transcoders(tmp_path / "both"), "holds transcoders of 2 formats")
    (tmp_path / "only").mkdir()
    torch.save(adam.state_dict(), tmp_path / "only" / "optimizer.pt")
    one_sentence(lambda: tc.load_transcoders(tmp_path / "only"), "not one of the paper's checkpoints|asks to run")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_than_the_models_is_one_sentence(model, tokens, tmp_path, dtype):
    make_transcoder(0).save(tmp_path / "layer_0")
    loaded = tc.load_transcoders(tmp_path, dtype=dtype)
    name = str(dtype)
    for call in (
        lambda: tc.trace(tc.ReplacementModel(model, loaded), "w1 w2"),
        lambda: tc.evaluate(tc.ReplacementModel(model, loaded), tokens),
        lambda: build_index(tc.ReplacementModel(model, loaded), tokens, tmp_path / "index"),
        lambda: interventions.run(model, tokens, interventions.replace_mlp(0, loaded[0])),
        lambda: loaded[0](torch.zeros(3, 32)),
    ):
        one_sentence(call, f"is in {name}.*load_transcoders")
    one_sentence(lambda: tc.load_transcoders(tmp_path, dtype=torch.int8), "weights cannot be torch.int8")


def renamed(layer: int, reads: str, writes: str):
    transcoder = make_transcoder(layer)
    names = {"hook_in": f"blocks.{layer}.{reads}", "hook_out": f"blocks.{layer}.{writes}"}
    transcoder.config = transcoder.config.model_copy(update=names)
    return transcoder


def test_hooks_that_are_not_ours_are_named(model, tokens):
    strange = renamed(0, "hook_resid_mid", "hook_attn_out")
    for call in (
        lambda: tc.trace(tc.ReplacementModel(model, {0: strange}), "w1"),
        lambda: tc.evaluate(tc.ReplacementModel(model, {0: strange}), tokens),
    ):
        one_sentence(
            call,
            "reads blocks.0.hook_resid_mid, and writes blocks.0.hook_attn_out; a transcoder of this layer reads "
            "blocks.0.ln2.hook_normalized and writes blocks.0.hook_mlp_out",
        )


def test_hooks_of_the_same_place_are_taken_and_named(model, tokens, tmp_path):
    plain, other = {0: make_transcoder(0)}, {0: renamed(0, "mlp.hook_in", "mlp.hook_out")}
    with pytest.warns(UserWarning, match="blocks.0.mlp.hook_in of the transcoder of layer 0 is taken as blocks.0.ln2"):
        a, b = (tc.trace(tc.ReplacementModel(model, t), "w1 w2", check_fit=False) for t in (plain, other))
    assert torch.equal(a.features[0], b.features[0])
    with pytest.warns(UserWarning, match="mlp.hook_out of the transcoder of layer 0 is taken as blocks.0.hook_mlp_out"):
        a, b = (tc.evaluate(tc.ReplacementModel(model, t), tokens) for t in (plain, other))
        pd.testing.assert_frame_equal(a, b)
        build_index(tc.ReplacementModel(model, other), tokens, tmp_path / "other")
    build_index(tc.ReplacementModel(model, plain), tokens, tmp_path / "plain")
    first, second = (Index(tmp_path / name).flat(0)[0] for name in ("plain", "other"))
    assert (first == second).all()
    logits = [interventions.run(model, tokens, interventions.keep_features(0, t[0], [1, 2])) for t in (plain, other)]
    assert torch.equal(*logits)
    raw = make_model(tmp_path / "raw", processed=False)
    one_sentence(
        lambda: tc.trace(tc.ReplacementModel(raw, other), "w1"),
        "behind LayerNorm's gain and bias, which this model has",
    )


# ---- searches


def test_a_search_without_threshold_ends_and_says_what_may_be_missing(bundled, monkeypatch):
    lm, transcoders = bundled
    traced = tc.trace(tc.ReplacementModel(lm, transcoders), "The war lasted")
    whole = prompt_graph(traced)
    found = best_first(whole, targets.logit(traced, "45"), 0, limit=100)
    listed = sum(path.contribution for path in found.paths)
    assert found.expanded <= 100 and 0 < found.guarantee < 100 and len(found.paths) <= 500
    assert listed + found.remainder == pytest.approx(found.value, abs=1e-3)
    larger = best_first(whole, targets.logit(traced, "45"), found.guarantee * 1.001)
    assert {path.nodes for path in larger.paths} <= {path.nodes for path in found.paths}
    assert larger.guarantee == found.guarantee * 1.001
    monkeypatch.setattr(path_search, "LIMIT", 3)
    with pytest.warns(UserWarning, match="stopped at its limit .*; raise the threshold"):
        best_first(whole, targets.logit(traced, "45"), 0)
