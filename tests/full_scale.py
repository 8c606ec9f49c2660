"""A model of GPT2-small's shape and twelve transcoders of the published size, all random, in the published files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tclib as tc
from tclib.activations import mlp_activations
from tclib.io.paths import data_path
from tests import foreign
from tests.conftest import REPO

LAYERS, WIDTH, FEATURES = 12, 768, 24_576
RARE = -2.9  # of standard deviations: about 50 of the features are active on a token, as in the published ones
TOKENIZER = REPO.parent / "shared" / "gpt2-tokenizer"


def build(folder: Path) -> tuple[Path, Path]:
    """Write the model's folder (0.5 GB) and the transcoders' (1.8 GB).

    The transcoders know nothing but the mean of their MLP's outputs, so that they are nearer to it than zero is.
    """
    model, transcoders = folder / "model", folder / "transcoders"
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config())  # the default configuration is GPT2-small's
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "ln_" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(model)
    tokenizer = TOKENIZER if TOKENIZER.is_dir() else data_path("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, model)
    lm = tc.load_model(str(model), device="cpu")
    tokens = torch.randint(0, 5000, (1, 256))
    tokens[:, 0] = lm.tokenizer.bos_token_id
    (batch,) = mlp_activations(lm, tokens, range(LAYERS))
    for layer, seen in batch.items():
        w = foreign.weights(layer, WIDTH, FEATURES)
        y = seen.y[0, 1:]
        foreign.original(
            transcoders, layer, layer, WIDTH, FEATURES,
            b_dec_out=y.mean(0), b_enc=w["b_enc"] + RARE, W_dec=0.05 * y.norm(dim=1).mean() * w["W_dec"],
        )  # fmt: skip
    return model, transcoders
