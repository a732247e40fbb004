// The difference of two maps over the words that both have.

import { MapView } from "./view.js";

/** Return the pairs of places of the longest common subsequence of two lists of tokens, by their texts. */
function aligned(one, other) {
  const width = other.length + 1;
  const lengths = new Uint16Array((one.length + 1) * width);
  for (let first = one.length - 1; first >= 0; first--)
    for (let second = other.length - 1; second >= 0; second--)
      lengths[first * width + second] =
        one[first].text === other[second].text
          ? lengths[(first + 1) * width + second + 1] + 1
          : Math.max(lengths[(first + 1) * width + second], lengths[first * width + second + 1]);
  const pairs = [];
  for (let first = 0, second = 0; first < one.length && second < other.length; ) {
    if (one[first].text === other[second].text) pairs.push([first++, second++]);
    else if (lengths[(first + 1) * width + second] >= lengths[first * width + second + 1]) first++;
    else second++;
  }
  return pairs;
}

/** Return the second map less the first, over the words of both; null if they share none. */
function differenceOf(one, other) {
  const rows = aligned(one.queries, other.queries);
  const columns = aligned(one.keys, other.keys);
  if (!rows.length || !columns.length) return null;
  const weights = new Float32Array(rows.length * columns.length);
  rows.forEach(([first, second], row) =>
    columns.forEach(([from, to], column) => {
      const before = one.weights[first * one.keys.length + from];
      weights[row * columns.length + column] = other.weights[second * other.keys.length + to] - before;
    }),
  );
  return new MapView({
    queries: rows.map(([first]) => one.queries[first]),
    keys: columns.map(([from]) => one.keys[from]),
    heads: ["joined"],
    weights,
    same: one.same && other.same,
    signed: true,
  });
}

export { aligned, differenceOf };
