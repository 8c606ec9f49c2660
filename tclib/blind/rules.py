"""Hypotheses as rules: a rule says at which tokens of any text a feature should fire, so it can be wrong.

Token sets, regular expressions, relations between positions, and labels of the generator, combined with ``&``, ``|``
and ``~``. `parse` reads one from a line of text. `score` compares a rule with activations: precision, recall, F1 and
the correlation of rule and activation, each with an interval over rows and beside chance.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from transformer_lens.model_bridge import TransformerBridge

from tclib.inputs import bos_id
from tclib.inputs import words as are_words
from tclib.text import LabelledText

Hits = Bool[np.ndarray, "row pos"]
BOTH, MET = 3, 6  # columns of `_sums` that a moved rule changes
MEASURES = ["precision", "recall", "f1", "correlation"]
GRAMMAR = "tokens: a| b   tokens@-1: was| were   before 5: (   regex: \\d\\d;   label: citation.semicolon"


@dataclass(frozen=True)
class Words:
    """A text as rules read it. ``scored`` is False at BOS, which no rule and no score looks at."""

    tokens: np.ndarray  # [row, pos] of str; BOS reads as a line break
    labels: np.ndarray  # [row, pos] of str
    scored: Hits


def words(model: TransformerBridge, text: LabelledText) -> Words:
    """The strings of a text's tokens, beside its labels."""
    ids, places = np.unique(text.tokens.cpu().numpy(), return_inverse=True)
    bos = bos_id(model)
    strings = np.array(["\n" if i == bos else model.tokenizer.decode([i]) for i in ids.tolist()], dtype=object)
    return Words(strings[places].reshape(text.tokens.shape), text.labels, are_words(model, text.tokens).cpu().numpy())


@dataclass(frozen=True)
class Rule:
    """What is claimed of a feature, as a line of text and as code. Combine rules with ``&``, ``|`` and ``~``."""

    line: str
    holds: Callable[[Words], Hits]

    def hits(self, text: Words) -> Hits:
        """At which tokens the feature should fire; never at BOS."""
        return self.holds(text) & text.scored

    def __str__(self) -> str:
        return self.line

    def __and__(self, other: Rule) -> Rule:
        return Rule(f"{self} && {other}", lambda text: self.holds(text) & other.holds(text))

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self} || {other}", lambda text: self.holds(text) | other.holds(text))

    def __invert__(self) -> Rule:
        return Rule(f"!{self}", lambda text: ~self.holds(text))


# Capitalised, though they are functions: notebook 05 and hypotheses that people have written use these names.
def Tokens(*tokens: str, offset: int = 0) -> Rule:
    """The token ``offset`` places from here (0: this one, -1: the one before) is one of these."""
    if not tokens:
        raise ValueError("a token set needs at least one token")
    line = f"tokens{f'@{offset}' if offset else ''}: {'|'.join(tokens)}"
    return Rule(line, lambda text: _shifted(np.isin(text.tokens, tokens), offset))


def Before(within: int, *tokens: str) -> Rule:
    """One of these tokens is among the ``within`` tokens before this one: a relation between positions."""
    if within < 1 or not tokens:
        raise ValueError(f"within = {within}: look back at least one token, for at least one token")

    def holds(text: Words) -> Hits:
        there = np.isin(text.tokens, tokens)
        return np.any([_shifted(there, -back) for back in range(1, within + 1)], axis=0)

    return Rule(f"before {within}: {'|'.join(tokens)}", holds)


def Regex(pattern: str) -> Rule:
    """The text matches this regular expression, and the match ends inside this token. A row is one text."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None

    def holds(text: Words) -> Hits:
        found = np.zeros(text.tokens.shape, dtype=bool)
        for row, tokens in enumerate(text.tokens):
            ends = np.cumsum([len(token) for token in tokens])
            last = [match.end() - 1 for match in compiled.finditer("".join(tokens)) if match.end() > match.start()]
            found[row, np.searchsorted(ends, last, side="right")] = True
        return found

    return Rule(f"regex: {pattern}", holds)


def Label(name: str) -> Rule:
    """The generator's label of this token, or with ``"next ..."`` of the token after it, has this name.

    A part of a dotted name counts: ``"citation"`` holds at ``"citation.year"``.
    """

    def holds(text: Words) -> Hits:
        wanted, labels = name.removeprefix("next "), text.labels.astype(str)
        known = {label: wanted == label or wanted in label.split(".") for label in np.unique(labels)}
        if not any(known.values()):
            raise ValueError(f"the text has no label {wanted!r}: it has {', '.join(sorted(known))}")
        there = np.vectorize(known.get, otypes=[bool])(labels)
        return _shifted(there, 1) if name.startswith("next ") else there

    return Rule(f"label: {name}", holds)


def parse(line: str) -> Rule:
    """A rule from one line: clauses as in `GRAMMAR`, joined by ``&&`` or ``||`` (``&&`` binds first), ``!`` negates.

    Tokens are separated by ``|`` and their spaces count: ``" was"`` is another token than ``"was"``.

    Raises:
        ValueError: a clause that is none of these.
    """
    clauses = [map(_clause, alternative.split(" && ")) for alternative in line.split(" || ")]
    return reduce(or_, (reduce(and_, alternative) for alternative in clauses))


def _clause(clause: str) -> Rule:
    if clause.lstrip().startswith("!"):
        return ~_clause(clause.lstrip()[1:])
    clause = re.sub(r"^(\s*)latent: ", r"\1label: ", clause)  # the older name
    match = re.match(r"\s*(tokens|before|regex|label)(?:@([+-]?\d+)| (\d+))?: (.+)", clause, re.DOTALL)
    kind, offset, within, body = match.groups("") if match else ("",) * 4
    if kind == "tokens" and not within:
        return Tokens(*body.split("|"), offset=int(offset or 0))
    if kind == "before" and within:
        return Before(int(within), *body.split("|"))
    if kind in ("regex", "label") and not (offset or within):
        return Regex(body) if kind == "regex" else Label(body.strip())
    raise ValueError(f"{clause!r} is no clause of a rule; clauses look like this: {GRAMMAR}")


def score(
    rule: Rule,
    text: Words,
    activations: Float[np.ndarray, "row pos"],
    replicates: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How well a rule tells when a feature fires, over all tokens but BOS.

    ``precision`` is the share of the rule's tokens on which the feature fires (z > 0), ``recall`` the share of its
    firing that the rule names, ``correlation`` Pearson's between rule (0 or 1) and activation z. Chance is the same
    rule moved along the text by random numbers of tokens: as many hits, in the same bursts, in the wrong places.

    Args:
        replicates: of the bootstrap over rows (intervals), and as many moves for chance.

    Returns:
        By measure: ``value``, ``low`` and ``high`` (95%), ``chance`` (mean) and ``chance_high`` (97.5%). A measure
        that does not exist, as the precision of a rule that never holds, is 0.

    Raises:
        ValueError: shapes that differ, or a feature that never fires on this text.
    """
    if activations.shape != text.tokens.shape:
        raise ValueError(f"activations have shape {activations.shape}, but the text {text.tokens.shape}")
    z, hits, scored = activations * text.scored, rule.hits(text), text.scored
    if not (z > 0).any():
        raise ValueError("the feature never fires on this text: give more text")
    generator = np.random.default_rng(seed)
    weights = generator.poisson(1.0, (replicates, len(z)))
    by_row = _sums(hits, z, scored)  # [row, sum]
    bootstrap = _measures(weights @ by_row)
    # A moved rule has as many hits, so that only what it meets must be summed again: firing, and activation.
    flat, places, count = z[scored], np.flatnonzero(hits[scored]), int(scored.sum())
    chance = np.repeat(by_row.sum(0)[None], replicates, axis=0)
    for replicate, steps in enumerate(generator.integers(1, max(count, 2), replicates)):
        met = flat[(places + steps) % count]
        chance[replicate, [BOTH, MET]] = (met > 0).sum(), met.sum(dtype=float)
    chance = _measures(chance)
    columns = {
        "value": _measures(by_row.sum(0)[None])[0],
        "low": np.quantile(bootstrap, 0.025, axis=0),
        "high": np.quantile(bootstrap, 0.975, axis=0),
        "chance": chance.mean(0),
        "chance_high": np.quantile(chance, 0.975, axis=0),
    }
    return pd.DataFrame(columns, index=pd.Index(MEASURES, name="measure"))


def _sums(hits: Hits, z: np.ndarray, scored: Hits) -> Float[np.ndarray, "row sum"]:
    fires = z > 0
    parts = [scored, hits, fires, hits & fires, z, z * z, z * hits]
    return np.stack([part.sum(1, dtype=float) for part in parts], axis=1)


def _measures(sums: Float[np.ndarray, "case sum"]) -> Float[np.ndarray, "case measure"]:
    n, h, f, both, z, zz, zh = sums.T
    spread = np.sqrt(np.maximum(n * h - h * h, 0) * np.maximum(n * zz - z * z, 0))
    ratios = [(both, h), (both, f), (2 * both, h + f), (n * zh - h * z, spread)]
    return np.stack([np.divide(a, b, out=np.zeros_like(b), where=b > 0) for a, b in ratios], axis=1)


def _shifted(there: Hits, offset: int) -> Hits:
    """Whether it holds ``offset`` places from here; False beyond the row."""
    width = there.shape[1]
    start = width + max(-width, min(offset, width))
    return np.pad(there, ((0, 0), (width, width)))[:, start : start + width]
