// What the scripts of all pages share. What models and people wrote is put on the page as text, never as HTML.

export const $ = (id) => document.getElementById(id);
export const csrf = document.querySelector('meta[name="csrf"]').content;
export const letter = (n) => String.fromCharCode(65 + n);

// An element with properties, attributes (those with a dash, and role), and children: nodes or text.
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else if (name === "data") Object.assign(node.dataset, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export async function post(path, body) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF": csrf },
    body: JSON.stringify(body),
  });
  return [response.status, await response.json().catch(() => ({}))];
}

// The words of a language by name, with {values} filled in.
export const speaker = (words) => (name, values = {}) => words[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);

export function newName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Text of a model: control characters that would reorder or hide it are shown by their number ---------------------------

const SHOWN = 20000; // characters of a text that are shown at first
export const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

export function shownText(text, t) {
  const box = el("div", { className: "text", dir: "auto" });
  const fill = (part) => {
    let from = 0;
    for (const match of part.matchAll(CONTROL)) {
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      if (code === "000D" && part[match.index + 1] === "\n") continue;
      box.append(part.slice(from, match.index));
      box.append(el("span", { className: "control", title: t("control") }, `U+${code}`));
      from = match.index + 1;
    }
    box.append(part.slice(from));
  };
  if (!text) box.append(el("span", { className: "muted" }, t("empty_answer")));
  fill(text.slice(0, SHOWN));
  if (text.length > SHOWN) {
    const more = el("button", { type: "button", className: "more" }, t("show_all", { n: text.length }));
    more.addEventListener("click", () => {
      more.remove();
      fill(text.slice(SHOWN));
    });
    box.append(more);
  }
  return box;
}
