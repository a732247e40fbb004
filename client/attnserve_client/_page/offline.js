// The page of `to_html()`: one map, from the JSON in the page. Its other modules are those of the explorer.

import { Board } from "./board.js";
import { byId, choices, toggle } from "./dom.js";
import { MapView } from "./view.js";

const data = JSON.parse(byId("map").textContent);
const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const [, , columnCount] = data.shape;

/** Weights are 16-bit fractions of the range from `data.least`, at most 0, to `data.scale`. */
function weightsOf() {
  const stored = new DataView(bytesOf(data.weights).buffer);
  const weights = new Float32Array(stored.byteLength / 2);
  const range = data.scale - data.least;
  for (let at = 0; at < weights.length; at++) weights[at] = data.least + (stored.getUint16(2 * at, true) / 65535) * range;
  return weights;
}

/** Keys outside a query's window, one bit for each cell, from the most significant bit on. */
function outsideOfWindow() {
  if (!data.outside) return null;
  const beyond = bytesOf(data.outside);
  return (row, column) => {
    const at = row * columnCount + column;
    return ((beyond[at >> 3] >> (7 - (at & 7))) & 1) === 1;
  };
}

function start() {
  const board = new Board(byId("board"));
  const bar = byId("controls");
  if (data.heads.length > 1) {
    const heads = data.heads.map((name, head) => [head, String(name)]);
    bar.append(choices("head", [[-1, "mean"], ...heads], -1, (head) => board.set({ head })));
  }
  bar.append(board.directions((backwards) => board.set({ backwards })));
  toggle(bar, "arcs", false, (arcs) => board.set({ arcs }));
  if ([...data.queries, ...data.keys].some((token) => token.special)) toggle(bar, "special tokens", false, (special) => board.set({ special }));
  byId("app").hidden = false;
  board.show(new MapView({ ...data, weights: weightsOf(), outside: outsideOfWindow() }));
}

start();
