"use strict";
// The state of the page and its controls. Only maps.js needs plotly.js: the page answers while that is read.
// Data only ever becomes text (textContent) or the address of an embedded image.

const report = JSON.parse(document.getElementById("report").textContent);
const state = { slice: 0, gene: 0, left: "", right: "", range: "own", opacity: 0.85, image: 1, spot: -1 };
const watchers = []; // functions of what changed: "gene", "slice", "look" or "theme"
const KINDS = { image: "H&E only", measured: "Measured", predicted: "Predicted", prediction_std: "Prediction std", domain: "Out-of-domain score" };
const texts = {};

const get = (id) => document.getElementById(id);
const announce = (words) => { get("status").textContent = words; };
const changed = (what) => watchers.forEach((watcher) => watcher(what));
const slice = () => report.slices[state.slice];
const isWeak = (gene) => Boolean(report.weak && report.weak[gene]);

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function show(value, digits = 3) {
  if (value === null || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const text = value.toFixed(Math.abs(value) >= 10 ? 1 : digits);
  return text.replace(/^-/, "−");
}

function blockText(id) {
  if (!(id in texts)) texts[id] = get(id).textContent;
  return texts[id];
}

// Values (S) of one gene in one map of a slice, NaN where unknown. The base64 text has G pieces of equal length.
function values(kind, gene) {
  if (kind === "domain") return Float64Array.from(slice().domain, (v) => v ?? NaN);
  const map = slice().maps[kind], text = blockText(map.block), length = text.length / report.genes.length;
  const bytes = Uint8Array.from(atob(text.slice(gene * length, (gene + 1) * length)), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer), wide = map.bits === 16, steps = 2 ** map.bits - 2;
  const low = map.low[gene], step = (map.high[gene] - low) / steps;
  return Float64Array.from(slice().barcodes, (_, i) => {
    const number = wide ? view.getUint16(2 * i, true) : view.getUint8(i);
    return number > steps ? NaN : low + number * step;
  });
}

function chooseGene(gene) {
  state.gene = gene;
  get("gene").value = report.genes[gene];
  if (document.activeElement === get("gene")) get("gene").select(); // the next letter begins another name
  showFacts();
  markRow();
  announce(`Gene ${report.genes[gene]}${isWeak(gene) ? ", weak" : ""}, maps drawn.`);
  changed("gene");
}

function showFacts() {
  const facts = get("facts"), gene = state.gene;
  facts.replaceChildren(make("strong", report.genes[gene]));
  for (const [name, column] of Object.entries(report.columns)) {
    const fact = make("span", `${name} `);
    fact.append(make("b", show(column[gene])));
    facts.append(fact);
  }
  get("weak").hidden = !isWeak(gene);
  get("weak").textContent = `Greyed: on validation slices this gene was predicted with a PCC below ${report.leastPcc}. Do not rely on its map.`;
}

// ---- choosing a gene by typing: an editable combobox with a list

function geneBox() {
  const input = get("gene"), list = get("gene-list"), key = pccColumn();
  let found = [], active = -1;

  function open(query) {
    const wanted = query.trim().toLowerCase();
    const starts = [], holds = [];
    report.genes.forEach((name, gene) => {
      const place = name.toLowerCase().indexOf(wanted);
      if (place >= 0) (place ? holds : starts).push(gene);
    });
    found = [...starts, ...holds];
    list.replaceChildren(...found.map((gene, i) => {
      const option = make("li", null, { role: "option", id: `option-${i}`, "aria-selected": "false" });
      option.append(make("span", report.genes[gene]), make("span", (key ? `${key} ${show(report.columns[key][gene])}` : "") + (isWeak(gene) ? ", weak" : "")));
      option.classList.toggle("weak", isWeak(gene));
      option.addEventListener("pointerdown", (event) => { event.preventDefault(); take(gene); });
      return option;
    }));
    list.hidden = !found.length;
    input.setAttribute("aria-expanded", String(!list.hidden));
    activate(found.length && wanted ? 0 : -1);
    if (!found.length) announce("No gene of that name.");
  }

  function activate(place) {
    list.children[active]?.setAttribute("aria-selected", "false");
    active = place;
    list.children[active]?.setAttribute("aria-selected", "true");
    list.children[active]?.scrollIntoView({ block: "nearest" });
    if (active < 0) input.removeAttribute("aria-activedescendant");
    else input.setAttribute("aria-activedescendant", `option-${active}`);
  }

  function close() {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function take(gene) { close(); chooseGene(gene); }

  input.addEventListener("input", () => open(input.value));
  input.addEventListener("focus", () => input.select());
  input.addEventListener("click", () => { if (list.hidden) { input.select(); open(""); } });
  input.addEventListener("blur", () => { close(); input.value = report.genes[state.gene]; });
  input.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      if (list.hidden) open("");
      activate(Math.max(0, Math.min(found.length - 1, active + step)));
    } else if (event.key === "Enter") {
      if (!list.hidden && active >= 0) take(found[active]);
    } else if (event.key === "Escape") {
      close();
      input.value = report.genes[state.gene];
      input.select();
    } else return;
    event.preventDefault();
  });
}

// ---- what is looked at

function kindsOf(one) {
  return ["image", "measured", "predicted", "prediction_std", "domain"].filter((kind) => kind in one.maps || (kind === "image" && one.image) || (kind === "domain" && one.domain));
}

function fillKinds() {
  const kinds = kindsOf(slice());
  for (const side of ["left", "right"]) {
    get(side).replaceChildren(...kinds.map((kind) => make("option", KINDS[kind], { value: kind })));
    const wished = [state[side], side === "left" ? "measured" : "predicted", side === "left" ? "image" : "predicted", "predicted"];
    state[side] = wished.find((kind) => kinds.includes(kind));
    get(side).value = state[side];
  }
}

function controls() {
  get("controls").addEventListener("submit", (event) => event.preventDefault());
  get("slice").replaceChildren(...report.slices.map((one, i) => make("option", one.name, { value: i })));
  get("slice-field").hidden = report.slices.length < 2;
  get("slice").addEventListener("change", () => {
    state.slice = Number(get("slice").value);
    state.spot = -1;
    fillKinds();
    announce(`Slice ${slice().name}, ${slice().barcodes.length} spots.`);
    changed("slice");
  });
  for (const name of ["left", "right", "range"])
    get(name).addEventListener("change", () => { state[name] = get(name).value; changed("look"); });
  for (const name of ["opacity", "image"]) {
    const follow = () => {
      state[name] = Number(get(name).value) / 100;
      get(`${name}-value`).textContent = `${get(name).value} %`;
    };
    get(name).addEventListener("input", () => { follow(); changed("look"); });
    follow();
  }
  get("precision").textContent = "Colours run from the 1st to the 99th percentile; what lies beyond has the last colour. Values are read "
    + "from 65,535 steps (prediction std: 255) between a gene's lowest and highest value in a map.";
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  get("theme").textContent = dark ? "Light colours" : "Dark colours";
  changed("theme");
}

function start() {
  const wishes = matchMedia("(prefers-color-scheme: dark)");
  theme(wishes.matches);
  wishes.addEventListener("change", () => theme(wishes.matches));
  get("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme !== "dark"));
  const parts = { maps: report.slices, genes: report.genes, examples: report.examples };
  for (const [name, list] of Object.entries(parts)) get(name).hidden = !list.length;
  const spots = report.slices.reduce((sum, one) => sum + one.barcodes.length, 0);
  const counted = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
  get("subtitle").textContent = report.slices.length
    ? `${counted(report.slices.length, "slice")} · ${counted(spots, "spot")} · ${counted(report.genes.length, "gene")} · ${report.unit}` : report.unit;
  if (report.genes.length) geneTable();
  if (report.slices.length) {
    controls();
    fillKinds();
    geneBox();
    chooseGene(orderedGenes().find((gene) => !isWeak(gene)) ?? 0);
  }
  examples();
  for (const button of document.querySelectorAll(".csv")) button.addEventListener("click", () => metricsCsv(Number(button.dataset.table)));
}
