"""Each architecture as it learns: its equation, its gradients, its scaling, and that it learns at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import tclib as tc
from tclib import evaluation
from tclib.training import architectures
from tclib.training.trainer import Trainer
from tests.tiny import make_transcoder

SMALL = tc.TrainConfig(d_features=64, steps=60, batch_rows=8, lr=3e-3, l1_coefficient=0.01)
KINDS = {
    "relu": {},
    "topk": {"activation": "topk", "k": 8},
    "batchtopk": {"activation": "batchtopk", "k": 8},
    "jumprelu": {"activation": "jumprelu"},
    "free rows": {"unit_norm": False},
    "free jumprelu": {"activation": "jumprelu", "unit_norm": False},
}


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_learns_and_keeps_its_sparsity(model, tokens, kind, skip, tmp_path):
    config = SMALL.model_copy(update=KINDS[kind] | {"skip": skip})
    trained, history = tc.train(model, tokens, [1], config)
    assert history["fvu"].iloc[-1] < 0.7 < history["fvu"].iloc[0]
    trained[1].save(tmp_path / "layer_1", dtype=torch.float32)
    row = evaluation.reconstruction(tc.ReplacementModel(model, tc.load_transcoders(tmp_path)), tokens).iloc[0]
    assert row["fvu"] < 0.75
    # The last batches must look like the finished transcoder, thresholds included, or the scaling was folded wrongly.
    assert row["fvu"] == pytest.approx(history["fvu"].iloc[-1], rel=0.35)
    if config.k:
        assert row["l0"] == pytest.approx(config.k, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_folding_the_scaling_changes_nothing(kind, skip):
    x, y = torch.randn(200, 32, dtype=torch.float64) * 3 + 1, torch.randn(200, 32, dtype=torch.float64) * 40 - 5
    trainer = Trainer(0, x, y, SMALL.model_copy(update=KINDS[kind] | {"skip": skip}))
    for step in range(5):
        trainer.step(x, y, step)
    with torch.no_grad():
        scaled, _ = trainer.scaled(x, y)
        before = trainer.transcoder(scaled) * trainer.y_scale + trainer.y_mean
    torch.testing.assert_close(trainer.finished()(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_loss_is_its_equation(kind, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(40, 32, dtype=torch.float64), torch.randn(40, 32, dtype=torch.float64)
    config = SMALL.model_copy(update=KINDS[kind] | {"l1_coefficient": 0.1, "l0_coefficient": 0.1, "aux": 0.0})
    trainer = Trainer(0, x, y, config)
    with torch.no_grad():
        if not config.unit_norm:
            trainer.transcoder.W_dec *= 1 + torch.rand(64, 1)
    x, y = trainer.scaled(x, y)
    (loss, squared, active), z = trainer.gradients(x, y)
    t = trainer.transcoder
    dense = torch.relu(x @ t.W_enc + t.b_enc)
    kept = {
        "relu": dense > 0,
        "topk": dense >= dense.topk(8).values[:, -1:],
        "batchtopk": dense >= dense.flatten().topk(8 * 40).values[-1],
        "jumprelu": dense > config.bandwidth,
    }.get(kind.removeprefix("free "), dense > 0) & (dense > 0)
    torch.testing.assert_close(z, dense * kept)
    error = (y - z @ t.W_dec - t.b_dec).pow(2).sum()
    paid = {"relu": z.sum(), "jumprelu": kept.sum(), "free rows": (z * t.W_dec.norm(dim=1)).sum()}
    price = 0.1 * paid.get(kind.replace("free jumprelu", "jumprelu"), 0.0)
    torch.testing.assert_close(loss, (error + price).detach())
    assert active == kept.sum() and torch.isclose(squared, error.detach())


def test_the_straight_through_gradient_is_the_published_one():
    """Rajamanoharan et al. 2024: -threshold/width and -1/width inside the window, nothing outside."""
    t = make_transcoder(0, d_features=3, activation="jumprelu").double().requires_grad_()
    with torch.no_grad():
        t.threshold.fill_(0.5)
    pre = torch.tensor([[0.45, 0.54, 0.9], [0.3, 0.56, 0.46]], dtype=torch.float64, requires_grad=True)
    config = SMALL.model_copy(update={"activation": "jumprelu", "bandwidth": 0.1, "l0_coefficient": 2.0})
    architectures.activate(t, pre, config).sum().backward()
    torch.testing.assert_close(pre.grad, (pre > 0.5).double())
    torch.testing.assert_close(t.threshold.grad, torch.tensor([-5.0, -5.0, -5.0], dtype=torch.float64))
    t.threshold.grad = None
    architectures.penalty(pre, pre, t, config).backward()
    torch.testing.assert_close(t.threshold.grad, torch.tensor([-20.0, -20.0, -20.0], dtype=torch.float64))


def test_aux_is_the_error_explained_by_dead_features_alone():
    t = make_transcoder(0, activation="topk", k=4).requires_grad_()
    pre, error = torch.rand(6, 64, requires_grad=True), torch.randn(6, 32)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[3, 50]] = True
    loss = architectures.auxiliary(t, pre, error, dead)
    expected = (error - pre[:, dead] @ t.W_dec[dead]).pow(2).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (pre.grad[:, ~dead] == 0).all() and (pre.grad[:, dead] != 0).all()


def test_finished_rows_have_unit_length_and_free_rows_had_not():
    x, y = torch.randn(200, 32), torch.randn(200, 32)
    trainer = Trainer(0, x, y, SMALL.model_copy(update={"unit_norm": False}))
    for step in range(20):
        trainer.step(x, y, step)
    assert (trainer.transcoder.W_dec.norm(dim=1) - 1).abs().max() > 0.01
    torch.testing.assert_close(trainer.finished().W_dec.norm(dim=1), torch.ones(64))


def test_pull_lifts_dead_features_until_they_fire():
    x, y = torch.randn(100, 32), torch.randn(100, 32)
    trainer = Trainer(
        0, x, y, SMALL.model_copy(update={"dead_after": 100, "lr": 0.01, "dead_bias_lift": 20.0, "warmup": 0.0})
    )
    with torch.no_grad():
        trainer.transcoder.b_enc[:5] = -1
    start = trainer.transcoder.b_enc[5:].clone()
    dead = [round(64 * trainer.step(x, y, step)["dead"]) for step in range(12)]
    assert dead[0] == 5 and dead[-1] == 0
    assert (trainer.transcoder.b_enc[5:] - start).abs().max() < 0.15  # those alive only learned


def test_dead_features_are_counted_in_tokens():
    x, y = torch.randn(100, 32), torch.randn(100, 32)
    trainer = Trainer(0, x, y, SMALL.model_copy(update={"dead_after": 250, "lr": 1e-9}))
    with torch.no_grad():
        trainer.transcoder.b_enc[:5] = -1e3
    assert [trainer.step(x, y, step)["dead"] for step in range(3)] == [0, 0, 5 / 64]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation": "topk"}, "needs k"),
        ({"activation": "batchtopk", "k": 65}, "k = 65 is more than the 64 features"),
        ({"activation": "topk", "k": 4, "unit_norm": False}, "unit length"),
        ({"l1_coefficient": -0.1}, "l1"),
        ({"l0": -0.1}, "l0"),
        ({"skip": True, "kind": "sae_in"}, "copy its input"),
        ({"lerning_rate": 1.0}, "lerning_rate"),
    ],
)
def test_impossible_settings_are_refused(change, sentence):
    with pytest.raises(ValidationError, match=sentence):
        tc.TrainConfig(**(SMALL.model_dump() | change))
