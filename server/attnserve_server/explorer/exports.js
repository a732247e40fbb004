// What the page gives away: pictures, tables, programs and a link, each made here of the map that is on screen.

import { colour, css, difference } from "./colours.js";
import { variable } from "./dom.js";
import { fit } from "./heatmap.js";

/** Cells of an SVG: more would make files of megabytes that few programs open. */
const MOST_CELLS = 40000;

/** Offer bytes or a text as a file. @param {string} name @param {Blob | string} content @param {string} [type] of a text */
function save(name, content, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** Return the map on screen as a picture, with labels and one line on where it is from. @returns {Promise<Blob>} */
function asPng(board, caption) {
  const { columnLabels, rowLabels, canvas } = board.heatmap;
  const ratio = canvas.width / parseFloat(canvas.style.width);
  const made = document.createElement("canvas");
  made.width = rowLabels.width + canvas.width;
  made.height = columnLabels.height + canvas.height + Math.ceil(24 * ratio);
  const pen = made.getContext("2d");
  pen.fillStyle = variable("--panel");
  pen.fillRect(0, 0, made.width, made.height);
  pen.drawImage(columnLabels, rowLabels.width, 0);
  pen.drawImage(rowLabels, 0, columnLabels.height);
  pen.drawImage(canvas, rowLabels.width, columnLabels.height);
  pen.fillStyle = variable("--soft");
  pen.font = `${Math.round(11 * ratio)}px system-ui, sans-serif`;
  pen.fillText(fit(pen, caption, made.width - 12 * ratio), 6 * ratio, made.height - 8 * ratio);
  return new Promise((resolve) => made.toBlob(resolve, "image/png"));
}

const escaped = (text) =>
  // XML 1.0 has no control characters, not even escaped.
  text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "\ufffd").replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);

/** Return the map as SVG; null if it has too many cells. */
function asSvg(view, caption) {
  const { rows, columns } = view;
  if (rows.length * columns.length > MOST_CELLS) return null;
  const [cell, left, top] = [20, 140, 120];
  const [width, height] = [left + columns.length * cell + 60, top + rows.length * cell + 30];
  const ink = variable("--ink");
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12">`,
    `<title>${escaped(caption)}</title><rect width="${width}" height="${height}" fill="${variable("--panel")}"/>`,
  ];
  rows.forEach((row, y) => {
    parts.push(`<text x="${left - 6}" y="${top + (y + 0.7) * cell}" text-anchor="end" fill="${ink}">${escaped(view.queryNames[row])}</text>`);
    columns.forEach((column, x) => {
      const share = view.value(row, column) / view.greatest;
      const rgb = view.signed ? difference(share) : colour(Math.max(share, 0) ** 0.6);
      parts.push(`<rect x="${left + x * cell}" y="${top + y * cell}" width="${cell - 1}" height="${cell - 1}" fill="${css(rgb)}"><title>${view.value(row, column).toFixed(4)}</title></rect>`);
    });
  });
  columns.forEach((column, x) => {
    const at = `${left + (x + 0.5) * cell} ${top - 6}`;
    parts.push(`<text transform="translate(${at}) rotate(-60)" fill="${ink}">${escaped(view.keyNames[column])}</text>`);
  });
  parts.push(`<text x="6" y="${height - 10}" fill="${variable("--soft")}" font-size="11">${escaped(caption)}</text></svg>`);
  return parts.join("\n");
}

const cellOf = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/** Return the map as CSV (RFC 4180): a line for each row, a column for each key. */
function asCsv(view) {
  const lines = [["", ...view.columns.map((column) => cellOf(view.keyNames[column]))].join(",")];
  for (const row of view.rows)
    lines.push([cellOf(view.queryNames[row]), ...view.columns.map((column) => String(view.value(row, column)))].join(","));
  return `${lines.join("\r\n")}\r\n`;
}

/** Return the map as JSON, with what ran and what was selected. */
function asJson(view, receipt, selection) {
  const weights = view.rows.map((row) => view.columns.map((column) => view.value(row, column)));
  const [queries, keys] = [view.rows.map((row) => view.queries[row]), view.columns.map((column) => view.keys[column])];
  return `${JSON.stringify({ receipt, selection, queries, keys, weights }, null, 1)}\n`;
}

export { asCsv, asJson, asPng, asSvg, save };
