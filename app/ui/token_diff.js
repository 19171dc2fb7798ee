// Panes of tokens: draws what Python sends, adds what is new, shows the token under the pointer or the cursor key.
// Every text is a model's output: it is written with textContent only, so that none of it can become markup.

const make = (tag, name, parent, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  parent?.appendChild(node);
  return node;
};
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const percent = (p) => p === null || p === undefined ? "" : p >= 0.0995 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toPrecision(2)} %`;
const tint = (strength) => `color-mix(in srgb, #d2691e ${Math.round(6 + 54 * strength)}%, transparent)`;
const isSpecial = (text) => /^<[|/]?[\w|]+>$/.test(text);

class TokenDiff {
  constructor(root) {
    this.root = root;
    this.panes = [];
    this.frame = make("div", "panes", root);
    this.key = make("div", "key", root);
    this.detail = make("div", "detail", root);
    this.detail.setAttribute("aria-live", "polite");
  }

  show(data) {
    this.data = data;
    while (this.panes.length > data.panes.length) this.panes.pop().node.remove();
    data.panes.forEach((pane, index) => this.fill(this.panes[index] ?? this.addPane(index), pane));
    this.drawKey();
    if (this.at && this.at.token < (data.panes[this.at.pane]?.tokens.length ?? 0)) this.tell(this.at.pane, this.at.token);
    else this.quiet();
  }

  addPane(index) {
    const node = make("section", "pane", this.frame), head = make("div", "head", node), text = make("div", "text", node);
    const pane = { node, title: make("b", "", head), foot: make("span", "", head), text, shown: [], spans: [] };
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.addEventListener("scroll", () => this.follow(index));
    text.addEventListener("pointerover", (event) => event.target.place !== undefined && this.tell(index, event.target.place));
    text.addEventListener("focus", () => this.panes[index].spans.length && this.tell(index, this.at?.pane === index ? this.at.token : 0));
    text.addEventListener("keydown", (event) => this.onKey(event, index));
    this.panes.push(pane);
    return pane;
  }

  // --- text ----------------------------------------------------------------------------------------------------

  fill(pane, data) {
    const wanted = data.tokens.map((token) => `${token.m}${token.k} ${token.t}`);
    let same = 0;
    while (same < pane.shown.length && same < wanted.length && pane.shown[same] === wanted[same]) same += 1;
    const atEnd = pane.text.scrollTop + pane.text.clientHeight >= pane.text.scrollHeight - 24;
    pane.text.style.height = `${this.data.height}px`;
    pane.title.textContent = data.title;
    pane.foot.textContent = data.foot;
    pane.text.setAttribute("aria-label", `${data.title}, ${data.tokens.length} tokens. Arrow keys move from token to token.`);
    while (pane.spans.length > same) pane.spans.pop().remove();
    pane.tail?.remove();
    data.tokens.slice(same).forEach((token, index) => pane.spans.push(this.span(token, same + index, pane.text)));
    pane.tail = data.writing ? make("span", "caret", pane.text) : data.tokens.length ? null : make("span", "nothing", pane.text, "Nothing written yet.");
    pane.shown = wanted;
    if (data.writing && atEnd) pane.text.scrollTop = pane.text.scrollHeight;
  }

  span(token, place, parent) {
    const group = make("span", "", parent);
    if (token.m === "first") make("span", "flag", group, "◆ parts here");
    const span = make("span", `token ${token.m}${isSpecial(token.t) ? " special" : ""}`, group);
    span.place = place;
    for (const piece of token.t.split(/([\n\t])/)) {
      if (piece === "\n" || piece === "\t") make("span", "sign", span, piece === "\n" ? "↵" : "⇥").place = place;
      if (piece) span.append(piece);
    }
    if (token.k > 0) span.style.background = tint(token.k);
    return group;
  }

  // --- the token under the pointer -----------------------------------------------------------------------------

  tell(pane, token) {
    this.at = { pane, token };
    this.root.querySelectorAll(".here").forEach((node) => node.classList.remove("here"));
    this.detail.replaceChildren();
    this.detail.classList.remove("idle");
    this.data.panes.forEach((side, index) => {
      const shared = index === pane || this.shared(pane, index, token);
      if (shared && side.tokens[token]) {
        this.panes[index].spans[token].querySelector(".token").classList.add("here");
        this.card(side, side.tokens[token], token);
      } else {
        make("div", "card", this.detail, shared ? "" : "The text before this token differs, so there is nothing to compare it with.");
      }
    });
  }

  // Up to the first divergence, itself included, a position means the same on both sides.
  shared(one, other, token) {
    return [one, other].every((index) => index === 0 || this.data.firsts[index - 1] === null || token <= this.data.firsts[index - 1]);
  }

  card(side, token, place) {
    const card = make("div", "card", this.detail), line = make("p", "", card);
    make("b", "", line, visible(token.t) || "(empty)");
    const facts = [percent(token.p), token.r === null || token.r === undefined ? "" : `rank ${token.r}`, token.kl === null ? "" : `KL ${token.kl} nat`, `token ${place + 1}`];
    line.append(`  ${facts.filter(Boolean).join(" · ")}`);
    for (const [text, p] of token.a) {
      const row = make("div", text.trim() === token.t.trim() ? "row chosen" : "row", card);
      make("code", "", row, visible(text));
      make("div", "bar", row).style.width = `${Math.max(0.5, 100 * p)}%`;
      make("span", "", row, percent(p));
    }
  }

  quiet() {
    this.at = null;
    this.detail.replaceChildren();
    this.detail.classList.toggle("idle", !this.data.panes.some((side) => side.tokens.length));
    const hint = "Point at a token, or walk with the arrow keys, to see its probability, its rank and what else was likely.";
    this.data.panes.forEach((side, index) => make("div", "card", this.detail, index === 0 && side.tokens.length ? hint : ""));
  }

  onKey(event, index) {
    const last = this.panes[index].spans.length - 1, now = this.at?.pane === index ? this.at.token : 0;
    const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -last, End: last }[event.key];
    if (step === undefined || last < 0) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.min(Math.max(now + step, 0), last);
    this.tell(index, next);
    this.panes[index].spans[next].scrollIntoView({ block: "nearest" });
  }

  // --- scroll and key ------------------------------------------------------------------------------------------

  follow(index) {
    if (this.led !== undefined && this.led !== index) return;
    this.led = index;
    clearTimeout(this.rest);
    this.rest = setTimeout(() => { this.led = undefined; }, 120);
    const from = this.panes[index].text, room = from.scrollHeight - from.clientHeight;
    for (const pane of this.panes) {
      if (pane.text !== from) pane.text.scrollTop = room > 0 ? (from.scrollTop / room) * (pane.text.scrollHeight - pane.text.clientHeight) : 0;
    }
  }

  drawKey() {
    this.key.replaceChildren();
    if (this.data.panes.some((pane) => pane.tokens.some((token) => token.kl !== null))) {
      make("i", "", this.key, "KL to dense, nat");
      for (const [label, strength] of this.data.steps) {
        const item = make("i", "", this.key);
        make("span", "swatch", item).style.background = tint(strength);
        item.append(label);
      }
    }
    if (this.data.firsts.some((first) => first !== null)) make("i", "", this.key, "◆ first divergence · underlined: differs");
    const verdict = make("span", "verdict", this.key, this.data.verdict);
    verdict.setAttribute("role", "status");
  }
}

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".token-diff");
  root.tokenDiff ??= new TokenDiff(root);
  root.tokenDiff.show(data);
}
