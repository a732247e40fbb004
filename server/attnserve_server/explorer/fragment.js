// The state of the page in the fragment of its address, which browsers do not send to servers. A text is in it only if the
// reader ticked that.

const FIRST = {
  model: "", version: "", layer: "-1", heads: "mean", unit: "word", special: false, backwards: false, least: 0, top: -1, pin: -1,
  reading: "auto", arcs: false, level: "auto", fit: "stretch", scale: "half",
  other: "none", otherModel: "", otherVersion: "", open: false, keep: false, text: "", pair: "", second: "",
};
const TEXTS = ["text", "pair", "second"];

/** Return the state that a fragment states; what it leaves out is as at first. */
function readFragment(fragment) {
  const state = { ...FIRST };
  for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    if (!(name in FIRST)) continue;
    const kind = typeof FIRST[name];
    if (kind === "boolean") state[name] = value === "1";
    else if (kind === "number") state[name] = Number.isFinite(Number(value)) ? Number(value) : FIRST[name];
    else state[name] = value;
  }
  return state;
}

/** Return the fragment of a state. */
function writeFragment(state) {
  const parts = new URLSearchParams();
  for (const [name, first] of Object.entries(FIRST)) {
    if (state[name] === first || (TEXTS.includes(name) && !state.keep)) continue;
    if (name.startsWith("other") && state.other !== "model" && name !== "other") continue;
    parts.set(name, typeof first === "boolean" ? (state[name] ? "1" : "0") : String(state[name]));
  }
  const text = parts.toString();
  return text ? `#${text}` : "";
}

export { readFragment, writeFragment };
