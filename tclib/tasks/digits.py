"""Greater-than for any tokenizer that leaves the answer one token, and so for those that write digit by digit.

A tokenizer is recognised by what it makes of the sentences, not by its name. What can be asked of it is one or more of

    "years"   two tokens of two digits (GPT-2, the bundled model)       "... 1732 to the year 17"    above 32
    "units"   the last digit is a token (SmolLM2, Llama, Qwen, Gemma)   "... 1732 to the year 173"   above 2
    "tens"    so is the digit before it (the same)                      "... 1732 to the year 17"    3 or more

For the digit before the last one, the digit itself is right as well: 1735 comes after 1732.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal, get_args

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from tclib.tasks import greater_than as gt
from tclib.tasks.templates import TEMPLATE, fill

Asks = Literal["years", "units", "tens"]


def recognise(tokenizer: PreTrainedTokenizerBase) -> tuple[Asks, ...]:
    """What this tokenizer can be asked for, the first one being the usual choice.

    Raises:
        ValueError: none of the three; what it makes of a year is quoted.
    """
    found = []
    for asks in get_args(Asks):
        with suppress(ValueError):
            prompts(tokenizer, ["war"], [17], [32], asks=asks)
            found.append(asks)
    if not found:
        raise ValueError(
            "this tokenizer cannot do greater-than: neither two digits nor one at the end of a year are a token of "
            f"their own ('1732' is {tokenizer.tokenize('1732')})"
        )
    return tuple(found)


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    nouns: Sequence[str],
    centuries: Sequence[int] = gt.CENTURIES,
    years: Sequence[int] = gt.YEARS,
    template: str = TEMPLATE,
    asks: Asks | None = None,
) -> gt.Prompts:
    """The task for a tokenizer: `greater_than.prompts` where "years" is asked, else prompts whose answer is a digit.

    The ``frame`` of a digit's task has the columns noun, century, tens and units, and ``compared`` names the digit that
    is asked for. The metrics of `greater_than` take ``prompts.bounds``.

    Args:
        template: as for `greater_than.prompts`. Where the units are asked for, the tens are written behind it.
        asks: None: the first of what `recognise` finds. Years that end in 9 have no right answer among the units, and
            are left out there.

    Raises:
        ValueError: another template, a tokenizer that cannot be asked for this, or nothing asked for.
    """
    asks = recognise(tokenizer)[0] if asks is None else asks
    if asks not in get_args(Asks):
        raise ValueError(f"asks is one of {', '.join(get_args(Asks))}, not {asks!r}")
    if asks == "years":
        return gt.prompts(tokenizer, nouns, centuries, years, template)
    gt.check_asked(template, nouns, centuries, years)
    if not tokenizer.is_fast:
        raise ValueError("greater-than needs a fast tokenizer, which tells where each token stands in the text")
    units = asks == "units"
    rows = [(noun, int(c), *divmod(int(y), 10)) for noun in nouns for c in centuries for y in years]
    rows = [row for row in rows if row[3] < 9 or not units]
    if not rows:
        raise ValueError("a year that ends in 9 has no right answer among the units: give others as well")
    texts = [fill(template, noun, c, 10 * ten + unit) + str(ten) * units for noun, c, ten, unit in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    # Every text is looked at with an answer behind it as well, since a tokenizer may join digits in some numbers only.
    answered = tokenizer([text + "5" for text in texts], add_special_tokens=False)["input_ids"]
    answers = _answers(tokenizer, texts[0])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before_year = template.split("XXYY")[0]
    by_length: dict[int, list] = {}
    dropped = set()
    for row, ids, spans, with_answer in zip(
        rows, encoded["input_ids"], encoded["offset_mapping"], answered, strict=True
    ):
        noun, century, ten, unit = row
        at = len(fill(before_year, noun, century, 0)) + (3 if units else 2)  # where the compared digit stands
        if answers and (at, at + 1) in spans and with_answer == [*ids, answers[5]]:
            by_length.setdefault(len(ids), []).append((row, [*bos, *ids]))
        else:
            dropped.add((century, 10 * ten + unit))
    if not by_length:
        raise ValueError(
            f"this tokenizer cannot be asked for the {asks} of any of these years: "
            f"{texts[0]!r} is {tokenizer.tokenize(texts[0])}"
        )
    groups = tuple(torch.tensor([ids for _, ids in group]) for group in by_length.values())
    kept = [row for group in by_length.values() for row, _ in group]
    frame = pd.DataFrame(kept, columns=["noun", "century", "tens", "units"])
    dropped_years = pd.DataFrame(sorted(dropped), columns=["century", "year"])
    return gt.Prompts(groups, frame, dropped_years, torch.tensor(answers), compared=asks, strict=units)


def counting(tokenizer: PreTrainedTokenizerBase, centuries: Sequence[int], tens: Sequence[int]) -> gt.Prompts:
    """Prompts that count years, "1731, 1732, 1733, 173", in the form of a task that asks for the units.

    The next number is the units of the ``frame`` plus one; they go from 2 to 8. Raises ValueError as `prompts` does.
    """
    task = prompts(tokenizer, ["war"], centuries, [10 * t + u for t in tens for u in range(2, 9)], asks="units")
    rows = task.frame[["century", "tens", "units"]].itertuples(index=False)
    texts = [", ".join(f"{c}{t}{u}" for u in (last - 2, last - 1, last)) + f", {c}{t}" for c, t, last in rows]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.tensor([[*bos, *row] for row in ids])
    return replace(task, groups=(tokens,), frame=task.frame.assign(noun="counting"))


def decade(task: gt.Prompts) -> gt.Prompts:
    """A task of two-digit years in one decade, to be answered with the ten numbers of that decade only.

    Raises:
        ValueError: another task, or years of several decades.
    """
    first = 10 * int(task.years.min() // 10)
    if task.compared != "year" or task.years.max() > first + 9:
        raise ValueError("only two-digit years of one decade can be answered within it")
    return replace(
        task, answers=task.answers[first : first + 10], frame=task.frame.assign(year=task.years.numpy() - first)
    )


def _answers(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """The tokens that "0" to "9" are behind a text, or None where they are no tokens of their own there."""
    ids, *answered = tokenizer([text, *(text + str(digit) for digit in range(10))], add_special_tokens=False)[
        "input_ids"
    ]
    last = [each[-1] for each in answered]
    alone = all(each[:-1] == ids for each in answered)
    return last if alone and len(set(last)) == 10 and tokenizer.unk_token_id not in last else None
