"""The making of the bundled model, end to end on a toy text."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import making.training
from making.export import bits_per_character, export, held_out_bits
from making.gpt2 import UnembeddingLoss
from making.tokenizer import YEARS_OF_CENTURY
from making.training import Settings, checkpoints, rate, train
from making.training_text import clean, prepare

SETTINGS = Settings(
    seed=1,
    tokens=6 * 4 * 16,
    d_model=32,
    layers=1,
    heads=2,
    real_fraction=0.4,
    batch=4,
    context=16,
    vocabulary=512,
)


def toy_work(seed: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(300)]
    return "\n\n".join(" ".join(rng.choices(words, k=40)) + "." for _ in range(60))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("making")
    for seed, name in enumerate(["first", "second", "kept"]):
        (folder / f"{name}.txt").write_text(toy_work(seed), encoding="utf-8")
    prepare(folder, folder / "work", 5_000, ["kept"], SETTINGS.vocabulary, SETTINGS.context)
    return folder / "work"


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    train(work, work / "run", SETTINGS)
    return work / "run"


def test_prepared_text(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == SETTINGS.vocabulary - 1
    assert tokenizer.tokenize(" 1732") == ["Ġ17", "32"]
    assert all(len(tokenizer.encode(year)) == 1 for year in YEARS_OF_CENTURY)

    ids = np.load(work / "real_heldout_kept.npy")
    assert ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(text) == json.loads((work / "text.json").read_text(encoding="utf-8"))["held_out"]["kept"]["characters"]
    assert text.startswith(toy_work(2)[:500])
    assert len(np.load(work / "chronicle_train.npy")) == 5_000


def test_markers_are_removed_and_percentages_kept() -> None:
    assert clean("%295. The Rule of 1756%.--To pay 5%. So") == "The Rule of 1756.--To pay 5%. So"


def test_an_interrupted_run_ends_with_the_same_weights(
    work: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch = making.training.draw_batch

    def draw_three(*arguments):
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return draw_batch(*arguments)

    monkeypatch.setattr(making.training, "draw_batch", draw_three)
    with pytest.raises(KeyboardInterrupt):
        train(work, tmp_path, SETTINGS, seconds_per_checkpoint=0)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint_00000002.pt",
        "checkpoint_00000003.pt",
    ]
    monkeypatch.undo()
    train(work, tmp_path, SETTINGS)

    whole, resumed = (torch.load(checkpoints(folder)[-1]) for folder in (run, tmp_path))
    assert whole["step"] == resumed["step"] == SETTINGS.steps
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def test_a_run_refuses_other_settings(work: Path, run: Path) -> None:
    with pytest.raises(SystemExit, match="other settings"):
        train(work, run, replace(SETTINGS, seed=2))


def test_export_loads_and_is_measured(work: Path, run: Path, tmp_path: Path) -> None:
    model = export(work, run, tmp_path)  # compares the logits itself
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["bos_token_id"] == config["eos_token_id"] == SETTINGS.vocabulary - 1
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    bits = held_out_bits(model, work, SETTINGS.context)
    assert bits["kept"] == bits["all"]
    assert 1 < bits["all"] < 9


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 100])
def test_bits_count_each_token_once(length: int) -> None:
    def uniform(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 64)

    ids = torch.arange(length) % 64
    bits = bits_per_character(uniform, ids, n_characters=1, context=16, batch=3)
    assert bits == pytest.approx(6 * (length - 1), rel=1e-5)


def test_loss_and_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = replace(SETTINGS, layers=2).model()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(SETTINGS.vocabulary, (4, 17))
    targets = ids[:, 1:].flatten()

    hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
    mean, each = UnembeddingLoss.apply(hidden, model.wte.weight, targets)
    ours = torch.autograd.grad(mean, list(model.parameters()))
    assert each.mean().item() == pytest.approx(mean.item())

    def softmax_attention(q, k, v, mask):
        return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("making.gpt2.CausalAttention.apply", softmax_attention)
        plain = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets)
        theirs = torch.autograd.grad(plain, list(model.parameters()))
    assert mean.item() == pytest.approx(plain.item(), rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_rate_warms_up_holds_and_ends_near_zero() -> None:
    rates = [rate(step, 10_000) for step in range(10_000)]
    assert rates[0] == pytest.approx(1 / 150) and rates[149] == rates[999] == 1.0
    assert rates[1_100] < 1.0 and 0 < rates[-1] < 0.001
