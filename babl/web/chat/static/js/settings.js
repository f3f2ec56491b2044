// Export and import, feedback, and API keys.

import { call } from "./api.js";
import { confirmed, fillIcons, h, toast } from "./dom.js";
import { plural, when } from "./text.js";

const $ = (id) => document.getElementById(id);

async function attempt(promise) {
  try {
    return await promise;
  } catch (error) {
    toast(error.message);
    return null;
  }
}

async function keys() {
  const found = await attempt(call("GET", "/api/keys"));
  if (!found) return;
  const revoke = async (key) => {
    if (!(await confirmed(`Programs that use “${key.name}” can no longer use this server.`, "Revoke"))) return;
    await attempt(call("DELETE", `/api/keys/${key.id}`));
    await keys();
  };
  $("keys").replaceChildren(...found.keys.map((key) => h("li", {},
    h("span", { text: key.name, dir: "auto" }), h("code", { text: `${key.prefix}…` }), h("span", { class: "note", text: when(key.created) }),
    h("button", { type: "button", class: "plain-button small", text: "Revoke", "aria-label": `Revoke ${key.name}`, onclick: () => revoke(key) }))));
}

$("new-key").addEventListener("submit", async (event) => {
  event.preventDefault();
  const made = await attempt(call("POST", "/api/keys", { name: event.target.elements.name.value }));
  if (!made) return;
  event.target.reset();
  $("key").hidden = false;
  $("key-text").textContent = made.key;
  $("key-text").focus();
  await keys();
});

$("import").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  const found = file && (await attempt(call("POST", "/api/import", file)));
  if (!found) return;
  const { conversations, messages, passages } = found;
  const news = conversations + messages + passages;
  $("status").textContent = news
    ? `Imported ${plural(conversations, "conversation")}, ${plural(messages, "message")} and ${plural(passages, "passage")}.`
    : "Everything was here already; nothing has changed.";
  toast($("status").textContent);
});

$("feedback").addEventListener("submit", async (event) => {
  event.preventDefault();
  const query = new URLSearchParams(new FormData(event.target, event.submitter));
  const found = await attempt(call("GET", `/api/feedback/export?${query}`));
  if (!found) return;
  const link = h("a", { href: URL.createObjectURL(new Blob([JSON.stringify(found)], { type: "application/json" })), download: `feedback-${query.get("part")}.json` });
  link.click();
  URL.revokeObjectURL(link.href);
});

document.querySelector("form[action='/logout/']").addEventListener("submit", () => {
  for (const name of Object.keys(localStorage)) if (name.startsWith("babl:draft:")) localStorage.removeItem(name);
});

$("origin").textContent = location.origin;
fillIcons();
keys();
