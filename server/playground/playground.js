// The page: what the controls say goes to the server, what comes back is shown by `Run`.

import * as api from "./api.js";
import { Policy, percent } from "./policy.js";
import { drawQuality } from "./quality.js";
import { Run } from "./run.js";

const element = (id) => document.getElementById(id);
const SEEDS = 2 ** 31;
const SMALL = 1e8; // parameters
const LOOK_AGAIN = 15_000; // milliseconds between two looks at what is served

let model = null;
let running = null; // the AbortController of what runs

const policy = new Policy(() => {
  if (policy.quality.length) {
    drawQuality(element("quality-chart"), policy.quality, policy.experts, policy.k);
    element("quality-text").textContent = policy.verdict;
  }
  element("quality").hidden = !policy.quality.length;
  update();
});

// Which buttons make sense now.
function update() {
  element("generate").disabled = running !== null || model === null;
  element("compare").disabled = running !== null || model === null || policy.isDense;
  element("compare-hint").textContent = policy.isDense
    ? "To compare, choose fewer experts than all."
    : "Compare runs the same prompt dense as well, one after the other.";
  element("stop-button").disabled = running === null;
}

function fail(error) {
  element("error").textContent = error instanceof api.ServerError ? error.message : `The page failed: ${error.message}`;
  element("error").hidden = false;
  if (error.needsKey) {
    element("access").open = true;
    element("key").focus();
  }
}

function say(message) {
  element("announce").textContent = message;
}

function millions(number) {
  for (const [size, name] of [[1e9, "billion"], [1e6, "million"]])
    if (number >= size) return `${Number((number / size).toPrecision(2))} ${name}`;
  return String(number);
}

// Asks what is served; without an answer nothing can be generated.
async function meet() {
  try {
    model = await api.info(element("key").value);
    element("error").hidden = true;
  } catch (error) {
    model = null;
    element("model").textContent = "Not connected.";
    fail(error);
    update();
    return;
  }
  show();
}

// Asks again, since a new checkpoint may have taken the model's place; who is idle may be told so.
// What is wrong, the next request will say.
async function refresh() {
  if (!model) return;
  const then = running;
  const found = await api.info(element("key").value).catch(() => model);
  if (running !== then) return; // what has begun meanwhile has asked for itself
  if (found.model_sha === model.model_sha && found.model_loaded_at === model.model_loaded_at) return;
  model = found;
  show();
  say(`The server serves another model now: ${model.model_id}.`);
}

function show() {
  const { num_experts, expert_size } = model.experts;
  const facts = [
    model.model_id,
    `${millions(model.model_parameters)} parameters`,
    `${model.num_layers} layers of ${num_experts} experts, ${expert_size} neurons each`,
    `${model.model_dtype} on ${model.model_device_type.toUpperCase()}`,
  ];
  element("model").replaceChildren(...facts.map((fact) => {
    const span = document.createElement("span");
    span.textContent = fact;
    return span;
  }));
  element("max_new_tokens").max = model.max_total_tokens - 1;
  policy.describe(model.experts);
  if (element("runs").querySelector(".token")) return;
  element("runs").replaceChildren();
  new Run("Nothing generated yet", model, element("runs"));
}

function number(id) {
  const input = element(id);
  const name = input.labels[0].textContent.trim();
  if (input.validity.badInput) throw new api.ServerError(`${name} must be a number.`);
  return input.value === "" ? null : Number(input.value);
}

function body(experts, seed) {
  const temperature = number("temperature") ?? 0;
  const stop = element("stop").value.split("\n").filter(Boolean);
  return {
    inputs: element("prompt").value,
    parameters: {
      max_new_tokens: number("max_new_tokens"),
      temperature,
      top_p: temperature > 0 ? number("top_p") : null,
      seed,
      stop: stop.map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t")),
      experts,
      details_experts: true,
    },
  };
}

// Runs what `choose` returns one after the other, so that each has the machine for itself.
async function generate(choose) {
  if (running || !model) return;
  element("error").hidden = true;
  element("verdict").hidden = true;
  running = new AbortController();
  const from = document.activeElement;
  update();
  if (from?.disabled) element("stop-button").focus(); // a disabled button would drop the focus
  try {
    if (!element("prompt").value) throw new api.ServerError("The prompt is empty: write something to continue.");
    await refresh();
    const choices = choose();
    // Two runs draw the same random numbers, so that they differ by their experts alone.
    const seed = number("seed") ?? (choices.length > 1 ? Math.floor(Math.random() * SEEDS) : null);
    const bodies = choices.map(({ experts }) => body(experts, seed));
    element("runs").replaceChildren();
    const runs = choices.map(({ title }) => new Run(title, model, element("runs")));
    // Where the results lie below the controls.
    if (matchMedia("(max-width: 820px)").matches) runs[0].article.scrollIntoView({ block: "start" });
    say("Generating.");
    for (const [i, run] of runs.entries()) {
      if (running.signal.aborted) break;
      await run.start(bodies[i], element("key").value, running.signal);
    }
    finish(runs, running.signal.aborted);
  } catch (error) {
    fail(error);
  } finally {
    running = null;
    const stopHadFocus = document.activeElement === element("stop-button");
    update();
    if (stopHadFocus) (from?.disabled === false ? from : element("generate")).focus();
  }
}

function finish(runs, stopped) {
  const [run, dense] = runs;
  const { tokens, speed, ratio } = run.numbers;
  if (stopped || !tokens) {
    say("Stopped.");
    return;
  }
  say(`Done: ${tokens} tokens, ${Math.round(speed ?? 0)} a second, ${percent(ratio)} of the experts.`);
  if (!dense?.numbers.tokens) return;
  element("verdict").hidden = false;
  if (!speed || !dense.numbers.speed) {
    element("verdict").textContent = "Too few tokens to compare speeds: the text ended at once.";
    return;
  }
  const times = speed / dense.numbers.speed;
  const strong = document.createElement("strong");
  strong.textContent = `${times.toFixed(2)}×`;
  const shared = run.sharedWith(dense);
  const same = shared === tokens && tokens === dense.numbers.tokens
    ? "Both wrote the same text."
    : `The first ${shared} tokens are the same.`;
  const share = percent(ratio / dense.numbers.ratio);
  const small = times < 1.1 && model.model_parameters < SMALL ? " A model this small spends about as much on routing as it saves." : "";
  element("verdict").replaceChildren(strong, `the speed of dense, with ${share} of its experts. ${same}${small}`);
}

const chosen = () => ({ title: policy.title, experts: policy.field });

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate(() => [chosen()]);
});
element("compare").addEventListener("click", () => generate(() => [chosen(), { title: "Dense", experts: "dense" }]));
element("stop-button").addEventListener("click", () => running?.abort());
element("key").addEventListener("change", meet);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("form").requestSubmit(element("generate"));
  if (event.key === "Escape") running?.abort();
});
update();
meet();
setInterval(() => {
  if (!running && !document.hidden) refresh();
}, LOOK_AGAIN);
document.addEventListener("visibilitychange", () => {
  if (!running && !document.hidden) refresh();
});
