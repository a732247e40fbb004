// What leaving words out did: one sentence, or the text coloured by the changes, a table beside the weights, and the figures
// that compare the words of greatest weight with random ones.

import { css, difference, inkOn, useScheme } from "./colours.js";
import { isolated, make, makeButton, percent } from "./dom.js";
import { DRAWS, SHARES } from "./faithful.js";
import { nameOf, spearman } from "./leave.js";

/**
 * Show what leaving words out did, beside their weights.
 * @param {HTMLElement} host @param {any} shown @param {any} view
 * @param {{token: import("./view.js").Token, column: number}[]} places what was left out; `column` is -1 for what is no key
 * @param {{drop: number, label: any}[]} changes of each @param {(() => void) | null} onCompare compares with random words
 */
function showDrops(host, shown, view, places, changes, onCompare) {
  const { measure } = shown;
  const weights = view.columnMeans();
  const entries = places.map(({ token, column }, at) => ({
    token,
    name: column < 0 ? token.text : view.keyNames[column],
    weight: column < 0 ? null : weights[column],
    ...changes[at],
  }));
  host.replaceChildren(make("h2", "", "Left out"));
  if (entries.length === 1) host.append(oneSentence(measure, entries[0]));
  else {
    const agreement = spearman(entries.map((each) => each.weight), entries.map((each) => each.drop));
    const known = Number.isNaN(agreement) ? "The ranks of weights and drops cannot be compared." : `Rank agreement of weights and drops: ${agreement.toFixed(2)} (1: the same order, 0: none).`;
    const changed = entries.filter((each) => each.label).length;
    const labels = measure.label ? ` ${changed || "None"} of ${entries.length} ${changed === 1 ? "changes" : "change"} the label.` : "";
    host.append(make("p", "", `How much ${measure.name} drops without each of them.${labels} ${known}`));
    if (shown.texts.length && entries.every((each) => each.token.patch < 0)) host.append(coloured(shown.texts, entries));
    host.append(drawTable(entries, measure));
    if (onCompare) {
      const part = make("div", "below");
      part.append(makeButton("chip", "Compare with random words", onCompare));
      host.append(part);
    }
  }
  host.hidden = false;
}

function oneSentence(measure, { name, weight, drop, label }) {
  const sentence = make("p");
  sentence.append("Without ", isolated(name, "b"), `, ${measure.name} is ${(measure.whole - drop).toFixed(3)} instead of ${measure.whole.toFixed(3)}`);
  if (label) sentence.append(", and the label becomes ", isolated(nameOf(label), "b"), ` (${percent(label.score || 0)})`);
  sentence.append(weight === null ? "." : `. On average, ${percent(weight)} of the attention is on it.`);
  return sentence;
}

/** The text, its words coloured by what the answer loses, or gains, without them. */
function coloured(texts, entries) {
  useScheme();
  const most = Math.max(...entries.map((each) => Math.abs(each.drop)), 1e-9);
  const text = make("div", "sentence dropped");
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "the text, coloured by the drop without each word; the table has the numbers");
  texts.forEach((each, segment) => {
    const [letters, line] = [[...each], make("div")];
    let at = 0;
    for (const entry of entries.filter(({ token }) => token.segment === segment).sort((one, other) => one.token.start - other.token.start)) {
      line.append(letters.slice(at, entry.token.start).join(""));
      const word = isolated(letters.slice(entry.token.start, entry.token.end).join(""), "span");
      const share = entry.drop / most;
      const rgb = difference(0.9 * share);
      [word.style.backgroundColor, word.style.color] = [css(rgb), inkOn(rgb)];
      if (Math.abs(share) > 0.15) word.style.boxShadow = `0 ${Math.ceil(4 * Math.abs(share))}px 0 var(--soft)`;
      word.title = `${share > 0 ? "drop" : "change"} ${entry.drop.toFixed(3)}`;
      line.append(word);
      at = entry.token.end;
    }
    line.append(letters.slice(at).join(""));
    text.append(line);
  });
  return text;
}

function scrolling(label) {
  const scroll = make("div", "scroll short");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", label);
  return scroll;
}

function headerOf(titles) {
  const head = make("tr");
  for (const [title, columns] of titles) {
    const cell = make("th", "", title);
    cell.colSpan = columns;
    cell.scope = "col";
    head.append(cell);
  }
  return head;
}

function drawTable(entries, measure) {
  const scroll = scrolling("what was left out, scrolls");
  const table = make("table");
  const labelled = Boolean(measure.label);
  table.append(headerOf([["without", 1], ["drop", 2], ["mean weight", 2], ...(labelled ? [["label", 1]] : [])]));
  const most = { drop: Math.max(...entries.map((each) => Math.abs(each.drop)), 1e-9), weight: Math.max(...entries.map((each) => each.weight), 1e-9) };
  for (const entry of [...entries].sort((one, other) => other.drop - one.drop)) {
    const line = make("tr");
    const word = make("td");
    word.append(isolated(entry.name));
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
    if (labelled) {
      const cell = make("td");
      if (entry.label) cell.append("becomes ", isolated(nameOf(entry.label), "b"));
      else cell.textContent = "same";
      line.append(cell);
    }
    table.append(line);
  }
  scroll.append(table);
  return scroll;
}

/** Show how the words of greatest weight compare with random ones. @param {HTMLElement} host @param {ReturnType<typeof import("./faithful.js").figuresOf>} figures */
function showFigures(host, figures) {
  const part = make("div", "figures");
  const shares = SHARES.map((share) => 100 * share);
  const about = `Means over ${shares.slice(0, -1).join(", ")} and ${shares[shares.length - 1]} % of the words. Random words: ${DRAWS} draws, with the 95 % bootstrap interval of their mean.`;
  const gain = figures[0].gain;
  const verdict = gain.low > 0
    ? "For this text, the answer depends more on the words of greatest weight than on random ones."
    : "For this text, the words of greatest weight do not matter more than random ones: this map is no guide to what the answer depends on.";
  const scroll = scrolling("comparison with random words, scrolls");
  const table = make("table");
  table.append(headerOf([["figure", 1], ["this map", 1], ["random words", 1], ["gain over random", 1]]));
  const ranged = ({ mean, low, high }) => `${mean.toFixed(3)} (${low.toFixed(3)} to ${high.toFixed(3)})`;
  for (const figure of figures) {
    const line = make("tr");
    const name = make("td");
    name.append(make("b", "", figure.name), ` ${figure.about}; ${figure.name === "sufficiency" ? "lower" : "higher"} is better`);
    line.append(name, make("td", "value", figure.map.toFixed(3)), make("td", "value", ranged(figure.random)), make("td", "value", ranged(figure.gain)));
    table.append(line);
  }
  scroll.append(table);
  part.append(make("p", "", verdict), scroll, make("p", "soft", about));
  const old = host.querySelector(".figures");
  if (old) old.replaceWith(part);
  else host.append(part);
}

export { showDrops, showFigures };
