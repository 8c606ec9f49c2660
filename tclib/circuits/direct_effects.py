"""Effects over all attention paths, as products of weights: the linear algebra under `tclib.circuits.graph`.

Between transcoders the frozen model is linear. A reader G[source position, target, d_model] is pulled back layer by
layer, the readers of one position together and only to the positions they can see:

    G <- G + sum_h  A_h^T  G W_O_h^T W_V_h^T / scale        A_h: pattern [reading position, source position]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.sources import Biases, Features, of_attention, of_mlp, skip_path
from tclib.targets import Target
from tclib.tracing import Trace

CHUNK = 256  # readers pulled back together: more would leave the processor's cache


@dataclass(frozen=True)
class Readers:
    """Vectors that read the residual stream of one position each.

    ``stages`` say when: 2 * layer before a layer's attention, one more after it. (GPT-NeoX's MLPs read before it.)
    """

    vectors: Float[Tensor, "n d_model"]
    positions: Int[Tensor, " n"]
    stages: Int[Tensor, " n"]
    biases: Float[Tensor, " n"]  # b_enc or b_U, and the LayerNorm's own bias
    values: Float[Tensor, " n"]  # the pre-activations or logits themselves

    @classmethod
    def of_targets(cls, trace: Trace, targets: Sequence[Target]) -> Readers:
        """One reader per target."""
        like = trace.like
        return cls(
            torch.stack([t.pulled_back(trace) for t in targets]),
            torch.tensor([t.position for t in targets], device=like.device),
            torch.tensor([trace.stage(t.place, t.layer) for t in targets], device=like.device),
            like.new_tensor([t.bias + t.norm_bias(trace) for t in targets]),
            like.new_tensor([t.value(trace) for t in targets]),
        )

    @classmethod
    def of_features(cls, trace: Trace, features: pd.DataFrame) -> Readers:
        """One reader per feature, in order; ``features`` has layer, position and feature, and is sorted by layer."""
        none = trace.tokens[:0]
        parts = [cls(trace.residual("final", 0)[:0], none, none, trace.like[:0, 0], trace.like[:0, 0])]
        for layer in features["layer"].unique().tolist():
            table = features[features["layer"] == layer]
            transcoder = trace.transcoders[layer]
            index = torch.tensor(table["feature"].tolist(), device=trace.like.device)
            positions = torch.tensor(table["position"].tolist(), device=trace.like.device)
            vectors = trace.pull_norm("mlp_in", layer, transcoder.W_enc[:, index].T, positions)
            values = (vectors * trace.residual("mlp_in", layer)[positions]).sum(-1) + transcoder.b_enc[index]
            stages = torch.full_like(positions, trace.stage("mlp_in", layer))
            parts.append(cls(vectors, positions, stages, transcoder.b_enc[index], values))
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Tensor) -> Readers:
        return Readers(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


class Sources:
    """Everything that writes to one prompt's residual stream, ready to be read.

    ``features`` lists the active ones (layer, position, feature, activation), ``others`` the remaining sources: error
    or whole MLP per layer and position, token and position embeddings, and one for all biases.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self.pos = len(trace.tokens)
        self.features = pd.concat(
            [_active(layer, z) for layer, z in sorted(trace.features.items())] or [_active(0, None)]
        )
        self.constants = _constants(trace)
        self.written, self.starts, self.errors = {}, {}, {}
        for layer in range(trace.model.cfg.n_layers):
            self._collect(layer)
        self.embeddings = [trace.cache[n] for n in ("hook_embed", "hook_pos_embed") if n in trace.cache]
        self.others = self._list_others()
        blocks = [trace.block(layer) for layer in range(trace.model.cfg.n_layers)]
        self.W_O = [block.W_O.flatten(0, 1).T for block in blocks]  # [d_model, head * d_head]
        gains = [trace.gain("attn_in", layer)[0] for layer in range(len(blocks))]
        scaled = [block.W_V.mT * gain for block, gain in zip(blocks, gains, strict=True)]
        # [value head, d_head, d_model]
        self.W_V = [trace.centre("attn_in", layer, w) for layer, w in enumerate(scaled)]

    @property
    def width(self) -> int:
        """How many sources there are."""
        return len(self.features) + len(self.others)

    def effects(
        self, readers: Readers, out: Float[Tensor, "reader source"] | None = None
    ) -> Float[Tensor, "reader source"]:
        """The effect of every source (features, then others) on every reader; rows sum to the readers' values."""
        out = readers.vectors.new_empty(len(readers), self.width) if out is None else out
        for position in readers.positions.unique().tolist():
            rows = (readers.positions == position).nonzero().squeeze(-1)
            rows = rows[readers.stages[rows].argsort(descending=True, stable=True)]
            for chunk in rows.split(CHUNK):
                out[chunk] = self._pull_back(readers[chunk], position)
        out[:, -1] = (self.constants[readers.stages, readers.positions] * readers.vectors).sum(-1) + readers.biases
        return out

    def _pull_back(self, readers: Readers, position: int) -> Tensor:
        """`effects`, without biases, of readers at one position in the order of falling stages."""
        seen = position + 1
        block = readers.vectors.new_zeros(len(readers), self.width)
        gradient = readers.vectors.new_zeros(seen, 0, readers.vectors.shape[-1])
        for layer in reversed(range(self.trace.model.cfg.n_layers)):
            gradient = torch.cat([gradient, self._at(readers.vectors[readers.stages == 2 * layer + 2], seen)], 1)
            self._read(block, gradient, layer)
            before = gradient
            gradient = self._through_skip(gradient, layer)
            moved = self._moved(before if self.trace.parallel else gradient, layer)
            if layer:
                gradient.view(-1, gradient.shape[-1]).addmm_(moved.flatten(0, 1), self.W_V[layer].flatten(0, 1))
            else:  # only embeddings are left to be read, and their values are few
                self._read_embeddings(block, moved, [e @ self.W_V[0].flatten(0, 1).T for e in self.embeddings])
            first = self._first(readers.vectors[readers.stages == 2 * layer + 1], layer, seen)
            gradient = torch.cat([gradient, first], 1)
        gradient = torch.cat([gradient, self._at(readers.vectors[readers.stages == 0], seen)], 1)
        self._read_embeddings(block, gradient, self.embeddings)
        return block

    def _read(self, block: Tensor, gradient: Tensor, layer: int) -> None:
        seen, count, _ = gradient.shape
        for at, written in self.written[layer].items():
            starts = self.starts[at]
            for source in range(seen):
                low, high = starts[source], starts[source + 1]
                block[:count, low:high] += gradient[source] @ written[low - starts[0] : high - starts[0]].T
        start = len(self.features) + layer * self.pos
        block[:count, start : start + seen] = _dot(gradient, self.errors[layer][:seen])

    def _read_embeddings(self, block: Tensor, gradient: Tensor, embeddings: list[Tensor]) -> None:
        seen, count, _ = gradient.shape
        start = len(self.features) + len(self.errors) * self.pos
        for embedding in embeddings:
            block[:count, start : start + seen] += _dot(gradient, embedding[:seen])
            start += self.pos

    def _moved(self, gradient: Tensor, layer: int) -> Float[Tensor, "source reader head_x_d_head"]:
        """Readers of attention's output as readers of its values, at the positions where those are taken."""
        seen, count, width = gradient.shape
        pattern = self._pattern(layer, seen)
        (heads, _, _), (kept, d_head, _) = pattern.shape, self.W_V[layer].shape
        read = (gradient.reshape(-1, width) @ self.W_O[layer]).view(seen, count, heads, d_head)
        moved = pattern.mT @ read.permute(2, 0, 1, 3).reshape(heads, seen, count * d_head)
        if heads > kept:  # heads that share their values
            moved = moved.view(kept, heads // kept, seen, count * d_head).sum(1)
        return moved.view(kept, seen, count, d_head).permute(1, 2, 0, 3).reshape(seen, count, kept * d_head)

    def _first(self, vectors: Tensor, layer: int, seen: int) -> Tensor:
        """Attention's first step, from one position to all: once per head, then spread, is cheaper there."""
        gradient = self._at(vectors, seen)
        if not len(vectors):
            return gradient
        pattern = self._pattern(layer, seen)[:, -1]  # [head, source]
        values = (vectors @ self.W_O[layer]).view(len(vectors), len(pattern), -1)
        by_head = values.transpose(0, 1) @ self.trace.block(layer).per_head(self.W_V[layer])  # [head, reader, d_model]
        gradient.view(seen, -1).addmm_(pattern.T, by_head.reshape(len(pattern), -1))
        return gradient

    def _through_skip(self, gradient: Tensor, layer: int) -> Tensor:
        transcoder = self.trace.transcoders.get(layer)
        if transcoder is None or transcoder.W_skip is None:
            return gradient
        where = torch.arange(gradient.shape[0], device=gradient.device)[:, None].expand(gradient.shape[:2])
        after = self.trace.after_mlp(layer)
        written = gradient
        if after is not None:
            written = after.centre(gradient * after.gain) / self.trace.frozen_scale(after)[where, None]
        return gradient + self.trace.pull_norm("mlp_in", layer, written @ transcoder.W_skip.T, where)

    def _pattern(self, layer: int, seen: int) -> Float[Tensor, "head to source"]:
        return self.trace.pattern(layer)[:, :seen, :seen] / self.trace.scale("attn_in", layer)[:seen]

    def _at(self, vectors: Tensor, seen: int) -> Float[Tensor, "source reader d_model"]:
        gradient = vectors.new_zeros(seen, *vectors.shape)
        gradient[-1] = vectors
        return gradient

    def _collect(self, layer: int) -> None:
        every = torch.arange(self.pos, device=self.trace.like.device)
        self.written[layer] = {}  # by the layer that features read at
        if layer in self.trace.features:
            before = int((self.features["layer"] < layer).sum())
            counts = (self.trace.features[layer] != 0).sum(-1)
            self.starts[layer] = [before, *(before + counts.cumsum(0)).tolist()]
        for source in of_mlp(self.trace, layer):
            if isinstance(source, Features):
                self.written[layer][source.layer] = source.written[2]
            elif source.kind in ("error", "mlp"):
                self.errors[layer] = source.vectors(every)

    def _list_others(self) -> pd.DataFrame:
        layers, positions = range(self.trace.model.cfg.n_layers), range(self.pos)
        kinds = {layer: "error" if layer in self.trace.transcoders else "mlp" for layer in layers}
        rows = [{"kind": kinds[layer], "layer": layer, "position": p} for layer in layers for p in positions]
        for kind, _ in zip(("embedding", "position"), self.embeddings, strict=False):
            rows += [{"kind": kind, "position": p} for p in positions]
        return pd.DataFrame([*rows, {"kind": "bias"}])


def shares(effects: Float[Tensor, "target source"]) -> Float[Tensor, "target source"]:
    """Absolute effects, each row divided by its sum (rows of zeros stay zero)."""
    size = effects.abs()
    return size / size.sum(1, keepdim=True).clamp(min=1e-10)


def influence_of_columns(
    effects: Float[Tensor, "row source"], weights: Float[Tensor, " target"], known: Int[Tensor, " feature"]
) -> Float[Tensor, " source"]:
    """`pruning.influence` where only some features' rows are known: ``effects`` has theirs, then the targets'.

    The last source is the bias and takes no share.
    """
    share = shares(torch.cat([effects[:, :-1], torch.zeros_like(effects[:, -1:])], 1))
    current = weights @ share[len(known) :]
    total = torch.zeros_like(current)
    while current.any():
        total = total + current
        current = current[known] @ share[: len(known)]
    return total


def _dot(gradient: Float[Tensor, "s n d"], vectors: Float[Tensor, "s d"]) -> Float[Tensor, "n s"]:
    return (gradient @ vectors[:, :, None])[..., 0].T


def _active(layer: int, z: Tensor | None) -> pd.DataFrame:
    columns = ["kind", "layer", "position", "feature", "activation"]
    if z is None:
        return pd.DataFrame(columns=columns)
    positions, index = z.nonzero(as_tuple=True)
    values = ["feature", layer, positions.cpu(), index.cpu(), z[positions, index].cpu()]
    return pd.DataFrame(dict(zip(columns, values, strict=True)))


def _constants(trace: Trace) -> Float[Tensor, "stage pos d_model"]:
    """The residual stream at every stage as it were if biases alone had written to it."""
    stream, stages = torch.zeros_like(trace.like), []
    for layer in range(trace.model.cfg.n_layers):
        block, (gain, bias) = trace.block(layer), trace.gain("attn_in", layer)
        read = trace.normalised("attn_in", layer, stream) * gain + bias
        moved = trace.pattern(layer) @ block.per_head(torch.einsum("sd,hde->hse", read, block.W_V))
        after = stream + torch.einsum("hte,hed->td", moved, block.W_O)
        biases = [source for source in of_attention(trace, layer) if isinstance(source, Biases)]
        stages += [stream, sum((source.over @ source.biases for source in biases), after)]
        read, stream = trace.normalised("mlp_in", layer, stages[-2 if trace.parallel else -1]), stages[-1]
        for source in of_mlp(trace, layer):
            if isinstance(source, Biases):
                stream = stream + source.over @ source.biases
            elif source.kind == "skip":
                stream = stream + skip_path(trace, layer, read)
    return torch.stack([*stages, stream])
