"""Query-key attribution: why a head attends where it does, as an exact sum over query sources x key sources.

With LayerNorm scales frozen, a head's query and keys are linear in what was written to the residual stream, so its
scores are bilinear. Softmax ignores a constant, so what is explained is a contrast over keys, with sum_j w_j = 0:

    sum_j w_j score(t, j)  =  q_t . sum_j w_j k_j  =  sum_a sum_b  q_a . k_b       a: query sources, b: key sources

Rotary embeddings rotate every k_j by its own position; that is linear too. The paper froze the patterns and left this
open (its case of "caught", mlp8[235], needs it). Attribution is bilinear, hence exact; what a source does to the
*pattern* goes through the softmax, is first order only, and stands beside the true effect in `removals`. Where queries
and keys are normalised (Qwen 3, Gemma 3, OLMo 2), those scales are frozen too; where scores are capped (Gemma 2), they
are explained before the cap.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.attribution import UnbalancedError
from tclib.circuits.query_key import COLUMNS, Cap, Collected, Side, read, reader_of, score_scale, seen_from
from tclib.targets import Target
from tclib.tracing import Trace

CHUNK = 1024  # query sources multiplied with all key sources together


@dataclass(frozen=True)
class ScoreTerms:
    """A contrast of one head's scores at one destination, in low rank: its terms are ``query.vectors @ key.vectors.T``.

    ``moved`` is what attention to each key is worth to the number whose change is asked for: ``sum_j pattern_j
    moved_j``. ``keys`` are the keys' positions, all that attention reaches.
    """

    name: str
    query: ScoreSources
    key: ScoreSources
    value: float
    scores: Float[Tensor, " key"]
    moved: Float[Tensor, " key"]
    keys: Int[Tensor, " key"]
    cap: Cap

    @torch.no_grad()
    def table(self, top: int = 20) -> pd.DataFrame:
        """The ``top`` largest terms and one row for the remainder; they sum to ``value``.

        Returns:
            ``query_*`` and ``key_*`` columns (`COLUMNS`) and ``contribution``; ``attrs`` holds ``target`` (its name),
            ``value`` and ``terms`` (how many there are).
        """
        best = torch.empty(0, 3, dtype=torch.float64)
        for start in range(0, len(self.query.vectors), CHUNK):
            block = self.query.vectors[start : start + CHUNK] @ self.key.vectors.T
            index = block.abs().flatten().topk(min(top, block.numel())).indices
            rows, columns = index // block.shape[1], index % block.shape[1]
            found = torch.stack([rows + start, columns, block[rows, columns]], 1).double().cpu()
            best = torch.cat([best, found])
        best = best[best[:, 2].abs().argsort(descending=True)[:top]]
        rest = pd.DataFrame([{"kind": "remainder"}], columns=COLUMNS)
        sides = {"query": (self.query, best[:, 0]), "key": (self.key, best[:, 1])}
        parts = [
            pd.concat([sources.table.iloc[rows.long().tolist()][COLUMNS].astype(object), rest], ignore_index=True)
            .astype(sources.table[COLUMNS].dtypes)
            .add_prefix(f"{side}_")
            for side, (sources, rows) in sides.items()
        ]
        listed = best[:, 2].tolist()
        table = pd.concat(parts, axis=1).assign(contribution=[*listed, self.value - sum(listed)])
        count = len(self.query.vectors) * len(self.key.vectors)
        table.attrs |= {"target": self.name, "value": self.value, "terms": count}
        return table

    @torch.no_grad()
    def pattern_without(self, side: Side, rows: Int[Tensor, "*case source"]) -> Float[Tensor, "*case key"]:
        """The head's pattern at the destination, softmax recomputed, when these sources are gone (together)."""
        return self.cap.softmax(self.scores - getattr(self, side).scores[rows].sum(-2))

    @torch.no_grad()
    def removals(self, side: Side) -> pd.DataFrame:
        """What each source of a side brings through the pattern: first order, and the true effect of removing it.

        Everything else is frozen: values, scales, and the other side. Units are those of ``moved``.

        Returns:
            `COLUMNS`, ``contribution`` (to the contrast), ``first_order`` and ``effect``, largest effect first.
        """
        sources, pattern = getattr(self, side), self.cap.softmax(self.scores)
        # d(sum_j pattern_j moved_j) / d score_j
        slope = self.cap.slope(self.scores) * pattern * (self.moved - pattern @ self.moved)
        alone = torch.arange(len(sources.scores), device=slope.device)[:, None]
        table = sources.table.copy()
        table["first_order"] = (sources.scores @ slope).cpu().numpy()
        table["effect"] = ((pattern - self.pattern_without(side, alone)) @ self.moved).cpu().numpy()
        return table.sort_values("effect", key=abs, ascending=False)


@dataclass(frozen=True)
class ScoreSources:
    """One side's sources. The table's ``contribution`` is summed over all sources of the other side."""

    table: pd.DataFrame  # its index is the row number of the tensors
    vectors: Float[Tensor, "source d_head"]  # of a key: summed over positions with the contrast's weights
    scores: Float[Tensor, "source key"]  # what the source brings to each score


@torch.no_grad()
def score_terms(trace: Trace, layer: int, head: int, destination: int, source: int) -> ScoreTerms:
    """score(destination, source) minus the pattern's mean score, the part of it that decides the attention paid.

    It is also the derivative of log pattern[destination, source] along the scores.

    Raises:
        ValueError: no such layer, head or position, or a source after the destination.
        UnbalancedError: |sum - value| > 1e-5 * sum |term| (1e-10 for a model in float64).
    """
    destination, source = _pair(trace, layer, head, destination, source)
    keys = seen_from(trace, layer, destination)
    moved = (keys == source).to(trace.like)
    name = f"score of head {layer}.{head} from {destination} to {source} minus mean score"
    weights = moved - _pattern(trace, layer, head, destination, keys)
    return _terms(trace, layer, head, destination, name, weights, moved, keys)


@torch.no_grad()
def output_terms(trace: Trace, target: Target, layer: int, head: int) -> ScoreTerms:
    """What the scores do to ``target`` through the head's output, to first order through the softmax.

    With A the pattern and g_j what the head would bring from key j alone, ``w_j = A_j (g_j - sum_i A_i g_i)``: an
    approximation, unlike `score_terms`; `ScoreTerms.removals` compares it with the true effect.

    Raises:
        ValueError: a head that does not write before the target reads.
        UnbalancedError: as `score_terms`.
    """
    trace.layer(layer)
    if layer not in trace.attention_before(target.place, target.layer):
        raise ValueError(f"head {layer}.{head} does not come before {target.name}")
    here, _ = _pair(trace, layer, head, target.position, target.position)
    keys, block = seen_from(trace, layer, here), trace.block(layer)
    W_O = block.W_O[head] @ target.pulled_back(trace) / trace.frozen_scale(block.after_attn)[here]
    moved = trace.cache[f"blocks.{layer}.attn.hook_v"][keys, head // block.group] @ W_O
    pattern = _pattern(trace, layer, head, here, keys)
    slope = Cap.of(trace).slope(_scores(trace, layer, head, keys, here)) * pattern
    name = f"first-order effect of the scores of head {layer}.{head} on {target.name}"
    return _terms(trace, layer, head, here, name, slope * (moved - pattern @ moved), moved, keys)


@torch.no_grad()
def score_target(trace: Trace, layer: int, head: int, destination: int, source: int, side: Side) -> Target:
    """One side of a score as a target for `tclib.attribution.attribute`, the other side frozen.

    "query": the number of `score_terms`, read at the destination. "key": the score itself, read at the source.
    """
    destination, source = _pair(trace, layer, head, destination, source)
    keys = seen_from(trace, layer, destination)
    name = f"{side} of head {layer}.{head} from {destination} to {source}"
    if side == "key":
        place, vector = source, read(trace, layer, head, "query", keys[-1:])[0]
    else:
        place, vectors = destination, read(trace, layer, head, "key", keys)
        vector = vectors[keys == source][0] - _pattern(trace, layer, head, destination, keys) @ vectors
    return Target(
        name, "attn_in", layer, place, *reader_of(trace, layer, head, side, place, vector * score_scale(trace, layer))
    )


def _terms(trace, layer, head, here, name: str, weights: Tensor, moved: Tensor, seen: Tensor) -> ScoreTerms:
    keys = read(trace, layer, head, "key", seen) * score_scale(trace, layer)
    query = read(trace, layer, head, "query", seen[-1:])[0] * score_scale(trace, layer)
    collected = Collected(trace, layer, head, "query", seen[-1:])
    q = collected.vectors(torch.ones_like(weights[:1]))
    query_side = ScoreSources(_contributing(collected.table, q @ (weights @ keys)), q, q @ keys.T)
    collected = Collected(trace, layer, head, "key", seen)
    k = collected.vectors(weights) * score_scale(trace, layer)
    key_side = ScoreSources(_contributing(collected.table, k @ q.sum(0)), k, collected.scores(query))
    scores = _scores(trace, layer, head, seen, here)
    value = (weights @ scores).item()
    _check(name, q, k, value, (weights * scores).abs().sum().item())
    return ScoreTerms(name, query_side, key_side, value, scores, moved, seen, Cap.of(trace))


def _scores(trace: Trace, layer: int, head: int, keys: Tensor, here: int) -> Float[Tensor, " key"]:
    """The model's own scores; where it caps them, those before that are not among its hooks and made anew."""
    if not Cap.of(trace).at:
        return trace.cache[f"blocks.{layer}.attn.hook_attn_scores"][head, here, keys]
    query, vectors = read(trace, layer, head, "query", keys[-1:])[0], read(trace, layer, head, "key", keys)
    return vectors @ query * score_scale(trace, layer)


def _check(name: str, q: Tensor, k: Tensor, value: float, rounding: float) -> None:
    """Where the contrast is next to nothing (all attention on one key), the scores' own rounding is all there is."""
    total = (q.sum(0) @ k.sum(0)).item()
    size = sum((part @ k.T).abs().sum().item() for part in q.split(CHUNK))
    tolerance = 1e-5 if q.dtype == torch.float32 else 1e-10
    if not abs(total - value) <= tolerance * max(size, rounding):
        raise UnbalancedError(
            f"the terms of the {name} sum to {total:.6f}, not {value:.6f}: "
            "is this a model of a supported family without other edits?"
        )


def _pattern(trace: Trace, layer: int, head: int, destination: int, keys: Tensor) -> Float[Tensor, " key"]:
    return trace.cache[f"blocks.{layer}.attn.hook_pattern"][head, destination, keys]


def _pair(trace: Trace, layer: int, head: int, destination: int, source: int) -> tuple[int, int]:
    trace.layer(layer)
    trace.head(head)
    destination, source = trace.position(destination), trace.position(source)
    if source > destination:
        raise ValueError(f"position {destination} cannot attend to position {source}, which comes after it")
    if source not in seen_from(trace, layer, destination):
        raise ValueError(f"position {source} is outside the sliding window of layer {layer} at position {destination}")
    return destination, source


def _contributing(table: pd.DataFrame, contributions: Tensor) -> pd.DataFrame:
    return table.assign(contribution=contributions.cpu().numpy())
