// The form of the page: models, versions, texts, the token, and the state that the address holds.

import { Api, Refused } from "./api.js";
import { byId, bytesText, make, makeButton } from "./dom.js";
import { readFragment, writeFragment } from "./fragment.js";
import { ImageField } from "./imagefield.js";

const EXAMPLES = [
  ["contract", "The buyer agrees to assume all liabilities, except those specifically excluded in Schedule B, which includes environmental damages from the 1995 incident."],
  ["patient", "Patient takes metformin for diabetes, started lisinopril last month for hypertension, and reports occasional dizziness since then."],
  ["code", "if processed:\n    result.append(processed)"],
];
const MOST_FILE = 1 << 20;

/** Return what the second text of a model is; null for a model that is not made for pairs. */
function pairOf(model) {
  if (!model.accepts_text) return null;
  const { kind, labels = [] } = model.head || {};
  if (kind === "spans") return "Passage that has the answer (the text above is the question)";
  if (kind === "sequence_labels" && labels.length === 1) return "Text that is ranked (the text above is the query)";
  return model.text_pair_axis !== model.text_axis ? "Second text, which the model reads apart" : null;
}

/** The form. What runs a text, and shows its answer, is in the class that extends it: `run` and `showGrid`. */
class Form {
  constructor() {
    this.api = new Api();
    this.state = readFragment(location.hash);
    this.models = [];
    this.described = new Map();
    /** The answer on screen, with what was requested for it. @type {any} */
    this.shown = null;
    this.image = new ImageField((change) => this.remember(change), (act) => this.guard(act));
    this.pairOpen = false;
  }

  /** @abstract @returns {Promise<void>} */
  async run() {}

  /** @abstract @returns {Promise<void>} */
  async showGrid() {}

  async start() {
    for (const [name, text] of EXAMPLES)
      byId("examples").append(makeButton("chip", name, () => this.example(text)));
    this.listen();
    this.fill();
    await this.guard(async () => {
      await this.load();
      await this.runIfComplete();
    });
  }

  /** Run what the address states, if it has all that the model needs. */
  async runIfComplete() {
    if (this.state.text && !this.image.input) await this.run();
  }

  listen() {
    byId("ask").addEventListener("submit", (event) => this.submit(event, () => this.run()));
    byId("ask").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.submit(event, () => this.run());
    });
    byId("sign").addEventListener("submit", (event) => this.submit(event, () => this.signIn()));
    byId("model").addEventListener("change", () => this.choose({ model: byId("model").value, version: "" }));
    byId("version").addEventListener("change", () => this.choose({ version: byId("version").value }));
    byId("other").addEventListener("change", () => this.choose({ other: byId("other").value }));
    byId("other-model").addEventListener("change", () => {
      const [otherModel, otherVersion] = JSON.parse(byId("other-model").value);
      this.choose({ otherModel, otherVersion });
    });
    for (const name of ["text", "pair", "second"]) byId(name).addEventListener("input", () => this.remember({ [name]: byId(name).value }));
    byId("pair-button").addEventListener("click", () => {
      this.pairOpen = byId("pair-field").hidden;
      if (!this.pairOpen) this.remember({ pair: "" });
      this.fill();
    });
    byId("depth").addEventListener("toggle", () => {
      this.remember({ open: byId("depth").open });
      if (byId("depth").open) this.guard(() => this.showGrid());
    });
    byId("text").addEventListener("dragover", (event) => event.preventDefault());
    byId("text").addEventListener("drop", (event) => this.drop(event));
    window.addEventListener("hashchange", () => {
      const { text, pair, second } = this.state;
      this.state = { ...readFragment(location.hash) };
      if (!this.state.text) Object.assign(this.state, { text, pair, second });
      this.fill();
      this.guard(async () => {
        this.fillModels();
        await this.fitModel();
        await this.runIfComplete();
      });
    });
  }

  submit(event, act) {
    event.preventDefault();
    this.guard(act);
  }

  async drop(event) {
    const file = event.dataTransfer && event.dataTransfer.files[0];
    if (!file) return;
    event.preventDefault();
    if (file.size > MOST_FILE) return this.say(`${file.name} has ${bytesText(file.size)}; at most ${bytesText(MOST_FILE)} are read.`, true);
    this.remember({ text: await file.text() });
    this.fill();
  }

  example(text) {
    this.remember({ text, pair: "" });
    this.fill();
    if (!this.image.input || this.image.bitmap) this.guard(() => this.run());
  }

  /** Run something, and show why it failed. Without a token that is needed, ask for one. */
  async guard(act) {
    try {
      await act();
    } catch (error) {
      if (error instanceof DOMException && error.name === "AbortError") return;
      if (error instanceof Refused && error.status === 401) return this.askToken();
      this.say(error instanceof Error ? error.message : String(error), true);
    }
  }

  askToken() {
    byId("sign").hidden = false;
    this.say(this.api.token ? "The server does not accept this token." : "This server needs a token.", true);
    byId("token").focus();
  }

  async signIn() {
    this.api.token = byId("token").value.trim();
    byId("token").value = "";
    await this.load();
    byId("sign").hidden = true;
    this.say("");
    await this.runIfComplete();
  }

  say(text, wrong = false) {
    byId("status").textContent = text;
    byId("status").classList.toggle("wrong", wrong);
  }

  async load() {
    this.models = (await this.api.models()).data.filter((model) => model.versions.length);
    if (!this.models.length) throw new Refused(0, "The server has no models. Put one in its repository: attnserve-server export --help");
    this.fillModels();
    await this.fitModel();
  }

  /** Open the fields that the model takes: a second text, an image. */
  async fitModel() {
    const { model: name, version } = this.state;
    const model = await this.describe(name, version);
    if (name !== this.state.model || version !== this.state.version) return;
    const pair = pairOf(model);
    this.pairOpen = pair !== null;
    byId("pair-name").textContent = pair || "Second text of the pair, if the model takes pairs";
    this.image.open(model, this.state);
    byId("text-field").hidden = !model.accepts_text && this.image.input !== null;
    this.fill();
  }

  fillModels() {
    const { state, models } = this;
    const model = models.find((each) => each.id === state.model) || models[0];
    if (!model) return;
    state.model = model.id;
    const versions = [...model.versions].reverse();
    const ready = versions.find((each) => each.state === "ready") || versions[0];
    if (!versions.some((each) => each.version === state.version)) state.version = ready.version;
    const option = (value, text, chosen) => {
      const made = make("option", "", text);
      made.value = value;
      made.selected = chosen;
      return made;
    };
    const stated = (each) => (each.state === "ready" ? each.version : `${each.version} (${each.state})`);
    byId("model").replaceChildren(...models.map((each) => option(each.id, each.id, each === model)));
    byId("version").replaceChildren(...versions.map((each) => option(each.version, stated(each), each.version === state.version)));
    const others = models.flatMap((each) => each.versions.map(({ version }) => [each.id, version]));
    if (!others.some(([name, version]) => name === state.otherModel && version === state.otherVersion)) {
      const next = others.find(([name, version]) => name !== state.model || version !== state.version) || others[0];
      [state.otherModel, state.otherVersion] = next;
    }
    byId("other-model").replaceChildren(
      ...others.map((each) => option(JSON.stringify(each), each.join(" "), each[0] === state.otherModel && each[1] === state.otherVersion)),
    );
    this.remember({});
  }

  /** Show the state in the form. */
  fill() {
    const { state } = this;
    for (const name of ["text", "pair", "second"]) if (byId(name).value !== state[name]) byId(name).value = state[name];
    byId("other").value = state.other;
    [byId("fit").value, byId("scale").value] = [state.fit, state.scale];
    byId("depth").open = state.open;
    byId("second-field").hidden = state.other !== "text";
    byId("other-model-field").hidden = state.other !== "model";
    byId("pair-field").hidden = !this.pairOpen && !state.pair;
    byId("pair-button").setAttribute("aria-pressed", String(!byId("pair-field").hidden));
  }

  choose(change) {
    this.remember({ ...change, pin: -1 });
    this.fillModels();
    this.fill();
    this.guard(async () => {
      await this.fitModel();
      if (this.shown && (this.state.other !== "text" || this.state.second)) await this.run();
    });
  }

  remember(change) {
    Object.assign(this.state, change);
    const fragment = writeFragment(this.state);
    if (fragment !== location.hash) history.replaceState(null, "", fragment || location.pathname + location.search);
  }

  link() {
    return new URL(writeFragment(this.state) || "#", location.href).href;
  }

  /** The layer in use: -1 is the last one with weights. */
  layer(model) {
    const { layer } = this.state;
    if (layer !== "-1") return layer;
    const sites = model.sites || [];
    const last = sites.findLastIndex((site) => !site.unavailable_reason);
    return String(last);
  }

  async describe(name, version, signal) {
    const key = JSON.stringify([name, version]);
    if (!this.described.has(key)) this.described.set(key, await this.api.describe(name, version, signal));
    return this.described.get(key);
  }
}

export { Form };
