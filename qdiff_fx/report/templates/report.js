"use strict";

// Tables: the head's buttons sort; a search field, one select a facet and a chosen block filter.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : typeof a === typeof b
        ? a.localeCompare(b, "en", { numeric: true })
        : typeof a === "number" ? -1 : 1; // numbers before text, such as a dash
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.disabled = false;
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => direction * compare(key(a, column), key(b, column))));
    });
  });
}

function filterable(bar) {
  const rows = [...document.getElementById(bar.dataset.for).tBodies[0].rows];
  const search = bar.querySelector("input");
  const selects = [...bar.querySelectorAll("select")];
  const output = bar.querySelector("output");
  let block = "";
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const visible =
        words.every((word) => text.includes(word)) &&
        selects.every((select) => !select.value || row.getAttribute("data-facet-" + select.dataset.facet) === select.value) &&
        (!block || row.dataset.block === block);
      row.hidden = !visible;
      shown += visible;
    }
    output.textContent = `${shown} of ${rows.length} rows` + (block ? `, block ${block}` : "");
  };
  const reset = (chosen) => {
    search.value = "";
    selects.forEach((select) => { select.value = ""; });
    block = chosen;
    apply();
  };
  bar.addEventListener("input", apply);
  bar.querySelector(".reset").addEventListener("click", () => reset(""));
  bar.hidden = false;
  apply();
  return reset;
}

// Pictures: every network's strip beside, under a slider over, or subtracted from the first one's.
function comparable(panel) {
  const modes = panel.querySelector(".modes");
  if (!modes) return;
  const reference = panel.querySelector("img.reference");
  for (const strip of panel.querySelectorAll(".strip")) {
    strip.style.setProperty("--period", strip.dataset.period + "%");
    if (strip.contains(reference)) continue;
    const over = reference.cloneNode();
    over.className = "over";
    over.alt = "";
    strip.append(over);
  }
  const amount = modes.querySelector(".amount");
  const apply = () => {
    const mode = modes.querySelector("input:checked").value;
    const value = Number(amount.querySelector("input").value);
    panel.dataset.mode = mode;
    amount.hidden = mode === "stacked";
    amount.firstElementChild.textContent = mode === "slider" ? "full precision up to here" : "brighter";
    panel.style.setProperty("--cut", value / 100);
    panel.style.setProperty("--gain", 1 + value / 6);
  };
  modes.addEventListener("input", apply);
  modes.hidden = false;
  apply();
}

// Figures: what a mark stands for is shown on hover and on focus; arrow keys step through the marks.
function explained(figure) {
  const tip = document.getElementById("tip");
  const marks = [...figure.querySelectorAll(".hit")];
  let current = null;
  const show = (mark) => {
    if (current) current.classList.remove("on");
    current = mark;
    tip.hidden = !mark;
    if (!mark) return;
    mark.classList.add("on");
    tip.textContent = mark.dataset.tip;
    const box = mark.getBoundingClientRect();
    const left = Math.min(box.left + box.width / 2 + 12, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
    tip.style.top = `${Math.max(8, box.top - tip.offsetHeight - 6) + window.scrollY}px`;
  };
  for (const mark of marks) {
    const title = mark.querySelector("title"); // the browser's own tooltip, where no script runs
    mark.dataset.tip = title.textContent;
    mark.setAttribute("aria-label", title.textContent);
    title.remove();
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("focus", () => show(mark));
  }
  figure.addEventListener("pointerleave", () => show(null));
  figure.addEventListener("focusout", () => show(null));
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") show(null);
    if (!step || !marks.length) return;
    event.preventDefault();
    const next = current ? marks.indexOf(current) + step : 0;
    show(marks[(next + marks.length) % marks.length]);
  });
}

for (const table of document.querySelectorAll("table")) sortable(table);
const resets = new Map([...document.querySelectorAll(".filters")].map((bar) => [bar.dataset.for, filterable(bar)]));
for (const link of document.querySelectorAll("a[data-block]")) {
  link.addEventListener("click", () => resets.get("layer-table")?.(link.dataset.block));
}
for (const panel of document.querySelectorAll(".strips")) comparable(panel);
for (const figure of document.querySelectorAll("svg.chart")) explained(figure);
