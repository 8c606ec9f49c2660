"""Interventions at the last token, for many prompts and many layers at the price of one token.

What is changed at the last token changes no other token, so all others run once: their keys and values are kept, and an
intervention runs the last token alone, from the layer at which it begins. It is `greater_than.run` with hooks at
position -1, many times faster.

For models whose attention and MLP follow each other, each behind a norm of its own (GPT-2, Llama, Qwen 2, Gemma 1);
that the last token comes out as in the model is checked at the start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.blocks import Block, Norm
from tclib.inputs import check_layers
from tclib.tasks import greater_than as gt

Edit = Tensor | Callable[[Tensor], Tensor]  # what is written, or a function of what would be, [prompt, ...]
PLACES = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")  # in the order in which a block computes them


class _Batch(NamedTuple):
    """Prompts of one length: the last token's stream before each layer, and what it attends to of the others."""

    rows: slice
    stream: list[Float[Tensor, "prompt d_model"]]
    keys: list[Float[Tensor, "prompt pos head d_head"]]
    values: list[Float[Tensor, "prompt pos head d_head"]]
    scales: dict[str, Float[Tensor, "prompt 1"]]  # what each norm divides by
    cos: Float[Tensor, " d_rotary"]
    sin: Float[Tensor, " d_rotary"]


class LastToken:
    """The last token of each prompt, ready to be run again from any layer. ``answers()`` are the model's own.

    Raises:
        ValueError: another kind of block than those named above.
    """

    @torch.no_grad()
    def __init__(self, model: TransformerBridge, prompts: gt.Prompts, size: int = 64):
        gt.check_prompts(model, prompts)
        self.model, self.prompts = model, prompts
        self.blocks = [Block.of(model, layer) for layer in range(model.cfg.n_layers)]
        # What attention and what the MLP of each block read through.
        self.norms = [(a, m) for b in self.blocks if (a := b.before_attn) and (m := b.before_mlp)]
        final = Norm.of(model.ln_final, "ln_final")
        self._refuse(len(self.norms) < len(self.blocks) or any(b.after_attn or b.after_mlp for b in self.blocks))
        assert final is not None
        self.final = final
        self.batches = [self._batch(tokens.to(model.cfg.device), rows) for tokens, rows in prompts.batches(size)]
        first = self.batches[0]
        mine, models = self._finish(first, 0, {}), _read(self.final, first.stream[-1], {})
        self._refuse(not torch.allclose(mine, models, atol=1e-3 * models.abs().max().item(), rtol=0))

    def _refuse(self, differs: bool) -> None:
        if differs:
            name = self.model.cfg.model_name
            raise ValueError(f"{name} has other blocks than GPT-2 or Llama, which is all that this can run")

    @torch.no_grad()
    def answers(
        self, edits: Mapping[str, Edit] | None = None, freeze_scales: bool = False
    ) -> Float[Tensor, "prompt answer"]:
        """Probabilities of the task's answers, with what the last token writes at some places replaced.

        Args:
            edits: by hook, ``blocks.23.hook_mlp_out`` for example (see `PLACES`; ``hook_z`` is ``[prompt, head,
                d_head]``), a tensor for all prompts, or a function from what would be written to what is.
            freeze_scales: every norm divides by what it divides by in the unchanged model.
        """
        edits = edits or {}
        layers = [self._layer(name) for name in edits]
        ids = self.prompts.answers.to(self.model.cfg.device)
        W_U, b_U = self.model.W_U[:, ids], self.model.b_U[ids]
        logits = [
            self._finish(batch, min(layers, default=len(self.blocks)), edits, freeze_scales) @ W_U + b_U
            for batch in self.batches
        ]
        return torch.cat(logits).softmax(-1).cpu()

    def kl(self, edits: Mapping[str, Edit]) -> Float[Tensor, " prompt"]:
        """How far edits move each prompt's answer, in nats: KL from the model's own (see `answers`)."""
        return gt.kl_to(self.answers(), self.answers(edits))

    @torch.no_grad()
    def activations(self, layer: int, names: Sequence[str]) -> list[Float[Tensor, "prompt ..."]]:
        """What some hooks of a layer see at the last token, without another pass: one tensor for each of ``names``.

        Args:
            names: of `PLACES`, of the MLP (``blocks.23.mlp.hook_post``), or ``blocks.23.ln2.hook_normalized``.

        Raises:
            ValueError: a layer that does not exist, or a hook of another place.
        """
        check_layers(self.model, [layer])
        found: dict[str, list[Tensor]] = {name: [] for name in names}

        def grab(value: Tensor, hook, name: str) -> None:
            found[name].append(value[:, -1])

        hooks = [(name, partial(grab, name=name)) for name in names if name.startswith(f"blocks.{layer}.mlp.")]
        for batch in self.batches:
            with self.model.hooks(fwd_hooks=hooks):
                seen = self._block(batch, layer, batch.stream[layer], {}, {})[1]
            for name in found.keys() & seen.keys():
                found[name].append(seen[name])
        for name, values in found.items():
            if not values:
                raise ValueError(f"{name!r} is no hook of layer {layer} that is seen here")
        return [torch.cat(values) for values in found.values()]

    def ablated_parts(self) -> pd.DataFrame:
        """Mean KL with the attention, or the MLP, of each layer at zero and at its mean over the compared number.

        Returns:
            One row per layer; columns (part, how), such as ``("MLP", "at mean")``.
        """
        effects = {}
        for part, place in {"attention": "hook_attn_out", "MLP": "hook_mlp_out"}.items():
            for layer in range(len(self.blocks)):
                (live,) = self.activations(layer, [f"blocks.{layer}.{place}"])
                for how, value in {"at zero": 0 * live, "at mean": gt.mean_over_years(live, self.prompts)}.items():
                    effects[layer, part, how] = self.kl({f"blocks.{layer}.{place}": value}).mean().item()
        return pd.Series(effects).unstack([1, 2]).rename_axis("layer")

    def ablated_heads(self, layers: Sequence[int]) -> pd.Series:
        """Mean KL with each head of some layers at its mean over the compared number, the largest first."""
        effects = {}
        for layer in layers:
            (live,) = self.activations(layer, [f"blocks.{layer}.attn.hook_z"])
            for head in range(live.shape[1]):
                value = live.clone()
                value[:, head] = gt.mean_over_years(value[:, head], self.prompts)
                effects[layer, head] = self.kl({f"blocks.{layer}.attn.hook_z": value}).mean().item()
        index = pd.MultiIndex.from_tuples(effects, names=["layer", "head"])
        return pd.Series(list(effects.values()), index, name="KL at its mean").sort_values(ascending=False)

    def _layer(self, name: str) -> int:
        found = re.fullmatch(rf"blocks\.(\d+)\.({'|'.join(PLACES)})", name)
        if not found:
            raise ValueError(f"{name!r} is no place to edit: choose blocks.LAYER and one of {', '.join(PLACES)}")
        check_layers(self.model, [int(found[1])])
        return int(found[1])

    def _finish(
        self, batch: _Batch, first: int, edits: Mapping[str, Edit], freeze_scales: bool = False
    ) -> Float[Tensor, "row d_model"]:
        """The last token's final stream, normalised, from the first layer that is edited."""
        x, scales = batch.stream[first], batch.scales if freeze_scales else {}
        for layer in range(first, len(self.blocks)):
            x, _ = self._block(batch, layer, x, edits, scales)
        return _read(self.final, x, scales)

    def _block(
        self,
        batch: _Batch,
        layer: int,
        x: Float[Tensor, "row d_model"],
        edits: Mapping[str, Edit],
        scales: Mapping[str, Tensor],
    ) -> tuple[Float[Tensor, "row d_model"], dict[str, Tensor]]:
        """The stream after a block, and what was written on the way, by hook."""
        block, (before_attn, before_mlp), seen = self.blocks[layer], self.norms[layer], {}

        def written(place: str, live: Tensor) -> Tensor:
            name = f"blocks.{layer}.{place}"
            edit = edits.get(name, live)
            seen[name] = edit(live) if callable(edit) else edit if edit is live else edit[batch.rows].to(live)
            return seen[name]

        z = written("attn.hook_z", self._mix(batch, layer, _read(before_attn, x, scales)))
        x = x + written("hook_attn_out", torch.einsum("nhd,hde->ne", z, block.W_O) + block.b_O)
        seen[f"blocks.{layer}.ln2.hook_normalized"] = before_mlp.normalised(x)
        out = self.model.blocks[layer].mlp(_read(before_mlp, x, scales)[:, None])[:, 0]
        return x + written("hook_mlp_out", out), seen

    def _mix(self, batch: _Batch, layer: int, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row head d_head"]:
        attn, block = self.model.blocks[layer].attn, self.blocks[layer]
        q, k, v = (
            torch.einsum("nd,hde->nhe", x, W) + (0 if b is None else b)
            for W, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        )
        q, k = _turned(q, batch.cos, batch.sin), _turned(k, batch.cos, batch.sin)
        keys = block.per_head(torch.cat([batch.keys[layer], k[:, None]], dim=1), dim=2)
        values = block.per_head(torch.cat([batch.values[layer], v[:, None]], dim=1), dim=2)
        pattern = (torch.einsum("nhe,nkhe->nhk", q, keys) / q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("nhk,nkhe->nhe", pattern, values)

    def _batch(self, tokens: Tensor, rows: slice) -> _Batch:
        layers = range(self.model.cfg.n_layers)
        rotary = self.model.cfg.positional_embedding_type == "rotary"
        key = "hook_rot_k" if rotary else "hook_k"
        wanted = {f"blocks.{n}.attn.{hook}" for n in layers for hook in (key, "hook_v")}
        wanted |= {f"blocks.{n}.hook_resid_pre" for n in layers}
        wanted |= {f"blocks.{layers[-1]}.hook_resid_post", "blocks.0.attn.hook_cos", "blocks.0.attn.hook_sin"}
        norms = [self.final, *(norm for pair in self.norms for norm in pair)]
        wanted |= {f"{norm.hook}.hook_scale" for norm in norms}
        _, cache = self.model.run_with_cache(tokens, names_filter=lambda name: name in wanted)
        self._refuse(f"blocks.0.attn.{key}" not in cache)
        stream = [cache[f"blocks.{n}.hook_resid_pre"][:, -1].clone() for n in layers]
        stream.append(cache[f"blocks.{layers[-1]}.hook_resid_post"][:, -1].clone())
        keys, values = ([cache[f"blocks.{n}.attn.{hook}"][:, :-1] for n in layers] for hook in (key, "hook_v"))
        none = stream[0].new_zeros(0)
        cos, sin = (cache[f"blocks.0.attn.hook_{p}"][0, -1] if rotary else none for p in ("cos", "sin"))
        scales = {norm.hook: cache[f"{norm.hook}.hook_scale"][:, -1].clone() for norm in norms}
        return _Batch(rows, stream, keys, values, scales, cos, sin)


def _read(norm: Norm, x: Float[Tensor, "row d_model"], scales: Mapping[str, Tensor]) -> Float[Tensor, "row d_model"]:
    """What a norm makes of the stream, divided by the scale that is frozen for it, if one is."""
    frozen = scales.get(norm.hook)
    return (norm.normalised(x) if frozen is None else norm.centre(x) / frozen) * norm.gain + norm.bias


def _turned(x: Float[Tensor, "row head d_head"], cos: Tensor, sin: Tensor) -> Float[Tensor, "row head d_head"]:
    """Rotated to the last position on the dimensions that are rotated (Su et al. 2021): all, some or none."""
    turned, rest = x[..., : len(cos)], x[..., len(cos) :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)
