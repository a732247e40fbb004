// A text as code: its lines with their numbers and their indentation, in which the words are placed.

import { make } from "./dom.js";

/** The lines of code in an element: each has its number, its indentation and its words. */
class CodeLines {
  /** @param {HTMLElement} host @param {string[][]} letters of each text */
  constructor(host, letters) {
    this.host = host;
    this.letters = letters;
    /** The text that is written, -1 before the first, and the place in it. */
    this.segment = -1;
    this.at = 0;
    this.number = 0;
    this.line = null;
  }

  start() {
    this.number += 1;
    const row = make("div", "code-line");
    const number = make("span", "line-number", String(this.number));
    number.setAttribute("aria-hidden", "true");
    this.line = make("span", "line-text");
    row.append(number, this.line);
    this.host.append(row);
  }

  /** Add text that is no word, and a line for each line feed in it. */
  write(text) {
    text.split("\n").forEach((piece, place) => {
      if (place) this.start();
      if (piece) this.line.append(piece);
    });
  }

  /** Add what is between the last word and this one. */
  upTo(token) {
    if (token.special || token.end <= token.start) return false;
    if (token.segment !== this.segment) {
      this.end();
      if (this.segment >= 0) [this.number, this.line] = [0, null];
      [this.segment, this.at] = [token.segment, 0];
      if (!this.line) this.start();
    }
    if (token.start > this.at) this.write(this.letters[token.segment].slice(this.at, token.start).join(""));
    return false;
  }

  /** Add a word. @param {HTMLElement} element @param {import("./view.js").Token} token */
  add(element, token) {
    if (!this.line) this.start();
    this.line.append(element);
    if (token.special || token.end <= token.start) return;
    // A token may be, or hold, line feeds.
    const within = this.letters[token.segment].slice(Math.max(this.at, token.start), token.end).filter((letter) => letter === "\n").length;
    for (let feed = 0; feed < within; feed++) this.start();
    this.at = Math.max(this.at, token.end);
  }

  /** Add what follows the last word. */
  end() {
    if (this.segment >= 0) this.write(this.letters[this.segment].slice(this.at).join("").trimEnd());
  }
}

export { CodeLines };
