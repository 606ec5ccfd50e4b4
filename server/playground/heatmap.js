// Layers by experts: how hot each expert is. While text is generated the last few tokens count most;
// afterwards, and where motion is not wanted, all tokens count alike.

const KEEP = 0.85; // of the heat, from one token to the next
const GUTTER = 22; // for the numbers of the layers, CSS pixels
const STEPS = 48; // of colour

const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");

// The choices of one token, one array of 0 and 1 a layer, from the base64 of the API.
export function unpack(chosen, layers, experts) {
  const bytes = Uint8Array.from(atob(chosen), (char) => char.charCodeAt(0));
  const stride = Math.ceil(experts / 8);
  return Array.from({ length: layers }, (_, layer) =>
    Uint8Array.from({ length: experts }, (_, e) => (bytes[layer * stride + (e >> 3)] >> (e & 7)) & 1),
  );
}

function mix(low, high, share) {
  const channel = (i) => Math.round(low[i] + (high[i] - low[i]) * share);
  return `rgb(${channel(0)} ${channel(1)} ${channel(2)})`;
}

function hex(name) {
  const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16));
}

export class HeatMap {
  constructor(canvas, layers, experts) {
    Object.assign(this, { canvas, layers, experts });
    this.tokens = 0;
    this.live = false;
    this.counts = Array.from({ length: layers }, () => new Uint32Array(experts));
    this.heat = Array.from({ length: layers }, () => new Float32Array(experts));
    this.shown = null; // the choice of one token, instead of the heat
    this.frame = 0;
    this.drawn = 0;
    new ResizeObserver(() => this.#request()).observe(canvas);
    const repaint = () => {
      if (canvas.isConnected) this.#request();
      else dark.removeEventListener("change", repaint); // the run that it belonged to is gone
    };
    dark.addEventListener("change", repaint);
  }

  add(choice) {
    this.tokens += 1;
    choice.forEach((row, layer) => {
      const counts = this.counts[layer];
      const heat = this.heat[layer];
      row.forEach((one, e) => {
        counts[e] += one;
        heat[e] = KEEP * heat[e] + (1 - KEEP) * one;
      });
    });
    // Without motion: a new picture a second at most.
    if (!still.matches || performance.now() - this.drawn > 1000) this.#request();
  }

  // Whether recent tokens count most.
  setLive(live) {
    this.live = live;
    this.#request();
  }

  show(choice) {
    this.shown = choice;
    this.#request();
  }

  // How hot an expert is, from 0 to 1.
  value(layer, expert) {
    if (this.shown) return this.shown[layer][expert];
    if (this.live && !still.matches) return this.heat[layer][expert];
    return this.tokens ? this.counts[layer][expert] / this.tokens : 0;
  }

  // {layer, expert} under a pointer, or null.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor(((event.clientX - box.left - GUTTER) / (box.width - GUTTER)) * this.experts);
    const layer = Math.floor(((event.clientY - box.top) / box.height) * this.layers);
    const inside = expert >= 0 && expert < this.experts && layer >= 0 && layer < this.layers;
    return inside ? { layer, expert } : null;
  }

  // Per layer: experts used at all, mean per token, and the most used ones with their share.
  summary() {
    return this.counts.map((counts) => {
      const used = [...counts.keys()].filter((e) => counts[e]);
      const most = used.sort((a, b) => counts[b] - counts[a]).slice(0, 3);
      const total = counts.reduce((sum, count) => sum + count, 0);
      const shares = most.map((e) => ({ expert: e, share: counts[e] / this.tokens }));
      return { used: used.length, perToken: this.tokens ? total / this.tokens : 0, most: shares };
    });
  }

  #request() {
    this.frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.frame = 0;
    this.drawn = performance.now();
    const width = this.canvas.clientWidth;
    if (!width) return;
    const cell = (width - GUTTER) / this.experts;
    const row = Math.max(8, Math.min(20, 2.2 * cell, 420 / this.layers));
    const ratio = devicePixelRatio || 1;
    const height = Math.ceil(row * this.layers);
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    const [low, high] = [hex("--heat-low"), hex("--heat-high")];
    // The square root, as in the shades of tokens: most experts are used seldom.
    const colours = Array.from({ length: STEPS + 1 }, (_, i) => mix(low, high, Math.sqrt(i / STEPS)));
    const edge = (i) => Math.round((GUTTER + i * cell) * ratio);
    const gap = cell * ratio >= 3 ? Math.max(1, Math.round(ratio * cell * 0.12)) : 0;
    for (let layer = 0; layer < this.layers; layer += 1) {
      const top = Math.round(layer * row * ratio);
      const bottom = Math.round((layer + 1) * row * ratio);
      for (let e = 0; e < this.experts; e += 1) {
        context.fillStyle = colours[Math.round(STEPS * this.value(layer, e))];
        context.fillRect(edge(e), top, edge(e + 1) - edge(e) - gap, bottom - top - Math.max(gap, 1));
      }
    }
    this.#number(context, row, ratio);
  }

  #number(context, row, ratio) {
    const style = getComputedStyle(this.canvas);
    context.font = `${11 * ratio}px ${style.fontFamily}`;
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--muted");
    context.textBaseline = "middle";
    const every = Math.ceil(13 / row);
    for (let layer = 0; layer < this.layers; layer += every)
      context.fillText(String(layer + 1), 0, (layer + 0.5) * row * ratio);
  }
}
