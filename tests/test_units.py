"""Units kept by the same rule whatever they are: features, neurons, or directions made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tclib.activations import hook_in, hook_out
from tclib.interventions import ablate_mlp
from tclib.tasks import greater_than as gt
from tclib.tasks import units
from tclib.tasks.last_token import LastToken
from tests.test_last_token import models, task  # noqa: F401
from tests.tiny import make_transcoder

LAYER = 1


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, models):  # noqa: F811
    return models(request.param, True)


def test_none_is_the_mean_and_all_neurons_are_the_model(model):
    prompts = task()
    last, neurons = LastToken(model, prompts), units.Units.of(LastToken(model, prompts), LAYER)
    (out,) = gt.at_last_token(model, prompts, LAYER, [hook_out(LAYER)])
    mean = gt.mean_over_years(out, prompts)
    order = units.ranked(neurons.written())
    kl = units.kl_kept(last, neurons, order, [0, len(order)])
    without = gt.run(model, prompts, lambda rows: ablate_mlp(LAYER, mean[rows], -1))
    np.testing.assert_allclose(kl[0], gt.kl_to(last.answers(), without), atol=1e-5)
    assert np.abs(kl[1]).max() < 1e-5 and neurons.unexplained() < 1e-8
    assert_close(neurons.output(order), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_features_start_where_neurons_do(model, skip):
    prompts, transcoder = task(), make_transcoder(LAYER, skip=skip)
    last = LastToken(model, prompts)
    features, neurons = (
        units.Units.of(LastToken(model, prompts), LAYER, transcoder),
        units.Units.of(LastToken(model, prompts), LAYER),
    )
    order = units.ranked(features.written())
    start = units.kl_kept(last, features, order, [0])
    np.testing.assert_allclose(start, units.kl_kept(last, neurons, order, [0]), atol=1e-6)
    everything = units.kl_kept(last, features.with_error(), order, [len(order)])
    assert np.abs(everything).max() < 1e-5  # all features and the error are the MLP
    assert features.unexplained() > 1e-3


def test_kept_features_are_those_of_the_hooks(model):
    prompts, transcoder = task(), make_transcoder(LAYER)
    features, kept = units.Units.of(LastToken(model, prompts), LAYER, transcoder), torch.tensor([3, 0, 7])
    x, out = gt.at_last_token(model, prompts, LAYER, [hook_in(LAYER), hook_out(LAYER)])
    z = transcoder.encode(x)
    one = gt.mean_over_years(z, prompts)
    missed = gt.mean_over_years(out - transcoder.decode(z, x), prompts)
    mixed = one.clone()
    mixed[:, kept] = z[:, kept]
    assert_close(features.output(kept), transcoder.decode(mixed) + missed, atol=1e-5, rtol=1e-4)


def test_orders(model):
    prompts = task()
    neurons = units.Units.of(LastToken(model, prompts), LAYER)
    by_hand = [(neurons.deviations[:, i, None] * neurons.writes[i]).square().sum(1).mean() for i in range(5)]
    assert_close(neurons.written()[:5], torch.stack(by_hand))
    U = torch.randn(32, 10)
    effects = neurons.deviations[:, 2, None] * (neurons.writes[2] @ U)
    assert_close(neurons.direct(U)[2], (effects - effects.mean(1, keepdim=True)).square().sum(1).mean())
    drawn = units.shuffled(neurons, 3)
    assert len(set(drawn.tolist())) == len(drawn) and not torch.equal(drawn, units.shuffled(neurons, 4))
    band = units.random_band(LastToken(model, prompts), neurons, [1, 4], draws=3)
    assert (band["low"] <= band["median"]).all() and (band["median"] <= band["high"]).all()


def test_what_does_not_fit_is_refused(model):
    prompts = task()
    with pytest.raises(ValueError, match="this transcoder writes to blocks.0.hook_mlp_out, not to blocks.1"):
        units.Units.of(LastToken(model, prompts), 1, make_transcoder(0))
    with pytest.raises(ValueError, match="at least 0"):
        units.kl_kept(LastToken(model, prompts), units.Units.of(LastToken(model, prompts), 1), torch.arange(3), [-1])


def test_controls_of_gated_neurons(models):  # noqa: F811
    model, prompts = models("llama", True), task()
    kinds = units.gated_controls(LastToken(model, prompts), LAYER)
    last, ks = LastToken(model, prompts), [0, 10**6]
    kl = {name: units.kl_kept(last, group, units.ranked(group.written()), ks).mean(1) for name, group in kinds.items()}
    for name in ("neurons", "cut in two", "principal directions"):
        assert kl[name][1] < 1e-5, name
    for name in ("only the gate moves", "only the value moves"):
        assert kl[name][0] == pytest.approx(kl["neurons"][0], abs=1e-6) and kl[name][1] > 1e-6
    (gate, value) = gt.at_last_token(
        model, prompts, LAYER, [f"blocks.1.mlp.{n}" for n in ("hook_pre", "hook_pre_linear")]
    )
    by_hand = torch.nn.functional.silu(gate) * gt.mean_over_years(value, prompts)
    assert_close(kinds["only the gate moves"].activations, by_hand, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="for gated MLPs"):
        units.gated_controls(LastToken(models("gpt2", True), prompts), LAYER)


def test_names_and_likeness(model):
    prompts = task()
    neurons = units.Units.of(LastToken(model, prompts), LAYER)
    assert_close(neurons.likeness(neurons).diagonal(), torch.ones(neurons.writes.shape[0]), atol=1e-4, rtol=0)
    turned = units.Units.made(prompts, LAYER, -neurons.activations, -neurons.writes, neurons.rest)
    assert_close(neurons.likeness(turned).diagonal(), torch.ones(neurons.writes.shape[0]), atol=1e-4, rtol=0)
    said = neurons.described(3, prompts, torch.randn(32, 10))
    numbers = said.removeprefix("negative ").removeprefix("on ").split(": raises ")
    assert all(0 <= int(n) < 7 for n in numbers[0].split(", ")) and len(numbers[1].split(" and ")) == 2
