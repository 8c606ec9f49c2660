"""One process of a training under torchrun: ``torchrun --nproc-per-node 2 -m tests.rank_worker MODEL OUT [CHANGES]``.

CHANGES: settings other than those of `tests.crash_worker`, as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tclib.model import load_model
from tclib.training import distributed, train_side_by_side
from tests.conftest import REPO
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


def launch(folder: Path, processes: int, **changes) -> None:
    """Train the model in ``folder`` under torchrun, into a folder named by the number of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.rank_worker", str(folder / "model"), str(folder / str(processes)), json.dumps(changes)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, encoding="utf-8", timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_one_and_two_agree(folder: Path) -> None:
    for name in CONFIGS:
        for layer in (0, 1):
            one, two = (load_file(folder / str(n) / name / f"layer_{layer}.safetensors") for n in (1, 2))
            for key in one:
                torch.testing.assert_close(one[key], two[key], rtol=1e-8, atol=1e-9, msg=f"{name} {layer} {key}")


if __name__ == "__main__":
    main(*sys.argv[1:])
