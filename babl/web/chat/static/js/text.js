// Texts in Python's units (code points) and the browser's (UTF-16 units), ids, and formatting of figures.

/** Returns how many code points a text has. */
export function length(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** Returns the text from code point `from` on. */
export function slice(text, from) {
  return from <= 0 ? text : Array.from(text).slice(from).join("");
}

/** Returns the number of code points before a UTF-16 unit. */
export function codePointAt(text, unit) {
  return length(text.slice(0, unit));
}

/** Returns the number of UTF-16 units before a code point. */
export function unitAt(text, codePoint) {
  return Array.from(text).slice(0, codePoint).join("").length;
}

/** Returns the part of a text around [start, end), in UTF-16 units: {before, inside, after}, cut between words. */
export function around(text, start, end, room = 90) {
  let from = Math.max(0, start - room);
  let to = Math.min(text.length, end + room);
  while (from > 0 && /\S/u.test(text[from - 1])) from -= 1;
  while (to < text.length && /\S/u.test(text[to])) to += 1;
  return {
    before: (from > 0 ? "… " : "") + text.slice(from, start).trimStart(),
    inside: text.slice(start, end),
    after: text.slice(end, to).trimEnd() + (to < text.length ? " …" : ""),
  };
}

/** Returns a new UUID that sorts by time, as the server's own do. Ref: RFC 9562, section 5.7. */
export function newId(now = Date.now(), random = crypto.getRandomValues(new Uint8Array(10))) {
  const bytes = [...now.toString(16).padStart(12, "0").match(/../g).map((pair) => parseInt(pair, 16)), ...random];
  bytes[6] = (bytes[6] & 0x0f) | 0x70;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return [0, 8, 12, 16, 20].map((at, i, all) => digits.slice(at, all[i + 1])).join("-");
}

/** Formats a number with at most three significant digits: 0.00012, 1.53, 17.2, 240. */
export function figure(value) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(Math.abs(value) < 1 ? 2 : 3)));
}

/** Formats a probability; never as "100 %" or "0 %" unless it is exactly that. */
export function percent(probability) {
  const value = 100 * probability;
  if (value > 0 && value < 0.1) return "under 0.1\u00a0%";
  if (value < 100 && value > 99.9) return "over 99.9\u00a0%";
  return `${value < 10 && value > 0 ? value.toFixed(1) : Math.round(value)}\u00a0%`;
}

/** Formats a score of 0 to 100 with at most one decimal. */
export function score(value) {
  return String(Math.round(10 * value) / 10);
}

/** Formats a difference of scores with its sign. */
export function signed(value) {
  const text = score(Math.abs(value));
  return text === "0" ? "±0" : (value > 0 ? "+" : "−") + text;
}

/** Formats a size in bytes. */
export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (count >= 1000 && at < units.length - 1) [count, at] = [count / 1000, at + 1];
  return `${figure(count)} ${units[at]}`;
}

/** Formats a number of parameters. */
export function parameters(count) {
  for (const [unit, name] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) if (count >= unit) return `${figure(count / unit)}${name}`;
  return String(count);
}

/** Returns "1 token" or "3 tokens". */
export function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

/** Formats a time, as short as possible. */
export function when(iso, now = new Date()) {
  const then = new Date(iso);
  const minutes = (now - then) / 60000;
  if (minutes < 1) return "now";
  if (minutes < 60) return `${Math.floor(minutes)} min`;
  if (then.toDateString() === now.toDateString()) return then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const year = then.getFullYear() === now.getFullYear() ? {} : { year: "numeric" };
  return then.toLocaleDateString([], { day: "numeric", month: "short", ...year });
}
