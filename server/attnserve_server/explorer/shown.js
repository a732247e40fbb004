// What the model answered, before any map: its labels, answers or filled masks as bars with numbers, or its embedding.

import { cosine, embeddingOf } from "./answers.js";
import { isolated, make, percent } from "./dom.js";

const MOST_SPANS = 40;

/** Fill an element with the answer of one sequence. @param {HTMLElement} host @param {any} model @param {any} result @param {boolean} alone */
function showAnswer(host, model, result, alone) {
  host.replaceChildren();
  const labels = result.labels;
  if (labels && labels.labels) host.append(bars(labels.labels.map((each) => [each.text || String(each.index || 0), each.score || 0])));
  else if (labels && labels.spans) host.append(spans(labels));
  else if (labels) host.append(make("p", "soft", "No label reaches the least score."));
  const embedding = embeddingOf(result);
  if (embedding) host.append(about(embedding, alone));
  if (!labels && !embedding) host.append(make("p", "soft", outputsOf(model)));
}

function outputsOf(model) {
  const names = (model.outputs || []).map((each) => each.name).join(", ");
  return `The model has neither labels nor an embedding of the whole text. Its outputs: ${names || "none"}.`;
}

/** A list of names with a bar and a number each. */
function bars(entries) {
  const list = make("ul", "bars");
  const bounded = entries.every(([, score]) => score >= 0 && score <= 1);
  const most = Math.max(...entries.map(([, score]) => Math.abs(score)), 1e-9);
  for (const [name, score] of entries) {
    const item = make("li");
    const bar = make("span", "bar");
    const fill = make("span", score < 0 ? "fill less" : "fill");
    fill.style.width = `${(100 * Math.abs(score)) / (bounded ? 1 : most)}%`;
    bar.append(fill);
    item.append(isolated(name), bar, make("span", "value", bounded ? percent(score) : score.toFixed(3)));
    list.append(item);
  }
  return list;
}

function spans(labels) {
  const entries = labels.spans.slice(0, MOST_SPANS).map((span) => {
    const first = (span.labels || [])[0];
    return [first ? `${span.text}: ${first.text || first.index || 0}` : span.text, span.score || (first ? first.score : 0) || 0];
  });
  return entries.length ? bars(entries) : make("p", "soft", "No part of the text has a label.");
}

function about(embedding, alone) {
  const length = Math.sqrt(embedding.reduce((sum, each) => sum + each * each, 0));
  const advice = alone ? " Compare it with a second text to see how near both are." : "";
  return make("p", "", `An embedding of ${embedding.length} numbers, of length ${length.toFixed(3)}.${advice}`);
}

/** Return one sentence on how two answers of one model, or of two, relate. */
function relation(one, other) {
  const embeddings = [embeddingOf(one), embeddingOf(other)];
  if (embeddings[0] && embeddings[1]) {
    if (embeddings[0].length !== embeddings[1].length) return "The embeddings have different lengths, and cannot be compared.";
    return `Cosine of both embeddings: ${cosine(embeddings[0], embeddings[1]).toFixed(4)}.`;
  }
  const labels = [one, other].map((each) => ((each.labels || {}).labels || [])[0]);
  if (!labels[0] || !labels[1]) return "";
  const [first, second] = labels.map((each) => `${each.text} (${percent(each.score || 0)})`);
  return labels[0].text === labels[1].text ? `Both have the label ${labels[0].text}: ${first}, ${second}.` : `The labels differ: ${first}, ${second}.`;
}

export { bars, relation, showAnswer };
