"""The greater-than task: "The war lasted from the year 1732 to the year 17" must go on with a number above 32.

Task and metrics are those of Hanna, Liu and Variengien, "How does GPT-2 compute greater-than?" (NeurIPS 2023). They
sum probabilities of the softmax over the whole vocabulary. The transcoder paper takes the softmax over the 100
two-digit tokens only (GPT2-small, "war", 1700s: probability difference 0.88), and so does this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from tclib.activations import hook_out
from tclib.inputs import check_layers, check_tokens
from tclib.interventions import EVERYWHERE, Hook, ablate_mlp, freeze
from tclib.tasks.templates import BACKWARD_TEMPLATE as BACKWARD_TEMPLATE
from tclib.tasks.templates import PAPER_TEMPLATE as PAPER_TEMPLATE
from tclib.tasks.templates import TEMPLATE, check_template, fill
from tclib.tasks.templates import chronicle_templates as chronicle_templates
from tclib.tasks.templates import read_templates as read_templates

YEARS = range(2, 99)
CENTURIES = (11, 12, 14, 15, 16, 17, 18)  # the bundled model's text has no year of the 1300s


@dataclass(frozen=True)
class Prompts:
    """A task: prompts of one template, the tokens that can answer them, and which of those are right.

    ``groups`` has one tensor of tokens, BOS first, per length: its last column is the last token. Row i of ``frame``
    (noun, century, year; others in `tclib.tasks.digits`) is row i of the groups laid end to end. ``dropped`` (century,
    year) are years that the tokenizer writes otherwise. ``answers`` are the tokens of 00 to 99, or of 0 to 9: those
    above the number in the column ``compared`` are right, and, where not ``strict``, that number itself.
    """

    groups: tuple[Int[Tensor, "prompt pos"], ...]
    frame: pd.DataFrame
    dropped: pd.DataFrame = field(repr=False)
    answers: Int[Tensor, " answer"] = field(repr=False)
    compared: str = "year"
    strict: bool = True

    @property
    def tokens(self) -> Int[Tensor, "prompt pos"]:
        """All prompts as one tensor. Raises ValueError when their lengths differ."""
        if len(self.groups) > 1:
            lengths = [group.shape[1] for group in self.groups]
            raise ValueError(f"these prompts have {lengths} tokens: take .groups, or nouns of equal length")
        return next(iter(self.groups))

    @property
    def years(self) -> Int[Tensor, " prompt"]:
        """YY of each prompt, or whichever number is compared."""
        return torch.tensor(self.frame[self.compared].to_numpy(), dtype=torch.long)

    @property
    def bounds(self) -> Int[Tensor, " prompt"]:
        """The largest answer that is still wrong; the metrics below take it in the place of YY."""
        return self.years if self.strict else self.years - 1

    @property
    def right(self) -> Bool[Tensor, "prompt answer"]:
        """Which answers are right."""
        return torch.arange(len(self.answers)) > self.bounds[:, None]

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
    check_asked(template, nouns, centuries, years)
    if tokenizer.bos_token_id is None or not tokenizer.is_fast:
        raise ValueError("greater-than needs a fast tokenizer with a BOS token")
    year_ids = year_tokens(tokenizer).tolist()
    before_year = template.split("XXYY")[0]
    rows = [(noun, int(century), int(year)) for noun in nouns for century in centuries for year in years]
    texts = [fill(template, *row) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    by_length, dropped = {}, set()
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
    return Prompts(groups, frame, pd.DataFrame(sorted(dropped), columns=["century", "year"]), torch.tensor(year_ids))


def check_asked(template: str, nouns: Sequence[str], centuries: Sequence[int], years: Sequence[int]) -> None:
    """Raise ValueError for another template, none of something, one of them twice, or years not between 0 and 99."""
    check_template(template)
    if not (len(nouns) and len(centuries) and len(years)) or min(years) < 0 or max(years) > 99:
        raise ValueError("give at least one noun, one century and one year, years between 0 and 99")
    if any(len(set(items)) < len(items) for items in (nouns, centuries, years)):
        raise ValueError("give each noun, century and year only once")


@torch.no_grad()
def run(
    model: TransformerBridge, prompts: Prompts, hooks: Sequence[Hook] | Callable[[slice], Sequence[Hook]] = ()
) -> Float[Tensor, "prompt answer"]:
    """The model's answer to each prompt: probabilities of the task's answers, 00 to 99.

    Args:
        hooks: interventions, the same for all prompts, or a function from a slice of prompts to theirs.
    """
    check_prompts(model, prompts)
    logits = []
    for tokens, rows in prompts.batches():
        with model.hooks(fwd_hooks=list(hooks(rows) if callable(hooks) else hooks)):
            logits.append(model(tokens.to(model.cfg.device))[:, -1])
    return year_probabilities(torch.cat(logits), prompts.answers)


def check_prompts(model: TransformerBridge, prompts: Prompts) -> None:
    """Refuse prompts that this model cannot read as it was trained, such as those of another tokenizer."""
    for group in prompts.groups:
        check_tokens(model, group, "the group of prompts")


def year_probabilities(
    logits: Float[Tensor, "prompt vocab"], year_ids: Int[Tensor, " answer"]
) -> Float[Tensor, "prompt answer"]:
    """Softmax over the answers' tokens alone, on the CPU, from the logits at the last token."""
    return logits[:, year_ids.to(logits.device)].softmax(dim=-1).cpu()


def probability_difference(
    probs: Float[Tensor, "prompt answer"], years: Int[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """sum p(> YY) - sum p(<= YY), from -1 to 1. Always saying 99 scores 1, in backward contexts as well."""
    return torch.where(torch.arange(probs.shape[1]) > years[:, None], probs, -probs).sum(dim=-1)


def sharpness(probs: Float[Tensor, "prompt answer"], years: Int[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """p(YY + 1) - p(YY - 1), the cutoff sharpness of Hanna et al. Raises ValueError for the first and last answer."""
    if years.min() < 1 or years.max() > probs.shape[1] - 2:
        raise ValueError(f"sharpness needs years between 01 and {probs.shape[1] - 2}")
    return (probs.gather(1, years[:, None] + 1) - probs.gather(1, years[:, None] - 1))[:, 0]


def kl_to(full: Float[Tensor, "prompt answer"], probs: Float[Tensor, "prompt answer"]) -> Float[Tensor, " prompt"]:
    """KL(full || probs) over the 100 numbers, in nats: how far an intervention moves the answer."""
    tiny = torch.finfo(full.dtype).tiny
    return (full * (full.clamp(min=tiny) / probs.clamp(min=tiny)).log()).sum(dim=-1)


def mean_logit_difference(
    probs: Float[Tensor, "prompt answer"], years: Int[Tensor, " prompt"]
) -> Float[Tensor, " prompt"]:
    """Mean logit of the numbers > YY minus mean logit of those <= YY; what all logits share cancels in log p.

    Unlike the probability difference it does not saturate, and it is linear in the final residual stream once its
    LayerNorm scale is frozen. Raises ValueError where no number, or every number, is greater.
    """
    if years.min() < 0 or years.max() > probs.shape[1] - 2:
        raise ValueError(f"the mean logit difference needs years from 0 up to {probs.shape[1] - 2}")
    logits = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    later = torch.arange(probs.shape[1]) > years[:, None]
    return (logits * later).sum(-1) / later.sum(-1) - (logits * ~later).sum(-1) / (~later).sum(-1)


def behaviour_matrix(
    probs: Float[Tensor, "prompt answer"], years: Int[Tensor, " prompt"]
) -> Float[Tensor, "year answer"]:
    """Mean answer for each YY; rows are the years that occur, rising (97 of them from 02 to 98)."""
    return torch.stack([probs[years == year].mean(dim=0) for year in years.unique()])


def mean_over_years(values: Float[Tensor, "prompt unit"], prompts: Prompts) -> Float[Tensor, "prompt unit"]:
    """Each prompt's values replaced by their mean over YY (what is compared), for its own noun and century."""
    codes = prompts.frame.groupby([c for c in prompts.frame if c != prompts.compared]).ngroup().to_numpy()
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
    freeze_scales: bool = False,
) -> float:
    """Probability difference lost when the output of one MLP is zero, or at the last token its mean over YY.

    Zero also takes away what the MLP writes for every YY alike; the mean leaves that. "MLP10 removed" of the paper
    (figure, about 0.63 left of 0.88) sets all neurons to zero at all positions and keeps the output bias.

    Args:
        freeze_scales: later LayerNorms divide by what they divide by in the whole model. Otherwise a missing output
            makes everything else larger after them, and the answer more decided.
    """
    check_layers(model, [layer])
    if (how, positions) not in (("zero", "last"), ("zero", "all"), ("mean", "last")):
        raise ValueError(f"how={how!r}, positions={positions!r}: choose zero/last, zero/all or mean/last")
    if how == "zero":
        edits = lambda rows: ablate_mlp(layer, 0.0, -1 if positions == "last" else EVERYWHERE)  # noqa: E731
    else:
        mean = mean_over_years(at_last_token(model, prompts, layer, [hook_out(layer)])[0], prompts)
        edits = lambda rows: ablate_mlp(layer, mean[rows], -1)  # noqa: E731
    frozen = frozen_scales(model, prompts, layer) if freeze_scales else lambda rows: []
    ablated = run(model, prompts, lambda rows: [*frozen(rows), *edits(rows)])
    whole = probability_difference(run(model, prompts), prompts.bounds)
    return (whole - probability_difference(ablated, prompts.bounds)).mean().item()


@torch.no_grad()
def frozen_scales(model: TransformerBridge, prompts: Prompts, layer: int) -> Callable[[slice], list[Hook]]:
    """Hooks that give the LayerNorms behind a layer's MLP the scales that they have in the unchanged model."""
    later = [f"blocks.{i}.{norm}.hook_scale" for i in range(layer + 1, model.cfg.n_layers) for norm in ("ln1", "ln2")]
    names = {*later, "ln_final.hook_scale"}
    batches = {}
    for tokens, rows in prompts.batches():
        _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=lambda n: n in names)
        batches[rows.start] = freeze(dict(cache), ["scales"])
    return lambda rows: batches[rows.start]
