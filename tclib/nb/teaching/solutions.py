"""Ours, for the exercises whose answer the rest of a notebook uses: what it computes with while they are open.

The same lines are folded below each task.
"""

import pandas as pd
import torch

from tclib.blind import rules


def one_layer(trace, layer, position, direction):
    """Exercise 04.2: attribute, for one layer."""
    out = trace.cache[f"blocks.{layer}.hook_mlp_out"][position]  # [d_model]
    A = trace.cache[f"blocks.{layer}.attn.hook_pattern"][:, position]  # [head, source]
    v = trace.cache[f"blocks.{layer}.attn.hook_v"]
    v = v.repeat_interleave(trace.block(layer).group, 1)  # [source, head, d_head], shared values once for each head
    attn = trace.model.blocks[layer].attn
    W_O, b_O = attn.W_O, torch.zeros_like(direction) if attn.b_O is None else attn.b_O  # [head, d_head, d_model]
    t = trace.transcoders.get(layer)
    z = torch.zeros(1) if t is None else trace.features[layer][position]  # [d_features]
    W_dec, b_dec = (torch.zeros(1, len(out)), torch.zeros(len(out))) if t is None else (t.W_dec, t.b_dec)
    contributions = z * (W_dec @ direction)
    bias = b_dec @ direction
    error = out @ direction - contributions.sum() - bias
    brought = (v * (W_O @ direction)).sum(-1).T  # [head, source]
    return contributions, error, bias, A * brought, b_O @ direction


def path_search(sources, root, value, branches, steps):
    """Exercise 04b.1: a path search."""
    paths, rounds = [((), value, root)], []
    for _ in range(steps):
        longer = [
            ((*names, name), contribution * share, onward)
            for names, contribution, node in paths
            if node is not None
            for name, share, onward in sources(node)
        ]
        paths = sorted(longer, key=lambda path: -abs(path[1]))[:branches]
        rounds.append([path[:2] for path in paths])
    return rounds


def attention_moves(A, g, S, delta):
    """Exercise 04b.3: when one score changes."""
    grown = A.clone()
    grown[S] = A[S] * torch.tensor(delta).exp()
    return grown @ g / grown.sum() - A @ g


def blind_rule(seal):
    """Exercise 05.1: build a player for blind features."""
    rows = pd.concat([seal.reading(e) for e in range(len(seal.activations))])
    rows = rows.query("offset != 'start' and share > 0")
    if rows.empty:
        return rules.Tokens(*seal.de_embed(top=6))
    offset, prefers = rows.groupby(["offset", "prefers"])["share"].sum().idxmax()
    return rules.Tokens(*prefers, offset=int(offset))


def ablation_value(live, group, how):
    """Exercise 06b.1: build the ablation harness."""
    value = torch.zeros_like(live)
    for g in group.unique() if how != "zero" else ():
        rows = (group == g).nonzero()[:, 0]
        turned = rows.roll(int(torch.randint(1, len(rows), ())))
        value[rows] = live[rows].mean(0) if how == "mean" else live[turned]
    return value


def warmer(prob, factor):
    """Exercise 06b.2: a decided answer without a better one."""
    raised = prob ** (1 / factor)
    return raised / raised.sum()


def balanced_share(kept, empty, whole):
    """Exercise 06b.3: a share with an honest zero."""
    kept, empty, whole = ((forward - backward) / 2 for forward, backward in (kept, empty, whole))
    return (kept - empty) / (whole - empty)


def fair_start(y, a, W, kept):
    """Exercise 09.1: a fair start."""
    deviation = a - a.mean(0)
    return y.mean(0) + deviation[:, kept] @ W[kept]


def integrated(slope, x, base, steps):
    """Exercise 10.1: the way, not its end."""
    way = x - base
    mean = sum(slope(base + (i + 0.5) / steps * way) for i in range(steps)) / steps
    return way * mean


def visible_part(v, W):
    """Exercise 10.2: what does anybody read of it?."""
    return W @ (torch.linalg.pinv(W) @ v)


def orthogonal_pursuit(y, D, k):
    """Exercise 11.1: look back after each pick."""
    picks, left, sizes = [], y, y[:0]
    for _ in range(k):
        picks.append(int((D @ left).abs().argmax()))
        sizes = torch.linalg.lstsq(D[picks].T, y).solution
        left = y - sizes @ D[picks]
    z = torch.zeros(len(D), dtype=y.dtype)
    z[picks] = sizes
    return z


def label_fvu(y, kind):
    """Exercise 11b.1: what labels can explain at best."""
    answer = torch.zeros_like(y)
    for one in kind.unique():
        answer[kind == one] = y[kind == one].mean(0)
    return (y - answer).pow(2).sum() / (y - y.mean(0)).pow(2).sum()


def imitated(z, W_dec, b_dec, layer):
    """Exercise 12.1: one MLP from all layers."""
    out = b_dec[layer].clone()
    for k in range(layer + 1):
        out += z[k] @ W_dec[k][:, layer - k]
    return out


def equal_width(d_features, layers):
    """Exercise 12.2: equal parameters."""
    matrices = layers + layers * (layers + 1) / 2
    return d_features * matrices / (2 * layers)


def error_share(N, weights, errors, inputs):
    """Exercise 13.1: how much of a graph is dark?."""
    reached, now = torch.zeros_like(weights), weights
    while now.any():
        now = now @ N
        reached = reached + now
    return (reached[errors].sum() / (reached[errors].sum() + reached[inputs].sum())).item()
