"""The front end of a graph: what its cards tell, and the page that shows one without a kernel.

Its scripts read and write the files of Neuronpedia and circuit-tracer: `graph_data.js` holds a graph and what a person
did to it, `graph_draw.js` and `graph_card.js` make drawings and cards, `graph_view.js` answers pointer and keyboard.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tclib.circuits.editing import FROZEN
from tclib.connections import logit_lenses
from tclib.features.naming import Names
from tclib.model import token_string
from tclib.tracing import Trace

TOP, EXAMPLES = 6, 4  # tokens that a card says are raised, and as many lowered; examples in it
_CODE, _STYLE = (
    "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)
    for names in (("graph_draw.js", "graph_card.js", "graph_data.js", "graph_view.js"), ("graph.css",))
)
# As in `base.PAGE`: a style is the only way to run a script that an output brings along.
FRONT = f"""<style>{_STYLE}</style><div class="tcg"></div>
<span style="animation: tclib-shown 1ms" onanimationstart="{html.escape(_CODE, quote=True)}"></span>"""


def cards(trace: Trace, features: Sequence[tuple[int, int]], names: Names | None = None) -> dict[str, dict[str, Any]]:
    """What a card tells of each feature (layer, feature): the tokens whose logits it raises and lowers, and, if there
    are ``names``, the text on which it fires most."""
    made: dict[str, dict[str, Any]] = {}
    by_layer: dict[int, list[int]] = {}
    for layer, feature in sorted(set(features)):
        by_layer.setdefault(layer, []).append(feature)
    for layer, indices in by_layer.items():
        scores = logit_lenses(trace, layer, indices)
        ends = [scores.topk(min(TOP, scores.shape[1]), largest=largest).indices.tolist() for largest in (True, False)]
        for feature, *tokens in zip(indices, *ends, strict=True):
            up, down = ([token_string(trace.model, i) for i in ids] for ids in tokens)
            examples = names.examples(layer, feature, EXAMPLES) if names else []
            made[f"{layer}_{feature}"] = {"up": up, "down": down, "examples": examples}
    return made


def page_html(file: Mapping[str, Any], cards: Mapping[str, Any] | None = None) -> str:
    """A page that needs neither a kernel nor a network: a graph (`neuronpedia.graph_json`, or any file of Neuronpedia's
    or circuit-tracer's) to look at, prune and group, and to save again."""
    data = script({"n": 1, "file": file, "cards": cards or {}, "modes": list(FROZEN)})
    title = html.escape(str(file["metadata"]["prompt"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title></head>'
        f'<body class="tcg-page"><div class="tcg-data">{data}</div>{FRONT}</body></html>\n'
    )


def script(data: Mapping[str, Any]) -> str:
    """Data for the front end, which no text in it can end early."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
