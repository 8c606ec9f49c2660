"""One process of a training under torchrun: ``torchrun --nproc-per-node 2 -m tests.rank_worker MODEL OUT [CHANGES]``.

CHANGES: settings other than those of `tests.crash_worker`, as JSON.
"""

import json
import sys
from pathlib import Path

import torch

from tclib.model import load_model
from tclib.training import distributed, train_side_by_side
from tests.crash_worker import CONFIGS, config, text


def main(model_folder: str, out: str, changes: str = "{}") -> None:
    torch.set_num_threads(1)
    with distributed.processes():
        model = load_model(model_folder, device="cpu").double()
        configs = {name: config(name, **json.loads(changes)) for name in CONFIGS}
        trained, history = train_side_by_side(model, text(), [0, 1], configs, run=Path(out) / "run")
        if distributed.rank() == 0:
            history.to_json(Path(out) / "history.json", double_precision=15)
            for name, by_layer in trained.items():
                for layer, transcoder in by_layer.items():
                    transcoder.save(Path(out) / name / f"layer_{layer}", dtype=torch.float64)


if __name__ == "__main__":
    main(*sys.argv[1:])
