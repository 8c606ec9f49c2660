"""Greater-than prompts, run once: the answers, everything behind them, and what each node writes on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib import interventions, plots
from tclib.activations import hook_out
from tclib.tasks import greater_than as gt

_LAST = ("unembed.hook_in", lambda x, hook: x[:, -1:])  # logits at the last token are all that is needed


class YearCase:
    """Prompts "The NOUN lasted from the year 1732 to the year 17", and what the model makes of them.

    ``numbers`` [prompt, 100] are the logits of the two-digit numbers, ``above`` says which of them are right, ``cache``
    is the run's, and ``means`` are the outputs of heads (``attn.hook_z``) and MLPs, each averaged over the start years
    of the same noun and century.

    Raises:
        ValueError: nouns that the tokenizer cannot put into such prompts.
    """

    @torch.no_grad()
    def __init__(self, model: TransformerBridge, nouns: Sequence[str], century: int, years: Sequence[int]):
        self.model, self.ids = model, gt.year_tokens(model.tokenizer)
        self.prompts = gt.prompts(model.tokenizer, nouns, [century], years)
        self.tokens, self.years = self.prompts.tokens, self.prompts.years
        logits, self.cache = model.run_with_cache(self.tokens)
        self.numbers: Float[Tensor, "prompt 100"] = logits[:, -1, self.ids]
        self.above: Bool[Tensor, "prompt 100"] = torch.arange(100) > self.years[:, None]
        places = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
        places += [hook_out(layer) for layer in range(model.cfg.n_layers)]
        own = {name: self.cache[name] for name in places}
        self.means = {name: gt.mean_over_years(x.flatten(1), self.prompts).view_as(x) for name, x in own.items()}

    def answer(self, hooks: Sequence[tuple] = ()) -> Float[Tensor, "prompt 100"]:
        """The logits of the numbers after the prompts, of the model with hooks."""
        with interventions.edited(self.model, [*hooks, _LAST]):
            return self.model(self.tokens)[:, -1, self.ids]

    def log_odds(self, numbers: Float[Tensor, "*n prompt 100"]) -> Float[Tensor, "*n prompt"]:
        """The log odds of a right answer; the tanh of half of it is the probability difference."""
        right = numbers.masked_fill(~self.above, -torch.inf).logsumexp(-1)
        return right - numbers.masked_fill(self.above, -torch.inf).logsumexp(-1)


def node_name(node: tuple[int, int, int], heads: int, source: int) -> str:
    """``head 2.12 at 12`` or ``MLP 0 at YY`` for a node (layer, position, head), where an MLP comes after the heads."""
    layer, position, head = node
    part = f"head {layer}.{head}" if head < heads else f"MLP {layer}"
    return f"{part} at {'YY' if position == source else position}"


def draw_nodes(values: Float[Tensor, "layer pos node"], source: int, title: str, unit: str) -> None:
    """A map of one number per node: tokens from ``source`` on across, heads and then each layer's MLP downwards."""
    depth, pos, _ = values.shape
    grid = values[:, source:].transpose(1, 2).flatten(0, 1).numpy()
    edges, layer = (source - 0.5, pos - 0.5, depth, 0), "layer: heads downwards, then its MLP"
    plots.heatmap(grid, title, "token of the prompt; the first is YY", layer, unit, edges)


def draw_estimates(
    effects: Float[Tensor, " node"],
    is_head: Bool[Tensor, " node"],
    shown: Mapping[str, Float[Tensor, " node"]],
    titles: Mapping[str, str],
) -> None:
    """One panel per route: measured effects of the nodes across, the route's estimates upwards, both in log odds."""
    _, axes = plt.subplots(1, len(shown), figsize=(3.7 * len(shown), 3.2), sharex=True, sharey=True, squeeze=False)
    for ax, (route, scores) in zip(axes[0], shown.items(), strict=True):
        for of_kind, label, mark in ((is_head, "heads", "o"), (~is_head, "MLPs", "s")):
            ax.plot(effects[of_kind], scores[of_kind], mark, alpha=0.6, label=label)
        ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
        ax.set(title=titles[route], xlabel="measured effect (log odds)")
    axes[0, 0].set_ylabel("estimate (log odds)")
    axes[0, 0].legend(loc="upper left")
