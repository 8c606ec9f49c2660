"""What is bundled is what its page says, small enough, and loads offline."""

import hashlib
import json
import re

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import tclib as tc
from tclib import text
from tests.conftest import REPO
from tests.tiny import make_model

DATA = REPO / "data"
pytestmark = pytest.mark.skipif(not (DATA / "README.md").exists(), reason="data/ has not been made yet")


def test_every_file_is_on_the_page_with_its_checksum():
    page = (DATA / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([^`]+)` \| \d+ \| `([0-9a-f]{64})`", page, flags=re.MULTILINE))
    found = {p.relative_to(DATA).as_posix(): p for p in DATA.rglob("*") if p.is_file() and p != DATA / "README.md"}
    assert listed.keys() == found.keys()
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name], name


def test_sizes():
    def size(folder):
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    assert size(DATA / "model") <= 25e6 and size(DATA / "smollm2") <= 60e6
    assert size(DATA) - size(DATA / "smollm2") <= 60e6


def test_metrics_hold_what_is_promised():
    metrics = json.loads((DATA / "model" / "metrics.json").read_text(encoding="utf-8"))
    promised = {"probability_difference", "balanced_difference", "bits_per_char", "mlp_drops", "by_nouns"}
    assert promised <= metrics.keys()
    report = json.loads((DATA / "transcoders" / "report.json").read_text(encoding="utf-8"))
    for name in ("chronicle", "real"):
        for layer in tc.load_transcoders():
            assert {"l0", "fvu", "recovered"} <= report[name][str(layer)].keys()


def test_rows_of_real_prose_agree_with_the_report():
    rows = json.loads((DATA / "transcoders" / "real_rows.json").read_text(encoding="utf-8"))
    report = json.loads((DATA / "transcoders" / "report.json").read_text(encoding="utf-8"))["real"]
    assert len(rows["ce"]) == len(rows["work"]) and set(rows["work"]) == set(range(len(rows["works"])))
    for layer, measured in report.items():  # of more rows of the same books
        for way in ("replaced", "zero", "mean"):
            lost = sum(rows[f"ce_{way}"][layer]) / len(rows["ce"]) - sum(rows["ce"]) / len(rows["ce"])
            assert lost == pytest.approx(measured[f"ce_{way}"] - measured["ce"], rel=0.3)
    assert all(kl >= 0 for group in rows["kl_replaced"].values() for kl in group)


@pytest.fixture(scope="module")
def model():
    return tc.load_model()


def test_model_tokens_and_transcoders_belong_together(model):
    trace = tc.trace(
        tc.ReplacementModel(model, tc.load_transcoders()), "The war lasted from the year 1732 to the year 17"
    )
    assert trace.token_strings[0] == "<bos>" and trace.token_strings[-1] == " 17"
    assert trace.token_strings[7:9] == [" 17", "32"]
    tokens = text.load_text(model, "chronicle", 16)
    report = json.loads((DATA / "transcoders" / "report.json").read_text(encoding="utf-8"))
    table = tc.evaluate(tc.ReplacementModel(model, tc.load_transcoders()), tokens).set_index("layer")
    for layer, row in table.iterrows():
        assert row["fvu"] == pytest.approx(report["chronicle"][str(layer)]["fvu"], rel=0.35, abs=0.02)


def test_text_rows_and_labels(model):
    labelled = text.chronicle(model, 5, seed=3)
    assert labelled.tokens.shape == labelled.labels.shape == (5, model.cfg.n_ctx)
    assert (labelled.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    years = labelled.tokens[torch.from_numpy(labelled.labels == "span.end.year")]
    assert len(years) and all(re.fullmatch(r"\d\d", model.tokenizer.decode([i])) for i in years.tolist())
    assert torch.equal(text.load_text(model, "chronicle", 5, seed=3), labelled.tokens)
    assert not torch.equal(text.load_text(model, "chronicle", 5, seed=4), labelled.tokens)


def test_sampled_text_and_files(model, tmp_path):
    sampled = text.load_text(model, "sampled", 7)
    assert sampled.shape == (7, model.cfg.n_ctx) and (sampled[:, 0] == model.tokenizer.bos_token_id).all()
    (tmp_path / "a.txt").write_text("The war was long. " * 400, encoding="utf-8")
    rows = text.load_text(model, str(tmp_path), 4)
    assert rows.shape == (4, model.cfg.n_ctx)
    assert model.tokenizer.decode(rows[0, 1:9].tolist()).startswith("The war was long.")


@pytest.mark.parametrize(
    ("source", "rows", "sentence"),
    [
        ("chronicel", 4, "unknown text 'chronicel'"),
        ("chronicle", 0, "at least one row"),
        ("sampled", 10**6, "rows, but 1000000 were asked for"),
    ],
)
def test_bad_text_gets_one_sentence(model, source, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        text.load_text(model, source, rows)


def test_short_text_gets_one_sentence(model, tmp_path):
    (tmp_path / "a.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(ValueError, match="fills 0 rows of 128 tokens, but 2 were asked for"):
        text.load_text(model, str(tmp_path / "a.txt"), 2)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("gpt-2-large", "unknown model 'gpt-2-large'"), (str(REPO / "tests"), "config.json, model.safetensors")],
)
def test_unknown_models_get_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        tc.load_model(name)


def test_an_absent_device_gets_one_sentence():
    with pytest.raises(ValueError, match="choose one of"):
        tc.load_model("bundled", device="xpu")


def test_a_damaged_model_gets_one_sentence(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DATA / "model" / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        tc.load_model(str(tmp_path))


def test_another_architecture_gets_one_sentence(tmp_path):
    config = OPTConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16
    )
    make_model(tmp_path, layers=1, d_model=16, heads=2)  # for its tokenizer
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="positions and its MLP's activation differ"):
        tc.load_model(str(tmp_path), device="cpu")


def test_rows_are_as_wide_as_asked_for_and_no_wider_than_the_context(model, tmp_path):
    (tmp_path / "long.txt").write_text("the war lasted " * 200, encoding="utf-8")
    for source in ("chronicle", "sampled", str(tmp_path / "long.txt")):
        assert tc.load_text(model, source, 3, width=40).shape == (3, 40)
    assert tc.load_text(model, "chronicle", 2, width=5000).shape == (2, model.cfg.n_ctx)
    model.cfg.n_ctx, context = 4096, model.cfg.n_ctx  # rows stay short where a context is long
    try:
        assert tc.load_text(model, "chronicle", 2).shape == (2, 128)
    finally:
        model.cfg.n_ctx = context
    for source in ("chronicle", "sampled"):
        with pytest.raises(ValueError, match="width = 1: a row has at least two tokens"):
            tc.load_text(model, source, 2, width=1)


def test_what_notebook_11b_says_of_successors_in_another_model():
    rows = json.loads((DATA / "smollm2" / "successors.json").read_text(encoding="utf-8"))
    assert rows["digits"]["best part"] == "head 23.3" and rows["digits"]["score"] > rows["digits"]["highest"]
    for name in ("days", "months"):
        assert rows[name]["shuffled, lowest"] <= rows[name]["score"] <= rows[name]["highest"]
