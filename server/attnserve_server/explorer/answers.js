// Answers of the API as what the page draws: views of maps, and what the model answered.

import { arrayOf } from "./api.js";
import { MapView } from "./view.js";

/** Return the tokens of an axis. */
function tokensOf(answer, axis) {
  const units = answer.axes.find((each) => each.axis === axis);
  return [...Array(units.length || 0).keys()].map((index) => ({
    index,
    text: units.texts ? units.texts[index] : String(index),
    start: units.starts ? units.starts[index] : 0,
    end: units.ends ? units.ends[index] : 0,
    special: units.special ? units.special[index] : false,
    segment: units.segments ? units.segments[index] : 0,
    patch: units.grid_rows ? index - (units.leading || 0) : -1,
  }));
}

function gridOf(answer, axis) {
  const units = answer.axes.find((each) => each.axis === axis);
  return units.grid_rows ? { rows: units.grid_rows, columns: units.grid_columns, leading: units.leading || 0 } : null;
}

/**
 * Return a map of a sequence's answer as a view. If the answer has links, the other weights are 0, and `view.partial` is the
 * share of all weight that they have.
 * @param {any} answer `attention` of a result @param {any} map of it @param {string[]} texts @param {HTMLCanvasElement | null} [picture]
 */
function viewOf(answer, map, texts, picture = null) {
  const sides = [tokensOf(answer, map.query_axis), tokensOf(answer, map.key_axis)];
  const queries = map.query_indices ? map.query_indices.map((at) => sides[0][at]) : sides[0];
  const keys = map.key_indices ? map.key_indices.map((at) => sides[1][at]) : sides[1];
  const heads = (map.links ? map.links.residual : map.weights).shape[0];
  const band = map.band_keys ? { keys: arrayOf(map.band_keys), width: map.band_keys.shape[1] } : null;
  const view = new MapView({
    queries,
    keys,
    heads: heads === 1 && (map.heads || []).length !== 1 ? ["joined"] : map.heads || [],
    weights: weightsOf(map, band, heads, queries.length, keys),
    outside: band ? outsideOf(band, queries.length, keys) : null,
    same: map.query_axis === map.key_axis,
    queryGrid: gridOf(answer, map.query_axis),
    keyGrid: gridOf(answer, map.key_axis),
    texts,
    picture,
  });
  if (map.links) {
    const [kept, left] = [arrayOf(map.links.weights), arrayOf(map.links.residual)].map((each) => /** @type {Float32Array} */ (each).reduce((sum, one) => sum + one, 0));
    view.partial = kept / (kept + left || 1);
  }
  return view;
}

function weightsOf(map, band, heads, rows, keys) {
  if (map.links) return linked(map.links, heads * rows, keys);
  const received = arrayOf(map.weights);
  return band ? scattered(received, band, heads, rows, keys) : /** @type {Float32Array} */ (received);
}

/** Return the weights of links over all keys. Shapes: `row_offsets` (rows + 1), keys and weights (links). */
function linked(links, rows, keys) {
  const [offsets, ends, weights] = [arrayOf(links.row_offsets), arrayOf(links.keys), arrayOf(links.weights)];
  const [made, places] = [new Float32Array(rows * keys.length), placesOf(keys)];
  for (let row = 0; row < rows; row++)
    for (let at = offsets[row]; at < offsets[row + 1]; at++) made[row * keys.length + places.get(ends[at])] = weights[at];
  return made;
}

/** Put the rows of a view that was fetched later, with all weights, in their places of another one. @param {MapView} view @param {MapView} fetched @param {number[]} rows */
function complete(view, fetched, rows) {
  const width = view.keys.length;
  rows.forEach((row, at) => {
    view.weights.set(fetched.weights.subarray(at * width, (at + 1) * width), row * width);
    view.exact.add(row);
  });
}

function placesOf(keys) {
  return new Map(keys.map((token, place) => [token.index, place]));
}

/** Return the weights of a band over all keys; those outside it are 0. */
function scattered(received, band, heads, rows, keys) {
  const [weights, places] = [new Float32Array(heads * rows * keys.length), placesOf(keys)];
  for (let head = 0; head < heads; head++)
    for (let at = 0; at < rows * band.width; at++) {
      const place = places.get(band.keys[at]);
      const row = Math.floor(at / band.width);
      if (place !== undefined) weights[(head * rows + row) * keys.length + place] = received[head * rows * band.width + at];
    }
  return weights;
}

function outsideOf(band, rows, keys) {
  const [inside, places] = [new Set(), placesOf(keys)];
  for (let at = 0; at < rows * band.width; at++) {
    const place = places.get(band.keys[at]);
    if (place !== undefined) inside.add(Math.floor(at / band.width) * keys.length + place);
  }
  return (row, column) => !inside.has(row * keys.length + column);
}

/** Return what to request beside attention: labels where the model has a head, else its embedding, else nothing. */
function wantedOf(model, unit) {
  if (model.head) return { outputs: [], labels: { unit } };
  const named = (model.outputs || []).some((each) => each.name === "embedding");
  return { outputs: named ? ["embedding"] : [] };
}

/** Return the embedding of a result; null without one. */
function embeddingOf(result) {
  const found = (result.outputs || []).find((each) => each.name === "embedding");
  return found ? arrayOf(found) : null;
}

/** Return the cosine of two vectors; 0 if one is all zeros. */
function cosine(one, other) {
  let [product, first, second] = [0, 0, 0];
  for (let at = 0; at < one.length; at++) {
    product += one[at] * other[at];
    first += one[at] ** 2;
    second += other[at] ** 2;
  }
  return first && second ? product / Math.sqrt(first * second) : 0;
}

export { complete, cosine, embeddingOf, viewOf, wantedOf };
