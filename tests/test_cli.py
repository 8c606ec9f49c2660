"""The command line: set-up, refusals, runs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

import tclib as tc
from tclib.cli import bootstrap, commands, prepare, serve, site, teach, testing
from tclib.cli import run as run_module
from tclib.cli.kernels import peak
from tclib.cli.run import declared_defaults, literal, run, select, typed
from tclib.cli.sweep import with_axes
from tclib.nb import find_headline
from tclib.nb.teaching import report  # noqa: F401  before a test gives up the right to read its imports
from tests.conftest import notebook_dict
from tests.tiny import make_model

REPO = Path(bootstrap.REPO)
BARE = [f"tclib/{name}" for name in ("__init__.py", "__main__.py", "cli/__init__.py")]
BARE += ["tclib/cli/bootstrap.py"]
GOOD = [
    "import tclib as tc",
    "model: str = 'bundled'  # which model\nlayer: int = 2  # which layer",
    "tc.headline('layer', layer)",
]
TAUGHT = "04b_search_and_test_circuits.ipynb"
STRICT = [
    "import tclib as tc",
    "model: str = 'bundled'\nlayer: int = 2\nkind: str = 'red'\nresults: str = 'bundled'",
    "p = tc.parameters(globals(), model=tc.Parameter('bundled'), layer=tc.Parameter(2, low=0, high=2),\n"
    "    kind=tc.Parameter('red', choices=['red', 'blue']), results=tc.Parameter('bundled'))",
    "from pathlib import Path\ntc.headline('found', str(Path(p.results).exists()))",
]
BAD = [GOOD[0], "model: str = 'bundled'  # which model", "raise KeyError('planted')"]


@pytest.fixture
def repo(tmp_path, write_notebook):
    """A repository with three notebooks, the first of which fails, in a path with a space."""
    folder = tmp_path / "a clone"
    write_notebook(folder / "notebooks/01_bad.ipynb", BAD, {1: "parameters"})
    write_notebook(folder / "notebooks/02_good.ipynb", GOOD, {1: "parameters"})
    write_notebook(folder / "notebooks/05_strict.ipynb", STRICT, {1: "parameters"})
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
    assert setup.pip_calls == [["-c", "constraints.txt", "-e", ".[gguf,notebooks,teaching,test,ui]"]]
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


def test_what_only_authors_need_is_installed_when_it_is_missing(monkeypatch, tmp_path, capsys):
    setup = FakeSetup(monkeypatch, tmp_path / "clone")
    bootstrap.need(tmp_path, "test", "pytest")
    assert setup.pip_calls == []
    bootstrap.need(tmp_path, "docs", "not_a_module")
    assert setup.pip_calls == [["-c", "constraints.txt", "-e", ".[docs]"]]
    monkeypatch.setenv("TCLIB_VENV", "off")
    with pytest.raises(bootstrap.SetupError, match=r"not_a_module is not installed here: pip install .* '\.\[docs\]'"):
        bootstrap.need(tmp_path, "docs", "not_a_module")
    capsys.readouterr()
    for module, command in ((testing, testing.lint), (site, lambda: site.docs([]))):
        monkeypatch.setattr(module, "need", lambda *_: bootstrap.need(tmp_path, "docs", "not_a_module"))
        assert command() == 1
        said = capsys.readouterr()
        assert said.err.startswith("not_a_module is not installed here") and said.err.count("\n") == 1


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
        (["--only", "07"], "No notebook starts with '07'; there are: 01_bad, 02_good, 05_strict."),
        (["--only", "02,"], "No notebook starts with ''"),
        (["--name", "a/b"], "'a/b' is not a folder name"),
        (
            ["--only", "05", "-p", "layer", "7"],
            "05_strict.ipynb: layer = 7 is out of range: this notebook accepts 0 to 2.",
        ),
        (["--only", "05", "-p", "layer", "1.5"], "05_strict.ipynb: layer = 1.5 has the wrong type"),
        (["--only", "05", "-p", "kind", "blu"], "kind = 'blu' is not a choice; did you mean 'blue'?"),
    ],
)
def test_refused_before_running(repo, capsys, arguments, sentence):
    assert run(arguments, repo) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1
    assert not (repo / "runs").exists()


def test_run_keeps_the_failed_notebook_and_goes_on(repo, capsys):
    assert run(["--name", "one"], repo) == 1
    assert (repo / "runs/one/05_strict.ipynb").is_file()
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


def test_a_model_without_transcoders_is_told_what_to_train(repo, write_notebook, tmp_path, capsys):
    make_model(tmp_path / "model", blocks="llama")
    capsys.readouterr()  # its bars
    arguments = ["--model", str(tmp_path / "model"), "--only"]
    assert run([*arguments, "02"], repo) == 2
    said = capsys.readouterr()
    assert f"There are no transcoders for {tmp_path / 'model'} yet: train some, python -m tclib run" in said.err
    assert '-p layers "[0, 1]" -p save transcoders' in said.err and said.err.count("\n") == 1
    path = write_notebook(repo / "notebooks/06_trains.ipynb", GOOD, {1: "parameters"})
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["tclib"] = {"trains": True}
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert run([*arguments, "06"], repo) == 0
    assert re.search(r"06_trains \.\.\. \d+ s, 0\.\d GB, layer = 2", capsys.readouterr().out)


def test_a_peak_is_that_of_all_that_was_started():
    code = "import sys; x = b'1' * 300_000_000; print(flush=True); sys.stdin.read()"
    with peak() as gigabytes:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.5)
        child.communicate()
    assert 0.3 < gigabytes[0] < 0.4


def test_a_name_is_used_once(repo, capsys):
    assert run(["--only", "02", "--name", "mine"], repo) == 0
    kept = (repo / "runs/mine/02_good.ipynb").read_bytes()
    assert 'python -m tclib lab --name "mine"' in capsys.readouterr().out
    assert run(["--only", "02", "--name", "mine", "-p", "layer", "1"], repo) == 2
    message = capsys.readouterr().err
    assert "is there already: give this run another --name" in message and message.count("\n") == 1
    assert (repo / "runs/mine/02_good.ipynb").read_bytes() == kept


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        ("04", ["04_a"]),
        ("04b", ["04b_c"]),
        ("04,04b", ["04_a", "04b_c"]),
        ("04_", ["04_a"]),
        ("0", ["00_x", "04_a", "04b_c"]),
        ("04b_c.ipynb, 00", ["00_x", "04b_c"]),
    ],
)
def test_a_number_chooses_one_notebook(tmp_path, only, chosen):
    for name in ("00_x", "04_a", "04b_c"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in select(tmp_path, only)] == chosen


def test_names_of_files_are_those_of_where_the_command_runs(repo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert run(["--only", "05", "-p", "results", "mine"], repo) == 0
    assert "found = True" in capsys.readouterr().out


def test_a_full_disk_leaves_no_half_notebook(repo, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of a file, as it does there."""
    cells = [*GOOD, "print('x' * 200_000)"]
    (repo / "notebooks/02_good.ipynb").write_text(json.dumps(notebook_dict(cells, {1: "parameters"})), encoding="utf-8")
    code = (
        "import resource, signal, sys; from pathlib import Path; from tclib.cli import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"sys.exit(run.run(['--only', '02', '--name', 'full'], Path({str(repo)!r})))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, encoding="utf-8")
    assert said.returncode == 1
    (sentence,) = said.stderr.strip().splitlines()
    assert (
        "The disk takes no more (File too large): free some space and try again. What is finished is kept in"
        in sentence
    )
    assert "Traceback" not in said.stdout and "Open them" not in said.stdout
    assert not list((repo / "runs/full").glob("*.ipynb"))


@pytest.fixture
def unwritable(repo):
    """The repository, in which this user may not write; root, who may always, is another user meanwhile."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no permissions of this kind")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clone"
        shutil.copytree(repo, folder)
        shutil.copy(REPO / "notebooks" / TAUGHT, folder / "notebooks")
        os.chmod(name, 0o555)
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)
            os.chmod(name, 0o755)


@pytest.mark.parametrize(
    "command", [["run"], ["student"], ["student", "--graded"], ["report", "04b"], ["lab", "--name", "x"]]
)
def test_a_read_only_checkout_is_one_sentence(unwritable, monkeypatch, capsys, command):
    module = {"run": run_module, "lab": serve}.get(command[0], teach)
    monkeypatch.setattr(module, command[0], partial(getattr(module, command[0]), repo=unwritable))
    assert commands.main(command) == 1
    message = capsys.readouterr().err
    assert "cannot be written (Permission denied): copy the repository to a folder where you may write" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "x"), ConnectionResetError()])
def test_other_errors_keep_their_traceback(error):
    assert bootstrap.disk_sentence(error) is None


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM is of POSIX")
def test_sigterm_is_handed_on_and_ends_the_command(tmp_path):
    """From the outermost process to the innermost, none of which is left."""
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    waiting = "import subprocess, sys\nfrom tclib.cli.bootstrap import wait\n"
    waiting += "wait(subprocess.Popen([sys.executable, '-c', {!r}]))"
    outer = waiting.format(waiting.format(inner))
    with subprocess.Popen([sys.executable, "-c", outer], cwd=REPO, stdout=subprocess.PIPE, encoding="utf-8") as process:
        innermost = int(process.stdout.readline())
        process.terminate()
        assert process.wait(30) == 143
    until(lambda: not psutil.pid_exists(innermost))


@pytest.mark.skipif(os.name != "posix", reason="both signals are of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_and_its_kernels_and_keeps_what_is_finished(repo, tmp_path, number):
    waiting = "import os, time\nopen({!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)"
    pids = [tmp_path / "02", tmp_path / "05"]

    def running() -> list[int]:
        return [int(pid.read_text(encoding="utf-8") or 0) for pid in pids if pid.is_file()]

    for path, pid in zip(sorted((repo / "notebooks").glob("*.ipynb"))[1:], pids, strict=True):
        cells = [*GOOD, waiting.format(str(pid))]
        path.write_text(json.dumps(notebook_dict(cells, {1: "parameters"})), encoding="utf-8")
    # A shell starts its background jobs, this test perhaps among them, with SIGINT ignored.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from pathlib import Path; from tclib.cli import run\n"
    code += f"sys.exit(run.run(['--name', 'cut'], Path({str(repo)!r})))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        until(lambda: (repo / "runs/cut/01_bad.ipynb").is_file() and any(running()))
        until(lambda: process.stdout.readline().startswith("[1/3] 01_bad"))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, out + err
    assert f"Interrupted: what is finished is kept in {repo / 'runs/cut'}." in err
    assert [path.name for path in (repo / "runs/cut").glob("*.ipynb")] == ["01_bad.ipynb"]
    until(lambda: not any(psutil.pid_exists(pid) for pid in running()))


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_headline_is_the_last_one(repo, write_notebook):
    path = write_notebook(repo / "notebooks/03.ipynb", ["x"])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert find_headline(notebook) is None
    text = ["holds: a = b\n", "headline: first = 1\n", "headline: p(big) = 0.87\n"]
    notebook["cells"][0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}]
    assert find_headline(notebook) == "p(big) = 0.87"


def test_defaults_that_a_notebook_declares(repo):
    notebook = json.loads((repo / "notebooks/02_good.ipynb").read_text(encoding="utf-8"))
    assert list(declared_defaults(notebook)) == ["model", "layer"]


def test_literals():
    assert [literal(text) for text in ("2", "1e-3", "True", "[1, 2]", "relu", "a b")] == [
        2,
        1e-3,
        True,
        [1, 2],
        "relu",
        "a b",
    ]


def about(path: Path, **metadata) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["tclib"] = metadata
    path.write_text(json.dumps(notebook), encoding="utf-8")


def test_a_notebook_about_another_model_is_run_by_its_number_only(repo, monkeypatch, capsys):
    for name in ("01_bad", "05_strict"):
        about(repo / "notebooks" / f"{name}.ipynb", model="smollm2")
    monkeypatch.setattr(prepare, "has_smollm2", lambda: True)
    assert run(["--name", "all"], repo) == 0
    assert [path.name for path in sorted((repo / "runs/all").glob("*.ipynb"))] == ["02_good.ipynb"]
    assert run(["--name", "one", "--only", "05"], repo) == 0
    monkeypatch.setattr(prepare, "has_smollm2", lambda: False)
    assert run(["--only", "05"], repo) == 2
    assert capsys.readouterr().err == "SmolLM2 is not on this machine: `python -m tclib smollm2` fetches it once.\n"
