"""What a check says: one line if the answer is right; else what was tried, expected, came back, and the usual cause.

While the exercise is open, it says that, and the notebook goes on; `answered` gives later cells ours until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

OPEN = "open: write your answer in the cell above and run it, then this one"


def exercise(check: Callable[..., None], graded: bool = False) -> Callable[..., None]:
    """A check as notebooks call it: while the answer is a stub, it prints that the exercise is open.

    What it and the answer draw at random leaves the notebook's generator as it was, so that later cells compute the
    same with and without an answer. ``graded`` checks raise the stub's `NotImplementedError` instead, because what does
    not fail earns points.
    """

    @wraps(check)
    def checked(answer: Any, *context: Any) -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                check(answer, *context)
        except NotImplementedError:
            if graded:
                raise
            print(OPEN)

    return checked


class NotYet(AssertionError):
    """An answer that is not right yet. Shown without its traceback in Jupyter."""

    def _render_traceback_(self) -> list[str]:
        # IPython prints these lines in place of the traceback, which would bury them.
        return [str(self)]


def accept(tried: str) -> None:
    """Print the one line of a right answer."""
    print(f"correct: {tried}")


def reject(tried: str, expected: str, came_back: str, cause: str) -> NoReturn:
    """Raise `NotYet` with the four things that a student needs to know."""
    raise NotYet(
        f"not yet\n  tried:       {tried}\n  expected:    {expected}\n"
        f"  came back:   {came_back}\n  usual cause: {cause}"
    )


def call(answer: Callable | Any, tried: str, *arguments: Any) -> Any:
    """The student's value, or what the student's function gives for ``arguments``.

    Raises:
        NotImplementedError: the exercise was not begun.
        Exception: whatever the function raised, with a note that says how it was called.
    """
    if not callable(answer):
        return answer
    try:
        return answer(*arguments)
    except NotImplementedError:
        raise
    except Exception as error:
        error.add_note(f"The check tried {tried}; the error is in the function that it was given.")
        raise


def answered(mine: Callable, ours: Callable) -> Callable:
    """A reader's function where it is written, and ours until then: what a notebook computes with, so that it runs."""

    @wraps(mine)
    def either(*arguments: Any, **named: Any) -> Any:
        try:
            return mine(*arguments, **named)
        except NotImplementedError:
            return ours(*arguments, **named)

    return either


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in float64 of each shape, drawn in this order; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def judge(
    tried: str, answer: Any, expected: Any, mistakes: Mapping[str, Any], otherwise: str, tolerance: float = 1e-4
) -> None:
    """`compare`, and say that the answer is right."""
    compare(tried, answer, expected, mistakes, otherwise, tolerance)
    accept(tried)


def compare(
    tried: str, answer: Any, expected: Any, mistakes: Mapping[str, Any], otherwise: str, tolerance: float = 1e-4
) -> None:
    """Compare an answer with the expected value and with what typical mistakes would give; a right one is no news yet.

    Args:
        tried: what the answer is about, in words.
        answer: numbers or a tensor.
        expected: the right value, from another route than the solution.
        mistakes: cause -> the value to which it leads. The first that fits the answer is named.
        otherwise: the cause to name if none fits.
        tolerance: largest difference, as a share of the largest expected number.

    Raises:
        NotYet: the answer differs.
    """
    if answer is None:
        reject(tried, shown(expected), "None", "the function does not return its result: end it with `return ...`")
    try:
        got = numbers(answer)
    except (TypeError, ValueError, RuntimeError):
        reject(tried, shown(expected), repr(answer)[:80], "the answer should be made of numbers")
    if _same(got, numbers(expected), tolerance):
        return
    for cause, wrong in mistakes.items():
        if _same(got, numbers(wrong), tolerance):
            reject(tried, shown(expected), shown(got), cause)
    if got.shape != numbers(expected).shape:
        otherwise = "the shape: a sum over the wrong axis, or over none"
    elif not got.isfinite().all():
        otherwise = "a division by zero, or the logarithm of zero"
    reject(tried, shown(expected), shown(got), otherwise)


def numbers(value: Any) -> Tensor:
    """Numbers, nested lists, arrays or tensors as one float64 tensor."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double()
    return torch.as_tensor(np.asarray(value, dtype=float))


def shown(value: Any, most: int = 4) -> str:
    """The first numbers of a value, and its shape if it has one."""
    tensor = numbers(value)
    first = ", ".join(f"{x:.4g}" for x in tensor.flatten()[:most].tolist())
    if tensor.ndim == 0:
        return first
    more = ", ..." if tensor.numel() > most else ""
    return f"{first}{more} (shape {tuple(tensor.shape)})"


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = max(1e-12, float(b.abs().max())) if b.numel() else 1.0
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * scale).all())
