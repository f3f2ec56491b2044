// The messages. An element is replaced only when its message has changed; streamed text is appended.

import { h, icon, iconButton, showRendered } from "./dom.js";
import { passage } from "./passages.js";
import { isLive } from "./state.js";
import { around, figure, percent, plural, score, signed } from "./text.js";

const STATES = { queued: "Waiting", loading: "Loading the model", reading: "Reading" };
const ENDS = { stopped: "Stopped", interrupted: "Interrupted", error: "No answer" };
const FINISHES = { length: "ended at its longest length", context: "the model can see no further", stop: "ended at a stop text" };

/** Returns an action button with a name. */
function action(image, name, act, more = {}) {
  return iconButton(image, name, act, more);
}

export class Transcript {
  /**
   * @param {HTMLElement} log
   * @param {HTMLElement} frame The element that scrolls.
   * @param {object} acts edit, again, stop, show, goTo, carryOn, praise, correct, copied
   */
  constructor(log, frame, acts) {
    [this.log, this.frame, this.acts] = [log, frame, acts];
    this.shown = new Map(); // id -> {message, live, element}
    this.atEnd = true;
    log.replaceChildren();
    frame.addEventListener("scroll", () => (this.atEnd = frame.scrollHeight - frame.scrollTop - frame.clientHeight < 80));
    const follow = new ResizeObserver(() => this.atEnd && this.toEnd());
    follow.observe(log);
    follow.observe(frame);
  }

  /** Scrolls to the end and stays there while it grows; for answers side by side, to their question. */
  toEnd() {
    this.atEnd = true;
    const question = this.log.querySelector(".turn.comparison:last-child")?.previousElementSibling;
    this.frame.scrollTop = question ? question.offsetTop - 16 : this.frame.scrollHeight;
  }

  /** Shows a state. */
  render(state) {
    const { frame } = this;
    const wanted = new Set(state.messages.map((message) => message.id));
    for (const [id, { element }] of this.shown) {
      if (!wanted.has(id)) element.remove(), this.shown.delete(id);
    }
    const grown = !this.shown.has(state.messages[0]?.id) && this.shown.size > 0 && !this.atEnd;
    const heightBefore = frame.scrollHeight;
    let last = null;
    state.messages.forEach((message, i) => {
      const known = this.shown.get(message.id);
      const parts = message.columns?.length ? message.columns : [message];
      const live = parts.map((part) => state.live[part.id]);
      const isLast = i === state.messages.length - 1;
      let element = known?.element;
      if (!known || known.message !== message || known.isLast !== isLast || known.live.some((each, j) => each !== live[j])) {
        if (!(known && this.#append(known, message, live, isLast))) {
          const focused = element?.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
          const fresh = this.#element(message, state, isLast);
          if (element) element.replaceWith(fresh);
          element = fresh;
          if (focused) (element.querySelector(`[aria-label="${CSS.escape(focused)}"]`) ?? document.getElementById("content")).focus();
        }
        this.shown.set(message.id, { message, live, isLast, element });
      }
      if ((last ? last.nextSibling : this.log.firstChild) !== element) this.log.insertBefore(element, last ? last.nextSibling : this.log.firstChild);
      last = element;
    });
    if (grown) frame.scrollTop += frame.scrollHeight - heightBefore;
    else if (this.atEnd) this.toEnd();
  }

  /** Appends new text if nothing else has changed; returns whether that was so. */
  #append(known, message, live, isLast) {
    if (known.isLast !== isLast || known.message.role !== "assistant") return false;
    const before = known.message.columns?.length ? known.message.columns : [known.message];
    const after = message.columns?.length ? message.columns : [message];
    if (before.length !== after.length) return false;
    const answering = (each) => each?.status === "answering";
    const grows = after.every((part, i) => part === before[i] ||
      (isLive(part) && isLive(before[i]) && part.id === before[i].id && part.content.startsWith(before[i].content)));
    if (!grows || !live.every((each, i) => each === known.live[i] || (answering(each) && answering(known.live[i])))) return false;
    after.forEach((part, i) => {
      if (part === before[i]) return;
      const said = known.element.querySelector(`[data-said="${part.id}"]`);
      said.firstChild.appendData(part.content.slice(before[i].content.length));
      this.#pace(known.element.querySelector(`[data-pace="${part.id}"]`), part);
    });
    return true;
  }

  /** Shows under an answer being written how many tokens it has, and how fast they come. */
  #pace(line, part) {
    if (!part.tokens) return;
    line.begun ??= { time: performance.now(), tokens: part.tokens };
    const seconds = (performance.now() - line.begun.time) / 1000;
    const pace = seconds > 0.5 ? Number(((part.tokens - line.begun.tokens) / seconds).toPrecision(2)) : 0;
    line.textContent = plural(part.tokens, "token") + (pace ? ` · ${figure(pace)} tokens/s` : "");
  }

  #element(message, state, isLast) {
    return message.role === "user" ? this.#question(message) : this.#answers(message, state, isLast);
  }

  #question(message) {
    const { acts } = this;
    const about = message.passage &&
      h("button", { type: "button", class: "chip", title: "Show the passage", onclick: () => acts.show({ passage: message.passage.id }) },
        icon("page"), h("span", { text: message.passage.title, dir: "auto" }));
    const golds = message.golds && h("p", { class: "golds" }, message.golds.length ? `Right: ${message.golds.join(" · ")}` : "Right: no answer");
    return h("article", { class: "turn user", id: `m-${message.id}`, tabindex: "-1" },
      h("h2", { text: "You" }),
      h("div", { class: "said plain", dir: "auto", text: message.content }),
      about && h("p", { class: "about" }, about), golds,
      h("div", { class: "acts" }, this.#branches(message),
        action("edit", "Edit and ask as a new branch", () => acts.edit(message)),
        action("copy", "Copy the question", () => acts.copied(message.content))));
  }

  #branches(message) {
    const { siblings } = message;
    if (!siblings || siblings.length < 2) return null;
    const at = siblings.indexOf(message.id);
    const go = (step) => () => this.acts.goTo(siblings[at + step]);
    return h("span", { class: "branches", role: "group", "aria-label": "Branches" },
      action("left", "Previous branch", go(-1), { disabled: at <= 0 }),
      h("span", { text: `${at + 1} / ${siblings.length}`, "aria-label": `branch ${at + 1} of ${siblings.length}` }),
      action("right", "Next branch", go(1), { disabled: at >= siblings.length - 1 }));
  }

  #answers(message, state, isLast) {
    const side = message.columns?.length > 1;
    const parts = message.columns?.length ? message.columns : [message];
    const columns = parts.map((part) => this.#answer(part, state, { side, isLast, shown: part.id === message.id, branches: side ? null : this.#branches(message) }));
    if (!side) {
      columns[0].id = `m-${message.id}`;
      return columns[0];
    }
    return h("article", { class: "turn comparison", id: `m-${message.id}`, tabindex: "-1", "aria-label": "Answers side by side" },
      h("h2", { text: "Side by side" }),
      h("div", { class: "columns" }, columns), this.#gains(parts),
      h("div", { class: "acts" }, this.#branches(message), parts.some(isLive) ? null : action("again", "Ask all again", () => this.acts.again(message))));
  }

  /** Returns the gain in scores of each model that was asked with and without the passage. */
  #gains(parts) {
    const rows = [];
    for (const model of new Set(parts.map((part) => part.model))) {
      const [seen, unseen] = [true, false].map((context) => parts.find((part) => part.model === model && part.with_context === context));
      if (!seen?.scores || !unseen?.scores) continue;
      const gain = (name) => signed(seen.scores[name] - unseen.scores[name]);
      rows.push(h("li", {}, h("strong", { text: model, dir: "auto" }), `: with the passage, F1 ${gain("f1")} and EM ${gain("exact")}`));
    }
    return rows.length ? h("ul", { class: "gains" }, rows) : null;
  }

  #answer(part, state, { side, isLast, shown, branches }) {
    const { acts } = this;
    const live = isLive(part);
    const told = state.live[part.id] ?? {};
    const said = h("div", { class: live ? "said live" : part.html ? "said" : "said plain", dir: "auto", "data-said": part.id });
    if (live || !part.html) said.append(document.createTextNode(part.content));
    else showRendered(said, part.html);
    const withWhat = part.kind !== "completion" && (side || part.passage)
      ? h("span", { class: "with", text: part.with_context ? "with the passage" : "without the passage" }) : null;
    const heading = h(side ? "h3" : "h2", {}, h("span", { text: part.model, dir: "auto" }), withWhat && " ", withWhat);
    const element = h(side ? "section" : "article", { class: "turn assistant", tabindex: "-1", "aria-label": side ? `${part.model}, ${part.with_context ? "with" : "without"} the passage` : null },
      heading, said);
    if (live) {
      const waits = STATES[told.status] && h("p", { class: "waits", text: STATES[told.status] + (told.status === "queued" && told.position ? ` · ${told.position} before this` : "") });
      const pace = h("p", { class: "facts", "data-pace": part.id });
      if (told.status === "answering") this.#pace(pace, part);
      element.append(waits || "", pace, h("div", { class: "acts" },
        h("button", { type: "button", class: "plain-button small", onclick: () => acts.stop(part), "aria-label": "Stop this answer" }, icon("stop"), "Stop")));
      return element;
    }
    element.append(...[this.#end(part), this.#evidence(part), this.#scores(part), this.#facts(part), this.#judged(part)].filter(Boolean));
    element.append(h("div", { class: "acts" }, branches,
      part.content && action("copy", "Copy the answer", () => acts.copied(part.content)),
      !side && action("again", "Answer again", () => acts.again(part)),
      action("up", "Right", () => acts.praise(part), { "aria-pressed": part.feedback?.good === true ? "true" : "false" }),
      action("down", "Wrong", () => acts.correct(part), { "aria-pressed": part.feedback?.good === false ? "true" : "false" }),
      side && isLast && (shown
        ? h("span", { class: "note", text: "continues from here" })
        : h("button", { type: "button", class: "plain-button small", text: "Continue from this one", onclick: () => acts.carryOn(part) }))));
    return element;
  }

  #end(part) {
    if (!ENDS[part.status]) return null;
    const why = part.error_message ? `: ${part.error_message}` : part.status === "interrupted" ? ": the server or the engine ended while it was written" : "";
    const again = part.status !== "stopped" && !part.comparison &&
      h("button", { type: "button", class: "plain-button small", text: "Ask again", onclick: () => this.acts.again(part) });
    return h("p", { class: `end ${part.status}` }, ENDS[part.status] + why, again && " ", again);
  }

  /** Returns the answer in its surroundings in the passage, or a note that it is not there. */
  #evidence(part) {
    if (part.status !== "done" || part.kind === "completion") return null;
    const how = part.probability === null ? "" : ` · probability ${percent(part.probability)}`;
    if (!part.passage) return part.kind === "qa" ? h("p", { class: "verdict" }, `Answered without a passage${how}`) : null;
    if (!part.content.trim()) return h("p", { class: "verdict" }, `No answer in the passage, according to the model${how}`);
    if (!part.span) return h("p", { class: "verdict absent" }, h("strong", { text: "Not in the passage" }), how);
    const quote = h("blockquote", { dir: "auto" });
    passage(part.passage).then(({ text }) => {
      const { before, inside, after } = around(text, part.span.start16, part.span.end16);
      quote.replaceChildren(before, h("mark", { text: inside }), after);
    }, () => quote.replaceChildren("The passage cannot be shown."));
    return h("figure", { class: "evidence" }, quote,
      h("figcaption", {}, `In the passage${how} `,
        h("button", { type: "button", class: "link", text: "Show", "aria-label": "Show it in the passage", onclick: () => this.acts.show(part) })));
  }

  #scores(part) {
    if (!part.scores) return null;
    const { exact, f1 } = part.scores;
    return h("p", { class: "scores" },
      h("span", {}, h("abbr", { title: "Exact match", text: "EM" }), ` ${score(exact)}`), " ", h("span", {}, h("abbr", { title: "Overlap of words", text: "F1" }), ` ${score(f1)}`));
  }

  #facts(part) {
    const facts = [];
    if (part.tokens) facts.push(plural(part.tokens, "token"));
    if (part.tokens_per_second) facts.push(`${figure(part.tokens_per_second)} tokens/s`);
    if (part.prompt_tokens) facts.push(`read ${part.prompt_tokens.toLocaleString("en")}${part.windows > 1 ? ` through ${part.windows} windows` : ""}`);
    if (FINISHES[part.finish]) facts.push(FINISHES[part.finish]);
    const cut = part.cut_tokens ? h("strong", { class: "warning", text: `${plural(part.cut_tokens, "token")} not read` }) : null;
    if (!facts.length && !cut) return null;
    return h("p", { class: "facts" }, facts.join(" · "), cut && " · ", cut);
  }

  #judged(part) {
    const { feedback } = part;
    if (!feedback) return null;
    const line = h("p", { class: "judged" }, feedback.good ? "Your feedback: right" : "Your feedback: wrong");
    if (feedback.no_answer) line.append("; the passage has no answer");
    if (feedback.span && part.passage) {
      passage(part.passage).then(({ text }) => line.append("; right is ", h("q", { text: Array.from(text).slice(feedback.span.start, feedback.span.end).join("") })));
    }
    return line;
  }
}
