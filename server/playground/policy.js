// The expert policy: its controls, its names, and what the checkpoint measured about it.

const element = (id) => document.getElementById(id);

export const percent = (share, digits = 1) => `${Number((100 * share).toFixed(digits))}%`;

export const signed = (relative) =>
  `${relative < 0 ? "−" : "+"}${percent(Math.abs(relative), Math.abs(relative) < 0.1 ? 2 : 1)}`;

// {kind, value} of "top_k:8", "mass:0.95", "dense".
function parse(text) {
  const [kind, value] = text.split(":");
  return { kind, value: Number(value) };
}

export class Policy {
  // Calls `changed` whenever the choice has changed.
  constructor(changed) {
    this.experts = 64;
    this.auto = { kind: "auto" };
    this.quality = [];
    for (const radio of document.getElementsByName("policy"))
      radio.addEventListener("change", () => this.#show(changed));
    // Moving the slider is choosing top k.
    element("k").addEventListener("input", () => {
      document.querySelector('[name="policy"][value="top_k"]').checked = true;
      this.#show(changed);
    });
    element("mass").addEventListener("input", () => this.#show(changed));
    this.changed = changed;
  }

  describe({ num_experts, default_policy, quality }) {
    this.experts = num_experts;
    this.auto = parse(default_policy);
    this.quality = quality;
    element("k").max = num_experts;
    this.#show(this.changed);
  }

  get #kind() {
    return document.querySelector('[name="policy"]:checked').value;
  }

  // What runs: `auto` as what it means here.
  get meaning() {
    const kind = this.#kind;
    if (kind === "auto") return this.auto;
    if (kind === "top_k") return { kind, value: Number(element("k").value) };
    if (kind === "mass") return { kind, value: Number(element("mass").value) / 100 };
    return { kind };
  }

  // The field `experts` of a request.
  get field() {
    const { kind, value } = this.meaning;
    if (this.#kind === "auto" || kind === "dense") return this.#kind;
    return { [kind]: value };
  }

  get isDense() {
    const { kind, value } = this.meaning;
    return kind === "dense" || (kind === "top_k" && value === this.experts);
  }

  get title() {
    const { kind, value } = this.meaning;
    if (kind === "top_k") return `${value} of ${this.experts} experts`;
    if (kind === "mass") return `${percent(value)} of the mass`;
    return kind === "dense" ? "Dense" : "Auto";
  }

  // Experts per token, where that is one number; else null.
  get k() {
    const { kind, value } = this.meaning;
    if (kind === "dense") return this.experts;
    return kind === "top_k" ? value : null;
  }

  get reading() {
    const { kind, value } = this.meaning;
    if (kind === "top_k") return `${value} of ${this.experts} experts = ${percent(value / this.experts)}`;
    if (kind === "dense") return `all ${this.experts} experts: the dense model`;
    if (kind === "mass") return `as few as hold ${percent(value)} of the predicted activation`;
    return "what the checkpoint recommends";
  }

  // What the measured curve says about the choice, in words.
  get verdict() {
    const { k, experts, quality } = this;
    if (k === null) return "How many experts this takes differs from token to token.";
    if (k === experts) return "All experts: what the others are measured against.";
    const at = (point) => `${signed(point.relative)} perplexity at ${point.top_k} of ${experts}`;
    const exact = quality.find((point) => point.top_k === k);
    if (exact) return `${at(exact)}, measured on held-out text.`;
    const below = quality.filter((point) => point.top_k < k).at(-1);
    const above = quality.find((point) => point.top_k > k);
    if (!below) return `Not measured; ${at(above)}.`;
    if (!above) return `Not measured; ${at(below)}, and none with all.`;
    return `Between ${at(above)} and ${signed(below.relative)} at ${below.top_k}.`;
  }

  #show(changed) {
    const mass = this.#kind === "mass";
    element("mass-row").hidden = !mass;
    element("k-row").hidden = mass;
    if (this.k !== null) element("k").value = this.k;
    element("k").setAttribute("aria-valuetext", this.reading);
    element("mass").setAttribute("aria-valuetext", this.reading);
    element("policy-text").textContent = this.reading;
    changed();
  }
}
