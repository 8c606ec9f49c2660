"""Edit a circuit: prune, pin and group its nodes without losing flow, take features out and compare with the model."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ipywidgets as w
import networkx as nx
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from tclib import interventions
from tclib.activations import hook_out
from tclib.circuits import validation
from tclib.circuits.graph import build_graph
from tclib.circuits.layout import layout
from tclib.circuits.neuronpedia import save_graph_json
from tclib.circuits.one_step import BIASES, PromptGraph, prompt_graph
from tclib.circuits.path_bounds import Bounds, bounding, finish
from tclib.circuits.path_graph import UNLISTED, merge
from tclib.circuits.path_search import SearchResult, searching
from tclib.circuits.pruning import prune as prune_graph
from tclib.targets import Target
from tclib.tracing import Trace, trace
from tclib.transcoder import Transcoder
from tclib.ui.answers import Question, next_tokens
from tclib.ui.base import Explorer, Work, download, paper, replace_options, table
from tclib.ui.circuit_page import circuit_svg, page_html

if TYPE_CHECKING:
    from tclib.ui.selected import Selected

MOST_TABLES, MOST_PATHS = 400, 300  # of one search, so that it answers soon and can be drawn
MOST_FEATURES = 3000  # of the graph that is saved
FROZEN: dict[str, tuple[interventions.Frozen, ...]] = {
    "all else answers": (),
    "all else frozen": ("patterns", "scales", "mlps"),
}


def search(graph: PromptGraph, target: Target, share: float) -> tuple[SearchResult, nx.DiGraph]:
    """Paths of at least ``share`` of the target's value, at most `MOST_PATHS`, and the circuit they merge into."""
    return finish(searched(graph, target, share))


def searched(
    graph: PromptGraph, target: Target, share: float, bounds: Bounds | None = None
) -> Generator[float, None, tuple[SearchResult, nx.DiGraph]]:
    """`search` in turns: yields how much of it is done."""
    least = share * abs(target.value(graph.trace))
    found = yield from searching(graph, target, least, limit=MOST_TABLES, bounds=bounds)
    if rest := [path.contribution for path in found.paths[MOST_PATHS:]]:
        found = replace(
            found,
            paths=found.paths[:MOST_PATHS],
            remainder=found.remainder + sum(rest),
            absolute=found.absolute + sum(map(abs, rest)),
            guarantee=max(found.guarantee, abs(rest[0])),
        )
    return found, merge(graph, target, found.paths)


def contract(circuit: nx.DiGraph, nodes: Collection[str], name: str, **attributes) -> nx.DiGraph:
    """The circuit with some nodes as one. What flows between it and the others is unchanged, and so are they.

    A node of that name that is there already is joined by them.
    """
    members = set(nodes) | ({name} & set(circuit))
    result = nx.DiGraph(**circuit.graph)
    result.add_nodes_from((n, dict(d)) for n, d in circuit.nodes(data=True) if n not in members)
    result.add_node(name, **attributes)
    for source, reader, weight in circuit.edges(data="weight"):
        ends = (name if source in members else source, name if reader in members else reader)
        if ends[0] != ends[1]:
            before = result.edges[ends]["weight"] if result.has_edge(*ends) else 0.0
            result.add_edge(*ends, weight=before + weight)
    result.nodes[name]["contribution"] = float(result.out_degree(name, weight="weight"))
    return result


def prune(circuit: nx.DiGraph, top: int, pinned: Collection[str] = ()) -> nx.DiGraph:
    """The ``top`` largest nodes, the pinned ones, and from each of these its strongest way to the target; all others
    become the remainder.

    Raises:
        ValueError: a pinned node that the circuit does not have.
    """
    if unknown := set(pinned) - set(circuit):
        raise ValueError(f"the circuit has no node {sorted(unknown)[0]!r}: lower the threshold, or unpin it")
    listed = [n for n in circuit if not _apart(circuit, n)]
    kept = set(sorted(listed, key=lambda n: -abs(circuit.nodes[n]["contribution"]))[:top]) | set(pinned)
    for node in list(kept):
        while circuit.nodes[node]["kind"] != "target":
            node = max(circuit.out_edges(node, data="weight"), key=lambda edge: abs(edge[2]))[1]
            kept.add(node)
    dropped = set(listed) - kept - {n for n in circuit if circuit.nodes[n]["kind"] == "target"}
    return contract(circuit, dropped, "remainder", kind="remainder") if dropped else circuit.copy()


def group(circuit: nx.DiGraph, nodes: Collection[str], name: str) -> nx.DiGraph:
    """Several nodes as one, which stands at the highest layer and last position of its members.

    Raises:
        ValueError: fewer than two nodes, or one that cannot be grouped.
    """
    if len(set(nodes)) < 2:
        raise ValueError("a group needs at least two nodes: choose several (with Shift or Ctrl)")
    if wrong := [n for n in nodes if n not in circuit or _apart(circuit, n)]:
        raise ValueError(f"{wrong[0]} cannot be part of a group: choose nodes of the circuit other than the answer")
    data = [circuit.nodes[n] for n in nodes]
    top = max(data, key=lambda d: (d.get("layer", -1), d["kind"] != "head"))
    last = max(data, key=lambda d: d.get("position", 0))
    place = {k: d[k] for d, keys in ((top, ("layer",)), (last, ("position", "token"))) for k in keys if k in d}
    if top["kind"] == "head":
        place["part"] = "attn"
    return contract(circuit, nodes, name, kind=f"{name} ({len(set(nodes))})", **place)


def imbalance(circuit: nx.DiGraph) -> float:
    """The largest difference between what enters and what leaves a node that is no end; the remainder may be one."""
    gaps = [
        abs(circuit.in_degree(n, weight="weight") - circuit.nodes[n]["contribution"])
        for n, d in circuit.nodes(data=True)
        if circuit.in_degree(n) and d["kind"] in ("feature", "head", "target")
    ]
    return float(max(gaps, default=0.0))


def ablation(
    trace: Trace,
    target: Target,
    nodes: Sequence[tuple[int, int, int]],
    frozen: str,
    values: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Features taken out, or set to a value: predicted and measured change of the target, each alone and all together.

    Args:
        nodes: (layer, position, feature) of active features.
        frozen: a key of `FROZEN`. With all else frozen the prediction is exact.
        values: the activation that each is set to; by default 0.

    Raises:
        ValueError: no features, a silent one, or skip transcoders with MLPs frozen.
    """
    if not nodes:
        raise ValueError("there is no feature to take out: choose some (heads and tokens cannot be)")
    values = [0.0] * len(nodes) if values is None else list(values)
    table = pd.DataFrame(nodes, columns=["layer", "position", "feature"]).assign(new=values)
    each = validation.compare(trace, table, [target], FROZEN[frozen])
    names = [
        f"mlp{layer}[{feature}]@{position}" + (f" = {value:g}" if value else "")
        for (layer, position, feature), value in zip(nodes, values, strict=True)
    ]
    rows = pd.DataFrame({"without": names, "predicted": each["predicted"], "measured": each["measured"]})
    if len(nodes) > 1:
        change = target.value(edited_trace(trace, nodes, values, frozen)) - target.value(trace)
        rows.loc[len(rows)] = ["all of them", rows["predicted"].sum(), change]
    return rows


@torch.no_grad()
def edited_trace(trace: Trace, nodes: Sequence[tuple[int, int, int]], values: Sequence[float], frozen: str) -> Trace:
    """The prompt with features set to values, all at once: residual stream, scales and logits are the edited model's.

    Args:
        nodes, values, frozen: as in `ablation`.
    """
    change = {layer: torch.zeros_like(trace.cache[hook_out(layer)]) for layer, _, _ in nodes}
    for (layer, position, feature), value in zip(nodes, values, strict=True):
        moved = value - trace.features[layer][position, feature]
        change[layer][position] += moved * trace.transcoders[layer].W_dec[feature]
    hooks = interventions.freeze(trace.cache, FROZEN[frozen])
    writes = {layer: trace.transcoders[layer].config.hook_out for layer in change}
    hooks += [(writes[layer], lambda y, hook, added=added: y + added) for layer, added in change.items()]
    needed = {name for name in trace.cache if "hook_resid" in name or name.endswith(("hook_scale", "hook_embed"))}
    needed.add("ln_final.hook_normalized")
    with interventions.edited(trace.model, hooks):
        _, cache = trace.model.run_with_cache(trace.tokens[None], names_filter=needed.__contains__)
    return replace(trace, cache={name: value[0] for name, value in cache.items()})


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


def account(circuit: nx.DiGraph, target: Target, value: float) -> str:
    """One sentence: how much of the target comes along what is drawn, and what the rest is."""
    aside = layout(circuit, len(circuit)).aside
    said = {"remainder": "smaller paths", "bias": "biases", "error": "what transcoders miss"}
    parts = [f"{aside[kind]:+.3f} from {name}" for kind, name in said.items() if kind in aside]
    drawn = f"{value - sum(aside.values()):+.3f} along what is drawn"
    return f"{target.name} is {value:.3f}: {', '.join([drawn, *parts])}"


def _apart(circuit: nx.DiGraph, node: str) -> bool:
    data = circuit.nodes[node]
    return data["kind"] in ("target", *BIASES) or (data["kind"] in UNLISTED and "layer" not in data)


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
        nodes = [n for n in self.circuit if not _apart(self.circuit, n)]
        nodes.sort(key=lambda n: -abs(self.circuit.nodes[n]["contribution"]))
        return [(f"{n}  {self.circuit.nodes[n]['contribution']:+.3f}{self._marks(n)}", n) for n in nodes]

    def _marks(self, node: str) -> str:
        marks = ["pinned"] if node in self.pinned else []
        marks += [f"in {name}" for name, members in self.groups.items() if node in members]
        if node in self.edited:
            marks.append(f"set to {self.edited[node]:g}" if self.edited[node] else "out")
        return "".join(f" ({mark})" for mark in marks)


_AUTO = w.Layout(width="auto")
