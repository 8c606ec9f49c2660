"""All-pairs attribution graph at the shape of GPT-2 small or of SmolLM2-135M, beside circuit-tracer.

    python benchmarks/attribution_graph.py [--shape smollm2] [--circuit-tracer-python PATH]

Both sides read the same random model and one random transcoder per layer (of 24,576 or 4,608 features, about 50 or 20
active per token) and explain one prompt of 10 tokens, each in a process of its own with one thread. The measure is CPU
time of everything after loading: forward pass, encoding, graph. Without the other Python (it needs circuit-tracer) that
side is skipped. The last line is the headline.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from setting import processor

TOKENS = 10
BATCHES = (512, 64)  # circuit-tracer's default, and the better one on a processor
EPS, THETA = 1e-5, 10_000.0  # of RMSNorm and rotary embeddings
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the names of its weights in TransformerLens."""

    layers: int
    width: int
    features: int
    heads: int
    value_heads: int
    d_mlp: int
    vocabulary: int
    l0: int  # active features per token
    ends: tuple[str, ...]  # weights before the first and after the last block
    attn: tuple[str, ...]
    mlp: tuple[str, ...]


SHAPES = {
    "gpt2": Shape(
        12, 768, 24_576, 12, 12, 3072, 50_257, 50, ("W_E", "W_pos", "W_U", "b_U"),
        ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"), ("W_in", "b_in", "W_out", "b_out"),
    ),
    "smollm2": Shape(
        30, 576, 4_608, 9, 3, 1536, 49_152, 20, ("W_E", "W_U", "b_U"), ("W_Q", "W_K", "W_V", "W_O"),
        ("W_gate", "W_in", "W_out"),
    ),
}  # fmt: skip


def prepare(folder: Path, shape: Shape) -> None:
    """Write the model, the transcoders, and the processed weights for the other side."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import tclib as tc
    from tclib.activations import hook_in, hook_out

    torch.manual_seed(0)
    bos = shape.vocabulary - 1
    words = {f"w{i}": i for i in range(bos)} | {"<|endoftext|>": bos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder / "model")
    ends = {"bos_token_id": bos, "eos_token_id": bos}
    if "W_gate" in shape.mlp:
        config = LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.value_heads, intermediate_size=shape.d_mlp,
            max_position_embeddings=1024, rms_norm_eps=EPS, tie_word_embeddings=True, **ends,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(**ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    processed = tc.load_model(str(folder / "model"), device="cpu")
    weights = {name: getattr(processed, name) for name in shape.ends}
    for layer, block in enumerate(processed.blocks):
        parts = {"attn": (block.attn, shape.attn), "mlp": (block.mlp, shape.mlp)}
        weights |= {
            f"{layer}.{at}.{name}": getattr(part, name) for at, (part, names) in parts.items() for name in names
        }
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, folder / "processed.safetensors")
    # A normalised input has length sqrt(width), so pre-activations are standard normal: the bias sets L0.
    bias = -torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - shape.l0 / shape.features))
    width, features = shape.width, shape.features
    for layer in range(shape.layers):
        config = tc.TranscoderConfig(
            d_in=width, d_out=width, d_features=features, hook_in=hook_in(layer), hook_out=hook_out(layer)
        )
        transcoder = tc.Transcoder(config).requires_grad_(False)
        transcoder.W_enc += torch.randn(width, features) / width**0.5
        transcoder.W_dec += torch.randn(features, width) / width**0.5
        transcoder.b_enc += bias
        transcoder.b_dec += 0.1 * torch.randn(width)
        transcoder.save(folder / "transcoders" / f"layer_{layer}")
    words = torch.randint(bos, (TOKENS - 1,))
    save_file({"tokens": torch.cat([torch.tensor([bos]), words])}, folder / "tokens.safetensors")


def ours(folder: Path) -> dict:
    """Load, measure, write the adjacency."""
    import torch
    from safetensors.torch import load_file, save_file

    import tclib as tc
    from tclib.circuits.graph import build_graph, plan

    torch.set_num_threads(1)
    model = tc.load_model(str(folder / "model"), device="cpu")
    transcoders = tc.load_transcoders(folder / "transcoders", device="cpu")
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    start = time.process_time()
    trace = tc.trace(tc.ReplacementModel(model, transcoders), tokens, check_fit=False)
    traced = time.process_time() - start
    graph = build_graph(trace)
    seconds = time.process_time() - start
    nodes = graph.nodes[["layer", "position", "feature"]].astype(float).fillna(-1).astype(int)
    table = torch.tensor(nodes.to_numpy().tolist())
    kinds = {
        kind: torch.tensor((graph.nodes["kind"] == kind).tolist())
        for kind in ("feature", "error", "embedding", "target")
    }
    save_file({"adjacency": graph.adjacency, "nodes": table, **kinds}, folder / "ours.safetensors")
    flops = plan(trace).flops
    return {"seconds": seconds, "trace_seconds": traced, "flops": flops, "features": int(kinds["feature"].sum())}


def theirs(folder: Path, shape: Shape, batch: int) -> dict:
    """The same by circuit-tracer, in its own environment."""
    import torch
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
    from safetensors.torch import load_file, save_file
    from transformer_lens import HookedTransformerConfig
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    kind = {"act_fn": "gelu_new", "normalization_type": "LNPre"}
    if "W_gate" in shape.mlp:
        kind = {
            "act_fn": "silu", "normalization_type": "RMSPre", "gated_mlp": True, "n_key_value_heads": shape.value_heads,
            "positional_embedding_type": "rotary", "rotary_dim": 64, "rotary_base": THETA, "eps": EPS,
            "rotary_adjacent_pairs": False,
        }  # fmt: skip
    config = HookedTransformerConfig(
        n_layers=shape.layers, d_model=shape.width, n_ctx=1024, d_head=64, n_heads=shape.heads, d_mlp=shape.d_mlp,
        d_vocab=shape.vocabulary, device="cpu", **kind,
    )  # fmt: skip
    transcoders = {}
    for layer in range(shape.layers):
        weights = {k: v.float() for k, v in load_file(folder / "transcoders" / f"layer_{layer}.safetensors").items()}
        weights["W_enc"] = weights["W_enc"].T.contiguous()
        transcoders[layer] = SingleLayerTranscoder(
            shape.width, shape.features, torch.relu, layer, device=torch.device("cpu"), dtype=torch.float32
        )
        transcoders[layer].load_state_dict(weights)
    model = TransformerLensReplacementModel.from_config(
        config, TranscoderSet(transcoders, "ln2.hook_normalized", "hook_mlp_out")
    )
    model.load_state_dict(_their_names(load_file(folder / "processed.safetensors"), shape), strict=False)
    words = folder / "model" / "tokenizer.json"
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(words), bos_token="<|endoftext|>")
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    start = time.process_time()
    graph = attribute(tokens, model, batch_size=batch)
    seconds = time.process_time() - start
    result = {"adjacency": graph.adjacency_matrix, "features": graph.active_features}
    save_file(
        {k: v.contiguous() for k, v in result.items()} | {"logits": graph.logit_token_ids},
        folder / "theirs.safetensors",
    )
    return {"seconds": seconds, "features": len(graph.active_features)}


def _their_names(weights: dict, shape: Shape) -> dict:
    places = {"W_E": "embed.W_E", "W_pos": "pos_embed.W_pos", "W_U": "unembed.old_unembed.W_U"}
    places["b_U"] = "unembed.old_unembed.b_U"
    named = {places[name]: weights[name] for name in shape.ends}
    grouped = "_" * (shape.value_heads < shape.heads)  # the names of weights that heads share
    for layer in range(shape.layers):
        for name in shape.attn:
            theirs = f"{grouped}{name}" if name in ("W_K", "W_V") else name
            named[f"blocks.{layer}.attn.{theirs}"] = weights[f"{layer}.attn.{name}"]
        named |= {f"blocks.{layer}.mlp.old_mlp.{name}": weights[f"{layer}.mlp.{name}"] for name in shape.mlp}
    return named


def compare(folder: Path, layers: int) -> tuple[float, int]:
    """Largest |difference| over the nodes both graphs have, relative to the largest |effect|; nodes only one has.

    circuit-tracer leaves out the features and errors of position 0, biases and position embeddings.
    """
    import torch
    from safetensors.torch import load_file

    a, b = load_file(folder / "ours.safetensors"), load_file(folder / "theirs.safetensors")
    mine = {tuple(a["nodes"][i].tolist()): i for i in a["feature"].nonzero().squeeze(-1).tolist()}
    other = {tuple(key): i for i, key in enumerate(b["features"].tolist())}
    shared = sorted(mine.keys() & other.keys())
    only_one = len(other.keys() - mine.keys()) + sum(key[1] > 0 for key in mine.keys() - other.keys())
    errors = a["error"].nonzero().squeeze(-1)[torch.arange(layers * TOKENS) % TOKENS > 0]
    their_errors = torch.arange(layers * TOKENS)[torch.arange(layers * TOKENS) % TOKENS > 0] + len(other)
    n_logits = len(b["logits"])
    their_rest = torch.arange(TOKENS) + len(other) + layers * TOKENS
    targets = a["target"].nonzero().squeeze(-1)
    their_targets = torch.arange(len(b["adjacency"]))[-n_logits:]
    features, their_features = torch.tensor([mine[k] for k in shared]), torch.tensor([other[k] for k in shared])
    columns = torch.cat([features, errors, a["embedding"].nonzero().squeeze(-1)])
    x = a["adjacency"][torch.cat([features, targets])][:, columns]
    y = b["adjacency"][torch.cat([their_features, their_targets])][
        :, torch.cat([their_features, their_errors, their_rest])
    ]
    return ((x - y).abs().max() / y.abs().max()).item(), only_one


def run(python: str, *arguments: str) -> dict:
    """One side in a process of its own; its last line is its result."""
    environment = {**os.environ, **ONE_THREAD}
    # The file goes in by path, not its folder's neighbours: the other environment has no tclib.
    done = subprocess.run([python, __file__, *arguments], env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--circuit-tracer-python", default=os.environ.get("CIRCUIT_TRACER_PYTHON"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to keep the inputs (1 GB); a temporary folder by default")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        shape = SHAPES[options.shape]
        jobs = {
            "prepare": lambda folder: prepare(folder, shape), "ours": ours,
            "theirs": lambda folder: theirs(folder, shape, options.batch),
        }  # fmt: skip
        result = jobs[options.side](options.folder) or {}
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "tokens.safetensors").is_file():
            run(sys.executable, "--side", "prepare", "--folder", str(folder), "--shape", options.shape)
        report(folder, options.shape, options.circuit_tracer_python)


def report(folder: Path, shape: str, peer: str | None) -> None:
    """Run both sides and print what they took."""
    print(
        f"the shape of {shape}, {processor()}, one thread: CPU seconds after loading, peak memory of the whole process"
    )
    mine = run(sys.executable, "--side", "ours", "--folder", str(folder))
    rate = mine["flops"] / (mine["seconds"] - mine["trace_seconds"]) / 1e9
    print(
        f"tclib: {mine['features']} features (position 0 included), {mine['seconds']:.2f} s, {mine['peak_gb']:.2f} GB"
    )
    print(f"tclib: of that the forward pass {mine['trace_seconds']:.2f} s; the graph at {rate:.0f} GFLOP/s")
    if peer is None:
        print("circuit-tracer: skipped, name its Python with --circuit-tracer-python")
        print(
            f"headline: all-pairs graph in {mine['seconds']:.2f} s of CPU and {mine['peak_gb']:.2f} GB; no peer was run"
        )
        return
    seconds = {}
    for batch in BATCHES:
        other = run(peer, "--side", "theirs", "--folder", str(folder), "--shape", shape, "--batch", str(batch))
        seconds[batch] = other["seconds"]
        ratio = other["seconds"] / mine["seconds"]
        print(f"circuit-tracer, batch {batch}: {other['features']} features (position 0 left out), "
              f"{other['seconds']:.2f} s ({ratio:.1f}x), {other['peak_gb']:.2f} GB")  # fmt: skip
    difference, only_one = compare(folder, SHAPES[shape].layers)
    print(f"same adjacency to {difference:.1e} of its largest effect; {only_one} features active on one side only")
    best = min(seconds.values()) / mine["seconds"]
    print(
        f"headline: {best:.1f}x circuit-tracer's better batch size, {seconds[512] / mine['seconds']:.1f}x its default, "
        f"same adjacency to {difference:.0e}, {mine['peak_gb']:.2f} GB"
    )


if __name__ == "__main__":
    main()
