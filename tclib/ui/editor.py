"""A graph to work with: pin, group, prune and name its nodes in the browser, edit features and compare with the model.

Python makes the graph and measures edits; all else is done by the front end (`tclib.ui.graph_page`) alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import ipywidgets as w
import pandas as pd

from tclib.circuits.editing import FROZEN, edited_trace, predict
from tclib.circuits.graph import Graph, build_graph, salient_logits
from tclib.circuits.neuronpedia import graph_json, node_ids
from tclib.circuits.pruning import influence, prune
from tclib.features.naming import Names
from tclib.model import to_tokens, token_strings
from tclib.replacement_model import ReplacementModel, joined
from tclib.targets import Target
from tclib.tracing import Trace, trace
from tclib.ui.answers import Question, next_tokens
from tclib.ui.base import Explorer, Work
from tclib.ui.graph_page import FRONT, cards, script
from tclib.ui.selected import Selected

MOST_FEATURES, MOST_NODES = 3000, 500  # of the graph that predicts; of the one that is shown
CLOSE = 0.02  # of a feature's activation, by which that in an opened file may differ from ours


def moved_tokens(before: Trace, after: Trace) -> pd.DataFrame:
    """The likeliest next tokens after an edit: ``next_token``, and its probability ``before`` and ``after``."""
    best, old = next_tokens(after), before.logits[-1].softmax(-1)
    probabilities = old[best["id"].tolist()].tolist()
    return pd.DataFrame({"next_token": best["token"], "before": probabilities, "after": best["probability"]})


class Editor(Explorer):
    """One graph. Its pins, supernodes, names and edits are in ``state``, as ``qParams`` of Neuronpedia's files."""

    def __init__(
        self,
        replacement: ReplacementModel,
        prompt: str,
        token: str = "",
        other: str = "",
        selected: Selected | None = None,
        names: Names | None = None,
    ):
        """Args:
        token: the answer to explain, rather than ``other`` if that is given; empty explains the likeliest next tokens.
        names: names of the features, and the text that their cards quote; without it they have their numbers.
        """
        self.replacement, self.model, self.names = joined(replacement), replacement.model, names
        # A name that says nothing is none: then the number stands there.
        self._name = cache(
            lambda *feature: "" if names is None or (name := names(*feature)) in ("various", "silent") else name
        )
        self.file: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self._sent, self._told = 0, 0
        self.question = Question(prompt, token, other)
        self.prompt, self.token, self.other = self.question.fields
        self.asked = w.Textarea(description="asked by the graph", continuous_update=False)
        self.view, self.data, self.result = w.HTML(FRONT, layout=w.Layout(width="100%")), w.HTML(), w.HTML()
        for name in ("asked", "data", "result"):
            getattr(self, name).add_class(f"tcg-{name}")
        views = [self.view, self.data, self.result, self.asked]
        super().__init__("Circuit editor", self.question.rows, views, selected)
        self.watch(self._start, *self.question.fields)
        self.watch(self._answer, self.asked)
        self.start(self._start)

    def _start(self, linked: dict[str, Any] | None = None) -> Work:
        yield 0.0
        traced = trace(self.replacement, self.prompt.value)
        targets = self._targets(traced)
        yield 0.1
        graph = build_graph(traced, targets, MOST_FEATURES)
        yield 0.6
        held = influence(graph).sort(descending=True).values.cumsum(0)
        shown = prune(graph, min(0.99, float(held[min(MOST_NODES, len(held)) - 1] / held[-1])))
        name = self.model.cfg.model_name or "model"
        file = graph_json(traced, shown, "circuit", name, names=self._name if self.names else None)
        file["metadata"]["info"]["question"] = {"answer": self.token.value, "other": self.other.value}
        yield 0.8
        places = [node["node_id"].split("_") for node in file["nodes"] if node["activation"] is not None]
        told = cards(traced, [(int(layer), int(feature)) for layer, feature, _ in places], self.names)
        lost = self._carry_over(file) if linked is None else []
        self._use(traced, graph, targets, file)
        self.state = file["qParams"] = file["qParams"] | (linked or self.state)
        self._sent += 1
        question = {"prompt": self.prompt.value, **file["metadata"]["info"]["question"]}
        self.data.value = script(
            {"n": self._sent, "file": file, "cards": told, "modes": list(FROZEN), "question": question}
        )
        said = (
            f"{len(file['nodes'])} of {len(graph.nodes)} nodes and {len(file['links'])} links that explain "
            f"{', '.join(target.name for target, _ in targets)}."
        )
        if lost:
            said += (
                " No longer pinned, grouped or edited, because this graph does not have them or has another token "
                f"there: {', '.join(lost)}."
            )
        return said + self._remeasured()

    def _targets(self, traced: Trace) -> list[tuple[Target, float]]:
        return [(self.question.target(traced), 1.0)] if self.token.value else salient_logits(traced)

    def _use(self, traced: Trace, graph: Graph, targets: list[tuple[Target, float]], file: dict[str, Any]) -> None:
        """Take over all of it together, or nothing."""
        self.trace, self.graph, self.targets, self.file = traced, graph, [target for target, _ in targets], file
        shown = {node["node_id"] for node in file["nodes"]}
        self.rows = {name: row for row, name in node_ids(traced, graph).items() if name in shown}
        self._measured: Any = None
        self.result.value = ""
        self.question.show(traced)

    def _carry_over(self, file: dict[str, Any]) -> list[str]:
        """Let pins, supernodes and edits go of nodes that the next graph does not have, or has at another token."""
        old, new = (f["metadata"]["prompt_tokens"] if f else [] for f in (self.file, file))
        same = {p for p, pair in enumerate(zip(old, new, strict=False)) if pair[0] == pair[1]}
        there = {node["node_id"] for node in file["nodes"] if node["ctx_idx"] in same}
        pinned, groups = (self.state.get(key, []) for key in ("pinnedIds", "supernodes"))
        kept = [[name, *(i for i in ids if i in there)] for name, *ids in groups]
        self.state["pinnedIds"] = [i for i in pinned if i in there]
        self.state["supernodes"] = [group for group in kept if len(group) > 1]
        if edits := [[i, value] for i, value in self.state.pop("edits", []) if i in there]:
            self.state["edits"] = edits
        return sorted({*pinned, *(i for _, *ids in groups for i in ids)} - there)

    def _answer(self) -> str | Work:
        message = json.loads(self.asked.value)
        if "open" in message:
            return self._open(message["open"]["metadata"], message["open"]["features"], message["state"])
        if "question" in message:
            return self._restore(message["question"])
        if message["of"] != self._sent:
            return ""  # about a graph that is gone
        before, self.state = self.state.get("clickedId"), message["state"]
        chosen = self.state.get("clickedId")
        if chosen != before and chosen in self.rows:
            node = self.graph.nodes.iloc[self.rows[chosen]]
            if node["kind"] == "feature":
                self.choose(int(node["layer"]), int(node["feature"]))
        if self._edits() != self._measured:
            return self._measure()
        counts = {"nodes pinned": "pinnedIds", "supernodes": "supernodes", "edits": "edits"}
        return ", ".join(f"{len(self.state.get(key, []))} {what}" for what, key in counts.items()) + "."

    def _edits(self) -> tuple[list[tuple[str, float]], str]:
        edits = [(name, float(value)) for name, value in self.state.get("edits", [])]
        return edits, self.state.get("frozen") or next(iter(FROZEN))

    def _remeasured(self) -> str:
        return f" {self._measure()}" if self.state.get("edits") else ""

    def _measure(self) -> str:
        self._measured = edits, frozen = self._edits()
        if not edits:
            self._tell()
            return "Nothing is edited."
        if unknown := [name for name, _ in edits if name not in self.rows]:
            raise ValueError(f"{unknown[0]} is no active feature of this graph, so it cannot be edited")
        nodes, new = self.graph.nodes, {self.rows[name]: value for name, value in edits}
        places = nodes.loc[list(new), ["layer", "position", "feature"]].astype(int)
        predicted = predict(self.trace, self.graph, new, frozen).tolist()
        after = edited_trace(self.trace, list(places.itertuples(index=False)), list(new.values()), frozen)
        ends = {len(nodes) - len(self.targets) + number: target for number, target in enumerate(self.targets)}
        told, said = {}, []
        for name, row in self.rows.items():
            node = nodes.iloc[row]
            if row in ends:
                old, now = node["value"], ends[row].value(after)
                said.append(f"{ends[row].name} from {old:.2f} to {now:.2f} (predicted {old + predicted[row]:.2f})")
            elif node["kind"] == "feature":
                old, now = node["activation"], after.features[node["layer"]][node["position"], node["feature"]].item()
            else:
                continue
            told[name] = [old, old + predicted[row], new.get(row, now)]
        self._tell(after=told, tokens=moved_tokens(self.trace, after).values.tolist())
        return f"Measured, {frozen}: {'; '.join(said[:3])}."

    def _tell(self, **result: Any) -> None:
        self._told += 1
        self.result.value = script({"n": self._told, "of": self._sent, **result})

    def _restore(self, link: dict[str, str]) -> Work:
        """The prompt and the state of a link; `graph_data.js` writes them."""
        state = {key: json.loads(link.get(key) or "[]") for key in ("supernodes", "edits")}
        state["pinnedIds"] = [name for name in link.get("pinnedIds", "").split(",") if name]
        state |= {key: link[key] for key in ("clerps", "frozen") if link.get(key)}
        if link.get("pruningThreshold"):
            state["pruningThreshold"] = float(link["pruningThreshold"])
        self._ask(link)
        return (yield from self._start(state))

    def _ask(self, question: Mapping[str, Any]) -> None:
        for field, name in ((self.prompt, "prompt"), (self.token, "answer"), (self.other, "other")):
            field.value = str(question.get(name, ""))

    def _open(self, about: dict[str, Any], features: Sequence[Sequence[Any]], state: dict[str, Any]) -> Work:
        """A file that was opened in the browser: edits can be measured if it is of this model.

        Args:
            about: its ``metadata``.
            features: node id, layer, feature, position and activation of each.
        """
        yield 0.0
        self.rows, self._measured = {}, None  # nothing of another graph is edited in its place
        self._tell(fits=False, cards={})
        traced = self._same_tokens(about)
        wrong = "another model or tokenizer" if traced is None else _differs(traced, features)
        if traced is None or wrong:
            return f"This file is of {wrong}: look at it, group and save it, but nothing can be measured."
        self._ask(
            {"prompt": self.model.tokenizer.decode(traced.tokens[1:]), **(about.get("info") or {}).get("question", {})}
        )
        targets = self._targets(traced)
        yield 0.2
        graph = build_graph(traced, targets, MOST_FEATURES)
        yield 0.8
        told = cards(traced, [(layer, feature) for _, layer, feature, *_ in features], self.names)
        for feature, card in told.items() if self.names else ():
            card["name"] = self._name(*map(int, feature.split("_")))
        nodes = [{"node_id": name, "ctx_idx": int(name.split("_")[-1])} for name in node_ids(traced, graph).values()]
        self._use(traced, graph, targets, {"metadata": about, "nodes": nodes})
        self.state = state
        self._tell(fits=True, cards=told)
        return f"This file is of this model and these transcoders: its features can be edited.{self._remeasured()}"

    def _same_tokens(self, about: dict[str, Any]) -> Trace | None:
        """The prompt of a file, if this model has it as the same tokens; how BOS is written does not matter."""
        bos = self.model.tokenizer.bos_token or ""
        for text in (about.get("prompt", ""), "".join(about["prompt_tokens"][1:])):
            try:
                tokens = to_tokens(self.model, text.removeprefix(bos))
            except ValueError:
                continue
            plain = [self.model.tokenizer.decode([i]) for i in tokens.tolist()]
            if about["prompt_tokens"][1:] in (plain[1:], token_strings(self.model, tokens)[1:]):
                return trace(self.replacement, tokens)
        return None


def _differs(traced: Trace, features: Sequence[Sequence[Any]]) -> str:
    """What a file's features are of instead; empty if all of them are active here as they are there."""
    for name, layer, feature, position, activation in features:
        z = traced.features.get(layer)
        if z is None or feature >= z.shape[1]:
            return f"other transcoders ({name} is none of these)"
        ours = z[position, feature].item()
        if ours == 0 or (activation is not None and abs(ours - activation) > CLOSE * abs(ours)):
            return f"other transcoders or another model (here {name} is active at {ours:.3g})"
    return ""
