"""Interventions do what they say and leave the model as it was."""

import pytest
import torch

from tclib import intervene
from tclib.activations import hook_in, hook_out
from tests.tiny import make_model, make_transcoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture()
def tokens():
    return torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(0))


def outputs(model, tokens, hooks, name):
    seen = {}
    watch = (name, lambda value, hook: seen.update(value=value.clone()))
    intervene.run(model, tokens, [*hooks, watch])
    return seen["value"]


def test_replacing_and_keeping_every_feature_are_the_same(model, tokens):
    transcoder = make_transcoder(1)
    replaced = intervene.run(model, tokens, intervene.replace_mlp(1, transcoder))
    kept = intervene.run(model, tokens, intervene.keep_features(1, transcoder, range(64)))
    torch.testing.assert_close(replaced, kept)
    assert not torch.allclose(replaced, model(tokens), atol=1e-2)


def test_keep_holds_the_rest_at_its_value(model, tokens):
    transcoder = make_transcoder(1)
    rest = torch.rand(64)
    hooks = intervene.keep_features(1, transcoder, [3, 5], rest, positions=-1)
    x = outputs(model, tokens, [], hook_in(1))
    z = rest.repeat(3, 1)
    z[:, [3, 5]] = transcoder.encode(x[:, -1])[:, [3, 5]]
    got = outputs(model, tokens, hooks, hook_out(1))
    torch.testing.assert_close(got[:, -1], transcoder.decode(z))
    torch.testing.assert_close(got[:, :-1], outputs(model, tokens, [], hook_out(1))[:, :-1])


def test_setting_a_feature_moves_the_output_by_its_decoder_row(model, tokens):
    transcoder = make_transcoder(0)
    x = outputs(model, tokens, [], hook_in(0))
    z = transcoder.encode(x)[..., 7]
    got = outputs(model, tokens, intervene.set_features(0, transcoder, [7], 2.0), hook_out(0))
    moved = got - outputs(model, tokens, [], hook_out(0))
    torch.testing.assert_close(moved, (2.0 - z)[..., None] * transcoder.W_dec[7], atol=1e-4, rtol=1e-4)


def test_ablations(model, tokens):
    assert outputs(model, tokens, intervene.ablate_mlp(0), hook_out(0)).abs().max() == 0
    mean = torch.randn(32)
    got = outputs(model, tokens, intervene.ablate_mlp(0, mean, positions=-1), hook_out(0))
    torch.testing.assert_close(got[:, -1], mean.expand(3, 32))
    z = outputs(model, tokens, intervene.ablate_head(1, 2), "blocks.1.attn.hook_z")
    assert z[:, :, 2].abs().max() == 0 and z[:, :, 1].abs().max() > 0


def test_an_sae_of_the_output_reconstructs_the_output(model, tokens):
    sae = make_transcoder(0)
    sae.config = sae.config.model_copy(update={"hook_in": hook_out(0)})
    y = outputs(model, tokens, [], hook_out(0))
    torch.testing.assert_close(outputs(model, tokens, intervene.replace_mlp(0, sae), hook_out(0)), sae(y))


def test_the_model_is_restored_also_after_an_error(model, tokens):
    before = model(tokens)

    def broken(value, hook):
        raise KeyboardInterrupt

    hooks = [*intervene.ablate_mlp(0), (hook_out(1), broken)]
    with pytest.raises(KeyboardInterrupt):
        intervene.run(model, tokens, hooks)
    assert torch.equal(model(tokens), before)


def test_wrong_requests_get_one_sentence():
    with pytest.raises(ValueError, match="cannot replace the MLP of layer 0"):
        intervene.replace_mlp(0, make_transcoder(1))
    with pytest.raises(ValueError, match="between 0 and 63"):
        intervene.keep_features(0, make_transcoder(0), [64])
