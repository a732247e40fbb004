// Colours of weights, in light and dark: one ramp for shares from 0 to 1, one for differences from -1 to 1.

const RAMPS = {
  light: ["#fbf8f2", "#f8dcbc", "#f0a272", "#d4555d", "#8a1c62", "#3b0f46"],
  dark: ["#171a20", "#2c2458", "#632b86", "#b83d7c", "#f0743e", "#ffdc86"],
};
const DIFFERENCES = {
  light: ["#0b4f8a", "#8db8dc", "#fbf8f2", "#f0a272", "#9a2c1e"],
  dark: ["#7db8f0", "#2d4f74", "#171a20", "#7a3f24", "#f5a060"],
};

const night = matchMedia("(prefers-color-scheme: dark)");

/** @param {string} hex @returns {number[]} red, green and blue, from 0 to 255 */
const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

let ramp = RAMPS.light.map(parse);
let differences = DIFFERENCES.light.map(parse);

/** Take the colours of the scheme that the reader prefers. */
function useScheme() {
  const scheme = night.matches ? "dark" : "light";
  ramp = RAMPS[scheme].map(parse);
  differences = DIFFERENCES[scheme].map(parse);
}

/** @param {number[][]} stops @param {number} share from 0 to 1 @returns {number[]} */
function between(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  return stops[low].map((value, part) => Math.round(value + (stops[low + 1][part] - value) * (place - low)));
}

/** @param {number} share of the greatest weight, from 0 to 1 */
const colour = (share) => between(ramp, share);

/** @param {number} share of the greatest difference, from -1 to 1 */
const difference = (share) => between(differences, (share + 1) / 2);

/** @param {number[]} rgb @returns {string} */
const css = (rgb) => `rgb(${rgb.join(",")})`;

/**
 * Return black or white, whichever has the greater contrast: at least 4.5, for any background.
 * Source: WCAG 2.2, relative luminance and contrast ratio.
 * @param {number[]} rgb
 */
function inkOn(rgb) {
  const [red, green, blue] = rgb.map((part) => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff";
}

export { colour, css, difference, inkOn, night, useScheme };
