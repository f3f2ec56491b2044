// The models, the memory they need, and the one selected.

import { call } from "./api.js";
import { h, show } from "./dom.js";
import { bytes, parameters, plural } from "./text.js";

const $ = (id) => document.getElementById(id);
const FAMILIES = { t5: "T5", llama: "LLaMA", bloom: "BLOOM" };
const STATES = { unloaded: "on disk", loading: "loading…", loaded: "in memory", unusable: "unusable" };

/** Returns the memory that the model takes, or would take and how much is free. */
function takes(model) {
  if (model.state === "unloaded" && model.needed) return `needs ${bytes(model.needed)} of ${bytes(model.free)} free`;
  return model.memory && bytes(model.memory);
}

export class Models {
  /** @param {(name) => void} chosen Called when the user selects another model. */
  constructor(chosen) {
    this.chosen = chosen;
    this.all = [];
    this.known = false; // whether the engine has listed them
    this.name = "";
    $("model").addEventListener("click", () => this.open());
  }

  /** Returns the models that can answer. */
  get usable() {
    return this.all.filter((model) => model.state !== "unusable");
  }

  async refresh() {
    this.#take((await call("GET", "/api/models")).models);
  }

  #take(models) {
    this.known = true;
    this.all = models;
    if (!this.name) this.name = [localStorage.getItem("babl:model"), this.usable[0]?.name].find((name) => this.usable.some((model) => model.name === name)) ?? "";
    this.#label();
    if ($("models-dialog").open) this.#render();
  }

  /** Selects the model of the next questions. */
  choose(name) {
    this.name = name || this.name || this.usable[0]?.name || "";
    this.#label();
  }

  #label() {
    $("model-name").textContent = this.name || (this.known ? "no model" : "engine is starting");
    const model = this.all.find((each) => each.name === this.name);
    $("model").dataset.state = model?.state ?? (this.all.length ? "unusable" : "");
    $("model").title = model ? `${this.name}: ${STATES[model.state]} (m)` : "Choose a model (m)";
  }

  async open() {
    $("models-dialog").querySelector(".problem").textContent = "";
    this.#render();
    const look = () => this.refresh().catch((error) => this.#fail(error));
    look();
    const timer = setInterval(look, 1500);
    await show($("models-dialog"));
    clearInterval(timer);
  }

  #fail(error) {
    $("models-dialog").querySelector(".problem").textContent = error.message;
  }

  #render() {
    const memory = this.all.reduce((sum, model) => sum + (model.state === "loaded" ? model.memory : 0), 0);
    const loaded = this.all.filter((model) => model.state === "loaded").length;
    $("models-note").textContent = this.all.length
      ? loaded ? `${plural(loaded, "model")} in memory, ${bytes(memory)} together.` : "A model is loaded when it is first asked."
      : !this.known ? "The engine is starting; its models are listed in a moment."
      : "No model in the folders searched: models/ and runs/, or what --models names, which is the folder around those of the models. `make demo` trains small ones; `babl pull` fetches others.";
    const focused = document.activeElement?.id;
    $("models").replaceChildren(h("ul", { class: "models" }, this.all.map((model, i) => this.#row(model, i))));
    if (focused) $(focused)?.focus();
  }

  #row(model, i) {
    const usable = model.state !== "unusable";
    const facts = usable
      ? [FAMILIES[model.family] ?? model.family, model.parameters && `${parameters(model.parameters)} parameters`, model.context ? `sees ${plural(model.context, "token")}` : "sees any length", takes(model)]
      : [model.reason];
    const pick = () => {
      this.choose(model.name);
      localStorage.setItem("babl:model", model.name);
      this.chosen(model.name);
      this.#render();
    };
    const act = (verb) => async () => {
      this.all = this.all.map((each) => (each === model && verb === "load" ? { ...each, state: "loading" } : each));
      this.#render();
      try {
        this.#take((await call("POST", `/api/models/${verb}`, { model: model.name })).models);
      } catch (error) {
        this.#fail(error);
        await this.refresh().catch(() => {});
      }
    };
    const button = { unloaded: "Load", loaded: "Unload" }[model.state];
    return h("li", { class: model.state },
      h("label", {},
        h("input", { type: "radio", name: "model", id: `model-${i}`, value: model.name, checked: model.name === this.name, disabled: !usable, onchange: pick }),
        h("span", {}, h("strong", { text: model.name, dir: "auto" }), h("small", { text: facts.filter(Boolean).join(" · ") }))),
      h("span", { class: "state", text: STATES[model.state] }),
      button && h("button", { type: "button", class: "plain-button small", id: `act-${i}`, text: button, "aria-label": `${button} ${model.name}`, onclick: act(button.toLowerCase()) }));
  }
}
