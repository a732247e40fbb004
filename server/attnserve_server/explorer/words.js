// The text as words: pointing at one colours the others by its weights, and a line underneath states them.

import { colour, css, difference, inkOn, night } from "./colours.js";
import { isolated, make, percent } from "./dom.js";
import { CodeLines } from "./lines.js";
import { isPunctuation } from "./view.js";

/** The words of one board. A sentence holds its tokens with their places among queries and keys, or -1. */
class Words {
  /** @param {HTMLElement} host @param {HTMLElement} summary @param {any} board */
  constructor(host, summary, board) {
    this.host = host;
    this.summary = summary;
    this.board = board;
    this.sentences = [];
    host.addEventListener("keydown", (event) => this.move(event));
  }

  /** Make the elements of the board's view. */
  build() {
    const { queries, keys, same, queryGrid, keyGrid } = this.board.view;
    this.sentences = [];
    if (same) {
      const places = new Map();
      queries.forEach((token, row) => places.set(token.index, { token, row, column: -1 }));
      keys.forEach((token, column) => {
        const place = places.get(token.index) || { token, row: -1 };
        places.set(token.index, { ...place, column });
      });
      this.add([...places.values()].sort((one, other) => one.token.index - other.token.index), keyGrid, "The text");
    } else {
      this.add(queries.map((token, row) => ({ token, row, column: -1 })), queryGrid, "What looks");
      this.add(keys.map((token, column) => ({ token, row: -1, column })), keyGrid, "What is looked at");
    }
    this.host.replaceChildren(...this.sentences.map((sentence) => this.paragraph(sentence)));
  }

  add(places, grid, label) {
    this.sentences.push({ places, grid, label, elements: [] });
  }

  paragraph(sentence) {
    const { texts, picture } = this.board.view;
    const letters = texts.map((text) => [...text]);
    const code = this.board.state.code && !sentence.grid && letters.length > 0;
    const paragraph = make("div", sentence.grid ? "sentence patches" : code ? "sentence code-lines" : "sentence");
    paragraph.setAttribute("role", "group");
    paragraph.setAttribute("aria-label", `${sentence.label}, word by word; the arrow keys move`);
    if (sentence.grid && picture) layPicture(paragraph, picture, sentence.grid);
    const lines = code ? new CodeLines(paragraph, letters) : null;
    let before = null;
    sentence.places.forEach((at, place) => {
      const { token } = at;
      const between = lines ? lines.upTo(token) : gapOf(before, token, letters);
      if (typeof between === "string" && !sentence.grid) paragraph.append(between);
      const element = make("button", `token${between === true ? " gap" : ""}${token.special ? " special" : ""}`, token.text);
      element.type = "button";
      element.dir = "auto";
      element.tabIndex = place ? -1 : 0;
      element.setAttribute("aria-pressed", "false");
      if (sentence.grid) setInGrid(element, token, sentence.grid);
      element.addEventListener("mouseenter", () => this.board.point(at));
      element.addEventListener("focus", () => this.focused(sentence, element, at));
      element.addEventListener("mouseleave", () => this.board.point(this.board.state.pinned));
      element.addEventListener("click", () => this.board.pin(at));
      sentence.elements.push(element);
      if (lines) lines.add(element, token);
      else paragraph.append(element);
      before = token;
    });
    if (lines) lines.end();
    return paragraph;
  }

  focused(sentence, element, at) {
    for (const each of sentence.elements) each.tabIndex = -1;
    element.tabIndex = 0;
    this.board.point(at);
  }

  /** Move the focus among the words by the arrow keys, Home and End. */
  move(event) {
    if (event.key === "Escape" && this.board.state.pinned) this.board.pin(null);
    const sentence = this.sentences.find((each) => each.elements.includes(event.target));
    if (!sentence) return;
    const seen = sentence.elements.filter((element) => !element.hidden);
    const at = seen.indexOf(event.target);
    const down = sentence.grid ? sentence.grid.columns : 1;
    const to = { ArrowRight: at + 1, ArrowDown: at + down, ArrowLeft: at - 1, ArrowUp: at - down, Home: 0, End: seen.length - 1 };
    if (!(event.key in to)) return;
    event.preventDefault();
    seen[Math.min(Math.max(to[event.key], 0), seen.length - 1)].focus();
  }

  /** Return the place of the token with this index, for the side that is pointed at. */
  placeOf(index) {
    const backwards = this.board.state.backwards;
    for (const { places } of this.sentences)
      for (const at of places) if (at.token.index === index && (backwards ? at.column : at.row) >= 0) return at;
    return null;
  }

  /** Move the focus to a word. @param {any} at its place */
  focus(at) {
    for (const { places, elements } of this.sentences) if (places.includes(at)) elements[places.indexOf(at)].focus();
  }

  /** Return the place of the same occurrence of a token's text; null if there is none. @param {any} token @param {Words} words of the token */
  alike(token, words) {
    const all = (each) => each.sentences.flatMap(({ places }) => places).filter((at) => at.token.text === token.text);
    return all(this)[all(words).filter((at) => at.token.index < token.index).length] || null;
  }

  /** Mark the words that have `wanted` in them, and return how many there are. @param {string} wanted */
  find(wanted) {
    const needle = wanted.trim().toLocaleLowerCase();
    let count = 0;
    for (const { places, elements } of this.sentences)
      places.forEach(({ token }, place) => {
        const found = needle !== "" && token.text.toLocaleLowerCase().includes(needle);
        elements[place].classList.toggle("found", found);
        count += found ? 1 : 0;
      });
    return count;
  }

  /** Focus the next word that `find` marked. */
  next() {
    const marked = this.sentences.flatMap(({ elements }) => elements.filter((each) => each.classList.contains("found")));
    const at = marked.findIndex((each) => each.classList.contains("at"));
    if (marked.length) marked[(at + 1) % marked.length].focus();
  }

  /** Colour the words by the weights of the one that is pointed at. An underline as thick as the weight says the same. */
  paint() {
    const { view, state } = this.board;
    const { at } = state;
    const from = at === null ? -1 : state.backwards ? at.column : at.row;
    let most = 0;
    const shares = this.sentences.map(({ places }) =>
      places.map((place) => {
        const other = state.backwards ? place.row : place.column;
        if (from < 0 || other < 0) return null;
        const share = state.backwards ? view.value(other, from) : view.value(from, other);
        if (state.special || !place.token.special) most = Math.max(most, Math.abs(share));
        return share;
      }),
    );
    this.sentences.forEach(({ places, elements }, position) => {
      const plain = places.some((each) => !each.token.special);
      elements.forEach((element, place) => {
        const { token, row, column } = places[place];
        const hidden = token.special && !state.special && plain;
        if (element.hidden !== hidden) element.hidden = hidden;
        element.classList.toggle("mute", (state.backwards ? column : row) < 0);
        element.classList.toggle("at", at !== null && at.token === token);
        const pressed = String(state.pinned !== null && state.pinned.token === token);
        if (element.getAttribute("aria-pressed") !== pressed) element.setAttribute("aria-pressed", pressed);
        paintOne(element, shares[position][place], most, view.signed, Boolean(this.sentences[position].grid && view.picture));
      });
    });
    this.summarise(from);
  }

  summarise(from) {
    const { view, state } = this.board;
    this.summary.replaceChildren();
    if (from < 0) {
      this.summary.textContent = view.signed
        ? "Point at a word to see where the second map differs from the first."
        : "Hover over a word, or click to pin it.";
      return;
    }
    const others = state.backwards ? view.rows : view.columns;
    const weigh = (other) => (state.backwards ? view.value(other, from) : view.value(from, other));
    const names = state.backwards ? view.queryNames : view.keyNames;
    const listed = (other) => (state.backwards ? view.isListed(other, from) : view.isListed(from, other));
    const best = [...others]
      .filter((other) => (view.signed ? weigh(other) !== 0 : weigh(other) > 0) && (listed(other) || isPunctuation(state.at.token)))
      .sort((one, other) => Math.abs(weigh(other)) - Math.abs(weigh(one)))
      .slice(0, 6);
    const verb = view.signed ? " changes most towards " : state.backwards ? " is looked at by " : " looks at ";
    this.summary.append(isolated((state.backwards ? view.keyNames : view.queryNames)[from], "b"), verb);
    best.forEach((other, place) => {
      this.summary.append(place ? ", " : "", isolated(names[other], "b"), ` ${signed(weigh(other), view.signed)}`);
    });
    if (!best.length) this.summary.append("nothing that is shown");
  }
}

const signed = (share, always) => (always && share > 0 ? "+" : "") + percent(share);

/** What is between two tokens: the text itself where it is known, else whether there is a gap. */
function gapOf(before, token, letters) {
  if (before === null) return false;
  const apart = before.special || token.special || token.segment !== before.segment;
  const text = letters[token.segment];
  if (apart || token.end <= token.start || text === undefined) return apart || token.start !== before.end;
  return token.start > before.end ? text.slice(before.end, token.start).join("") : false;
}

/** Pixels that the patches of an image fill, where these are large enough to be pointed at. */
const WIDE = 420;

/** Lay a picture below its patches. */
function layPicture(host, picture, grid) {
  const copy = make("canvas", "picture");
  [copy.width, copy.height] = [picture.width, picture.height];
  copy.getContext("2d").drawImage(picture, 0, 0);
  copy.setAttribute("aria-hidden", "true");
  copy.style.gridRow = `2 / span ${grid.rows}`;
  copy.style.gridColumn = `1 / span ${grid.columns}`;
  const cell = Math.min(64, Math.max(26, Math.floor(WIDE / grid.columns)));
  host.style.gridAutoColumns = host.style.gridAutoRows = `${cell}px`;
  host.classList.add("over");
  host.append(copy);
}

/** Colours of a word: what lies between two of them cannot be told apart, and a word that keeps its own is not painted. */
const STEPS = 40;
/** The colour that each element has, as a step of its scheme. */
const painted = new WeakMap();

function paintOne(element, share, most, both, over = false) {
  const known = share !== null && most > 0;
  const title = known ? signed(share, both) : "";
  if (element.title !== title) element.title = title;
  const step = known ? Math.round((STEPS * Math.max(-most, Math.min(share, most))) / most) : null;
  const look = `${step} ${both} ${night.matches}`;
  if (painted.get(element) === look) return;
  painted.set(element, look);
  if (step === null) {
    element.style.backgroundColor = element.style.color = element.style.boxShadow = "";
    return;
  }
  const part = Math.abs(step) / STEPS;
  const rgb = both ? difference((step / STEPS) * 0.9) : colour(part ** 0.75 * 0.85);
  element.style.backgroundColor = over ? `rgba(${rgb.join(",")},${(0.85 * part).toFixed(3)})` : css(rgb);
  element.style.color = inkOn(rgb);
  // Over a picture, a frame as thick as the weight does not depend on the colours below.
  if (over) element.style.boxShadow = part > 0.15 ? `inset 0 0 0 ${Math.ceil(4 * part)}px ${css(rgb)}` : "";
  else element.style.boxShadow = part > 0.15 ? `0 ${Math.ceil(4 * part)}px 0 var(--soft)` : "";
}

/** Place a patch as in the image, leading units in the row above. */
function setInGrid(element, token, grid) {
  const patch = token.index - grid.leading;
  element.style.gridRow = patch < 0 ? 1 : 2 + Math.floor(patch / grid.columns);
  element.style.gridColumn = 1 + (patch < 0 ? token.index : patch % grid.columns);
  element.setAttribute("aria-label", token.text);
  if (patch >= 0) element.textContent = "";
}

export { Words, signed };
