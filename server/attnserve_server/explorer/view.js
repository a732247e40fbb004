// The weights of one map with its tokens: what is chosen of them, and the links that follow. Draws nothing.

/**
 * @typedef {{index: number, text: string, start: number, end: number, special: boolean, segment: number, patch: number}} Token
 * Offsets are in Unicode code points of the text of the segment. `patch`: its place in a grid of patches, below 0 for none.
 * @typedef {{rows: number, columns: number, leading: number}} Grid
 * @typedef {{rows: [number, number], columns: [number, number]}} Part
 * First and last place among queries, and among keys, of the part of a map that is shown.
 * @typedef {{head: number, special: boolean, least: number, top: number, part?: Part | null}} Choice
 * `head`: place of a head, -1 for the mean; `least`: weights below it count as 0; `top`: kept weights of a row, 0 for all.
 * @typedef {{share: number, row: number, column: number}} FoundLink
 */

/** The text of each token, with its position where the text repeats: as `AttentionMap.names` of the SDK. */
function namesOf(tokens, texts = []) {
  const counts = new Map();
  for (const token of tokens) counts.set(token.text, (counts.get(token.text) || 0) + 1);
  return tokens.map((token) => (counts.get(token.text) > 1 ? token.text + placeInText(token, texts) : token.text));
}

function placeInText(token, texts) {
  const text = texts[token.segment] || "";
  if (!text.includes("\n") || token.end <= token.start) return ` (${token.index})`;
  const lines = [...text].slice(0, token.start).join("").split("\n");
  return `, line ${lines.length}, column ${[...lines[lines.length - 1]].length + 1}`;
}

const isPunctuation = (token) => !/[\p{L}\p{N}]/u.test(token.text);

/** One map. Letters of shapes: H heads, L queries, S keys. */
class MapView {
  /**
   * @param {{queries: Token[], keys: Token[], heads: (number|string)[], weights: Float32Array, same: boolean,
   *   outside?: ((row: number, column: number) => boolean) | null, queryGrid?: Grid | null, keyGrid?: Grid | null,
   *   texts?: string[], signed?: boolean, names?: string[], picture?: HTMLCanvasElement | null}} given
   * `weights` are H * L * S, row by row; `same`: queries and keys are the same sequence; `signed`: differences; `names`: of
   * queries and keys alike, in place of their texts; `picture`: what the patches of a grid cover
   */
  constructor(given) {
    this.queries = given.queries;
    this.keys = given.keys;
    this.heads = given.heads;
    this.weights = given.weights;
    this.same = given.same;
    this.signed = given.signed || false;
    this.texts = given.texts || [];
    this.queryGrid = given.queryGrid || null;
    this.keyGrid = given.keyGrid || null;
    this.isOutside = given.outside || (() => false);
    this.picture = given.picture || null;
    /** The share of all weight that is here; null: all of it. Rows in `exact` have all of theirs. */
    this.partial = /** @type {number | null} */ (null);
    this.exact = new Set();
    this.queryNames = given.names || namesOf(this.queries, this.texts);
    this.keyNames = given.names || namesOf(this.keys, this.texts);
    this.queryMarks = this.queries.map(isPunctuation);
    this.keyMarks = this.keys.map(isPunctuation);
    this.choose({ head: -1, special: false, least: 0, top: 0 });
  }

  /** Compute `matrix`, and the rows and columns that are shown. @param {Choice} choice */
  choose(choice) {
    const [rowCount, columnCount] = [this.queries.length, this.keys.length];
    const size = rowCount * columnCount;
    const heads = this.weights.length / (size || 1);
    const chosen = choice.head < 0 ? [...Array(heads).keys()] : [choice.head];
    const matrix = new Float32Array(size);
    for (const head of chosen)
      for (let at = 0; at < size; at++) matrix[at] += this.weights[head * size + at] / chosen.length;
    this.matrix = matrix;
    const shown = (tokens) => [...tokens.keys()].filter((at) => choice.special || !tokens[at].special);
    [this.rows, this.columns] = [shown(this.queries), shown(this.keys)];
    if (!this.rows.length || !this.columns.length) {
      [this.rows, this.columns] = [[...this.queries.keys()], [...this.keys.keys()]];
    }
    this.everyRow = this.rows;
    if (choice.part) {
      const { rows, columns } = choice.part;
      this.rows = this.rows.filter((at) => at >= rows[0] && at <= rows[1]);
      this.columns = this.columns.filter((at) => at >= columns[0] && at <= columns[1]);
    }
    if (choice.least > 0 || choice.top > 0) this.drop(choice.least, choice.top);
    this.greatest = 0;
    for (const row of this.rows)
      for (const column of this.columns) this.greatest = Math.max(this.greatest, Math.abs(this.value(row, column)));
    this.greatest = this.greatest || 1;
  }

  /** Set weights below `least`, and all but the `top` greatest of a row, to 0. */
  drop(least, top) {
    for (const row of this.rows) {
      let bound = least;
      if (top > 0 && top < this.columns.length) {
        const weights = this.columns.map((column) => Math.abs(this.value(row, column))).sort((one, other) => other - one);
        bound = Math.max(bound, weights[top - 1]);
      }
      for (const column of this.columns)
        if (Math.abs(this.value(row, column)) < bound) this.matrix[row * this.keys.length + column] = 0;
    }
  }

  value(row, column) {
    return this.matrix[row * this.keys.length + column];
  }

  /** Return the mean over the heads of the weights that each key gets, over all rows, thresholds left aside. @returns {number[]} */
  columnMeans() {
    const size = this.queries.length * this.keys.length;
    const heads = this.weights.length / (size || 1);
    return this.keys.map((_, column) => {
      let sum = 0;
      for (let head = 0; head < heads; head++)
        for (const row of this.everyRow) sum += this.weights[head * size + row * this.keys.length + column];
      return sum / (heads * this.everyRow.length);
    });
  }

  /** Links of punctuation, and of a token to itself, are left out of lists: as in `AttentionMap.links` of the SDK. */
  isListed(row, column) {
    if (this.queryMarks[row] || this.keyMarks[column]) return false;
    return !(this.same && this.queries[row].index === this.keys[column].index);
  }

  /** Return the strongest links, greatest first; of equal ones, in the order of rows and columns. @returns {FoundLink[]} */
  links(most) {
    const found = [];
    let least = 0;
    const sort = () => found.sort((one, other) => Math.abs(other.share) - Math.abs(one.share) || one.row - other.row || one.column - other.column);
    for (const row of this.rows)
      for (const column of this.columns) {
        const share = this.value(row, column);
        if (share === 0 || (!this.signed && share < 0) || Math.abs(share) < least || !this.isListed(row, column)) continue;
        found.push({ share, row, column });
        if (found.length >= 8 * most + 64) {
          sort();
          found.length = most;
          least = Math.abs(found[most - 1].share);
        }
      }
    return sort().slice(0, most);
  }
}

export { MapView, isPunctuation, namesOf };
