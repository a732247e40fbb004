// The page `/explore`: what runs a text, and shows the answer.

import { Refused } from "./api.js";
import { viewOf, wantedOf } from "./answers.js";
import { Board } from "./board.js";
import { differenceOf } from "./compare.js";
import { exportControls, layerControls, mapControls } from "./controls.js";
import { byId, bytesText, make, makeButton } from "./dom.js";
import { Form } from "./form.js";
import { HeadGrid, gridSelections, headsOf, sampled } from "./grid.js";
import { Measure, canLeave, dropsOf, showDrops } from "./leave.js";
import { selectionOf, sequenceOf } from "./selection.js";
import { relation, showAnswer } from "./shown.js";

/** The page: boards with maps, the grid of heads, and what is known of the answer. */
class Page extends Form {
  constructor() {
    super();
    this.boards = [];
    this.titles = "";
    this.abort = null;
    this.grid = new HeadGrid(byId("grid"), (layer, head, added) => this.chooseHead(layer, head, added));
    this.gridOf = "";
  }

  change(change) {
    this.remember(change);
    return this.guard(() => this.run());
  }

  /** Draw what is there in another way, without a call. */
  redraw(change) {
    this.remember(change);
    // A threshold of weights says nothing about differences.
    for (const board of this.boards) board.set(board.view.signed ? { ...change, least: 0, top: 0 } : change);
  }

  /** The state, with what ran in place of what was left open. */
  named() {
    return { ...this.state, layer: this.layer(this.shown.model), text: this.shown.texts[0], pair: this.shown.texts[1] || "" };
  }

  caption() {
    const { model, receipt, view } = this.shown;
    return `${model.name} ${receipt.version}, ${receipt.digest.slice(0, 19)}, ${receipt.precision}: ${this.chosenText()}, ${view.rows.length} × ${view.columns.length}`;
  }

  chosenText() {
    const layer = this.layer(this.shown.model);
    const { heads } = this.state;
    const where = layer === "mean" ? "mean of all layers" : layer === "rollout" ? "rollout" : `layer ${layer}`;
    return `${where}, ${/^\d/.test(heads) ? `head ${heads}` : `${heads} of heads`}`;
  }

  async run() {
    const { state } = this;
    if (!state.text.trim()) return this.say("Type a text first.", true);
    if (this.abort) this.abort.abort();
    const abort = (this.abort = new AbortController());
    this.say("Running …");
    byId("ask").setAttribute("aria-busy", "true");
    try {
      await this.runBoth(abort.signal);
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        byId("ask").removeAttribute("aria-busy");
      }
    }
    if (byId("depth").open) await this.showGrid();
  }

  /** Run the text, and what it is compared with, and show both. @param {AbortSignal} signal */
  async runBoth(signal) {
    const { state } = this;
    const began = performance.now();
    const first = await this.answer(state.model, state.version, [state.text, state.pair], signal);
    let second = null;
    if (state.other === "text" && state.second.trim()) second = await this.answer(state.model, state.version, [state.second, ""], signal);
    if (state.other === "model") second = await this.answer(state.otherModel, state.otherVersion, [state.text, state.pair], signal);
    if (this.shown && this.shown.texts.join("\n") !== first.texts.join("\n")) this.remember({ pin: -1 });
    this.show(first, second);
    const words = first.view ? `${first.view.rows.length} ${state.unit}s, ` : "";
    this.say(`${words}${bytesText(first.bytes + (second ? second.bytes : 0))} in ${Math.round(performance.now() - began)} ms.`);
  }

  /** Run one text, and return what is drawn of it. */
  async answer(name, version, given, signal) {
    const model = await this.describe(name, version, signal);
    if (!model.accepts_text) throw new Refused(0, `${name} takes tensors, no text. Call it from Python: the page cannot make its inputs.`);
    const texts = given[1] ? given : [given[0]];
    const before = this.api.bytes;
    const tapped = Number(this.layer(model)) !== -1;
    const selection = tapped ? selectionOf({ ...this.state, layer: this.layer(model) }, texts.join("")) : null;
    const body = { sequences: [sequenceOf(given[0], given[1])], ...wantedOf(model, this.state.unit) };
    if (selection) body.attention = selection;
    const answer = await this.api.infer(name, version, body, signal);
    const [result] = answer.results;
    const view = tapped ? viewOf(result.attention, result.attention.maps[0], texts) : null;
    const bytes = this.api.bytes - before;
    return { model, texts, result, view, bytes, receipt: answer.receipt, selection: answer.effective_attention, measure: new Measure(result) };
  }

  show(first, second) {
    this.shown = first;
    byId("answer").hidden = false;
    byId("leave").hidden = true;
    const parts = second ? [first, second] : [first];
    byId("result").replaceChildren(
      ...parts.map((part) => {
        const host = make("div");
        showAnswer(host, part.model, part.result, !second);
        if (second) host.prepend(make("h3", "", this.titleOf(part, part === second)));
        return host;
      }),
    );
    byId("relation").textContent = second ? relation(first.result, second.result) : "";
    byId("relation").hidden = !byId("relation").textContent;
    this.showMaps(first, second);
    this.showFacts(first);
  }

  titleOf(part, other) {
    if (!other) return this.state.other === "text" ? "First text" : `${part.model.name} ${part.receipt.version}`;
    return this.state.other === "text" ? "Other text" : `${part.model.name} ${part.receipt.version}`;
  }

  showMaps(first, second) {
    const views = [first, second].filter((part) => part && part.view);
    const hidden = !views.length;
    for (const id of ["controls", "depth", "boards", "exports"]) byId(id).hidden = hidden;
    if (hidden) return;
    const difference = views.length > 1 ? differenceOf(views[0].view, views[1].view) : null;
    const wanted = views.length + (difference ? 1 : 0);
    if (this.boards.length !== wanted || this.titles !== this.state.other) this.makeBoards(views, difference, second);
    const { backwards, special, least, top, pin } = this.state;
    [...views.map((part) => part.view), ...(difference ? [difference] : [])].forEach((view, at) => {
      const board = this.boards[at];
      Object.assign(board.state, { backwards, special, least: view.signed ? 0 : least, top: view.signed ? 0 : top });
      board.show(view, at ? -1 : pin);
    });
    this.pinned(this.boards[0].state.pinned);
    mapControls(byId("controls"), this);
    layerControls(byId("layers"), this, first.model);
    exportControls(byId("exports"), this);
  }

  makeBoards(views, difference, second) {
    this.titles = this.state.other;
    const hosts = [...views, ...(difference ? [null] : [])].map(() => make("div", "board"));
    byId("boards").classList.toggle("two", views.length > 1);
    byId("boards").replaceChildren(...hosts);
    this.boards = hosts.map((host, at) => {
      const words = at >= views.length ? "Where they differ" : second ? `Where it looks: ${this.titleOf(views[at], at > 0)}` : "Where it looks";
      if (at >= views.length) host.classList.add("wide");
      const onPoint = (pointed) => this.boards.forEach((board, place) => place !== at && board.view && board.follow(pointed, this.boards[at]));
      return new Board(host, { words, onPoint, onPin: (pinned) => at === 0 && this.pinned(pinned) });
    });
  }

  /** Offer to leave out the word that is pinned, or each word. */
  pinned(at) {
    this.remember({ pin: at ? at.token.index : -1 });
    const below = this.boards[0].below;
    below.replaceChildren();
    const { texts, measure } = this.shown;
    if (!at || !measure.known || !canLeave(texts, at.token)) return;
    below.append(
      makeButton("chip", "Leave it out", () => this.guard(() => this.leave([at.token]))),
      makeButton("chip", "Leave out each word", () => this.guard(() => this.leave(this.leavable()))),
    );
  }

  leavable() {
    const { view, texts } = this.shown;
    return view.keys.filter((token) => canLeave(texts, token));
  }

  async leave(tokens) {
    const abort = (this.abort = new AbortController());
    const { shown } = this;
    this.say("Running …");
    const drops = await dropsOf(this.api, shown, tokens, (done) => this.say(`Left out ${done} of ${tokens.length} …`), abort.signal);
    if (shown !== this.shown) return;
    showDrops(byId("leave"), shown, tokens, drops);
    this.say(`Left out ${tokens.length} of ${tokens.length}.`);
  }

  async showGrid() {
    const { shown, state } = this;
    if (!shown || !shown.view) return;
    const layer = Number(this.layer(shown.model));
    const chosen = { layer, heads: /^\d/.test(state.heads) ? state.heads.split(",").map(Number) : [] };
    const key = JSON.stringify([shown.receipt.digest, shown.texts, state.unit, state.special]);
    if (this.gridOf === key) return this.grid.choose(chosen);
    const sites = this.gridSites(shown);
    const queries = sampled(shown.view.queries);
    const selections = gridSelections(state, sites, queries, shown.view.same);
    const before = this.api.bytes;
    const body = { sequences: [sequenceOf(shown.texts[0], shown.texts[1] || "")], outputs: [] };
    const [maps, features] = await Promise.all(
      selections.map((attention) => this.api.infer(shown.model.name, shown.model.version, { ...body, attention })),
    );
    if (shown !== this.shown) return;
    this.gridOf = key;
    this.grid.show(headsOf(maps.results[0].attention, features.results[0].attention, shown.model), chosen);
    const all = shown.view.queries.length;
    const rows = queries.length < all ? `${queries.length} of ${all} rows of each head, evenly spaced` : "All rows of each head";
    byId("grid-note").textContent = `${rows}; ${bytesText(this.api.bytes - before)}. Choose a head to see it in detail; Shift adds one of the same layer.`;
    this.showFacts(shown);
  }

  /** The sites whose maps have the axes of the one in detail. */
  gridSites({ model, view }) {
    const open = model.sites.filter((site) => !site.unavailable_reason);
    const at = model.sites[Number(this.layer(model))] || open[0];
    const alike = open.filter((site) => site.query_axis === at.query_axis && site.key_axis === at.key_axis);
    return (view ? alike : open).map((site) => site.name);
  }

  chooseHead(layer, head, added) {
    const { state } = this;
    const before = added && this.layer(this.shown.model) === String(layer) && /^\d/.test(state.heads) ? state.heads.split(",").map(Number) : [];
    const heads = before.includes(head) && before.length > 1 ? before.filter((each) => each !== head) : [...new Set([...before, head])];
    this.change({ layer: String(layer), heads: heads.sort((one, other) => one - other).join(",") });
  }

  showFacts({ model, receipt, selection, bytes }) {
    const facts = [
      ["model", `${model.name}, version ${receipt.version}`],
      ["digest", receipt.digest],
      ["precision", `${receipt.precision} on ${receipt.execution_provider}`],
      ["selection", selection ? JSON.stringify({ ...selection, sites: (selection.sites || []).length > 3 ? `${selection.sites.length} sites` : selection.sites }) : "none"],
      ["fetched", `${bytesText(bytes)} for this answer, ${bytesText(this.api.bytes)} since the page opened`],
    ];
    byId("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  }
}

new Page().start();
