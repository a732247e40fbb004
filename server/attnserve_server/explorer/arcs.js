// Arcs between the words of a text: from a word that looks to what it looks at, where a dot ends each. Words and lists state
// the same in text.

import { colour, css } from "./colours.js";
import { make } from "./dom.js";

/** Arcs of the word that is pointed at, and of the whole map. */
const OF_WORD = 8;
const OF_MAP = 14;

/** The arcs of one board, on a canvas above its words. */
class Arcs {
  /** @param {HTMLElement} host of the words @param {any} board */
  constructor(host, board) {
    this.host = host;
    this.board = board;
    this.canvas = make("canvas", "arcs");
    this.canvas.setAttribute("aria-hidden", "true");
  }

  /** Draw the arcs, if the reader wants them. */
  draw() {
    const { state, words } = this.board;
    this.host.classList.toggle("arched", state.arcs);
    this.canvas.remove();
    if (!state.arcs) return;
    const places = new Map();
    for (const { places: all, elements } of words.sentences)
      all.forEach((at, place) => {
        if (elements[place].hidden) return;
        if (at.row >= 0) places.set(`row ${at.row}`, elements[place]);
        if (at.column >= 0) places.set(`column ${at.column}`, elements[place]);
      });
    const found = this.links();
    const [width, height] = [this.host.scrollWidth, this.host.scrollHeight];
    const ratio = Math.min(window.devicePixelRatio || 1, 8192 / Math.max(width, height, 1));
    [this.canvas.width, this.canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    [this.canvas.style.width, this.canvas.style.height] = [`${width}px`, `${height}px`];
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const most = Math.max(...found.map((each) => Math.abs(each.share)), 1e-9);
    for (const { row, column, share } of found) {
      const [from, to] = [places.get(`row ${row}`), places.get(`column ${column}`)];
      if (from && to) this.arc(pen, from, to, Math.abs(share) / most);
    }
    this.host.append(this.canvas);
  }

  /** The links to draw: of the word that is pointed at, else the strongest of the map. */
  links() {
    const { view, state } = this.board;
    const from = state.at === null ? -1 : state.backwards ? state.at.column : state.at.row;
    if (from < 0) return view.links(OF_MAP);
    const others = state.backwards ? view.rows : view.columns;
    return others
      .map((other) => (state.backwards ? { row: other, column: from } : { row: from, column: other }))
      .map((link) => ({ ...link, share: view.value(link.row, link.column) }))
      .filter((link) => link.share !== 0 && view.isListed(link.row, link.column))
      .sort((one, other) => Math.abs(other.share) - Math.abs(one.share))
      .slice(0, OF_WORD);
  }

  /** Draw one: above the words of a line, and from line to line. */
  arc(pen, from, to, share) {
    const middle = (element) => element.offsetLeft + element.offsetWidth / 2;
    const [x, end] = [middle(from), middle(to)];
    const [top, bottom] = [from.offsetTop + 2, to.offsetTop + 2];
    const apart = Math.abs(top - bottom);
    const lift = apart < 4 ? Math.min(30, 10 + Math.abs(end - x) / 10) : 14;
    pen.strokeStyle = pen.fillStyle = css(colour(0.45 + 0.5 * share));
    pen.lineWidth = 1 + 3 * share;
    pen.beginPath();
    pen.moveTo(x, top);
    pen.bezierCurveTo(x, top - lift, end, bottom - lift, end, bottom);
    pen.stroke();
    pen.beginPath();
    pen.arc(end, bottom, 2 + 2 * share, 0, 2 * Math.PI);
    pen.fill();
  }
}

export { Arcs };
