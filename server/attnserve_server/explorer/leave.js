// "Leave it out": the model runs the text without a word, and the change of its answer is shown beside the word's weight. The
// same texts, measure and rank agreement as `client.faithfulness` of the SDK.

import { cosine, embeddingOf } from "./answers.js";
import { sequenceOf } from "./selection.js";

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

/** Return the sequence of an answer without some of its words, or patches of its image. @param {any} shown @param {import("./view.js").Token[]} tokens */
function sequenceWithout({ texts, tensors, picture, view }, tokens) {
  const left = texts.map((text, segment) => {
    const own = tokens.filter((token) => token.patch < 0 && token.segment === segment);
    return own.length ? without(text, own) : text;
  });
  const patches = tokens.filter((token) => token.patch >= 0).map((token) => token.patch);
  return sequenceOf(left, patches.length ? [picture.tensor(patches, view.keyGrid || view.queryGrid)] : tensors);
}

/** Return whether a word, or a patch, can be left out: it is in the text, and not all of it. */
function canLeave({ texts, picture }, token) {
  if (token.special) return false;
  if (token.patch >= 0) return picture !== null;
  return token.end > token.start && without(texts[token.segment] || "", [token]) !== "";
}

/** What is compared: the score of the best label, or the cosine of the embedding. */
class Measure {
  constructor(result) {
    this.label = bestOf(result);
    this.embedding = this.label ? null : embeddingOf(result);
    this.whole = this.label ? this.label.score || 0 : 1;
  }

  get known() {
    return this.label !== null || this.embedding !== null;
  }

  get name() {
    return this.label ? `the score of “${nameOf(this.label)}”` : "the cosine with the embedding of the whole text";
  }

  /** What to request: all labels, so that the one that is compared is among them, or the embedding. */
  wanted(model) {
    if (!this.label) return { outputs: ["embedding"] };
    return { outputs: [], labels: { top_k: Math.min(1024, Math.max(1, ((model.head || {}).labels || []).length)) } };
  }

  /** How far the answer drops, and the label that it has now, if that is another one. @returns {{drop: number, label: any}} */
  change(result) {
    if (!this.label) return { drop: this.whole - cosine(this.embedding, embeddingOf(result)), label: null };
    const found = ((result.labels || {}).labels || []).find((each) => indexOf(each) === indexOf(this.label));
    const best = bestOf(result);
    return { drop: this.whole - (found ? found.score || 0 : 0), label: best && indexOf(best) !== indexOf(this.label) ? best : null };
  }
}

const bestOf = (result) => ((result.labels || {}).labels || [])[0] || null;
const indexOf = (label) => label.index || 0;
const nameOf = (label) => label.text || String(indexOf(label));

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
  const middle = (one.length + 1) / 2;
  let [product, left, right] = [0, 0, 0];
  for (let at = 0; at < one.length; at++) {
    product += (first[at] - middle) * (second[at] - middle);
    left += (first[at] - middle) ** 2;
    right += (second[at] - middle) ** 2;
  }
  return left && right ? product / Math.sqrt(left * right) : NaN;
}

/**
 * Run the sequence without each of these groups of words, in requests of the model's size.
 * @param {any} api @param {any} shown @param {import("./view.js").Token[][]} groups @param {(done: number) => void} onProgress
 * @returns {Promise<{drop: number, label: any}[]>} changes of the measure
 */
async function changesOf(api, shown, groups, onProgress, signal) {
  const { model, measure } = shown;
  const changes = [];
  const size = Math.max(1, Math.min(model.max_batch_size || 1, 32));
  for (let start = 0; start < groups.length; start += size) {
    const sequences = groups.slice(start, start + size).map((tokens) => sequenceWithout(shown, tokens));
    const answer = await api.infer(model.name, model.version, { sequences, ...measure.wanted(model) }, signal);
    changes.push(...answer.results.map((result) => measure.change(result)));
    onProgress(changes.length);
  }
  return changes;
}

export { Measure, canLeave, changesOf, nameOf, spearman, without };
