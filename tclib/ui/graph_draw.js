// Where nodes and boxes stand, and the drawings as SVG text: layers upwards, positions across.
const TclibDraw = {
  LINE: 17, DOT: 12, LEFT: 52,
  pen: document.createElement("canvas").getContext("2d"),

  escape: text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`),
  short: (text, most) => (text.length <= most ? text : `${text.slice(0, most - 1)}\u2026`),
  number: value => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(Math.abs(value) >= 10 ? 1 : 2)),
  wide(text, size = 11) { TclibDraw.pen.font = `${size}px system-ui, sans-serif`; return TclibDraw.pen.measureText(text).width; },
  layerName: (graph, layer) => (layer < 0 ? "token" : layer === graph.layers.at(-1) ? "answer" : `mlp ${layer}`),

  // Places of nodes in cells of layer and position. Names are written, if need be shortened, where there is room for all.
  places(graph, nodes, width) {
    const D = TclibDraw, space = Math.max(120, width - D.LEFT - 8);
    const named = node => node.kind === "feature" || node.kind === "logit";
    const attempt = labels => {
      const letters = node => D.short(graph.label(node), labels), cells = new Map();
      const size = node => (labels && named(node) ? 22 + D.wide(letters(node)) : D.DOT + 2);
      for (const node of nodes) {
        const key = `${node.layer} ${node.pos}`;
        cells.set(key, [...(cells.get(key) ?? []), node]);
      }
      const columns = graph.tokens.map((_, pos) => Math.max(16, ...graph.layers.map(layer =>
        (cells.get(`${layer} ${pos}`) ?? []).reduce((sum, node) => sum + size(node), 0))));
      const least = graph.tokens.map((_, pos) => Math.max(16, ...graph.layers.flatMap(layer =>
        (cells.get(`${layer} ${pos}`) ?? []).map(size))));
      const sum = limit => columns.reduce((all, c, pos) => all + Math.max(least[pos], Math.min(c, limit)), 0);
      let low = 0, high = Math.max(...columns);
      if (sum(low) > space && labels) return null;
      for (let i = 0; i < 20; i++) sum((low + high) / 2) <= space ? (low = (low + high) / 2) : (high = (low + high) / 2);
      const widths = columns.map((c, pos) => Math.max(least[pos], Math.min(c, low)));
      const spare = Math.max(0, space - widths.reduce((a, b) => a + b, 0)) / widths.length;
      const starts = widths.reduce((all, w) => [...all, all.at(-1) + w + spare], [D.LEFT]);
      const lines = new Map(), heights = new Map();
      for (const [key, members] of cells) {
        const broken = [[]], most = widths[members[0].pos] + spare;
        let used = 0;
        for (const node of members.sort((a, b) => b.share - a.share)) {
          if (used + size(node) > most + 0.5 && broken.at(-1).length) { broken.push([]); used = 0; }
          broken.at(-1).push(node);
          used += size(node);
        }
        lines.set(key, broken);
        heights.set(members[0].layer, Math.max(heights.get(members[0].layer) ?? 1, broken.length));
      }
      const rows = [], place = new Map();
      let y = 6;
      for (const layer of [...graph.layers].reverse()) {
        const tall = (heights.get(layer) ?? 1) * D.LINE + 12;
        rows.push({layer, y, tall});
        graph.tokens.forEach((_, pos) => (lines.get(`${layer} ${pos}`) ?? []).forEach((line, number, all) => {
          const total = line.reduce((sum, node) => sum + size(node), 0);
          let x = starts[pos] + (widths[pos] + spare - total) / 2;
          for (const node of line) {
            place.set(node.id, {node, x: labels && named(node) ? x + 6 : x + size(node) / 2,
              y: y + tall / 2 + (number - (all.length - 1) / 2) * D.LINE, label: labels && named(node) ? letters(node) : ""});
            x += size(node);
          }
        }));
        y += tall + 22;
      }
      const columnsAt = starts.slice(0, -1).map((start, pos) => ({x: start + (widths[pos] + spare) / 2, wide: widths[pos] + spare}));
      return {place, rows, columns: columnsAt, width: starts.at(-1) + 8, bottom: y - 16};
    };
    return (nodes.filter(named).length <= 90 && (attempt(20) || attempt(12) || attempt(8))) || attempt(0);
  },

  shape({kind}) {
    if (kind === "feature") return '<circle r="5"/>';
    if (kind === "error") return '<path d="M0 -5L5 0L0 5L-5 0Z"/>';
    return '<rect x="-4.5" y="-4.5" width="9" height="9" rx="1.5"/>';
  },

  curve(a, b, weight, share) {
    const bend = Math.sign(a.y - b.y || 1) * Math.max(10, Math.abs(a.y - b.y) * 0.4), thick = (0.6 + 5 * Math.min(1, Math.abs(share))).toFixed(1);
    return `<path class="${weight > 0 ? "up" : "down"}" stroke-width="${thick}" d="M${a.x.toFixed(1)} ${(a.y).toFixed(1)}` +
      `C${a.x.toFixed(1)} ${(a.y - bend).toFixed(1)} ${b.x.toFixed(1)} ${(b.y + bend).toFixed(1)} ${b.x.toFixed(1)} ${(b.y).toFixed(1)}"/>`;
  },

  edges(links, place) {
    return links.filter(l => place.has(l.source.id) && place.has(l.target.id)).map(l =>
      TclibDraw.curve(place.get(l.source.id), place.get(l.target.id), l.weight, l.weight / l.target.size)).join("");
  },

  map(graph, plan, about, focus) {
    const D = TclibDraw, parts = [];
    for (const {layer, y, tall} of plan.rows)
      parts.push(`<rect class="row" x="0" y="${y}" width="${plan.width}" height="${tall}"/>` +
        `<text class="axis" x="4" y="${y + tall / 2 + 4}">${D.layerName(graph, layer)}</text>`);
    const words = graph.tokens.map((token, pos) => D.short(token.trim() || graph.token(pos), 10));
    const flat = plan.columns.every(({wide}, pos) => D.wide(words[pos]) + 4 < wide), below = plan.bottom + (flat ? 14 : 12);
    plan.columns.forEach(({x}, pos) => {
      const turned = flat ? 'text-anchor="middle"' : `text-anchor="end" transform="rotate(-50 ${x} ${below})"`;
      parts.push(`<text class="axis" x="${x + (flat ? 0 : 4)}" y="${below}" ${turned}>${D.escape(words[pos])}</text>`);
    });
    parts.push('<g class="edges"></g>');
    for (const [id, {node, x, y, label}] of plan.place) {
      const {classes, said} = about(node);
      const text = label && `<text x="8" y="3.5">${D.escape(label)}</text>`;
      parts.push(`<g class="${node.kind} ${classes}" data-id="${D.escape(id)}" role="button" tabindex="${id === focus ? 0 : -1}"` +
        ` aria-label="${D.escape(said)}" aria-pressed="${classes.includes("chosen")}" transform="translate(${x.toFixed(1)} ${y.toFixed(1)})">` +
        `<rect class="hit" x="-7" y="-8" width="${label ? 18 + D.wide(label) : 14}" height="16"/>${D.shape(node)}${text}</g>`);
    }
    const tall = flat ? 20 : 16 + 0.77 * Math.max(...words.map(word => D.wide(word)));
    return {html: parts.join(""), width: plan.width, height: plan.bottom + tall};
  },

  // Boxes in rows of layers, over the place in the prompt where they stand, none on top of another.
  boxPlaces(graph, boxes, lines, width) {
    const D = TclibDraw, rows = new Map(), place = new Map();
    const positions = boxes.map(box => box.nodes.reduce((sum, n) => sum + n.pos, 0) / box.nodes.length);
    const columns = [...new Set(positions)].sort((a, b) => a - b);
    boxes.forEach((box, i) => {
      const layer = Math.max(...box.nodes.map(n => n.layer)), x = (columns.indexOf(positions[i]) + 0.5) / columns.length * width;
      const wide = Math.min(width - 16, 20 + Math.max(...lines[i].map((line, number) => D.wide(line, number ? 10.5 : 12))));
      rows.set(layer, [...(rows.get(layer) ?? []), {box, lines: lines[i], wide, x}]);
    });
    let y = 10;
    for (const layer of [...rows.keys()].sort((a, b) => b - a)) {
      const broken = [[]];
      let used = 0;
      for (const item of rows.get(layer).sort((a, b) => a.x - b.x)) {
        if (used + item.wide + 12 > width && broken.at(-1).length) { broken.push([]); used = 0; }
        broken.at(-1).push(item);
        used += item.wide + 12;
      }
      for (const line of broken) {
        let edge = 8;
        for (const item of line) { item.x = Math.max(item.x, edge + item.wide / 2); edge = item.x + item.wide / 2 + 12; }
        edge = width - 8;
        for (const item of [...line].reverse()) { item.x = Math.min(item.x, edge - item.wide / 2); edge = item.x - item.wide / 2 - 12; }
        for (const item of line) place.set(item.box.id, {...item, y: y + 20});
        y += 52;
      }
      y += 34;
    }
    return {place, height: Math.max(40, y - 34)};
  },

  circuit(graph, boxes, lines, about, width, focus) {
    const D = TclibDraw, {place, height} = D.boxPlaces(graph, boxes, lines, width), parts = [];
    for (const {from, to, share} of graph.flows(boxes)) {
      if (Math.abs(share) < 0.005) continue;
      const told = `${from.name} \u2192 ${to.name}: ${(100 * share).toFixed(0)}% of its input`;
      const a = place.get(from.id), b = place.get(to.id);
      const up = a.y > b.y ? 20 : -20;  // a supernode may reach down to earlier layers than its highest node's
      const path = D.curve({x: a.x, y: a.y - up}, {x: b.x, y: b.y + up}, share, share);
      parts.push(path.replace("/>", `><title>${D.escape(told)}</title></path>`));
    }
    for (const [id, {box, lines: text, wide, x, y}] of place) {
      const {classes, said} = about(box);
      const written = text.map((line, i) => `<text text-anchor="middle" class="${i ? "small" : ""}" y="${i ? 13 : text.length > 1 ? -2 : 4}">` +
        `${D.escape(D.short(line, Math.floor(line.length * Math.min(1, (wide - 10) / D.wide(line, i ? 10.5 : 12)))))}</text>`).join("");
      parts.push(`<g class="box ${classes}" ${box.color === null ? "" : `style="--group: var(--g${box.color % 6})"`} data-id="${D.escape(id)}"` +
        ` role="button" tabindex="${id === focus ? 0 : -1}" aria-label="${D.escape(said)}" aria-pressed="${classes.includes("chosen")}"` +
        ` transform="translate(${x.toFixed(1)} ${y.toFixed(1)})"><rect x="${-wide / 2}" y="-20" width="${wide}" height="40" rx="7"/>${written}</g>`);
    }
    return {html: parts.join(""), height, place};
  },
};
