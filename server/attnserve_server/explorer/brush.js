// Choosing a part of a heatmap: drag over it, or click one corner and Shift-click the other. A finger scrolls instead.

/** Pixels below which a drag is a click. */
const LEAST = 6;

/** The brush of one heatmap; calls `onPart` with the part that is chosen. */
class Brush {
  /** @param {HTMLElement} layers @param {any} heatmap @param {(part: import("./view.js").Part) => void} onPart */
  constructor(layers, heatmap, onPart) {
    this.heatmap = heatmap;
    this.onPart = onPart;
    /** Where a drag began, and the corner that a click set. */
    this.began = null;
    this.corner = null;
    layers.addEventListener("pointerdown", (event) => this.start(event));
    layers.addEventListener("pointermove", (event) => this.drag(event));
    layers.addEventListener("pointerup", (event) => this.end(event));
    layers.addEventListener("pointercancel", () => this.cancel());
  }

  start(event) {
    if (event.pointerType === "touch" || event.button !== 0) return;
    this.began = { x: event.clientX, y: event.clientY, cell: this.heatmap.cellAt(event, true) };
    event.currentTarget.setPointerCapture(event.pointerId);
  }

  moved(event) {
    return Math.max(Math.abs(event.clientX - this.began.x), Math.abs(event.clientY - this.began.y)) >= LEAST;
  }

  drag(event) {
    if (this.began && this.moved(event)) this.heatmap.outline(this.partOf(this.began.cell, this.heatmap.cellAt(event, true)));
  }

  end(event) {
    const { began } = this;
    if (!began) return;
    const dragged = this.moved(event);
    this.began = null;
    const cell = this.heatmap.cellAt(event, true);
    const corner = dragged ? began.cell : event.shiftKey ? this.corner : null;
    this.corner = cell;
    this.heatmap.outline(null);
    if (!corner || (corner.x === cell.x && corner.y === cell.y)) return;
    this.corner = null;
    this.onPart(this.partOf(corner, cell));
  }

  cancel() {
    this.began = null;
    this.heatmap.outline(null);
  }

  /** Return the part between two cells, as places among queries and keys. */
  partOf(one, other) {
    const { rows, columns } = this.heatmap.board.view;
    const span = (places, from, to) => /** @type {[number, number]} */ ([places[Math.min(from, to)], places[Math.max(from, to)]]);
    return { rows: span(rows, one.y, other.y), columns: span(columns, one.x, other.x) };
  }
}

export { Brush };
