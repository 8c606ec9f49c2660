"""Query-key attribution: terms sum to the model's own scores, other routes agree, removals are what the model does."""

import copy
import json

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tclib as tc
from tclib import attribution, interventions, linearity, targets
from tclib.circuits import attention
from tclib.model import load_model
from tests.tiny import make_model, make_transcoder

MODELS = [
    ("gpt2", True), ("gpt2", False), ("neox", True), ("neox", False), ("neox-sequential", False),
]  # fmt: skip
ARCHITECTURES = [{}, {"skip": True}, {"activation": "topk", "k": 8}, {"activation": "jumprelu"}]
WORDS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [
        make_model(tmp_path_factory.mktemp("model"), layers=3, seed=7, blocks=blocks, processed=processed)
        for blocks, processed in MODELS
    ]


@pytest.fixture(scope="module")
def models64(models):
    return [copy.deepcopy(model).double() for model in models]


def make_trace(models, which=0, architecture=0, seed=0, skip_layer=None):
    dtype = models[which].W_E.dtype
    transcoders = {
        layer: make_transcoder(layer, seed=seed, **ARCHITECTURES[architecture]).to(dtype)
        for layer in range(3)
        if layer != skip_layer
    }
    ids = torch.randint(0, 40, (WORDS,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tc.trace(tc.ReplacementModel(models[which], transcoders), " ".join(f"w{i}" for i in ids), check_fit=False)


question = {
    "which": st.integers(0, len(MODELS) - 1),
    "architecture": st.integers(0, len(ARCHITECTURES) - 1),
    "seed": st.integers(0, 1000),
    "skip_layer": st.sampled_from([None, 0, 1]),
    "layer": st.integers(0, 2),
    "head": st.integers(0, 3),
    "pair": st.tuples(st.integers(0, WORDS), st.integers(0, WORDS)).map(sorted),
}


def check_terms(trace, layer, head, destination, source, tolerance):
    terms = attention.score_terms(trace, layer, head, destination, source)
    scores = trace.cache[f"blocks.{layer}.attn.hook_attn_scores"][head, destination, : destination + 1]
    pattern = trace.cache[f"blocks.{layer}.attn.hook_pattern"][head, destination, : destination + 1]
    expected = (scores[source] - (pattern * scores).sum()).item()
    matrix = terms.query.vectors @ terms.key.vectors.T
    size = matrix.abs().sum().item() + scores.abs().max().item()
    assert matrix.sum().item() == pytest.approx(expected, abs=tolerance * size)
    for side, dim in ((terms.query, 1), (terms.key, 0)):
        assert side.table["contribution"].to_numpy() == pytest.approx(matrix.sum(dim).numpy(), abs=tolerance * size)
        largest = side.scores.abs().sum(0).max().item()
        assert side.scores.sum(0).numpy() == pytest.approx(scores.numpy(), abs=tolerance * largest)
    table = terms.table(top=7)
    assert len(table) == min(7, matrix.numel()) + 1 and table["query_kind"].iloc[-1] == "remainder"
    assert table["contribution"].sum() == pytest.approx(expected, abs=tolerance * size)
    listed = table["contribution"].abs().to_numpy()[:-1]
    assert listed == pytest.approx(matrix.abs().flatten().topk(len(listed)).values.numpy(), abs=tolerance * size)
    return terms


@settings(max_examples=60, deadline=None)
@given(**question)
def test_terms_sum_to_the_score(models, which, architecture, seed, skip_layer, layer, head, pair):
    source, destination = pair
    check_terms(make_trace(models, which, architecture, seed, skip_layer), layer, head, destination, source, 1e-5)


@settings(max_examples=15, deadline=None)
@given(**question)
def test_float64_is_exact_to_1e_minus_10(models64, which, architecture, seed, skip_layer, layer, head, pair):
    source, destination = pair
    check_terms(make_trace(models64, which, architecture, seed, skip_layer), layer, head, destination, source, 1e-10)


@settings(max_examples=20, deadline=None)
@given(**question)
def test_attribution_of_one_side_is_the_other_route(models, which, architecture, seed, skip_layer, layer, head, pair):
    """The key side of one score, and the query side of the contrast, are ordinary targets with the same rows."""
    source, destination = pair
    trace = make_trace(models, which, architecture, seed, skip_layer)
    terms = attention.score_terms(trace, layer, head, destination, source)
    by_key = terms.key.table.assign(contribution=terms.key.scores[:, source].numpy())
    for side, ours in (("query", terms.query.table), ("key", by_key)):
        target = attention.score_target(trace, layer, head, destination, source, side)
        assert target.value(trace) == pytest.approx(ours["contribution"].sum(), rel=1e-4, abs=1e-4)
        theirs = tc.attribute(trace, target)
        mine, other = (by_source(table) for table in (ours, theirs))
        if side == "key":  # other keys' sources bring nothing to this score
            mine = {source_: value for source_, value in mine.items() if source_ in other or abs(value) > 1e-6}
        assert mine.keys() == other.keys()
        size = theirs["contribution"].abs().sum()
        assert [mine[k] for k in other] == pytest.approx(list(other.values()), abs=1e-5 * size)


def by_source(table):
    """One name for what both tables hold; the reader's own bias goes by two names."""
    rows = {}
    for row in table.itertuples():
        kind = "own_bias" if row.kind in ("query_bias", "key_bias", "target_bias") else row.kind
        place = {"head": (row.layer, row.head, row.position), "value_bias": (row.layer, row.head)}
        at = place.get(kind, () if kind in ("own_bias", "norm_bias") else (row.layer, row.feature))
        key = (kind, *("" if pd.isna(value) else int(value) for value in at))
        if kind in ("embedding", "position"):
            key = (kind, int(row.position))
        if kind == "own_bias" and not row.contribution:
            continue
        rows[key] = rows.get(key, 0.0) + row.contribution
    return rows


def test_one_term_by_hand(models):
    trace = make_trace(models, 1, seed=3)
    terms = attention.score_terms(trace, 2, 1, 5, 3)
    query = terms.query.table.query("kind == 'feature' and layer == 1").index[0]
    key = terms.key.table.query("kind == 'feature' and layer == 0").index[0]
    i, j = terms.query.table.loc[query, "feature"], terms.key.table.loc[key, "feature"]
    scale, gain = trace.cache["blocks.2.ln1.hook_scale"][:, 0], trace.model.blocks[2].ln1.weight
    read = [d - d.mean() for d in (trace.transcoders[1].W_dec[i], trace.transcoders[0].W_dec[j])]
    weights = -trace.cache["blocks.2.attn.hook_pattern"][1, 5, :6].clone()
    weights[3] += 1
    q = trace.features[1][5, i] / scale[5] * (read[0] * gain) @ trace.model.W_Q[2, 1]
    k = (weights * trace.features[0][:6, j] / scale[:6]).sum() * (read[1] * gain) @ trace.model.W_K[2, 1]
    matrix = terms.query.vectors @ terms.key.vectors.T
    assert matrix[query, key].item() == pytest.approx((q @ k / 8**0.5).item(), rel=1e-4)


def test_biases_of_the_keys_cancel_unless_they_are_rotated(models):
    for which, cancels in ((0, True), (2, False)):
        trace = make_trace(models, which)
        table = attention.score_terms(trace, 2, 1, 5, 3).key.table
        bias = table.loc[table["kind"] == "key_bias", "contribution"].abs().item()
        assert (bias < 1e-5) == cancels


@pytest.mark.parametrize("which", range(len(MODELS)))
@pytest.mark.parametrize("side", ["query", "key"])
def test_a_removal_is_what_the_model_does(models, which, side):
    """Put the changed pattern into the frozen model: the target moves by the stated effect."""
    trace = make_trace(models, which, seed=1)
    layer, head, target = 1, 2, targets.feature(trace, 2, 9)
    terms = attention.output_terms(trace, target, layer, head)
    removals = terms.removals(side)
    assert removals["contribution"].sum() == pytest.approx(terms.value, abs=1e-4)
    assert removals["first_order"].to_numpy() == pytest.approx(removals["contribution"].to_numpy(), abs=1e-5)
    for row in (0, 3, len(removals) - 1):
        pattern = terms.pattern_without(side, torch.tensor([removals.index[row]]))

        def look_elsewhere(value, hook, pattern=pattern):
            value = value.clone()
            value[:, head, -1] = pattern
            return value

        # Values held too: the head reaches the target on its direct path alone.
        hooks = linearity.freeze(trace) + interventions.freeze(trace.cache, ["values"])
        hooks.append((f"blocks.{layer}.attn.hook_pattern", look_elsewhere))
        seen = {}
        name = f"blocks.2.hook_resid_{'pre' if trace.parallel else 'mid'}"
        interventions.run(
            trace.model, trace.tokens[None], [*hooks, (name, lambda v, hook, seen=seen: seen.update(r=v[0, -1]))]
        )
        after = seen["r"] @ target.pulled_back(trace) + target.norm_bias(trace) + target.bias
        assert target.value(trace) - after.item() == pytest.approx(removals["effect"].iloc[row], abs=1e-4)


def test_first_order_is_the_derivative(models64):
    """Removing a hundredth of a source has a hundredth of its first-order effect."""
    trace = make_trace(models64, 2, seed=5)
    terms = attention.output_terms(trace, targets.logit(trace, "w3"), 2, 0)
    for side in (terms.query, terms.key):
        row = side.table["contribution"].abs().idxmax()
        little = (terms.scores - 1e-4 * side.scores[row]).softmax(-1)
        moved = ((terms.scores.softmax(-1) - little) @ terms.moved).item()
        assert moved == pytest.approx(1e-4 * side.table.loc[row, "contribution"], rel=1e-2)


def test_removing_everything_leaves_uniform_attention(models):
    terms = attention.score_terms(make_trace(models, 3), 2, 1, 5, 3)
    for side in ("query", "key"):
        everything = torch.arange(len(getattr(terms, side).table))
        assert terms.pattern_without(side, everything).numpy() == pytest.approx(1 / 6, abs=1e-4)


def test_gpt2_that_scales_by_layer(tmp_path):
    make_model(tmp_path, layers=3)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config |= {"scale_attn_by_inverse_layer_idx": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_model(str(tmp_path), device="cpu")
    check_terms(make_trace([model]), 2, 1, 5, 3, 1e-5)


def test_another_model_than_the_trace_says_is_noticed(models):
    trace = make_trace(models)
    scores = trace.cache["blocks.1.attn.hook_attn_scores"]
    trace.cache["blocks.1.attn.hook_attn_scores"] = scores * 1.1
    with pytest.raises(attribution.UnbalancedError, match="without other edits"):
        attention.score_terms(trace, 1, 1, 5, 3)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda t: attention.score_terms(t, 3, 0, 5, 3), "layer 3 is outside the model"),
        (lambda t: attention.score_terms(t, 1, 4, 5, 3), "head 4 is outside the layer"),
        (lambda t: attention.score_terms(t, 1, 0, 3, 5), "position 3 cannot attend to position 5"),
        (lambda t: attention.score_terms(t, 1, 0, 7, 5), "position 7 is outside the prompt"),
        (lambda t: attention.score_target(t, 1, 9, 5, 3, "key"), "head 9 is outside the layer"),
        (lambda t: attention.output_terms(t, targets.feature(t, 0, 1), 1, 0), "head 1.0 does not come before"),
    ],
)
def test_wrong_questions_get_one_sentence(models, ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(make_trace(models))
