// The map of the latents: points drawn by sigma (vendor/README.md), cards from /part/card, the list from /part/points.
"use strict";

const plane = document.querySelector("#plane");
const card = plane.querySelector(".card");
const form = document.querySelector("form[data-part=points]");
const style = getComputedStyle(document.documentElement);
const theme = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)");
const FAINT = 0.6; // of its size, a point that does not fit
const CARD_DELAY = 90; // milliseconds that the pointer rests before a card is asked for

function value(name) {
  return style.getPropertyValue(name).trim();
}

function failed(html) {
  plane.querySelector("[role=status]").outerHTML = html;
  plane.removeAttribute("aria-busy");
}

async function start() {
  const answer = await ask(`/places${location.search}`);
  if (!answer) return failed("");
  const found = await answer.json();
  if (found.problem) return failed(found.problem);
  document.querySelector("#method").textContent = found.method;
  let map;
  try {
    map = new LatentMap(found);
  } catch (error) {
    return failed('<p class="problem" role="alert">This browser cannot draw the map, for it has no WebGL; the list has the same latents.</p>');
  }
  plane.querySelector("[role=status]").remove();
  plane.removeAttribute("aria-busy");
  window.latentMap = map; // for whoever looks into it, such as the tests
}

class LatentMap {
  constructor(found) {
    this.found = found;
    this.fits = null; // a set of latents, or null for all
    this.alone = null; // the class that is shown alone
    this.active = null; // the latent under the pointer or the focus
    this.pinned = null;
    this.cards = new Map();
    this.place = new Map(found.latents.map((latent, i) => [String(latent), i]));
    const graph = new graphology.Graph();
    found.latents.forEach((latent, i) => graph.addNode(latent, { x: found.x[i], y: found.y[i] }));
    this.read();
    this.sigma = new Sigma(graph, plane, {
      nodeProgramClasses: { circle: Sigma.rendering.NodePointProgram },
      labelFont: "system-ui, sans-serif",
      labelSize: 12,
      labelRenderedSizeThreshold: 0,
      labelDensity: 0.5,
      labelGridCellSize: 110,
      stagePadding: 20,
      minCameraRatio: 0.002,
      maxCameraRatio: 2,
      zIndex: true,
      nodeReducer: (latent) => this.drawn(latent),
      defaultDrawNodeHover: (context, point) => this.ring(context, point),
      labelColor: { color: value("--ink") },
    });
    this.sigma.on("enterNode", ({ node }) => this.show(node));
    this.sigma.on("leaveNode", () => this.show(this.pinned));
    this.sigma.on("clickNode", ({ node }) => this.pin(node));
    this.sigma.on("clickStage", () => this.pin(null));
    this.sigma.getCamera().on("updated", () => this.put());
    theme.addEventListener("change", () => this.redraw());
    if (this.place.has(plane.dataset.latent)) this.pin(plane.dataset.latent, true);
  }

  // What the form and the list say.
  read() {
    const fits = document.querySelector("[data-fits]").dataset.fits;
    this.fits = fits === "all" ? null : new Set(fits.split(" "));
    this.by = form.elements.by?.value || Object.keys(this.found.classes)[0];
    this.colours = (this.found.classes[this.by] && [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11].map((i) => value(`--${this.by}-${i}`))) || [];
    this.ink = value("--accent");
    this.faint = value("--faint");
  }

  isFit(latent, i) {
    const of = this.found.classes[this.by];
    return (!this.fits || this.fits.has(latent)) && (this.alone === null || of[i] === this.alone);
  }

  drawn(latent) {
    const i = this.place.get(latent);
    const base = { ...this.at(latent), size: this.found.size[i], zIndex: 1, label: null, highlighted: latent === this.active };
    if (!this.isFit(latent, i)) return { ...base, size: FAINT * base.size, color: this.faint, zIndex: 0 };
    const of = this.found.classes[this.by];
    return { ...base, color: of ? this.colours[of[i]] : this.ink, label: this.found.names[latent] ?? null };
  }

  redraw() {
    this.read();
    this.sigma.setSetting("labelColor", { color: value("--ink") });
    this.sigma.refresh();
  }

  ring(context, point) {
    context.beginPath();
    context.arc(point.x, point.y, point.size + 4, 0, 2 * Math.PI);
    context.lineWidth = 3;
    context.strokeStyle = value("--ink");
    context.stroke();
  }

  // A latent with its ring and its card; null hides both.
  show(latent, wait = CARD_DELAY) {
    if (latent !== null && latent === this.active && !card.hidden) return;
    const changed = [this.active, latent].filter((one) => one !== null);
    clearTimeout(this.waiting);
    this.active = latent;
    card.hidden = true;
    this.sigma.refresh({ partialGraph: { nodes: changed }, skipIndexation: true, schedule: true });
    if (latent !== null) this.waiting = setTimeout(() => this.fill(latent), wait);
  }

  async fill(latent) {
    if (!this.cards.has(latent)) {
      const wanted = new URLSearchParams(location.search);
      wanted.set("page", "map");
      wanted.set("latent", latent);
      const answer = await ask(`/part/card?${wanted}`);
      if (!answer) return;
      this.cards.set(latent, await answer.text());
    }
    if (this.active !== latent) return;
    card.innerHTML = this.cards.get(latent);
    card.hidden = false;
    this.put();
  }

  // The card stays beside its point and inside the plane; a narrow plane has it at its lower end, by style.css.
  put() {
    if (card.hidden || this.active === null) return;
    const at = this.sigma.graphToViewport(this.at(this.active));
    const { width, height } = this.sigma.getDimensions();
    const left = at.x + 14 + card.offsetWidth < width ? at.x + 14 : at.x - 14 - card.offsetWidth;
    card.style.left = `${Math.max(0, Math.min(left, width - card.offsetWidth))}px`;
    card.style.top = `${Math.max(0, Math.min(at.y - card.offsetHeight / 2, height - card.offsetHeight))}px`;
  }

  at(latent) {
    const i = this.place.get(latent);
    return { x: this.found.x[i], y: this.found.y[i] };
  }

  pin(latent, isCentred = false) {
    this.pinned = latent;
    card.classList.toggle("pinned", latent !== null);
    if (latent !== null && isCentred) this.centre(latent);
    this.show(latent, 0);
  }

  centre(latent) {
    const { x, y } = this.sigma.getNodeDisplayData(latent);
    const camera = this.sigma.getCamera();
    this.move({ x, y, ratio: Math.min(camera.ratio, 0.25) });
  }

  move(state) {
    const camera = this.sigma.getCamera();
    if (still.matches) camera.setState({ ...camera.getState(), ...state });
    else camera.animate(state, { duration: 200 });
  }

  zoom(how) {
    const { ratio } = this.sigma.getCamera();
    if (how === "all") this.move({ x: 0.5, y: 0.5, ratio: 1, angle: 0 });
    else this.move({ ratio: this.sigma.getCamera().getBoundedRatio(how === "in" ? ratio / 1.6 : ratio * 1.6) });
  }

  pan(x, y) {
    const camera = this.sigma.getCamera();
    this.move({ x: camera.x + 0.15 * camera.ratio * x, y: camera.y + 0.15 * camera.ratio * y });
  }
}

const KEYS = {
  "+": (map) => map.zoom("in"),
  "=": (map) => map.zoom("in"),
  "-": (map) => map.zoom("out"),
  0: (map) => map.zoom("all"),
  ArrowLeft: (map) => map.pan(-1, 0),
  ArrowRight: (map) => map.pan(1, 0),
  ArrowUp: (map) => map.pan(0, 1),
  ArrowDown: (map) => map.pan(0, -1),
  Escape: (map) => map.pin(null),
};

plane.addEventListener("keydown", (event) => {
  if (!window.latentMap || event.target !== plane || !KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  KEYS[event.key](window.latentMap);
});

document.addEventListener("msae-part", () => window.latentMap?.redraw());

form.addEventListener("input", (event) => {
  if (event.target.name !== "by") return;
  for (const legend of document.querySelectorAll(".classes")) legend.hidden = legend.dataset.scale !== event.target.value;
  alone(null);
});

// One class of a legend alone, or all of them.
function alone(button) {
  const isOn = button?.getAttribute("aria-pressed") === "false";
  for (const one of document.querySelectorAll(".classes button")) one.setAttribute("aria-pressed", String(isOn && one === button));
  if (!window.latentMap) return;
  window.latentMap.alone = isOn ? Number(button.dataset.class) : null;
  window.latentMap.redraw();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".classes button, [data-zoom]");
  if (button?.dataset.zoom) window.latentMap?.zoom(button.dataset.zoom);
  else if (button) alone(button);
});

// The list: what the keyboard or the pointer is on has its ring in the map.
for (const [kind, isOn] of [["focusin", true], ["pointerover", true], ["focusout", false], ["pointerout", false]]) {
  document.addEventListener(kind, (event) => {
    const point = event.target.closest?.("[data-point]");
    if (point && window.latentMap?.place.has(point.dataset.point)) window.latentMap.show(isOn ? point.dataset.point : window.latentMap.pinned, 0);
  });
}

start();
