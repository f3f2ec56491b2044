// The passage beside the conversation: it marks the answer, and lets the user select the right one.

import { h } from "./dom.js";
import { passage } from "./passages.js";
import { codePointAt, percent, plural, unitAt } from "./text.js";

const $ = (id) => document.getElementById(id);

export class Panel {
  /** @param {(part, judgement) => Promise} judge Stores the user's feedback. */
  constructor(judge) {
    this.judge = judge;
    this.text = "";
    this.span = null; // UTF-16 units [start, end) of the right answer
    $("close-passage").addEventListener("click", () => this.close());
    $("open-passage").addEventListener("click", () => ($("passage").hidden ? this.open() : this.close()));
    $("correct").addEventListener("submit", (event) => (event.preventDefault(), this.#save({ no_answer: false })));
    $("correct-none").addEventListener("click", () => this.#save({ no_answer: true }));
    $("correct-cancel").addEventListener("click", () => this.#endCorrection());
    $("correct-text").addEventListener("input", () => this.#typed());
    document.addEventListener("selectionchange", () => this.#selected());
    $("passage").addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      if (this.correcting) this.#endCorrection();
      else this.close();
    });
  }

  open() {
    $("passage").hidden = false;
    document.body.classList.add("with-passage");
    $("open-passage").setAttribute("aria-expanded", "true");
  }

  close() {
    const inside = $("passage").contains(document.activeElement);
    $("passage").hidden = true;
    document.body.classList.remove("with-passage");
    $("open-passage").setAttribute("aria-expanded", "false");
    if (inside) $("open-passage").focus();
  }

  /** Clears the panel. */
  clear() {
    this.#endCorrection();
    this.id = null;
    this.text = "";
    $("passage-title").textContent = "Passage";
    $("passage-answer").textContent = "";
    $("passage-text").replaceChildren(h("p", { class: "note", text: "A text attached to a question is shown here, with the answer marked." }));
  }

  /** Shows a passage, and marks the answer in it. */
  async show(id, answer = null) {
    const wanted = (this.wanted = `${id} ${answer?.id}`);
    const found = await passage(id);
    if (wanted !== this.wanted) return;
    if (this.correcting && this.correcting.id !== answer?.id) this.#endCorrection();
    [this.id, this.text] = [id, found.text];
    $("passage-title").textContent = found.title;
    const span = answer?.span;
    this.#mark(span ? [span.start16, span.end16] : null);
    $("passage-answer").replaceChildren(...this.#legend(answer));
    $("passage-text").querySelector("mark")?.scrollIntoView({ block: "center" });
  }

  #legend(answer) {
    if (answer?.status !== "done") return [];
    const how = answer.probability === null ? "" : `, probability ${percent(answer.probability)}`;
    if (answer.span) return [h("mark", { text: "Answer" }), ` of ${answer.model}${how}`];
    if (answer.in_passage === false) return [h("strong", { text: "Not in the passage" }), `: the answer of ${answer.model}${how}`];
    return [];
  }

  #mark(span, kind = null) {
    const place = $("passage-text");
    if (!span) return place.replaceChildren(this.text);
    const [start, end] = span;
    place.replaceChildren(this.text.slice(0, start), h("mark", { text: this.text.slice(start, end), class: kind }), this.text.slice(end));
  }

  /** Starts a correction: the user selects the right answer. */
  async correct(answer) {
    this.open();
    await this.show(answer.passage, answer);
    this.correcting = answer;
    const right = answer.feedback?.span;
    this.span = right ? [unitAt(this.text, right.start), unitAt(this.text, right.end)] : null;
    $("correct").hidden = false;
    $("correct-text").value = this.span ? this.text.slice(...this.span) : "";
    this.#say();
    $("correct-text").focus();
  }

  #endCorrection() {
    this.correcting = this.span = null;
    $("correct").hidden = true;
  }

  #selected() {
    const selection = document.getSelection();
    const place = $("passage-text");
    if (!this.correcting || selection.isCollapsed || !place.contains(selection.anchorNode) || !place.contains(selection.focusNode)) return;
    const range = selection.getRangeAt(0);
    const before = document.createRange();
    before.setStart(place, 0);
    before.setEnd(range.startContainer, range.startOffset);
    let start = before.toString().length;
    let end = start + range.toString().length;
    while (start < end && /\s/u.test(this.text[start])) start += 1;
    while (end > start && /\s/u.test(this.text[end - 1])) end -= 1;
    if (start === end) return;
    this.span = [start, end];
    $("correct-text").value = this.text.slice(start, end);
    this.#say();
  }

  #typed() {
    const typed = $("correct-text").value.trim();
    const at = typed ? this.text.indexOf(typed) : -1;
    this.span = at < 0 ? null : [at, at + typed.length];
    if (this.span) this.#mark(this.span, "right");
    $("passage-text").querySelector("mark")?.scrollIntoView({ block: "nearest" });
    this.#say();
  }

  #say() {
    const typed = $("correct-text").value.trim();
    const places = typed ? this.text.split(typed).length - 1 : 0;
    $("correct-save").disabled = !this.span;
    $("correct-found").textContent = !typed ? "" : !this.span ? "This is not in the passage."
      : places > 1 ? `${plural(places, "place")} in the passage; select another one if the marked one is not meant.` : "Found in the passage.";
  }

  async #save({ no_answer }) {
    const answer = this.correcting;
    if (!answer || (!no_answer && !this.span)) return;
    const span = no_answer ? null : this.span.map((unit) => codePointAt(this.text, unit));
    if (await this.judge(answer, { good: false, span, no_answer })) this.#endCorrection();
  }
}
