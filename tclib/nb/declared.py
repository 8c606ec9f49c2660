"""What a notebook accepts, read without running it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from tclib.nb.parameters import Parameter


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
