"""The last token run alone is the whole model with the same hooks at position -1."""

from __future__ import annotations

from functools import cache

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tclib.tasks import greater_than as gt
from tclib.tasks.last_token import PLACES, LastToken
from tests.tiny import make_model

LAYERS, PROMPTS = 3, 7


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @cache
    def make(family: str, processed: bool):
        return make_model(tmp_path_factory.mktemp(family), layers=LAYERS, blocks=family, processed=processed)

    return make


def task(seed: int = 0) -> gt.Prompts:
    """Prompts of two lengths with ten answers."""
    generator = torch.Generator().manual_seed(seed)
    groups = tuple(torch.randint(0, 40, (n, size), generator=generator) for n, size in ((4, 9), (3, 6)))
    for group in groups:
        group[:, 0] = 40
    frame = pd.DataFrame({"noun": "w", "century": [11, 12] * 3 + [11], "units": range(PROMPTS)})
    return gt.Prompts(groups, frame, pd.DataFrame(), torch.arange(20, 30), compared="units")


def at_last(edit, rows):
    """A hook that does at the last token what an edit does there."""

    def hook_fn(value, hook):
        value = value.clone()
        value[:, -1] = edit(value[:, -1]) if callable(edit) else edit[rows]
        return value

    return hook_fn


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["gpt2", "llama", "qwen2", "gemma"]),
    processed=st.booleans(),
    places=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(PLACES)), max_size=3, unique=True),
    given_values=st.booleans(),
    size=st.integers(1, 5),
    frozen=st.booleans(),
)
def test_it_is_the_whole_model_edited_at_the_last_token(models, family, processed, places, given_values, size, frozen):
    model, prompts = models(family, processed), task()
    last = LastToken(model, prompts, size)
    edits = {}
    for layer, place in places:
        name = f"blocks.{layer}.{place}"
        (live,) = gt.at_last_token(model, prompts, layer, [name])
        edits[name] = torch.randn_like(live) if given_values else lambda value: 0.5 * value.flip(-1)
    held = gt.frozen_scales(model, prompts, -1) if frozen else lambda rows: []  # of all norms
    hooks = lambda rows: [*held(rows), *((name, at_last(edit, rows)) for name, edit in edits.items())]  # noqa: E731
    assert_close(last.answers(edits, frozen), gt.run(model, prompts, hooks), atol=2e-6, rtol=1e-4)
    assert_close(last.answers(), gt.run(model, prompts), atol=2e-6, rtol=1e-4)


def test_the_model_is_as_it_was(models):
    model, prompts = models("llama", True), task()
    before = gt.run(model, prompts)
    LastToken(model, prompts).answers({"blocks.1.hook_mlp_out": torch.zeros(PROMPTS, 32)})
    assert torch.equal(gt.run(model, prompts), before)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "olmo2", "mistral", "neox", "neox-sequential"])
def test_other_blocks_are_refused(models, family):
    with pytest.raises(ValueError, match="has other blocks than GPT-2 or Llama"):
        LastToken(models(family, False), task())


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_mid", "blocks.x.hook_mlp_out", "hook_embed", "blocks.1"])
def test_other_places_are_refused(models, name):
    with pytest.raises(ValueError, match="is no place to edit: choose blocks.LAYER and one of attn.hook_z"):
        LastToken(models("llama", True), task()).answers({name: torch.zeros(PROMPTS, 32)})
    with pytest.raises(ValueError, match="layers 0 to 2"):
        LastToken(models("llama", True), task()).answers({"blocks.7.hook_mlp_out": torch.zeros(PROMPTS, 32)})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activations_are_those_of_a_whole_pass(models, family):
    model, prompts = models(family, True), task()
    names = [f"blocks.1.{name}" for name in (*PLACES, "mlp.hook_post", "mlp.hook_pre", "ln2.hook_normalized")]
    last = LastToken(model, prompts, 3)
    for name, mine, whole in zip(
        names, last.activations(1, names), gt.at_last_token(model, prompts, 1, names), strict=True
    ):
        assert_close(mine, whole, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(ValueError, match="'blocks.1.hook_resid_mid' is no hook of layer 1 that is seen here"):
        last.activations(1, ["blocks.1.hook_resid_mid"])


def test_parts_and_heads_at_their_means(models):
    model, prompts = models("llama", True), task()
    last = LastToken(model, prompts, 3)
    parts, heads = last.ablated_parts(), last.ablated_heads([1])
    assert parts.shape == (LAYERS, 4) and len(heads) == 4 and heads.is_monotonic_decreasing
    (z,) = gt.at_last_token(model, prompts, 1, ["blocks.1.attn.hook_z"])
    mean = gt.mean_over_years(z.flatten(1), prompts).view_as(z)
    z[:, 2] = mean[:, 2]
    slow = gt.run(model, prompts, lambda rows: [("blocks.1.attn.hook_z", at_last(z, rows))])
    assert heads[1, 2] == pytest.approx(gt.kl_to(last.answers(), slow).mean().item(), abs=1e-5)
    (out,) = gt.at_last_token(model, prompts, 2, ["blocks.2.hook_mlp_out"])
    slow = gt.run(model, prompts, lambda rows: [("blocks.2.hook_mlp_out", at_last(0 * out, rows))])
    assert parts.loc[2, ("MLP", "at zero")] == pytest.approx(gt.kl_to(last.answers(), slow).mean().item(), abs=1e-5)
