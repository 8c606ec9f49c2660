"""Edit a circuit: prune, pin and group its nodes without losing flow, take features out and compare with the model."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import ipywidgets as w
import networkx as nx
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from tclib.circuits.editing import (
    FROZEN,
    ablation,
    account,
    apart,
    edited_trace,
    group,
    imbalance,
    prune,
    searched,
)
from tclib.circuits.graph import build_graph
from tclib.circuits.neuronpedia import save_graph_json
from tclib.circuits.one_step import PromptGraph, prompt_graph
from tclib.circuits.path_bounds import bounding
from tclib.circuits.path_graph import UNLISTED
from tclib.circuits.pruning import prune as prune_graph
from tclib.targets import Target
from tclib.tracing import Trace, trace
from tclib.transcoder import Transcoder
from tclib.ui.answers import Question, next_tokens
from tclib.ui.base import Explorer, Work, replace_options
from tclib.ui.circuit_page import circuit_svg, page_html
from tclib.ui.markup import download, paper, table

if TYPE_CHECKING:
    from tclib.ui.selected import Selected

MOST_FEATURES = 3000  # of the graph that is saved


def moved_tokens(before: Trace, after: Trace) -> pd.DataFrame:
    """The likeliest next tokens after an edit: ``next_token``, and its probability ``before`` and ``after``."""
    best, old = next_tokens(after), before.logits[-1].softmax(-1)
    return pd.DataFrame(
        {
            "next_token": best["token"],
            "before": [old[index].item() for index in best["id"]],
            "after": best["probability"],
        }
    )


class Editor(Explorer):
    """Nodes are chosen in the list (Shift and Ctrl choose several); the buttons act on what is chosen."""

    def __init__(
        self,
        model: TransformerBridge,
        transcoders: Mapping[int, Transcoder],
        prompt: str,
        token: str,
        other: str = "",
        selected: Selected | None = None,
    ):
        self.model, self.transcoders, self.circuit = model, dict(transcoders), nx.DiGraph()
        self.graph = self.bounds = None
        self.pinned: set[str] = set()
        self.groups: dict[str, set[str]] = {}
        self.edited: dict[str, float] = {}
        self.question = Question(prompt, token, other)
        self.prompt, self.token, self.other = self.question.fields
        shares = [(f"{share:.0%}", share) for share in (0.2, 0.1, 0.05, 0.03, 0.02)]
        self.share = w.SelectionSlider(options=shares, value=0.03, description="paths from", continuous_update=False)
        wide = w.Layout(width="290px")
        self.top = w.IntSlider(15, 1, 40, description="draw", continuous_update=False)
        self.nodes = w.SelectMultiple(description="nodes", rows=16, layout=wide)
        self.pin = w.Button(description="pin / unpin", tooltip="always draw the chosen nodes", layout=_AUTO)
        self.group_name = w.Text("", description="group name", placeholder="month names", layout=wide)
        about = "draw the chosen nodes, and groups they are in, as one"
        self.join = w.Button(description="group", tooltip=about, layout=_AUTO)
        about = "undo the groups that the chosen nodes are in"
        self.split = w.Button(description="ungroup", tooltip=about, layout=_AUTO)
        self.out = w.Button(description="take out / put back", tooltip="set the chosen features to zero", layout=_AUTO)
        self.to = w.Text("", description="value", placeholder="an activation", layout=w.Layout(width="200px"))
        self.set = w.Button(description="set to it", tooltip="set the chosen features to this value", layout=_AUTO)
        about = "the circuit as a page, and as JSON for Neuronpedia"
        self.save = w.Button(description="save", tooltip=about, layout=_AUTO)
        self.frozen = w.ToggleButtons(options=list(FROZEN), description="measured:", style={"button_width": "auto"})
        self.view, self.measured, self.files = w.HTML(), w.HTML(), w.HTML()
        wrapped = w.Layout(flex_flow="row wrap", width="300px")
        grouping = w.HBox([self.group_name, self.join, self.split, self.pin, self.save], layout=wrapped)
        editing = w.HBox([self.out, self.to, self.set], layout=wrapped)
        super().__init__(
            "Circuit editor",
            [*self.question.rows, (self.share, self.top, self.frozen)],
            [
                w.VBox([self.nodes, grouping, editing, self.files], layout=w.Layout(width="310px")),
                w.VBox([self.view, self.measured], layout=w.Layout(flex="1 1 340px", min_width="0")),
            ],
            selected,
        )
        self.watch(self._start, *self.question.fields)
        self.watch(self._search, self.share)
        self.watch(self._show, self.top, self.frozen)
        self.watch(self._look, self.nodes)
        for action in ("pin", "join", "split", "out", "set", "save"):
            self.watch(getattr(self, f"_{action}"), getattr(self, action))
        self.start(self._start)

    def _start(self) -> Work:
        yield 0.0
        traced = trace(self.model, self.transcoders, self.prompt.value)
        if self.graph and torch.equal(traced.tokens, self.trace.tokens):  # another answer alone
            return (yield from self._search(self.graph, self.question.target(self.trace)))
        return (yield from self._search(prompt_graph(traced), self.question.target(traced)))

    def _search(self, graph: PromptGraph | None = None, target: Target | None = None) -> Work:
        graph, target = graph or self.graph, target or self.target
        bounds = self.bounds if graph is self.graph else (yield from bounding(graph))
        found, circuit = yield from searched(graph, target, self.share.value, bounds)
        lost = self._let_go(circuit)
        self.trace, self.graph, self.target = graph.trace, graph, target  # together, or not at all
        self.bounds, self.found, self.circuit = bounds, found, circuit
        self.question.show(self.trace)
        return self._show() + lost

    def _let_go(self, circuit: nx.DiGraph) -> str:
        """Forget pins, groups and edits of nodes that are no longer there, or stand at another token now."""

        def lost(nodes: Collection[str]) -> set[str]:
            old, new = self.circuit.nodes, circuit.nodes
            return {n for n in nodes if n not in new or old[n].get("token") != new[n].get("token")}

        gone = lost(self.pinned.union(self.edited, *self.groups.values()))
        self.pinned -= gone
        self.edited = {n: value for n, value in self.edited.items() if n not in gone}
        self.groups = {name: members - gone for name, members in self.groups.items() if len(members - gone) > 1}
        self.nodes.value = tuple(n for n in self.nodes.value if n not in lost(self.nodes.value))
        if not gone:
            return ""
        return (
            " No longer pinned, grouped or edited, because this circuit does not have them or has another token "
            f"there: {', '.join(sorted(gone))}."
        )

    def _look(self) -> str:
        chosen = [self.circuit.nodes[n] for n in self.nodes.value]
        features = [d for d in chosen if d["kind"] == "feature"]
        if len(chosen) == len(features) == 1:
            self.choose(features[0]["layer"], features[0]["feature"])
        return f"{len(chosen)} nodes are chosen, {len(features)} of them features."

    def _pin(self) -> str:
        self.pinned ^= self._chosen()
        return self._show()

    def _join(self) -> str:
        chosen, name = self._chosen(), self.group_name.value.strip()
        whole = {n for n in self.groups if self.groups[n] & chosen or n == name}
        members = chosen.union(*(self.groups[n] for n in whole))
        same = len(whole) == 1 and members == self.groups[min(whole)]
        if same and name in ("", *whole):
            raise ValueError(
                f"these nodes are already in group {min(whole)!r}: choose others too, or type another name"
            )
        if not name:
            free = (f"group {number}" for number in itertools.count(1))
            name = min(whole) if len(whole) == 1 else next(n for n in free if n not in self.groups.keys() - whole)
        if name in self.circuit or name in UNLISTED:
            raise ValueError(f"{name!r} is the name of a node: type another name for the group")
        group(self.circuit, members, name)
        self.groups = {n: of for n, of in self.groups.items() if n not in whole} | {name: members}
        self.group_name.value = ""
        return self._show()

    def _split(self) -> str:
        chosen = self._chosen()
        kept = {name: members for name, members in self.groups.items() if not members & chosen}
        if len(kept) == len(self.groups):
            raise ValueError("none of the chosen nodes is in a group: choose one that is marked (in ...)")
        self.groups = kept
        return self._show()

    def _out(self) -> str:
        chosen = self._features()
        back = chosen & self.edited.keys()
        self.edited = {n: v for n, v in self.edited.items() if n not in back} | {n: 0.0 for n in chosen - back}
        return self._show()

    def _set(self) -> str:
        try:
            value = float(self.to.value)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{self.to.value!r} is no activation: type a number in the field 'value', for example 5")
        self.edited |= dict.fromkeys(self._features(), value)
        return self._show()

    def _save(self) -> Work:
        yield 0.0
        circuit = self.drawn()
        name = f"{self.target.name} after {self.prompt.value!r}"
        page = page_html(circuit, name, len(circuit), self._struck())
        yield 0.3
        graph = prune_graph(build_graph(self.trace, [(self.target, 1.0)], MOST_FEATURES))
        yield 0.8
        groups = {n: self._places(members) for n, members in self.groups.items()}
        model = self.model.cfg.model_name or "model"
        with tempfile.TemporaryDirectory() as folder:
            pinned = self._places(self.pinned)
            path = save_graph_json(self.trace, graph, folder, "circuit", model, pinned=pinned, groups=groups)
            data = path.read_text(encoding="utf-8")
        self.files.value = download("circuit.html", "text/html", page)
        self.files.value += download("circuit.json", "application/json", data)
        return (
            "Two files are ready below the list: this drawing as a page that needs no kernel, and the all-paths graph "
            "of this answer, with pins and groups, as JSON that Neuronpedia and circuit-tracer's viewer open."
        )

    def _places(self, nodes: Collection[str]) -> list[tuple[int, int, int]]:
        data = [self.circuit.nodes[n] for n in sorted(nodes)]
        return [(d["layer"], d["position"], d["feature"]) for d in data if d["kind"] == "feature"]

    def _features(self) -> set[str]:
        chosen = {n for n in self._chosen() if self.circuit.nodes[n]["kind"] == "feature"}
        if not chosen:
            raise ValueError("only features can be taken out or set: choose some (mlp...)")
        return chosen

    def _chosen(self) -> set[str]:
        if not self.nodes.value:
            raise ValueError("no node is chosen: choose some in the list first")
        return set(self.nodes.value)

    def _struck(self) -> set[str]:
        """The edited nodes, and the groups that have one."""
        return self.edited.keys() | {name for name, members in self.groups.items() if members & self.edited.keys()}

    def drawn(self) -> nx.DiGraph:
        """The circuit after pruning and grouping."""
        kept = self.pinned.union(self.edited, *self.groups.values())
        circuit = prune(self.circuit, self.top.value, kept)
        for name, members in self.groups.items():
            circuit = group(circuit, members, name)
        return circuit

    def _show(self) -> str:
        circuit = self.drawn()
        note = "<p>The circuit before the edit: what is struck through is edited, with the effect told below.</p>"
        self.view.value = paper(note * bool(self.edited) + circuit_svg(circuit, len(circuit), self._struck()))
        replace_options(self.nodes, self._listed())
        self.files.value = ""  # of another circuit
        self.measured.value = self._measured() if self.edited else ""
        return (
            f"{len(self.found.paths)} paths, none unlisted larger than {self.found.guarantee:.3g}; "
            f"{account(circuit, self.target, self.found.value)}; balanced to {imbalance(circuit):.0e}."
        )

    def _measured(self) -> str:
        nodes, frozen = sorted(self.edited), self.frozen.value
        places, values = self._places(nodes), [self.edited[n] for n in nodes]
        rows = ablation(self.trace, self.target, places, frozen, values)
        after = moved_tokens(self.trace, edited_trace(self.trace, places, values, frozen))
        change = table(rows, f"change of {self.target.name} without features, or with others' values, {frozen}")
        return change + table(after, f"likeliest next tokens after the edit, {frozen}")

    def _listed(self) -> list[tuple[str, str]]:
        nodes = [n for n in self.circuit if not apart(self.circuit, n)]
        nodes.sort(key=lambda n: -abs(self.circuit.nodes[n]["contribution"]))
        return [(f"{n}  {self.circuit.nodes[n]['contribution']:+.3f}{self._marks(n)}", n) for n in nodes]

    def _marks(self, node: str) -> str:
        marks = ["pinned"] if node in self.pinned else []
        marks += [f"in {name}" for name, members in self.groups.items() if node in members]
        if node in self.edited:
            marks.append(f"set to {self.edited[node]:g}" if self.edited[node] else "out")
        return "".join(f" ({mark})" for mark in marks)


_AUTO = w.Layout(width="auto")
