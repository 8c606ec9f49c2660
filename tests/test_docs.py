"""The API page names what there is, and nothing that is not."""

import re

import pytest

import tclib as tc
from tclib import attribution, connections, evaluation, factorisation, interventions, linearity, targets
from tclib.cli import site
from tests.conftest import COMMITTED, REPO
from tests.tiny import make_model, make_transcoder
from tools import library_map

PAGE = (REPO / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_map_is_fresh():
    assert PAGE == library_map.fresh_page(), "run: python tools/library_map.py"


def test_every_public_name_is_on_the_page_and_exists():
    on_page = set(re.findall(r"`tc\.(\w+)", PAGE))
    assert on_page == set(tc.__all__)
    for name in on_page:
        assert getattr(tc, name) is not None


def test_table_columns_are_on_the_page(tmp_path):
    model = make_model(tmp_path)
    transcoders = {0: make_transcoder(0)}
    tokens = tc.trace(tc.ReplacementModel(model, {}), "w1 w2 w3").tokens
    table = evaluation.evaluate(tc.ReplacementModel(model, transcoders), tokens[None])
    for column in [*table.columns, *attribution.COLUMNS]:
        assert f"`{column}`" in PAGE, column


def test_functions_on_the_page_exist():
    for module, names in {
        targets: ("feature", "logit", "logit_difference", "head_source", "direction"),
        interventions: ("run", "replace_mlp", "reencode_input", "ablate_mlp", "ablate_head", "keep_features"),
        connections: (
            "pullback",
            "de_embed",
            "de_embed_through_mlp0",
            "ov_connections",
            "logit_lens",
            "data_weighted",
            "overlap",
        ),
        factorisation: ("by_features", "by_neurons", "by_sae", "terms_holding"),
        linearity: ("self_test", "by_autograd", "freeze", "propagate"),
    }.items():
        for name in names:
            assert name in PAGE and callable(getattr(module, name))


@pytest.mark.slow
def test_the_site_has_every_notebook_and_needs_no_network():
    assert site.docs([]) == 0
    pages = REPO / "build" / "site"
    contents = (pages / site.FIRST).read_text(encoding="utf-8")
    for path in COMMITTED:
        assert f"notebooks/{path.stem}.html" in contents
        assert (pages / "notebooks" / f"{path.stem}.html").is_file()
    for page in pages.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(https?:[^"]*)', page.read_text(encoding="utf-8")
        )
        assert not loaded, page


@pytest.mark.slow
def test_a_dead_link_stops_the_site(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    page.write_text("# A page\n\n[a heading](#a-page)\n", encoding="utf-8")
    assert site.docs([], tmp_path) == 0
    for link in ("../missing.md", "#no-heading", "missing.ipynb"):
        page.write_text(f"# A page\n\n[dead]({link})\n", encoding="utf-8")
        assert site.docs([], tmp_path) != 0, link
