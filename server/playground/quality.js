// The checkpoint's quality by share of experts: a small chart, the chosen share marked.

import { signed } from "./policy.js";

const WIDTH = 300;
const HEIGHT = 100;
const LEFT = 6;
const RIGHT = 294;
const TOP = 20;
const BOTTOM = 80;

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
  add(svg, "text", { x: WIDTH, y: 9, "text-anchor": "end" }, "extra perplexity by experts per token");
  all.forEach((point, i) => {
    const [cx, cy] = [x(point.top_k), y(point.relative)];
    add(svg, "circle", { class: point.top_k === k ? "point chosen-point" : "point", cx, cy, r: 3.5 });
    const last = point.top_k === experts;
    const below = { x: i ? (last ? WIDTH : cx) : 0, y: BOTTOM + 15, "text-anchor": i ? (last ? "end" : "middle") : "start" };
    add(svg, "text", below, String(point.top_k));
    if (last) return;
    // Right of a steep curve, otherwise above it.
    const steep = i === 0 || y(all[i - 1].relative) < cy - 12;
    const beside = { x: cx + (i ? (steep ? 3 : 0) : 8), y: cy - (i ? (steep ? 13 : 8) : -4), "text-anchor": steep ? "start" : "middle" };
    add(svg, "text", beside, signed(point.relative));
  });
}
