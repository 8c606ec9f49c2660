"""Everybody's checkpoints: each file computes what the tool that wrote it computes, and round trips lose nothing."""

import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import tclib as tc
from tclib import targets
from tclib.activations import hook_in, hook_out
from tclib.checkpoints import check_fit, memory_plan
from tclib.model import layer_norms
from tests import foreign
from tests.tiny import make_model, make_transcoder

X = torch.randn(20, foreign.D, generator=torch.Generator().manual_seed(9))
SAELENS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=5e-6)


def load(where, **options):
    return tc.load_transcoders(where, device="cpu", **options)


def test_the_papers_checkpoints(tmp_path):
    forwards = {layer: foreign.original(tmp_path, layer, seed=layer) for layer in (0, 1, 11)}
    layers = load(tmp_path)
    assert list(layers) == [0, 1, 11] and len(layers) == 3
    for layer, forward in forwards.items():
        same(layers[layer](X), forward(X))
        config = layers[layer].config
        assert (config.hook_in, config.hook_out) == (hook_in(layer), hook_out(layer))
        assert config.model_name == "gpt2-small" and config.activation == "relu"
    assert layers[1] is layers[1]  # made once


def test_the_papers_plain_sae_uses_its_bias_on_both_sides(tmp_path):
    forward = foreign.original(tmp_path, 3, plain_sae=True)
    (sae,) = load(tmp_path).values()
    same(sae(X), forward(X))
    assert sae.config.hook_in == sae.config.hook_out == hook_in(3)


@pytest.mark.parametrize("kind", SAELENS)
def test_saelens(tmp_path, kind):
    forward = foreign.saelens(tmp_path / "here", kind, layer=2)
    for where in (tmp_path, tmp_path / "here", tmp_path / "here" / "sae_weights.safetensors"):
        same(load(where)[2](X), forward(X))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_circuit_tracer(tmp_path, kind, skip):
    forwards = foreign.circuit_tracer(tmp_path / "set", kind, skip)
    layers = load(tmp_path / "set")
    for layer, forward in enumerate(forwards):
        same(layers[layer](X), forward(X))
    assert list(load(tmp_path / "set" / "layer_1.safetensors")) == [1]


@pytest.mark.parametrize("blocks", ["gpt2", "neox"])
@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_sparsify_reads_behind_the_layer_norm(tmp_path, blocks, processed, skip):
    model = make_model(tmp_path / "model", blocks=blocks, processed=processed)
    forward = foreign.sparsify(tmp_path / "sparsify", layer=1, skip=skip)
    with pytest.raises(ValueError, match="load_transcoders\\(where, model=...\\) folds them in"):
        load(tmp_path / "sparsify")
    with pytest.warns(UserWarning, match="unexplained"):  # it is random
        layers = load(tmp_path / "sparsify", model=model)
    x = model.run_with_cache(torch.arange(8)[None])[1][hook_in(1)][0]
    plain = make_model(tmp_path / "model", blocks=blocks, processed=False)  # the same seed, so the same weights
    after = {}
    grab = [("blocks.1.mlp.hook_in", lambda value, hook: after.update(x=value[0]))]
    plain.run_with_hooks(torch.arange(8)[None], fwd_hooks=grab)
    same(layers[1](x), forward(after["x"]))


@pytest.mark.parametrize("skip", [True, False])
def test_sparsify_with_normalised_inputs_and_outputs(tmp_path, skip):
    model = make_model(tmp_path / "model")
    plain = make_model(tmp_path / "model", processed=False)
    forward = foreign.sparsify(tmp_path / "sparsify", 1, skip=skip, lengths=(7.5, 21.0))
    with pytest.warns(UserWarning, match="unexplained"):  # it is random
        layers = load(tmp_path / "sparsify", model=model)
    x = model.run_with_cache(torch.arange(8)[None])[1][hook_in(1)][0]
    gain, bias = layer_norms(plain, [1])[1]
    same(layers[1](x), forward(x * gain + bias))


@pytest.mark.parametrize("length", [0.0, -1.0, float("nan"), float("inf")])
def test_lengths_that_are_none_are_refused(tmp_path, length):
    model = make_model(tmp_path / "model")
    foreign.sparsify(tmp_path / "sparsify", 1, lengths=(length, 21.0))
    with pytest.raises(ValueError, match="is damaged: its inputs have length"):
        load(tmp_path / "sparsify", model=model)


@pytest.mark.parametrize(
    ("d", "factor"), [(32, 4), pytest.param(576, 128, marks=pytest.mark.slow)], ids=["small", "as published"]
)
def test_the_published_set_of_smollm2(tmp_path, d, factor):
    """Files as in EleutherAI/skip-transcoder-SmolLM2-135M-128x, and of their size: 341 MB a layer."""
    model = make_model(tmp_path / "model", d_model=d)
    name = "model.layers.{}.mlp"
    forward = foreign.sparsify(tmp_path / "set", 1, k=32, d=d, f=factor * d, name=name, normalize_decoder=False)
    place = tmp_path / "set" / name.format(1)
    if factor == 128:
        assert (place / "cfg.json").stat().st_size == 180  # of the published file
        assert round((place / "sae.safetensors").stat().st_size / 1e6) == 341
    with pytest.warns(UserWarning, match="unexplained"):  # it is random
        transcoder = load(tmp_path / "set", model=model)[1]
    assert transcoder.config.d_features == factor * d and transcoder.config.k == 32 and transcoder.config.skip
    x = torch.randn(6, d)
    gain, bias = layer_norms(model, [1])[1]
    torch.testing.assert_close(transcoder(x), forward(x * gain + bias), rtol=1e-4, atol=1e-4)


OWN, NORMALISED = ("mlp.hook_in", "mlp.hook_out"), ("ln2.hook_normalized", "hook_mlp_out")
SETS = {  # what published sets of each tool read and write, and how their files are written
    "circuit-tracer": (NORMALISED, lambda folder, layer: foreign.circuit_tracer(folder, layers=2)),
    "circuit-tracer, of the MLP itself": (OWN, lambda folder, layer: foreign.circuit_tracer(folder, layers=2)),
    "sparsify": (OWN, lambda folder, layer: foreign.sparsify(folder, layer, foreign.F, skip=False, seed=layer)),
    "Gemma Scope": (NORMALISED, lambda folder, layer: foreign.gemma_scope(folder, layer, layer)),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2"])
@pytest.mark.parametrize("tool", SETS)
def test_sets_for_todays_models_fit_them(tmp_path, monkeypatch, tool, family):
    """Dictionaries fitted to what the tool hooks, in its files, leave as little unexplained when they are read here."""
    hooks, write = SETS[tool]
    if family == "olmo2" and hooks == NORMALISED:
        pytest.skip("nothing is normalised before its MLPs")
    plain = make_model(tmp_path / "model", blocks=family, processed=False)
    tokens = torch.randint(0, 40, (60, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 40
    _, seen = plain.run_with_cache(tokens)
    fits, unexplained = {}, {}
    for layer in (0, 1):
        x, y = (seen[f"blocks.{layer}.{hook}"][:, 1:].flatten(0, 1) for hook in hooks)
        fits[layer] = w = foreign.weights(layer) | {"threshold": torch.zeros(foreign.F)}
        w["W_enc"] = w["W_enc"] / x.std()
        z = torch.relu(x @ w["W_enc"] + w["b_enc"])
        solved = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1)], 1), y).solution
        w["W_dec"], w["b_dec"] = solved[:-1].contiguous(), solved[-1].contiguous()
        unexplained[layer] = ((y - z @ w["W_dec"] - w["b_dec"]).square().sum() / (y - y.mean(0)).square().sum()).item()
    monkeypatch.setattr(foreign, "weights", lambda seed, *sizes: fits[seed])
    for layer in (0, 1) if "circuit" not in tool else (0,):
        write(tmp_path / "set", layer)
    if tool == "circuit-tracer, of the MLP itself":
        config = (tmp_path / "set" / "config.yaml").read_text(encoding="utf-8")
        config = config.replace(NORMALISED[0], OWN[0]).replace(NORMALISED[1], OWN[1])
        (tmp_path / "set" / "config.yaml").write_text(config, encoding="utf-8")
    for model in (plain, make_model(tmp_path / "model", blocks=family)):
        with warnings.catch_warnings(action="ignore"):  # the text that loading asks about is nothing but w0 here
            layers = load(tmp_path / "set", model=model)
        with warnings.catch_warnings(action="error"):
            fvu = check_fit(model, layers, tokens)["fvu"]
        assert fvu.to_dict() == pytest.approx(unexplained, rel=1e-3) and fvu.max() < 0.7
        trace = tc.trace(tc.ReplacementModel(model, layers), tokens[0])
        tc.attribute(trace, targets.logit(trace, 3))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope(tmp_path, save):
    forwards = {layer: foreign.gemma_scope(tmp_path, layer, layer, save) for layer in (0, 3)}
    layers = load(tmp_path)
    for layer, forward in forwards.items():
        same(layers[layer](X), forward(X))


KINDS = st.fixed_dictionaries({"activation": st.sampled_from(["relu", "jumprelu", "batchtopk"]), "skip": st.booleans()})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=KINDS, seed=st.integers(0, 10_000), format=st.sampled_from(["tclib", "saelens", "circuit-tracer"]))
def test_round_trips(tmp_path_factory, kind, seed, format):
    ours = {layer: make_transcoder(layer, seed=seed, **kind) for layer in range(2)}
    folder = tc.save_transcoders(ours, tmp_path_factory.mktemp("out") / "set", format)
    again = load(folder)
    assert list(again) == [0, 1]
    for layer in ours:
        assert torch.equal(again[layer](X), ours[layer](X)) or (again[layer](X) - ours[layer](X)).abs().max() < 1e-6
        assert (again[layer].config.hook_in, again[layer].config.hook_out) == (hook_in(layer), hook_out(layer))


def test_negative_thresholds_cut_nothing_in_any_format(tmp_path):
    ours = {0: make_transcoder(0, activation="jumprelu")}
    with torch.no_grad():
        ours[0].threshold.neg_()
    for format in ("saelens", "circuit-tracer"):
        again = load(tc.save_transcoders(ours, tmp_path / format, format))
        same(again[0](X), ours[0](X))


def test_from_each_format_to_each(tmp_path):
    """What the paper's code wrote computes the same after every chain of conversions."""
    forward = foreign.original(tmp_path / "original", 0)
    layers = load(tmp_path / "original")
    for format in ("saelens", "circuit-tracer", "tclib", "circuit-tracer", "saelens"):
        folder = tmp_path / f"{format} {len(list(tmp_path.iterdir()))}"
        layers = load(tc.save_transcoders(layers, folder, format))
    same(layers[0](X), forward(X))


def test_tclib_keeps_every_field(tmp_path):
    ours = {3: make_transcoder(3, activation="topk", k=5, skip=True, model_name="somebody/model")}
    again = load(tc.save_transcoders(ours, tmp_path / "set"))
    assert again[3].config == ours[3].config
    assert torch.equal(again[3](X), ours[3](X))


@pytest.mark.parametrize(
    ("layers", "format", "sentence"),
    [
        ({0: {"activation": "topk", "k": 5}}, "saelens", "SAELens has none"),
        ({0: {"activation": "topk", "k": 5}}, "circuit-tracer", "would read them as ReLU"),
        ({1: {}}, "circuit-tracer", "every layer from 0"),
        ({0: {}, 1: {"d_features": 65}}, "circuit-tracer", "equal widths"),
        ({0: {}, 1: {"skip": True}}, "circuit-tracer", "equal skip connections"),
        ({}, "saelens", "no transcoders to save"),
        ({0: {}}, "pickle", "choose one of tclib, saelens, circuit-tracer"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, layers, format, sentence):
    ours = {layer: make_transcoder(layer, **config) for layer, config in layers.items()}
    with pytest.raises(ValueError, match=sentence):
        tc.save_transcoders(ours, tmp_path / "out", format)


def test_a_folder_in_use_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="not empty"):
        tc.save_transcoders({0: make_transcoder(0)}, tmp_path)


def two_formats(folder):
    foreign.saelens(folder / "a")
    foreign.gemma_scope(folder)


def two_of_one_layer(folder):
    foreign.saelens(folder / "a", layer=1)
    foreign.saelens(folder / "b", layer=1)


def nothing(folder):
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (two_formats, r"2 formats \(SAELens, Gemma Scope\)|2 formats \(Gemma Scope, SAELens\)"),
        (two_of_one_layer, "layer 1 is there twice"),
        (nothing, "no transcoders in"),
    ],
)
def test_formats_are_never_guessed(tmp_path, make, sentence):
    make(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input is True"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations is"),
        ({"architecture": "matryoshka_transcoder"}, "'matryoshka_transcoder' is not read"),
        ({"architecture": "skip_transcoder"}, "W_skip is None"),
        ({"d_sae": 65}, r"W_enc is \(32, 64\), not \(32, 65\)"),
        ({"metadata": {}}, "does not say hook_name"),
    ],
)
def test_saelens_settings_that_change_the_function_are_refused(tmp_path, changes, sentence):
    foreign.saelens(tmp_path / "sae", **changes)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)


def test_one_file_of_a_mixed_folder(tmp_path):
    forward = foreign.original(tmp_path, 5)
    foreign.saelens(tmp_path / "a")
    with pytest.raises(ValueError, match="2 formats"):
        load(tmp_path)
    (path,) = (p for p in tmp_path.glob("*.pt") if "sparsity" not in p.name)
    same(load(path)[5](X), forward(X))
    with pytest.raises(ValueError, match="no transcoders in .*cfg.json"):
        load(tmp_path / "a" / "cfg.json")


def test_sparsify_autoencoders_are_refused(tmp_path):
    foreign.sparsify(tmp_path, transcode=False)
    with pytest.raises(ValueError, match="not a TopK transcoder"):
        load(tmp_path)


def test_a_place_that_is_nothing_is_named():
    with pytest.raises(ValueError, match="no folder, file or hub repository 'no such place'"):
        load("no such place")


def fitted(model, tokens, layer):
    """A skip transcoder whose affine part is the best linear imitation of an MLP: it fits well enough to be known."""
    cache = model.run_with_cache(tokens)[1]
    x, y = (cache[name].flatten(0, 1).double() for name in (hook_in(layer), hook_out(layer)))
    ones = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    solution = torch.linalg.lstsq(ones, y).solution.float()
    t = make_transcoder(layer, skip=True)
    with torch.no_grad():
        t.W_dec.zero_()
        t.W_skip.copy_(solution[:-1])
        t.b_dec.copy_(solution[-1])
    return t


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("model"))
    tokens = torch.randint(0, 40, (40, 16), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = model.tokenizer.bos_token_id
    return model, tokens, {layer: fitted(model, tokens, layer) for layer in range(2)}


def test_what_fits_is_not_warned_about(fit, recwarn):
    model, tokens, layers = fit
    table = check_fit(model, layers, tokens)
    assert (table["fvu"] < 0.7).all() and not recwarn.list


def transposed(layers):
    layers[0].W_skip.data = layers[0].W_skip.data.T.clone()


def in_the_wrong_layer(layers):
    swapped = layers[1]
    layers[0].load_state_dict(swapped.state_dict())


def uncentred(layers):
    layers[0].b_dec.data += 30


def other_numbers(layers):
    layers[0].W_skip.data.normal_()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (transposed, "with W_skip transposed it fits"),
        (in_the_wrong_layer, "it fits layer 1"),
        (uncentred, "without their means over d_model"),
        (other_numbers, "it belongs to another model"),
    ],
)
def test_misfits_are_told_apart(fit, damage, cause):
    model, tokens, layers = fit
    layers = copy.deepcopy(layers)
    damage(layers)
    with pytest.warns(UserWarning, match=f"transcoder of layer 0 leaves .* unexplained: {cause}"):
        table = check_fit(model, layers, tokens)
    assert table.loc[0, "fvu"] > 0.8 > table.loc[1, "fvu"]


def test_a_layer_norm_gain_is_found(fit):
    """A transcoder of the MLP module's own input g n + b, taken for one of n: it computes right((x - b) / g)."""
    model, tokens, layers = fit
    gain, bias = layer_norms(model, [0])[0]
    wrong = copy.deepcopy(layers[0])
    with torch.no_grad():
        wrong.W_skip.copy_(layers[0].W_skip / gain[:, None])
        wrong.b_dec.copy_(layers[0].b_dec - bias @ wrong.W_skip)
    with pytest.warns(UserWarning, match="unexplained: it fits behind LayerNorm's gain and bias"):
        check_fit(model, {0: wrong}, tokens)


def private_bytes():
    """Memory of this process that belongs to no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
@pytest.mark.parametrize("format", ["original", "circuit-tracer", "tclib"])
def test_layers_stay_in_their_files(tmp_path, format):
    foreign.original(tmp_path / "original", 0, d=512, f=16384)  # 67 MB
    folder = tmp_path / "original"
    if format != "original":
        folder = tc.save_transcoders(load(folder), tmp_path / format, format)
    before = private_bytes()
    layers = load(folder)
    transcoder = layers[0]
    transcoder(torch.randn(2, 512))
    assert private_bytes() - before < 8e6
    assert transcoder.W_enc.untyped_storage().nbytes() >= 512 * 16384 * 4


def test_a_chosen_dtype(tmp_path):
    forward = foreign.original(tmp_path, 0)
    half = load(tmp_path, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(X.bfloat16()).float(), forward(X), rtol=0.05, atol=0.1)


def test_too_little_memory_is_a_sentence(tmp_path, monkeypatch):
    foreign.original(tmp_path, 0, d=128, f=4096)
    monkeypatch.setattr("tclib.io.memory.available_memory", lambda device="cpu": 1000)
    assert len(load(tmp_path)) == 1  # stays in its file
    with pytest.raises(ValueError, match="GB are available"):
        load(tmp_path, dtype=torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_cuda(tmp_path):
    forward = foreign.original(tmp_path, 0)
    t = tc.load_transcoders(tmp_path, device="cuda")[0]
    assert t.W_enc.is_cuda
    torch.testing.assert_close(t(X.cuda()).cpu(), forward(X), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS")
def test_on_mps(tmp_path):
    forward = foreign.original(tmp_path, 0)
    t = tc.load_transcoders(tmp_path, device="mps")[0]
    torch.testing.assert_close(t(X.to("mps")).cpu(), forward(X), rtol=1e-3, atol=1e-3)


def test_a_plan_before_anything_is_loaded(tmp_path):
    make_model(tmp_path / "model")
    foreign.original(tmp_path / "transcoders", 0, d=128, f=4096)
    plan = memory_plan(str(tmp_path / "model"), tmp_path / "transcoders", "cpu")["GB"]
    assert list(plan.index) == ["Python", "model", "while it loads", "transcoders", "work", "together", "available"]
    assert plan["transcoders"] == 0 < plan["model"] < plan["together"] < plan["available"]
    small = memory_plan(str(tmp_path / "model"), tmp_path / "transcoders", "cpu", work=1024)["GB"]
    assert small["work"] == pytest.approx(plan["work"] / 8) and small["model"] == plan["model"]


def test_exports_have_the_keys_of_the_tools(tmp_path):
    ours = {0: make_transcoder(0, activation="jumprelu", skip=True)}
    tc.save_transcoders(ours, tmp_path / "s", "saelens")
    tc.save_transcoders(ours, tmp_path / "c", "circuit-tracer")
    with safe_open(tmp_path / "s/layer_0/sae_weights.safetensors", "pt") as file:
        assert set(file.keys()) == {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold"}
    with safe_open(tmp_path / "c/layer_0.safetensors", "pt") as file:
        assert tuple(file.get_slice("W_enc").get_shape()) == (64, 32)
        assert "activation_function.threshold" in file.keys()  # noqa: SIM118
    cfg = json.loads((tmp_path / "s/layer_0/cfg.json").read_text(encoding="utf-8"))
    assert cfg["architecture"] == "jumprelu_skip_transcoder" and cfg["metadata"]["hook_name"] == hook_in(0)
