"""The sparse step gives the plain step's gradients and trajectories; screening misses nothing."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tclib as tc
from tclib.training.fast import screening, sparse_step
from tclib.training.fast.pairs import Pairs
from tclib.training.fast.sparse_step import SparseTrainer, make_trainer
from tclib.training.trainer import Trainer
from tests.rank_worker import assert_one_and_two_agree, launch
from tests.tiny import SPARSE_KINDS, make_model

WIDTH, FEATURES, TOKENS = 24, 320, 300
WAYS = {"exact": 0.0, "bfloat16": 1.0}  # screen_below


def config(kind, **changes):
    base = {"d_features": FEATURES, "steps": 500, "start_l0": 12.0, "sparse_below": 1.0, "tied": True}
    return tc.TrainConfig(**(base | SPARSE_KINDS[kind] | changes))


@cache
def data(dtype=torch.float64, seed=0, tokens=TOKENS):
    """Inputs of uneven directions, and targets that a sparse dictionary explains."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=draw) * torch.logspace(0.5, -0.5, WIDTH) + 0.3
    fixed = torch.Generator().manual_seed(99)
    reads, writes = torch.randn(WIDTH, 60, generator=fixed), torch.randn(60, WIDTH, generator=fixed)
    return x.to(dtype), (torch.relu(x @ reads - 8) @ writes).to(dtype)


def plain_and_sparse(kind, dtype=torch.float64, **changes):
    """The plain and the sparse trainer with equal, slightly random weights."""
    c = config(kind, **changes)
    pair = [cls(0, *data(dtype), c) for cls in (Trainer, SparseTrainer)]
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in pair[0].transcoder.named_parameters():
            if name != "threshold":
                p += (0.3 * p.std() if p.any() else 0.01) * torch.randn(p.shape, generator=draw).to(p)
        if pair[0].transcoder.threshold is not None:
            pair[0].transcoder.threshold += 0.02 * torch.rand(FEATURES, generator=draw).to(dtype)
        for p, q in zip(*(s.transcoder.parameters() for s in pair), strict=True):
            q.copy_(p)
    return pair


@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_gradients_are_those_of_the_dense_step(kind, skip, way, dtype, bound, monkeypatch):
    monkeypatch.setattr(sparse_step, "bfloat16_hardware", lambda: True)
    plain, fast = plain_and_sparse(kind, dtype, skip=skip, screen_below=WAYS[way])
    x, y = plain.scaled(*data(dtype, seed=1))
    for dead in (False, True):
        for s in (plain, fast):
            s.silent[::5] = 10**9 if dead else 0
        (sums, z), (sums2, pairs) = plain.gradients(x, y, 0.7), fast.gradients(x, y, 0.7)
        assert isinstance(pairs, Pairs)
        dense = torch.zeros_like(z).index_put((pairs.token, pairs.feature), pairs.z)
        torch.testing.assert_close(dense, z, rtol=bound, atol=bound)
        torch.testing.assert_close(torch.stack(sums2), torch.stack(sums), rtol=bound, atol=0)
        assert 0.002 < float((z > 0).double().mean()) < 0.2
        for (name, p), q in zip(plain.transcoder.named_parameters(), fast.transcoder.parameters(), strict=True):
            if p.requires_grad:
                distance = (p.grad - q.grad).norm() / p.grad.norm()
                assert distance < bound, f"{name}: {distance}"


def trajectory(cls, kind, dtype, tokens=TOKENS, order=1, **changes):
    """A trainer and its rows after 500 steps; with ``order=-1`` the tokens of each batch come in reverse."""
    c = config(kind, **changes)
    # Other data: start_l0 puts one pre-activation per feature at 0, where rounding would decide who is active.
    trainer = cls(0, *data(dtype, seed=1000), c)
    rows = []
    for step in range(c.steps):
        x, y = data(dtype, seed=step % 20, tokens=tokens)
        rows.append(trainer.step(x, y, step) if order > 0 else trainer.step(x.flip(0), y.flip(0), step))
        assert cls is Trainer or trainer.density < c.screen_below
    return trainer, rows


def apart(rows, others):
    """Largest relative difference of the losses; those of the final L0 and FVU."""
    loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, others, strict=True))
    return loss, *(abs(rows[-1][name] / others[-1][name] - 1) for name in ("l0", "fvu"))


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_500_steps_in_float64_end_with_the_same_weights(kind):
    changes = {"skip": True, "screen_below": 1.0, "dead_after": 2000}
    (plain, rows), (fast, others) = (trajectory(c, kind, torch.float64, **changes) for c in (Trainer, SparseTrainer))
    assert rows[-1]["fvu"] < 0.7 * rows[0]["fvu"]
    for (name, p), q in zip(plain.transcoder.named_parameters(), fast.transcoder.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-8, name
    assert max(apart(rows, others)) < 1e-8


def steps_before_a_tie() -> int:
    """Steps of TopK until the k-th and the next activation of a token differ by float32's rounding alone.

    From there on, which of the two is kept depends on the processor's order of adding, and both are right.
    """
    c = config("topk", screen_below=1.0)
    trainer = Trainer(0, *data(torch.float32, seed=1000), c)
    for step in range(c.steps):
        x, y = data(torch.float32, seed=step % 20)
        pre = trainer.scaled(x, y)[0] @ trainer.transcoder.W_enc + trainer.transcoder.b_enc
        last, next_one = pre.topk(c.k + 1).values[:, -2:].T
        if (last - next_one < 5e-7 * last).any():
            return step
        trainer.step(x, y, step)
    return c.steps


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_500_steps_in_float32_end_equally_well(kind):
    rows, others = (trajectory(c, kind, torch.float32, screen_below=1.0)[1] for c in (Trainer, SparseTrainer))
    _, l0, fvu = apart(rows, others)
    steps = steps_before_a_tie() if kind == "topk" else len(rows)
    assert steps > 100 and apart(rows[:steps], others[:steps])[0] < 1e-4
    assert l0 < 5e-3 and fvu < 5e-3


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_500_steps_in_float32_drift_no_more_than_from_another_order_of_tokens(kind):
    """One pair on the other side of its threshold moves the loss by more than 1e-4, whoever adds in another order."""
    runs = ((Trainer, 1), (SparseTrainer, 1), (Trainer, -1))
    changes = {"tokens": 600, "lr": 5e-4, "screen_below": 1.0}
    plain, fast, turned = (trajectory(c, kind, torch.float32, order=order, **changes)[1] for c, order in runs)
    loss, l0, fvu = apart(plain, fast)
    assert l0 < 5e-3 and fvu < 5e-3
    assert loss < max(1e-4, 3 * apart(plain, turned)[0]) and apart(plain[:50], fast[:50])[0] < 1e-4


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_from_dense_to_screened_through_all_switches(kind):
    """Biases that start at 0: the first steps are dense, later ones exact, then screened; weights stay equal."""
    switches = {"start_l0": None, "sparse_below": 0.2, "screen_below": 0.08}
    costs = {"l1_coefficient": 0.3, "lr": 4e-3} if kind == "relu" else {"l0": 0.05, "lr": 4e-3, "bandwidth": 0.05}
    c = config(kind, steps=300, **switches, **costs)
    plain, fast = (cls(0, *data(), c) for cls in (Trainer, SparseTrainer))
    density = []
    for step in range(c.steps):
        density.append(float(fast.density))
        for s in (plain, fast):
            s.step(*data(seed=step % 20), step)
    ways = [(v < c.sparse_below) + (v < c.screen_below) for v in density]
    assert {0, 1, 2} == set(ways), sorted(density)
    for (name, p), q in zip(plain.transcoder.named_parameters(), fast.transcoder.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-8, name


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_restored_it_goes_on_with_the_same_bits(kind):
    c = config(kind)
    first, second = (SparseTrainer(0, *data(torch.float32, seed=s), c) for s in (0, 7))
    for step in range(10):
        first.step(*data(torch.float32, seed=step), step)
    second.restore({name: t.contiguous().clone() for name, t in first.state().items()})
    for step in range(10, 20):
        assert first.step(*data(torch.float32, seed=step), step) == second.step(*data(torch.float32, seed=step), step)
    for p, q in zip(first.finished().parameters(), second.finished().parameters(), strict=True):
        assert torch.equal(p, q) and p.is_contiguous()


def test_either_step_goes_on_where_the_other_stopped():
    c = config("relu")
    plain, fast, other, further = (cls(0, *data(seed=1000), c) for cls in (Trainer, SparseTrainer) * 2)
    for step in range(20):
        plain.step(*data(seed=step), step)
        fast.step(*data(seed=step), step)
    other.restore(fast.state())
    further.restore(plain.state())
    rows = [[s.step(*data(seed=step), step)["loss"] for step in range(20, 30)] for s in (plain, other, further)]
    assert rows[1] == pytest.approx(rows[0], rel=1e-9) and rows[2] == pytest.approx(rows[0], rel=1e-9)


def test_a_batch_without_any_active_feature():
    for kind in SPARSE_KINDS:
        _, s = plain_and_sparse(kind, screen_below=1.0)
        with torch.no_grad():
            s.transcoder.b_enc -= 100
        (loss, squared, count), pairs = s.gradients(*s.scaled(*data()))
        assert count == 0 and len(pairs) == 0 and loss == squared
        assert not s.transcoder.W_dec.grad.any() and not s.transcoder.W_enc.grad.any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(1, 300), k=st.none() | st.integers(1, 9), scale=st.floats(-4, 4),
    bias=st.floats(-4, 4), uneven=st.floats(0, 3),
)  # fmt: skip
def test_screening_misses_no_pair(seed, tokens, k, scale, bias, uneven):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 40, generator=draw) * 10 ** (uneven * torch.randn(tokens, 1, generator=draw))
    weights = torch.randn(70, 40, generator=draw) * 10 ** (scale + uneven * torch.randn(70, 1, generator=draw))
    b = torch.randn(70, generator=draw) * 10 ** (scale + bias)
    floor = torch.zeros(70) if k else torch.randn(70, generator=draw).abs() * 10 ** (scale + bias)
    key = screening.Screen(70, 40)(x, weights, b, floor, k).sort().values
    pre = (x.double() @ weights.double().T + b.double()).T
    wanted = pre > floor[:, None]
    if k:
        wanted &= pre >= pre.topk(k, dim=0).values[-1]
    missed = set(wanted.flatten().nonzero().squeeze(1).tolist()) - set(key.tolist())
    assert not missed
    same, values = screening.exact(x, weights, b, floor, k)
    assert not set(same.tolist()) - set(key.tolist())
    torch.testing.assert_close(values.double(), pre.flatten()[same], rtol=1e-3, atol=1e-4 * float(pre.abs().max()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(-6, 6), bias=st.floats(-6, 6))
def test_screened_products_are_within_the_bound(seed, scale, bias):
    draw = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(20, 100, generator=draw), torch.randn(30, 100, generator=draw) * 10**scale
    b = torch.randn(30, generator=draw) * 10 ** (scale + bias)
    screen = screening.Screen(30, 100)
    margin, slack = screen.load(weights, b)
    inputs, length = screening._inputs(x, screen.width)
    upper = inputs.double() @ screen.raised.double().T
    pre = x.double() @ weights.double().T + b.double()
    assert (upper > pre).all()
    assert (upper < pre + length.double() @ margin.double().T + slack).all()
    apriori = ((1 + 2.0**-8) ** 2 - 1) * torch.outer(x.norm(dim=1), weights.norm(dim=1))
    assert (length @ margin.T / 2 < 1.03 * apriori).all()


def test_the_bound_is_needed_and_nearly_sharp(monkeypatch):
    """Factors just below the middle of two bfloat16 numbers: products lose nearly all that the bound allows."""
    x = weights = torch.full((1, 512), 1 + 2.0**-8 - 2.0**-20)
    true = float((x.double() ** 2).sum())
    b, floor = torch.tensor([-true * (1 - 1e-5)]), torch.zeros(1)
    assert len(screening.Screen(1, 512)(x, weights, b, floor)) == 1
    monkeypatch.setattr(screening, "_up", lambda value: (0.98 * value).bfloat16())
    assert len(screening.Screen(1, 512)(x, weights, b, floor)) == 0


def test_screening_names_few_pairs_in_vain():
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(256, 768, generator=draw), torch.randn(4096, 768, generator=draw) / 768**0.5
    b, floor = torch.full((4096,), -2.88), torch.zeros(4096)
    few = len(screening.exact(x, weights, b, floor)[0])
    assert few <= len(screening.Screen(4096, 768)(x, weights, b, floor)) < 1.8 * few
    best = torch.full((4096,), 0.0)
    assert len(screening.Screen(4096, 768)(x, weights, best, floor, k=8)) < 4 * 8 * len(x)


def test_equal_values_are_kept_in_the_order_of_features_whatever_else_is_there():
    for extra in range(6):
        value = torch.tensor([0.5, 1.0, 1.0] + [0.1] * extra)
        pairs = Pairs(torch.arange(len(value)), torch.zeros(len(value), dtype=torch.int64), 10, 1)
        assert pairs.largest(value, 1).nonzero().flatten().tolist() == [1]
        assert pairs.largest(value, 2).nonzero().flatten().tolist() == [1, 2]


def test_without_the_hardware_the_product_is_exact(monkeypatch):
    plain, fast = plain_and_sparse("relu", torch.float32, screen_below=1.0)
    fast.screen = None  # would fail if it were used
    monkeypatch.setattr(sparse_step, "bfloat16_hardware", lambda: False)
    x, y = plain.scaled(*data(torch.float32))
    (loss, _, count), _ = plain.gradients(x, y)
    (loss2, _, count2), _ = fast.gradients(x, y)
    assert count == count2 and torch.isclose(loss, loss2)


def test_who_gets_which_step():
    x, y = data(torch.float32)
    kinds = {"large": {"sparse_from": FEATURES}, "small": {}, "half": {"sparse_from": 1, "bfloat16": True}}
    made = {name: type(make_trainer(0, x, y, config("relu", **change))) for name, change in kinds.items()}
    assert made == {"large": SparseTrainer, "small": Trainer, "half": Trainer}
    assert type(make_trainer(0, x.bfloat16(), y.bfloat16(), config("relu", sparse_from=1, start_l0=None))) is Trainer


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_with_the_sparse_step_reproduce_one_with_the_plain_step(tmp_path):
    make_model(tmp_path / "model")
    launch(tmp_path, 1, start_l0=None)
    launch(tmp_path, 2, start_l0=None, sparse_from=1, sparse_below=1, screen_below=1)
    assert_one_and_two_agree(tmp_path)
