"""The truth ledger: every published number is there, and ours come beside them by code only."""

from __future__ import annotations

import math

import pytest

from tclib.tasks import published

NAMES = list(published.entries())


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_says_where_it_is_from_and_what_it_measured(name):
    entry = published.entries()[name]
    assert entry.keys() == {"source", "measured", "differs", "values"}
    assert "arXiv:" in entry["source"] and all(entry.values())
    for value in published.values(name).values():
        assert isinstance(value, str) or math.isfinite(value)


def test_curves_have_one_row_a_point():
    pairs = published.values("pythia_410m_layer15_l0_ce")
    assert pairs["sae_out at 31.5"] == 3.36779 and len(pairs) == 9
    overlap = published.values("connection_overlap")
    assert overlap["mlp8[89] at k = 50"] == 0.14 and len(overlap) == 6


def test_the_ledger_shows_every_number_and_what_was_not_run():
    table = published.ledger(
        ["greater_than_replaced", "greater_than_crossing"],
        here={
            "greater_than_replaced/probability_difference": 0.91234567,
            "greater_than_crossing/neurons_ahead_from": None,
        },
    )
    assert table.columns.tolist() == ["published", "ours here", "ours on GPT-2", "what differs"]
    assert len(table) == 4
    row = table.loc["greater than replaced: probability difference"]
    assert row["published"] == "0.7978" and row["ours here"] == "0.9123" and row["ours on GPT-2"] == "not run"
    assert table.loc["greater than crossing: neurons ahead from", "ours here"] == "none"
    assert table.loc["greater than crossing: features ahead to", "ours here"] == "not run"
    assert set(table["what differs"]) == {
        published.entries()[n]["differs"] for n in ("greater_than_replaced", "greater_than_crossing")
    }


def test_ours_on_gpt2_have_their_own_column():
    table = published.ledger(["greater_than_original"], on_gpt2={"greater_than_original/probability_difference": 0.88})
    assert table.iloc[0].tolist()[:3] == ["0.8829", "not run", "0.88"]


def test_numbers_that_were_never_published_are_refused():
    with pytest.raises(ValueError, match="did you mean 'greater_than_removed/probability_difference'"):
        published.ledger(["greater_than_removed"], here={"greater_than_removed/probability_diference": 0.5})
    with pytest.raises(ValueError, match="no entry 'greater_then_removed'; did you mean 'greater_than_removed'"):
        published.ledger(["greater_then_removed"])
