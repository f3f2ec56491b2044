// The stream that all tabs of a browser share, because a browser opens at most six connections to a server. This runs in
// a SharedWorker, which lives as long as any of the tabs; without SharedWorkers, in each page.

import { length, slice } from "./text.js";

const MAX = 128; // answers in one stream
const followed = new Map(); // port of a tab -> ids of the answers it shows
const answers = new Map(); // id -> {text, tokens, state} as streamed so far
let source = null;
let streamed = new Set(); // ids of the stream's answers
let timer = null;

/** Connects a tab, which sends ids of answers and gets {kind, data}: `state`, `delta`, `done`, `waiting`, `lost`. */
export function connect(port) {
  port.onmessage = ({ data: ids }) => {
    if (ids.length) followed.set(port, new Set(ids));
    else followed.delete(port);
    for (const id of ids) {
      const answer = answers.get(id);
      if (answer?.state) port.postMessage({ kind: "state", data: answer.state });
      if (answer?.text) port.postMessage({ kind: "delta", data: { g: id, at: 0, text: answer.text, tokens: answer.tokens } });
    }
    clearTimeout(timer);
    timer = setTimeout(settle);
  };
}

/** Streams the answers that are followed; reopens the stream only for new ones. */
function settle() {
  const wanted = [...new Set([...followed.values()].flatMap((ids) => [...ids]))].slice(0, MAX);
  for (const id of answers.keys()) if (!wanted.includes(id)) answers.delete(id);
  if (wanted.length && source && wanted.every((id) => streamed.has(id))) return;
  source?.close();
  source = null;
  if (wanted.length) open(wanted);
}

function open(ids) {
  streamed = new Set(ids);
  for (const id of ids) if (!answers.has(id)) answers.set(id, { text: "", tokens: 0, state: null });
  const after = ids.map((id) => length(answers.get(id).text)).join("-");
  const mine = (source = new EventSource(`/api/events?${ids.map((id) => `g=${id}`).join("&")}&after=${after}`));
  for (const kind of ["state", "delta", "done"]) mine.addEventListener(kind, (event) => take(kind, JSON.parse(event.data)));
  mine.addEventListener("reconnect", () => again(200));
  mine.addEventListener("error", () => {
    tell("waiting");
    if (mine.readyState === EventSource.CLOSED) again(2000);
  });
}

function take(kind, data) {
  const answer = answers.get(data.g);
  if (!answer) return;
  if (kind === "state") answer.state = data;
  if (kind === "delta") {
    answer.text += slice(data.text, length(answer.text) - data.at);
    answer.tokens = data.tokens;
  }
  for (const [port, ids] of followed) {
    if (!ids.has(data.g)) continue;
    port.postMessage({ kind, data });
    if (kind === "done") ids.delete(data.g), ids.size || followed.delete(port);
  }
  if (kind === "done") settle();
}

function tell(kind) {
  for (const port of followed.keys()) port.postMessage({ kind });
}

/** Lets each tab fetch its state again, and follow its answers. */
function again(milliseconds) {
  source.close();
  source = null;
  clearTimeout(timer);
  timer = setTimeout(() => {
    tell("lost");
    followed.clear();
    answers.clear();
  }, milliseconds);
}

if ("SharedWorkerGlobalScope" in globalThis) globalThis.onconnect = ({ ports }) => connect(ports[0]);
