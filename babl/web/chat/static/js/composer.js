// The form for a question. The draft stays in localStorage until the server has it.

import { call } from "./api.js";
import { h, icon, iconButton, show } from "./dom.js";
import { passage, store } from "./passages.js";
import { newId, plural } from "./text.js";

const $ = (id) => document.getElementById(id);
const BLANK = { content: "", passage: null, golds: null, models: [], both: false, comparing: false, choosing: false, kind: "", edits: null, parent: undefined };
const user = document.querySelector("meta[name=user]").content;
const key = (conversation) => `babl:draft:${user}:${conversation ?? "new"}`;
const phone = matchMedia("(hover: none) and (pointer: coarse)"); // its keyboard has no Shift+Enter

export class Composer {
  /**
   * @param {object} acts send(), models(): the Models, conversation(): the one shown, parent(): id of the last answer,
   *   attached(id), settings()
   */
  constructor(acts) {
    this.acts = acts;
    this.draft = { ...BLANK };
    this.conversation = null;
    const changed = () => (this.#read(), this.keep(), this.count());
    for (const id of ["content", "gold", "gold-none", "compare-context", "kind"]) $(id).addEventListener("input", changed);
    $("content").addEventListener("keydown", (event) => {
      // Safari ends a composition before it reports the key that ended it, with the code 229.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229 || phone.matches) return;
      event.preventDefault();
      this.acts.send();
    });
    $("composer").addEventListener("submit", (event) => (event.preventDefault(), this.acts.send()));
    $("right").addEventListener("click", () => this.toggleGold());
    $("compare").addEventListener("click", () => this.toggleCompare());
    $("attach").addEventListener("click", () => this.attach());
    $("attach-file").addEventListener("change", (event) => this.#file(event.target.files[0], true));
    $("composer").addEventListener("dragover", (event) => event.preventDefault());
    $("composer").addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.#file(event.dataTransfer.files[0], false);
    });
  }

  /** Restores the draft of a conversation (null: of a new one). */
  restore(conversation, attached = null) {
    this.conversation = conversation;
    let kept = null;
    try {
      kept = JSON.parse(localStorage.getItem(key(conversation)));
    } catch {
      // Something else has written there.
    }
    this.draft = { ...BLANK, passage: attached, ...kept };
    this.#write();
  }

  /** Saves the draft in the browser. */
  keep() {
    const { content, golds, edits, comparing, passage: attached } = this.draft;
    const empty = !content && golds === null && !edits && !comparing && (this.conversation || !attached);
    try {
      if (empty) localStorage.removeItem(key(this.conversation));
      else localStorage.setItem(key(this.conversation), JSON.stringify(this.draft));
    } catch {
      // The storage is full; the draft is on the page alone.
    }
  }

  /** Deletes the saved draft of a conversation. */
  forget(conversation) {
    localStorage.removeItem(key(conversation));
  }

  /** Puts a text into the field, before what is there. */
  begin(content) {
    this.draft.content = [content, this.draft.content].filter(Boolean).join("\n");
    this.#write();
    this.keep();
  }

  /** Clears the draft once the server has the question. */
  sent() {
    this.forget(this.conversation);
    this.draft = { ...BLANK, passage: this.draft.passage, models: this.draft.models, both: this.draft.both, comparing: this.draft.comparing, kind: this.draft.kind };
    this.#write();
  }

  #read() {
    const { draft } = this;
    draft.content = $("content").value;
    draft.kind = $("kind").value;
    draft.both = $("compare-context").checked;
    draft.models = [...$("compare-models").querySelectorAll("input:checked")].map((input) => input.value);
    if (!$("gold-row").hidden) {
      const lines = $("gold").value.split("\n").filter((line) => line.trim());
      draft.golds = $("gold-none").checked ? [] : lines.length ? lines : null;
    }
    $("gold").disabled = $("gold-none").checked;
    this.#fit();
  }

  #write() {
    const { draft } = this;
    $("content").value = draft.content;
    $("kind").value = draft.kind;
    $("gold").value = draft.golds?.join("\n") ?? "";
    $("gold-none").checked = draft.golds?.length === 0;
    $("gold").disabled = $("gold-none").checked;
    this.#open("gold-row", "right", draft.golds !== null);
    this.#open("compare-row", "compare", draft.comparing && draft.choosing);
    $("compare-context").checked = draft.both;
    this.renderModels();
    this.#chips();
    this.#fit();
    this.count();
  }

  #open(row, button, open) {
    $(row).hidden = !open;
    $(button).setAttribute("aria-expanded", String(open));
  }

  #fit() {
    for (const field of [$("content"), $("gold")]) {
      field.style.height = "auto";
      field.style.height = `${Math.min(field.scrollHeight + 2, 240)}px`;
    }
  }

  toggleGold(open = $("gold-row").hidden) {
    this.#open("gold-row", "right", open);
    if (open) $("gold").focus();
    else this.draft.golds = null;
    this.#read();
    this.keep();
  }

  toggleCompare(open = $("compare-row").hidden) {
    this.draft.comparing = this.draft.choosing = open;
    if (open && !this.draft.models.length) {
      this.draft.both = true;
      this.draft.models = [this.acts.models().name].filter(Boolean);
    }
    this.#write();
    this.keep();
    if (open) $("compare-context").focus();
  }

  /** Shows the models that can be compared. */
  renderModels() {
    const { usable } = this.acts.models();
    $("compare-models").replaceChildren(...usable.map((model) => {
      const input = h("input", { type: "checkbox", value: model.name, checked: this.draft.models.includes(model.name) });
      input.addEventListener("input", () => (this.#read(), this.keep(), this.count()));
      return h("label", { class: "check" }, input, h("span", { text: model.name, dir: "auto" }));
    }));
  }

  #chips() {
    const { draft } = this;
    const chips = [];
    if (draft.edits) {
      chips.push(h("span", { class: "chip" }, icon("edit"), h("span", { text: "Asked as a new branch" }), iconButton("close", "Cancel the edit", () => this.cancelEdit())));
    }
    if (draft.comparing && !draft.choosing) {
      const text = `${draft.models.join(", ")}${draft.both && draft.passage ? ", with and without the passage" : ""}`;
      chips.push(h("span", { class: "chip" }, icon("columns"), h("button", { type: "button", class: "link", text, title: "Side by side", onclick: () => this.toggleCompare(true) }),
        iconButton("close", "Stop comparing", () => this.toggleCompare(false))));
    }
    if (draft.passage) {
      const name = h("span", { text: "Passage", dir: "auto" });
      passage(draft.passage).then(({ title }) => (name.textContent = title), () => this.detach());
      chips.push(h("span", { class: "chip" }, icon("page"), name, iconButton("close", "Ask without the passage", () => this.detach())));
    }
    $("chips").replaceChildren(...chips);
  }

  /** Starts to edit a question, which is asked as a new branch. */
  edit(question) {
    const { comparing, models, both } = this.draft;
    this.draft = { ...BLANK, comparing, models, both, content: question.content, golds: question.golds, passage: question.passage?.id ?? null, edits: question.id, parent: question.parent };
    this.#write();
    this.keep();
    $("content").focus();
  }

  cancelEdit() {
    this.draft = { ...BLANK, passage: this.draft.passage };
    this.#write();
    this.keep();
    $("content").focus();
  }

  async attach() {
    const dialog = $("attach-dialog");
    const form = dialog.querySelector("form");
    const problem = (text) => (dialog.querySelector(".problem").textContent = text);
    problem("");
    this.#earlier();
    form.onsubmit = async (event) => {
      if (event.submitter?.value !== "text") return;
      event.preventDefault();
      if (!$("attach-text").value.trim()) return problem("There is no text yet.");
      try {
        this.use(await store($("attach-text").value, $("attach-title").value));
        $("attach-text").value = $("attach-title").value = "";
        dialog.close("text");
      } catch (error) {
        problem(error.message);
      }
    };
    await show(dialog);
    $("content").focus();
  }

  async #earlier() {
    const list = $("attach-earlier");
    const { passages } = await call("GET", "/api/passages").catch(() => ({ passages: [] }));
    $("attach-earlier-heading").hidden = !passages.length;
    list.replaceChildren(...passages.slice(0, 30).map((each) =>
      h("li", { class: "row" },
        h("button", { type: "button", text: each.title, dir: "auto", onclick: () => (this.use(each), $("attach-dialog").close("earlier")) }),
        h("button", { type: "button", class: "plain-button small", text: "Remove", "aria-label": `Remove ${each.title}`, onclick: () => this.#forget(each) }))));
  }

  async #forget({ id }) {
    try {
      await call("DELETE", `/api/passages/${id}`);
      await this.#earlier();
    } catch (error) {
      $("attach-dialog").querySelector(".problem").textContent = error.message;
    }
  }

  async #file(file, inDialog) {
    $("attach-file").value = "";
    if (!file) return;
    try {
      this.use(await store(file));
      $("attach-dialog").close("file");
    } catch (error) {
      if (inDialog) $("attach-dialog").querySelector(".problem").textContent = error.message;
      else this.acts.fail(error);
    }
  }

  /** Attaches a passage to the next question. */
  use({ id }) {
    this.draft.passage = id;
    this.keep();
    this.#chips();
    this.count();
    this.acts.attached(id);
  }

  detach() {
    this.draft.passage = null;
    this.keep();
    this.#chips();
    this.count();
    this.acts.attached(null);
    $("content").focus();
  }

  /** Returns the request to the server; its id stays the same until the question changes. */
  request() {
    const { draft } = this;
    const comparing = draft.comparing && draft.models.length > 0;
    const body = {
      content: draft.content,
      models: comparing ? draft.models : [this.acts.models().name],
      parent: draft.edits ? draft.parent : this.acts.parent(),
      passage: draft.passage,
      contexts: comparing && draft.both && draft.passage ? [true, false] : [true],
      golds: draft.golds,
      kind: draft.kind || null,
    };
    const what = JSON.stringify(body);
    if (draft.sent?.what !== what) draft.sent = { what, id: newId() };
    draft.conversation ??= this.conversation ?? newId();
    this.keep();
    return { ...body, client_id: draft.sent.id };
  }

  /** Shows the tokens of the question for each model, and how many would be cut. */
  count() {
    clearTimeout(this.timer);
    const asked = (this.asked = Symbol("count"));
    if (!this.draft.content.trim() || !this.acts.models().name) {
      $("count").replaceChildren();
      return;
    }
    this.timer = setTimeout(async () => {
      const body = this.request();
      const draft = {
        content: body.content, passage: body.passage, parent: body.parent, conversation: this.acts.conversation()?.id ?? null,
        kind: body.kind ?? (body.passage || body.models.length * body.contexts.length > 1 ? "qa" : "chat"), settings: this.acts.settings(),
      };
      const counts = await Promise.all(body.models.map((model) =>
        call("POST", "/api/count", { ...draft, model }).then((counted) => ({ model, ...counted }), (error) => ({ model, error }))));
      if (asked !== this.asked) return;
      $("count").replaceChildren(...counts.flatMap((each, i) => [i ? h("br") : "", ...this.#counted(each, counts.length > 1)]));
    }, 250);
  }

  #counted({ model, prompt_tokens, limit, cut_tokens, windows, error }, named) {
    const name = named ? `${model}: ` : "";
    if (error) return [h("span", { class: "warning", text: name + error.message })];
    const read = windows > 1 ? `${plural(prompt_tokens, "token")} through ${windows} windows of ${limit}` : `${prompt_tokens.toLocaleString("en")} of ${plural(limit, "token")}`;
    const cut = cut_tokens ? h("strong", { class: "warning", text: `${plural(cut_tokens, "token")} would not be read` }) : null;
    return [name + read, ...(cut ? [" · ", cut] : [])];
  }
}
