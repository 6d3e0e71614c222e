"use strict";
// Text of models reaches the page through textContent alone. Children of a step are drawn when it is opened.
const CHUNK = 100; // children drawn at once
const LARGE = 500; // steps from which on those off the screen are not laid out
const LANE = 9; // pixels between the rails of two preference pairs
const place = (entry) => `#tree=${entry.round}/${encodeURIComponent(entry.id)}`;
const read = (id) => JSON.parse(document.getElementById(id).textContent);

function el(tag, options, ...children) {
  const { text, ...attributes } = options;
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== false && value != null) made.setAttribute(name, value);
  if (text != null) made.textContent = text;
  made.append(...children.filter((child) => child != null));
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const signed = (value) => (value <= -0.005 ? "\u2212" : "+") + Math.abs(value).toFixed(2);
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
  constructor(entry, tree, into, others) {
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
    this.sizes = new ResizeObserver((changed) => { for (const { target } of changed) this.drawPairs(target); });
    this.list = el("ul", { class: "nodes", "aria-label": "search tree" });
    into.classList.toggle("large", tree.nodes.length > LARGE);
    into.replaceChildren(...this.about(entry, others), this.list);
    this.fill(this.list, 0);
    this.openBest();
  }

  pairsOf(id) {
    if (!this.pairs.has(id)) this.pairs.set(id, { over: [], under: [] });
    return this.pairs.get(id);
  }

  about(entry, others) {
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
    const rounds = el("div", { class: "note" }, "This problem");
    for (const other of others) {
      const text = `round ${other.round} ${other.solved ? "✓" : "✗"}`;
      rounds.append(" · ", other === entry ? el("b", { text }) : el("a", { href: place(other), text }));
    }
    const worst = el("button", { type: "button", class: "link", text: `#${entry.at}` });
    worst.addEventListener("click", () => this.show(entry.at));
    return [
      el("h3", {}, el("span", { class: entry.solved ? "good" : "bad", text: entry.solved ? "✓ solved " : "✗ not solved " }), entry.id),
      el("div", { class: "note", text: facts.join(" · ") }),
      others.length > 1 ? rounds : null,
      el("div", { class: "question", text: entry.question }),
      el("div", {}, "Reference answer: ", el("b", { text: tree.answer }), given || ""),
      entry.at ? el("div", { class: "note" }, `PPM most wrong at `, worst, `: ${entry.off.toFixed(2)} from the mean reward of the answers below`) : null,
      tools,
    ].filter(Boolean);
  }

  fill(list, parent, from = 0) {
    const ids = this.children[parent];
    if (!from) this.rails(list, parent);
    list.append(...ids.slice(from, from + CHUNK).map((id) => this.item(id)));
    if (ids.length <= from + CHUNK) return;
    const more = el("button", { type: "button", class: "link", text: `${ids.length - from - CHUNK} more` });
    const last = el("li", {}, more);
    more.addEventListener("click", () => { last.remove(); this.fill(list, parent, from + CHUNK); });
    list.append(last);
  }

  // Siblings of one preference pair are joined by a rail at the list's left, drawn anew whenever the list changes its size.
  rails(list, parent) {
    const siblings = new Set(this.children[parent]);
    list.pairs = this.children[parent].map((id) => [id, (this.pairs.get(id)?.over || []).filter((other) => siblings.has(other))]).filter(([, under]) => under.length);
    if (!list.pairs.length) return;
    list.classList.add("paired");
    list.style.setProperty("--lanes", `${list.pairs.length * LANE + 4}px`);
    this.sizes.observe(list);
  }

  drawPairs(list) {
    const middle = (id) => { const item = this.items.get(id); return item && item.offsetTop + item.firstChild.offsetHeight / 2; };
    const drawn = shape("svg", { class: "pairs", width: list.pairs.length * LANE + 4, height: list.clientHeight, "aria-hidden": "true" });
    list.pairs.forEach(([chosen, rejected], lane) => {
      const [from, x, edge] = [middle(chosen), 5 + lane * LANE, list.pairs.length * LANE + 4];
      const ends = rejected.map(middle).filter((y) => y != null);
      if (from == null || !ends.length) return;
      const [low, high] = [Math.min(from, ...ends), Math.max(from, ...ends)];
      drawn.append(shape("path", { class: "rail", d: `M${x} ${low} V${high}` }), shape("path", { class: "over", d: `M${x} ${from} H${edge}` }),
        shape("circle", { class: "over", cx: x, cy: from, r: 3.5 }));
      for (const y of ends) drawn.append(shape("path", { class: "under", d: `M${x} ${y} H${edge} M${x - 3} ${y - 3} l6 6 m0 -6 l-6 6` }));
    });
    list.querySelector(":scope > svg")?.remove();
    list.append(drawn);
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
  const buttons = entries.map((entry, i) => {
    const facts = [`round ${entry.round}`, entry.level && `level ${entry.level}`, `${entry.nodes} steps`, entry.new && "newly solved", entry.at && `off ${entry.off.toFixed(2)}`];
    const button = el("button", { type: "button", title: entry.question },
      el("span", { class: entry.solved ? "good" : "bad", text: entry.solved ? "✓ " : "✗ " }), el("span", { class: "name", text: entry.problem }),
      el("small", { text: facts.filter(Boolean).join(" · ") }));
    button.addEventListener("click", () => select(i));
    return el("li", {}, button);
  });

  function select(i, keep) {
    buttons.forEach((item, k) => item.firstChild.setAttribute("aria-current", k === i));
    const others = entries.filter((entry) => entry.problem === entries[i].problem);
    window.treeView?.sizes.disconnect();
    window.treeView = new TreeView(entries[i], read(`data-${i}`), document.getElementById("tree"), others);
    if (keep) list.scrollTop = buttons[i].offsetTop - list.clientHeight / 2;
    else history.replaceState(null, "", place(entries[i]));
  }

  function filter() {
    const text = search.value.trim().toLowerCase();
    const said = (entry) => [entry.problem, entry.id, entry.question].some((one) => one.toLowerCase().includes(text));
    const kinds = { solved: (entry) => entry.solved, unsolved: (entry) => !entry.solved, new: (entry) => entry.new, off: (entry) => entry.at };
    const wanted = (entry) => (!text || said(entry)) && (!round.value || entry.round === Number(round.value)) && (!outcome.value || kinds[outcome.value](entry));
    const shown = entries.map((entry, i) => i).filter((i) => wanted(entries[i]));
    if (outcome.value === "off") shown.sort((a, b) => entries[b].off - entries[a].off);
    list.replaceChildren(...shown.map((i) => buttons[i]));
    document.getElementById("matches").textContent = `${shown.length} of ${entries.length} trees`;
  }

  function follow() { // a link of this page, or the address it was opened with
    const asked = entries.findIndex((entry) => place(entry) === location.hash);
    if (asked < 0) return false;
    select(asked, true);
    root.scrollIntoView();
    return true;
  }

  for (const input of [search, outcome, round]) input.addEventListener("input", filter);
  addEventListener("hashchange", follow);
  root.hidden = false;
  filter();
  const seen = (entry) => entries.filter((other) => other.problem === entry.problem).length; // rounds to follow it through
  const telling = ["asked", "new", "solved"].map((name) => entries.filter((entry) => entry[name]).sort((a, b) => seen(b) - seen(a))[0]).find(Boolean);
  if (!follow()) select(telling ? entries.indexOf(telling) : 0, true);
}

const root = document.getElementById("viewer");
if (root) viewer(root);
