"use strict";

const find = (query, within = document) => within.querySelector(query);
const GONE = "the page's server does not answer: start it again";
const sliders = { temperature: 2, share: 2, t_scale: 2, completions: 0, max_tokens: 0 }; // decimals
const shares = { min_p: 0.1, top_p: 0.95 }; // of the cut, as last chosen
let about, panes, running, finished;

// One side: completions one after the other, the bars of their tokens, what they add up to.
class Pane {
  constructor(id) {
    this.root = find(`#${id}`);
    [this.text, this.bars, this.token] = [".text", ".bars", ".token"].map((q) => find(q, this.root));
    this.text.addEventListener("pointerover", (event) => this.point(event.target));
    this.bars.addEventListener("pointerover", (event) => this.point(event.target));
    this.text.addEventListener("keydown", (event) => this.walk(event));
    this.clear();
  }

  clear() {
    [this.drawn, this.valid, this.line, this.at] = [[], [], "", -1];
    this.text.replaceChildren();
    this.bars.replaceChildren();
    this.token.textContent = "T of each token";
  }

  state(name, said) {
    this.root.dataset.state = name;
    this.text.setAttribute("aria-busy", name === "running");
    find(".numbers", this.root).textContent = said;
  }

  // What the tokens so far add up to.
  sums() {
    const T = this.drawn.map((each) => each.temperature);
    if (!T.length) return "no tokens";
    const [least, most] = [Math.min(...T), Math.max(...T)].map((each) => each.toFixed(2));
    const mean = (T.reduce((a, b) => a + b) / T.length).toFixed(2);
    const range = least === most ? `at T = ${least}` : `at T = ${least} to ${most}, mean ${mean}`;
    return `${T.length} tokens ${range}`;
  }

  // How many lines are valid records, where the prompt shows some.
  worth() {
    const counted = this.valid.filter((each) => each !== undefined);
    if (!counted.length) return "";
    return ` · ${counted.filter((each) => each).length} of ${counted.length} are valid records`;
  }

  // The end of the prompt, where the completions begin.
  begin(prompt) {
    const last = prompt.slice(prompt.lastIndexOf("\n") + 1);
    this.note((this.line && "\n") + last);
    this.line = last;
  }

  end(reason, asked) {
    if (reason === "length") this.note(" …");
    const fields = asked.one_line ? keys(asked.prompt.split("\n").find(keys) ?? "") : undefined;
    this.valid.push(fields && keys(this.line) === fields);
    if (fields) this.note(this.valid.at(-1) ? "\u00a0✓" : "\u00a0✗", "a record with all of its keys, and no other");
  }

  note(text, title = "") {
    const note = document.createElement("span");
    note.className = "note";
    note.textContent = text;
    note.title = title;
    this.text.append(note);
  }

  add(token) {
    const n = this.drawn.push(token) - 1;
    const span = document.createElement("span");
    span.className = "drawn";
    span.textContent = token.text;
    span.title = `T = ${token.temperature.toFixed(2)}`;
    span.dataset.n = n;
    span.dataset.temperature = token.temperature;
    span.style.background = `rgb(var(--orange) / ${token.opacity})`;
    this.text.append(span);
    this.line += token.text;

    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = Math.min(token.temperature, about.shade.hottest);
    const places = { x: n + 0.1, width: 0.8, y: about.shade.hottest - height, height };
    for (const [name, value] of Object.entries(places)) bar.setAttribute(name, value);
    bar.dataset.n = n;
    this.bars.append(bar);
    const width = Math.max(...panes.map((each) => each.drawn.length), 40);
    for (const each of panes) each.bars.setAttribute("viewBox", `0 0 ${width} ${about.shade.hottest}`);
    this.bars.setAttribute("aria-label", `Temperature of each token: ${this.sums()}`);
  }

  point(element) {
    if (element.dataset.n !== undefined) this.show(Number(element.dataset.n));
  }

  show(n) {
    for (const old of this.root.querySelectorAll(".at")) old.classList.remove("at");
    for (const each of this.root.querySelectorAll(`[data-n="${n}"]`)) each.classList.add("at");
    this.at = n;
    const code = document.createElement("code");
    code.textContent = JSON.stringify(this.drawn[n].text);
    const T = this.drawn[n].temperature.toFixed(3);
    this.token.replaceChildren(`token ${n + 1} `, code, ` at T = ${T}`);
  }

  walk(event) {
    const last = this.drawn.length - 1;
    const to = {
      ArrowRight: Math.min(this.at + 1, last), ArrowLeft: Math.max(this.at - 1, 0), Home: 0, End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.token.setAttribute("role", "status"); // read out where somebody walks
    this.show(to);
  }

  async run(asked, times, signal) {
    this.clear();
    this.state("running", "…");
    try {
      for (let i = 0; i < times; i++) await this.complete(asked, signal);
      this.state("done", this.sums() + this.worth());
    } catch (error) {
      if (signal.aborted) return this.state("stopped", `${this.sums()} · stopped`);
      this.state("error", `${this.sums()} · broken off`);
      complain(error instanceof TypeError ? GONE : error.message);
    }
  }

  async complete(asked, signal) {
    this.begin(asked.prompt);
    for await (const event of events(asked, signal)) {
      signal.throwIfAborted(); // what had come with the last token shown
      if (event.error !== undefined) throw new Error(event.error);
      if (event.request) find(".request", this.root).textContent = JSON.stringify(event.request, null, 1);
      if (event.text !== undefined) this.add(event);
      if (event.end !== undefined) return this.end(event.end, asked);
    }
    throw new Error(GONE);
  }
}

// The keys of a JSON object, sorted, as a text; undefined for any other text.
function keys(text) {
  try {
    const value = JSON.parse(text);
    return value instanceof Object && !Array.isArray(value) ? Object.keys(value).sort().join() : undefined;
  } catch { return undefined; }
}

// The lines of JSON of an answer, as they come.
async function* events(asked, signal) {
  const answer = await fetch("/complete", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked), signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines) if (line) yield JSON.parse(line);
    if (done) return;
  }
}

function complain(said) {
  const problem = find("#problem");
  problem.hidden = !said;
  problem.textContent = said;
}

function asked() {
  const number = (id) => find(`#${id}`).valueAsNumber;
  const [cut, both] = [find("#cut").value, {
    prompt: find("#prompt").value, max_tokens: number("max_tokens"), one_line: find("#one_line").checked,
  }];
  const static_ = { ...both, adaptive: false, temperature: number("temperature") };
  if (cut !== "none") static_[cut] = number("share");
  return [static_, { ...both, adaptive: true, t_scale: number("t_scale") }];
}

function describe() {
  for (const [id, decimals] of Object.entries(sliders)) {
    const input = find(`#${id}`);
    input.nextElementSibling.textContent = input.valueAsNumber.toFixed(decimals);
  }
  const cut = find("#cut");
  find("#share-label").hidden = cut.value === "none";
  const name = cut.value === "none" ? "no cut" : `${cut.selectedOptions[0].text} ${find("#share").value}`;
  find("#static-title small").textContent = `T = ${find("#temperature").value}, ${name}`;
  find("#adaptive-title small").textContent = `T of the head × ${find("#t_scale").value}, Min-P ${about.min_p}`;
  for (const button of document.querySelectorAll(".examples button"))
    button.setAttribute("aria-pressed", button.value === find("#prompt").value);
}

async function generate() {
  running?.abort();
  const own = (running = new AbortController());
  await finished;
  if (running !== own) return; // asked again meanwhile
  complain("");
  describe();
  find("#stop").disabled = false;
  const times = find("#completions").valueAsNumber;
  finished = Promise.all(asked().map((each, i) => panes[i].run(each, times, own.signal)));
  await finished;
  if (running === own) find("#stop").disabled = true;
}

async function start() {
  about = await (await fetch("/about")).json();
  const { hottest, orange, deepest } = about.shade;
  document.documentElement.style.setProperty("--orange", orange.join(" "));
  document.documentElement.style.setProperty("--deepest", deepest);
  find("#hottest").textContent = `T = ${hottest} and above`;
  find("#api").textContent = `${about.api}, model ${about.model}`;
  for (const { name, prompt } of about.examples) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: name, value: prompt });
    button.addEventListener("click", () => { find("#prompt").value = prompt; describe(); });
    find(".examples").append(button);
  }
  shares.min_p = about.static.min_p;
  // What the address says wins: ?prompt=…&max_tokens=…&temperature=…&t_scale=…&cut=…&share=…&completions=…&one_line=0&go=1
  const given = new URLSearchParams(location.search);
  const is = (name, otherwise) => given.has(name) ? !["0", "false"].includes(given.get(name)) : otherwise;
  const cuts = Array.from(find("#cut").options, (each) => each.value);
  const asksFor = given.get("cut") ?? "min_p";
  const cut = cuts.includes(asksFor) ? asksFor : "min_p";
  const first = {
    prompt: about.examples[0].prompt, temperature: about.static.temperature,
    share: shares[cut] ?? shares.min_p, t_scale: about.t_scale, completions: 4, max_tokens: 40,
  };
  for (const [id, value] of Object.entries(first)) find(`#${id}`).value = given.get(id) ?? value;
  find("#cut").value = cut;
  find("#one_line").checked = is("one_line", true);

  panes = [new Pane("static"), new Pane("adaptive")];
  const form = find("#ask");
  form.addEventListener("input", (event) => {
    if (event.target.id === "cut" && shares[event.target.value]) find("#share").value = shares[event.target.value];
    if (event.target.id === "share") shares[find("#cut").value] = event.target.valueAsNumber;
    describe();
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); generate(); });
  find("#stop").addEventListener("click", () => running.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
  describe();
  if (cut !== asksFor) complain(`cut must be one of ${cuts.join(", ")}, got ${asksFor}`);
  else if (is("go", false)) generate();
}

start().catch(() => complain(GONE));
