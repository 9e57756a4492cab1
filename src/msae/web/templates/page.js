// The browser's side of the explorer. What is shown stands in the URL: a page is a link, and a part of a page comes as
// HTML from /part/NAME with the same address, so that links, reload and the back button need nothing else.
"use strict";

const calls = {}; // of each part: whether one is under way, and the newest address that waits
let shown = location.search;

function say(html, after) {
  document.querySelector(".lost")?.remove();
  const said = document.createElement("div");
  said.className = "lost";
  said.innerHTML = html;
  after.after(said);
}

function lost() {
  say('<p class="problem" role="alert">msae explore does not answer. If it was stopped, start it again in its terminal, then reload this page.</p>', document.querySelector("h1"));
}

async function ask(address, options) {
  try {
    const answer = await fetch(address, options);
    if (answer.ok) return answer;
  } catch (error) {
    // said to the user by lost()
  }
  lost();
  return null;
}

// One request of a part at a time; of those that come meanwhile only the newest is sent.
async function change(part, address, history_ = "replace") {
  const call = (calls[part] ??= { busy: false, next: null });
  if (call.busy) {
    call.next = [address, history_];
    return;
  }
  call.busy = true;
  const target = document.querySelector(`#part-${part}`);
  target.setAttribute("aria-busy", "true");
  const answer = await ask(`/part/${part}${address}`);
  const html = answer && (await answer.text());
  call.busy = false;
  if (html !== null) {
    if (history_ === "push") history.pushState(null, "", address);
    if (history_ === "replace") history.replaceState(null, "", address);
    shown = location.search;
    const used = target.contains(document.activeElement) ? document.activeElement : null;
    target.innerHTML = html;
    target.dispatchEvent(new CustomEvent("msae-part", { bubbles: true }));
    // A link or box that was used by keyboard is a new one now: stay on it.
    const same = (one) => (used.name ? one.name === used.name : one.textContent[0] === used.textContent[0]);
    if (used) [...target.querySelectorAll(used.name ? "input" : "a")].find(same)?.focus();
  }
  target.removeAttribute("aria-busy");
  const next = call.next;
  call.next = null;
  if (next) change(part, ...next);
}

function addressOf(form) {
  const wanted = new URLSearchParams();
  for (const [key, value] of new FormData(form)) if (typeof value === "string" && value !== "") wanted.append(key, value);
  for (const slider of form.querySelectorAll("[data-turned]")) wanted.append("set", `${slider.dataset.concept}=${slider.value}`);
  return `?${wanted}`;
}

function send(form) {
  if (form.dataset.part) change(form.dataset.part, addressOf(form));
  else location.assign(addressOf(form));
}

function move(slider) {
  const isOwn = Math.abs(slider.value - slider.dataset.own) <= slider.step / 2;
  slider.toggleAttribute("data-turned", !isOwn);
  const value = Number(isOwn ? slider.dataset.own : slider.value);
  document.querySelector(`output[for="${slider.id}"]`).textContent = value.toFixed(2);
  send(slider.form);
}

// A small copy of a dropped picture, to be seen beside its neighbours; it stays in this tab.
async function preview(file) {
  const bitmap = await createImageBitmap(file);
  const canvas = document.createElement("canvas");
  canvas.width = 160;
  canvas.height = Math.max(1, Math.round((160 * bitmap.height) / bitmap.width));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg");
}

async function embed(file) {
  const form = document.querySelector("[data-picture]").form;
  document.querySelector("main").setAttribute("aria-busy", "true");
  const answer = await ask("/embed", { method: "POST", body: file });
  const found = answer && (await answer.json());
  if (found?.vector) {
    const picture = await preview(file).catch(() => "");
    sessionStorage.setItem("picture", JSON.stringify([found.vector, picture]));
    for (const name of ["text", "row"]) form.elements[name].value = "";
    form.elements.vector.value = found.vector;
    send(form);
    return;
  }
  document.querySelector("main").removeAttribute("aria-busy");
  if (found?.problem) say(found.problem, form);
}

async function loadAudit(file) {
  const answer = await ask("/audit", { method: "POST", body: file });
  if (answer) document.querySelector("#part-loaded").innerHTML = await answer.text();
}

let typing = 0;
document.addEventListener("input", (event) => {
  const field = event.target;
  if (field.type === "range") return move(field);
  const form = field.form;
  if (!form) return;
  if (form.matches(".ask") && ["text", "row"].includes(field.name)) {
    for (const other of ["text", "row", "vector"]) if (other !== field.name && form.elements[other]) form.elements[other].value = "";
  }
  if (form.matches(".controls")) {
    clearTimeout(typing);
    typing = setTimeout(() => send(form), field.type === "search" ? 200 : 0);
  }
});

document.addEventListener("change", (event) => {
  const field = event.target;
  if (field.matches("[data-picture]") && field.files.length) embed(field.files[0]);
  else if (field.matches("[data-audit]") && field.files.length) loadAudit(field.files[0]);
  else if (field.matches("[data-run]")) {
    const wanted = new URLSearchParams(location.search);
    wanted.set("run", field.value);
    for (const key of ["set", "add", "from"]) wanted.delete(key);
    location.assign(`?${wanted}`);
  } else if (field.name === "in") send(field.form);
});

document.addEventListener("submit", (event) => {
  event.preventDefault();
  send(event.target);
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-copy], button[data-reset]");
  if (button?.hasAttribute("data-copy")) {
    navigator.clipboard.writeText(location.href).then(() => (button.textContent = "Copied"), () => (button.textContent = "Copy it from the address bar"));
    return;
  }
  if (button) {
    const slider = document.querySelector(`#${button.dataset.reset}`);
    slider.value = slider.dataset.own;
    move(slider);
    return;
  }
  const link = event.target.closest("a[data-part]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button !== 0) return;
  event.preventDefault();
  change(link.dataset.part, link.getAttribute("href"), "push");
});

for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    const field = document.querySelector("[data-picture]:not([disabled])");
    if (kind === "drop" && field && event.dataTransfer.files.length) embed(event.dataTransfer.files[0]);
  });
}

window.addEventListener("popstate", () => {
  if (location.search !== shown) location.reload(); // not for a jump inside the page
});

const place = document.querySelector("[data-preview]");
if (place) {
  const [vector, picture] = JSON.parse(sessionStorage.getItem("picture") ?? "[]");
  if (picture && vector === new URLSearchParams(location.search).get("vector")) {
    const image = document.createElement("img");
    image.src = picture;
    image.alt = "the picture that was dropped";
    place.append(image);
  }
}

for (const one of document.querySelectorAll("[data-load]")) change(one.dataset.load, location.search, "none");

// The page that waits until the run and the store have been read.
const opening = document.querySelector("[data-opening]");
if (opening) {
  const look = async () => {
    const answer = await ask("/state");
    if (!answer) return opening.removeAttribute("aria-busy");
    const { doing, done } = await answer.json();
    opening.querySelector("[role=status]").textContent = `${doing} …`;
    if (done) location.reload();
    else setTimeout(look, 200);
  };
  look();
}
