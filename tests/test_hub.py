"""Downloads from a small hub on this machine over HTTP: what works, and one sentence for each way to fail."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tclib as tc
from tclib.cli import run as command_line
from tclib.io import hub
from tests import foreign
from tests.conftest import REPO
from tests.hub_server import Hub
from tests.tiny import make_model

FETCH = """
import sys
from tclib.io import hub
try:
    folder, names = hub.fetch(hub.parse(sys.argv[1]), lambda names: [n for n in names if n.endswith(".pt")])
except ValueError as error:
    sys.exit(f"ValueError: {error}")
print(folder, *((folder / name).stat().st_size for name in names))
"""
LOAD = "import sys; from tests.test_hub import load; print(load(*sys.argv[1:]))"
BIG = os.urandom(300_000)
LARGE = os.urandom(1000) * 24_000  # more than two of the parts in which files are received


@pytest.fixture
def server():
    server = Hub({"somebody/transcoders": {"a.pt": BIG, "b.pt": BIG[:5000], "README.md": b"not wanted"}})
    yield server
    server.close()


def run(server, home, code, *arguments, limit=None, **environment):
    """Run code in a fresh process whose only hub is the server (or none, if it is None)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(home), **environment}
    env["HF_ENDPOINT"] = server.endpoint if server else "http://127.0.0.1:9"
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    capped = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, encoding="utf-8", preexec_fn=capped)


def fetch(server, home, what="somebody/transcoders", **options):
    return run(server, home, FETCH, what, **options)


def refused(result, sentence):
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("ValueError: ") and sentence in last, result.stderr


def bodies(server):
    return [
        (path.rsplit("/", 1)[-1], part) for method, path, part in server.log if method == "GET" and "resolve" in path
    ]


def test_a_download_is_kept_and_only_what_is_needed(server, tmp_path):
    result = fetch(server, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1:] == ["300000", "5000"]
    assert sorted(name for name, _ in bodies(server)) == ["a.pt", "b.pt"]
    assert "%" in result.stderr  # a progress bar
    before = len(bodies(server))
    assert fetch(server, tmp_path).stdout == result.stdout
    assert len(bodies(server)) == before
    for off in ({"HF_HUB_OFFLINE": "1"}, {}):  # told to stay off-line, and with no hub in sight
        assert fetch(None if not off else server, tmp_path, **off).stdout == result.stdout


def test_off_line_with_an_empty_cache(server, tmp_path):
    for result in (fetch(server, tmp_path, HF_HUB_OFFLINE="1"), fetch(None, tmp_path)):
        refused(result, "somebody/transcoders is not in the cache")
        assert "run once with a network, or use model='bundled'" in result.stderr
    assert not bodies(server)


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.repos["somebody/transcoders"]["a.pt"] = LARGE
    server.faults["a.pt"] = "cut"
    result = fetch(server, tmp_path)
    assert result.returncode == 0, result.stderr
    ranges = [part for name, part in bodies(server) if name == "a.pt"]
    assert ranges[0] is None and ranges[-1] is not None  # the second request goes on in the middle
    assert (Path(result.stdout.split()[0]) / "a.pt").read_bytes() == LARGE


def test_a_connection_that_never_holds(server, tmp_path):
    server.faults["a.pt"] = "truncate"
    refused(fetch(server, tmp_path), "run again")
    assert not list((tmp_path / "hub").glob("models--*/snapshots/*/a.pt"))
    refused(fetch(None, tmp_path), "not in the cache")  # half of it does not count
    server.faults.clear()
    result = fetch(server, tmp_path)
    assert result.stdout.split()[1:] == ["300000", "5000"]
    assert (Path(result.stdout.split()[0]) / "a.pt").read_bytes() == BIG


@pytest.mark.parametrize("name", ["a.pt", "b.pt"])
def test_a_wrong_checksum(server, tmp_path, name):
    server.faults[name] = "corrupt"
    refused(fetch(server, tmp_path), f"{name} arrived damaged")
    refused(fetch(None, tmp_path), "not in the cache")
    server.faults.clear()
    assert fetch(server, tmp_path).returncode == 0


def test_a_wrong_checksum_of_a_small_file(server, tmp_path):
    server.repos["somebody/transcoders"]["b.pt"] = b"small, so git's own checksum"
    server.faults["b.pt"] = "corrupt"
    refused(fetch(server, tmp_path), "b.pt arrived damaged")


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk(server, tmp_path):
    server.repos["somebody/transcoders"]["a.pt"] = LARGE
    refused(fetch(server, tmp_path, limit=15_000_000), "the disk is full")
    result = fetch(server, tmp_path)
    assert (Path(result.stdout.split()[0]) / "a.pt").read_bytes() == LARGE


def test_a_disk_that_is_too_small_is_seen_before(server, tmp_path):
    server.announced["a.pt"] = 10**16
    refused(fetch(server, tmp_path), "needs 10000000.0 GB")
    assert not bodies(server)


def test_a_pinned_revision(server, tmp_path):
    old = server.sha("somebody/transcoders")
    assert fetch(server, tmp_path, f"somebody/transcoders@{old}").returncode == 0
    assert old in fetch(server, tmp_path, f"somebody/transcoders@{old}", HF_HUB_OFFLINE="1").stdout
    server.repos["somebody/transcoders"]["a.pt"] = BIG[::-1]
    new = fetch(server, tmp_path)
    assert server.sha("somebody/transcoders") in new.stdout and old not in new.stdout
    assert (Path(new.stdout.split()[0]) / "a.pt").read_bytes() == BIG[::-1]
    assert old in fetch(server, tmp_path, f"somebody/transcoders@{old}", HF_HUB_OFFLINE="1").stdout


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("somebody/else", "there is no somebody/else on the hub"),
        ("somebody/transcoders@v9", "has no revision 'v9'"),
        ("gated/model", "is gated: accept its licence"),
    ],
)
def test_what_the_hub_does_not_give(server, tmp_path, what, sentence):
    server.repos["gated/model"] = {}
    server.gated.add("gated/model")
    refused(fetch(server, tmp_path, what), sentence)


@pytest.mark.parametrize("name", ["../../escaped.pt", "/etc/escaped.pt", "a/../../../escaped.pt", "..\\escaped.pt"])
def test_names_that_leave_the_folder(server, tmp_path, name):
    server.repos["somebody/transcoders"][name] = b"x"
    refused(fetch(server, tmp_path), "would leave its folder")
    assert not bodies(server)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b", ("a/b", "", "main")),
        ("a/b@v1", ("a/b", "", "v1")),
        ("a/b/layer_3/width_16k@c0ffee", ("a/b", "layer_3/width_16k", "c0ffee")),
        ("pchlenski/gpt2-transcoders", ("pchlenski/gpt2-transcoders", "", "main")),
    ],
)
def test_ids(text, parts):
    source = hub.parse(text)
    assert (source.repo, source.folder, source.revision) == parts


@pytest.mark.parametrize(
    "text", ["", "a", "/a/b", "./a/b", "../a/b", "a/b/../c", "a/b@../c", "a b/c", "https://x/y", "a\\b"]
)
def test_what_is_no_id(text):
    assert hub.parse(text) is None


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model and transcoders in the published files' format, behind a hub."""
    folder = tmp_path_factory.mktemp("published")
    make_model(folder / "model")
    for layer in range(2):
        foreign.original(folder / "transcoders", layer)
    repos = {
        name: {path.name: path.read_bytes() for path in (folder / part).iterdir()}
        for part, name in {"model": "somebody/model", "transcoders": "somebody/transcoders"}.items()
    }
    repos["somebody/model"] |= {"pytorch_model.bin": b"a pickle", "README.md": b"text", "onnx/model.onnx": b"x"}
    repos["somebody/pickled"] = {**repos["somebody/model"]}
    del repos["somebody/pickled"]["model.safetensors"]
    server = Hub(repos)
    yield server, folder
    server.close()


def load(model: str, transcoders: str) -> str:
    """What a model and its transcoders compute, in short."""
    lm = tc.load_model(model, device="cpu")
    layers = tc.load_transcoders(transcoders, device="cpu")
    trace = tc.trace(
        tc.ReplacementModel(lm, layers), torch.tensor([lm.tokenizer.bos_token_id, 1, 2, 3]), check_fit=False
    )
    active = sum(int((z > 0).sum()) for z in trace.features.values())
    return f"{lm.cfg.n_layers} layers, transcoders {list(layers)}, {trace.logits.sum():.4f}, {active} active"


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """huggingface_hub's settings, for this process, whatever those of its environment are."""

    def change(**values):
        for name, value in {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": False, **values}.items():
            monkeypatch.setattr(hub.constants, name, value)

    return change


def test_model_and_transcoders_from_the_hub_are_those_of_the_folder(published, tmp_path, settings):
    server, folder = published
    local = load(str(folder / "model"), str(folder / "transcoders"))
    there = run(server, tmp_path, LOAD, "somebody/model", "somebody/transcoders@main")
    assert there.stdout.strip() == local, there.stderr
    assert {name for name, _ in bodies(server)}.isdisjoint({"pytorch_model.bin", "README.md", "model.onnx"})
    settings(HF_HUB_OFFLINE=True)
    assert load("somebody/model", "somebody/transcoders") == local


def test_a_folder_of_a_repository(published, tmp_path, settings):
    server, _ = published
    for width in ("average_l0_40", "average_l0_70"):
        foreign.gemma_scope(tmp_path / width, 3, save=np.savez)
        (path,) = (tmp_path / width).rglob("params.npz")
        server.repos.setdefault("somebody/many", {})[f"layer_3/width_16k/{width}/params.npz"] = path.read_bytes()
    url = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings(ENDPOINT=server.endpoint, HUGGINGFACE_CO_URL_TEMPLATE=url)
    server.log.clear()
    with pytest.raises(ValueError, match="layer 3 is there twice"):
        tc.load_transcoders("somebody/many")
    assert not bodies(server)
    (t,) = tc.load_transcoders("somebody/many/layer_3/width_16k/average_l0_70", device="cpu").values()
    assert t.config.hook_in == "blocks.3.ln2.hook_normalized"
    with pytest.raises(ValueError, match="no transcoders in"):
        tc.load_transcoders("somebody/many/layer_4")


def test_a_repository_of_pickled_weights_is_refused_before_anything_is_downloaded(published, settings):
    server, _ = published
    server.log.clear()
    settings(ENDPOINT=server.endpoint)
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, which may run code and is never read"):
        tc.load_model("somebody/pickled")
    assert server.log and not bodies(server)


def test_gpt2_off_line_says_what_to_do(settings, capsys):
    settings(HF_HUB_OFFLINE=True)
    sentence = "gpt2.* is not in the cache .* run once with a network, or use model='bundled'"
    with pytest.raises(ValueError, match=sentence):
        tc.load_model("gpt2")
    with pytest.raises(ValueError, match=sentence):
        tc.load_transcoders("gpt2")
    assert command_line.run(["--model", "gpt2", "--only", "00"]) == 2  # refused before a notebook starts
    assert "run once with a network" in capsys.readouterr().err
