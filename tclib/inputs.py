"""Validate tokens and the numbers of layers, heads, features and positions.

Wrong tokens give plausible wrong numbers: without BOS, say, every activation is another one. So every public function
that takes tokens hands them to `check_tokens` first, and every one that takes a number of something to `whole`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
_CHAT_MARKERS = ("<|im_start|>", "<|im_end|>")


def bos_id(model: TransformerBridge) -> int | None:
    """The token that stands in front of every row of text, or None if the model reads text without one.

    TransformerLens' ``model.cfg.default_prepend_bos`` says so. `tclib.load_model` sets it; set it to False for a model
    that was trained without BOS, and nothing here adds one, asks for one or leaves one out of a mean.

    Raises:
        ValueError: the tokenizer has no BOS, and nobody said that the model does without.
    """
    if not model.cfg.default_prepend_bos:
        return None
    bos = model.tokenizer.bos_token_id
    if bos is None:
        raise ValueError(
            "the tokenizer of this model has no BOS token: if the model was trained without one, set "
            "model.cfg.default_prepend_bos = False"
        )
    return bos


def separate_documents(tokenizer: Any, size: int) -> str | None:
    """Make the separator of documents a tokenizer's BOS where that is a chat marker or missing; a line that says so.

    A tokenizer without a separator that is known stays as it is: `bos_id` says what to do where BOS is
    missing.

    Behind a chat marker a model expects somebody's turn; behind the separator, plain text, as in its pretraining.

    Args:
        size: of the model's vocabulary; a tokenizer may have tokens of its class behind it, which the model never saw.
    """
    bos = tokenizer.bos_token
    if bos is not None and bos not in _CHAT_MARKERS:
        return None
    vocabulary = tokenizer.get_vocab()
    found = [token for token in (*_SEPARATORS, tokenizer.eos_token) if vocabulary.get(token, size) < size]
    if not found or found[0] in _CHAT_MARKERS:
        return None
    tokenizer.bos_token = found[0]
    why = "the tokenizer names no BOS" if bos is None else f"the tokenizer's BOS, {bos}, marks turns of a chat"
    return f"{found[0]} stands in front of every text, as between documents in pretraining: {why}."


def words(model: TransformerBridge, tokens: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
    """Which tokens are words: all but BOS, which is the same vector in every row."""
    bos = bos_id(model)
    return torch.ones_like(tokens, dtype=torch.bool) if bos is None else tokens != bos


def check_tokens(
    model: TransformerBridge,
    tokens: Any,
    what: str = "the text",
    rows: bool = True,
    least: int = 1,
    bos: bool = True,
) -> Int[Tensor, "*row pos"]:
    """The tokens as int64, if the model can read them and they are laid out as it was trained.

    Args:
        what: is looked at, for the sentence.
        rows: ``[row, pos]``; False: one prompt, ``[pos]``.
        least: how many tokens a row must have.
        bos: False: there is no BOS in front, and that is meant.

    Raises:
        ValueError: no tensor of whole numbers, another shape, ids outside the vocabulary, a row that is too short or
            too long, or does not start with one BOS.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        kind = f"a tensor of {tokens.dtype}" if isinstance(tokens, Tensor) else f"of type {type(tokens).__name__}"
        raise ValueError(f"{what} is {kind}: give a torch tensor of token ids (int64)")
    first, longest = bos_id(model) if bos else None, model.cfg.n_ctx
    if tokens.numel() == 0:
        raise ValueError("there is no text: give at least one row of tokens" if rows else f"{what} is empty")
    if tokens.ndim != 1 + rows or not least <= tokens.shape[-1] <= longest:
        shape = f"rows [row, pos] of {least} to {longest} tokens" if rows else f"one row of {least} to {longest} tokens"
        raise ValueError(
            f"{what} has shape {tuple(tokens.shape)}: give {shape}{', BOS included' * (first is not None)}"
        )
    low, high = (int(value) for value in tokens.aminmax())
    if low < 0 or high >= model.cfg.d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"{what} has token {wrong}, but the ids of this model go from 0 to {model.cfg.d_vocab - 1}")
    if first is not None:
        _check_bos(tokens if rows else tokens[None], first, what, rows)
    return tokens.long()


def _check_bos(tokens: Int[Tensor, "row pos"], bos: int, what: str, rows: bool) -> None:
    without = (tokens[:, 0] != bos).nonzero()
    if len(without):
        where = f"row {int(without[0])} of {what}" if rows else what
        raise ValueError(
            f"{where} does not start with BOS (token {bos}), which changes every number: put it in front, or set "
            "model.cfg.default_prepend_bos = False for a model that was trained without one"
        )
    # BOS also parts documents, so a row of a text may begin with the end of one; all of them do not.
    if tokens.shape[1] > 1 and (tokens[:, 1] == bos).all() and not (rows and (tokens == bos).all()):
        raise ValueError(f"{what} starts with two BOS (token {bos}), which changes every number: take one away")


def whole(name: str, value: Any, count: int, owner: str) -> int:
    """The number of one of ``count`` things, counted from 0.

    Raises:
        ValueError: no whole number, or there is no such thing: ``name`` and ``owner`` are named.
    """
    number = _number(name, value)
    if not 0 <= number < count:
        has = f"which has {name}s 0 to {count - 1}" if count else f"which has no {name}"
        raise ValueError(f"{name} {number} is outside {owner}, {has}")
    return number


def counted(name: str, value: Any) -> int:
    """A number that counts from 0, where nobody knows how many there are.

    Raises:
        ValueError: no whole number, or one below 0.
    """
    number = _number(name, value)
    if number < 0:
        raise ValueError(f"{name} {number} is below 0, from which {name}s are counted")
    return number


def from_end(name: str, value: Any, count: int, owner: str) -> int:
    """As `whole`, but negative numbers count from the end, as in Python.

    Raises:
        ValueError: no whole number, or there is no such thing from either end.
    """
    number = _number(name, value)
    if not -count <= number < count:
        raise ValueError(f"{name} {number} is outside {owner}, which has {count} {name}s")
    return number % count


def feature_of(transcoders: Mapping[int, Any], layer: int, feature: Any) -> int:
    """The number of a feature of one layer's transcoder.

    Raises:
        ValueError: no transcoder of this layer, or no such feature in it.
    """
    if isinstance(layer, bool) or layer not in transcoders:
        raise ValueError(f"layer {layer} has no transcoder: layers {sorted(transcoders)} have one")
    return whole("feature", feature, transcoders[layer].config.d_features, f"the transcoder of layer {layer}")


def check_layers(model: TransformerBridge, layers: Iterable[int]) -> None:
    """Look at the numbers of layers that something is asked of.

    Raises:
        ValueError: no layer at all, or one that the model does not have.
    """
    layers = list(layers)
    if not layers:
        raise ValueError(f"there is no layer: this model has layers 0 to {model.cfg.n_layers - 1}")
    for layer in layers:
        whole("layer", layer, model.cfg.n_layers, "the model")


def _number(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} {value!r} is not a whole number") from None
