"""The experiments behind the paper's case studies, on any model: prompts, replaced MLPs, patched keys and values.

`published_cases` runs them as printed in the paper's code release, on GPT2-small, for the ledger of published numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib import targets
from tclib.activations import hook_in
from tclib.attribution import attribute
from tclib.inputs import check_tokens, from_end, whole
from tclib.interventions import Hook, edited, replace_mlp
from tclib.model import to_tokens
from tclib.plots import source_names
from tclib.replacement_model import ReplacementModel, joined
from tclib.tasks import published
from tclib.tracing import trace


@torch.no_grad()
def activation(
    replacement: ReplacementModel,
    tokens: Int[Tensor, " pos"],
    layer: int,
    index: int,
    position: int = -1,
    replaced: Iterable[int] = (),
    hooks: Sequence[Hook] = (),
    bos: bool = True,
) -> float:
    """A feature's activation, with the MLPs of the layers ``replaced`` by their transcoders and under other hooks.

    Args:
        bos: False: the prompt has no BOS in front, as some in the paper's code.
    """
    index, model = joined(replacement).feature(layer, index), replacement.model
    tokens = check_tokens(model, tokens, "the prompt", rows=False, bos=bos)
    position = from_end("position", position, len(tokens), "the prompt")
    x = _read(replacement, tokens, layer, position, replaced, hooks)
    return replacement.transcoders[layer].encode(x)[index].item()


@torch.no_grad()
def patches(
    replacement: ReplacementModel,
    tokens: Int[Tensor, " pos"],
    source: Int[Tensor, " pos"],
    layer: int,
    index: int,
    position: int,
) -> pd.DataFrame:
    """What one position's keys and values, or its values alone, do to a feature at the end when they come from source.

    Both prompts have one length and differ at ``position``. For each head that writes before the feature reads: the
    feature's pre-activation under the patch minus that in the untouched model, on ``tokens``.

    Returns:
        ``layer``, ``head``, ``keys_and_values``, ``values``.

    Raises:
        ValueError: prompts of two lengths.
    """
    index, model = joined(replacement).feature(layer, index), replacement.model
    tokens, source = (check_tokens(model, t, "the prompt", rows=False) for t in (tokens, source))
    if len(tokens) != len(source):
        raise ValueError(f"the prompts have {len(tokens)} and {len(source)} tokens: patching needs one length")
    before = _read(replacement, tokens, layer)
    rows = []
    for at, head in product(range(layer + 1), range(model.cfg.n_heads)):
        row: dict[str, float] = {"layer": at, "head": head}
        for name, parts in {"keys_and_values": "kv", "values": "v"}.items():
            hooks = patch(model, source, at, head, position, parts)
            after = _read(replacement, tokens, layer, hooks=hooks)
            row[name] = ((after - before) @ replacement.transcoders[layer].W_enc[:, index]).item()
        rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def patch(
    model: TransformerBridge, source: Int[Tensor, " pos"], layer: int, head: int, position: int, parts: str
) -> list[Hook]:
    """One head's keys ("k"), values ("v") or both ("kv") at one position become those of the prompt ``source``."""
    layer, head = whole("layer", layer, model.cfg.n_layers, "the model"), whole("head", head, model.cfg.n_heads, "it")
    source = check_tokens(model, source, "the prompt", rows=False)
    position = from_end("position", position, len(source), "the prompt")
    names = {f"blocks.{layer}.attn.hook_{part}" for part in parts}
    _, cache = model.run_with_cache(
        source.to(model.cfg.device)[None], names_filter=names.__contains__, stop_at_layer=layer + 1
    )

    def edit(x: Tensor, hook) -> Tensor:
        x = x.clone()
        x[:, position, head] = cache[hook.name][:, position, head]
        return x

    return [(name, edit) for name in sorted(names)]


def published_cases(replacement: ReplacementModel) -> dict[str, float]:
    """Our numbers for the ledger's entries of the three case studies, on GPT2-small with the paper's transcoders.

    The code release gives some prompts without BOS (scores) and others with it (caches); so does this.
    """
    early, model = range(8), joined(replacement).model

    def at(prompt: str, index: int, **change) -> float:
        without_bos = to_tokens(model, prompt)[1:]
        return activation(replacement, without_bos, 8, index, bos=False, **change)

    def circuit(prompt: str, index: int) -> dict[str, float]:
        traced = trace(replacement, prompt)
        table = attribute(traced, targets.feature(traced, 8, index))
        by_name = dict(zip(source_names(table), table["contribution"], strict=True))
        entry = f"case_study_{index}_circuit"
        return {f"{entry}/{name}": float(by_name.get(name, 0.0)) for name in published.values(entry)}

    def patched(parts: str) -> float:
        was, then = (to_tokens(model, prompt) for prompt in ("was caught", "then caught"))
        hooks = patch(model, was, 2, 8, 1, parts)
        after = activation(replacement, then, 8, 235, replaced=early, hooks=hooks)
        return after - activation(replacement, then, 8, 235)

    rifle = "Oh, that rifle model is a 6M"
    numbers = {
        "case_study_355/comma": at("(Leisman, 1976;", 355),
        "case_study_355/no comma": at("(Leisman 1976;", 355),
        "case_study_355/comma, MLPs 0-7 replaced": at("(Leisman, 1976;", 355, replaced=early),
        "case_study_355/no comma, MLPs 0-7 replaced": at("(Leisman 1976;", 355, replaced=early),
        "case_study_235/keys and values patched": patched("kv"),
        "case_study_235/values patched": patched("v"),
        "case_study_235_sentences/He was caught": at("He was caught", 235),
        "case_study_235_sentences/He caught": at("He caught the ball", 235, position=1),
        "case_study_235_sentences/He was caught, MLPs 0-7 replaced": at("He was caught", 235, replaced=early),
        "case_study_235_sentences/He caught, MLPs 0-7 replaced": at(
            "He caught the ball", 235, position=1, replaced=early
        ),
        "feature_under_replacement/original": at(rifle, 89),
        "feature_under_replacement/layers_1_7_replaced": at(rifle, 89, replaced=range(1, 8)),
        "feature_under_replacement/layers_0_7_replaced": at(rifle, 89, replaced=early),
    }
    return numbers | circuit("(Leisman, 1976;", 355) | circuit("He was caught", 235) | circuit(rifle, 89)


def _read(
    replacement: ReplacementModel,
    tokens: Int[Tensor, " pos"],
    layer: int,
    position: int = -1,
    replaced: Iterable[int] = (),
    hooks: Sequence[Hook] = (),
) -> Float[Tensor, " d_model"]:
    """What the transcoder reads there."""
    model, transcoders = replacement.model, replacement.transcoders
    hooks = [hook for i in replaced for hook in replace_mlp(i, transcoders[i])] + list(hooks)
    name, tokens = hook_in(layer), tokens.to(model.cfg.device)[None]
    with edited(model, hooks):
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: n == name, stop_at_layer=layer + 1)
    return cache[name][0, position]
