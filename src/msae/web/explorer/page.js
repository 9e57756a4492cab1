// The browser's side of the explorer. Pages come as HTML from `server.show`, made from the address alone: what is shown
// stands in the URL, so links, reload and the back button need nothing else. `element` and `server` are gradio's.
const root = element.querySelector("#msae");
const calls = {}; // of each part: whether one is under way, and the newest address that waits
let pages = 0;
let preview = null; // the picture that was dropped, to be seen; it never leaves this tab but to be embedded

const lost = () => {
  root.removeAttribute("aria-busy");
  if (root.querySelector(".lost")) return;
  const said = document.createElement("p");
  said.className = "problem lost";
  said.setAttribute("role", "alert");
  said.textContent = "msae explore does not answer. If it was stopped, start it again in its terminal, then reload this page.";
  root.prepend(said);
};

const ask = async (question) => {
  try {
    const answer = await server.show(question);
    if (answer && typeof answer.html === "string") return answer;
  } catch (error) {
    // said to the user by lost()
  }
  lost();
  return null;
};

async function show(address, { push = true, focus = true } = {}) {
  const mine = ++pages;
  root.setAttribute("aria-busy", "true");
  const answer = await ask({ address, part: "" });
  if (answer === null || mine !== pages) return;
  if (push) history.pushState(null, "", address);
  document.title = answer.title;
  root.innerHTML = answer.html;
  root.removeAttribute("aria-busy");
  if (focus) {
    root.querySelector("main").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }
  const place = root.querySelector("[data-preview]");
  if (place && preview) {
    const image = document.createElement("img");
    image.src = preview;
    image.alt = "the picture that was dropped";
    place.append(image);
  }
  for (const one of root.querySelectorAll("[data-load]")) change(one.dataset.load, address, "none");
}

// One request of a part at a time; of those that come meanwhile only the newest is sent.
async function change(part, address, history_ = "replace") {
  const call = (calls[part] ??= { busy: false, next: null });
  if (call.busy) {
    call.next = [address, history_];
    return;
  }
  call.busy = true;
  const shown = pages;
  const target = root.querySelector(`#part-${part}`);
  target?.setAttribute("aria-busy", "true");
  const answer = await ask({ address, part });
  call.busy = false;
  const next = call.next;
  call.next = null;
  if (answer !== null && shown === pages && target) {
    if (history_ === "push") history.pushState(null, "", address);
    if (history_ === "replace") history.replaceState(null, "", address);
    const focused = target.contains(document.activeElement) && document.activeElement.textContent;
    target.innerHTML = answer.html;
    target.removeAttribute("aria-busy");
    // A link that was followed by keyboard is a new one now: stay on it.
    if (focused) [...target.querySelectorAll("a")].find((a) => a.textContent[0] === focused[0])?.focus();
  }
  if (next && shown === pages) change(part, ...next);
}

function addressOf(form) {
  const now = new URLSearchParams(location.search);
  const wanted = form.hasAttribute("data-keep") ? now : new URLSearchParams();
  for (const key of ["page", "run"]) if (now.has(key)) wanted.set(key, now.get(key));
  for (const [key, value] of new FormData(form)) if (typeof value === "string" && value !== "") wanted.append(key, value);
  for (const slider of form.querySelectorAll("[data-turned]")) wanted.append("set", `${slider.dataset.concept}=${slider.value}`);
  return `?${wanted}`;
}

function send(form) {
  if (form.dataset.part) change(form.dataset.part, addressOf(form));
  else show(addressOf(form));
}

function turn(slider) {
  const isOwn = Math.abs(slider.value - slider.dataset.own) <= slider.step / 2;
  slider.toggleAttribute("data-turned", !isOwn);
  const value = Number(isOwn ? slider.dataset.own : slider.value);
  root.querySelector(`output[for="${slider.id}"]`).textContent = value.toFixed(2);
  send(slider.form);
}

async function embed(file) {
  const form = root.querySelector("form.ask");
  root.setAttribute("aria-busy", "true");
  const bytes = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(String(reader.result).split(",")[1] ?? "");
    reader.readAsDataURL(file);
  });
  let answer = null;
  try {
    answer = await server.embed({ picture: bytes });
  } catch (error) {
    lost();
  }
  root.removeAttribute("aria-busy");
  if (!answer) return;
  if (answer.problem) {
    form.insertAdjacentHTML("afterend", answer.problem);
    return;
  }
  if (preview) URL.revokeObjectURL(preview);
  preview = URL.createObjectURL(file);
  for (const name of ["text", "row"]) form.elements[name].value = "";
  form.elements.vector.value = answer.vector;
  send(form);
}

async function loadAudit(file) {
  try {
    root.querySelector("#part-loaded").innerHTML = (await server.audit({ text: await file.text() })).html;
  } catch (error) {
    lost();
  }
}

let typing = 0;
root.addEventListener("input", (event) => {
  const field = event.target;
  if (field.type === "range") return turn(field);
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

root.addEventListener("change", (event) => {
  const field = event.target;
  if (field.matches("[data-picture]") && field.files.length) embed(field.files[0]);
  else if (field.matches("[data-audit]") && field.files.length) loadAudit(field.files[0]);
  else if (field.matches("[data-run]")) {
    const wanted = new URLSearchParams(location.search);
    wanted.set("run", field.value);
    for (const key of ["set", "add", "from"]) wanted.delete(key);
    show(`?${wanted}`);
  } else if (field.name === "in") send(field.form);
});

root.addEventListener("submit", (event) => {
  event.preventDefault();
  send(event.target);
});

root.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-copy], button[data-reset]");
  if (button?.hasAttribute("data-copy")) {
    navigator.clipboard.writeText(location.href).then(() => (button.textContent = "Copied"), () => (button.textContent = "Copy it from the address bar"));
    return;
  }
  if (button) {
    const slider = root.querySelector(`#${button.dataset.reset}`);
    slider.value = slider.dataset.own;
    turn(slider);
    return;
  }
  const link = event.target.closest("a[href]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button !== 0) return;
  const where = link.getAttribute("href");
  if (where.startsWith("#")) {
    event.preventDefault();
    root.querySelector(where)?.focus();
  } else if (where.startsWith("?")) {
    event.preventDefault();
    if (link.dataset.part) change(link.dataset.part, where, "push");
    else show(where);
  }
});

for (const kind of ["dragover", "drop"]) {
  root.addEventListener(kind, (event) => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    const field = root.querySelector("[data-picture]:not([disabled])");
    if (kind === "drop" && field && event.dataTransfer.files.length) embed(event.dataTransfer.files[0]);
  });
}

window.addEventListener("popstate", () => show(location.search, { push: false }));
show(location.search, { push: false, focus: false });
