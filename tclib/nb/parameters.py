"""Strict notebook parameters, and findings that are only claims with the default ones.

Types are those of the defaults, and most of the module is hints (the nearest name, what papermill injected), of which
pydantic has none.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class ParameterError(ValueError):
    """A notebook was given a parameter that it cannot use. Shown as one sentence in Jupyter."""

    def _render_traceback_(self) -> list[str]:
        # IPython prints these lines in place of the traceback, which would bury the sentence.
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Parameter:
    """What a notebook accepts for one parameter.

    Args:
        default: the value in the tagged cell; its type is the accepted type (int, float, bool,
            str, or a list whose items have the type of the default's first item).
        low, high: inclusive bounds, for a number or for each item of a list of numbers.
        choices: the allowed values, for a scalar or for each item of a list.
        min_length: the fewest characters (str) or items (list) accepted.
    """

    default: Any
    low: float | None = None
    high: float | None = None
    choices: Sequence[Any] | None = None
    min_length: int | None = None

    def check(self, name: str, value: Any) -> Any:
        """Return ``value`` (an int becomes a float where the default is one).

        Raises:
            ParameterError: wrong type, out of range, too short, or not one of the choices.
        """
        if isinstance(self.default, list):
            if not isinstance(value, list | tuple):
                raise ParameterError(_wrong_type(name, value, "a list"))
            kind = self.default[0] if self.default else None
            items = [self._check_scalar(name, item, kind) for item in value]
            self._check_length(name, items, "items")
            return items
        value = self._check_scalar(name, value, self.default)
        if isinstance(value, str):
            self._check_length(name, value, "characters")
        return value

    def _check_scalar(self, name: str, value: Any, like: Any) -> Any:
        if like is not None:
            value = _as_type_of(like, name, value)
        if self.choices is not None and value not in self.choices:
            allowed = ", ".join(repr(choice) for choice in self.choices)
            end = _did_you_mean(value, self.choices) or "."
            raise ParameterError(f"{name} = {value!r} is not a choice{end} This notebook accepts: {allowed}.")
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        bounded = self.low is not None or self.high is not None
        # Written so that NaN, which compares false with everything, is refused.
        if bounded and not low <= value <= high:
            raise ParameterError(f"{name} = {value!r} is out of range: this notebook accepts {self._range()}.")
        return value

    def _range(self) -> str:
        if self.high is None:
            return f"{self.low} or more"
        if self.low is None:
            return f"{self.high} or less"
        return f"{self.low} to {self.high}"

    def _check_length(self, name: str, value: Sequence[Any], unit: str) -> None:
        if self.min_length is not None and len(value) < self.min_length:
            raise ParameterError(
                f"{name} = {value!r} is too short: this notebook needs at least {self.min_length} {unit}."
            )


class Parameters:
    """The checked parameters of a notebook, one attribute each."""

    def __init__(self, values: Mapping[str, Any], is_default: bool) -> None:
        self.__dict__.update(values)
        self._values = dict(values)
        self.is_default = is_default

    def __repr__(self) -> str:
        return ", ".join(f"{name} = {value!r}" for name, value in self._values.items())

    def __getattr__(self, name: str) -> Any:
        known = [key for key in self.__dict__ if not key.startswith("_")]
        raise AttributeError(f"no parameter {name!r}{_did_you_mean(name, known)}")

    def finding(self, claim: str, holds: Any) -> None:
        """Print a claim of the text, and whether the numbers above bear it out.

        A claim may fail: a miss is committed as a miss. With the default parameters the outcome is part of the
        notebook, and a test compares it with the committed one; with others it is a result "here".
        """
        outcome = "holds" if holds else "does not hold"
        print(f"{outcome}{'' if self.is_default else ' here'}: {claim}")


def parameters(scope: Mapping[str, Any], /, **declared: Parameter) -> Parameters:
    """Check the values of the tagged cell; call it as ``tc.parameters(globals(), layer=...)``.

    Raises:
        ParameterError: a name that is not declared was injected, a declared name is missing, or
            a value has the wrong type, is out of range or is not one of the choices.
        ValueError: a declared name would hide a method of the result.
    """
    reserved = {"finding", "is_default"} & declared.keys()
    if reserved:
        raise ValueError(f"a parameter cannot be called {sorted(reserved)[0]!r}")
    for name in injected_names(scope.get("In", ())):
        if name not in declared:
            raise ParameterError(unknown_parameter(name, declared))
    values = {}
    for name, parameter in declared.items():
        if name not in scope:
            raise ParameterError(
                f"the cell tagged 'parameters' does not set {name!r}; write "
                f"`{name}: {type(parameter.default).__name__} = {parameter.default!r}` there."
            )
        values[name] = parameter.check(name, scope[name])
    is_default = all(values[name] == parameter.default for name, parameter in declared.items())
    return Parameters(values, is_default)


def unknown_parameter(name: str, known: Iterable[str]) -> str:
    """The sentence that refuses a parameter name."""
    known = sorted(known)
    end = _did_you_mean(name, known) or "."
    return f"unknown parameter {name!r}{end} This notebook accepts: {', '.join(known)}."


def declared_parameters(notebook: Mapping[str, Any]) -> dict[str, Parameter]:
    """What a notebook accepts: the arguments of its ``tc.parameters(globals(), ...)``, read without running it.

    Raises:
        ValueError: it has no such call, or one that is not made of literals.
    """
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "tc.parameters(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tc.parameters":
                return {str(word.arg): _parameter(str(word.arg), word.value) for word in node.keywords}
    raise ValueError("the notebook declares no parameters: it needs a cell that calls tc.parameters(globals(), ...)")


def _parameter(name: str, call: ast.expr) -> Parameter:
    try:
        assert isinstance(call, ast.Call)
        given = [ast.literal_eval(argument) for argument in call.args]
        return Parameter(*given, **{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
    except (AssertionError, ValueError):
        raise ValueError(
            f"{name} is not declared as tc.Parameter(...) of plain values, so its values cannot be checked"
        ) from None


def assigned_literals(source: str) -> dict[str, Any]:
    """Names that a cell assigns at its top level, with their values (None: no literal); none if it is not Python."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return {}
    values = {}
    for statement in statements:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                if isinstance(target, ast.Name):
                    values[target.id] = _literal(statement.value)
    return values


def _literal(expression: ast.expr | None) -> Any:
    try:
        return None if expression is None else ast.literal_eval(expression)
    except ValueError:
        return None


def injected_names(history: Sequence[str]) -> list[str]:
    """Names set by the last cell that papermill injected into this session."""
    injected = [cell for cell in history if cell.startswith("# Parameters\n")]
    return list(assigned_literals(injected[-1])) if injected else []


_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def _as_type_of(like: Any, name: str, value: Any) -> Any:
    """``value`` if it has the type of ``like``; raises ParameterError if not."""
    kind = type(like)
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ParameterError(_wrong_type(name, value, _TYPES.get(kind, f"a {kind.__name__}")))
    return float(value) if kind is float else value


def _wrong_type(name: str, value: Any, wanted: str) -> str:
    hint = ""
    scientific = re.fullmatch(r"([+-]?[\d.]+)e([+-]?)(\d+)", value) if type(value) is str else None
    if wanted == "text":
        hint = f"; with papermill, write `-r {name} {value}`"
    elif wanted == "True or False" and isinstance(value, str):
        hint = ", with a capital and without quotes"
    elif wanted == "a number" and scientific:
        # YAML 1.1 reads a number in scientific notation only with a point and a signed exponent.
        digits, sign, exponent = scientific.groups()
        point = "" if "." in digits else ".0"
        hint = f"; in YAML, write {digits}{point}e{sign or '+'}{exponent}"
    return f"{name} = {value!r} has the wrong type: this notebook accepts {wanted}{hint}."


def _did_you_mean(value: Any, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(value), [str(item) for item in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
