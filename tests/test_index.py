"""The index: what it holds, that its pieces merge to the same bytes, what survives a crash, and what it refuses."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tclib import connections, text
from tclib.activations import mlp_activations
from tclib.evaluation import ground_truth, measure
from tclib.features import (
    FeatureActivations,
    Index,
    NeverFired,
    active,
    build,
    build_index,
    common_tokens,
    connect,
    feature_activations,
    fingerprint,
    index,
    load_summary,
    merge,
    plan,
    save_summary,
    search,
    summarise,
)
from tclib.replacement_model import ReplacementModel
from tests import index_worker
from tests.conftest import REPO
from tests.tiny import make_model, make_transcoder

ROWS, WIDTH, BOS = 50, 16, 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def transcoders():
    return {0: quiet(make_transcoder(0)), 1: quiet(make_transcoder(1, activation="jumprelu"))}


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 40, (ROWS, WIDTH), generator=generator)
    rows[:, 0] = BOS
    rows[3, 7] = BOS  # a second document in the row
    return rows


@pytest.fixture(scope="module")
def built(model, transcoders, tokens, tmp_path_factory):
    return build_index(ReplacementModel(model, transcoders), tokens, tmp_path_factory.mktemp("index") / "all")


@pytest.fixture(scope="module")
def dense(model, transcoders, tokens):
    """Activations of every feature at every position, 0 at BOS."""
    z = {layer: [] for layer in transcoders}
    for acts in mlp_activations(model, tokens, list(transcoders), build.BATCH_ROWS):
        for layer, transcoder in transcoders.items():
            z[layer].append(transcoder.encode(acts[layer].x))
    return {layer: torch.cat(parts).flatten(0, 1) * (tokens.flatten() != BOS)[:, None] for layer, parts in z.items()}


def quiet(transcoder):
    """Sparser, and with some features that never fire."""
    transcoder.b_enc -= 1.5
    transcoder.b_enc[5:8] = -100
    return transcoder


def same_bytes(a, b) -> bool:
    names = sorted(path.name for path in a.folder.iterdir())
    assert names == sorted(path.name for path in b.folder.iterdir())
    return filecmp.cmpfiles(a.folder, b.folder, names, shallow=False)[0] == names


def test_it_holds_every_activation_and_nothing_else(built, dense, transcoders):
    for layer, z in dense.items():
        assert sum(FeatureActivations(built, layer, f).count for f in range(z.shape[1])) == (z > 0).sum()
        for feature in range(z.shape[1]):
            expected = z[:, feature].nonzero().squeeze(1).numpy()
            if not len(expected):
                assert FeatureActivations(built, layer, feature).count == 0
                continue
            positions, values = built.entries(layer, feature)
            assert np.array_equal(positions, expected)
            assert np.array_equal(values, z[expected, feature].numpy().astype(np.float16))


def test_six_bytes_per_activation(built):
    for layer in built.layers:
        positions, values = built.flat(layer)
        assert positions.itemsize + values.itemsize == 6
        for name in ("positions", "values"):
            size = (built.folder / f"layer_{layer}.{name}.npy").stat().st_size
            assert size - 128 == len(positions) * {"positions": 4, "values": 2}[name]


def test_counts_agree_with_the_evaluation(model, transcoders, tokens, built):
    firing = measure(ReplacementModel(model, transcoders), tokens, groups={}).firing
    for layer in transcoders:
        table = search.statistics(built, layer)
        assert np.allclose(table["frequency"], firing[layer].numpy(), atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_shards_merge_to_the_same_bytes(model, transcoders, tokens, built, tmp_path, n):
    folders = [tmp_path / f"shard_{i}" for i in range(n)]
    for i in reversed(range(n)):
        build_index(ReplacementModel(model, transcoders), tokens, folders[i], shard=(i, n))
    assert same_bytes(merge(folders[::-1], tmp_path / "merged"), built)
    # Merging is associative: first the last two, then the rest.
    merge(folders[-2:], tmp_path / "tail")
    assert same_bytes(merge([*folders[:-2], tmp_path / "tail"], tmp_path / "again"), built)


def test_parts_do_not_show(model, transcoders, tokens, built, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PART_TOKENS", build.BATCH_ROWS * WIDTH)
    monkeypatch.setattr(build, "MERGED_AT_ONCE", 7)
    assert same_bytes(build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "many"), built)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many"]


def test_a_shard_reads_as_rows_of_its_own(model, transcoders, tokens, built, tmp_path):
    shard = build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "last", shard=(1, 2))
    start = shard.about["rows"][0]
    assert 0 < start < ROWS and np.array_equal(shard.tokens, tokens[start:].numpy())
    feature = int(search.statistics(shard, 0)["count"].idxmax())
    whole = built.entries(0, feature)[0]
    assert np.array_equal(shard.entries(0, feature)[0], whole[whole >= start * WIDTH] - start * WIDTH)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_other_architectures(model, tokens, tmp_path, activation):
    transcoder = make_transcoder(0, activation=activation, k=4)
    found = build_index(ReplacementModel(model, {0: transcoder}), tokens, tmp_path / "index")
    counts = np.diff(found.layer_offsets(0))
    if activation == "topk":
        assert 0 < counts.sum() <= 4 * found.n_tokens
    else:
        assert counts.sum() > 0


# --- reading


def test_top_examples(built, dense):
    for feature in np.flatnonzero(search.statistics(built, 0)["count"] > 3)[:5]:
        table = FeatureActivations(built, 0, feature).top(4)
        z = dense[0][:, feature].numpy().astype(np.float16).astype(np.float32)
        assert np.array_equal(table["activation"], np.sort(z)[::-1][:4])
        assert np.array_equal(z[table["row"] * WIDTH + table["position"]], table["activation"])
        assert np.array_equal(built.tokens[table["row"], table["position"]], table["token"])


def test_histogram_counts_every_activation(built):
    feature = int(search.statistics(built, 0)["count"].idxmax())
    table = FeatureActivations(built, 0, feature).histogram(bins=9)
    assert table["count"].sum() == FeatureActivations(built, 0, feature).count and len(table) == 9
    assert table["low"].iloc[0] == 0


def test_bands_are_quantiles_and_repeatable(built):
    feature = int(search.statistics(built, 0)["count"].idxmax())
    table = FeatureActivations(built, 0, feature).bands(n=4, each=3)
    assert list(table["band"].unique()) == [1, 2, 3, 4] and len(table) == 12
    assert (table["activation"].between(table["low"], table["high"])).all()
    lows = table.groupby("band")["low"].first().to_numpy()
    assert (np.diff(lows) <= 0).all()
    values = built.entries(0, feature)[1]
    assert abs((values >= lows[0]).mean() - 0.25) < 0.25 / 2
    pd.testing.assert_frame_equal(table, FeatureActivations(built, 0, feature).bands(n=4, each=3))
    assert not table.equals(FeatureActivations(built, 0, feature).bands(n=4, each=3, seed=1))


def test_bands_of_a_feature_that_fired_once(built):
    counts = search.statistics(built, 1)["count"]
    feature = int(counts[counts > 0].idxmin())
    table = FeatureActivations(built, 1, feature).bands()
    assert len(table) == min(counts[feature], 15) and table["band"].iloc[0] == 1


def test_top_tokens(built, dense, tokens):
    feature = int(search.statistics(built, 0)["count"].idxmax())
    z, flat = dense[0][:, feature], tokens.flatten()
    for row in FeatureActivations(built, 0, feature).top_tokens(5).itertuples():
        here = (flat == row.token) & (z > 0)
        assert row.count == here.sum()
        assert row.of_token == pytest.approx((here.sum() / (flat == row.token).sum()).item())
        assert row.mean == pytest.approx(z[here].mean().item(), rel=1e-3)


def test_tokens_of_features_that_fire_often_are_counted_beforehand(
    model, transcoders, tokens, built, tmp_path, monkeypatch
):
    counts = search.statistics(built, 1).set_index("feature")["count"]
    monkeypatch.setattr(common_tokens, "OFTEN", 50)
    monkeypatch.setattr(common_tokens, "KEPT", 4)
    monkeypatch.setattr(common_tokens, "COUNTED_AT_ONCE", 7)
    whole = build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "whole")
    shards = [
        build_index(ReplacementModel(model, transcoders), tokens, tmp_path / f"{i}", shard=(i, 2)) for i in range(2)
    ]
    assert same_bytes(merge([shard.folder for shard in shards], tmp_path / "merged"), whole)
    for feature, count in counts[counts > 0].items():
        assert bool(len(whole.often(1, feature))) == (count >= 50) and not len(built.often(1, feature))
        for k in (2, 4, 9):
            pd.testing.assert_frame_equal(
                FeatureActivations(whole, 1, feature).top_tokens(k),
                FeatureActivations(built, 1, feature).top_tokens(k),
            )
    second, feature = shards[1], int(counts.idxmax())
    positions, values = second.entries(1, feature)
    fresh = common_tokens.commonest(second.flat_tokens[positions], values, 4)
    monkeypatch.setattr(feature_activations, "commonest", None)  # would fail if it were used
    table = FeatureActivations(second, 1, feature).top_tokens(4)
    assert table["token"].tolist() == fresh["token"].tolist() and table["mean"].tolist() == fresh["mean"].tolist()
    with pytest.raises(ValueError, match="layer 5 is not in this index"):
        whole.often(5, 0)


def test_a_feature_of_few_tokens_is_not_counted_again(built, tmp_path, monkeypatch):
    monkeypatch.setattr(common_tokens, "OFTEN", 2)
    shutil.copytree(built.folder, tmp_path / "one")
    np.save(tmp_path / "one" / "tokens.npy", np.full_like(built.tokens, 3))
    common_tokens.write_often(tmp_path / "one", "0", 0)
    one, feature = Index(tmp_path / "one"), int(search.statistics(built, 0)["count"].idxmax())
    monkeypatch.setattr(feature_activations, "commonest", None)  # would fail if it were used
    (row,) = FeatureActivations(one, 0, feature).top_tokens(10).itertuples()
    assert (row.token, row.count, row.share) == (3, FeatureActivations(built, 0, feature).count, 1.0)


def test_context_shows_neighbours_and_stops_at_the_row(built, dense):
    feature = int(search.statistics(built, 0)["count"].idxmax())
    z = dense[0][:, feature].view(ROWS, WIDTH).numpy().astype(np.float16)
    for position in (0, 5, WIDTH - 1):
        found = FeatureActivations(built, 0, feature).context(2, position, before=3, after=2)
        start, stop = max(0, position - 3), min(WIDTH, position + 3)
        assert np.array_equal(found.activations, z[2, start:stop])
        assert np.array_equal(found.tokens, built.tokens[2, start:stop])
        assert found.centre == position - start
    with pytest.raises(ValueError, match="row 50 is outside the index"):
        FeatureActivations(built, 0, feature).context(ROWS, 0)


READS = {
    "count": lambda fired: fired.count,
    "histogram": FeatureActivations.histogram,
    "top": FeatureActivations.top,
    "bands": FeatureActivations.bands,
    "top_tokens": FeatureActivations.top_tokens,
}


def test_reading_takes_less_than_a_millisecond(built):
    """Of a small index here; of a large one in benchmarks/index.py. The best of many: others use the machine too."""
    feature = int(search.statistics(built, 0)["count"].idxmax())
    for name, function in READS.items():
        function(FeatureActivations(built, 0, feature))
        best = min(_seconds(function, built, feature) for _ in range(50))
        assert best < 1e-3, name


def _seconds(function, built, feature) -> float:
    start = time.perf_counter()
    function(FeatureActivations(built, 0, feature))
    return time.perf_counter() - start


# --- searching


def test_by_positions(built, dense, tokens):
    on = (tokens.flatten() == 7).numpy()
    table = search.by_positions(built, 0, on, k=3)
    assert table["f1"].is_monotonic_decreasing
    fired = dense[0].numpy() > 0
    hits = (fired & on[:, None]).sum(0)
    f1 = 2 * hits / np.maximum(fired.sum(0) + on.sum(), 1)
    assert np.allclose(table["f1"], np.sort(f1)[::-1][:3])


def test_labels(built, dense):
    truth = pd.DataFrame({"even": built.flat_tokens[built.kept] % 2 == 0, "small": built.flat_tokens[built.kept] < 10})
    feature = int(search.statistics(built, 0)["count"].idxmax())
    of = search.labels_of(FeatureActivations(built, 0, feature), truth).set_index("label")
    by = search.by_label(built, 0, truth["even"], k=64).set_index("feature")
    assert of.loc["even", "f1"] == pytest.approx(by.loc[feature, "f1"])
    best = search.best_labels(built, 0, truth)
    assert best.loc[feature, "f1"] == pytest.approx(of["f1"].max())
    assert pd.isna(best["label"][5]) and best["f1"][5] == 0
    with pytest.raises(ValueError, match="use the same text"):
        search.labels_of(FeatureActivations(built, 0, feature), truth.iloc[:-1])


def test_by_similarity(transcoders):
    near = search.by_similarity(transcoders[0], 3, k=4)
    W = torch.nn.functional.normalize(transcoders[0].W_dec, dim=1)
    cosine = W @ W[3]
    cosine[3] = -1
    assert near["feature"][0] == cosine.argmax() and near["cosine"][0] == pytest.approx(cosine.max().item(), abs=1e-5)


def test_co_firing(built, dense):
    feature = int(search.statistics(built, 0)["count"].idxmax())
    fired = {layer: z.numpy() > 0 for layer, z in dense.items()}
    for other in (0, 1):
        for row in search.co_firing(FeatureActivations(built, 0, feature), other, k=5).itertuples():
            both = (fired[0][:, feature] & fired[other][:, row.feature]).sum()
            either = (fired[0][:, feature] | fired[other][:, row.feature]).sum()
            assert row.both == both and row.jaccard == pytest.approx(both / either)
            assert (row.feature, other) != (feature, 0)


def test_connections_are_those_of_a_pass_over_the_text(model, transcoders, tokens, built):
    target = int(search.statistics(built, 1)["count"].idxmax())
    expected = connections.data_weighted(ReplacementModel(model, transcoders), tokens, 0, 1, target)
    found = connect.incoming(FeatureActivations(built, 1, target), transcoders)
    for name in expected:
        size = expected[name].abs().max()
        assert np.allclose(found[name], expected[name], atol=2e-3 * size), name
    for source in (0, 1, 9):
        out = connect.outgoing(FeatureActivations(built, 0, source), transcoders).loc[target, connect.COLUMNS[2:]]
        assert np.allclose(out.astype(float), found.loc[source, connect.COLUMNS[2:]].astype(float), atol=1e-4)
    silent = connect.incoming(FeatureActivations(built, 1, 6), transcoders)
    assert silent["target_weighted"].isna().all() and silent["input_invariant"].notna().all()


# --- planning


def test_the_plan_predicts_size_and_bounds_memory(model, transcoders, tokens, built):
    planned = plan(ReplacementModel(model, transcoders), tokens)
    real = sum(path.stat().st_size for path in built.folder.glob("*.npy"))
    assert planned.disk == pytest.approx(real, rel=0.1)
    longer = plan(ReplacementModel(model, transcoders), tokens.repeat(8, 1))
    assert longer.disk > 6 * planned.disk
    assert "activations" in str(planned)


def test_memory_does_not_grow_with_the_text(model, transcoders, tokens, tmp_path):
    """Traced, so that it is our arrays alone that count; torch's batches are bounded by their constant size."""
    import tracemalloc

    def peak(rows, folder):
        tracemalloc.start()
        build_index(ReplacementModel(model, transcoders), rows, folder)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    part = build.PART_TOKENS // WIDTH
    peak(tokens, tmp_path / "warm")
    once, thrice = (peak(tokens.repeat(n * part // ROWS + 1, 1), tmp_path / f"x{n}") for n in (1, 3))
    planned = plan(ReplacementModel(model, transcoders), tokens.repeat(3 * part // ROWS + 1, 1))
    assert thrice < 1.5 * once and thrice < planned.memory


# --- crashes


def test_an_interrupted_build_goes_on(model, transcoders, tokens, built, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PART_TOKENS", build.BATCH_ROWS * WIDTH)
    real, calls = build.active_pairs, []

    def stop_at_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(build, "active_pairs", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    kept = sorted(path.name for path in (tmp_path / "index.part").iterdir())
    assert kept == ["rows_000000000", "rows_000000016"]  # whole parts only
    assert same_bytes(build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "index"), built)
    assert len(calls) == 3 + 2  # the finished parts were not made again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


@pytest.mark.parametrize("where", [(index.ArrayFile, "write"), (common_tokens, "_entries")], ids=["arrays", "tables"])
def test_a_full_disk_leaves_nothing(model, transcoders, tokens, tmp_path, monkeypatch, where):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*where, full)
    monkeypatch.setattr(common_tokens, "OFTEN", 50)
    with pytest.raises(ValueError, match="could not be written .No space left on device."):
        build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "index")
    assert not (tmp_path / "index").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    monkeypatch.undo()
    build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "index")


@pytest.mark.skipif(os.name != "posix", reason="kills by a signal")
def test_a_killed_build_goes_on(tmp_path, monkeypatch):
    """The real thing: a process killed while it writes parts, and one that finishes after it."""
    command = [sys.executable, "-m", "tests.index_worker", str(tmp_path)]
    worker = subprocess.Popen(command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("index.part/rows_*")) and time.monotonic() < deadline and worker.poll() is None:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    subprocess.run(command, cwd=REPO, check=True, timeout=120)
    found = Index(tmp_path / "index")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(build, "PART_TOKENS", build.PART_TOKENS)  # which the worker changes
    index_worker.main(tmp_path / "other")
    assert same_bytes(found, Index(tmp_path / "other" / "index"))


# --- refusals


def test_another_model_or_text_is_refused_and_both_are_named(model, transcoders, tokens, built):
    other = {0: quiet(make_transcoder(0, seed=5)), 1: transcoders[1]}
    made, found = fingerprint(transcoders[0]), fingerprint(other[0])
    with pytest.raises(ValueError, match=f"transcoder {made} of layer 0, not from this one, {found}"):
        built.check(ReplacementModel(model, other))
    assert built.check(ReplacementModel(model, transcoders)) is built
    with pytest.raises(ValueError, match=f"(?s){made}.*not.*{found}"):
        build_index(ReplacementModel(model, other), tokens, built.folder)
    with pytest.raises(ValueError, match="was made from text .* not .*: use another folder"):
        build_index(ReplacementModel(model, transcoders), tokens.flip(0), built.folder)
    assert build_index(ReplacementModel(model, transcoders), tokens, built.folder).folder == built.folder


def test_another_language_model_is_refused(built, transcoders, tmp_path):
    other = make_model(tmp_path, seed=1)
    with pytest.raises(ValueError, match=f"{built.about['model']}, not from this one, {fingerprint(other)}"):
        built.check(ReplacementModel(other, transcoders))


def test_half_precision_is_summed_in_full():
    layer = nn.Linear(768, 4096).requires_grad_(False)
    layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert fingerprint(layer.bfloat16()) == fingerprint(layer.bfloat16().float())


def test_the_fingerprint_forgives_rounding_and_nothing_else(transcoders):
    import copy

    same, trained = copy.deepcopy(transcoders[0]), copy.deepcopy(transcoders[0])
    same.W_enc *= 1 + 1e-8 * torch.randn_like(same.W_enc)
    trained.W_enc += 1e-3 * torch.randn_like(trained.W_enc)
    names = [fingerprint(t) for t in (transcoders[0], same, trained)]
    assert names[0] == names[1] != names[2]


def test_merge_refuses_gaps_and_strangers(model, transcoders, tokens, tmp_path):
    for i in range(3):
        build_index(ReplacementModel(model, transcoders), tokens, tmp_path / f"{i}", shard=(i, 3))
    with pytest.raises(ValueError, match="rows 16 to 32 are missing or twice between 0 and 2"):
        merge([tmp_path / "0", tmp_path / "2"], tmp_path / "out")
    with pytest.raises(ValueError, match="missing or twice"):
        merge([tmp_path / "0", tmp_path / "0"], tmp_path / "out")
    build_index(ReplacementModel(model, {0: transcoders[0]}), tokens, tmp_path / "stranger", shard=(1, 3))
    with pytest.raises(ValueError, match="was made from layers"):
        merge([tmp_path / "0", tmp_path / "stranger"], tmp_path / "out")
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists: merge into a new folder"):
        merge([tmp_path / "0"], tmp_path / "1")


def test_bad_input_gets_one_sentence(model, transcoders, tokens, built, tmp_path):
    with pytest.raises(ValueError, match="no index in .*: index.json is missing; make it with build_index"):
        Index(tmp_path / "nowhere")
    with pytest.raises(NeverFired, match="feature 0/6 never fired on the 749 tokens of this index"):
        FeatureActivations(built, 0, 6).top()
    assert FeatureActivations(built, 0, 6).count == 0
    with pytest.raises(ValueError, match="feature 64 is outside layer 0, which has features 0 to 63"):
        FeatureActivations(built, 0, 64)
    with pytest.raises(ValueError, match="feature -1 is outside"):
        FeatureActivations(built, 0, -1)
    with pytest.raises(ValueError, match=r"layer 2 is not in this index, which has layers \[0, 1\]"):
        FeatureActivations(built, 2, 0)
    with pytest.raises(ValueError, match="text"):
        build_index(ReplacementModel(model, transcoders), tokens[:0], tmp_path / "index")
    with pytest.raises(ValueError, match="no transcoder to index"):
        build_index(ReplacementModel(model, {}), tokens, tmp_path / "index")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists and holds no index: choose a new folder"):
        build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "mine")
    (tmp_path / "mine").rmdir()
    for shard, sentence in {(3, 3): "counts from 0", (0, 9): "9 shards of 50 rows: at most 4"}.items():
        with pytest.raises(ValueError, match=sentence):
            build_index(ReplacementModel(model, transcoders), tokens, tmp_path / "index", shard=shard)
    assert not list(tmp_path.iterdir())


def test_a_damaged_index_gets_one_sentence(built, tmp_path):
    for name, content in {"layer_0.values.npy": b"", "index.json": b"{", "layer_1.offsets.npy": b"\x93NUMPY"}.items():
        folder = tmp_path / name
        shutil.copytree(built.folder, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            Index(folder)
    np.save(folder / "layer_1.often.npy", np.zeros(3))
    shutil.copy(built.folder / "layer_1.offsets.npy", folder)
    with pytest.raises(ValueError, match="is damaged: a table of tokens has other columns"):
        Index(folder)


def test_an_index_of_another_version_is_refused_with_what_to_do(built, tmp_path):
    shutil.copytree(built.folder, tmp_path / "old")
    (tmp_path / "old" / "index.json").write_text(json.dumps(built.about | {"format": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another version \(format 1, not 2\): remove it and build it again"):
        Index(tmp_path / "old")


def test_an_activation_beyond_float16_is_refused():
    transcoder = make_transcoder(0)
    transcoder.b_enc += 1e5
    with pytest.raises(ValueError, match="does not fit float16"):
        active.ActiveFinder(transcoder)(torch.zeros(4, 32))


# --- summaries


def test_a_summary_survives_the_disk(model, transcoders, built, tmp_path):
    truth = pd.DataFrame({"even": built.flat_tokens[built.kept] % 2 == 0})
    summary = summarise(built, truth)
    save_summary(summary, tmp_path / "s.npz")
    again = load_summary(ReplacementModel(model, transcoders), tmp_path / "s.npz")
    pd.testing.assert_frame_equal(summary.features, again.features, check_dtype=False, rtol=2e-3, atol=1e-4)
    pd.testing.assert_frame_equal(summary.examples, again.examples, check_dtype=False)
    assert np.array_equal(summary.tokens, again.tokens)
    with pytest.raises(ValueError, match="was made from .* as layer 0, not from"):
        load_summary(ReplacementModel(model, {0: make_transcoder(0, seed=9)}), tmp_path / "s.npz")
    with pytest.raises(ValueError, match="no summary at"):
        load_summary(ReplacementModel(model, transcoders), tmp_path / "none.npz")
    (tmp_path / "s.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="damaged"):
        load_summary(ReplacementModel(model, transcoders), tmp_path / "s.npz")


def test_a_summary_holds_what_each_feature_says_of_itself(built):
    summary = summarise(built, seed=4)
    for layer in built.layers:
        table = summary.features.query("layer == @layer").set_index("feature")
        for feature in table.index[table["count"] > 0][:20]:
            fired = FeatureActivations(built, layer, feature)
            kept = summary.examples.query("layer == @layer and feature == @feature")
            expected = pd.concat([fired.top(5).assign(band=0), fired.bands(5, 2, seed=4)])
            columns = ["band", "row", "position", "activation"]
            assert kept[columns].to_numpy().tolist() == expected[columns].to_numpy().tolist()
            first = fired.top_tokens(1).iloc[0]
            assert table.loc[feature, ["token", "token_share"]].tolist() == [first["token"], first["share"]]


def test_the_bundled_summary_is_of_the_bundled_weights_and_right():
    import tclib as tc

    model, transcoders = tc.load_model(device="cpu"), tc.load_transcoders(device="cpu")
    summary = load_summary(ReplacementModel(model, transcoders))
    rows = 4
    labelled = text.chronicle(model, rows)
    assert np.array_equal(summary.tokens[:rows], labelled.tokens.numpy())
    (acts,) = mlp_activations(model, labelled.tokens, sorted(transcoders))
    few = summary.examples.query("row < @rows").groupby("layer").head(40)
    for row in few.itertuples():
        z = transcoders[row.layer].encode(acts[row.layer].x[row.row, row.position])[row.feature].item()
        assert z == pytest.approx(row.activation, rel=2e-3, abs=1e-2)
    assert len(few) > 20
    assert set(ground_truth.truth(labelled)) & set(summary.features["label"].dropna())


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_screening_finds_what_the_plain_way_finds(activation, monkeypatch):
    """Up to pairs at the very edge, where float32 sums in another order decide."""
    transcoder = make_transcoder(0, d_features=512, activation=activation)
    transcoder.b_enc -= 2
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    plain = active.ActiveFinder(transcoder)
    monkeypatch.setattr(active, "SCREENED_FROM", 0)
    monkeypatch.setattr(active, "bfloat16_hardware", lambda: True)
    screened = active.ActiveFinder(transcoder)
    assert plain.screen is None and screened.screen is not None
    z = []
    for found in (plain(x), screened(x)):
        z.append(np.zeros((300, 512), np.float32))
        z[-1][found.tokens, found.features] = found.values
        order = np.argsort(found.features, kind="stable")
        assert (np.diff(found.tokens[order]) > 0)[np.diff(found.features[order]) == 0].all()
    assert (z[0] > 0).mean() > 0.005 and np.allclose(*z, rtol=2e-3, atol=1e-4)


def test_the_pass_stops_before_the_last_mlp(model, transcoders, tokens, tmp_path):
    def forbidden(x, hook):
        raise AssertionError("the last MLP ran")

    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", forbidden)]):
        build_index(ReplacementModel(model, {0: transcoders[0]}), tokens, tmp_path / "index")
    assert torch.isfinite(model(tokens[:1])).all()  # and the model is as it was
