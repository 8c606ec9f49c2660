"""Gates on every node, their scores, and circuits from which nothing can be taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tclib.interventions import ablate_head
from tclib.replacement_model import ReplacementModel
from tclib.tasks import gated_circuit as sc
from tclib.tasks import greater_than as gt
from tests.test_greater_than import make_tokenizer, model, tokenizer  # noqa: F401
from tests.tiny import make_transcoder


@pytest.fixture(scope="module")
def prompts():
    return gt.prompts(make_tokenizer(), ["war", "long siege"], [11, 17], range(2, 99, 12))


@pytest.fixture(scope="module")
def gated(model, prompts):  # noqa: F811
    # The middle layer has no transcoder: its MLP is one node.
    return sc.Gated(ReplacementModel(model, {0: make_transcoder(0), 2: make_transcoder(2, skip=True)}), prompts)


def mean_difference(answers, prompts):
    return gt.probability_difference(answers, prompts.years).mean().item()


def test_all_nodes_live_is_the_model(model, prompts, gated):  # noqa: F811
    assert gated.whole == pytest.approx(mean_difference(gt.run(model, prompts), prompts), abs=1e-5)
    assert gated.share(gated.nodes) == 1 and gated.share([]) == 0
    assert {("head", 2, 3), ("error", 1, 0)} <= set(gated.nodes)
    assert not [node for node in gated.nodes if node[:2] == ("feature", 1)]


def test_no_node_live_knows_nothing_of_the_year(gated, prompts):
    """The last token's answer is then the same for every YY of a noun and century."""
    ids = gt.year_tokens(gated.model.tokenizer)
    zeros = {key: torch.zeros(size) for key, size in gated.sizes.items()}
    for tokens, means in gated.means:
        with gated.model.hooks(fwd_hooks=gated._hooks(zeros, means)):
            answers = gt.year_probabilities(gated.model(tokens)[:, -1], ids)
        for half in answers.chunk(2):  # two centuries
            assert torch.allclose(half, half[:1].expand_as(half), atol=1e-5)


def test_one_head_at_its_mean_is_that_ablation(model, prompts, gated):  # noqa: F811
    without = [node for node in gated.nodes if node != ("head", 2, 1)]
    parts = []
    first = 0
    for tokens in prompts.groups:
        _, cache = model.run_with_cache(tokens)
        rows = replace(prompts, groups=(tokens,), frame=prompts.frame.iloc[first : first + len(tokens)])
        first += len(tokens)
        z = cache["blocks.2.attn.hook_z"][:, :, 1]
        mean = gt.mean_over_years(z.flatten(1), rows).view_as(z)
        parts.append(gt.probability_difference(gt.run(model, rows, ablate_head(2, 1, mean)), rows.years))
    assert gated.difference(without) == pytest.approx(torch.cat(parts).mean().item(), abs=1e-5)


def test_scores_add_up(gated):
    total = gated.whole - gated.empty
    coarse, fine = (abs(gated.scores(steps).sum() - total) for steps in (2, 24))
    assert fine < 0.02 + 0.05 * abs(total) and fine <= coarse + 1e-3


class Sum(sc.Gated):
    """m is a sum of known numbers, so the smallest circuit is known."""

    def __init__(self, worth):
        self.worth, self.nodes = worth, list(worth)
        self.empty, self.whole = 0.0, sum(worth.values())

    def difference(self, circuit):
        return sum(self.worth[node] for node in circuit)

    def scores(self, steps=5):
        import pandas as pd

        index = pd.MultiIndex.from_tuples(self.nodes)
        return pd.Series(self.worth.values(), index).sort_values(key=abs, ascending=False)


def test_the_search_is_locally_minimal():
    worth = {("feature", 0, 0): 0.5, ("head", 1, 2): 0.4, ("feature", 1, 7): -0.3, ("feature", 2, 1): 0.15}
    worth |= {("error", 0, 0): 0.15, ("feature", 2, 2): 0.1}
    gated = Sum(worth)
    table = sc.find(gated)
    nodes = list(table[["kind", "layer", "index"]].itertuples(index=False, name=None))
    assert gated.share(nodes) == table.attrs["share"] >= 0.9
    for node, without in zip(nodes, table["without"], strict=True):
        assert gated.share([other for other in nodes if other != node]) == pytest.approx(without)
        assert without < 0.9
    assert ("feature", 1, 7) not in nodes  # what works against the answer is taken out


def test_bad_requests_are_refused(gated):
    with pytest.raises(ValueError, match="no node"):
        gated.difference([("feature", 1, 0)])
    with pytest.raises(ValueError, match="no node"):
        gated.difference([("head", 0, 99)])
    with pytest.raises(ValueError, match="with no node live the model does as well"):
        sc.find(Sum({("head", 0, 0): 0.0}))
