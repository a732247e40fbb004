// The field of an image: a file that is chosen, pasted or dropped, and how its pixels become the numbers of a model's input.

import { byId, bytesText } from "./dom.js";
import { FITS, Picture, SCALES, imageInputOf } from "./image.js";

const MOST_IMAGE = 32 << 20;

/** The field. It keeps the image in memory, and hands it to no caller but the model. */
class ImageField {
  /** @param {(change: object) => void} onChoice remembers fit and scale @param {(act: () => Promise<void>) => void} guard shows errors */
  constructor(onChoice, guard) {
    this.bitmap = null;
    this.name = "";
    this.input = null;
    this.onChoice = onChoice;
    this.pictures = new Map();
    for (const [value, text] of Object.entries(FITS)) byId("fit").append(new Option(text, value));
    for (const [value, [text]] of Object.entries(SCALES)) byId("scale").append(new Option(text, value));
    for (const id of ["fit", "scale"])
      byId(id).addEventListener("change", () => this.choose({ [id]: byId(id).value }));
    byId("image").addEventListener("change", () => guard(() => this.take(byId("image").files[0])));
    const field = byId("image-field");
    field.addEventListener("dragover", (event) => event.preventDefault());
    field.addEventListener("drop", (event) => {
      event.preventDefault();
      guard(() => this.take(event.dataTransfer.files[0]));
    });
    document.addEventListener("paste", (event) => {
      const file = [...(event.clipboardData ? event.clipboardData.files : [])].find((each) => each.type.startsWith("image/"));
      if (file && this.input) guard(() => this.take(file));
    });
  }

  /** Show the field for a model that takes an image, with the choices of a state. @param {any} model @param {any} state */
  open(model, state) {
    this.input = model ? imageInputOf(model) : null;
    byId("image-field").hidden = !this.input;
    byId("fit").value = state.fit;
    byId("scale").value = state.scale;
    this.draw();
  }

  choose(change) {
    this.onChoice(change);
    this.draw();
  }

  /** Read a file. @param {File | undefined} file */
  async take(file) {
    if (!file) return;
    if (file.size > MOST_IMAGE) throw new Error(`${file.name} has ${bytesText(file.size)}; at most ${bytesText(MOST_IMAGE)} are read.`);
    try {
      this.bitmap = await createImageBitmap(file);
    } catch {
      throw new Error(`${file.name} is no image that this browser reads. Save it as PNG or JPEG.`);
    }
    this.name = file.name;
    this.draw();
  }

  /** Return the image as this model takes it, or null without one: the same object for the same choices. @param {any} model */
  picture(model) {
    const input = imageInputOf(model);
    if (!input || !this.bitmap) return null;
    const key = JSON.stringify([input, byId("fit").value, byId("scale").value]);
    const known = this.pictures.get(key);
    if (known && known.bitmap === this.bitmap) return known.made;
    const made = new Picture(this.bitmap, input, byId("fit").value, byId("scale").value);
    this.pictures.set(key, { bitmap: this.bitmap, made });
    return made;
  }

  /** Show the image at the size of the model. */
  draw() {
    const { input, bitmap } = this;
    const preview = byId("preview");
    preview.hidden = !input || !bitmap;
    if (!input) return;
    const size = `${input.width} × ${input.height}`;
    byId("image-note").textContent = bitmap
      ? `${this.name}: ${bitmap.width} × ${bitmap.height}, as ${size} for the model. It leaves this page only to be run on this server.`
      : `The model takes ${size} pixels. Choose a file, paste an image, or drop one here.`;
    if (!bitmap) return;
    const { canvas } = new Picture(bitmap, input, byId("fit").value, byId("scale").value);
    [preview.width, preview.height] = [input.width, input.height];
    preview.getContext("2d").drawImage(canvas, 0, 0);
    preview.setAttribute("aria-label", `the image as the model gets it, ${size}`);
  }
}

export { ImageField };
