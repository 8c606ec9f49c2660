"""The bundled model's attribution graph, made and written by circuit-tracer itself, in an environment of its own.

    python tests/peer_graph.py FOLDER        # with circuit-tracer's Python; `prepare(FOLDER)` comes before, with ours

The environment needs circuit-tracer 0.5 with its TransformerLens, and PYTHONPATH must not lead to ours.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ENDS = {
    "W_E": "embed.W_E",
    "W_pos": "pos_embed.W_pos",
    "W_U": "unembed.old_unembed.W_U",
    "b_U": "unembed.old_unembed.b_U",
}
ATTN, MLP = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"), ("W_in", "b_in", "W_out", "b_out")


def prepare(folder: Path, prompt: str) -> None:
    """Processed weights and transcoders of the bundled model, and the prompt as tokens, for the other side."""
    from safetensors.torch import save_file

    import tclib as tc
    from tclib.model import to_tokens

    model, transcoders = tc.load_model(device="cpu"), tc.load_transcoders(device="cpu")
    weights = {theirs: getattr(model, ours) for ours, theirs in ENDS.items()}
    for layer, block in enumerate(model.blocks):
        weights |= {f"blocks.{layer}.attn.{name}": getattr(block.attn, name) for name in ATTN}
        weights |= {f"blocks.{layer}.mlp.old_mlp.{name}": getattr(block.mlp, name) for name in MLP}
    save_file({name: w.detach().contiguous().clone() for name, w in weights.items()}, folder / "model.safetensors")
    tc.save_transcoders(transcoders, folder / "transcoders", "circuit-tracer")
    cfg = model.cfg
    sizes = {
        name: getattr(cfg, name) for name in ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab")
    }
    tokenizer = folder / "tokenizer"  # in words of the transformers that circuit-tracer has
    tokenizer.mkdir()
    shutil.copy(tc.data_path("model", "tokenizer.json"), tokenizer)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": model.tokenizer.bos_token}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    about = {"sizes": sizes, "tokens": to_tokens(model, prompt).tolist(), "prompt": prompt, "tokenizer": str(tokenizer)}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def make(folder: Path) -> None:
    """``folder/peer.json``, by circuit-tracer's own attribution, pruning and writer."""
    import torch
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    from circuit_tracer.utils import create_graph_files
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer

    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    config = HookedTransformerConfig(**about["sizes"], device="cpu", act_fn="gelu_new", normalization_type="LNPre")
    files = {i: str(folder / "transcoders" / f"layer_{i}.safetensors") for i in range(config.n_layers)}
    layers = load_transcoder_set(
        files, "bundled", "ln2.hook_normalized", "hook_mlp_out", device=torch.device("cpu"), dtype=torch.float32
    )
    model = TransformerLensReplacementModel.from_config(config, layers)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.cfg.tokenizer_name = about["tokenizer"]
    model.tokenizer = AutoTokenizer.from_pretrained(about["tokenizer"])
    graph = attribute(torch.tensor(about["tokens"]), model, batch_size=64)
    graph.input_string = about["prompt"]
    create_graph_files(graph, "peer", folder, scan="bundled")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
