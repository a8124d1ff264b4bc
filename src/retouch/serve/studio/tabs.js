/** The tabs pattern of ARIA: arrow keys move, the panel follows, the address remembers. */

/** @param {HTMLElement} list of role tablist @param {(name: string) => void} shown called with the tab's data-tab */
export function tabs(list, shown) {
  const all = [...list.querySelectorAll("[role=tab]")];
  const select = (tab, focus = false) => {
    for (const each of all) {
      const on = each === tab;
      each.setAttribute("aria-selected", String(on));
      each.tabIndex = on ? 0 : -1;
      document.getElementById(each.getAttribute("aria-controls")).hidden = !on;
    }
    if (focus) tab.focus();
    history.replaceState(null, "", tab === all[0] ? location.pathname + location.search : `#${tab.dataset.tab}`);
    shown(tab.dataset.tab);
  };
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) select(tab);
  });
  list.addEventListener("keydown", (event) => {
    const at = all.indexOf(event.target);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || at < 0) return;
    event.preventDefault();
    select(all[(next + all.length) % all.length], true);
  });
  const named = () => all.find((tab) => `#${tab.dataset.tab}` === location.hash) ?? all[0];
  window.addEventListener("hashchange", () => select(named()));
  select(named());
  return { select: (name) => select(all.find((tab) => tab.dataset.tab === name)) };
}
