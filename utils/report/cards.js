"use strict";
// Small maps of several genes side by side, on canvases: a browser gives a page few WebGL contexts. And the start of maps.

const CARD = { width: 250, most: 12, first: 4 }; // pixels; cards; of them at the beginning
let pinned = [], cardKind = "predicted", picture = { of: "", ready: null };

// The H&E of the slice, decoded once; null where there is none.
function pictureOf(one) {
  const of = one.image?.block ?? "";
  if (picture.of !== of || !picture.ready) {
    const image = new Image();
    image.src = of ? blockText(of) : "data:,";
    picture = { of, ready: of ? image.decode().then(() => image) : Promise.resolve(null) };
  }
  return picture.ready;
}

// 256 colours of a scale: text of each.
function coloursOf(scale) {
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return Array.from({ length: 256 }, (_, i) => {
    const t = i / 255, next = Math.max(1, scale.findIndex(([at]) => at >= t)), [[a, low], [b, high]] = [scale[next - 1], scale[next]];
    const mixed = parts(low).map((v, k) => Math.round(v + ((t - a) / (b - a)) * (parts(high)[k] - v)));
    return `rgb(${mixed.join(",")})`;
  });
}

function drawCard(canvas, gene, image) {
  const one = slice(), { left, right, top, bottom } = extent(), scale = CARD.width / (right - left), sharp = devicePixelRatio;
  canvas.width = CARD.width * sharp;
  canvas.height = Math.min(2 * CARD.width, (bottom - top) * scale) * sharp;
  const pen = canvas.getContext("2d"), list = values(cardKind, gene), [low, high] = rangeOf(cardKind, gene), colours = coloursOf(scaleOf(cardKind, gene));
  pen.setTransform(scale * sharp, 0, 0, scale * sharp, -left * scale * sharp, -top * scale * sharp);
  pen.globalAlpha = state.image;
  if (image) pen.drawImage(image, 0, 0, one.image.width, one.image.height);
  pen.globalAlpha = state.opacity;
  list.forEach((value, i) => {
    if (Number.isNaN(value)) return;
    pen.fillStyle = colours[Math.max(0, Math.min(255, Math.round(((value - low) / (high - low)) * 255)))];
    pen.beginPath();
    pen.arc(one.x[i], one.y[i], Math.max(one.diameter / 2, 1 / scale), 0, 2 * Math.PI);
    pen.fill();
  });
  const words = `${KINDS[cardKind]} ${report.genes[gene]}, colours from ${precise(low)} to ${precise(high)}`;
  canvas.setAttribute("aria-label", words);
}

function card(gene, image) {
  const box = make("article", null, { class: "card", role: "listitem", "data-gene": gene }), head = make("div", null, { class: "bar" });
  const name = make("button", report.genes[gene], { type: "button", class: "name", title: "Draw it in the large maps" });
  const away = make("button", "×", { type: "button", "aria-label": `Remove ${report.genes[gene]}` });
  name.addEventListener("click", () => { chooseGene(gene); get("maps").scrollIntoView({ behavior: "smooth" }); });
  away.addEventListener("click", () => { pinned = pinned.filter((other) => other !== gene); drawCards(); announce(`${report.genes[gene]} removed.`); get("pin").focus(); });
  head.append(name, away);
  const canvas = make("canvas", null, { role: "img" });
  drawCard(canvas, gene, image);
  const [low, high] = rangeOf(cardKind, gene), legend = make("div", null, { class: "legend", "aria-hidden": "true" }), strip = make("span", null, { class: "strip" });
  strip.style.background = `linear-gradient(to right, ${scaleOf(cardKind, gene).map(([at, hex]) => `${hex} ${100 * at}%`).join(", ")})`;
  legend.append(make("span", show(low, 2)), strip, make("span", show(high, 2)));
  const key = pccColumn(), words = [key ? `${key} ${show(report.columns[key][gene])}` : "", isWeak(gene) ? "greyed" : ""].filter(Boolean);
  box.append(head, canvas, legend, make("p", words.join(", "), { class: "help" }));
  return box;
}

let cardsDrawn = Promise.resolve(), cardsWanted = false;

// Several changes before the next frame are drawn once.
function drawCards() {
  if (!cardsWanted) cardsDrawn = new Promise((done) => requestAnimationFrame(() => { cardsWanted = false; drawCardsNow().then(done); }));
  cardsWanted = true;
  return cardsDrawn;
}

async function drawCardsNow() {
  const image = await pictureOf(slice());
  get("cards").replaceChildren(...pinned.map((gene) => card(gene, image)));
  get("cards").dataset.drawn = `${state.slice} ${cardKind} ${state.range} ${pinned.join(" ")}`;
  pinButton();
}

function pinButton() {
  const there = pinned.includes(state.gene), full = pinned.length >= CARD.most;
  get("pin").textContent = there ? `${report.genes[state.gene]} is shown` : full ? `At most ${CARD.most} genes` : `Add ${report.genes[state.gene]}`;
  get("pin").disabled = there || full;
}

function cardKinds() {
  const kinds = kindsOf(slice()).filter((kind) => kind in slice().maps);
  if (!kinds.includes(cardKind)) cardKind = kinds[0];
  get("card-kind").replaceChildren(...kinds.map((kind) => make("option", KINDS[kind], { value: kind })));
  get("card-kind").value = cardKind;
}

function startCards() {
  pinned = orderedGenes().filter((gene) => !isWeak(gene)).slice(0, CARD.first);
  cardKinds();
  get("card-kind").addEventListener("change", () => { cardKind = get("card-kind").value; drawCards(); });
  get("pin").addEventListener("click", () => { pinned = [...pinned, state.gene]; announce(`${report.genes[state.gene]} added.`); drawCards(); });
  watchers.push((what) => {
    if (what === "gene") pinButton();
    if (what === "slice") cardKinds();
    if (what === "slice" || what === "look") drawCards();
  });
  return drawCards();
}

startMaps().then(() => (report.slices.length ? startCards() : null))
  .then(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); }); // ms
