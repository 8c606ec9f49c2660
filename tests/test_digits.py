"""Greater-than asked of any tokenizer: recognised by what it writes, and a digit at a time where it writes digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tclib.evaluation import stats
from tclib.tasks import digits
from tclib.tasks import greater_than as gt
from tests.test_greater_than import make_tokenizer

TWO, ONE = make_tokenizer(digits=2), make_tokenizer(digits=1)


def test_a_tokenizer_is_recognised_by_what_it_writes():
    assert digits.recognise(TWO) == ("years",)
    assert digits.recognise(ONE) == ("units", "tens")


@pytest.mark.parametrize("missing", [("5",), ("7", "07")])
def test_tokenizers_without_all_digits_are_refused(missing):
    with pytest.raises(ValueError, match=r"cannot do greater-than: .*\('1732' is "):
        digits.recognise(make_tokenizer(digits=1, missing=missing))
    with pytest.raises(ValueError, match="cannot be asked for the units of any of these years"):
        digits.prompts(make_tokenizer(digits=1, missing=missing), ["war"], asks="units")


def test_two_digits_are_the_task_of_greater_than():
    asked = dict(nouns=["war", "long siege"], centuries=[11, 17], years=range(2, 99, 7))
    ours, theirs = digits.prompts(TWO, **asked), gt.prompts(TWO, **asked)
    assert ours.frame.equals(theirs.frame) and torch.equal(ours.answers, gt.year_tokens(TWO))
    assert all(torch.equal(a, b) for a, b in zip(ours.groups, theirs.groups, strict=True))
    with pytest.raises(ValueError, match="cannot be asked for the tens"):
        digits.prompts(TWO, **asked, asks="tens")


@settings(deadline=None, max_examples=40)
@given(
    nouns=st.lists(st.sampled_from(["war", "siege", "long siege"]), min_size=1, unique=True),
    centuries=st.lists(st.integers(10, 20), min_size=1, max_size=3, unique=True),
    years=st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True),
    template=st.sampled_from([gt.TEMPLATE, gt.BACKWARD_TEMPLATE]),
    asks=st.sampled_from(["units", "tens"]),
)
def test_prompts_are_what_they_say(nouns, centuries, years, template, asks):
    """The text of every prompt, its right answers among the ten digits, and each year once for a noun and a century."""
    expected = [y for y in years if asks == "tens" or y % 10 < 9]
    if not expected:
        with pytest.raises(ValueError, match="ends in 9 has no right answer"):
            digits.prompts(ONE, nouns, centuries, years, template, asks)
        return
    task = digits.prompts(ONE, nouns, centuries, years, template, asks)
    assert len(task.frame) == len(nouns) * len(centuries) * len(expected) and task.dropped.empty
    rows = [row for group in task.groups for row in group]
    for row, (noun, century, tens, units), right in zip(
        rows, task.frame.itertuples(index=False), task.right, strict=True
    ):
        text = gt.fill(template, noun, century, 10 * tens + units) + str(tens) * (asks == "units")
        assert row[0] == ONE.bos_token_id
        assert ONE.decode(row[1:]).replace(" ", "") == text.replace(" ", "")
        # An answer is right where the year that it completes can lie after the one that was given.
        low = 10 * tens + units
        latest = [10 * tens + d if asks == "units" else 10 * d + 9 for d in range(10)]
        assert right.tolist() == [year > low or (asks == "tens" and year // 10 == tens) for year in latest]


def test_metrics_take_a_digits_task():
    task = digits.prompts(ONE, ["war", "siege"], [11, 17], range(30, 60), asks="units")
    ideal = task.right / task.right.sum(1, keepdim=True)
    assert_close(gt.probability_difference(ideal, task.bounds), torch.ones(len(ideal)))
    assert_close(gt.probability_difference(1.0 * (task.right.cumsum(1) == 1), task.bounds), torch.ones(len(ideal)))
    assert gt.behaviour_matrix(ideal, task.years).shape == (9, 10)
    tens = digits.prompts(ONE, ["war"], [17], range(0, 99), asks="tens")
    same = torch.nn.functional.one_hot(tens.years, 10).float()
    assert_close(gt.probability_difference(same, tens.bounds), torch.ones(len(same)))
    assert stats.cell_means(task.bounds.numpy(), task.frame).shape == (2, 2)


def test_means_are_over_the_digit_that_is_compared():
    task = digits.prompts(ONE, ["war", "siege"], [11, 17], range(30, 60), asks="units")
    values = torch.tensor(task.frame[["century", "tens", "units"]].to_numpy(), dtype=torch.float64)
    means = gt.mean_over_years(values, task)
    assert_close(means[:, :2], values[:, :2])
    assert_close(means[:, 2], torch.full((len(means),), 4.0, dtype=torch.float64))


def test_what_cannot_be_asked_is_refused():
    for asked, sentence in (
        (dict(asks="month"), "asks is one of years, units, tens"),
        (dict(nouns=[]), "at least one noun"),
        (dict(years=[9, 19]), "a year that ends in 9 has no right answer"),
        (dict(template="The NOUN of XXYY"), "needs NOUN and XXYY"),
    ):
        with pytest.raises(ValueError, match=sentence):
            digits.prompts(ONE, **{"nouns": ["war"], "asks": "units", **asked})


def test_counting_goes_on_by_one():
    with_commas = make_tokenizer(digits=1)
    task = digits.counting(with_commas, [11, 17], [3])
    assert len(task.frame) == 2 * 7 and task.compared == "units" and len(task.groups) == 1
    assert task.years.unique().tolist() == list(range(2, 9))
    assert (task.right.sum(1) == 9 - task.years).all()


def test_a_decade_is_answered_within_it():
    whole = digits.prompts(TWO, ["war"], [17], range(30, 39))
    task = digits.decade(whole)
    assert task.years.tolist() == list(range(9)) and torch.equal(task.answers, whole.answers[30:40])
    for wrong in (digits.prompts(TWO, ["war"], [17], range(30, 45)), digits.prompts(ONE, ["war"], [17], [32])):
        with pytest.raises(ValueError, match="two-digit years of one decade"):
            digits.decade(wrong)
