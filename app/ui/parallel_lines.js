// Parallel coordinates: an axis a quantity, a line a run, drawn on a plain canvas, which needs no graphics card.
// It knows axes and lines; what they stand for is Python's business. Titles reach the page as text only.

const TOP = 46, BOTTOM = 14, SIDE = 62, NEAR = 12, TICKS = 5;

const short = (value) => {
  const text = Number(value.toPrecision(3));
  return Math.abs(text) >= 1e5 || (text !== 0 && Math.abs(text) < 1e-3) ? text.toExponential(1) : String(text);
};

const mixed = (scale, place) => {
  const at = Math.min(Math.max(place, 0), 1) * (scale.length - 1), low = Math.min(Math.floor(at), scale.length - 2);
  const channel = (colour, i) => parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16);
  return `rgb(${[0, 1, 2].map((i) => Math.round(channel(scale[low], i) + (channel(scale[low + 1], i) - channel(scale[low], i)) * (at - low))).join(",")})`;
};

class ParallelLines {
  constructor(root) {
    this.root = root;
    this.brushes = new Map();
    this.canvas = root.appendChild(document.createElement("canvas"));
    this.said = root.appendChild(document.createElement("div"));
    this.said.className = "said";
    this.canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    this.canvas.addEventListener("pointermove", (event) => this.onMove(event));
    this.canvas.addEventListener("pointerup", (event) => this.onUp(event));
    this.canvas.addEventListener("pointerleave", () => this.point(-1));
    this.canvas.addEventListener("dblclick", () => { this.brushes.clear(); this.draw(); });
    root.addEventListener("transitionend", () => this.data && this.draw());  // the theme's text colour has changed
    new ResizeObserver(() => this.data && this.root.clientWidth !== this.width && this.draw()).observe(root);
  }

  show(data) {
    const axes = JSON.stringify(data.axes.map((axis) => axis.label));
    if (axes !== this.axes) this.brushes.clear();
    this.axes = axes;
    this.data = data;
    this.hover = -1;
    this.canvas.setAttribute("aria-label", data.label);
    this.canvas.setAttribute("role", "img");
    this.draw();
  }

  // --- places --------------------------------------------------------------------------------------------------

  x(axis) { return SIDE + (axis * (this.width - 2 * SIDE)) / (this.data.axes.length - 1); }
  y(place) { return this.height - BOTTOM - place * (this.height - TOP - BOTTOM); }

  // Place of a value between the ends of its axis, 0 at the foot.
  place(axis, value) {
    const { foot, head, log } = this.data.axes[axis];
    const turn = log ? Math.log : (number) => number;
    return (turn(value) - turn(foot)) / (turn(head) - turn(foot));
  }

  value(axis, place) {
    const { foot, head, log } = this.data.axes[axis];
    return log ? Math.exp(Math.log(foot) + place * (Math.log(head) - Math.log(foot))) : foot + place * (head - foot);
  }

  kept(line) {
    return [...this.brushes].every(([axis, [low, high]]) => line.places[axis] >= low && line.places[axis] <= high);
  }

  // --- drawing -------------------------------------------------------------------------------------------------

  draw() {
    this.width = Math.max(480, this.root.clientWidth);
    this.height = this.data.height;
    this.lines = this.data.lines.map(([title, ...values]) => ({ title, values, places: values.map((value, axis) => this.place(axis, value)) }));
    const sharp = window.devicePixelRatio || 1, pen = this.canvas.getContext("2d");
    Object.assign(this.canvas, { width: this.width * sharp, height: this.height * sharp });
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    const ink = getComputedStyle(this.root).color, chosen = this.lines.filter((line) => this.kept(line));
    const many = chosen.length > 60;
    if (this.brushes.size) for (const line of this.lines) this.stroke(pen, line, ink, 0.06, 1);
    for (const line of chosen) this.stroke(pen, line, mixed(this.data.scale, line.places[0]), many ? 0.5 : 0.9, many ? 1 : 1.8);
    if (this.hover >= 0) this.stroke(pen, this.lines[this.hover], ink, 1, 3);
    this.data.axes.forEach((axis, number) => this.axis(pen, axis, number, ink));
    this.tell(chosen.length);
  }

  stroke(pen, line, colour, strength, thick) {
    Object.assign(pen, { strokeStyle: colour, globalAlpha: strength, lineWidth: thick });
    pen.beginPath();
    line.places.forEach((place, axis) => pen.lineTo(this.x(axis), this.y(place)));
    pen.stroke();
    pen.globalAlpha = 1;
  }

  axis(pen, axis, number, ink) {
    const x = this.x(number), style = getComputedStyle(this.root);
    const ground = style.getPropertyValue("--st-background-color") || "white";
    Object.assign(pen, { fillStyle: ink, strokeStyle: ink, lineWidth: 1, textAlign: "center", font: `600 12px ${style.fontFamily}` });
    const [title, unit] = axis.label.split(", ");
    pen.fillText(title, x, 14, SIDE * 2);
    pen.font = `12px ${style.fontFamily}`;
    if (unit) pen.fillText(unit, x, 29);
    pen.fillRect(x - 0.5, this.y(1), 1, this.y(0) - this.y(1));
    pen.textAlign = "left";
    for (let tick = 0; tick < TICKS; tick++) {
      const y = this.y(tick / (TICKS - 1)), text = short(this.value(number, tick / (TICKS - 1)));
      pen.fillRect(x - 3, y - 0.5, 6, 1);
      Object.assign(pen, { strokeStyle: ground, lineWidth: 4, lineJoin: "round" });
      pen.strokeText(text, x + 6, y + 4);
      pen.fillText(text, x + 6, y + 4);
    }
    if (this.brushes.has(number)) {
      const [low, high] = this.brushes.get(number);
      Object.assign(pen, { fillStyle: style.getPropertyValue("--st-primary-color") || ink, globalAlpha: 0.45 });
      pen.fillRect(x - 6, this.y(high), 12, this.y(low) - this.y(high));
      pen.globalAlpha = 1;
    }
  }

  tell(count) {
    const line = this.lines[this.hover];
    const figures = line && this.data.axes.map((axis, number) => `${axis.label.split(", ")[0].toLowerCase()} ${short(line.values[number])}`);
    const picked = this.brushes.size ? `${count} of ${this.lines.length} runs picked out; click an axis to release it.` : "";
    this.said.textContent = line ? `${line.title}: ${figures.join(" · ")}` : picked;
  }

  // --- hands ---------------------------------------------------------------------------------------------------

  at(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const axis = this.data.axes.findIndex((_, number) => Math.abs(this.x(number) - x) < NEAR);
    return { x, y, axis, place: Math.min(1, Math.max(0, (this.height - BOTTOM - y) / (this.height - TOP - BOTTOM))) };
  }

  onDown(event) {
    const { axis, place } = this.at(event);
    if (axis < 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = { axis, from: place };
  }

  onMove(event) {
    const at = this.at(event);
    if (!this.drag) {
      this.canvas.style.cursor = at.axis >= 0 ? "ns-resize" : "default";
      return this.point(at.axis >= 0 ? -1 : this.nearest(at.x, at.y));
    }
    this.brushes.set(this.drag.axis, [Math.min(this.drag.from, at.place), Math.max(this.drag.from, at.place)]);
    this.draw();
  }

  onUp() {
    if (!this.drag) return;
    const [low, high] = this.brushes.get(this.drag.axis) ?? [0, 0];
    if (high - low < 0.01) this.brushes.delete(this.drag.axis);
    this.drag = null;
    this.draw();
  }

  point(line) {
    if (line === this.hover || !this.lines) return;
    this.hover = line;
    this.draw();
  }

  // The picked-out line that passes within a few pixels of a point, -1 where none does.
  nearest(x, y) {
    const step = (this.width - 2 * SIDE) / (this.data.axes.length - 1), left = Math.floor((x - SIDE) / step);
    if (left < 0 || left >= this.data.axes.length - 1) return -1;
    const share = (x - this.x(left)) / step;
    let best = -1, least = NEAR;
    this.lines.forEach((line, number) => {
      const away = Math.abs(this.y(line.places[left] + share * (line.places[left + 1] - line.places[left])) - y);
      if (away < least && this.kept(line)) [best, least] = [number, away];
    });
    return best;
  }
}

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".parallel-lines");
  root.parallelLines ??= new ParallelLines(root);
  root.parallelLines.show(data);
}
