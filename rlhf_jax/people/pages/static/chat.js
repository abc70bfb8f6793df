// Talking to models: the page on which anybody does, and the conversations of the task "chat".

import { $, csrf, el, letter, newName, post, shownText, speaker } from "./common.js";

// Ask for answers, and tell `on` of each as it comes: (place, text so far, whether it is whole). Returns what the server
// says at the end: {turn}, by which the answers are judged, or {error, message}.
async function ask(body, on) {
  const texts = [];
  let last = { error: "chat_cut" };
  try {
    const response = await fetch("/api/chat/answer", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF": csrf },
      body: JSON.stringify(body),
    });
    if (!response.ok) return await response.json();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return last;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const event = JSON.parse(line);
        if ("text" in event) texts[event.n] = (texts[event.n] || "") + event.text;
        if ("n" in event) on(event.n, texts[event.n] || "", event.end || "");
        else last = event;
      }
    }
  } catch {
    return last;
  }
}

const stop = (name) => post("/api/chat/stop", { name }).catch(() => {});

// Send until there is an answer: what has one name is stored once. `waiting` is told whether that takes time.
async function deliver(path, body, waiting) {
  for (let wait = 500; ; ) {
    try {
      const [status, found] = await post(path, body);
      if (status !== 429 && status < 500) {
        if (wait > 500) waiting(false);
        return [status, found];
      }
    } catch {
      // again
    }
    waiting(true);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, 15000);
  }
}

// A box whose text grows; it is drawn once a frame, however often it changes.
function growing(t) {
  const box = el("div", { className: "growing", "aria-busy": "true" }, el("span", { className: "thinking" }, t("chat_thinking")));
  let text = "";
  let due = false;
  const draw = () => {
    due = false;
    if (text) box.replaceChildren(shownText(text, t));
  };
  return {
    box,
    set(next) {
      text = next;
      if (!due) requestAnimationFrame(draw);
      due = true;
    },
    end() {
      box.removeAttribute("aria-busy");
      draw();
    },
  };
}

const SVG = "http://www.w3.org/2000/svg";

function icon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

const THUMB = "M7 11v9H4v-9zM7 11l4-8c1.7 0 2.6 1.2 2.3 2.8L12.7 9H18c1.5 0 2.4 1.2 2.1 2.6l-1.4 6.6c-.2 1-1.1 1.8-2.2 1.8H7";

// A place to write in that is as high as what is written.
function writer(id, label, value, more = {}) {
  const area = el("textarea", { id, rows: 1, value, dir: "auto", spellcheck: true, "aria-label": label, ...more });
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
  };
  area.addEventListener("input", fit);
  queueMicrotask(fit);
  return area;
}

// Enter sends, unless it ends the choice of a character or begins a line.
function sends(area, send) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    if (event.ctrlKey && !area.value.trim()) return; // it ends the task
    event.preventDefault();
    event.stopPropagation();
    send();
  });
}

function button(text, act, props = {}) {
  const node = el("button", { type: "button", ...props }, text);
  node.addEventListener("click", act);
  return node;
}

const why = (words, failed) => (words[`error_${failed.error}`] || failed.message || failed.error) + (failed.message && words[`error_${failed.error}`] ? ` (${failed.message})` : "");

// The page that talks to one model ---------------------------------------------------------------------------------------

export function talk(boot) {
  const words = boot.words;
  const t = speaker(words);
  const kept = `chat/${boot.person}`;
  const empty = { messages: [], model: 0, system: "", temperature: "1", tokens: "", text: "", former: null };
  let state = empty;
  let names = null; // of the models; null for one whose name is not told
  let running = null; // the name of the question that is being answered
  let editing = null; // {n, better}: the message that is being changed
  let saved = 0;

  function read() {
    try {
      state = { ...empty, ...JSON.parse(localStorage.getItem(kept) || "{}") };
    } catch {
      // what is kept there is of no use
    }
  }
  read();
  for (const message of state.messages) {
    delete message.busy;
    if (message.growing) Object.assign(message, { growing: false, failed: { error: "chat_cut" } });
  }

  function save() {
    saved = Date.now();
    try {
      localStorage.setItem(kept, JSON.stringify(state));
    } catch {
      // it is full: this conversation lasts as long as the page
    }
  }

  const banner = (text, ...more) => {
    $("banner").replaceChildren(text, ...more);
    $("banner").hidden = !text;
  };

  const waiting = (long) => banner(long ? t("offline") : "");

  async function findModels() {
    try {
      const response = await fetch("/api/chat/models");
      const body = await response.json();
      if (response.ok) {
        names = body.models;
        banner("");
        return draw();
      }
      if (body.error === "guidelines") return location.assign("/guidelines");
      banner(["chat_away", "chat_slow"].includes(body.error) ? t("chat_waiting") : why(words, body));
      if (response.status < 500) return;
    } catch {
      banner(t("chat_waiting"));
    }
    setTimeout(findModels, 3000);
  }

  const last = () => state.messages.at(-1);
  const stuck = () => last()?.role === "user" || (last()?.failed && !last().content);

  function send(text) {
    if (running || !names || !text.trim() || stuck()) return;
    state.messages.push({ role: "user", content: text });
    state.text = "";
    state.former = null;
    answer();
  }

  // Have the last message answered.
  async function answer() {
    if (running) return;
    const name = newName();
    const said = state.messages.map(({ role, content }) => ({ role, content }));
    const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
    const message = { role: "assistant", content: "", growing: true };
    running = name;
    editing = null;
    state.messages.push(message);
    draw();
    const last = await ask(
      {
        name,
        model: Math.min(state.model, names.length - 1),
        messages: [...system, ...said],
        temperature: Number(state.temperature),
        max_tokens: state.tokens ? Number(state.tokens) : null,
      },
      (_, text, end) => {
        message.content = text;
        if (end === "length") message.cut = true;
        live?.set(text);
        follow();
        if (Date.now() - saved > 500) save();
      },
    );
    message.growing = false;
    message.at = Date.now();
    if ("turn" in last) message.turn = last.turn;
    else message.failed = last;
    running = null;
    if (last.error === "guidelines") return location.assign("/guidelines");
    draw();
    $("live").textContent = message.failed ? why(words, message.failed) : t("chat_answered");
  }

  function again(n) {
    if (running || !names) return;
    state.messages.length = n;
    answer();
  }

  // Seconds for which the person may have looked at an answer.
  const since = (message) => Math.min((Date.now() - message.at) / 1000, 600);

  // Thumbs may change; the former one is withdrawn.
  async function thumb(message, which) {
    if (message.busy) return;
    const before = message.thumb;
    message.busy = true;
    message.thumb = before === which ? null : which;
    draw();
    if (before) await deliver("/api/chat/withdraw", { assignment: message.turn }, waiting);
    if (message.thumb) {
      const label = { assignment: message.turn, submission: newName(), answer: { thumb: message.thumb }, seconds: since(message) };
      const [status, body] = await deliver("/api/submit", label, waiting);
      if (status !== 200) {
        message.thumb = null;
        banner(why(words, body));
      }
    }
    delete message.busy;
    draw();
  }

  async function better(message, text) {
    const body = { assignment: message.turn, text, submission: newName(), seconds: since(message) };
    const [status, found] = await deliver("/api/chat/better", body, waiting);
    if (status !== 200) return banner(why(words, found));
    Object.assign(message, { content: text, better: true, cut: false });
    editing = null;
    draw(".composer textarea");
  }

  // Drawing ------------------------------------------------------------------------------------------------------------

  let live = null; // the box of the answer that is being written

  function drawMessage(message, n) {
    const own = message.role === "user";
    const item = el("li", { className: `message ${message.role}` });
    item.append(el("h2", { className: "who" }, own ? t("chat_you") : t("role_assistant"), message.better ? el("span", { className: "badge" }, t("chat_better_stored")) : null));
    if (editing?.n === n) {
      item.append(drawEditor(message, n, own));
      return item;
    }
    const body = el("div", { className: "said" });
    if (message.growing) {
      live = growing(t);
      if (message.content) live.set(message.content);
      body.append(live.box);
    } else if (message.content || !message.failed) body.append(shownText(message.content, t));
    item.append(body);
    if (message.failed) {
      const retry = button(t("chat_retry"), () => again(n), { className: "retry" });
      item.append(el("p", { className: "banner warn failed" }, why(words, message.failed), " ", retry));
    }
    if (!running) item.append(own ? drawOwnActs(n) : drawActs(message, n));
    return item;
  }

  function drawOwnActs(n) {
    const acts = el("div", { className: "acts" }, button(t("chat_edit"), () => edit(n), { className: "quiet edit" }));
    if (n === state.messages.length - 1) acts.append(button(t("chat_retry"), () => again(n + 1), { className: "retry" }));
    return acts;
  }

  function drawActs(message, n) {
    const acts = el("div", { className: "acts" });
    if (message.turn && !message.better) {
      for (const which of ["up", "down"]) {
        const node = button("", () => thumb(message, which), {
          className: `quiet thumb ${which}`,
          title: t(`thumb_${which}`),
          "aria-label": t(`thumb_${which}`),
          "aria-pressed": String(message.thumb === which),
        });
        node.append(icon(THUMB));
        acts.append(node);
      }
      acts.append(button(t("chat_better"), () => edit(n), { className: "quiet better" }));
    }
    if (!message.failed) acts.append(button(t("chat_again"), () => again(n), { className: "quiet again" }));
    if (message.cut) acts.append(el("span", { className: "muted" }, t("chat_cut_short")));
    return acts;
  }

  function edit(n) {
    editing = { n };
    draw(".message textarea");
  }

  function drawEditor(message, n, own) {
    const area = writer("edited", own ? t("chat_message") : t("chat_better_label"), message.content);
    const cancel = () => {
      editing = null;
      draw(".composer textarea");
    };
    const done = () => {
      if (!area.value.trim()) return area.focus();
      if (!own) return better(message, area.value);
      state.messages.length = n;
      editing = null;
      send(area.value);
    };
    area.addEventListener("keydown", (event) => event.key === "Escape" && cancel());
    if (own) sends(area, done);
    else
      area.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
      });
    const row = el("div", { className: "row" }, button(t(own ? "chat_edit_send" : "chat_better_store"), done, { className: "primary done" }), button(t("chat_cancel"), cancel));
    return el("div", { className: "rewrite" }, own ? null : el("p", { className: "muted" }, t("chat_better_label")), area, row);
  }

  function drawSettings() {
    const model = el("select", { id: "model" });
    (names || []).forEach((name, n) => model.append(el("option", { value: String(n) }, name ?? t("chat_model_n", { n: n + 1 }))));
    model.value = String(Math.min(state.model, (names || []).length - 1));
    model.disabled = !names;
    model.addEventListener("change", () => set("model", Number(model.value)));
    const system = el("textarea", { id: "system", rows: 2, value: state.system, dir: "auto" });
    const temperature = el("input", { id: "temperature", type: "range", min: "0", max: "2", step: "0.1", value: state.temperature });
    const shown = el("output", { htmlFor: "temperature" }, state.temperature);
    const tokens = el("input", { id: "tokens", type: "number", min: "1", max: "100000", step: "1", value: state.tokens, placeholder: t("chat_tokens_hint") });
    const set = (name, value) => {
      state[name] = value;
      save();
    };
    system.addEventListener("input", () => set("system", system.value));
    temperature.addEventListener("input", () => {
      shown.textContent = temperature.value;
      set("temperature", temperature.value);
    });
    tokens.addEventListener("input", () => set("tokens", tokens.validity.valid ? tokens.value : ""));
    const details = el(
      "details",
      {},
      el("summary", {}, t("chat_settings")),
      el(
        "div",
        { className: "knobs" },
        el("label", { for: "system" }, t("chat_system")),
        el("div", {}, system, el("p", { className: "muted" }, t("chat_system_hint"))),
        el("label", { for: "temperature" }, t("chat_temperature")),
        el("div", { className: "row" }, temperature, shown),
        el("label", { for: "tokens" }, t("chat_tokens")),
        tokens,
      ),
    );
    details.open = open;
    details.addEventListener("toggle", () => (open = details.open));
    const fresh = button(t("chat_new"), renew, { id: "new", className: "quiet" });
    fresh.hidden = !state.messages.length || Boolean(running);
    return el("section", { className: "sheet settings" }, el("div", { className: "row" }, el("label", { for: "model" }, t("chat_model")), model, fresh), details);
  }
  let open = false;

  function renew() {
    state.former = state.messages;
    state.messages = [];
    editing = null;
    draw(".composer textarea");
  }

  function restore() {
    state.messages = state.former;
    state.former = null;
    draw(".composer textarea");
  }

  function drawComposer() {
    const area = writer("message", t("chat_message"), state.text, { placeholder: t("chat_placeholder"), maxLength: 100000 });
    const able = () => (act.disabled = !running && (!names || !area.value.trim() || stuck()));
    area.addEventListener("input", () => {
      state.text = area.value;
      save();
      able();
    });
    sends(area, () => send(area.value));
    area.addEventListener("keydown", (event) => {
      const mine = state.messages.findLastIndex((message) => message.role === "user");
      if (event.key === "ArrowUp" && !area.value && mine >= 0 && !running) {
        event.preventDefault();
        edit(mine);
      }
    });
    const act = running
      ? button(t("chat_stop"), () => stop(running), { id: "stop" })
      : button(t("chat_send"), () => send(area.value), { id: "send", className: "primary" });
    able();
    return el("div", { className: "composer" }, area, act);
  }

  function draw(focus = null) {
    const area = document.activeElement;
    const at = area?.id && !focus ? `#${area.id}` : focus;
    const pressed = area?.classList?.contains("thumb") ? [...document.querySelectorAll("button.thumb")].indexOf(area) : -1;
    live = null;
    const list = el("ol", { className: "talk", "aria-label": t("prompt") }, ...state.messages.map(drawMessage));
    const nothing = el("div", { className: "nothing" }, el("p", { className: "muted" }, t("chat_about")));
    if (state.former && !state.messages.length) nothing.append(button(t("chat_former"), restore, { id: "former" }));
    $("talk").replaceChildren(drawSettings(), state.messages.length ? list : nothing, drawComposer());
    save();
    if (pressed >= 0) document.querySelectorAll("button.thumb")[pressed]?.focus({ preventScroll: true });
    else (document.querySelector(at || "#message") || $("message")).focus({ preventScroll: !focus });
    if (!focus && pressed < 0) follow(true);
  }

  // Keep the end in sight, unless the person has gone up to read.
  function follow(always = false) {
    const end = document.documentElement.scrollHeight - innerHeight;
    if (always || end - scrollY < 160) scrollTo(0, document.documentElement.scrollHeight);
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop(running);
  });

  // Another tab has gone on with the conversation.
  addEventListener("storage", (event) => {
    if (event.key !== kept || running || editing) return;
    read();
    draw();
  });

  draw();
  findModels();
}

// The task: two answers a turn, and the chosen one continues the conversation ---------------------------------------------

export function conversation({ task, answer, words, t, choices, changed, banner, reload, refused, say, strongest, looked }) {
  const node = el("div", { className: "conversation" });
  let found = null; // as the server has it
  let running = null; // the name of the question that is being answered
  let strength = null;
  let since = 0; // milliseconds on the task when the answers were whole
  let closed = false;

  const done = () => found.turns.filter((turn) => turn.strength !== null);
  const pending = () => found.turns.find((turn) => turn.strength === null);
  const chosen = (turn) => turn.responses[Number(turn.strength > 0)];

  async function load() {
    try {
      const response = await fetch(`/api/chat/conversation?assignment=${task.id}`);
      const body = await response.json();
      if (closed) return;
      if (!response.ok) return refused(response.status, body.error === "missing" ? { error: "chat_away" } : body);
      found = body;
      strength = null;
      since = looked();
      draw();
    } catch {
      setTimeout(() => closed || load(), 3000);
    }
  }

  function bubble(role, text) {
    const who = { user: "chat_you", assistant: "role_assistant", system: "role_system" }[role];
    return el("li", { className: `message ${role}` }, el("h2", { className: "who" }, t(who)), el("div", { className: "said" }, shownText(text, t)));
  }

  function card(n, body) {
    const name = `${t("answer")} ${letter(n)}`;
    const head = el("header", {}, el("h2", {}, el("span", { className: "letter" }, letter(n)), el("span", { className: "hidden" }, name)));
    return el("article", { className: "card", id: `card-${n}` }, head, el("div", { className: "body", tabIndex: 0, role: "group", "aria-label": name }, body));
  }

  function draw(message = null, cards = null, end = null) {
    const talk = el("ol", { className: "talk", "aria-label": t("prompt") });
    if (Array.isArray(found.opening)) for (const one of found.opening) talk.append(bubble(one.role, one.content));
    for (const turn of done()) talk.append(bubble("user", turn.message), bubble("assistant", chosen(turn)));
    const turn = pending();
    const asked = message ?? turn?.message;
    if (asked !== undefined) talk.append(bubble("user", asked));
    const parts = [];
    if (typeof found.opening === "string" && found.opening)
      parts.push(el("p", { className: "sheet topic" }, el("strong", {}, t("chat_topic")), " ", shownText(found.opening, t)));
    if (talk.childElementCount) parts.push(talk);
    if (cards) parts.push(pair(cards), end);
    else if (turn) parts.push(pair(turn.responses.map((text) => shownText(text, t))), drawChoice(turn));
    else parts.push(drawComposer());
    const n = done().length;
    const where = n >= found.least ? t("chat_enough") : t("chat_turn_of", { n: n + 1, least: found.least });
    parts.push(el("p", { className: "muted progress", role: "status" }, where));
    node.replaceChildren(...parts);
    if ($("submit")) $("submit").className = enough() && !turn && !cards ? "" : "quiet";
    (firstOpen() || node).focus?.({ preventScroll: true });
    node.lastElementChild.scrollIntoView({ block: "end" });
    const read = node.querySelector(".cards"); // from its beginning, if not all of it can be seen
    const above = (read?.getBoundingClientRect().top ?? Infinity) - document.querySelector(".top").offsetHeight - 8;
    if (above < 0) scrollBy(0, above);
  }

  function pair(bodies) {
    const cards = el("section", { className: "cards", "aria-label": t("answers") }, ...bodies.map((body, n) => card(n, body)));
    cards.dataset.count = 2;
    return cards;
  }

  function drawComposer() {
    const area = writer("text", t("chat_message"), answer.text, { placeholder: t("chat_placeholder"), maxLength: 100000 });
    const act = button(t("chat_send"), () => send(area.value), { id: "send", className: "primary" });
    act.disabled = !answer.text.trim();
    area.addEventListener("input", () => {
      answer.text = area.value;
      act.disabled = !area.value.trim();
      changed();
    });
    sends(area, () => send(area.value));
    return el("div", { className: "composer" }, area, act);
  }

  async function send(message) {
    if (running || !message.trim()) return;
    running = newName();
    banner("");
    const lives = [growing(t), growing(t)];
    const halt = button(t("chat_stop"), () => stop(running), { id: "stop" });
    draw(message, lives.map((live) => live.box), el("div", { className: "row choosing" }, halt));
    const last = await ask({ name: running, assignment: task.id, message }, (n, text, end) => {
      lives[n].set(text);
      if (end) lives[n].end();
    });
    running = null;
    if (closed) return;
    if ("turn" in last) {
      answer.text = "";
      changed();
      say(t("chat_answered"));
      return load();
    }
    if (["expired", "answered", "foreign", "guidelines", "no_session"].includes(last.error)) {
      refused(409, last);
      return last.error === "no_session" ? undefined : reload();
    }
    answer.text = message;
    changed();
    if (last.error === "moved") return load();
    for (const live of lives) live.end();
    const retry = button(t("chat_retry"), () => send(message), { id: "retry", className: "primary" });
    const change = button(t("chat_edit"), () => draw(), { id: "change" });
    const failed = el("p", { className: "banner warn failed", role: "alert" }, why(words, last), " ");
    draw(message, lives.map((live) => live.box), el("div", {}, failed, el("div", { className: "row" }, retry, change)));
  }

  function drawChoice(turn) {
    const values = [];
    for (let value = -strongest; value <= strongest; value++) if (value) values.push(value);
    const title = (value) => t("strength_of", { a: letter(Number(value > 0)), how: t(`strength_${Math.abs(value)}`) });
    const group = choices("strength", t("chat_which"), values, strength, (value) => {
      strength = value;
      mark();
    }, title, (value) => String(values.indexOf(value) + 1)); // the digit that chooses it
    group.classList.add("strength");
    for (const [n, label] of [...group.querySelectorAll("label")].entries()) label.append(el("small", { "aria-hidden": "true" }, title(values[n])));
    const choose = button(t("chat_go_on_none"), () => compare(turn), { id: "choose", className: "primary", disabled: true });
    const others = button(t("chat_other_pair"), () => send(turn.message), { id: "others", className: "quiet" });
    const mark = () => {
      choose.disabled = strength === null;
      choose.textContent = strength === null ? t("chat_go_on_none") : t("chat_go_on", { a: letter(Number(strength > 0)) });
      [0, 1].forEach((n) => $(`card-${n}`)?.classList.toggle("lit", strength !== null && n === Number(strength > 0)));
    };
    return el("div", {}, el("p", { className: "ask which" }, t("chat_which")), group, el("div", { className: "row choosing" }, choose, others));
  }

  async function compare(turn) {
    if (running || strength === null) return;
    running = newName();
    $("choose").disabled = $("others").disabled = true;
    const seconds = Math.max(0, looked() - since) / 1000;
    const label = { assignment: turn.id, submission: running, answer: { strength }, seconds };
    const [status, body] = await deliver("/api/submit", label, (long) => (long ? banner(t("offline"), "warn") : banner("")));
    running = null;
    if (closed) return;
    if (status !== 200) refused(status, body);
    reload();
  }

  const enough = () => Boolean(found) && done().length >= found.least;

  function firstOpen() {
    if (!found) return null;
    if ($("choose")?.disabled === false) return $("choose");
    const open = node.querySelector(".strength input, #text");
    return $("retry") || open || node.querySelector(".card .body"); // not what stops: Enter may come twice
  }

  // What Ctrl+Enter does: the next step.
  function next() {
    if ($("choose")) return $("choose").disabled ? firstOpen()?.focus() : $("choose").click();
    if ($("text")?.value.trim()) return send($("text").value);
    $("submit").click();
  }

  const onKey = (event) => event.key === "Escape" && running && $("stop")?.click();
  document.addEventListener("keydown", onKey);
  load();
  return {
    node,
    enough,
    firstOpen,
    next,
    close() {
      closed = true;
      document.removeEventListener("keydown", onKey);
    },
  };
}
