"use strict";
// Conveniences only: without this script the page shows everything.
const controls = document.getElementById("controls");
const lane = document.getElementById("lane");
const status = document.getElementById("status");
const shown = document.getElementById("shown");

function matches(element) {
  const laneAgrees = !lane.value || element.dataset.lane === lane.value;
  const statusAgrees = !status.value || !element.dataset.status || element.dataset.status === status.value;
  return laneAgrees && statusAgrees;
}

function filter() {
  for (const element of document.querySelectorAll("[data-lane]")) {
    element.hidden = !matches(element);
  }
  let count = 0;
  for (const line of document.querySelectorAll(".matrix tbody tr")) {
    line.hidden = Boolean(lane.value || status.value) && !line.querySelector(".cell:not([hidden])");
    count += line.hidden ? 0 : 1;
  }
  shown.textContent = lane.value || status.value ? count + (count === 1 ? " kernel shown" : " kernels shown") : "";
}

function copy(button, code) {
  const done = () => { button.textContent = "Copied"; };
  const select = () => { window.getSelection().selectAllChildren(code); button.textContent = "Selected"; };
  if (navigator.clipboard) {
    navigator.clipboard.writeText(code.textContent).then(done, select);
  } else {
    select();
  }
}

if (controls) {
  controls.hidden = false;
  lane.addEventListener("change", filter);
  status.addEventListener("change", filter);
  filter();  // a browser may have kept a choice over a reload
}
for (const code of document.querySelectorAll(".command code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", () => copy(button, code));
  code.after(button);
}
