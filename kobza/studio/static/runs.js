/* The curves of runs, drawn as they grow, and the small helps of the form for a new one.

   Every two seconds /runs/data is asked what came since the last time, for the runs that are shown; the server keeps the count, so
   a long run costs no more than a short one. A curve is buckets: lowest, highest and mean of so many records. What a run or
   its owner wrote (names) goes into the page as text alone. */
"use strict";

const COLOURS = ["#2f8fd0", "#e0661a", "#1a9e77", "#c45ab3", "#b58900", "#7a6ff0", "#cc4455", "#6b8e9e"]; // told apart by most eyes
const EVERY = 2000;
const SVG = "http://www.w3.org/2000/svg";
const MARKS = { uniform: "knows nothing", unigram: "token frequencies", bigram: "token pairs" };

const at = (name) => "/runs/at/" + encodeURIComponent(name);

function make(tag, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

function short(value) { // 1234567 -> 1.23M, 0.00012 -> 1.2e-4
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e15 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return +(value / (letter === "k" ? 1e3 : unit)).toPrecision(3) + letter;
  }
  return String(+value.toPrecision(4));
}

function ticks(low, high, wanted) { // round numbers between two, 1-2-5
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) || power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high && found.length < 20; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) && found.length < 60; power++) {
    for (const n of [1, 2, 5]) if (n * 10 ** power >= low && n * 10 ** power <= high) found.push(n * 10 ** power);
  }
  const every = Math.ceil(found.length / 7);
  return found.length > 1 ? found.filter((_, i) => i % every === 0) : [low, high];
}

// ---- what is known of each run -------------------------------------------------------------------------------------------

class Run {
  constructor(name, colour) {
    Object.assign(this, { name, colour, on: true, generation: 0, cursor: 0, columns: {}, landmarks: {}, state: "", sampled: null });
  }

  take(said) {
    const fresh = said.all || !this.columns.step;
    for (const axis of ["step", "tokens", "seconds"]) {
      this.columns[axis] = fresh ? said[axis] : this.columns[axis].concat(said[axis]);
    }
    const n = this.columns.step.length, before = n - said.step.length;
    for (const measure of ["train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second"]) {
      const old = this.columns[measure], add = said[measure];
      if (!add && (fresh || !old)) { delete this.columns[measure]; continue; }
      const joined = {};
      for (const part of ["low", "high", "mean", "count"]) {
        const head = fresh ? [] : old ? old[part] : new Array(before).fill(null);
        joined[part] = head.concat(add ? add[part] : new Array(said.step.length).fill(null));
      }
      this.columns[measure] = joined;
    }
    Object.assign(this, { generation: said.generation, cursor: said.cursor });
  }
}

function smooth(curve, share) { // means of buckets, each counted by its records, over a share of them around each
  const held = [];
  curve.mean.forEach((value, i) => { if (value !== null) held.push(i); });
  const reach = Math.floor(held.length * share / 200), sums = [0], counts = [0], out = new Array(curve.mean.length).fill(null);
  held.forEach((i, k) => {
    sums.push(sums[k] + curve.mean[i] * curve.count[i]);
    counts.push(counts[k] + curve.count[i]);
  });
  held.forEach((i, k) => {
    const near = Math.min(reach, k, held.length - 1 - k); // narrows towards the ends, so neither is bent
    out[i] = (sums[k + near + 1] - sums[k - near]) / (counts[k + near + 1] - counts[k - near]);
  });
  return out;
}

// ---- one figure ----------------------------------------------------------------------------------------------------------

class Chart {
  constructor(figure, board) {
    Object.assign(this, { figure, board, measures: figure.dataset.measures.split(" "), pointer: null });
    const title = document.createElement("h3");
    title.textContent = figure.dataset.title;
    this.caption = document.createElement("figcaption");
    this.svg = make("svg", { role: "img", "aria-label": figure.dataset.title });
    figure.append(title, this.svg, this.caption);
    const point = (event) => { this.pointer = event.clientX - this.svg.getBoundingClientRect().left; this.read(); };
    this.svg.addEventListener("pointermove", point);
    this.svg.addEventListener("pointerdown", point);
    this.svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") { this.pointer = null; this.read(); } });
  }

  curves() { // {run, measure, x, low, high, line, count} of what is switched on
    const { axis, share } = this.board.options, found = [];
    for (const run of this.board.shown()) for (const measure of this.measures) {
      const curve = run.columns[measure];
      if (!curve || this.board.hidden.has(measure)) continue;
      const line = measure === "train_loss" || measure === "grad_norm" || measure === "tokens_per_second" ? smooth(curve, share) : curve.mean;
      found.push({ run, measure, x: run.columns[axis], low: curve.low, high: curve.high, line });
    }
    return found;
  }

  landmarks() { // of the runs' text; none where they are of different texts, whose losses do not compare
    if (!this.measures.includes("train_loss") || !this.board.options.landmarks) return [];
    const known = this.board.shown().map((run) => run.landmarks).filter((marks) => marks.uniform);
    const same = known.every((marks) => Object.keys(marks).every((name) => Math.abs(marks[name] - known[0][name]) < 0.01 * marks[name] + 1e-9));
    return known.length && same ? Object.entries(known[0]) : [];
  }

  ceiling() { // of the losses: above it are only spikes and what has diverged, which would flatten the rest
    const known = this.measures.includes("train_loss") ? this.board.shown().map((run) => run.landmarks.uniform || 0) : [0];
    return 1.3 * Math.max(...known, 0) || Infinity;
  }

  range(curves, marks) { // {x: [from, to], y: [from, to]} or null where there is nothing to draw
    let left = Infinity, right = -Infinity, low = Infinity, high = -Infinity;
    for (const { x, low: lows, high: highs } of curves) {
      for (let i = 0; i < x.length; i++) {
        if (x[i] === null || lows[i] === null || (this.log && highs[i] <= 0)) continue;
        left = Math.min(left, x[i]); right = Math.max(right, x[i]);
        low = Math.min(low, this.log && lows[i] <= 0 ? highs[i] : lows[i]); high = Math.max(high, highs[i]);
      }
    }
    if (left === Infinity) return null;
    for (const [, value] of marks) { low = Math.min(low, value); high = Math.max(high, value); }
    high = Math.min(high, Math.max(this.ceiling(), low * 1.01));
    if (this.measures[0] === "tokens_per_second" && !this.log) low = Math.min(low, 0);
    if (left === right) { left -= 1; right += 1; }
    if (!(high > low)) { const pad = Math.abs(low) * 0.05 || 1; low -= this.log ? 0 : pad; high += pad; }
    const pad = this.log ? 0 : 0.05 * (high - low);
    return { x: [left, right], y: [low - (low === 0 ? 0 : pad), high + pad] };
  }

  draw() {
    const width = Math.max(200, this.figure.clientWidth - 26), height = this.figure.classList.contains("big") ? 300 : 150;
    this.log = this.board.options.log;
    const curves = this.curves(), marks = this.landmarks(), range = this.range(curves, marks);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren();
    this.scale = null;
    if (!range) {
      this.svg.append(make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing recorded yet"));
      this.caption.textContent = "";
      return;
    }
    const box = { left: 46, right: width - 6, top: 8, bottom: height - 20 }, [x0, x1] = range.x;
    const f = this.log ? Math.log10 : (v) => v, [y0, y1] = range.y.map(f);
    const x = (v) => box.left + (v - x0) / (x1 - x0) * (box.right - box.left);
    const y = (v) => Math.max(-1e4, Math.min(1e4, box.bottom - (f(v) - y0) / (y1 - y0) * (box.bottom - box.top)));
    this.scale = { x, y, box, curves, value: (px) => x0 + (px - box.left) / (box.right - box.left) * (x1 - x0) };
    this.frame(range, x, y, box, width);
    const clip = make("clipPath", { id: "clip-" + this.measures[0] });
    clip.append(make("rect", { x: box.left, y: box.top - 4, width: box.right - box.left, height: box.bottom - box.top + 5 }));
    const inside = make("g", { "clip-path": `url(#clip-${this.measures[0]})` });
    for (const [name, value] of marks) this.mark(inside, name, value, y, box);
    for (const curve of curves) this.line(inside, curve, x, y);
    this.hair = make("g");
    this.svg.append(clip, inside, this.hair);
    this.read();
  }

  frame(range, x, y, box, width) {
    for (const value of this.log ? logTicks(...range.y) : ticks(...range.y, box.bottom > 200 ? 6 : 3)) {
      const height = y(value);
      this.svg.append(make("line", { class: "grid-line", x1: box.left, x2: box.right, y1: height, y2: height }));
      this.svg.append(make("text", { x: box.left - 5, y: height + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(...range.x, Math.max(2, Math.min(8, width / 110)))) {
      if (value < 0) continue;
      this.svg.append(make("text", { x: Math.min(x(value), box.right - 12), y: box.bottom + 15, "text-anchor": "middle" }, short(value)));
    }
  }

  mark(into, name, value, y, box) {
    const dash = { uniform: "1 3", unigram: "5 3", bigram: "9 3 2 3" }[name] || "2 2";
    into.append(make("line", { class: "mark-line", x1: box.left, x2: box.right, y1: y(value), y2: y(value), "stroke-dasharray": dash }));
    into.append(make("text", { class: "mark-text", x: box.right - 4, y: y(value) - 3, "text-anchor": "end" }, `${MARKS[name] || name} ${short(value)}`));
  }

  line(into, { run, measure, x: across, low, high, line }, x, y) {
    const held = measure === "val_loss", raw = [], mean = [], dots = [], stroke = run.colour;
    for (let i = 0; i < across.length; i++) {
      if (across[i] === null || line[i] === null || (this.log && !(low[i] > 0 && line[i] > 0))) continue;
      const px = x(across[i]).toFixed(1);
      raw.push(`${px} ${y(low[i]).toFixed(1)}`);
      if (high[i] !== low[i]) raw.push(`${px} ${y(high[i]).toFixed(1)}`);
      mean.push(`${px} ${y(line[i]).toFixed(1)}`);
      if (held) dots.push([px, y(line[i]).toFixed(1)]);
    }
    if (!mean.length) return;
    const style = { fill: "none", stroke, "stroke-linejoin": "round" };
    if (!held && measure !== "lr") into.append(make("path", { ...style, d: "M" + raw.join("L"), "stroke-width": 0.8, opacity: 0.4 }));
    into.append(make("path", { ...style, class: "curve", d: "M" + mean.join("L"), "stroke-width": 1.8, "stroke-dasharray": held ? "5 3" : "none" }));
    const size = dots.length > 60 ? 1.6 : 3;
    for (const [cx, cy] of held ? dots : mean.length === 1 ? [mean[0].split(" ")] : []) into.append(make("circle", { cx, cy, r: size, fill: stroke }));
  }

  read() { // what stands under the pointer
    if (!this.scale) return;
    const { x, y, box, curves, value } = this.scale, lines = [];
    this.hair.replaceChildren();
    this.caption.replaceChildren();
    const px = this.pointer === null ? null : Math.max(box.left, Math.min(box.right, this.pointer));
    let place = null;
    for (const curve of curves) {
      const i = px === null ? last(curve) : nearest(curve, value(px));
      if (i < 0) continue;
      place = Math.max(place ?? -Infinity, curve.x[i]);
      const many = this.board.shown().length > 1, kind = { train_loss: "train", val_loss: "validation" }[curve.measure];
      lines.push([[many && curve.run.name, kind].filter(Boolean).join(" "), short(curve.line[i])]);
      if (px !== null) this.hair.append(make("circle", { cx: x(curve.x[i]), cy: y(curve.line[i]), r: 3.5, fill: curve.run.colour }));
    }
    if (place === null) return;
    if (px !== null) this.hair.prepend(make("line", { class: "hair", x1: x(place), x2: x(place), y1: box.top, y2: box.bottom }));
    this.caption.append(`${{ step: "step", tokens: "tokens", seconds: "second" }[this.board.options.axis]} ${short(place)}`);
    for (const [name, said] of lines) {
      const bold = document.createElement("b");
      bold.textContent = said;
      this.caption.append(` · ${name} `, bold);
    }
  }
}

function last({ line }) {
  for (let i = line.length - 1; i >= 0; i--) if (line[i] !== null) return i;
  return -1;
}

function nearest({ x, line }, wanted) { // the drawn place closest to a value of the axis
  let best = -1;
  for (let i = 0; i < x.length; i++) {
    if (line[i] !== null && x[i] !== null && (best < 0 || Math.abs(x[i] - wanted) <= Math.abs(x[best] - wanted))) best = i;
  }
  return best;
}

// ---- all of them -----------------------------------------------------------------------------------------------------------

class Board {
  constructor(root) {
    this.root = root;
    this.form = root.querySelector("form");
    this.chips = root.querySelector("#chips");
    this.error = root.querySelector("#chart-error");
    this.one = root.dataset.one === "yes";
    this.runs = new Map();
    this.names = [];
    this.hidden = new Set();
    for (const name of JSON.parse(root.dataset.shown)) this.add(name);
    this.readOptions();
    this.charts = [...root.querySelectorAll(".chart")].map((figure) => new Chart(figure, this));
    this.form.addEventListener("input", () => { this.readOptions(); this.draw(); });
    this.form.addEventListener("submit", (event) => event.preventDefault());
    new ResizeObserver(() => this.draw()).observe(root);
    this.poll();
  }

  add(name) {
    const used = new Set([...this.runs.values()].map((run) => run.colour));
    this.runs.set(name, new Run(name, COLOURS.find((colour) => !used.has(colour)) || COLOURS[0]));
  }

  shown() { return [...this.runs.values()].filter((run) => run.on); }

  readOptions() {
    const data = new FormData(this.form);
    this.options = { axis: data.get("axis"), log: data.has("log"), landmarks: data.has("landmarks"), share: +data.get("smooth") };
  }

  draw() { for (const chart of this.charts) chart.draw(); }

  async poll() {
    try {
      if (!document.hidden || !this.names.length) await this.ask();
      this.error.classList.add("hidden");
    } catch (problem) {
      this.error.textContent = problem.message || "the studio does not answer; is it still running?";
      this.error.classList.remove("hidden");
    }
    setTimeout(() => this.poll(), EVERY);
  }

  async ask() {
    const query = this.shown().map((run) => "run=" + encodeURIComponent(`${run.generation}.${run.cursor}.${run.name}`));
    let response;
    try { response = await fetch("/runs/data?" + query.join("&"), { headers: { "X-Swap": "1" } }); } catch {
      throw new Error("the studio does not answer; is it still running?");
    }
    const said = await response.json();
    if (!response.ok) throw new Error(said.error.message);
    for (const one of said.runs) this.take(one);
    const names = JSON.stringify(said.names);
    if (names !== this.saidNames) { this.saidNames = names; this.names = said.names; this.drawChips(); }
    this.draw();
  }

  take(said) {
    const run = this.runs.get(said.name);
    if (!run) return;
    const first = run.sampled === null, sampled = run.sampled !== said.sampled, changed = run.state !== said.state;
    run.take(said);
    Object.assign(run, { sampled: said.sampled, state: said.state });
    if (first || (changed && !run.landmarks.uniform)) this.askLandmarks(run);
    if (!this.one || first) return;
    for (const part of document.querySelectorAll("#actions, #coach, #samples, #facts, #log")) {
      if (changed) part.dispatchEvent(new Event("changed"));
      if (sampled) part.dispatchEvent(new Event("sampled"));
    }
  }

  async askLandmarks(run) {
    try {
      const response = await fetch(at(run.name) + "/landmarks", { headers: { "X-Swap": "1" } });
      if (response.ok) { run.landmarks = await response.json(); this.draw(); }
    } catch { /* the lines are missing, no more */ }
  }

  drawChips() {
    const focused = document.activeElement?.dataset?.chip;
    this.chips.replaceChildren();
    if (!this.one) {
      for (const { name, state } of this.names) this.chip(name, this.runs.get(name)?.colour || "currentColor", !!this.runs.get(name)?.on, "none", () => this.toggle(name), state);
      this.chips.append(Object.assign(document.createElement("span"), { className: "gap" }));
    }
    for (const [measure, word, dash] of [["train_loss", "train", "none"], ["val_loss", "validation", "5 3"]]) {
      const colour = this.one ? this.shown()[0]?.colour || "currentColor" : "currentColor";
      this.chip(word, colour, !this.hidden.has(measure), dash, () => {
        if (!this.hidden.delete(measure)) this.hidden.add(measure);
        this.drawChips();
        this.draw();
      });
    }
    if (focused) [...this.chips.children].find((chip) => chip.dataset.chip === focused)?.focus();
  }

  chip(word, colour, pressed, dash, onclick, state = "") {
    const button = document.createElement("button"), swatch = make("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" });
    const label = document.createElement("span");
    swatch.append(make("line", { x1: 1, x2: 21, y1: 6, y2: 6, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash }));
    label.textContent = state === "running" ? `${word} · live` : word;
    Object.assign(button, { type: "button", onclick });
    button.dataset.chip = word;
    button.setAttribute("aria-pressed", pressed);
    button.append(swatch, label);
    this.chips.append(button);
  }

  toggle(name) {
    const run = this.runs.get(name);
    if (run) run.on = !run.on; else if (this.runs.size < COLOURS.length) this.add(name);
    else { const idle = [...this.runs.values()].find((other) => !other.on); if (idle) this.runs.delete(idle.name); this.add(name); }
    const others = this.shown();
    if (others.length > COLOURS.length) others[0].on = false;
    history.replaceState(null, "", "?" + this.shown().map((one) => "show=" + encodeURIComponent(one.name)).join("&"));
    this.drawChips();
    this.ask().catch(() => this.draw());
  }
}

// ---- the form for a new run --------------------------------------------------------------------------------------------------

function helpForm(form) {
  const show = () => {
    const source = new FormData(form).get("source");
    for (const part of form.querySelectorAll("[data-source]")) part.classList.toggle("hidden", part.dataset.source !== source);
  };
  form.addEventListener("change", async (event) => {
    show();
    if (event.target.id !== "preset") return;
    const response = await fetch("/runs/new/settings?preset=" + encodeURIComponent(event.target.value), { headers: { "X-Swap": "1" } });
    if (response.ok) document.querySelector("#settings").innerHTML = await response.text();
  });
  show();
}

for (const root of document.querySelectorAll("#charts")) new Board(root);
for (const form of document.querySelectorAll("#new-run")) helpForm(form);
