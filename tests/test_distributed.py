"""Two processes train what one process trains, on the same global batches."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import tclib as tc
from tests.conftest import REPO
from tests.crash_worker import CONFIGS, config, text
from tests.tiny import make_model

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.slow
def test_two_ranks_reproduce_one(tmp_path):
    make_model(tmp_path / "model")
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "tests.rank_worker", str(tmp_path / "model"), str(out)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in CONFIGS:
        for layer in (0, 1):
            one, two = (load_file(tmp_path / str(n) / name / f"layer_{layer}.safetensors") for n in (1, 2))
            for key in one:
                torch.testing.assert_close(one[key], two[key], rtol=1e-8, atol=1e-9, msg=f"{name} {layer} {key}")
    one, two = (pd.read_json(tmp_path / str(n) / "history.json") for n in (1, 2))
    pd.testing.assert_frame_equal(one, two, rtol=1e-8)


def test_rows_that_cannot_be_divided_are_refused(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    monkeypatch.setattr("tclib.training.distributed.world", lambda: 3)
    with pytest.raises(ValueError, match="rows = 4 cannot be divided among 3 processes"):
        tc.train(model, text(), [0], config("relu"))
