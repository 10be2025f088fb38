"use strict";
// The plots of the report: runs as points, memory as bars, evaluations as lines. They show the runs that the table
// shows, less the series that their legend switches off.

const data = JSON.parse(document.getElementById("runs-data").textContent);
const CHARACTER = 7.5;  // pixels that a letter of a bar's name may take
const MOST_BARS = 40, MOST_DETAILED = 24;  // bars; lines with their bands and markers
const inTable = new Set(data.runs.keys()), switchedOff = new Set(), charts = [];

// In the order of their labels, which is that of the other tables and figures.
const ordered = [...data.runs.entries()].filter(([, run]) => run.series !== null).sort((a, b) => a[1].order - b[1].order);

function drawnRuns() {
  return ordered.filter(([index, run]) => inTable.has(index) && !switchedOff.has(run.series)).map(([, run]) => run);
}

function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) {
    const key = keyOf(item);
    groups.has(key) ? groups.get(key).push(item) : groups.set(key, [item]);
  }
  return groups;
}

function counted(count, noun) {
  return `${whole.format(count)} ${noun}${count === 1 ? "" : "s"}`;
}

const withState = run => run.label + (run.status === "ok" ? "" : ` (${run.status})`)
  + (run.predicted ? " (predicted)" : "");
const frame = width => ({left: 52, right: width - 12, top: 24, bottom: 320});

function scatter(figure) {
  const chosen = [...data.axes];
  const choosers = ["Across", "Up"].map((name, axis) => {
    const options = data.fields.map((field, index) => html("option", {value: index}, field));
    const select = html("select", {}, ...options);
    select.selectedIndex = chosen[axis];
    select.addEventListener("change", () => {
      chosen[axis] = select.selectedIndex;
      chart.redraw();
    });
    return html("label", {}, `${name} `, select);
  });
  const chart = new Chart(figure, "Runs as points", width => {
    const names = chosen.map(index => data.fields[index]), box = frame(width), runs = drawnRuns();
    const valuesOf = run => chosen.map(index => run.values[index]);
    const points = runs.filter(run => !valuesOf(run).includes(null));
    const without = runs.length - points.length;
    const told = `${counted(points.length, "point")}: ${names[1]} against ${names[0]}`
      + `${points.some(run => run.predicted) ? "; hollow: predicted" : ""}.`
      + `${without ? ` ${counted(without, "run")} without one of the two.` : ""}`;
    if (!points.length) return {height: 30, nodes: [], marks: [], told};
    const [x, y] = [[box.left, box.right], [box.bottom, box.top]].map(([from, to], axis) =>
      scaleOf(points.map(run => valuesOf(run)[axis]), from, to, {mayBeLog: !data.scores.includes(chosen[axis])}));
    const marks = points.map(run => ({
      x: x.pixel(valuesOf(run)[0]), y: y.pixel(valuesOf(run)[1]), run, group: run.series,
      text: () => [`${withState(run)}, seed ${run.seed}`, run.name,
        ...names.map((name, axis) => `${name}: ${numberText(valuesOf(run)[axis])}`)].join("\n"),
    })).sort((a, b) => a.group - b.group || a.x - b.x);
    const dots = marks.map(({x, y, run}) => {
      const dot = marker(data.series[run.series], x, y, {isHollow: run.predicted});
      if (run.status !== "ok") dot.classList.add("not-ok");
      return dot;
    });
    return {height: box.bottom + 42, nodes: [...axes(x, y, names, box), ...dots], marks, told};
  });
  chart.box.before(html("div", {class: "choosers"}, ...choosers));
  return chart;
}

function bars(figure) {
  const legend = data.categories.map(({name, color}) => {
    const dot = html("span", {class: "dot"});
    dot.style.background = color;
    return html("span", {}, dot, name);
  });
  const chart = new Chart(figure, "Peak memory by category", width => {
    const groups = [...grouped(drawnRuns().filter(run => run.memory), withState)], step = 40;
    const left = groups.length - MOST_BARS;
    const told = `${counted(groups.length, "bar")}, MiB, mean over the shown runs of each`
      + `${groups.some(([, [run]]) => run.predicted) ? "; hatched: predicted" : ""}.`
      + (left > 0 ? ` The first ${MOST_BARS} are drawn: filter to see the others.` : "");
    const rows = groups.slice(0, MOST_BARS).map(([name, runs]) => ({
      name, predicted: runs[0].predicted, count: runs.length,
      parts: data.categories.map((_, index) => runs.reduce((sum, run) => sum + run.memory[index], 0) / runs.length),
      total: runs.reduce((sum, run) => sum + run.peak, 0) / runs.length,
    }));
    if (!rows.length) return {height: 30, nodes: [], marks: [], told};
    const x = scaleOf(rows.map(row => row.total), 0, width - 60, {fromZero: true}), nodes = [hatching()], marks = [];
    rows.forEach((row, index) => {
      const top = 6 + step * index;
      nodes.push(svg("text", {x: 0, y: top + 10}, cut(row.name, Math.floor(width / CHARACTER))), ...stack(row, x, top + 15));
      const end = x.pixel(row.total);
      nodes.push(svg("text", {x: end + 6, y: top + 27}, sizeText(row.total)));
      const text = () => [`${row.name}: ${sizeText(row.total)} MiB (${counted(row.count, "run")})`,
        ...row.parts.map((part, at) => part && `${data.categories[at].name}: ${sizeText(part)} MiB`)];
      marks.push({x: end, y: top + 23, group: index, text: () => text().filter(Boolean).join("\n")});
    });
    return {height: 12 + step * rows.length, nodes, marks, told};
  }, {readsRows: true});
  chart.box.before(html("div", {class: "categories"}, ...legend));
  return chart;
}

function stack(row, x, top) {
  const nodes = [];
  let before = 0;
  row.parts.forEach((part, index) => {
    const place = {x: x.pixel(before), y: top, width: Math.max(0, x.pixel(before + part) - x.pixel(before)), height: 16};
    nodes.push(svg("rect", {...place, fill: data.categories[index].color}));
    if (row.predicted) nodes.push(svg("rect", {...place, fill: "url(#hatching)"}));
    before += part;
  });
  return nodes;
}

function hatching() {
  const line = svg("path", {d: "M0,6 L6,0", stroke: "var(--ground)", "stroke-width": 1.5});
  return svg("pattern", {id: "hatching", width: 6, height: 6, patternUnits: "userSpaceOnUse"}, line);
}

function curves(figure) {
  return new Chart(figure, data.curve, width => {
    const lines = [...grouped(drawnRuns().filter(run => run.curve.length), run => run.label)].map(meanLine);
    const isCrowded = lines.length > MOST_DETAILED;
    const told = `${counted(lines.length, "line")}: mean over the shown runs of each`
      + `${isCrowded ? `; filter to ${MOST_DETAILED} lines for bands` : "; bands: ± one standard deviation"}.`;
    if (!lines.length) return {height: 30, nodes: [], marks: [], told};
    const box = frame(width), points = lines.flatMap(line => line.points);
    const x = scaleOf(points.map(point => point.step), box.left, box.right);
    const y = scaleOf(points.flatMap(({mean, std}) => [mean - std, mean + std]), box.bottom, box.top);
    const place = (step, value) => `${x.pixel(step).toFixed(1)},${y.pixel(value).toFixed(1)}`;
    const nodes = axes(x, y, ["Optimizer step", data.curve], box);
    for (const {style, points} of lines) {
      const line = points.map(p => place(p.step, p.mean)).join(" ");
      nodes.push(svg("polyline", {points: line, fill: "none", stroke: style.color, "stroke-width": 1.6}));
      if (isCrowded) continue;
      const edge = [...points.map(p => place(p.step, p.mean + p.std)),
        ...[...points].reverse().map(p => place(p.step, p.mean - p.std))];
      nodes.push(svg("polygon", {points: edge.join(" "), fill: style.color, opacity: .13}));
      const every = Math.max(1, Math.floor(points.length / 6));
      points.forEach((p, at) => at % every || nodes.push(marker(style, x.pixel(p.step), y.pixel(p.mean), {radius: 4})));
    }
    const marks = lines.flatMap(({name, points}) => points.map(({step, mean, std, count}) => ({
      x: x.pixel(step), y: y.pixel(mean), group: name,
      text: () => `${name}, step ${step}\n${numberText(mean)}${count > 1 ? ` ± ${numberText(std)}` : ""} (${counted(count, "run")})`,
    })));
    return {height: box.bottom + 42, nodes, marks, told};
  });
}

// Over the runs that have an evaluation at a step; the sample standard deviation, 0 for one run.
function meanLine([name, runs]) {
  const bySteps = grouped(runs.flatMap(run => run.curve), ([step]) => step);
  const points = [...bySteps].sort((a, b) => a[0] - b[0]).map(([step, found]) => {
    const count = found.length, mean = found.reduce((sum, [, value]) => sum + value, 0) / count;
    const squares = found.reduce((sum, [, value]) => sum + (value - mean) ** 2, 0);
    return {step, mean, std: count > 1 ? Math.sqrt(squares / (count - 1)) : 0, count};
  });
  return {name, points, style: data.series[runs[0].series]};
}

function legend(place) {
  const buttons = data.series.map((style, index) => {
    const sign = svg("svg", {width: 14, height: 14, "aria-hidden": "true"}, marker(style, 7, 7));
    const button = html("button", {type: "button", "aria-pressed": "true"}, sign, style.name);
    button.addEventListener("click", () => {
      const isOn = switchedOff.delete(index) || !switchedOff.add(index);
      button.setAttribute("aria-pressed", isOn);
      redrawAll();
    });
    return button;
  });
  const all = html("button", {type: "button", class: "all"}, "All on or off");
  all.addEventListener("click", () => {
    const turnOn = switchedOff.size > 0;
    data.series.forEach((_, index) => turnOn ? switchedOff.delete(index) : switchedOff.add(index));
    buttons.forEach(button => button.setAttribute("aria-pressed", turnOn));
    redrawAll();
  });
  place.append(...buttons, all);
}

function redrawAll() {
  charts.forEach(chart => chart.redraw());
}

document.addEventListener("runs-shown", event => {
  inTable.clear();
  event.detail.forEach(index => inTable.add(index));
  redrawAll();
});
document.documentElement.classList.add("scripted");
for (const figure of document.querySelectorAll("figure[data-plot]"))
  charts.push({scatter, bars, curves}[figure.dataset.plot](figure));
document.querySelectorAll(".legend").forEach(legend);
