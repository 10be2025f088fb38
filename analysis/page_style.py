"""The style sheet and the script of a report, as text to be put into the page."""

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5b6570; --ground: #fff; --panel: #f5f7f9;
  --line: #dde2e7; --accent: #0a5ea8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #a3adb8; --ground: #16191d;
  --panel: #1f242a; --line: #343b43; --accent: #7cc0ff; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0 auto; padding: clamp(1rem, 4vw, 3rem); max-width: 80rem; color: var(--ink);
  background: var(--ground); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .75rem; }
section { margin-top: 3rem; scroll-margin-top: 1rem; }
p, li { max-width: 46rem; }
ul { padding-left: 1.2rem; }
li + li { margin-top: .5rem; }
.finding { font-size: 1.15rem; }
.lead, .note, figcaption, caption { color: var(--faint); }
.note { border-left: 3px solid var(--accent); padding-left: .8rem; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; list-style: none; padding: 0; margin: 1rem 0 0; }
nav li + li { margin: 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--ground); }
.scroll + .scroll { margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem; position: sticky; left: 0;
  max-width: min(46rem, calc(100vw - 2.2rem)); }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { background: var(--panel); border-top: 0; padding: 0; vertical-align: bottom; line-height: 1.25; }
table:not(.sortable) thead th { padding: .4rem .6rem; }
tbody th { font-weight: 600; background: var(--ground); }
table:not(.sortable) tbody th { width: 16rem; }
.sortable tbody th { position: sticky; left: 0; box-shadow: 1px 0 0 var(--line); min-width: 8.5rem; }
.sortable td { white-space: nowrap; }
@media (min-width: 48rem) { .sortable tbody th { white-space: nowrap; } }
.number { text-align: right; }
tbody tr:hover > * { background: var(--panel); }
th button { font: inherit; font-size: .8125rem; font-weight: 600; color: inherit; background: none; border: 0;
  width: 100%; padding: .55rem .6rem; text-align: inherit; cursor: pointer;
  text-decoration: underline dotted var(--faint); text-underline-offset: .25em; }
th button:hover { color: var(--accent); }
th button::after { font-size: .85em; }
th[aria-sort=ascending] button::after { content: "\\00a0\\2191"; }
th[aria-sort=descending] button::after { content: "\\00a0\\2193"; }
.bad { color: var(--bad); font-weight: 600; }
.code code { user-select: all; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
small { display: block; color: var(--faint); font-weight: 400; width: 16rem; white-space: normal;
  overflow-wrap: anywhere; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
figure { margin: 0 0 2.5rem; }
.figures { display: grid; gap: 1rem 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
figure img.samples { image-rendering: pixelated; }
figure img { display: block; width: 100%; max-width: 44rem; height: auto; }
figcaption { font-size: .9rem; margin-top: .5rem; max-width: 44rem; }
figcaption strong { color: var(--ink); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media print { nav, th button::after { display: none; } .scroll { overflow: visible; border: 0; }
  section { break-inside: avoid-page; } }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1, isNumber = head.classList.contains("number");
    const compare = (a, b) => {
      const [x, y] = [a.cells[index].dataset.sort, b.cells[index].dataset.sort];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is missing stays last
      return sign * (isNumber ? x - y : x.localeCompare(y, "en", {numeric: true}));
    };
    body.append(...[...body.rows].sort(compare));
    document.getElementById("announcement").textContent =
      `Sorted by ${head.textContent.trim()}, ${order}.`;
  }));
}
"""
