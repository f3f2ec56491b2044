// Requests to the server, and the stream of answers that are being written.

/** An error response of the server. */
export class Refused extends Error {
  constructor(status, { code, message, retry_after } = {}, data = {}) {
    super(message ?? `the server answered with status ${status}`);
    Object.assign(this, { status, code, retryAfter: retry_after, data });
  }
}

/** Returns the JSON of a response; a body other than FormData or a File is sent as JSON. */
export async function call(method, path, body) {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-CSRFToken"] = document.querySelector("meta[name=csrf-token]").content;
  const raw = body instanceof FormData || body instanceof Blob;
  if (body !== undefined && !raw) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined || raw ? body : JSON.stringify(body) });
  } catch {
    throw new Refused(0, { code: "network", message: "The server does not answer. Is it running?" });
  }
  const text = await response.text();
  let data = {};
  try {
    data = text ? JSON.parse(text) : {};
  } catch {
    // An error page of a proxy.
  }
  if (response.ok) return data;
  if (response.status === 401) data.error = { code: "login", message: "You are logged out. Log in again in another tab; what you wrote stays here." };
  throw new Refused(response.status, data.error, data);
}

const address = new URL("./stream.js", import.meta.url).href;
const policy = globalThis.trustedTypes?.createPolicy("babl-stream", { createScriptURL: (url) => url });

/**
 * Follows answers until they are done, over the stream that all tabs share.
 *
 * @param {(kind: string, data: object) => void} take Called for `state`, `delta` and `done`.
 * @param {() => void} lost Called when the page must fetch its state again: the server shut down, or refused.
 * @param {() => void} waiting Called when the connection broke and the browser reconnects.
 */
export class Stream {
  constructor(take, lost, waiting) {
    this.following = false;
    this.port = this.#port();
    this.port.onmessage = ({ data: { kind, data } }) => {
      if (kind === "lost") this.following = false;
      if (kind === "lost") lost();
      else if (kind === "waiting") waiting();
      else take(kind, data);
    };
    addEventListener("pagehide", () => this.close()); // nothing else tells the stream that the tab is closed
    addEventListener("pageshow", (event) => event.persisted && lost());
  }

  #port() {
    if (globalThis.SharedWorker) return new SharedWorker(policy ? policy.createScriptURL(address) : address, { type: "module" }).port;
    const { port1, port2 } = new MessageChannel();
    import("./stream.js").then(({ connect }) => connect(port2));
    return port1;
  }

  /** Follows exactly the answers with these ids; the stream repeats what it knows of them. */
  follow(ids) {
    this.following = ids.length > 0;
    this.port.postMessage(ids);
  }

  /** Stops following answers. */
  close() {
    this.follow([]);
  }
}
