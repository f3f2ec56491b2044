// Requests to the server, and the stream of what is being answered.

/** What the server said instead of doing what it was asked. */
export class Refused extends Error {
  constructor(status, { code, message, retry_after } = {}, data = {}) {
    super(message ?? `the server answered with status ${status}`);
    Object.assign(this, { status, code, retryAfter: retry_after, data });
  }
}

/** Returns the JSON of the answer; a body that is no FormData or File goes as JSON. */
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
    // An error page of something in between.
  }
  if (response.ok) return data;
  if (response.status === 401) data.error = { code: "login", message: "You are logged out. Log in again in another tab; what you wrote stays here." };
  throw new Refused(response.status, data.error, data);
}

/**
 * Follows answers until they are done, over any number of connections.
 *
 * @param {(kind: string, data: object) => void} take Called for `state`, `delta` and `done`.
 * @param {() => void} lost Called where the page has to look again what there is: the server ended, or refused.
 * @param {() => void} waiting Called where the connection broke and the browser tries again.
 */
export class Stream {
  constructor(take, lost, waiting) {
    [this.take, this.lost, this.waiting] = [take, lost, waiting];
    this.ids = "";
  }

  /** Follows exactly these: [{id, seen}], with the code points that are known of each. */
  follow(wanted) {
    const ids = wanted.map(({ id }) => id).join(" ");
    if (this.source && ids === this.ids) return;
    this.close();
    if (!wanted.length) return;
    this.ids = ids;
    const left = new Set(wanted.map(({ id }) => id));
    const after = wanted.map(({ seen }) => seen).join("-");
    const source = new EventSource(`/api/events?${wanted.map(({ id }) => `g=${id}`).join("&")}&after=${after}`);
    this.source = source;
    for (const kind of ["state", "delta", "done"]) {
      source.addEventListener(kind, (event) => {
        const data = JSON.parse(event.data);
        if (kind === "done") left.delete(data.g);
        if (!left.size) this.close(); // else the browser would connect again to what has ended
        this.take(kind, data);
      });
    }
    source.addEventListener("reconnect", () => this.#again(200));
    source.addEventListener("error", () => {
      this.waiting();
      if (source.readyState === EventSource.CLOSED) this.#again(2000);
    });
  }

  #again(milliseconds) {
    this.close();
    this.timer = setTimeout(this.lost, milliseconds);
  }

  /** Follows nothing any more. */
  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
    this.ids = "";
  }
}
