"""Summarise every feature of the bundled transcoders over half a million tokens of unseen chronicle text.

    python -m making.features

The index that the summary is made from (about 90 MB) is built in a scratch folder and thrown away; an interrupted run
goes on where it stopped.
"""

import shutil
import tempfile
from pathlib import Path

import tclib as tc
from tclib import text
from tclib.evaluation import ground_truth
from tclib.features import build_index, plan, save_summary, summarise
from tclib.io.paths import data_path

ROWS = 4096
SCRATCH = Path(tempfile.gettempdir()) / "tclib-features"


def main() -> None:
    model, transcoders = tc.load_model(device="cpu"), tc.load_transcoders(device="cpu")
    labelled = text.chronicle(model, ROWS)
    print(plan(tc.ReplacementModel(model, transcoders), labelled.tokens))
    built = build_index(tc.ReplacementModel(model, transcoders), labelled.tokens, SCRATCH)
    summary = summarise(built, ground_truth.truth(labelled))
    out = data_path() / "features.npz"
    save_summary(summary, out)
    print(f"{out.name}: {out.stat().st_size / 1e6:.2f} MB, {summary.about['tokens']:,} tokens")
    shutil.rmtree(SCRATCH)


if __name__ == "__main__":
    main()
