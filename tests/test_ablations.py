"""Variants are compared with the recipe at their own L0."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("making.ablations")
from making import ablations  # noqa: E402


def front(scale=1.0):
    return pd.DataFrame(
        {"l0": [10.0, 20.0, 40.0], "fvu": [0.2 * scale, 0.1 * scale, 0.05 * scale], "dead": [0.3, 0.2, 0.1]}
    )


@pytest.mark.parametrize("l0", [5.0, 10.0, 13.0, 40.0, 80.0])
def test_reading_off_a_power_law_is_exact(l0):
    fvu, _ = ablations.read_off(front(), l0)
    assert fvu == pytest.approx(2 / l0)


def test_a_variant_on_the_front_is_worth_nothing_and_one_above_it_costs():
    runs = []
    for seed in (0, 1):
        base = front(1 + seed).assign(name=["recipe x2.0", "recipe x1.0", "recipe x0.5"], seconds=10.0)
        for i, name in enumerate(ablations.VARIANTS):
            worse = 1.5 if name == "no clip" else 1.0
            l0 = 12.0 + i
            base.loc[len(base)] = {
                "l0": l0,
                "fvu": worse * 2 / l0 * (1 + seed),
                "dead": 0.2,
                "name": name,
                "seconds": 20.0,
            }
        runs.append(base.assign(layer=2, seed=seed))
    effects = pd.DataFrame(ablations.joined(pd.concat(runs))["effects"]).set_index("name")
    on_front = [n for n in ablations.VARIANTS if n not in ("no clip", *ablations.AGAINST)]
    assert np.allclose(effects.loc[on_front, "fvu_change"], 0, atol=1e-3)
    assert effects.loc["no clip", "fvu_change"] == pytest.approx(0.5, abs=1e-3)
    assert effects.loc["no clip", "time_change"] == pytest.approx(1.0)
