"""Input-invariant connections: what the weights alone say about every prompt, beside what text makes of them.

Paper, section 4.1 and appendix: the factor ``f_dec . f_enc`` needs no input, so all of a feature's connections can be
read at once. Which of them matter is a question about text; `data_weighted` answers it.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, norm_after, passes
from tclib.blocks import Block, embeddings
from tclib.inputs import check_layers, check_tokens
from tclib.replacement_model import ReplacementModel, joined
from tclib.targets import Target
from tclib.tracing import Trace
from tclib.transcoder import Transcoder

_VOCABULARIES: MutableMapping[Any, tuple[int, pd.Index]] = WeakKeyDictionary()  # by tokenizer, with its length

Head = tuple[int, int]  # (layer, head)


@torch.no_grad()
def reader(trace: Trace, target: Target, heads: Sequence[Head] = ()) -> Float[Tensor, " d_model"]:
    """The direction that a target reads, carried back through the OV circuits of ``heads``, the last one first.

    ``r <- W_V W_O r`` for each head, and each norm's gain and centring; no pattern, no scale.

    Raises:
        ValueError: a head that does not come before what reads it.
    """
    vector, place, layer = target.pulled_back(trace) * target.scale(trace), target.place, target.layer
    for at, head in heads:
        at, head = trace.layer(at), trace.head(head)
        if at not in trace.attention_before(place, layer):
            raise ValueError(f"head {at}.{head} does not come before {place} of layer {layer}")
        W_V, W_O = trace.block(at).head(head)
        vector = W_V @ (W_O @ vector) * trace.gain("attn_in", at)[0]
        vector, place, layer = trace.centre("attn_in", at, vector), "attn_in", at
    return vector


@torch.no_grad()
def pullback(trace: Trace, target: Target, layer: int, heads: Sequence[Head] = ()) -> pd.Series:
    """The input-invariant factor of every feature of an earlier layer, active or not: ``W_dec r`` (see `reader`).

    Returns:
        A Series by feature index, largest first.

    Raises:
        ValueError: a layer that has no transcoder or does not come before its reader.
    """
    transcoder = trace.transcoders[trace.layer(layer, with_transcoder=True)]
    before = heads[-1][0] if heads else target.layer
    if layer >= before:
        raise ValueError(f"the features of layer {layer} are written after layer {before} reads")
    readers = reader(trace, target, heads)
    factors = torch.stack([rows @ _before(trace, at, readers) for at, rows in _writes(transcoder, layer, before)]).sum(
        0
    )
    return _ranked(factors, "input_invariant")


@torch.no_grad()
def de_embed(trace: Trace, target: Target, heads: Sequence[Head] = ()) -> pd.Series:
    """Which vocabulary tokens drive a target on the direct path: ``W_E r`` (paper, section 4.2).

    Returns:
        A Series by token string, largest first.
    """
    scores = embeddings(trace.model) @ reader(trace, target, heads)
    return _ranked(scores, "de_embedding", _vocabulary(trace.model))


@torch.no_grad()
def de_embed_through_mlp0(trace: Trace, target: Target, heads: Sequence[Head] = ()) -> pd.DataFrame:
    """De-embedding extended by what MLP0's transcoder makes of each token: ``W_E r`` and ``TC0(LN(W_E)) r``.

    MLP0 is given the token's embedding alone, without position and attention, as if the token stood anywhere.

    Returns:
        By token string: ``direct``, ``through_mlp0`` and ``total``, largest total first.

    Raises:
        ValueError: layer 0 has no transcoder, or one that writes through a norm; the target does not come after it.
    """
    if (heads[-1][0] if heads else target.layer) < 1:
        raise ValueError(f"{target.name} is read before MLP0 has written")
    first, norm = trace.transcoders[trace.layer(0, with_transcoder=True)], trace.norm("mlp_in", 0)
    if trace.after_mlp(0) is not None:
        raise ValueError("the transcoder of layer 0 writes through a norm, whose scale depends on the whole MLP")
    W_E, direction = embeddings(trace.model), reader(trace, target, heads)
    made = torch.cat([first(part if norm is None else norm.normalised(part)) for part in W_E.split(1024)])
    columns = {"direct": W_E @ direction, "through_mlp0": made @ direction}
    table = pd.DataFrame({name: c.cpu().numpy() for name, c in columns.items()}, index=_vocabulary(trace.model))
    table["total"] = table["direct"] + table["through_mlp0"]
    return table.sort_values("total", ascending=False)


@torch.no_grad()
def logit_lens(trace: Trace, layer: int, index: int) -> pd.Series:
    """What a feature says about the next token when nothing comes in between: ``f_dec W_U``, centred.

    Returns:
        A Series by token string, largest first; units of a logit per unit of activation / LayerNorm scale.
    """
    scores = logit_lenses(trace, layer, [trace.feature(layer, index)])[0]
    return _ranked(scores, "logit_lens", _vocabulary(trace.model))


@torch.no_grad()
def logit_lenses(trace: Trace, layer: int, features: Sequence[int]) -> Float[Tensor, "feature vocab"]:
    """`logit_lens` of several features of a layer at once, by token id."""
    readers = trace.centre("final", 0, (trace.gain("final", 0)[0][:, None] * trace.model.W_U).T)
    writes = _writes(trace.transcoders[layer], layer, trace.model.cfg.n_layers)
    scores = torch.stack([rows[list(features)] @ _before(trace, at, readers).T for at, rows in writes]).sum(0)
    return scores - scores.mean(-1, keepdim=True)


@torch.no_grad()
def ov_connections(trace: Trace, target: Target, layer: int, index: int) -> pd.DataFrame:
    """One earlier feature's connection to a target through each single head: ``f_dec W_V W_O r``.

    Returns:
        ``layer`` and ``head`` of every head between the two, ``input_invariant``; largest magnitude first.
    """
    index = trace.feature(layer, index)

    def through(at: int, head: int) -> float:
        readers, writes = reader(trace, target, [(at, head)]), _writes(trace.transcoders[layer], layer, at)
        return sum((rows[index] @ _before(trace, written, readers)).item() for written, rows in writes)

    rows = [
        {"layer": at, "head": head, "input_invariant": through(at, head)}
        for at in trace.attention_before(target.place, target.layer)
        if at > layer
        for head in range(trace.model.cfg.n_heads)
    ]
    table = pd.DataFrame(rows, columns=["layer", "head", "input_invariant"])
    return table.sort_values("input_invariant", key=abs, ascending=False, ignore_index=True)


@torch.no_grad()
def data_weighted(
    replacement: ReplacementModel,
    tokens: Int[Tensor, "row pos"],
    source_layer: int,
    target_layer: int,
    index: int,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Connections of all features of a layer to one later feature on the direct path, weighted by text.

    With V_i = f_dec,i . f_enc the input-invariant factor, z_i / scale the input-dependent one, and z the target's
    activation, over all tokens but BOS:

        input_x_gradient = V_i  E[ 1(z > 0) z_i / scale ]        the mean attribution, gradient through the ReLU
        target_weighted  = V_i  E[ z z_i / scale ] / E[ z ]      expected attribution where the target fires

    (the second: Ameisen et al. 2025, "target-weighted expected residual attribution").

    Returns:
        ``input_invariant``, ``input_x_gradient`` and ``target_weighted`` by feature index of the source layer.

    Raises:
        ValueError: layers, feature or tokens that do not fit, an SAE, or a target that never fires on this text.
    """
    model, transcoders = joined(replacement).model, replacement.transcoders
    check_layers(model, [source_layer, target_layer])
    if source_layer >= target_layer or not {source_layer, target_layer} <= transcoders.keys():
        raise ValueError(f"layers {source_layer} and {target_layer}: the earlier one first, both with a transcoder")
    source, target = transcoders[source_layer], transcoders[target_layer]
    replacement.need_transcoders()
    index = replacement.feature(target_layer, index)
    tokens = check_tokens(model, tokens)
    norm, after = Block.of(model, target_layer).before_mlp, norm_after(model, source_layer, source.config.hook_out)
    reads = target.W_enc[:, index] if norm is None else norm.centre(target.W_enc[:, index])
    if after is not None and source.config.n_writes is not None:
        raise ValueError("a cross-layer transcoder that writes through norms has a scale for each write: use attribute")
    rows = source.written(target_layer - source_layer)
    invariant = rows @ (reads if after is None else after.centre(reads * after.gain))
    scales = [f"{n.hook}.hook_scale" for n in (norm, after) if n is not None]
    names = {hook_in(source_layer), hook_in(target_layer), *scales}
    masked, weighted = torch.zeros_like(invariant), torch.zeros_like(invariant)
    fired, count = 0.0, 0
    for keep, cache in passes(model, tokens, names, batch_size, target_layer + 1):
        z = target.encode(cache[hook_in(target_layer)][keep])[:, index]
        dependent = source.encode(cache[hook_in(source_layer)][keep])
        for scale in scales:
            dependent = dependent / cache[scale][keep]
        masked += (z > 0).to(z) @ dependent
        weighted += z @ dependent
        fired, count = fired + z.sum().item(), count + len(z)
    if fired == 0:
        raise ValueError(f"feature {target_layer}/{index} never fires on these {count} tokens: give more text")
    columns = {
        "input_invariant": invariant,
        "input_x_gradient": invariant * masked / count,
        "target_weighted": invariant * weighted / fired,
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


def overlap(a: pd.Series, b: pd.Series, ks: Sequence[int] = (10, 20, 50)) -> pd.DataFrame:
    """How many of the k largest entries two rankings share (paper, appendix: input-invariant against data-weighted).

    Returns:
        ``k``, ``overlap`` (fraction), ``chance`` (expected for two random rankings: k / number of entries).
    """
    rows = [
        {"k": k, "overlap": len(a.nlargest(k).index.intersection(b.nlargest(k).index)) / k, "chance": k / len(a)}
        for k in ks
    ]
    return pd.DataFrame(rows)


def _writes(transcoder: Transcoder, layer: int, before: int) -> list[tuple[int, Tensor]]:
    """The layers that a transcoder's features write to before another one reads, and the decoder rows."""
    return [(at, transcoder.rows(at - layer)) for at in range(layer, min(layer + transcoder.reach, before))]


def _before(trace: Trace, layer: int, readers: Tensor) -> Tensor:
    """Readers of the stream as readers of a layer's transcoder, whose output may pass a norm (without its scale)."""
    after = trace.after_mlp(layer)
    return readers if after is None else after.centre(readers * after.gain)


def _ranked(scores: Tensor, name: str, index: pd.Index | None = None) -> pd.Series:
    return pd.Series(scores.cpu().numpy(), index=index, name=name).sort_values(ascending=False)


def _vocabulary(model: TransformerBridge) -> pd.Index:
    """All tokens as text; decoded once for each tokenizer, since that takes longer than any product here."""
    length, known = _VOCABULARIES.get(model.tokenizer, (0, pd.Index([])))
    if (length, len(known)) != (len(model.tokenizer), model.cfg.d_vocab):
        known = pd.Index([model.tokenizer.decode([i]) for i in range(model.cfg.d_vocab)])
        _VOCABULARIES[model.tokenizer] = len(model.tokenizer), known
    return known
