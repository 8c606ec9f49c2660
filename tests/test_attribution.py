"""Attribution: the sums are exact, two routes agree, wrong questions get one sentence."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tclib as tc
from tclib import attribution, connections, linearity, targets
from tests.tiny import make_model, make_transcoder

ARCHITECTURES = [
    {"activation": "relu"},
    {"activation": "relu", "skip": True},
    {"activation": "topk", "k": 8},
    {"activation": "jumprelu"},
    {"activation": "batchtopk", "k": 8, "skip": True},
]


# (layers, blocks, processed): gains and biases are random in all of them.
MODELS = [
    (1, "gpt2", True), (2, "gpt2", True), (3, "gpt2", True), (4, "gpt2", True), (2, "gpt2", False), (3, "gpt2", False),
    (2, "neox", True), (3, "neox", False), (2, "neox-sequential", False),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [
        make_model(tmp_path_factory.mktemp("model"), layers=n, seed=n, blocks=blocks, processed=processed)
        for n, blocks, processed in MODELS
    ]


@pytest.fixture(scope="module")
def models64(models):
    return [copy.deepcopy(model).double() for model in models]


def make_trace(models, which, architecture, seed, skip_layer=None, words=6, double=False):
    model = models[which]
    transcoders = {
        layer: make_transcoder(layer, seed=seed, **ARCHITECTURES[architecture])
        for layer in range(model.cfg.n_layers)
        if layer != skip_layer
    }
    if double:
        transcoders = {layer: transcoder.double() for layer, transcoder in transcoders.items()}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (words,), generator=generator).tolist()
    return tc.trace(tc.ReplacementModel(model, transcoders), " ".join(f"w{i}" for i in ids), check_fit=False)


def any_target(trace, position, data):
    reader = torch.randn(32, generator=torch.Generator().manual_seed(5)).to(trace.logits.dtype)
    candidates = [targets.logit(trace, "w3", position), targets.logit_difference(trace, "w1", "w2", position)]
    candidates += [targets.feature(trace, layer, 5, position) for layer in trace.transcoders]
    candidates += [targets.direction(trace, reader, place, 0, position) for place in ("attn_in", "mlp_in", "final")]
    return data.draw(st.sampled_from(candidates), label="target")


question = {
    "which": st.integers(0, len(MODELS) - 1),
    "architecture": st.integers(0, len(ARCHITECTURES) - 1),
    "seed": st.integers(0, 1000),
    "position": st.integers(0, 6),
    "skip_layer": st.sampled_from([None, 0, 1]),
    "data": st.data(),
}


@settings(max_examples=60, deadline=None)
@given(**question)
def test_contributions_sum_to_the_target_and_autograd_agrees(
    models, which, architecture, seed, position, skip_layer, data
):
    trace = make_trace(models, which, architecture, seed, skip_layer)
    target = any_target(trace, position, data)
    table = tc.attribute(trace, target)  # raises UnbalancedError otherwise
    size = table["contribution"].abs().sum()
    assert table["contribution"].sum() == pytest.approx(target.value(trace), abs=1e-5 * size)
    again = linearity.by_autograd(trace, target, table)
    assert again.to_numpy() == pytest.approx(table["contribution"].to_numpy(float), abs=1e-5 * size)


@settings(max_examples=20, deadline=None)
@given(**question)
def test_float64_balances_to_1e_minus_10(models64, which, architecture, seed, position, skip_layer, data):
    trace = make_trace(models64, which, architecture, seed, skip_layer, double=True)
    target = any_target(trace, position, data)
    table = tc.attribute(trace, target)
    gap = abs(table["contribution"].sum() - target.value(trace))
    assert gap <= 1e-10 * table["contribution"].abs().sum()
    assert linearity.self_test(trace) < 1e-10


@settings(max_examples=20, deadline=None)
@given(**question)
def test_every_opened_head_sums_to_its_row(models64, which, architecture, seed, position, skip_layer, data):
    # In float64: the row multiplies values, the opened table residuals, and what cancels inside a dot product
    # leaves float32 rounding that no sum of contributions bounds.
    trace = make_trace(models64, which, architecture, seed, skip_layer, double=True)
    target = any_target(trace, position, data)
    table = tc.attribute(trace, target)
    heads = table[table["kind"] == "head"]
    for row in heads.iloc[:: max(1, len(heads) // 3)].itertuples():
        opened = tc.attribute(trace, targets.head_source(trace, target, row.layer, row.head, row.position))
        size = opened["contribution"].abs().sum()
        assert opened["contribution"].sum() == pytest.approx(row.contribution, abs=1e-10 * size)


def test_biases_have_rows_only_where_the_model_has_them(models):
    traces = [make_trace(models, which, 0, seed=1) for which in (1, 4, 7)]
    processed, raw, neox = [set(tc.attribute(trace, targets.logit(trace, "w3"))["kind"]) for trace in traces]
    assert {"attention_bias", "transcoder_bias", "target_bias"} <= processed
    assert not {"value_bias", "norm_bias"} & processed
    assert {"value_bias", "norm_bias", "position"} <= raw
    assert {"value_bias", "norm_bias"} <= neox and "position" not in neox


def test_names_say_what_is_special(models):
    trace = make_trace(models, 1, 0, seed=1)
    assert targets.logit(trace, "w3").name == "logit 'w3' - mean logit"
    assert targets.logit(make_trace(models, 4, 0, seed=1), "w3").name == "logit 'w3'"
    silent = int((trace.features[1][-1] == 0).nonzero()[0])
    target = targets.feature(trace, 1, silent)
    assert "inactive, pre-activation -" in target.name
    assert tc.attribute(trace, target).attrs["without_transcoder"] == []
    trace = make_trace(models, 1, 0, seed=1, skip_layer=0)
    table = tc.attribute(trace, targets.feature(trace, 1, 5))
    assert table.attrs["without_transcoder"] == [0] and "mlp" in set(table["kind"])


def test_a_freeze_that_does_not_hold_is_noticed(models):
    trace = make_trace(models, 1, 0, seed=1)
    assert linearity.self_test(trace) < 1e-4
    # Somebody's forgotten hook makes the model another one than its weights say.
    with trace.model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda value, hook: value * 1.1)]):
        with pytest.raises(linearity.NotFrozenError, match="without other edits"):
            tc.attribute(trace, targets.logit(trace, "w3"))


def test_the_self_test_runs_once_per_trace_and_again_when_the_model_was_edited(models, monkeypatch):
    trace, runs = make_trace(models, 1, 0, seed=1), []
    monkeypatch.setattr(
        linearity, "propagate", lambda *given, whole=linearity.propagate: runs.append(1) or whole(*given)
    )
    target = targets.logit(trace, "w3")
    for _ in range(3):
        tc.attribute(trace, target)
    assert len(runs) == 1
    with trace.model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda value, hook: None)]):  # it only looks
        tc.attribute(trace, target)
    assert len(runs) == 2
    tc.attribute(trace, target)
    assert len(runs) == 2
    weight = trace.model.blocks[0].attn.o.weight
    with torch.no_grad():
        weight *= 1.5
    try:
        with pytest.raises(linearity.NotFrozenError, match="without other edits"):
            tc.attribute(trace, target)
    finally:
        with torch.no_grad():
            weight /= 1.5


def test_target_values_are_the_models_own_numbers(models):
    for which in (1, 4, 6, 7):
        trace = make_trace(models, which, 0, seed=1)
        transcoder = trace.transcoders[1]
        pre = transcoder.pre_activations(trace.cache["blocks.1.ln2.hook_normalized"][-1])
        assert targets.feature(trace, 1, 7).value(trace) == pytest.approx(pre[7].item(), abs=1e-4)
        logits = trace.logits[-1]
        difference = targets.logit_difference(trace, "w1", "w2").value(trace)
        assert difference == pytest.approx((logits[1] - logits[2]).item(), abs=1e-4)


def test_factors_multiply_to_the_contribution(models):
    trace = make_trace(models, 2, 0, seed=2)
    table = tc.attribute(trace, targets.feature(trace, 2, 9))
    rows = table[table["kind"] == "feature"]
    assert len(rows) > 10
    product = rows["input_dependent"] * rows["input_invariant"]
    assert product.to_numpy() == pytest.approx(rows["contribution"].to_numpy(), rel=1e-5, abs=1e-7)
    # The invariant factor is the same on another prompt: it comes from two weight vectors alone.
    other = make_trace(models, 2, 0, seed=2, words=3)
    invariant = connections.pullback(other, targets.feature(other, 2, 9), layer=0)
    first = rows[rows["layer"] == 0].iloc[0]
    assert invariant[first["feature"]] == pytest.approx(first["input_invariant"], rel=1e-5)


def test_opening_a_head_gives_its_row(models):
    trace = make_trace(models, 2, 0, seed=3)
    target = targets.feature(trace, 2, 9)
    table = tc.attribute(trace, target)
    heads = table[(table["kind"] == "head") & (table["layer"] == 1)]
    row = heads.iloc[0]
    opened = targets.head_source(trace, target, row["layer"], row["head"], row["position"])
    inner = tc.attribute(trace, opened)
    assert inner["contribution"].sum() == pytest.approx(row["contribution"], rel=1e-4, abs=1e-5)


def test_weights_agree_with_autograd_on_the_frozen_model(models):
    """The same numbers by another route: the gradient through a model whose patterns and scales are frozen."""
    trace = make_trace(models, 1, 0, seed=4)
    model, target = trace.model, targets.feature(trace, 1, 3)
    source = {}

    def freeze(name):
        return lambda value, hook: trace.cache[name][None]

    def remember(value, hook):
        source["embed"] = value.detach().requires_grad_(True)
        return source["embed"]

    def keep_normalised(value, hook):
        source["normalised"] = value

    names = [n for n in trace.cache if n.endswith(("hook_pattern", "hook_scale", "hook_mlp_out"))]
    hooks = [(n, freeze(n)) for n in names] + [("hook_embed", remember)]
    hooks.append(("blocks.1.ln2.hook_normalized", keep_normalised))
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        model(trace.tokens[None])
        (source["normalised"][0, -1] @ target.reader).backward()
    by_gradient = (source["embed"].grad[0] * trace.cache["hook_embed"]).sum(-1)
    # From the weights: the direct path plus, through every head, what that head read from each embedding.
    by_weights = torch.zeros(len(trace.tokens))
    queue = [target]
    while queue:
        current = queue.pop()
        table = tc.attribute(trace, current)
        by_weights[current.position] += table.loc[table["kind"] == "embedding", "contribution"].sum()
        for row in table[table["kind"] == "head"].itertuples():
            queue.append(targets.head_source(trace, current, row.layer, row.head, row.position))
    assert by_weights.numpy() == pytest.approx(by_gradient.numpy(), abs=1e-4)


def test_an_unbalanced_table_is_an_error(models):
    trace = make_trace(models, 1, 0, seed=5)
    table = tc.attribute(trace, targets.logit(trace, "w1"))
    table.loc[0, "contribution"] += 1.0
    with pytest.raises(attribution.UnbalancedError, match="sum to"):
        attribution.check_balance(table)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda t: targets.feature(t, 9, 0), "layer 9 is outside the model"),
        (lambda t: targets.feature(t, 0, 0), "layer 0 has no transcoder"),
        (lambda t: targets.feature(t, 1, 64), "feature 64 is outside"),
        (lambda t: targets.feature(t, 1, 0, position=7), "position 7 is outside the prompt"),
        (lambda t: targets.logit(t, "w1 w2"), "is 2 tokens"),
        (lambda t: targets.direction(t, torch.zeros(3), "mlp_in", 0), "not \\(32,\\)"),
        (lambda t: targets.head_source(t, targets.feature(t, 1, 0), 1, 4, 0), "head 4 is outside the layer"),
        (lambda t: tc.trace(tc.ReplacementModel(t.model, t.transcoders), " "), "prompt is empty"),
        (lambda t: tc.trace(tc.ReplacementModel(t.model, t.transcoders), "w1 " * 16), "17 tokens with BOS"),
        (lambda t: tc.trace(tc.ReplacementModel(t.model, {5: t.transcoders[1]}), "w1"), "layer 5 is outside the model"),
        (
            lambda t: tc.trace(tc.ReplacementModel(t.model, {0: t.transcoders[1]}), "w1"),
            "dictionary of layer 0 reads blocks.1",
        ),
        (
            lambda t: tc.trace(tc.ReplacementModel(t.model, t.transcoders), "w1 w2"),
            "further from this model's MLP than zero",
        ),
        (
            lambda t: tc.trace(tc.ReplacementModel(t.model, t.transcoders), torch.ones(2, 3, dtype=torch.long)),
            "give one row of 1 to 16",
        ),
        (lambda t: targets.logit(t, 41), "token 41 is outside"),
    ],
)
def test_wrong_questions_get_one_sentence(models, ask, sentence):
    trace = make_trace(models, 1, 0, seed=6, skip_layer=0)
    with pytest.raises(ValueError, match=sentence):
        ask(trace)


def test_answers_of_several_tokens_are_compared_where_they_differ():
    bundled = tc.load_model(device="cpu")
    prompt = "The war lasted from the year 1732 to the year 17"
    assert targets.one_token_each(bundled, prompt, "45", "20") == (prompt, "45", "20")
    assert targets.one_token_each(bundled, prompt, "4520", "4510") == (f"{prompt}45", "20", "10")
    with pytest.raises(ValueError, match="'45' and '4520' do not differ in any token"):
        targets.one_token_each(bundled, prompt, "45", "4520")
    with pytest.raises(ValueError, match="are several tokens each: give two answers of one token"):
        targets.one_token_each(bundled, "The wa", "r end", "r was")
