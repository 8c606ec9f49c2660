"""Names that a person can say: what a feature fires on, in a few words, found by code from its strongest examples.

A name is a hypothesis about the strongest examples of one text, and no more than that: notebook 03 measures how often
such names fail elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.activations import hook_in, mlp_activations, our_name
from tclib.evaluation.metrics import check
from tclib.inputs import words
from tclib.model import token_string
from tclib.plots import feature_name
from tclib.replacement_model import ReplacementModel, joined

EXAMPLES = 40  # strongest activations from which a name is made
ENOUGH = 0.6  # share of their activation that a name has to cover
BEFORE, AFTER = 12, 4  # tokens around an example; an earlier number is looked for in those before it
WIDEST = 50  # a wider range of earlier numbers says nothing
PROMOTED = 5  # tokens that a feature raises most, in `Names.promotes`


class Names:
    """Names of features, from one pass over a text.

    ``names(0, 223)`` is ``31–34`` for a feature of MLP 0 that fires on these numbers, and ``17…`` for the beginning of
    longer ones; ``a number after 31–38`` if what came before tells more. It is ``war, siege`` for words, ``after the``
    where only the token in front is shared, ``various`` where nothing is, and ``silent`` if it never fires on the text.

    Args:
        tokens: rows of text, BOS first, as from `tclib.load_text`; a hundred rows name all but rare features.

    Raises:
        ValueError: tokens that do not fit the model, or an SAE of the MLP's output.
    """

    def __init__(self, replacement: ReplacementModel, tokens: Int[Tensor, "row pos"]) -> None:
        self.model, self.transcoders, self.tokens = joined(replacement).model, replacement.transcoders, tokens
        self._strings: dict[int, str] = {}
        self._strongest = strongest(replacement, tokens)

    def __call__(self, layer: int, feature: int) -> str:
        """The name alone, such as ``31–34``."""
        values, places = (part[feature] for part in self._strongest[layer])
        weights, places = values[values > 0].numpy(), places[values > 0]
        if len(weights) == 0:
            return "silent"
        width = self.tokens.shape[1]
        rows, at = places // width, places % width
        here = self._read(self.tokens[rows, at].tolist())
        if (name := _numbers(here, weights)) is not None:
            earlier = [self._number_before(int(row), int(pos)) for row, pos in zip(rows, at, strict=True)]
            before = _numbers(earlier, weights, WIDEST) if name.endswith("…") else None
            return name if before is None else f"a number after {before}"
        if (name := _words(here, weights, 3)) is not None:
            return name
        before = _words(self._read(self.tokens[rows, at - 1].tolist()), weights, 2)
        return "various" if before is None else f"after {before}"

    def full(self, layer: int, feature: int) -> str:
        """Number and name, such as ``mlp0[223] "31–34"``."""
        return f'{feature_name(layer, feature)} "{self(layer, feature)}"'

    def promotes(self, layer: int, feature: int) -> str:
        """The tokens whose logits the feature raises most by its direct path, such as ``39–52``."""
        effect = (self.transcoders[layer].written()[feature].float() @ self.model.W_U.float()).detach()
        top = effect.topk(PROMOTED)
        strings, weights = self._read(top.indices.tolist()), top.values.clamp(min=0).cpu().numpy() + 1e-9
        return _numbers(strings, weights) or ", ".join(s.strip() or repr(s) for s in strings[:3])

    def examples(self, layer: int, feature: int, k: int = 4) -> list[tuple[list[str], int]]:
        """The tokens around each of the ``k`` strongest activations, and which of them it is at."""
        values, places = (part[feature] for part in self._strongest[layer])
        found = []
        for place in places[values > 0][:k].tolist():
            row, at = divmod(place, self.tokens.shape[1])
            start = max(1, at - BEFORE)
            found.append((self._read(self.tokens[row, start : at + AFTER + 1].tolist()), at - start))
        return found

    def column(self, table: pd.DataFrame) -> pd.Series:
        """The name of each row of a table of `tclib.attribute`; empty where the source is no feature."""
        rows = table.to_dict("records")
        named = [self(r["layer"], r["feature"]) if r["kind"] == "feature" else "" for r in rows]
        return pd.Series(named, table.index, name="name")

    def _read(self, ids: Sequence[int]) -> list[str]:
        return [self._strings.setdefault(i, token_string(self.model, i)) for i in ids]

    def _number_before(self, row: int, pos: int) -> str:
        """The last number without a space in front, among the tokens before ``pos``; empty if there is none."""
        for string in reversed(self._read(self.tokens[row, max(1, pos - BEFORE) : pos].tolist())):
            if re.fullmatch(r"\d+", string):
                return string
        return ""


@torch.no_grad()
def strongest(
    replacement: ReplacementModel, tokens: Int[Tensor, "row pos"], k: int = EXAMPLES
) -> dict[int, tuple[Float[Tensor, "feature k"], Int[Tensor, "feature k"]]]:
    """By layer: each feature's k largest activations, BOS left out, and where they stand (row * width + position)."""
    best: dict[int, tuple[Tensor, Tensor]] = {}
    tokens, model, transcoders = check(replacement, tokens), replacement.model, replacement.transcoders
    for layer, transcoder in transcoders.items():
        if our_name(transcoder.config.hook_in) != hook_in(layer):
            raise ValueError(
                f"{transcoder.config.hook_in} is not the input of MLP {layer}: only what reads that can be named"
            )
    begin = 0
    for batch in mlp_activations(model, tokens, list(transcoders), batch_size=16):
        for layer, transcoder in transcoders.items():
            rows = torch.arange(len(batch[layer].x)) + begin
            places = words(model, tokens[rows]).flatten().nonzero().squeeze(1)
            z = transcoder.encode(batch[layer].x.flatten(0, 1)[places]).float().cpu()  # [place, feature]
            values, at = z.T.topk(min(k, len(places)))
            places = places + begin * tokens.shape[1]
            found = (values, places[at])
            if layer in best:
                both = [torch.cat(parts, 1) for parts in zip(best[layer], found, strict=True)]
                values, at = both[0].topk(min(k, both[0].shape[1]))
                found = (values, both[1].gather(1, at))
            best[layer] = found
        begin += len(rows)
    return best


def _numbers(strings: Sequence[str], weights: Float[np.ndarray, " example"], widest: int = 10**6) -> str | None:
    """The range that holds most of the numbers; ``…`` behind it where they begin a word.

    None if most are words, or the range is wider than ``widest``.
    """
    is_number = np.array([s.strip().isdecimal() for s in strings])
    if weights[is_number].sum() < ENOUGH * weights.sum():
        return None
    numbers = np.array([int(s) for s, good in zip(strings, is_number, strict=True) if good])
    digits = Counter(len(s.strip()) for s in strings if s.strip().isdecimal()).most_common(1)[0][0]
    order = np.argsort(numbers)
    share = weights[is_number][order].cumsum() / weights[is_number].sum()
    low, high = (numbers[order][np.searchsorted(share, q)] for q in (0.1, 0.9))
    if high - low > widest:
        return None
    low, high = f"{low:0{digits}}", f"{high:0{digits}}"
    begins = np.mean([s.startswith(" ") for s in strings if s.strip().isdecimal()]) > 0.5
    return (low if low == high else f"{low}–{high}") + "…" * bool(begins)


def _words(strings: Sequence[str], weights: Float[np.ndarray, " example"], most: int) -> str | None:
    """At most ``most`` tokens that share most of the activation; None if they do not."""
    shares = pd.Series(weights).groupby(np.array([s.strip() or repr(s) for s in strings], dtype=object)).sum()
    shares = shares.sort_values(ascending=False, kind="stable") / weights.sum()
    needed = int(np.searchsorted(shares.cumsum().to_numpy(), ENOUGH)) + 1
    return ", ".join(shares.index[:needed]) if needed <= most else None
