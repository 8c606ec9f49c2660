"""circuitsvis views that share one copy of its code, and show something where scripts do not run.

A view of circuitsvis itself carries 1.3 MB, or loads as much from the network after looking for it at every display,
and is empty in a notebook that is not trusted. Here the code is written into a page once, compressed; a view is a
static picture that is replaced when, and if, the code has arrived. Ids are hashes of the content, so a second run gives
the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from tclib.plots import highlighted
from tclib.ui.markup import picture

_START = """<script>
globalThis.tclibCircuitsVis ??= (async () => {
  const packed = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = (await new Response(unpacked).text()) + "\\nglobalThis.CircuitsVis = CircuitsVis;";
  document.head.append(script);
})();
</script>"""

_VIEW = """<div id="%(id)s" style="margin: 15px 0">%(static)s</div><script>
(function wait(tries) {
  const lib = globalThis.CircuitsVis, place = document.getElementById("%(id)s");
  if (!lib && tries) return setTimeout(wait, 100, tries - 1);
  if (!lib || !place) return;
  place.replaceChildren();
  lib.render("%(id)s", lib.%(element)s, %(properties)s);
})(300);
</script>"""


class View:
    """HTML that Jupyter displays."""

    def __init__(self, text: str):
        self.text = text

    def _repr_html_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return "<interactive view: trust or run the notebook>"


def bundle() -> View:
    """circuitsvis' code: display it once per notebook, before or after the views.

    Raises:
        ValueError: circuitsvis is not installed.
    """
    try:
        import circuitsvis
    except ImportError:
        raise ValueError("circuitsvis is not installed: install tclib[ui], or use the static views") from None
    code = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_bytes()
    code = code.replace(b"//# sourceMappingURL=iife.js.map", b"")
    return View(_START % base64.b64encode(gzip.compress(code, 9, mtime=0)).decode())


def coloured_tokens(tokens: Sequence[str], activations: Sequence[float], largest: float | None = None) -> View:
    """Tokens coloured by one value each; hover tells the number. Static: `tclib.plots.highlighted`.

    Raises:
        ValueError: the two lengths differ.
    """
    static = highlighted(tokens, activations, largest)
    top = float(largest or max(activations, default=0.0))
    properties = {"tokens": list(tokens), "values": _short(activations), "minValue": 0.0, "maxValue": top}
    return _view("ColoredTokens", properties, static)


def attention_heads(
    patterns: Float[np.ndarray, "head destination source"], tokens: Sequence[str], names: Sequence[str]
) -> View:
    """Attention patterns of several heads; a click enlarges one. Static: small multiples as a PNG.

    Raises:
        ValueError: sizes that do not fit.
    """
    patterns = np.asarray(patterns, float)
    if patterns.shape != (len(names), len(tokens), len(tokens)):
        raise ValueError(f"patterns of shape {patterns.shape} for {len(names)} heads and {len(tokens)} tokens")
    properties = {"attention": _short(patterns), "attentionHeadNames": list(names), "tokens": list(tokens)}
    return _view("AttentionHeads", properties, _small_multiples(patterns, names))


def _view(element: str, properties: dict, static: str) -> View:
    try:
        from circuitsvis.utils.convert_props import convert_props
    except ImportError:  # not installed: the picture is there all the same
        return View(static)
    # A token such as "</script>" must not end the script. In JSON, "<" stands only inside strings.
    written = convert_props(properties).replace("<", "\\u003c")
    name = hashlib.sha256(f"{element}{written}".encode()).hexdigest()[:12]
    return View(_VIEW % {"id": f"view-{name}", "static": static, "element": element, "properties": written})


def _short(values) -> list:
    return np.round(np.asarray(values, float), 3).tolist()


def _small_multiples(patterns: np.ndarray, names: Sequence[str]) -> str:
    columns = min(len(names), 6)
    rows = -(-len(names) // columns)
    drawn = Figure(figsize=(1.5 * columns, 1.7 * rows), dpi=70, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, pattern, name in zip(axes.flat, patterns, names, strict=False):
        ax.imshow(pattern, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(name, fontsize=8)
    told = f"attention patterns of {', '.join(names)}: destinations down, sources across"
    return picture(drawn, told, 105 * columns)
