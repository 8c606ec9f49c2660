"""Path search: which ways from the tokens to a target carry most of it?

A path lists nodes from the target backwards; its length is its number of edges, heads counted as nodes. For every n,
the paths that end within n edges and the partial paths of exactly n edges sum to the target (see
`tclib.circuits.one_step`). `best_first` lists every path above a threshold, of both signs, and says what it left out.
`greedy` is the search of the paper's code, kept for reproduction.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import pandas as pd
import torch
from torch import Tensor

from tclib.circuits.one_step import FEATURE, KINDS, Node, PromptGraph, States, Tables
from tclib.circuits.path_bounds import Bounds, suffix_bounds
from tclib.targets import Target

Predicate = Callable[[Node], bool]
BATCH = 64  # states whose tables are computed together
LIMIT = 20_000  # tables of one search
STEPS = 5  # of paths, for each table that may be computed


@dataclass(frozen=True)
class Path:
    """Nodes from the target (left out) backwards, and the signed contribution of the last one through the others."""

    nodes: tuple[Node, ...]
    contribution: float
    sources: tuple[int, ...] = field(repr=False)  # the nodes' numbers in the `PromptGraph`

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        return " <- ".join(node.name for node in self.nodes)


@dataclass(frozen=True)
class PathFilter:
    """Which paths are wanted, by predicates on nodes.

    ``first`` are asked about the nodes next to the target, in order; ``last`` about the final nodes, in the path's
    order; ``inside`` must hold for consecutive nodes anywhere; ``never`` must not hold for any node.
    """

    first: Sequence[Predicate] = ()
    last: Sequence[Predicate] = ()
    inside: Sequence[Predicate] = ()
    never: Predicate | None = None

    def may_step(self, node: Node, depth: int) -> bool:
        """Whether a path may have this node at this depth (0: next to the target)."""
        if self.never is not None and self.never(node):
            return False
        return depth >= len(self.first) or bool(self.first[depth](node))

    def accepts(self, nodes: Sequence[Node]) -> bool:
        """Whether a path is to be listed whose nodes are all allowed."""
        if len(nodes) < len(self.first):
            return False
        ends = range(len(self.inside), len(nodes) + 1)
        inside = not self.inside or any(_matches(self.inside, nodes[:end]) for end in ends)
        return inside and _matches(self.last, nodes)


def _matches(predicates: Sequence[Predicate], nodes: Sequence[Node]) -> bool:
    if len(nodes) < len(predicates):
        return False
    return all(p(n) for p, n in zip(predicates, nodes[len(nodes) - len(predicates) :], strict=True))


@dataclass(frozen=True)
class SearchResult:
    """The paths found, largest |contribution| first, and an account of everything else.

    ``remainder`` is the signed sum of all that is not listed: the target minus the listed paths. ``absolute`` is the
    sum of the absolute contributions of the partial paths at which the search stopped. No wanted path that is not
    listed exceeds ``guarantee`` in magnitude.
    """

    target: str
    value: float
    paths: list[Path]
    remainder: float
    absolute: float
    guarantee: float
    expanded: int  # tables computed

    def table(self) -> pd.DataFrame:
        """One row per path: ``length``, ``ends_at`` (kind), ``contribution`` and the ``path`` in words."""
        rows = [(len(p), p.nodes[-1].kind, p.contribution, str(p)) for p in self.paths]
        return pd.DataFrame(rows, columns=["length", "ends_at", "contribution", "path"])


# A partial path that goes on: its last source contributes to one row of some states.
_Open = tuple[States, Tensor, Path]


@torch.no_grad()
def best_first(
    graph: PromptGraph,
    target: Target,
    threshold: float,
    max_length: int | None = None,
    only: PathFilter | None = None,
    limit: int | None = None,
    bounds: Bounds | None = None,
) -> SearchResult:
    """Every path whose |contribution| is at least ``threshold``, found without following what cannot reach it.

    Args:
        threshold: in units of the target.
        max_length: paths are cut after this many edges and listed as they are; by default each goes to its terminal.
        only: which paths are wanted. Others count as not listed.
        limit: stop after this many tables. Of `STEPS` times as many steps of paths the largest bounds are followed;
            where there are more, the threshold in effect rises. The ``guarantee`` says how far. Without a limit of
            your own it is `LIMIT`, and a warning says that it was reached.
        bounds: of `suffix_bounds(graph, max_length is not None)`, to use again for other targets.

    Raises:
        ValueError: a negative threshold, a length or limit below 1.
    """
    warned, limit = limit is None, LIMIT if limit is None else limit
    if not threshold >= 0 or (max_length is not None and max_length < 1) or limit < 1:
        raise ValueError(
            f"threshold {threshold} must be 0 or more, max_length {max_length} and limit {limit} at least 1"
        )
    only, bounds = only or PathFilter(), bounds or suffix_bounds(graph, max_length is not None)
    listed: list[Path] = []
    left: list[Tensor] = []  # contributions that are not followed or listed
    heap: list[tuple[float, int, _Open]] = []
    number, expanded = count(), 0
    room, cut = STEPS * limit, 0.0  # cut: the largest bound of what there was no room for

    def take(states: States, table: Tables, paths: list[Path]) -> None:
        nonlocal cut, room
        beyond, sizes = bounds.beyond(states, table), table.values.abs()
        depths = torch.tensor([len(path) for path in paths], device=sizes.device)[table.states]
        if max_length is not None:
            beyond = torch.where((depths == max_length - 1)[:, None], sizes, beyond)
        chosen = table.valid & (beyond >= max(threshold, cut))
        if int(chosen.sum()) > room // 4:  # so that no table takes it all
            fits = torch.zeros_like(chosen)
            fits.view(-1)[beyond.masked_fill(~chosen, -1.0).flatten().topk(room // 4).indices] = True
            cut = max(cut, beyond[chosen & ~fits].max().item())
            chosen &= fits
        room -= int(chosen.sum())
        rejected = []
        for row, column in chosen.nonzero().tolist():
            value, path = table.values[row, column].item(), paths[int(table.states[row])]
            node = graph.node(int(table.sources[column]), path.nodes[-1] if path.nodes else None)
            longer = Path((*path.nodes, node), value, (*path.sources, int(table.sources[column])))
            if not only.may_step(node, len(path)):
                rejected.append(value)
            elif node.goes_on and len(longer) != max_length:
                item = (states, table.states[row : row + 1], longer)
                heapq.heappush(heap, (-beyond[row, column].item(), next(number), item))
            elif abs(value) >= threshold and only.accepts(longer.nodes):
                listed.append(longer)
            else:
                rejected.append(value)
        left.extend([table.values[table.valid & ~chosen], table.values.new_tensor(rejected)])

    states, paths = graph.root(target), [Path((), target.value(graph.trace), ())]
    while paths:
        for table in graph.tables(states):
            take(states, table, paths)
        expanded += len(paths)
        more = max(0, min(BATCH, limit - expanded))
        batch = [heapq.heappop(heap)[2] for _ in range(min(more, len(heap))) if -heap[0][0] >= cut]
        paths = [path for *_, path in batch]
        if batch:
            states = _follow(graph, batch)
    rest = torch.cat([*left, graph.writes.new_tensor([item[2].contribution for *_, item in heap])]).double()
    guarantee = max([threshold, cut, *(-bound for bound, _, _ in heap)])
    if warned and guarantee > threshold:
        warnings.warn(
            f"the search for paths of {target.name} stopped at its limit ({expanded} tables, {len(listed)} paths "
            f"listed): paths of up to {guarantee:.3g} may be missing; raise the threshold ({threshold:.3g})",
            stacklevel=3,
        )
    listed.sort(key=lambda path: -abs(path.contribution))
    value = target.value(graph.trace)
    return SearchResult(target.name, value, listed, rest.sum().item(), rest.abs().sum().item(), guarantee, expanded)


def _follow(graph: PromptGraph, batch: Sequence[_Open]) -> States:
    columns = zip(*(vars(states[row]).values() for states, row, _ in batch), strict=True)
    parents, paths = States(*(torch.cat(column) for column in columns)), [path for *_, path in batch]
    sources = torch.tensor([path.sources[-1] for path in paths], device=graph.writes.device)
    return graph.follow(parents, sources, graph.writes.new_tensor([path.contribution for path in paths]))


@torch.no_grad()
def greedy(
    graph: PromptGraph,
    target: Target,
    steps: int = 3,
    branches: int = 15,
    cap: bool = False,
    bos: bool = False,
    only: PathFilter | None = None,
) -> list[list[Path]]:
    """The search of the paper's public code: at every depth, the ``branches`` largest (most positive) extensions.

    Its rules: candidates are active features, heads with their source token (of each layer at most as many as it has
    heads) and the embedding, token and position together. Errors and biases are not candidates. Heads of layer 0 are
    not followed. Inhibition and whatever a large path would have become later are lost: see `best_first`.

    Args:
        cap: no contribution counts for more than that of the last feature before it in the path (the original's
            default; capped contributions no longer sum to the target, and their ties have no defined order).
        bos: whether heads may read from BOS.

    Returns:
        The paths kept at each depth, largest first.

    Raises:
        ValueError: fewer than one step or branch.
    """
    if steps < 1 or branches < 1:
        raise ValueError(f"{steps} steps and {branches} branches: both must be at least 1")
    only, states, paths = only or PathFilter(), graph.root(target), [Path((), target.value(graph.trace), ())]
    caps = [max(paths[0].contribution, 0.0) if cap and target.place == "mlp_in" else float("inf")]
    kept = []
    for depth in range(steps):
        found: list[tuple[float, float, int, int]] = []  # contribution, before the cap, path, source
        for table in graph.tables(states):
            values = _candidates(graph, table, branches, bos)
            if only.first or only.never:
                for row, column in (values > -torch.inf).nonzero().tolist():
                    if not only.may_step(graph.node(int(table.sources[column])), depth):
                        values[row, column] = -torch.inf
            limits = values.new_tensor([caps[i] for i in table.states.tolist()])
            best = values.minimum(limits[:, None]).topk(min(branches, values.shape[1]))
            owner = table.states[:, None].expand_as(best.indices)
            columns = (best.values, values.gather(1, best.indices), owner, table.sources[best.indices])
            found += zip(*(column.flatten().tolist() for column in columns), strict=True)
        found = [item for item in found if item[0] > -float("inf")]
        found = heapq.nlargest(branches, found, key=lambda item: item[0])
        previous, paths = paths, []
        for value, _, owner, source in found:
            before = previous[owner]
            paths.append(Path((*before.nodes, graph.node(source)), value, (*before.sources, source)))
        kept.append(paths)
        ahead = [i for i, path in enumerate(paths) if path.nodes[-1].goes_on and path.nodes[-1][:2] != ("head", 0)]
        if not ahead or depth + 1 == steps:
            break
        owners, sources = (torch.tensor([found[i][k] for i in ahead], device=graph.writes.device) for k in (2, 3))
        states = graph.follow(states[owners], sources, graph.writes.new_tensor([found[i][1] for i in ahead]))
        paths = [paths[i] for i in ahead]
        if cap:
            inherited = [caps[owner] for owner in owners.tolist()]
            last = zip(paths, inherited, strict=True)
            caps = [path.contribution if path.nodes[-1].kind == "feature" else before for path, before in last]
        else:
            caps = [float("inf")] * len(paths)
    return kept


def _candidates(graph: PromptGraph, table: Tables, branches: int, bos: bool) -> Tensor:
    """The table with everything that the paper's search does not consider at -inf."""
    _, pos, heads = graph.heads
    writes = int((table.sources < graph.first_head).sum())
    values = torch.full_like(table.values, -torch.inf)
    kinds = graph.kinds[table.sources[:writes]]
    candidate = (kinds == FEATURE) | (kinds == KINDS.index("embedding"))
    values[:, :writes] = torch.where(table.valid[:, :writes] & candidate, table.values[:, :writes], -torch.inf)
    if KINDS.index("position") in kinds:  # the first two writes are token and position embedding
        values[:, 0] += table.values[:, 1]
    through = torch.where(table.valid, table.values, -torch.inf)[:, writes:-2].unflatten(1, (-1, pos, heads)).clone()
    if not bos:
        through[:, :, 0] = -torch.inf
    through = through.flatten(2)
    best = through.topk(min(branches, heads, pos * heads), dim=-1)
    values[:, writes:-2] = torch.full_like(through, -torch.inf).scatter(-1, best.indices, best.values).flatten(1)
    return values
