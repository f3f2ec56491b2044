// The chat page: its state, the components that show it, and the actions that change it.

import { call, Refused, Stream } from "./api.js";
import { Composer } from "./composer.js";
import { fillIcons, menu, show, toast } from "./dom.js";
import { Models } from "./models.js";
import { askOptions, changed } from "./options.js";
import { Panel } from "./panel.js";
import { store } from "./passages.js";
import * as shortcuts from "./shortcuts.js";
import { Sidebar } from "./sidebar.js";
import { answers, EMPTY, find, isLive, reduce, summary } from "./state.js";
import { newId } from "./text.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const EXAMPLE = {
  title: "The lighthouse of Varn",
  text: "The lighthouse of Varn stands on the northern cape. Ines Okafor built it in 1874, after forty ships had been lost there in ten years. Its lamp burned whale oil until 1911, when the keeper's daughter, Mara Lind, brought electric light from the mill. Today nobody lives in the tower, and swifts nest under its roof.",
  question: "Who brought electric light to the lighthouse?",
};
const others = new BroadcastChannel("babl"); // tabs of this browser
let state = EMPTY;
let fresh = { system_prompt: "", settings: {} }; // of a conversation that is not stored yet
let seenPassage = null;
let opening = null; // the page requested last
let sending = false;
let loading = false;
let retry = null;

function dispatch(action) {
  const before = state;
  state = reduce(state, action);
  if (state !== before) render();
  if (state.gap) refresh();
}

const how = () => state.conversation ?? fresh;

function render() {
  transcript.render(state);
  const { conversation } = state;
  const title = conversation?.title || "New conversation";
  if ($("title").textContent !== title) $("title").textContent = title;
  document.title = `${title} - Babl`;
  $("welcome").hidden = state.messages.length > 0;
  $("earlier").hidden = !state.more;
  const answering = Object.keys(state.live).length > 0;
  $("stop").hidden = !answering;
  $("send").hidden = answering;
  $("open-settings").classList.toggle("changed", changed(how()) > 0);
  $("conversation-menu").hidden = !conversation;
  $("in-trash").hidden = !conversation?.deleted;
  say(summary(state));
}

function say(text, problem = false) {
  const line = $("status");
  if (line.textContent !== text) line.textContent = text;
  line.classList.toggle("warning", problem || text.startsWith("Not "));
}

function fail(error) {
  if (!(error instanceof Refused)) throw error;
  const wait = error.retryAfter ? ` Try again in ${Math.ceil(error.retryAfter)} s.` : "";
  toast(error.message + wait);
}

const attempt = async (promise) => {
  try {
    return await promise;
  } catch (error) {
    fail(error);
    return null;
  }
};

// Showing

/** Fetches and shows the conversation, and follows its answers that are being written. */
async function refresh() {
  const id = state.conversation?.id;
  if (!id) return;
  try {
    const snapshot = await call("GET", `/api/conversations/${id}`);
    if (state.conversation?.id !== id) return;
    dispatch({ type: "snapshot", snapshot });
    follow();
  } catch (error) {
    if (error.status === 404) return gone();
    if (error.status === 401) return fail(error);
    say("The connection is lost; trying again", true);
    clearTimeout(retry);
    retry = setTimeout(refresh, 2000);
  }
}

function follow() {
  stream.follow(Object.keys(state.live));
}

/** Opens a conversation, and scrolls to a message if one is given. */
async function open(id, message = null, push = true) {
  const wanted = (opening = Symbol(id));
  stream.close();
  try {
    let snapshot = await call("GET", `/api/conversations/${id}`);
    const has = (one) => snapshot.messages.some((each) => each.id === one || each.columns?.some((column) => column.id === one));
    if (message && !has(message) && !(await pagesUp(id, snapshot, message))) {
      await call("PATCH", `/api/conversations/${id}`, { leaf: message }); // it may be on another branch
      snapshot = await call("GET", `/api/conversations/${id}`);
      await pagesUp(id, snapshot, message);
    }
    if (wanted !== opening) return;
    if (push && location.pathname !== `/c/${id}/`) history.pushState({}, "", `/c/${id}/`);
    const { conversation } = state;
    if (conversation && conversation.id !== id) dispatch({ type: "clear" });
    dispatch({ type: "snapshot", snapshot });
    models.choose(snapshot.model);
    composer.restore(id, snapshot.passage);
    follow();
    sidebar.render();
    await showPassage();
    if (message) point(message);
    else transcript.toEnd();
  } catch (error) {
    if (error.status === 404) leave();
    fail(error);
  }
}

/** Loads earlier pages until the message is there; returns whether it is on the branch shown. */
async function pagesUp(id, snapshot, message) {
  const above = [];
  let { more, messages } = snapshot;
  while (more) {
    const page = await call("GET", `/api/conversations/${id}/messages?before=${messages[0].id}`);
    above.unshift(...page.messages);
    ({ more, messages } = page);
    if (page.messages.some((each) => each.id === message || each.columns?.some((column) => column.id === message))) {
      snapshot.messages.unshift(...above);
      snapshot.more = more;
      return true;
    }
  }
  return snapshot.messages.some((each) => each.id === message || each.columns?.some((column) => column.id === message));
}

function point(message) {
  const shown = state.messages.find((each) => each.id === message || each.columns?.some((column) => column.id === message));
  const element = shown && $(`m-${shown.id}`);
  if (!element) return;
  transcript.atEnd = false;
  element.scrollIntoView({ block: "center" });
  element.focus({ preventScroll: true });
}

/** Shows an empty page for a new conversation. */
function leave(push = true) {
  opening = null;
  stream.close();
  if (push && location.pathname !== "/") history.pushState({}, "", "/");
  dispatch({ type: "clear" });
  fresh = { system_prompt: "", settings: {} };
  composer.restore(null);
  panel.clear();
  panel.close();
  seenPassage = null;
  if (composer.draft.passage) attempt(panel.show(composer.draft.passage));
  sidebar.render();
  render();
  if (push) $("content").focus();
}

/** Handles the deletion of the conversation shown; the draft moves to a new one. */
function gone() {
  const { content } = composer.draft;
  composer.forget(composer.conversation);
  leave();
  if (!content.trim()) return;
  composer.begin(content);
  toast("This conversation was deleted permanently. What you wrote is still here.");
}

/** Shows in the panel the passage of the last answer, or the one attached to the next question. */
async function showPassage() {
  const all = [...answers(state)].filter((answer) => answer.passage);
  const last = all.filter((answer) => answer.span).at(-1) ?? all.at(-1);
  const attached = composer.draft.passage;
  const answer = last && (!attached || last.passage === attached) ? last : null;
  const id = answer?.passage ?? attached;
  if (!id) {
    panel.clear();
    return panel.close();
  }
  await attempt(panel.show(id, answer));
  if (seenPassage !== id && matchMedia("(min-width: 1100px)").matches) panel.open();
  seenPassage = id;
}

async function earlier() {
  const first = state.messages[0];
  const page = first && (await attempt(call("GET", `/api/conversations/${state.conversation.id}/messages?before=${first.id}`)));
  if (page && state.messages[0] === first) dispatch({ type: "earlier", ...page });
}

// Actions

async function send() {
  if (Object.keys(state.live).length || !composer.draft.content.trim() || sending) return;
  if (!models.name) return models.known ? models.open() : say("The engine is starting; what you wrote stays here", true);
  const page = opening;
  const { conversation, draft } = composer;
  busy(true);
  try {
    const body = composer.request();
    if (!conversation) {
      await call("POST", "/api/conversations", { id: draft.conversation, model: models.name, passage: draft.passage, ...fresh });
    }
    const id = draft.conversation;
    try {
      await call("POST", `/api/conversations/${id}/messages`, body);
    } catch (error) {
      if (!error.data?.question) throw error;
      fail(error); // it is stored, although the engine is full
    }
    if (page !== opening) { // another conversation is shown by now
      composer.forget(conversation);
      return sidebar.refresh();
    }
    composer.sent();
    if (!conversation) history.pushState({}, "", `/c/${id}/`);
    await attempt(took(id));
  } catch (error) {
    fail(error);
    if (error.status === 409) await refresh(); // another tab has changed it
    say(`Not ${error.code === "not_saved" ? "saved" : "sent"}. What you wrote is still here.`, true);
  } finally {
    busy(false);
  }
}

function busy(now) {
  sending = now;
  $("content").readOnly = now;
  if (now) say("Sending");
}

/** Shows a question that was just sent, and its answers. */
async function took(id) {
  const snapshot = await call("GET", `/api/conversations/${id}`);
  composer.conversation = id;
  composer.draft.conversation = id;
  busy(false); // the next question may be typed at once
  dispatch({ type: "snapshot", snapshot });
  follow();
  transcript.toEnd();
  others.postMessage(id);
  showPassage().then(settled);
  sidebar.refresh();
}

const acts = {
  edit: (question) => composer.edit(question),
  async again(answer) {
    const settings = { ...how().settings };
    if (settings.temperature) settings.seed = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
    const body = { client_id: newId(), model: models.name || null, settings };
    try {
      await call("POST", `/api/messages/${answer.id}/again`, body);
    } catch (error) {
      fail(error);
      if (!error.data?.question) return;
    }
    await attempt(took(state.conversation.id));
  },
  stop: (answer) => attempt(call("POST", `/api/messages/${answer.id}/stop`)),
  stopAll: () => Object.keys(state.live).forEach((id) => acts.stop({ id })),
  async show(answer) {
    await attempt(panel.show(answer.passage, answer.id ? answer : null));
    panel.open();
    $("passage-text").querySelector("mark")?.scrollIntoView({ block: "center" });
    $("passage-text").focus();
  },
  goTo: (id) => showBranch(id),
  carryOn: (answer) => showBranch(answer.id),
  async praise(answer) {
    if (answer.feedback?.good) {
      if ((await attempt(call("DELETE", `/api/messages/${answer.id}/feedback`))) !== null) dispatch({ type: "feedback", g: answer.id, feedback: null });
    } else await judge(answer, { good: true });
  },
  async correct(answer) {
    if (!(await judge(answer, { good: false, span: answer.feedback?.span && [answer.feedback.span.start, answer.feedback.span.end], no_answer: answer.feedback?.no_answer ?? false }))) return;
    if (answer.passage) await panel.correct(find(state, answer.id));
  },
  async copied(text) {
    await (navigator.clipboard?.writeText(text) ?? Promise.reject()).then(() => toast("Copied"), () => toast("The browser does not let this page copy."));
  },
};

async function showBranch(id) {
  if (await attempt(call("PATCH", `/api/conversations/${state.conversation.id}`, { leaf: id }))) {
    await refresh();
    point(id);
    await showPassage();
  }
}

async function judge(answer, judgement) {
  const feedback = await attempt(call("PUT", `/api/messages/${answer.id}/feedback`, judgement));
  if (feedback) dispatch({ type: "feedback", g: answer.id, feedback });
  return feedback;
}

async function change(fields) {
  if (!state.conversation) {
    fresh = { ...fresh, ...fields };
    return render();
  }
  dispatch({ type: "conversation", conversation: await call("PATCH", `/api/conversations/${state.conversation.id}`, fields) });
  others.postMessage(state.conversation.id);
  await sidebar.refresh();
}

async function rename(row) {
  const dialog = $("rename-dialog");
  $("rename-title").value = row.title;
  $("rename-title").select();
  if ((await show(dialog)) !== "save") return;
  const conversation = await attempt(call("PATCH", `/api/conversations/${row.id}`, { title: $("rename-title").value }));
  if (!conversation) return;
  dispatch({ type: "conversation", conversation });
  others.postMessage(row.id);
  await sidebar.refresh();
}

const options = () => askOptions(how(), change);
const last = (role) => state.messages.findLast((message) => message.role === role);

// Wiring

fillIcons();
const transcript = new Transcript($("log"), $("scroll"), acts);
const panel = new Panel(judge);
const models = new Models((model) => {
  composer.renderModels();
  composer.count();
  if (state.conversation) attempt(change({ model }));
});
const sidebar = new Sidebar({ open, rename, fail, changed: (id) => others.postMessage(id), gone: (id) => id === state.conversation?.id && leave(), current: () => state.conversation?.id });
const composer = new Composer({
  send,
  fail,
  models: () => models,
  conversation: () => state.conversation,
  parent: () => state.messages.at(-1)?.id ?? null,
  settings: () => how().settings,
  attached: async (passage) => {
    if (state.conversation) await attempt(change({ passage }));
    await showPassage();
  },
});
const stream = new Stream(
  (kind, data) => {
    dispatch({ type: kind, ...data });
    if (kind !== "done") return;
    others.postMessage(state.conversation?.id);
    settled();
  },
  () => refresh(),
  () => say("The connection is lost; trying again", true),
);

/** Updates the panel and the models once all answers have ended. */
async function settled() {
  if (Object.keys(state.live).length) return;
  await showPassage();
  const asked = new Set([...answers(state)].slice(-8).map((answer) => answer.model));
  if (models.all.some((model) => asked.has(model.name) && model.state !== "loaded")) await models.refresh().catch(() => {});
}

$("new").addEventListener("click", (event) => {
  if (event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  sidebar.toggle(false);
  leave();
});
$("stop").addEventListener("click", () => acts.stopAll());
$("earlier").addEventListener("click", earlier);
$("scroll").addEventListener("scroll", () => {
  if ($("scroll").scrollTop < 120 && state.more && !loading) (loading = true), earlier().finally(() => (loading = false));
});
$("open-settings").addEventListener("click", options);
$("take-back").addEventListener("click", () => attempt(change({ deleted: false })));
$("conversation-menu").addEventListener("click", () => menu($("conversation-menu"), sidebar.items(state.conversation)));
$("welcome-passage").addEventListener("click", () => composer.attach());
$("welcome-compare").addEventListener("click", () => composer.toggleCompare(true));
$("welcome-example").addEventListener("click", async () => {
  try {
    composer.use(await store(EXAMPLE.text, EXAMPLE.title));
    if (!composer.draft.content) composer.begin(EXAMPLE.question);
    $("content").focus();
  } catch (error) {
    toast(error.message);
  }
});
addEventListener("popstate", () => route(false));
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open], [popover]:popover-open")) return;
  if (composer.draft.edits) composer.cancelEdit();
  else acts.stopAll();
});
others.addEventListener("message", ({ data }) => {
  if (data === state.conversation?.id) refresh();
  sidebar.refresh();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && Object.keys(state.live).length && !stream.following) refresh();
});
shortcuts.listen([
  ["/", "Search", () => (sidebar.toggle(matchMedia("(max-width: 800px)").matches), $("search").focus())],
  ["n", "New conversation", () => leave()],
  ["i", "Write", () => $("content").focus()],
  ["p", "Attach a passage", () => composer.attach()],
  ["v", "Show or hide the passage", () => $("open-passage").click()],
  ["c", "Compare", () => composer.toggleCompare()],
  ["g", "Give the right answer", () => composer.toggleGold()],
  ["m", "Models", () => models.open()],
  ["s", "Answer settings", options],
  ["e", "Edit the last question", () => last("user") && composer.edit(last("user"))],
  ["r", "Answer again", () => last("assistant") && !isLive(last("assistant")) && acts.again(last("assistant"))],
  ["[", "Previous branch", () => branch(-1)],
  ["]", "Next branch", () => branch(1)],
  ["?", "This list", shortcuts.open],
]);

/** Shows the branch beside the current one, at the last fork. */
function branch(step) {
  const fork = state.messages.findLast((message) => message.siblings?.length > 1);
  const beside = fork?.siblings[fork.siblings.indexOf(fork.id) + step];
  if (beside) showBranch(beside);
}

function route(push) {
  const id = location.pathname.match(/^\/c\/([\w-]+)\/$/)?.[1];
  const message = location.hash.match(/^#m-([\w-]+)$/)?.[1] ?? null;
  return id ? open(id, message, push) : leave(push);
}

sidebar.refresh();
models.refresh().then(() => {
  composer.renderModels();
  composer.count();
}, fail);
route(false);
if (matchMedia("(min-width: 800px)").matches) $("content").focus();
