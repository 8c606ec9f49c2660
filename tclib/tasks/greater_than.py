"""The greater-than task: "The war lasted from the year 1732 to the year 17" must go on with a number above 32.

Task and metrics are those of Hanna, Liu and Variengien, "How does GPT-2 compute greater-than?" (NeurIPS 2023). They
sum probabilities of the softmax over the whole vocabulary. The transcoder paper takes the softmax over the 100
two-digit tokens only (GPT2-small, "war", 1700s: probability difference 0.88), and so does this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from tclib.activations import hook_out
from tclib.chronicle import BACKWARD, SPANS
from tclib.inputs import check_layers, check_tokens
from tclib.interventions import EVERYWHERE, Hook, ablate_mlp, freeze
from tclib.io.paths import read_text

TEMPLATE = "The NOUN lasted from the year XXYY to the year XX"
BACKWARD_TEMPLATE = "The NOUN ended in the year XXYY; it began in the year XX"
PAPER_TEMPLATE = "The NOUN lasted from XXYY to XX"
YEARS = range(2, 99)
CENTURIES = (11, 12, 14, 15, 16, 17, 18)  # the bundled model's text has no year of the 1300s


@dataclass(frozen=True)
class Prompts:
    """Prompts of one template.

    ``groups`` has one tensor of tokens, BOS first, for each length, so that the last column is the last token. Row i
    of ``frame`` (noun, century, year) is row i of the groups laid end to end. ``dropped`` (century, year) are years
    that the tokenizer does not write as one token for the century and one for YY.
    """

    groups: tuple[Int[Tensor, "prompt pos"], ...]
    frame: pd.DataFrame
    dropped: pd.DataFrame = field(repr=False)

    @property
    def tokens(self) -> Int[Tensor, "prompt pos"]:
        """All prompts as one tensor. Raises ValueError when their lengths differ."""
        if len(self.groups) > 1:
            lengths = [group.shape[1] for group in self.groups]
            raise ValueError(f"these prompts have {lengths} tokens: take .groups, or nouns of equal length")
        return self.groups[0]

    @property
    def years(self) -> Int[Tensor, " prompt"]:
        """YY of each prompt."""
        return torch.tensor(self.frame["year"].to_numpy(), dtype=torch.long)

    def batches(self, size: int = 128) -> Iterator[tuple[Int[Tensor, "row pos"], slice]]:
        """Tokens of at most ``size`` prompts of one length, and which rows of ``frame`` they are."""
        first = 0
        for tokens in (part for group in self.groups for part in group.split(size)):
            yield tokens, slice(first, first + len(tokens))
            first += len(tokens)


def year_tokens(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " 100"]:
    """Ids of "00" to "99" without a space. Raises ValueError naming those that are not one token."""
    ids = tokenizer([f"{year:02d}" for year in range(100)], add_special_tokens=False)["input_ids"]
    wrong = [f"{year:02d}" for year, i in enumerate(ids) if len(i) != 1 or i[0] == tokenizer.unk_token_id]
    if wrong:
        named = ", ".join(wrong[:5]) + ", ..." * (len(wrong) > 5)
        raise ValueError(f"this tokenizer cannot do greater-than: {len(wrong)} of 00 to 99 are not one token ({named})")
    return torch.tensor(ids)[:, 0]


def check_years(tokenizer: PreTrainedTokenizerBase, century: int) -> list[int]:
    """The YY of a century that the tokenizer does not write as one token for the century and one for YY.

    GPT-2's tokenizer: 214 of the years 1000 to 1999, the whole 1900s among them.
    """
    year_ids = year_tokens(tokenizer).tolist()
    encoded = tokenizer([f" {century}{year:02d}" for year in range(100)], add_special_tokens=False)["input_ids"]
    return [year for year, ids in enumerate(encoded) if ids[1:] != [year_ids[year]]]


def fill(template: str, noun: str, century: int, year: int) -> str:
    """One prompt: ``fill(TEMPLATE, "war", 17, 32)``."""
    text = template.replace("XXYY", f"{century}{year:02d}").replace("XX", str(century))
    return text.replace("NOUN", noun)


def check_template(template: str) -> None:
    """Raise ValueError unless the template has one NOUN and one XXYY and ends in XX."""
    marks = [template.count("NOUN"), template.count("XXYY"), template.count("XX"), template.count("YY")]
    if marks != [1, 1, 2, 1] or not template.endswith("XX"):
        raise ValueError(f"template {template!r} needs NOUN and XXYY once each, and must stop at XX")


def read_templates(path: str | Path) -> list[str]:
    """Templates of a text file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: no such file, none in UTF-8, no template in it, or a line that is not one (it is named).
    """
    try:
        lines = read_text(Path(path)).splitlines()
    except OSError:
        raise ValueError(f"there is no prompt file {path}: give a text file with one template a line") from None
    templates = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for template in templates:
        check_template(template)
    if not templates:
        raise ValueError(f"{path} holds no template: write one a line, for example {TEMPLATE!r}")
    return templates


def chronicle_templates(kind: Literal["train", "heldout"], backward: bool = False) -> list[str]:
    """The bundled corpus' own sentences as templates: those with no other field than the noun and the two years.

    ``heldout`` templates never occur in the training text.
    """
    first, second = ("end", "start") if backward else ("start", "end")
    plain = [
        t for t in (BACKWARD if backward else SPANS)[kind] if set(re.findall(r"{(.*?)}", t)) == {"noun", first, second}
    ]
    cut = [t.split(f"{{{second}}}")[0] + "XX" for t in plain]
    return [t.replace("{noun}", "NOUN").replace(f"{{{first}}}", "XXYY") for t in cut]


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    nouns: Sequence[str],
    centuries: Sequence[int] = CENTURIES,
    years: Sequence[int] = YEARS,
    template: str = TEMPLATE,
) -> Prompts:
    """Every noun in every century with every year that the tokenizer can express.

    Args:
        template: has ``NOUN`` and the whole year ``XXYY``, and stops at ``XX``, after which the model answers. Whether
            the answer must be greater or, in backward contexts, smaller is what the sentence says.

    Raises:
        ValueError: another template, a tokenizer that cannot express any of the years, or nothing asked for.
    """
    check_template(template)
    if not (len(nouns) and len(centuries) and len(years)) or min(years) < 0 or max(years) > 99:
        raise ValueError("give at least one noun, one century and one year, years between 0 and 99")
    if any(len(set(items)) < len(items) for items in (nouns, centuries, years)):
        raise ValueError("give each noun, century and year only once")
    if tokenizer.bos_token_id is None or not tokenizer.is_fast:
        raise ValueError("greater-than needs a fast tokenizer with a BOS token")
    year_ids = year_tokens(tokenizer).tolist()
    before_year = template.split("XXYY")[0]
    rows = [(noun, int(century), int(year)) for noun in nouns for century in centuries for year in years]
    texts = [fill(template, *row) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    by_length: dict[int, list] = {}
    dropped = set()
    for row, text, ids, spans in zip(rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        noun, century, year = row
        end = len(fill(before_year, noun, century, year)) + 4
        at = next((i for i, span in enumerate(spans) if span[1] == end), 0)
        split = at > 0 and ids[at] == year_ids[year] and spans[at - 1][0] <= end - 4 and spans[at - 1][1] == end - 2
        if split and spans[-1][0] <= len(text) - 2:  # the last token must be the whole century
            by_length.setdefault(len(ids), []).append((row, [tokenizer.bos_token_id, *ids]))
        else:
            dropped.add((century, year))
    if not by_length:
        raise ValueError(
            "this tokenizer writes none of these years as one token for the century and one for YY: "
            f"{texts[0]!r} is {tokenizer.tokenize(texts[0])}"
        )
    groups = tuple(torch.tensor([ids for _, ids in group]) for group in by_length.values())
    kept = [row for group in by_length.values() for row, _ in group]
    frame = pd.DataFrame(kept, columns=["noun", "century", "year"])
    return Prompts(groups, frame, pd.DataFrame(sorted(dropped), columns=["century", "year"]))


@torch.no_grad()
def run(
    model: TransformerBridge, prompts: Prompts, hooks: Sequence[Hook] | Callable[[slice], Sequence[Hook]] = ()
) -> Float[Tensor, "prompt 100"]:
    """The model's answer to each prompt: probabilities of 00 to 99.

    Args:
        hooks: interventions, the same for all prompts, or a function from a slice of prompts to theirs.
    """
    check_prompts(model, prompts)
    logits = []
    for tokens, rows in prompts.batches():
        with model.hooks(fwd_hooks=list(hooks(rows) if callable(hooks) else hooks)):
            logits.append(model(tokens.to(model.cfg.device))[:, -1])
    return year_probabilities(torch.cat(logits), year_tokens(model.tokenizer))


def check_prompts(model: TransformerBridge, prompts: Prompts) -> None:
    """Refuse prompts that this model cannot read as it was trained, such as those of another tokenizer."""
    for group in prompts.groups:
        check_tokens(model, group, "the group of prompts")


def year_probabilities(
    logits: Float[Tensor, "prompt vocab"], year_ids: Int[Tensor, " 100"]
) -> Float[Tensor, "prompt 100"]:
    """Softmax over the 100 two-digit tokens alone, on the CPU, from the logits at the last token."""
    return logits[:, year_ids.to(logits.device)].softmax(dim=-1).cpu()


def probability_difference(
    probs: Float[Tensor, "prompt 100"], years: Int[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """sum p(> YY) - sum p(<= YY), from -1 to 1. Always saying 99 scores 1: see `balanced_difference`."""
    return torch.where(torch.arange(100) > years[:, None], probs, -probs).sum(dim=-1)


def balanced_difference(forward: Float[Tensor, " prompt"], backward: Float[Tensor, " other"]) -> float:
    """(forward - backward) / 2 of the mean `probability_difference` in forward and in backward contexts.

    After "ended in 1757, began in 17" the number must be below 57: a model that compares has about -1 there, and
    about 1 in all; a constant answer has about 0.
    """
    return (forward.mean() - backward.mean()).item() / 2


def sharpness(probs: Float[Tensor, "prompt 100"], years: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """p(YY + 1) - p(YY - 1), the cutoff sharpness of Hanna et al. Raises ValueError for the years 00 and 99."""
    if years.min() < 1 or years.max() > 98:
        raise ValueError("sharpness needs years between 01 and 98")
    return (probs.gather(1, years[:, None] + 1) - probs.gather(1, years[:, None] - 1))[:, 0]


def kl_to(full: Float[Tensor, "prompt 100"], probs: Float[Tensor, "prompt 100"]) -> Float[Tensor, " prompt"]:
    """KL(full || probs) over the 100 numbers, in nats: how far an intervention moves the answer."""
    tiny = torch.finfo(full.dtype).tiny
    return (full * (full.clamp(min=tiny) / probs.clamp(min=tiny)).log()).sum(dim=-1)


def mean_logit_difference(
    probs: Float[Tensor, "prompt 100"], years: Int[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """Mean logit of the numbers > YY minus mean logit of those <= YY; what all logits share cancels in log p.

    Unlike the probability difference it does not saturate, and it is linear in the final residual stream once its
    LayerNorm scale is frozen. Raises ValueError for the year 99, above which there is no number.
    """
    if years.max() > 98:
        raise ValueError("the mean logit difference needs years up to 98")
    logits = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    later = torch.arange(100) > years[:, None]
    return (logits * later).sum(-1) / later.sum(-1) - (logits * ~later).sum(-1) / (~later).sum(-1)


def behaviour_matrix(probs: Float[Tensor, "prompt 100"], years: Int[Tensor, " prompt"]) -> Float[Tensor, "year 100"]:
    """Mean answer for each YY; rows are the years that occur, rising (97 of them from 02 to 98)."""
    return torch.stack([probs[years == year].mean(dim=0) for year in years.unique()])


def mean_over_years(values: Float[Tensor, "prompt unit"], prompts: Prompts) -> Float[Tensor, "prompt unit"]:
    """Each prompt's values replaced by their mean over YY, for its own noun and century."""
    codes = prompts.frame.groupby(["noun", "century"]).ngroup().to_numpy()
    group = torch.tensor(codes, dtype=torch.long, device=values.device)
    counts = group.bincount()[:, None]
    return (values.new_zeros(len(counts), values.shape[1]).index_add_(0, group, values) / counts)[group]


@torch.no_grad()
def at_last_token(
    model: TransformerBridge, prompts: Prompts, layer: int, names: Sequence[str]
) -> list[Float[Tensor, "prompt unit"]]:
    """Activations at the last token of each prompt, one tensor for each of ``names``, hooks of one layer."""
    check_layers(model, [layer])
    check_prompts(model, prompts)
    parts = []
    for tokens, _ in prompts.batches():
        tokens = tokens.to(model.cfg.device)
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: n in names, stop_at_layer=layer + 1)
        parts.append([cache[name][:, -1] for name in names])
    return [torch.cat(batches) for batches in zip(*parts, strict=True)]


def drop_if_ablated(
    model: TransformerBridge,
    prompts: Prompts,
    layer: int,
    how: Literal["zero", "mean"] = "mean",
    positions: Literal["last", "all"] = "last",
    hold_scales: bool = False,
) -> float:
    """Probability difference lost when the output of one MLP is zero, or at the last token its mean over YY.

    Zero also takes away what the MLP writes for every YY alike; the mean leaves that. "MLP10 removed" of the paper
    (figure, about 0.63 left of 0.88) sets all neurons to zero at all positions and keeps the output bias.

    Args:
        hold_scales: later LayerNorms divide by what they divide by in the whole model. Otherwise a missing output makes
            everything else larger after them, and the answer more decided.
    """
    check_layers(model, [layer])
    if (how, positions) not in (("zero", "last"), ("zero", "all"), ("mean", "last")):
        raise ValueError(f"how={how!r}, positions={positions!r}: choose zero/last, zero/all or mean/last")
    if how == "zero":
        edits = lambda rows: ablate_mlp(layer, 0.0, -1 if positions == "last" else EVERYWHERE)  # noqa: E731
    else:
        mean = mean_over_years(at_last_token(model, prompts, layer, [hook_out(layer)])[0], prompts)
        edits = lambda rows: ablate_mlp(layer, mean[rows], -1)  # noqa: E731
    held = held_scales(model, prompts, layer) if hold_scales else lambda rows: []
    ablated = run(model, prompts, lambda rows: [*held(rows), *edits(rows)])
    whole = probability_difference(run(model, prompts), prompts.years)
    return (whole - probability_difference(ablated, prompts.years)).mean().item()


@torch.no_grad()
def held_scales(model: TransformerBridge, prompts: Prompts, layer: int) -> Callable[[slice], list[Hook]]:
    """Hooks that give the LayerNorms behind a layer's MLP the scales that they have in the unchanged model."""
    later = [f"blocks.{i}.{norm}.hook_scale" for i in range(layer + 1, model.cfg.n_layers) for norm in ("ln1", "ln2")]
    names = {*later, "ln_final.hook_scale"}
    batches = {}
    for tokens, rows in prompts.batches():
        _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=lambda n: n in names)
        batches[rows.start] = freeze(cache, ["scales"])
    return lambda rows: batches[rows.start]
