// The maps of the page: boards of words or sentences, what was fetched of them, and words that are left out.

import { complete, viewOf } from "./answers.js";
import { Board } from "./board.js";
import { differenceOf } from "./compare.js";
import { exportControls, layerControls, mapControls } from "./controls.js";
import { showDrops, showFigures } from "./dropped.js";
import { byId, bytesText, make, makeButton, percent } from "./dom.js";
import { figuresOf, runsOf } from "./faithful.js";
import { Form } from "./form.js";
import { canLeave, changesOf } from "./leave.js";
import { askedOf, selectionOf, suffices } from "./selection.js";
import { MANY_WORDS, bySentence, hasSentences, isCode } from "./sentences.js";

/** The form with its maps. What runs a text is in the class that extends it. */
class Maps extends Form {
  constructor() {
    super();
    this.boards = [];
    this.titles = "";
    this.abort = /** @type {AbortController | null} */ (null);
    /** What the answer is compared with. @type {any} */
    this.second = null;
  }

  /** Begin what takes time, and end what was begun before. @returns {AbortController} */
  begin() {
    if (this.abort) this.abort.abort();
    return (this.abort = new AbortController());
  }

  change(change) {
    this.remember(change);
    return this.guard(() => this.run());
  }

  /** Draw what is there in another way; request weights only if some are missing. */
  redraw(change) {
    this.remember(change);
    const wanted = askedOf(this.state, this.shown.texts.join(""));
    if (!suffices(this.shown.asked, wanted)) return this.guard(() => this.run());
    const own = this.looks();
    // A threshold of weights says nothing about differences.
    for (const board of this.boards) board.set(board.view.signed ? { ...own, least: 0, top: 0 } : own);
    this.showPartial();
  }

  /** What the boards draw, of the state. */
  looks() {
    const { backwards, special, least, top, arcs } = this.state;
    return { backwards, special, least, top: Math.max(top, 0), arcs, code: this.code };
  }

  /** Whether the text is shown as code. */
  get code() {
    const { reading } = this.state;
    return reading === "auto" ? this.shown.texts.some(isCode) : reading === "code";
  }

  /** Whether the map is by sentence. */
  get sentences() {
    const { level, other } = this.state;
    const { view } = this.shown;
    if (other !== "none" || !view || !hasSentences(view, this.code)) return false;
    return level === "auto" ? view.everyRow.length > MANY_WORDS : level === "sentences";
  }

  showMaps(first, second) {
    const views = [first, second].filter((part) => part && part.view);
    const hidden = !views.length;
    for (const id of ["controls", "depth", "boards", "exports"]) byId(id).hidden = hidden;
    this.showPartial();
    if (hidden) return;
    const difference = views.length > 1 ? differenceOf(views[0].view, views[1].view) : null;
    const wanted = views.length + (difference ? 1 : 0);
    if (this.boards.length !== wanted || this.titles !== this.state.other) this.makeBoards(views, difference, second);
    const drawn = views.map((part) => (this.sentences ? bySentence(part.view, this.code) : part.view));
    [...drawn, ...(difference ? [difference] : [])].forEach((view, at) => {
      const board = this.boards[at];
      Object.assign(board.state, this.looks(), view.signed ? { least: 0, top: 0 } : {});
      board.show(view, at ? -1 : this.state.pin);
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
      const onPart = (part) => at === 0 && this.guard(() => this.showPart(part));
      return new Board(host, { words, onPoint, onPin: (pinned) => at === 0 && this.pinned(pinned), onPart });
    });
  }

  titleOf(part, other) {
    if (this.state.other === "text") return other ? "Other text" : "First text";
    return `${part.model.name} ${part.receipt.version}`;
  }

  /** Show the map in another way: by word or sentence, as text or code. */
  reshape(change) {
    this.remember({ ...change, pin: -1 });
    this.showMaps(this.shown, this.second);
  }

  /** Fetch all weights of some rows, those that are not here yet. @param {number[]} rows places in the view of words */
  async refine(rows) {
    const { shown } = this;
    const { view, model, sequence, asked } = shown;
    const missing = rows.filter((row) => !view.exact.has(row));
    if (view.partial === null || !missing.length) return;
    const all = missing.length === view.queries.length;
    const attention = { ...selectionOf(shown.chosen, shown.texts.join("")), ...(all ? {} : { queries: missing.map((row) => view.queries[row].index) }) };
    const before = this.api.bytes;
    const answer = await this.api.infer(model.name, model.version, { sequences: [sequence], outputs: [], attention });
    const [result] = answer.results;
    complete(view, viewOf(result.attention, result.attention.maps[0], shown.texts), missing);
    if (view.exact.size === view.queries.length) [view.partial, shown.asked] = [null, { ...asked, top: 0, least: 0 }];
    shown.bytes += this.api.bytes - before;
    if (shown !== this.shown) return;
    if (this.sentences) this.boards[0].show(bySentence(view, this.code), this.state.pin);
    else for (const board of this.boards) board.draw();
    this.showFacts(shown);
    this.showPartial();
  }

  /** Say which weights were fetched, and offer the others. */
  showPartial() {
    const { view, asked } = this.shown;
    const host = byId("partial");
    host.hidden = !view || view.partial === null;
    host.replaceChildren();
    if (host.hidden) return;
    const kept = [asked.top ? `the ${asked.top} greatest weights of each row` : "", asked.least ? `weights from ${asked.least}` : ""].filter(Boolean).join(", ");
    host.append(make("span", "", `Fetched: ${kept}. They have ${percent(view.partial)} of all weight; the others are drawn as 0. A pinned word, or a part of the heatmap, gets all of its own. `));
    const size = (4 / 3) * 2 * view.queries.length * view.keys.length;
    host.append(makeButton("chip", `Fetch all weights, about ${bytesText(size)}`, () => this.change({ top: 0, least: 0 })));
  }

  /** Show a part of the map with all of its weights. @param {import("./view.js").Part | null} part */
  async showPart(part) {
    const { view } = this.boards[0];
    if (!part || view !== this.shown.view || this.filtered) return;
    await this.refine(view.rows.filter((row) => row >= part.rows[0] && row <= part.rows[1]));
  }

  /** Whether the reader chose thresholds, so that weights are missing on purpose. */
  get filtered() {
    return this.state.top > 0 || this.state.least > 0;
  }

  /** Offer to leave out the word that is pinned, or each word. */
  pinned(at) {
    this.remember({ pin: at ? at.token.index : -1 });
    const [board] = this.boards;
    board.below.replaceChildren();
    if (!at) return;
    const add = (text, act) => board.below.append(makeButton("chip", text, act));
    if (at.token.places) add("Show its words", () => this.showWords(at.token.places));
    else if (board.view === this.shown.view && at.row >= 0 && !this.filtered) this.guard(() => this.refine([at.row]));
    if (!this.shown.measure.known) return;
    if (canLeave(this.shown, at.token)) add("Leave it out", () => this.guard(() => this.leave([at])));
    const each = this.leavable();
    const unit = at.token.places ? "sentence" : board.view.keyGrid ? "patch" : this.state.unit;
    if (each.length > 1) add(`Leave out each ${unit}`, () => this.guard(() => this.leave(each)));
  }

  /** Show the words of a sentence: their rows of the map, over all words. @param {number[]} places */
  showWords(places) {
    this.reshape({ level: "words" });
    const [board] = this.boards;
    board.choosePart({ rows: [places[0], places[places.length - 1]], columns: [0, board.view.keys.length - 1] });
    const first = board.words.placeOf(board.view.queries[places[0]].index);
    if (first) board.words.focus(first);
  }

  leavable() {
    return this.boards[0].view.keys.map((token, column) => ({ token, column })).filter(({ token }) => canLeave(this.shown, token));
  }

  /** Run the text without each of these units. @param {{token: any, column: number}[]} places */
  async leave(places) {
    const abort = this.begin();
    const { shown } = this;
    this.say("Running …");
    // A mean over rows is one of all weights.
    await this.refine([...shown.view.queries.keys()]);
    const { view } = this.boards[0];
    const groups = places.map(({ token }) => [token]);
    const changes = await changesOf(this.api, shown, groups, (done) => this.say(`Left out ${done} of ${groups.length} …`), abort.signal);
    if (shown !== this.shown) return;
    const compared = places.length > 2 && shown.texts.length === 1 && places.every(({ token }) => token.patch < 0);
    const weights = view.columnMeans();
    const compare = () => this.guard(() => this.compareWithRandom(places, places.map(({ column }) => weights[column])));
    showDrops(byId("leave"), shown, view, places, changes, compared ? compare : null);
    this.say(`Left out ${groups.length} of ${groups.length}.`);
  }

  /** Leave out the words of greatest weight, and random ones. */
  async compareWithRandom(places, weights) {
    const abort = this.begin();
    const { shown } = this;
    const groups = runsOf(weights).map((left) => left.map((at) => places[at].token));
    this.say("Running …");
    const changes = await changesOf(this.api, shown, groups, (done) => this.say(`Ran ${done} of ${groups.length} texts …`), abort.signal);
    if (shown !== this.shown) return;
    showFigures(byId("leave"), figuresOf(changes.map((each) => each.drop)));
    this.say(`Ran ${groups.length} of ${groups.length}.`);
  }

  /** @abstract @param {any} _shown */
  showFacts(_shown) {}
}

export { Maps };
