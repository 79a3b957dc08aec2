/* Fragments that the server made, put into a page without loading it anew.

   <form data-post="/path" data-into="#result" data-on="input, load">   or data-get; any element may carry these
   data-on   input | change | click | submit | load | every 2s, several joined by commas; default: submit of a form, else click
   data-into where the answer goes (default: the element itself); data-address: also keep the fields in the page's address
   The fields of the enclosing form are sent, with the button that was pressed. One request is under way per target: what
   happens meanwhile is sent when it has come back, only the latest of it. What fails is shown in the target, as text.
   The target gets the event "swapped" (detail: ok), and a range input's <output for=its id> says its value. */
"use strict";

const waiting = new Map(); // target -> the request to send next, or null while only one is under way

function fields(element, submitter) {
  const form = element.closest("form");
  return form ? new FormData(form, submitter?.form === form ? submitter : null) : new FormData();
}

async function answer(element, data) {
  const multipart = element.closest("form")?.enctype === "multipart/form-data";
  const query = new URLSearchParams([...data].filter(([, value]) => typeof value === "string"));
  if (element.dataset.address !== undefined) history.replaceState(null, "", "?" + query);
  const headers = { "X-Swap": "1" };
  if (element.dataset.post !== undefined) {
    return fetch(element.dataset.post, { method: "POST", headers, body: multipart ? data : query });
  }
  const path = element.dataset.get;
  return fetch(path + (path.includes("?") ? "&" : "?") + query, { headers });
}

async function words(response) { // of an error: our JSON body, or the status
  const text = await response.text();
  try { return JSON.parse(text).error.message; } catch { return `the server answered ${response.status}`; }
}

async function swap(element, submitter) {
  const target = element.dataset.into ? document.querySelector(element.dataset.into) : element;
  if (!target) return;
  if (waiting.has(target)) { waiting.set(target, () => swap(element, submitter)); return; }
  waiting.set(target, null);
  target.setAttribute("aria-busy", "true");
  let ok = false, line = "";
  try {
    const response = await answer(element, fields(element, submitter));
    ok = response.ok;
    if (ok) { target.innerHTML = await response.text(); wire(target); } else line = await words(response);
  } catch { line = "the server does not answer; is it still running?"; }
  if (!ok) {
    const note = document.createElement("p");
    note.className = "note error";
    note.textContent = line;
    target.replaceChildren(note);
  }
  target.removeAttribute("aria-busy");
  target.dispatchEvent(new CustomEvent("swapped", { bubbles: true, detail: { ok } }));
  const next = waiting.get(target);
  waiting.delete(target);
  if (next) next();
}

function wireOne(element) {
  const isForm = element.tagName === "FORM";
  const events = (element.dataset.on || (isForm ? "submit" : "click")).split(",").map((name) => name.trim());
  for (const name of events) {
    const every = /^every (\d+(?:\.\d+)?)s$/.exec(name);
    if (every) {
      const timer = setInterval(() => {
        if (!element.isConnected) clearInterval(timer);
        else if (!document.hidden) swap(element);
      }, 1000 * every[1]);
    } else if (name === "load") swap(element);
    else element.addEventListener(name, (event) => {
      if (name === "submit" || name === "click") event.preventDefault();
      swap(element, event.submitter || (name === "click" ? element : null));
    });
  }
  if (isForm && !events.includes("submit")) element.addEventListener("submit", (event) => event.preventDefault());
}

function wire(root) {
  for (const element of root.querySelectorAll("[data-get], [data-post]")) wireOne(element);
}

document.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  for (const output of document.querySelectorAll("output")) {
    if (output.htmlFor.contains(event.target.id)) output.value = event.target.value;
  }
});
wire(document);
