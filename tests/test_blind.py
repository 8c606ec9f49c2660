"""Blind case studies: rules that can be wrong, seals that hold, decks and ratings without invented people."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import making.blind
import tclib as tc
from tclib import targets
from tclib.activations import hook_in, mlp_activations
from tclib.blind import rating, rules, sealed
from tclib.circuits.one_step import prompt_graph
from tclib.circuits.path_search import best_first
from tclib.evaluation import baselines
from tclib.tasks import case_studies, published
from tclib.text import LabelledText
from tclib.ui import blind_game
from tests.tiny import make_model

TOKENS = np.array([["\n", " a", " b", " c", " a", "12"], ["\n", " b", " b", " a", "34", ";"]], dtype=object)
LATENTS = np.array(
    [["bos", "plain", "verb.passive", "plain", "plain", "citation.year"]]
    + [["bos", "plain", "plain", "verb.active", "citation.year", "citation.semicolon"]],
    dtype=object,
)
TEXT = rules.Words(TOKENS, LATENTS, TOKENS != "\n")
LINES = [
    "tokens:  a| c",
    "tokens@-1:  b",
    "tokens@1: ;",
    "before 2:  b",
    r"regex: \d\d;?",
    "label: citation",
    "label: next verb",
    "!tokens:  a && label: plain",
    "tokens:  a || before 1:  a && !regex: b",
]


def held(line: str) -> list[list[int]]:
    return np.argwhere(rules.parse(line).hits(TEXT)).tolist()


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("tokens:  a| c", [[0, 1], [0, 3], [0, 4], [1, 3]]),
        ("tokens@-1:  b", [[0, 3], [1, 2], [1, 3]]),
        ("tokens@2: ;", [[1, 3]]),
        ("before 2:  b", [[0, 3], [0, 4], [1, 2], [1, 3], [1, 4]]),
        (r"regex: \d;", [[1, 5]]),
        (r"regex: a\d", [[0, 5], [1, 4]]),
        ("label: citation", [[0, 5], [1, 4], [1, 5]]),
        ("label: next verb", [[0, 1], [1, 2]]),
        ("latent: next verb", [[0, 1], [1, 2]]),  # its older name
        ("tokens:  a && !label: plain", [[1, 3]]),
        ("tokens: ; || tokens: 12 && label: citation.year", [[0, 5], [1, 5]]),
        ("tokens: \n", []),  # BOS
    ],
)
def test_rules_hold_where_they_say(line, where):
    assert held(line) == where


@pytest.mark.parametrize("line", LINES)
def test_a_rule_is_written_as_it_is_read(line):
    assert str(rules.parse(line)) == line
    assert held(str(rules.parse(line))) == held(line)


@given(st.sampled_from(LINES), st.sampled_from(LINES))
def test_rules_obey_logic(first, second):
    a, b = rules.parse(first), rules.parse(second)
    for left, right in [(~(a & b), ~a | ~b), (~(a | b), ~a & ~b), (~~a, a), (a & a, a)]:
        assert (left.hits(TEXT) == right.hits(TEXT)).all()
    assert not (a & ~a).hits(TEXT).any() and ((a | ~a).hits(TEXT) == TEXT.scored).all()


@given(st.integers(-8, 8))
def test_offsets_look_where_they_should(offset):
    found = rules.Tokens(" b", offset=offset).hits(TEXT)
    for row, pos in np.ndindex(*TOKENS.shape):
        there = pos + offset
        expected = 0 <= there < TOKENS.shape[1] and TOKENS[row, there] == " b" and TEXT.scored[row, pos]
        assert found[row, pos] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("the word caught", "clauses look like this"),
        ("before: a", "clauses look like this"),
        ("tokens 3: a", "clauses look like this"),
        ("regex: (", "no regular expression"),
        ("before 0:  a", "at least one token"),
        ("label@-1: verb", "clauses look like this"),
    ],
)
def test_a_bad_rule_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        rules.parse(line)


def test_an_unknown_label_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no label 'verb.pasive'.*citation.semicolon"):
        rules.Label("verb.pasive").hits(TEXT)


def random_text(rows: int = 30, length: int = 40, seed: int = 0) -> tuple[rules.Words, np.ndarray]:
    """A text, and a feature that fires on " a" after " b", strongly, and weakly on some of the rest."""
    generator = np.random.default_rng(seed)
    tokens = generator.choice(np.array([" a", " b", " c", " d"], dtype=object), (rows, length))
    tokens[:, 0] = "\n"
    text = rules.Words(tokens, np.full(tokens.shape, "plain", dtype=object), tokens != "\n")
    on = (rules.Tokens(" a") & rules.Tokens(" b", offset=-1)).hits(text)
    z = on * generator.uniform(5, 10, on.shape) + (generator.random(on.shape) < 0.1) * text.scored * 0.1
    return text, z


def test_scores_are_those_of_their_definitions():
    text, z = random_text()
    table = rules.score(rules.Tokens(" a"), text, z)
    hits, fires = rules.Tokens(" a").hits(text)[text.scored], z[text.scored] > 0
    both = (hits & fires).sum()
    assert table.value["precision"] == pytest.approx(both / hits.sum())
    assert table.value["recall"] == pytest.approx(both / fires.sum())
    assert table.value["f1"] == pytest.approx(2 * both / (hits.sum() + fires.sum()))
    assert table.value["correlation"] == pytest.approx(np.corrcoef(hits, z[text.scored])[0, 1])
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


def test_chance_is_the_rule_moved_along_the_text():
    text, z = random_text()
    table = rules.score(rules.Tokens(" a"), text, z, replicates=1, seed=3)
    hits, value = rules.Tokens(" a").hits(text)[text.scored], z[text.scored]
    draw = np.random.default_rng(3)
    draw.poisson(1.0, (1, len(z)))  # the bootstrap's
    moved = np.roll(hits, draw.integers(1, len(hits), 1))
    both = (moved & (value > 0)).sum()
    assert table.chance["precision"] == pytest.approx(both / hits.sum())
    assert table.chance["recall"] == pytest.approx(both / (value > 0).sum())
    assert table.chance["correlation"] == pytest.approx(np.corrcoef(moved, value)[0, 1])


def test_the_right_rule_beats_a_vague_one_and_a_wrong_one_is_chance():
    text, z = random_text()
    right = rules.score(rules.parse("tokens:  a && tokens@-1:  b"), text, z)
    vague, wrong = (rules.score(rules.Tokens(token), text, z) for token in (" a", " d"))
    assert right.value["correlation"] > 0.9 > vague.value["correlation"] > vague.chance_high["correlation"]
    assert right.low["correlation"] > vague.high["correlation"]
    assert wrong.value["correlation"] <= wrong.chance_high["correlation"]
    assert right.chance["precision"] == pytest.approx((z[text.scored] > 0).mean(), abs=0.05)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 100))
def test_the_scale_of_a_feature_does_not_matter(factor):
    text, z = random_text(rows=5)
    one, other = (rules.score(rules.Tokens(" a"), text, v, replicates=10) for v in (z, factor * z))
    assert np.allclose(one, other)


def test_a_perfect_rule_and_one_that_never_holds():
    text, _ = random_text()
    perfect = rules.score(rules.Tokens(" a"), text, rules.Tokens(" a").hits(text) * 2.0)
    assert np.allclose(perfect["value"], 1) and np.allclose(perfect["low"], 1)
    assert (rules.score(rules.Tokens("never"), text, rules.Tokens(" a").hits(text) * 2.0)["value"] == 0).all()


def test_scores_refuse_what_does_not_fit():
    text, z = random_text()
    with pytest.raises(ValueError, match="activations have shape"):
        rules.score(rules.Tokens(" a"), text, z[:5])
    with pytest.raises(ValueError, match="never fires on this text"):
        rules.score(rules.Tokens(" a"), text, 0 * z)


LAYER = 2


def random_tokens(model, rows: int) -> torch.Tensor:
    tokens = torch.randint(0, 40, (rows, 16), generator=torch.Generator().manual_seed(rows))
    tokens[:, 0] = model.tokenizer.bos_token_id
    return tokens


def fitted(model, d_features: int) -> dict[int, tc.Transcoder]:
    """Random encoders with the best decoders: transcoders that fit a random model without training."""
    layers = range(model.cfg.n_layers)
    acts = next(mlp_activations(model, random_tokens(model, 100), layers, batch_size=100))
    flat = {layer: (a.x.flatten(0, 1), a.y.flatten(0, 1)) for layer, a in acts.items()}
    return {layer: baselines.random_directions(layer, x, y, 12, d_features) for layer, (x, y) in flat.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model of three layers, its transcoders, a text and the last transcoder's activations."""
    model = make_model(tmp_path_factory.mktemp("blind"), layers=3)
    transcoders = fitted(model, 64)
    tokens = random_tokens(model, 12)
    text = LabelledText(tokens, np.full(tokens.shape, "plain", dtype=object))
    z = sealed.activations(model, tokens, {"units": transcoders[LAYER]})["units"]
    return model, transcoders, text, z


@pytest.fixture
def seal(world):
    model, transcoders, text, z = world
    index = int((z > 0).sum((0, 1)).argmax())
    return make_seal(world, index), index


def make_seal(world, index: int, **options) -> sealed.Seal:
    model, transcoders, text, z = world
    return sealed.Seal(tc.ReplacementModel(model, transcoders), LAYER, index, text.tokens, z[:, :, index], **options)


def test_activations_are_those_of_a_plain_pass(world):
    model, transcoders, text, z = world
    neurons = f"blocks.{LAYER}.mlp.hook_post"
    found = sealed.activations(model, text.tokens, {"z": transcoders[LAYER], "n": neurons}, batch_size=5)
    _, cache = model.run_with_cache(text.tokens)
    expected = transcoders[LAYER].encode(cache[hook_in(LAYER)])
    assert np.allclose(found["z"][:, 1:], expected[:, 1:], atol=1e-5) and np.array_equal(found["z"], z)
    assert np.allclose(found["n"][:, 1:], cache[neurons][:, 1:], atol=1e-5)
    assert (found["z"][:, 0] == 0).all() and (found["n"][:, 0] == 0).all()
    with pytest.raises(ValueError, match="has no blocks.7"):
        sealed.activations(model, text.tokens, {"n": "blocks.7.mlp.hook_post"})


def test_a_draw_is_its_seed_and_its_rule():
    fired = np.array([0, 5, 40, 31, 29, 30, 100])
    assert sealed.draw(fired, 4, seed=0) == [2, 3, 5, 6]
    assert sealed.draw(fired, 2, seed=3) == sealed.draw(fired, 2, seed=3)
    assert len({tuple(sealed.draw(fired, 2, seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="5 features cannot be drawn from the 4"):
        sealed.draw(fired, 5, seed=0)


def test_a_seal_holds_until_a_hypothesis_is_written(seal, world):
    seal, _ = seal
    with pytest.raises(sealed.SealedError, match="commit a hypothesis first"):
        seal.reveal()
    assert not seal.broken
    seal.commit(rules.Tokens("w1"), by="a")
    page = seal.reveal(top=2)
    assert seal.broken and page.count("<div") == 2 and "background-color" in page
    seal.commit(rules.Tokens("w2"), by="a")
    assert [h.when for h in seal.hypotheses] == ["blind", "after looking"]


def test_nothing_public_tells_a_token(seal, world):
    """The same circuit is told whatever the tokens are called, so long as the weights are the same."""
    seal, _ = seal
    public = {name: value for name, value in vars(seal).items() if not name.startswith("_")}
    assert public.keys() == {"name", "layer", "index", "restricted", "hypotheses", "broken", "activations"}
    assert not {"token", "position"} & set(seal.circuit()) and "token" not in set(seal.reading())
    assert set(seal.circuit()["offset"].map(lambda o: o == "start" or o <= 0)) == {True}


def test_shares_are_those_of_the_paths(seal, world):
    seal, _ = seal
    traced, target = seal._traces[0], seal._target(0)
    table = seal.circuit(0, share=0.01)
    paths = best_first(prompt_graph(traced), target, 0.01 * abs(target.value(traced)), limit=4_000).paths
    ends = [path for path in paths if path.nodes[-1].kind == "embedding"]
    assert table["share"].sum() == pytest.approx(sum(path.contribution for path in ends) / target.value(traced))
    assert table.attrs["remainder"] + table["share"].sum() == pytest.approx(1)
    here = sum(path.contribution for path in ends if path.nodes[-1].position == target.position)
    assert table.query("offset == 0")["share"].sum() == pytest.approx(here / target.value(traced), abs=1e-5)
    reading = seal.reading(0, share=0.01)
    assert reading["share"].sum() == pytest.approx(table["share"].sum()) and reading["routes"].sum() == len(table)


def test_what_a_route_prefers_is_told_by_the_weights(world, seal):
    model, transcoders, *_ = world
    seal, index = seal
    table = seal.circuit(0, share=0.0005)
    tip = table[table["route"].str.fullmatch(r"mlp0\[\d+\]@0")].iloc[0]
    f_enc = transcoders[0].W_enc[:, int(tip["route"].split("[")[1].split("]")[0])]
    best = (model.W_E @ (f_enc - f_enc.mean())).topk(6).indices
    assert list(tip["prefers"]) == [model.tokenizer.decode([i]) for i in best.tolist()]
    direct = model.W_E @ (transcoders[LAYER].W_enc[:, index] - transcoders[LAYER].W_enc[:, index].mean())
    assert seal.de_embed(top=3) == [model.tokenizer.decode([i]) for i in direct.topk(3).indices.tolist()]
    assert len(seal.de_embed_through_mlp0(top=5)) == len(seal.writes(5)) == 5


def test_a_restricted_seal_hides_mlp0(world, seal):
    seal, index = seal
    hidden = make_seal(world, index, restricted=True)
    open_table, table = seal.circuit(0, share=0.01), hidden.circuit(0, share=0.01)
    assert open_table["route"].str.contains("mlp0").any() and not table["route"].str.contains("mlp0").any()
    assert table["share"].sum() == pytest.approx(open_table["share"].sum())
    with pytest.raises(sealed.SealedError, match="restricted"):
        hidden.de_embed_through_mlp0()


def test_examples_are_strong_and_drawn_by_the_seed(world, seal):
    seal, index = seal
    z = world[3][:, :, index]
    assert min(seal.activations) >= z.max() / 2 and len(seal.activations) <= 3
    assert seal.activations == make_seal(world, index).activations
    with pytest.raises(ValueError, match="never fires"):
        sealed.Seal(tc.ReplacementModel(*world[:2]), LAYER, index, world[2].tokens, 0 * z)


def test_spread_counts_sources(world, seal):
    seal, index = seal
    table = tc.attribute(seal._traces[0], seal._target(0))
    assert 1 <= seal.spread() <= len(table)


def test_all_hypotheses_are_scored_whatever_they_are(world, seal):
    model, _, text, z = world
    seal, index = seal
    seal.commit(rules.Tokens("w1", "w2"), by="a")
    seal.commit(rules.Tokens("never"), by="b")
    table = seal.scores(rules.words(model, text), z[:, :, index])
    assert table["by"].tolist() == ["a", "b"] and table["correlation"].iloc[1] == 0
    assert {"precision", "recall", "correlation", "low", "high", "chance", "when"} <= set(table)


def test_words_of_a_text(world):
    model, _, text, _ = world
    words = rules.words(model, text)
    assert (words.tokens[:, 0] == "\n").all() and not words.scored[:, 0].any()
    assert words.tokens[0, 1] == model.tokenizer.decode([int(text.tokens[0, 1])])


def sources(seed: int = 0) -> tuple[rules.Words, dict[str, np.ndarray]]:
    text, _ = random_text(seed=seed)
    generator = np.random.default_rng(seed)
    shape = (*text.tokens.shape, 20)
    return text, {name: np.maximum(generator.normal(-1, 1, shape), 0) for name in ("transcoder", "SAE", "neurons")}


def test_a_deck_hides_its_sources_and_their_scale():
    text, acts = sources()
    items, key = rating.deck(text, acts, each=10, seed=1)
    assert len(items) == 30 and key["source"].value_counts().eq(10).all()
    assert key["source"].tolist() != sorted(key["source"])
    scaled, same_key = rating.deck(text, {name: 1000 * z for name, z in acts.items()}, each=10, seed=1)
    assert scaled == items and same_key.equals(key)
    for item in items:
        assert {step for row in item.steps for step in row} <= set(range(rating.STEPS + 1))
        assert max(map(max, item.steps)) == rating.STEPS
        assert not any(name in item.html() for name in acts)


def test_a_deck_needs_enough_live_units():
    text, acts = sources()
    with pytest.raises(ValueError, match="SAE has 0 live units"):
        rating.deck(text, acts | {"SAE": 0 * acts["SAE"]}, each=10)
    with pytest.raises(ValueError, match="activations have shape"):
        rating.deck(text, {"SAE": acts["SAE"][:3]}, each=10)


def test_nobody_has_rated_until_somebody_has(tmp_path):
    text, acts = sources()
    items, key = rating.deck(text, acts, each=5)
    sheet = rating.blank(items, "anna")
    empty = rating.summary(sheet, key)
    assert (empty[["share", "low", "high"]] == "not rated").all(axis=None) and (empty["not rated"] == 5).all()
    mine = key.index[key["source"] == "SAE"][:4]
    sheet.loc[mine, "rating"] = ["interpretable", "interpretable", "maybe", "not"]
    rating.write_ratings(sheet, tmp_path / "r.csv")
    table = rating.summary(rating.read_ratings(tmp_path / "r.csv"), key)
    assert table.loc["SAE", ["interpretable", "maybe", "not", "not rated"]].tolist() == [2, 1, 1, 1]
    assert table.loc["SAE", "share"] == 0.5 and table.loc["neurons", "share"] == "not rated"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,rater,rating\na,b,not\n", "has columns"),
        ("item,rater,rating,context_free\na,b,good,no\n", "rating is 'good'"),
        ("item,rater,rating,context_free\na,b,not,perhaps\n", "context_free is 'perhaps'"),
        ("item,rater,rating,context_free\na,b,not,no\na,b,maybe,no\n", "rated twice"),
    ],
)
def test_a_damaged_sheet_is_refused(tmp_path, text, message):
    (tmp_path / "r.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        rating.read_ratings(tmp_path / "r.csv")


def test_wilson_of_the_published_counts():
    assert rating.wilson(41, 50) == pytest.approx((0.82, 0.6920, 0.9023), abs=1e-4)
    for wrong in [(1, 0), (3, 2), (-1, 5)]:
        with pytest.raises(ValueError, match="is no share"):
            rating.wilson(*wrong)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_stays_within_bounds(pair):
    share, low, high = rating.wilson(*pair)
    assert -1e-12 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 + 1e-12 and low < high


def raters(table: dict[tuple[str, str], int]) -> tuple[pd.Series, pd.Series]:
    pairs = [pair for pair, count in table.items() for _ in range(count)]
    return pd.Series([a for a, _ in pairs]), pd.Series([b for _, b in pairs])


def test_kappa_of_a_known_table():
    a, b = raters({("maybe", "maybe"): 20, ("maybe", "not"): 5, ("not", "maybe"): 10, ("not", "not"): 15})
    found = rating.kappa(a, b)
    assert found["kappa"] == pytest.approx(0.4) and found["agreement"] == pytest.approx(0.7)
    assert found["chance"] == pytest.approx(0.5) and found["low"] < 0.4 < found["high"] and found["items"] == 50
    assert rating.kappa(b, a)["kappa"] == pytest.approx(0.4)


def test_kappa_at_its_ends():
    a, b = raters({("maybe", "maybe"): 5, ("not", "not"): 5})
    assert rating.kappa(a, b)["kappa"] == 1 and rating.kappa(a, b)["low"] == 1
    opposite, _ = raters({("not", "maybe"): 5, ("maybe", "not"): 5})
    assert rating.kappa(a, opposite)["kappa"] == -1
    always = pd.Series(["not"] * 4)
    assert np.isnan(rating.kappa(always, always)["kappa"])


def test_kappa_counts_what_both_have_rated():
    a, b = raters({("maybe", "maybe"): 3, ("not", "not rated"): 4, ("not", "maybe"): 2})
    assert rating.kappa(a, b)["items"] == 5
    with pytest.raises(ValueError, match="rated by both"):
        rating.kappa(a, pd.Series(["not rated"] * len(a)))


def test_the_game_is_played_by_setting_values(world, seal):
    model, _, text, z = world
    seal, index = seal
    game = blind_game.Game(seal, rules.words(model, text), z[:, :, index])
    game.reveal.value = True
    assert "run this notebook" in game._repr_mimebundle_()["text/plain"]
    assert "commit a hypothesis first" in game.message.value and not game.reveal.value and not seal.broken
    game.rule.value = "nonsense"
    assert "no clause of a rule" in game.message.value and not seal.hypotheses
    game.rule.value = "label: nothing"
    assert "no label" in game.message.value and not seal.hypotheses
    game.rule.value = "tokens: w1|w2"
    assert game.message.value == "" and "tokens: w1|w2" in game.scores.value
    game.reveal.value = True
    assert seal.broken and "background-color" in game.text.value
    game.rule.value = "tokens: w3"
    assert seal.hypotheses[-1].when == "after looking" and "after looking" in game.scores.value


def test_ratings_are_kept_at_once_and_found_again(tmp_path):
    text, acts = sources()
    items, _ = rating.deck(text, acts, each=2)
    first = blind_game.Rating(items, tmp_path / "r.csv", "anna")
    assert not (tmp_path / "r.csv").exists()  # looking is not rating
    first.rating.value = "maybe"
    first.number.value = 3
    assert first.rating.value == "not rated" and first.text.value == items[2].html()
    first.rating.value, first.context_free.value = "not", "yes"
    assert first.done.value == "2 of 6 rated"
    kept = rating.read_ratings(tmp_path / "r.csv")
    assert kept["rating"].tolist() == ["maybe", "not rated", "not", "not rated", "not rated", "not rated"]
    again = blind_game.Rating(items, tmp_path / "r.csv", "anna")
    assert again.rating.value == "maybe" and again.done.value == "2 of 6 rated"
    with pytest.raises(ValueError, match="another rater"):
        blind_game.Rating(items, tmp_path / "r.csv", "bert")


def test_activation_is_that_of_a_trace(world):
    model, transcoders, text, _ = world
    prompt = text.tokens[0]
    traced = tc.trace(tc.ReplacementModel(model, transcoders), prompt, check_fit=False)
    index = int(traced.features[LAYER][5].argmax())
    ours = case_studies.activation(tc.ReplacementModel(model, transcoders), prompt, LAYER, index, position=5)
    assert ours == pytest.approx(traced.features[LAYER][5, index].item(), rel=1e-4)
    replaced = case_studies.activation(
        tc.ReplacementModel(model, transcoders), prompt, LAYER, index, position=5, replaced=range(LAYER)
    )
    assert replaced != pytest.approx(ours)


def test_patching_a_prompt_into_itself_changes_nothing(world):
    model, transcoders, text, _ = world
    one, other = text.tokens[0], text.tokens[1]
    nothing = case_studies.patches(tc.ReplacementModel(model, transcoders), one, one, LAYER, 3, position=4)
    assert nothing[["keys_and_values", "values"]].abs().max(axis=None) < 1e-4
    assert len(nothing) == (LAYER + 1) * model.cfg.n_heads
    table = case_studies.patches(tc.ReplacementModel(model, transcoders), one, other, LAYER, 3, position=4)
    something = table.set_index(["layer", "head"]).loc[1, 2]
    assert something[["keys_and_values", "values"]].abs().min() > 1e-4
    with pytest.raises(ValueError, match="one length"):
        case_studies.patches(tc.ReplacementModel(model, transcoders), one, other[:-1], LAYER, 3, position=4)


def test_values_alone_are_what_attribution_predicts(world):
    """With the pattern as it is, the change of a last-layer head's output is linear in its value."""
    model, transcoders, text, _ = world
    one, other = text.tokens[0], text.tokens[1]
    table = case_studies.patches(tc.ReplacementModel(model, transcoders), one, other, LAYER, 3, position=4)
    traces = [tc.trace(tc.ReplacementModel(model, transcoders), prompt, check_fit=False) for prompt in (one, other)]
    reads = targets.feature(traces[0], LAYER, 3)
    change = traces[1].cache[f"blocks.{LAYER}.attn.hook_v"][4, 1] - traces[0].cache[f"blocks.{LAYER}.attn.hook_v"][4, 1]
    weight = traces[0].cache[f"blocks.{LAYER}.attn.hook_pattern"][1, -1, 4]
    predicted = weight * (change @ model.W_O[LAYER, 1] @ reads.pulled_back(traces[0]))
    # The LayerNorm scale moves a little with the patch; its sign and size must be right.
    values = table.set_index(["layer", "head"]).loc[(LAYER, 1), "values"]
    assert values == pytest.approx(predicted.item(), rel=0.3, abs=0.05)


def test_the_published_cases_fill_the_ledger(tmp_path):
    """On a random model of the right depth: every number has its place among the published ones."""
    model = make_model(tmp_path, layers=9, d_model=48, heads=12)
    numbers = case_studies.published_cases(tc.ReplacementModel(model, fitted(model, 400)))
    assert all(np.isfinite(value) for value in numbers.values())
    entries = sorted({key.split("/")[0] for key in numbers})
    table = published.ledger(entries, on_gpt2=numbers)
    assert (table["ours on GPT-2"] != "not run").all() and (table["ours here"] == "not run").all()


def test_the_shipped_pair_is_matched():
    pair = {name: tc.Transcoder.load(tc.data_path("blind") / name) for name in ("transcoder", "sae")}
    configs = [dictionary.config.model_dump() for dictionary in pair.values()]
    for same in ("d_in", "d_out", "d_features", "k", "activation", "hook_out"):
        assert configs[0][same] == configs[1][same]
    assert configs[0]["hook_in"] == hook_in(2) and configs[1]["hook_in"] == configs[1]["hook_out"]
    trained = [config["training"] for config in configs]
    assert {key for key in trained[0] if trained[0][key] != trained[1][key]} == {"kind", "tied"}


def test_the_making_of_the_pair(tmp_path, monkeypatch, capsys):
    options = "--steps 2 --rows 2 --d-features 32 --k 4 --text-rows 4".split()
    monkeypatch.setattr(sys, "argv", ["blind", "--run", str(tmp_path / "r"), "--out", str(tmp_path / "o"), *options])
    making.blind.main()
    assert {p.name for p in (tmp_path / "o").iterdir()} >= {"sae.json", "transcoder.safetensors"}
    assert "sae" in capsys.readouterr().out
