"""Which token stands in front of a text: BOS, or what separated documents where BOS is a chat's or missing."""

from __future__ import annotations

from typing import Any

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
_CHAT_MARKERS = ("<|im_start|>", "<|im_end|>")


def separate_documents(tokenizer: Any, size: int) -> str | None:
    """Make the separator of documents a tokenizer's BOS where that is a chat marker or missing; a line that says so.

    A tokenizer without a separator that is known stays as it is: `tclib.inputs.bos_id` says what to do where BOS is
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
