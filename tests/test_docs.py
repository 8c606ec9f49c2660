"""The API page names what there is, and nothing that is not."""

import re

import tclib as tc
from tclib import attribution, connections, evaluation, factorisation, interventions, linearity, targets
from tests.conftest import REPO
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
    tokens = tc.trace(model, {}, "w1 w2 w3").tokens
    table = evaluation.evaluate(model, transcoders, tokens[None])
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
