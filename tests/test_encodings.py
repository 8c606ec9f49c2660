"""Text is UTF-8 whatever the platform says: nothing is lost under an ASCII locale, and other encodings are refused."""

from __future__ import annotations

import ast
import codecs
import json
import os
import subprocess
import sys

import pytest

import tclib as tc
from tclib.blind import rating
from tclib.cli import sweep
from tclib.io.paths import read_text
from tclib.io.safe_files import read_json
from tclib.tasks import greater_than as gt
from tests.conftest import REPO

TEXT = "Café “naï”"
PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
UNDER_ASCII = f"""
import json, sys
from pathlib import Path
import networkx as nx, torch
import tclib as tc
from tclib import evaluation, targets, training
from tclib.circuits import graph
from tclib.circuits.graph_files import save_graph
from tclib.circuits.neuronpedia import save_graph_json
from tclib.features import Index, build_index
from tclib.training.run_folder import RunFolder
from tests.tiny import make_model, make_transcoder

assert "é".encode(errors="ignore") and open(__file__).encoding.lower() not in ("utf-8", "utf8")
text, folder = {TEXT!r}, Path(sys.argv[1])
(folder / "text.txt").write_bytes((text + " ").encode() * 200)
bundled = tc.load_model()
row = tc.load_text(bundled, str(folder / "text.txt"), 1)[0]
assert bundled.tokenizer.decode(row[1:]).startswith(text), ascii(bundled.tokenizer.decode(row[1:20]))

model = make_model(folder / "model")
transcoders = {{layer: make_transcoder(layer, model_name=text) for layer in (0, 1)}}
for format in ("tclib", "saelens", "circuit-tracer"):
    tc.save_transcoders(transcoders, folder / format, format)
    assert tc.load_transcoders(folder / format)[0].config.model_name == text
tokens = torch.randint(0, 40, (32, 16))
tokens[:, 0] = 40
config = tc.TrainConfig(d_features=16, steps=2, batch_rows=4)
tc.train(model, tokens, [0], config, run=folder / "run")
tc.train(model, tokens, [0], config, run=folder / "run")
training.cache_activations(model, tokens, [0], folder / "cache")
training.ActivationCache(folder / "cache")
build_index(tc.ReplacementModel(model, transcoders), tokens, folder / "index")
Index(folder / "index")
traced = tc.trace(tc.ReplacementModel(model, transcoders), "w1 w2", check_fit=False)
save_graph_json(traced, graph.build_graph(traced), folder, "slug", text)
save_graph_json(traced, graph.build_graph(traced), folder, "other", text)
circuit = nx.DiGraph(tokens=[text])
circuit.add_node(text, kind="target", token=text)
save_graph(circuit, folder / "circuit.json")
save_graph(circuit, folder / "circuit.graphml")
assert text in json.loads((folder / "circuit.json").read_bytes())["graph"]["tokens"]
assert nx.read_graphml(folder / "circuit.graphml").nodes[text]["token"] == text
"""


def test_nothing_is_lost_under_an_ascii_locale(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNDER_ASCII, encoding="utf-8")
    environment = os.environ | PLAIN | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, cwd=REPO)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert json.loads((tmp_path / "slug.json").read_bytes())["metadata"]["scan"] == TEXT


def test_the_commands_print_what_the_terminal_cannot_spell(tmp_path):
    code = "import sys; from tclib.cli import commands, run; run.run = lambda rest: print(rest[0]); "
    code += "sys.exit(commands.main(['run', 'Caf\\xe9']))"
    environment = os.environ | PLAIN | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=REPO)
    assert (done.returncode, done.stdout.decode().strip()) == (0, "Caf\\xe9"), done.stderr


READERS = {
    "text": (lambda model, path: tc.load_text(model, str(path), 1), "w1 w2 é " * 20),
    "templates": (lambda model, path: gt.read_templates(path), f"{gt.TEMPLATE}\n# é\n"),
    "json": (lambda model, path: read_json(path), '{"é": 1}'),
    "grid": (lambda model, path: sweep.read_grid(path), '{"é": [1]}'),
    "ratings": (
        lambda model, path: rating.read_ratings(path),
        f"item,rater,rating,context_free\né,é,{rating.NOT_RATED},{rating.NOT_RATED}\n",
    ),
    "any": (lambda model, path: read_text(path), "é"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused(model, tmp_path, kind):
    read, text = READERS[kind]
    path = tmp_path / "file.json"
    path.write_bytes(text.encode())
    plain = read(model, path)
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    marked = read(model, path)
    assert str(plain) == str(marked)
    for encoding in ("utf-16", "utf-16-le", "latin-1"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match="is not text in UTF-8") as refused:
            read(model, path)
        assert "\n" not in str(refused.value)


def without_encoding(source: str) -> list[str]:
    """Calls of open, read_text and write_text (methods of paths) that leave the encoding to the platform."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        modes = [word.value for word in node.keywords if word.arg == "mode"] + node.args[0 if method else 1 :][:1]
        binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        owner = ast.unparse(node.func.value) if method else ""
        if name == "open" and not binary and owner not in NOT_FILES:
            found.append(ast.unparse(node))
        if name in ("read_text", "write_text") and method and owner != "guards":
            found.append(ast.unparse(node))
        if any(word.arg in ("text", "universal_newlines") for word in node.keywords) and "subprocess" in owner:
            found.append(ast.unparse(node))
    return found


NOT_FILES = ("os", "Image", "archive", "kind", "layer", "stored", "self")  # whose `open` opens no file of text
FOLDERS = ("tclib", "making", "benchmarks", "tools", "tests")
SOURCES = [path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_every_file_of_text_is_opened_with_an_encoding(path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


def test_what_the_notebooks_open():
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and ("open(" in source or "_text(" in source):
                assert without_encoding(source) == [], path.name
