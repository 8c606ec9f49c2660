"""The text the bundled model learns from: real prose and chronicle prose, cleaned, cut into documents and encoded.

In every file of ids a separator stands before each document.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from making.tokenizer import SEPARATOR, train_tokenizer
from tclib.chronicle import HELD_OUT_CENTURY, documents

# Whole works that are only ever used for the report: a history, a biography, a novel.
HELD_OUT = (
    "beard_contemporary-american-history-1877-1913",
    "lytton-strachey_queen-victoria",
    "willa-cather_my-antonia",
)
TOKENIZER_SEED = 1_000_000  # far from the seeds 0, 1, 2, ... of the training text
TOKENIZER_CHRONICLE_DOCUMENTS = 20_000
UNSEEN_YEAR = re.compile(rf"\b{HELD_OUT_CENTURY}\d\d\b")  # prose that names such a year is left out, too
BLOCK_TOKENS = 1_000_000  # chronicle tokens per seed
PROCESSES = 2


def prepare(real: Path, work: Path, chronicle_tokens: int, held_out: list[str], entries: int, context: int) -> None:
    """Write the tokenizer, `*_train.npy`, `real_heldout_*.npy` and, last, `text.json` into `work`."""
    works = {path.stem: clean(path.read_text(encoding="utf-8")) for path in sorted(real.glob("*.txt"))}
    missing = [name for name in held_out if name not in works]
    if missing:
        raise SystemExit(f"held-out works that are not in {real}: {missing}")
    work.mkdir(parents=True, exist_ok=True)
    cut = {name: list(cut_into_documents(text)) for name, text in works.items()}
    training = [document for name, its in cut.items() if name not in held_out for document in its]
    training = [document for document in training if not UNSEEN_YEAR.search(document)]
    print(f"{len(works)} works, {len(training)} training documents; training the tokenizer", flush=True)

    sample = islice(documents(TOKENIZER_SEED), TOKENIZER_CHRONICLE_DOCUMENTS)
    texts = [*training, *(document.text for document in sample)]
    train_tokenizer(texts, entries, context).save_pretrained(work)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))

    print("encoding the real text", flush=True)
    ids = encode(tokenizer, training)
    np.save(work / "real_train.npy", ids)
    facts = {"real_tokens": len(ids), "held_out": {}}
    for name in held_out:
        ids = encode(tokenizer, cut[name])
        np.save(work / f"real_heldout_{name}.npy", ids)
        text = "".join(cut[name])
        facts["held_out"][name] = {
            "tokens": len(ids),
            "characters": len(text),
            "bytes": len(text.encode()),
        }

    print(f"writing {chronicle_tokens:,} tokens of chronicle", flush=True)
    ids = chronicle_ids(work / "tokenizer.json", chronicle_tokens)
    np.save(work / "chronicle_train.npy", ids)
    facts["chronicle_tokens"] = len(ids)
    (work / "text.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


def clean(text: str) -> str:
    """Remove the markers that one transcriber put around section titles ("%295. The Rule of 1756%.--")."""
    text = re.sub(r"%(\.?--)", r"\1", text)
    return re.sub(r"(?<!\d)%(\d+\.\s*)?", "", text)


def cut_into_documents(text: str) -> Iterator[str]:
    """Cut a work into documents of 5 to 20 paragraphs."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    rng = np.random.default_rng(len(paragraphs))
    start = 0
    while start < len(paragraphs):
        end = start + int(rng.integers(5, 21))
        yield "\n\n".join(paragraphs[start:end])
        start = end


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Ids of all texts in a row, a separator before each."""
    separator = [tokenizer.token_to_id(SEPARATOR)]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array(separator + encoding.ids, dtype=np.uint16) for encoding in encodings])


def chronicle_ids(tokenizer_file: Path, n_tokens: int) -> np.ndarray:
    """`n_tokens` ids of chronicle documents, made in parallel; the same whatever the number of processes."""
    n_blocks = -(-n_tokens // BLOCK_TOKENS)
    sizes = [min(BLOCK_TOKENS, n_tokens - seed * BLOCK_TOKENS) for seed in range(n_blocks)]
    jobs = [(tokenizer_file, seed, size) for seed, size in enumerate(sizes)]
    with get_context("spawn").Pool(min(PROCESSES, n_blocks)) as pool:
        blocks = []
        for block in pool.imap(chronicle_block, jobs):
            blocks.append(block)
            print(f"  {len(blocks)} of {n_blocks} blocks", flush=True)
    return np.concatenate(blocks)


def chronicle_block(job: tuple[Path, int, int]) -> np.ndarray:
    """The first `size` ids of the chronicle with this seed."""
    tokenizer_file, seed, size = job
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    stream = (document.text for document in documents(seed))
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < size:
        parts.append(encode(tokenizer, list(islice(stream, 500))))
    return np.concatenate(parts)[:size]
