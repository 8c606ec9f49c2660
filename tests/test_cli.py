"""The command line: set-up, refusals, runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tclib as tc
from tclib.cli import bootstrap
from tclib.cli.run import declared_names, literal, run, typed
from tclib.cli.sweep import with_axes
from tclib.notebook import find_headline

REPO = Path(bootstrap.REPO)
BARE = [f"tclib/{name}" for name in ("__init__.py", "__main__.py", "cli/__init__.py")]
BARE += ["tclib/cli/bootstrap.py"]
GOOD = [
    "import tclib as tc",
    "model: str = 'bundled'  # which model\nlayer: int = 2  # which layer",
    "tc.headline('layer', layer)",
]
BAD = [GOOD[0], "model: str = 'bundled'  # which model", "raise KeyError('planted')"]


@pytest.fixture
def repo(tmp_path, write_notebook):
    """A repository with two notebooks, the first of which fails, in a path with a space."""
    folder = tmp_path / "a clone"
    write_notebook(folder / "notebooks/01_bad.ipynb", BAD, {1: "parameters"})
    write_notebook(folder / "notebooks/02_good.ipynb", GOOD, {1: "parameters"})
    return folder


@pytest.mark.parametrize("name", BARE)
def test_bootstrap_parses_on_old_pythons(name):
    source = (REPO / name).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))
    assert "from __future__" not in source  # `annotations` is a syntax error before 3.7


@pytest.mark.parametrize("name", BARE)
def test_bootstrap_needs_only_the_standard_library(name):
    for node in ast.walk(ast.parse((REPO / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        for module in modules:
            assert module.split(".")[0] in {*sys.stdlib_module_names, "tclib"}


def test_old_python_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 1))
    assert bootstrap.main(["run"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("Transcoder Circuits needs Python 3.11 or newer, and this is Python 3.9")
    assert message.count("\n") == 1


def test_importing_tclib_loads_nothing():
    code = "import sys, tclib; sys.exit(bool({'torch', 'numpy', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_unknown_command_shows_usage(capsys):
    assert bootstrap.main(["rnu"]) == 2
    assert "test-all" in capsys.readouterr().err


class FakeSetup:
    """Stands in for venv and pip; records what would have been run."""

    def __init__(self, monkeypatch, repo, error=None):
        self.pip_calls, self.error = [], error
        for name in ("pyproject.toml", "constraints.txt"):
            repo.mkdir(exist_ok=True)
            (repo / name).write_text("torch==2.13.0\n", encoding="utf-8")
        self.python = repo / ".venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        self.python.parent.mkdir(parents=True)
        self.python.touch()
        monkeypatch.delenv("TCLIB_VENV", raising=False)
        monkeypatch.delenv("TORCH_INDEX", raising=False)
        monkeypatch.setattr(bootstrap, "has_pip", lambda python: True)
        monkeypatch.setattr(bootstrap, "pip", self.pip)

    def pip(self, repo, python, arguments):
        self.pip_calls.append(arguments)
        if self.error:
            raise self.error


def test_second_call_installs_nothing(monkeypatch, tmp_path):
    setup = FakeSetup(monkeypatch, tmp_path / "a clone")
    repo = tmp_path / "a clone"
    assert bootstrap.set_up(repo) == setup.python
    assert bootstrap.set_up(repo) == setup.python
    assert setup.pip_calls == [["-c", "constraints.txt", "-e", ".[notebooks,test]"]]
    (repo / "constraints.txt").write_text("torch==2.13.1\n", encoding="utf-8")
    bootstrap.set_up(repo)
    assert len(setup.pip_calls) == 2


@pytest.mark.parametrize("error", [bootstrap.SetupError("no network"), KeyboardInterrupt()])
def test_failed_install_is_taken_up_again(monkeypatch, tmp_path, error):
    setup = FakeSetup(monkeypatch, tmp_path / "clone", error)
    for _ in range(2):
        with pytest.raises(type(error)):
            bootstrap.set_up(tmp_path / "clone")
    assert len(setup.pip_calls) == 2


def test_torch_index_is_for_torch_alone(monkeypatch, tmp_path):
    setup = FakeSetup(monkeypatch, tmp_path / "clone")
    monkeypatch.setenv("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
    bootstrap.set_up(tmp_path / "clone")
    torch, rest = setup.pip_calls
    assert torch[-1] == "torch==2.13.0" and "--index-url" in torch
    assert "--index-url" not in rest


def test_no_network_is_one_sentence(tmp_path, capfd):
    # `python -m pip` finds this module first, in its working directory.
    (tmp_path / "pip.py").write_text("import sys; sys.exit('NewConnectionError: no route')", encoding="utf-8")
    with pytest.raises(bootstrap.SetupError, match="The package index cannot be reached"):
        bootstrap.pip(tmp_path, sys.executable, ["torch"])
    assert "NewConnectionError: no route" in capfd.readouterr().err


def test_not_a_clone(tmp_path):
    with pytest.raises(bootstrap.SetupError, match="works in a clone"):
        bootstrap.set_up(tmp_path)


def test_only_this_kernel(monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", "/elsewhere")
    env = bootstrap.environment()
    assert env["JUPYTER_PREFER_ENV_PATH"] == "1" and "JUPYTER_PATH" not in env


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-p", "layr", "1", "--only", "02"], "unknown parameter 'layr'; did you mean 'layer'?"),
        (["-p", "layer", "1"], "01_bad.ipynb: unknown parameter 'layer'"),
        (["--model", "no such model"], "unknown model 'no such model'"),
        (["--only", "07"], "No notebook starts with '07'; there are: 01_bad, 02_good."),
        (["--only", "02,"], "No notebook starts with ''"),
        (["--name", "a/b"], "'a/b' is not a folder name"),
    ],
)
def test_refused_before_running(repo, capsys, arguments, sentence):
    assert run(arguments, repo) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1
    assert not (repo / "runs").exists()


def test_run_keeps_the_failed_notebook_and_goes_on(repo, capsys):
    assert run(["--name", "one"], repo) == 1
    printed = capsys.readouterr().out
    assert "FAILED in cell 3, In [3]: KeyError: 'planted'" in printed
    assert "layer = 2" in printed
    assert str(repo / "runs/one/02_good.ipynb") in printed
    assert "planted" in (repo / "runs/one/01_bad.ipynb").read_text(encoding="utf-8")


TYPES = [
    GOOD[0],
    "prompt: str = 'words'  # a\nrows: int = 2  # b\nnouns: list = ['war']  # c\nfast: bool = True  # d",
]


@pytest.mark.parametrize("written", ["1732", "45", "true", "1.5e3", "[1]", "None", "words", "it's"])
def test_what_is_declared_as_text_stays_as_it_was_written(repo, write_notebook, written):
    path = write_notebook(repo / "notebooks/03_types.ipynb", TYPES, {1: "parameters"})
    assert typed(path, {"prompt": written, "rows": "3", "other": "1"}) == {"prompt": written, "rows": 3}
    assert typed(path, {"prompt": f'"{written}"'}) == {"prompt": written}


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("rows", "many", "-p rows 2"), ("rows", "1.5", "-p rows 2"), ("nouns", "war", "-p nouns '['\"'\"'war"),
     ("nouns", "[1732]", "-p nouns '['\"'\"'war"), ("fast", "true", "-p fast True")],
)  # fmt: skip
def test_another_type_is_refused_with_the_way_to_write_it_here(repo, write_notebook, capsys, name, value, instead):
    write_notebook(repo / "notebooks/03_types.ipynb", TYPES, {1: "parameters"})
    assert run(["--only", "03", "-p", name, value], repo) == 2
    message = capsys.readouterr().err
    assert f"03_types.ipynb: {name} = {value} has the wrong type" in message and instead in message
    assert "papermill" not in message and message.count("\n") == 1 and not (repo / "runs").exists()


def test_the_axes_of_a_sweep_keep_text_as_it_was_written():
    declared = {"activation": tc.Parameter("relu"), "k": tc.Parameter(8)}
    given = [("activation", "45"), ("k", "[4, 8]")]
    assert with_axes([{}], given, declared) == [{"activation": ["45"], "k": [4, 8]}]
    assert with_axes([{}], [("activation", "['a', '1']")], declared) == [{"activation": ["a", "1"]}]
    with pytest.raises(ValueError, match="is not a list of texts: write -p activation"):
        with_axes([{}], [("activation", "[1, 2]")], declared)


def test_run_passes_parameters(repo, capsys):
    arguments = ["--only", "02", "-p", "layer", "1", "--model", str(REPO / "data" / "model"), "--name", "two"]
    assert run(arguments, repo) == 0
    printed = capsys.readouterr().out
    assert "layer = 1" in printed and "together" in printed and "available" in printed  # the memory plan


def test_interruption_keeps_what_is_finished(repo, monkeypatch, capsys):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tclib.cli.run.execute", interrupted)
    assert run([], repo) == 130
    assert "what is finished is kept" in capsys.readouterr().err


def test_headline_is_the_last_one(repo, write_notebook):
    path = write_notebook(repo / "notebooks/03.ipynb", ["x"])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert find_headline(notebook) is None
    text = ["holds: a = b\n", "headline: first = 1\n", "headline: p(big) = 0.87\n"]
    notebook["cells"][0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}]
    assert find_headline(notebook) == "p(big) = 0.87"


def test_declared_names(repo):
    notebook = json.loads((repo / "notebooks/02_good.ipynb").read_text(encoding="utf-8"))
    assert declared_names(notebook) == ["model", "layer"]


def test_literals():
    assert [literal(text) for text in ("2", "1e-3", "True", "[1, 2]", "relu", "a b")] == [
        2,
        1e-3,
        True,
        [1, 2],
        "relu",
        "a b",
    ]
