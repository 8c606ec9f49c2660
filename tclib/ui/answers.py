"""What is asked: a prompt, a next token and perhaps another one, with the likeliest next tokens at one click."""

from __future__ import annotations

import ast
import re

import ipywidgets as w
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from tclib import targets
from tclib.model import to_token, token_string
from tclib.targets import Target
from tclib.tracing import Trace
from tclib.ui.base import prompt_field
from tclib.ui.markup import TEXT, shown

LIKELIEST = 5


def next_tokens(trace: Trace, k: int = LIKELIEST) -> pd.DataFrame:
    """The k likeliest next tokens: ``id``, ``token`` (as it is shown) and ``probability``, largest first."""
    best = trace.logits[-1].softmax(-1).topk(min(k, trace.model.cfg.d_vocab))
    names = [shown(token_string(trace.model, index)) for index in best.indices.tolist()]
    return pd.DataFrame({"id": best.indices.tolist(), "token": names, "probability": best.values.tolist()})


def written(model: TransformerBridge, index: int) -> str:
    """How to type a token so that `read_token` understands it: its text, in quotes if it begins or ends with a space
    or has a line break, or ``#`` and its number if no text of its own stands for it (a piece of a letter, say)."""
    text = model.tokenizer.decode([index])
    if _ids(model, text) != [index]:
        return f"#{index}"
    return repr(text) if text != text.strip() else text


def read_token(model: TransformerBridge, text: str) -> str | int:
    """What was typed for a token: a text that is one token, such a text in quotes, or ``#`` and a number.

    Raises:
        ValueError: none of these.
    """
    if len(_ids(model, text)) == 1:
        return text
    if re.fullmatch(r"#\d+", text):
        return int(text[1:])
    if re.fullmatch(r"(['\"]).+\1", text):
        try:
            text = str(ast.literal_eval(text))
        except (SyntaxError, ValueError):
            pass  # no quotes of Python, but a text that begins and ends so
    to_token(model, text)
    return text


class Question:
    """Fields for prompt and tokens, and a row of buttons that put the likeliest next tokens into *answer*."""

    def __init__(self, prompt: str, token: str, other: str):
        short = w.Layout(width="160px")
        self.prompt = prompt_field(prompt)
        self.token = w.Text(token, description="answer", continuous_update=False, layout=short)
        self.other = w.Text(other, description="rather than", continuous_update=False, layout=short)
        about = "make this next token the answer"
        self.likeliest = [w.Button(description="next", tooltip=about, layout=_NARROW) for _ in range(LIKELIEST)]
        for button in self.likeliest:
            button.on_click(self._take)
        self._tokens = [""] * LIKELIEST

    @property
    def fields(self) -> tuple[w.Text | w.Textarea, ...]:
        return self.prompt, self.token, self.other

    @property
    def rows(self) -> list[tuple[w.Widget, ...]]:
        """Rows of controls for an explorer."""
        return [self.fields, (w.HTML(f'<span style="color: {TEXT}">likeliest next tokens:</span>'), *self.likeliest)]

    def target(self, trace: Trace) -> Target:
        """The logit of the answer, minus that of the other token if there is one; both as `read_token` reads them.

        Raises:
            ValueError: no token, or twice the same one.
        """
        model, token = trace.model, self.token.value
        first = read_token(model, token)
        if not self.other.value:
            return targets.logit(trace, first)
        second = read_token(model, self.other.value)
        ids = [to_token(model, t) if isinstance(t, str) else t for t in (first, second)]
        if ids[0] == ids[1]:
            raise ValueError(
                f"the answer and 'rather than' are both {shown(token)}, so their difference is always 0: change one of "
                "them, or leave 'rather than' empty"
            )
        return targets.logit_difference(trace, first, second)

    def show(self, trace: Trace) -> None:
        """Put this prompt's likeliest next tokens on the buttons."""
        table = next_tokens(trace)
        self._tokens = [written(trace.model, index) for index in table["id"]]
        for button, row in zip(self.likeliest, table.itertuples(), strict=False):
            button.description = f"{row.token} {row.probability:.0%}"

    def _take(self, button: w.Button) -> None:
        self.token.value = self._tokens[self.likeliest.index(button)]


_NARROW = w.Layout(width="auto")


def _ids(model: TransformerBridge, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]
