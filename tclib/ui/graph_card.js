// What stands around the drawings: the controls, the card of a node, and what was measured, as HTML text.
const TclibCard = {
  frame: modes => `
<div class="tcg-bar" role="toolbar" aria-label="graph">
  <span><label>prune <input class="prune" type="range" min="0.02" max="1" step="0.005" aria-label="prune: influence that is shown"></label>
    <output class="tcg-count faint"></output></span>
  <span><button data-do="save" title="as JSON for Neuronpedia and circuit-tracer">save</button>
    <label class="button">open<input class="file" type="file" accept=".json,application/json" aria-label="open a saved graph"></label>
    <button data-do="page" title="a page that needs no kernel">save page</button></span>
  <span><button data-do="copy">copy link</button>
    <input class="link" placeholder="paste a link, Enter" aria-label="link to this state: paste one and press Enter"></span>
</div>
<div class="tcg-bar" role="toolbar" aria-label="what is chosen">
  <span><button data-do="pin" title="key P">pin</button>
    <input class="name" placeholder="name" aria-label="name of a supernode or a feature">
    <button data-do="group" title="key G">group</button><button data-do="ungroup" title="key U">ungroup</button>
    <button data-do="rename" title="a feature, or a whole supernode">rename</button></span>
  <span><button data-do="ablate" title="key A: set to 0">ablate</button>
    <input class="value" placeholder="12.5 or \u00d72" aria-label="activation to set, or a factor such as \u00d72">
    <button data-do="set">set</button><button data-do="restore">put back</button>
    <select class="frozen" aria-label="what is frozen while an edit is measured">${modes.map(m => `<option>${m}</option>`).join("")}</select></span>
</div>
<div class="tcg-said" role="status" aria-live="polite"></div>
<div class="tcg-main">
  <div class="tcg-graph">
    <div class="tcg-scroll"><svg class="map" role="group" aria-label="attribution graph, layers upwards, tokens across"></svg></div>
    <h4>Circuit of what is pinned</h4>
    <p class="tcg-empty faint">Choose a node (click, or arrow keys and Enter) and pin it (P) or group several (Shift and click, then G).</p>
    <div class="tcg-scroll"><svg class="circuit" role="group" aria-label="circuit of pinned nodes and supernodes"></svg></div>
  </div>
  <div class="tcg-side"><div class="tcg-card" role="region" aria-label="card of a node"></div><div class="tcg-measured"></div></div>
</div>`,

  code: text => `<code>${TclibDraw.escape(text.replace(/\n/g, "\u23ce"))}</code>`,

  card(graph, nodes, cards) {
    const {escape, number} = TclibDraw, [node] = nodes, several = nodes.length > 1;
    const known = several ? null : cards[`${node.layer}_${node.feature}`], group = graph.groups[graph.group(node.id)];
    const place = n => `${graph.name(n)}, ${n.kind === "feature" ? `mlp${n.layer} ` : ""}at ${n.pos} ${graph.token(n.pos)}`;
    const facts = several ? [`supernode of ${nodes.length} nodes`] : [`${graph.number(node)} at ${node.pos} ${graph.token(node.pos)}`];
    if (!several && node.raw.activation != null) facts.push(`activation ${number(node.raw.activation)}`);
    if (!several && group) facts.push(`in ${group.name}`);
    if (!several && graph.edits.has(node.id)) facts.push(`edited to ${number(graph.edits.get(node.id))}`);
    const parts = [`<h4>${escape(several ? group?.name : graph.name(node))}</h4><p class="faint">${escape(facts.join(" \u00b7 "))}</p>`];
    if (several) parts.push(`<ul>${nodes.map(n => `<li>${escape(place(n))}</li>`).join("")}</ul>`);
    if (known) parts.push(`<p><b>raises</b> ${known.up.map(TclibCard.code).join(" ")}<br><b>lowers</b> ${known.down.map(TclibCard.code).join(" ")}</p>`);
    if (known?.examples.length) parts.push(`<b>fires most on</b><ul>${known.examples.map(([list, at]) =>
      `<li>${list.map((t, i) => (i === at ? `<mark>${escape(t)}</mark>` : escape(t))).join("").replace(/\n/g, "\u23ce")}</li>`).join("")}</ul>`);
    const bar = (share, n) => `<tr><td class="${share > 0 ? "up" : "down"}">${share > 0 ? "+" : "\u2212"}${Math.abs(100 * share).toFixed(0)}%</td>` +
      `<td><i class="${share > 0 ? "up" : "down"}" style="width:${Math.min(100, Math.abs(150 * share)).toFixed(0)}%"></i>${escape(place(n))}</td></tr>`;
    for (const [title, links, end] of several ? [] : [["strongest inputs", node.into, "source"], ["strongest outputs", node.from, "target"]]) {
      const best = links.map(l => [l.weight / l.target.size, l[end]]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 5);
      if (best.length) parts.push(`<table><caption>${title}, share of what enters the reader</caption>${best.map(row => bar(...row)).join("")}</table>`);
    }
    return parts.join("");
  },

  table(rows, result, frozen) {
    const {escape, number} = TclibDraw, cells = (values, form) => values.map(v => `<td>${form(v)}</td>`).join("");
    const head = names => `<tr><td></td>${names.map(name => `<th scope="col">${name}</th>`).join("")}</tr>`;
    return `<h4>After the edit, ${escape(frozen)}</h4><table><caption>activation, or value of the answer</caption>` +
      head(["before", "predicted", "measured"]) +
      rows.map(([name, m]) => `<tr><th scope="row">${escape(name)}</th>${cells(m, number)}</tr>`).join("") +
      `</table><table><caption>likeliest next tokens, measured</caption>${head(["before", "after"])}` +
      result.tokens.map(([text, ...p]) => `<tr><th scope="row">${TclibCard.code(text)}</th>${cells(p, v => `${(100 * v).toFixed(1)}%`)}</tr>`).join("") + "</table>";
  },

  // A page of its own, as `graph_page.page_html` makes it: the same scripts, with this graph as it is now.
  page: (mark, data) => `<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>${TclibDraw.escape(data.file.metadata.prompt)}</title></head>
<body class="tcg-page"><div class="tcg-data"><script type="application/json">${JSON.stringify(data).replace(/</g, "\\u003c")}</script></div>
${mark.parentElement.querySelector("style").outerHTML}<div class="tcg"></div>${mark.outerHTML}</body></html>`,
};
