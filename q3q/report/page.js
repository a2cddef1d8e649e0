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

// One line at a time: a legend's entry brings it out, and again shows all.
function bringOut(entry) {
  const svg = entry.closest("svg");
  const wanted = svg.dataset.only === entry.dataset.line ? "" : entry.dataset.line;
  svg.dataset.only = wanted;
  for (const part of svg.querySelectorAll("[data-line]")) {
    part.classList.toggle("faint", wanted !== "" && part.dataset.line !== wanted);
  }
}

for (const point of document.querySelectorAll("svg .point")) {
  point.addEventListener("pointerenter", () => show(point));
  point.addEventListener("focus", () => show(point));
  for (const end of ["pointerleave", "blur"]) point.addEventListener(end, () => { tip.hidden = true; });
}
for (const entry of document.querySelectorAll("svg .entry")) {
  entry.addEventListener("click", () => bringOut(entry));
  entry.addEventListener("keydown", (event) => { if (event.key === "Enter") bringOut(entry); });
}
for (const button of document.querySelectorAll(".command button")) {
  button.addEventListener("click", () => {
    const text = button.previousElementSibling.textContent;
    const done = () => { button.textContent = "Copied"; };
    // A page opened from a file may not use the clipboard: then the text is selected.
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => select(button));
    else select(button);
  });
}

function select(button) {
  getSelection().selectAllChildren(button.previousElementSibling);
}
