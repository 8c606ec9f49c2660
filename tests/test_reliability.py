"""A run survives kill -9, ctrl-C, full disks and damaged files, and refuses to go on as another run."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import tclib as tc
from tests.conftest import REPO
from tests.crash_worker import config, text
from tests.tiny import make_model

posix = pytest.mark.skipif(sys.platform != "linux", reason="limits and forks of Linux")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=2)


def worker(case, folder, *names):
    command = [sys.executable, "-m", "tests.crash_worker", case, str(folder), *names]
    done = subprocess.run(command, cwd=REPO, capture_output=True, encoding="utf-8", timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@posix
@pytest.mark.parametrize(
    "names",
    [("relu",), pytest.param(("topk", "batchtopk", "jumprelu"), marks=pytest.mark.slow)],
    ids=["relu", "others"],
)
def test_killed_at_random_moments_and_resumed_it_is_bit_identical(tmp_path, names):
    said = worker("kill", tmp_path, *names)
    assert said.count("identical") == len(names) and "DIFFERENT" not in said


@posix
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path):
    said = worker("interrupt", tmp_path)
    assert said.count("KeyboardInterrupt: stopped after step") == 2
    assert "goes on from step_" in said and "identical" in said


@posix
def test_a_full_disk_is_found_before_training(tmp_path):
    assert "ValueError: checkpoints cannot be written" in worker("full_before", tmp_path)
    assert not list((tmp_path / "run").glob("*.part"))


@posix
def test_a_disk_that_fills_during_training_costs_checkpoints_only(tmp_path):
    said = worker("full_during", tmp_path)
    assert "the last good one is step_000000" in said and "identical" in said


@posix
def test_too_little_memory_names_the_rows_that_fit(tmp_path):
    said = worker("memory", tmp_path)
    assert "ValueError: batch_rows = 64 does not fit into memory, but batch_rows = " in said


def test_a_folder_that_cannot_be_made_is_named_before_training(model, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="the run cannot be kept in"):
        tc.train(model, text(), [0], config("relu"), run=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"lr": 1e-4}, "lr = 0.003, not 0.0001"), ({"steps": 7}, "steps = 120, not 7")],
)
def test_another_configuration_is_refused_by_name(model, tmp_path, change, sentence):
    short = config("relu")
    tc.train(model, text(), [0], short, run=tmp_path, checkpoint_seconds=1e9)
    with pytest.raises(ValueError, match=sentence):
        tc.train(model, text(), [0], short.model_copy(update=change), run=tmp_path)
    with pytest.raises(ValueError, match=r"begun with layers \[0\], not \[1\]"):
        tc.train(model, text(), [1], short, run=tmp_path)
    with pytest.raises(ValueError, match="begun with text"):
        tc.train(model, text().flip(0), [0], short, run=tmp_path)


def test_another_model_is_refused(model, tmp_path):
    tc.train(model, text(), [0], config("relu"), run=tmp_path / "run")
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="another model"):
        tc.train(other, text(), [0], config("relu"), run=tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over(model, tmp_path):
    whole, _ = tc.train(model, text(), [0], config("relu"), run=tmp_path, checkpoint_seconds=0)
    newest = sorted(tmp_path.glob("step_*"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="is damaged and is passed over"):
        again, _ = tc.train(model, text(), [0], config("relu"), run=tmp_path, checkpoint_seconds=0)
    assert torch.equal(whole[0].W_dec, again[0].W_dec)


def test_divergence_names_step_cause_and_last_good_checkpoint(model, tmp_path):
    wild = config("jumprelu").model_copy(update={"lr": 1e30})
    with pytest.raises(ValueError, match=r"diverged at step \d+ in layer 0: lower lr .* checkpoint is step_0000000\d"):
        tc.train(model, text(), [0], wild, run=tmp_path, checkpoint_seconds=0)
    for path in tmp_path.glob("step_*"):
        assert all(t.isfinite().all() for t in load_file(path).values())


def test_activations_that_are_not_finite_are_named(model):
    broken = [model.blocks[1].mlp.out.original_component] if hasattr(model.blocks[1].mlp, "out") else []
    weight = next(p for m in broken or [model.blocks[1].mlp] for p in m.parameters())
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="activations of layer 1 are not finite in the first rows"):
            tc.train(model, text(), [1], config("relu"))
    finally:
        with torch.no_grad():
            weight.copy_(saved)
