"use strict";
// The tables: headings sort; the table of runs is also filtered by the form above it and shown a page at a time.

const TYPING_PAUSE_MS = 120;
const collator = new Intl.Collator("en", {numeric: true});

class SortableTable {
  constructor(element) {
    this.body = element.tBodies[0];
    this.rows = [...this.body.rows];  // all, as sorted
    this.passing = this.rows;  // those that the filter lets through
    this.pageSize = Number(element.dataset.pageSize) || this.rows.length;
    this.pager = document.getElementById(`${element.id}-pager`);
    const heads = [...element.tHead.rows[0].cells];
    heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => this.sort(heads, index)));
    if (this.pager) this.startPager();
  }

  sort(heads, index) {
    const head = heads[index], order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1, isNumber = head.classList.contains("number");
    const compare = isNumber ? (x, y) => x - y : collator.compare;
    const keys = new Map(this.rows.map(row => [row, row.cells[index].dataset.sort]));
    const inOrder = (a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // what is missing stays last
      return sign * compare(x, y);
    };
    this.rows.sort(inOrder);
    this.passing = this.passing === this.rows ? this.rows : this.passing.sort(inOrder);
    this.show(0);
    announce(`Sorted by ${head.textContent.trim()}, ${order}.`);
  }

  filter(passes) {
    this.passing = this.rows.filter(passes);
    this.show(0);
  }

  show(page) {
    this.page = page;
    const size = this.pageSize, count = Math.max(1, Math.ceil(this.passing.length / size));
    this.body.replaceChildren(...this.passing.slice(page * size, page * size + size));
    if (!this.pager) return;
    this.pager.hidden = count <= 1;
    this.pager.querySelector("span").textContent = `Page ${page + 1} of ${count}`;
    const [previous, next] = this.pager.querySelectorAll("button");
    previous.disabled = page === 0;
    next.disabled = page >= count - 1;
  }

  startPager() {
    const [previous, next] = this.pager.querySelectorAll("button");
    const turn = by => {
      this.show(this.page + by);
      announce(this.pager.querySelector("span").textContent);
    };
    previous.addEventListener("click", () => turn(-1));
    next.addEventListener("click", () => turn(1));
    // Paper has no buttons: all rows are printed.
    addEventListener("beforeprint", () => this.body.replaceChildren(...this.passing));
    addEventListener("afterprint", () => this.show(this.page));
    this.show(0);
  }
}

function startFilter(form, table) {
  const search = form.elements.search, choices = [...form.querySelectorAll("select")];
  const count = form.querySelector("output"), places = new Map(table.rows.map((row, index) => [row, index]));
  // Not the code and the command: every command has "snell" in it.
  const searched = row => [...row.cells].filter(cell => !cell.classList.contains("code")).map(cell => cell.textContent);
  const texts = new Map(table.rows.map(row => [row, searched(row).join(" ").toLowerCase()]));
  const tell = () => {
    const [shown, all] = [table.passing.length, table.rows.length].map(number => number.toLocaleString("en"));
    count.textContent = `${shown} of ${all} runs shown`;
  };
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = choices.filter(choice => choice.value).map(choice => [choice.name, choice.value]);
    table.filter(row => {
      const facets = data.runs[places.get(row)].facets;
      return wanted.every(([name, value]) => facets[name] === value)
        && words.every(word => texts.get(row).includes(word));
    });
    tell();
    document.dispatchEvent(new CustomEvent("runs-shown", {detail: table.passing.map(row => places.get(row))}));
  };
  let pause;
  search.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(apply, TYPING_PAUSE_MS);
  });
  choices.forEach(choice => choice.addEventListener("change", apply));
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));  // the fields are empty only after the event
  form.hidden = false;
  tell();
}

for (const element of document.querySelectorAll("table.sortable")) {
  const table = new SortableTable(element);
  const form = document.querySelector(`form[data-filters="${element.id}"]`);
  if (form) startFilter(form, table);
}
