"use strict";
// A click on a column's name sorts the table by it; a second click reverses the order. Empty cells come last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const compare = new Intl.Collator("en", {numeric: true}).compare;
  const value = (row, column) => row.cells[column]?.dataset.value ?? row.cells[column]?.textContent ?? "";
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const order = (a, b) => (a === "") - (b === "") || sign * (Number(a) - Number(b) || compare(a, b));
    const rows = [...table.tBodies[0].rows].sort((a, b) => order(value(a, column), value(b, column)));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  }));
}
