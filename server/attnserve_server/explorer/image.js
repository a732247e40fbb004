// An image as the input of a model: its size and numbers, computed in the browser. What a model was trained with is not in its
// file, so that the reader chooses how colours become numbers.

/**
 * Name, and mean and deviation of red, green and blue, of colours from 0 to 1.
 * @type {Record<string, [string, number[], number[]]>}
 */
const SCALES = {
  half: ["-1 to 1 (mean 0.5, deviation 0.5)", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
  imagenet: ["ImageNet (0.485, 0.456, 0.406)", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]],
  clip: ["CLIP (0.481, 0.458, 0.408)", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]],
  unit: ["0 to 1", [0, 0, 0], [1, 1, 1]],
  byte: ["0 to 255", [0, 0, 0], [1 / 255, 1 / 255, 1 / 255]],
};
const FITS = { stretch: "stretched to the model's size", cut: "cut to its middle" };
const CHANNELS = [1, 3];
/** Most pixels of a side: more is no input of an image model. */
const MOST_SIDE = 4096;

/**
 * Return the input of a model that takes an image; null if it takes none.
 * @returns {{name: string, width: number, height: number, channels: number, last: boolean, dtype: string} | null}
 * `last`: whether the axis of the channels is the last one
 */
function imageInputOf(model) {
  for (const { name, dtype, shape = [] } of model.inputs || []) {
    const sizes = shape.map((axis) => Number(axis.size || 0));
    if (sizes.length !== 3 || !["float32", "uint8"].includes(dtype) || sizes.some((size) => size < 1 || size > MOST_SIDE)) continue;
    const last = !CHANNELS.includes(sizes[0]);
    const [channels, height, width] = last ? [sizes[2], sizes[0], sizes[1]] : sizes;
    if (CHANNELS.includes(channels) && height > 1 && width > 1) return { name, dtype, width, height, channels, last };
  }
  return null;
}

/** Return the inputs that the page cannot make: those that are required, and neither an image nor made from text. */
function missingInputs(model) {
  if (model.accepts_text) return [];
  const image = imageInputOf(model);
  return (model.inputs || []).filter((each) => !each.optional && (!image || each.name !== image.name)).map((each) => each.name);
}

/** An image at the size that a model takes. */
class Picture {
  /** @param {ImageBitmap} bitmap @param {any} input of `imageInputOf` @param {string} fit of FITS @param {string} scale of SCALES */
  constructor(bitmap, input, fit, scale) {
    const { width, height } = input;
    this.input = input;
    this.scale = scale;
    this.canvas = document.createElement("canvas");
    [this.canvas.width, this.canvas.height] = [width, height];
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    this.pen.imageSmoothingQuality = "high";
    // Transparent pixels get a white ground, as paper has.
    this.pen.fillStyle = "#ffffff";
    this.pen.fillRect(0, 0, width, height);
    const zoom = Math.max(width / bitmap.width, height / bitmap.height);
    const [wide, high] = fit === "cut" ? [width / zoom, height / zoom] : [bitmap.width, bitmap.height];
    this.pen.drawImage(bitmap, (bitmap.width - wide) / 2, (bitmap.height - high) / 2, wide, high, 0, 0, width, height);
  }

  /**
   * Return the numbers of the input, in its order.
   * @param {number[]} [without] patches whose pixels get the mean colour of the image
   * @param {{rows: number, columns: number} | null} [grid] of the patches @returns {Float32Array | Uint8Array}
   */
  values(without = [], grid = null) {
    const { width, height, channels, last, dtype } = this.input;
    const { data } = this.pen.getImageData(0, 0, width, height);
    if (grid) fillPatches(data, width, height, without, grid);
    const [, mean, deviation] = SCALES[this.scale];
    const count = width * height;
    const made = dtype === "uint8" ? new Uint8Array(count * channels) : new Float32Array(count * channels);
    for (let at = 0; at < count; at++)
      for (let channel = 0; channel < channels; channel++) {
        // Source of the weights of grey: ITU-R BT.601.
        const level = channels === 3 ? data[4 * at + channel] : 0.299 * data[4 * at] + 0.587 * data[4 * at + 1] + 0.114 * data[4 * at + 2];
        made[last ? at * channels + channel : channel * count + at] = dtype === "uint8" ? Math.round(level) : (level / 255 - mean[channel]) / deviation[channel];
      }
    return made;
  }

  get shape() {
    const { width, height, channels, last } = this.input;
    return last ? [height, width, channels] : [channels, height, width];
  }

  /** Return the input as a tensor of the API. @param {number[]} [without] as of `values` @param {any} [grid] of the patches */
  tensor(without = [], grid = null) {
    return { name: this.input.name, dtype: this.input.dtype, shape: this.shape, data: base64(bytesOf(this.values(without, grid))) };
  }

  /** Return the input as a file of NumPy. Source: NEP 1, format version 1.0. */
  npy() {
    const kind = this.input.dtype === "uint8" ? "|u1" : "<f4";
    const dictionary = `{'descr': '${kind}', 'fortran_order': False, 'shape': (${this.shape.join(", ")}), }`;
    const header = `${dictionary.padEnd(64 * Math.ceil((dictionary.length + 11) / 64) - 11)}\n`;
    const start = Uint8Array.from([0x93, ..."NUMPY".split("").map((letter) => letter.charCodeAt(0)), 1, 0, header.length & 255, header.length >> 8]);
    return new Blob([start, header, /** @type {Uint8Array<ArrayBuffer>} */ (bytesOf(this.values()))], { type: "application/octet-stream" });
  }
}

/** Give the pixels of some patches the mean colour of the image. @param {Uint8ClampedArray} data red, green, blue and alpha of each pixel */
function fillPatches(data, width, height, patches, grid) {
  const mean = [0, 1, 2].map((channel) => {
    let sum = 0;
    for (let at = channel; at < data.length; at += 4) sum += data[at];
    return sum / (width * height);
  });
  const wanted = new Set(patches);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const patch = Math.floor((y * grid.rows) / height) * grid.columns + Math.floor((x * grid.columns) / width);
      if (wanted.has(patch)) mean.forEach((level, channel) => (data[4 * (y * width + x) + channel] = level));
    }
}

/** Return the little-endian bytes of numbers. @param {Float32Array | Uint8Array} values */
function bytesOf(values) {
  if (values instanceof Uint8Array) return values;
  const view = new DataView(new ArrayBuffer(4 * values.length));
  values.forEach((value, at) => view.setFloat32(4 * at, value, true));
  return new Uint8Array(view.buffer);
}

function base64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}

export { FITS, Picture, SCALES, imageInputOf, missingInputs };
