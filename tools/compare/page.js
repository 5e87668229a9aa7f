"use strict";
// A click on a column's name sorts the table by it; a second click reverses the order. Numbers at
// the beginning of cells are compared as numbers, other cells as texts; empty cells come last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const compareTexts = new Intl.Collator("en", {numeric: true}).compare;
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const text = (row) => row.cells[column].textContent;
    const compare = (a, b) => (a === "") - (b === "")
      || sign * ((parseFloat(a) - parseFloat(b)) || compareTexts(a, b));
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(text(a), text(b)));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  }));
}
