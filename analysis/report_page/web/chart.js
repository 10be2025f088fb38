"use strict";
// What every plot has: an SVG with its axes, and marks that pointer and arrow keys read, with a note beside them.

const REACH = 40;  // pixels from a mark to the pointer that still reads it
const formatter = options => new Intl.NumberFormat("en", options);  // made once: making one takes long
const whole = formatter({maximumFractionDigits: 0}), tenths = formatter({maximumFractionDigits: 1});
const hundredths = formatter({maximumFractionDigits: 2}), fine = formatter({maximumSignificantDigits: 5});
const coarse = formatter({maximumSignificantDigits: 4});
const compact = formatter({maximumSignificantDigits: 4, notation: "compact"});
const sizeText = value => (value < 1 ? hundredths : value < 100 ? tenths : whole).format(value);  // as in the tables
const numberText = value => fine.format(value);
const tickText = value => (Math.abs(value) >= 1e6 ? compact : coarse).format(value);

function cut(text, length) {  // its beginning and its end, where it is longer
  const half = Math.floor(length / 2);
  return text.length <= length ? text : `${text.slice(0, half)}…${text.slice(half + 1 - length)}`;
}

function announce(text) {
  document.getElementById("announcement").textContent = text;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Corners, turn in degrees, and how far the corners in between reach, of the printed figures' markers.
const SHAPES = {
  o: [16, 0], s: [4, 45], D: [4, 0], "^": [3, 0], v: [3, 180], "<": [3, 270], ">": [3, 90], h: [6, 0], p: [5, 0],
  "*": [5, 0, .45], P: [4, 0, .4], X: [4, 45, .4], d: [2, 0, .55],
};

function marker(style, x, y, {radius = 5, isHollow = false} = {}) {
  const [corners, turn, between] = SHAPES[style.marker], count = between ? 2 * corners : corners;
  const points = Array.from({length: count}, (_, index) => {
    const angle = 2 * Math.PI * index / count + turn * Math.PI / 180;
    const length = between && index % 2 ? between * radius : radius;
    return `${(x + length * Math.sin(angle)).toFixed(1)},${(y - length * Math.cos(angle)).toFixed(1)}`;
  });
  const fill = isHollow ? "none" : style.color;
  return svg("polygon", {points: points.join(" "), fill, stroke: style.color, "stroke-width": isHollow ? 1.5 : .5});
}

// Values to pixels. Logarithmic where that is allowed and the values spread over a factor of 30 above zero.
// From left to right, or from the bottom up (to < from), where ticks may stand closer.
function scaleOf(values, from, to, {mayBeLog = false, fromZero = false} = {}) {
  let low = fromZero ? 0 : Infinity, high = fromZero ? 0 : -Infinity;
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const isLog = mayBeLog && low > 0 && high / low >= 30, put = isLog ? Math.log10 : value => value;
  let [start, end] = [put(low), put(high)];
  const margin = .06 * (end - start) || .05 * Math.abs(end) || 1;
  [start, end] = [fromZero ? start : start - margin, end + margin];
  return {
    isLog,
    pixel: value => from + (put(value) - start) / (end - start) * (to - from),
    ticks: (isLog ? logTicks : linearTicks)(start, end, Math.max(2, Math.abs(to - from) / (to > from ? 80 : 48))),
  };
}

function linearTicks(start, end, count) {
  const rough = (end - start) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const first = Math.ceil(start / step), last = Math.floor(end / step);
  return Array.from({length: last - first + 1}, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function logTicks(start, end, count) {
  const factors = end - start > count / 2 ? [1] : [1, 2, 5], ticks = [];
  for (let power = Math.floor(start); power <= end; power += 1)
    for (const factor of factors) ticks.push(factor * 10 ** power);
  return ticks.filter(tick => Math.log10(tick) >= start && Math.log10(tick) <= end);
}

// The frame of a plot in data coordinates: grid, ticks and names of both axes.
function axes(x, y, names, box) {
  const parts = [];
  for (const tick of x.ticks) {
    const at = x.pixel(tick);
    parts.push(svg("line", {class: "grid", x1: at, x2: at, y1: box.top, y2: box.bottom}));
    parts.push(svg("text", {x: at, y: box.bottom + 16, "text-anchor": "middle"}, tickText(tick)));
  }
  for (const tick of y.ticks) {
    const at = y.pixel(tick);
    parts.push(svg("line", {class: "grid", x1: box.left, x2: box.right, y1: at, y2: at}));
    parts.push(svg("text", {x: box.left - 6, y: at + 4, "text-anchor": "end"}, tickText(tick)));
  }
  const [across, up] = [x, y].map((scale, axis) => names[axis] + (scale.isLog ? " (log)" : ""));
  const middle = (box.left + box.right) / 2;
  parts.push(svg("text", {class: "axis", x: middle, y: box.bottom + 34, "text-anchor": "middle"}, across));
  parts.push(svg("text", {class: "axis", x: 0, y: box.top - 10}, up));
  return parts;
}

class Chart {
  // draw(width) → {height, nodes, marks, told}; a mark is {x, y, text(), group}, in reading order. told: what is shown.
  constructor(figure, name, draw, {readsRows = false} = {}) {
    Object.assign(this, {name, draw, readsRows, marks: [], current: -1, width: 0});
    this.picture = svg("svg", {"aria-hidden": "true"});
    this.note = html("div", {class: "tip", hidden: ""});
    this.told = html("p", {class: "told"});
    this.box = html("div", {class: "plot", tabindex: "0", role: "application", "aria-roledescription": "plot"});
    this.box.append(this.picture, this.note);
    figure.prepend(this.box, this.told);
    this.picture.addEventListener("pointermove", event => this.readAt(event));
    this.picture.addEventListener("pointerdown", event => this.readAt(event));
    // A finger leaves at once: what it read stays until the next tap takes the focus away.
    this.box.addEventListener("pointerleave", event => event.pointerType === "mouse" && this.read(-1));
    this.box.addEventListener("blur", () => this.read(-1));
    this.box.addEventListener("keydown", event => this.key(event));
    // The first call comes before the first paint. Only here is the width read: elsewhere it would cost a layout.
    new ResizeObserver(([{contentRect}]) => {
      if (contentRect.width === this.width) return;
      this.width = contentRect.width;
      this.redraw();
    }).observe(this.box);
  }

  redraw() {
    if (!this.width) return;
    const {height, nodes, marks, told} = this.draw(this.width);
    this.picture.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    this.ring = svg("circle", {class: "ring", r: 9, visibility: "hidden"});
    this.picture.replaceChildren(...nodes, this.ring);
    this.marks = marks;
    this.told.textContent = told;
    this.box.setAttribute("aria-label", `${this.name}. ${told} Arrow keys read the values, Escape closes the note.`);
    this.read(-1);
  }

  readAt(event) {
    const place = this.picture.getBoundingClientRect();
    const x = event.clientX - place.left, y = event.clientY - place.top;
    let nearest = -1, least = REACH;
    this.marks.forEach((mark, index) => {
      const distance = this.readsRows ? Math.abs(mark.y - y) : Math.hypot(mark.x - x, mark.y - y);
      if (distance < least) [nearest, least] = [index, distance];
    });
    this.read(nearest);
  }

  key(event) {
    const last = this.marks.length - 1, at = this.current;
    const otherGroup = step => {
      let index = Math.max(at, 0);
      while (this.marks[index] && this.marks[index].group === this.marks[Math.max(at, 0)].group) index += step;
      return this.marks[index] ? index : at;
    };
    const moves = {
      ArrowRight: () => Math.min(at + 1, last), ArrowLeft: () => Math.max(at - 1, 0), Home: () => 0, End: () => last,
      ArrowDown: () => otherGroup(1), ArrowUp: () => otherGroup(-1), Escape: () => -1,
    };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    this.read(moves[event.key]());
    announce(this.current < 0 ? "" : this.marks[this.current].text());
  }

  read(index) {
    this.current = index;
    const mark = this.marks[index];
    this.note.hidden = !mark;
    this.ring.setAttribute("visibility", mark ? "visible" : "hidden");
    if (!mark) return;
    this.ring.setAttribute("cx", mark.x);
    this.ring.setAttribute("cy", mark.y);
    this.note.textContent = mark.text();
    const left = Math.min(mark.x + 14, this.width - this.note.offsetWidth);
    this.note.style.left = `${Math.max(0, left)}px`;
    this.note.style.top = `${mark.y + 16}px`;
  }
}
