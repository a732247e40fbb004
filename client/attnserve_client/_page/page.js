"use strict";
// Draws one attention map from the JSON in the page. Token texts enter the page through textContent and fillText alone.
(() => {
  const data = JSON.parse(document.getElementById("map").textContent);
  const { queries, keys, shape, heads, same } = data;
  const [headCount, rowCount, columnCount] = shape;
  const bytes = Uint8Array.from(atob(data.weights), (letter) => letter.charCodeAt(0));
  const stored = new DataView(bytes.buffer);
  const weightAt = (head, row, column) =>
    (stored.getUint16(2 * ((head * rowCount + row) * columnCount + column), true) / 65535) * data.scale;
  // Keys outside a query's window, one bit for each cell.
  const beyond = data.outside ? Uint8Array.from(atob(data.outside), (letter) => letter.charCodeAt(0)) : null;
  const isOutside = (row, column) => {
    const at = row * columnCount + column;
    return beyond !== null && ((beyond[at >> 3] >> (7 - (at & 7))) & 1) === 1;
  };

  const RAMPS = {
    light: ["#fbf8f2", "#f8dcbc", "#f0a272", "#d4555d", "#8a1c62", "#3b0f46"],
    dark: ["#171a20", "#2c2458", "#632b86", "#b83d7c", "#f0743e", "#ffdc86"],
  };
  const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const night = matchMedia("(prefers-color-scheme: dark)");
  let ramp = [];
  const colour = (share) => {
    const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
    const low = Math.min(Math.floor(place), ramp.length - 2);
    return ramp[low].map((value, part) => Math.round(value + (ramp[low + 1][part] - value) * (place - low)));
  };
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const inkOn = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#1d1f24" : "#fdfcfa");
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)}%`;
  const make = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const byId = (id) => document.getElementById(id);
  // The text of a unit, and its number where the text repeats on its axis: as `AttentionMap.names`.
  const namesOf = (tokens) => {
    const counts = new Map();
    for (const token of tokens) counts.set(token.text, (counts.get(token.text) || 0) + 1);
    return tokens.map((token) => (counts.get(token.text) > 1 ? `${token.text} (${token.index})` : token.text));
  };
  const queryNames = namesOf(queries);
  const keyNames = namesOf(keys);
  // Links of punctuation, and of a unit to itself, are left out of the lists: as in `AttentionMap.links`.
  const isPunctuation = (token) => !/[\p{L}\p{N}]/u.test(token.text);
  const isListed = (row, column) =>
    !isPunctuation(queries[row]) && !isPunctuation(keys[column]) && !(same && queries[row].index === keys[column].index);

  // The current choices and highlights.
  const state = { head: -1, backwards: false, special: false, at: null, pinned: null, cell: null };
  let matrix = new Float32Array(0);
  let rows = [];
  let columns = [];
  let greatest = 1;

  const value = (row, column) => matrix[row * columnCount + column];

  function compute() {
    matrix = new Float32Array(rowCount * columnCount);
    const chosen = state.head < 0 ? [...Array(headCount).keys()] : [state.head];
    for (const head of chosen)
      for (let row = 0; row < rowCount; row++)
        for (let column = 0; column < columnCount; column++)
          matrix[row * columnCount + column] += weightAt(head, row, column) / chosen.length;
    rows = [...queries.keys()].filter((row) => state.special || !queries[row].special);
    columns = [...keys.keys()].filter((column) => state.special || !keys[column].special);
    if (!rows.length || !columns.length) {
      rows = [...queries.keys()];
      columns = [...keys.keys()];
    }
    greatest = 0;
    for (const row of rows) for (const column of columns) greatest = Math.max(greatest, value(row, column));
    greatest = greatest || 1;
  }

  // ---- controls
  function chip(parent, text, pressed, act) {
    const button = make("button", "chip", text);
    button.type = "button";
    button.setAttribute("aria-pressed", String(pressed));
    button.addEventListener("click", act);
    parent.append(button);
  }
  function drawControls() {
    const bar = byId("controls");
    bar.replaceChildren();
    if (headCount > 1) {
      const group = make("div", "group");
      group.append(make("span", "", "head"));
      chip(group, "mean", state.head < 0, () => set({ head: -1 }));
      heads.forEach((name, head) => chip(group, String(name), state.head === head, () => set({ head })));
      bar.append(group);
    }
    const direction = make("div", "group");
    direction.append(make("span", "", "hovering shows"));
    chip(direction, "what it looks at", !state.backwards, () => set({ backwards: false }));
    chip(direction, "what looks at it", state.backwards, () => set({ backwards: true }));
    bar.append(direction);
    if ([...queries, ...keys].some((token) => token.special)) {
      const group = make("div", "group");
      chip(group, "special tokens", state.special, () => set({ special: !state.special }));
      bar.append(group);
    }
  }

  // ---- the sentence
  // Each sentence holds, for each token, its position among the queries and among the keys, or -1.
  const sentences = [];
  function line(tokens, rowOf, columnOf, grid) {
    sentences.push({ tokens, rowOf, columnOf, grid, elements: [] });
  }
  if (same) {
    const places = new Map();
    queries.forEach((token, row) => places.set(token.index, { token, row, column: -1 }));
    keys.forEach((token, column) => {
      const place = places.get(token.index) || { token, row: -1 };
      places.set(token.index, { ...place, column });
    });
    const all = [...places.values()].sort((one, other) => one.token.index - other.token.index);
    line(all.map((place) => place.token), all.map((place) => place.row), all.map((place) => place.column), data.keyGrid);
  } else {
    line(queries, [...queries.keys()], queries.map(() => -1), data.queryGrid);
    line(keys, keys.map(() => -1), [...keys.keys()], data.keyGrid);
  }
  // Patches are placed as in the image, leading units in the row above.
  function setInGrid(element, token, grid) {
    const patch = token.index - grid.leading;
    element.style.gridRow = patch < 0 ? 1 : 2 + Math.floor(patch / grid.columns);
    element.style.gridColumn = 1 + (patch < 0 ? token.index : patch % grid.columns);
    element.setAttribute("aria-label", token.text);
    if (patch >= 0) element.textContent = "";
  }
  function buildSentences() {
    const host = byId("sentences");
    for (const sentence of sentences) {
      const paragraph = make("div", sentence.grid ? "sentence patches" : "sentence");
      let before = null;
      sentence.tokens.forEach((token, place) => {
        const gap = before && (before.special || token.special || token.segment !== before.segment || token.start !== before.end);
        const element = make("button", `token${gap ? " gap" : ""}${token.special ? " special" : ""}`, token.text);
        element.type = "button";
        if (sentence.grid) setInGrid(element, token, sentence.grid);
        const at = { row: sentence.rowOf[place], column: sentence.columnOf[place], token };
        element.addEventListener("mouseenter", () => point(at));
        element.addEventListener("focus", () => point(at));
        element.addEventListener("mouseleave", () => point(state.pinned));
        element.addEventListener("click", () => {
          state.pinned = state.pinned && state.pinned.token === token ? null : at;
          point(state.pinned);
        });
        sentence.elements.push(element);
        paragraph.append(element);
        before = token;
      });
      host.append(paragraph);
    }
  }
  function drawSentences() {
    const at = state.at;
    const from = at === null ? -1 : state.backwards ? at.column : at.row;
    let most = 0;
    const shares = sentences.map(({ rowOf, columnOf, tokens }) =>
      tokens.map((token, place) => {
        const other = state.backwards ? rowOf[place] : columnOf[place];
        if (from < 0 || other < 0) return -1;
        const share = state.backwards ? value(other, from) : value(from, other);
        if (state.special || !token.special) most = Math.max(most, share);
        return share;
      }),
    );
    sentences.forEach((sentence, position) => {
      sentence.elements.forEach((element, place) => {
        const token = sentence.tokens[place];
        element.hidden = token.special && !state.special && sentence.tokens.some((each) => !each.special);
        const share = shares[position][place];
        const source = state.backwards ? sentence.columnOf[place] : sentence.rowOf[place];
        element.classList.toggle("mute", source < 0);
        element.classList.toggle("at", at !== null && source >= 0 && at.token === token);
        if (share < 0 || !most) {
          element.style.backgroundColor = "";
          element.style.color = "";
          element.title = "";
        } else {
          const rgb = colour(Math.pow(Math.min(share / most, 1), 0.75) * 0.85);
          element.style.backgroundColor = css(rgb);
          element.style.color = inkOn(rgb);
          element.title = percent(share);
        }
      });
    });
    summarise(from);
  }
  function summarise(from) {
    const host = byId("summary");
    host.replaceChildren();
    if (from < 0) {
      host.textContent = "Hover over a word, or click to pin it.";
      return;
    }
    const others = state.backwards ? rows : columns;
    const weigh = (other) => (state.backwards ? value(other, from) : value(from, other));
    const names = state.backwards ? queryNames : keyNames;
    const listed = (other) => (state.backwards ? isListed(other, from) : isListed(from, other));
    const best = [...others]
      .filter((other) => weigh(other) > 0 && (listed(other) || isPunctuation(state.at.token)))
      .sort((one, other) => weigh(other) - weigh(one))
      .slice(0, 6);
    host.append(make("b", "", (state.backwards ? keyNames : queryNames)[from]), state.backwards ? " is looked at by " : " looks at ");
    best.forEach((other, place) => {
      host.append(place ? ", " : "", make("b", "", names[other]), ` ${percent(weigh(other))}`);
    });
    if (!best.length) host.append("nothing that is shown");
  }

  // ---- the heatmap
  // The labels have canvases of their own, which stay in view while the map scrolls below them.
  const canvas = byId("heatmap");
  const pen = canvas.getContext("2d");
  const [rowCanvas, columnCanvas] = [byId("row-labels"), byId("column-labels")];
  const [rowPen, columnPen] = [rowCanvas.getContext("2d"), columnCanvas.getContext("2d")];
  const FONT = "12px system-ui, sans-serif";
  const layout = { cell: 10, left: 0, top: 0 };
  const fit = (text, width) => {
    if (pen.measureText(text).width <= width) return text;
    let kept = [...text];
    while (kept.length > 1 && pen.measureText(`${kept.join("")}…`).width > width) kept = kept.slice(0, -1);
    return `${kept.join("")}…`;
  };
  function drawHeatmap() {
    pen.font = FONT;
    const labelled = (length) => length <= 160;
    const widest = (names, places) =>
      labelled(places.length) ? Math.min(120, Math.max(...places.map((place) => pen.measureText(names[place]).width))) : 0;
    layout.left = Math.ceil(widest(queryNames, rows)) + 10;
    layout.top = Math.ceil(widest(keyNames, columns) * 0.87) + 16;
    const room = byId("scroll").clientWidth - layout.left - 30;
    layout.cell = Math.max(labelled(columns.length) ? 13 : 4, Math.min(38, Math.floor(room / columns.length)));
    const lean = Math.ceil(widest(keyNames, columns) * 0.5);
    const width = columns.length * layout.cell + lean + 4;
    const height = rows.length * layout.cell + 4;
    resize(pen, width, height);
    resize(rowPen, layout.left, height);
    resize(columnPen, width, layout.top);
    const { cell } = layout;
    const gap = cell > 11 ? 1 : 0;
    const ink = variable("--ink");
    const soft = variable("--soft");
    rows.forEach((row, y) =>
      columns.forEach((column, x) => {
        if (isOutside(row, column)) {
          pen.fillStyle = soft;
          pen.fillRect((x + 0.5) * cell - 1, (y + 0.5) * cell - 1, 1, 1);
          return;
        }
        const rgb = colour(Math.pow(value(row, column) / greatest, 0.6));
        pen.fillStyle = css(rgb);
        pen.fillRect(x * cell, y * cell, cell - gap, cell - gap);
        if (cell >= 34) {
          pen.fillStyle = inkOn(rgb);
          pen.font = "11px system-ui, sans-serif";
          pen.textAlign = "center";
          pen.textBaseline = "middle";
          pen.fillText(String(Math.round(100 * value(row, column))), (x + 0.5) * cell, (y + 0.5) * cell);
        }
      }),
    );
    pen.font = FONT;
    if (labelled(rows.length)) drawRowLabels(cell, layout.left, ink, soft);
    if (labelled(columns.length)) drawColumnLabels(cell, layout.top, ink, soft);
    if (state.cell) {
      const y = rows.indexOf(state.cell.row);
      const x = columns.indexOf(state.cell.column);
      pen.strokeStyle = variable("--accent");
      pen.lineWidth = 1;
      pen.strokeRect(0.5, y * cell + 0.5, columns.length * cell - 1, cell - 1);
      pen.strokeRect(x * cell + 0.5, 0.5, cell - 1, rows.length * cell - 1);
    }
    cue();
  }
  function resize(brush, width, height) {
    const ratio = Math.min(window.devicePixelRatio || 1, 8192 / Math.max(width, height));
    brush.canvas.width = Math.round(width * ratio);
    brush.canvas.height = Math.round(height * ratio);
    brush.canvas.style.width = `${width}px`;
    brush.canvas.style.height = `${height}px`;
    brush.setTransform(ratio, 0, 0, ratio, 0, 0);
    brush.clearRect(0, 0, width, height);
  }
  function drawRowLabels(cell, left, ink, soft) {
    rowPen.font = FONT;
    rowPen.textBaseline = "middle";
    rowPen.textAlign = "right";
    rows.forEach((row, y) => {
      rowPen.fillStyle = queries[row].special && !(state.cell && state.cell.row === row) ? soft : ink;
      rowPen.fillText(fit(queryNames[row], 120), left - 7, (y + 0.5) * cell);
    });
  }
  function drawColumnLabels(cell, top, ink, soft) {
    columnPen.font = FONT;
    columnPen.textBaseline = "middle";
    columns.forEach((column, x) => {
      columnPen.save();
      columnPen.translate((x + 0.5) * cell, top - 6);
      columnPen.rotate(-Math.PI / 3);
      columnPen.fillStyle = keys[column].special ? soft : ink;
      columnPen.fillText(fit(keyNames[column], 120), 0, 0);
      columnPen.restore();
    });
  }
  // Whether the map continues behind an edge: a shadow there, and a line of text below.
  function cue() {
    const host = byId("scroll");
    const right = host.scrollWidth - host.clientWidth - host.scrollLeft > 1;
    const below = host.scrollHeight - host.clientHeight - host.scrollTop > 1;
    byId("frame").classList.toggle("more-right", right);
    byId("frame").classList.toggle("more-below", below);
    byId("cue").hidden = host.scrollWidth - host.clientWidth <= 1 && host.scrollHeight - host.clientHeight <= 1;
  }
  byId("scroll").addEventListener("scroll", cue, { passive: true });
  function cellUnder(event) {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / layout.cell);
    const y = Math.floor((event.clientY - box.top) / layout.cell);
    return x >= 0 && y >= 0 && x < columns.length && y < rows.length ? { row: rows[y], column: columns[x] } : null;
  }
  const tip = byId("tip");
  canvas.addEventListener("mousemove", (event) => {
    const cell = cellUnder(event);
    tip.hidden = cell === null;
    if (cell) {
      const shown = isOutside(cell.row, cell.column) ? "outside the window" : value(cell.row, cell.column).toFixed(4);
      tip.textContent = `${queryNames[cell.row]} → ${keyNames[cell.column]}: ${shown}`;
      tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 240)}px`;
      tip.style.top = `${event.clientY + 16}px`;
    }
    if (!cell !== !state.cell || (cell && (cell.row !== state.cell.row || cell.column !== state.cell.column))) {
      state.cell = cell;
      drawHeatmap();
      if (cell) {
        const token = state.backwards ? keys[cell.column] : queries[cell.row];
        point({ row: cell.row, column: cell.column, token: sentenceToken(token) });
      } else point(state.pinned);
    }
  });
  canvas.addEventListener("mouseleave", () => {
    tip.hidden = true;
    state.cell = null;
    drawHeatmap();
    point(state.pinned);
  });
  // Returns the sentence's object for a token: highlights compare tokens by identity.
  function sentenceToken(token) {
    if (!same) return token;
    return sentences[0].tokens.find((each) => each.index === token.index) || token;
  }

  // ---- the strongest links
  function drawLinks() {
    const found = [];
    for (const row of rows) for (const column of columns) if (value(row, column) > 0 && isListed(row, column)) found.push([value(row, column), row, column]);
    found.sort((one, other) => other[0] - one[0]);
    const list = byId("links");
    list.replaceChildren();
    for (const [share, row, column] of found.slice(0, 14)) {
      const entry = make("button", "link");
      entry.type = "button";
      const ends = make("span", "ends");
      ends.append(make("span", "", queryNames[row]), make("span", "arrow", "→"), make("span", "", keyNames[column]));
      const bar = make("span", "bar");
      const fill = make("span", "fill");
      fill.style.width = `${(100 * share) / found[0][0]}%`;
      fill.style.display = "block";
      bar.style.display = "block";
      bar.append(fill);
      entry.append(ends, make("span", "value", share.toFixed(3)), bar);
      const show = () => {
        state.cell = { row, column };
        drawHeatmap();
        point({ row, column, token: sentenceToken(state.backwards ? keys[column] : queries[row]) });
      };
      entry.addEventListener("mouseenter", show);
      entry.addEventListener("focus", show);
      entry.addEventListener("mouseleave", () => {
        state.cell = null;
        drawHeatmap();
        point(state.pinned);
      });
      const item = make("li");
      item.append(entry);
      list.append(item);
    }
  }
  function drawScale() {
    const strip = byId("strip");
    const brush = strip.getContext("2d");
    for (let x = 0; x < strip.width; x++) {
      brush.fillStyle = css(colour(Math.pow(x / strip.width, 0.6)));
      brush.fillRect(x, 0, 1, strip.height);
    }
    byId("greatest").textContent = greatest.toFixed(3);
  }

  function point(at) {
    state.at = at;
    drawSentences();
  }
  function draw() {
    ramp = RAMPS[night.matches ? "dark" : "light"].map(parse);
    compute();
    drawControls();
    drawScale();
    drawHeatmap();
    drawLinks();
    drawSentences();
  }
  function set(change) {
    Object.assign(state, change, { cell: null });
    draw();
  }
  buildSentences();
  byId("app").hidden = false;
  draw();
  night.addEventListener("change", draw);
  window.addEventListener("resize", drawHeatmap);
})();
