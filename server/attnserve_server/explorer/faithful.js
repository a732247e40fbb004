// Comprehensiveness and sufficiency of a map, beside those of random words: what to run without, and the figures from what
// the model answered. As `client.faithfulness` of the SDK. Source: DeYoung et al. 2020, "ERASER", section 4.2.

const SHARES = [0.1, 0.2, 0.5];
const DRAWS = 20;
const RESAMPLES = 2000;

/** Return how many words a share is: at least one, and not all. Halves are rounded to even. @param {number} share @param {number} words */
function countOf(share, words) {
  const exact = share * words;
  const low = Math.floor(exact);
  const half = exact - low === 0.5;
  return Math.min(words - 1, Math.max(1, half ? low + (low % 2) : Math.round(exact)));
}

/** Return a source of numbers from 0 to 1, the same ones each time. Source: Marsaglia 2003, "Xorshift RNGs", section 3. */
function generator() {
  let state = 2463534242;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}

function permutation(count, random) {
  const order = [...Array(count).keys()];
  for (let at = count - 1; at > 0; at--) {
    const other = Math.floor(random() * (at + 1));
    [order[at], order[other]] = [order[other], order[at]];
  }
  return order;
}

/**
 * Return which words each run leaves out, by their places: for the order of weights, then for each random order, without its
 * first words and with these alone, for each share.
 * @param {number[]} weights of the words @returns {number[][]}
 */
function runsOf(weights) {
  const [count, random] = [weights.length, generator()];
  const byWeight = [...Array(count).keys()].sort((one, other) => weights[other] - weights[one] || one - other);
  const orders = [byWeight, ...[...Array(DRAWS).keys()].map(() => permutation(count, random))];
  return orders.flatMap((order) =>
    SHARES.flatMap((share) => {
      const kept = countOf(share, count);
      return [order.slice(0, kept), order.slice(kept)];
    }),
  );
}

const mean = (values) => values.reduce((sum, each) => sum + each, 0) / values.length;

/** Return the percentile of sorted values, between the nearest two. */
function percentile(sorted, share) {
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (place - low);
}

/** Return the mean with its 95 % percentile bootstrap interval. */
function interval(values, random) {
  const means = new Float64Array(RESAMPLES).map(() => {
    let sum = 0;
    for (let at = 0; at < values.length; at++) sum += values[Math.floor(random() * values.length)];
    return sum / values.length;
  });
  means.sort();
  return { mean: mean(values), low: percentile(means, 0.025), high: percentile(means, 0.975) };
}

/**
 * Return the figures of the drops that the runs of `runsOf` gave: of the map, of random words, and how much better the map is.
 * @param {number[]} drops
 */
function figuresOf(drops) {
  const each = 2 * SHARES.length;
  const orders = [...Array(drops.length / each).keys()].map((at) => {
    const own = drops.slice(at * each, (at + 1) * each);
    return [mean(own.filter((_, place) => place % 2 === 0)), mean(own.filter((_, place) => place % 2 === 1))];
  });
  const [map, ...draws] = orders;
  const random = generator();
  return [
    { name: "comprehensiveness", about: "drop without the words of greatest weight", map: map[0], random: interval(draws.map((one) => one[0]), random), gain: interval(draws.map((one) => map[0] - one[0]), random) },
    { name: "sufficiency", about: "drop with these words alone", map: map[1], random: interval(draws.map((one) => one[1]), random), gain: interval(draws.map((one) => one[1] - map[1]), random) },
  ];
}

export { DRAWS, SHARES, countOf, figuresOf, runsOf };
