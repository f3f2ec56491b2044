// Settings of a conversation: system prompt and sampling.

import { show } from "./dom.js";

const $ = (id) => document.getElementById(id);
export const DEFAULTS = { max_new_tokens: 256, temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, seed: 0, stop: [] };

/** Opens the dialog; resolves to {system_prompt, settings}, or null if it is cancelled. */
export async function askOptions(current, save) {
  const dialog = $("settings-dialog");
  const form = dialog.querySelector("form");
  const fill = (settings) => {
    for (const name of Object.keys(DEFAULTS)) form.elements[name].value = name === "stop" ? settings.stop.join("\n") : settings[name];
  };
  $("system_prompt").value = current.system_prompt;
  fill({ ...DEFAULTS, ...current.settings });
  $("settings-reset").onclick = () => fill(DEFAULTS);
  dialog.querySelector(".problem").textContent = "";
  form.onsubmit = async (event) => {
    if (event.submitter?.value !== "save") return;
    event.preventDefault();
    const number = (name) => (form.elements[name].value === "" ? DEFAULTS[name] : Number(form.elements[name].value));
    const settings = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, name === "stop" ? form.elements.stop.value.split("\n").filter(Boolean) : number(name)]));
    try {
      await save({ system_prompt: $("system_prompt").value, settings });
      dialog.close("saved");
    } catch (error) {
      dialog.querySelector(".problem").textContent = error.message;
    }
  };
  await show(dialog);
}

/** Returns how many settings differ from the defaults. */
export function changed({ system_prompt = "", settings = {} }) {
  const differs = Object.entries(settings).filter(([name, value]) => String(value) !== String(DEFAULTS[name])).length;
  return differs + (system_prompt ? 1 : 0);
}
