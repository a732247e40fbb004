// The choices of the page as a selection of attention, for the API, for Python and for curl.

/** Letters from which weights are sent as float16: half as long, with an error of at most 2^-12 of the weight. */
const LONG = 1200;

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
  if (text.length > LONG) selection.dtype = "float16";
  return selection;
}

/** Return the sequence of a request. */
function sequenceOf(text, pair) {
  return pair ? { text, text_pair: pair } : text;
}

/** A string of JSON is one of Python too. @param {string} value */
const python = (value) => JSON.stringify(value);

/** Return the call as a program with the SDK. */
function asPython(state, host) {
  const heads = /^[\d,]+$/.test(state.heads) ? `[${state.heads}], head_reduction="mean"` : python(state.heads);
  const layers = state.layer === "mean" || state.layer === "rollout" ? `layer_reduction=${python(state.layer)}` : `layers=${state.layer}`;
  const text = state.pair ? `(${python(state.text)}, ${python(state.pair)})` : python(state.text);
  return [
    "from attnserve_client import AttentionSelection, Client",
    "",
    `selection = AttentionSelection(${layers}, heads=${heads}, unit=${python(state.unit)}, special_tokens=${python(state.special ? "keep" : "drop")})`,
    `with Client(${python(host)}) as client:  # the gRPC port`,
    `    result = client.infer(${python(state.model)}, ${text}, version=${python(state.version)}, attention=selection)`,
    "for link in result.attention[0].links():",
    '    print(f"{link.query} -> {link.key}: {link.weight:.3f}")',
    "",
  ].join("\n");
}

/** Return the call as a line of a shell. */
function asCurl(state, address) {
  const body = { sequences: [sequenceOf(state.text, state.pair)], attention: selectionOf(state, "") };
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const path = `v1/models/${encodeURIComponent(state.model)}/versions/${encodeURIComponent(state.version)}:infer`;
  return `curl --json '${quoted}' '${new URL(path, address).href}'\n`;
}

export { asCurl, asPython, selectionOf, sequenceOf };
