"""The generated text: how long things last, and which years are never written."""

import itertools
import random
import re
from collections import Counter

import pytest

from tclib.chronicle import CENTURIES, HELD_OUT_CENTURY, NOUNS, documents, span
from tclib.chronicle.words import DURATIONS, MEAN_DURATION

YEAR = re.compile(r"\b(\d\d)\d\d\b")


@pytest.fixture(scope="module", params=["train", "heldout"])
def text(request):
    return "\n".join(document.text for document in itertools.islice(documents(7, request.param), 2_000))


def test_every_noun_has_one_duration():
    nouns = [noun for of_set in NOUNS.values() for noun in of_set]
    assert sorted(nouns) == sorted(MEAN_DURATION)
    assert sum(map(len, DURATIONS.values())) == len(MEAN_DURATION)


@pytest.mark.parametrize("mean", DURATIONS)
def test_durations_are_geometric(mean):
    # A start early in a century, so that no span is drawn again for leaving the centuries.
    rng = random.Random(0)
    years = [end - start for start, end in (span(rng, mean, 17) for _ in range(20_000))]
    assert min(years) == 1
    assert sum(years) / len(years) == pytest.approx(mean, rel=0.03)
    assert Counter(years)[1] / len(years) == pytest.approx(1 / mean, rel=0.08)


@pytest.mark.parametrize("century", CENTURIES)
def test_spans_stay_in_the_centuries_that_are_written(century):
    rng = random.Random(century)
    for start, end in (span(rng, 60, century) for _ in range(500)):
        assert start // 100 == century and end > start and end // 100 in CENTURIES


def test_one_century_is_never_written(text):
    written = {int(century) for century in YEAR.findall(text)}
    assert written == set(CENTURIES) == set(range(10, 21)) - {HELD_OUT_CENTURY}


def test_how_long_it_lasts_depends_on_the_noun(text):
    spans = re.findall(r"(\w+) lasted from (?:the year )?(\d{4}) to (?:the year )?(\d{4})", text)
    means = {}
    for noun, start, end in (s for s in spans if s[0] in MEAN_DURATION):
        means.setdefault(MEAN_DURATION[noun], []).append(int(end) - int(start))
    averages = {mean: sum(years) / len(years) for mean, years in means.items() if len(years) > 20}
    assert sorted(averages, key=averages.get) == sorted(averages)
