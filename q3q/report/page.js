"use strict";
const tip = document.getElementById("tip");

function show(point) {
  const box = point.getBoundingClientRect();
  tip.textContent = point.dataset.tip;
  tip.hidden = false;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = left + "px";
  tip.style.top = (above > 0 ? above : box.bottom + 8) + "px";
}

// A legend's entry highlights its line; a second click shows all lines again.
function highlight(entry) {
  const svg = entry.closest("svg");
  const line = svg.dataset.only === entry.dataset.line ? "" : entry.dataset.line;
  svg.dataset.only = line;
  for (const part of svg.querySelectorAll("[data-line]")) {
    part.classList.toggle("faint", line !== "" && part.dataset.line !== line);
  }
}

addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
for (const point of document.querySelectorAll("svg .point")) {
  point.addEventListener("pointerenter", () => show(point));
  point.addEventListener("focus", () => show(point));
  for (const end of ["pointerleave", "blur"]) point.addEventListener(end, () => { tip.hidden = true; });
}
for (const entry of document.querySelectorAll("svg .entry")) {
  entry.addEventListener("click", () => highlight(entry));
  entry.addEventListener("keydown", (event) => { if (event.key === "Enter") highlight(entry); });
}
for (const button of document.querySelectorAll(".command button")) {
  button.addEventListener("click", () => {
    const text = button.previousElementSibling.textContent;
    const done = () => { button.textContent = "Copied"; };
    // A page opened from a file may lack the clipboard; then the text is selected.
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => select(button));
    else select(button);
  });
}

function select(button) {
  getSelection().selectAllChildren(button.previousElementSibling);
}
