"""Models in GGUF files: the same numbers as the file stands for, made once, and one sentence for what is no model."""

import json
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import tclib as tc
from tclib.inputs import separate_documents
from tclib.io import gguf_model, safe_files
from tclib.io.gguf_header import read_header
from tclib.model import check_architecture, model_folder, to_token, to_tokens, token_strings
from tests import gguf_files


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The models made in a test go nowhere else."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(folder))
    return folder / "tclib" / "models"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "small.gguf"
    gguf_files.write(path, kind="Q8_0")
    return path


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        tc.load_model(str(path), device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "F32"), ("llama", "Q4_1"), ("llama", "Q8_0"), ("gpt2", "F16"), ("gpt2", "Q8_0")]
)
def test_a_file_loads_by_its_path_with_the_numbers_that_it_stands_for(tmp_path, capsys, family, kind):
    original = gguf_files.write(tmp_path / "some model.gguf", family, kind)
    model = tc.load_model(str(tmp_path / "some model.gguf"), device="cpu", processed=False)
    tokens = torch.tensor([[0, 5, 9, 3, 14, 21, 22]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), original(tokens).logits, rtol=1e-4, atol=1e-4)
    folder = model_folder(str(tmp_path / "some model.gguf"))
    stored = safe_files.read_safetensors(folder / "model.safetensors", {"w": next(iter(original.state_dict()))})
    assert torch.equal(stored["w"], next(iter(original.state_dict().values())))
    assert "some model.gguf, its weights rounded to" in (printed := capsys.readouterr().out) and kind in printed
    processed = tc.load_model(str(tmp_path / "some model.gguf"), device="cpu")
    with torch.no_grad():
        expected = original(tokens).logits.log_softmax(-1)
        torch.testing.assert_close(processed(tokens).log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


def test_a_file_is_made_once_and_again_where_that_was_interrupted(good, cache, capsys):
    made = gguf_model.gguf_folder(good, check_architecture)
    assert made.parent == cache and "0.00 GB" in capsys.readouterr().out
    before = made.stat().st_mtime_ns
    assert gguf_model.gguf_folder(good, check_architecture) == made and made.stat().st_mtime_ns == before
    assert not capsys.readouterr().out
    half = made.rename(made.with_name(made.name + ".part"))
    (half / "model.safetensors").write_bytes(b"half of it")
    assert gguf_model.gguf_folder(good, check_architecture) == made and not half.exists()
    tc.load_model(str(made), device="cpu")


def test_digits_are_split_as_its_tokenizer_was_trained(good):
    model = tc.load_model(str(good), device="cpu")
    pieces = model.tokenizer.convert_ids_to_tokens(model.tokenizer("a  12 bc", add_special_tokens=False)["input_ids"])
    assert pieces == ["a", "ĠĠ", "1", "2", "Ġbc"]


def test_the_separator_stands_in_front_where_bos_is_a_chat_marker(good, capsys):
    model = tc.load_model(str(good), device="cpu")
    assert "<|endoftext|> stands in front of every text" in (said := capsys.readouterr().out)
    assert "<|im_start|>, marks turns of a chat" in said
    tokens = to_tokens(model, " a bc")
    assert tokens.tolist() == [0, to_token(model, " a"), to_token(model, " bc")]
    assert token_strings(model, tokens)[0] == "<bos>"


def test_a_tokenizer_without_any_separator_keeps_its_bos(tmp_path):
    gguf_files.write(tmp_path / "x.gguf", tokens=["<|nothing|>", *gguf_files.TOKENS[1:]])
    assert tc.load_model(str(tmp_path / "x.gguf"), device="cpu").tokenizer.bos_token == "<|im_start|>"


@pytest.mark.parametrize("eos", ["<|endoftext|>", "</s>"])
def test_a_tokenizer_without_bos_takes_the_separator(eos):
    words = Tokenizer(WordLevel({"a": 0, "b": 1, eos: 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos)
    assert "the tokenizer names no BOS" in separate_documents(tokenizer, 3) and tokenizer.bos_token_id == 2
    assert separate_documents(tokenizer, 3) is None  # it has one now
    tokenizer.bos_token = None
    assert separate_documents(tokenizer, 2) is None and tokenizer.bos_token is None  # the model has no such row


def test_without_the_package_gguf_it_says_what_to_install(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(good, "needs the package gguf: install it with")


def test_too_little_disk_or_memory_is_said_before(good, cache, monkeypatch):
    monkeypatch.setattr("tclib.io.memory.available_memory", lambda device="cpu": 1000)
    refused(good, "while it is converted")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    refused(good, r"becomes a model folder of .* GB free\): free space there or set HF_HOME to another disk")


# Hostile and damaged files


def test_any_truncation_is_refused_in_one_sentence(good, tmp_path):
    whole, path = good.read_bytes(), tmp_path / "cut.gguf"
    header = GGUFReader(good).data_offset
    for length in [*range(0, header, 97), header, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "truncated|not a GGUF file")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_headers_are_refused_or_read(good, tmp_path, data):
    """No other exception, whatever is written into the header."""
    whole, path = bytearray(good.read_bytes()), tmp_path / "changed.gguf"
    at = data.draw(st.integers(0, GGUFReader(good).data_offset - 8))
    whole[at : at + 8] = data.draw(
        st.sampled_from([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 62), struct.pack("<Q", 10**7)])
        | st.binary(min_size=8, max_size=8)
    )
    path.write_bytes(whole)
    try:
        header = read_header(path)
    except safe_files.BadFile as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert header.weights < 8 * len(whole)


def lie(path, **numbers):
    """The smallest file with a lie: one tensor of 32 numbers, and a vocabulary of two tokens."""
    said = {
        "version": 3,
        "tensors": 1,
        "keys": 2,
        "elements": 2,
        "rank": 1,
        "side": 32,
        "kind": 0,
        "offset": 0,
    } | numbers

    def text(content: bytes, length=None):
        return struct.pack("<Q", len(content) if length is None else length) + content

    parts = [b"GGUF", struct.pack("<IQQ", said["version"], said["tensors"], said["keys"])]
    parts += [text(b"general.architecture", said.get("length")), struct.pack("<I", 8), text(b"llama")]
    parts += [text(b"tokens"), struct.pack("<IIQ", 9, said.get("inner", 8), said["elements"]), text(b"a"), text(b"b")]
    for _ in range(said.get("repeated", 1)):
        parts += [text(b"t%d" % _), struct.pack("<I", said["rank"]), struct.pack("<Q", said["side"])]
        parts += [struct.pack("<IQ", said["kind"], said["offset"])]
    head = b"".join(parts)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(128))
    return path


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"version": 1}, "version 1: only versions 2 and 3"),
        ({"version": 3 << 24}, "only versions 2 and 3"),
        ({"tensors": 1 << 63}, "says that it has 9223372036854775808 tensors"),
        ({"keys": 1 << 40}, "says that it has 1 tensors and 1099511627776 settings"),
        ({"keys": 9000}, "truncated|damaged"),
        ({"tensors": 9000}, "truncated|damaged"),
        ({"elements": 1 << 50}, "no vocabulary has so many"),
        ({"elements": 1_500_000, "inner": 0}, "truncated"),
        ({"inner": 9}, "a list of the kind 9"),
        ({"inner": 77}, "a list of the kind 77"),
        ({"length": 1 << 40}, "a text of 1099511627776 bytes"),
        ({"rank": 1 << 30}, "1073741824 dimensions"),
        ({"side": 0}, "in blocks of 1"),
        ({"side": 1 << 60}, "truncated: 't0'|truncated: t0 ends at byte"),
        ({"side": 33, "kind": 8}, "in blocks of 32"),
        ({"kind": 999}, "number 999"),
        ({"kind": 24}, "number 24"),  # whole numbers
        ({"offset": 1 << 62}, "truncated: t0 ends at byte"),
        ({"tensors": 2, "repeated": 2}, "its tensors overlap"),
    ],
)
def test_what_a_header_says_is_compared_with_the_file(tmp_path, numbers, sentence):
    with pytest.raises(safe_files.BadFile, match=sentence):
        read_header(lie(tmp_path / "lie.gguf", **numbers))


def test_that_file_without_the_lie_has_a_header(tmp_path):
    header = read_header(lie(tmp_path / "true.gguf"))
    assert header.shapes == {"t0": (32,)} and header.settings == {"general.architecture": "llama"}
    assert header.weights == 32 and header.shares() == {"F32": 1.0}


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"llama__block_count": 10**9}, "says that it is llama with 1000000000 layers, and has 2"),
        ({"llama__feed_forward_length": 10**12}, "but a model of its configuration has"),
        ({"llama__embedding_length": 128}, "but a model of its configuration has"),
        ({"llama__attention__head_count": 0}, "could not be read as a model"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused_before_a_model_is_made(tmp_path, cache, numbers, sentence):
    path = tmp_path / "x.gguf"
    gguf_files.write(path)
    whole = path.read_bytes()
    for name, value in numbers.items():
        key = name.replace("__", ".").encode()
        at = whole.index(key) + len(key) + 4
        whole = whole[:at] + struct.pack("<I", value % (1 << 32)) + whole[at + 4 :]
    path.write_bytes(whole)
    refused(path, sentence)
    assert not cache.exists()


def test_weights_that_fit_no_place_leave_nothing_behind(tmp_path, cache):
    path = tmp_path / "x.gguf"
    gguf_files.write(path)
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    refused(path, "could not be made into a model folder: it has no model.layers.1.self_attn.q_proj.weight")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_other_families_and_other_files_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    gguf_files.write(path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    refused(path, "is a mamba model: only GPT-2, .* blocks are supported")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(path, "is not a GGUF file")
    refused(tmp_path / "none.gguf", "unknown model .* a .gguf file or a folder")


def test_a_file_that_came_from_the_internet_cannot_forge_where_it_is_from(tmp_path, good):
    """Only folders in the cache say what they were made from."""
    made = gguf_model.gguf_folder(good, check_architecture)
    assert json.loads((made / "made_from.json").read_text(encoding="utf-8"))["file"] == "small.gguf"
    assert gguf_model.origin(made).startswith("small.gguf")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "made_from.json").write_text("[1]", encoding="utf-8")
    assert gguf_model.origin(copy) is None
