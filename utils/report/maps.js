"use strict";
// The plots, by plotly.js. Maps lie in full-resolution pixels, y down; both share one window.

const plot = get("plot");
// The buttons are listed: by default there is one that sends the data to a server.
const config = { displaylogo: false, scrollZoom: false, plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };
const evenly = (colours) => colours.map((one, i) => [i / (colours.length - 1), one]);
const GREYED = evenly(["#f2f2f2", "#4a4a4a"]);
const VIRIDIS = evenly(["#440154", "#472c7a", "#3b518b", "#2c718e", "#21908d", "#27ad81", "#5cc863", "#aadc32", "#fde725"]);
// ColorBrewer's RdBu from blue to red: residuals lie around zero, which is white
const DIVERGING = evenly(["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"]);
// thousands of spots are drawn tenfold faster by WebGL; where the machine has none they are drawn as SVG
const drawnBy = document.createElement("canvas").getContext("webgl") ? "scattergl" : "scatter";
const [ABOVE, BELOW] = [34, 64]; // pixels for the titles, and for the bars of colours
let shown = {}; // kind -> values (S) of the gene
let drawing = Promise.resolve();
let view = { of: "", x: [0, 1], y: [1, 0] }; // the window in full-resolution pixels, kept from gene to gene

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // plotly reads tags
const font = getComputedStyle(document.body).fontFamily;
const stacked = () => plot.clientWidth < 680;
const precise = (value) => (Number.isNaN(value) ? "not known" : value.toPrecision(4).replace(/^-/, "−"));

// The spots with a margin, and no more than the image where they lie in it.
function extent() {
  const one = slice(), margin = 2 * one.diameter, edge = (list, side) => list.reduce((a, b) => Math[side](a, b));
  if (!one.x.length) return { left: 0, right: 1, top: 0, bottom: 1 };
  const [left, right, top, bottom] = [edge(one.x, "min"), edge(one.x, "max"), edge(one.y, "min"), edge(one.y, "max")];
  const inside = one.image && left >= 0 && top >= 0 && right <= one.image.width && bottom <= one.image.height;
  const [least, width, height] = inside ? [0, one.image.width, one.image.height] : [-Infinity, Infinity, Infinity];
  return { left: Math.max(least, left - margin), right: Math.min(width, right + margin), top: Math.max(least, top - margin), bottom: Math.min(height, bottom + margin) };
}

const isExpression = (kind) => kind === "measured" || kind === "predicted";
const isGreyed = (kind, gene) => isWeak(gene) && (kind === "predicted" || kind === "prediction_std");

function rangeOf(kind, gene) {
  const one = slice();
  if (kind === "domain") return [Math.min(0.5, ...shown.domain), Math.max(1.5, ...shown.domain)];
  const of = state.range === "shared" && isExpression(kind) ? one.shared : one.maps[kind].own;
  const low = of.low[gene], high = of.high[gene];
  if (report.diverging && isExpression(kind)) {
    const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
    return [-most, most];
  }
  return [low, high > low ? high : low + 1];
}

function scaleOf(kind, gene) {
  if (isGreyed(kind, gene)) return GREYED;
  return report.diverging && isExpression(kind) ? DIVERGING : VIRIDIS;
}

const unitOf = (kind) => (kind === "domain" ? "score, about 1 is within" : report.unit);

function spotWords(i) {
  const words = [slice().barcodes[i]];
  for (const [kind, list] of Object.entries(shown)) words.push(`${KINDS[kind].toLowerCase()} ${precise(list[i])}`);
  return words;
}

function trace(kind, side) {
  const one = slice(), list = shown[kind], bare = kind === "image";
  const known = bare ? one.x.map((_, i) => i) : one.x.map((_, i) => i).filter((i) => !Number.isNaN(list[i]));
  const [low, high] = bare ? [0, 1] : rangeOf(kind, state.gene);
  return {
    type: drawnBy, mode: "markers", xaxis: side ? "x2" : "x", yaxis: side ? "y2" : "y", customdata: known,
    x: known.map((i) => one.x[i]), y: known.map((i) => one.y[i]),
    text: known.map((i) => spotWords(i).map(escaped).join("<br>")), hovertemplate: "%{text}<extra></extra>",
    marker: {
      size: spotPx(), opacity: bare ? 0 : state.opacity, line: { width: report.diverging ? 0.5 : 0, color: "#555" }, color: bare ? known.map(() => 0) : known.map((i) => list[i]),
      cmin: low, cmax: high, colorscale: scaleOf(kind, state.gene), showscale: !bare, colorbar: bar(kind, side),
    },
  };
}

function bar(kind, side) {
  const box = panels()[side];
  return {
    orientation: "h", thickness: 10, thicknessmode: "pixels", outlinewidth: 0, ticks: "outside", ticklen: 4, tickcolor: colour("line"),
    len: (box.x[1] - box.x[0]) * 0.7, x: (box.x[0] + box.x[1]) / 2, y: box.y[0], yanchor: "top", ypad: 8, nticks: 6,
    title: { text: escaped(unitOf(kind)), side: "bottom", font: { size: 12, color: colour("soft") } }, tickfont: { size: 11, color: colour("soft") },
  };
}

// Where each panel lies, in fractions of the plot: beside each other, or below each other on a narrow page.
function panels() {
  if (!stacked()) return [{ x: [0, 0.49], y: [0, 1] }, { x: [0.51, 1], y: [0, 1] }];
  const gap = (ABOVE + BELOW) / (plotHeight() - ABOVE - BELOW);
  return [{ x: [0, 1], y: [0.5 + gap / 2, 1] }, { x: [0, 1], y: [0, 0.5 - gap / 2] }];
}

function plotHeight() {
  const whole = extent(), width = stacked() ? plot.clientWidth : plot.clientWidth * 0.49;
  const panel = Math.max(220, Math.min(0.82 * innerHeight, (width * (whole.bottom - whole.top)) / (whole.right - whole.left)));
  return stacked() ? 2 * (panel + ABOVE + BELOW) : panel + ABOVE + BELOW;
}

// Pixels on the screen of a full-resolution pixel: of the plot as it stands, else of the one about to be drawn.
function screenScale() {
  const axis = plot._fullLayout?.xaxis, range = Math.abs(view.x[1] - view.x[0]);
  if (axis?._length) return axis._length / range;
  const box = panels()[0], across = (plot.clientWidth * (box.x[1] - box.x[0])) / range;
  return Math.min(across, ((plotHeight() - ABOVE - BELOW) * (box.y[1] - box.y[0])) / Math.abs(view.y[1] - view.y[0]));
}

const spotPx = () => Math.max(2, slice().diameter * screenScale());

function images() {
  const one = slice();
  if (!one.image) return [];
  const where = { source: blockText(one.image.block), x: 0, y: 0, sizex: one.image.width, sizey: one.image.height, sizing: "stretch", layer: "below" };
  return ["", "2"].map((n) => ({ ...where, xref: `x${n}`, yref: `y${n}`, opacity: state.image }));
}

function scaleBar() {
  const one = slice();
  if (!one.umPerPx) return { shapes: [], annotations: [] };
  const range = view.x;
  const width = Math.abs(range[1] - range[0]) * one.umPerPx;
  const um = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].filter((step) => step <= width / 7).pop() ?? 5;
  const words = um < 1000 ? `${um} µm` : `${um / 1000} mm`, at = { xref: "x", yref: "y domain" }, end = range[0] + um / one.umPerPx;
  return {
    shapes: [{ ...at, type: "line", x0: range[0], x1: end, y0: -0.012, y1: -0.012, line: { color: colour("ink"), width: 4 } }],
    annotations: [{ ...at, x: range[0], y: -0.015, xanchor: "left", yanchor: "top", showarrow: false, text: words, font: { size: 12, color: colour("ink") } }],
  };
}

function remark(kind) {
  if (kind !== "image" && shown[kind].every(Number.isNaN)) return ": not known for this gene here";
  return isGreyed(kind, state.gene) ? ", greyed" : "";
}

function layout() {
  const [first, second] = panels(), bars = scaleBar();
  const axis = { visible: false, showgrid: false, zeroline: false };
  const title = (kind, box) => ({
    xref: "paper", yref: "paper", x: box.x[0], y: box.y[1], xanchor: "left", yanchor: "bottom", yshift: 4, showarrow: false,
    text: escaped(KINDS[kind]) + remark(kind), font: { size: 15, color: colour("ink") },
  });
  return {
    height: plotHeight(), width: plot.clientWidth, margin: { l: 0, r: 0, t: ABOVE, b: BELOW }, showlegend: false, dragmode: "zoom", hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: font, color: colour("ink") },
    modebar: { orientation: "h", bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
    hoverlabel: { align: "left", bgcolor: colour("card"), bordercolor: colour("accent"), font: { color: colour("ink"), size: 13 } },
    xaxis: { ...axis, domain: first.x, range: [...view.x], constrain: "domain", constraintoward: "left" },
    yaxis: { ...axis, domain: first.y, range: [...view.y], scaleanchor: "x", constrain: "domain", constraintoward: "top" },
    xaxis2: { ...axis, domain: second.x, range: [...view.x], anchor: "y2", matches: "x", constrain: "domain", constraintoward: "left" },
    yaxis2: { ...axis, domain: second.y, range: [...view.y], anchor: "x2", matches: "y", constrain: "domain", constraintoward: "top" },
    images: images(), shapes: bars.shapes, annotations: [title(state.left, first), title(state.right, second), ...bars.annotations],
  };
}

// What changes while a plot is being drawn is drawn once, afterwards.
let wanted = false;
function draw() {
  if (wanted) return;
  wanted = true;
  requestAnimationFrame(() => { drawing = drawing.then(drawNow); });
}

async function drawNow() {
  wanted = false;
  shown = {};
  for (const kind of kindsOf(slice())) if (kind !== "image") shown[kind] = values(kind, state.gene);
  const of = `${state.slice} ${stacked()}`, edges = extent();
  if (view.of !== of) view = { of, x: [edges.left, edges.right], y: [edges.bottom, edges.top] };
  await Plotly.react(plot, [trace(state.left, 0), trace(state.right, 1)], layout(), config);
  if (Math.abs(spotPx() - plot.data[0].marker.size) > 0.25) await Plotly.restyle(plot, { "marker.size": spotPx() });
  scatterPlot();
  if (state.spot >= 0) readSpot(state.spot, false);
  document.querySelectorAll(".modebar svg, #js-plotly-tester").forEach((icon) => icon.setAttribute("aria-hidden", "true"));
  plot.dataset.drawn = `${state.slice} ${state.gene} ${state.left} ${state.right} ${state.range}`;
}

// After a zoom spots keep their true size, and the bar its round length.
function afterZoom(update) {
  if (!Object.keys(update).some((key) => /axis/.test(key))) return;
  const { xaxis, yaxis } = plot._fullLayout, titles = plot.layout.annotations.slice(0, 2);
  view = { ...view, x: [...xaxis.range], y: [...yaxis.range] };
  const bars = scaleBar();
  Plotly.update(plot, { "marker.size": spotPx() }, { shapes: bars.shapes, annotations: [...titles, ...bars.annotations] }).then(rings);
}

// ---- reading a spot, by pointer or by key

function readSpot(i, aloud) {
  state.spot = i;
  const words = spotWords(i).join(" · ");
  get("spot").textContent = words;
  if (aloud) announce(words);
  rings();
}

// A ring around the spot that is read, in both maps.
function rings() {
  ["", "2"].forEach((n, side) => {
    const ring = get(`ring-${side}`), xaxis = plot._fullLayout[`xaxis${n}`], yaxis = plot._fullLayout[`yaxis${n}`];
    const x = state.spot < 0 ? -1 : xaxis.l2p(slice().x[state.spot]), y = state.spot < 0 ? -1 : yaxis.l2p(slice().y[state.spot]);
    ring.hidden = !(x >= 0 && y >= 0 && x <= xaxis._length && y <= yaxis._length);
    ring.style.width = ring.style.height = `${spotPx() + 8}px`;
    ring.style.left = `${xaxis._offset + x}px`;
    ring.style.top = `${yaxis._offset + y}px`;
  });
}

// The nearest spot in a direction, so measured that in a staggered array no row is passed over.
function neighbour(dx, dy) {
  const one = slice();
  let best = state.spot, least = Infinity;
  one.x.forEach((_, i) => {
    const x = one.x[i] - one.x[state.spot], y = one.y[i] - one.y[state.spot];
    const ahead = x * dx + y * dy, aside = Math.abs(x * dy - y * dx);
    if (ahead > 0.5 * aside && ahead + aside < least) [best, least] = [i, ahead + aside];
  });
  return best;
}

function zoom(factor) {
  const about = (range, spots) => {
    const centre = state.spot < 0 ? (range[0] + range[1]) / 2 : spots[state.spot];
    return range.map((edge) => centre + (edge - centre) * factor);
  };
  Plotly.relayout(plot, { "xaxis.range": about(view.x, slice().x), "yaxis.range": about(view.y, slice().y) });
}

function whole() {
  const edges = extent();
  Plotly.relayout(plot, { "xaxis.range": [edges.left, edges.right], "yaxis.range": [edges.bottom, edges.top] });
}

function keys(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (step) readSpot(state.spot < 0 ? 0 : neighbour(...step), true);
  else if (event.key === "+" || event.key === "=") zoom(0.6);
  else if (event.key === "-") zoom(1 / 0.6);
  else if (event.key === "0") whole();
  else return;
  event.preventDefault();
}

// ---- measured against predicted, of the gene in the maps

function agreement(x, y) {
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  const [mx, my] = [mean(x), mean(y)];
  const [dx, dy] = [x.map((v) => v - mx), y.map((v) => v - my)];
  const [xx, yy, xy] = [mean(dx.map((v) => v * v)), mean(dy.map((v) => v * v)), mean(dx.map((v, i) => v * dy[i]))];
  return { pcc: xx > 0 && yy > 0 ? xy / Math.sqrt(xx * yy) : null, ratio: xx > 0 ? Math.sqrt(yy / xx) : null };
}

function scatterPlot() {
  const { measured, predicted } = shown;
  get("agreement").hidden = !(measured && predicted);
  if (!measured || !predicted) return;
  const known = slice().x.map((_, i) => i).filter((i) => !Number.isNaN(measured[i]) && !Number.isNaN(predicted[i]));
  const x = known.map((i) => measured[i]), y = known.map((i) => predicted[i]);
  const { pcc, ratio } = known.length ? agreement(x, y) : { pcc: null, ratio: null };
  const facts = { "PCC over spots": pcc, "SD ratio, predicted over measured": ratio, spots: known.length };
  get("agreement-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", name), make("dd", show(value))]));
  const edge = (side) => [...x, ...y].reduce((a, b) => Math[side](a, b), known.length ? x[0] : 0), ends = [edge("min"), edge("max")];
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("soft"), linecolor: colour("line") };
  const points = {
    type: drawnBy, mode: "markers", x, y, customdata: known, text: known.map((i) => spotWords(i).map(escaped).join("<br>")), hovertemplate: "%{text}<extra></extra>",
    marker: { color: isWeak(state.gene) ? colour("weak") : colour("accent"), size: 6, opacity: 0.6 },
  };
  Plotly.react("scatter", [points], {
    height: 380, width: get("scatter").clientWidth, margin: { l: 58, r: 10, t: 10, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: font, color: colour("soft") }, hovermode: "closest", hoverlabel: { align: "left", bgcolor: colour("card"), font: { color: colour("ink") } },
    xaxis: { ...axis, title: { text: `measured, ${escaped(report.unit)}` } }, yaxis: { ...axis, title: { text: `predicted, ${escaped(report.unit)}` } },
    shapes: [{ type: "line", x0: ends[0], y0: ends[0], x1: ends[1], y1: ends[1], line: { color: colour("soft"), width: 1.5, dash: "dash" }, layer: "below" }],
  }, { displayModeBar: false });
}

// ---- correlation beside mean expression

function depthPlot() {
  const key = pccColumn(), mean = Object.keys(report.columns).find((name) => /^mean/i.test(name));
  if (!get("depth")) return;
  if (!key || !mean) {
    get("depth").remove();
    document.querySelector(".two").classList.add("single");
    return;
  }
  const x = report.columns[mean], y = report.columns[key], axis = { gridcolor: colour("line"), zerolinecolor: colour("soft"), linecolor: colour("line") };
  const log = x.every((value) => value === null || value > 0);
  const colours = report.genes.map((_, gene) => (gene === state.gene && report.slices.length ? "#d55e00" : isWeak(gene) ? colour("weak") : colour("accent")));
  const one = {
    type: "scatter", mode: "markers", x, y, text: report.genes.map(escaped), hovertemplate: `%{text}<br>${escaped(key)} %{y:.3f}<br>${escaped(mean)} %{x:.3g}<extra></extra>`,
    marker: { color: colours, size: report.genes.map((_, gene) => (gene === state.gene ? 11 : 7)), opacity: 0.75, symbol: report.genes.map((_, gene) => (isWeak(gene) ? "circle-open" : "circle")) },
  };
  Plotly.react("depth", [one], {
    height: 420, width: get("depth").clientWidth, margin: { l: 58, r: 10, t: 10, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: font, color: colour("soft") }, hovermode: "closest", hoverlabel: { bgcolor: colour("card"), font: { color: colour("ink") } },
    xaxis: { ...axis, type: log ? "log" : "linear", title: { text: escaped(mean) }, nticks: 6 }, yaxis: { ...axis, title: { text: escaped(key) } },
  }, { displayModeBar: false });
}

async function startMaps() {
  if (report.genes.length) depthPlot();
  if (!report.slices.length) return;
  plot.replaceChildren();
  draw();
  watchers.push((what) => { draw(); if (what === "gene" || what === "theme") depthPlot(); });
  let timer = 0;
  addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(() => { draw(); depthPlot(); }, 150); });
  get("frame").addEventListener("keydown", keys);
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  await drawing;
  plot.on("plotly_relayout", afterZoom);
  plot.on("plotly_doubleclick", () => { whole(); return false; });
  plot.on("plotly_hover", (event) => readSpot(event.points[0].customdata, false));
  if (get("scatter").on) get("scatter").on("plotly_hover", (event) => readSpot(event.points[0].customdata, false));
  if (get("depth")) get("depth").on("plotly_click", (event) => chooseGene(event.points[0].pointNumber));
}
