"""Text as rows of tokens: every row starts with BOS and has the same length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.chronicle import Split, documents
from tclib.inputs import bos_id
from tclib.io.paths import data_path, read_text

# Far from the seeds of the documents that the bundled model and its transcoders were trained on (0, 1, 2, ...).
UNSEEN_SEEDS = 2_000_000
ROW = 128  # tokens, as transcoders are usually trained; a context may be thousands long


@dataclass(frozen=True)
class LabelledText:
    """Rows of tokens with the label that produced each token (``"bos"`` for BOS)."""

    tokens: Int[Tensor, "row pos"]
    labels: Shaped[np.ndarray, "row pos"]  # of str


def load_text(
    model: TransformerBridge, source: str, rows: int, seed: int = 0, width: int = ROW
) -> Int[Tensor, "row pos"]:
    """Rows of tokens from any source.

    Args:
        source: ``"chronicle"`` (generated prose), ``"sampled"`` (text sampled from the bundled model),
            a .txt file or a folder of them, or a Hugging Face dataset id with a ``text`` column (needs a network).
        rows: how many rows.
        seed: which chronicle documents; where in the sampled text to start. Files are read from their beginning.
        width: tokens in a row; at most the model's context.

    Raises:
        ValueError: an unknown source, one too short for the rows asked for, rows of less than two tokens, or a
            file that is not UTF-8.
    """
    if rows < 1:
        raise ValueError(f"rows = {rows}: ask for at least one row of text")
    if source == "chronicle":
        return chronicle(model, rows, seed, width=width).tokens
    if source == "sampled":
        return _sampled(model, rows, seed)[:, : _width(model, width)]
    path = Path(source)
    if path.exists():
        files = sorted(path.glob("**/*.txt")) if path.is_dir() else [path]
        return pack(model, (read_text(file) for file in files), rows, width)
    if source.count("/") == 1 and not source.startswith((".", "/")):
        return pack(model, _hub_dataset(source), rows, width)
    raise ValueError(f"unknown text {source!r}: use 'chronicle', 'sampled', a .txt file, a folder or a dataset id")


def chronicle(
    model: TransformerBridge, rows: int, seed: int = 0, split: Split = "train", width: int = ROW
) -> LabelledText:
    """Rows of chronicle prose with the label of each token. Documents are packed with BOS between them."""
    bos, width = bos_id(model), _width(model, width)
    first = [] if bos is None else [bos]
    ids: list[int] = []
    labels: list[str] = []
    source = documents(UNSEEN_SEEDS + seed, split)
    while len(ids) <= rows * (width - len(first)):
        document = next(source)
        encoded = model.tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
        ids += [*first, *encoded["input_ids"]]
        labels += ["bos"] * len(first) + [*document.labels([end for _, end in encoded["offset_mapping"]])]
    # Every row brings its own BOS, so the first document's is dropped.
    ids, labels = ids[len(first) :], labels[len(first) :]
    tokens, labelled = _rows(ids, rows, width, first), _rows(labels, rows, width, ["bos"] * len(first), object)
    return LabelledText(torch.from_numpy(tokens), labelled)


def pack(model: TransformerBridge, texts: Iterable[str], rows: int, width: int = ROW) -> Int[Tensor, "row pos"]:
    """Join texts with BOS between them and cut them into rows that start with BOS.

    Raises:
        ValueError: the texts are shorter than the rows asked for, or rows of less than two tokens.
    """
    bos, width = bos_id(model), _width(model, width)
    first = [] if bos is None else [bos]
    ids: list[int] = []
    for text in texts:
        for start in range(0, len(text), 100_000):
            # Long files are cut into parts so that the tokenizer never holds a whole book.
            part = text[start : start + 100_000]
            ids += [*(first if start == 0 else []), *model.tokenizer(part, add_special_tokens=False)["input_ids"]]
            if len(ids) > rows * (width - len(first)):
                return torch.from_numpy(_rows(ids[len(first) :], rows, width, first))
    have = len(ids) // (width - len(first))
    raise ValueError(f"the text fills {have} rows of {width} tokens, but {rows} were asked for: give more text")


def text_hash(tokens: Int[Tensor, "row pos"]) -> str:
    """A fingerprint of a text."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _width(model: TransformerBridge, width: int) -> int:
    if width < 2:
        raise ValueError(f"width = {width}: a row has at least two tokens")
    return min(width, model.cfg.n_ctx)


def _rows(values: list, rows: int, width: int, first: list, dtype: type = np.int64) -> Shaped[np.ndarray, "row pos"]:
    width -= len(first)
    body = np.array(values[: rows * width], dtype=dtype).reshape(rows, width)
    return np.hstack([np.array([first] * rows, dtype=dtype).reshape(rows, len(first)), body])


def _sampled(model: TransformerBridge, rows: int, seed: int) -> Int[Tensor, "row pos"]:
    tokens = torch.from_numpy(np.load(data_path("text", "sampled.npy"), allow_pickle=False).astype(np.int64))
    if tokens.shape[1] != model.cfg.n_ctx or int(tokens[0, 0]) != bos_id(model):
        raise ValueError("the sampled text belongs to the bundled model: choose another text for this model")
    if rows > len(tokens):
        raise ValueError(f"the sampled text has {len(tokens)} rows, but {rows} were asked for")
    return tokens.roll(-(seed * 997) % len(tokens), 0)[:rows]


def _hub_dataset(name: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        stream = load_dataset(name, split="train", streaming=True)
        for record in islice(stream, 1_000_000):
            yield record["text"]
    except KeyError:
        raise ValueError(f"the dataset {name!r} has no column 'text'") from None
    except Exception as error:
        raise ValueError(
            f"the dataset {name!r} could not be read ({type(error).__name__}): check its name and the network, "
            "or use text='chronicle'"
        ) from error
