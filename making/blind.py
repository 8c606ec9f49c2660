"""Train the matched pair of notebook 05's blind comparison: a transcoder and an SAE that differ in nothing else.

    python -m making.blind --run RUN --out data/blind

Both belong to the last layer, have equal numbers of features and of active features per token (TopK, Gao et al. 2024),
and see the same text in the same order: chronicle and sampled text, so that nothing is needed beside data/. RUN takes
checkpoints: the same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

import torch

import tclib as tc
from tclib import training

KINDS = {"transcoder": {}, "sae": {"kind": "sae_out", "tied": True}}
ROWS = 2048  # of each text
SEED = 40  # of the chronicle documents: other ones than notebook 05 reads


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.blind", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--out", type=Path, default=Path("data/blind"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="rows of text per step")
    parser.add_argument("--d-features", type=int, default=512)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--text-rows", type=int, default=ROWS, help="rows of each text")
    options = parser.parse_args()

    model = tc.load_model(device="cpu")
    base = tc.TrainConfig(
        d_features=options.d_features, steps=options.steps, batch_rows=options.rows, lr=2e-3,
        activation="topk", k=options.k, buffer=4, bfloat16=True,
    )  # fmt: skip
    rows = [tc.load_text(model, source, options.text_rows, SEED) for source in ("chronicle", "sampled")]
    layer = model.cfg.n_layers - 1
    configs = {name: base.model_copy(update=change) for name, change in KINDS.items()}
    trained, history = training.train_side_by_side(model, torch.cat(rows), [layer], configs, run=options.run)
    for name in KINDS:
        trained[name][layer].save(options.out / name)
    print(history.groupby("name").tail(1).to_string(index=False))


if __name__ == "__main__":
    main()
