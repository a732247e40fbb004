// The map as a heatmap. Labels have canvases of their own, which stay in view while the map scrolls below them; so has the
// highlight, so that pointing at a cell draws no weight again.

import { Brush } from "./brush.js";
import { colour, css, difference, inkOn } from "./colours.js";
import { make, makeButton, variable } from "./dom.js";

const FONT = "12px system-ui, sans-serif";
/** Most labels at the size that fits; more are drawn once the reader zooms in. */
const LABELLED = 160;
/** Pixels of a cell from which labels can be read. */
const LEAST_LABELLED = 11;
const MOST_PIXELS = 8192;

/** The heatmap of one board. */
class Heatmap {
  /** @param {HTMLElement} host @param {any} board @param {string} title of the board */
  constructor(host, board, title) {
    this.board = board;
    this.zoom = 1;
    this.layout = { cell: 10, left: 0, top: 0 };
    this.scroll = make("div", "scroll");
    this.scroll.tabIndex = 0;
    this.scroll.setAttribute("role", "region");
    this.scroll.setAttribute("aria-label", `heatmap, scrolls: ${title}`);
    const map = make("div", "map");
    this.columnLabels = make("canvas", "column-labels");
    this.rowLabels = make("canvas", "row-labels");
    const layers = make("div", "layers");
    this.canvas = make("canvas", "heatmap");
    this.canvas.setAttribute("role", "img");
    this.marks = make("canvas", "marks");
    for (const each of [this.columnLabels, this.rowLabels, this.marks]) each.setAttribute("aria-hidden", "true");
    layers.append(this.canvas, this.marks);
    map.append(make("span", "corner"), this.columnLabels, this.rowLabels, layers);
    this.scroll.append(map);
    this.frame = make("div", "frame");
    this.frame.append(this.scroll);
    this.cue = make("p", "cue", "The map continues behind the edge: scroll or swipe it.");
    this.cue.hidden = true;
    this.tip = make("div", "tip");
    this.tip.hidden = true;
    host.append(this.frame, this.cue, this.scale(), this.tip);
    this.scroll.addEventListener("scroll", () => this.cut(), { passive: true });
    layers.addEventListener("mousemove", (event) => this.hover(event));
    layers.addEventListener("mouseleave", () => this.leave());
    this.scroll.addEventListener("keydown", (event) => event.key === "Escape" && board.state.part && board.choosePart(null));
    new Brush(layers, this, (part) => board.choosePart(part));
  }

  scale() {
    const scale = make("div", "scale");
    this.least = make("span", "", "0");
    this.strip = make("canvas");
    [this.strip.width, this.strip.height] = [160, 10];
    this.strip.setAttribute("aria-hidden", "true");
    this.greatest = make("span");
    const zoom = make("span", "zoom");
    for (const { text, label, factor } of [{ text: "−", label: "smaller cells", factor: 1 / 1.6 }, { text: "+", label: "larger cells", factor: 1.6 }]) {
      const button = makeButton("chip", text, () => {
        this.zoom = Math.min(Math.max(this.zoom * factor, 0.4), 12);
        this.draw();
      });
      button.setAttribute("aria-label", label);
      zoom.append(button);
    }
    this.whole = makeButton("chip", "whole map", () => this.board.choosePart(null));
    const how = make("span", "how", "drag over a part to see it alone");
    scale.append(this.least, this.strip, this.greatest, how, this.whole, zoom);
    return scale;
  }

  share(row, column) {
    const { view } = this.board;
    const share = view.value(row, column) / view.greatest;
    return view.signed ? difference(share) : colour(Math.max(share, 0) ** 0.6);
  }

  draw() {
    const { view } = this.board;
    const { rows, columns } = view;
    const pen = this.canvas.getContext("2d");
    pen.font = FONT;
    const widest = (names, places) => Math.min(120, Math.max(...places.map((place) => pen.measureText(names[place]).width)));
    const labelled = Math.max(rows.length, columns.length) <= LABELLED || this.zoom > 1;
    const left = labelled ? Math.ceil(widest(view.queryNames, rows)) + 10 : 10;
    const slant = labelled ? Math.ceil(widest(view.keyNames, columns) * 0.5) : 0;
    const room = this.scroll.clientWidth - left - Math.max(30, slant + 6);
    const fitting = Math.max(columns.length <= LABELLED ? LEAST_LABELLED : 4, Math.min(38, Math.floor(room / columns.length)));
    const most = Math.max(2, Math.floor(MOST_PIXELS / Math.max(rows.length, columns.length)));
    const cell = Math.min(most, Math.max(2, Math.round(fitting * this.zoom)));
    const named = labelled && cell >= LEAST_LABELLED;
    const top = named ? Math.ceil(widest(view.keyNames, columns) * 0.87) + 16 : 16;
    const lean = named ? slant : 0;
    this.layout = { cell, left: named ? left : 10, top };
    const [width, height] = [columns.length * cell + lean + 4, rows.length * cell + 4];
    resize(this.canvas, width, height);
    resize(this.marks, width, height);
    resize(this.rowLabels, this.layout.left, height);
    resize(this.columnLabels, width, top);
    if (cell > LEAST_LABELLED && rows.length * columns.length <= 30000) this.drawCells(pen, cell);
    else this.drawPixels(pen, cell);
    if (named) this.drawLabels();
    this.whole.hidden = !this.board.state.part;
    this.canvas.setAttribute("aria-label", `${view.signed ? "differences of weights" : "attention weights"}, ${rows.length} rows look at ${columns.length} columns; the lists have the numbers`);
    this.drawScale();
    this.mark();
    this.cut();
  }

  drawCells(pen, cell) {
    const { view } = this.board;
    const soft = variable("--soft");
    view.rows.forEach((row, y) =>
      view.columns.forEach((column, x) => {
        if (view.isOutside(row, column)) {
          pen.fillStyle = soft;
          pen.fillRect((x + 0.5) * cell - 1, (y + 0.5) * cell - 1, 1, 1);
          return;
        }
        const rgb = this.share(row, column);
        pen.fillStyle = css(rgb);
        pen.fillRect(x * cell, y * cell, cell - 1, cell - 1);
        if (cell < 34) return;
        pen.fillStyle = inkOn(rgb);
        pen.font = "11px system-ui, sans-serif";
        pen.textAlign = "center";
        pen.textBaseline = "middle";
        pen.fillText(String(Math.round(100 * view.value(row, column))), (x + 0.5) * cell, (y + 0.5) * cell);
      }),
    );
  }

  /** Draw each cell as one pixel, and enlarge the picture: quick for long texts. */
  drawPixels(pen, cell) {
    const { view } = this.board;
    const [height, width] = [view.rows.length, view.columns.length];
    const picture = new ImageData(width, height);
    // A colour of a table for each share, because computing one for each cell would take most of the time.
    const table = [...Array(511).keys()].map((at) => {
      const share = (at - 255) / 255;
      return view.signed ? difference(share) : colour(Math.max(share, 0) ** 0.6);
    });
    let place = 0;
    for (const row of view.rows)
      for (const column of view.columns) {
        if (!view.isOutside(row, column)) {
          const rgb = table[255 + Math.round((255 * view.value(row, column)) / view.greatest)];
          [picture.data[place], picture.data[place + 1], picture.data[place + 2]] = rgb;
          picture.data[place + 3] = 255;
        }
        place += 4;
      }
    const small = make("canvas");
    [small.width, small.height] = [width, height];
    small.getContext("2d").putImageData(picture, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, 0, 0, width * cell, height * cell);
  }

  drawLabels() {
    const { view } = this.board;
    const { cell, left, top } = this.layout;
    const [ink, soft] = [variable("--ink"), variable("--soft")];
    const rowPen = this.rowLabels.getContext("2d");
    rowPen.font = FONT;
    rowPen.textBaseline = "middle";
    rowPen.textAlign = "right";
    view.rows.forEach((row, y) => {
      rowPen.fillStyle = view.queries[row].special ? soft : ink;
      rowPen.fillText(fit(rowPen, view.queryNames[row], 120), left - 7, (y + 0.5) * cell);
    });
    const pen = this.columnLabels.getContext("2d");
    pen.font = FONT;
    pen.textBaseline = "middle";
    view.columns.forEach((column, x) => {
      pen.save();
      pen.translate((x + 0.5) * cell, top - 6);
      pen.rotate(-Math.PI / 3);
      pen.fillStyle = view.keys[column].special ? soft : ink;
      pen.fillText(fit(pen, view.keyNames[column], 120), 0, 0);
      pen.restore();
    });
  }

  drawScale() {
    const { view } = this.board;
    const brush = this.strip.getContext("2d");
    for (let x = 0; x < this.strip.width; x++) {
      const share = x / this.strip.width;
      brush.fillStyle = css(view.signed ? difference(2 * share - 1) : colour(share ** 0.6));
      brush.fillRect(x, 0, 1, this.strip.height);
    }
    this.least.textContent = view.signed ? `-${view.greatest.toFixed(3)}` : "0";
    this.greatest.textContent = view.greatest.toFixed(3);
  }

  /** Outline a part that is being chosen, or none. @param {import("./view.js").Part | null} part */
  outline(part) {
    this.mark();
    if (!part) return;
    const { view } = this.board;
    const { cell } = this.layout;
    const [left, right] = part.columns.map((place) => view.columns.indexOf(place) * cell);
    const [top, bottom] = part.rows.map((place) => view.rows.indexOf(place) * cell);
    const pen = this.marks.getContext("2d");
    pen.strokeStyle = variable("--accent");
    pen.lineWidth = 2;
    pen.strokeRect(left + 1, top + 1, right - left + cell - 2, bottom - top + cell - 2);
  }

  /** Outline row and column of the cell that is pointed at. */
  mark() {
    const { view, state } = this.board;
    const pen = this.marks.getContext("2d");
    pen.clearRect(0, 0, this.marks.width, this.marks.height);
    if (!state.cell) return;
    const { cell } = this.layout;
    const y = view.rows.indexOf(state.cell.row);
    const x = view.columns.indexOf(state.cell.column);
    if (x < 0 || y < 0) return;
    pen.strokeStyle = variable("--accent");
    pen.lineWidth = 1;
    pen.strokeRect(0.5, y * cell + 0.5, view.columns.length * cell - 1, cell - 1);
    pen.strokeRect(x * cell + 0.5, 0.5, cell - 1, view.rows.length * cell - 1);
  }

  /** Mark an edge behind which the map continues: a shadow there, and a line of text below. */
  cut() {
    const host = this.scroll;
    const right = host.scrollWidth - host.clientWidth - host.scrollLeft > 1;
    const below = host.scrollHeight - host.clientHeight - host.scrollTop > 1;
    this.frame.classList.toggle("more-right", right);
    this.frame.classList.toggle("more-below", below);
    this.cue.hidden = host.scrollWidth - host.clientWidth <= 1 && host.scrollHeight - host.clientHeight <= 1;
  }

  /** Return column and row of the cell at the pointer; `nearest`: of the nearest one, where there is none. */
  cellAt(event, nearest = false) {
    const { view } = this.board;
    const box = this.canvas.getBoundingClientRect();
    const place = (distance, count) => {
      const at = Math.floor(distance / this.layout.cell);
      return nearest ? Math.min(Math.max(at, 0), count - 1) : at;
    };
    const [x, y] = [place(event.clientX - box.left, view.columns.length), place(event.clientY - box.top, view.rows.length)];
    return x >= 0 && y >= 0 && x < view.columns.length && y < view.rows.length ? { x, y } : null;
  }

  hover(event) {
    const { view, state } = this.board;
    const found = this.cellAt(event);
    const cell = found && { row: view.rows[found.y], column: view.columns[found.x] };
    this.tip.hidden = cell === null;
    if (cell) {
      const shown = view.isOutside(cell.row, cell.column) ? "outside the window" : view.value(cell.row, cell.column).toFixed(4);
      this.tip.textContent = `${view.queryNames[cell.row]} → ${view.keyNames[cell.column]}: ${shown}`;
      this.tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, window.innerWidth - 240))}px`;
      this.tip.style.top = `${event.clientY + 16}px`;
    }
    if (cell && state.cell && cell.row === state.cell.row && cell.column === state.cell.column) return;
    this.board.pointAtCell(cell);
  }

  leave() {
    this.tip.hidden = true;
    this.board.pointAtCell(null);
  }
}

function fit(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let kept = [...text];
  while (kept.length > 1 && pen.measureText(`${kept.join("")}…`).width > width) kept = kept.slice(0, -1);
  return `${kept.join("")}…`;
}

function resize(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, MOST_PIXELS / Math.max(width, height));
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
}

export { Heatmap, fit };
