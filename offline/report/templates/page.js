"use strict";

document.documentElement.classList.add("js");

// Theme: what the system says, unless a person chooses.
const theme = document.getElementById("theme");
const themes = ["system", "light", "dark"];
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.firstElementChild.textContent = name;
  try { localStorage.setItem("grains-theme", name); } catch { /* a file may have no storage */ }
}
let remembered = null;
try { remembered = localStorage.getItem("grains-theme"); } catch { /* as above */ }
if (themes.includes(remembered)) setTheme(remembered);
theme.hidden = false;
theme.addEventListener("click", () => {
  const now = theme.firstElementChild.textContent;
  setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
});

// Examples: search, filter, sort.
function plain(text) {
  return text.replace(/[↵⇥·\s]+/g, " ").toLowerCase();
}
for (const section of document.querySelectorAll(".examples")) {
  const form = section.querySelector("form");
  const list = section.querySelector(".list");
  const count = section.querySelector(".count");
  const items = [...list.children];
  let texts = null; // made when somebody searches
  const keys = {
    gap: (item) => -item.dataset.gap,
    high: (item) => -item.dataset.f,
    low: (item) => +item.dataset.f,
  };
  const { text, show, sort } = form.elements;
  function apply() {
    const wanted = plain(text.value).trim();
    if (wanted) {
      texts ??= items.map((item) =>
        plain(`${item.querySelector(".id").textContent} ${item.querySelector(".prompt").textContent}`));
    }
    let shown = 0;
    items.forEach((item, index) => {
      const fits = (!wanted || texts[index].includes(wanted)) &&
        (!show.value || show.value in item.dataset);
      item.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${items.length} examples shown`;
  }
  function reorder() {
    const key = keys[sort.value];
    const ordered = key ? [...items].sort((a, b) => key(a) - key(b)) : items;
    list.append(...ordered);
  }
  let waiting = 0;
  text.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 120);
  });
  show.addEventListener("change", apply);
  sort.addEventListener("change", reorder);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.open.addEventListener("click", () => {
    for (const item of items) if (!item.hidden) item.open = true;
  });
  form.elements.close.addEventListener("click", () => {
    for (const item of items) item.open = false;
  });
  form.hidden = false;
  apply();
  if (sort.value) reorder(); // browsers remember what was chosen
  for (const item of items) item.querySelector(".prompt").tabIndex = 0;
}

// Tokens: the pointer or the arrow keys pick one, and a line says what it is.
function pick(prompt, token) {
  prompt.querySelector(".here")?.classList.remove("here");
  const line = prompt.parentElement.querySelector(".read");
  if (!token) {
    line.textContent = "";
    return;
  }
  const tokens = [...prompt.querySelectorAll("[data-s]")];
  const words = [`token ${tokens.indexOf(token)} “${token.textContent.replace("\n", "")}”`,
    token.dataset.s.replace("-", "−")];
  if (token.classList.contains("plus")) words.push("in T+");
  if (token.classList.contains("minus")) words.push("in T−");
  if (token.classList.contains("dim")) words.push("template or special");
  line.textContent = words.join(", ");
}
document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".example [data-s]");
  if (token) pick(token.parentElement, token);
});
document.addEventListener("keydown", (event) => {
  const prompt = event.target;
  if (!prompt.matches?.(".example .prompt")) return;
  const tokens = [...prompt.querySelectorAll("[data-s]")];
  const now = tokens.indexOf(prompt.querySelector(".here"));
  const next = {
    ArrowRight: Math.min(now + 1, tokens.length - 1),
    ArrowLeft: Math.max(now - 1, 0),
    Home: 0,
    End: tokens.length - 1,
  }[event.key];
  if (event.key === "Escape") pick(prompt, null);
  if (next === undefined) return;
  event.preventDefault();
  pick(prompt, tokens[next]);
  tokens[next].classList.add("here");
  tokens[next].scrollIntoView({ block: "nearest" });
});
document.addEventListener("focusout", (event) => {
  if (event.target.matches?.(".example .prompt")) pick(event.target, null);
});
