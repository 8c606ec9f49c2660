// An attribution graph as Neuronpedia and circuit-tracer write it, with what a person did to it: pins, supernodes, names,
// pruning and edits. No drawing here; `graph_view.js` shows it.
class TclibGraph {
  constructor(file) {
    const lists = [file?.metadata?.prompt_tokens, file?.nodes, file?.links];
    if (!lists.every(Array.isArray)) throw Error("this is no attribution graph: it lacks prompt_tokens, nodes or links");
    this.file = file;
    this.tokens = file.metadata.prompt_tokens;
    const kinds = {embedding: "embedding", logit: "logit"};
    this.nodes = file.nodes.map(raw => {
      const kind = kinds[raw.feature_type] ?? (/error/.test(raw.feature_type) ? "error" : "feature");
      const layer = kind === "embedding" ? -1 : +raw.layer;
      if (typeof raw.node_id !== "string" || !Number.isInteger(layer) || !(raw.ctx_idx in this.tokens))
        throw Error(`node ${JSON.stringify(raw.node_id)} has no layer, or stands at no token of the prompt`);
      const feature = kind === "feature" ? +raw.node_id.split("_")[1] : null;
      return {raw, id: raw.node_id, kind, layer, feature, pos: raw.ctx_idx, influence: raw.influence ?? null,
        into: [], from: [], size: 0, share: 0};
    });
    this.layers = [...new Set(this.nodes.filter(n => n.kind !== "logit").map(n => n.layer))].sort((a, b) => a - b);
    const top = this.layers.length ? this.layers.at(-1) + 1 : 0;
    for (const node of this.nodes) if (node.kind === "logit") node.layer = top;
    this.layers.push(top);
    // circuit-tracer gives an error the id of a feature now and then: the feature keeps it.
    this.byId = new Map([...this.nodes].sort((a, b) => (a.kind === "feature") - (b.kind === "feature")).map(n => [n.id, n]));
    this.links = [];
    for (const {source, target, weight} of file.links) {
      const link = {source: this.byId.get(source), target: this.byId.get(target), weight};
      if (!link.source || !link.target || !Number.isFinite(weight))
        throw Error(`the link from ${source} to ${target} has no weight, or joins nodes that are not there`);
      link.target.into.push(link);
      link.source.from.push(link);
      link.target.size += Math.abs(weight);
      this.links.push(link);
    }
    // Influence is cumulative over nodes, the largest first; a node's own share is the step that it adds.
    let before = 0;
    for (const node of this.nodes.filter(n => n.influence !== null).sort((a, b) => a.influence - b.influence)) {
      node.share = node.influence - before;
      before = node.influence;
    }
    for (const node of this.nodes) if (node.kind === "logit") node.share = node.raw.token_prob || 1;
    const strength = ({weight, target}) => Math.abs(weight) / target.size * target.share;
    this.links.sort((a, b) => strength(b) - strength(a));
    this.read(file.qParams ?? {});
  }

  // Take over a state as it stands in a file or, in texts, in a link. Ids of nodes that are not there are kept along.
  read(q) {
    const list = value => (typeof value === "string" ? JSON.parse(value || "[]") : value ?? []);
    const ids = typeof q.pinnedIds === "string" ? q.pinnedIds.split(",").filter(Boolean) : q.pinnedIds ?? [];
    this.pinned = new Set(ids);
    this.groups = list(q.supernodes).map(([name, ...members]) => ({name, ids: members}));
    this.names = new Map(list(q.clerps).map(([feature, name]) => [String(feature), name]));
    this.namesRead = JSON.stringify(list(this.file.qParams?.clerps));
    this.edits = new Map(list(q.edits).filter(([id]) => this.byId.get(id)?.kind === "feature"));
    this.frozen = q.frozen ?? null;
    this.clicked = null;
    this.threshold = q.pruningThreshold == null || q.pruningThreshold === "" ? null : +q.pruningThreshold;
  }

  // The state as those viewers keep it. What nobody touched stays as it was, so that a file that was only looked at is
  // saved as it came.
  state() {
    const before = this.file.qParams ?? {};
    const q = {...before, pinnedIds: [...this.pinned], supernodes: this.groups.map(g => [g.name, ...g.ids])};
    const keep = (name, value, some) => { if (some) q[name] = value; else delete q[name]; };
    const names = [...this.names], pairs = JSON.stringify(names);
    if (pairs !== this.namesRead) keep("clerps", typeof before.clerps === "object" ? names : pairs, names.length);
    keep("edits", [...this.edits], this.edits.size);
    keep("frozen", this.frozen, this.edits.size && this.frozen);
    keep("pruningThreshold", this.threshold, this.threshold !== null);
    if (this.clicked !== null) q.clickedId = this.clicked;
    return q;
  }

  text() { return JSON.stringify({...this.file, qParams: this.state()}, null, 1) + "\n"; }

  // What restores this state: the parameters of Neuronpedia's links, behind a #.
  link(question) {
    const {pinnedIds, supernodes, clerps, pruningThreshold, edits, frozen} = this.state();
    const values = {...question, pinnedIds: pinnedIds.join(","), supernodes: JSON.stringify(supernodes), pruningThreshold,
      clerps: typeof clerps === "object" ? JSON.stringify(clerps) : clerps, edits: edits && JSON.stringify(edits), frozen};
    return new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined)).toString();
  }

  static linked(text) {
    const q = Object.fromEntries(new URLSearchParams(text.slice(text.indexOf("#") + 1)));
    if (!("pinnedIds" in q)) throw Error("this is no link to a graph: copy one with the button 'copy link'");
    return q;
  }

  // The default shows some fifty nodes beside the tokens.
  get shownShare() {
    const known = this.nodes.filter(n => n.influence !== null && n.kind !== "embedding").map(n => n.influence);
    return this.threshold ?? known.sort((a, b) => a - b)[Math.min(50, known.length) - 1] ?? 1;
  }

  visible() {
    const least = this.shownShare, kept = new Set([...this.pinned, ...this.edits.keys()]);
    for (const group of this.groups) group.ids.forEach(id => kept.add(id));
    return this.nodes.filter(n => n.influence === null || n.kind === "embedding" || n.influence <= least || kept.has(n.id));
  }

  name(node) {
    if (node.kind === "embedding") return this.token(node.pos);
    if (node.kind === "error") return `error of mlp${node.layer}`;
    const given = node.kind === "logit" ? node.raw.clerp?.replace(/ \(p=[\d.]+\)$/, "") : this.names.get(String(node.raw.feature));
    return given || node.raw.clerp || this.cards?.[`${node.layer}_${node.feature}`]?.name || this.number(node);
  }

  // The name where there is little room, and where the row tells the layer.
  label(node) {
    const name = this.name(node);
    return name === this.number(node) && node.kind === "feature" ? `[${node.feature}]` : name.replace(/^a number after /, "after ");
  }

  number(node) { return node.kind === "feature" ? `mlp${node.layer}[${node.feature}]` : node.kind === "logit" ? node.id : this.name(node); }

  token(position) { return `'${this.tokens[position].replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5")}'`; }

  group(id) { return this.groups.findIndex(g => g.ids.includes(id)); }

  // The nodes of the circuit: supernodes, what is pinned alone, and the answers.
  boxes() {
    const nodes = ids => ids.map(id => this.byId.get(id)).filter(Boolean);
    const grouped = new Set(this.groups.flatMap(g => g.ids));
    const alone = this.nodes.filter(n => this.byId.get(n.id) === n && !grouped.has(n.id) &&
      (this.pinned.has(n.id) || (n.kind === "logit" && n.raw.is_target_logit)));
    return [
      ...this.groups.map((g, color) => ({name: g.name, nodes: nodes(g.ids), color, id: `group ${color}`})),
      ...alone.map(n => ({name: this.name(n), nodes: [n], color: null, id: n.id})),
    ].filter(box => box.nodes.length);
  }

  // Between boxes: which share of a box's input another one brings, signed, its members weighted by their influence.
  flows(boxes) {
    const of = new Map(boxes.flatMap(box => box.nodes.map(n => [n, box]))), found = [];
    for (const to of boxes) {
      const own = n => n.share || 1e-9, all = to.nodes.reduce((sum, n) => sum + own(n), 0), shares = new Map();
      for (const n of to.nodes)
        for (const {source, weight} of n.into)
          shares.set(of.get(source), (shares.get(of.get(source)) ?? 0) + own(n) / all * weight / n.size);
      for (const [from, share] of shares) if (from && from !== to) found.push({from, to, share});
    }
    return found;
  }
}
