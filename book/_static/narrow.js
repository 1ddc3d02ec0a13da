// On a narrow page nothing needs sideways scrolling: a table that is too wide becomes one card per row, with the column's
// header before each value, and a formula that is too wide becomes smaller.
"use strict";

const SMALLEST = 0.6; // of the lettering of the text

function header(table) {
  const rows = [...table.querySelectorAll("thead tr")];
  // pandas has the name of the index in a row of its own.
  const columns = rows.map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
  return (columns[0] || []).map((name, i) => name || columns[1]?.[i] || "");
}

function fitTable(table) {
  table.classList.remove("cards");
  const room = table.parentElement;
  if (innerWidth > 576 || (table.scrollWidth <= room.clientWidth + 1 && room.scrollWidth <= room.clientWidth + 1)) return;
  const names = header(table);
  if (!names.length) return;
  for (const row of table.querySelectorAll("tbody tr")) [...row.cells].forEach((cell, i) => (cell.dataset.column = names[i] || ""));
  table.classList.add("cards");
}

function fitFormula(formula) {
  const size = (formula.dataset.size ??= formula.style.fontSize || "100%"); // as MathJax has set it
  formula.style.fontSize = size;
  const inner = formula.querySelector("mjx-math") || formula;
  const ratio = formula.clientWidth / inner.scrollWidth;
  if (ratio < 1) formula.style.fontSize = `${Math.max(SMALLEST, ratio * 0.98) * parseFloat(size)}%`;
}

function fit() {
  document.querySelectorAll(".bd-article table").forEach(fitTable);
  document.querySelectorAll(".bd-article mjx-container[display='true']").forEach(fitFormula);
}

let width = 0;
addEventListener("resize", () => {
  if (innerWidth !== width) fit();
  width = innerWidth;
});
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  fit();
  width = innerWidth;
});
