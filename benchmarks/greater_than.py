"""How fast is the sweep over units kept? `tclib.tasks.unit_sweep` against the method of the paper's notebook.

The shape is GPT2-small's: 12 layers of width 768, 50,257 tokens, a transcoder of 24,576 features for MLP 10, 98 prompts
of 9 tokens, 100 nested feature counts; the weights are random. The plain method, written anew below, runs the whole
model on all prompts for each count, with the transcoder in the MLP's place and all but the kept features at zero. It is
timed at a few counts and extrapolated to all of them (each costs the same); values are compared at those counts.

    OMP_NUM_THREADS=1 python benchmarks/greater_than.py
"""

from __future__ import annotations

import os
import statistics
import time

import torch
from setting import gpt2_sized, processor
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.activations import hook_in, hook_out
from tclib.tasks import greater_than as gt
from tclib.tasks import unit_sweep
from tclib.transcoder import Transcoder, TranscoderConfig

LAYER, FEATURES, COUNTS = 10, 24_576, range(1, 101)
TIMED = (1, 34, 67, 100)  # counts at which the plain method runs
ACTIVE = 0.002  # about 50 of 24,576 features per token, as the published transcoders have


def random_transcoder(x: Tensor) -> Transcoder:
    """Random unit directions; the bias lets a feature fire on about `ACTIVE` of the tokens ``x`` [token, d_model]."""
    config = TranscoderConfig(
        d_in=768, d_out=768, d_features=FEATURES, hook_in=hook_in(LAYER), hook_out=hook_out(LAYER)
    )
    transcoder = Transcoder(config).requires_grad_(False)
    transcoder.W_enc.normal_().div_(transcoder.W_enc.norm(dim=0))
    transcoder.W_dec.normal_().div_(transcoder.W_dec.norm(dim=1, keepdim=True))
    transcoder.b_enc.copy_(-torch.quantile(x @ transcoder.W_enc, 1 - ACTIVE))
    return transcoder


def plain(model: TransformerBridge, tokens: Tensor, transcoder: Transcoder, kept: Tensor, ids: Tensor) -> Tensor:
    """One count of the plain method: answers [prompt, 100]."""
    mask = torch.zeros(FEATURES).index_fill(0, kept, 1.0)
    seen = {}

    def remember(x, hook):
        seen["x"] = x

    def replace(y, hook):
        return transcoder.decode(transcoder.encode(seen["x"]) * mask)

    logits = model.run_with_hooks(tokens, fwd_hooks=[(hook_in(LAYER), remember), (hook_out(LAYER), replace)])
    return logits[:, -1, ids].softmax(-1)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = gpt2_sized()
    ids = gt.year_tokens(model.tokenizer)
    prompts = gt.prompts(model.tokenizer, ["war"], [17], range(1, 99), gt.PAPER_TEMPLATE)
    tokens = prompts.tokens
    (x,) = gt.at_last_token(model, prompts, LAYER, [hook_in(LAYER)])
    transcoder = random_transcoder(x[:20])
    ranked = unit_sweep.rank_units(model, prompts, LAYER, transcoder)

    ours, theirs, reference = [], {}, {}
    for k in TIMED:  # alternating, so that both meet the same machine
        start = time.process_time()
        reference[k] = plain(model, tokens, transcoder, ranked[:k], ids)
        theirs[k] = time.process_time() - start
        start = time.process_time()
        answers = unit_sweep.keep_units(model, prompts, LAYER, COUNTS, ranked, transcoder, rest="zero")
        ours.append(time.process_time() - start)

    gaps = []
    for k, expected in reference.items():
        pair = [gt.probability_difference(a, prompts.years).mean().item() for a in (answers[k - 1], expected)]
        largest = (answers[k - 1] - expected).abs().max().item()
        gaps += [abs(pair[0] - pair[1]), largest]
        print(f"k = {k:3d}: probability difference {pair[0]:.8f}, plain {pair[1]:.8f}, largest gap of p {largest:.1e}")
    whole = statistics.fmean(theirs.values()) * len(COUNTS)
    print(f"{len(tokens)} prompts of {tokens.shape[1]} tokens, {FEATURES} features, {len(COUNTS)} counts")
    print(f"CPU: {processor()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()}")
    low, high = min(theirs.values()), max(theirs.values())
    print(f"plain: {low:.2f} to {high:.2f} CPU-s a count; {whole:.0f} for all (extrapolated)")
    print(f"ours: {min(ours):.2f} CPU-s for all, median of {len(ours)} runs {statistics.median(ours):.2f}")
    ratio = whole / statistics.median(ours)
    assert max(gaps) < 1e-6, "the values differ"
    verdict = "goal 100x met" if ratio >= 100 else "60x met, goal 100x missed" if ratio >= 60 else "60x MISSED"
    print(f"greater-than sweep: {ratio:.0f}x the plain method, values equal to {max(gaps):.0e}; {verdict}")


if __name__ == "__main__":
    main()
