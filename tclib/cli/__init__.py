"""The command line: set-up, running the notebooks, testing. Nothing else in the library imports it.

`python -m tclib` starts `bootstrap`, which runs on any Python; `commands` runs inside the environment that it makes.
"""
