"""A process that builds an index and may be killed at any moment."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tclib.features import build
from tclib.replacement_model import ReplacementModel
from tests.tiny import make_model, make_transcoder


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = make_model(folder / "model", layers=1)
    tokens = torch.randint(0, 40, (640, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 40
    build.PART_TOKENS = build.BATCH_ROWS * 16
    build.build_index(ReplacementModel(model, {0: make_transcoder(0)}), tokens, folder / "index")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
