"""Files made to harm: none runs code, fills the memory or leaves its folder, and each gets one sentence."""

import io
import json
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tclib as tc
from tclib.io import safe_files
from tests import foreign
from tests.tiny import make_model, make_transcoder

PWNED = []


def pwned(*args):
    PWNED.append(args)


class Runs:
    """What a pickle can do: name any function and its arguments."""

    def __init__(self, function=pwned, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


@pytest.fixture(autouse=True)
def nothing_ran():
    PWNED.clear()
    yield
    assert not PWNED


def refused(where, match):
    with pytest.raises(ValueError, match=match) as caught:
        list(tc.load_transcoders(where, device="cpu").values())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def original(folder, *, state=None, cfg=None, **extra):
    """The paper's file with parts of it exchanged."""
    w = foreign.weights()
    attributes = {"hook_point": "blocks.0.ln2.hook_normalized", "hook_point_layer": 0, "d_in": 32, "d_out": 32,
                  "out_hook_point": "blocks.0.hook_mlp_out", "d_sae": 64} | (cfg or {})  # fmt: skip
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "b_dec_out")
    with foreign.original_class(**attributes) as config:
        content = {"cfg": config, "state_dict": OrderedDict((n, w[n]) for n in names) | (state or {})} | extra
        path = folder / "final_sparse_autoencoder_x.pt"
        torch.save(content, path)
    return path


# Pickles


@pytest.mark.parametrize("where", ["beside", "in the state", "in the config", "as a key"])
def test_a_pickle_with_code_is_refused_by_name(tmp_path, where):
    evil = Runs(pwned, "here")
    if where == "beside":
        original(tmp_path, extra=evil)
    elif where == "in the state":
        original(tmp_path, state={"x": evil})
    elif where == "in the config":
        original(tmp_path, cfg={"dtype": evil})
    else:
        original(tmp_path, **{"cfg": {}, "y": {1: [evil]}})
    refused(tmp_path, r"asks to run tests\.test_hostile_files\.pwned: weights never need that")


@pytest.mark.parametrize(
    "function", [eval, exec, __import__, print, getattr, bytearray, torch.load, torch.Tensor, torch.zeros, np.zeros]
)
def test_even_harmless_functions_are_refused(tmp_path, function):
    """Some of these torch would run: bytearray and Tensor take any amount of memory."""
    original(tmp_path, extra=Runs(function, 10**12))
    refused(tmp_path, "asks to run")


def test_another_class_of_the_same_module_is_refused(tmp_path):
    module = types.ModuleType("sae_training.config")
    module.Other = type("Other", (), {"__module__": "sae_training.config"})
    sys.modules |= {"sae_training": types.ModuleType("sae_training"), "sae_training.config": module}
    try:
        torch.save({"cfg": module.Other(), "state_dict": {}}, tmp_path / "x.pt")
    finally:
        del sys.modules["sae_training"], sys.modules["sae_training.config"]
    refused(tmp_path, r"asks to run sae_training\.config\.Other")


def rewritten(path, data_pkl=None, compression=zipfile.ZIP_STORED, add=(), drop=()):
    """The same .pt archive with other contents."""
    with zipfile.ZipFile(path) as old:
        parts = {entry.filename: old.read(entry) for entry in old.infolist()}
    (name,) = [n for n in parts if n.endswith("data.pkl")]
    if data_pkl is not None:
        parts[name] = data_pkl
    with zipfile.ZipFile(path, "w", compression) as new:
        for filename, content in [*parts.items(), *add]:
            if filename not in drop:
                new.writestr(filename, content)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_any_protocol(tmp_path, protocol):
    path = original(tmp_path)
    rewritten(path, pickle.dumps({"cfg": Runs(), "state_dict": {}}, protocol))
    refused(tmp_path, "asks to run|damaged")


def test_names_put_together_at_run_time_are_refused(tmp_path):
    # STACK_GLOBAL takes module and name from the stack, where a list of names would not see them.
    path = original(tmp_path)
    rewritten(path, b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")
    refused(tmp_path, "asks to run an object by STACK_GLOBAL")


@pytest.mark.parametrize(
    "data", [b"", b".", b"\x80\x02", b"not a pickle", b"\x80\x02}q\x00", b"\x80\x02" + b"(" * 10**5]
)
def test_broken_pickles(tmp_path, data):
    rewritten(original(tmp_path), data)
    refused(tmp_path, "damaged|not one of the paper's")


def test_a_deeply_nested_pickle(tmp_path):
    rewritten(original(tmp_path), b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    refused(tmp_path, "damaged|not one of the paper's")


def test_a_bare_pickle_and_an_old_torch_file(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Runs()))
    refused(tmp_path, "not a zip archive; if it is an old .pt file, save it anew")
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path, "not a zip archive; if it is an old .pt file")


def test_a_torchscript_program(tmp_path):
    rewritten(original(tmp_path), add=[("x/constants.pkl", b"\x80\x02)."), ("x/code/evil.py", b"import os")])
    refused(tmp_path, "TorchScript program")


def test_a_zip_bomb_in_a_pt_file(tmp_path):
    path = original(tmp_path)
    rewritten(path, compression=zipfile.ZIP_DEFLATED, add=[("archive/data/99", bytes(50_000_000))])
    assert path.stat().st_size < 200_000
    refused(tmp_path, "unpacks to|compressed or overlap")


def test_a_large_pickle(tmp_path):
    rewritten(original(tmp_path), b"\x80\x02" + b"N0" * 1_000_000 + b".")
    refused(tmp_path, "one small data.pkl")


def test_two_pickles(tmp_path):
    rewritten(original(tmp_path), add=[("other/data.pkl", b"\x80\x02}.")])
    refused(tmp_path, "one small data.pkl")


def test_overlapping_entries(tmp_path):
    """One block of bytes announced many times: each entry is plain, together they are a bomb."""
    path = original(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        block = archive.getinfo("final_sparse_autoencoder_x/data/0")
        for i in range(1000):
            copy = zipfile.ZipInfo(f"final_sparse_autoencoder_x/data/{100 + i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, field, getattr(block, field))
            archive.filelist.append(copy)
        archive._didModify = True
    refused(tmp_path, "unpacks to|compressed or overlap")


def swap_numbers(path, old, new):
    """Exchange one integer in the pickle for another."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        data = archive.read(name)
    coded = {n: b"M" + struct.pack("<H", n) if n > 255 else b"K" + bytes([n]) for n in (old, min(new, 60_000))}
    replacement = coded[new] if new in coded else b"J" + struct.pack("<i", new)
    assert coded[old] in data
    rewritten(path, data.replace(coded[old], replacement))


@pytest.mark.parametrize("new", [2_000_000_000, 50_000])
def test_shapes_that_the_file_does_not_hold(tmp_path, new):
    """Billions of numbers in a file of a few thousand."""
    swap_numbers(original(tmp_path), 64, new)
    refused(tmp_path, "damaged|does not fit|larger than|not a plain tensor")


@pytest.mark.parametrize("new", [2_000_000_000, 50_000])
def test_storages_that_the_file_does_not_hold(tmp_path, new):
    """torch maps what there is, and the tensors keep their sizes."""
    swap_numbers(original(tmp_path), 2048, new)
    assert torch.equal(tc.load_transcoders(tmp_path, device="cpu")[0].W_dec, foreign.weights()["W_dec"])


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"W_enc": torch.zeros(1).expand(32, 64)}, "not a plain tensor"),
        ({"W_enc": torch.zeros(32, 64, dtype=torch.int64)}, "asks to run torch.LongStorage"),
        ({"W_enc": torch.zeros(32, 65)}, r"W_enc is \(32, 65\), not \(32, 64\)"),
        ({"W_enc": [1.0]}, "no tensor W_enc"),
        ({"b_enc": torch.zeros(())}, "b_enc is"),
        ({"W_enc": torch.zeros(3)}, "no matrices"),
        ({"b_dec_out": torch.zeros(5)}, "b_dec is"),
        ({"W_enc": torch.zeros(32, 64).to_sparse()}, "asks to run"),
        ({"W_enc": torch.empty(32, 64, device="meta")}, "asks to run"),
    ],
)
def test_tensors_that_are_none(tmp_path, state, sentence):
    original(tmp_path, state=state)
    refused(tmp_path, sentence)


@pytest.mark.parametrize(
    "cfg", [{"d_in": 10**12}, {"d_sae": -1}, {"hook_point": None}, {"hook_point_layer": "3; import os"}, {"d_in": [3]}]
)
def test_configurations_that_do_not_fit(tmp_path, cfg):
    original(tmp_path, cfg=cfg)
    refused(tmp_path, "damaged|does not fit|not one of the paper's")


def test_a_stub_with_a_setstate_of_its_own_runs_nothing(tmp_path):
    original(tmp_path, cfg={"__setstate__": 1, "__class__": 2, "__reduce__": 3})
    tc.load_transcoders(tmp_path, device="cpu")  # attributes, nothing more


# safetensors: in SAELens', circuit-tracer's, sparsify's and our own folders


def header(entries, length=None, body=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


HEADERS = {
    "empty": b"",
    "longer than the file": header({}, length=2**40),
    "all ones": b"\xff" * 64,
    "not JSON": header(b"{" * 64),
    "beyond the end": header({"W_enc": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "overflow": header({"W_enc": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
    "terabytes": header({"W_enc": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}),
    "negative": header({"W_enc": {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]}}, body=bytes(16)),
    "overlapping": header(
        {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in ("W_enc", "W_dec")}, body=bytes(16)
    ),
    "hole": header({"W_enc": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, body=bytes(8)),
    "unknown type": header({"W_enc": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}, body=bytes(4)),
    "integers": header({"W_enc": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}, body=bytes(4)),
    "nested": header(b'{"a":' * 20_000),
}


def each_folder(folder):
    """One folder per format of safetensors, and the file of weights in it."""
    foreign.saelens(folder / "saelens")
    foreign.circuit_tracer(folder / "ct", layers=1)
    foreign.sparsify(folder / "sparsify")
    make_transcoder(0).save(folder / "ours" / "layer_0")
    return {
        "saelens": folder / "saelens/sae_weights.safetensors",
        "ct": folder / "ct/layer_0.safetensors",
        "sparsify": folder / "sparsify/layers.0.mlp/sae.safetensors",
        "ours": folder / "ours/layer_0.safetensors",
    }


@pytest.mark.parametrize("which", HEADERS)
def test_hostile_headers(tmp_path, which):
    for folder, path in each_folder(tmp_path).items():
        path.write_bytes(HEADERS[which])
        refused(tmp_path / folder, "damaged|does not fit|floating-point|no matrix")


@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_truncated_weights(tmp_path, keep):
    for folder, path in each_folder(tmp_path).items():
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        refused(tmp_path / folder, "damaged")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"d_in": 1e999}', "{" * 10**5, "9" * 10_000, "\udc80", '{"d_in": 32}']
)
def test_broken_configurations(tmp_path, text):
    paths = each_folder(tmp_path)
    for folder, name in {"saelens": "cfg.json", "sparsify": "layers.0.mlp/cfg.json", "ours": "layer_0.json"}.items():
        (tmp_path / folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(tmp_path / folder, "damaged|not read|missing")
    assert all(path.is_file() for path in paths.values())


def test_a_configuration_of_gigabytes_is_not_read(tmp_path):
    foreign.saelens(tmp_path / "sae")
    with (tmp_path / "sae" / "cfg.json").open("wb") as file:
        file.truncate(10**10)  # sparse on disk
    refused(tmp_path, "that is no configuration")


def test_sizes_in_the_configuration_take_no_memory(tmp_path):
    make_transcoder(0).save(tmp_path / "layer_0")
    config = json.loads((tmp_path / "layer_0.json").read_text(encoding="utf-8"))
    (tmp_path / "layer_0.json").write_text(json.dumps(config | {"d_in": 10**6, "d_features": 10**9}), encoding="utf-8")
    refused(tmp_path, "does not fit its configuration")


# YAML

YAMLS = {
    "code": "x: !!python/object/apply:tests.test_hostile_files.pwned [1]",
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "not a mapping": "- 1",
    "empty": "",
    "broken": "a: [",
    "huge number": "k: " + "9" * 10_000,
}


@pytest.mark.parametrize("which", YAMLS)
def test_hostile_yaml(tmp_path, which):
    foreign.circuit_tracer(tmp_path / "set")
    (tmp_path / "set" / "config.yaml").write_text(YAMLS[which], encoding="utf-8")
    refused(tmp_path / "set", "damaged|tags or aliases")


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "hf://somebody/else/params.npz", "a/b", "..", "C:\\x", 3]
)
def test_names_in_a_configuration_stay_in_its_folder(tmp_path, name):
    foreign.circuit_tracer(tmp_path / "set", extra=yaml.safe_dump({"transcoders": ["layer_0.safetensors", name]}))
    refused(tmp_path / "set", "only plain names of files beside it are followed")


@pytest.mark.parametrize("k", [float("nan"), float("inf"), -3.0, 0.0, 1e30])
def test_a_k_that_is_no_number_of_features(tmp_path, k):
    foreign.circuit_tracer(tmp_path / "set", "topk", layers=1, k=5)
    tensors = {"k": torch.tensor(k)}
    with safe_files._safetensors(tmp_path / "set" / "layer_0.safetensors") as file:
        tensors |= {n: file.get_tensor(n) for n in file.keys() if n != "k"}  # noqa: SIM118
    save_file(tensors, tmp_path / "set" / "layer_0.safetensors")
    refused(tmp_path / "set", "says k =")


# npz


def npz(folder, **replaced):
    """Gemma Scope's file with some members replaced by raw bytes."""
    foreign.gemma_scope(folder)
    (path,) = folder.rglob("params.npz")
    with zipfile.ZipFile(path) as old:
        parts = {entry.filename: old.read(entry) for entry in old.infolist()}
    parts |= {f"{name}.npy": content for name, content in replaced.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)
    return path


def npy(shape, dtype="<f4", body=b"", version=(1, 0), descr=None):
    text = repr({"descr": descr or dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    size = struct.pack("<H", len(text)) if version == (1, 0) else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + body


def objects():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Runs()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


ARRAYS = {
    "terabytes": npy((10**6, 10**6)),
    "overflow": npy((2**40, 2**40)),
    "negative": npy((-1, 4), body=bytes(16)),
    "too short": npy((32, 64), body=bytes(16)),
    "integers": npy((32, 64), "<i4", bytes(32 * 64 * 4)),
    "text": npy((32, 64), "<U1000", b""),
    "nothing": b"",
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "code in the header": b"\x93NUMPY\x01\x00"
    + struct.pack("<H", 64)
    + b"__import__('os').system('true')".ljust(63)
    + b"\n",
    "version 9": npy((32, 64), version=(9, 0)),
    "record": npy((2,), descr=[("a", "<f4"), ("b", "|O")]),
}


@pytest.mark.parametrize("which", ARRAYS)
def test_hostile_arrays(tmp_path, which):
    npz(tmp_path, W_enc=ARRAYS[which])
    refused(tmp_path, "damaged|floating-point|but has|does not fit|never read")


def test_pickled_objects_in_an_npz(tmp_path):
    npz(tmp_path, W_enc=objects())
    refused(tmp_path, "pickled objects, which are never read")


def test_a_zip_bomb_in_an_npz(tmp_path):
    path = npz(tmp_path, W_enc=npy((5000, 5000), body=bytes(10**8)))
    assert path.stat().st_size < 10**6
    refused(tmp_path, "weights do not shrink like that")


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"\xff" * 100])
def test_no_archive_at_all(tmp_path, content):
    foreign.gemma_scope(tmp_path)
    (path,) = tmp_path.rglob("params.npz")
    path.write_bytes(content)
    refused(tmp_path, "not a zip archive|no matrices")


# Anything at all


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A folder of each format."""
    folder = tmp_path_factory.mktemp("samples")
    foreign.original(folder / "original")
    foreign.gemma_scope(folder / "gemma")
    each_folder(folder)
    return folder


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), changes=st.integers(1, 4), early=st.booleans())
def test_random_damage_is_read_or_refused(samples, seed, changes, early):
    """Bytes exchanged anywhere, or in the first 400 where headers are: never another exception, let alone a crash."""
    random = np.random.default_rng(seed)
    files = sorted(path for path in samples.rglob("*") if path.is_file() and "sparsity" not in path.name)
    path = files[random.integers(len(files))]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for place in random.integers(min(len(damaged), 400) if early else len(damaged), size=changes):
        damaged[place] = random.integers(256)
    top = samples / path.relative_to(samples).parts[0]
    path.write_bytes(damaged)
    try:
        list(tc.load_transcoders(top, device="cpu").values())
    except ValueError as error:
        assert "folds them in" in str(error) or str(top) in str(error) or "sae" in str(error)  # one of our sentences
    finally:
        path.write_bytes(whole)


# Models


def model_folder(folder):
    make_model(folder)
    return folder


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "asks to run code of its own"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}, "asks to run code of its own"),
        ("config.json", {"n_embd": 10**7}, "config.json says vocabulary 41, width 10000000"),
        ("config.json", {"vocab_size": 10**9}, "config.json says vocabulary 1000000000"),
        ("config.json", {"n_layer": 10**6}, "1000000 layers; its weights have"),
        ("config.json", {"n_layer": "2"}, "config.json says"),
    ],
)
def test_models_that_ask_for_more_than_they_bring(tmp_path, file, values, sentence):
    edit(model_folder(tmp_path) / file, **values)
    with pytest.raises(ValueError, match=sentence):
        tc.load_model(str(tmp_path), device="cpu")


def test_adapters_of_other_models_are_not_followed(tmp_path):
    model_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}', encoding="utf-8")
    with pytest.raises(ValueError, match="adapter of another model"):
        tc.load_model(str(tmp_path), device="cpu")


def test_pickled_model_weights_are_never_read(tmp_path):
    model_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, which may run code and is never read"):
        tc.load_model(str(tmp_path), device="cpu")


def test_no_module_unpickles_on_its_own():
    """One place reads pickles, with weights_only; nothing else may load one."""
    for path in (Path(tc.__file__).parent).rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in source and "weights_only=False" not in source, path
        assert "import pickle\n" not in source and "yaml.load(" not in source, path
        assert "torch.load(" not in source or path.name == "safe_files.py", path
