// "Leave it out": the model runs the text without a word, and the change of its answer is shown beside the word's weight. The
// same texts, measure and rank agreement as `client.faithfulness` of the SDK.

import { cosine, embeddingOf } from "./answers.js";
import { isolated, make, percent } from "./dom.js";

/** Return a text without some of its words; spaces around them become one. @param {import("./view.js").Token[]} tokens */
function without(text, tokens) {
  const letters = [...text];
  const pieces = [];
  let at = 0;
  for (const token of [...tokens].sort((one, other) => one.start - other.start)) {
    pieces.push(letters.slice(at, token.start).join(""));
    at = token.end;
  }
  pieces.push(letters.slice(at).join(""));
  return pieces.join("").split(/\s+/u).filter(Boolean).join(" ");
}

/** Return both texts of a sequence without one word. */
function sequenceWithout(texts, token) {
  const left = texts.map((text, segment) => (segment === token.segment ? without(text, [token]) : text));
  return left.length > 1 ? { text: left[0], text_pair: left[1] } : left[0];
}

/** Return whether a word can be left out: it is in the text, and not all of it. */
function canLeave(texts, token) {
  return !token.special && token.end > token.start && without(texts[token.segment] || "", [token]) !== "";
}

/** What is compared: the score of the best label, or the cosine of the embedding. */
class Measure {
  constructor(result) {
    this.label = ((result.labels || {}).labels || [])[0] || null;
    this.embedding = this.label ? null : embeddingOf(result);
    this.whole = this.label ? this.label.score || 0 : 1;
  }

  get known() {
    return this.label !== null || this.embedding !== null;
  }

  get name() {
    return this.label ? `the score of “${this.label.text}”` : "the cosine with the embedding of the whole text";
  }

  /** What to request: all labels, so that the one that is compared is among them, or the embedding. */
  wanted(model) {
    if (!this.label) return { outputs: ["embedding"] };
    return { outputs: [], labels: { top_k: Math.min(1024, Math.max(1, ((model.head || {}).labels || []).length)) } };
  }

  value(result) {
    if (!this.label) return cosine(this.embedding, embeddingOf(result));
    const found = ((result.labels || {}).labels || []).find((each) => (each.index || 0) === (this.label.index || 0));
    return found ? found.score || 0 : 0;
  }
}

/** Return the mean weight that each key gets over the rows that are shown. */
function columnWeights(view) {
  return view.keys.map((_, column) => view.rows.reduce((sum, row) => sum + view.value(row, column), 0) / view.rows.length);
}

function ranks(values) {
  const order = [...values.keys()].sort((one, other) => values[one] - values[other]);
  const found = new Array(values.length);
  for (let start = 0; start < order.length; ) {
    let end = start;
    while (end < order.length && values[order[end]] === values[order[start]]) end++;
    for (let at = start; at < end; at++) found[order[at]] = (start + end + 1) / 2;
    start = end;
  }
  return found;
}

/** Return Spearman's rank correlation; equal values share their mean rank; NaN if one is constant. */
function spearman(one, other) {
  const [first, second] = [ranks(one), ranks(other)];
  const mean = (one.length + 1) / 2;
  let [product, left, right] = [0, 0, 0];
  for (let at = 0; at < one.length; at++) {
    product += (first[at] - mean) * (second[at] - mean);
    left += (first[at] - mean) ** 2;
    right += (second[at] - mean) ** 2;
  }
  return left && right ? product / Math.sqrt(left * right) : NaN;
}

/** Run the text without each of these words, in requests of the model's size. @returns {Promise<number[]>} drops of the measure */
async function dropsOf(api, shown, tokens, onProgress, signal) {
  const { model, texts, measure } = shown;
  const drops = [];
  const size = Math.max(1, Math.min(model.max_batch_size || 1, 32));
  for (let start = 0; start < tokens.length; start += size) {
    const sequences = tokens.slice(start, start + size).map((token) => sequenceWithout(texts, token));
    const answer = await api.infer(model.name, model.version, { sequences, ...measure.wanted(model) }, signal);
    drops.push(...answer.results.map((result) => measure.whole - measure.value(result)));
    onProgress(drops.length);
  }
  return drops;
}

/** Show what leaving words out did, beside their weights. */
function showDrops(host, shown, tokens, drops) {
  const { view, measure } = shown;
  const weights = columnWeights(view);
  const places = new Map(view.keys.map((token, column) => [token.index, column]));
  const entries = tokens.map((token, at) => ({ token, weight: weights[places.get(token.index)] || 0, drop: drops[at] }));
  host.replaceChildren(make("h2", "", "Left out"));
  if (entries.length === 1) {
    const sentence = make("p");
    const [{ token, weight, drop }] = entries;
    sentence.append("Without ", isolated(token.text, "b"), `, ${measure.name} is ${(measure.whole - drop).toFixed(3)} instead of `);
    sentence.append(`${measure.whole.toFixed(3)}. Other words give it ${percent(weight)} of their attention on average.`);
    host.append(sentence);
  } else {
    const agreement = spearman(entries.map((each) => each.weight), entries.map((each) => each.drop));
    const known = Number.isNaN(agreement) ? "The ranks of weights and drops cannot be compared." : `Rank agreement of weights and drops: ${agreement.toFixed(2)} (1: the same order, 0: none).`;
    host.append(make("p", "", `How much ${measure.name} drops without each word. ${known}`), drawTable(entries, view));
  }
  host.hidden = false;
}

function drawTable(entries, view) {
  const scroll = make("div", "scroll short");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "words that were left out, scrolls");
  const table = make("table");
  const head = make("tr");
  for (const [title, columns] of [["word", 1], ["drop", 2], ["mean weight", 2]]) {
    const cell = make("th", "", title);
    cell.colSpan = columns;
    cell.scope = "col";
    head.append(cell);
  }
  table.append(head);
  const names = new Map(view.keys.map((token, column) => [token.index, view.keyNames[column]]));
  const most = { drop: Math.max(...entries.map((each) => Math.abs(each.drop)), 1e-9), weight: Math.max(...entries.map((each) => each.weight), 1e-9) };
  for (const entry of [...entries].sort((one, other) => other.drop - one.drop)) {
    const line = make("tr");
    const word = make("td");
    word.append(isolated(names.get(entry.token.index) || entry.token.text));
    line.append(word);
    for (const name of ["drop", "weight"]) {
      line.append(make("td", "value", entry[name].toFixed(3)));
      const cell = make("td", "wide");
      const bar = make("span", "bar");
      const fill = make("span", entry[name] < 0 ? "fill less" : "fill");
      fill.style.width = `${(100 * Math.abs(entry[name])) / most[name]}%`;
      bar.append(fill);
      cell.append(bar);
      line.append(cell);
    }
    table.append(line);
  }
  scroll.append(table);
  return scroll;
}

export { Measure, canLeave, dropsOf, showDrops, spearman, without };
