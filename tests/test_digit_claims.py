"""The sentences and rows of notebook 09, on numbers whose answer is known and on the bundled model."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

import tclib as tc
from tclib.tasks import digit_claims, digits, published
from tclib.tasks import greater_than as gt

NOUNS, CENTURIES = ["war", "siege"], [16, 17]


@pytest.mark.parametrize(
    ("features", "neurons", "expected"),
    [([1, 1, 3], [2, 2, 2], (2, 4)), ([1, 1, 1], [2, 2, 2], (4, None)), ([3, 3, 3], [2, 2, 2], (None, 1))],
)
def test_where_the_lead_ends(features, neurons, expected):
    ks = [1, 2, 4]
    rows = digit_claims.crossing(dict(zip(ks, features, strict=True)), dict(zip(ks, neurons, strict=True)), ks)
    assert tuple(rows.values()) == expected
    assert published.ledger(["greater_than_crossing"], here=rows).shape[0] == 2


def test_sentences_count_who_wins():
    index = product((24, 23), ("written", "direct"), (4, 16))
    rows = {place: [0.05, 0.03, 0.02, 0.01, 0.03] for place in index}
    contest = pd.DataFrame(rows, index=["features", "neurons", "features - neurons", "low", "high"]).T
    u = pd.Series({f"{n} {p}": 0.9 for n in ("forward", "balanced") for p in ("mean", "low", "high")})
    left = pd.DataFrame({"all": 0.02, "features, error live": 0.005, "neurons": 0.018}, index=[24, 23])
    likeness = pd.Series([0.84, 0.75, 0.38])
    one, two, three = digit_claims.sentences(u, [(23, 3), (20, 8)], (16, 0.82), contest, likeness, left, True)
    assert "Heads 23.3 and 20.8" in one and "16 nodes keep 0.82" in one and "MLPs 24 and 23 decide" in one
    assert "does not carry over" in two and "features win 0 and neurons 8" in two
    assert "difference +0.020 [+0.010, +0.030]" in two
    assert "(likeness 0.84 and 0.75; 0.38 in" in three and "is not the reason" in three


def test_scores_and_counterparts_of_the_bundled_model():
    lm, layers = tc.load_model(device="cpu"), tc.load_transcoders(device="cpu")
    ahead = digits.prompts(lm.tokenizer, NOUNS, CENTURIES, gt.YEARS[::32])
    answers = gt.run(lm, ahead)
    row = digit_claims.scores(lm, ahead, answers, gt.YEARS[::32], NOUNS, CENTURIES)
    assert row["forward mean"] == pytest.approx(
        gt.probability_difference(answers, ahead.bounds).mean().item(), abs=1e-5
    )
    assert row["forward low"] <= row["forward mean"] <= row["forward high"] and np.isfinite(row["sharpness"])
    layer = max(layers)
    order = torch.arange(layers[layer].config.d_features)
    found = digit_claims.counterparts(lm, ahead, layer, layers[layer], order)
    assert len(found) == 7 and all(-1 <= value <= 1 for value in found.values())
    assert published.ledger(["greater_than_removed"], here={k: v for k, v in found.items() if "removed" in k}).size
