// Elements, icons, toasts and dialogs.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  menu: "M3 6h18M3 12h18M3 18h18",
  plus: "M12 5v14M5 12h14",
  search: "M10.5 4a6.5 6.5 0 1 0 0 13a6.5 6.5 0 0 0 0-13zM15.5 15.5L20 20",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6l6 6",
  stop: "M7 7h10v10H7z",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  again: "M20 11a8 8 0 1 0-2.3 6.3M20 5v6h-6",
  up: "M7 11v9H4v-9zM7 11l4-7c2 0 2.5 1.5 2 3l-.6 2.5h5.3c1.3 0 2.1 1.2 1.7 2.4l-1.9 6.2c-.3 1-1.1 1.9-2.2 1.9H7",
  down: "M7 13V4H4v9zM7 13l4 7c2 0 2.5-1.5 2-3l-.6-2.5h5.3c1.3 0 2.1-1.2 1.7-2.4L17.5 5.9c-.3-1-1.1-1.9-2.2-1.9H7",
  left: "M14 6l-6 6l6 6",
  right: "M10 6l6 6l-6 6",
  page: "M6 3h8l4 4v14H6zM14 3v4h4M9 12h6M9 16h6",
  columns: "M4 5h16v14H4zM12 5v14",
  target: "M12 4a8 8 0 1 0 0 16a8 8 0 0 0 0-16zM12 9a3 3 0 1 0 0 6a3 3 0 0 0 0-6z",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  keys: "M3 7h18v10H3zM7 11h.01M11 11h.01M15 11h.01M8 14h8",
};

/**
 * Returns a new element.
 * @param {string} tag
 * @param {object} attributes `on…` are listeners, `class`, `text` and any other attribute; false and null are left out.
 * @param {...(Node|string|null|false)} children
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (name in element && ["value", "checked", "disabled", "hidden"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Returns an icon, hidden from screen readers: the button around it has a name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Returns a button with an icon and an accessible name. */
export function iconButton(image, name, onclick, attributes = {}) {
  return h("button", { type: "button", class: "quiet", "aria-label": name, title: name, onclick, ...attributes }, icon(image));
}

/** Adds the icons to a template's buttons. */
export function fillIcons(root = document) {
  for (const element of root.querySelectorAll("[data-icon]")) {
    if (!element.querySelector(".icon")) element.prepend(icon(element.dataset.icon));
  }
}

// The only HTML that is parsed here is rendered and sanitized by the server.
const policy = globalThis.trustedTypes?.createPolicy("babl-rendered", { createHTML: (html) => html });

/** Shows HTML that the server has rendered from Markdown and sanitized. */
export function showRendered(element, html) {
  element.innerHTML = policy ? policy.createHTML(html) : html;
  for (const table of element.querySelectorAll("table")) {
    const frame = h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
}

/** Shows a message for some seconds, with a button to undo. */
export function toast(text, undo = null) {
  const place = document.getElementById("toasts");
  const remove = () => {
    clearTimeout(timer);
    message.remove();
  };
  const button = undo && h("button", { type: "button", text: "Undo", onclick: () => (remove(), undo()) });
  const message = h("div", { class: "toast" }, h("span", { text }), button);
  place.replaceChildren(message);
  const timer = setTimeout(remove, undo ? 12000 : 5000);
}

/** Shows a dialog; resolves, once it is closed, to the value of the button that closed it ("" for Escape). */
export function show(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

/** Asks the user to confirm; resolves to whether they did. */
export async function confirmed(question, action) {
  const dialog = document.getElementById("confirm");
  dialog.querySelector("p").textContent = question;
  dialog.querySelector("[value=yes]").textContent = action;
  return (await show(dialog)) === "yes";
}

/** Opens a menu below a button: [{text, act, danger?}]; closed by Escape, a click elsewhere, or a choice. */
export function menu(button, items) {
  document.getElementById("menu")?.remove();
  const list = h("div", { id: "menu", class: "menu", role: "menu", popover: "auto" });
  for (const { text, act, danger } of items) {
    const choose = () => (list.hidePopover(), act());
    list.append(h("button", { type: "button", role: "menuitem", class: danger ? "danger" : null, text, onclick: choose }));
  }
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.children];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length].focus();
  });
  list.addEventListener("toggle", (event) => {
    if (event.newState !== "closed") return;
    if (list.contains(document.activeElement) || document.activeElement === document.body) button.focus();
    button.setAttribute("aria-expanded", "false");
    list.remove();
  });
  document.body.append(list);
  list.showPopover();
  button.setAttribute("aria-expanded", "true");
  const at = button.getBoundingClientRect();
  list.style.top = `${Math.min(at.bottom + 4, innerHeight - list.offsetHeight - 8)}px`;
  list.style.left = `${Math.max(8, Math.min(at.right - list.offsetWidth, innerWidth - list.offsetWidth - 8))}px`;
  list.firstChild.focus();
}
