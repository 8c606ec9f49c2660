"""Two processes train what one process trains, on the same global batches."""

import pandas as pd
import pytest
import torch

import tclib as tc
from tests.crash_worker import config, text
from tests.rank_worker import assert_one_and_two_agree, launch
from tests.tiny import make_model

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.slow
def test_two_ranks_reproduce_one(tmp_path):
    make_model(tmp_path / "model")
    for processes in (1, 2):
        launch(tmp_path, processes)
    assert_one_and_two_agree(tmp_path)
    one, two = (pd.read_json(tmp_path / str(n) / "history.json") for n in (1, 2))
    pd.testing.assert_frame_equal(one, two, rtol=1e-8)


def test_rows_that_cannot_be_divided_are_refused(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    monkeypatch.setattr("tclib.training.distributed.world", lambda: 3)
    with pytest.raises(ValueError, match="batch_rows = 4 cannot be divided among 3 processes"):
        tc.train(model, text(), [0], config("relu"))
