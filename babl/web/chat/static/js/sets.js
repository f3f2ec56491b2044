// Question sets: their runs, and the answers in which two runs differ.

import { call } from "./api.js";
import { confirmed, fillIcons, h, toast } from "./dom.js";
import { plural, score, signed, when } from "./text.js";

const $ = (id) => document.getElementById(id);
const LIVE = ["queued", "running"];
const ENDS = { stopped: "stopped", interrupted: "interrupted", error: "broke off" };
const picked = new Map(); // set -> {a?, b?}: the runs that the user chose to compare; by default the last two
const differences = new Map(); // set -> the differences
let sets = [];
let models = [];
let timer = null;
let answering = false;

const say = (text) => {
  if ($("status").textContent !== text) $("status").textContent = text;
};

const attempt = async (promise) => {
  try {
    return await promise;
  } catch (error) {
    toast(error.message);
    return null;
  }
};

async function refresh() {
  clearTimeout(timer);
  const found = await attempt(call("GET", "/api/sets"));
  if (found) {
    sets = found.sets;
    render();
  }
  const going = sets.flatMap((set) => set.runs).find((run) => LIVE.includes(run.status));
  if (going || answering) say(going ? `${going.model} is answering` : "All questions are answered");
  answering = Boolean(going);
  if (going) timer = setTimeout(refresh, 800);
}

function render() {
  const focused = document.activeElement?.dataset?.focus;
  $("sets").replaceChildren(...(sets.length ? sets.map(card) : [h("p", { class: "note", text: "No question set yet." })]));
  if (focused) document.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
}

function card(set) {
  const start = async (event) => {
    event.preventDefault();
    const form = new FormData(event.target);
    if (await attempt(call("POST", `/api/sets/${set.id}/runs`, { model: form.get("model"), with_context: form.has("context") }))) await refresh();
  };
  const remove = async () => {
    if (await confirmed(`“${set.name}”, its passages that nothing else uses, and the answers to it will be gone for good.`, "Delete")) {
      await attempt(call("DELETE", `/api/sets/${set.id}`));
      await refresh();
    }
  };
  return h("section", { class: "card", "aria-label": set.name },
    h("h2", { text: set.name, dir: "auto" }),
    h("p", { class: "note", text: `${plural(set.questions, "question")} · imported ${when(set.created)}` }),
    h("form", { class: "row", onsubmit: start },
      h("label", {}, "Model ", h("select", { name: "model", "data-focus": `model-${set.id}` }, models.map((model) => h("option", { text: model.name, value: model.name })))),
      h("label", { class: "check" }, h("input", { type: "checkbox", name: "context", checked: true }), " With the passages"),
      h("button", { class: "primary", text: "Run", "data-focus": `run-${set.id}` }),
      h("button", { type: "button", class: "plain-button", text: "Delete", "aria-label": `Delete ${set.name}`, onclick: remove })),
    set.runs.length ? runs(set) : null,
    differences.has(set.id) ? difference(set, differences.get(set.id)) : null);
}

function runs(set) {
  const pair = { b: set.runs[0]?.id, a: set.runs[1]?.id, ...picked.get(set.id) };
  const radio = (run, side) => h("td", {}, h("input", {
    type: "radio", name: `${side}-${set.id}`, checked: pair[side] === run.id, "aria-label": `${side === "a" ? "Before" : "After"}: ${name(run)}`,
    onchange: () => picked.set(set.id, { ...picked.get(set.id), [side]: run.id }) && (pair[side] = run.id), "data-focus": `${side}-${run.id}`,
  }));
  const compare = async () => {
    const found = await attempt(call("GET", `/api/sets/${set.id}/difference?a=${pair.a}&b=${pair.b}`));
    if (!found) return;
    differences.set(set.id, { ...found, a: set.runs.find((run) => run.id === pair.a), b: set.runs.find((run) => run.id === pair.b) });
    render();
  };
  const act = (run, verb) => h("button", {
    type: "button", class: "plain-button small", text: verb === "stop" ? "Stop" : "Go on", onclick: async () => {
      await attempt(call("POST", `/api/runs/${run.id}/${verb}`));
      await refresh();
    },
  });
  const rows = set.runs.map((run) => h("tr", {},
    h("th", { scope: "row", text: run.model, dir: "auto" }),
    h("td", { text: run.with_context ? "with" : "without" }),
    h("td", {}, h("progress", { max: run.questions, value: run.answered, "aria-label": "answered" }), ` ${run.answered} / ${run.questions} `,
      run.skipped ? h("span", { class: "warning", text: `${run.skipped} skipped `, title: "Too long for this model; counted as answered with nothing" }) : null,
      ENDS[run.status] && h("span", { class: "warning", text: ENDS[run.status], title: run.error_message }),
      LIVE.includes(run.status) ? act(run, "stop") : run.status === "done" ? null : act(run, "resume")),
    h("td", { class: "number", text: run.exact === null ? "" : score(run.exact) }),
    h("td", { class: "number", text: run.f1 === null ? "" : score(run.f1) }),
    h("td", {}, run.answered ? h("a", { href: `/api/runs/${run.id}/predictions`, download: "", text: "Predictions", "aria-label": `Predictions of ${name(run)}` }) : null),
    radio(run, "a"), radio(run, "b")));
  return h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": `Runs of ${set.name}` },
    h("table", {}, h("thead", {}, h("tr", {}, ["Model", "Passages", "Answered", "EM", "F1", "", "Before", "After"].map((text) => h(text ? "th" : "td", { scope: text ? "col" : null, text })))), h("tbody", {}, rows)),
    set.runs.length > 1 ? h("p", {}, h("button", { type: "button", class: "plain-button", text: "Compare question by question", onclick: compare, "data-focus": `compare-${set.id}` })) : null);
}

const name = (run) => `${run.model} ${run.with_context ? "with" : "without"} passages`;

function difference(set, { questions, fixed, broke, a, b }) {
  const sorted = [...questions].sort((one, other) => Math.abs(other.f1) - Math.abs(one.f1));
  const rows = sorted.map((row) => h("tr", { class: row.exact > 0 ? "fixed" : row.exact < 0 ? "broke" : null },
    h("th", { scope: "row", text: row.question, dir: "auto" }),
    h("td", { text: row.golds[0] ?? "no answer", dir: "auto" }),
    h("td", { text: row.a.text || "no answer", dir: "auto" }), h("td", { text: row.b.text || "no answer", dir: "auto" }),
    h("td", { class: "number", text: signed(row.f1) }),
    h("td", { text: row.exact > 0 ? "fixed" : row.exact < 0 ? "broken" : "" })));
  const mean = questions.length ? questions.reduce((sum, row) => sum + row.f1, 0) / questions.length : 0;
  return h("section", { class: "difference", "aria-label": "Difference" },
    h("h3", { text: "Question by question" }),
    h("p", {}, `From ${name(a)} to ${name(b)}: `, h("strong", { text: `${fixed} fixed, ${broke} broken` }), `, F1 ${signed(mean)} on ${plural(questions.length, "question")}.`),
    h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": `Differences in ${set.name}` },
      h("table", {}, h("thead", {}, h("tr", {}, ["Question", "Right", "Before", "After", "F1", ""].map((text) => h(text ? "th" : "td", { scope: text ? "col" : null, text })))), h("tbody", {}, rows))));
}

$("import").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  const form = new FormData();
  form.append("file", file);
  const set = await attempt(call("POST", "/api/sets", form));
  if (!set) return;
  say(`${set.name}: ${plural(set.questions, "question")}`);
  await refresh();
});

fillIcons();
call("GET", "/api/models").then((found) => (models = found.models.filter((model) => model.state !== "unusable")), (error) => toast(error.message)).finally(refresh);
