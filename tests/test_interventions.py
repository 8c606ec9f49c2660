"""Interventions do what they say and leave the model as it was."""

import warnings

import pandas as pd
import pytest
import torch

import tclib as tc
from tclib import interventions, targets
from tclib.activations import hook_in, hook_out
from tclib.circuits import validation
from tests.tiny import make_model, make_transcoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture()
def tokens():
    rows = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 40
    return rows


def outputs(model, tokens, hooks, name):
    seen = {}
    watch = (name, lambda value, hook: seen.update(value=value.clone()))
    interventions.run(model, tokens, [*hooks, watch])
    return seen["value"]


def test_replacing_and_keeping_every_feature_are_the_same(model, tokens):
    transcoder = make_transcoder(1)
    replaced = interventions.run(model, tokens, interventions.replace_mlp(1, transcoder))
    kept = interventions.run(model, tokens, interventions.keep_features(1, transcoder, range(64)))
    torch.testing.assert_close(replaced, kept)
    assert not torch.allclose(replaced, model(tokens), atol=1e-2)


def test_keep_holds_the_rest_at_its_value(model, tokens):
    transcoder = make_transcoder(1)
    rest = torch.rand(64)
    hooks = interventions.keep_features(1, transcoder, [3, 5], rest, positions=-1)
    x = outputs(model, tokens, [], hook_in(1))
    z = rest.repeat(3, 1)
    z[:, [3, 5]] = transcoder.encode(x[:, -1])[:, [3, 5]]
    got = outputs(model, tokens, hooks, hook_out(1))
    torch.testing.assert_close(got[:, -1], transcoder.decode(z))
    torch.testing.assert_close(got[:, :-1], outputs(model, tokens, [], hook_out(1))[:, :-1])


def test_setting_a_feature_moves_the_output_by_its_decoder_row(model, tokens):
    transcoder = make_transcoder(0)
    x = outputs(model, tokens, [], hook_in(0))
    z = transcoder.encode(x)[..., 7]
    got = outputs(model, tokens, interventions.set_features(0, transcoder, [7], 2.0), hook_out(0))
    moved = got - outputs(model, tokens, [], hook_out(0))
    torch.testing.assert_close(moved, (2.0 - z)[..., None] * transcoder.W_dec[7], atol=1e-4, rtol=1e-4)


def test_ablations(model, tokens):
    assert outputs(model, tokens, interventions.ablate_mlp(0), hook_out(0)).abs().max() == 0
    mean = torch.randn(32)
    got = outputs(model, tokens, interventions.ablate_mlp(0, mean, positions=-1), hook_out(0))
    torch.testing.assert_close(got[:, -1], mean.expand(3, 32))
    z = outputs(model, tokens, interventions.ablate_head(1, 2), "blocks.1.attn.hook_z")
    assert z[:, :, 2].abs().max() == 0 and z[:, :, 1].abs().max() > 0


def test_an_sae_of_the_output_reconstructs_the_output(model, tokens):
    sae = make_transcoder(0)
    sae.config = sae.config.model_copy(update={"hook_in": hook_out(0)})
    y = outputs(model, tokens, [], hook_out(0))
    torch.testing.assert_close(outputs(model, tokens, interventions.replace_mlp(0, sae), hook_out(0)), sae(y))


def test_the_model_is_restored_also_after_an_error(model, tokens):
    before = model(tokens)

    def broken(value, hook):
        raise KeyboardInterrupt

    hooks = [*interventions.ablate_mlp(0), (hook_out(1), broken)]
    with pytest.raises(KeyboardInterrupt):
        interventions.run(model, tokens, hooks)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("positions", [-1, slice(2, 5), [1, 3, 6]], ids=str)
def test_set_and_remove_at_chosen_positions_of_many_prompts(model, tokens, positions):
    transcoder = make_transcoder(0)
    x, y = outputs(model, tokens, [], hook_in(0)), outputs(model, tokens, [], hook_out(0))
    z = transcoder.encode(x)[..., [7, 9]]
    for hooks, new in (
        (interventions.set_features(0, transcoder, [7, 9], 2.0, positions), torch.full_like(z, 2.0)),
        (interventions.set_features(0, transcoder, [7, 9], 0.0, positions), torch.zeros_like(z)),
    ):
        expected = y.clone()
        expected[:, positions] += ((new - z) @ transcoder.W_dec[[7, 9]])[:, positions]
        torch.testing.assert_close(outputs(model, tokens, hooks, hook_out(0)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["patterns", "scales", "values", "mlps"])
def test_what_is_held_does_not_answer_and_the_rest_does(model, tokens, what):
    edit = interventions.set_features(0, make_transcoder(0), [7], 5.0)
    name = {
        "patterns": "blocks.1.attn.hook_pattern", "scales": "blocks.1.ln1.hook_scale",
        "values": "blocks.1.attn.hook_v", "mlps": hook_out(1),
    }[what]  # fmt: skip
    _, cache = model.run_with_cache(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = outputs(model, tokens, interventions.freeze(cache, [what]) + edit, name)
    assert torch.equal(held, cache[name])
    assert not torch.allclose(outputs(model, tokens, edit, name), cache[name], atol=1e-3)
    torch.testing.assert_close(model(tokens), interventions.run(model, tokens, interventions.freeze(cache, [what])))


KINDS = [("gpt2", True, {}), ("gpt2", False, {}), ("neox", True, {}), ("neox", False, {"activation": "topk", "k": 8})]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def trace(request, tmp_path_factory):
    blocks, processed, config = request.param
    model = make_model(tmp_path_factory.mktemp("model"), layers=3, seed=1, blocks=blocks, processed=processed)
    model, transcoders = (
        model.double(),
        {layer: make_transcoder(layer, seed=2, **config).double() for layer in range(3)},
    )
    return tc.trace(tc.ReplacementModel(model, transcoders), "w1 w5 w2 w9 w4", check_fit=False)


def strongest(trace, layer, position, count=3):
    index = trace.features[layer][position].topk(count).indices.tolist()
    return [{"layer": layer, "position": position, "feature": i} for i in index]


LINEAR = ["patterns", "scales", "mlps"]


def test_removing_a_feature_changes_a_later_one_by_its_row_in_the_table(trace):
    """Everything held: the direct path, by the rows of `tclib.attribute` themselves."""
    target = targets.feature(trace, 2, 9)
    table = tc.attribute(trace, target)
    rows = table[table["kind"] == "feature"].head(10)
    measured = validation.measure(trace, rows, [target], [*LINEAR, "values"])[:, 0]
    assert measured.numpy() == pytest.approx(-rows["contribution"].to_numpy(), abs=1e-9)
    assert abs(measured).max() > 1e-2


def test_through_attention_the_opened_heads_predict_it(trace):
    """Values free: what the heads carry arrives as well, one head after the other."""
    target = targets.logit_difference(trace, "w1", "w2")
    removed = pd.DataFrame(strongest(trace, 0, 3) + strongest(trace, 0, 5))
    expected, queue = [0.0] * len(removed), [target]
    while queue:
        current = queue.pop()
        table = tc.attribute(trace, current)
        for i, edit in enumerate(removed.itertuples()):
            same = (table["kind"] == "feature") & (table["layer"] == edit.layer) & (table["feature"] == edit.feature)
            expected[i] -= table.loc[same & (table["position"] == edit.position), "contribution"].sum()
        for row in table[(table["kind"] == "head") & (table["layer"] > 0)].itertuples():
            if row.position >= 3:
                queue.append(targets.head_source(trace, current, row.layer, row.head, row.position))
    measured = validation.measure(trace, removed, [target], LINEAR)[:, 0]
    assert measured.numpy() == pytest.approx(expected, abs=1e-9)
    both = validation.compare(trace, removed, [target], LINEAR)
    assert both["predicted"].to_numpy() == pytest.approx(expected, abs=1e-9)
    assert both["measured"].to_numpy() == pytest.approx(expected, abs=1e-9)


def test_new_activations_and_many_targets(trace):
    changed = pd.DataFrame(strongest(trace, 0, 2) + strongest(trace, 1, -1)).assign(new=2.5)
    asked = [targets.feature(trace, 2, 9), targets.feature(trace, 1, 4, position=3), targets.logit(trace, "w3")]
    for held in (LINEAR, [*LINEAR, "values"]):
        table = validation.compare(trace, changed, asked, held)
        assert table["measured"].to_numpy() == pytest.approx(table["predicted"].to_numpy(), abs=1e-9)
    assert len(table) == 6 and set(table["position"]) == {5}  # directly, and only later layers at the same token


def test_with_nothing_held_the_model_answers_differently(trace):
    before = trace.model(trace.tokens[None])
    removed = pd.DataFrame(strongest(trace, 0, 3))
    table = validation.compare(trace, removed, [targets.logit(trace, "w3")])
    assert (table["predicted"] - table["measured"]).abs().max() > 1e-3
    hooks = interventions.set_features(0, trace.transcoders[0], [removed["feature"][0]], 0.0, positions=3)
    after = interventions.run(trace.model, trace.tokens[None], hooks)[0, -1]
    target = targets.logit_difference(trace, "w3", "w4")
    measured = validation.measure(trace, removed, [target])[0, 0]
    assert measured.item() == pytest.approx(((after[3] - after[4]) - (before[0, -1, 3] - before[0, -1, 4])).item())
    assert torch.equal(trace.model(trace.tokens[None]), before)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"layer": 5, "position": 1, "feature": 0}, "layer 5 is outside the model"),
        ({"layer": 0, "position": 9, "feature": 0}, "position 9 is outside the prompt"),
        ({"layer": 0, "position": 1, "feature": 64}, "feature 64 is outside"),
        ({"layer": 0, "position": 1}, "no column feature"),
        ({"layer": 0, "position": 1, "feature": None}, "is silent at 1"),
    ],
)
def test_wrong_edits_get_one_sentence(trace, edit, sentence):
    if edit.get("feature", 0) is None:
        edit = edit | {"feature": int((trace.features[0][1] == 0).nonzero()[0])}
    with pytest.raises(ValueError, match=sentence):
        validation.compare(trace, pd.DataFrame([edit]), [targets.logit(trace, "w3")])


def test_a_prediction_through_skip_paths_needs_free_mlps(model):
    skips = {layer: make_transcoder(layer, skip=True) for layer in (0, 1)}
    trace = tc.trace(tc.ReplacementModel(model, skips), "w1 w5 w2", check_fit=False)
    removed, target = pd.DataFrame(strongest(trace, 0, -1, 1)), targets.logit(trace, "w3")
    with pytest.raises(ValueError, match="frozen MLPs cut"):
        validation.compare(trace, removed, [target], LINEAR)
    table = validation.compare(trace, removed, [target], [*LINEAR, "values"])
    assert table["measured"].item() == pytest.approx(table["predicted"].item(), abs=1e-3)


def test_wrong_requests_get_one_sentence(model, tokens):
    with pytest.raises(ValueError, match="'softmax'.*cannot be frozen"):
        interventions.freeze({}, ["softmax"])
    with pytest.raises(ValueError, match="no attn.hook_v"):
        interventions.freeze({}, ["values"])
    with pytest.raises(ValueError, match="cannot replace the MLP of layer 0"):
        interventions.replace_mlp(0, make_transcoder(1))
    with pytest.raises(ValueError, match="feature 64 is outside the transcoder, which has features 0 to 63"):
        interventions.keep_features(0, make_transcoder(0), [64])
