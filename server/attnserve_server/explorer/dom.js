// Elements of a page. Texts enter it through textContent alone, never as markup.

/**
 * Return a new element.
 * @param {string} tag
 * @param {string} [kind] its classes
 * @param {string} [text] its content
 * @returns {any}
 */
function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Return a button. @param {string} kind @param {string} text @param {() => void} act */
function makeButton(kind, text, act) {
  const button = make("button", kind, text);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

/** Return a span that keeps text of another direction apart from its neighbours. @param {string} text @param {string} [tag] */
function isolated(text, tag = "span") {
  const element = make(tag, "isolated", text);
  element.dir = "auto";
  return element;
}

/** Append a chip, a button that is pressed or not. */
function chip(parent, text, pressed, act) {
  const button = makeButton("chip", text, act);
  button.setAttribute("aria-pressed", String(pressed));
  parent.append(button);
  return button;
}

/**
 * Return a labelled group of chips, of which one is pressed.
 * @param {string} label @param {[any, string][]} options value and text of each @param {any} chosen @param {(value: any) => void} act
 */
function choices(label, options, chosen, act) {
  const group = make("div", "group");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", label);
  group.append(make("span", "", label));
  const chips = options.map(([value, text]) =>
    chip(group, text, value === chosen, () => {
      chips.forEach((each, place) => each.setAttribute("aria-pressed", String(options[place][0] === value)));
      act(value);
    }),
  );
  return group;
}

/** Return a chip that turns something on and off. @param {string} text @param {boolean} on @param {(on: boolean) => void} act */
function toggle(parent, text, on, act) {
  const made = chip(parent, text, on, () => {
    const next = made.getAttribute("aria-pressed") !== "true";
    made.setAttribute("aria-pressed", String(next));
    act(next);
  });
  return made;
}

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const percent = (value) => `${(100 * value).toFixed(Math.abs(value) < 0.0995 ? 1 : 0)}%`;

const byId = (id) => /** @type {any} */ (document.getElementById(id));
const bytesText = (count) => (count < 1000 ? `${count} B` : count < 1e6 ? `${(count / 1000).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`);

export { byId, bytesText, chip, choices, isolated, make, makeButton, percent, toggle, variable };
