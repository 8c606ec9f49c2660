"""Greater-than prompts that were run once, and the maps drawn of them."""

from __future__ import annotations

import matplotlib
import pytest
import torch

import tclib as tc
from tclib.tasks import greater_than as gt
from tclib.tasks.year_case import YearCase, draw_estimates, draw_nodes, node_name

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def case():
    return YearCase(tc.load_model(device="cpu"), ["war"], 17, gt.YEARS[::24])


def test_log_odds_are_the_probability_difference_in_another_form(case):
    m = case.log_odds(case.numbers)
    PD = gt.probability_difference(case.numbers.softmax(-1), case.years)
    assert torch.allclose((m / 2).tanh(), PD, atol=1e-5)
    assert torch.allclose(case.log_odds(case.numbers.expand(3, -1, -1)), m.expand(3, -1))


def test_the_model_without_hooks_answers_as_before(case):
    assert torch.allclose(case.answer(), case.numbers, atol=1e-4)


def test_means_are_over_the_years_of_a_noun(case):
    for name, mean in case.means.items():
        assert torch.allclose(mean, case.cache[name].mean(0, keepdim=True).expand_as(mean), atol=1e-4), name


def test_nodes_have_names_and_maps():
    assert node_name((2, 12, 3), heads=16, source=8) == "head 2.3 at 12"
    assert node_name((0, 8, 16), heads=16, source=8) == "MLP 0 at YY"
    draw_nodes(torch.randn(2, 5, 4), 2, "a title", "a unit")
    (axes,) = [ax for ax in matplotlib.pyplot.gcf().axes if ax.get_title()]
    assert axes.get_title() == "a title"
    draw_estimates(torch.randn(6), torch.arange(6) < 4, {"a": torch.randn(6)}, {"a": "route a"})
    assert matplotlib.pyplot.gcf().axes[0].get_title() == "route a"
    matplotlib.pyplot.close("all")
