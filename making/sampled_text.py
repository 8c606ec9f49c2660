"""Sample text from the bundled model: rows of tokens for notebooks that need prose without a download.

    python -m making.sampled_text --model data/model --out data/text/sampled.npy

Temperature 1 and no truncation, so the rows follow the model's own distribution. This is sampled text, not real text.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import GPT2LMHeadModel


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.sampled_text", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = GPT2LMHeadModel.from_pretrained(options.model).float().eval()
    torch.manual_seed(options.seed)
    batches = range(0, options.rows, options.batch)
    rows = [sample(model, min(options.batch, options.rows - start)) for start in tqdm(batches)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(options.out, np.concatenate(rows).astype(np.uint16))


@torch.no_grad()
def sample(model: GPT2LMHeadModel, count: int) -> np.ndarray:
    """``[count, context]`` tokens; every row starts with BOS, and a document that ends is followed by the next."""
    tokens = torch.full((count, 1), model.config.bos_token_id)
    past, last = None, tokens
    for _ in range(model.config.n_positions - 1):
        out = model(last, past_key_values=past, use_cache=True)
        past = out.past_key_values
        last = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
        tokens = torch.cat([tokens, last], dim=1)
    return tokens.numpy()


if __name__ == "__main__":
    main()
