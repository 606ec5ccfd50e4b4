// The checkpoint's quality by share of experts: a small chart, the chosen share marked.

const WIDTH = 300;
const HEIGHT = 96;
const LEFT = 6;
const RIGHT = 294;
const TOP = 16;
const BOTTOM = 76;

function add(parent, name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

// Draws into `svg`: shares by powers of two from left to right, extra perplexity upwards.
export function drawQuality(svg, points, experts, k) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const all = [...points, { top_k: experts, relative: 0 }];
  const first = Math.log2(all[0].top_k);
  const span = Math.log2(experts) - first || 1;
  const worst = Math.max(...all.map((point) => point.relative), 0.001);
  const x = (n) => LEFT + ((RIGHT - LEFT) * Math.max(0, Math.log2(n) - first)) / span;
  const y = (relative) => BOTTOM - ((BOTTOM - TOP) * Math.max(0, relative)) / worst;

  add(svg, "line", { class: "axis", x1: 0, x2: WIDTH, y1: BOTTOM, y2: BOTTOM });
  if (k !== null) add(svg, "line", { class: "chosen", x1: x(k), x2: x(k), y1: TOP - 8, y2: BOTTOM });
  add(svg, "path", { class: "curve", d: `M${all.map((p) => `${x(p.top_k)} ${y(p.relative)}`).join("L")}` });
  for (const point of all) {
    const at = { cx: x(point.top_k), cy: y(point.relative), r: 3.5 };
    add(svg, "circle", { class: point.top_k === k ? "point chosen-point" : "point", ...at });
    const anchor = point === all[0] ? "start" : point.top_k === experts ? "end" : "middle";
    const shift = anchor === "start" ? -LEFT : anchor === "end" ? LEFT : 0;
    add(svg, "text", { x: at.cx + shift, y: BOTTOM + 14, "text-anchor": anchor }, String(point.top_k));
    if (point.top_k === experts) continue;
    const label = `+${Number((100 * point.relative).toFixed(2))}%`;
    const left = point === all[0];
    add(svg, "text", { x: at.cx + (left ? 8 : 0), y: at.cy - (left ? -4 : 8), "text-anchor": left ? "start" : "middle" }, label);
  }
}
