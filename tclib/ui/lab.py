"""The greater-than laboratory: what happens to the answers when only some units of an MLP are live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as w
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.inputs import check_layers
from tclib.plots import NEGATIVE, POSITIVE
from tclib.replacement_model import ReplacementModel, joined
from tclib.tasks import greater_than as gt
from tclib.tasks.unit_sweep import keep_units, rank_units
from tclib.transcoder import Transcoder
from tclib.ui.base import Explorer, replace_options
from tclib.ui.markup import picture

LISTED = 24  # units that can be taken out


def answers(
    model: TransformerBridge,
    prompts: gt.Prompts,
    layer: int,
    ranked: Int[Tensor, " unit"],
    kept: int,
    out: Sequence[int] = (),
    transcoder: Transcoder | None = None,
) -> Float[Tensor, "prompt 100"]:
    """The answers with the first ``kept`` units of a ranking live, but for those in ``out``; all others are held at
    their mean over YY (`tclib.tasks.unit_sweep.keep_units`)."""
    live = ranked[:kept]
    live = live[~torch.isin(live, torch.tensor(list(out), dtype=live.dtype, device=live.device))]
    return keep_units(model, prompts, layer, [len(live)], live, transcoder)[0]


def whole_model(model: TransformerBridge, prompts: gt.Prompts, layer: int) -> Float[Tensor, "prompt 100"]:
    """The untouched model's answers: all neurons of one MLP live, faster than running every prompt from its start."""
    check_layers(model, [layer])
    neurons = torch.arange(model.blocks[layer].mlp.W_out.shape[0], device=model.cfg.device)
    return keep_units(model, prompts, layer, [len(neurons)], neurons)[0]


def lab_figure(probs: Float[Tensor, "prompt 100"], prompts: gt.Prompts, year: int, title: str) -> Figure:
    """The behaviour matrix, and the row of one YY as bars: blue above YY, orange up to it."""
    years = prompts.years.unique().numpy()
    matrix = gt.behaviour_matrix(probs, prompts.years).sqrt().numpy()
    figure = Figure(figsize=(9.2, 3.5), dpi=85, layout="none")  # pyright: ignore[reportArgumentType]
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    figure.subplots_adjust(left=0.06, right=0.99, top=0.86, bottom=0.15, wspace=0.22)
    edges = (-0.5, 99.5, years[-1] + 0.5, years[0] - 0.5)
    left.imshow(matrix, aspect="auto", extent=edges, interpolation="nearest", vmin=0, vmax=0.35)
    left.plot(years, years, color="white", linewidth=1)
    left.axhline(year, color="white", linewidth=1, linestyle=":")
    left.set(xlabel="answer y", ylabel="YY of the prompt")
    left.set_title("square root of p(y), dark 0, bright 0.35", fontsize=9)
    row = probs[(prompts.years == year).nonzero()[0, 0]].numpy()
    colors = [POSITIVE if y > year else NEGATIVE for y in range(100)]
    right.vlines(range(100), 0, row, colors=colors, linewidth=3.5)  # one artist: a hundred bars are slow
    right.axvline(year + 0.5, color="black", linewidth=0.8)
    right.set(xlabel=f"answer y after YY = {year:02d}", ylabel="p(y)", xlim=(-1, 99.9), ylim=(0, None))
    right.set_title(title, fontsize=10)
    for ax in (left, right):
        ax.locator_params(nbins=5)  # drawing their labels is what takes longest
    return figure


class Lab(Explorer):
    """YY, how many units are kept, in which order, and which of the first ones are taken out."""

    def __init__(
        self,
        replacement: ReplacementModel,
        nouns: Sequence[str] = ("war", "siege", "reign", "voyage"),
        centuries: Sequence[int] = gt.CENTURIES,
        layer: int | None = None,
    ):
        self.model, self.transcoders = joined(replacement).model, replacement.transcoders
        self._known, self._rankings = {}, {}
        short = w.Layout(width="190px")
        layer = max(self.transcoders) if layer is None else layer
        self.noun: Any = w.Dropdown(options=list(nouns), description="noun", layout=short)
        self.century: Any = w.Dropdown(options=list(centuries), description="century", layout=short)
        self.layer: Any = w.Dropdown(options=sorted(self.transcoders), value=layer, description="MLP", layout=short)
        self.year = w.IntSlider(35, 2, 98, description="YY", continuous_update=False)
        self.units: Any = w.ToggleButtons(
            options=["features", "neurons", "random features"], description="units", style={"button_width": "auto"}
        )
        self.kept: Any = w.SelectionSlider(options=[("0", 0)], description="kept", continuous_update=False)
        self.out: Any = w.SelectMultiple(description="taken out", rows=10, layout=w.Layout(width="220px"))
        self.view = w.HTML(layout=w.Layout(flex="1 1 600px"))
        controls = [(self.noun, self.century, self.layer), (self.year, self.kept), (self.units,)]
        super().__init__("Greater-than laboratory", controls, [self.out, self.view])
        self.watch(self._prepare, self.noun, self.century, self.layer, self.units)
        self.watch(self._edit, self.kept, self.out)
        self.watch(self._show, self.year)
        self.start(self._prepare)

    def _prepare(self) -> str:
        noun, century, layer, units = self.noun.value, self.century.value, self.layer.value, self.units.value
        if (noun, century) not in self._known:
            prompts = gt.prompts(self.model.tokenizer, [noun], [century])
            self._known[noun, century] = prompts, whole_model(self.model, prompts, layer)
        self.prompts, self.whole = self._known[noun, century]
        self.transcoder = None if units == "neurons" else self.transcoders[layer]
        order = "random" if units == "random features" else "variance"
        asked = noun, century, layer, units
        if asked not in self._rankings:
            self._rankings[asked] = rank_units(self.model, self.prompts, layer, self.transcoder, order)
        self.ranked = self._rankings[asked]
        size = len(self.ranked)
        steps = sorted({0, *(2**n for n in range(size.bit_length()) if 2**n < size), size})
        kept = self.kept.value
        self.kept.options = [(f"{k} of {size}", k) for k in steps]
        self.kept.value = kept if kept in steps and kept else 16 if 16 in steps else size
        replace_options(
            self.out, [(f"{n + 1}.  [{unit}]", unit) for n, unit in enumerate(self.ranked[:LISTED].tolist())]
        )
        return self._edit()

    def _edit(self) -> str:
        layer, kept, out = self.layer.value, self.kept.value, self.out.value
        self.now = answers(self.model, self.prompts, layer, self.ranked, kept, out, self.transcoder)
        return self._show()

    def _show(self) -> str:
        layer, year, kept, out, now = self.layer.value, self.year.value, self.kept.value, self.out.value, self.now
        difference = gt.probability_difference(now, self.prompts.years).mean().item()
        whole = gt.probability_difference(self.whole, self.prompts.years).mean().item()
        moved = gt.kl_to(self.whole, now).mean().item()
        title = f"probability difference {difference:.3f}, whole model {whole:.3f}"
        told = f"behaviour matrix and answers at YY = {year:02d}: {title}"
        self.view.value = picture(lab_figure(now, self.prompts, year, title), told, 782)
        taken = f", {len(out)} of the first taken out" if out else ""
        return (
            f"{kept} {self.units.value} of MLP {layer} live{taken}: mean over YY {title}; "
            f"KL from the whole model {moved:.3f} nats."
        )
