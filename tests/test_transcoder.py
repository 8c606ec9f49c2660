"""The transcoder class: its equation, its architectures, its files, and what it says about bad ones."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import tclib as tc
from tclib import onednn_matmul
from tests.tiny import make_transcoder


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 7), skip=st.booleans())
def test_relu_is_the_papers_equation(seed, tokens, skip):
    t = make_transcoder(0, seed=seed, skip=skip)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))
    z = torch.relu(x @ t.W_enc + t.b_enc)
    out = z @ t.W_dec + t.b_dec + (x @ t.W_skip if skip else 0)
    torch.testing.assert_close(t.encode(x), z)
    torch.testing.assert_close(t(x), out)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 64))
def test_topk_keeps_the_k_largest_and_never_a_negative_one(seed, k):
    t = make_transcoder(0, seed=seed, activation="topk", k=k)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    z, dense = t.encode(x), torch.relu(t.pre_activations(x))
    assert ((z > 0).sum(-1) == (dense > 0).sum(-1).clamp(max=k)).all()
    torch.testing.assert_close(z.sum(-1), dense.topk(k).values.sum(-1))


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
def test_thresholds_cut_but_do_not_shrink(activation):
    t = make_transcoder(0, activation=activation, k=8)
    x = torch.randn(50, 32)
    z, pre = t.encode(x), t.pre_activations(x)
    on = z > 0
    torch.testing.assert_close(z[on], pre[on])
    assert (pre[on] > t.threshold.expand_as(pre)[on]).all()
    assert ((pre > 0) & ~on).any()  # otherwise the threshold did nothing


def test_saved_and_loaded_is_the_same(tmp_path):
    t = make_transcoder(1, activation="jumprelu", skip=True)
    t.save(tmp_path / "layer_1", dtype=torch.float32)
    loaded = tc.load_transcoders(tmp_path)
    assert list(loaded) == [1] and loaded[1].config == t.config
    x = torch.randn(3, 32)
    assert torch.equal(loaded[1](x), t(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer_1.json", "layer_1.safetensors"]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), skip=st.booleans())
def test_int8_files_are_off_by_half_a_level_at_most(tmp_path_factory, seed, skip):
    t = make_transcoder(1, seed=seed, skip=skip)
    stem = tmp_path_factory.mktemp("int8") / "layer_1"
    t.save(stem, dtype=torch.int8)
    loaded = tc.load_transcoders(stem.parent)[1]
    for name, along in (("W_enc", 0), ("W_dec", 1)):
        exact, read = getattr(t, name), getattr(loaded, name)
        level = exact.abs().amax(along, keepdim=True) / 127
        assert read.dtype == torch.float32 and ((exact - read).abs() <= level * 0.5001).all()
    assert torch.equal(tc.Transcoder.load(stem)(torch.ones(1, 32)), loaded(torch.ones(1, 32)))


def test_whole_numbers_without_their_scale_are_refused(tmp_path):
    t = make_transcoder(1)
    t.save(tmp_path / "layer_1", dtype=torch.int8)
    tensors = load_file(tmp_path / "layer_1.safetensors")
    del tensors["W_enc.scale"]
    save_file(tensors, tmp_path / "layer_1.safetensors")
    with pytest.raises(ValueError, match="W_enc is stored as I8; weights are floating-point numbers"):
        tc.load_transcoders(tmp_path)


def damage_json(folder):
    (folder / "layer_1.json").write_text("{", encoding="utf-8")


def damage_weights(folder):
    (folder / "layer_1.safetensors").write_bytes(b"\xff" * 64)


def damage_shape(folder):
    config = json.loads((folder / "layer_1.json").read_text(encoding="utf-8")) | {"d_features": 65}
    (folder / "layer_1.json").write_text(json.dumps(config), encoding="utf-8")


def damage_field(folder):
    config = json.loads((folder / "layer_1.json").read_text(encoding="utf-8")) | {"activaton": "relu"}
    (folder / "layer_1.json").write_text(json.dumps(config), encoding="utf-8")


def remove_json(folder):
    (folder / "layer_1.json").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_json, "damaged"),
        (damage_weights, "damaged"),
        (damage_shape, r"W_dec is \(64, 32\), not \(65, 32\)"),
        (damage_field, "damaged"),
        (remove_json, "layer_1.json is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, sentence):
    make_transcoder(1).save(tmp_path / "layer_1")
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        tc.load_transcoders(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no transcoders in"):
        tc.load_transcoders(tmp_path)


def test_impossible_configurations_are_refused():
    with pytest.raises(ValidationError, match="needs k"):
        make_transcoder(0, activation="topk")
    with pytest.raises(ValidationError, match="more than the 64 features"):
        make_transcoder(0, activation="topk", k=65)
    with pytest.raises(ValueError, match="width 31, but this transcoder reads 32"):
        make_transcoder(0)(torch.zeros(1, 31))
    with pytest.raises(ValueError, match="decode\\(z, x\\)"):
        t = make_transcoder(0, skip=True)
        t.decode(torch.zeros(1, 64))


def test_the_thin_product_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(512, 2**14, generator=generator)
    assert W.numel() >= onednn_matmul._LARGE
    for shape in [(2, 512), (3, 7, 512), (256, 512), (512,), (1, 512), (0, 512), (300, 512)]:
        x = torch.randn(*shape, generator=generator)
        torch.testing.assert_close(onednn_matmul.product(x, W), x @ W, rtol=1e-5, atol=2e-4)
    turned = torch.randn(2**14, 512, generator=generator).T  # not contiguous: oneDNN would take seconds
    torch.testing.assert_close(onednn_matmul.product(x[:8], turned), x[:8] @ turned)
    x.requires_grad_(True)
    assert onednn_matmul.product(x[:8], W).requires_grad
    assert onednn_matmul.product(x[:8].double(), W.double()).dtype == torch.float64
