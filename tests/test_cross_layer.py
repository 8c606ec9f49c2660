"""Cross-layer transcoders: trained as their equations say, exact in attribution, edited in all writes, and read."""

from __future__ import annotations

import copy
import json
from functools import cache

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tclib as tc
from tclib import connections, evaluation, factorisation, interventions, linearity, targets, training
from tclib.activations import hook_in, hook_out, mlp_out
from tclib.circuits import graph, neuronpedia, pruning, validation
from tclib.circuits.one_step import prompt_graph
from tclib.circuits.path_graph import merge
from tclib.circuits.path_search import best_first
from tclib.training.cross_layer import CrossTrainer
from tclib.training.fast.sparse_step import make_trainer
from tclib.transcoder import imitation
from tests import foreign
from tests.tiny import FAMILIES, SPARSE_KINDS, make_model, make_transcoder

LAYERS, WORDS = 3, 8
ALL = ["gpt2", "neox", "neox-sequential", *FAMILIES]
KINDS = {"relu": {}, "topk": {"activation": "topk", "k": 8}, "jumprelu": {"activation": "jumprelu"}}


def make_set(layers=LAYERS, first=0, before_norm=False, seed=0, **config):
    """A random cross-layer transcoder of the layers from ``first`` on."""
    made = {
        layer: make_transcoder(layer, d_features=24, seed=seed, n_writes=layers - layer, **config)
        for layer in range(first, layers)
    }
    for layer, part in made.items():
        if before_norm:
            part.config = part.config.model_copy(update={"hook_out": mlp_out(layer)})
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @cache
    def make(family: str, processed: bool = False, double: bool = False):
        if double:
            return copy.deepcopy(make(family, processed)).double()
        return make_model(tmp_path_factory.mktemp(family), layers=LAYERS, seed=3, blocks=family, processed=processed)

    return make


def make_trace(models, family="gpt2", processed=False, double=True, first=0, before_norm=False, seed=0, **config):
    model = models(family, processed, double)
    parts = make_set(first=first, before_norm=before_norm, seed=seed, **config)
    for part in parts.values():
        part.to(model.W_E.dtype)
    ids = torch.randint(0, 40, (WORDS,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tc.trace(tc.ReplacementModel(model, parts), " ".join(f"w{i}" for i in ids), check_fit=False)


question = {
    "family": st.sampled_from(ALL),
    "processed": st.booleans(),
    "double": st.booleans(),
    "first": st.integers(0, 2),
    "before_norm": st.booleans(),
    "skip": st.booleans(),
    "kind": st.sampled_from(sorted(KINDS)),
    "seed": st.integers(0, 1000),
    "position": st.integers(0, WORDS),
    "data": st.data(),
}


def any_target(trace, position, data):
    candidates = [targets.logit(trace, "w3", position), targets.logit_difference(trace, "w1", "w2", position)]
    candidates += [targets.feature(trace, layer, 5, position) for layer in trace.transcoders]
    return data.draw(st.sampled_from(candidates), label="target")


@settings(max_examples=20, deadline=None)
@given(**question)
def test_contributions_balance_in_every_family(
    models, family, processed, double, first, before_norm, skip, kind, seed, position, data
):
    trace = make_trace(models, family, processed, double, first, before_norm, seed, skip=skip, **KINDS[kind])
    target, tolerance = any_target(trace, position, data), 1e-10 if double else 1e-5
    table = tc.attribute(trace, target)  # raises UnbalancedError otherwise
    again = linearity.by_autograd(trace, target, table)
    size = table["contribution"].abs().sum()
    assert again.to_numpy() == pytest.approx(table["contribution"].to_numpy(float), abs=tolerance * size)
    features = table[table["kind"] == "feature"]
    assert (features["written"] >= features["layer"]).all() and (features["written"] < target.layer).all()
    if target.layer == LAYERS and first < LAYERS - 1 and trace.features[first][position].any():
        assert (features["written"] > features["layer"]).any()


@settings(max_examples=12, deadline=None)
@given(**question)
def test_graphs_and_searches_balance(
    models, family, processed, double, first, before_norm, skip, kind, seed, position, data
):
    trace = make_trace(models, family, processed, True, first, before_norm, seed, skip=skip, **KINDS[kind])
    whole = graph.build_graph(trace)  # checks every row
    small = pruning.to_networkx(pruning.prune(whole, 0.6))
    assert nx.is_directed_acyclic_graph(small)
    assert 0 <= pruning.replacement_score(whole) <= pruning.completeness_score(whole) + 1e-9
    target = any_target(trace, position, data)
    found = prompt_graph(trace)
    (table,) = found.tables(root := found.root(target))
    values = table.values[0] * table.valid[0]
    size = values.abs().sum().item()
    assert values.sum().item() == pytest.approx(target.value(trace), abs=1e-10 * size)
    onward = [i for i, s in enumerate(table.sources.tolist()) if table.valid[0, i] and found.node(s).goes_on]
    if onward:
        states = found.follow(root[torch.zeros(len(onward), dtype=torch.long)], table.sources[onward], values[onward])
        for part in found.tables(states):
            inner, brought = part.values * part.valid, values[onward][part.states]
            assert ((inner.sum(1) - brought).abs() <= 1e-9 * (inner.abs().sum(1) + brought.abs())).all()
    searched = best_first(found, target, 0.05 * abs(target.value(trace)), limit=200)
    merge(found, target, searched.paths)  # what enters a node leaves it, or it raises


def test_a_search_lists_each_write_and_misses_none(models):
    trace = make_trace(models, seed=4)
    target = targets.logit(trace, "w3")
    found = best_first(prompt_graph(trace), target, 0.0, max_length=1)
    one_step = tc.attribute(trace, target).query("kind == 'feature'").groupby(["layer", "feature"])["contribution"]
    paths = pd.DataFrame([(*p.nodes[0][:5], p.contribution) for p in found.paths if p.nodes[0].kind == "feature"])
    sums = paths.groupby([1, 4])[5].sum()
    assert sums.to_numpy() == pytest.approx(one_step.sum().to_numpy(float), abs=1e-9)
    assert len(paths) > len(sums)


def test_rows_of_the_graph_are_the_frozen_models(models):
    """A feature's effect on a logit is the change when all its writes are taken out of the frozen model."""
    trace = make_trace(models, "llama", seed=2)
    wanted = [targets.logit(trace, "w3"), targets.feature(trace, 2, 5)]
    rows = [
        {"layer": layer, "position": at, "feature": int(trace.features[layer][at].nonzero()[0])}
        for layer in range(LAYERS)
        for at in (2, WORDS)
    ]
    held = ["patterns", "scales", "mlps"]
    table = validation.compare(trace, pd.DataFrame(rows), wanted, held)
    assert table["predicted"].to_numpy() == pytest.approx(table["measured"].to_numpy(), abs=1e-10)
    direct = validation.compare(trace, pd.DataFrame(rows), wanted, [*held, "values"])
    assert direct["predicted"].to_numpy() == pytest.approx(direct["measured"].to_numpy(), abs=1e-10)
    free = validation.compare(trace, pd.DataFrame(rows), wanted)
    assert (free["predicted"] - free["measured"]).abs().max() > 1e-3


def test_constrained_patching_holds_the_layers_that_it_names(models):
    trace = make_trace(models, seed=1)
    feature = int(trace.features[0][WORDS].nonzero()[0])
    edit = pd.DataFrame([{"layer": 0, "position": WORDS, "feature": feature}])
    wanted = [targets.logit(trace, "w3")]
    by_range = [validation.measure(trace, edit, wanted, ["mlps"], range(last)).item() for last in range(LAYERS + 1)]
    assert by_range[0] == pytest.approx(validation.measure(trace, edit, wanted).item())
    assert by_range[LAYERS] == pytest.approx(validation.measure(trace, edit, wanted, ["mlps"]).item())
    assert len({round(value, 9) for value in by_range[1:]}) == LAYERS
    with pytest.raises(ValueError, match="cannot be frozen"):
        validation.measure(trace, edit, wanted, ["mlp"], [0])


def test_a_clamped_feature_is_changed_in_all_its_writes(models):
    trace = make_trace(models, seed=1)
    feature = int(trace.features[0][WORDS].nonzero()[0])
    z = trace.features[0][WORDS, feature]
    hooks = interventions.freeze(trace.cache, ["mlps"]) + interventions.set_features(
        0, trace.transcoders[0], [feature], 0.0, -1
    )
    seen = {}
    hooks += [(hook_out(layer), lambda y, hook: seen.__setitem__(hook.name, y)) for layer in range(LAYERS)]
    logits = interventions.run(trace.model, trace.tokens[None], hooks)[0, -1]
    for layer, y in enumerate(seen.values()):
        change = y[0] - trace.cache[hook_out(layer)]
        torch.testing.assert_close(change[WORDS], -z * trace.transcoders[0].rows(layer)[feature])
        assert not change[:WORDS].any()
    assert logits.isfinite().all()


def test_replacing_mlps(models):
    trace = make_trace(models, processed=True, seed=3)
    parts, seen = trace.transcoders, {}
    hooks = interventions.replace_mlps(parts, [1, 2])
    keep = [hook_in(layer) for layer in range(LAYERS)] + [hook_out(layer) for layer in range(LAYERS)]
    hooks += [(name, lambda value, hook: seen.__setitem__(hook.name, value)) for name in keep]
    interventions.run(trace.model, trace.tokens[None], hooks)
    z = {layer: part.encode(seen[hook_in(layer)]) for layer, part in parts.items()}
    for layer in (1, 2):
        expected = parts[layer].b_dec + sum(z[at] @ parts[at].W_dec[:, layer - at] for at in range(layer + 1))
        torch.testing.assert_close(seen[hook_out(layer)], expected)
    torch.testing.assert_close(seen[hook_out(0)][0], trace.cache[hook_out(0)])
    silent = interventions.replace_mlps(parts, [2], lambda layer, z: torch.zeros_like(z))
    silent.append((hook_out(2), lambda value, hook: seen.__setitem__(hook.name, value)))
    interventions.run(trace.model, trace.tokens[None], silent)
    torch.testing.assert_close(seen[hook_out(2)][0, 3], parts[2].b_dec)


def test_evaluation_is_its_definition(models):
    model = models("gpt2", True)
    parts = make_set(seed=5)
    tokens = torch.randint(0, 40, (12, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 40
    table = tc.evaluate(tc.ReplacementModel(model, parts), tokens).set_index("layer")
    _, cache = model.run_with_cache(tokens)
    keep = tokens != 40
    z = {layer: part.encode(cache[hook_in(layer)]) for layer, part in parts.items()}
    for layer in range(LAYERS):
        y = cache[hook_out(layer)][keep]
        out = imitation(parts, layer, z, cache[hook_in(layer)])[keep]
        expected = (y - out).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
        assert table["fvu"][layer] == pytest.approx(expected.item(), rel=1e-4)
        assert table["l0"][layer] == pytest.approx((z[layer][keep] > 0).float().sum(-1).mean().item(), rel=1e-4)
    everything = evaluation.measure(tc.ReplacementModel(model, parts), tokens).groups.set_index("layer")
    assert np.isfinite(everything["ce_replaced"]).all() and everything.index[-1] == "all"


def test_virtual_weights_sum_over_writes(models):
    trace = make_trace(models, processed=True, seed=1)
    target = targets.feature(trace, 2, 5)
    rows = tc.attribute(trace, target).query("kind == 'feature' and layer == 0").groupby("feature")["input_invariant"]
    pulled = connections.pullback(trace, target, 0)
    for feature, invariant in rows.sum().items():
        assert pulled[feature] == pytest.approx(invariant, abs=1e-9)
    lens = connections.logit_lens(trace, 0, 3)
    written = trace.transcoders[0].written()[3] @ trace.model.W_U
    assert lens.max() == pytest.approx((written - written.mean()).max().item(), abs=1e-8)


def data(seed=0, tokens=200, width=16, layers=LAYERS):
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    x = {layer: torch.randn(tokens, width, generator=draw).double() for layer in range(layers)}
    reads, writes = torch.randn(width, 40, generator=fixed).double(), torch.randn(layers, 40, width, generator=fixed)
    z = {layer: torch.relu(x[layer] @ reads - 4) for layer in range(layers)}
    return {layer: (x[layer], sum(z[at] @ writes[layer - at].double() for at in range(layer + 1))) for layer in x}


def learner(kind, sparse, seed=0, **changes):
    base = {"kind": "cross_layer", "d_features": 96, "steps": 200, "start_l0": 8.0, "tied": True}
    base |= {"sparse_from": 1 if sparse else 10**6, "sparse_below": 1.0}
    c = tc.TrainConfig(**(base | SPARSE_KINDS[kind] | changes))
    parts = {layer: make_trainer(layer, *pair, c, LAYERS - layer) for layer, pair in data(seed).items()}
    return CrossTrainer(parts)


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense step", "sparse step"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_loss_and_gradients_are_the_plain_equations(kind, sparse, skip):
    """Against loops over layer pairs and autograd, dead features and their second target included."""
    joint = learner(kind, sparse, skip=skip)
    draw = torch.Generator().manual_seed(5)
    for part in joint.parts.values():
        with torch.no_grad():
            for name, p in part.transcoder.named_parameters():
                if name != "threshold" or kind == "jumprelu":
                    p += 0.1 * p.abs().mean() * torch.rand(p.shape, generator=draw).double()
        part.silent[:5] = 10**6
    scaled, sparsity_scale = joint.scaled(data()), 0.7
    sums, _ = joint.gradients(scaled, dict.fromkeys(joint.parts, sparsity_scale))
    found = {layer: {n: p.grad.clone() for n, p in part.transcoder.named_parameters() if p.requires_grad}
             for layer, part in joint.parts.items()}  # fmt: skip

    total, z, pre = 0.0, {}, {}
    for layer, part in joint.parts.items():
        t = part.transcoder
        part.adam.zero_grad()
        pre[layer] = scaled[layer][0] @ t.W_enc + t.b_enc
        z[layer] = training.trainer.activate(t, pre[layer], part.config)
    errors = {}
    for layer, part in joint.parts.items():
        x, y = scaled[layer]
        out = part.transcoder.b_dec + (x @ part.transcoder.W_skip if skip else 0)
        for at in range(layer + 1):
            out = out + z[at] @ joint.parts[at].transcoder.W_dec[:, layer - at]
        errors[layer] = y - out
        total = total + errors[layer].pow(2).sum()
    for layer, part in joint.parts.items():
        t, c = part.transcoder, part.config
        lengths = t.W_dec.pow(2).sum((1, 2)).sqrt() if kind == "free relu" else 1.0
        if c.activation == "relu":
            total = total + sparsity_scale * c.l1_coefficient * (z[layer] * lengths).sum()
        elif c.activation == "jumprelu":
            total = total + sparsity_scale * training.trainer.penalty(z[layer], pre[layer], t, c)
        else:
            beside = torch.cat([errors[at].detach() for at in range(layer, LAYERS)], 1)
            dead = torch.relu(pre[layer]) * (part.silent >= c.dead_after)
            again = dead @ t.W_dec.flatten(1)
            total = total + c.aux * (beside - again).pow(2).sum()
    total = total / len(x)
    total.backward()
    loss = sum(row[0] for row in sums.values()) / len(x)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for layer, part in joint.parts.items():
        for name, p in part.transcoder.named_parameters():
            if p.requires_grad:
                difference = (found[layer][name] - p.grad).abs().max()
                assert difference <= 1e-6 * p.grad.abs().max(), (layer, name)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_the_sparse_step_trains_as_the_dense_one(kind):
    dense, sparse = learner(kind, False), learner(kind, True)
    for step in range(30):
        rows = [s.learn(data(step), step) for s in (dense, sparse)]
    assert [r["loss"] for r in rows[1].values()] == pytest.approx([r["loss"] for r in rows[0].values()], rel=1e-6)
    for layer in range(LAYERS):
        ours, theirs = (s.parts[layer].transcoder for s in (sparse, dense))
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-6 * q.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_folding_the_scaling_changes_nothing(kind, skip):
    joint = learner(kind, False, skip=skip)
    big = {layer: (x * 3 + 1, y * 10 ** (layer - 1) - 5) for layer, (x, y) in data().items()}
    joint = CrossTrainer(
        {layer: make_trainer(layer, *pair, joint.parts[0].config, LAYERS - layer) for layer, pair in big.items()}
    )
    for step in range(5):
        joint.learn(big, step)
    parts = {layer: part.transcoder for layer, part in joint.parts.items()}
    with torch.no_grad():
        scaled = joint.scaled(big)
        z = {layer: t.encode(scaled[layer][0]) for layer, t in parts.items()}
        before = {
            layer: imitation(parts, layer, z, scaled[layer][0]) * part.y_scale + part.y_mean
            for layer, part in joint.parts.items()
        }
    done = joint.finished()
    z = {layer: t.encode(big[layer][0]) for layer, t in done.items()}
    for layer, t in done.items():
        torch.testing.assert_close(imitation(done, layer, z, big[layer][0]), before[layer], rtol=1e-9, atol=1e-9)
        if kind != "topk":  # where a length of its own for each feature would change which are largest
            torch.testing.assert_close(t.W_dec.flatten(1).norm(dim=1), torch.ones(96, dtype=torch.float64))


CONFIG = tc.TrainConfig(kind="cross_layer", d_features=64, steps=60, batch_rows=8, lr=3e-3, activation="topk", k=8)


@pytest.mark.parametrize("changes", [{}, {"activation": "jumprelu", "k": None}, {"skip": True}], ids=str)
def test_it_learns_and_is_saved(model, tokens, changes, tmp_path):
    config = CONFIG.model_copy(update=changes)
    trained, history = tc.train(model, tokens, [0, 1], config)
    assert set(history["layer"]) == {0, 1} and trained[0].W_dec.shape[1] == 2 and trained[1].W_dec.shape[1] == 1
    assert (history.groupby("layer")["fvu"].last() < 0.7).all()
    tc.save_transcoders(trained, tmp_path / "set")
    table = evaluation.reconstruction(
        tc.ReplacementModel(model, tc.load_transcoders(tmp_path / "set", device="cpu")), tokens
    )
    assert table["fvu"].to_numpy() == pytest.approx(history.groupby("layer")["fvu"].last().to_numpy(), rel=0.35)


def test_a_run_goes_on_bit_for_bit(model, tokens, tmp_path):
    class Stop(Exception):
        pass

    def stop(records):
        if records[0]["step"] >= 30:
            raise Stop

    whole, history = tc.train(model, tokens, [0, 1], CONFIG)
    with pytest.raises(Stop):
        tc.train(model, tokens, [0, 1], CONFIG, run=tmp_path / "run", watch=stop, checkpoint_seconds=0.0)
    again, records = tc.train(model, tokens, [0, 1], CONFIG, run=tmp_path / "run")
    for layer in (0, 1):
        for p, q in zip(whole[layer].parameters(), again[layer].parameters(), strict=True):
            assert torch.equal(p, q)
    pd.testing.assert_frame_equal(history, records)


def test_beside_a_per_layer_training_it_trains_as_alone(model, tokens):
    alone, _ = tc.train(model, tokens, [0, 1], CONFIG)
    both, history = training.train_side_by_side(
        model, tokens, [0, 1], {"cross": CONFIG, "own": CONFIG.model_copy(update={"kind": "transcoder"})}
    )
    assert torch.equal(alone[0].W_dec, both["cross"][0].W_dec) and both["own"][0].W_dec.ndim == 2
    assert set(history["name"]) == {"cross", "own"}


def applied(parts, x):
    z = {layer: part.encode(x[layer]) for layer, part in parts.items()}
    return {layer: imitation(parts, layer, z, x[layer]) for layer in parts}


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_circuit_tracers_folders_are_read_and_written(kind, tmp_path):
    forward = foreign.circuit_tracer_cross_layer(tmp_path / "theirs", kind)
    parts = tc.load_transcoders(tmp_path / "theirs", device="cpu")
    assert list(parts) == [0, 1, 2] and parts[0].config.activation == kind
    assert parts[1].config.hook_in == hook_in(1) and parts[1].W_dec.shape == (foreign.F, 2, foreign.D)
    x = {layer: torch.randn(20, foreign.D) for layer in parts}
    for layer, out in applied(parts, x).items():
        torch.testing.assert_close(out, forward(x)[layer], rtol=1e-5, atol=1e-5)
    for format in ("circuit-tracer", "tclib"):
        tc.save_transcoders(parts, tmp_path / format, format)
        again = applied(tc.load_transcoders(tmp_path / format, device="cpu"), x)
        for layer, out in applied(parts, x).items():
            torch.testing.assert_close(again[layer], out, rtol=0, atol=0)
    written, read = (sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("circuit-tracer", "theirs"))
    assert written == read


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (lambda f: (f / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda f: (f / "W_dec_1.safetensors").unlink(), "W_dec_1.safetensors"),
        (lambda f: (f / "W_enc_1.safetensors").unlink(), "features of layer 0 in .* write to layer 1, whose files"),
        (lambda f: (f / "W_enc_2.safetensors").write_bytes(b"short"), "W_enc_2.safetensors"),
        (lambda f: save_file({"W_dec_0": torch.zeros(64, 3, 31)}, f / "W_dec_0.safetensors"), "W_dec_0 is .64, 3, 31"),
        (lambda f: save_file({"W_dec_1": torch.zeros(64, 32)}, f / "W_dec_1.safetensors"), "no rows W_dec_1 for each"),
        (lambda f: save_file({"W_dec_2": torch.zeros(64, 4, 32)}, f / "W_dec_2.safetensors"), "write to layer 3"),
        (lambda f: (f / "config.yaml").write_text("model_kind: transcoder_set\nfeature_input_hook: a\n"
                                                  "feature_output_hook: b\n", encoding="utf-8"), "says transcoder_set"),
    ],
)  # fmt: skip
def test_broken_folders_are_refused_in_one_sentence(tmp_path, broken, sentence):
    foreign.circuit_tracer_cross_layer(tmp_path / "set")
    broken(tmp_path / "set")
    with pytest.raises(ValueError, match=sentence) as caught:
        dict(tc.load_transcoders(tmp_path / "set", device="cpu"))
    assert "\n" not in str(caught.value)


def test_int8_files_hold_all_writes(tmp_path):
    part = make_set(activation="jumprelu")[0]
    part.save(tmp_path / "layer_0", dtype=torch.int8)
    again = tc.Transcoder.load(tmp_path / "layer_0")
    largest = part.W_dec.abs().amax((1, 2), keepdim=True)
    assert again.W_dec.shape == part.W_dec.shape and ((again.W_dec - part.W_dec).abs() <= largest / 127).all()


def test_a_set_of_another_hook_or_model_is_refused(models, tmp_path):
    model = models("gpt2", True)
    foreign.circuit_tracer_cross_layer(tmp_path / "mid", hook_in="hook_resid_mid")
    with pytest.raises(ValueError, match="reads blocks.0.hook_resid_mid"):
        tc.load_transcoders(tmp_path / "mid", device="cpu", model=model)
    foreign.circuit_tracer_cross_layer(tmp_path / "random")
    with pytest.warns(UserWarning, match="it belongs to another model"):
        tc.load_transcoders(tmp_path / "random", device="cpu", model=model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"activation": "topk", "k": 8}, "TopK"), ({"skip": True}, "no skip path"), ({"first": 1}, "every layer from 0")],
)
def test_what_circuit_tracer_cannot_hold_is_not_written(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tc.save_transcoders(make_set(**changes), tmp_path / "set", "circuit-tracer")


def test_the_graphs_json(models, tmp_path):
    trace = make_trace(models, processed=True, seed=1)
    small = pruning.prune(graph.build_graph(trace), 0.8)
    content = json.loads(
        neuronpedia.save_graph_json(trace, small, tmp_path, "cross", "tiny").read_text(encoding="utf-8")
    )
    features = [node for node in content["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert len(features) == (small.nodes["kind"] == "feature").sum() == len({node["node_id"] for node in features})


def test_what_is_refused(models, model, tokens, tmp_path):
    parts = make_set()
    two = {0: parts[0], 2: parts[2]}
    trace_of = models("gpt2")
    joined = tc.ReplacementModel
    for ask, sentence in [
        (lambda: tc.trace(joined(trace_of, two), "w1"), "writes to layers 0 to 2, and the set has no part for layer 1"),
        (lambda: tc.evaluate(joined(trace_of, two), torch.tensor([[40, 1, 2]])), "has no part for layer 1"),
        (lambda: tc.trace(joined(trace_of, parts | {1: make_transcoder(1)}), "w1"), "no part for layer 1"),
        (lambda: parts[0](torch.zeros(1, 32)), "imitate an MLP together"),
        (lambda: interventions.replace_mlp(0, parts[0]), "use replace_mlps"),
        (lambda: interventions.replace_mlps(parts, [3]), "layer 3 has no transcoder"),
        (lambda: factorisation.by_features(make_trace(models), 1, 3, torch.zeros(32)), "features of several layers"),
        (lambda: interventions.replace_mlps(two, [0]), "no part for layer 1"),
        (lambda: tc.train(models("gpt2"), tokens, [0, 2], CONFIG), "without gaps"),
        (lambda: tc.train(model, tokens, [0, 1], {0: CONFIG, 1: CONFIG.model_copy(update={"kind": "transcoder"})}),
         "give them all that kind"),
        (lambda: tc.save_transcoders(parts, tmp_path / "x", "saelens"), "SAELens has no cross-layer transcoders"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            ask()
