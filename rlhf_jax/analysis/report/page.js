"use strict";
// The data are those of `pack` in __init__.py. Text of models and people is only ever set as text, never as HTML.
(async () => {
const $ = (id) => document.getElementById(id);

function el(tag, settings = {}, ...children) {
  const node = settings.svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name === "svg" || value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const svg = (tag, settings, ...children) => el(tag, { svg: true, ...settings }, ...children);

const bytes = Uint8Array.from(atob($("data").textContent), (c) => c.charCodeAt(0));
const data = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
const { runs, words, prompts, episodes } = data;
const letters = runs.length > 1 ? ["A", "B"] : [""];

// Numbers --------------------------------------------------------------------------------------------------------------

const shown = (x, digits = 3) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (Math.abs(x) >= 1000) return Math.round(x).toLocaleString("en").replace("-", "−");
  return x.toFixed(Math.abs(x) >= 10 ? 1 : digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
};
const brief = (x) => (x !== 0 && Math.abs(x) < 0.005 ? x.toExponential(0).replace("e-", "e−").replace(/^-/, "−") : shown(x, 2));
const signed = (x) => (x >= 0.0005 ? "+" : "") + shown(x);
const percent = (p) => (p > 0.995 && p < 1 ? ">99 %" : p >= 0.1 ? `${Math.round(100 * p)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "<0.1 %");
const combine = (f, ...columns) => (columns.every(Boolean) ? columns[0].map((_, n) => f(...columns.map((c) => c[n]))) : null);

// What a token can be coloured by: its numbers, and how far each is from dull, to both sides of 0 or to one.
const KINDS = [
  { id: "logratio", name: "Log-ratio", about: "ln of policy over reference: blue is said more often than before training, orange less",
    of: (e) => combine((a, b) => a - b, e.logp, e.logp_ref), text: signed },
  { id: "reward", name: "Reward", about: "each token pays for its KL, and the last one gets the score", of: (e) => e.reward, text: signed },
  { id: "advantage", name: "Advantage", about: "blue is made likelier by the update, orange less likely", of: (e) => e.advantage, text: signed },
  { id: "value", name: "Value", about: "the reward that the critic expected before this token; of a reward model, its score through this token",
    of: (e) => e.value, text: signed },
  { id: "ratio", name: "Ratio", about: "how the updates of this step changed the token's probability; 1 is not at all",
    of: (e) => combine((a, b) => Math.exp(a - b), e.logp_after, e.logp), amount: Math.log, text: (x) => shown(x), ends: (most) => [Math.exp(-most), 1, Math.exp(most)] },
  { id: "entropy", name: "Entropy", about: "nats; the darker, the less the policy was sure what to say here", of: (e) => e.entropy, oneSided: true, text: (x) => shown(x) },
  { id: "probability", name: "Probability", about: "of this token when it was sampled; the darker, the less likely",
    of: (e) => combine(Math.exp, e.logp), amount: (p) => 1 - p, oneSided: true, text: percent, ends: () => [1, 0] },
];
for (const kind of KINDS) {
  kind.amount ??= (x) => x;
  const sizes = [];
  for (const e of episodes) for (const x of kind.of(e) ?? []) if (x !== null) sizes.push(Math.abs(kind.amount(x)));
  sizes.sort((a, b) => a - b);
  kind.most = sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] || 1e-6 : 0;
  if (kind.id === "probability") kind.most = 1;
}
const kinds = KINDS.filter((kind) => kind.most);

function colour(node, kind, x) {
  if (!kind || x === null || x === undefined) return node.removeAttribute("style");
  const amount = Math.max(-1, Math.min(1, kind.amount(x) / kind.most));
  const share = Math.round(64 * Math.sqrt(Math.abs(amount)));
  node.style.setProperty("--hue", kind.oneSided ? "var(--strong)" : amount < 0 ? "var(--minus)" : "var(--plus)");
  node.style.setProperty("--share", share < 6 ? "0%" : `${share}%`);
}

for (const [number, e] of episodes.entries()) {
  e.number = number;
  e.length = e.tokens.length || e.text.split(/\s+/).filter(Boolean).length;
}

// State ----------------------------------------------------------------------------------------------------------------

const state = { view: null, kind: kinds[0] ?? null, sort: "score", down: true, search: "", step: "", part: "", run: "", low: "", high: "", pick: null, token: 0 };
const SORTS = { score: "score", kl: "KL", length: "length", disagreement: "disagreement of reward models", cost: "cost", step: "step" };
const PARTS = { trained: "trained on", watched: "same prompts throughout", ranked: "ranked by people" };
const has = (name) => episodes.some((e) => e[name] !== undefined);

const isEnd = (word) => /^<(\|.*\||\/?s|eos|end_of_turn)>$/.test(word);
function tokenNode(e, n, settings = {}) {
  const word = words[e.tokens[n]];
  const node = el("span", { class: isEnd(word) ? "token end" : "token", text: isEnd(word) ? "end" : word === "\n" ? "↵\n" : n ? word : word.trimStart(), ...settings });
  if (state.kind) colour(node, state.kind, numbers(e, state.kind)?.[n]);
  return node;
}
function numbers(e, kind) {
  e.cells ??= {};
  return (e.cells[kind.id] ??= kind.of(e) ?? false) || null;
}
function said(e, most = 40, marked = null) {
  if (!e.tokens.length) return [e.text];
  const nodes = e.tokens.slice(0, most).map((_, n) => {
    const node = tokenNode(e, n);
    if (marked?.has(n)) node.classList.add("other");
    return node;
  });
  return e.tokens.length > most ? [...nodes, " …"] : nodes;
}
// The tokens of `e` that are no part of the longest common subsequence with `other`.
function others(e, other) {
  const a = e.tokens, b = other.tokens, best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  const found = new Set();
  for (let i = 0, j = 0; i < a.length; ) {
    if (j < b.length && a[i] === b[j]) { i++; j++; } else if (j < b.length && best[i][j + 1] >= best[i + 1][j]) j++; else found.add(i++);
  }
  return found;
}

// A list of which only the rows in sight exist --------------------------------------------------------------------------

class List {
  constructor(label, height, draw, choose) {
    Object.assign(this, { height, draw, choose, items: [], at: -1, nodes: new Map() });
    this.id = `list-${label.replace(/\W+/g, "-").toLowerCase()}`;
    this.spacer = el("div", { class: "spacer", role: "presentation" });
    this.box = el("div", { class: "list", tabindex: 0, "aria-label": label, id: this.id, onscroll: () => this.later() }, this.spacer);
    new ResizeObserver(() => this.later()).observe(this.box);
  }
  set(items, at = -1) {
    this.items = items;
    this.at = at;
    this.spacer.style.height = `${items.length * this.height}px`;
    this.spacer.replaceChildren();
    this.nodes.clear();
    if (items.length) this.box.setAttribute("role", "listbox"); else this.box.setAttribute("role", "region");
    this.render();
  }
  later() {
    this.asked ??= requestAnimationFrame(() => { this.asked = null; this.render(); });
  }
  render() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.height) - 4);
    const last = Math.min(this.items.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.height) + 4);
    for (const [n, node] of this.nodes) if (n < first || n >= last) { node.remove(); this.nodes.delete(n); }
    for (let n = first; n < last; n++) {
      if (this.nodes.has(n)) continue;
      const node = el("div", {
        class: "row", role: "option", id: `${this.id}-${n}`, "aria-posinset": n + 1, "aria-setsize": this.items.length,
        "aria-selected": n === this.at, onclick: () => { this.select(n); this.box.focus({ preventScroll: true }); },
      }, this.draw(this.items[n]));
      node.style.top = `${n * this.height}px`;
      node.style.height = `${this.height}px`;
      this.spacer.append(node);
      this.nodes.set(n, node);
    }
    if (this.at >= 0) this.box.setAttribute("aria-activedescendant", `${this.id}-${this.at}`);
    else this.box.removeAttribute("aria-activedescendant");
  }
  select(n, tell = true) {
    if (n < 0 || n >= this.items.length) return;
    this.nodes.get(this.at)?.setAttribute("aria-selected", false);
    this.at = n;
    const top = n * this.height, bottom = top + this.height;
    const above = this.box.scrollTop - top, beyond = bottom - this.box.scrollTop - this.box.clientHeight;
    if (Math.max(above, beyond) > this.height) this.box.scrollTop = (top + bottom - this.box.clientHeight) / 2;
    else if (above > 0) this.box.scrollTop = top;
    else if (beyond > 0) this.box.scrollTop += beyond;
    this.render();
    this.nodes.get(n)?.setAttribute("aria-selected", true);
    if (tell) this.choose(this.items[n]);
  }
}

// Answers --------------------------------------------------------------------------------------------------------------

const steps = [...new Set(episodes.map((e) => e.step))].sort((a, b) => a - b);
let visible = [];

function option(value, text) { return el("option", { value, text }); }
function chooser(label, name, pairs) {
  return el("select", { "aria-label": label, onchange: (event) => { state[name] = event.target.value; filter(); } }, pairs.map(([value, text]) => option(value, text)));
}
const dots = (e) => (runs.length > 1 ? el("span", { class: `dot${e.run}` }) : null);

const answers = new List("Answers", 58, (e) => [
  el("div", {}, el("div", { class: "said" }, dots(e), said(e)), el("div", { class: "asked", text: prompts[e.prompt] })),
  el("div", { class: "right number" }, el("b", { text: shown(e[state.sort] ?? e.score, 2) }), el("div", { class: "soft", text: e.rank === undefined ? `step ${e.step}` : `rank ${e.rank}` })),
], (e) => show(e));

function inList(e) {
  if (state.step !== "" && e.step !== Number(state.step)) return false;
  if (state.part && e.part !== state.part) return false;
  if (state.run !== "" && e.run !== Number(state.run)) return false;
  const x = e[state.sort];
  if (state.low !== "" && !(x >= Number(state.low))) return false;
  if (state.high !== "" && !(x <= Number(state.high))) return false;
  const text = state.search.toLowerCase();
  return !text || e.text.toLowerCase().includes(text) || prompts[e.prompt].toLowerCase().includes(text);
}
function filter() {
  const sign = state.down ? -1 : 1, key = (e) => e[state.sort] ?? -Infinity;
  visible = episodes.filter(inList).sort((a, b) => sign * (key(a) - key(b)) || a.number - b.number);
  const at = visible.indexOf(state.pick);
  answers.box.scrollTop = 0;
  answers.set(visible, at);
  $("count").firstChild.textContent = `${visible.length.toLocaleString("en")} of ${episodes.length.toLocaleString("en")} answers`;
  if (at >= 0) answers.select(at, false);
  map();
}

function map() {
  const canvas = $("map");
  if (!canvas?.clientWidth) return;
  const across = has("kl") ? "kl" : "length", ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d"), probe = el("i");
  document.body.append(probe);
  const named = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  const ink = named("soft"), ring = named("ink"), tones = [named("a"), named("b")];
  probe.remove();
  pen.scale(ratio, ratio);
  const drawn = visible.filter((e) => e.score !== undefined && e[across] !== undefined);
  const bounds = (name) => { const xs = drawn.map((e) => e[name]); const lo = Math.min(...xs), hi = Math.max(...xs); return [lo, hi > lo ? hi : lo + 1]; };
  const [x0, x1] = bounds(across), [y0, y1] = bounds("score"), last = Math.max(...steps), first = Math.min(...steps);
  canvas.points = drawn.map((e) => [10 + ((width - 20) * (e[across] - x0)) / (x1 - x0), height - 18 - ((height - 30) * (e.score - y0)) / (y1 - y0), e]);
  for (const [x, y, e] of canvas.points) {
    pen.globalAlpha = last > first ? 0.22 + (0.68 * (e.step - first)) / (last - first) : 0.6;
    pen.fillStyle = tones[e.run];
    pen.beginPath();
    pen.arc(x, y, 3.2, 0, 7);
    pen.fill();
  }
  pen.globalAlpha = 1;
  for (const [x, y, e] of canvas.points) if (e === state.pick) { pen.strokeStyle = ring; pen.lineWidth = 2; pen.beginPath(); pen.arc(x, y, 5.5, 0, 7); pen.stroke(); }
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.fillStyle = ink;
  pen.fillText("score ↑", 8, 13);
  pen.textAlign = "right";
  pen.fillText(across === "kl" ? "KL →" : "length →", width - 8, height - 5);
  if (last > first) pen.fillText("pale: early, strong: late", width - 8, 13);
}

function strip() {
  const wanted = ["reward/score", "kl/reference", "policy/entropy", "response/tokens", "loss/bradley_terry", "reward/accuracy", "loss/next_token", "loss/ptx"];
  const names = wanted.filter((name) => runs.some((run) => run.curves[name])).slice(0, 4);
  return el("div", { class: "strip" }, names.map((name) => {
    const values = runs.map((run) => (run.curves[name] ?? []).filter((x) => x !== null));
    const [own] = values.filter((xs) => xs.length);
    const picture = svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" });
    const all = values.flat(), low = Math.min(...all), high = Math.max(...all);
    values.forEach((xs, run) => {
      if (xs.length > 1) picture.append(svg("path", { class: `line${run}`, d: xs.map((x, n) => `${n ? "L" : "M"}${((100 * n) / (xs.length - 1)).toFixed(2)} ${(28 - (26 * (x - low)) / (high - low || 1)).toFixed(2)}`).join("") }));
    });
    return el("div", { class: "mini" }, el("div", { class: "label" }, titled(name)),
      el("div", { class: "value" }, el("small", { text: `${shown(own[0], 2)} → ` }), values.map((xs) => shown(xs.at(-1), 2)).join(" · ")), picture);
  }));
}

function answersView() {
  const sorts = Object.entries(SORTS).filter(([name]) => name === "length" || name === "step" || has(name));
  if (!sorts.some(([name]) => name === state.sort)) state.sort = sorts[0][0];
  const parts = [...new Set(episodes.map((e) => e.part))];
  const direction = el("button", { type: "button", text: "↓", "aria-label": "Turn the order round", onclick: () => { state.down = !state.down; direction.textContent = state.down ? "↓" : "↑"; filter(); } });
  const bound = (name, label) => el("input", { type: "number", step: "any", "aria-label": label, placeholder: name === "low" ? "from" : "to", oninput: (event) => { state[name] = event.target.value; filter(); } });
  const side = el("div", { class: "side" },
    el("div", { class: "filters", role: "search" },
      el("div", { class: "wide" }, el("input", { type: "search", id: "search", "aria-label": "Search prompts and answers", placeholder: "Search prompts and answers", oninput: (event) => { state.search = event.target.value; filter(); } })),
      chooser("Steps", "step", [["", "All steps"], ...steps.map((step) => [step, `Step ${step}`])]),
      parts.length > 1 ? chooser("Kind of episode", "part", [["", "All episodes"], ...parts.map((part) => [part, PARTS[part] ?? part])]) : chooser("Kind of episode", "part", [["", PARTS[parts[0]] ?? parts[0]]]),
      runs.length > 1 ? el("div", { class: "wide" }, chooser("Run", "run", [["", "Both runs"], ...runs.map((run, n) => [n, `${letters[n]}: ${run.name}`])])) : null,
      el("div", { class: "wide" }, chooser("Sort by", "sort", sorts.map(([name, text]) => [name, `by ${text}`])), el("div", { class: "between" }, bound("low", "Least"), bound("high", "Most")), direction)),
    el("canvas", { class: "map", id: "map", role: "img", "aria-label": "Score of each answer against its KL or length; the list has the same answers", onclick: nearest }),
    el("div", { class: "count", id: "count", role: "status" }, "", ""),
    answers.box);
  const panel = el("section", { class: "panel split" }, side, el("div", { class: "detail", id: "detail", tabindex: 0, "aria-label": "The answer that is chosen", role: "region" }));
  return [panel, () => {
    panel.querySelector('[aria-label="Sort by"]').value = state.sort;
    filter();
    if (!state.pick && visible.length) answers.select(0); else if (state.pick) show(state.pick);
  }];
}
function nearest(event) {
  const box = event.target.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = null, distance = 400;
  for (const [px, py, e] of event.target.points ?? []) { const d = (px - x) ** 2 + (py - y) ** 2; if (d < distance) { distance = d; best = e; } }
  if (best) answers.select(visible.indexOf(best));
}

function show(e) {
  const again = state.pick === e;
  if (!again) { state.pick = e; state.token = e.tokens.length ? strongest(e) : 0; }
  const box = $("detail");
  if (!box) return;
  const chip = (label, value) => (value === undefined ? null : el("span", { class: "chip" }, `${label} `, el("b", { class: "number", text: value })));
  const facts = el("div", { class: "facts" },
    runs.length > 1 ? el("span", { class: `chip of${e.run}`, text: runs[e.run].name }) : null,
    e.rank === undefined ? chip("step", e.step) : chip("rank given by people", e.rank),
    el("span", { class: "chip", text: PARTS[e.part] ?? e.part }),
    e.score === undefined ? null : chip("score", shown(e.score, 3)),
    e.kl === undefined ? null : chip("KL", `${shown(e.kl, 2)} nats`), chip("length", e.length),
    e.disagreement === undefined ? null : chip("disagreement", shown(e.disagreement)),
    e.cost === undefined ? null : chip("cost", shown(e.cost)),
    e.ended ? null : el("span", { class: "chip", text: "cut off at the longest length" }));
  const tokens = el("div", { class: "tokens", id: "tokens", ...(e.tokens.length ? { role: "listbox", "aria-label": "Tokens of the answer", "aria-orientation": "horizontal", tabindex: 0 } : {}) });
  if (e.tokens.length) e.tokens.forEach((_, n) => tokens.append(tokenNode(e, n, { role: "option", id: `token-${n}`, "data-token": n, "aria-selected": n === state.token })));
  else tokens.textContent = e.text;
  box.replaceChildren(...[
    strip(),
    el("section", { class: "sheet" }, facts,
      el("div", { class: "prompt" }, el("b", { text: "Prompt" }), el("span", { text: prompts[e.prompt] })),
      el("div", { class: "answer" }, el("b", { text: "Answer" }), tokens),
      e.tokens.length ? palette(e) : el("p", { class: "soft", text: "This answer was recorded without its tokens: the run is older, or was made with --token-samples 0." })),
    e.tokens.length ? el("section", { class: "sheet two", id: "worth" }) : null,
    course(e),
    e.tokens.length ? el("section", { class: "sheet" }, el("h2", { text: "Every number of every token" }), el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Every number of every token" }, grid(e))) : null,
  ].filter(Boolean));
  box.onmouseover = box.onclick = (event) => {
    const at = event.target.closest?.("[data-token]");
    if (at) token(Number(at.dataset.token));
  };
  if (e.tokens.length) token(state.token);
  map();
}
function strongest(e) {
  const xs = state.kind && numbers(e, state.kind);
  if (!xs) return 0;
  const sizes = xs.map((x) => Math.abs(state.kind.amount(x ?? 0)));
  return Math.max(0, sizes.indexOf(Math.max(...sizes)));
}

function palette(e) {
  const there = kinds.filter((kind) => numbers(e, kind));
  const legend = el("div", { class: "legend", id: "legend" });
  const set = (kind) => {
    const ends = kind.ends?.(kind.most) ?? (kind.oneSided ? [0, kind.most] : [-kind.most, 0, kind.most]);
    const ramp = el("span", { class: "ramp", "aria-hidden": "true" });
    ramp.style.background = kind.oneSided ? "linear-gradient(90deg, transparent, color-mix(in srgb, var(--strong) 64%, transparent))"
      : "linear-gradient(90deg, color-mix(in srgb, var(--minus) 64%, transparent), transparent, color-mix(in srgb, var(--plus) 64%, transparent))";
    legend.replaceChildren(el("span", { class: "number", text: kind.text(ends[0]) }), ramp, el("span", { class: "number", text: kind.text(ends.at(-1)) }), el("span", { text: kind.about }));
  };
  const choices = there.map((kind, n) => el("label", {}, el("input", { type: "radio", name: "kind", value: kind.id, ...(kind === state.kind ? { checked: "" } : {}), onchange: () => recolour(kind) }),
    el("span", {}, kind.id === "value" && e.rank !== undefined ? "Score so far" : kind.name, el("span", { class: "hidden", text: `, key ${n + 1}` }))));
  if (there.length && !there.includes(state.kind)) state.kind = there[0];
  if (state.kind) set(state.kind);
  palette.set = set;
  return el("div", {}, el("fieldset", { class: "palette" }, el("legend", { class: "hidden", text: "Colour tokens by" }), choices), legend);
}
function recolour(kind) {
  state.kind = kind;
  answers.nodes.forEach((node) => node.remove());
  answers.nodes.clear();
  answers.render();
  const e = state.pick;
  palette.set(kind);
  document.querySelectorAll("#tokens .token").forEach((node, n) => colour(node, kind, numbers(e, kind)?.[n]));
  document.querySelectorAll('input[name="kind"]').forEach((input) => (input.checked = input.value === kind.id));
  $("course")?.replaceWith(course(e));
}

function token(n) {
  const e = state.pick;
  state.token = Math.max(0, Math.min(e.tokens.length - 1, n));
  n = state.token;
  for (const node of document.querySelectorAll("#tokens .token")) node.setAttribute("aria-selected", Number(node.dataset.token) === n);
  $("tokens").setAttribute("aria-activedescendant", `token-${n}`);
  for (const node of document.querySelectorAll(".grid [data-token]")) node.classList.toggle("on", Number(node.dataset.token) === n);
  const rows = [
    ["probability when sampled", e.logp && percent(Math.exp(e.logp[n]))],
    ["… by the reference", e.logp_ref && percent(Math.exp(e.logp_ref[n]))],
    ["… after this step's updates", e.logp_after && percent(Math.exp(e.logp_after[n]))],
    ["log-ratio to the reference", e.logp_ref && signed(e.logp[n] - e.logp_ref[n])],
    ["ratio of the updates", e.logp_after && shown(Math.exp(e.logp_after[n] - e.logp[n]))],
    ["reward", e.reward && signed(e.reward[n])],
    [e.rank === undefined ? "value before it" : "score through it", e.value && signed(e.value[n])],
    ["advantage", e.advantage && signed(e.advantage[n])],
    ["entropy (nats)", e.entropy && shown(e.entropy[n])],
  ].filter(([, text]) => text);
  if (e.rank !== undefined && e.value && n) rows.push(["change by this token", signed(e.value[n] - e.value[n - 1])]);
  const word = words[e.tokens[n]];
  const left = el("div", {}, el("h2", {}, "Token ", String(n + 1), ": ", el("span", { class: "word", text: isEnd(word) ? "the end" : `“${word.replace(/\n/g, "↵")}”` })),
    el("dl", { class: "worth" }, rows.flatMap(([name, text]) => [el("dt", { text: name }), el("dd", { text })])));
  $("worth").replaceChildren(left, ...(e.best ? [instead(e, n)] : []));
}
// What is not among the likeliest is less likely than they are.
const below = (best) => `<${percent(Math.exp(Math.min(...best.map(([, x]) => x)))).replace("<", "")}`;
function instead(e, n) {
  const found = new Map([[e.tokens[n], [e.logp[n], e.logp_ref?.[n]]]]);
  for (const [id, logp] of e.best[n]) found.set(id, [logp, found.get(id)?.[1]]);
  for (const [id, logp] of e.best_ref?.[n] ?? []) found.set(id, [found.get(id)?.[0], logp]);
  const sorted = [...found].sort((a, b) => Math.max(b[1][0] ?? -99, b[1][1] ?? -99) - Math.max(a[1][0] ?? -99, a[1][1] ?? -99));
  const bar = (name, logp) => { const node = el("div", { class: name }); node.style.width = `${100 * Math.exp(logp ?? -99)}%`; return node; };
  return el("div", {}, el("h2", { text: "What else it might have said" }),
    el("div", { class: "soft" }, el("span", { class: "key" }), "policy, ", el("span", { class: "key ref" }), "reference"),
    el("div", { class: "bars" }, sorted.flatMap(([id, [own, reference]]) => [
      el("span", { class: id === e.tokens[n] ? "word chosen" : "word", text: isEnd(words[id]) ? "(end)" : words[id].replace(/\n/g, "↵").trim() || "␣" }),
      el("span", { class: "pair" }, bar("bar", own), bar("bar ref", reference)),
      el("span", { class: "percent", text: own === undefined ? below(e.best[n]) : percent(Math.exp(own)) }),
      el("span", { class: "percent soft", text: reference === undefined ? below(e.best_ref[n]) : percent(Math.exp(reference)) }),
    ])));
}
function grid(e) {
  const there = kinds.filter((kind) => numbers(e, kind));
  const head = el("tr", {}, el("td", {}), e.tokens.map((id, n) => el("th", { scope: "col", "data-token": n, text: isEnd(words[id]) ? "end" : words[id].replace(/\n/g, "↵").trim() || "␣" })));
  return el("table", { class: "grid" }, el("thead", {}, head), el("tbody", {}, there.map((kind) => el("tr", {}, el("th", { scope: "row", text: kind.id === "value" && e.rank !== undefined ? "Score so far" : kind.name }),
    numbers(e, kind).map((x, n) => { const cell = el("td", { "data-token": n, text: x === null ? "–" : kind.text(x) }); colour(cell, kind, x); return cell; })))));
}

// The answers to one prompt over the course of training, the runs side by side
function siblings(e) {
  return episodes.filter((other) => other.prompt === e.prompt && other.rank === undefined && (other.part === "watched") === (e.part === "watched"));
}
function course(e) {
  const all = e.rank === undefined ? siblings(e).sort((a, b) => a.step - b.step || a.run - b.run || a.number - b.number) : episodes.filter((x) => x.rank !== undefined && x.ranking === e.ranking && x.prompt === e.prompt && x.run === e.run).sort((a, b) => a.rank - b.rank);
  if (all.length < 2) return el("div", { id: "course" });
  const ranked = e.rank !== undefined, first = all[0];
  const rows = all.map((x) => {
    const other = runs.length > 1 && x.run === 1 ? all.find((y) => y.run === 0 && y.step === x.step) : null;
    return el("tr", x === e ? { class: "here" } : {},
      el("td", {}, dots(x), el("button", { type: "button", "aria-label": `Show the answer of ${ranked ? "rank" : "step"} ${ranked ? x.rank : x.step}`, text: ranked ? x.rank : x.step, onclick: () => go(x) })),
      el("td", {}, said(x, 200, other ? others(x, other) : null)),
      el("td", { class: "n", text: shown(x.score, 2) }), ranked ? null : el("td", { class: "n", text: shown(x.kl, 2) }));
  });
  return el("section", { class: "sheet", id: "course" },
    el("h2", { text: ranked ? "All answers to this prompt" : "The same prompt over the course of training" }),
    el("table", { class: "course" }, el("thead", {}, el("tr", {}, el("th", { scope: "col", text: ranked ? "Rank" : "Step" }), el("th", { scope: "col", text: first.part === "watched" ? "Answer, always sampled with the same noise" : "Answer" }), el("th", { scope: "col", class: "n", text: "Score" }), ranked ? null : el("th", { scope: "col", class: "n", text: "KL" }))), el("tbody", {}, rows)),
    runs.length > 1 && all.some((x) => x.run) ? el("p", { class: "soft", text: `A line below marks what ${runs[1].name} says otherwise than ${runs[0].name} at the same step.` }) : null);
}
function go(e) {
  if (state.view !== "answers") open("answers");
  const at = visible.indexOf(e);
  if (at >= 0) answers.select(at); else { answers.set(visible, -1); show(e); }
}

// Two runs side by side: answers to the same prompt at the same step
function besideView() {
  const key = (e) => `${e.prompt}/${e.step}`, first = new Map(), pairs = [];
  for (const e of episodes) if (e.run === 0 && e.part === "watched" && !first.has(key(e))) first.set(key(e), e);
  for (const e of episodes) if (e.run === 1 && e.part === "watched" && first.has(key(e))) { pairs.push([first.get(key(e)), e]); first.delete(key(e)); }
  const gain = ([a, b]) => (b.score ?? 0) - (a.score ?? 0);
  pairs.sort((a, b) => b[0].step - a[0].step || Math.abs(gain(b)) - Math.abs(gain(a)));
  const list = new List("Pairs of answers", 92, ([a, b]) => [
    el("div", {}, el("div", { class: "asked", text: `step ${a.step} · ${prompts[a.prompt]}` }), el("div", { class: "said" }, el("span", { class: "dot0" }), said(a)), el("div", { class: "said" }, el("span", { class: "dot1" }), said(b, 40, others(b, a)))),
    el("div", { class: "right number" }, el("b", { text: signed(gain([a, b])) }), el("div", { text: shown(a.score, 2) }), el("div", { text: shown(b.score, 2) })),
  ], ([, b]) => (state.pick = b));
  const differ = Object.entries(data.differences);
  const rescored = differ.some(([name]) => /^(reward|judge|process|algorithm\.rewards)(\.|$)/.test(name));
  const panel = el("section", { class: "panel full" },
    el("details", { ...(differ.length && differ.length < 8 ? { open: "" } : {}) }, el("summary", { text: differ.length ? `${differ.length} settings differ` : "The settings are the same" }),
      el("table", { class: "settings" }, el("tbody", {}, differ.map(([name, text]) => el("tr", {}, el("th", { scope: "row", text: name }), ...(runs.every((run) => name in run.settings) ? runs.map((run, n) => el("td", {}, el("span", { class: `dot${n}` }), run.settings[name])) : [el("td", { colspan: 2, text })])))))),
    rescored ? el("div", { class: "count", text: "The two runs have different rewards, so their scores cannot be compared: judge by the answers, or by a score that neither was trained on, such as gold." }) : null,
    el("div", { class: "count", role: "status", text: pairs.length ? `${pairs.length} answers to the same prompts at the same steps; the number is B's score less A's. Enter opens B's answer.` : "The two runs have no prompt and step in common." }),
    list.box);
  current.beside = list;
  list.enter = ([, b]) => go(b);
  return [panel, () => list.set(pairs, -1)];
}

// Reward models: which answers they prefer, and whether people did
function pairsView() {
  const groups = new Map();
  const key = (e) => `${e.run}/${e.ranking}/${e.prompt}`;
  for (const e of episodes) if (e.rank !== undefined) groups.set(key(e), [...(groups.get(key(e)) ?? []), e]);
  const pairs = [], byText = new Map(), known = new Set();
  for (const group of groups.values()) for (const better of group) for (const worse of group) if (better.rank < worse.rank) {
    const pair = { better, worse, margin: better.score - worse.score, run: better.run, longer: better.length - worse.length };
    const key = [better.prompt, better.text, worse.text].join("\u0000");
    if (known.has(better.run + key)) continue;  // the same two texts again
    known.add(better.run + key);
    if (better.run === 1 && byText.has(key)) byText.get(key).second = pair; else if (better.run === 0) byText.set(key, pair);
    if (better.run === 0 || !runs[0].curves["reward/accuracy"]) pairs.push(pair);
  }
  const two = pairs.some((pair) => pair.second);
  const settings = { show: "", sort: "wrong" };
  const verdict = (margin) => el("span", { class: `right-or-wrong ${margin > 0 ? "is-right" : "is-wrong"}`, text: margin > 0 ? "right" : margin < 0 ? "wrong" : "equal" });
  const list = new List("Ranked pairs", 92, (pair) => [
    el("div", {}, el("div", { class: "asked", text: prompts[pair.better.prompt] }), el("div", { class: "said" }, el("span", { class: "soft", text: "better " }), said(pair.better)), el("div", { class: "said" }, el("span", { class: "soft", text: "worse  " }), said(pair.worse))),
    el("div", { class: "right number" }, el("div", {}, dots(pair), verdict(pair.margin), pair.second ? [" · ", el("span", { class: "dot1" }), verdict(pair.second.margin)] : null), el("div", { text: shown(pair.better.score, 2) }), el("div", { text: shown(pair.worse.score, 2) })),
  ], (pair) => (state.pick = pair.better));
  list.enter = (pair) => go(pair.better);
  const rate = (xs) => percent(xs.reduce((sum, pair) => sum + (pair.margin > 0) + 0.5 * (pair.margin === 0), 0) / xs.length);
  const unequal = pairs.filter((pair) => pair.longer), share = (test) => percent(unequal.filter(test).length / Math.max(1, unequal.length));
  const facts = el("div", { class: "facts" },
    el("span", { class: "chip" }, el("span", {}, "right on ", el("b", { text: rate(pairs) }), ` of ${pairs.length} different pairs, chance is 50 %`)),
    el("span", { class: "chip" }, el("span", {}, "the model prefers the longer answer in ", el("b", { text: share((p) => p.margin > 0 === p.longer > 0) }), ", people in ", el("b", { text: share((p) => p.longer > 0) }))));
  const update = () => {
    const kept = pairs.filter((pair) => !settings.show || (settings.show === "wrong" ? pair.margin <= 0 : settings.show === "right" ? pair.margin > 0 : pair.second && pair.margin > 0 !== pair.second.margin > 0));
    const keys = { wrong: (p) => p.margin, right: (p) => -p.margin, close: (p) => Math.abs(p.margin), longer: (p) => p.longer, apart: (p) => -Math.abs(p.margin - (p.second?.margin ?? p.margin)) };
    kept.sort((a, b) => keys[settings.sort](a) - keys[settings.sort](b));
    list.box.scrollTop = 0;
    list.set(kept, -1);
    count.textContent = `${kept.length} of ${pairs.length} pairs; Enter opens the better answer`;
  };
  const choose = (label, name, options) => el("select", { "aria-label": label, onchange: (event) => { settings[name] = event.target.value; update(); } }, options.map(([value, text]) => option(value, text)));
  const count = el("div", { class: "count", role: "status" });
  const learnt = runs.filter((run, n) => run.settings.held_out === "none" && pairs.some((pair) => pair.run === n || (n === 1 && pair.second)));
  const panel = el("section", { class: "panel full" }, facts, learnt.map((run) => el("div", { class: "count", text: `${run.name} was trained on these pairs (--held-out None): how often it is right here does not tell how often it is right on new ones.` })), el("div", { class: "filters" },
    choose("Pairs", "show", [["", "All pairs"], ["wrong", "Wrong"], ["right", "Right"], ...(two ? [["apart", "On which the two models differ"]] : [])]),
    choose("Order", "sort", [["wrong", "Most wrong first"], ["right", "Most right first"], ["close", "Closest first"], ["longer", "Better answer shorter first"], ...(two ? [["apart", "Farthest apart first"]] : [])])), count, list.box);
  current.pairs = list;
  return [panel, update];
}

// Curves ---------------------------------------------------------------------------------------------------------------

const TITLES = {
  "reward/score": "Score", "kl/reference": "KL to the reference; nats", "policy/entropy": "Entropy; nats a token", "response/tokens": "Length; tokens",
  "response/ended": "Answers that end; share", "reward/total": "Reward with the KL penalty", "reward/disagreement": "Disagreement of reward models", "reward/accuracy": "Pairs in the right order",
  "loss/policy": "Policy loss", "loss/value": "Value loss", "value/explained_variance": "Critic: explained variance", "policy/clip_fraction": "Clipped tokens; share",
  "policy/approx_kl": "KL of the updates; nats a token", "grad_norm/policy": "Gradient norm, policy", "grad_norm/critic": "Gradient norm, critic", "loss/ptx": "Pretraining loss; nats a token",
  "loss/bradley_terry": "Loss; nats", "loss/next_token": "Loss; nats a token", "kl/coef": "KL coefficient", "cost/mean": "Cost", "cost/multiplier": "Multiplier of the cost",
};
const title = (name) => (TITLES[name] ?? name).replace(";", ",");
const titled = (name) => { const [text, unit] = (TITLES[name] ?? name).split("; "); return el("span", {}, text, unit ? el("small", { text: ` ${unit}` }) : null); };

function plot(name) {
  const W = 330, H = 136, left = 44, right = 8, top = 8, bottom = 20;
  const lines = runs.map((run) => (run.curves[name] ?? []).map((y, n) => [run.curves.step[n], y]).filter(([, y]) => y !== null));
  const all = lines.flat(), xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)], flat = Math.min(...ys) === Math.max(...ys);
  const [y0, y1] = flat ? [Math.min(0, ys[0]), Math.max(0, 2 * ys[0]) || 1] : [Math.min(...ys), Math.max(...ys)];
  const X = (x) => left + ((W - left - right) * (x - x0)) / (x1 - x0 || 1), Y = (y) => H - bottom - ((H - top - bottom) * (y - y0)) / (y1 - y0 || 1);
  const read = el("span", { class: "read" });
  const cursor = svg("line", { class: "cursor", y1: top, y2: H - bottom, x1: -9, x2: -9 });
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title(name)} over the steps: ${lines.map((line) => `from ${shown(line[0]?.[1])} to ${shown(line.at(-1)?.[1])}`).join("; ")}` },
    [y0, (y0 + y1) / 2, y1].map((y) => [svg("line", { class: "axis", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }), svg("text", { x: left - 5, y: Y(y) + 3.5, "text-anchor": "end", text: brief(y) })]).flat(),
    svg("text", { x: left, y: H - 5, text: `step ${x0}` }), svg("text", { x: W - right, y: H - 5, "text-anchor": "end", text: x1 }),
    steps.filter((step) => step >= x0 && step <= x1).map((step) => svg("line", { class: "seen", x1: X(step), x2: X(step), y1: H - bottom, y2: H - bottom + 4 })),
    lines.map((line, run) => svg("path", { class: `line${run}`, d: line.map(([x, y], n) => `${n ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("") })), cursor);
  const at = (step) => {
    const there = lines.map((line) => line.reduce((best, point) => (best && Math.abs(best[0] - step) <= Math.abs(point[0] - step) ? best : point), null));
    cursor.setAttribute("x1", step === null ? -9 : X(step));
    cursor.setAttribute("x2", step === null ? -9 : X(step));
    read.textContent = step === null ? lines.map((line) => brief(line.at(-1)?.[1] ?? NaN)).join(" · ") : `step ${Math.round(step)}: ${there.map((point) => brief(point?.[1] ?? NaN)).join(" · ")}`;
  };
  at(null);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * W;
    const step = Math.max(x0, Math.min(x1, x0 + ((x - left) / (W - left - right)) * (x1 - x0)));
    plots.forEach((other) => other(step));
  });
  picture.addEventListener("pointerleave", () => plots.forEach((other) => other(null)));
  plots.push(at);
  return el("figure", { class: "plot" }, el("figcaption", {}, titled(name), read), picture);
}
let plots = [];
function curvesView() {
  plots = [];
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => name !== "step");
  const known = Object.keys(TITLES).filter((name) => names.includes(name)), rest = names.filter((name) => !known.includes(name));
  const main = known.length ? known : rest.splice(0, 6);
  const more = el("details", { ontoggle: (event) => { if (event.target.open && event.target.children.length < 2) event.target.append(el("div", { class: "plots" }, rest.map(plot))); } }, el("summary", { text: `${rest.length} more: speed, memory and the like` }));
  const marks = steps.length ? el("p", { class: "soft", text: "The small marks below a curve are the steps whose answers were recorded." }) : null;
  return [el("section", { class: "panel", tabindex: 0, role: "region", "aria-label": "Curves" }, el("div", { class: "plots" }, main.map(plot)), marks, rest.length ? more : null), () => {}];
}

function settingsView() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  return [el("section", { class: "panel", tabindex: 0, role: "region", "aria-label": "Settings" }, el("div", { class: "sheet" }, el("table", { class: "settings" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "Setting" }), runs.map((run, n) => el("th", { scope: "col", text: run.name })))),
    el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row", text: name }), runs.map((run) => el("td", { text: run.settings[name] ?? "–" })))))))), () => {}];
}

// The frame ------------------------------------------------------------------------------------------------------------

const current = { answers };
const VIEWS = { answers: ["Answers", answersView, episodes.length], pairs: ["Pairs", pairsView, has("rank")], beside: ["Side by side", besideView, runs.length > 1 && episodes.some((e) => e.part === "watched")],
  curves: ["Curves", curvesView, runs.some((run) => Object.keys(run.curves).length)], settings: ["Settings", settingsView, true] };
const views = Object.entries(VIEWS).filter(([, view]) => view[2]);

function open(name) {
  state.view = name;
  for (const tab of $("tabs").children) {
    const chosen = tab.dataset.view === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
  }
  const [panel, ready] = VIEWS[name][1]();
  const holder = el("div", { role: "tabpanel", id: "view", "aria-labelledby": `tab-${name}` }, panel);
  holder.style.height = "100%";
  $("main").replaceChildren(holder);
  ready();
}
$("names").append(...runs.map((run, n) => el("span", { class: runs.length > 1 ? `chip of${n}` : "chip", text: letters[n] ? `${letters[n]}: ${run.name}` : run.name })));
$("tabs").append(...views.map(([name, view]) => el("button", { type: "button", role: "tab", id: `tab-${name}`, "data-view": name, "aria-controls": "view", text: view[0], onclick: () => open(name) })));

function theme() {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  named();
  map();
}
function named() {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").textContent = dark ? "Light" : "Dark";
}
$("theme").addEventListener("click", theme);
$("keys").addEventListener("click", () => $("help").showModal());
addEventListener("resize", map);
named();

addEventListener("keydown", (event) => {
  const target = event.target, typing = target.matches?.("input:not([type=radio]), select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (typing) { if (event.key === "Escape") target.blur(); return; }
  const done = () => event.preventDefault();
  const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (target.closest?.("[role=tablist]") && sideways) {
    const tabs = [...$("tabs").children], next = tabs[(tabs.indexOf(target) + sideways + tabs.length) % tabs.length];
    open(next.dataset.view);
    next.focus();
    return done();
  }
  if (event.key === "?") { $("help").showModal(); return done(); }
  if (event.key === "t") { theme(); return done(); }
  if (event.key === "/" && $("search")) { $("search").focus(); return done(); }
  const list = current[state.view], page = list ? Math.max(1, Math.floor(list.box.clientHeight / list.height) - 1) : 1;
  const move = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, End: Infinity, Home: -Infinity }[event.key];
  const inside = target === document.body || target.closest?.(".list, #tokens") || target.closest?.("[role=tablist]");
  if (list && move && list.items.length && (inside || "jk".includes(event.key))) { list.select(Math.max(0, Math.min(list.items.length - 1, list.at + move))); return done(); }
  if (list?.enter && event.key === "Enter" && list.at >= 0 && target === list.box) { list.enter(list.items[list.at]); return done(); }
  if (state.view !== "answers" || !state.pick) return;
  if (sideways && state.pick.tokens.length && !target.matches?.("input")) { token(state.token + sideways); return done(); }
  const there = kinds.filter((kind) => numbers(state.pick, kind));
  if (/^[1-9]$/.test(event.key) && there[Number(event.key) - 1]) { recolour(there[Number(event.key) - 1]); return done(); }
  if (event.key === "[" || event.key === "]") {
    const all = siblings(state.pick).filter((e) => e.run === state.pick.run).sort((a, b) => a.step - b.step || a.number - b.number);
    const next = all[all.indexOf(state.pick) + (event.key === "]" ? 1 : -1)];
    if (next) go(next);
    return done();
  }
});

const preferred = episodes.filter((e) => e.part === "watched" && e.tokens.length > 2);
if (preferred.length && runs.length === 1) {  // what training changed most says most
  const last = Math.max(...preferred.map((e) => e.step));
  const told = (e) => { const all = siblings(e); return new Set(all.map((x) => x.text)).size + (e.score ?? 0) - (all[0].score ?? 0); };
  state.pick = preferred.filter((e) => e.step === last).reduce((a, b) => (told(b) > told(a) ? b : a));
}
open(views[0][0]);
document.documentElement.dataset.ready = "";
})();
