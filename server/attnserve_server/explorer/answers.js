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
  }));
}

function gridOf(answer, axis) {
  const units = answer.axes.find((each) => each.axis === axis);
  return units.grid_rows ? { rows: units.grid_rows, columns: units.grid_columns, leading: units.leading || 0 } : null;
}

/** Return a map of a sequence's answer as a view. @param {any} answer `attention` of a result @param {any} map of it @param {string[]} texts */
function viewOf(answer, map, texts) {
  const sides = [tokensOf(answer, map.query_axis), tokensOf(answer, map.key_axis)];
  const queries = map.query_indices ? map.query_indices.map((at) => sides[0][at]) : sides[0];
  const keys = map.key_indices ? map.key_indices.map((at) => sides[1][at]) : sides[1];
  const received = arrayOf(map.weights);
  const heads = map.weights.shape[0];
  const band = map.band_keys ? { keys: arrayOf(map.band_keys), width: map.band_keys.shape[1] } : null;
  return new MapView({
    queries,
    keys,
    heads: heads === 1 && (map.heads || []).length !== 1 ? ["joined"] : map.heads || [],
    weights: band ? scattered(received, band, heads, queries.length, keys) : /** @type {Float32Array} */ (received),
    outside: band ? outsideOf(band, queries.length, keys) : null,
    same: map.query_axis === map.key_axis,
    queryGrid: gridOf(answer, map.query_axis),
    keyGrid: gridOf(answer, map.key_axis),
    texts,
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

export { cosine, embeddingOf, viewOf, wantedOf };
