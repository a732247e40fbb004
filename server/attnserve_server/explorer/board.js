// One map on the page: its words, its heatmap and its strongest links, which point at each other.

import { Arcs } from "./arcs.js";
import { night, useScheme } from "./colours.js";
import { choices, make } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { listLinks } from "./links.js";
import { Words } from "./words.js";

const MOST_LINKS = 14;

function panel(title, ...content) {
  const section = make("section", "panel");
  section.append(make("h2", "", title), ...content);
  return section;
}

/** The parts of one map in an element, and what is pointed at. */
class Board {
  /**
   * @param {HTMLElement} host
   * @param {{words?: string, onPin?: (at: any) => void, onPoint?: (at: any) => void, onPart?: (part: any) => void}} [options]
   * `words`: the title above the words; `onPin`: called when a word is pinned, or none; `onPoint`: when one is pointed at;
   * `onPart`: when a part of the map is chosen, or the whole map
   */
  constructor(host, options = {}) {
    this.view = null;
    this.onPin = options.onPin || (() => {});
    this.onPoint = options.onPoint || (() => {});
    this.onPart = options.onPart || (() => {});
    /** `at`: the word that is pointed at; `pinned`: the one that stays; `cell`: the cell that is pointed at; `part`: of the map. */
    this.state = { head: -1, backwards: false, special: false, least: 0, top: 0, arcs: false, code: false, at: null, pinned: null, cell: null, part: null };
    const title = options.words || "Where it looks";
    const sentences = make("div", "sentences");
    const summary = make("p", "summary");
    summary.setAttribute("aria-live", "polite");
    const links = make("ol", "links");
    this.words = new Words(sentences, summary, this);
    this.arcs = new Arcs(sentences, this);
    const map = panel("Heatmap: rows look at columns");
    this.heatmap = new Heatmap(map, this, title);
    this.links = links;
    this.below = make("div", "below");
    const columns = make("div", "columns");
    columns.append(map, panel("Strongest links", links));
    host.append(panel(title, sentences, summary, this.below), columns);
    night.addEventListener("change", () => this.draw());
    window.addEventListener("resize", () => this.view && (this.heatmap.draw(), this.arcs.draw()));
  }

  /** Show another map. @param {import("./view.js").MapView} view @param {number} [index] of a word to pin, -1 for none */
  show(view, index = -1) {
    this.view = view;
    Object.assign(this.state, { at: null, pinned: null, cell: null, part: null });
    if (this.state.head >= view.heads.length) this.state.head = -1;
    this.words.build();
    this.state.at = this.state.pinned = index < 0 ? null : this.words.placeOf(index);
    this.draw();
  }

  /** Change choices, and draw the map again. */
  set(change) {
    const { code } = this.state;
    Object.assign(this.state, change, { cell: null });
    if (this.state.code !== code) this.words.build();
    this.draw();
  }

  /** Show a part of the map, or all of it. @param {import("./view.js").Part | null} part */
  choosePart(part) {
    this.set({ part });
    this.onPart(part);
  }

  draw() {
    if (!this.view) return;
    useScheme();
    this.view.choose(this.state);
    this.heatmap.draw();
    listLinks(this.links, this, MOST_LINKS);
    this.paint();
  }

  paint() {
    this.words.paint();
    this.arcs.draw();
  }

  point(at) {
    this.state.at = at;
    this.paint();
    this.onPoint(at);
  }

  /** Point at the word that another board points at, if this one has it. */
  follow(at, other) {
    this.state.at = (at && this.words.alike(at.token, other.words)) || this.state.pinned;
    this.paint();
  }

  /** Pin a word, or release it where it is pinned already. */
  pin(at) {
    const { pinned } = this.state;
    this.state.pinned = at === null || (pinned !== null && pinned.token === at.token) ? null : at;
    this.point(this.state.pinned);
    this.onPin(this.state.pinned);
  }

  pointAtCell(cell) {
    this.state.cell = cell;
    this.heatmap.mark();
    this.point(cell ? this.placeOfLink(cell.row, cell.column) : this.state.pinned);
  }

  /** Return the place of a link's token, on the side that is pointed at. */
  placeOfLink(row, column) {
    const token = this.state.backwards ? this.view.keys[column] : this.view.queries[row];
    const side = this.view.same ? null : this.state.backwards ? "column" : "row";
    for (const { places } of this.words.sentences)
      for (const at of places) if (at.token.index === token.index && (side === null || at[side] >= 0)) return at;
    return null;
  }

  /** Return the choice of what pointing at a word shows. @param {(backwards: boolean) => void} act */
  directions(act) {
    return choices("hovering shows", [[false, "what it looks at"], [true, "what looks at it"]], this.state.backwards, act);
  }
}

export { Board };
