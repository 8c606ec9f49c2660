"""One check per exercise. Each takes the student's function or value and finds the right one by another route.

A module has the checks of one notebook or two: its public functions, which are all that notebooks use. `graded` has the
same ones for nbgrader, which fail while an exercise is open.
"""

from importlib import import_module
from inspect import isfunction
from pkgutil import iter_modules
from types import SimpleNamespace

from tclib.nb.teaching.verdict import exercise

_checks = {
    name: check
    for found in iter_modules(__path__)
    for name, check in vars(import_module(f"{__name__}.{found.name}")).items()
    if isfunction(check) and check.__module__ == f"{__name__}.{found.name}" and not name.startswith("_")
}
graded = SimpleNamespace(**{name: exercise(check, graded=True) for name, check in _checks.items()})
globals().update({name: exercise(check) for name, check in _checks.items()}, __all__=list(_checks))
