// The grid of squares: draws what Python sends, keeps the selection while the person works, reports it back.
// It knows rows, columns and cells; what they stand for is Python's business.

const SVG = "http://www.w3.org/2000/svg";
const GAP = 2, TOP = 20, BAND = 30, REST_MS = 220;

const make = (tag, attributes, parent, text) => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent?.appendChild(node);
  return node;
};

class LayerMap {
  constructor(root) {
    this.root = root;
    this.selected = new Set();
    this.count = -1;
    this.active = 0;
    this.legend = document.createElement("div");
    this.legend.className = "legend";
    this.svg = make("svg", { role: "grid", tabindex: 0, "aria-multiselectable": "true" }, root);
    root.appendChild(this.legend);
    this.svg.addEventListener("keydown", (event) => this.onKey(event));
    this.svg.addEventListener("pointerdown", (event) => this.onDown(event));
    this.svg.addEventListener("pointermove", (event) => this.onMove(event));
    this.svg.addEventListener("pointerup", (event) => this.onUp(event));
    this.svg.addEventListener("pointercancel", () => this.dropBox());
    new ResizeObserver(() => this.data && this.width() !== this.drawnWidth && this.draw()).observe(root);
  }

  width() { return Math.max(280, Math.floor(this.root.clientWidth)); }

  show(data) {
    this.data = data;
    if (data.n >= this.count) {  // otherwise the message answers an older click than the one on screen
      this.count = data.n;
      this.selected = new Set(data.selected);
    }
    const { selected, n, ...picture } = data;
    const print = JSON.stringify(picture);
    if (print === this.print && this.width() === this.drawnWidth) return this.mark();  // tooltips and a drag under way stay
    this.print = print;
    this.draw();
  }

  // --- drawing -------------------------------------------------------------------------------------------------

  draw() {
    const { rows, columns, cells, band, label } = this.data;
    this.drawnWidth = this.width();
    const left = Math.max(34, ...rows.map((name) => 10 + 7 * name.length));
    const slotW = Math.min(170, Math.max(9, (this.drawnWidth - left) / Math.max(1, columns.length)));
    const slotH = Math.min(32, Math.max(20, slotW));
    const gridBottom = TOP + rows.length * slotH;
    const gridWidth = Math.max(slotW * columns.length, Math.min(this.drawnWidth - left, 480));
    const height = gridBottom + (band.length ? BAND + 8 : 2);
    Object.assign(this, { left, slotW, slotH, gridBottom });
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${this.drawnWidth} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("aria-label", label);
    this.labels(rows, columns);
    this.places = cells.map((cell) => this.place(cell, left + cell[2] * slotW, TOP + cell[1] * slotH, slotW, slotH));
    const share = gridWidth / Math.max(1, band.length);
    band.forEach((cell, index) => {
      const asCell = [cell[0], rows.length, index, ...cell.slice(3)];
      this.places.push(this.place(asCell, left + index * share, gridBottom + 6, share, BAND, cell[1]));
    });
    this.active = Math.min(this.active, this.places.length - 1);
    this.focusRing = make("rect", { class: "focus", rx: 5 }, this.svg);
    this.box = make("rect", { class: "box", visibility: "hidden" }, this.svg);
    this.mark();
    this.drawLegend();
  }

  labels(rows, columns) {
    rows.forEach((name, row) => {
      const text = make("text", { class: "name", x: this.left - 8, y: TOP + (row + 0.5) * this.slotH + 4, "text-anchor": "end", role: "rowheader" }, this.svg, name);
      text.addEventListener("pointerdown", (event) => this.pickLine(event, (place) => place.row === row));
    });
    const longest = Math.max(...columns.map((name) => name.length), 1);
    const every = Math.ceil((longest * 7 + 3) / this.slotW);
    columns.forEach((name, column) => {
      const shown = column % every === 0 ? name : "·";
      const text = make("text", { class: "name", x: this.left + (column + 0.5) * this.slotW, y: 13, "text-anchor": "middle", role: "columnheader",
        "aria-label": `${this.data.columnTitle} ${name}` }, this.svg, shown);
      text.addEventListener("pointerdown", (event) => this.pickLine(event, (place) => place.column === column && place.row < rows.length));
    });
  }

  place([id, row, column, fill, words, size, level, state, title], x, y, slotW, slotH, name) {
    const group = make("g", { role: "gridcell", id: `cell-${row}-${column}`, "aria-label": title || id, "aria-selected": "false" }, this.svg);
    make("title", {}, group, title || id);
    make("rect", { class: "slot", x, y, width: slotW, height: slotH }, group);
    const wide = slotW - GAP, tall = slotH - GAP;
    if (state === "missing") {
      make("circle", { class: "missing", cx: x + slotW / 2, cy: y + slotH / 2, r: 1.5 }, group);
      return { id, row, column, x, y, slotW, slotH, group, missing: true };
    }
    const w = wide * size, h = tall * size, left = x + (slotW - w) / 2, top = y + (slotH - h) / 2;
    const [colour, ink] = fill < 0 ? [null, null] : this.data.palette[fill];
    const square = make("rect", { class: `square ${state} ${colour ? "" : "none"}`, x: left, y: top, width: w, height: h, rx: Math.min(4, w / 4) }, group);
    if (colour && state !== "removed") square.style.fill = colour;
    const inked = state === "removed" || state === "pending" ? null : ink;
    this.write(group, name ? `${name}  ${words}` : words, left + w / 2, top + h / 2, w, inked);
    if (level !== null && state !== "removed" && state !== "pending") this.bar(group, left, top, w, h, level, inked);
    if (state === "locked") make("text", { class: "in", x: left + w - 8, y: top + 10 }, group, "🔒");
    return { id, row, column, x, y, slotW, slotH, group };
  }

  write(group, words, x, y, room, ink) {
    const size = Math.min(12, Math.max(8, room / Math.max(1, words.length) * 1.7));
    if (!words || words.length * size * 0.58 > room) return;
    const text = make("text", { class: "in", x, y: y + size * 0.35, "text-anchor": "middle" }, group, words);
    text.style.fontSize = `${size}px`;
    if (ink) text.style.fill = ink;
  }

  bar(group, left, top, w, h, level, ink) {
    const length = Math.max(1.5, (w - 4) * Math.min(1, Math.max(0, level)));
    const strip = make("rect", { x: left + 2, y: top + h - 4.5, width: length, height: 2.5, rx: 1, "pointer-events": "none" }, group);
    strip.style.fill = ink || "var(--st-text-color)";
  }

  drawLegend() {
    const legend = this.data.legend;
    this.legend.replaceChildren();
    const add = (tag, name, text) => {
      const node = document.createElement(tag);
      node.className = name;
      node.textContent = text;
      this.legend.appendChild(node);
      return node;
    };
    if (legend) {
      add("b", "", legend.title);
      for (const [text, fill] of legend.steps) {
        const key = add("span", "key", text);
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.background = fill < 0 ? "color-mix(in srgb, var(--st-text-color) 20%, var(--st-background-color))" : this.data.palette[fill][0];
        key.prepend(swatch);
      }
      for (const note of legend.notes) add("span", "note", note);
    }
    this.counter = add("span", "count", "");
    this.counter.setAttribute("aria-live", "polite");
    this.tell();
  }

  // --- selection -----------------------------------------------------------------------------------------------

  mark() {
    this.svg.querySelectorAll(".chosen").forEach((node) => node.remove());
    this.places.forEach((place, index) => {
      const on = this.selected.has(place.id);
      place.group.setAttribute("aria-selected", on);
      if (on) make("rect", { class: "chosen", ...this.frame(place), rx: 4 }, this.svg);
      if (index === this.active) {
        for (const [name, value] of Object.entries(this.frame(place))) this.focusRing.setAttribute(name, value);
        this.svg.setAttribute("aria-activedescendant", place.group.id);
      }
    });
    this.tell();
  }

  frame(place) { return { x: place.x + 0.5, y: place.y + 0.5, width: place.slotW - 1, height: place.slotH - 1 }; }

  tell() {
    if (this.counter) this.counter.textContent = this.selected.size ? `${this.selected.size} selected · Esc clears` : "";
  }

  choose(ids, wait = 0) {
    this.selected = new Set(ids);
    this.count += 1;
    this.mark();
    clearTimeout(this.timer);
    const count = this.count;
    const order = this.places.filter((place) => this.selected.has(place.id)).map((place) => place.id);
    this.timer = setTimeout(() => this.send(order, count), wait);
  }

  toggle(ids) {
    const next = new Set(this.selected);
    const all = ids.every((id) => next.has(id));
    for (const id of ids) all ? next.delete(id) : next.add(id);
    return next;
  }

  pick(ids, add) {
    const alone = ids.length === this.selected.size && ids.every((id) => this.selected.has(id));
    this.choose(add ? this.toggle(ids) : alone ? [] : ids);
  }

  pickLine(event, inLine) {
    event.stopPropagation();
    this.pick(this.places.filter((place) => !place.missing && inLine(place)).map((place) => place.id), event.shiftKey || event.ctrlKey || event.metaKey);
  }

  // --- pointer -------------------------------------------------------------------------------------------------

  point(event) {
    const frame = this.svg.getBoundingClientRect();
    const zoom = this.drawnWidth / frame.width;
    return { x: (event.clientX - frame.left) * zoom, y: (event.clientY - frame.top) * zoom };
  }

  at({ x, y }) { return this.places.findIndex((p) => !p.missing && x >= p.x && x < p.x + p.slotW && y >= p.y && y < p.y + p.slotH); }

  onDown(event) {
    if (event.button !== 0) return;
    this.start = this.point(event);
    this.dragging = false;
  }

  onMove(event) {
    if (!this.start) return;
    const now = this.point(event);
    if (!this.dragging && Math.hypot(now.x - this.start.x, now.y - this.start.y) < 6) return;
    if (!this.dragging) this.svg.setPointerCapture(event.pointerId);
    this.dragging = true;
    this.area = { x: Math.min(now.x, this.start.x), y: Math.min(now.y, this.start.y), width: Math.abs(now.x - this.start.x), height: Math.abs(now.y - this.start.y) };
    for (const [name, value] of Object.entries(this.area)) this.box.setAttribute(name, value);
    this.box.setAttribute("visibility", "visible");
  }

  onUp(event) {
    if (!this.start) return;
    const add = event.shiftKey || event.ctrlKey || event.metaKey;
    if (this.dragging) {
      const { x, y, width, height } = this.area;
      const inside = this.places.filter((p) => !p.missing && p.x < x + width && p.x + p.slotW > x && p.y < y + height && p.y + p.slotH > y).map((p) => p.id);
      this.choose(add ? [...this.selected, ...inside] : inside);
    } else {
      const index = this.at(this.start);
      if (index >= 0) { this.active = index; this.pick([this.places[index].id], add); } else if (this.selected.size) this.choose([]);
    }
    this.dropBox();
  }

  dropBox() {
    this.start = null;
    this.dragging = false;
    this.box?.setAttribute("visibility", "hidden");
  }

  // --- keyboard ------------------------------------------------------------------------------------------------

  onKey(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step) this.move(step, event.shiftKey);
    else if (event.key === " " || event.key === "Enter") { if (!event.ctrlKey) this.choose(this.toggle([this.places[this.active].id]), REST_MS); else return; }
    else if (event.key === "Escape") { if (this.selected.size) this.choose([]); }
    else if (event.key === "a" && (event.ctrlKey || event.metaKey)) this.choose(this.places.filter((p) => !p.missing).map((p) => p.id));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  move([down, right], extend) {
    const from = this.places[this.active];
    const bandRow = this.data.rows.length;
    const row = Math.min(Math.max(from.row + down, 0), bandRow);
    const sideways = this.places.map((place, index) => ({ place, index })).filter(({ place }) => place.row === row && !place.missing);
    if (!sideways.length) return;
    const aim = row === bandRow || from.row === bandRow ? from.x + from.slotW / 2 : from.x + from.slotW / 2 + right * this.slotW;
    const centre = ({ place }) => place.x + place.slotW / 2;
    let next = sideways.reduce((best, item) => Math.abs(centre(item) - aim) < Math.abs(centre(best) - aim) ? item : best);
    if (right && row === bandRow) next = sideways[Math.min(Math.max(sideways.findIndex(({ index }) => index === this.active) + right, 0), sideways.length - 1)];
    if (extend) {
      this.active = next.index;
      this.choose([...this.selected, from.id, next.place.id], REST_MS);
    } else {
      this.active = next.index;
      this.mark();
    }
  }
}

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".layer-map");
  root.layerMap ??= new LayerMap(root);
  root.layerMap.send = (ids, n) => setStateValue("selection", { n, ids });
  root.layerMap.show(data);
}
