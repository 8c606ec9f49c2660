"""Other routes to a circuit: the identities behind notebook 10's functions, on values that it does not use itself."""

from __future__ import annotations

import re

import matplotlib
import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tclib import interventions
from tclib.evaluation import yardsticks
from tclib.nb.teaching import students
from tests.conftest import REPO

NOTEBOOK = REPO / "notebooks" / "10_other_routes_to_the_circuit.ipynb"
QUICK = {"nouns": ["war"], "every": 24, "steps": 1}
few = settings(max_examples=8, deadline=None)


@pytest.fixture(scope="module")
def nb():
    """What the notebook defines, on few prompts: its cells up to the table of all routes, without training codes."""
    matplotlib.use("Agg")
    names = {"__name__": "notebook"}
    for cell in students.solved(nbformat.read(NOTEBOOK, 4)).cells:
        source = cell["source"]
        if "results = pd.DataFrame(board)" in source:
            break
        skipped = "codes" in source or source.startswith("checks.")
        if cell["cell_type"] == "code" and not skipped:
            if "parameters" in cell["metadata"].get("tags", ()):
                source += "".join(f"\n{name} = {value!r}" for name, value in QUICK.items())
            exec(source, names)
    matplotlib.pyplot.close("all")
    return names


def nodes(nb):
    return st.sampled_from(nb["nodes"])


def logits(nb, hooks):
    return nb["chosen"].answer(hooks)


def test_nodes_before_the_year_say_the_same_in_every_prompt(nb):
    gates = nb["every_gate"].clone()
    gates[:, : nb["source"]] = 0
    assert torch.allclose(logits(nb, nb["gated"](nb["chosen"], gates)), nb["chosen"].numbers, atol=1e-3)


def test_closing_features_removes_exactly_their_part(nb):
    closed = torch.zeros(len(nb["features"]))
    written = {}

    def keep(y, hook):
        written["y"] = y

    logits(nb, [*nb["features_gated"](closed), (nb["OUT"][nb["key"]], keep)])
    expected = nb["cache"][nb["OUT"][nb["key"]]] - nb["deviation"] @ nb["W_dec"]
    assert torch.allclose(written["y"], expected, atol=1e-4)


@given(data=st.data())
@few
def test_slopes_are_what_a_small_step_changes(nb, data):
    node = data.draw(nodes(nb))
    chosen, (slopes, _) = nb["chosen"], nb["slopes"]()
    ends = []
    for step in (-0.02, 0.02):
        gates = nb["every_gate"].clone()
        gates[node] += step
        ends.append(chosen.log_odds(logits(nb, nb["gated"](chosen, gates))).mean())
    assert abs((ends[1] - ends[0]) / 0.04 - slopes[node]) < 0.02 * slopes.abs().max()


def test_integrated_gradients_are_complete_and_nearer_with_more_points(nb):
    chosen, gaps = nb["chosen"], []
    ends = [chosen.log_odds(logits(nb, nb["gated"](chosen, nb["every_gate"] * a))).mean() for a in (0.0, 1.0)]
    for steps in (1, 16):
        total = sum(nb["slopes"](nodes_at=(i + 0.5) / steps)[0].sum() for i in range(steps)) / steps
        gaps.append(abs(total - (ends[1] - ends[0])).item())
    assert gaps[1] < 0.05 and gaps[1] <= gaps[0]


def handed_back(nb, rules, weights):
    """Where relevance starts, and what comes back to embeddings and biases."""
    lm, seen = nb["lm"], {}

    def note(place):
        return place, lambda x, hook: seen.setdefault(place, x.requires_grad_() if "embed" in place else x)

    with torch.enable_grad():
        start = ((logits(nb, [*map(note, nb["entered"]), *rules]) - lm.b_U[nb["ids"]]) @ weights).sum()
        back = torch.autograd.grad(start, list(seen.values()))
    parts = [
        (given * nb["entered"][place] * (value if "embed" in place else 1)).sum()
        for given, (place, value) in zip(back, seen.items(), strict=True)
    ]
    return start, sum(parts), sum(part.abs() for part in parts)


@given(seed=st.integers(0, 10**6))
@few
def test_relevance_is_conserved_for_any_observable(nb, seed):
    weights = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    start, back, size = handed_back(nb, nb["relp_rules"], weights)
    assert abs(start - back) < 1e-3 * size


@pytest.mark.parametrize("left_out", ["norm_rule", "bilinear_rule", "activation_rule"])
def test_conservation_needs_every_rule(nb, left_out):
    names = {"norm_rule", "bilinear_rule", "activation_rule"} - {left_out}
    rules = [hook for name in sorted(names) for hook in nb[name]]
    start, back, size = handed_back(nb, rules, torch.randn(100, generator=torch.Generator().manual_seed(0)))
    assert abs(start - back) > 1e-2 * abs(start) and size > 0


@given(data=st.data())
@few
def test_cdt_with_biases_left_is_patching_with_patterns_and_scales_held(nb, data):
    node = data.draw(nodes(nb))
    gates, chosen = nb["every_gate"].clone(), nb["chosen"]
    gates[node] = 0
    held = interventions.freeze(nb["cache"], ["patterns", "scales"])
    patched = chosen.log_odds(logits(nb, [*held, *nb["gated"](chosen, gates)])).mean()
    assert abs(nb["m"].mean() - patched - nb["left_to_rest"][node]) < 2e-3 + 1e-3 * abs(nb["left_to_rest"][node])


def test_cdt_is_what_its_authors_code_gives(nb):
    # Run once on these numbers: prop_linear_core, prop_act and prop_layer_norm of github.com/adelaidehsu/CD_Circuit.
    rel, rest = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.5, 0.25, -0.75])
    W, bias = torch.tensor([[1.0, -0.5], [0.25, 2.0], [-1.5, 0.75]]), torch.tensor([0.6, -0.4])
    theirs = {
        "linear": ([-2.4465518, -0.9420000], [2.9840518, -1.0204999]),
        "activation": ([0.5550262, -0.3197148, 1.2877536], [1.3995715, 0.1496754, -0.1700395]),
        "norm": ([0.0, -1.2923198, 1.2923198], [1.0051376, -0.0717956, -0.9333421]),
    }
    act, scale = nb["act"], (rel + rest).var(correction=0).add(1e-5).sqrt()
    whole = (rel + rest) @ W + bias
    ours = {
        "linear": [nb["with_bias"](part @ W, whole, bias, 1) for part in (rel, rest)],
        "activation": [act(rel + rest) - act(rest), act(rest)],
        "norm": [(part - part.mean()) / scale for part in (rel, rest)],
    }
    for rule, parts in theirs.items():
        assert torch.allclose(torch.stack(ours[rule]), torch.tensor(parts), atol=1e-5), rule


def test_relevance_of_a_neuron_is_what_its_authors_code_gives(nb):
    # Run once on these numbers: ModifiedAct(gelu, "identity") of github.com/FarnoushRJ/RelP, and its gradient.
    x = torch.tensor([-2.0, -0.5, 0.3, 1.7], requires_grad=True)
    (_, keep), (_, hand_back) = nb["in_proportion"](0)
    keep(x, None)
    out = hand_back(nb["act"](x), None)
    (relevance,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(out, torch.tensor([-0.0454023, -0.1542860, 0.1853709, 1.6241059]), atol=1e-5)
    assert torch.allclose(relevance, torch.tensor([0.0227011, 0.3085714, 0.6179010, 0.9553559]), atol=1e-5)


@pytest.mark.parametrize("shared", [0, 1])
def test_nothing_relevant_brings_nothing(nb, shared):
    part = torch.zeros(1, len(nb["m"]), 3, nb["lm"].cfg.d_model)
    assert nb["push"](part, 0, shared).abs().max() < 1e-6


def test_scores_from_weights_are_linear_in_what_was_written(nb):
    """The key MLP's score is that of what it wrote, read by the slope of the rules: linear, so its parts add up."""
    out, chosen = nb["OUT"][nb["key"]], nb["chosen"]
    reader = torch.zeros_like(nb["cache"][out]).requires_grad_()
    rules = [hook for layer in range(nb["depth"]) for hook in nb["by_transcoder"](layer)]
    rules += [*nb["norm_rule"], *nb["bilinear_rule"], (out, lambda y, hook: y + reader)]
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(chosen.log_odds(logits(nb, rules)).mean(), reader)
    moved = slope * (nb["cache"][out] - chosen.means[out])
    of_nodes, of_features = nb["ours"]
    assert torch.allclose(moved.sum((0, 2)), of_nodes[nb["key"], :, -1], atol=1e-3)
    assert torch.allclose((slope * (nb["deviation"] @ nb["W_dec"])).sum(), of_features.sum(), atol=1e-3)


@given(seed=st.integers(0, 10**6))
@few
def test_what_nobody_reads_moves_nothing(nb, seed):
    v = torch.randn(nb["lm"].cfg.d_model, generator=torch.Generator().manual_seed(seed))
    unread = torch.nn.functional.normalize(v - nb["see"](v), dim=0)
    assert abs(nb["exchange"](unread)) < 1e-2
    read = nb["see"](v)
    assert torch.allclose(nb["see"](read), read, atol=1e-4)
    assert (nb["W"].T @ (v - read)).abs().max() < 1e-3


def test_the_trick_is_caught(nb):
    trick = nb["trick"]
    assert abs(trick.loc["illusion", "by its visible part alone"]) < 0.05 * abs(trick.loc["illusion", "effect"])
    assert trick.loc["honest", "by its visible part alone"] > 0.3 * trick.loc["honest", "effect"]


numbers = st.lists(st.integers(-50, 50), min_size=12, max_size=30, unique_by=abs)


@given(numbers, st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_yardsticks_of_the_truth_itself_and_of_another_scale(effects, seed):
    effects = torch.tensor(effects, dtype=torch.float64)
    row = yardsticks.agreement(3 * effects, effects, k=5, seed=seed)
    assert row["order"] == pytest.approx(1) and row["linear"] == pytest.approx(1) and row["best 5"] == 1
    assert -1 <= row["order, shuffled"] <= 1 and list(row) == ["order", "order, shuffled", "linear", "best 5"]
    squared = effects.sign() * effects**2  # the order knows no scale, the linear correlation does
    assert yardsticks.rank_correlation(squared, effects) == pytest.approx(1)
    assert yardsticks.precision(-squared, effects, 5) == 1


@given(numbers)
@settings(deadline=None)
def test_rank_correlation_is_the_textbook_formula_without_ties(effects):
    scores = torch.tensor(effects).flip(0)
    ranks = [torch.tensor(values).abs().argsort().argsort().double() for values in (effects, scores.tolist())]
    n = len(effects)
    expected = 1 - 6 * (ranks[0] - ranks[1]).square().sum() / (n * (n**2 - 1))
    assert yardsticks.rank_correlation(scores, effects) == pytest.approx(expected.item())


def test_kept_shares():
    measure = lambda parts: 0.2 + 0.1 * sum(parts)  # noqa: E731
    assert yardsticks.kept_shares(measure, [3, 2, 1], (0, 1, 2, 9), 0.2, 0.8) == pytest.approx(
        {0: 0, 1: 0.5, 2: 5 / 6, 9: 1}
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: yardsticks.rank_correlation([1.0], [1.0, 2.0]), "1 scores for 2 effects"),
        (lambda: yardsticks.rank_correlation([], []), "at least one"),
        (lambda: yardsticks.agreement([1.0, float("nan")], [1.0, 2.0], k=1), "must be finite"),
        (lambda: yardsticks.precision([1.0, 2.0], [1.0, 2.0], 3), "k = 3, but there are 2 parts"),
        (lambda: yardsticks.kept_shares(len, [1], [1], 0.5, 0.5), "no share of a difference"),
        (lambda: yardsticks.kept_shares(len, [1], [-1], 0.0, 0.5), "sizes are 0 or more"),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_a_cost_counts_prompts_both_ways_and_leaves_no_hook(model, tokens):
    before = len(model.unembed._forward_hooks)
    with yardsticks.cost_of(model) as spent:
        model(tokens[:3])
        with torch.enable_grad():
            gate = torch.ones(1, requires_grad=True)
            with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x * gate)]):
                model(tokens[:2])[:, -1].sum().backward()
    assert (spent.forward, spent.backward) == (5, 2) and spent.seconds > 0
    with pytest.raises(RuntimeError, match="mine"), yardsticks.cost_of(model):
        raise RuntimeError("mine")
    assert len(model.unembed._forward_hooks) == before
