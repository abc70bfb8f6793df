// The script of all pages. Templates of the page say what it consists of; this puts in what people and models wrote, as
// text and never as HTML, and what is entered lives in the fields of the page's form.

const $ = (id) => document.getElementById(id);
const boot = JSON.parse($("boot")?.textContent ?? "{}");
const letter = (n) => String.fromCharCode(65 + n);
const say = (text) => ($("live").textContent = text);
const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

// A text in the person's language, with {values} filled in.
const t = (name, values = {}) => boot.words[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);

function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

const copy = (template) => $(template)?.content.cloneNode(true) ?? document.createDocumentFragment();

function banner(text, kind = "") {
  $("banner").textContent = text;
  $("banner").className = `banner ${kind}`;
  $("banner").hidden = !text;
}

// What went wrong, in words; only an administrator is told what a model's server said.
function why({ error, message }) {
  const known = boot.words[`error_${error}`] ?? "";
  const detail = error?.startsWith("chat_") && message !== known ? message : "";
  return known && detail ? `${known} (${detail})` : known || message || error;
}

// What a person has entered is kept in the browser too, as long as there is room.
function keep(what, value) {
  try {
    if (value === null) localStorage.removeItem(`${what}/${boot.person}`);
    else localStorage.setItem(`${what}/${boot.person}`, JSON.stringify(value));
  } catch {
    // it is full: this lasts as long as the page
  }
}

function kept(what) {
  try {
    return JSON.parse(localStorage.getItem(`${what}/${boot.person}`));
  } catch {
    return null; // what is kept there is of no use
  }
}

function put(form, name, value) {
  for (const field of [...form.elements].filter((one) => one.name === name))
    if (!["radio", "checkbox"].includes(field.type)) field.value = value ?? "";
    else field.checked = [value].flat().map(String).includes(field.value);
}

// Requests ------------------------------------------------------------------------------------------------------------

const send = (path, body) =>
  fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF": document.querySelector("meta[name=csrf]").content },
    body: JSON.stringify(body),
  });

async function post(path, body) {
  const response = await send(path, body);
  return [response.status, await response.json().catch(() => ({}))];
}

// A name for what is sent: what has one name is stored once, however often it comes.
const newName = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

// Post until there is an answer.
async function deliver(path, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 15000)) {
    const [status, found] = await post(path, body).catch(() => [0, {}]);
    if (status && status !== 429 && status < 500) {
      if (wait > 500) banner("");
      return [status, found];
    }
    banner(t(status === 507 ? "error_disk" : "offline"), "warn");
    await pause(wait);
  }
}

// Ask models for answers, and tell `on` what has come of each: (texts, ends). Returns what the server says at the end:
// {turn}, by which the answers are judged, or {error, message}.
async function ask(body, on) {
  const texts = [];
  const ends = [];
  let last = { error: "chat_cut" };
  try {
    const response = await send("/api/chat/answer", body);
    if (!response.ok) return await response.json();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return last;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const event of lines.map((line) => JSON.parse(line))) {
        if ("text" in event) texts[event.n] = (texts[event.n] ?? "") + event.text;
        else if ("n" in event) ends[event.n] = event.end;
        else last = event;
      }
      on(texts, ends);
    }
  } catch {
    return last;
  }
}

const stop = (name) => post("/api/chat/stop", { name }).catch(() => {});

// Text of a model: characters that would hide or reorder it are shown by their numbers --------------------------------

const SHOWN = 20000; // characters of a text that are shown at first
const CONTROL = // but for what joins and varies letters
  /([[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\p{DI}\ufff9-\ufffb]--[\t\n\r\u200c\u200d\p{VS}]]|\r(?!\n))/gv;

function shown(text) {
  const box = el("div", { className: "text", dir: "auto" });
  const fill = (part) =>
    part.split(CONTROL).forEach((piece, n) => {
      const name = n % 2 && `U+${piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
      box.append(name ? el("span", { className: "control", title: t("control") }, name) : piece);
    });
  const end = SHOWN + (text.codePointAt(SHOWN - 1) > 0xffff);
  if (!text) box.append(el("span", { className: "muted" }, t("empty_answer")));
  fill(text.slice(0, end));
  if (text.length > end) {
    const more = el("button", { type: "button", className: "more" }, t("show_all", { n: text.length }));
    more.onclick = () => {
      more.remove();
      fill(text.slice(end));
    };
    box.append(more);
  }
  return box;
}

function card(text, n) {
  const node = copy("card").firstElementChild;
  node.id = `card-${n}`;
  node.querySelector(".letter").textContent = letter(n);
  node.querySelector(".hidden").textContent = node.querySelector(".body").ariaLabel = `${t("answer")} ${letter(n)}`;
  node.querySelector(".badge").id = `badge-${n}`;
  node.querySelector(".body").append(shown(text));
  return node;
}

function message(role, text) {
  const node = copy("message-template").firstElementChild;
  node.classList.add(role);
  node.querySelector(".who").textContent = t(role === "user" ? "chat_you" : `role_${role}`);
  node.querySelector(".said").append(shown(text));
  return node;
}

// Show an answer that is being written.
function grow(box, text, end) {
  box.classList.toggle("growing", !end);
  box.ariaBusy = String(!end);
  box.replaceChildren(text ? shown(text) : el("span", { className: "thinking" }, t("chat_thinking")));
}

// Enter sends a message, unless it ends the choice of a character or begins a line, as it does in a better answer.
addEventListener("keydown", (event) => {
  const area = event.target;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  if (!area.matches(".composer textarea, .rewrite textarea")) return;
  const control = event.ctrlKey || event.metaKey;
  if (control ? !area.value.trim() : area.closest(".rewrite.assistant")) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  area.parentElement.querySelector(".primary").click();
});

// Light or dark -------------------------------------------------------------------------------------------------------

const root = document.documentElement;
$("theme").onclick = () => {
  const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  document.cookie = `theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=lax`; // the server's pages have it
};

// Entrance: the token is behind the # of the link, which is in no log -------------------------------------------------

function entrance(form) {
  const busy = (is) => {
    form.hidden = is;
    $("enter-busy").hidden = !is;
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    busy(true);
    const token = $("token").value.trim().replace(/^.*#/, "");
    const [status, body] = await post("/enter", { token }).catch(() => [0]);
    if (status === 200) return location.replace(body.to);
    $("enter-error").textContent = form.dataset[{ 0: "offline", 429: "many" }[status] ?? "unknown"];
    busy(false);
  };
  const follow = () => {
    if (!location.hash) return;
    $("token").value = location.hash;
    history.replaceState(null, "", location.pathname);
    form.requestSubmit();
  };
  addEventListener("hashchange", follow);
  follow();
}

// Administration: what is live is read again every few seconds --------------------------------------------------------

async function refresh(parts) {
  if (document.hidden || document.activeElement?.closest("[data-live]")) return;
  const response = await fetch(parts[0].dataset.live || "/admin");
  if (!response.ok) return;
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html").querySelectorAll("[data-live]");
  if (fresh.length === parts.length) parts.forEach((part, n) => part.replaceChildren(...fresh[n].childNodes));
}

async function stayFresh(parts) {
  const start = Date.now();
  await refresh(parts).catch(() => null); // else the next time
  setTimeout(stayFresh, Math.max(5000, 10 * (Date.now() - start)), parts); // what takes long is asked for less often
}

// Work: a task --------------------------------------------------------------------------------------------------------

const IDLE = 120000; // milliseconds without a sign of life, after which time no longer counts
const api = boot.api ?? { task: "/api/task", draft: "/api/draft", submit: "/api/submit", undo: "/api/undo" };
const title = document.title;
const form = $("task");
const tabs = new BroadcastChannel("people");
let task = null; // what the server gave
let ranks = []; // the place of each answer; null for one that was never put in one
let looked = 0; // milliseconds spent on the task
let sign = Date.now(); // last sign of life
let busy = false; // an answer is on its way
let timer = 0; // of the next draft, or of the next question for a task
let waiting = false; // nothing was left to do
let missed = false; // the banner says what is missing
let wanted = boot.api ? new URLSearchParams(location.search).get("item") : null; // the item to decide next

function later(act, time) {
  clearTimeout(timer);
  timer = setTimeout(act, time);
}

async function load(focus = !document.querySelector("dialog[open]")) {
  let response, body;
  try {
    response = await fetch(wanted ? `${api.task}?item=${encodeURIComponent(wanted)}` : api.task);
    body = await response.json();
  } catch {
    banner(t("offline"), "warn");
    return later(load, 3000);
  }
  if (!response.ok) {
    later(load, 5000);
    return refused(body);
  }
  for (const name of ["today", "done", "left"]) $(`pace-${name}`).textContent = body.pace[name];
  $("pace-seconds").textContent = body.pace.seconds ? `${Math.round(body.pace.seconds)} s` : "–";
  $("undo").disabled = !body.pace.done;
  if (body.gone) banner(t(`error_${body.gone}`), "warn");
  task = body.task;
  talk = null;
  wanted = null;
  if (boot.api) history.replaceState(null, "", task ? `?item=${task.item}` : location.pathname);
  form.hidden = !task;
  $("resting").hidden = Boolean(task || body.aside || boot.nothing);
  if (!task) {
    waiting = true;
    $("bench").replaceChildren();
    const going = body.sampling && (body.sampling.done ? "sampling" : "sampling_first");
    $("ask").textContent = t(body.aside ? "aside" : (boot.nothing ?? going ?? "nothing_left"), body.sampling ?? {});
    return later(load, 5000);
  }
  clearTimeout(timer);
  if (waiting) {
    say(t("new_task"));
    if (document.hidden) document.title = `● ${title}`; // until somebody looks
  }
  waiting = false;
  looked = 0;
  const own = kept("draft");
  const drafts = [own?.assignment === task.id ? own.answer : null, task.draft].filter(Boolean);
  draw(drafts.sort((a, b) => (b.at ?? 0) - (a.at ?? 0))[0] ?? {});
  $("about").hidden = !body.about;
  const about = body.about?.length ? body.about : [t("about_none")];
  $("about").querySelector("ul").replaceChildren(...about.map((line) => el("li", {}, line)));
  scrollTo(0, 0);
  if (task.task === "chat") loadTalk();
  else if (focus) ($("text") ?? firstOpen()).focus({ preventScroll: true });
}

function refused(body) {
  if (body.error === "guidelines") return location.assign("/guidelines");
  banner(why(body), "warn");
}

// Show the task with an answer to it that was begun.
function draw(answer) {
  const { task: kind, responses, orders, prompt } = task;
  const cards = responses.map(card);
  form.reset();
  form.classList.remove("expanded");
  form.dataset.task = kind;
  const share = Math.round(100 * task.share);
  const ask = t(kind === "rank" && boot.ratings === "none" ? "task_order" : `task_${kind}`);
  $("ask").textContent = orders ? t("decide_ask", { n: orders.length, share }) : ask;
  $("prompt").hidden = kind === "chat";
  $("submit").textContent = t(kind === "chat" ? "chat_finish" : "submit");
  $("submit").className = kind === "chat" ? "quiet" : "primary";
  $("draft").textContent = "";
  const turns = kind === "chat" ? [] : typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
  $("turns").replaceChildren(...turns.map(({ role, content }) => {
    const turn = copy("turn").firstElementChild;
    turn.classList.add(role);
    turn.firstElementChild.textContent = t(`role_${role}`);
    turn.append(shown(content));
    return turn;
  }));
  cards.forEach((node, n) => {
    node.append(copy(`card-${kind}`));
    for (const field of node.querySelectorAll("input"))
      if (kind === "best") field.value = n;
      else field.name += `-${n}`;
  });
  const list = copy("cards").firstElementChild;
  list.dataset.count = cards.length;
  if (kind === "rank") list.append(copy("step"));
  list.append(...cards);
  $("bench").replaceChildren(...(cards.length ? [list] : []), copy(`kind-${kind}`));
  if (kind === "rank") drawPanel();
  if (kind === "arena" && responses[0].trim() === responses[1].trim()) {
    $("same").hidden = false;
    for (const field of form.querySelectorAll("[data-better='0'], [data-better='1']")) field.disabled = true;
  }
  $("orders").hidden = !orders;
  if (orders) drawOrders(orders);
  fill(answer);
}

function fill(answer) {
  const putAll = (values, suffix) => Object.entries(values).forEach(([name, value]) => put(form, name + suffix, value));
  putAll(answer, "");
  answer.ratings?.forEach((rating, n) => putAll(rating, `-${n}`));
  ranks = answer.ranks?.length === task.responses.length ? [...answer.ranks] : task.responses.map(() => null);
  for (const details of form.querySelectorAll("details")) details.open = Boolean(details.querySelector(":checked"));
  if (task.task === "rank") placeChips();
  view();
}

// The answer that stands in the form.
function read() {
  const data = new FormData(form);
  const number = (name) => (data.get(name) ? Number(data.get(name)) : null);
  const rating = (_, n) => ({
    ...Object.fromEntries(boot.scales.map((scale) => [scale, number(`${scale}-${n}`)])),
    flags: data.getAll(`flags-${n}`),
  });
  const said = {
    rank: () => ({ ranks, ratings: boot.ratings === "none" ? null : task.responses.map(rating) }),
    compare: () => ({ strength: number("strength") }),
    arena: () => ({ verdict: data.get("verdict") }),
    thumb: () => ({ thumb: data.get("thumb") }),
    best: () => ({ best: number("best") }),
    demonstrate: () => ({ text: data.get("text"), edited: number("edited") }),
    chat: () => ({ text: data.get("text") }),
  };
  return {
    ...said[task.task](),
    ...taken(number("taken")),
    prompt_flags: data.getAll("prompt_flags"),
    confidence: number("confidence"),
    note: data.get("note"),
  };
}

// What follows on the page from what was entered.
function view() {
  const panel = form.querySelector(".panel");
  if (panel) {
    const missing = form.querySelectorAll(".card .scale:invalid").length;
    panel.classList.toggle("locked", missing > 0);
    for (const chip of form.querySelectorAll(".chip")) chip.disabled = missing > 0;
    $("rank-hint").textContent = missing ? t("rank_locked", { n: missing }) : t("rank_hint");
  }
  if ($("text")) {
    const from = form.elements.edited.value;
    $("text").setCustomValidity($("text").value.trim() ? "" : t("missing_text"));
    $("count").textContent = t("characters", { n: $("text").value.length });
    $("from").textContent = from && t("edited_from", { a: letter(Number(from)) });
    $("fresh").hidden = !from;
  }
  if (talk) viewTalk();
}

// The first thing that is still to be filled in, or else what comes after it.
function firstOpen() {
  if (task.task === "chat") return openInTalk();
  return form.querySelector(":is(input, textarea):invalid") ?? $(`chip-${ranks.indexOf(null)}`) ?? $("submit");
}

// Go on from the text of answer n, or from nothing.
function startFrom(n) {
  const { text, edited } = read();
  const before = edited === null ? "" : task.responses[edited];
  if (text.trim() && text !== before && !confirm(t("replace_text"))) return;
  put(form, "edited", n);
  put(form, "text", n === null ? "" : task.responses[n]);
  changed();
  $("text").focus();
}

// Ranking: answers lie in places, by mouse, by touch or by keys -------------------------------------------------------

function drawPanel() {
  const count = task.responses.length;
  $("bench").querySelector(".panel").classList.toggle("many", count > 6);
  for (let place = 0; place < count; place++) {
    const [gap, level] = copy("level").children;
    gap.dataset.gap = level.dataset.place = place;
    const end = { 0: "best", [count - 1]: "worst" }[place];
    level.firstElementChild.append(String(place + 1), el("small", {}, end ? t(end) : ""));
    $("levels").append(gap, level);
  }
  $("levels").append(el("div", { className: "gap" }));
  $("levels").lastElementChild.dataset.gap = count;
  task.responses.forEach((text, n) => {
    const chip = copy("chip").firstElementChild;
    chip.id = `chip-${n}`;
    chip.querySelector(".letter").textContent = letter(n);
    chip.querySelector(".snippet").textContent = text.slice(0, 160).replace(CONTROL, "·").replace(/\s+/g, " ");
    const light = () => form.querySelectorAll(".card").forEach((one, k) => one.classList.toggle("lit", k === n));
    chip.addEventListener("focus", light);
    chip.addEventListener("pointerenter", light);
    chip.addEventListener("pointerdown", (event) => drag(event, chip, n));
    $("tray").append(chip);
  });
  form.querySelector(".panel").addEventListener("click", (event) => {
    const chip = event.target.closest(".chip");
    const picked = form.querySelector(".chip[aria-pressed=true]");
    if (!chip && picked) return drop(numberOf(picked), event.target.closest(".level, .gap"));
    if (!chip || chip.dataset.dragged) return;
    if (picked) picked.ariaPressed = "false";
    if (picked !== chip) chip.ariaPressed = "true";
  });
}

const numberOf = (chip) => Number(chip.id.slice(5));
const placeOf = (n) => t(ranks[n] === null ? "unplaced" : "placed", { a: letter(n), n: ranks[n] + 1 });
const better = (strength) => letter(Number(strength > 0)); // the answer that a strength is for

function placeChips() {
  ranks.forEach((rank, n) => {
    const chip = $(`chip-${n}`);
    (rank === null ? $("tray") : form.querySelector(`[data-place="${rank}"] .chips`)).append(chip);
    chip.ariaPressed = "false";
    chip.querySelector(".hidden").textContent = placeOf(n);
    $(`badge-${n}`).textContent = rank === null ? "" : `#${rank + 1}`;
  });
}

// Put answer n at a place, with those that are there, or before them, with the others moved down.
function move(n, place, before = false) {
  ranks[n] = null;
  if (before && (ranks.includes(place) || place === ranks.length)) {
    const places = [...new Set(ranks.filter((rank) => rank !== null))].sort(); // gaps are closed, to make room
    const at = places.filter((one) => one < place).length;
    ranks = ranks.map((rank) => (rank === null ? null : places.indexOf(rank) + Number(places.indexOf(rank) >= at)));
    place = at;
  }
  ranks[n] = place;
  placeChips();
  changed();
  say(placeOf(n));
  $(`chip-${n}`).focus({ preventScroll: true });
}

function drop(n, spot) {
  if (spot?.id === "tray") move(n, null);
  else if (spot) move(n, Number(spot.dataset.place ?? spot.dataset.gap), "gap" in spot.dataset);
}

function drag(from, chip, n) {
  if (from.button || chip.disabled) return;
  const ended = new AbortController();
  let spot = null;
  const over = (next) => {
    spot?.classList.remove("over");
    next?.classList.add("over");
    spot = next;
  };
  const on = (name, act) => chip.addEventListener(name, act, { signal: ended.signal });
  const end = (event) => {
    const found = event.type === "pointerup" ? spot : null;
    ended.abort();
    over(null);
    chip.classList.remove("dragged");
    chip.style.transform = "";
    setTimeout(() => delete chip.dataset.dragged); // after the click that this may be as well
    drop(n, found);
  };
  chip.setPointerCapture(from.pointerId);
  on("pointerup", end);
  on("pointercancel", end);
  on("pointermove", ({ clientX, clientY }) => {
    const [x, y] = [clientX - from.clientX, clientY - from.clientY];
    if (!chip.dataset.dragged && Math.hypot(x, y) < 6) return;
    chip.dataset.dragged = "yes";
    chip.classList.add("dragged");
    chip.style.transform = `translate(${x}px, ${y}px)`;
    const below = document.elementsFromPoint(clientX, clientY);
    over(below.find((one) => one.matches(".gap")) ?? below.find((one) => one.matches(".level")) ?? null);
    const edge = 60; // near the edge of the window, scroll
    scrollBy(0, clientY < edge ? -12 : clientY > innerHeight - edge ? 12 : 0);
  });
}

// Adjudication: the orders of others, of which one may be taken -------------------------------------------------------

function drawOrders(orders) {
  const columns = []; // [heading, the cell of an order]; one that no order fills is left out
  const add = (heading, cell) => orders.some(cell) && columns.push([heading, cell]);
  const strength = (value) => {
    const how = t(`strength_${Math.abs(value)}`);
    return value ? t("strength_of", { a: better(value), how }) : how;
  };
  const mark = ({ ratings }, n) => {
    const rating = el("small", { title: t("scale_overall") }, String(ratings?.[n]?.overall ?? ""));
    return el("span", { className: "placed" }, el("span", { className: "letter" }, letter(n)), rating);
  };
  task.responses.forEach((_, place) =>
    add(t("place", { n: place + 1 }), (order) => {
      const marks = order.ranks.flatMap((rank, n) => (rank === place ? [mark(order, n)] : []));
      return marks.length ? el("span", { className: "marks" }, ...marks) : null;
    }),
  );
  add(t("by_how_much"), (order) => order.strength !== undefined && strength(order.strength));
  add(t("confidence"), (order) => order.confidence && String(order.confidence));
  const note = (text) => el("span", { className: "said", dir: "auto" }, text.replace(CONTROL, "·"));
  add(t("note"), (order) => order.note && note(order.note));
  const rows = orders.map((order) => {
    const button = el("button", { type: "button", className: "take" }, t("take"));
    button.ariaLabel = t("take_of", { name: order.person });
    button.onclick = () => {
      const best = task.task === "best" ? order.ranks.indexOf(0) : null;
      fill({ ...read(), ranks: order.ranks, strength: order.strength ?? null, best, taken: order.label });
      changed();
      say(t("taken", { name: order.person }));
      banner(t("taken", { name: order.person }));
      $("submit").focus();
    };
    const cells = columns.map(([, cell]) => el("td", {}, cell(order) || ""));
    return el("tr", {}, el("th", { scope: "row" }, order.person), el("td", {}, button), ...cells);
  });
  const head = el("tr", {}, el("td"), el("td"), ...columns.map(([heading]) => el("th", { scope: "col" }, heading)));
  $("orders").querySelector("thead").replaceChildren(head);
  $("orders").querySelector("tbody").replaceChildren(...rows);
}

// The label that is taken, as long as the answer is as it says.
function taken(label) {
  const order = task.orders?.find((one) => one.label === label);
  const chosen = (name) => new FormData(form).get(name);
  const same = {
    rank: () => String(ranks) === String(order.ranks),
    compare: () => chosen("strength") === String(order.strength),
    best: () => chosen("best") === String(order.ranks.indexOf(0)),
  };
  return order && same[task.task]() ? { taken: label } : {};
}

// Drafts and submission -----------------------------------------------------------------------------------------------

const written = (answer) => ({ ...answer, at: Date.now() });

function changed() {
  view();
  if (missed) banner("");
  missed = false;
  keep("draft", { assignment: task.id, answer: written(read()) });
  later(saveDraft, 500);
}

async function saveDraft() {
  if (!task || busy) return;
  const number = task.id;
  const [status, body] = await post(api.draft, { assignment: number, draft: written(read()) }).catch(() => [0]);
  if (status === 200 && $("banner").textContent === t("offline")) banner("");
  if (status === 401) return refused(body);
  if (status === 409 && task?.id === number) return lost(body);
  $("draft").textContent = t(status === 200 ? "draft_saved" : "draft_local");
  if (!status) later(saveDraft, 4000);
}

// The task is no longer this person's, or no longer open.
function lost(body, text = task && read().text) {
  banner(why(body), "warn");
  keep("draft", null);
  if (body.error === "taken_back") wanted = task?.item;
  if (text?.trim()) {
    $("lost").querySelector("textarea").value = text;
    $("lost").showModal();
  }
  load();
}

// Ask something in a dialog: the value of the button that closes it, which is empty where nothing is chosen.
const asked = (dialog) =>
  new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.onclose = () => resolve(dialog.returnValue);
    dialog.showModal();
  });

function finish() {
  const open = firstOpen();
  if (task.task === "chat" ? talk?.enough : open === $("submit")) return submit(read());
  banner(task.task === "chat" ? t("chat_short") : open.closest("[data-missing]").dataset.missing, "warn");
  missed = true;
  open?.focus();
}

function submit(answer) {
  if (busy) return;
  clearTimeout(timer);
  const pending = { assignment: task.id, submission: newName(), answer, seconds: looked / 1000 };
  keep("pending", pending);
  settle(pending);
}

async function settle(pending) {
  busy = $("submit").disabled = true;
  const [status, body] = await deliver(api.submit, pending);
  busy = $("submit").disabled = false;
  keep("pending", null);
  if (status === 200) {
    keep("draft", null);
    banner("");
    say(t("submitted"));
    tabs.postMessage({ person: boot.person, assignment: pending.assignment });
    return load();
  }
  if (body.error === "contradiction") {
    if (!task) await load(false);
    return task?.id === pending.assignment ? contradict(pending.answer, body.pairs) : undefined;
  }
  if (status === 409) return lost(body, pending.answer.text);
  refused(body);
  if (!task) load();
}

async function contradict(answer, pairs) {
  const lines = pairs.map(([a, b]) => el("li", {}, t("contradiction_pair", { a: letter(a), b: letter(b) })));
  $("contradiction").querySelector("ul").replaceChildren(...lines);
  if (await asked($("contradiction"))) submit({ ...answer, confirmed: true });
}

async function skip() {
  const reason = await asked($("skipping"));
  if (!reason) return;
  const { prompt_flags, confidence, note } = read();
  submit({ skip: reason, prompt_flags, confidence, note });
}

async function undo() {
  if (busy) return;
  clearTimeout(timer);
  try {
    if (task) await post(api.draft, { assignment: task.id, draft: written(read()) });
    const [status, body] = await post(api.undo, {});
    if (status !== 200) return refused(body);
    wanted = body.item ?? null;
    keep("draft", null);
    banner(t("undone"));
    tabs.postMessage({ person: boot.person, assignment: null });
    await load();
  } catch {
    banner(t("offline"), "warn");
  }
}

// Keys ----------------------------------------------------------------------------------------------------------------

function onKey(event) {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  const act = keyed(event, document.activeElement);
  if (!act) return;
  event.preventDefault();
  act();
}

// What a key does; nothing, where it is to do what it does everywhere.
function keyed(event, at) {
  const key = event.key.toLowerCase();
  if (event.key === "Escape" && $("stop")) return () => $("stop").click();
  const control = event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && task && control) return talk ? goOn : finish;
  if (event.key === "Enter" && at.matches("#task :is(input, select)")) return () => {}; // a button submits
  if (control || event.altKey) return null;
  if (at.matches("textarea, select, input:not([type=radio], [type=checkbox])")) return null;
  if (key === "?") return () => $("keys").showModal();
  if (key === "u") return undo;
  if (!task) return null;
  const count = task.responses.length;
  const digit = Number(/^(Digit|Numpad)([1-9])$/.exec(event.code)?.[2]);
  if (at.matches(".chip")) {
    const n = numberOf(at);
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (digit <= count)
      return () => {
        move(n, digit - 1, event.shiftKey);
        firstOpen().focus({ preventScroll: true });
      };
    if (step && ranks[n] === null) return () => step < 0 && move(n, count - 1);
    if (step) return () => move(n, Math.min(Math.max(ranks[n] + step, 0), count - 1));
  }
  if (digit && !event.shiftKey) {
    const group = at.closest(".card .scale");
    const option = (group ?? form).querySelectorAll(group ? "input" : ".strength input, .pick input")[digit - 1];
    if (!option || option.disabled || !option.checkVisibility()) return null;
    return () => {
      option.click();
      if (group) return nextScale(group);
      (talk ? $("choose") : $("submit")).focus({ preventScroll: true });
    };
  }
  const n = key.length === 1 ? key.charCodeAt(0) - 97 : -1;
  if (n >= 0 && n < count) {
    const chip = form.querySelector(`#chip-${n}:enabled`);
    const node = $(`card-${n}`);
    const rated = node.querySelector(".scale input:checked");
    return () => {
      (chip ?? rated ?? node.querySelector(".scale input, .pick input") ?? node.querySelector(".body")).focus();
      if (!chip) node.scrollIntoView({ block: "nearest" });
    };
  }
  if (key === "t" && task.orders) return () => form.querySelector(".take").focus();
  return { x: () => form.classList.toggle("expanded"), s: () => $("skip").click(), n: () => $("note").focus() }[key];
}

function nextScale(group) {
  const groups = [...form.querySelectorAll(".card .scale")];
  const next = groups[groups.indexOf(group) + 1];
  const open = next ? (next.querySelector("input:checked") ?? next.querySelector("input")) : firstOpen();
  open.focus({ preventScroll: true });
  open.closest(".card")?.scrollIntoView({ block: "nearest" });
}

// The task "chat": two answers a turn, and the chosen one continues the conversation ----------------------------------

let talk = null; // the conversation: {opening, turns, least} as the server has it, and how it stands on this page

async function loadTalk() {
  const number = task.id;
  talk = null;
  try {
    const response = await fetch(`/api/chat/conversation?assignment=${number}`);
    const body = await response.json();
    if (task?.id !== number) return;
    if (!response.ok) return refused(body.error === "missing" ? { error: "chat_away" } : body);
    const done = body.turns.filter((turn) => turn.strength !== null);
    const pending = body.turns.find((turn) => turn.strength === null);
    talk = { ...body, done, pending, enough: done.length >= body.least, since: looked, asking: null };
    drawTalk(pending ? "choose" : "write");
  } catch {
    setTimeout(() => task?.id === number && loadTalk(), 3000);
  }
}

// Show the conversation where a message is written, waited for, failed, or where one of two answers is to be chosen.
function drawTalk(stage, asked = talk.pending?.message) {
  const { opening, done, pending, least } = talk;
  talk.stage = stage;
  $("conversation").hidden = false;
  const topic = typeof opening === "string";
  $("topic").hidden = !topic || !opening;
  if (topic) $("topic").lastElementChild.replaceChildren(shown(opening));
  $("list").replaceChildren(
    ...(topic ? [] : opening.map(({ role, content }) => message(role, content))),
    ...done.flatMap(({ message: said, responses, strength }) => [
      message("user", said),
      message("assistant", responses[Number(strength > 0)]),
    ]),
    ...(asked !== undefined && stage !== "write" ? [message("user", asked)] : []),
  );
  $("list").hidden = !$("list").childElementCount;
  if (stage === "choose") $("pair").replaceChildren(...pending.responses.map(card));
  put(form, "strength", null);
  for (const part of form.querySelectorAll("[data-in]")) part.hidden = !part.dataset.in.split(" ").includes(stage);
  $("turns-done").textContent = talk.enough ? t("chat_enough") : t("chat_turn_of", { n: done.length + 1, least });
  $("submit").className = talk.enough && stage === "write" ? "" : "quiet";
  viewTalk();
  openInTalk().focus({ preventScroll: true });
  $("turns-done").scrollIntoView({ block: "end" });
  const pair = form.querySelector("#pair:not([hidden])");
  if (pair?.getBoundingClientRect().top < 64) pair.scrollIntoView(); // from its beginning, if not all of it can be seen
}

// Where the person goes on; while answers come not at what stops them, as Enter may come twice.
function openInTalk() {
  const chosen = !$("choose").disabled;
  const first = { write: "#message", wait: ".body", broken: "#retry", choose: chosen ? "#choose" : ".strength input" };
  return form.querySelector(first[talk?.stage ?? "write"]);
}

function viewTalk() {
  const strength = new FormData(form).get("strength");
  $("send").disabled = !$("message").value.trim();
  $("choose").disabled = strength === null;
  $("choose").textContent = strength === null ? t("chat_go_on_none") : t("chat_go_on", { a: better(strength) });
}

async function sendTurn(text) {
  const here = talk;
  if (here.asking || !text.trim()) return;
  here.asking = newName();
  here.asked = text;
  banner("");
  $("pair").replaceChildren(card("", 0), card("", 1));
  const bodies = [...$("pair").querySelectorAll(".body")];
  const show = (texts, ends) => bodies.forEach((body, n) => grow(body, texts[n], ends[n]));
  show([], []);
  drawTalk("wait", text);
  let came = [];
  const question = { name: here.asking, assignment: task.id, message: text };
  const last = await ask(question, (texts, ends) => show((came = texts), ends));
  here.asking = null;
  if (talk !== here) return;
  if (["expired", "answered", "foreign", "guidelines", "no_session"].includes(last.error)) {
    refused(last);
    return last.error === "no_session" ? undefined : load();
  }
  put(form, "text", "turn" in last ? "" : text);
  changed();
  if ("turn" in last) say(t("chat_answered"));
  if ("turn" in last || last.error === "moved") return loadTalk();
  show(came, ["cut", "cut"]);
  $("failed").textContent = why(last);
  drawTalk("broken", text);
}

async function choose() {
  const here = talk;
  const strength = Number(new FormData(form).get("strength"));
  if (here.asking || !strength) return;
  here.asking = newName();
  $("choose").disabled = $("others").disabled = true;
  const seconds = Math.max(0, looked - here.since) / 1000;
  const label = { assignment: here.pending.id, submission: here.asking, answer: { strength }, seconds };
  const [status, body] = await deliver("/api/submit", label);
  if (talk !== here) return;
  if (status !== 200) refused(body);
  load();
}

// What Ctrl+Enter does: the next step.
function goOn() {
  if ($("choose").checkVisibility()) return $("choose").disabled ? firstOpen().focus() : $("choose").click();
  if ($("message").checkVisibility() && $("message").value.trim()) return $("send").click();
  finish();
}

function work() {
  const acts = {
    skip,
    fresh: () => startFrom(null),
    send: () => sendTurn($("message").value),
    stop: () => talk?.asking && stop(talk.asking),
    retry: () => sendTurn(talk.asked),
    change: () => drawTalk("write"),
    others: () => sendTurn(talk.pending.message),
    choose,
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    finish();
  };
  form.addEventListener("input", changed);
  form.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.matches(".edit-this")) startFrom([...form.querySelectorAll(".edit-this")].indexOf(button));
    else acts[button?.id]?.();
  });
  $("undo").onclick = undo;
  $("help").onclick = () => $("keys").showModal();
  $("skipping").onkeydown = (event) => $("skipping").querySelectorAll("button[value]")[event.key - 1]?.click();
  addEventListener("keydown", onKey);
  tabs.onmessage = ({ data }) => {
    if (data.person !== boot.person || !task || ![task.id, null].includes(data.assignment) || busy) return;
    if (boot.api) wanted = task.item;
    load(false);
  };
  setInterval(() => {
    if (!document.hidden && Date.now() - sign < IDLE) looked += 250;
  }, 250);
  for (const name of ["pointermove", "pointerdown", "keydown", "scroll", "wheel"])
    addEventListener(name, () => (sign = Date.now()), { passive: true, capture: true });
  addEventListener("visibilitychange", () => document.hidden || (document.title = title));
  const pending = kept("pending"); // not yet acknowledged when the page was closed
  if (pending) settle(pending);
  else load();
}

// The page that talks to one model ------------------------------------------------------------------------------------

let chat; // {messages, former, fields}, which is kept in the browser
let models = null; // their names; null for one whose name is not told
let running = null; // the name of the question that is being answered
let saved = 0;
let judging = Promise.resolve(); // thumbs are sent one after the other

function readChat() {
  chat = { messages: [], former: null, fields: {}, ...kept("chat") };
  const broken = chat.messages.filter((one) => one.growing); // when the page was closed
  for (const one of broken) Object.assign(one, { growing: false, failed: { error: "chat_cut" } });
  for (const [name, value] of Object.entries(chat.fields)) put($("talk"), name, value);
}

function saveChat() {
  saved = Date.now();
  chat.fields = { ...chat.fields, ...Object.fromEntries(new FormData($("talk"))) };
  keep("chat", chat);
}

async function findModels() {
  try {
    const response = await fetch("/api/chat/models");
    const body = await response.json();
    if (response.ok) {
      models = body.models;
      const option = (name, n) => el("option", { value: n }, name ?? t("chat_model_n", { n: n + 1 }));
      $("model").append(...models.map(option));
      $("model").value = Math.min(chat.fields.model ?? 0, models.length - 1);
      $("model").disabled = false;
      banner("");
      return drawChat();
    }
    if (body.error === "guidelines") return location.assign("/guidelines");
    banner(["chat_away", "chat_slow"].includes(body.error) ? t("chat_waiting") : why(body));
    if (response.status < 500) return;
  } catch {
    banner(t("chat_waiting"));
  }
  setTimeout(findModels, 3000);
}

function drawChat() {
  const { messages, former } = chat;
  $("list").replaceChildren(...messages.map(drawMessage));
  $("list").hidden = !messages.length;
  $("nothing").hidden = messages.length > 0;
  $("former").hidden = !former;
  $("new").hidden = !messages.length || Boolean(running);
  viewChat();
  saveChat();
  if (document.activeElement === document.body) $("message").focus({ preventScroll: true });
}

// A message without an answer is to be asked again, or changed, first.
function stuck() {
  const last = chat.messages.at(-1);
  return last?.role === "user" || (last?.failed && !last.content);
}

function viewChat() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !models || !$("message").value.trim() || stuck();
}

function drawMessage(one, n) {
  const node = message(one.role, one.content);
  const said = node.querySelector(".said");
  if (one.better) node.querySelector(".who").append(el("span", { className: "badge" }, t("chat_better_stored")));
  if (one.growing) grow(said, one.content);
  else if (one.failed && !one.content) said.remove();
  if (one.failed) node.append(copy("acts-failed"));
  if (one.failed) node.querySelector(".failed span").textContent = why(one.failed);
  if (running) return node;
  node.append(copy(`acts-${one.role}`));
  const useless = [
    ...(n < chat.messages.length - 1 ? [".retry"] : []),
    ...(!one.turn || one.better ? [".thumb", ".better"] : []),
    ...(one.failed ? [".again"] : []),
    ...(one.cut ? [] : [".cut"]),
  ];
  for (const name of useless) node.querySelectorAll(`.acts ${name}`).forEach((part) => part.remove());
  for (const button of node.querySelectorAll(".thumb")) button.ariaPressed = String(one.thumb === button.value);
  return node;
}

function sendMessage(text) {
  if (running || !models || !text.trim() || stuck()) return;
  chat.messages.push({ role: "user", content: text });
  chat.former = null;
  put($("talk"), "text", "");
  answer();
}

// Have the last message answered.
async function answer() {
  if (running || !models) return;
  const valid = (id) => ($(id).validity.valid && $(id).value ? Number($(id).value) : null);
  const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  const one = { role: "assistant", content: "", growing: true };
  running = newName();
  const question = {
    name: running,
    model: Number($("model").value),
    messages: [...system, ...chat.messages.map(({ role, content }) => ({ role, content }))],
    temperature: valid("temperature") ?? 1,
    max_tokens: valid("tokens"),
  };
  chat.messages.push(one);
  drawChat();
  $("message").focus({ preventScroll: true });
  follow(true);
  const last = await ask(question, ([text = ""], [end]) => {
    one.content = text;
    one.cut = end === "length";
    grow($("list").lastElementChild.querySelector(".said"), text);
    follow();
    if (Date.now() - saved > 500) saveChat();
  });
  running = null;
  if (last.error === "guidelines") return location.assign("/guidelines");
  Object.assign(one, { growing: false, at: Date.now() }, "turn" in last ? { turn: last.turn } : { failed: last });
  drawChat();
  follow(true);
  say(one.failed ? why(one.failed) : t("chat_answered"));
}

// Keep the end in sight, unless the person has gone up to read.
function follow(always = false) {
  const end = root.scrollHeight - innerHeight;
  if (always || end - scrollY < 160) scrollTo(0, root.scrollHeight);
}

function again(n) {
  if (running || !models) return;
  chat.messages.length = n;
  answer();
}

// What is said of an answer, with the seconds for which the person may have looked at it.
function judged(one, said) {
  const seconds = Math.min((Date.now() - one.at) / 1000, 600);
  return { assignment: one.turn, submission: newName(), seconds, ...said };
}

// Thumbs may change; the former one is withdrawn.
function thumb(one, which) {
  const before = one.thumb;
  const now = (one.thumb = before === which ? null : which);
  judging = judging.then(async () => {
    if (before) await deliver("/api/chat/withdraw", { assignment: one.turn });
    if (!now) return;
    const [status, body] = await deliver("/api/submit", judged(one, { answer: { thumb: now } }));
    if (status === 200) return;
    one.thumb = null;
    drawChat();
    banner(why(body));
  });
}

function edit(n) {
  const one = chat.messages[n];
  drawChat(); // one at a time
  const node = $("list").children[n];
  node.querySelectorAll(".said, .acts").forEach((part) => part.remove());
  node.append(copy(`rewrite-${one.role}`));
  $("edited").value = one.content;
  $("edited").focus();
}

async function rewrite(n) {
  const text = $("edited").value;
  const one = chat.messages[n];
  if (!text.trim()) return $("edited").focus();
  if (one.role === "user") {
    chat.messages.length = n;
    return sendMessage(text);
  }
  const [status, body] = await deliver("/api/chat/better", judged(one, { text }));
  if (status !== 200) return banner(why(body));
  Object.assign(one, { content: text, better: true, cut: false });
  drawChat();
}

function chatting() {
  const acts = {
    thumb: (n, button) => {
      const one = chat.messages[n];
      thumb(one, button.value);
      const both = button.parentElement.querySelectorAll(".thumb"); // drawn here, so that the focus stays
      for (const other of both) other.ariaPressed = String(one.thumb === other.value);
      saveChat();
    },
    edit,
    better: edit,
    again,
    retry: (n) => again(chat.messages[n].role === "user" ? n + 1 : n),
    done: rewrite,
    cancel: drawChat,
  };
  $("list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    const n = [...$("list").children].indexOf(event.target.closest("li"));
    for (const name of button?.classList ?? []) acts[name]?.(n, button);
  });
  $("talk").addEventListener("input", () => {
    viewChat();
    saveChat();
  });
  $("send").onclick = () => sendMessage($("message").value);
  $("stop").onclick = () => stop(running);
  $("new").onclick = () => {
    Object.assign(chat, { messages: [], former: chat.messages });
    drawChat();
  };
  $("former").onclick = () => {
    Object.assign(chat, { messages: chat.former, former: null });
    drawChat();
  };
  addEventListener("keydown", (event) => {
    const mine = chat.messages.findLastIndex((one) => one.role === "user");
    if (event.key === "Escape" && running) stop(running);
    else if (event.key === "Escape" && $("edited")) drawChat();
    else if (event.key === "ArrowUp" && event.target === $("message") && !$("message").value && mine >= 0 && !running) {
      event.preventDefault();
      edit(mine);
    }
  });
  addEventListener("storage", (event) => {
    if (event.key !== `chat/${boot.person}` || running || $("edited")) return;
    readChat(); // another tab has gone on with the conversation
    drawChat();
  });
  readChat();
  drawChat();
  follow(true);
  findModels();
}

const live = [...document.querySelectorAll("[data-live]")];
if (live.length) setTimeout(stayFresh, 5000, live);
document.querySelector("input.link")?.select();
document.querySelector("[data-focus]")?.focus({ preventScroll: true }); // what is to be read first stays in view
if ($("enter")) entrance($("enter"));
if (form) work();
if ($("talk")) chatting();
