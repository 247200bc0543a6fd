"use strict";
(() => {
  const table = document.getElementById("cases");
  const body = table.tBodies[0];
  const rows = () => [...body.rows];
  let current = null;

  const go = (row, focus = true) => {
    if (!row) return;
    if (current) { current.removeAttribute("aria-current"); current.tabIndex = -1; }
    current = row;
    row.setAttribute("aria-current", "true");
    row.tabIndex = 0;
    if (focus) { row.focus({preventScroll: true}); row.scrollIntoView({block: "nearest"}); }
  };
  const step = by => {
    const all = rows();
    const place = all.indexOf(current) + by;
    go(all[Math.max(0, Math.min(all.length - 1, place))]);
  };

  // What has no value comes last, whichever way it goes.
  const compare = (key, down) => (one, other) => {
    const [a, b] = [one.dataset[key], other.dataset[key]];
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = key === "name" ? a.localeCompare(b, "en", {numeric: true}) : a - b;
    return down ? -order : order;
  };
  const sort = key => {
    const heads = [...table.tHead.querySelectorAll("th[data-key]")];
    const head = heads.find(one => one.dataset.key === key);
    if (!head) return;
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : key !== "name";  // the worst cases first
    heads.forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows().sort(compare(key, down)));
    go(rows()[0], false);
    body.rows[0]?.scrollIntoView({block: "nearest"});
  };

  const keys = {
    ArrowDown: () => step(1), j: () => step(1),
    ArrowUp: () => step(-1), k: () => step(-1),
    Home: () => go(rows()[0]), End: () => go(rows().at(-1)),
    m: () => document.body.classList.toggle("no-map"),
    l: () => document.body.classList.toggle("large"),
    e: () => sort("error"), u: () => sort("uncertainty"),
    p: () => sort("probability"), n: () => sort("name"),
  };
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = keys[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  table.tHead.addEventListener("click", event => {
    const head = event.target.closest("th[data-key]");
    if (head) sort(head.dataset.key);
  });
  body.addEventListener("click", event => go(event.target.closest("tr")));
  go(rows()[0], false);
})();
