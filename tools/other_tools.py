"""Open our exports with the tools they are for, and their files with ours, and compare outputs.

    PYTHONPATH=. python tools/other_tools.py --saelens PY --circuit-tracer PY --sparsify PY

Each ``PY`` is the Python of a separate environment with `sae-lens`, `circuit-tracer` or `eai-sparsify` installed (they
cannot share one with transformer-lens 4); a tool without one is skipped and said to be.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import tclib as tc
from tclib.circuits import graph, neuronpedia, pruning
from tclib.model import layer_norms
from tclib.transcoder import imitation
from tests.tiny import make_model, make_transcoder

CLOSE = 1e-5  # of the largest output
KINDS = [(activation, skip) for activation in ("relu", "jumprelu", "batchtopk") for skip in (False, True)]

SAELENS = """
import sys, numpy as np, torch
from pathlib import Path
from sae_lens import SAE
root, x = Path(sys.argv[1]), torch.from_numpy(np.load(f"{sys.argv[1]}/x.npy"))
for place in sorted(root.glob("ours_*/layer_0")):
    sae = SAE.load_from_disk(place, device="cpu")
    np.save(place.parent / "out.npy", sae(x).detach().numpy())
    sae.save_model(root / place.parent.name.replace("ours", "theirs"))
"""
CIRCUIT_TRACER = """
import sys, numpy as np, torch, yaml
from pathlib import Path
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
root, x = Path(sys.argv[1]), torch.from_numpy(np.load(f"{sys.argv[1]}/x.npy"))
for place in sorted(root.glob("ours_*")):
    config = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
    files = {i: str(place / f"layer_{i}.safetensors") for i in range(len(list(place.glob("layer_*"))))}
    hooks = config["feature_input_hook"], config["feature_output_hook"]
    layers = load_transcoder_set(files, config["scan"], *hooks, device=torch.device("cpu"), dtype=torch.float32)
    np.save(place / "out.npy", layers[0](x).detach().numpy())
    theirs = root / place.name.replace("ours", "theirs")
    layers = load_transcoder_set(
        files, config["scan"], *hooks, device=torch.device("cpu"), dtype=torch.float32, lazy_encoder=False,
        lazy_decoder=False,
    )
    layers.to_safetensors(str(theirs))
    (theirs / "config.yaml").write_bytes((place / "config.yaml").read_bytes())
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
for place in sorted(root.glob("cross_*")):
    inputs = torch.stack([x, x + 1])
    clt = load_clt(str(place), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
    np.save(place / "out.npy", clt(inputs).detach().numpy())
    theirs = root / place.name.replace("cross", "theirs_cross")
    clt.to_safetensors(str(theirs))
    (theirs / "config.yaml").write_bytes((place / "config.yaml").read_bytes())
if (root / "graph.json").exists():
    from circuit_tracer.frontend.graph_models import Model
    graph = Model.model_validate_json((root / "graph.json").read_text(encoding="utf-8"))
    ids = {node.node_id for node in graph.nodes}
    assert len(ids) == len(graph.nodes) and all({link["source"], link["target"]} <= ids for link in graph.links)
    print(f"graph JSON accepted: {len(graph.nodes)} nodes, {len(graph.links)} links")
"""
SPARSIFY = """
import sys, numpy as np, torch
from pathlib import Path
from sparsify import SparseCoder, SparseCoderConfig
root = Path(sys.argv[1])
x = torch.from_numpy(np.load(root / "x.npy"))
torch.manual_seed(0)
for skip in (False, True):
    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=64, k=6, transcode=True, skip_connection=skip))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += torch.randn_like(parameter) / 5
    place = root / f"theirs_{skip}" / "layers.0.mlp"
    coder.save_to_disk(place)
    np.save(place.parent / "out.npy", coder(x).sae_out.detach().numpy())
"""


def run(python: str, code: str, folder: Path) -> None:
    """Run code in the other environment; what it prints is shown."""
    done = subprocess.run([python, "-c", code, str(folder)], capture_output=True, encoding="utf-8")
    print(done.stdout, end="")
    if done.returncode:
        raise SystemExit(f"the other tool failed:\n{done.stderr[-3000:]}")


def compare(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"  {name}: largest difference {gap:.1e} of the largest output")
    if not gap < CLOSE:
        raise SystemExit(f"{name} differs")


def exchange(python: str, code: str, format: str, folder: Path, model) -> None:
    """Ours in the other tool, and what it saves again in ours."""
    x = torch.randn(50, 32)
    np.save(folder / "x.npy", x.numpy())
    ours = {}
    for activation, skip in KINDS:
        ours[f"{activation}_{skip}"] = {0: make_transcoder(0, activation=activation, skip=skip, k=8)}
        tc.save_transcoders(ours[f"{activation}_{skip}"], folder / f"ours_{activation}_{skip}", format)
    if format == "circuit-tracer":
        trace = tc.trace(
            tc.ReplacementModel(model, {0: make_transcoder(0), 1: make_transcoder(1)}), "w1 w2 w3 w4", check_fit=False
        )
        small = pruning.prune(graph.build_graph(trace), 0.9, 0.98)
        neuronpedia.save_graph_json(trace, small, folder, "graph", "tiny")
        cross = {kind: cross_layer(kind) for kind in ("relu", "jumprelu")}
        for kind, parts in cross.items():
            tc.save_transcoders(parts, folder / f"cross_{kind}", format)
    run(python, code, folder)
    for name, layers in ours.items():
        here = layers[0](x).numpy()
        compare(f"{name}, written by us", here, np.load(folder / f"ours_{name}" / "out.npy"))
        again = tc.load_transcoders(folder / f"theirs_{name}", device="cpu")
        compare(f"{name}, saved again by it", again[0](x).numpy(), here)

    for kind, parts in (cross if format == "circuit-tracer" else {}).items():
        here = together(parts, x)
        compare(f"{kind} cross-layer, written by us", here, np.load(folder / f"cross_{kind}" / "out.npy"))
        again = tc.load_transcoders(folder / f"theirs_cross_{kind}", device="cpu")
        compare(f"{kind} cross-layer, saved again by it", together(again, x), here)


def cross_layer(activation: str) -> dict[int, tc.Transcoder]:
    """A random cross-layer transcoder of two layers."""
    return {layer: make_transcoder(layer, activation=activation, n_writes=2 - layer) for layer in (0, 1)}


def together(parts: Mapping[int, tc.Transcoder], x: torch.Tensor) -> np.ndarray:
    """What it gives for x in layer 0 and x + 1 in layer 1."""
    z = {layer: part.encode(x + layer) for layer, part in parts.items()}
    return torch.stack([imitation(parts, layer, z, x + layer) for layer in parts]).detach().numpy()


def from_sparsify(python: str, folder: Path, model, plain) -> None:
    """sparsify's files on the true MLP input of an unprocessed model, ours on the normalised residual stream."""
    tokens = torch.arange(12)[None]
    n = model.run_with_cache(tokens)[1]["blocks.0.ln2.hook_normalized"][0]
    gain, bias = layer_norms(plain, [0])[0]
    np.save(folder / "x.npy", (n * gain + bias).numpy())
    run(python, SPARSIFY, folder)
    for skip in (False, True):
        layers = tc.load_transcoders(folder / f"theirs_{skip}", device="cpu", model=model)
        compare(
            f"topk, skip {skip}, written by it", layers[0](n).numpy(), np.load(folder / f"theirs_{skip}" / "out.npy")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for tool in ("saelens", "circuit-tracer", "sparsify"):
        parser.add_argument(f"--{tool}", metavar="PY", help=f"the Python of an environment with {tool}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make_model(folder / "model")
        plain = make_model(folder / "model", processed=False)
        for tool in ("saelens", "circuit_tracer", "sparsify"):
            python = getattr(options, tool)
            print(f"{tool}: {'skipped, no environment given' if python is None else python}")
            if python is None:
                continue
            (folder / tool).mkdir()
            if tool == "sparsify":
                from_sparsify(python, folder / tool, model, plain)
            else:
                code = SAELENS if tool == "saelens" else CIRCUIT_TRACER
                exchange(python, code, tool.replace("_", "-"), folder / tool, model)


if __name__ == "__main__":
    main()
