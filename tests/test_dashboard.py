"""Dashboards: what is on them is true, and the files need nothing but a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import tclib as tc
from tclib import connections, targets
from tclib.features import FeatureActivations, build_index, connect, dashboard, dashboard_figure, search
from tclib.transcoder import TranscoderConfig
from tclib.ui import circuitsvis_views, dashboard_page
from tests.tiny import make_model, make_transcoder

SILENT = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture(scope="module")
def transcoders():
    made = {layer: make_transcoder(layer) for layer in range(3)}
    for transcoder in made.values():
        transcoder.b_enc[SILENT] = -100
    return made


@pytest.fixture(scope="module")
def built(model, transcoders, tmp_path_factory):
    tokens = torch.randint(0, 40, (24, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 40
    return build_index(tc.ReplacementModel(model, transcoders), tokens, tmp_path_factory.mktemp("index") / "all")


@pytest.fixture(scope="module")
def truth(built):
    return pd.DataFrame({"even": built.flat_tokens[built.kept] % 2 == 0})


@pytest.fixture(scope="module")
def feature(built):
    return int(search.statistics(built, 1)["count"].idxmax())


@pytest.fixture(scope="module")
def made(model, transcoders, built, truth, feature):
    return dashboard.collect(tc.ReplacementModel(model, transcoders), built, 1, feature, truth)


class Reader(HTMLParser):
    """Tags, attributes and text of a page; a tag that is not closed is an error."""

    VOID = {"img", "meta", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_its_numbers_are_those_of_the_functions_it_stands_on(model, transcoders, built, truth, feature, made):
    s = made.statistics
    assert s["count"] == FeatureActivations(built, 1, feature).count and s["frequency"] == s["count"] / built.n_tokens
    assert s["max"] == FeatureActivations(built, 1, feature).top(1)["activation"][0] and s["live"]
    trace = tc.trace(tc.ReplacementModel(model, transcoders), "w1 w2 w3", check_fit=False)
    target = targets.feature(trace, 1, feature, 2)
    pd.testing.assert_series_equal(made.logit_lens, connections.logit_lens(trace, 1, feature))
    # Read at another prompt: input-invariant means just that.
    expected = connections.de_embed(trace, target)
    assert np.allclose(made.de_embedding[expected.index], expected, atol=1e-4)
    pull = connections.pullback(trace, target, 0)
    found = made.incoming.query("layer == 0").set_index("feature")["input_invariant"]
    assert np.allclose(found[pull.index], pull, atol=1e-4)
    back = connect.incoming(FeatureActivations(built, 2, 3), transcoders)
    back = back.set_index(["layer", "feature"]).loc[(1, feature)]
    there = made.outgoing.set_index(["layer", "feature"]).loc[(2, 3)]
    assert np.allclose(back.to_numpy(float), there.to_numpy(float), atol=1e-5)
    assert made.heads.shape == (2, 4)
    W_V, W_O, gain = model.W_V[1, 2], model.W_O[1, 2], trace.gain("attn_in", 1)[0]
    r = connections.reader(trace, target)
    through = (W_V @ (W_O @ r)) * gain
    assert made.heads.loc[1, 2] == pytest.approx(((through - through.mean()).norm() / r.norm()).item(), rel=1e-4)


def test_examples_cover_the_range(built, made, feature):
    bands = [e.band for e in made.examples]
    assert sorted(set(bands)) == [0, 1, 2, 3, 4, 5] and bands.count(0) == 5 and bands.count(3) == 3
    for e in made.examples:
        at = np.flatnonzero(built.entries(1, feature)[0] == e.row * built.width + e.position)
        value = built.entries(1, feature)[1][at[0]]
        assert value in e.activations and e.low <= value <= e.high
        assert len(e.tokens) == len(e.activations)


def test_the_page_is_whole_and_self_contained(made, tmp_path):
    path = tmp_path / "feature.html"
    dashboard_page.save_dashboard(made, path)
    found = Reader(path.read_text(encoding="utf-8"))
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "style"}
    (image,) = [attributes for tag, attributes in found.tags if tag == "img"]
    kind, data = image["src"].split(",", 1)
    assert kind == "data:image/png;base64" and base64.b64decode(data)[:4] == b"\x89PNG" and made.name in image["alt"]
    text = "".join(found.words)
    for word in (made.name, "band 5", "strongest activations", "suppressed", "target weighted", "even", "live"):
        assert word in text, word
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_page_twice(made):
    assert dashboard_page.dashboard_html(made) == dashboard_page.dashboard_html(made)


def test_a_feature_that_never_fired_has_a_page(model, transcoders, built, truth):
    d = dashboard.collect(tc.ReplacementModel(model, transcoders), built, 1, SILENT, truth)
    assert d.statistics["count"] == 0 and not d.examples and d.labels is None
    assert "never fired on 360 tokens" in dashboard_page.dashboard_html(d)
    first = dashboard.collect(tc.ReplacementModel(model, transcoders), built, 0, 0)
    assert first.incoming.empty and "tokens" in dashboard_page.dashboard_html(first)
    plt.close("all")


def test_export_links_pages_and_lists_every_feature(model, transcoders, built, truth, feature, tmp_path):
    listing = dashboard_page.export(
        tc.ReplacementModel(model, transcoders), built, 1, [feature, SILENT], tmp_path / "pages", truth
    )
    found = Reader(listing.read_text(encoding="utf-8"))
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert sorted(links) == sorted(f"layer_1_feature_{f}.html" for f in (feature, SILENT))
    for link in links:
        assert 'href="layer_1.html"' in (listing.parent / link).read_text(encoding="utf-8")
    assert sum(tag == "tr" for tag, _ in found.tags) == 64 + 1
    table = search.statistics(built, 1)
    assert f"{(table['frequency'] > dashboard.LIVE).sum()} of 64 features" in "".join(found.words)


def test_the_listing_names_the_commonest_token(model, built, feature):
    commonest = dashboard_page._commonest(model, built, 1)
    for f in (feature, 0, 1):
        token = int(FeatureActivations(built, 1, f).top_tokens(1)["token"][0])
        assert commonest[f] == repr(model.tokenizer.decode([token]))
    assert commonest[SILENT] == ""


def test_tokens_cannot_break_out(made):
    evil = "</div><script>alert('$x$')</script>"
    hostile = dashboard.Example(1, 0.0, 1.0, 0, 0, [evil], np.array([1.0], np.float32))
    renamed = made.logit_lens.rename({made.logit_lens.index[0]: evil})
    d = dashboard.Dashboard(**{**made.__dict__, "examples": [hostile], "logit_lens": renamed})
    found = Reader(dashboard_page.dashboard_html(d))
    assert "script" not in {tag for tag, _ in found.tags} and evil in "".join(found.words)
    dashboard_figure.figure(d).canvas.draw()  # nor mathematics in the figure
    plt.close("all")
    assert Reader(circuitsvis_views.coloured_tokens([evil], [1.0]).text).tags.count(("script", {})) == 1


def test_bad_input_gets_one_sentence(model, transcoders, built):
    with pytest.raises(ValueError, match="layer 1 has no transcoder"):
        dashboard.collect(tc.ReplacementModel(model, {0: transcoders[0]}), built, 1, 0)
    with pytest.raises(ValueError, match="layer 7 is not in this index"):
        dashboard.collect(tc.ReplacementModel(model, transcoders), built, 7, 0)
    with pytest.raises(ValueError, match="feature 64 is outside"):
        dashboard.collect(tc.ReplacementModel(model, transcoders), built, 1, 64)
    other = {**transcoders, 1: make_transcoder(1, seed=8)}
    with pytest.raises(ValueError, match="was made from transcoder .* of layer 1, not from this one"):
        dashboard.collect(tc.ReplacementModel(model, other), built, 1, 0)


def test_neuronpedia_only_where_there_is_a_page():
    def config(**changes):
        hooks = {"hook_in": "blocks.8.ln2.hook_normalized", "hook_out": "blocks.8.hook_mlp_out"}
        sizes = {"d_in": 768, "d_out": 768, "d_features": 24_576, "model_name": "gpt2-small"}
        return TranscoderConfig(**{**hooks, **sizes, **changes})

    assert dashboard.neuronpedia(config(), 8, 355) == "https://www.neuronpedia.org/gpt2-small/8-tres-dc/355"
    assert dashboard.neuronpedia(config(), 7, 355) is None
    assert dashboard.neuronpedia(config(model_name="bundled"), 8, 355) is None
    assert dashboard.neuronpedia(config(d_features=2048), 8, 355) is None


# --- circuitsvis


def test_without_circuitsvis_the_picture_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "circuitsvis.utils.convert_props", None)
    view = circuitsvis_views.attention_heads(np.tril(np.ones((1, 2, 2))), ["a", "b"], ["0.0"])
    assert "<img" in view.text and "<script" not in view.text


def test_views_are_small_repeatable_and_static_first():
    view = circuitsvis_views.coloured_tokens(["a", " b"], [0.0, 1.25])
    assert view.text == circuitsvis_views.coloured_tokens(["a", " b"], [0.0, 1.25]).text
    assert view.text != circuitsvis_views.coloured_tokens(["a", " b"], [0.0, 1.5]).text
    assert len(view.text) < 2000 and "rgba(230" in view.text and view._repr_html_() == view.text
    assert "http" not in view.text.replace("http://www.w3.org", "")
    patterns = np.tril(np.ones((3, 4, 4)))
    heads = circuitsvis_views.attention_heads(patterns, list("abcd"), ["0.0", "0.1", "0.2"])
    assert heads.text == circuitsvis_views.attention_heads(patterns, list("abcd"), ["0.0", "0.1", "0.2"]).text
    assert heads.text.index("data:image/png") < heads.text.index("<script>")
    with pytest.raises(ValueError, match="patterns of shape"):
        circuitsvis_views.attention_heads(patterns, list("abc"), ["0.0", "0.1", "0.2"])
    with pytest.raises(ValueError, match="2 tokens but 1"):
        circuitsvis_views.coloured_tokens(["a", "b"], [1.0])


def test_the_bundle_holds_circuitsvis_once_and_fits_a_notebook():
    text = circuitsvis_views.bundle().text
    assert len(text) < 600_000 and text == circuitsvis_views.bundle().text
    code = gzip.decompress(base64.b64decode(re.search(r'atob\("([^"]+)"\)', text)[1])).decode()
    assert code.lstrip().startswith('"use strict";var CircuitsVis=')


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_bundle_and_the_views_run():
    """In node, with a document that only remembers: the code unpacks, and each view calls what is really in it."""
    views = [
        circuitsvis_views.coloured_tokens(["a", "</script>"], [0.0, 1.0]),
        circuitsvis_views.attention_heads(np.tril(np.ones((2, 2, 2))), ["a", "b"], ["0.0", "0.1"]),
    ]
    scripts = [re.search(r"<script>(.*)</script>", v.text, re.DOTALL)[1] for v in [circuitsvis_views.bundle(), *views]]
    program = """
        const place = { replaceChildren() { place.cleared = true; } };
        globalThis.document = {
          createElement: () => ({ style: {}, setAttribute() {} }), createTextNode: () => ({}), body: {},
          head: { append: (script) => {
            (0, eval)(script.textContent);
            globalThis.CircuitsVis = { ...globalThis.CircuitsVis, render: (id, element, properties) =>
              console.log(JSON.stringify([id, typeof element, Object.keys(properties), place.cleared])) };
          } },
          documentElement: { style: {} }, addEventListener() {}, getElementById: () => place, querySelector: () => null,
        };
        globalThis.window = globalThis;
        for (const script of %s) (0, eval)(script);
        setTimeout(() => process.exit(0), 4000);
    """  # the views stand before the code has arrived, as in a notebook
    source = program % json.dumps([*scripts[1:], scripts[0]])
    done = subprocess.run(["node", "-"], input=source, capture_output=True, encoding="utf-8", timeout=60)
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(calls) == 2, done.stderr
    for (name, kind, properties, cleared), view in zip(calls, views, strict=True):
        assert name in view.text and kind in ("function", "object") and cleared and "tokens" in properties
