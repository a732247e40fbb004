// The controls below the answer: what a word is, what pointing shows, thresholds, layers and heads, and exports.

import { asCsv, asJson, asPng, asSvg, save } from "./exports.js";
import { choices, make, makeButton, toggle } from "./dom.js";
import { asCurl, asPython, bodyOf, topOf } from "./selection.js";
import { hasSentences } from "./sentences.js";

/** Return a labelled field. */
function field(label, input) {
  const made = make("label", "group");
  made.append(make("span", "", label), input);
  return made;
}

function numberInput(value, most, step) {
  const input = make("input");
  Object.assign(input, { type: "number", min: "0", max: String(most), step: String(step), value: String(value) });
  return input;
}

/** Fill the controls of the maps. @param {any} page */
function mapControls(host, page) {
  const { state } = page;
  host.replaceChildren();
  host.append(choices("show", [["word", "words"], ["token", "tokens"]], state.unit, (unit) => page.change({ unit, pin: -1 })));
  const { texts, view } = page.shown;
  if (state.other === "none" && hasSentences(view, page.code)) {
    const level = page.sentences ? "sentences" : "words";
    host.append(choices("map", [["words", `by ${state.unit}`], ["sentences", page.code ? "by line" : "by sentence"]], level, (chosen) => page.reshape({ level: chosen })));
  }
  if (texts.length) {
    const reading = page.code ? "code" : "text";
    host.append(choices("text", [["text", "as text"], ["code", "as code"]], reading, (chosen) => page.reshape({ reading: chosen })));
  }
  host.append(page.boards[0].directions((backwards) => page.redraw({ backwards })));
  toggle(host, "arcs", state.arcs, (arcs) => page.redraw({ arcs }));
  toggle(host, "special tokens", state.special, (special) => page.change({ special }));
  const least = numberInput(state.least, 1, 0.01);
  least.addEventListener("change", () => page.redraw({ least: Number(least.value) || 0 }));
  const top = numberInput(topOf(state, texts.join("")), 512, 1);
  top.addEventListener("change", () => page.redraw({ top: Number(top.value) || 0 }));
  const find = make("input");
  find.type = "search";
  const count = make("span", "soft");
  count.setAttribute("role", "status");
  find.addEventListener("input", () => {
    const found = page.boards.map((board) => board.words.find(find.value))[0];
    count.textContent = find.value.trim() ? `${found} found` : "";
  });
  find.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    page.boards[0].words.next();
  });
  const searching = field("find a word", find);
  searching.append(count);
  host.append(field("weights from", least), field("most of a row (0: all)", top), searching);
}

/** Return why a site cannot be chosen, or what it is. */
function siteText(site, at, last) {
  const kind = site.kind && site.kind !== "self" ? `, ${site.kind}` : "";
  return `${at}${at === last ? " (last)" : ""}${kind}${site.unavailable_reason ? ": no weights" : ""}`;
}

function option(value, text, chosen) {
  const made = make("option", "", text);
  made.value = value;
  made.selected = value === chosen;
  return made;
}

/** Fill the choice of layer and heads. @param {any} page @param {any} model */
function layerControls(host, page, model) {
  const { state } = page;
  const sites = model.sites || [];
  const open = sites.filter((site) => !site.unavailable_reason);
  const layer = make("select");
  sites.forEach((site, at) => {
    const made = option(String(at), siteText(site, at, sites.length - 1), page.layer(model));
    made.disabled = Boolean(site.unavailable_reason);
    layer.append(made);
  });
  if (open.length > 1 && open.every((site) => site.query_axis === open[0].query_axis && site.key_axis === open[0].key_axis)) {
    layer.append(option("mean", "mean of all", state.layer));
    if (open[0].query_axis === open[0].key_axis) layer.append(option("rollout", "rollout of all", state.layer));
  }
  layer.addEventListener("change", () => page.change({ layer: layer.value, ...(/^\d/.test(state.heads) && /\D/.test(layer.value) ? { heads: "mean" } : {}) }));
  const heads = make("select");
  const joined = state.layer === "mean" || state.layer === "rollout";
  heads.append(option("mean", "mean of all", state.heads), option("max", "greatest of all", state.heads));
  const site = sites[Number(page.layer(model))];
  if (!joined && site) {
    for (let head = 0; head < (site.heads || 0); head++) heads.append(option(String(head), String(head), state.heads));
    if (state.heads.includes(",")) heads.append(option(state.heads, `mean of ${state.heads}`, state.heads));
  }
  heads.addEventListener("change", () => page.change({ heads: heads.value }));
  host.replaceChildren(field("layer", layer), field("heads", heads));
}

/** Fill the exports. @param {any} page */
function exportControls(host, page) {
  host.replaceChildren(make("span", "soft", "save or share"));
  const name = () => `${page.shown.model.name}-attention`;
  const board = () => page.boards[0];
  const add = (text, act) => host.append(makeButton("chip", text, act));
  const code = make("pre", "code");
  code.tabIndex = 0;
  code.hidden = true;
  const tell = make("span", "soft");
  tell.setAttribute("role", "status");
  const copy = async (text, what) => {
    try {
      await navigator.clipboard.writeText(text);
      tell.textContent = `${what} is copied.`;
    } catch {
      tell.textContent = "The browser does not let this page copy; select it below.";
    }
    code.textContent = text;
    code.hidden = false;
  };
  add("PNG", async () => save(`${name()}.png`, await asPng(board(), page.caption()), "image/png"));
  add("SVG", () => {
    const made = asSvg(board().view, page.caption());
    tell.textContent = made ? "" : "The map has too many cells for SVG; save it as PNG, or choose fewer words.";
    if (made) save(`${name()}.svg`, made, "image/svg+xml");
  });
  add("CSV", () => save(`${name()}.csv`, asCsv(board().view), "text/csv"));
  add("JSON", () => save(`${name()}.json`, asJson(board().view, page.shown.receipt, page.shown.selection), "application/json"));
  const kept = () => ({ top: Math.max(page.state.top, 0), least: page.state.least });
  add("as Python", () => {
    const { picture } = page.shown;
    if (picture) save("pixels.npy", picture.npy());
    return copy(asPython(page.named(), location.hostname, kept(), picture ? picture.input.name : ""), picture ? "pixels.npy is saved; the program" : "The program");
  });
  add("as curl", () => {
    const { texts, tensors } = page.shown;
    const body = bodyOf(page.named(), texts, kept(), tensors);
    if (tensors.length) save("request.json", JSON.stringify(body), "application/json");
    return copy(asCurl(page.named(), tensors.length ? "request.json" : body, document.baseURI), tensors.length ? "request.json is saved; the line" : "The line");
  });
  add("copy link", () => copy(page.link(), "The link"));
  const keep = make("input");
  keep.type = "checkbox";
  keep.checked = page.state.keep;
  keep.addEventListener("change", () => page.remember({ keep: keep.checked }));
  const label = make("label", "group");
  label.append(keep, make("span", "", "with the text in the link"));
  host.append(label, tell, code);
}

export { exportControls, layerControls, mapControls };
