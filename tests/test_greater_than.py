"""Greater-than: prompts, metrics on tables made by hand, and units kept on a random model."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from making import measure
from tclib.chronicle import BACKWARD, SPANS
from tclib.interventions import ablate_mlp
from tclib.model import load_model
from tclib.tasks import greater_than as gt
from tclib.tasks import unit_sweep
from tests.tiny import make_transcoder

BOS = "<|endoftext|>"
TEMPLATES = (gt.TEMPLATE, gt.BACKWARD_TEMPLATE)


def make_tokenizer(digits: int = 2, missing: tuple[str, ...] = (), whole: tuple[str, ...] = ()):
    """Words and numbers of ``digits`` digits, "long siege" in two tokens; ``whole`` years are one token."""
    vocabulary = "<unk> siege".split() + [f" {w}" for w in "war siege long the to from year in it".split()]
    numbers = [f"{n:02d}" for n in range(100)] if digits == 2 else [str(n) for n in range(10)]
    vocabulary += [space + n for n in numbers for space in ("", " ") if n not in missing] + list(whole)
    vocabulary += ["The", " lasted", " ended", " began", ";", BOS]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(vocabulary)}, unk_token="<unk>"))
    exceptions = "".join(f"{year}|" for year in whole)
    pattern = Regex(rf"{exceptions} ?[0-9]{{1,{digits}}}| ?[a-zA-Z]+|;")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    bos = tokenizer.bos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=20, n_embd=32, n_layer=3, n_head=4, bos_token_id=bos, eos_token_id=bos
    )
    network = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Two lengths, two centuries."""
    return gt.prompts(tokenizer, ["war", "long siege"], [11, 17], range(2, 99, 8))


# ---------------------------------------------------------------- prompts


def test_prompts_are_what_they_say(tokenizer, prompts):
    assert [group.shape[1] for group in prompts.groups] == [13, 14]  # BOS first
    texts = [tokenizer.decode(row[1:]).replace(" ", "") for group in prompts.groups for row in group]
    expected = [gt.fill(gt.TEMPLATE, n, c, y).replace(" ", "") for n, c, y in prompts.frame.itertuples(index=False)]
    assert texts == expected
    ids = gt.year_tokens(tokenizer)
    of_start = torch.cat([group[:, -5] for group in prompts.groups])
    assert torch.equal(of_start, ids[prompts.years])
    assert prompts.dropped.empty


def test_rows_of_batches_are_rows_of_the_frame(prompts):
    rows = [i for tokens, rows in prompts.batches(5) for i in range(len(prompts.frame))[rows]]
    assert rows == list(range(len(prompts.frame)))
    assert max(len(tokens) for tokens, _ in prompts.batches(5)) == 5


def test_prompts_of_several_lengths_are_not_one_tensor(prompts, tokenizer):
    with pytest.raises(ValueError, match="take .groups"):
        _ = prompts.tokens
    one = gt.prompts(tokenizer, ["war"], [17])
    assert one.tokens.shape == (97, 13)


def odd_years(tokenizer, century):
    """The YY of a century that the tokenizer does not write as one token for the century and one for YY.

    GPT-2's tokenizer: 214 of the years 1000 to 1999, the whole 1900s among them.
    """
    year_ids = gt.year_tokens(tokenizer).tolist()
    encoded = tokenizer([f" {century}{year:02d}" for year in range(100)], add_special_tokens=False)["input_ids"]
    return [year for year, ids in enumerate(encoded) if ids[1:] != [year_ids[year]]]


def test_years_written_otherwise_are_dropped_and_named():
    tokenizer = make_tokenizer(whole=(" 1732", " 1800"))
    assert odd_years(tokenizer, 17) == [32]
    assert odd_years(tokenizer, 18) == [0]
    assert odd_years(tokenizer, 16) == []
    found = gt.prompts(tokenizer, ["war", "siege"], [17, 18], range(100))
    assert found.dropped.values.tolist() == [[17, 32], [18, 0]]
    assert len(found.frame) == 2 * 198
    with pytest.raises(ValueError, match="writes none of these years .* 1732"):
        gt.prompts(tokenizer, ["war"], [17], [32])


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (make_tokenizer(missing=("07", "41")), r"2 of 00 to 99 are not one token \(07, 41\)$"),
        (make_tokenizer(digits=1), r"100 of 00 to 99 are not one token \(00, 01, 02, 03, 04, ...\)$"),
    ],
)
def test_unsuitable_tokenizers_are_refused(tokenizer, message):
    for call in (gt.year_tokens, lambda t: odd_years(t, 17), lambda t: gt.prompts(t, ["war"])):
        with pytest.raises(ValueError, match=message):
            call(tokenizer)


@pytest.mark.parametrize(
    "template", ["The NOUN of XXYY", "XXYY to XX", "The NOUN of XXYY to XX.", "NOUN XXYY XXYY XX", "NOUN YY XXYY XX"]
)
def test_bad_templates_are_refused(tokenizer, template):
    with pytest.raises(ValueError, match="template .* needs"):
        gt.prompts(tokenizer, ["war"], template=template)


@pytest.mark.parametrize("asked", [dict(nouns=[]), dict(years=[]), dict(years=[100]), dict(centuries=[])])
def test_empty_or_impossible_requests_are_refused(tokenizer, asked):
    with pytest.raises(ValueError, match="at least one noun"):
        gt.prompts(tokenizer, **{"nouns": ["war"], **asked})


def test_prompt_files(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text(f"# mine\n{gt.TEMPLATE}\n\n{gt.BACKWARD_TEMPLATE}\n", encoding="utf-8")
    assert gt.read_templates(path) == list(TEMPLATES)
    path.write_text("The NOUN of XXYY to XX\nThe war of XXYY to XX\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'The war of XXYY to XX' needs NOUN"):
        gt.read_templates(path)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no template"):
        gt.read_templates(path)
    with pytest.raises(ValueError, match="there is no prompt file"):
        gt.read_templates(tmp_path / "absent.txt")


@pytest.mark.parametrize("kind", ["train", "heldout"])
def test_chronicle_templates_are_templates(kind):
    found = gt.chronicle_templates(kind)
    assert found
    for template in found:
        gt.check_template(template)


def test_gpt2_cannot_express_214_years():
    """With the files of GPT-2's tokenizer in the folder named by TCLIB_GPT2_TOKENIZER."""
    folder = os.environ.get("TCLIB_GPT2_TOKENIZER")
    if not folder:
        pytest.skip("set TCLIB_GPT2_TOKENIZER to a folder with GPT-2's tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    odd = {century: len(odd_years(tokenizer, century)) for century in range(10, 20)}
    assert sum(odd.values()) == 214 and odd[19] == 100


def test_repeated_nouns_are_refused(tokenizer):
    with pytest.raises(ValueError, match="only once"):
        gt.prompts(tokenizer, ["war", "war"])


# ---------------------------------------------------------------- metrics

YEARS = torch.arange(2, 99)
UNIFORM = torch.full((97, 100), 0.01)


def always(number: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.full((97,), number), 100).float()


def test_metrics_on_tables_made_by_hand():
    probs = torch.zeros(2, 100)
    probs[0, [31, 32, 33, 90]] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    probs[1, [31, 32, 33]] = torch.tensor([0.5, 0.5, 0.0])
    years = torch.tensor([32, 32])
    assert_close(gt.probability_difference(probs, years), torch.tensor([0.4, -1.0]))
    assert_close(gt.sharpness(probs, years), torch.tensor([0.2, -0.5]))
    assert_close(gt.kl_to(probs, probs), torch.zeros(2))
    expected = 0.5 * torch.tensor([0.5 / 0.1, 0.5 / 0.2]).log().sum()
    assert_close(gt.kl_to(probs[1:], probs[:1])[0], expected)
    assert_close(gt.behaviour_matrix(probs, years), probs.mean(dim=0, keepdim=True))


def test_always_99_games_the_difference():
    assert_close(gt.probability_difference(always(99), YEARS), torch.ones(97))
    assert gt.sharpness(always(99), YEARS).mean() < 0.02


def test_a_perfect_comparer_has_differences_1_and_minus_1():
    forward = torch.stack([(torch.arange(100) > y) / (99 - y) for y in YEARS])
    backward = torch.stack([(torch.arange(100) < y) / y for y in YEARS])
    assert_close(gt.probability_difference(forward, YEARS), torch.ones(97))
    assert_close(gt.probability_difference(backward, YEARS), -torch.ones(97))
    assert (gt.sharpness(forward, YEARS) > 0).all()


def test_uniform_answers_have_the_known_value():
    assert_close(gt.probability_difference(UNIFORM, YEARS), (99 - YEARS - (YEARS + 1)) / 100)
    assert_close(gt.sharpness(UNIFORM, YEARS), torch.zeros(97))
    assert gt.behaviour_matrix(UNIFORM, YEARS).shape == (97, 100)


def test_softmax_is_over_the_100_tokens_only():
    logits = torch.randn(3, 250)
    ids = torch.randperm(250)[:100]
    probs = gt.year_probabilities(logits, ids)
    logits[:, [i for i in range(250) if i not in set(ids.tolist())]] = 50.0
    assert_close(gt.year_probabilities(logits, ids), probs)
    assert_close(probs.sum(dim=1), torch.ones(3))


def test_mean_logit_difference_is_of_logits_not_of_probabilities():
    logits = torch.randn(97, 100, dtype=torch.float64)
    ours = gt.mean_logit_difference(logits.softmax(-1), YEARS)
    by_hand = [row[y + 1 :].mean() - row[: y + 1].mean() for row, y in zip(logits, YEARS, strict=True)]
    assert_close(ours, torch.stack(by_hand))
    with pytest.raises(ValueError, match="up to 98"):
        gt.mean_logit_difference(logits[:1].softmax(-1), torch.tensor([99]))


@pytest.mark.parametrize("year", [0, 99])
def test_sharpness_refuses_years_at_the_edge(year):
    with pytest.raises(ValueError, match="between 01 and 98"):
        gt.sharpness(UNIFORM, torch.tensor([year]))


@st.composite
def tables(draw):
    """A table of answers with their years."""
    n = draw(st.integers(1, 6))
    seed, temperature = draw(st.integers(0, 2**31)), draw(st.floats(0.01, 20))
    generator = torch.Generator().manual_seed(seed)
    logits = temperature * torch.randn(n, 100, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=1), torch.randint(1, 99, (n,), generator=generator)


@settings(deadline=None)
@given(tables())
def test_bounds(table):
    probs, years = table
    for metric in (gt.probability_difference, gt.sharpness):
        assert (metric(probs, years).abs() <= 1 + 1e-9).all()
    assert (gt.kl_to(probs, probs.roll(1, 0)) >= -1e-9).all()


@settings(deadline=None)
@given(tables())
def test_mirrored_answers_change_the_sign(table):
    """Number n becomes 99 - n and year y becomes 99 - y: sharpness only changes its sign, and the difference does
    but for p(YY), which counts as not greater both times."""
    probs, years = table
    mirrored, mirrored_years = probs.flip(1), 99 - years
    assert_close(gt.sharpness(mirrored, mirrored_years), -gt.sharpness(probs, years))
    equal = probs.gather(1, years[:, None])[:, 0]
    total = gt.probability_difference(probs, years) + gt.probability_difference(mirrored, mirrored_years)
    assert_close(total, -2 * equal)


def test_means_are_over_years_within_noun_and_century(prompts):
    frame = prompts.frame
    values = torch.tensor(frame[["century", "year"]].to_numpy(), dtype=torch.float64)
    means = gt.mean_over_years(values, prompts)
    assert_close(means[:, 0], values[:, 0])
    assert_close(means[:, 1], torch.full((len(frame),), frame["year"].mean(), dtype=torch.float64))
    shuffled = torch.randn(len(frame), 3, dtype=torch.float64)
    expected = torch.tensor(
        frame[["noun", "century"]].assign(v=shuffled[:, 0].numpy()).groupby(["noun", "century"])["v"].transform("mean")
    )
    assert_close(gt.mean_over_years(shuffled, prompts)[:, 0], expected)


# ---------------------------------------------------------------- the model


def mean_difference(probs, prompts):
    return gt.probability_difference(probs, prompts.years).mean().item()


def test_run_is_the_model_prompt_by_prompt(model, prompts):
    probs = gt.run(model, prompts)
    ids = gt.year_tokens(model.tokenizer)
    rows = [row for group in prompts.groups for row in group]
    assert len(rows) == len(probs)
    for row, answer in list(zip(rows, probs, strict=True))[::9]:
        assert_close(model(row[None])[0, -1, ids].softmax(-1), answer, atol=1e-6, rtol=1e-4)


def test_hooks_of_rows_fit_their_prompts(model, prompts):
    values = torch.randn(len(prompts.frame), 32)
    by_row = gt.run(model, prompts, lambda rows: ablate_mlp(1, values[rows], -1))
    last = len(by_row) - 1
    one = model.run_with_hooks(prompts.groups[-1][-1:], fwd_hooks=ablate_mlp(1, values[last:], -1))
    ids = gt.year_tokens(model.tokenizer)
    assert_close(one[0, -1, ids].softmax(-1), by_row[last], atol=1e-6, rtol=1e-4)
    assert_close(gt.run(model, prompts, ablate_mlp(1)), gt.run(model, prompts, lambda rows: ablate_mlp(1)))


@pytest.mark.parametrize("layer", [0, 2])
def test_drops_are_full_minus_ablated(model, prompts, layer):
    whole = mean_difference(gt.run(model, prompts), prompts)
    for positions, where in (("last", -1), ("all", slice(None))):
        left = mean_difference(gt.run(model, prompts, ablate_mlp(layer, 0.0, where)), prompts)
        assert gt.drop_if_ablated(model, prompts, layer, "zero", positions) == pytest.approx(whole - left, abs=1e-6)
    m0 = unit_sweep.curve(unit_sweep.sweep(model, prompts, layer, []))[0]
    assert gt.drop_if_ablated(model, prompts, layer, "mean") == pytest.approx(whole - m0, abs=1e-5)


def test_impossible_ablations_are_refused(model, prompts):
    with pytest.raises(ValueError, match="choose zero/last"):
        gt.drop_if_ablated(model, prompts, 0, "mean", "all")
    with pytest.raises(ValueError, match="layers 0 to 2"):
        gt.drop_if_ablated(model, prompts, 3)


def test_the_model_is_as_it_was(model, prompts):
    before = gt.run(model, prompts)
    unit_sweep.sweep(model, prompts, 1, [1, 2])
    gt.drop_if_ablated(model, prompts, 1)
    assert torch.equal(gt.run(model, prompts), before)


# ---------------------------------------------------------------- making/measure.py


def test_held_out_templates_become_prompts():
    rng = measure.random.Random(1)
    templates = measure.cut(SPANS["heldout"], "end", rng) + measure.cut(BACKWARD["heldout"], "start", rng)
    assert len(templates) == len(SPANS["heldout"]) + len(BACKWARD["heldout"])
    for template in templates:
        filled = gt.fill(template, "war", 17, 32)
        assert filled.endswith(" 17") and "1732" in filled and "{" not in filled


def test_spread_picks_evenly():
    assert measure.spread(list(range(70)), 7) == [0, 10, 20, 30, 40, 50, 60]
    assert measure.spread(("a", "b"), 3) == ["a", "b"]


def test_measure_finds_the_key_mlp_and_says_what_is_missed(model, tokenizer, monkeypatch):
    monkeypatch.setattr(measure, "NOUNS", {"train": ("war",), "selection": ("siege",), "report": ("it",)})
    monkeypatch.setattr(measure.gt.prompts, "__defaults__", ([17], range(2, 99, 12), gt.TEMPLATE))
    monkeypatch.setattr(measure.gt, "CENTURIES", [17])
    monkeypatch.setattr(measure, "SPANS", {"heldout": ("The {noun} lasted from {start} to {end}.",)})
    monkeypatch.setattr(measure, "BACKWARD", {"heldout": ("The {noun} ended in {end}; it began in {start}.",)})
    monkeypatch.setattr(measure, "NEURON_KS", [1, 16])
    transcoders = {layer: make_transcoder(layer) for layer in range(3)}
    metrics = measure.measure(model, transcoders, "selection")
    drops = {row["layer"]: row["mean_last"] for row in metrics["mlp_drops"]["train"]}
    assert metrics["key_mlp"]["layer"] == max(drops, key=drops.get)
    assert set(metrics["by_nouns"]) == {"train", "selection"}  # the report nouns stay unseen
    assert metrics["features_vs_neurons"]["selection"]["layer"] == metrics["key_mlp"]["layer"]
    assert metrics["by_nouns"]["train"]["by_century"].keys() == {"17"}
    lines = measure.verdicts({**metrics, "bits_per_char": 1.7})
    assert any(line.startswith("probability difference") and line.endswith("MISSED") for line in lines)
    assert "bits per character: 1.700 (at most 1.6) MISSED" in lines
    assert measure.json.dumps(measure.rounded(metrics))
