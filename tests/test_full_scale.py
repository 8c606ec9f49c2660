"""Notebooks on a model of GPT2-small's shape with the published transcoders' files, all random, as a user runs them.

What is claimed about the trained model cannot hold here and is printed as not holding; every identity must.
"""

import json
import shutil
import time

import pytest

from tclib.cli.run import run
from tests import full_scale
from tests.conftest import REPO

# Fewer prompts and training steps than the bundled model's: the rest of the notebook is what it is there.
SMALLER = {
    "00": [],
    "04_": ["-p", "rows", "64", "-p", "steps", "1"],
    "06": ["-p", "nouns", "['war']", "-p", "centuries", "[14, 17]"],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_scale")
    yield full_scale.build(folder)
    shutil.rmtree(folder)  # 2.3 GB


@pytest.mark.slow
@pytest.mark.parametrize("notebook", SMALLER)
def test_the_notebook_runs_unchanged(published, tmp_path, capsys, notebook):
    model, transcoders = published
    shutil.copytree(REPO / "notebooks", tmp_path / "notebooks")
    start = time.monotonic()
    arguments = ["--only", notebook, "--name", "full", "--model", str(model), "-p", "transcoders", str(transcoders)]
    assert run([*arguments, *SMALLER[notebook]], tmp_path) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "together" in printed and "available" in printed  # the memory plan comes first
    (path,) = (tmp_path / "runs" / "full").glob("*.ipynb")
    texts = [
        "".join(output.get("text", ""))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", ())
    ]
    assert "holds here: " in "\n".join(texts) or "does not hold here: " in "\n".join(texts)
    with capsys.disabled():
        print(f"\n{path.stem} at full scale: {time.monotonic() - start:.0f} s")
