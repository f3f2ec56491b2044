// Sets the theme before the first paint: light, dark, or the system's. Not a module, so that nothing flashes.
(() => {
  const NAMES = { "": "as the system", light: "light", dark: "dark" };
  const order = Object.keys(NAMES);
  const read = () => {
    const kept = localStorage.getItem("babl:theme") ?? "";
    return kept in NAMES ? kept : "";
  };
  const apply = () => {
    if (read()) document.documentElement.dataset.theme = read();
    else delete document.documentElement.dataset.theme;
    const button = document.getElementById("theme");
    if (button) button.title = `Colours: ${NAMES[read()]}`;
    button?.setAttribute("aria-label", `Colours: ${NAMES[read()]}`);
  };
  apply();
  addEventListener("storage", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme")?.addEventListener("click", () => {
      localStorage.setItem("babl:theme", order[(order.indexOf(read()) + 1) % order.length]);
      apply();
    });
  });
})();
