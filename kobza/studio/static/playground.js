/* The playground's texts: kept here as ids, written by the server token by token, shown as chips.

   A pane is one text being written (a model, drawn or greedy); it has branches, and shows one. A branch is
   { prompt, messages, ids (before the text), tokens, parent, words, line }. Whatever a chip shows is set as text, never as HTML.
   The bars on the right are the server's (swap.js sends the form); here their hidden fields are set: where to look. */
"use strict";

const form = document.querySelector("#play");
const find = (query, root = document) => root.querySelector(query);
const field = (name) => form.elements[name];
const percent = (p) => (p > 0 && p < 0.001 ? "<0.1 %" : (100 * p).toFixed(1) + " %");
let panes = [];

// ---- showing ----

function chip(token, k) {
  const span = document.createElement("span");
  span.className = `chip p${token.c}` + (token.t.includes("\n") ? " newline" : "");
  span.textContent = token.t;
  if (!token.t) span.dataset.unseen = token.s.includes("\ufffd") ? "·" : token.s;
  span.setAttribute("role", "button");
  span.tabIndex = k ? -1 : 0;
  span.title = span.ariaLabel = `${token.s}  ${percent(token.p)}`;
  span.dataset.k = k;
  return span;
}

function bubble(message) {
  const box = document.createElement("div");
  box.className = `bubble ${message.role}`;
  box.dir = "auto";
  box.textContent = message.content;
  return box;
}

function show(pane, branch) {
  pane.shown = branch;
  find(".answer", pane.root).replaceChildren(...branch.tokens.map(chip));
  find(".talk", pane.root).replaceChildren(...(branch.messages || []).map(bubble));
  find(".line", pane.root).classList.toggle("hidden", !branch.line);
  find(".line pre", pane.root).textContent = branch.line;
  say(pane);
  const buttons = pane.branches.length < 2 ? [] : pane.branches.map((one, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "small";
    button.textContent = `${"↳ ".repeat(Math.min(one.depth, 4))}${i + 1}${one.from}`;
    button.ariaPressed = String(one === branch);
    button.addEventListener("click", () => { show(pane, one); look(pane, 0); });
    return button;
  });
  find(".branches", pane.root).replaceChildren(...buttons);
}

function say(pane, words) {
  const status = find(".status", pane.root);
  status.textContent = words ?? pane.shown?.words ?? "";
  status.classList.toggle("bad", Boolean(!words && pane.shown?.failed));
}

const textOf = (branch) => branch.tokens.map((token) => token.t).join("");

// ---- where the bars look ----

function look(pane, k, chosen = true) { // at the place before token k of what a pane shows; without a pane: the prompt's end
  for (const old of form.querySelectorAll(".chip.chosen")) old.classList.remove("chosen");
  const branch = pane?.shown, token = branch?.tokens[k];
  pane = branch?.ids && pane;
  field("at").value = pane ? pane.model() : "";
  field("ids").value = pane ? [...branch.ids, ...branch.tokens.slice(0, k).map((one) => one.id)].join() : "";
  field("chosen").value = pane && token ? token.id : "";
  field("draw").value = pane && token ? Math.min(token.draw, field("tokens").value - 1) : "";
  form.looking = pane ? { pane, branch, k } : null;
  if (token && chosen) find(`[data-k="${k}"]`, pane.root)?.classList.add("chosen");
  if (!pane) field("messages").value = chatting() ? JSON.stringify(talkSoFar(panes[0])) : "";
  form.dispatchEvent(new Event("look"));
}

const chatting = () => field("mode").value === "chat";

function talkSoFar(pane) { // and what stands in the box
  const last = pane.shown, past = last?.messages || [];
  const answered = last && past.length ? [...past, { role: "assistant", content: textOf(last).trim() }] : [];
  return [...answered, { role: "user", content: field("prompt").value }];
}

// ---- writing ----

function body(pane, extra) {
  const data = new URLSearchParams(new FormData(form));
  for (const name of ["at", "messages", "ids", "chosen", "draw"]) data.delete(name);
  data.set("model", pane.model());
  if (pane.greedy) data.set("temperature", "0");
  for (const [name, value] of Object.entries(extra)) data.set(name, value);
  return data;
}

async function* events(response) { // lines of JSON, as they come
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function take(pane, branch, event) { // one event into a branch
  if (event.error) throw new Error(event.error);
  if (event.start) {
    branch.ids ??= event.start.ids;
    branch.line = event.start.command;
  } else if (event.end) {
    const ended = event.end.why === "end" ? "ended by itself" : "at the limit of tokens";
    const pace = event.end.n / Math.max(event.end.seconds, 1e-3);
    branch.words = `${branch.tokens.length} tokens, ${pace.toFixed(0)} a second, ${ended}`;
    if (event.end.rest && branch.tokens.length) branch.tokens.at(-1).t += event.end.rest;
  } else {
    event.draw ??= branch.tookAt ?? 0; // a token that was put there has the draw that fell there
    branch.tokens.push(event);
    branch.words = `${branch.tokens.length} tokens …`;
    if (pane.shown === branch) find(".answer", pane.root).append(chip(event, branch.tokens.length - 1));
  }
}

async function write(pane, branch, extra) {
  pane.branches.push(branch);
  pane.stop = new AbortController();
  show(pane, branch);
  busy();
  try {
    const response = await fetch("/playground/write", {
      method: "POST", headers: { "X-Swap": "1" }, body: body(pane, extra), signal: pane.stop.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      take(pane, branch, event);
      if (pane.shown === branch) say(pane);
    }
  } catch (error) {
    branch.failed = error.name !== "AbortError";
    branch.words = branch.failed ? error.message : `stopped after ${branch.tokens.length} tokens`;
  }
  pane.stop = null;
  if (pane.shown === branch) show(pane, branch);
  busy();
}

function busy() {
  const writing = panes.some((pane) => pane.stop);
  find("#go").disabled = writing;
  find("#stop").disabled = !writing;
}

async function begin() { // a new text in every pane; of a chat, the next turn
  if (panes.some((pane) => pane.stop)) return;
  const chat = chatting();
  const texts = panes.map((pane) => {
    const messages = chat ? talkSoFar(pane) : null;
    if (chat && pane.shown?.failed) messages.splice(0, messages.length - 1, ...(pane.shown.messages || []).slice(0, -1));
    const depth = 0, branch = { messages, ids: null, tokens: [], depth, from: "", words: "…", line: "" };
    if (chat) pane.branches = [];
    return write(pane, branch, chat ? { messages: JSON.stringify(messages) } : {});
  });
  if (chat) field("prompt").value = "";
  await Promise.all(texts);
  if (chat && panes[0]?.shown?.failed) field("prompt").value = panes[0].shown.messages.at(-1).content; // to be mended
  if (panes[0]?.shown) look(panes[0], 0, false);
}

async function goOn(id) { // from the place the bars look at, with another token there
  const place = form.looking;
  if (!place) { await write(panes[0], fresh(), { ...inChat(panes[0]), take: id }); look(panes[0], 0, false); return; }
  const { pane, branch, k } = place;
  if (pane.stop) return;
  const before = branch.tokens.slice(0, k);
  const next = {
    messages: branch.messages, ids: branch.ids, tokens: before, depth: branch.depth + 1,
    from: ` at ${k + 1}`, words: "…", line: "", tookAt: branch.tokens[k]?.draw,
  };
  const ids = [...branch.ids, ...before.map((token) => token.id)].join();
  await write(pane, next, { ids, take: id });
  look(pane, k, true);
}

const fresh = () => ({
  messages: chatting() ? talkSoFar(panes[0]) : null, ids: null, tokens: [], depth: 0, from: "", words: "…", line: "",
});
const inChat = (pane) => (chatting() ? { messages: JSON.stringify(talkSoFar(pane)) } : {});

// ---- the page ----

function arrange() { // panes for what is chosen; texts begin anew
  const compare = field("compare").value, chat = chatting();
  for (const pane of panes) pane.stop?.abort();
  if (compare === "models" && field("other").value === field("model").value) { // two, where there are two
    field("other").selectedIndex = (field("model").selectedIndex + 1) % field("model").length;
  }
  const model = () => field("model").value, other = () => field("other").value;
  const wanted = [{ model, greedy: false }];
  if (compare === "greedy") wanted.push({ model, greedy: true });
  if (compare === "models") wanted.push({ model: other, greedy: false });
  panes = wanted.map((one) => {
    const root = find("#pane").content.cloneNode(true).firstElementChild;
    const pane = { ...one, root, branches: [], shown: null, stop: null };
    find(".who", root).textContent = one.model();
    find(".how", root).textContent = one.greedy ? "greedy" : "drawn";
    find(".answer", root).addEventListener("pointerover", (event) => point(pane, event));
    find(".answer", root).addEventListener("focusin", (event) => point(pane, event));
    find(".answer", root).addEventListener("pointerleave", () => say(pane));
    find(".answer", root).addEventListener("click", (event) => press(pane, event.target));
    find(".answer", root).addEventListener("keydown", (event) => keys(pane, event));
    return pane;
  });
  find("#panes").replaceChildren(...panes.map((pane) => pane.root));
  find("#panes").className = `panes n${panes.length}`;
  find("#second").classList.toggle("hidden", compare !== "models");
  find("#system-field").hidden = !chat;
  find("#anew").classList.toggle("hidden", !chat);
  find("#prompt-label").textContent = chat ? "Your message" : "Prompt";
  find("#go span").textContent = chat ? "Send" : "Write";
  find("#hint").textContent = chat ? "Enter" : "Ctrl + Enter";
  find("#prompt").placeholder = chat ? "" : "Empty: the model begins by itself";
  busy();
  look(null);
}

function point(pane, event) {
  const token = pane.shown?.tokens[event.target.dataset.k];
  if (token) say(pane, `${token.s} · ${percent(token.p)} · rank ${token.rank.toLocaleString("en")} · id ${token.id}`);
}

function press(pane, chipShown) {
  if (chipShown.dataset.k === undefined || !pane.shown.ids) return;
  look(pane, Number(chipShown.dataset.k));
  if (matchMedia("(max-width: 60rem)").matches) find("#next-card").scrollIntoView({ behavior: "smooth" });
}

function keys(pane, event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); press(pane, event.target); }
  if (!step) return;
  event.preventDefault();
  find(`[data-k="${Number(event.target.dataset.k) + step}"]`, pane.root)?.focus();
}

function start() {
  form.addEventListener("input", (event) => {
    const name = event.target.name;
    if (["mode", "compare", "model", "other"].includes(name)) arrange();
    else if (["prompt", "system"].includes(name) && (form.looking || chatting())) look(null);
  }, { capture: true }); // before swap.js sends the form
  form.addEventListener("submit", begin);
  find("#prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (chatting() && !event.shiftKey))) {
      event.preventDefault();
      begin();
    }
  });
  find("#stop").addEventListener("click", () => panes.forEach((pane) => pane.stop?.abort()));
  find("#anew").addEventListener("click", arrange);
  find("#dice").addEventListener("click", () => set(field("seed"), Math.floor(Math.random() * 1e6)));
  find("#reset").addEventListener("click", () => {
    for (const knob of form.querySelectorAll("#knobs input")) set(knob, knob.defaultValue);
  });
  find("#bars").addEventListener("click", (event) => {
    const button = event.target.closest("[data-take]");
    if (button) goOn(button.dataset.take);
  });
  find("#bars").addEventListener("swapped", () => {
    const seen = find("#bars > [data-seen]");
    if (seen?.dataset.seen === field("model").value) find("[name=mode][value=chat]").disabled = seen.dataset.chat === "no";
  });
  arrange();
}

function set(input, value) {
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

if (form) start();
