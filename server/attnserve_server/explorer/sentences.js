// A map by sentence: the weights of its words, joined over the sentences, or the lines of code, that they are in.

import { MapView } from "./view.js";

/** Words from which a map is shown by sentence at first. */
const MANY_WORDS = 160;
/** Letters of a sentence in a label or a list. */
const NAME = 28;

/** Return whether a text is code, by its lines: some are indented, or several end as statements do. @param {string} text */
function isCode(text) {
  return /\n[ \t]+\S/.test(text) || (text.match(/[;{}]\s*$/gm) || []).length > 1;
}

/** Return start and end of each sentence, or line of code, in code points. Source: Unicode UAX 29, in the browser. @param {string} text @param {boolean} code */
function sentencesOf(text, code) {
  // A browser without a segmenter, such as Firefox before 125, gets lines.
  const lines = code || !("Segmenter" in Intl);
  const pieces = lines ? text.match(/[^\n]*\n|[^\n]+/g) || [] : [...new Intl.Segmenter(undefined, { granularity: "sentence" }).segment(text)].map((each) => each.segment);
  let start = 0;
  return pieces.map((piece) => {
    const end = start + [...piece].length;
    const found = { start, end };
    start = end;
    return found;
  });
}

/** Return the groups of tokens that are in one sentence, in order; each special token, and each without a text, is one of its own. */
function groupsOf(tokens, texts, code) {
  const sentences = texts.map((text) => sentencesOf(text, code));
  const groups = [];
  let before = null;
  tokens.forEach((token, place) => {
    const known = !token.special && token.end > token.start && sentences[token.segment];
    const sentence = known ? sentences[token.segment].find((each) => token.start < each.end) : null;
    if (sentence && sentence === before) groups[groups.length - 1].places.push(place);
    else groups.push({ sentence, places: [place] });
    before = sentence;
  });
  return groups;
}

/** Return whether a map can be shown by sentence: its two sides are one text of at least two sentences. @param {MapView} view */
function hasSentences(view, code) {
  return view.same && !view.keyGrid && groupsOf(view.queries, view.texts, code).filter((each) => each.sentence).length > 1;
}

/**
 * Return a map by sentence. A weight is what the words of the query's sentence give all words of the key's, as the mean over
 * the former. Each unit has `places`, those of its words.
 * @param {MapView} view @param {boolean} code
 */
function bySentence(view, code) {
  const letters = view.texts.map((text) => [...text]);
  const [rows, columns] = [view.queries, view.keys].map((tokens) => groupsOf(tokens, view.texts, code));
  const unitsOf = (groups, tokens) =>
    groups.map(({ places }, index) => {
      const [first, last] = [tokens[places[0]], tokens[places[places.length - 1]]];
      const text = places.length === 1 ? first.text : letters[first.segment].slice(first.start, last.end).join("");
      return { index, text, start: first.start, end: last.end, special: first.special, segment: first.segment, patch: -1, places };
    });
  const [queries, keys] = [unitsOf(rows, view.queries), unitsOf(columns, view.keys)];
  const weights = new Float32Array(rows.length * columns.length);
  rows.forEach((row, at) =>
    columns.forEach((column, to) => {
      let sum = 0;
      for (const query of row.places) for (const key of column.places) sum += view.weights[query * view.keys.length + key];
      weights[at * columns.length + to] = sum / row.places.length;
    }),
  );
  const names = keys.map((unit) => (unit.special ? unit.text : nameOfSentence(unit, letters, code)));
  const made = new MapView({ queries, keys, heads: ["joined"], weights, same: true, texts: view.texts, names });
  made.partial = view.partial;
  return made;
}

function nameOfSentence(unit, letters, code) {
  const words = unit.text.replace(/\s+/gu, " ").trim();
  const short = [...words].length > NAME ? `${[...words].slice(0, NAME).join("")}…` : words;
  const line = letters[unit.segment].slice(0, unit.start).filter((letter) => letter === "\n").length + 1;
  return `${code ? line : unit.index + 1}: ${short}`;
}

export { MANY_WORDS, bySentence, hasSentences, isCode };
