"""The methods of notebooks 11 and 11b, taken from their cells by name, on problems whose answer is known."""

from __future__ import annotations

import ast
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tclib.activations import hook_out
from tclib.blocks import Block
from tclib.evaluation import ground_truth
from tclib.evaluation.baselines import ridge
from tclib.tasks.dictionaries import Bench, Dictionary, directions, learn, top_k, topk_dictionary
from tests.conftest import REPO

PATHS = [
    REPO / "notebooks" / name for name in ("11_other_dictionaries.ipynb", "11b_if_one_knew_what_to_look_for.ipynb")
]
CELLS = [cell for path in PATHS for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
DEFINED = {node.name: node for cell in CODE for node in ast.parse(cell).body if isinstance(node, ast.FunctionDef)}
METHODS = compile(ast.Module([*DEFINED.values()], []), "notebooks 11 and 11b", "exec")
seeds = st.integers(0, 10_000)


def method(name: str, **known):
    """A function of the notebook, with the notebook's other functions and what else it needs."""
    space = {"torch": torch, "np": np, "F": F, "ground_truth": ground_truth, "Block": Block}
    space |= {"hook_out": hook_out, "OUT": "y"}
    space |= {"Dictionary": Dictionary, "ridge": ridge, "directions": directions, "learn": learn}
    space |= {"p": SimpleNamespace(k=3, seed=0, units=12, steps=5)}
    exec(METHODS, space)
    space |= known
    return space[name]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_dictionary_of_the_table_has_its_controls():
    printed = "\n".join(
        "".join(output.get("text", ""))
        for cell in CELLS
        for output in cell.get("outputs", ())
        if output["output_type"] == "stream"
    )
    controlled = re.findall(r"^(.+): FVU .+; 20 controls .+ to .+, median .+$", printed, flags=re.MULTILINE)
    scored = re.findall(r'score\("(.+?)"', "\n".join(CODE))
    assert set(controlled) == set(scored) - {"principal components"}  # itself a control
    assert len(set(controlled)) == 10


@given(seeds, st.integers(1, 8))
def test_top_k_keeps_the_largest(seed, k):
    pre = normal(5, 8, seed=seed)
    z = method("top_k")(pre, k)
    for row, kept in zip(pre.relu(), z, strict=True):
        assert sorted(kept[kept > 0].tolist()) == sorted(v for v in row.topk(k).values.tolist() if v > 0)


@given(seeds)
def test_pursuit_subtracts_one_unit_after_another(seed):
    y, D = normal(3, 6, seed=seed), F.normalize(normal(10, 6, seed=seed + 1), dim=1)
    z = method("pursue")(y, D, 4)
    for row, code in zip(y, z, strict=True):
        left, sizes = row, torch.zeros(10)
        for _ in range(4):
            pick = int((D @ left).argmax())
            sizes[pick] += max(0.0, float(D[pick] @ left))
            left = row - sizes @ D
        assert torch.allclose(code, sizes, atol=1e-4)


def test_pursuit_finds_the_code_of_units_at_right_angles():
    D = torch.linalg.qr(normal(8, 8)).Q
    z = method("top_k")(normal(20, 8, seed=1), 3)
    assert torch.allclose(method("pursue")(z @ D, D, 3), z, atol=1e-5)


@given(seeds, st.integers(1, 6))
def test_more_picks_never_leave_more(seed, k):
    y, D = normal(4, 6, seed=seed), F.normalize(normal(9, 6, seed=seed + 1), dim=1)
    left = [(y - method("pursue")(y, D, n) @ D).square().sum() for n in (k, k + 1)]
    assert left[1] <= left[0] + 1e-4


@given(st.integers(4, 600), st.integers(1, 30))
def test_rates_halve_from_group_to_group_and_add_up(n, k):
    rates = method("group_rates")(n, k)
    assert rates.sum() == pytest.approx(k, rel=1e-4) and rates[0] / rates[1] == pytest.approx(2)
    assert len(rates.unique()) == 4


@given(seeds)
def test_the_bias_hits_the_rate(seed):
    pre, rates = normal(1000, 4, seed=seed), torch.tensor([0.5, 0.1, 0.02, 0.004])
    b = method("quantile_bias")(pre, rates)
    assert ((pre + b > 0).float().mean(0) - rates).abs().max() <= 2 / 1000
    z = method("fire")(pre, b)
    assert torch.equal(z[z > 0], pre[z > 0])  # a unit that fires is not shrunk


def test_rounds_of_k_means_never_leave_more_and_books_correct_what_is_left():
    y = normal(300, 3)
    for seed in range(5):
        found = [method("cluster")(y, 6, rounds, torch.Generator().manual_seed(seed)) for rounds in range(8)]
        left = [torch.cdist(y, centres).min(1).values.square().sum().item() for centres in found]
        assert all(after <= before + 1e-4 for before, after in zip(left, left[1:], strict=False)) and left[-1] < left[0]
    books = method("codebooks")(normal(500, 6), 32, 4)
    assert books.shape == (4, 8, 6)
    fresh = normal(300, 6, seed=2)
    z = method("spell")(fresh, books, 4)
    assert (z.unflatten(1, (4, 8)).sum(2) == 1).all()  # one code of every book, and no amplitudes
    errors = [(fresh - method("spell")(fresh, books, k) @ books.flatten(0, 1)).square().sum().item() for k in range(5)]
    assert errors == sorted(errors, reverse=True)


@settings(max_examples=25)
@given(seeds)
def test_amounts_stay_positive_and_never_raise_the_error(seed):
    A, G, Z = normal(12, 7, seed=seed), normal(5, 7, seed=seed + 1), normal(12, 5, seed=seed + 2).abs() + 0.1
    errors = [(A - method("amounts")(A, G, Z, rounds) @ G).square().sum().item() for rounds in range(6)]
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False))
    assert (method("amounts")(A, G, Z, 5) >= 0).all()


def test_semi_nmf_finds_more_than_its_start():
    Z = method("top_k")(normal(400, 12) - 1.0, 3)
    A = Z @ normal(12, 20, seed=1) + 0.01 * normal(400, 20, seed=2)
    (start, _), (G, errors) = (method("factorise")(A, 12, 3, rounds, seed=0) for rounds in (0, 20))
    sparse = method("sparse_amounts")
    assert ((sparse(A, G, 3) > 0).sum(1) <= 3).all()
    left = [(A - sparse(A, g, 3) @ g).square().sum() for g in (start, G)]
    assert left[1] < 0.7 * left[0] and errors[-1] < errors[0]


def test_the_local_basis_whitens_and_orders_by_effect():
    Y, JJ = normal(4000, 5) @ normal(5, 5, seed=1), normal(5, 5, seed=2)
    JJ = JJ.T @ JJ
    S, vectors, readers = method("local_basis")(Y, JJ)
    assert torch.allclose(readers @ vectors.T, torch.eye(5), atol=1e-4)
    coordinates = Y @ readers.T
    assert torch.allclose(coordinates.T @ coordinates / len(Y), torch.eye(5), atol=1e-3)
    assert torch.allclose(vectors @ JJ @ vectors.T, S.diag(), atol=1e-3 * float(S.max()))
    assert S.tolist() == sorted(S.tolist(), reverse=True)


def test_random_signs_give_the_square_of_the_jacobian(model, tokens):
    torch.manual_seed(0)
    name, rows = hook_out(0), tokens[:1, :6]
    found = method("jacobian_square", lm=model, OUT=name)(rows, probes=600)
    store = {}

    def watch(y, hook):
        store["y"] = y.detach().requires_grad_()
        return store["y"]

    with torch.enable_grad():
        logits = model.run_with_hooks(rows, fwd_hooks=[(name, watch)])
        logits = (logits - logits.mean(-1, keepdim=True)).flatten()
        g = torch.stack([torch.autograd.grad(one, store["y"], retain_graph=True)[0][0, 1:] for one in logits])
    exact = torch.einsum("jti,jtk->ik", g, g) / g.shape[1]
    assert (found - exact).norm() < 0.25 * exact.norm()


def test_the_supervised_dictionary_finds_labels_and_shuffled_ones_are_no_use():
    T = (normal(1500, 6).abs() > 1.2).float()
    Y = T @ normal(6, 10, seed=1) + 0.05 * normal(1500, 10, seed=2)
    left = []
    for seed in (None, 0):
        d = method("supervised")(Y, T, seed)
        left.append((Y - d.encode(Y, 1) @ d.D - d.rest(Y)).square().sum() / (Y - Y.mean(0)).square().sum())
    assert left[0] < 0.05 and left[1] > 0.8


def test_ridge_is_least_squares_where_the_penalty_is_small():
    Z, Y = normal(200, 5), normal(200, 3, seed=1)
    assert torch.allclose(ridge(Z, Y, 1e-6), torch.linalg.lstsq(Z, Y).solution, atol=1e-4)


def test_succession_is_the_share_of_next_numbers():
    successor = torch.eye(10).roll(1, dims=1)
    score, order = method("succession"), torch.arange(10)
    assert score(successor, order) == 1.0 and score(successor, order, step=2) == 0.0
    assert score(torch.eye(10), order, step=0) == 1.0 and score(torch.eye(10), order) == 0.0
    assert score(successor.T, order, step=-1) == 1.0
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert score(successor, shuffled) < 0.5


def test_heads_maps_add_up_to_what_attention_writes_if_it_looks_at_the_number_alone(model):
    ids = torch.arange(12)
    maps = method("number_maps")(model, ids)
    assert len(maps) == model.cfg.n_layers * (model.cfg.n_heads + 1)
    rows = torch.stack([torch.full_like(ids, model.tokenizer.bos_token_id), ids], 1)
    alone = [("blocks.0.attn.hook_pattern", lambda A, hook: torch.eye(2).expand_as(A))]
    with model.hooks(fwd_hooks=alone):
        _, cache = model.run_with_cache(rows)
    written = cache["blocks.0.hook_attn_out"][:, 1] @ model.W_U[:, ids]
    together = sum(maps[f"head 0.{head}"] for head in range(model.cfg.n_heads))
    assert torch.allclose(together, written - written.mean(0), atol=1e-3 * float(written.abs().max()))


@pytest.mark.parametrize("read", ["blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_a_perfect_dictionary_changes_nothing_and_a_silent_one_writes_the_mean(model, tokens, read):
    _, cache = model.run_with_cache(tokens[:4])
    width = cache[read].flatten(2).shape[2]
    mean, size = {read: normal(width)}, {read: torch.tensor(2.0)}
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    bench = Bench.__new__(Bench)  # its activations are not needed
    bench.mean, bench.size, bench.k = mean, size, 3
    spliced = bench.spliced
    perfect = Dictionary(read, read, lambda v, k: torch.cat([v, -v], 1).relu(), both, lambda v: 0.0)
    silent = Dictionary(read, read, lambda v, k: torch.zeros(len(v), 2 * width), both, lambda v: 0.0)
    whole = model(tokens[:4])
    assert torch.allclose(model.run_with_hooks(tokens[:4], fwd_hooks=spliced(perfect)), whole, atol=1e-3)

    def by_mean(y, hook):
        return torch.cat([y[:, :1], mean[read].reshape(y.shape[2:]).expand_as(y[:, 1:])], 1)

    expected = model.run_with_hooks(tokens[:4], fwd_hooks=[(read, by_mean)])
    assert torch.allclose(model.run_with_hooks(tokens[:4], fwd_hooks=spliced(silent)), expected, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_the_librarys_topk_dictionary_is_the_one_of_the_notebook(skip):
    bench = SimpleNamespace(train={"x": normal(40, 6), "y": normal(40, 6, seed=1)}, k=3)
    mine = topk_dictionary(bench, "x", "y", units=12, steps=5, seed=0, skip=skip)
    by_hand = method("topk_dictionary", train=bench.train)("x", "y", skip)
    assert torch.equal(mine.D, by_hand.D)
    z = mine.encode(bench.train["x"], 3)
    assert torch.equal(z, by_hand.encode(bench.train["x"], 3))
    assert torch.allclose(mine.rebuilt(z, bench.train["x"]), z @ by_hand.D + by_hand.rest(bench.train["x"]))


def test_directions_have_length_one_and_few_units_fire():
    assert torch.allclose(directions(7, 5, seed=3).norm(dim=1), torch.ones(7))
    assert ((top_k(normal(20, 9), 4) > 0).sum(1) <= 4).all()


def test_learning_finds_a_line():
    x, w = normal(200, 3), torch.zeros(3, 2)
    target = x @ normal(3, 2, seed=5) * 0.05
    before = (target - x @ w).square().sum()
    learn(lambda at: (target[at] - x[at] @ w).square().mean(), [w], len(x), steps=200, seed=0)
    assert (target - x @ w).square().sum() < 0.05 * before and not w.requires_grad
