// The open page: hears what is new from the server, puts panels in place, draws charts with Plotly. Everything that is
// text arrives as HTML which the server has escaped; what a chart says is put in as text.
"use strict";

const charts = new Map(); // key -> {document, plot, log}
const SIGNS = { restart: "↻", spike: "▲", lost: "✗" };
const SYMBOLS = { restart: "circle-open", spike: "triangle-up", lost: "x-thin-open" };

const role = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

// Plotly reads a few tags as markup: names from a recipe are shown as they are written.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// ---------------------------------------------------------------- charts

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function card(chart) {
  const section = element("section", "chart c" + chart.columns);
  const title = element("h2");
  const log = element("button", "scale", "log");
  log.type = "button";
  log.setAttribute("aria-pressed", "false");
  log.setAttribute("aria-label", "logarithmic: " + chart.title);
  title.append(element("span", "", chart.title), log);
  const plot = element("div", "plot");
  plot.setAttribute("role", "img");
  const legend = element("div", "legend");
  section.append(title, plot, legend);
  document.getElementById("charts").append(section);
  const made = { document: chart, section, plot, legend, log: false };
  log.addEventListener("click", () => {
    made.log = !made.log;
    log.setAttribute("aria-pressed", String(made.log));
    draw(made);
  });
  return made;
}

function traces(chart) {
  const drawn = chart.lines.map((line) => ({
    type: "scatter",
    name: plain(line.name),
    x: line.points[0],
    y: line.points[1],
    mode: line.form === "dots" ? "lines+markers" : line.points[0].length === 1 ? "markers" : "lines",
    line: { color: role(line.colour), width: line.form === "faint" ? 1 : 2 },
    marker: { size: line.points[0].length > 60 ? 3 : 6 },
    opacity: line.form === "faint" ? 0.45 : 1,
    hovertemplate: "%{y:.4~g}",
  }));
  for (const kind of Object.keys(SIGNS)) {
    const marks = chart.marks.filter((mark) => mark[1] === kind);
    if (!marks.length) continue;
    drawn.push({
      type: "scatter", mode: "markers", name: kind, yaxis: "y2", x: marks.map((m) => m[0]), y: marks.map(() => 0.97),
      text: marks.map((m) => plain(m[2])), hovertemplate: "%{text}<extra></extra>",
      marker: { symbol: SYMBOLS[kind], size: 9, color: role("no"), line: { color: role("no"), width: 2 } },
    });
  }
  return drawn;
}

function tiny(chart) {
  return chart.lines.every((line) => line.points[1].every((value) => Math.abs(value) < 1e-3));
}

function layout(made) {
  const chart = made.document;
  const axis = {
    gridcolor: role("line"), linecolor: role("muted"), zeroline: false, color: role("muted"), automargin: true,
    tickfont: { size: 11 },
  };
  const upright = { type: "line", yref: "paper", y0: 0, y1: 1, line: { color: role("no"), width: 1, dash: "dot" } };
  const shapes = chart.marks.filter((m) => m[1] === "restart").map((m) => ({ ...upright, x0: m[0], x1: m[0] }));
  const notes = [];
  if (chart.bound) {
    const value = made.log ? Math.log10(chart.bound[0]) : chart.bound[0];
    const line = { color: role("fits"), width: 1.5, dash: "dash" };
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: chart.bound[0], y1: chart.bound[0], line });
    notes.push({
      xref: "paper", x: 1, y: value, xanchor: "right", yanchor: "bottom", showarrow: false,
      text: `${chart.bound[1]} ${chart.bound[0]}`, font: { color: role("fits"), size: 11 },
    });
  }
  return {
    uirevision: made.log ? "log" : "linear",
    showlegend: false,
    hovermode: "x unified",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    margin: { l: 46, r: 10, t: 8, b: 34 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: getComputedStyle(document.body).fontFamily, color: role("ink"), size: 12 },
    hoverlabel: { bgcolor: role("card"), bordercolor: role("line"), font: { color: role("ink") } },
    xaxis: { ...axis, showgrid: false, title: { text: "step", font: { size: 11 }, standoff: 6 } },
    yaxis: {
      ...axis, type: made.log ? "log" : "linear", rangemode: chart.zero && !made.log ? "tozero" : "normal", nticks: 6,
      ...(tiny(chart) ? { exponentformat: "e" } : { tickformat: ".3~g" }),
    },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    shapes,
    annotations: notes,
  };
}

function draw(made) {
  const chart = made.document;
  made.plot.setAttribute("aria-label", chart.title + ": " + chart.lines.map((line) => {
    const y = line.points[1];
    return `${line.name} from ${y[0]} to ${y[y.length - 1]}`;
  }).join("; "));
  made.legend.replaceChildren(...chart.lines.map((line) => {
    const entry = element("span");
    const swatch = element("i", line.form);
    swatch.style.background = `var(--${line.colour})`;
    entry.append(swatch, line.name);
    return entry;
  }), ...Object.keys(SIGNS).filter((kind) => chart.marks.some((m) => m[1] === kind))
    .map((kind) => element("span", "", `${SIGNS[kind]} ${kind}`)));
  Plotly.react(made.plot, traces(chart), layout(made), { displayModeBar: false, responsive: true });
}

function drawAll(documents) {
  const wanted = documents.map((chart) => chart.key);
  const known = [...charts.keys()];
  if (known.join("\n") !== wanted.join("\n")) {
    for (const made of charts.values()) Plotly.purge(made.plot);
    document.getElementById("charts").replaceChildren();
    charts.clear();
    for (const chart of documents) charts.set(chart.key, card(chart));
  }
  for (const chart of documents) {
    const made = charts.get(chart.key);
    made.document = chart;
    draw(made);
  }
}

function extend(more) {
  for (const [key, lines] of Object.entries(more)) {
    const made = charts.get(key);
    for (const line of made.document.lines) {
      const points = lines[line.name];
      if (!points) continue;
      line.points[0].push(...points[0]);
      line.points[1].push(...points[1]);
    }
    draw(made);
  }
}

// ---------------------------------------------------------------- panels, and the list's order

let order = null; // [column, direction]

function sort() {
  if (!order) return;
  const [column, direction] = order;
  const table = document.querySelector(".sortable");
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    head.setAttribute("aria-sort", i !== column ? "none" : direction > 0 ? "ascending" : "descending");
  });
  const value = (row) => row.cells[column].dataset.sort ?? "";
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1; // what is not known comes last
    return direction * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  }));
}

document.addEventListener("click", (event) => {
  const head = event.target.closest?.(".sortable th[aria-sort]");
  if (!head || !event.target.closest("button")) return;
  const column = head.cellIndex;
  order = [column, order && order[0] === column ? -order[1] : 1];
  sort();
});

function put(panels) {
  for (const [name, html] of Object.entries(panels)) {
    const panel = document.getElementById("panel-" + name);
    const ticked = new Set([...panel.querySelectorAll("input:checked")].map((input) => input.value));
    const open = [...panel.querySelectorAll("details")].map((one) => one.open);
    panel.innerHTML = html;
    panel.querySelectorAll("input").forEach((input) => (input.checked = ticked.has(input.value)));
    panel.querySelectorAll("details").forEach((one, i) => (one.open = Boolean(open[i])));
    if (name === "runs") sort();
  }
}

// ---------------------------------------------------------------- the server

function hear(message) {
  if (message.panels) put(message.panels);
  if (message.title) document.title = message.title + " · mlx-empire";
  if (message.mood) document.getElementById("panel-head").className = "v-" + message.mood;
  if (message.charts) drawAll(message.charts);
  if (message.more) extend(message.more);
}

const said = document.getElementById("live");
const address = document.body.dataset.events;
if (address) {
  const source = new EventSource(address); // after a break it begins again, with everything
  source.onopen = () => (said.textContent = "live");
  source.onerror = () => (said.textContent = "not connected: the page's server does not answer");
  source.onmessage = (event) => hear(JSON.parse(event.data));
}
const stored = document.getElementById("document");
if (stored) drawAll(JSON.parse(stored.textContent));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
