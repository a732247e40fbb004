// Calls of the REST API of this server: the token, the bytes received, and answers as arrays. The token is kept in memory alone.

/** A refusal by the server, with its status and its sentence. */
class Refused extends Error {
  /** @param {number} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The server that this page comes from. */
class Api {
  constructor() {
    this.token = "";
    this.bytes = 0;
    /** Of the last answer. */
    this.lastBytes = 0;
  }

  /** @param {string} path relative to the page @param {object} [body] @param {AbortSignal} [signal] @returns {Promise<any>} */
  async call(path, body, signal) {
    const headers = { accept: "application/json" };
    if (this.token) headers.authorization = `Bearer ${this.token}`;
    if (body) headers["content-type"] = "application/json";
    const sent = { method: body ? "POST" : "GET", headers, signal, cache: "no-store", credentials: "omit", redirect: "error" };
    if (body) sent.body = JSON.stringify(body);
    let answer;
    try {
      answer = await fetch(path, /** @type {RequestInit} */ (sent));
    } catch (error) {
      if (signal && signal.aborted) throw error;
      throw new Refused(0, "The server does not answer. Check that it runs, and try again.");
    }
    const data = await answer.arrayBuffer();
    this.bytes += data.byteLength;
    this.lastBytes = data.byteLength;
    const content = read(new TextDecoder().decode(data));
    if (!answer.ok) throw new Refused(answer.status, messageOf(content, answer.status));
    return content;
  }

  models(signal) {
    return this.call("v1/models", undefined, signal);
  }

  describe(name, version, signal) {
    return this.call(pathOf(name, version), undefined, signal);
  }

  /** Run sequences. @param {object} body as `InferBody` of the API */
  infer(name, version, body, signal) {
    return this.call(`${pathOf(name, version)}:infer`, { tensor_encoding: "base64", ...body }, signal);
  }
}

const pathOf = (name, version) => `v1/models/${encodeURIComponent(name)}/versions/${encodeURIComponent(version)}`;

function read(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {};
  }
}

/** The sentence of an error in any form of the API. */
function messageOf(content, status) {
  const violations = (content.violations || []).map((each) => `${each.field}: ${each.description}`);
  if (violations.length) return violations.join("; ");
  return content.detail || (content.error && content.error.message) || content.message || `The server answered with status ${status}.`;
}

const READERS = {
  uint8: (data, at) => data.getUint8(at) / 255,
  float16: (data, at) => half(data.getUint16(at, true)),
  float32: (data, at) => data.getFloat32(at, true),
  float64: (data, at) => data.getFloat64(at, true),
  int32: (data, at) => data.getInt32(at, true),
  int64: (data, at) => Number(data.getBigInt64(at, true)),
};
const SIZES = { uint8: 1, float16: 2, float32: 4, float64: 8, int32: 4, int64: 8 };

/** Return the number of a binary16. Source: IEEE 754, 3.4. */
function half(bits) {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  const sign = bits >> 15 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
}

/** Return the elements of a tensor of an answer, row by row; those of uint8 are divided by 255. @returns {Float32Array|Float64Array} */
function arrayOf(tensor) {
  const bytes = Uint8Array.from(atob(tensor.data || ""), (letter) => letter.charCodeAt(0));
  const [readOne, size] = [READERS[tensor.dtype], SIZES[tensor.dtype]];
  if (!readOne) throw new Error(`a tensor of ${tensor.dtype} cannot be drawn`);
  const data = new DataView(bytes.buffer);
  const made = tensor.dtype === "float64" || tensor.dtype === "int64" ? new Float64Array(bytes.length / size) : new Float32Array(bytes.length / size);
  for (let at = 0; at < made.length; at++) made[at] = readOne(data, at * size);
  return made;
}

export { Api, Refused, arrayOf };
