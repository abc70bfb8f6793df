// The script of all pages: the head, the entrance, administration, and work.

import { $, CONTROL, el, letter, newName, post, shownText as textShown, speaker } from "./common.js";
import { conversation, talk } from "./chat.js";

// Light or dark ------------------------------------------------------------------------------------------------------

const stored = localStorage.getItem("theme");
if (stored) document.documentElement.dataset.theme = stored;
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", dark ? "light" : "dark");
});

// Entrance: the token is behind the # of the link, which is in no log ---------------------------------------------------

if ($("enter")) {
  const form = $("enter");
  const enter = async (text) => {
    const token = text.trim().replace(/^.*#/, "");
    try {
      const [status, body] = await post("/enter", { token });
      if (status === 200) return location.replace(body.to);
      $("enter-error").textContent = status === 429 ? form.dataset.many : form.dataset.unknown;
    } catch {
      $("enter-error").textContent = form.dataset.offline;
    }
    form.hidden = false;
    $("enter-busy").hidden = true;
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    enter($("token").value);
  });
  const follow = () => {
    const token = location.hash.slice(1);
    if (!token) return;
    history.replaceState(null, "", location.pathname);
    form.hidden = true;
    $("enter-busy").hidden = false;
    enter(token);
  };
  addEventListener("hashchange", follow);
  follow();
}

// Administration: what is live is read again every few seconds ---------------------------------------------------------

if (document.querySelector("[data-live]")) {
  for (const link of document.querySelectorAll("input.link")) link.select();
  setInterval(async () => {
    if (document.hidden || document.activeElement?.closest("[data-live]")) return;
    try {
      const response = await fetch(document.querySelector("[data-live]").dataset.live || "/admin");
      if (!response.ok) return;
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
      const parts = fresh.querySelectorAll("[data-live]");
      document.querySelectorAll("[data-live]").forEach((part, n) => part.replaceChildren(...parts[n].childNodes));
    } catch {
      // the next time
    }
  }, 5000);
}

// Work -----------------------------------------------------------------------------------------------------------------

if ($("boot")) work(JSON.parse($("boot").textContent));
if ($("chat-boot")) talk(JSON.parse($("chat-boot").textContent));

function work(boot) {
  const words = boot.words;
  const t = speaker(words);
  const shownText = (text) => textShown(text, t);
  const IDLE = 120000; // milliseconds without a sign of life, after which time no longer counts

  let task = null; // what the server gave
  let answer = null; // what the person has entered
  let looked = 0; // milliseconds spent on the task
  let sign = Date.now(); // last sign of life
  let busy = false;
  let talking = null; // the conversation, where that is the task
  let timer = 0; // of the next draft, or of the next question for a task
  let selected = null; // chip that a click on a place will put there
  let waiting = false; // nothing was left to do
  const title = document.title;
  const api = boot.api || { task: "/api/task", draft: "/api/draft", submit: "/api/submit", undo: "/api/undo" };
  let wanted = boot.api ? new URLSearchParams(location.search).get("item") : null; // item to decide next
  const tabs = "BroadcastChannel" in window ? new BroadcastChannel("people") : null;

  const key = (what) => `${what}/${boot.person}`;
  const say = (text) => ($("live").textContent = text);

  function banner(text, kind = "") {
    $("banner").textContent = text;
    $("banner").className = `banner ${kind}`;
    $("banner").hidden = !text;
  }

  // Time -----------------------------------------------------------------------------------------------------------

  setInterval(() => {
    if (!document.hidden && Date.now() - sign < IDLE) looked += 250;
  }, 250);
  for (const name of ["pointermove", "pointerdown", "keydown", "scroll", "wheel"])
    addEventListener(name, () => (sign = Date.now()), { passive: true, capture: true });

  addEventListener("visibilitychange", () => {
    if (!document.hidden) document.title = title;
  });

  // Radio buttons in a row ---------------------------------------------------------------------------------------------

  function choices(name, legend, values, chosen, choose, title = (value) => String(value), face = title) {
    const row = el("div", { className: "choices" });
    for (const value of values) {
      const input = el("input", { type: "radio", name, value: String(value), checked: value === chosen });
      input.addEventListener("change", () => choose(value));
      const mark = el("span", { "aria-hidden": "true" }, face(value));
      row.append(el("label", { title: title(value) }, input, mark, el("span", { className: "hidden" }, title(value))));
    }
    return el("fieldset", { className: "scale", data: { name } }, el("legend", {}, legend), row);
  }

  function boxes(names, prefix, chosen, change) {
    const list = el("div", { className: "boxes" });
    for (const name of names) {
      const input = el("input", { type: "checkbox", checked: chosen.includes(name) });
      input.addEventListener("change", () => {
        const found = new Set(chosen);
        input.checked ? found.add(name) : found.delete(name);
        chosen.splice(0, chosen.length, ...names.filter((one) => found.has(one)));
        change();
      });
      list.append(el("label", {}, input, t(`${prefix}_${name}`)));
    }
    return list;
  }

  // The task -----------------------------------------------------------------------------------------------------------

  function empty(count) {
    return {
      ranks: Array(count).fill(null),
      ratings: Array.from({ length: count }, () => ({ flags: [] })),
      strength: null,
      verdict: null,
      thumb: null,
      best: null,
      text: "",
      edited: null,
      prompt_flags: [],
      confidence: null,
      note: "",
      taken: null,
    };
  }

  // The draft as it was saved last, here or on the server.
  function restored(count) {
    const local = JSON.parse(localStorage.getItem(key("draft")) || "null");
    const kept = local && local.assignment === task.id ? local.answer : null;
    const newest = [kept, task.draft].filter(Boolean).sort((a, b) => (b.at || 0) - (a.at || 0))[0];
    const found = Object.assign(empty(count), newest || {});
    if (found.ranks.length !== count || found.ratings.length !== count) return empty(count);
    found.ratings = found.ratings.map((rating) => ({ flags: [], ...rating }));
    return found;
  }

  async function load(focus = !document.querySelector("dialog[open]")) {
    let body;
    try {
      const response = await fetch(wanted ? `${api.task}?item=${encodeURIComponent(wanted)}` : api.task);
      body = await response.json();
      if (!response.ok) {
        clearTimeout(timer);
        timer = setTimeout(load, 5000);
        return refused(response.status, body);
      }
    } catch {
      banner(t("offline"), "warn");
      clearTimeout(timer);
      timer = setTimeout(load, 3000);
      return;
    }
    const { pace } = body;
    $("pace-today").textContent = pace.today;
    $("pace-done").textContent = pace.done;
    $("pace-left").textContent = pace.left;
    $("pace-seconds").textContent = pace.seconds ? `${Math.round(pace.seconds)} s` : "–";
    $("undo").disabled = !pace.done;
    task = body.task;
    wanted = null;
    if (body.gone) banner(t(`error_${body.gone}`), "warn");
    if (boot.api) history.replaceState(null, "", task ? `?item=${task.item}` : location.pathname);
    if (!task) {
      $("ask").textContent = body.aside ? t("aside") : t(boot.nothing || "nothing_left");
      if (body.aside || !waiting) $("task").replaceChildren();
      if (!body.aside && !waiting && !boot.nothing) {
        const dot = el("span", { className: "pulse", "aria-hidden": "true" });
        $("task").append(el("p", { className: "resting" }, dot, t("resting")));
      }
      waiting = true;
      clearTimeout(timer);
      timer = setTimeout(load, 5000);
      return;
    }
    clearTimeout(timer);
    if (waiting) {
      say(t("new_task"));
      if (document.hidden) document.title = `● ${title}`; // until somebody looks
    }
    waiting = false;
    looked = 0;
    selected = null;
    answer = restored(task.responses.length);
    draw();
    scrollTo(0, 0);
    if (focus) focusFirst();
  }

  function refused(status, body) {
    if (body.error === "guidelines") return location.assign("/guidelines");
    if (status === 401) return banner(t("error_no_session"), "warn");
    banner(words[`error_${body.error}`] || body.message || String(status), "warn");
  }

  function draw() {
    const kind = task.task;
    const share = task.orders && Math.round(100 * task.share);
    $("ask").textContent = task.orders ? t("decide_ask", { n: task.orders.length, share }) : t(`task_${kind}`);
    talking?.close();
    talking = null;
    if (kind === "chat") return drawConversation();
    const parts = [drawPrompt()];
    if (task.orders) parts.push(drawOrders());
    const cards = el("section", { className: "cards", "aria-label": t("answers") }, ...task.responses.map(drawCard));
    cards.dataset.count = task.responses.length;
    if (kind === "rank") parts.push(el("div", { className: "bench" }, cards, drawPanel()));
    else if (kind === "compare") parts.push(cards, drawStrength());
    else if (kind === "arena") parts.push(...drawVerdict(cards));
    else if (kind === "thumb") parts.push(cards, drawThumbs());
    else if (kind === "demonstrate") parts.push(...(task.responses.length ? [cards] : []), drawEditor());
    else parts.push(cards);
    parts.push(drawBar());
    $("task").replaceChildren(...parts);
    $("task").dataset.task = kind;
    if (kind === "rank") drawLevels();
    if (kind === "best") drawBest();
    if (kind === "arena") lightBetter();
  }

  function drawConversation() {
    talking = conversation({ task, answer, words, t, choices, changed, banner, reload: load, refused, say, strongest: boot.strongest, looked: () => looked });
    $("task").replaceChildren(talking.node, drawBar());
    $("task").dataset.task = "chat";
    $("submit").textContent = t("chat_finish");
  }

  function drawThumbs() {
    const group = choices("thumb", t("task_thumb"), ["up", "down"], answer.thumb, (value) => {
      answer.thumb = value;
      changed();
    }, (value) => t(`thumb_${value}`));
    group.classList.add("strength");
    return group;
  }

  function drawPrompt() {
    const turns = typeof task.prompt === "string" ? [{ role: "user", content: task.prompt }] : task.prompt;
    const list = el("div", { className: "turns", tabIndex: 0, role: "group", "aria-label": t("prompt") });
    for (const turn of turns)
      list.append(
        el("div", { className: `turn ${turn.role}` }, el("span", { className: "who" }, t(`role_${turn.role}`)), shownText(turn.content)),
      );
    const about = el("details", { className: "about" }, el("summary", {}, t("about_prompt")));
    about.open = answer.prompt_flags.length > 0;
    about.append(boxes(boot.prompt_flags, "pflag", answer.prompt_flags, changed));
    return el("section", { className: "prompt" }, list, about);
  }

  function drawCard(text, n) {
    const name = `${t("answer")} ${letter(n)}`;
    const head = el("header", {}, el("h2", {}, el("span", { className: "letter" }, letter(n)), el("span", { className: "hidden" }, name)));
    const badge = el("span", { className: "badge", id: `badge-${n}` });
    head.append(badge);
    const body = el("div", { className: "body", tabIndex: 0, role: "group", "aria-label": name }, shownText(text));
    const card = el("article", { className: "card", id: `card-${n}` }, head, body);
    if (task.task === "rank" && boot.ratings !== "none") card.append(...drawRatings(n));
    if (task.task === "best") {
      const input = el("input", { type: "radio", name: "best", checked: answer.best === n });
      input.addEventListener("change", () => {
        answer.best = n;
        drawBest();
        changed();
      });
      card.append(el("label", { className: "pick" }, input, t("choose")));
    }
    if (task.task === "demonstrate") {
      const edit = el("button", { type: "button" }, t("edit_this"));
      edit.addEventListener("click", () => startFrom(n));
      card.append(edit);
    }
    return card;
  }

  const scales = () => (boot.ratings === "overall" ? boot.scales.slice(0, 1) : boot.scales);

  function drawRatings(n) {
    const rating = answer.ratings[n];
    const groups = scales().map((scale) =>
      choices(`${scale}-${n}`, t(`scale_${scale}`), [1, 2, 3, 4, 5, 6, 7], rating[scale], (value) => {
        rating[scale] = value;
        changed();
        lock();
      }),
    );
    const flags = el("details", { className: "flags" }, el("summary", {}, t("flags")));
    flags.open = rating.flags.length > 0;
    flags.append(boxes(boot.flags, "flag", rating.flags, changed));
    return [el("div", { className: "ratings" }, ...groups), flags];
  }

  const unrated = () =>
    boot.ratings === "none" ? 0 : answer.ratings.reduce((sum, rating) => sum + scales().filter((scale) => !rating[scale]).length, 0);

  // Places -------------------------------------------------------------------------------------------------------------

  function drawPanel() {
    return el(
      "aside",
      { className: task.responses.length > 6 ? "panel many" : "panel", "aria-label": t(task.orders ? "step_order" : "step_rank") },
      el("h2", {}, t(task.orders ? "step_order" : "step_rank")),
      el("p", { className: "hint", id: "rank-hint" }),
      el("div", { className: "levels", id: "levels" }),
      el("h3", {}, t("tray")),
      el("div", { className: "tray level", id: "tray" }),
    );
  }

  function chip(n) {
    const words = task.responses[n].slice(0, 160).replace(CONTROL, "·").replace(/\s+/g, " ");
    const node = el(
      "button",
      { type: "button", className: "chip", id: `chip-${n}`, "aria-pressed": String(selected === n) },
      el("span", { className: "letter" }, letter(n)),
      el("span", { className: "snippet", dir: "auto" }, words),
    );
    const place = answer.ranks[n];
    const where = place === null ? t("unplaced", { a: letter(n) }) : t("placed", { a: letter(n), n: place + 1 });
    node.append(el("span", { className: "hidden" }, where));
    node.addEventListener("focus", () => light(n));
    node.addEventListener("pointerenter", () => light(n));
    node.addEventListener("pointerdown", (event) => drag(event, n, node));
    node.addEventListener("click", () => {
      if (node.dataset.dragged) return;
      selected = selected === n ? null : n;
      for (const other of document.querySelectorAll(".chip")) other.setAttribute("aria-pressed", String(selected !== null && other === $(`chip-${selected}`)));
    });
    return node;
  }

  function light(n) {
    for (const card of document.querySelectorAll(".card")) card.classList.toggle("lit", card.id === `card-${n}`);
  }

  function drawLevels() {
    const count = task.responses.length;
    const rows = [];
    for (let place = 0; place < count; place++) {
      const row = el("div", { className: "level", data: { place } });
      const word = place === 0 ? t("best") : place === count - 1 ? t("worst") : "";
      row.append(el("span", { className: "number" }, String(place + 1), el("small", {}, word)));
      const holder = el("div", { className: "chips" });
      answer.ranks.forEach((rank, n) => rank === place && holder.append(chip(n)));
      row.append(holder);
      row.addEventListener("click", (event) => event.target.closest(".chip") || chosen(place));
      const gap = el("div", { className: "gap", data: { gap: place } });
      gap.addEventListener("click", () => selected !== null && move(selected, place, true));
      rows.push(gap, row);
    }
    rows.push(el("div", { className: "gap", data: { gap: count } }));
    $("levels").replaceChildren(...rows);
    $("tray").replaceChildren(...answer.ranks.map((rank, n) => (rank === null ? chip(n) : null)).filter(Boolean));
    answer.ranks.forEach((rank, n) => ($(`badge-${n}`).textContent = rank === null ? "" : `#${rank + 1}`));
    lock();
  }

  function chosen(place) {
    if (selected !== null) move(selected, place, false);
  }

  function lock() {
    if (!$("levels")) return;
    const missing = unrated();
    const panel = document.querySelector(".panel");
    panel.classList.toggle("locked", missing > 0);
    for (const node of panel.querySelectorAll(".chip")) node.disabled = missing > 0;
    $("rank-hint").textContent = missing ? t("rank_locked", { n: missing }) : t("rank_hint");
  }

  // Put response n at a place: with those that are there, or (between) before them, with the others moved down.
  function move(n, place, between) {
    const count = task.responses.length;
    answer.ranks[n] = null;
    if (between) {
      const taken = [...new Set(answer.ranks.filter((rank) => rank !== null))].sort((a, b) => a - b);
      if (answer.ranks.includes(place) || place >= count) {
        // Close the gaps, so that there is room for one more.
        const level = taken.filter((rank) => rank < place).length;
        answer.ranks = answer.ranks.map((rank) => (rank === null ? null : taken.indexOf(rank) + (taken.indexOf(rank) >= level ? 1 : 0)));
        place = level;
      }
    }
    answer.ranks[n] = place === null ? null : Math.max(0, Math.min(count - 1, place));
    selected = null;
    drawLevels();
    say(place === null ? t("unplaced", { a: letter(n) }) : t("placed", { a: letter(n), n: answer.ranks[n] + 1 }));
    changed();
  }

  function drag(event, n, node) {
    if (event.button !== 0 || node.disabled) return;
    const start = [event.clientX, event.clientY];
    let target = null;
    let moving = false;
    delete node.dataset.dragged;
    node.setPointerCapture(event.pointerId);
    const over = (next) => {
      if (next === target) return;
      target?.classList.remove("over");
      next?.classList.add("over");
      target = next;
    };
    const onMove = (move) => {
      const [x, y] = [move.clientX - start[0], move.clientY - start[1]];
      if (!moving && Math.hypot(x, y) < 6) return;
      moving = true;
      node.dataset.dragged = "yes";
      node.classList.add("dragged");
      node.style.transform = `translate(${x}px, ${y}px)`;
      const below = document.elementsFromPoint(move.clientX, move.clientY);
      over(below.find((one) => one.matches(".gap")) || below.find((one) => one.matches(".level")) || null);
      const edge = 60; // near the edge of the window, scroll
      if (move.clientY < edge) scrollBy(0, -12);
      else if (move.clientY > innerHeight - edge) scrollBy(0, 12);
    };
    const onEnd = (end) => {
      node.removeEventListener("pointermove", onMove);
      node.removeEventListener("pointerup", onEnd);
      node.removeEventListener("pointercancel", onEnd);
      const dropped = target;
      over(null);
      node.classList.remove("dragged");
      node.style.transform = "";
      if (!moving || end.type === "pointercancel" || !dropped) return;
      if (dropped.id === "tray") move(n, null, false);
      else if (dropped.dataset.gap !== undefined) move(n, Number(dropped.dataset.gap), true);
      else move(n, Number(dropped.dataset.place), false);
      $(`chip-${n}`).focus();
    };
    node.addEventListener("pointermove", onMove);
    node.addEventListener("pointerup", onEnd);
    node.addEventListener("pointercancel", onEnd);
  }

  // The orders of others, of which one may be taken ------------------------------------------------------------------

  function drawOrders() {
    const columns = []; // [heading, the cell of an order]; one that no order fills is left out
    const add = (heading, cell) => task.orders.some(cell) && columns.push([heading, cell]);
    task.responses.forEach((_, place) => add(t("place", { n: place + 1 }), (order) => inPlace(order, place)));
    add(t("by_how_much"), (order) =>
      order.strength === undefined ? null
        : order.strength === 0 ? t("strength_0")
        : t("strength_of", { a: letter(order.strength < 0 ? 0 : 1), how: t(`strength_${Math.abs(order.strength)}`) }),
    );
    add(t("confidence"), (order) => order.confidence && String(order.confidence));
    add(t("note"), (order) => order.note && el("span", { className: "said", dir: "auto" }, order.note.replace(CONTROL, "·")));
    const rows = task.orders.map((order) => {
      const button = el("button", { type: "button", className: "take", "aria-label": t("take_of", { name: order.person }) }, t("take"));
      button.addEventListener("click", () => take(order));
      const cells = columns.map(([, cell]) => el("td", {}, cell(order) || ""));
      return el("tr", {}, el("th", { scope: "row" }, order.person), el("td", {}, button), ...cells);
    });
    const head = el("tr", {}, el("td"), el("td"), ...columns.map(([heading]) => el("th", { scope: "col" }, heading)));
    const table = el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows));
    const scroll = el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": t("their_orders") }, table);
    return el("section", { className: "orders" }, el("h2", {}, t("their_orders")), scroll);
  }

  // The responses that a person put in a place, with the overall ratings.
  function inPlace(order, place) {
    const found = order.ranks.flatMap((rank, n) => (rank === place ? [n] : []));
    if (!found.length) return null;
    const mark = (n) => {
      const rating = order.ratings?.[n]?.overall;
      return el("span", { className: "placed" }, el("span", { className: "letter" }, letter(n)), rating ? el("small", { title: t("scale_overall") }, String(rating)) : null);
    };
    return el("span", { className: "marks" }, ...found.map(mark));
  }

  function take(order) {
    answer.ranks = [...order.ranks];
    answer.strength = order.strength ?? null;
    answer.best = task.task === "best" ? order.ranks.indexOf(0) : null;
    answer.taken = order.label;
    draw();
    changed();
    say(t("taken", { name: order.person }));
    banner(t("taken", { name: order.person }));
    $("submit").focus();
  }

  // The label that is taken, if the answer still is as it says.
  function taken() {
    const order = task.orders?.find((one) => one.label === answer.taken);
    if (!order) return {};
    const same = {
      rank: () => String(answer.ranks) === String(order.ranks),
      compare: () => answer.strength === order.strength,
      best: () => answer.best === order.ranks.indexOf(0),
    };
    return same[task.task]() ? { taken: order.label } : {};
  }

  // Compare, choose, write ---------------------------------------------------------------------------------------------

  function drawStrength() {
    const values = [];
    for (let value = -boot.strongest; value <= boot.strongest; value++) values.push(value);
    const title = (value) =>
      value === 0 ? t("strength_0") : t("strength_of", { a: letter(value < 0 ? 0 : 1), how: t(`strength_${Math.abs(value)}`) });
    const group = choices("strength", t("task_compare"), values, answer.strength, (value) => {
      answer.strength = value;
      changed();
    }, title, (value) => String(value + boot.strongest + 1)); // the digit that chooses it
    group.classList.add("strength");
    for (const [n, label] of [...group.querySelectorAll("label")].entries()) label.append(el("small", { "aria-hidden": "true" }, title(values[n])));
    return group;
  }

  // In the order of their digits, as the strengths are.
  function drawVerdict(cards) {
    const title = (value) => t(`verdict_${value}`);
    const group = choices("verdict", t("task_arena"), boot.verdicts, answer.verdict, (value) => {
      answer.verdict = value;
      lightBetter();
      changed();
    }, title, (value) => String(boot.verdicts.indexOf(value) + 1));
    group.classList.add("strength", "verdict");
    for (const [n, label] of [...group.querySelectorAll("label")].entries()) label.append(el("small", { "aria-hidden": "true" }, title(boot.verdicts[n])));
    if (task.responses[0].trim() !== task.responses[1].trim()) return [cards, group];
    for (const input of [...group.querySelectorAll("input")].slice(0, 2)) input.disabled = true;
    return [cards, el("p", { className: "banner", role: "note" }, t("same_answers")), group];
  }

  function lightBetter() {
    task.responses.forEach((_, n) => $(`card-${n}`).classList.toggle("lit", answer.verdict === boot.verdicts[n]));
  }

  function drawBest() {
    task.responses.forEach((_, n) => {
      $(`card-${n}`).classList.toggle("lit", answer.best === n);
      $(`badge-${n}`).textContent = answer.best === n ? "★" : "";
    });
  }

  function drawEditor() {
    const area = el("textarea", { id: "text", rows: 8, value: answer.text, spellcheck: true, dir: "auto" });
    area.addEventListener("input", () => {
      answer.text = area.value;
      count();
      changed();
    });
    const from = el("span", { className: "muted", id: "from" });
    const fresh = el("button", { type: "button", className: "quiet", id: "fresh" }, t("write_new"));
    fresh.addEventListener("click", () => startFrom(null));
    const box = el(
      "section",
      { className: "editor" },
      el("label", { for: "text" }, t("your_answer")),
      area,
      el("p", { className: "row" }, el("span", { className: "muted", id: "count" }), from, fresh),
    );
    queueMicrotask(count);
    return box;
  }

  function count() {
    $("count").textContent = t("characters", { n: answer.text.length });
    $("from").textContent = answer.edited === null ? "" : t("edited_from", { a: letter(answer.edited) });
    $("fresh").hidden = answer.edited === null;
  }

  function startFrom(n) {
    const before = answer.edited === null ? "" : task.responses[answer.edited];
    if (answer.text.trim() && answer.text !== before && !confirm(t("replace_text"))) return;
    answer.edited = n;
    answer.text = n === null ? "" : task.responses[n];
    $("text").value = answer.text;
    count();
    changed();
    $("text").focus();
  }

  // The bar below ------------------------------------------------------------------------------------------------------

  function drawBar() {
    const confidence = el("select", { id: "confidence" }, el("option", { value: "" }, t("confidence_none")));
    for (let n = 1; n <= 9; n++) confidence.append(el("option", { value: String(n) }, String(n)));
    confidence.value = answer.confidence === null ? "" : String(answer.confidence);
    confidence.addEventListener("change", () => {
      answer.confidence = confidence.value ? Number(confidence.value) : null;
      changed();
    });
    const note = el("input", { id: "note", value: answer.note, maxLength: 5000, autocomplete: "off", dir: "auto" });
    note.addEventListener("input", () => {
      answer.note = note.value;
      changed();
    });
    const skip = el("button", { type: "button", className: "quiet", id: "skip" }, t("skip"));
    skip.addEventListener("click", askSkip);
    const send = el("button", { type: "button", className: "primary", id: "submit" }, t("submit"));
    send.addEventListener("click", () => finish());
    return el(
      "footer",
      { className: "bar" },
      el("label", { for: "confidence" }, t("confidence"), confidence),
      el("label", { for: "note", className: "grow" }, t("note"), note),
      el("span", { className: "muted", id: "draft", role: "status" }),
      skip,
      send,
    );
  }

  function dialog(title, ...children) {
    const box = el("dialog", { "aria-label": title }, el("h2", {}, title), ...children);
    document.body.append(box);
    box.addEventListener("close", () => box.remove());
    box.showModal();
    return box;
  }

  function askSkip() {
    const list = el("div", { className: "reasons" });
    const box = dialog(t("skip_title"), list);
    boot.skips.forEach((reason, n) => {
      const button = el("button", { type: "button" }, `${n + 1} · ${t(`skip_${reason}`)}`);
      button.addEventListener("click", () => {
        box.close();
        send({ skip: reason, ...common() });
      });
      list.append(button);
    });
    const close = el("button", { type: "button", className: "quiet" }, t("close"));
    close.addEventListener("click", () => box.close());
    list.append(close);
    box.addEventListener("keydown", (event) => {
      const n = Number(event.key) - 1;
      if (list.children[n] && n < boot.skips.length) list.children[n].click();
    });
  }

  // Drafts -------------------------------------------------------------------------------------------------------------

  function changed() {
    answer.at = Date.now();
    localStorage.setItem(key("draft"), JSON.stringify({ assignment: task.id, answer }));
    clearTimeout(timer);
    timer = setTimeout(keepDraft, 500);
  }

  async function keepDraft() {
    if (!task || busy) return;
    const number = task.id;
    const status = $("draft");
    try {
      const [code, body] = await post(api.draft, { assignment: number, draft: answer });
      if (code === 200) {
        status.textContent = t("draft_saved");
        if (!$("banner").hidden && $("banner").textContent === t("offline")) banner("");
      } else if (code === 409 && task?.id === number) lost(body);
      else if (code === 401) refused(code, body);
      else status.textContent = t("draft_local");
    } catch {
      status.textContent = t("draft_local");
      clearTimeout(timer);
      timer = setTimeout(keepDraft, 4000);
    }
  }

  // The task is no longer this person's, or no longer open.
  function lost(body, written = ["demonstrate", "chat"].includes(task?.task) ? answer.text : "") {
    banner(words[`error_${body.error}`] || body.message, "warn");
    localStorage.removeItem(key("draft"));
    if (body.error === "taken_back") wanted = task?.item;
    if (written.trim()) {
      const close = el("button", { type: "button", autofocus: true }, t("close"));
      const box = dialog(t("lost_text"), el("textarea", { rows: 8, readOnly: true, value: written, "aria-label": t("your_answer") }), close);
      close.addEventListener("click", () => box.close());
    }
    load();
  }

  // Submission ---------------------------------------------------------------------------------------------------------

  function common() {
    return { prompt_flags: answer.prompt_flags, confidence: answer.confidence, note: answer.note };
  }

  function finish() {
    const missing = (what, node) => {
      banner(t(what), "warn");
      node?.focus();
    };
    switch (task.task) {
      case "rank": {
        if (unrated()) return missing("missing_ratings", firstOpen());
        if (answer.ranks.includes(null)) return missing("missing_places", firstOpen());
        const ratings = boot.ratings === "none" ? null : answer.ratings;
        return send({ ranks: answer.ranks, ratings, ...common(), ...taken() });
      }
      case "compare":
        if (answer.strength === null) return missing("missing_choice", firstOpen());
        return send({ strength: answer.strength, ...common(), ...taken() });
      case "arena":
        if (answer.verdict === null) return missing("missing_choice", firstOpen());
        return send({ verdict: answer.verdict, ...common() });
      case "thumb":
        if (answer.thumb === null) return missing("missing_choice", firstOpen());
        return send({ thumb: answer.thumb, ...common() });
      case "chat":
        if (!talking.enough()) return missing("chat_short", firstOpen());
        return send(common());
      case "best":
        if (answer.best === null) return missing("missing_choice", firstOpen());
        return send({ best: answer.best, ...common(), ...taken() });
      case "demonstrate":
        if (!answer.text.trim()) return missing("missing_text", $("text"));
        return send({ text: answer.text, edited: answer.edited, ...common() });
    }
  }

  function send(content) {
    if (busy) return;
    clearTimeout(timer);
    const pending = { assignment: task.id, submission: newName(), answer: content, seconds: looked / 1000 };
    localStorage.setItem(key("pending"), JSON.stringify(pending));
    deliver(pending, 500);
  }

  // Send until there is an answer: the server stores what has one name once, however often it comes.
  async function deliver(pending, wait) {
    busy = true;
    if ($("submit")) $("submit").disabled = true;
    let code, body;
    try {
      [code, body] = await post(api.submit, pending);
    } catch {
      code = 0;
    }
    if (code === 0 || code === 429 || code >= 500) {
      banner(code === 507 ? t("error_disk") : t("offline"), "warn");
      return setTimeout(() => deliver(pending, Math.min(2 * wait, 15000)), wait);
    }
    busy = false;
    if ($("submit")) $("submit").disabled = false;
    localStorage.removeItem(key("pending"));
    if (code === 200) {
      localStorage.removeItem(key("draft"));
      banner("");
      say(t("submitted"));
      tabs?.postMessage({ person: boot.person, assignment: pending.assignment });
      return load();
    }
    if (body.error === "contradiction") {
      if (!task) await load(false);
      return task?.id === pending.assignment ? contradiction(pending, body.pairs) : undefined;
    }
    if (code === 409) return lost(body, pending.answer.text);
    refused(code, body);
    if (!task) load();
  }

  function contradiction(pending, pairs) {
    const list = el("ul", {}, ...pairs.map(([a, b]) => el("li", {}, t("contradiction_pair", { a: letter(a), b: letter(b) }))));
    const back = el("button", { type: "button", autofocus: true }, t("change"));
    const keep = el("button", { type: "button", className: "primary" }, t("keep"));
    const box = dialog(t("contradiction_title"), list, el("p", {}, t("contradiction_why")), el("p", { className: "row" }, back, keep));
    back.addEventListener("click", () => box.close());
    keep.addEventListener("click", () => {
      box.close();
      send({ ...pending.answer, confirmed: true });
    });
  }

  tabs?.addEventListener("message", ({ data }) => {
    if (data.person !== boot.person || !task || (data.assignment !== task.id && data.assignment !== null) || busy) return;
    if (boot.api) wanted = task.item;
    load(false);
  });

  $("undo").addEventListener("click", undo);

  async function undo() {
    if (busy) return;
    clearTimeout(timer);
    try {
      if (task) await post(api.draft, { assignment: task.id, draft: answer });
      const [code, body] = await post(api.undo, {});
      if (code !== 200) return refused(code, body);
      wanted = body.item ?? null;
      localStorage.removeItem(key("draft"));
      banner(t("undone"));
      tabs?.postMessage({ person: boot.person, assignment: null });
      await load();
    } catch {
      banner(t("offline"), "warn");
    }
  }

  // Keys ---------------------------------------------------------------------------------------------------------------

  // The first thing that is still to be filled in.
  function firstOpen() {
    const kind = task.task;
    if (kind === "rank") {
      for (const group of document.querySelectorAll(".card .scale"))
        if (!group.querySelector("input:checked")) return group.querySelector("input");
      const n = answer.ranks.indexOf(null);
      return n < 0 ? $("submit") : $(`chip-${n}`);
    }
    if (kind === "chat") return talking.firstOpen() || $("submit");
    if (kind === "thumb") return document.querySelector(answer.thumb === null ? ".strength input" : "#submit");
    if (kind === "compare") return document.querySelector(answer.strength === null ? ".strength input" : "#submit");
    if (kind === "arena") return document.querySelector(answer.verdict === null ? ".strength input:enabled" : "#submit");
    if (kind === "best") return document.querySelector(answer.best === null ? ".pick input" : "#submit");
    return $("text");
  }

  function focusFirst() {
    firstOpen()?.focus({ preventScroll: true });
  }

  function rate(group, digit) {
    const input = group.querySelector(`input[value="${digit}"]`);
    if (!input) return;
    input.checked = true;
    input.dispatchEvent(new Event("change"));
    const groups = [...document.querySelectorAll(".card .scale")];
    const next = groups[groups.indexOf(group) + 1];
    const open = next ? next.querySelector("input:checked") || next.querySelector("input") : firstOpen();
    open.focus({ preventScroll: true });
    open.closest(".card")?.scrollIntoView({ block: "nearest" });
  }

  function help() {
    const keys = [
      ["1 – 7", "key_rate"],
      ["1 – 4", "key_verdict"],
      ["1 – 9", "key_place"],
      ["Shift 1 – 9", "key_insert"],
      ["↑ ↓", "key_move"],
      ["A – I", "key_letter"],
      ["Ctrl Enter", "key_submit"],
      ["Enter", "key_send"],
      ["Esc", "key_stop"],
      ["X", "key_expand"],
      ["S", "key_skip"],
      ["U", "key_undo"],
      ["N", "key_note"],
      ["?", "key_help"],
    ];
    if (task?.orders) keys.splice(5, 0, ["T", "key_take"]);
    const list = el("dl", { className: "keys" }, ...keys.flatMap(([name, what]) => [el("dt", {}, el("kbd", {}, name)), el("dd", {}, t(what))]));
    const close = el("button", { type: "button", className: "primary", autofocus: true }, t("close"));
    const box = dialog(t("help"), list, close);
    close.addEventListener("click", () => box.close());
  }
  $("help").addEventListener("click", help);

  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "?" && !document.activeElement?.matches("input:not([type=radio]), textarea")) return help();
    if (!task) return event.key === "u" && !event.ctrlKey && !event.metaKey ? undo() : undefined;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      return talking ? talking.next() : finish();
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const at = document.activeElement;
    if (at?.matches("textarea, select, input:not([type=radio]):not([type=checkbox])")) return;
    const digit = /^(Digit|Numpad)([1-9])$/.exec(event.code)?.[2];
    const done = () => event.preventDefault();
    const focused = at?.id?.startsWith("chip-") ? Number(at.id.slice(5)) : null;
    if (digit && focused !== null && Number(digit) <= task.responses.length) {
      done();
      move(focused, Number(digit) - 1, event.shiftKey);
      const next = answer.ranks.indexOf(null);
      return $(next < 0 ? "submit" : `chip-${next}`).focus({ preventScroll: true });
    }
    if (focused !== null && ["ArrowUp", "ArrowDown"].includes(event.key)) {
      done();
      const place = answer.ranks[focused];
      const step = event.key === "ArrowUp" ? -1 : 1;
      const last = task.responses.length - 1;
      if (place === null && step < 0) move(focused, last, false);
      else if (place !== null && place + step <= last && place + step >= 0) move(focused, place + step, false);
      return $(`chip-${focused}`).focus({ preventScroll: true });
    }
    if (digit && !event.shiftKey) {
      if (["compare", "arena", "thumb", "chat"].includes(task.task)) {
        const input = document.querySelectorAll(".strength input")[Number(digit) - 1];
        if (!input || input.disabled) return;
        done();
        input.click();
        return ($("choose") || $("submit")).focus({ preventScroll: true });
      }
      if (task.task === "best") {
        const input = document.querySelectorAll(".pick input")[Number(digit) - 1];
        if (!input) return;
        done();
        input.click();
        return $("submit").focus({ preventScroll: true });
      }
      if (task.task === "rank") {
        const group = at?.closest?.(".card .scale");
        if (group) {
          done();
          return rate(group, digit);
        }
      }
    }
    const name = event.key.toLowerCase();
    const n = name.length === 1 ? name.charCodeAt(0) - 97 : -1;
    if (n >= 0 && n < Math.min(9, task.responses.length)) {
      done();
      if (task.task === "rank" && !unrated()) return $(`chip-${n}`).focus({ preventScroll: true });
      const first = $(`card-${n}`).querySelector(".scale input:checked, .scale input, .pick input") || $(`card-${n}`).querySelector(".body, button");
      first.focus();
      return $(`card-${n}`).scrollIntoView({ block: "nearest" });
    }
    const acts = { x: expand, s: askSkip, u: undo, n: () => $("note").focus() };
    if (task.orders) acts.t = () => document.querySelector(".take").focus();
    if (acts[name]) {
      done();
      acts[name]();
    }
  });

  function expand() {
    $("task").classList.toggle("expanded");
  }

  // Start: what was not yet acknowledged when the page was closed is sent first ------------------------------------------

  const pending = JSON.parse(localStorage.getItem(key("pending")) || "null");
  if (pending) deliver(pending, 500);
  else load();
}
