// Small multiples: a thumbnail for each head of each layer, from one request of uint8 weights and one of row features.

import { arrayOf } from "./api.js";
import { colour, css, useScheme } from "./colours.js";
import { make, makeButton } from "./dom.js";

/** Rows that are requested of each head, evenly spaced, and most columns of a thumbnail. */
const MOST_ROWS = 32;
const FEATURES = ["entropy", "mean_distance", "first_token"];
const ORDERS = { layer: "layer", entropy: "entropy", mean_distance: "distance", first_token: "share of the first word" };

/** Return which rows to request, of those that the map shows. @param {import("./view.js").Token[]} tokens */
function sampled(tokens) {
  if (tokens.length <= MOST_ROWS) return tokens.map((token) => token.index);
  return [...Array(MOST_ROWS).keys()].map((at) => tokens[Math.floor((at * tokens.length) / MOST_ROWS)].index);
}

/** Return the two selections of the grid. @param {any} state @param {string[]} sites @param {number[]} queries @param {boolean} square */
function gridSelections(state, sites, queries, square) {
  const common = { sites, queries, unit: state.unit, special_tokens: state.special ? "keep" : "drop", head_reduction: "each" };
  const features = square ? FEATURES : FEATURES.filter((each) => each !== "mean_distance");
  return [{ ...common, dtype: "uint8" }, { ...common, features }];
}

/** Return an entry for each head: its layer, its number, its thumbnail and its mean features. */
function headsOf(answer, featured, model) {
  const found = [];
  answer.maps.forEach((map, at) => {
    if (map.band_keys) return;
    const [count, rows, columns] = map.weights.shape;
    const weights = arrayOf(map.weights);
    const features = arrayOf(featured.maps[at].features);
    const width = features.length / (count * rows);
    for (let head = 0; head < count; head++) {
      const means = [...Array(width).keys()].map((one) => {
        let sum = 0;
        for (let row = 0; row < rows; row++) sum += features[(head * rows + row) * width + one];
        return sum / rows;
      });
      const names = width === FEATURES.length ? FEATURES : FEATURES.filter((each) => each !== "mean_distance");
      const layer = model.sites.findIndex((site) => site.name === map.sites[0]);
      const piece = weights.subarray(head * rows * columns, (head + 1) * rows * columns);
      found.push({ layer, head, rows, columns, weights: piece, features: Object.fromEntries(names.map((name, one) => [name, means[one]])) });
    }
  });
  return found;
}

/** The thumbnails of all heads; choosing one calls `onChoose` with its layer, its head, and whether it is added. */
class HeadGrid {
  /** @param {HTMLElement} host @param {(layer: number, head: number, added: boolean) => void} onChoose */
  constructor(host, onChoose) {
    this.host = host;
    this.onChoose = onChoose;
    this.heads = [];
    this.order = "layer";
    this.chosen = { layer: -1, heads: [] };
  }

  /** @param {any[]} heads of `headsOf` @param {{layer: number, heads: number[]}} chosen */
  show(heads, chosen) {
    this.heads = heads;
    this.choose(chosen);
  }

  choose(chosen) {
    this.chosen = chosen;
    this.draw();
  }

  draw() {
    useScheme();
    const bar = make("div", "group");
    const label = make("label", "", "sort by ");
    const select = make("select");
    for (const [value, text] of Object.entries(ORDERS)) {
      if (value !== "layer" && this.heads.some((each) => each.features[value] === undefined)) continue;
      const option = make("option", "", text);
      option.value = value;
      option.selected = value === this.order;
      select.append(option);
    }
    select.addEventListener("change", () => {
      this.order = select.value;
      this.draw();
      this.host.querySelector("select").focus();
    });
    label.append(select);
    bar.append(label);
    this.host.replaceChildren(bar, this.order === "layer" ? this.byLayer() : this.sorted());
  }

  byLayer() {
    const table = make("div", "heads");
    for (const layer of new Set(this.heads.map((each) => each.layer))) {
      const line = make("div", "line");
      line.append(make("span", "name", `layer ${layer}`));
      for (const each of this.heads) if (each.layer === layer) line.append(this.thumbnail(each));
      table.append(line);
    }
    return table;
  }

  sorted() {
    const line = make("div", "heads line");
    const order = this.order;
    const sign = order === "entropy" ? 1 : -1;
    for (const each of [...this.heads].sort((one, other) => sign * (one.features[order] - other.features[order]))) line.append(this.thumbnail(each));
    return line;
  }

  thumbnail(each) {
    const { layer, head, features } = each;
    const button = makeButton("thumb", "", () => {});
    button.addEventListener("click", (event) => this.onChoose(layer, head, event.shiftKey));
    const facts = Object.entries(features).map(([name, value]) => `${ORDERS[name]} ${value.toFixed(2)}`).join(", ");
    button.setAttribute("aria-label", `layer ${layer}, head ${head}: ${facts}`);
    button.title = `layer ${layer}, head ${head}: ${facts}`;
    button.setAttribute("aria-pressed", String(layer === this.chosen.layer && this.chosen.heads.includes(head)));
    const canvas = make("canvas");
    canvas.setAttribute("aria-hidden", "true");
    drawThumbnail(canvas, each);
    button.append(canvas, make("span", "number", this.order === "layer" ? String(head) : `${layer}.${head}`));
    return button;
  }
}

/** Draw a head in at most 32 columns; a column shows the greatest of the weights that share it. */
function drawThumbnail(canvas, { weights, rows, columns }) {
  const width = Math.min(columns, MOST_ROWS);
  [canvas.width, canvas.height] = [width, rows];
  const pen = canvas.getContext("2d");
  const pooled = new Float32Array(rows * width);
  let most = 0;
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const place = row * width + Math.floor((column * width) / columns);
      pooled[place] = Math.max(pooled[place], weights[row * columns + column]);
      most = Math.max(most, pooled[place]);
    }
  for (let place = 0; place < pooled.length; place++) {
    pen.fillStyle = css(colour((pooled[place] / (most || 1)) ** 0.6));
    pen.fillRect(place % width, Math.floor(place / width), 1, 1);
  }
}

export { HeadGrid, gridSelections, headsOf, sampled };
