"""Edit a circuit: prune, pin and group its nodes without losing flow, take features out and compare with the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import ipywidgets as w
import networkx as nx
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from tclib import edits, intervene
from tclib.activations import hook_out
from tclib.circuits import Search, best_first
from tclib.explore.page import circuit_svg
from tclib.explorers.base import WIDE, Explorer, paper, replace_options, table
from tclib.explorers.walker import answer_target
from tclib.merging import UNLISTED, merge
from tclib.prompt_graph import BIASES, PromptGraph, prompt_graph
from tclib.targets import Target
from tclib.tracing import Trace, trace
from tclib.transcoder import Transcoder

MOST_TABLES = 400  # of one search, so that it answers at once
HELD: dict[str, tuple[intervene.Held, ...]] = {
    "all else answers": (),
    "all else frozen": ("patterns", "scales", "mlps"),
}


def search(graph: PromptGraph, target: Target, share: float) -> tuple[Search, nx.DiGraph]:
    """Paths of at least ``share`` of the target's value, and the circuit they merge into."""
    found = best_first(graph, target, share * abs(target.value(graph.trace)), limit=MOST_TABLES)
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
    return contract(circuit, nodes, name, kind=f"{name} ({len(set(nodes))})", **place)


def imbalance(circuit: nx.DiGraph) -> float:
    """The largest difference between what enters and what leaves a node that is no end; the remainder may be one."""
    gaps = [
        abs(circuit.in_degree(n, weight="weight") - circuit.nodes[n]["contribution"])
        for n, d in circuit.nodes(data=True)
        if circuit.in_degree(n) and d["kind"] in ("feature", "head", "target")
    ]
    return float(max(gaps, default=0.0))


def ablation(trace: Trace, target: Target, nodes: Sequence[tuple[int, int, int]], held: str) -> pd.DataFrame:
    """Features set to zero: predicted and measured change of the target, each alone and all together.

    Args:
        nodes: (layer, position, feature) of active features.
        held: a key of `HELD`. With all else frozen the prediction is exact.

    Raises:
        ValueError: no features, a silent one, or skip transcoders with MLPs held.
    """
    if not nodes:
        raise ValueError("there is no feature to take out: choose some (heads and tokens cannot be)")
    table = pd.DataFrame(nodes, columns=["layer", "position", "feature"])
    each = edits.compare(trace, table, [target], HELD[held])
    names = [f"mlp{layer}[{feature}]@{position}" for layer, position, feature in nodes]
    rows = pd.DataFrame({"without": names, "predicted": each["predicted"], "measured": each["measured"]})
    if len(nodes) > 1:
        rows.loc[len(rows)] = ["all of them", rows["predicted"].sum(), _together(trace, target, nodes, HELD[held])]
    return rows


@torch.no_grad()
def _together(
    trace: Trace, target: Target, nodes: Sequence[tuple[int, int, int]], held: Sequence[intervene.Held]
) -> float:
    change = {layer: torch.zeros_like(trace.cache[hook_out(layer)]) for layer, _, _ in nodes}
    for layer, position, feature in nodes:
        change[layer][position] -= trace.features[layer][position, feature] * trace.transcoders[layer].W_dec[feature]
    hooks = intervene.hold(trace.cache, held)
    writes = {layer: trace.transcoders[layer].config.hook_out for layer in change}
    hooks += [(writes[layer], lambda y, hook, added=added: y + added) for layer, added in change.items()]
    needed = {name for name in trace.cache if "hook_resid" in name or name.endswith(("hook_scale", "hook_embed"))}
    with intervene.edited(trace.model, hooks):
        _, cache = trace.model.run_with_cache(trace.tokens[None], names_filter=needed.__contains__)
    changed = replace(trace, cache={name: value[0] for name, value in cache.items()})
    return target.value(changed) - target.value(trace)


def _apart(circuit: nx.DiGraph, node: str) -> bool:
    data = circuit.nodes[node]
    return data["kind"] in ("target", *BIASES) or (data["kind"] in UNLISTED and "layer" not in data)


class Editor(Explorer):
    """Nodes are chosen in the list (Shift and Ctrl choose several); the buttons act on what is chosen."""

    def __init__(
        self, model: TransformerBridge, transcoders: Mapping[int, Transcoder], prompt: str, token: str, other: str = ""
    ):
        self.model, self.transcoders = model, dict(transcoders)
        self.pinned, self.groups, self.gone = set(), [], set()
        self.prompt = w.Text(prompt, description="prompt", continuous_update=False, layout=WIDE)
        short = w.Layout(width="160px")
        self.token = w.Text(token, description="answer", continuous_update=False, layout=short)
        self.other = w.Text(other, description="rather than", continuous_update=False, layout=short)
        shares = [(f"{share:.0%}", share) for share in (0.2, 0.1, 0.05, 0.03, 0.02)]
        self.share = w.SelectionSlider(options=shares, value=0.03, description="paths from", continuous_update=False)
        self.top = w.IntSlider(15, 1, 40, description="draw", continuous_update=False)
        self.nodes = w.SelectMultiple(description="nodes", rows=16, layout=w.Layout(width="330px"))
        self.pin = w.Button(description="pin / unpin", tooltip="always draw the chosen nodes")
        self.join = w.Button(description="group", tooltip="draw the chosen nodes as one")
        self.split = w.Button(description="ungroup all", tooltip="undo all groups")
        self.out = w.Button(description="take out / put back", tooltip="set the chosen features to zero")
        self.held = w.ToggleButtons(options=list(HELD), description="measured:", style={"button_width": "auto"})
        self.view, self.measured = w.HTML(), w.HTML()
        buttons = w.HBox(
            [self.pin, self.join, self.split, self.out], layout=w.Layout(flex_flow="row wrap", width="330px")
        )
        super().__init__(
            "Circuit editor",
            [(self.prompt, self.token, self.other), (self.share, self.top, self.held)],
            [w.VBox([self.nodes, buttons]), w.VBox([self.view, self.measured], layout=w.Layout(flex="1 1 520px"))],
        )
        self.watch(self._start, self.prompt, self.token, self.other)
        self.watch(self._search, self.share)
        self.watch(self._show, self.top, self.held)
        self.watch(self._pin, self.pin)
        self.watch(self._join, self.join)
        self.watch(self._split, self.split)
        self.watch(self._out, self.out)
        self.start(self._start)

    def _start(self) -> str:
        traced = trace(self.model, self.transcoders, self.prompt.value)
        target = answer_target(traced, self.token.value, self.other.value)
        return self._search(prompt_graph(traced), target)

    def _search(self, graph: PromptGraph | None = None, target: Target | None = None) -> str:
        graph, target = graph or self.graph, target or self.target
        found, circuit = search(graph, target, self.share.value)
        self.trace, self.graph, self.target = graph.trace, graph, target  # together, or not at all
        self.found, self.circuit = found, circuit
        self.pinned, self.gone = self.pinned & set(circuit), self.gone & set(circuit)
        self.groups = [members & set(circuit) for members in self.groups if len(members & set(circuit)) > 1]
        return self._show()

    def _pin(self) -> str:
        self.pinned ^= self._chosen()
        return self._show()

    def _join(self) -> str:
        chosen = self._chosen() - set().union(*self.groups)
        group(self.circuit, chosen, "group")
        self.groups.append(chosen)
        return self._show()

    def _split(self) -> str:
        self.groups = []
        return self._show()

    def _out(self) -> str:
        chosen = {n for n in self._chosen() if self.circuit.nodes[n]["kind"] == "feature"}
        if not chosen:
            raise ValueError("only features can be taken out: choose some (mlp...)")
        self.gone ^= chosen
        return self._show()

    def _chosen(self) -> set[str]:
        if not self.nodes.value:
            raise ValueError("no node is chosen: choose some in the list first")
        return set(self.nodes.value)

    def drawn(self) -> nx.DiGraph:
        """The circuit after pruning and grouping."""
        grouped = set().union(*self.groups)
        circuit = prune(self.circuit, self.top.value, self.pinned | grouped | self.gone)
        for number, members in enumerate(self.groups, start=1):
            circuit = group(circuit, members, f"group {number}")
        return circuit

    def _show(self) -> str:
        circuit = self.drawn()
        self.view.value = paper(circuit_svg(circuit, len(circuit)))
        replace_options(self.nodes, self._listed())
        self.measured.value = ""
        if self.gone:
            data = [self.circuit.nodes[n] for n in sorted(self.gone)]
            rows = ablation(
                self.trace, self.target, [(d["layer"], d["position"], d["feature"]) for d in data], self.held.value
            )
            self.measured.value = table(rows, f"change of {self.target.name} without features, {self.held.value}")
        left = circuit.nodes["remainder"]["contribution"] if "remainder" in circuit else 0.0
        return (
            f"{len(self.found.paths)} paths, none unlisted larger than {self.found.guarantee:.3g}; {self.target.name} "
            f"is {self.found.value:.3f}, of which {left:+.3f} comes from what is not drawn; "
            f"balanced to {imbalance(circuit):.0e}."
        )

    def _listed(self) -> list[tuple[str, str]]:
        nodes = [n for n in self.circuit if not _apart(self.circuit, n)]
        nodes.sort(key=lambda n: -abs(self.circuit.nodes[n]["contribution"]))
        marks = {"pinned": self.pinned, "grouped": set().union(*self.groups), "out": self.gone}
        said = {n: "".join(f" ({mark})" for mark, members in marks.items() if n in members) for n in nodes}
        return [(f"{n}  {self.circuit.nodes[n]['contribution']:+.3f}{said[n]}", n) for n in nodes]
