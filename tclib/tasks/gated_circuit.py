"""Which few nodes are enough? A circuit with everything outside it held at its mean over YY.

Nodes are attention heads, transcoder features, and what each transcoder misses of its MLP (its error, with the skip
path if it has one; the whole MLP where there is no transcoder), each at all tokens at once. A circuit C is judged by

    share(C) = (m(C) - m(empty)) / (m(model) - m(empty)),     m: mean probability difference

which may exceed 1: nodes that were left out may have worked against the answer. Live nodes are computed from what the
patched model gives them, so a circuit must carry the year by itself (as in Marks et al. 2024, "Sparse Feature
Circuits").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from tclib.activations import hook_in, hook_out
from tclib.interventions import Hook
from tclib.replacement_model import ReplacementModel, joined
from tclib.tasks import greater_than as gt
from tclib.transcoder import is_cross_layer

Node = tuple[str, int, int]  # ("head" | "feature" | "error", layer, index); an error has index 0


class Gated:
    """A model in which every node has a gate: 1 lets it live, 0 holds it at its mean over YY.

    ``nodes`` are those that vary over YY in these prompts; the gates of all others would change nothing.
    """

    @torch.no_grad()
    def __init__(self, replacement: ReplacementModel, prompts: gt.Prompts):
        model, transcoders = joined(replacement).model, replacement.transcoders
        gt.check_prompts(model, prompts)
        if is_cross_layer(transcoders):
            raise ValueError("a small circuit is made of nodes that write to one layer: give per-layer transcoders")
        replacement.need_transcoders()
        self.model, self.transcoders, self.prompts = model, transcoders, prompts
        layers = range(model.cfg.n_layers)
        names = [f for n in layers for f in (f"blocks.{n}.attn.hook_z", hook_in(n), self._out(n))]
        varies: dict[tuple[str, int], Tensor] = {}
        self.means = []
        first = 0
        for tokens in prompts.groups:
            rows = replace(prompts, groups=(tokens,), frame=prompts.frame.iloc[first : first + len(tokens)])
            first += len(tokens)
            _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=names.__contains__)
            means = {}
            for layer in layers:
                live = {"head": cache[f"blocks.{layer}.attn.hook_z"]}
                live |= self._mlp(layer, cache[hook_in(layer)], cache[self._out(layer)])
                for kind, value in live.items():
                    mean = gt.mean_over_years(value.flatten(1), rows).view_as(value)
                    means[kind, layer] = mean
                    moves = (value - mean).square()
                    moves = moves.sum(-1) if kind == "head" else moves  # [row, pos, node or d_model]
                    moves = moves.sum() if kind == "error" else moves.flatten(0, 1).sum(0)
                    varies[kind, layer] = varies.get((kind, layer), 0) + moves.view(-1)
            self.means.append((tokens.to(model.cfg.device), means))
        self.sizes = {key: len(moves) for key, moves in varies.items()}
        self.nodes = [(*key, i) for key, moves in varies.items() for i in (moves > 1e-8).nonzero()[:, 0].tolist()]
        self.empty, self.whole = self.difference([]), self.difference(self.nodes)

    def difference(self, circuit: Sequence[Node]) -> float:
        """m(circuit): the mean probability difference with only these nodes live."""
        gates = {key: torch.zeros(size, device=self.model.cfg.device) for key, size in self.sizes.items()}
        for kind, layer, index in circuit:
            if (kind, layer) not in gates or not 0 <= index < self.sizes[kind, layer]:
                raise ValueError(f"this model has no node {(kind, layer, index)}")
            gates[kind, layer][index] = 1.0
        with torch.no_grad():
            return self._difference(gates).item()

    def share(self, circuit: Sequence[Node]) -> float:
        """(m(circuit) - m(empty)) / (m(model) - m(empty)); NaN if nothing depends on YY."""
        return (self.difference(circuit) - self.empty) / (self.whole - self.empty or float("nan"))

    def scores(self, steps: int = 5) -> pd.Series:
        """Each node's part in m(model) - m(empty): gradients of its gate, integrated while all gates open together.

        Integrated gradients (Sundararajan et al. 2017), so the scores sum to that difference up to the step size.
        """
        totals = {key: torch.zeros(size, device=self.model.cfg.device) for key, size in self.sizes.items()}
        for step in range(steps):
            gates = {key: torch.full_like(t, (step + 0.5) / steps, requires_grad=True) for key, t in totals.items()}
            with torch.enable_grad():
                gradients = torch.autograd.grad(self._difference(gates), list(gates.values()))
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total += gradient / steps
        values = [totals[kind, layer][index].item() for kind, layer, index in self.nodes]
        index = pd.MultiIndex.from_tuples(self.nodes, names=["kind", "layer", "index"])
        return pd.Series(values, index, name="score").sort_values(key=abs, ascending=False)

    def _difference(self, gates: dict[tuple[str, int], Tensor]) -> Tensor:
        answers = []
        for tokens, means in self.means:
            with self.model.hooks(fwd_hooks=self._hooks(gates, means)):
                answers.append(gt.year_probabilities(self.model(tokens)[:, -1], self.prompts.answers))
        return gt.probability_difference(torch.cat(answers), self.prompts.bounds).mean()

    def _hooks(self, gates: dict, means: dict) -> list[Hook]:
        hooks, inputs = [], {}

        def mixed(kind: str, layer: int, live: Tensor) -> Tensor:
            gate = gates[kind, layer][:, None] if kind == "head" else gates[kind, layer]
            return means[kind, layer] + gate * (live - means[kind, layer])

        for layer in range(self.model.cfg.n_layers):

            def attention(z: Tensor, hook, layer=layer) -> Tensor:
                return mixed("head", layer, z)

            def remember(x: Tensor, hook, layer=layer) -> None:
                inputs[layer] = x

            def mlp(y: Tensor, hook, layer=layer) -> Tensor:
                live = self._mlp(layer, inputs.pop(layer), y)
                out = mixed("error", layer, live["error"])
                if "feature" not in live:
                    return out
                transcoder = self.transcoders[layer]
                return out + mixed("feature", layer, live["feature"]) @ transcoder.W_dec + transcoder.b_dec

            hooks += [(f"blocks.{layer}.attn.hook_z", attention), (hook_in(layer), remember), (self._out(layer), mlp)]
        return hooks

    def _out(self, layer: int) -> str:
        return self.transcoders[layer].config.hook_out if layer in self.transcoders else hook_out(layer)

    def _mlp(self, layer: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The MLP's output y as features and what they miss."""
        if layer not in self.transcoders:
            return {"error": y}
        transcoder = self.transcoders[layer]
        z = transcoder.encode(x)
        return {"feature": z, "error": y - z @ transcoder.W_dec - transcoder.b_dec}


def find(gated: Gated, least: float = 0.9) -> pd.DataFrame:
    """A small circuit with a share of at least ``least``, from which no single node can be taken away.

    Greedy: nodes enter in the order of their |`Gated.scores`| until the share is reached, then leave one at a time, the
    smallest first, wherever the share allows it, until none can.

    Returns:
        One row per node, largest |score| first: ``kind``, ``layer``, ``index``, ``score`` and ``without``, the share of
        the circuit without this node (below ``least`` for each). ``table.attrs["share"]`` is that of the circuit.

    Raises:
        ValueError: the prompts are not about YY (the model does no better than with all nodes at their mean).
    """
    if not gated.whole - gated.empty > 0.01:
        raise ValueError(f"with no node live the model does as well ({gated.empty:.3f} against {gated.whole:.3f})")
    scores = gated.scores()
    ordered, size = scores.index.tolist(), 1
    while gated.share(ordered[:size]) < least and size < len(ordered):
        size = min(len(ordered), size + max(1, size // 4))
    circuit, without = ordered[:size], {}
    shrinking = True
    while shrinking:
        shrinking = False
        for node in list(reversed(circuit)):
            others = [other for other in circuit if other != node]
            without[node] = gated.share(others)
            if without[node] >= least:
                circuit, shrinking = others, True
    table = pd.DataFrame(circuit, columns=["kind", "layer", "index"])
    table["score"] = scores[circuit].to_numpy()
    table["without"] = [without[node] for node in circuit]
    table.attrs["share"] = gated.share(circuit)
    return table


def drawn_like(gated: Gated, circuit: Sequence[Node], seed: int) -> list[Node]:
    """As many nodes of each kind, drawn at random from those that vary."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    for kind in sorted({node[0] for node in circuit}):
        same = [node for node in gated.nodes if node[0] == kind]
        number = sum(node[0] == kind for node in circuit)
        drawn += [same[i] for i in torch.randperm(len(same), generator=generator)[:number].tolist()]
    return drawn
