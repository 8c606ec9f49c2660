"""What attribution can explain: a number that is linear in the residual stream once LayerNorm scales are frozen.

A target reads the normalised residual stream at one place with one vector:
``value = reader . gain * normalised(resid) + norm_bias + bias``, where only a model that was not processed has a gain
other than 1 and a ``norm_bias`` (the LayerNorm's bias, seen by the reader) other than 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.inputs import whole
from tclib.model import to_token, to_tokens
from tclib.tracing import Place, Trace


@dataclass(frozen=True)
class Target:
    """One number of one prompt, ready to be taken apart by `tclib.attribution.attribute`."""

    name: str
    place: Place
    layer: int  # n_layers for "final"
    position: int
    reader: Float[Tensor, " d_model"]
    bias: float
    token: int | None = None  # whose logit this is, if it is that of one token

    def scale(self, trace: Trace) -> float:
        """The LayerNorm scale (standard deviation) that this input was divided by; treated as a constant."""
        return trace.scale(self.place, self.layer)[self.position].item()

    def norm_bias(self, trace: Trace) -> float:
        """What the LayerNorm's own bias brings to the reader: 0 in a processed model."""
        return (trace.gain(self.place, self.layer)[1] @ self.reader).item()

    def pulled_back(self, trace: Trace) -> Float[Tensor, " d_model"]:
        """The reader as a direction in the residual stream: centred, if the norm centres, and divided by its scale."""
        return trace.pull_norm(self.place, self.layer, self.reader, self.position)

    def value(self, trace: Trace) -> float:
        """The number itself, read off the residual stream."""
        resid = trace.residual(self.place, self.layer)[self.position]
        return (resid @ self.pulled_back(trace)).item() + self.norm_bias(trace) + self.bias


def feature(trace: Trace, layer: int, index: int, position: int = -1) -> Target:
    """The pre-activation of a transcoder feature at a position. Of an inactive feature too: its name then says so.

    Raises:
        ValueError: no such layer, transcoder, feature or position.
    """
    index, position = trace.feature(layer, index), trace.position(position)
    transcoder = trace.transcoders[layer]
    reader, bias = transcoder.W_enc[:, index], transcoder.b_enc[index].item()
    name = f"feature {layer}/{index} at {position}"
    target = Target(name, "mlp_in", layer, position, reader, bias)
    if trace.features[layer][position, index] == 0:
        return replace(target, name=f"{name} (inactive, pre-activation {target.value(trace):.3g})")
    return target


def logit(trace: Trace, token: str | int, position: int = -1) -> Target:
    """The logit of a token. Where the unembedding is centred, as in a processed model, this is the logit minus the
    mean logit; where the model caps its logits, it is the logit before that. The target's name says so.

    Raises:
        ValueError: no single token, or no such position.
    """
    index = to_token(trace.model, token) if isinstance(token, str) else token
    index = whole("token", index, trace.model.cfg.d_vocab, "the vocabulary")
    W_U = trace.model.W_U
    centred = W_U.mean(dim=1).abs().max() < 1e-4 * W_U.std()
    name = f"logit {token!r}" + " - mean logit" * bool(centred) + before_cap(trace)
    target = _final(trace, name, position, W_U[:, index], trace.model.b_U[index].item())
    return replace(target, token=index)


def logit_difference(trace: Trace, token: str | int, other: str | int, position: int = -1) -> Target:
    """The logit of ``token`` minus that of ``other``; what both share, the mean logit too, cancels.

    Raises:
        ValueError: no single token, or no such position.
    """
    a, b = logit(trace, token, position), logit(trace, other, position)
    name = f"logit {token!r} - {other!r}{before_cap(trace)}"
    return _final(trace, name, position, a.reader - b.reader, a.bias - b.bias)


def direction(trace: Trace, reader: Float[Tensor, " d_model"], place: Place, layer: int, position: int = -1) -> Target:
    """Any vector that reads the output of any LayerNorm (at "mlp_in" before its gain, as transcoders do).

    Raises:
        ValueError: a vector of another width, or no such place, layer or position.
    """
    if reader.shape != (trace.model.cfg.d_model,):
        raise ValueError(f"the direction has shape {tuple(reader.shape)}, not ({trace.model.cfg.d_model},)")
    if place == "final":
        return _final(trace, "direction at the end", position, reader, 0.0)
    position, where = trace.position(position), trace.layer(layer)
    trace.scale(place, layer)  # refuses another place
    return Target(f"direction at {place} {layer}", place, where, position, reader, 0.0)


def head_source(trace: Trace, target: Target, layer: int, head: int, source: int) -> Target:
    """What one head brought to ``target`` from one source position, as a target of its own at that position.

    Paper, section 4.1: with the pattern A frozen, the reader at the source is ``A[t, s] W_V W_O reader``.
    Its value is the head's row in the target's table (without the head's value bias).

    Raises:
        ValueError: a head that does not come before the target.
    """
    layer, head, source = trace.layer(layer), trace.head(head), trace.position(source)
    if layer not in trace.attention_before(target.place, target.layer):
        raise ValueError(f"head {layer}.{head} does not come before {target.name}")
    weight = trace.pattern(layer)[head, target.position, source]
    W_V, W_O = trace.block(layer).head(head)
    reader = weight * (W_V @ (W_O @ target.pulled_back(trace)))
    return Target(f"head {layer}.{head} from {source} to {target.name}", "attn_in", layer, source, reader, 0.0)


def before_cap(trace: Trace) -> str:
    """What a logit's name says of a model that caps its logits, and of no other."""
    return "" if trace.cap is None else f" (before the cap at {trace.cap:g})"


def _final(trace: Trace, name: str, position: int, reader: Tensor, bias: float) -> Target:
    return Target(name, "final", trace.model.cfg.n_layers, trace.position(position), torch.as_tensor(reader), bias)


def one_token_each(model: TransformerBridge, prompt: str, answer: str, other: str) -> tuple[str, str, str]:
    """A prompt and two answers as the tokenizer can compare them: at the first token in which the answers differ.

    Tokens that both begin with are moved to the prompt: to a tokenizer that writes digits singly, "45" and "20" are "4"
    and "2", and "45" and "41" are "5" and "1" behind a prompt that goes on with "4".

    Raises:
        ValueError: two answers of which one is the beginning of the other, or that are not joined to the prompt token
            by token.
    """
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, other)]
    at = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), None)
    if at is None:
        raise ValueError(f"{answer!r} and {other!r} do not differ in any token: give two different next tokens")
    shared, *apart = (model.tokenizer.decode(part) for part in (ids[0][:at], *([own[at]] for own in ids)))
    joined = to_tokens(model, prompt + shared).tolist() == to_tokens(model, prompt).tolist() + ids[0][:at]
    if not joined or [to_token(model, text) for text in apart] != [own[at] for own in ids]:
        raise ValueError(f"{answer!r} and {other!r} are several tokens each: give two answers of one token")
    return prompt + shared, *apart
