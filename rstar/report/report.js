"use strict";
// Text of models reaches the page through textContent alone. Children of a step are drawn when it is opened.
const CHUNK = 100; // children drawn at once
const read = (id) => JSON.parse(document.getElementById(id).textContent);

function el(tag, options, ...children) {
  const { text, ...attributes } = options;
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== false && value != null) made.setAttribute(name, value);
  if (text != null) made.textContent = text;
  made.append(...children.filter((child) => child != null));
  return made;
}

const signed = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(2);
const WORDS = new Set(("and as assert break class continue def del elif else except False finally for from global if import in is " +
  "lambda None not or pass raise return True try while with yield print").split(" "));
const TOKEN = /(#[^\n]*)|("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|\b(\d+(?:\.\d+)?)\b|\b([A-Za-z_]\w*)\b/g;

function highlighted(code) {
  const pre = el("pre", {});
  let end = 0;
  for (const found of code.matchAll(TOKEN)) {
    const kind = found[1] ? "remark" : found[2] ? "string" : found[3] ? "number" : WORDS.has(found[4]) ? "word" : null;
    if (!kind) continue;
    pre.append(code.slice(end, found.index), el("span", { class: kind, text: found[0] }));
    end = found.index + found[0].length;
  }
  pre.append(code.slice(end));
  return pre;
}

class TreeView {
  constructor(entry, tree, into) {
    this.tree = tree;
    this.best = new Set(tree.best);
    this.items = new Map(); // node id -> its list item, where drawn
    this.children = tree.nodes.map(() => []);
    tree.nodes.forEach((node, id) => { if (node.p != null) this.children[node.p].push(id); });
    const failed = (id) => ["code_error", "malformed"].includes(tree.nodes[id].x);
    for (const list of this.children) list.sort((a, b) => failed(a) - failed(b) || (tree.nodes[b].n || 0) - (tree.nodes[a].n || 0) || a - b);
    this.pairs = new Map();
    for (const [chosen, rejected] of tree.pairs) {
      this.pairsOf(chosen).over.push(rejected);
      this.pairsOf(rejected).under.push(chosen);
    }
    this.list = el("ul", { class: "nodes", "aria-label": "search tree" });
    into.replaceChildren(...this.about(entry), this.list);
    this.fill(this.list, 0);
    this.openBest();
  }

  pairsOf(id) {
    if (!this.pairs.has(id)) this.pairs.set(id, { over: [], under: [] });
    return this.pairs.get(id);
  }

  about(entry) {
    const { tree } = this;
    const facts = [`round ${entry.round}`, entry.level && `level ${entry.level}`, `${tree.rollouts} rollouts`, `${entry.nodes.toLocaleString("en")} steps`,
      `${tree.tokens.toLocaleString("en")} tokens`, `${tree.seconds} s`, !entry.complete && "unfinished"].filter(Boolean);
    const given = tree.common && `, most given: ${tree.common[0]} (${tree.common[1]} of ${tree.common[2]})`;
    const tools = el("div", { class: "tools" });
    for (const [text, act] of [["Best path", () => this.openBest()], ["Open all", () => this.openAll()], ["Close all", () => this.closeAll()]]) {
      const button = el("button", { type: "button", text });
      button.addEventListener("click", act);
      tools.append(button);
    }
    return [
      el("h3", {}, el("span", { class: entry.solved ? "good" : "bad", text: entry.solved ? "✓ solved " : "✗ not solved " }), entry.id),
      el("div", { class: "note", text: facts.join(" · ") }),
      el("div", { class: "question", text: tree.question }),
      el("div", {}, "Reference answer: ", el("b", { text: tree.answer }), given || ""),
      tools,
    ];
  }

  fill(list, parent, from = 0) {
    const ids = this.children[parent];
    list.append(...ids.slice(from, from + CHUNK).map((id) => this.item(id)));
    if (ids.length <= from + CHUNK) return;
    const more = el("button", { type: "button", class: "link", text: `${ids.length - from - CHUNK} more` });
    const last = el("li", {}, more);
    more.addEventListener("click", () => { last.remove(); this.fill(list, parent, from + CHUNK); });
    list.append(last);
  }

  item(id) {
    const node = this.tree.nodes[id];
    const first = ((node.t || "").split("\n").find((line) => line.trim()) || "(empty)").trim();
    const head = el("button", { type: "button", class: "head", "aria-expanded": "false" },
      el("span", { class: "fold", text: "▸", "aria-hidden": "true" }), el("span", { class: "id", text: `${this.best.has(id) ? "★" : ""}#${id}` }),
      el("span", { class: "first", text: first }), this.figures(node, id));
    const failed = node.x === "code_error" || node.x === "malformed";
    const item = el("li", { class: [this.best.has(id) && "best", failed && "failed"].filter(Boolean).join(" ") || null }, head);
    head.addEventListener("click", () => this.toggle(id));
    this.items.set(id, item);
    return item;
  }

  figures(node, id) {
    const figures = el("span", { class: "figures-of" });
    const add = (name, text, kind) => figures.append(el("span", { class: kind || null }, name ? `${name} ` : "", el("b", { text })));
    const count = this.children[id].length;
    add("N", node.n || 0);
    if (node.q != null) {
      add("Q", signed(node.q));
      const bar = el("i", { class: node.q < 0 ? "minus" : null });
      bar.style.left = `${50 + Math.min(0, node.q) * 50}%`;
      bar.style.width = `${Math.abs(node.q) * 50}%`;
      figures.lastChild.append(el("span", { class: "q", "aria-hidden": "true" }, bar));
    }
    if (node.v != null) add("PPM", signed(node.v));
    if (node.x === "answer") {
      const kind = node.r == null ? null : node.r > 0 ? "good" : "bad";
      add("", `${node.r == null ? "answer" : node.r > 0 ? "✓ correct (+1):" : "✗ wrong (−1):"} ${node.a}`, kind);
    } else if (node.x) add("", node.r == null ? node.x : `${node.x} (${node.r > 0 ? "+" : "−"}${Math.abs(node.r)})`, "bad");
    if (node.m) add("", `×${node.m}`);
    if (count) add("", `${count} ▾`);
    return figures;
  }

  body(id) {
    const node = this.tree.nodes[id];
    const body = el("div", { class: "body" });
    if (node.t) body.append(node.c ? highlighted(node.t) : el("pre", { text: node.t }));
    if (node.o) body.append(el("pre", { class: "out", text: node.o, title: "printed" }));
    if (node.e) body.append(el("pre", { class: "err", text: node.e, title: "error" }));
    const pairs = this.pairs.get(id) || { over: [], under: [] };
    const notes = el("small", {}, [node.k && `${node.k} tokens`, node.w].filter(Boolean).join(", "));
    for (const [word, ids] of [["over", pairs.over], ["under", pairs.under]]) {
      for (const other of ids) {
        const link = el("button", { type: "button", class: "link", text: `#${other}` });
        link.addEventListener("click", () => this.show(other));
        notes.append(notes.textContent ? " · " : "", `${word} `, link);
      }
    }
    if (notes.textContent) body.append(notes);
    return body;
  }

  open(id) {
    const item = this.items.get(id);
    if (!item || item.dataset.open) return;
    item.dataset.open = "1";
    item.firstChild.setAttribute("aria-expanded", "true");
    item.querySelector(".fold").textContent = "▾";
    item.append(this.body(id));
    if (!this.children[id].length) return;
    const list = el("ul", { class: "nodes" });
    this.fill(list, id);
    item.append(list);
  }

  close(id) {
    const item = this.items.get(id);
    if (!item || !item.dataset.open) return;
    delete item.dataset.open;
    item.firstChild.setAttribute("aria-expanded", "false");
    item.querySelector(".fold").textContent = "▸";
    while (item.children.length > 1) item.lastChild.remove();
    const waiting = [...this.children[id]];
    while (waiting.length) {
      const child = waiting.pop();
      if (this.items.delete(child)) waiting.push(...this.children[child]);
    }
  }

  toggle(id) {
    if (this.items.get(id).dataset.open) this.close(id);
    else this.open(id);
  }

  openBest() { for (const id of this.tree.best) this.reveal(id), this.open(id); }

  openAll() { for (let id = 1; id < this.tree.nodes.length; id++) this.open(id); } // parents come before their children

  closeAll() { for (const id of this.children[0]) this.close(id); }

  reveal(id) {
    const path = [];
    for (let at = this.tree.nodes[id].p; at; at = this.tree.nodes[at].p) path.unshift(at);
    for (const parent of path) this.open(parent);
    let more;
    while (!this.items.has(id) && (more = (this.items.get(this.tree.nodes[id].p) || this.list.parentNode).querySelector(":scope > .nodes > li > .link"))) more.click();
  }

  show(id) {
    this.reveal(id);
    const item = this.items.get(id);
    item.scrollIntoView({ block: "center" });
    item.classList.add("flash");
    setTimeout(() => item.classList.remove("flash"), 1500);
  }
}

function viewer(root) {
  const entries = read("data-entries");
  const [search, outcome, round] = ["find", "outcome", "round"].map((id) => document.getElementById(id));
  const list = document.getElementById("entries");
  const place = (entry) => `#tree=${entry.round}/${encodeURIComponent(entry.id)}`;
  const buttons = entries.map((entry, i) => {
    const button = el("button", { type: "button" },
      el("span", { class: entry.solved ? "good" : "bad", text: entry.solved ? "✓ " : "✗ " }), entry.problem,
      el("small", { text: [`round ${entry.round}`, entry.level && `level ${entry.level}`, `${entry.nodes} steps`, entry.new && "newly solved"].filter(Boolean).join(" · ") }));
    button.addEventListener("click", () => select(i));
    return el("li", {}, button);
  });

  function select(i, keep) {
    buttons.forEach((item, k) => item.firstChild.setAttribute("aria-current", k === i));
    window.treeView = new TreeView(entries[i], read(`data-${i}`), document.getElementById("tree"));
    if (!keep) history.replaceState(null, "", place(entries[i]));
  }

  function filter() {
    const text = search.value.trim().toLowerCase();
    const wanted = (entry) => (!text || entry.problem.toLowerCase().includes(text) || entry.id.toLowerCase().includes(text)) &&
      (!round.value || entry.round === Number(round.value)) &&
      (!outcome.value || { solved: entry.solved, unsolved: !entry.solved, new: entry.new }[outcome.value]);
    const shown = entries.map((entry, i) => i).filter((i) => wanted(entries[i]));
    list.replaceChildren(...shown.map((i) => buttons[i]));
    document.getElementById("matches").textContent = `${shown.length} of ${entries.length} trees`;
  }

  for (const input of [search, outcome, round]) input.addEventListener("input", filter);
  root.hidden = false;
  filter();
  const asked = entries.findIndex((entry) => place(entry) === location.hash);
  const telling = [(entry) => entry.new, (entry) => entry.solved, () => true].map((wanted) => entries.findIndex(wanted)).find((i) => i >= 0);
  select(asked >= 0 ? asked : telling, true);
  if (asked >= 0) root.scrollIntoView();
}

const root = document.getElementById("viewer");
if (root) viewer(root);
