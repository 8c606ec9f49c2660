"""Input-invariant connections and the factorisation: by hand, on random models of every kind of block."""

import pandas as pd
import pytest
import torch

import tclib as tc
from tclib import connections, factorisation, targets
from tclib.activations import hook_in, hook_out
from tclib.blocks import Block
from tclib.transcoder import Transcoder, TranscoderConfig
from tests.tiny import make_model, make_transcoder

KINDS = [
    ("gpt2", True), ("gpt2", False), ("neox", True), ("neox", False),
    ("llama", True), ("gemma2", False), ("olmo2", False),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=str)
def trace(request, tmp_path_factory):
    blocks, processed = request.param
    model = make_model(tmp_path_factory.mktemp("model"), layers=3, seed=1, blocks=blocks, processed=processed)
    transcoders = {layer: make_transcoder(layer, seed=2) for layer in range(3)}
    return tc.trace(tc.ReplacementModel(model, transcoders), "w1 w5 w2 w9 w4", check_fit=False)


def test_pullback_is_the_invariant_column_of_the_table(trace):
    target = targets.feature(trace, 2, 9)
    table = tc.attribute(trace, target)
    rows = table[(table["kind"] == "feature") & (table["layer"] == 1)]
    factors = connections.pullback(trace, target, 1)
    assert len(rows) > 5
    assert factors[rows["feature"]].to_numpy() == pytest.approx(rows["input_invariant"].to_numpy(), rel=1e-4, abs=1e-6)


def test_pullback_through_a_head_agrees_with_the_opened_head(trace):
    """Contribution of a feature through a head = activation x pattern / (both scales) x the invariant factor."""
    target = targets.feature(trace, 2, 9)
    opened = targets.head_source(trace, target, 1, 2, 3)
    table = tc.attribute(trace, opened)
    rows = table[(table["kind"] == "feature") & (table["layer"] == 0)]
    factors = connections.pullback(trace, target, 0, heads=[(1, 2)])
    pattern = trace.cache["blocks.1.attn.hook_pattern"][2, -1, 3].item()
    after = trace.cache.get("blocks.1.ln1_post.hook_scale", torch.ones(len(trace.tokens), 1))[-1].item()
    weight = pattern / target.scale(trace) / opened.scale(trace) / after
    z = trace.features[0][3]
    by_hand = [z[i].item() * weight * factors[i] for i in rows["feature"]]
    assert len(rows) > 5
    assert by_hand == pytest.approx(rows["contribution"].to_list(), rel=1e-4, abs=1e-6)
    one = connections.ov_connections(trace, target, 0, rows["feature"].iloc[0])
    through = one[(one["layer"] == 1) & (one["head"] == 2)]["input_invariant"].item()
    assert through == pytest.approx(factors[rows["feature"].iloc[0]], rel=1e-4, abs=1e-6)
    heads_between = [1] if trace.parallel else [1, 2]
    assert len(one) == 4 * len(heads_between)


def test_de_embeddings(trace):
    target = targets.feature(trace, 1, 4)
    direct = connections.de_embed(trace, target)
    assert list(direct) == sorted(direct, reverse=True) and len(direct) == 41
    row = tc.attribute(trace, target).query("kind == 'embedding'").iloc[0]
    word = trace.token_strings[-1]
    assert row["contribution"] * target.scale(trace) == pytest.approx(direct[word], rel=1e-4, abs=1e-6)
    extended = connections.de_embed_through_mlp0(trace, target)
    assert extended.loc[word, "direct"] == pytest.approx(direct[word], rel=1e-5, abs=1e-6)
    x, reader, cfg = trace.cache["hook_embed"][-1], target.reader, trace.model.cfg
    if not cfg.uses_rms_norm:
        x, reader = x - x.mean(), reader - reader.mean()
    if "blocks.0.ln2.hook_scale" in trace.cache:  # OLMo 2 has no norm there
        x = x / (x.square().mean() + cfg.eps).sqrt()
    by_hand = trace.transcoders[0](x) @ reader
    assert extended.loc[word, "through_mlp0"] == pytest.approx(by_hand.item(), rel=1e-4, abs=1e-5)


def test_logit_lens_is_what_the_logits_get(trace):
    table = tc.attribute(trace, targets.logit_difference(trace, "w3", "w8"))
    row = table[(table["kind"] == "feature") & (table["layer"] == 2)].iloc[0]
    lens = connections.logit_lens(trace, 2, row["feature"])
    assert lens["w3"] - lens["w8"] == pytest.approx(row["input_invariant"], rel=1e-3, abs=1e-5)


def test_data_weighted_by_hand(trace):
    model, transcoders = trace.model, trace.transcoders
    rows = torch.randint(0, 40, (6, 12), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 40
    index = int((trace.features[2] > 0).sum(0).argmax())
    got = connections.data_weighted(tc.ReplacementModel(model, transcoders), rows, 0, 2, index, batch_size=4)
    products, weighted, fired, count = 0.0, 0.0, 0.0, 0
    for row in rows[:2]:
        one = tc.trace(tc.ReplacementModel(model, transcoders), row, check_fit=False)
        for position in range(1, 12):
            z, count = one.features[2][position, index].item(), count + 1
            table = tc.attribute(one, targets.feature(one, 2, index, position))
            part = table[(table["kind"] == "feature") & (table["layer"] == 0)].set_index("feature")["contribution"]
            part = part.reindex(range(64), fill_value=0.0).astype(float)
            products, weighted, fired = products + part * (z > 0), weighted + part * z, fired + z
    short = connections.data_weighted(tc.ReplacementModel(model, transcoders), rows[:2], 0, 2, index)
    assert short["input_x_gradient"].to_numpy() == pytest.approx((products / count).to_numpy(), rel=1e-3, abs=1e-5)
    assert short["target_weighted"].to_numpy() == pytest.approx((weighted / fired).to_numpy(), rel=1e-3, abs=1e-5)
    assert got["input_invariant"].equals(short["input_invariant"])


def test_overlap():
    a = pd.Series(range(100), dtype=float)
    assert connections.overlap(a, a)["overlap"].to_list() == [1, 1, 1]
    assert connections.overlap(a, -a)["overlap"].to_list() == [0, 0, 0]
    assert connections.overlap(a, a)["chance"].to_list() == [0.1, 0.2, 0.5]


def test_three_ways_to_split_an_mlp_each_sum_to_it(trace):
    sae = Transcoder(TranscoderConfig(d_in=32, d_out=32, d_features=64, hook_in=hook_in(1), hook_out=hook_in(1)))
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(4))
    whole = (trace.cache[hook_out(1)][2] @ direction).item()
    for table in (
        factorisation.by_features(trace, 1, 2, direction),
        factorisation.by_neurons(trace, 1, 2, direction),
        factorisation.by_sae(trace, sae, 1, 2, direction),
    ):
        assert table["contribution"].sum() == pytest.approx(whole, abs=1e-4 * table["contribution"].abs().sum())
    # The Jacobian is a derivative.
    x, step = trace.cache[hook_in(1)][2], 1e-3 * torch.randn(32, generator=torch.Generator().manual_seed(5))
    block = trace.model.blocks[1]
    norm = Block.of(trace.model, 1).before_mlp
    gain, bias = (1, 0) if norm is None else (norm.gain, norm.bias)
    mlp = [block.mlp(((x + s) * gain + bias)[None, None])[0, 0] for s in (step, -step)]
    slope = factorisation.jacobian_pullback(trace, 1, x, direction) @ (2 * step)
    assert slope.item() == pytest.approx(((mlp[0] - mlp[1]) @ direction).item(), rel=2e-2, abs=1e-5)


def test_terms_holding():
    assert factorisation.terms_holding(pd.Series([5.0, -4.0, 0.5, 0.5])) == 2
    assert factorisation.terms_holding(pd.Series([1.0] * 10)) == 9


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda t: connections.pullback(t, targets.feature(t, 1, 0), 1), "written after layer 1 reads"),
        (lambda t: connections.pullback(t, targets.feature(t, 2, 0), 1, [(1, 0)]), "written after layer 1 reads"),
        (lambda t: connections.reader(t, targets.feature(t, 1, 0), [(2, 0)]), "head 2.0 does not come before"),
        (lambda t: connections.de_embed_through_mlp0(t, targets.feature(t, 0, 0)), "before MLP0 has written"),
        (
            lambda t: connections.data_weighted(tc.ReplacementModel(t.model, t.transcoders), t.tokens[None], 2, 1, 0),
            "the earlier one first",
        ),
        (lambda t: factorisation.by_sae(t, t.transcoders[1], 1, 0, torch.zeros(32)), "needs an SAE of"),
    ],
)
def test_wrong_questions_get_one_sentence(trace, ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(trace)
