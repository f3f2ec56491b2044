// Passages, each fetched once: they never change.

import { call } from "./api.js";

const known = new Map();

/** Resolves to {id, title, text}. */
export function passage(id) {
  if (!known.has(id)) {
    const wanted = call("GET", `/api/passages/${id}`);
    known.set(id, wanted);
    wanted.catch(() => known.delete(id));
  }
  return known.get(id);
}

/** Stores a text or a file as a passage; resolves to it. */
export async function store(source, title = "") {
  let body = { text: source, title };
  if (source instanceof File) {
    body = new FormData();
    body.append("file", source);
  }
  const stored = await call("POST", "/api/passages", body);
  known.set(stored.id, Promise.resolve(stored));
  return stored;
}
