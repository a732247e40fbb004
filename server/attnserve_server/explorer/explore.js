// The page `/explore`: what runs a text, and shows the answer.

import { Refused } from "./api.js";
import { viewOf, wantedOf } from "./answers.js";
import { byId, bytesText, make } from "./dom.js";
import { HeadGrid, gridSelections, headsOf, sampled } from "./grid.js";
import { imageInputOf, missingInputs } from "./image.js";
import { Measure } from "./leave.js";
import { Maps } from "./maps.js";
import { askedOf, selectionOf, sequenceOf, thresholds } from "./selection.js";
import { relation, showAnswer } from "./shown.js";

/** The page: the answer, its maps, and the grid of heads. */
class Page extends Maps {
  constructor() {
    super();
    this.grid = new HeadGrid(byId("grid"), (layer, head, added) => this.chooseHead(layer, head, added));
    this.gridOf = "";
    this.pictureOf = null;
  }

  /** The state, with what ran in place of what was left open. */
  named() {
    return { ...this.state, layer: this.layer(this.shown.model), text: this.shown.texts[0] || "", pair: this.shown.texts[1] || "" };
  }

  caption() {
    const { model, receipt } = this.shown;
    const { view } = this.boards[0];
    return `${model.name} ${receipt.version}, ${receipt.digest.slice(0, 19)}, ${receipt.precision}: ${this.chosenText()}, ${view.rows.length} × ${view.columns.length}`;
  }

  chosenText() {
    const layer = this.layer(this.shown.model);
    const { heads } = this.state;
    const where = layer === "mean" ? "mean of all layers" : layer === "rollout" ? "rollout" : `layer ${layer}`;
    return `${where}, ${/^\d/.test(heads) ? `head ${heads}` : `${heads} of heads`}`;
  }

  async run() {
    const abort = this.begin();
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
    const units = first.view ? `${first.view.rows.length} ${first.view.queryGrid ? "patches" : `${state.unit}s`}, ` : "";
    this.say(`${units}${bytesText(first.bytes + (second ? second.bytes : 0))} in ${Math.round(performance.now() - began)} ms.`);
  }

  /** Return what a model reads of the form: its texts and its image. Raises Refused if something is missing. */
  inputOf(model, given) {
    const missing = missingInputs(model);
    const image = imageInputOf(model);
    if (missing.length || (!model.accepts_text && !image))
      throw new Refused(0, `${model.name} takes tensors${missing.length ? ` (${missing.join(", ")})` : ""}, no text. Call it from Python: the page cannot make its inputs.`);
    const texts = !model.accepts_text ? [] : given[1] ? given : [given[0]];
    if (texts.length && !texts[0].trim()) throw new Refused(0, "Type a text first.");
    const picture = this.image.picture(model);
    if (image && !picture) throw new Refused(0, `${model.name} takes an image. Choose one first.`);
    return { texts, picture, tensors: picture ? [picture.tensor()] : [] };
  }

  /** Run one text, and return what is drawn of it. */
  async answer(name, version, given, signal) {
    const model = await this.describe(name, version, signal);
    const { texts, picture, tensors } = this.inputOf(model, given);
    const before = this.api.bytes;
    const chosen = { ...this.state, layer: this.layer(model) };
    const tapped = Number(chosen.layer) !== -1;
    const asked = askedOf(this.state, texts.join(""));
    const sequence = sequenceOf(texts, tensors);
    const attention = tapped ? { attention: { ...selectionOf(chosen, texts.join("")), ...thresholds(asked) } } : {};
    const body = { sequences: [sequence], ...wantedOf(model, chosen.unit), ...attention };
    const answer = await this.api.infer(name, version, body, signal);
    const [result] = answer.results;
    const view = tapped ? viewOf(result.attention, result.attention.maps[0], texts, picture && picture.canvas) : null;
    const bytes = this.api.bytes - before;
    const { receipt, effective_attention: selection } = answer;
    return { model, texts, picture, tensors, sequence, result, view, bytes, receipt, selection, chosen, asked, measure: new Measure(result) };
  }

  show(first, second) {
    this.shown = first;
    this.second = second;
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

  async showGrid() {
    const { shown, state } = this;
    if (!shown || !shown.view) return;
    const layer = Number(this.layer(shown.model));
    const chosen = { layer, heads: /^\d/.test(state.heads) ? state.heads.split(",").map(Number) : [] };
    const sites = this.gridSites(shown);
    const key = JSON.stringify([shown.receipt.digest, shown.texts, state.unit, state.special, sites]);
    if (this.gridOf === key && this.pictureOf === shown.picture) return this.grid.choose(chosen);
    const queries = sampled(shown.view.queries);
    const selections = gridSelections(state, sites, queries, shown.view.same);
    const before = this.api.bytes;
    const body = { sequences: [shown.sequence], outputs: [] };
    const [maps, features] = await Promise.all(
      selections.map((attention) => this.api.infer(shown.model.name, shown.model.version, { ...body, attention })),
    );
    if (shown !== this.shown) return;
    this.gridOf = key;
    this.pictureOf = shown.picture;
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
    byId("printed").textContent = `${model.name}, version ${receipt.version}, ${receipt.digest}, ${receipt.precision}: ${this.chosenText()}.`;
  }
}

new Page().start();
