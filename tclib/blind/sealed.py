"""A feature behind a seal: its circuit and its weights can be read, the text on which it fires only afterwards.

The blind case study of the paper (section 5 and appendix): read a feature's circuit and de-embeddings, write a
hypothesis, and only then look. Positions are told as offsets from where the feature fires, tokens not at all; what a
path reads is told by the weights, as the vocabulary tokens that its last node prefers. A *restricted* seal also hides
which features of MLP0 are active: they are nearly tokens themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib import connections, targets
from tclib.activations import passes
from tclib.attribution import attribute
from tclib.blind.rules import Rule, Words, score
from tclib.circuits.one_step import Node, prompt_graph
from tclib.circuits.path_search import best_first
from tclib.inputs import bos_id, check_tokens
from tclib.model import token_strings
from tclib.plots import feature_name, highlighted
from tclib.replacement_model import ReplacementModel, joined
from tclib.targets import Target
from tclib.tracing import Trace, trace
from tclib.transcoder import Transcoder


class SealedError(ValueError):
    """Something was asked of a sealed feature that the game does not allow yet."""


@torch.no_grad()
def activations(
    model: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    sources: Mapping[str, Transcoder | str],
    batch_size: int = 16,
) -> dict[str, Float[np.ndarray, "row pos unit"]]:
    """Compute the activations of units at every token, in one pass; 0 at BOS.

    Args:
        sources: by name, a transcoder or SAE, or a hook whose values are units themselves (neurons).

    Raises:
        ValueError: a hook that the model does not have, or tokens that do not fit (`tclib.inputs.check_tokens`).
    """
    hooks = {name: s if isinstance(s, str) else s.config.hook_in for name, s in sources.items()}
    unknown = sorted(set(hooks.values()) - set(model.hook_dict))
    if unknown:
        raise ValueError(f"this model has no {unknown[0]}: do its units belong to another model?")
    tokens = check_tokens(model, tokens)
    stop = 1 + max(int(hook.split(".")[1]) for hook in hooks.values())
    parts: dict[str, list[Tensor]] = {name: [] for name in sources}
    for kept, seen in passes(model, tokens, set(hooks.values()), batch_size, stop):
        for name, source in sources.items():
            values = seen[hooks[name]] if isinstance(source, str) else source.encode(seen[hooks[name]])
            parts[name].append((values * kept[..., None]).cpu())
    return {name: torch.cat(part).numpy() for name, part in parts.items()}


def draw(fired: Int[np.ndarray, " feature"], number: int, seed: int, least: int = 30) -> list[int]:
    """Ids drawn before anything is read: ``number`` of the features that fired at least ``least`` times, by the seed.

    Raises:
        ValueError: fewer than that many features fire so often.
    """
    live = np.flatnonzero(fired >= least)
    if not 0 < number <= len(live):
        raise ValueError(f"{number} features cannot be drawn from the {len(live)} that fire {least} times or more")
    return sorted(np.random.default_rng(seed).choice(live, number, replace=False).tolist())


@dataclass(frozen=True)
class Hypothesis:
    """A rule, who wrote it, and whether the text had been seen by then."""

    rule: Rule
    by: str
    when: str  # "blind" or "after looking"


class Seal:
    """One drawn feature. Nothing public tells a token of the text before `commit` and `reveal`."""

    def __init__(
        self,
        replacement: ReplacementModel,
        layer: int,
        index: int,
        tokens: Int[Tensor, "row pos"],
        activations: Float[np.ndarray, "row pos"],
        examples: int = 3,
        seed: int = 0,
        restricted: bool = False,
    ):
        """Choose, by the seed, examples of different rows where the feature reaches half of its largest activation.

        Args:
            activations: of this feature on ``tokens``.

        Raises:
            ValueError: the feature never fires on this text.
        """
        index, model = joined(replacement).feature(layer, index), replacement.model
        tokens = check_tokens(model, tokens)
        if activations.shape != tuple(tokens.shape):
            raise ValueError(f"activations have shape {activations.shape}, but the text {tuple(tokens.shape)}")
        if not activations.max() > 0:
            raise ValueError(f"{feature_name(layer, index)} never fires on this text: draw another, or give more text")
        self.name, self.layer, self.index, self.restricted = feature_name(layer, index), layer, index, restricted
        self.hypotheses: list[Hypothesis] = []
        self.broken = False
        self._model, self._tokens, self._activations = model, tokens, activations
        at = activations.argmax(1)
        strong = np.flatnonzero(activations.max(1) >= activations.max() / 2)
        # A row of packed text may begin with the end of a document, and so with two BOS; a prompt may not.
        inside = (tokens[:, 1] != bos_id(model)).numpy()
        rows = [row for row in np.random.default_rng([seed, layer, index]).permutation(strong) if inside[row]][
            :examples
        ]
        if not rows:
            raise ValueError(
                f"{feature_name(layer, index)} is strong only behind two BOS: draw another, or give more text"
            )
        prompts = [tokens[row, : at[row] + 1] for row in rows]
        self._traces = [trace(replacement, prompt) for prompt in prompts]
        # Half a second each, and players read again; functools.cache would tie the traces to themselves in a cycle.
        self._circuits: dict[tuple[int, float], pd.DataFrame] = {}
        self.activations = [float(activations[row, at[row]]) for row in rows]

    def __repr__(self) -> str:
        state = "broken" if self.broken else "restricted" if self.restricted else "sealed"
        return f"<{self.name}, {state}, {len(self.activations)} examples, {len(self.hypotheses)} hypotheses>"

    def de_embed(self, heads: Sequence[connections.Head] = (), top: int = 12) -> list[str]:
        """The vocabulary tokens that drive the feature directly, or through heads' OV circuits (weights only)."""
        return connections.de_embed(self._traces[0], self._target(0), heads).index[:top].tolist()

    def de_embed_through_mlp0(self, heads: Sequence[connections.Head] = (), top: int = 12) -> list[str]:
        """The same with what MLP0 makes of each token.

        Raises:
            SealedError: the seal is restricted.
        """
        if self.restricted:
            raise SealedError(f"{self.name} is restricted: activations of MLP0's features are hidden, use de_embed")
        table = connections.de_embed_through_mlp0(self._traces[0], self._target(0), heads)
        return table.index[:top].tolist()

    def writes(self, top: int = 12) -> list[str]:
        """The vocabulary tokens whose logits the feature raises most, when nothing comes in between (weights only)."""
        return connections.logit_lens(self._traces[0], self.layer, self.index).index[:top].tolist()

    def circuit(self, example: int = 0, share: float = 0.03) -> pd.DataFrame:
        """The largest paths from tokens to the feature on one hidden example, tokens told by the weights alone.

        Args:
            share: paths below this share of the feature's pre-activation are left to the remainder.

        Returns:
            ``offset`` of the token, ``route`` from the feature backwards, ``share`` (of the pre-activation, signed) and
            the vocabulary tokens that the route's last node ``prefers``; ``attrs["remainder"]`` is the share of all
            that is not listed. The first token of a text stands as "start".
        """
        if (example, share) not in self._circuits:
            self._circuits[example, share] = self._paths(example, share)
        return self._circuits[example, share].copy()

    def _paths(self, example: int, share: float) -> pd.DataFrame:
        traced, target = self._traces[example], self._target(example)
        found = best_first(prompt_graph(traced), target, share * abs(target.value(traced)), limit=4_000)
        rows: dict[tuple, float] = {}
        for path in found.paths:
            if path.nodes[-1].kind == "embedding":
                key = (path.nodes[-1].position, tuple(self._shown(path.nodes[:-1])))
                rows[key] = rows.get(key, 0.0) + path.contribution / target.value(traced)
        here = target.position
        records = [
            {
                "offset": position - here if position else "start",
                "route": " <- ".join(_offset(node, here) for node in nodes) or "direct",
                "share": value,
                "prefers": tuple(self._tip(traced, target, nodes)),
            }
            for (position, nodes), value in rows.items()
        ]
        table = pd.DataFrame(records, columns=["offset", "route", "share", "prefers"])
        table = table.sort_values("share", key=abs, ascending=False, ignore_index=True)
        table.attrs["remainder"] = 1 - table["share"].sum()
        return table

    def reading(self, example: int = 0, share: float = 0.03) -> pd.DataFrame:
        """The circuit by token: for each ``offset`` and ``prefers``, the summed ``share`` and how many ``routes``."""
        paths = self.circuit(example, share)
        groups = paths.groupby(["offset", "prefers"], sort=False)["share"]
        table = groups.agg(share="sum", routes="size").reset_index()
        return table.sort_values("share", key=abs, ascending=False, ignore_index=True)

    def readings(self, top: int = 4) -> pd.DataFrame:
        """The ``top`` rows of every example's `reading`, its tokens in quotes for people."""
        tables = {f"example {number}": self.reading(number).head(top) for number in range(len(self.activations))}
        table = pd.concat(tables)
        return table.assign(prefers=[" ".join(map(repr, tokens)) for tokens in table["prefers"]])

    def spread(self, example: int = 0) -> float:
        """How many sources the feature has at one step, as a participation ratio: (sum |c|)^2 / sum c^2."""
        sizes = attribute(self._traces[example], self._target(example))["contribution"].abs()
        return float(sizes.sum() ** 2 / (sizes**2).sum())

    def commit(self, rule: Rule, by: str) -> None:
        """Write a hypothesis down. It stays, and says whether it was written before or after the seal was broken."""
        self.hypotheses.append(Hypothesis(rule, by, "after looking" if self.broken else "blind"))

    def reveal(self, top: int = 4, before: int = 14, after: int = 3) -> str:
        """Break the seal: the ``top`` rows of strongest firing as HTML, activation as shade.

        Raises:
            SealedError: no hypothesis has been written.
        """
        if not self.hypotheses:
            raise SealedError(f"{self.name} is sealed: commit a hypothesis first, even a poor one")
        self.broken = True
        parts = []
        for row in np.argsort(-self._activations.max(1), kind="stable")[:top]:
            at = int(self._activations[row].argmax())
            window = slice(max(0, at - before), at + after + 1)
            strings = token_strings(self._model, self._tokens[row, window])
            parts.append(highlighted(strings, self._activations[row, window].tolist(), float(self._activations.max())))
        return "".join(parts)

    def scores(self, text: Words, activations: Float[np.ndarray, "row pos"]) -> pd.DataFrame:
        """Every hypothesis scored on a text (see `score`), one row each; the interval is that of the correlation."""
        tables = [score(hypothesis.rule, text, activations) for hypothesis in self.hypotheses]
        rows = [
            {"feature": self.name, "hypothesis": str(h.rule), "by": h.by, "when": h.when}
            | t["value"].to_dict()
            | {"low": t.low["correlation"], "high": t.high["correlation"], "chance": t.chance_high["correlation"]}
            for h, t in zip(self.hypotheses, tables, strict=True)
        ]
        return pd.DataFrame(rows)

    def _target(self, example: int) -> Target:
        return targets.feature(self._traces[example], self.layer, self.index)

    def _shown(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """The nodes that may be told: a restricted route ends before MLP0's feature."""
        if not self.restricted:
            return nodes
        hidden = [i for i, node in enumerate(nodes) if (node.kind, node.layer) == ("feature", 0)]
        return nodes[: hidden[0]] if hidden else nodes

    def _tip(self, traced: Trace, target: Target, nodes: Sequence[Node], top: int = 6) -> list[str]:
        """What the route's last feature, or the target, reads through the heads behind it."""
        last = max((i for i, node in enumerate(nodes) if node.kind == "feature"), default=-1)
        heads = [(node.layer or 0, node.head or 0) for node in nodes[last + 1 :]]
        reads = target
        if last >= 0:
            reads = targets.feature(traced, nodes[last].layer or 0, nodes[last].feature or 0)
        return connections.de_embed(traced, reads, heads).index[:top].tolist()


def _offset(node: Node, here: int) -> str:
    if not node.position:
        return node._replace(position=None).name + "@start"
    return node._replace(position=node.position - here).name
