"""Checks of notebook 04: circuits from weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tclib.nb.teaching.verdict import accept, call, judge, reject
from tclib.tracing import Trace


def invariant(answer: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 04.1, the input-invariant factor from ``f_dec, f_enc``.

    Expected: a little of ``f_dec`` added to a random stream, LayerNorm computed with its scale held, then read.
    """
    x, f_dec, f_enc = _random((6,), (6,), (6,))
    f_dec, f_enc = f_dec + 0.5, f_enc + 1.0  # means that are far from zero
    tried = "a little of f_dec added to a stream of width 6, and what f_enc reads after LayerNorm"
    sigma = x.std(correction=0)

    def read(stream: Tensor) -> float:
        return float(((stream - stream.mean()) / sigma) @ f_enc)

    expected = (read(x + 1e-3 * f_dec) - read(x)) / 1e-3 * sigma
    mistakes = {
        "LayerNorm's centring is missing: it takes the mean out of what is read": f_dec @ f_enc,
        "that is a cosine: lengths belong to the factor": torch.cosine_similarity(f_dec, f_enc, dim=0),
        "that is not summed over the coordinates yet": f_dec * (f_enc - f_enc.mean()),
        "that reads with f_dec what f_dec wrote": f_dec @ (f_dec - f_dec.mean()),
    }
    judge(tried, call(answer, tried, f_dec, f_enc), expected, mistakes, "which of z, sigma, f_dec, f_enc are weights?")


def through_head(answer: Callable[[Tensor, Tensor, Tensor, Tensor], float]) -> None:
    """Exercise 04.2, the invariant factor through a head from ``f_dec, W_V, W_O, f_enc``.

    Expected: a little of ``f_dec`` added at the source and followed through both LayerNorms with scale 1.
    """
    x, f_dec, W_V, W_O, f_enc = _random((6,), (6,), (6, 3), (3, 6), (6,))
    f_dec, f_enc = f_dec + 0.5, f_enc + 1.0
    tried = "a little of f_dec at the source, followed through a head of width 3 to f_enc"

    def read(stream: Tensor) -> float:
        out = (stream - stream.mean()) @ W_V @ W_O
        return float((out - out.mean()) @ f_enc)

    expected = (read(x + 1e-3 * f_dec) - read(x)) / 1e-3
    centred, reader = f_dec - f_dec.mean(), f_enc - f_enc.mean()
    mistakes = {
        "both LayerNorms are missing: the head's and the target's centring": f_dec @ W_V @ W_O @ f_enc,
        "the target's LayerNorm is missing: f_enc reads a centred stream": centred @ W_V @ W_O @ f_enc,
        "the head's LayerNorm is missing: it reads a centred stream too": f_dec @ W_V @ W_O @ reader,
        "the order: W_V reads the stream, W_O writes to it": centred @ W_O.T @ W_V.T @ reader,
        "that leaves out the head": f_dec @ reader,
    }
    judge(tried, call(answer, tried, f_dec, W_V, W_O, f_enc), expected, mistakes, "from left to right, as it flows")


def two_tokens(
    answer: Callable[[], Sequence[int]] | Sequence[int],
    trace: Trace,
    layer: int,
    written: Float[Tensor, " d_model"],
    read: Float[Tensor, " d_model"],
    inputs: Float[Tensor, "token d_model"],
) -> None:
    """Exercise 04.3, the tokens with the largest and the smallest factor of one SAE feature.

    Expected: the MLP run on each input plus and minus a little of ``written``, its output read with ``read``.
    """
    tried = f"the MLP run on {len(inputs)} inputs, each moved a little both ways along the SAE feature"
    norm, mlp = trace.block(layer).before_mlp, trace.model.blocks[layer].mlp
    assert norm is not None
    step = 0.01 * inputs.norm(dim=1).mean() / written.norm()
    with torch.no_grad():
        up, down = (mlp((norm.gain * (inputs + s * written) + norm.bias)[None])[0] for s in (step, -step))
    factors = (up - down) @ read / (2 * step)
    high, low = int(factors.argmax()), int(factors.argmin())
    wanted = f"({high}, {low}), with factors {factors[high]:.3f} and {factors[low]:.3f}"
    given = call(answer, tried)
    try:
        first, second = (int(i) for i in given)
        found = factors[first], factors[second]
    except (TypeError, ValueError, IndexError):
        cause = f"two numbers from 0 to {len(inputs) - 1} are wanted: places among these inputs, not among all tokens"
        reject(tried, wanted, repr(given)[:80], cause)
    room = 0.02 * (factors[high] - factors[low])
    if found[0] >= factors[high] - room and found[1] <= factors[low] + room:
        return accept(tried)
    came_back = f"({first}, {second}), with factors {found[0]:.3f} and {found[1]:.3f}"
    if first == second:
        cause = "one token came back twice, so nothing is compared"
    elif found[0] <= factors[low] + room and found[1] >= factors[high] - room:
        cause = "the order: first the token with the largest factor"
    elif first == int(factors.abs().argmin()) or second == int(factors.abs().argmin()):
        cause = "the smallest factor is the most negative one, not the one nearest to zero"
    else:
        cause = "the factor is one number per token: the row of `pulled` times the SAE's decoder row"
    reject(tried, wanted, came_back, cause)


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
