"""The stream of training tokens: shuffled as stated, paired, repeatable, the same from disk."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tclib as tc
from tclib import training
from tclib.training.stream import ModelSource, Stream, mixing
from tests.tiny import make_model


class Numbered:
    """Rows whose activations say which token they belong to; targets are the negatives of the inputs."""

    def __init__(self, n_rows, row_length):
        self.n_rows, self.row_length = n_rows, row_length

    def read(self, rows):
        token = torch.from_numpy(rows)[:, None] * self.row_length + torch.arange(self.row_length)
        return {0: (token.reshape(-1, 1), -token.reshape(-1, 1))}


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4), buffer=st.integers(1, 5), passes=st.integers(1, 3), spare=st.integers(0, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_token_of_a_pass_comes_once_and_paired(rows, buffer, passes, spare, seed):
    source = Numbered(2 * rows * buffer + min(spare, rows * buffer - 1), 8)
    stream = Stream(source, tc.TrainConfig(batch_rows=rows, buffer=buffer, passes=passes, seed=seed))
    seen = torch.zeros(source.n_rows * 8, dtype=torch.int64)
    for step in range(2 * buffer * passes):
        x, y = stream.batch(step)[0]
        assert torch.equal(x, -y) and len(x) == rows * 8
        seen += torch.bincount(x.flatten(), minlength=len(seen))
    assert set(seen.tolist()) <= {0, passes} and (seen > 0).sum() == 2 * rows * buffer * 8


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 200), before=st.lists(st.integers(0, 200), max_size=5))
def test_a_batch_depends_on_its_step_alone(step, before):
    config = tc.TrainConfig(batch_rows=2, buffer=4, passes=2, seed=3)
    used = Stream(Numbered(32, 8), config)
    for other in before:
        used.batch(other)
    assert torch.equal(used.batch(step)[0][0], Stream(Numbered(32, 8), config).batch(step)[0][0])


@pytest.mark.parametrize("buffer", [1, 4, 16])
def test_mixing_is_what_it_says(buffer):
    config = tc.TrainConfig(batch_rows=4, buffer=buffer)
    stream, same, pairs = Stream(Numbered(64, 32), config), 0, 0
    for step in range(64):
        row = stream.batch(step)[0][0].flatten() // 32
        same += int((row[:, None] == row).sum()) - len(row)
        pairs += len(row) * (len(row) - 1)
    assert same / pairs == pytest.approx(mixing(config, 32), rel=0.1)


def test_text_that_does_not_fill_one_buffer_is_refused(model, tokens):
    with pytest.raises(ValueError, match=r"64 rows of 16 tokens, fewer than one buffer \(16 rows x 8\)"):
        tc.train(model, tokens, [0], tc.TrainConfig(batch_rows=16, buffer=8))


def test_all_layers_come_from_one_forward_pass(model, tokens, monkeypatch):
    calls = []
    original = type(model).run_with_cache
    monkeypatch.setattr(type(model), "run_with_cache", lambda *a, **k: calls.append(1) or original(*a, **k))
    acts = ModelSource(model, tokens, [0, 1]).read(np.arange(16))
    assert len(calls) == 1 and acts.keys() == {0, 1} and acts[1][0].shape == (256, 32)


def test_from_disk_is_as_from_the_model(model, tokens, tmp_path):
    config = tc.TrainConfig(d_features=64, steps=30, batch_rows=4, buffer=4, passes=2)
    cache = training.cache_activations(model, tokens, [0, 1], tmp_path)
    live, _ = tc.train(model, tokens, [0, 1], config)
    cached, _ = tc.train(model, cache, [0, 1], config)
    for layer in (0, 1):
        torch.testing.assert_close(live[layer].W_enc, cached[layer].W_enc, rtol=1e-3, atol=1e-5)
    again = training.cache_activations(model, tokens, [0, 1], tmp_path)
    assert isinstance(again.arrays[0][0], np.memmap)
    with pytest.raises(ValueError, match="another text"):
        training.cache_activations(model, tokens.flip(0), [0, 1], tmp_path)
    with pytest.raises(ValueError, match=r"holds layers \[0, 1\], not all of \[2\]"):
        Stream(cache, config), tc.train(make_deeper(tmp_path / "deeper"), cache, [2], config)


def make_deeper(folder):
    return make_model(folder, layers=3)


def test_half_a_cache_is_refused(model, tokens, tmp_path):
    training.cache_activations(model, tokens, [0], tmp_path)
    (tmp_path / "cache.json").unlink()  # written last
    with pytest.raises(ValueError, match="no complete activation cache"):
        training.ActivationCache(tmp_path)


def test_text_that_does_not_fit_the_model_is_refused(model, tokens):
    config = tc.TrainConfig(batch_rows=4)
    with pytest.raises(ValueError, match="rows .row, pos. of 1 to 16 tokens"):
        tc.train(model, tokens.repeat(1, 2), [0], config)
    with pytest.raises(ValueError, match="has token 99, but the ids of this model go from 0 to 40"):
        tc.train(model, tokens.clamp(min=99), [0], config)


def test_each_layer_may_have_its_own_sparsity_coefficient(model, tokens):
    base = tc.TrainConfig(d_features=64, steps=60, batch_rows=8, lr=3e-3, l1_coefficient=0.2)
    trained, history = tc.train(model, tokens, [0, 1], {0: base, 1: base.model_copy(update={"l1_coefficient": 0.0})})
    assert trained[0].config.training["l1_coefficient"] == 0.2 and trained[1].config.training["l1_coefficient"] == 0.0
    last = history.groupby("layer")["l0"].last()
    assert last[0] < 0.7 * last[1]


def test_watching_sees_every_record(model, tokens, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append(figure) or Handle(shown))
    figure = training.LiveFigure(every=10)
    _, history = tc.train(model, tokens, [0, 1], tc.TrainConfig(d_features=64, steps=40, batch_rows=4), watch=figure)
    assert len(figure.records) == len(history) == 80 and len(shown) == 4
    titles = [axis.get_title() for axis in shown[-1].axes]
    assert titles == ["loss", "FVU", "active per token", "dead fraction", "tokens per second"]
    assert len(shown[-1].axes[0].lines) == 2


class Handle:
    def __init__(self, shown):
        self.shown = shown

    def update(self, figure):
        self.shown.append(figure)


def test_tensorboard_is_written_or_asked_for(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match="TensorBoard is not installed"):
            training.TensorBoard(tmp_path)
        return
    training.TensorBoard(tmp_path)(
        [{"name": "", "layer": 0, "step": 1, "loss": 1, "fvu": 1, "l0": 1, "dead": 0, "speed": 1}]
    )
    assert list(tmp_path.glob("events.*"))


def test_the_papers_settings_are_a_preset():
    paper = training.PAPER
    assert (paper.d_features, paper.lr, paper.activation) == (24_576, 4e-4, "relu")
    tokens = paper.steps * paper.batch_rows * 128
    assert tokens == pytest.approx(60e6, rel=0.01) and paper.warmup * paper.steps == pytest.approx(5_000)
