// One generation on the page: its text, its numbers, its heat map.

import { generate } from "./api.js";
import { HeatMap, unpack } from "./heatmap.js";
import { percent } from "./policy.js";

const INVITATION = "Point at a token, or focus the text and use the arrow keys.";
const REASONS = { length: "reached the token limit", eos_token: "ended by itself", stop_sequence: "met a stop text" };

export class Run {
  constructor(title, model, runs) {
    const template = document.getElementById("run-template");
    this.article = template.content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.article.querySelector(selector);
    this.model = model;
    this.title = title;
    this.find("h2").textContent = title;
    this.text = this.find(".text");
    this.text.setAttribute("aria-label", `Output, ${title}`);
    this.tokens = []; // {span, choice, token, ratio}
    this.numbers = {};
    this.current = -1;
    runs.append(this.article);
    this.heat = new HeatMap(this.find("canvas"), model.num_layers, model.experts.num_experts);
    this.#begin("Text appears here, each token shaded by the share of the experts that computed it.");
    this.#describe();
    this.#listen();
  }

  // Sends `body` and shows what comes; rejects as `generate` does. Aborting is an end, not an error.
  async start(body, key, signal) {
    this.#begin(body.inputs);
    this.text.setAttribute("aria-busy", "true");
    this.find(".state").textContent = "waiting for the first token …";
    this.heat.setLive(true);
    const began = performance.now();
    try {
      for await (const event of generate(body, key, signal)) this.#take(event, began);
    } catch (error) {
      if (error.name !== "AbortError") {
        this.find(".state").textContent = "failed";
        throw error;
      }
      this.find(".state").textContent = "stopped";
    } finally {
      this.text.removeAttribute("aria-busy");
      this.heat.setLive(false);
      this.#describe();
      if (this.tokens.length) this.find(".inspect").textContent = INVITATION;
    }
  }

  // What stands before the tokens.
  #begin(text) {
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = text;
    this.text.replaceChildren(given);
  }

  // How many tokens this text and another one have in common at their beginning.
  sharedWith(other) {
    const different = this.tokens.findIndex(({ token }, i) => token.id !== other.tokens[i]?.token.id);
    return different < 0 ? this.tokens.length : different;
  }

  #take(event, began) {
    const now = performance.now();
    const { token } = event;
    const ratio = token.experts.activated_ratio;
    const choice = unpack(token.experts.chosen, this.model.num_layers, this.model.experts.num_experts);
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = token.special ? "" : token.text;
    span.title = `${percent(ratio)} of the experts`;
    span.style.setProperty("--shade", Math.sqrt(ratio).toFixed(3));
    span.dataset.index = this.tokens.length;
    const follows = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    this.text.append(span);
    if (follows) this.text.scrollTop = this.text.scrollHeight;
    this.tokens.push({ span, choice, token, ratio });
    this.heat.add(choice);
    this.firstAt ??= now;
    this.#count(now, began, event.details);
  }

  #count(now, began, details) {
    const made = this.tokens.length;
    this.sum = (this.sum ?? 0) + this.tokens[made - 1].ratio;
    const seconds = (now - this.firstAt) / 1000;
    this.numbers = {
      tokens: made,
      first: this.firstAt - began,
      speed: seconds > 0 ? (made - 1) / seconds : null,
      ratio: this.sum / made,
    };
    const { speed, first, ratio } = this.numbers;
    this.#number("tokens", String(made));
    this.#number("first", first < 1000 ? `${first.toFixed(0)} ms` : `${(first / 1000).toFixed(1)} s`);
    if (speed !== null) this.#number("speed", speed < 10 ? speed.toFixed(1) : speed.toFixed(0));
    this.#number("ratio", percent(ratio));
    this.find(".state").textContent = details ? REASONS[details.finish_reason] ?? "" : "generating …";
  }

  #number(name, value) {
    this.find(`[data-number="${name}"]`).textContent = value;
  }

  #listen() {
    const { text } = this;
    text.addEventListener("pointerover", ({ target }) => {
      if (target.dataset.index) this.#inspect(Number(target.dataset.index));
    });
    text.addEventListener("pointerleave", () => this.#inspect(-1));
    text.addEventListener("focus", () => {
      if (this.current < 0 && this.tokens.length && text.matches(":focus-visible")) this.#inspect(0);
    });
    text.addEventListener("blur", () => this.#inspect(-1));
    text.addEventListener("keydown", (event) => {
      const last = this.tokens.length - 1;
      const to = { ArrowRight: this.current + 1, ArrowLeft: this.current - 1, Home: 0, End: last }[event.key];
      if (to === undefined || last < 0) return;
      event.preventDefault();
      this.#inspect(Math.max(0, Math.min(last, to)));
      this.tokens[this.current].span.scrollIntoView({ block: "nearest" });
    });
    const canvas = this.find("canvas");
    canvas.addEventListener("pointermove", (event) => this.#inspectExpert(this.heat.at(event)));
    canvas.addEventListener("pointerleave", () => this.#inspect(-1));
  }

  // Describes a token below the text and shows its experts; -1: none.
  #inspect(index) {
    this.tokens[this.current]?.span.classList.remove("current");
    this.current = index;
    const found = this.tokens[index];
    this.heat.show(found?.choice ?? null);
    if (!found) {
      this.find(".inspect").textContent = this.tokens.length ? INVITATION : "";
      return;
    }
    const { span, token, ratio } = found;
    span.classList.add("current");
    const shown = JSON.stringify(token.text);
    const logprob = token.logprob.toFixed(2).replace("-", "−");
    const line = `Token ${index + 1} of ${this.tokens.length}, ${shown}: ${percent(ratio)} of the experts; log-probability ${logprob}.`;
    this.find(".inspect").textContent = line;
    if (document.activeElement === this.text) document.getElementById("announce").textContent = line;
  }

  #inspectExpert(place) {
    if (!place || !this.heat.tokens) return;
    const share = this.heat.counts[place.layer][place.expert] / this.heat.tokens;
    this.find(".inspect").textContent =
      `Layer ${place.layer + 1}, expert ${place.expert}: chosen by ${percent(share)} of the tokens.`;
  }

  // The heat map in words: a label, and a table.
  #describe() {
    const { num_layers: layers, experts } = this.model;
    const rows = this.heat.summary();
    const label = this.heat.tokens
      ? rows.map((row, i) => `layer ${i + 1}: ${row.used} of ${experts.num_experts} used`).join("; ")
      : "nothing generated yet";
    this.find("canvas").setAttribute("aria-label", `Heat map of ${layers} layers and ${experts.num_experts} experts: ${label}`);
    this.find(".heat .hint").textContent = this.heat.tokens
      ? `A column an expert, a row a layer: the share of the ${this.heat.tokens} tokens that chose it.`
      : "A column an expert, a row a layer. While text is generated, experts light up as tokens choose them.";
    this.find(".heat details").hidden = !this.heat.tokens;
    this.find("tbody").replaceChildren(
      ...rows.map((row, i) => {
        const most = row.most.map(({ expert, share }) => `${expert} (${percent(share, 0)})`).join(", ");
        const cells = [i + 1, row.used, row.perToken.toFixed(1), most];
        const line = document.createElement("tr");
        line.append(...cells.map((cell, column) => {
          const node = document.createElement(column ? "td" : "th");
          if (!column) node.scope = "row";
          node.textContent = String(cell);
          return node;
        }));
        return line;
      }),
    );
  }
}
