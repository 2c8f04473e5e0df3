"use strict";
// The table of genes, retrieval examples, CSV files; and the start, which needs no plotly.js.

// ---- the table of genes

const pccColumn = () => Object.keys(report.columns).find((name) => name === "PCC") ?? Object.keys(report.columns).find((name) => /PCC/i.test(name));
let order = { column: null, up: false };

function orderedGenes() {
  const column = order.column === null ? null : report.columns[order.column];
  const sign = order.up ? 1 : -1;
  const byName = (a, b) => report.genes[a].localeCompare(report.genes[b]);
  return report.genes.map((_, gene) => gene).sort((a, b) => {
    if (!column) return sign * byName(a, b);
    if (column[a] === null || column[b] === null) return (column[a] === null) - (column[b] === null) || byName(a, b);
    return sign * (column[a] - column[b]) || byName(a, b);
  });
}

function geneTable() {
  const names = [null, ...Object.keys(report.columns)], row = make("tr");
  for (const name of names) {
    const head = make("th", null, { scope: "col" }), button = make("button", name ?? "Gene", { type: "button" });
    if (Object.hasOwn(report.geneNotes ?? {}, name)) button.title = report.geneNotes[name];
    button.addEventListener("click", () => {
      order = { column: name, up: order.column === name ? !order.up : name === null };
      fillGenes();
      announce(`Sorted by ${name ?? "gene"}, ${order.up ? "ascending" : "descending"}.`);
    });
    head.append(button);
    row.append(head);
  }
  get("gene-table").tHead.append(row);
  get("genes-csv").addEventListener("click", genesCsv);
  order = { column: pccColumn() ?? null, up: !pccColumn() };
  fillGenes();
  const weak = (report.weak ?? []).filter(Boolean).length;
  get("genes-help").textContent = "A column's head sorts by it; a gene's name draws its maps. Read a correlation beside the gene's mean "
    + `expression: a gene that is hardly expressed cannot be predicted. ${report.weak ? `${weak} of ${report.genes.length} genes are greyed: PCC on validation below ${report.leastPcc}.` : ""}`;
}

function fillGenes() {
  const columns = Object.keys(report.columns);
  [...get("gene-table").tHead.rows[0].cells].forEach((cell, i) => {
    const here = (i ? columns[i - 1] : null) === order.column;
    cell.setAttribute("aria-sort", here ? (order.up ? "ascending" : "descending") : "none");
  });
  get("gene-table").tBodies[0].replaceChildren(...orderedGenes().map((gene) => {
    const row = make("tr", null, { "data-gene": gene }), head = make("th", null, { scope: "row" });
    const button = make("button", report.genes[gene], { type: "button" });
    button.disabled = !report.slices.length;
    button.addEventListener("click", () => { chooseGene(gene); get("maps").scrollIntoView({ behavior: "smooth" }); });
    head.append(button);
    if (isWeak(gene)) head.append(make("span", ", weak", { class: "unseen" }));
    row.classList.toggle("weak", isWeak(gene));
    row.append(head, ...columns.map((name) => {
      const value = report.columns[name][gene], cell = make("td");
      if (/PCC/i.test(name) && value !== null) {
        const meter = make("span", null, { class: "meter", "aria-hidden": "true" });
        meter.style.setProperty("--share", Math.max(0, value));
        cell.append(meter);
      }
      cell.append(show(value));
      return cell;
    }));
    return row;
  }));
  markRow();
}

function markRow() {
  for (const row of get("gene-table").tBodies[0].rows) row.classList.toggle("chosen", Boolean(report.slices.length) && Number(row.dataset.gene) === state.gene);
}

// ---- examples

function examples() {
  get("examples-help").textContent = `${report.examplesNote} Framed in green, with a check mark: the image's own profile.`.trim();
  get("example-list").append(...report.examples.map((one) => {
    const box = make("article", null, { class: "example" }), figure = make("figure"), list = make("ol");
    figure.append(make("img", null, { src: one.tile, alt: `Image of ${one.title}` }), make("figcaption", "the image", { class: "caption" }));
    list.append(...one.candidates.map((candidate) => {
      const item = make("li", null, { class: candidate.own ? "candidate own" : "candidate" });
      item.append(candidate.tile ? make("img", null, { src: candidate.tile, alt: `Tissue of profile ${candidate.label}` }) : make("span", "no image", { class: "none" }));
      if (candidate.own) item.append(make("span", "✓ its own", { class: "mark" }));
      item.append(make("span", candidate.label, { class: "label" }), make("span", `score ${show(candidate.score)}`, { class: "score" }));
      return item;
    }));
    box.append(make("h3", one.title), figure, list);
    return box;
  }));
}

// ---- tables as CSV files (RFC 4180)

function csv(rows) {
  const cell = (value) => (value === null || value === undefined ? "" : /[",\r\n]/.test(value) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
  return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}

function download(title, rows) {
  const name = `${title.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_|_$/g, "") || "table"}.csv`;
  const address = URL.createObjectURL(new Blob([csv(rows)], { type: "text/csv;charset=utf-8" }));
  const link = make("a", null, { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  announce(`${name}: ${rows.length - 1} rows.`);
}

function genesCsv() {
  const names = Object.keys(report.columns);
  download("genes", [["gene", ...names], ...orderedGenes().map((gene) => [report.genes[gene], ...names.map((name) => report.columns[name][gene])])]);
}

const metricsCsv = (i) => download(report.tables[i].title, [report.tables[i].columns, ...report.tables[i].rows]);

start();
