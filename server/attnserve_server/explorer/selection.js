// The choices of the page as a selection of attention, for the API, for Python and for curl.

/** Letters from which a text counts as long: its weights are sent as float16, and only the greatest of each row at first. */
const LONG = 1200;
/** Weights of a row that are requested of a long text. */
const AT_FIRST = 16;

/** Return the selection of the map in detail. @param {any} state @param {string} text */
function selectionOf(state, text) {
  const selection = { unit: state.unit, special_tokens: state.special ? "keep" : "drop" };
  if (state.layer === "mean" || state.layer === "rollout") selection.layer_reduction = state.layer;
  else selection.layers = [Number(state.layer)];
  if (state.heads === "mean" || state.heads === "max") selection.head_reduction = state.heads;
  else {
    selection.heads = state.heads.split(",").map(Number);
    selection.head_reduction = "mean";
  }
  // Half as long, with an error of at most 2^-12 of the weight.
  if (text.length > LONG) selection.dtype = "float16";
  return selection;
}

/** Return the kept weights of a row, 0 for all: what the reader chose, or the greatest ones of a long text. @param {any} state @param {string} text */
function topOf(state, text) {
  if (state.top >= 0) return state.top;
  return text.length > LONG ? AT_FIRST : 0;
}

/** Return what of the weights is requested: all, or those that the thresholds keep. Comparing maps needs all. @param {any} state @param {string} text */
function askedOf(state, text) {
  if (state.other !== "none") return { top: 0, least: 0 };
  return { top: topOf(state, text), least: state.least };
}

/** Return the thresholds as fields of a selection. @param {{top: number, least: number}} asked */
function thresholds({ top, least }) {
  return { ...(top > 0 ? { top_k: top } : {}), ...(least > 0 ? { min_weight: least } : {}) };
}

/** Return whether weights that were requested are enough for other thresholds. @param {{top: number, least: number}} asked @param {{top: number, least: number}} wanted */
function suffices(asked, wanted) {
  return (!asked.top || (wanted.top > 0 && wanted.top <= asked.top)) && wanted.least >= asked.least;
}

/** Return the sequence of a request. @param {string[]} texts one, or the two of a pair; none beside tensors alone @param {any[]} [tensors] */
function sequenceOf(texts, tensors = []) {
  if (texts.length === 1 && !tensors.length) return texts[0];
  return { ...(texts.length ? { text: texts[0] } : {}), ...(texts[1] ? { text_pair: texts[1] } : {}), ...(tensors.length ? { tensors } : {}) };
}

/** A string of JSON is one of Python too. @param {string} value */
const python = (value) => JSON.stringify(value);

/** Return the call as a program with the SDK. @param {any} state @param {string} host @param {{top: number, least: number}} asked @param {string} [pixels] name of the input of an image */
function asPython(state, host, asked, pixels = "") {
  const heads = /^[\d,]+$/.test(state.heads) ? `[${state.heads}], head_reduction="mean"` : python(state.heads);
  const layers = state.layer === "mean" || state.layer === "rollout" ? `layer_reduction=${python(state.layer)}` : `layers=${state.layer}`;
  const kept = Object.entries(thresholds(asked)).map(([name, value]) => `, ${name}=${value}`).join("");
  const parts = [state.text, state.pair].filter(Boolean).map(python);
  if (pixels) parts.push(`{${python(pixels)}: np.load("pixels.npy")}`);
  const input = parts.length > 1 ? `(${parts.join(", ")})` : parts[0];
  return [
    ...(pixels ? ["import numpy as np"] : []),
    "from attnserve_client import AttentionSelection, Client",
    "",
    `selection = AttentionSelection(${layers}, heads=${heads}, unit=${python(state.unit)}, special_tokens=${python(state.special ? "keep" : "drop")}${kept})`,
    `with Client(${python(host)}) as client:  # the gRPC port`,
    `    result = client.infer(${python(state.model)}, ${input}, version=${python(state.version)}, attention=selection)`,
    "for link in result.attention[0].links():",
    '    print(f"{link.query} -> {link.key}: {link.weight:.3f}")',
    "",
  ].join("\n");
}

/** Return the body of the call. @param {any} state @param {string[]} texts @param {{top: number, least: number}} asked @param {any[]} [tensors] */
function bodyOf(state, texts, asked, tensors = []) {
  return { sequences: [sequenceOf(texts, tensors)], attention: { ...selectionOf(state, ""), ...thresholds(asked) } };
}

/** Return the call as a line of a shell, with the body in it, or in a file. @param {any} state @param {object | string} body or the name of a file @param {string} address */
function asCurl(state, body, address) {
  const data = typeof body === "string" ? `@${body}` : JSON.stringify(body);
  const quoted = data.replaceAll("'", "'\\''");
  const path = `v1/models/${encodeURIComponent(state.model)}/versions/${encodeURIComponent(state.version)}:infer`;
  return `curl --json '${quoted}' '${new URL(path, address).href}'\n`;
}

export { LONG, asCurl, asPython, askedOf, bodyOf, selectionOf, sequenceOf, suffices, thresholds, topOf };
