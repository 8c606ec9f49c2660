// The graph that one works with: what is shown, chosen and asked. Everything but measuring happens in this page.
const begin = mark => {
  const box = mark.closest(".tclib-explorer, body"), root = mark.parentElement?.querySelector(".tcg"), D = TclibDraw;
  const sent = name => JSON.parse(box.querySelector(`.tcg-${name} script`)?.textContent || "null");
  if (!root || root.graph) return;
  let data = sent("data"), graph, plan, cards = {}, result = null, fits = true, number = 0;
  let chosen = new Set(), focus = null, looked = null;  // ids: chosen by hand, in the tab order, under the pointer
  if (!data) return setTimeout(begin, 50, mark);
  root.innerHTML = TclibCard.frame(data.modes);
  const part = name => root.querySelector(`.${name}`), map = part("map"), circuit = part("circuit");
  const say = text => { part("tcg-said").textContent = text; };
  const attempt = action => { try { return action(); } catch (error) { say(`Not possible: ${error.message}.`); } };
  const nodesOf = id => (id?.startsWith("group ") ? graph.groups[id.slice(6)]?.ids ?? [] : [id]).filter(i => graph.byId.has(i));
  const asking = () => box.querySelector(".tcg-asked textarea");  // none in a saved page

  const send = more => {
    const field = asking();
    if (!field) return;
    field.value = JSON.stringify({n: ++number, of: data.n, state: graph.state(), ...more});
    field.dispatchEvent(new Event("change", {bubbles: true}));
  };

  // What marks a node or a box, for the eye and for a screen reader.
  const about = item => {
    const nodes = item.nodes ?? [item], ids = nodes.map(n => n.id), every = (set, mark) => (ids.every(id => set.has(id)) ? mark : "");
    const edited = ids.some(id => graph.edits.has(id)) ? "edited" : "", group = item.nodes ? -1 : graph.group(item.id);
    const classes = [every(chosen, "chosen"), item.nodes ? "" : every(graph.pinned, "pinned"), edited, group < 0 ? "" : `g${group % 6}`];
    const where = item.nodes?.length > 1 ? `supernode of ${ids.length} nodes` :
      `${graph.number(nodes[0])} at ${nodes[0].pos} ${graph.token(nodes[0].pos)}`;
    const marks = [graph.pinned.has(ids[0]) && "pinned", group >= 0 && `in ${graph.groups[group].name}`, edited].filter(Boolean);
    return {classes: classes.filter(Boolean).join(" "), said: [item.name ?? graph.name(item), where, ...marks].join(", ")};
  };

  const measured = item => {
    const values = result?.after && item.nodes.map(n => result.after[n.id]).filter(Boolean);
    return values?.length ? values.reduce((sum, row) => sum.map((v, i) => v + row[i]), [0, 0, 0]) : null;
  };

  const lines = item => {
    const m = measured(item), [first] = item.nodes;
    const place = item.nodes.length > 1 ? `${item.nodes.length} nodes` : first.kind === "feature" ?
      `${graph.number(first)} at ${graph.token(first.pos)}` : first.kind === "embedding" ? `token ${first.pos}` :
      first.kind === "logit" && first.raw.token_prob < 1 ? `probability ${(100 * first.raw.token_prob).toFixed(0)}%` : "";
    return [item.name, m ? `${D.number(m[0])} \u2192 ${D.number(m[2])} (predicted ${D.number(m[1])})` : place].filter(Boolean);
  };

  const draw = () => {
    const held = root.contains(document.activeElement) && document.activeElement.dataset?.id;
    const inCircuit = held && circuit.contains(document.activeElement), nodes = graph.visible(), boxes = graph.boxes();
    const wide = Math.max(260, part("tcg-graph").clientWidth - 2);
    plan = D.places(graph, nodes, wide);
    if (!plan.place.has(focus)) focus = nodes.find(n => n.kind === "logit")?.id ?? nodes[0]?.id;
    const drawn = D.map(graph, plan, about, focus);
    map.innerHTML = drawn.html;
    size(map, drawn.width, drawn.height);
    const written = boxes.map(lines), first = boxes.find(b => nodesOf(b.id).includes(focus))?.id ?? boxes[0]?.id;
    const below = D.circuit(graph, boxes, written, about, wide, first);
    circuit.innerHTML = below.html;
    circuit.place = below.place;
    size(circuit, wide, below.height);
    part("tcg-empty").hidden = boxes.length > 1;
    const least = graph.shownShare;
    const count = `${nodes.length} of ${graph.nodes.length} nodes`;
    part("prune").value = least;
    part("prune").setAttribute("aria-valuetext", count);
    part("tcg-count").textContent = `${count}, ${Math.round(100 * least)}% of influence`;
    edges();
    table();
    if (held) [...(inCircuit ? circuit : map).querySelectorAll("[data-id]")].find(e => e.dataset.id === held)?.focus();
  };
  const size = (svg, width, height) => {
    for (const [name, value] of Object.entries({width, height, viewBox: `0 0 ${width} ${height}`})) svg.setAttribute(name, value);
  };

  // The edges of what is looked at or chosen; else the strongest of all.
  const edges = () => {
    const ids = new Set(looked ? nodesOf(looked) : chosen), of = link => ids.has(link.source.id) || ids.has(link.target.id);
    const shown = graph.links.filter(l => plan.place.has(l.source.id) && plan.place.has(l.target.id) && (!ids.size || of(l)));
    const group = map.querySelector(".edges");
    group.innerHTML = D.edges(shown.slice(0, ids.size ? 120 : 70).reverse(), plan.place);
    group.classList.toggle("some", ids.size > 0);
  };

  const card = id => {
    const nodes = nodesOf(id).map(i => graph.byId.get(i));
    if (nodes.length) part("tcg-card").innerHTML = TclibCard.card(graph, nodes, cards);
  };
  const table = () => {
    const rows = result?.after ? graph.boxes().map(b => [b.name, measured(b)]).filter(([, m]) => m) : [];
    part("tcg-measured").innerHTML = rows.length ? TclibCard.table(rows, result, graph.frozen ?? data.modes[0]) : "";
  };

  const names = ids => ids.map(id => graph.byId.get(id)).filter(Boolean).map(n => graph.name(n)).join("; ");
  const look = id => { if (id !== looked) { looked = id; edges(); if (id) card(id); } };

  const choose = (id, more) => {
    const ids = nodesOf(id), all = ids.every(i => chosen.has(i));
    if (!more) chosen = new Set(ids);
    else for (const i of ids) all ? chosen.delete(i) : chosen.add(i);
    if (chosen.has(id)) { graph.clicked = id; send(); }
    say(chosen.size ? `Chosen: ${names([...chosen])}` : "Nothing is chosen.");
    draw();
    if (chosen.size) card(id);
  };

  const picked = what => {
    const ids = [...chosen].filter(id => what !== "feature" || graph.byId.get(id)?.kind === "feature");
    if (!ids.length) throw Error(`choose a ${what} first, by a click or the Enter key (Shift or the space bar add to the choice)`);
    return ids;
  };
  const changed = told => { say(told); draw(); send(); };
  const edit = value => {
    const ids = picked("feature");
    if (!asking()) throw Error("an edit is measured by a running notebook, and this is a saved page");
    if (!fits) throw Error("this file is of another model or of other transcoders, so nothing can be measured");
    for (const id of ids) graph.edits.set(id, value(graph.byId.get(id).raw.activation ?? 0));
    graph.frozen = part("frozen").value;
    ids.forEach(id => graph.pinned.add(id));
    changed(`Edited: ${names(ids)}`);
  };

  const actions = {
    pin() {
      const ids = picked("node"), all = ids.every(id => graph.pinned.has(id));
      for (const id of ids) all ? graph.pinned.delete(id) : graph.pinned.add(id);
      changed(`${all ? "Unpinned" : "Pinned"}: ${names(ids)}`);
    },
    group() {
      const ids = picked("node"), typed = part("name").value.trim();
      const free = Array.from({length: 99}, (_, i) => `group ${i + 1}`).find(n => !graph.groups.some(g => g.name === n));
      const touched = graph.groups.filter(g => g.ids.some(id => chosen.has(id)) || g.name === typed);
      const name = typed || touched[0]?.name || free, old = touched.find(g => g.name === name);
      for (const g of graph.groups) g.ids = g.ids.filter(id => !ids.includes(id));
      if (old) old.ids.push(...ids); else graph.groups.push({name, ids});
      graph.groups = graph.groups.filter(g => g.ids.length);
      ids.forEach(id => graph.pinned.add(id));
      part("name").value = "";
      changed(`Supernode ${name}: ${names(old?.ids ?? ids)}`);
    },
    ungroup() {
      const ids = picked("node"), before = graph.groups.length;
      graph.groups = graph.groups.filter(g => !g.ids.some(id => ids.includes(id)));
      if (graph.groups.length === before) throw Error("none of the chosen nodes is in a supernode");
      changed("The supernode is undone; its nodes stay pinned.");
    },
    rename() {
      const ids = picked("node"), name = part("name").value.trim(), group = graph.groups.find(g => ids.every(id => g.ids.includes(id)));
      if (!name) throw Error("type the new name first");
      if (group && ids.length === group.ids.length) group.name = name;
      else for (const id of picked("feature")) graph.names.set(String(graph.byId.get(id).raw.feature), name);
      part("name").value = "";
      changed(`Renamed: ${name}.`);
    },
    ablate() { edit(() => 0); },
    set() {
      const [, times, typed] = part("value").value.trim().match(/^([\u00d7x*]?)\s*([-\u2212]?\d+(?:\.\d+)?)$/) ?? [];
      if (typed === undefined) throw Error("type an activation such as 12.5, or a factor such as \u00d72");
      const value = +typed.replace("\u2212", "-");
      edit(old => (times ? value * old : value));
    },
    restore() {
      const ids = chosen.size ? [...chosen] : [...graph.edits.keys()];
      ids.forEach(id => graph.edits.delete(id));
      if (!graph.edits.size) result = null;
      changed("Put back.");
    },
    save() { download(`${graph.file.metadata.slug || "graph"}.json`, "application/json", graph.text()); },
    page() { download("graph.html", "text/html", TclibCard.page(mark, {...data, file: JSON.parse(graph.text()), cards})); },
    copy() {
      const text = `${location.href.split("#")[0]}#${graph.link(data.question)}`;
      part("link").value = text;
      part("link").select();
      Promise.resolve(navigator.clipboard?.writeText(text)).then(() => say("The link is copied."), () => say("The link is chosen: copy it."));
    },
  };
  const download = (name, type, text) => {
    const link = document.createElement("a");
    link.href = globalThis.URL.createObjectURL(new Blob([text], {type}));
    link.download = name;
    link.click();
    setTimeout(() => globalThis.URL.revokeObjectURL(link.href), 1000);
    say(`Saved as ${name}.`);
  };

  const load = (file, known) => {
    graph = new TclibGraph(file);
    graph.cards = cards = known ?? {};
    result = null;
    chosen = new Set();
    looked = null;
    root.graph = graph;
    part("frozen").value = graph.frozen ?? part("frozen").options[0].value;
    draw();
    card(focus);
  };
  const open = text => {
    let file;
    try { file = JSON.parse(text); } catch (error) { throw Error("this file is no JSON"); }
    load(file);
    fits = false;
    data = {...data, question: {prompt: file.metadata.prompt, answer: "", other: "", ...file.metadata.info?.question}};
    const features = graph.nodes.filter(n => n.kind === "feature").map(n => [n.id, n.layer, n.feature, n.pos, n.raw.activation]);
    send({open: {metadata: file.metadata, features}});
    say(`Opened: ${graph.nodes.length} nodes of ${file.metadata.prompt}`);
  };
  const restore = text => {
    const q = TclibGraph.linked(text);
    const same = !asking() || ["prompt", "answer", "other"].every(name => (q[name] ?? "") === (data.question?.[name] ?? ""));
    graph.read({...graph.file.qParams, ...q});
    if (!same) return send({question: q});
    changed("Restored from the link.");
  };

  const arrow = (svg, key) => {
    const places = svg === map ? plan.place : circuit.place, here = places.get(document.activeElement.dataset.id);
    const way = {ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0]}[key];
    let best = null, least = Infinity;
    for (const [id, {x, y}] of places) {
      const along = (x - here.x) * way[0] + (y - here.y) * way[1], aside = Math.abs((x - here.x) * way[1]) + Math.abs((y - here.y) * way[0]);
      if (along > 1 && along + 2 * aside < least) { least = along + 2 * aside; best = id; }
    }
    if (best) [...svg.querySelectorAll("[data-id]")].find(e => e.dataset.id === best).focus();
  };
  const keys = {p: "pin", u: "ungroup", a: "ablate", g: "group"};
  for (const svg of [map, circuit]) {
    const id = event => event.target.closest("[data-id]")?.dataset.id;
    svg.addEventListener("pointerover", event => id(event) && look(id(event)));
    svg.addEventListener("pointerleave", () => look(null));
    svg.addEventListener("click", event => id(event) && choose(id(event), event.shiftKey || event.ctrlKey || event.metaKey));
    svg.addEventListener("focusin", event => {
      if (!id(event)) return;
      svg.querySelectorAll('[tabindex="0"]').forEach(e => e.setAttribute("tabindex", -1));
      event.target.setAttribute("tabindex", 0);
      if (svg === map) focus = id(event);
      look(id(event));
    });
    svg.addEventListener("focusout", () => look(null));
    svg.addEventListener("keydown", event => {
      if (!id(event) || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key.startsWith("Arrow")) arrow(svg, event.key);
      else if (event.key === "Enter" || event.key === " ") choose(id(event), event.key === " " || event.shiftKey);
      else if (event.key === "Escape") { chosen = new Set(); changed("Nothing is chosen."); }
      else if (keys[event.key]) { if (!chosen.size) choose(id(event)); attempt(actions[keys[event.key]]); }
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }

  root.addEventListener("click", event => attempt(actions[event.target.closest("[data-do]")?.dataset.do] ?? (() => {})));
  root.addEventListener("keydown", event => {
    const enter = {name: () => actions.group(), value: () => actions.set(), link: () => restore(part("link").value)}[event.target.className];
    if (event.key === "Enter" && enter) attempt(enter);
  });
  part("prune").addEventListener("input", () => { graph.threshold = +part("prune").value; draw(); });
  part("prune").addEventListener("change", () => send());
  part("frozen").addEventListener("change", () => { graph.frozen = part("frozen").value; if (graph.edits.size) changed("Measured again."); });
  part("file").addEventListener("change", async () => {
    const [file] = part("file").files, text = file && (await file.text());
    part("file").value = "";
    if (file) attempt(() => open(text));
  });

  // What Python sends: another graph, or what was measured, or whether an opened file is this model's.
  const heard = () => {
    const next = sent("data"), answer = sent("result");
    if (next && next.n !== data.n) { data = next; fits = true; load(data.file, data.cards); }
    if (!answer || answer.of !== data.n || answer.n === result?.n) return;
    if ("fits" in answer) { fits = answer.fits; graph.cards = cards = answer.cards; }
    result = answer;
    draw();
  };
  const theme = () => {
    let color = null;
    for (let e = root.parentElement; e && !color; e = e.parentElement) {
      const parts = getComputedStyle(e).backgroundColor.match(/[\d.]+/g) ?? [0, 0, 0, 0];
      if (+(parts[3] ?? 1) > 0.5) color = parts;
    }
    const dark = color ? 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] < 128 : matchMedia("(prefers-color-scheme: dark)").matches;
    root.classList.toggle("tcg-dark", dark);
  };
  theme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
  new MutationObserver(theme).observe(document.body, {attributes: true});
  for (const name of ["data", "result"]) {
    const place = box.querySelector(`.tcg-${name}`);
    if (place) new MutationObserver(heard).observe(place, {childList: true, subtree: true});
  }
  attempt(() => load(data.file, data.cards));
  const before = JSON.parse(asking()?.value || "{}");  // of this same graph, in a view that was closed
  number = before.n ?? 0;
  if (before.of === data.n && !before.open) { graph.read({...graph.file.qParams, ...before.state}); draw(); }
  heard();
  if (location.hash.includes("pinnedIds=") && !globalThis.tclibLinked) attempt(() => restore(location.hash));
  globalThis.tclibLinked = true;
  let width = root.clientWidth;
  new ResizeObserver(() => { if (root.clientWidth !== width) { width = root.clientWidth; draw(); } }).observe(root);
};
begin(this);
