"""Training lowers the loss, is repeatable, folds its scaling away; evaluation measures what it says."""

import numpy as np
import pytest
import torch

import tclib as tc
from tclib import evaluation, training
from tclib.activations import mlp_activations
from tests.tiny import make_transcoder

CONFIG = tc.TrainConfig(d_features=64, steps=60, batch_rows=8, l1_coefficient=0.01, lr=3e-3)


@pytest.fixture(scope="module")
def trained(model, tokens):
    return tc.train(model, tokens, [0, 1], CONFIG)


def test_training_beats_the_untrained_transcoder(model, tokens, trained):
    transcoders, history = trained
    table = evaluation.reconstruction(tc.ReplacementModel(model, transcoders), tokens)
    untrained = evaluation.reconstruction(
        tc.ReplacementModel(model, {0: make_transcoder(0), 1: make_transcoder(1)}), tokens
    )
    assert (table["fvu"] < 0.7).all() and (untrained["fvu"] > 1).all()
    assert (history.groupby("layer")["loss"].last() < history.groupby("layer")["loss"].first()).all()


def test_training_is_repeatable_and_seeded(model, tokens, trained):
    again, _ = tc.train(model, tokens, [0, 1], CONFIG)
    other, _ = tc.train(model, tokens, [0, 1], CONFIG.model_copy(update={"seed": 1}))
    assert torch.equal(again[1].W_enc, trained[0][1].W_enc)
    assert not torch.equal(other[1].W_enc, trained[0][1].W_enc)


def test_folded_weights_have_unit_decoder_rows_and_match_the_logged_fvu(model, tokens, trained):
    transcoders, history = trained
    torch.testing.assert_close(transcoders[0].W_dec.norm(dim=1), torch.ones(64))
    last = history[history["layer"] == 0]["fvu"].iloc[-1]
    fvu = evaluation.reconstruction(tc.ReplacementModel(model, transcoders), tokens)["fvu"][0]
    assert fvu == pytest.approx(last, rel=0.25)  # the logged one is of one batch, before the last step, BOS included


def test_a_larger_penalty_is_sparser(model, tokens):
    sparse, _ = tc.train(model, tokens, [1], CONFIG.model_copy(update={"l1_coefficient": 0.2}))
    dense, _ = tc.train(model, tokens, [1], CONFIG.model_copy(update={"l1_coefficient": 0.0}))
    l0 = [evaluation.reconstruction(tc.ReplacementModel(model, t), tokens)["l0"][0] for t in (sparse, dense)]
    assert l0[0] < 0.7 * l0[1]


@pytest.mark.parametrize("kind", ["sae_in", "sae_out"])
def test_saes_are_trained_by_the_same_code(model, tokens, kind):
    saes, _ = tc.train(model, tokens, [1], CONFIG.model_copy(update={"kind": kind}))
    assert saes[1].config.hook_in == saes[1].config.hook_out
    assert evaluation.reconstruction(tc.ReplacementModel(model, saes), tokens)["fvu"][0] < 0.7


def test_reconstruction_against_numpy(model, tokens):
    transcoder = make_transcoder(0)
    acts = next(mlp_activations(model, tokens, [0], batch_size=64))[0]
    keep = (tokens != 40).numpy()
    x, y = acts.x.numpy()[keep].astype(float), acts.y.numpy()[keep].astype(float)
    z = np.maximum(x @ transcoder.W_enc.numpy() + transcoder.b_enc.numpy(), 0)
    error = y - z @ transcoder.W_dec.numpy() - transcoder.b_dec.numpy()
    row = evaluation.reconstruction(tc.ReplacementModel(model, {0: transcoder}), tokens, batch_size=7).iloc[0]
    assert row["fvu"] == pytest.approx((error**2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-4)
    assert row["l0"] == pytest.approx((z > 0).sum(1).mean(), rel=1e-4)
    assert row["tokens"] == keep.sum()


def test_a_transcoder_that_writes_nothing_recovers_nothing(model, tokens):
    nothing = make_transcoder(0)
    for parameter in nothing.parameters():
        parameter.zero_()
    table = evaluation.measure(tc.ReplacementModel(model, {0: nothing}), tokens[:8]).groups
    assert table["recovered"][0] == pytest.approx(0, abs=1e-5)
    assert list(table["layer"]) == [0, "all"]
    assert evaluation.faithfulness(model, tokens[:8], {"edited": []})["ce"].iloc[1] == pytest.approx(table["ce"][0])


def test_side_by_side_is_as_alone(model, tokens, trained):
    configs = {"other": CONFIG.model_copy(update={"kind": "sae_in"}), "same": CONFIG}
    together, history = training.train_side_by_side(model, tokens, [0, 1], configs)
    assert torch.equal(together["same"][1].W_enc, trained[0][1].W_enc)
    assert together["other"][0].config.training["kind"] == "sae_in"
    assert set(history["name"]) == set(configs)


def test_names_of_older_files_are_read(model, tokens, tmp_path):
    older = {"l1": 0.1, "l0": 0.2, "rows": 4, "ramp": 0.3, "pull": 0.5}
    config = tc.TrainConfig(**older)
    assert config == tc.TrainConfig(
        l1_coefficient=0.1, l0_coefficient=0.2, batch_rows=4, sparsity_warmup=0.3, dead_bias_lift=0.5
    )
    assert config == tc.TrainConfig().model_copy(update=older)
    short = CONFIG.model_copy(update={"steps": 2})
    tc.train(model, tokens, [0], short, run=tmp_path)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    (tmp_path / "run.json").write_text(
        text.replace("batch_rows", "rows").replace("l1_coefficient", "l1"), encoding="utf-8"
    )
    assert tc.train(model, tokens, [0], short, run=tmp_path)[1]["step"].tolist() == [0, 1]


def test_bad_input_gets_one_sentence(model, tokens):
    with pytest.raises(ValueError, match="agree in steps, batch_rows, buffer, passes and seed"):
        configs = {"a": CONFIG, "b": CONFIG.model_copy(update={"seed": 1})}
        training.train_side_by_side(model, tokens, [0], configs)
    with pytest.raises(ValueError, match="layers 0 to 1"):
        tc.train(model, tokens, [2], CONFIG)
    with pytest.raises(ValueError, match="there is no text"):
        evaluation.reconstruction(tc.ReplacementModel(model, {0: make_transcoder(0)}), tokens[:0])
    with pytest.raises(ValueError, match="diverged at step"):
        tc.train(model, tokens, [0], CONFIG.model_copy(update={"lr": 1e30}))
