"""What a sweep found, as a page and a figure: Pareto fronts, lines at equal sparsity, one number with all else equal.

A *line* of the figure joins the runs of one layer that differ only in what sets their sparsity (`KNOBS`) and in the
seed. Nothing here is about one grid: whatever else was varied names the lines.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from tclib.evaluation import fronts, stats
from tclib.io.paths import write_whole
from tclib.nb.style import figure_defaults
from tclib.nb.sweeps.results import Point, Results, table

KNOBS = ("l1_coefficient", "l0_coefficient", "k")  # what sets how many features are active
METRICS = {"fvu": "variance unexplained (FVU)", "ce_increase": "cross-entropy lost, nats"}
OVERLAP = 1.2  # lines are compared where the L0 that both reach spans at least this factor
DRAWS = 200  # of the shuffled control
CAPTION = (
    "*A dot is a run; a line joins the means over seeds of runs that differ in nothing but their sparsity. A ring "
    "marks a run that no other run of its layer beats in L0 and in what the panel shows: the Pareto front. Lower and "
    "further left is better, and both axes are logarithmic.*"
)


def write(results: Results, folder: Path) -> Path:
    """Write ``report.md`` and ``fronts.png`` into a folder; return the page."""
    if not points(results).empty:
        figure(results, folder / "fronts.png")
    page = folder / "report.md"
    write_whole(page, f"# Report of a sweep\n\n{text(results, 'fronts.png')}\n".encode())
    return page


def points(results: Results) -> pd.DataFrame:
    """`table` without the runs that failed, with ``ce_increase``, the run's ``line`` and ``front``.

    ``ce_increase`` is the cross-entropy lost when the dictionary takes the MLP's place, in nats. On the front is a run
    that no other of its layer beats, by being at least as sparse and explaining at least as much, and more of one.
    """
    everything = table(results)
    if "l0" not in everything:  # no run has a point
        return everything.head(0)
    found = everything[everything["reason"].isna() & (everything["l0"] > 0)].reset_index(drop=True)
    found["ce_increase"] = found["ce_replaced"] - found["ce"]
    found["line"] = _words(found, [n for n in _axes(everything) if n not in (*KNOBS, "seed", "layer")])
    found["layer"] = found.get("layer", 0)
    found["seed"] = found.get("seed", 0)
    found["front"] = False
    for _, part in found.groupby("layer"):
        found.loc[part.index, "front"] = fronts.undominated(part, ["l0", "fvu"])
    return found


def figure(results: Results, path: Path) -> None:
    """Draw the fronts into a PNG: a column of panels per layer, FVU above, cross-entropy lost below."""
    found = points(results)
    by_layer = list(found.groupby("layer"))
    with plt.rc_context():
        figure_defaults()
        size = {"figsize": (4.6 * len(by_layer), 7), "sharex": "col", "sharey": "row", "squeeze": False}
        drawn, panels = plt.subplots(len(METRICS), len(by_layer), **size)
        colours = {line: f"C{i}" for i, line in enumerate(found["line"].unique())}
        for column, (layer, part) in zip(panels.T, by_layer, strict=True):
            for panel, metric in zip(column, METRICS, strict=True):
                best = _draw(panel, part, metric, colours)
                panel.set_title(f"{_layer_name(layer)}: {best} of {len(part)} runs on the front", fontsize=10)
            column[-1].set_xlabel("active features per token (L0)")
        for panel, words in zip(panels[:, 0], METRICS.values(), strict=True):
            panel.set_ylabel(words)
        handles = {label: h for panel in panels[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        drawn.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata={"Software": None})
        plt.close(drawn)


def text(results: Results, picture: str) -> str:
    """The report as Markdown, with its figure at the address ``picture``."""
    everything, found = table(results), points(results)
    axes = _axes(everything)
    varied = f" over {', '.join(f'`{name}`' for name in axes)}" if axes else ""
    first = f"{len(everything)} runs{varied}; {len(found)} have a point.{_failures(everything)}"
    if found.empty:
        return first
    drawn = f"![What each run leaves unexplained, against its active features per token]({picture})\n\n{CAPTION}"
    numbers = (_one_number(found, axes, name) for name in axes)
    return "\n\n".join([first, drawn, _front(found, axes), *filter(None, [_at_equal_l0(found, axes), *numbers])])


def gaps(found: pd.DataFrame, setting: list[str], draws: int = DRAWS) -> pd.DataFrame:
    """Lines of one layer compared at equal L0, wherever two of them share enough of it (`fronts.gap` of the FVU).

    Only settings that were trained with every seed count. The control shuffles the names of the two lines among runs
    of one seed that have the same rank in L0.

    Args:
        found: `points`.
        setting: the parameters that were varied, without the seed.

    Returns:
        ``layer``, ``pair``, ``gap`` (mean over seeds; below 0 favours the first), ``low``, ``high`` (95%, Student's t;
        NaN with one seed), and of the control the ``shuffled`` median, the ``least`` and the ``most``.
    """
    rng, records = np.random.default_rng(0), []
    for layer, part in found.groupby("layer"):
        seeds = part.groupby(setting)["seed"].transform("nunique") if setting else part["seed"]
        part = part[seeds == seeds.max()].rename(columns={"line": "name"})
        for one, other in combinations(sorted(part["name"].unique()), 2):
            pair = part[part["name"].isin([one, other])]
            if _shared(pair) < OVERLAP:
                continue
            gap = fronts.gap(pair, one, other, ["seed"], "fvu").assign(pair=f"{one} minus {other}")
            low, high = stats.over_seeds(gap, ["pair"], "gap").loc[0, ["low", "high"]] if len(gap) > 1 else 2 * [np.nan]
            control = [_shuffled(pair, one, other, rng) for _ in range(draws)]
            control = {"shuffled": np.nanmedian(control), "least": np.nanmin(control), "most": np.nanmax(control)}
            first = {"layer": layer, "pair": gap["pair"][0], "gap": gap["gap"].mean(), "low": low, "high": high}
            records.append(first | control)
    return pd.DataFrame(records)


def _shuffled(pair: pd.DataFrame, one: str, other: str, rng: np.random.Generator) -> float:
    ranked = pair.sort_values(["seed", "name", "l0"]).assign(rank=lambda t: t.groupby(["seed", "name"]).cumcount())
    ranked["name"] = ranked.groupby(["seed", "rank"])["name"].transform(rng.permutation)
    return fronts.gap(ranked, one, other, ["seed"], "fvu")["gap"].mean() if _shared(ranked) > 1 else np.nan


def _shared(pair: pd.DataFrame) -> float:
    """The factor of L0 that both names reach with every seed."""
    ends = pair.groupby(["name", "seed"])["l0"].agg(["min", "max"])
    return ends["max"].min() / ends["min"].max()


def _axes(everything: pd.DataFrame) -> list[str]:
    """The parameters that differ between runs."""
    measured = {"run", *Point.model_fields, "seconds", "reason"}
    return [str(name) for name in everything if name not in measured and everything[name].nunique() > 1]


def _words(found: pd.DataFrame, names: list[str]) -> list[str]:
    """A few words for each run, from some of its parameters."""

    def word(name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool | np.bool_):
            return name * bool(value)
        return _layer_name(value) if name == "layer" else f"{name} {value:g}"

    return [", ".join(filter(None, map(word, names, row))) or "all" for row in found[names].itertuples(index=False)]


def _draw(panel: Axes, part: pd.DataFrame, metric: str, colours: dict[str, str]) -> int:
    """One layer and one metric; returns how many runs are on the front."""
    for line, runs in part.groupby("line"):
        knobs = [name for name in KNOBS if name in runs]
        mean = runs.groupby(knobs)[["l0", metric]].mean().sort_values("l0") if knobs else runs
        panel.loglog(mean["l0"], mean[metric], "s-", ms=4, color=colours[str(line)], label=line)
        panel.loglog(runs["l0"], runs[metric], ".", ms=4, alpha=0.6, color=colours[str(line)])
    best = part[fronts.undominated(part, ["l0", metric])]
    panel.loglog(best["l0"], best[metric], "o", mfc="none", color="black", ms=9, label="Pareto front")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 4)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
        axis.set_tick_params(labelleft=True)
    return len(best)


def _layer_name(layer: Any) -> str:
    return "last layer" if layer == -1 else f"layer {layer}"


def _failures(everything: pd.DataFrame) -> str:
    reasons = everything["reason"].dropna()
    if reasons.empty:
        return ""
    return f" {len(reasons)} failed, and say why: " + "; ".join(f"`{r}`" for r in dict.fromkeys(reasons)) + "."


def _front(found: pd.DataFrame, axes: list[str]) -> str:
    falls = []
    for _, part in found.groupby(["layer", "line"]):
        mean = part.groupby([n for n in axes if n != "seed"] or ["line"])[["l0", "fvu"]].mean().sort_values("l0")
        falls += [bool((np.diff(mean["fvu"]) < 0).all())] * (len(mean) > 1)
    best = found[found["front"]].sort_values(["layer", "l0"])
    return (
        f"Along {sum(falls)} of {len(falls)} lines each step to more active features leaves less unexplained. "
        f"{len(best)} of {len(found)} runs are on the front of their layer. A front takes the best of several noisy "
        "runs, so a new run with one of these settings would be slightly worse; the means have no such bias.\n\n"
        + _markdown(best[["layer", "line", "l0", "fvu", "kl", "ce_increase"]])
    )


def _at_equal_l0(found: pd.DataFrame, axes: list[str]) -> str:
    compared = gaps(found, [name for name in axes if name != "seed"])
    if compared.empty:
        return ""
    clear = ((compared["gap"] < compared["least"]) | (compared["gap"] > compared["most"])).sum()
    apart = ((compared["low"] > 0) | (compared["high"] < 0)).sum()
    return (
        "### At equal sparsity\n\nNo two lines have runs at the same L0, so both are read at five values of L0 that "
        "they share, by interpolation in log L0. The mean difference of their FVUs is the gap: below 0, the first of "
        "the pair leaves less unexplained. `low` and `high` are its 95% interval over seeds. As a control, the names "
        f"of the two lines are shuffled {DRAWS} times among runs of equal rank, which gives a median and a range. Gaps "
        f"outside that range: {clear} of {len(compared)}; gaps whose interval excludes 0: {apart} of {len(compared)}. "
        "Pairs that share hardly any L0 are left out.\n\n" + _markdown(compared)
    )


def _one_number(found: pd.DataFrame, axes: list[str], axis: str) -> str:
    """Settings that were trained at several values of one number, all else equal."""
    if axis in (*KNOBS, "seed") or not pd.api.types.is_numeric_dtype(found[axis]) or found[axis].dtype == bool:
        return ""
    others = [name for name in axes if name not in (axis, "seed")]
    found = found.assign(setting=_words(found, others))
    same = found.groupby("setting").filter(lambda part: part[axis].nunique() > 1)
    if same.empty:
        return ""
    alike = [name for name in others if same[name].nunique() == 1]
    same = same.assign(setting=_words(same, [name for name in others if name not in alike]))
    by = same.groupby(["setting", axis], sort=False)
    shown = by.agg(l0=("l0", "mean"), fvu=("fvu", "mean"), seeds=("seed", "nunique")).reset_index()
    if (shown["seeds"] > 1).all():
        spread = stats.over_seeds(same, ["setting", axis], "fvu")
        shown = shown.merge(spread[["setting", axis, "low", "high"]], on=["setting", axis])
    shown["sparsity"] = shown.groupby("setting")["l0"].transform("mean")
    shown = shown.sort_values(["sparsity", axis]).drop(columns="sparsity")
    said = {"d_features": _width, "layer": lambda *_: LAYERS}.get(axis, lambda *_: "")(same, shown)
    constant = f"All of these have: {_words(same.head(1), alike)[0]}." if alike else ""
    return f"### By `{axis}`, with all else equal\n\n{f'{said} {constant}'.strip()}\n\n{_markdown(shown)}"


LAYERS = (
    "The unit of FVU is each layer's own variance. So this says which MLP is harder to imitate with few features, and "
    "not which one matters more."
)


def _width(same: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Whether wider is better here; a run too short for its width is told by how often a feature fired in training."""
    per_row = same["tokens"] / same["measured_rows"]
    shown["firings"] = (
        (same["steps"] * same["rows"] * per_row * same["l0"] / same["d_features"])
        .groupby([same["setting"], same["d_features"]])
        .mean()
        .loc[list(shown[["setting", "d_features"]].itertuples(index=False, name=None))]
        .round()
        .astype(int)
        .to_numpy()
    )
    _, part = max(shown.groupby("setting"), key=lambda item: len(item[1]))
    best, widest = (part.iloc[int(i)] for i in (part["fvu"].argmin(), part["d_features"].argmax()))
    said = "`firings` is how often a feature fired in training, on average."
    if best["d_features"] == widest["d_features"]:
        return f"The widest dictionary leaves least unexplained. {said}"
    overlap = "overlap" if widest.get("low", 0) <= best.get("high", 0) else "do not"
    clear = f", with intervals over seeds that {overlap}" if "low" in part else ""
    return (
        f"{widest['d_features']:,} features leave more unexplained than {best['d_features']:,}: {widest['fvu']:.3f} "
        f"against {best['fvu']:.3f}{clear}. That is no reason against width. All widths had the same few steps, so a "
        f"feature of the widest dictionary fired {widest['firings']:,} times in training, and one of the best "
        f"{best['firings']:,} times. The widest one is under-trained, and what it would reach with enough text is not "
        f"measured here. {said}"
    )


def _markdown(frame: pd.DataFrame) -> str:
    """A table; numbers with a point have three significant digits."""
    frame = frame[[c for c in frame if c not in ("layer", "setting") or frame[c].nunique() > 1]]
    if "layer" in frame:
        frame = frame.assign(layer=[_layer_name(layer) for layer in frame["layer"]])
    numbers = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame]
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)]
    lines = [list(frame.columns), ["---:" if number else "---" for number in numbers], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
