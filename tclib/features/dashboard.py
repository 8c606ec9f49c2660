"""What a feature's page shows: collected once, as tables, from an index, the weights and, if there are any, labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32

from tclib import connections, targets
from tclib.activations import hook_in, hook_out
from tclib.circuits.neuronpedia import neuronpedia_url
from tclib.evaluation.metrics import LIVE
from tclib.features import connect, search
from tclib.features.feature_activations import FeatureActivations
from tclib.features.index import Index
from tclib.inputs import bos_id
from tclib.model import token_strings
from tclib.plots import feature_name
from tclib.replacement_model import ReplacementModel, joined
from tclib.tracing import trace
from tclib.transcoder import TranscoderConfig

STRONGEST, BANDS, EACH = 5, 5, 3  # examples of the largest activations; quantile bands, and examples of each


@dataclass(frozen=True)
class Example:
    """One activation in its context."""

    band: int  # 0: among the strongest of all; 1 to n: drawn from a band, strongest band first
    low: float
    high: float
    row: int
    position: int
    tokens: list[str]
    activations: Float32[np.ndarray, " pos"]


@dataclass(frozen=True)
class Dashboard:
    """All tables of one feature. Those that need activations are empty if it never fired."""

    name: str  # mlp2[867]
    layer: int
    feature: int
    statistics: pd.Series  # tokens, count, frequency, live, mean, max
    histogram: pd.DataFrame  # low, high, count
    examples: list[Example]
    top_tokens: pd.DataFrame  # token (text), count, share, of_token, mean
    logit_lens: pd.Series  # by token, largest first, all of the vocabulary
    de_embedding: pd.Series  # the same
    incoming: pd.DataFrame  # layer, feature, input_invariant, input_x_gradient, target_weighted
    outgoing: pd.DataFrame  # the same
    heads: pd.DataFrame  # [layer, head]: length of what the feature reads through a head's OV, relative to direct
    labels: pd.DataFrame | None  # label, precision, recall, f1
    similar: pd.DataFrame  # feature, cosine of decoder rows
    link: str | None


@torch.no_grad()
def collect(
    replacement: ReplacementModel,
    index: Index,
    layer: int,
    feature: int,
    truth: pd.DataFrame | None = None,
    seed: int = 0,
) -> Dashboard:
    """Everything about one feature. No forward pass over text is run: an index holds it.

    Args:
        truth: the labels of the index's text (`tclib.evaluation.ground_truth.truth`), if it is labelled.
        seed: of the examples drawn from each quantile band.

    Raises:
        ValueError: a layer or feature that is not there, or an index made from other weights.
    """
    fired = FeatureActivations(index, layer, feature)
    feature = joined(replacement).feature(layer, fired.feature)
    model, transcoders = replacement.model, replacement.transcoders
    index.check(replacement, [layer])
    # Input-invariant numbers are the same at every prompt; BOS alone is the shortest.
    traced = trace(replacement, torch.tensor([bos_id(model) or 0]))
    target = targets.feature(traced, layer, feature, 0)
    return Dashboard(
        name=feature_name(layer, feature),
        layer=layer,
        feature=feature,
        statistics=_statistics(fired),
        histogram=fired.histogram() if fired.count else pd.DataFrame(columns=["low", "high", "count"]),
        examples=_examples(model, fired, seed) if fired.count else [],
        top_tokens=_top_tokens(model, fired),
        logit_lens=connections.logit_lens(traced, layer, feature),
        de_embedding=connections.de_embed(traced, target),
        incoming=connect.incoming(fired, transcoders),
        outgoing=connect.outgoing(fired, transcoders),
        heads=_heads(traced, target),
        labels=search.labels_of(fired, truth) if truth is not None and fired.count else None,
        similar=search.by_similarity(transcoders[layer], feature, 5),
        link=neuronpedia(transcoders[layer].config, layer, feature),
    )


def neuronpedia(config: TranscoderConfig, layer: int, feature: int) -> str | None:
    """The feature's page on Neuronpedia: of the paper's own GPT2-small transcoders there are some."""
    paper = config.model_name in ("gpt2", "gpt2-small") and config.d_features == 24_576
    if not paper or (config.hook_in, config.hook_out) != (hook_in(layer), hook_out(layer)):
        return None
    return neuronpedia_url(layer, feature)


def _statistics(fired: FeatureActivations) -> pd.Series:
    number, tokens = fired.count, fired.index.n_tokens
    share = number / max(tokens, 1)
    values = fired.values.astype(np.float32) if number else np.full(1, np.nan)
    entries = {"tokens": tokens, "count": number, "frequency": share, "live": share > LIVE}
    return pd.Series(entries | {"mean": float(values.mean()), "max": float(values.max())}, dtype=object)


def _examples(model, fired: FeatureActivations, seed: int) -> list[Example]:
    best = fired.top(STRONGEST)
    best = best.assign(band=0, low=best["activation"].min(), high=best["activation"].max())
    table = pd.concat([best, fired.bands(BANDS, EACH, seed)])
    examples = []
    for row in table.to_dict("records"):
        found = fired.context(row["row"], row["position"])
        words = token_strings(model, torch.tensor(found.tokens.tolist()))
        place = {name: row[name] for name in ("band", "low", "high", "row", "position")}
        examples.append(Example(**place, tokens=words, activations=found.activations))
    return examples


def _top_tokens(model, fired: FeatureActivations) -> pd.DataFrame:
    if not fired.count:
        return pd.DataFrame(columns=["token", "count", "share", "of_token", "mean"])
    table = fired.top_tokens()
    return table.assign(token=token_strings(model, torch.tensor(table["token"].tolist())))


def _heads(traced, target) -> pd.DataFrame:
    layers = list(traced.attention_before(target.place, target.layer))
    direct = connections.reader(traced, target).norm()

    def length(at: int, head: int) -> float:
        return (connections.reader(traced, target, [(at, head)]).norm() / direct).item()

    heads = range(traced.model.cfg.n_heads)
    return pd.DataFrame([[length(at, head) for head in heads] for at in layers], index=pd.Index(layers, name="layer"))
