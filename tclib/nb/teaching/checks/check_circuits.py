"""Checks of notebook 04: circuits from weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tclib.attribution import attribute
from tclib.nb.teaching.verdict import accept, call, judge, numbers, random, reject
from tclib.targets import direction
from tclib.tracing import Trace


def invariant(answer: Callable[[Tensor, Tensor], float]) -> None:
    """Exercise 04.1, the input-invariant factor from ``f_dec, f_enc``.

    Expected: a little of ``f_dec`` added to a random stream, LayerNorm computed with its scale frozen, then read.
    """
    x, f_dec, f_enc = random((6,), (6,), (6,))
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


def one_layer(answer: Callable[[Trace, int, int, Tensor], Sequence[Tensor]], trace: Trace) -> None:
    """Exercise 04.2, what one layer writes at the last token, read with a direction of the stream.

    The answer returns features, error, bias, heads x sources and attention bias. Expected: the rows of `tc.attribute`
    for a direction that reads the stream after the layer.
    """
    layer, position = max(trace.transcoders), len(trace.tokens) - 1
    tried = f"all that layer {layer} writes at the last token, read with one direction"
    target = direction(trace, random((trace.model.cfg.d_model,))[0].to(trace.like), "final", 0)
    table = attribute(trace, target)
    features = torch.zeros(trace.transcoders[layer].config.d_features, dtype=torch.float64)
    heads = torch.zeros(trace.model.cfg.n_heads, position + 1, dtype=torch.float64)
    single: dict[str, float] = {}
    for row in table.query("layer == @layer").to_dict("records"):
        if row["kind"] == "feature":
            features[int(row["feature"])] = row["contribution"]
        elif row["kind"] == "head":
            heads[int(row["head"]), int(row["position"])] = row["contribution"]
        else:
            single[str(row["kind"])] = row["contribution"]
    error, bias, attention = (single.get(kind, 0.0) for kind in ("error", "transcoder_bias", "attention_bias"))

    def flat(features, error, bias, heads, attention) -> Tensor:
        return torch.cat([numbers(part).flatten() for part in (features, error, bias, heads, attention)])

    given = call(answer, tried, trace, layer, position, target.pulled_back(trace))
    try:
        given = None if given is None else flat(*given)
    except TypeError:
        reject(tried, "five things", repr(given)[:80], "return features, error, bias, heads and attention bias")
    unweighted = heads / trace.pattern(layer)[:, position].double().cpu().clamp(min=1e-30)
    mistakes = {
        "the imitation has a bias too: the error is what remains after features and b_dec": flat(
            features, error + bias, bias, heads, attention
        ),
        "the sign of the error: the MLP's output less the imitation": flat(features, -error, bias, heads, attention),
        "the MLP's output is not the error yet: take the imitation away": flat(
            features, error + bias + features.sum(), bias, heads, attention
        ),
        "the heads' values are not weighted by the pattern": flat(features, error, bias, unweighted, attention),
        "the order of the heads' result: [head, source]": flat(features, error, bias, heads.T, attention),
    }
    cause = "each is (what was written) . direction: z times decoder row, A times value times W_O"
    judge(tried, given, flat(features, error, bias, heads, attention), mistakes, cause, tolerance=1e-3)


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
