// The state of a conversation on the page. A snapshot and the events after it go through one reducer, so that opening,
// reloading and reconnecting are the same. Nothing here touches the DOM.

import { length, slice } from "./text.js";

export const EMPTY = { conversation: null, messages: [], more: false, live: {}, gap: false };
export const isLive = (message) => message.status === "queued" || message.status === "running";

/** Yields every answer that is shown, including those side by side. */
export function* answers(state) {
  for (const message of state.messages) {
    if (message.role !== "assistant") continue;
    yield* message.columns?.length ? message.columns : [message];
  }
}

/** Returns the answer of that id, or undefined. */
export function find(state, id) {
  for (const answer of answers(state)) if (answer.id === id) return answer;
  return undefined;
}

/** Returns the state after an action; the same object if nothing changes. */
export function reduce(state, action) {
  switch (action.type) {
    case "clear":
      return EMPTY;
    case "snapshot":
      return snapshot(state, action.snapshot);
    case "earlier":
      return { ...state, messages: [...action.messages, ...state.messages], more: action.more };
    case "conversation":
      return state.conversation?.id === action.conversation.id ? { ...state, conversation: action.conversation } : state;
    case "state":
      return told(state, action);
    case "delta":
      return delta(state, action);
    case "done":
      return done(state, action.message);
    case "feedback":
      return change(state, action.g, (message) => ({ ...message, feedback: action.feedback }));
    default:
      throw new Error(`no action ${action.type}`);
  }
}

function snapshot(state, { messages, more, live, ...conversation }) {
  const same = state.conversation?.id === conversation.id;
  const before = same ? new Map([...answers(state)].map((answer) => [answer.id, answer])) : new Map();
  // What is saved lags behind what was streamed.
  const ahead = (message) => {
    const known = before.get(message.id);
    return known && isLive(message) && isLive(known) && known.content.length > message.content.length
      ? { ...message, content: known.content, tokens: known.tokens }
      : message;
  };
  let page = messages.map((message) => ahead(message.columns?.length ? { ...message, columns: message.columns.map(ahead) } : message));
  // Earlier pages that were loaded stay while they lead to this one.
  const join = same && page.length ? state.messages.findIndex((message) => message.id === page[0].parent) : -1;
  const above = join >= 0 ? state.messages.slice(0, join + 1) : [];
  const states = Object.fromEntries(live.map((id) => [id, (same && state.live[id]) || { status: "queued", saved: true }]));
  page = [...above, ...page];
  return { conversation, messages: page, more: above.length ? state.more : more, live: states, gap: false };
}

function told(state, { g, type, ...facts }) {
  if (!find(state, g)) return state;
  return { ...state, live: { ...state.live, [g]: { ...state.live[g], ...facts } } };
}

function delta(state, { g, at, text, tokens }) {
  const answer = find(state, g);
  if (!answer || !isLive(answer)) return state;
  const have = length(answer.content);
  if (at > have) return { ...state, gap: true };
  const rest = slice(text, have - at);
  return rest ? change(state, g, (message) => ({ ...message, content: message.content + rest, tokens })) : state;
}

function done(state, message) {
  const { [message.id]: _, ...live } = state.live;
  return change({ ...state, live }, message.id, (old) => ({ ...old, ...message }));
}

function change(state, id, how) {
  const messages = state.messages.map((message) => {
    const columns = message.columns?.some((column) => column.id === id)
      ? message.columns.map((column) => (column.id === id ? how(column) : column))
      : message.columns;
    if (message.id === id) return { ...how(message), columns, siblings: message.siblings };
    return columns === message.columns ? message : { ...message, columns };
  });
  return { ...state, messages };
}

/** Returns the status line of the answers: a phrase that does not change with every word. */
export function summary(state) {
  const states = Object.values(state.live);
  if (states.some((each) => each.saved === false)) return "Not saved: the server cannot store the answer yet. Is its disk full?";
  if (states.length) {
    const { status, position, prompt_tokens, windows } = states.find((each) => each.status === "answering") ?? states[0];
    if (status === "queued") return position ? `Waiting; ${position} before this` : "Waiting";
    if (status === "loading") return "Loading the model";
    if (status === "reading") return `Reading ${prompt_tokens} tokens${windows > 1 ? ` through ${windows} windows` : ""}`;
    return "Answering";
  }
  const last = state.messages.at(-1);
  if (last?.role !== "assistant") return "";
  const ends = new Set((last.columns?.length ? last.columns : [last]).map((answer) => answer.status));
  if (ends.has("error")) return "No answer";
  if (ends.has("interrupted")) return "Interrupted";
  if (ends.has("stopped")) return "Stopped";
  return "Answered";
}
