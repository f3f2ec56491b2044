// Keyboard shortcuts, and their list, which `?` shows. Single keys can be turned off, and are ignored in text fields.

import { h, show } from "./dom.js";

const $ = (id) => document.getElementById(id);
const on = () => localStorage.getItem("babl:keys") !== "off";
const typing = (element) => element.closest?.("input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable]");

/** Listens for shortcuts: [[key, description, act]]. */
export function listen(keys) {
  const list = [["Enter", "Send (on a phone: new line)"], ["Shift Enter", "New line"], ["Escape", "Stop the answer, or close what is open"], ...keys];
  $("keys-list").replaceChildren(...list.map(([key, what]) =>
    h("div", {}, h("dt", {}, ...key.split(" ").flatMap((each, i) => [i ? " + " : "", h("kbd", { text: each })])), h("dd", { text: what }))));
  $("keys-on").addEventListener("change", (event) => localStorage.setItem("babl:keys", event.target.checked ? "on" : "off"));
  $("keys").addEventListener("click", open);
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (typing(event.target) || document.querySelector("dialog[open], [popover]:popover-open") || !on()) return;
    const found = keys.find(([key]) => key === event.key);
    if (!found) return;
    event.preventDefault();
    found[2]();
  });
}

/** Shows the list. */
export function open() {
  $("keys-on").checked = on();
  return show($("keys-dialog"));
}
