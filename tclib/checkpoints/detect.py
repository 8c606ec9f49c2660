"""Which tool wrote a set of transcoders, from the names of its files. Two answers or none are refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tclib.checkpoints import readers
from tclib.checkpoints.clt_reader import circuit_tracer_cross_layer
from tclib.checkpoints.lazy import Stored

PAPERS = "the paper's"
SPARSITY = "_log_feature_sparsity.pt"


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint: which files hold the weights of a layer, what lies beside them, and who reads them."""

    name: str
    weights: str  # a pattern for the file's name
    beside: Callable[[str], list[str]]  # from the weights' name without suffix
    needs: str | None  # a file of this name in the same folder tells it from formats with equal weights' names
    open: Callable[[Path], Stored]


FORMATS = (
    Format(
        "circuit-tracer", r"layer_\d+\.safetensors", lambda stem: ["config.yaml"], "config.yaml", readers.circuit_tracer
    ),
    Format(
        "circuit-tracer's cross-layer",
        r"W_enc_\d+\.safetensors",
        lambda stem: ["config.yaml", f"{stem.replace('W_enc', 'W_dec')}.safetensors"],
        None,
        circuit_tracer_cross_layer,
    ),
    Format("tclib", r"layer_\d+\.safetensors", lambda stem: [f"{stem}.json"], None, readers.native),
    Format(PAPERS, r".+\.pt", lambda stem: [stem + SPARSITY], None, readers.original),
    Format("SAELens", r"sae_weights\.safetensors", lambda stem: ["cfg.json"], None, readers.saelens),
    Format("sparsify", r"sae\.safetensors", lambda stem: ["cfg.json"], None, readers.sparsify),
    Format("Gemma Scope", r"params\.npz", lambda stem: [], None, readers.gemma_scope),
)


def by_name(name: str) -> bool:
    """Whether a .pt file has the name of the paper's checkpoints, where its content is not at hand."""
    return "sparse_autoencoder" in PurePosixPath(name).name


def detect(
    names: Iterable[str], where: str, is_papers: Callable[[str], bool | None] = by_name
) -> tuple[Format, list[str]]:
    """The format, and the files of weights.

    Args:
        names: files relative to the place, with forward slashes.
        where: the place, for the sentences.
        is_papers: whether a .pt is the paper's, and no optimizer or trainer; None: it cannot be told.

    Raises:
        ValueError: no format, or several.
    """
    names = set(names)
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(SPARSITY):
            continue
        path = PurePosixPath(name)
        for kind in FORMATS:
            beside = kind.needs is None or str(path.with_name(kind.needs)) in names
            if beside and re.fullmatch(kind.weights, path.name):
                found.setdefault(kind.name, []).append(name)
                break
    if papers := found.pop(PAPERS, []):
        others = bool(found)
        sure = {name: is_papers(name) for name in papers}
        kept = [name for name in papers if sure[name] or (sure[name] is None and not others)]
        if kept or not others:
            found[PAPERS] = kept or papers
    if len(found) > 1:
        raise ValueError(
            f"{where} holds transcoders of {len(found)} formats ({', '.join(found)}): give the folder of one"
        )
    for kind in FORMATS:
        if kind.name in found:
            _one_per_layer(found[kind.name])
            return kind, found[kind.name]
    raise ValueError(
        f"there are no transcoders in {where}: expected layer_0.safetensors, ..., or the files of the paper's "
        "checkpoints (.pt), SAELens (sae_weights.safetensors), sparsify (sae.safetensors) or Gemma Scope (params.npz)"
    )


def _one_per_layer(weights: list[str]) -> None:
    """Refuse two files of one layer where names tell, before a repository of many sizes is downloaded."""
    seen: dict[str, str] = {}
    for name in weights:
        found = re.search(r"(?:^|/)layer_(\d+)(?:/|\.)", name)
        if found and seen.setdefault(found[1], name) != name:
            raise ValueError(
                f"layer {found[1]} is there twice, {seen[found[1]]} and {name}: give the folder or the file of one"
            )


def needed(kind: Format, weights: list[str], names: Iterable[str]) -> list[str]:
    """The files of weights and their companions, among the files that there are."""
    paths = [PurePosixPath(name) for name in weights]
    beside = {str(path.with_name(other)) for path in paths for other in kind.beside(path.stem)}
    return sorted({*weights, *(beside & set(names))})
