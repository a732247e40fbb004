// The strongest links as a list, with their weights as numbers and as bars.

import { isolated, make, makeButton } from "./dom.js";

/** Fill a list with the strongest links of a board's view. Pointing at one shows it in the map. */
function listLinks(list, board, most) {
  const { view } = board;
  const found = view.links(most);
  list.replaceChildren();
  for (const { share, row, column } of found) {
    const entry = makeButton("link", "", () => board.pin(board.placeOfLink(row, column)));
    const ends = make("span", "ends");
    ends.append(isolated(view.queryNames[row]), make("span", "arrow", "→"), isolated(view.keyNames[column]));
    const bar = make("span", "bar");
    const fill = make("span", share < 0 ? "fill less" : "fill");
    fill.style.width = `${(100 * Math.abs(share)) / Math.abs(found[0].share)}%`;
    bar.append(fill);
    entry.append(ends, make("span", "value", (view.signed && share > 0 ? "+" : "") + share.toFixed(3)), bar);
    const show = () => board.pointAtCell({ row, column });
    entry.addEventListener("mouseenter", show);
    entry.addEventListener("focus", show);
    entry.addEventListener("mouseleave", () => board.pointAtCell(null));
    entry.addEventListener("blur", () => board.pointAtCell(null));
    const item = make("li");
    item.append(entry);
    list.append(item);
  }
  if (!found.length) list.append(make("li", "soft", "None that is shown."));
}

export { listLinks };
