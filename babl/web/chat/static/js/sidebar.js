// The list of conversations: its pages, search, and a menu for each.

import { call } from "./api.js";
import { confirmed, h, iconButton, menu, toast } from "./dom.js";
import { when } from "./text.js";

const $ = (id) => document.getElementById(id);
const EMPTY = { active: "No conversations yet.", archived: "Nothing is archived.", trash: "The trash is empty." };

export class Sidebar {
  /** @param {object} acts open(id, message), changed(id), gone(id), current(): id, fail(error) */
  constructor(acts) {
    this.acts = acts;
    this.kind = "active";
    this.rows = [];
    this.next = null;
    $("search").addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.refresh(), 150);
    });
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") event.preventDefault(), $("list").querySelector("a")?.focus();
    });
    for (const tab of document.querySelectorAll("[data-list]")) {
      tab.addEventListener("click", () => {
        this.kind = tab.dataset.list;
        for (const each of document.querySelectorAll("[data-list]")) each.setAttribute("aria-pressed", String(each === tab));
        $("search").value = "";
        this.refresh();
      });
    }
    $("list").addEventListener("scroll", () => {
      const { scrollTop, clientHeight, scrollHeight } = $("list");
      if (scrollHeight - scrollTop - clientHeight < 300) this.#more();
    });
    $("open-side").addEventListener("click", () => this.toggle(true));
    $("close-side").addEventListener("click", () => this.toggle(false));
    $("side").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && document.body.classList.contains("with-side")) event.stopPropagation(), this.toggle(false);
    });
  }

  /** Opens or closes the list over a narrow page. */
  toggle(open) {
    document.body.classList.toggle("with-side", open);
    $("open-side").setAttribute("aria-expanded", String(open));
    if (open) $("search").focus();
    else if ($("side").contains(document.activeElement)) $("open-side").focus();
  }

  /** Fetches and shows the list. */
  async refresh() {
    const query = $("search").value.trim();
    const asked = (this.asked = Symbol(query));
    try {
      const found = await call("GET", query ? `/api/conversations?q=${encodeURIComponent(query)}` : `/api/conversations?kind=${this.kind}`);
      if (asked !== this.asked) return;
      [this.rows, this.next, this.query] = [found.conversations, found.next, query];
      this.render();
    } catch (error) {
      this.acts.fail(error);
    }
  }

  async #more() {
    if (!this.next || this.busy) return;
    this.busy = true;
    try {
      const found = await call("GET", `/api/conversations?kind=${this.kind}&before=${encodeURIComponent(this.next)}`);
      const known = new Set(this.rows.map((row) => row.id));
      this.rows.push(...found.conversations.filter((row) => !known.has(row.id)));
      this.next = found.next;
      this.render();
    } catch (error) {
      this.acts.fail(error);
    } finally {
      this.busy = false;
    }
  }

  render() {
    const rows = this.rows.map((row) => this.#row(row));
    const nothing = h("li", { class: "note", text: this.query ? `No conversation has “${this.query}”.` : EMPTY[this.kind] });
    const { scrollTop } = $("list");
    $("list").replaceChildren(...(rows.length ? rows : [nothing]));
    $("list").scrollTop = scrollTop;
  }

  #row(row) {
    const current = row.id === this.acts.current();
    const open = (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
      event.preventDefault();
      this.toggle(false);
      this.acts.open(row.id, row.message);
    };
    const title = row.title || "New conversation";
    const link = h("a", { href: `/c/${row.id}/${row.message ? `#m-${row.message}` : ""}`, "aria-current": current ? "page" : null, onclick: open },
      h("span", { dir: "auto" }, ...(this.query ? marked(title, this.query) : [title])),
      row.excerpt && row.message && row.excerpt !== title ? h("small", { dir: "auto" }, ...marked(row.excerpt, this.query)) : h("small", {}, h("time", { datetime: row.updated, text: when(row.updated) })));
    const button = iconButton("more", `Actions for ${title}`, () => menu(button, this.items(row)), { "aria-haspopup": "menu", "aria-expanded": "false" });
    return h("li", {}, link, button);
  }

  /** Returns the entries of a conversation's menu. */
  items(row) {
    if (row.deleted) {
      return [
        { text: "Restore", act: () => this.change(row, { deleted: false }) },
        { text: "Delete permanently", danger: true, act: () => this.#purge(row) },
      ];
    }
    return [
      { text: "Rename", act: () => this.acts.rename(row) },
      { text: "Export as JSON", act: () => location.assign(`/api/conversations/${row.id}/export?format=json`) },
      { text: "Export as Markdown", act: () => location.assign(`/api/conversations/${row.id}/export?format=md`) },
      { text: row.archived ? "Unarchive" : "Archive", act: () => this.change(row, { archived: !row.archived }) },
      { text: "Delete", danger: true, act: () => this.change(row, { deleted: true }) },
    ];
  }

  /** Archives, trashes or restores a conversation, with a button to undo. */
  async change(row, how) {
    const [[name, value]] = Object.entries(how);
    const said = { archived: ["Archived", "Unarchived"], deleted: ["Moved to the trash", "Restored"] }[name];
    try {
      await call("PATCH", `/api/conversations/${row.id}`, how);
      this.acts.changed(row.id);
      if (value) this.acts.gone(row.id);
      toast(said[value ? 0 : 1], async () => {
        await call("PATCH", `/api/conversations/${row.id}`, { [name]: !value }).catch(this.acts.fail);
        this.acts.changed(row.id);
        await this.refresh();
      });
      await this.refresh();
    } catch (error) {
      this.acts.fail(error);
    }
  }

  async #purge(row) {
    if (!(await confirmed(`“${row.title || "New conversation"}” and its messages will be gone for good.`, "Delete permanently"))) return;
    try {
      await call("DELETE", `/api/conversations/${row.id}`);
      this.acts.changed(row.id);
      this.acts.gone(row.id);
      await this.refresh();
    } catch (error) {
      this.acts.fail(error);
    }
  }
}

/** Returns a text as nodes, with the words of the search marked. */
function marked(text, query) {
  const words = query.match(/[\p{L}\p{N}_]+/gu) ?? [];
  if (!words.length) return [text];
  const parts = text.split(new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "giu"));
  return parts.map((part, i) => (i % 2 ? h("mark", { text: part }) : part));
}
