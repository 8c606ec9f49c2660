"""Sweeps: what is refused, what is kept, what survives a kill, and where it runs."""

from __future__ import annotations

import base64
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pandas as pd
import pytest
from dask.distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from making.sweep import LARGER
from tclib.checkpoints import save_transcoders
from tclib.cli import sweep as command
from tclib.evaluation import fronts
from tclib.nb import declared_parameters, sweeps
from tclib.nb.sweeps import NOTEBOOK, SMALL, Point, cluster, results, sweep_report
from tclib.nb.sweeps.grid import code_hash, expand, run_name
from tests.conftest import REPO, notebook_dict
from tests.test_freshness import LARGEST_FIGURE_DISTANCE, figure_distance
from tests.test_structure import declared_defaults, literals
from tests.tiny import WORDS, make_model, make_transcoder
from tools import sweeps_page

POINT = {
    "tokens": 10, "l0": 2.0, "fvu": 0.1, "cosine": 0.9, "dead": 0.0, "dense": 0.1, "ce": 1.0, "ce_replaced": 1.1,
    "ce_zero": 2.0, "ce_mean": 3.0, "recovered": 0.9, "kl": 0.01, "top1": 0.9,
}  # fmt: skip
CELLS = [
    "import os, time\nimport tclib as tc\nfrom tclib.nb.sweeps import Point",
    "k: int = 1  # any\nprice: float = 0.5  # any\nwait: float = 0.0  # seconds\nfate: str = 'good'  # what happens",
    "p = tc.parameters(globals(), k=tc.Parameter(1, low=0), price=tc.Parameter(0.5), wait=tc.Parameter(0.0),\n"
    "    fate=tc.Parameter('good', choices=['good', 'raise', 'die', 'silent', 'nan']))",
    "time.sleep(p.wait)\nif p.fate == 'raise':\n    raise KeyError('planted')\nif p.fate == 'die':\n    os._exit(1)",
    f"point = {POINT!r} | {{'l0': p.k}}\nif p.fate == 'nan':\n    point['fvu'] = float('nan')\n"
    "Point(**point) if p.fate != 'silent' else None",
]
DECLARED = declared_parameters(notebook_dict(CELLS))


@pytest.fixture
def notebook(tmp_path, write_notebook):
    return write_notebook(tmp_path / "toy.ipynb", CELLS, {1: "parameters"})


@pytest.fixture(scope="module")
def threads():
    """One worker with two threads in this process: notebooks side by side in one process is the hardest case."""
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client:
        yield client


def reads(folder: Path) -> dict[str, float]:
    """When each finished run was finished."""
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("*/finished")}


# The grid


@given(st.permutations(["k", "price", "wait"]), st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
def test_a_run_is_named_by_its_parameters_alone(order, ks):
    grid = {name: {"k": ks, "price": [1, 2.5], "wait": [0]}[name] for name in order}
    runs = expand(grid, DECLARED)
    assert len(runs) == 2 * len(ks) == len({run_name(run) for run in runs})
    # Spelling out a default, or writing a whole number for a float, changes nothing.
    same = expand([grid, {**grid, "price": [1.0, 2.5, 1], "fate": ["good"]}], DECLARED)
    assert [run_name(run) for run in same] == [run_name(run) for run in runs]
    assert all(run.keys() == DECLARED.keys() for run in runs)


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ({"pric": [1]}, "unknown parameter 'pric'; did you mean 'price'"),
        ({"k": [1, "two"]}, "k = 'two' has the wrong type"),
        ({"k": [-1]}, "k = -1 is out of range"),
        ({"fate": ["god"]}, "did you mean 'good'"),
        ({"k": []}, r"k = \[\] is not an axis"),
        ({"fate": "good"}, "fate = 'good' is not an axis"),
        ([], "the grid is empty"),
    ],
)
def test_bad_grids_are_refused_before_anything_runs(notebook, tmp_path, grid, sentence):
    with pytest.raises(ValueError, match=sentence):
        sweeps.sweep(grid, tmp_path / "out", notebook)
    assert not (tmp_path / "out").exists()


def test_the_grid_that_a_message_suggests_is_one_that_matters(tmp_path):
    """Its runs differ in what the architecture uses: k, say, would be ignored by relu, the default."""
    (tmp_path / "grid.json").write_text("nonsense", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as a grid") as refusal:
        command.read_grid(tmp_path / "grid.json")
    suggested = json.loads(str(refusal.value).split("such as ")[1])
    runs = expand(suggested, declared_parameters(json.loads(NOTEBOOK.read_text(encoding="utf-8"))))
    assert len({run["l1_coefficient"] for run in runs if run["activation"] == "relu"}) == len(runs) == 2
    (tmp_path / "grid.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a grid") as refusal:
        command.read_grid(tmp_path / "grid.json")
    assert json.dumps(suggested) in str(refusal.value)


def test_a_notebook_without_declared_parameters_is_refused(tmp_path, write_notebook):
    for cells, sentence in {
        "x = 1": "declares no parameters",
        "p = tc.parameters(globals(), k=tc.Parameter(low))": "k is not declared",
        "p = tc.parameters(globals(), k=tc.Parameter(1), l0=tc.Parameter(1))": "parameter 'l0', which is a column",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            sweeps.sweep({"k": [1]}, tmp_path / "out", write_notebook(tmp_path / "bad.ipynb", [cells]))


def test_the_swept_notebook_declares_what_its_tagged_cell_sets():
    parsed = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in parsed["cells"] if cell["cell_type"] == "code"]
    (tagged,) = [i for i, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", ())]
    declared = {name: parameter.default for name, parameter in declared_parameters(parsed).items()}
    assert literals("".join(code[tagged]["source"])) == declared
    assert declared_defaults("".join(code[tagged + 1]["source"])) == declared
    assert {"l1_coefficient", "d_features", "activation", "skip", "layer", "seed"} <= declared.keys()
    assert len(expand(SMALL, declared_parameters(parsed))) == 12


# The results


@pytest.mark.parametrize("change", [{"fvu": float("nan")}, {"dead": 1.5}, {"extra": 1}, {"tokens": "many"}])
def test_points_are_typed(change):
    Point(**POINT)
    with pytest.raises(ValidationError):
        Point(**(POINT | change))


def test_unwritable_folders_and_other_versions_are_refused(notebook, tmp_path, threads):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="results cannot be written to .*file.*choose another folder"):
        sweeps.sweep({"k": [1]}, tmp_path / "file" / "out", notebook)
    out = tmp_path / "out"
    sweeps.sweep({"k": [1]}, out, notebook, threads)
    about = (out / "sweep.json").read_text(encoding="utf-8")
    changed = json.loads(notebook.read_text(encoding="utf-8"))
    changed["cells"][3]["source"] += "\n1 + 1"
    other = tmp_path / "other" / notebook.name
    other.parent.mkdir()
    other.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ValueError, match="made with the notebook's code .* not .*use another folder"):
        sweeps.sweep({"k": [1]}, out, other)
    for field, sentence in {
        "tclib": "made with tclib 9, not 0",
        "format": "does not hold results of this version",
    }.items():
        (out / "sweep.json").write_text(json.dumps(json.loads(about) | {field: "9"}), encoding="utf-8")
        with pytest.raises(ValueError, match=sentence):
            sweeps.sweep({"k": [1]}, out, notebook)
    with pytest.raises(ValueError, match="there are no results"):
        sweeps.load_results(tmp_path / "nowhere")


def test_failures_are_rows_and_the_finished_are_not_run_again(notebook, tmp_path, threads):
    grid = [{"k": [3, 5]}, {"fate": ["raise", "die", "silent", "nan"]}]
    first = sweeps.sweep(grid, tmp_path / "out", notebook, threads)
    assert list(first["k"]) == [3, 5, 1, 1, 1, 1] and list(first["l0"][:2]) == [3, 5]
    reasons = first.set_index("fate")["reason"]
    assert reasons["good"].isna().all()
    assert reasons["raise"] == "in cell 5, In [5]: KeyError: 'planted'"
    assert "DeadKernelError" in reasons["die"]
    assert "shows 0 points, not one" in reasons["silent"]
    assert "fvu" in reasons["nan"] and "finite" in reasons["nan"]
    for run in first["run"]:
        assert (tmp_path / "out" / run / "notebook.ipynb").is_file()
    planted = first.set_index("fate").loc["raise", "run"]
    assert "planted" in (tmp_path / "out" / planted / "notebook.ipynb").read_text(encoding="utf-8")

    before = reads(tmp_path / "out")
    assert set(before) == set(first["run"][:2])
    # A finished one whose marker was lost, and one with half a file, are not finished.
    lost, halved = first["run"][:2]
    (tmp_path / "out" / lost / "finished").unlink()
    (tmp_path / "out" / halved / "run.json").write_text('{"parameters": {', encoding="utf-8")
    assert results.read_run(tmp_path / "out" / lost) is None and results.read_run(tmp_path / "out" / halved) is None
    again = sweeps.sweep(grid[0], tmp_path / "out", notebook, threads)
    kept = [name for name in first if name not in ("seconds", "reason")]
    pd.testing.assert_frame_equal(again[kept], first.loc[:1, kept], check_dtype=False)
    assert again["reason"].isna().all()
    finished = reads(tmp_path / "out")
    third = sweeps.sweep({"k": [3, 5, 7]}, tmp_path / "out", notebook, threads)
    assert finished.items() <= reads(tmp_path / "out").items() and list(third["l0"]) == [3, 5, 7]

    loaded = sweeps.load_results(tmp_path / "out")
    assert len(loaded.runs) == 7
    sweeps.save_results(loaded, tmp_path / "all.json")
    assert sweeps.load_results(tmp_path / "all.json") == loaded
    assert set(sweeps.table(loaded)["run"]) == set(first["run"]) | set(third["run"])


def test_a_cached_sweep_starts_nothing(notebook, tmp_path, threads):
    out = tmp_path / "out"
    sweeps.sweep({"k": [1]}, out, notebook, threads)
    # No scheduler could answer there, and none is asked.
    assert len(sweeps.sweep({"k": [1]}, out, notebook, cluster="tcp://127.0.0.1:1")) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, 2.0, float("nan")])), max_size=8))
def test_the_front_is_what_no_point_beats(pairs):
    front = pd.DataFrame(pairs, columns=["l0", "fvu"])

    def beaten(a):
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in pairs)

    expected = [not math.isnan(fvu) and not beaten((l0, fvu)) for l0, fvu in pairs]
    assert fronts.undominated(front).tolist() == expected


# Kills


def test_a_killed_worker_loses_nothing_finished(notebook, tmp_path):
    out, found = tmp_path / "out", []
    options = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options) as local, Client(local) as client:
        grid = [{"k": [1]}, {"k": [2, 3], "wait": [2]}]
        thread = threading.Thread(target=lambda: found.append(sweeps.sweep(grid, out, notebook, client)))
        thread.start()
        wait_until(lambda: len(reads(out)) == 1)
        before = reads(out)
        wait_until(lambda: len(list(out.glob("*/notebook.ipynb"))) == 3)
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        thread.join(180)
    assert found and found[0]["reason"].isna().all() and list(found[0]["l0"]) == [1, 2, 3]
    assert before.items() <= reads(out).items()


def test_a_run_that_kills_its_workers_is_a_row(tmp_path, write_notebook):
    # The kernel's parent is the worker: this notebook brings down every worker that takes it.
    cells = [*CELLS[:3], "os.kill(os.getppid(), 9)\ntime.sleep(60)"]
    notebook = write_notebook(tmp_path / "killer.ipynb", cells, {1: "parameters"})
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "silence_logs": 60}
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), LocalCluster(**options) as local:
        found = sweeps.sweep({"k": [1]}, tmp_path / "out", notebook, local)
    assert found["reason"].item() == "(KilledWorker: its workers died, one after another)"


@pytest.mark.skipif(os.name != "posix", reason="sends the signal of ctrl-C to a process group")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_sweep_goes_on_where_it_stopped(notebook, tmp_path, threads, number):
    out, code = tmp_path / "out", "import sys\nfrom pathlib import Path\nfrom tclib.cli import sweep\n"
    code += "if __name__ == '__main__':\n    sys.exit(sweep.sweep(sys.argv[2:], notebook=Path(sys.argv[1])))"
    (tmp_path / "main.py").write_text(code, encoding="utf-8")
    (tmp_path / "grid.json").write_text(json.dumps([{"k": [1]}, {"k": [2, 3], "wait": [30]}]), encoding="utf-8")
    arguments = ["--grid", str(tmp_path / "grid.json"), "--folder", str(out)]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(notebook), *arguments],
        cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        # Tests that run in the background of a shell ignore this signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_until(lambda: len(reads(out)) == 1 and len(list(out.glob("*/notebook.ipynb"))) >= 2)
    before = reads(out)
    os.killpg(process.pid, number)  # as a terminal does: to all processes of the group
    _, said = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted: what is finished is kept in" in said and "Traceback" not in said, said
    assert reads(out) == before
    assert sum(bool(run.reason) for run in sweeps.load_results(out).runs) == 0  # interrupted is not failed
    scheduler = ["--scheduler", threads.scheduler.address]
    assert command.sweep([*arguments, *scheduler, "-p", "wait", "0"], notebook=notebook) == 0
    assert before.items() <= reads(out).items() and len(reads(out)) == 3


def wait_until(condition, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


# Where it runs


def test_the_local_cluster_fits_the_machine():
    with cluster.local_cluster(tasks=1) as one:
        assert len(one.workers) == 1
        (worker,) = one.workers.values()
        assert worker.nthreads == 1 and worker.env["OMP_NUM_THREADS"] == str(dask.system.CPU_COUNT)
    with pytest.raises(ValueError, match="one run needs about 1000000 GB of memory and"):
        cluster.local_cluster(tasks=1, task_memory=10**15)


def test_what_is_handed_over_stays_open(threads):
    for handed in (threads, threads.cluster, threads.scheduler.address):
        with cluster.connected(handed, 1) as client:
            assert client.submit(sum, [1, 2], pure=False).result() == 3
    assert threads.submit(sum, [1, 2], pure=False).result() == 3


def test_an_absent_scheduler_is_one_sentence(notebook, tmp_path):
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(ValueError, match="no Dask scheduler answers at 'tcp://127.0.0.1:1'"):
            sweeps.sweep({"k": [1]}, tmp_path / "out", notebook, cluster="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("SLURMCluster", ["#SBATCH -p gpu", "#SBATCH --cpus-per-task=2", "#SBATCH --mem=8G", "#SBATCH -t 02:00:00"]),
        ("PBSCluster", ["#PBS -q gpu", "#PBS -l select=1:ncpus=2:mem=7630MB", "#PBS -l walltime=02:00:00"]),
    ],
)
def test_the_job_scripts_of_the_documentation(name, lines):
    jobqueue = pytest.importorskip("dask_jobqueue")
    example = (REPO / "docs" / "sweeps.md").read_text(encoding="utf-8")
    call = next(line for line in example.splitlines() if f"{name}(" in line).partition("=")[2]
    with eval(call, {name: getattr(jobqueue, name)}) as handed:
        script = handed.job_script()
    for line in lines:
        assert line in script, script
    assert "distributed.cli.dask_worker" in script and "--nthreads 1" in script and "OMP_NUM_THREADS=2" in script


# The command


def test_the_command_prints_a_table_and_writes_a_report(notebook, tmp_path, capsys, threads):
    (tmp_path / "grid.json").write_text('{"k": [1, 2], "price": [1.0]}', encoding="utf-8")
    arguments = ["--grid", str(tmp_path / "grid.json"), "--folder", str(tmp_path / "out")]
    arguments += ["--scheduler", threads.scheduler.address, "-p", "fate", "['good', 'raise']"]
    assert command.sweep(arguments, notebook=notebook) == 1
    printed = capsys.readouterr()
    assert "planted" in printed.out and str(tmp_path / "out" / "report.md") in printed.out
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "4 runs over `k`, `fate`; 2 have a point." in report and "planted" in report and "![" in report
    assert (tmp_path / "out" / "fronts.png").read_bytes().startswith(b"\x89PNG")
    assert "k=1, fate=good: L0 1.0, FVU 0.100" in printed.out + printed.err and "4/4" in printed.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-p", "lyer", "1"], "unknown parameter 'lyer'; did you mean 'layer'?"),
        (["--grid", "nowhere.json"], "nowhere.json cannot be read as a grid"),
        (["-p", "kind", "sea_in"], "did you mean 'sae_in'?"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, capsys, arguments, sentence):
    assert command.sweep([*arguments, "--folder", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert sentence in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


# The report


def run_at(l0: float, fvu: float, tokens: int = 100, **parameters) -> results.Run:
    defaults = {"layer": -1, "activation": "topk", "skip": False, "d_features": 64, "k": 8, "seed": 0}
    point = Point(**POINT | {"l0": l0, "fvu": fvu, "tokens": tokens})
    parameters = defaults | {"steps": 5, "rows": 2, "measured_rows": 10} | parameters
    return results.Run(parameters=parameters, seconds=1, point=point)


def swept(*runs: results.Run) -> results.Results:
    return results.Results(about=results.About(notebook="x", code="x"), runs=list(runs))


def curves(shift: float) -> results.Results:
    """Two architectures whose fronts are ``shift`` apart, at L0 that differ."""
    noise = {0: -0.002, 1: 0.0, 2: 0.002}
    return swept(
        *(
            run_at(k * stretch, 0.5 / k + sign * noise[seed] + lead, k=k, seed=seed, activation=activation)
            for activation, stretch, lead, sign in (("relu", 1.1, shift, -1), ("topk", 1.0, 0.0, 1))
            for k in (4, 8, 16)
            for seed in noise
        )
    )


def test_a_gap_is_told_from_shuffled_names():
    found = sweep_report.gaps(sweep_report.points(curves(0.05)), ["activation", "k"])
    (row,) = found.itertuples()
    assert row.pair == "relu minus topk" and row.low < row.gap < row.high and row.gap > row.most > row.shuffled
    alike = sweep_report.gaps(sweep_report.points(curves(-0.007)), ["activation", "k"]).iloc[0]
    assert alike["least"] <= alike["gap"] <= alike["most"] and row.gap - alike["gap"] == pytest.approx(0.057)


def test_lines_that_share_no_l0_are_not_compared():
    far = swept(*(run_at(l0 + 50 * (a == "relu"), 0.1, k=l0, activation=a) for a in ("relu", "topk") for l0 in (4, 8)))
    assert sweep_report.gaps(sweep_report.points(far), ["activation", "k"]).empty
    assert "At equal sparsity" not in sweep_report.text(far, "x.png")


@given(st.lists(st.tuples(st.floats(0.5, 50), st.floats(0.01, 1)), min_size=1, max_size=8), st.integers(0, 3))
def test_points_keep_what_has_a_place_on_a_front(pairs, failed):
    runs = [run_at(l0, fvu, seed=i) for i, (l0, fvu) in enumerate(pairs)]
    runs += [results.Run(parameters={"k": i}, seconds=0, reason="planted") for i in range(failed)]
    found = sweep_report.points(swept(*runs))
    assert len(found) == len(pairs) and found["front"].any()
    best = found.loc[found["fvu"].idxmin()]
    assert found[found["front"]]["l0"].max() <= best["l0"] and found["ce_increase"].round(6).eq(0.1).all()


def test_a_wide_dictionary_that_is_worse_is_called_under_trained():
    widths = {16: 0.2, 64: 0.1, 256: 0.15}
    report = sweep_report.text(swept(*(run_at(4.0, fvu, d_features=n) for n, fvu in widths.items())), "x.png")
    # 5 steps of 2 rows of 10 tokens, of which 4 in 256 features
    assert "256 features leave more unexplained than 64: 0.150 against 0.100. That is no reason" in report
    assert "fired 2 times in training, and one of the best 6 times" in report
    better = sweep_report.text(swept(*(run_at(4.0, 1 / n, d_features=n) for n in widths)), "x.png")
    assert "The widest dictionary leaves least unexplained." in better and "under-trained" not in better


def test_a_sweep_of_one_run_and_of_none_that_worked():
    assert sweep_report.text(swept(run_at(4.0, 0.1)), "x.png").startswith("1 runs; 1 have a point.\n\n![")
    failed = swept(results.Run(parameters={"k": 1}, seconds=0, reason="planted"))
    assert sweep_report.text(failed, "x.png") == "1 runs; 0 have a point. 1 failed, and say why: `planted`."


def test_the_page_of_the_documentation_is_fresh(tmp_path):
    page = (REPO / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert page == sweeps_page.fresh_page(), "run: python tools/sweeps_page.py"
    sweep_report.figure(sweeps.load_results(), tmp_path / "fresh.png")
    both = [REPO / "docs" / "sweeps.png", tmp_path / "fresh.png"]
    assert (
        figure_distance(*(base64.b64encode(path.read_bytes()).decode() for path in both)) < LARGEST_FIGURE_DISTANCE
    ), "run: python tools/sweeps_page.py"


# With a model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a tiny model and its transcoders, and a text for it."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model(folder / "model")
    save_transcoders({layer: make_transcoder(layer) for layer in (0, 1)}, folder / "transcoders")
    (folder / "text.txt").write_text(" ".join(WORDS[i * i % 40] for i in range(12_000)), encoding="utf-8")
    return model, {name: str(folder / name) for name in ("model", "transcoders")} | {"text": str(folder / "text.txt")}


def test_a_real_run(tiny, tmp_path, threads):
    _, names = tiny
    fixed = {"model": [names["model"]], "text": [names["text"]], "d_features": [32], "steps": [6], "rows": [2]}
    found = sweeps.sweep({**fixed, "activation": ["topk"], "k": [4]}, tmp_path / "out", cluster=threads).iloc[0]
    assert found["reason"] is None and found["l0"] <= 4 and found["fvu"] > 0 and 0 <= found["top1"] <= 1


# What is bundled


def test_the_bundled_results_are_of_the_script_and_of_this_notebook():
    loaded, parsed = sweeps.load_results(), json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert loaded.about.code == code_hash(parsed)
    names = {sweeps.run_name(parameters) for parameters in expand(LARGER, declared_parameters(parsed))}
    assert {sweeps.run_name(run.parameters) for run in loaded.runs} <= names and len(loaded.runs) >= 12
