"""Rating units without knowing what they are: transcoder features, SAE features and neurons in one shuffled deck.

The paper's comparison (section 3.2.1 and appendix): 50 live units of each kind, sources hidden. An item shows where a
unit is strongest; activations are told in steps of its own maximum, so that their scale does not give the kind away.
Ratings are made by people and live in a CSV file; what nobody has rated reads "not rated".
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from tclib.blind.rules import Words
from tclib.evaluation.metrics import LIVE
from tclib.io.paths import read_text, write_whole
from tclib.plots import highlighted

RATINGS = ("interpretable", "maybe", "not")
NOT_RATED = "not rated"
COLUMNS = ["item", "rater", "rating", "context_free"]
STEPS = 4


@dataclass(frozen=True)
class Item:
    """One unit: the texts on which it is strongest, and how strong it is at each token, in `STEPS` of its maximum."""

    name: str
    tokens: list[list[str]]
    steps: list[list[int]]

    def html(self) -> str:
        """The texts, darker where the unit is stronger."""
        return "".join(highlighted(t, s, STEPS) for t, s in zip(self.tokens, self.steps, strict=True))


def deck(
    text: Words,
    sources: Mapping[str, Float[np.ndarray, "row pos unit"]],
    each: int = 50,
    contexts: int = 5,
    seed: int = 0,
) -> tuple[list[Item], pd.DataFrame]:
    """Draw ``each`` live units of every source and shuffle them.

    Args:
        sources: activations on ``text`` by kind. A unit fires where it is positive.

    Returns:
        The items in the order of rating, and the key (``item``, ``source``, ``unit``), to be kept from the rater.

    Raises:
        ValueError: a source with fewer live units than that, or activations of another text.
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for source, z in sources.items():
        if z.shape[:2] != text.tokens.shape:
            raise ValueError(f"{source}: activations have shape {z.shape}, but the text {text.tokens.shape}")
        live = np.flatnonzero((z[text.scored] > 0).mean(0) > LIVE)
        if len(live) < each:
            raise ValueError(f"{source} has {len(live)} live units on this text, but {each} were asked for")
        drawn += [(source, int(unit)) for unit in generator.choice(live, each, replace=False)]
    order = generator.permutation(len(drawn))
    items, key = [], []
    for number, index in enumerate(order.tolist(), start=1):
        source, unit = drawn[index]
        name = f"item {number:03d}"
        items.append(_item(name, text, sources[source][..., unit] * text.scored, contexts))
        key.append({"item": name, "source": source, "unit": unit})
    return items, pd.DataFrame(key)


def blank(items: list[Item], rater: str) -> pd.DataFrame:
    """A sheet that nobody has filled in."""
    return pd.DataFrame(
        {"item": [i.name for i in items], "rater": rater, "rating": NOT_RATED, "context_free": NOT_RATED}
    )


def write_ratings(ratings: pd.DataFrame, path: str | Path) -> None:
    """Save a sheet as CSV; the file appears whole or not at all."""
    write_whole(Path(path), ratings[COLUMNS].to_csv(index=False, lineterminator="\n").encode())


def read_ratings(path: str | Path) -> pd.DataFrame:
    """Read a sheet.

    Raises:
        ValueError: columns, ratings or items that do not belong there, or another encoding than UTF-8.
    """
    ratings = pd.read_csv(io.StringIO(read_text(Path(path))), dtype=str, keep_default_na=False)
    if list(ratings) != COLUMNS:
        raise ValueError(f"{path} has columns {', '.join(map(str, ratings))}; a rating sheet has {', '.join(COLUMNS)}")
    allowed = {"rating": (*RATINGS, NOT_RATED), "context_free": ("yes", "no", NOT_RATED)}
    for column, values in allowed.items():
        wrong = sorted(set(ratings[column]) - set(values))
        if wrong:
            raise ValueError(f"{path}: {column} is {wrong[0]!r}, but it must be one of {', '.join(values)}")
    if ratings.duplicated(["item", "rater"]).any():
        raise ValueError(f"{path}: an item is rated twice by the same rater")
    return ratings


def summary(ratings: pd.DataFrame, key: pd.DataFrame) -> pd.DataFrame:
    """Counts of each rating by source, and the share that is interpretable with its 95% interval (`wilson`).

    The share is of rated items; with none, it and its interval are "not rated".
    """
    table = ratings.merge(key, on="item", validate="many_to_one")
    rows = {}
    for source, part in table.groupby("source", sort=False):
        counts = {name: int((part["rating"] == name).sum()) for name in (*RATINGS, NOT_RATED)}
        rated = len(part) - counts[NOT_RATED]
        share = wilson(counts["interpretable"], rated) if rated else (NOT_RATED,) * 3
        free = int((part["context_free"] == "yes").sum()) if rated else NOT_RATED
        rows[source] = counts | {"context-free": free} | dict(zip(("share", "low", "high"), share, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index")


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float, float]:
    """A share and its 95% interval (Wilson 1927), which stays within 0 and 1 for any count.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} of {count} is no share")
    share, spread = successes / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / count + spread / (4 * count))
    return share, float(centre - half), float(centre + half)


def kappa(a: pd.Series, b: pd.Series, replicates: int = 1000, seed: int = 0) -> pd.Series:
    """Cohen's kappa (1960), agreement of two raters beyond chance, over the items that both rated.

        kappa = (p_o - p_e) / (1 - p_e)     p_o: share of agreement, p_e: what the raters' own shares would give

    Args:
        a, b: ratings by item.

    Returns:
        ``kappa``, ``low``, ``high`` (95%, bootstrap over items), ``agreement`` (p_o), ``chance`` (p_e), ``items``.
        NaN where both raters always say the same one thing: agreement by chance alone is then complete.

    Raises:
        ValueError: no item was rated by both.
    """
    both = pd.concat([a, b], axis=1, keys=["a", "b"], join="inner")
    both = both[(both != NOT_RATED).all(axis=1)]
    if both.empty:
        raise ValueError("no item has been rated by both raters, so there is no agreement to speak of")
    names = sorted(set(both["a"]) | set(both["b"]))
    codes = np.stack([pd.Categorical(both[c], categories=names).codes for c in ("a", "b")])  # [rater, item]
    samples = np.random.default_rng(seed).integers(0, len(both), (replicates, len(both)))
    drawn = [_kappa(codes[:, sample], len(names))[0] for sample in samples]
    value, agreement, chance = _kappa(codes, len(names))
    known = [v for v in drawn if np.isfinite(v)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (np.nan, np.nan)
    numbers = {"kappa": value, "low": low, "high": high, "agreement": agreement, "chance": chance}
    return pd.Series(numbers | {"items": len(both)})


def _kappa(codes: np.ndarray, kinds: int) -> tuple[float, float, float]:
    shares = np.stack([np.bincount(rater, minlength=kinds) for rater in codes]) / codes.shape[1]
    agreement, chance = float((codes[0] == codes[1]).mean()), float((shares[0] * shares[1]).sum())
    return ((agreement - chance) / (1 - chance) if chance < 1 else np.nan), agreement, chance


def _item(name: str, text: Words, z: Float[np.ndarray, "row pos"], contexts: int) -> Item:
    largest = z.max()
    tokens, steps = [], []
    for row in np.argsort(-z.max(1), kind="stable")[:contexts]:
        at = int(z[row].argmax())
        window = slice(max(0, at - 12), at + 5)
        tokens.append(text.tokens[row, window].tolist())
        steps.append(np.ceil(STEPS * np.clip(z[row, window] / largest, 0, 1)).astype(int).tolist())
    return Item(name, tokens, steps)
