"""Run the larger sweep that docs/sweeps.md reports.

    python -m making.sweep --run RUN --out data/sweep.json

Finished runs stay in RUN: the same command goes on where it was stopped, `--most N` stops after N of them, and what is
finished is written each time.
"""

import argparse
import json
from pathlib import Path

from dask.distributed import LocalCluster

from tclib.nb import declared_parameters, sweeps
from tclib.nb.sweeps.grid import expand

SEEDS = [0, 1, 2]
TOPK = {"activation": ["topk"]}
EACH = [
    *sweeps.SMALL,
    {**TOPK, "k": [256], "d_features": [128]},  # more than there are: this one fails
    {**TOPK, "k": [16], "d_features": [128, 2048]},
    {**TOPK, "k": [4, 16, 48], "layer": [0]},
]
LARGER = [{**grid, "seed": [seed]} for seed in SEEDS for grid in EACH]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the results")
    parser.add_argument("--out", type=Path, default=Path("data/sweep.json"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--most", type=int, default=1_000, help="stop after so many runs")
    options = parser.parse_args()

    notebook = json.loads(sweeps.NOTEBOOK.read_text(encoding="utf-8"))
    runs = expand(LARGER, declared_parameters(notebook))
    todo = [run for run in runs if not (options.run / sweeps.run_name(run) / "run.json").exists()]
    if todo:
        grids = [{name: [value] for name, value in run.items()} for run in todo[: options.most]]
        with LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
            sweeps.sweep(grids, options.run, cluster=cluster, progress=True)
    results = sweeps.load_results(options.run)
    sweeps.save_results(results, options.out)
    print(f"wrote {options.out}: {len(results.runs)} of {len(runs)} runs")


if __name__ == "__main__":
    main()
