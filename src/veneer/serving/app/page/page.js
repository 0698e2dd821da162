// The page asks the same routes as every other client. Whatever comes from the server is put in as text, never as HTML.

const get = (id) => document.getElementById(id);
const MOST_SHOWN = 200, MOST_ASKED = 12, LOOK_EVERY = 1000, LIST_EVERY = 10000, TRACE = 120;
const READERS = { classify: "classify", multilabel: "classify", regress: "classify", rank: "classify", tag: "tag", seq2seq: "translate" };
const state = { key: sessionStorage.getItem("key") || "", base: "", adapters: [], chosen: new Set(), trace: [], before: null, stop: null };

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function call(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (state.key) headers.authorization = `Bearer ${state.key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  let said = `The server answered ${answer.status}.`;
  try { said = (await answer.json()).error.message; } catch { /* no error object: the status has to do */ }
  throw new Refused(answer.status, said);
}

const json = async (path) => (await call(path)).json();

function make(tag, properties = {}, ...children) {
  const { label, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  if (label) made.dataset.label = label;
  made.append(...children);
  return made;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let i = 0;
  while (bytes >= 1024 && i < units.length - 1) { bytes /= 1024; i += 1; }
  return `${bytes.toFixed(i && bytes < 100 ? 1 : 0)} ${units[i]}`;
}

function notice(text) {
  get("notice").textContent = text || "";
  get("notice").hidden = !text;
}

function troubled(error) {
  if (error.name === "AbortError") return;
  get("door").hidden = error.status !== 401;
  notice(error.status === 401 ? "" : error instanceof Refused ? error.message : "The server does not answer.");
  if (error.status === 401 && document.activeElement === document.body) get("key").focus();
}

// -- adapters ----------------------------------------------------------------------------------------------------

async function list() {
  const [models, adapters] = await Promise.all([json("/v1/models"), json("/v1/adapters")]);
  state.base = models.data[0].id;
  get("base").textContent = state.base;
  get("on").textContent = `on ${state.base}`;
  document.title = `${state.base} · veneer`;
  const is_first = !state.adapters.length && !state.chosen.size;
  state.adapters = adapters.data;
  if (is_first) {
    for (const one of [{ id: state.base }, ...state.adapters].slice(0, 3)) state.chosen.add(one.id);
  }
  const known = new Set([state.base, ...state.adapters.map((one) => one.id)]);
  for (const name of state.chosen) if (!known.has(name)) state.chosen.delete(name);
  show();
}

function show() {
  const wanted = get("find").value.trim().toLowerCase();
  const base = { id: state.base, method: "the base alone", task: "", state: "", version: "" };
  const all = [base, ...state.adapters];
  const found = all.filter((one) => `${one.id} ${one.method} ${one.task || ""}`.toLowerCase().includes(wanted));
  const rows = found.slice(0, MOST_SHOWN).map(row);
  const focused = document.activeElement && document.activeElement.id;
  get("adapters").tBodies[0].replaceChildren(...rows);
  if (focused && focused.startsWith("ask-")) get(focused)?.focus();
  get("adapters").classList.toggle("no-task", !state.adapters.some((one) => one.task));
  get("adapters").classList.toggle("no-score", !state.adapters.some((one) => one.score != null));
  get("none").hidden = state.adapters.length > 0;
  get("more").hidden = found.length <= MOST_SHOWN;
  get("more").textContent = `${found.length - MOST_SHOWN} more: find them by name, method or task.`;
  count();
}

function row(one, i) {
  const id = `ask-${one.id}`;
  const tick = make("input", { type: "checkbox", id, checked: state.chosen.has(one.id) });
  tick.addEventListener("change", () => { state.chosen[tick.checked ? "add" : "delete"](one.id); count(); });
  const score = one.score == null ? "" : `${Math.round(one.score * 1000) / 1000}${one.metric ? ` ${one.metric}` : ""}`;
  const is_bad = one.state === "failed";
  return make("tr", {},
    make("td", { className: "tick" }, tick),
    make("th", { scope: "row" }, make("label", { htmlFor: id }, one.id)),
    make("td", { className: "text" }, one.method),
    make("td", { className: "text", label: "task" }, one.task || ""),
    make("td", { label: "size" }, one.bytes ? size(one.bytes) : ""),
    make("td", { label: "score" }, score),
    make("td", { className: is_bad ? "text failed" : "text", title: one.reason || "" }, one.state),
    make("td", { className: "text version", title: one.version }, one.version.replace("sha256:", "").slice(0, 10)));
}

function count() {
  const n = state.chosen.size;
  const too_many = `${n} are chosen; at most ${MOST_ASKED} are asked at a time.`;
  get("chosen").textContent = n > MOST_ASKED ? too_many : `${n} chosen`;
  get("whom").textContent = n > MOST_ASKED ? too_many : n ? `Asks ${[...state.chosen].join(", ")}.` : "Nobody is chosen.";
  get("go").disabled = !n || n > MOST_ASKED || state.stop !== null;
}

// -- asking ------------------------------------------------------------------------------------------------------

async function ask() {
  if (get("go").disabled || !get("prompt").value) return;
  const stop = state.stop = new AbortController();
  get("stop").disabled = false;
  count();
  const names = [state.base, ...state.adapters.map((one) => one.id)].filter((name) => state.chosen.has(name));
  const cards = names.map(card);
  get("answers").replaceChildren(...cards.map((one) => one.box));
  get("said").textContent = `Asking ${names.length}.`;
  await Promise.all(cards.map((one) => answer(one, stop.signal)));
  state.stop = null;
  get("stop").disabled = true;
  count();
  const failed = cards.filter((one) => one.box.classList.contains("failed")).length;
  get("said").textContent = `${names.length - failed} answered${failed ? `, ${failed} failed` : ""}.`;
}

function card(name) {
  const found = state.adapters.find((one) => one.id === name);
  const text = make("div", { className: "text" }), facts = make("p", { className: "facts-line" });
  const box = make("article", {}, make("h3", {}, name, make("small", {}, found ? found.method : "the base alone")), text, facts);
  box.setAttribute("aria-busy", "true");
  return { name, task: found && found.task, box, text, facts };
}

async function answer(one, signal) {
  try {
    await (READERS[one.task] ? read(one, signal) : write(one, signal));
  } catch (error) {
    if (error.name === "AbortError") {
      one.facts.textContent += one.facts.textContent ? ", stopped" : "stopped";
    } else {
      one.box.classList.add("failed");
      one.text.textContent += `${one.text.textContent ? "\n" : ""}${error.message}`;
    }
  }
  one.box.setAttribute("aria-busy", "false");
}

async function read(one, signal) {
  const began = performance.now();
  const kind = READERS[one.task];
  const body = JSON.stringify({ model: one.name, input: get("prompt").value });
  const found = (await (await call(`/v1/${kind}`, { method: "POST", body, signal })).json()).data[0];
  const percent = (p) => `${(100 * p).toFixed(1)} %`;
  if (kind === "translate") one.text.textContent = found.text;
  else if (kind === "tag") one.text.textContent = found.tags.map((t) => `${get("prompt").value.slice(t.start, t.end)}\t${t.label}`).join("\n");
  else if (found.scores && !Array.isArray(found.scores)) {
    const all = Object.entries(found.scores).sort((a, b) => b[1] - a[1]).slice(0, 8);
    one.text.textContent = all.map(([label, p]) => `${label}  ${percent(p)}`).join("\n");
  } else one.text.textContent = found.label == null ? String(found.score) : `${found.label}  ${percent(found.score)}`;
  one.facts.textContent = `${((performance.now() - began) / 1000).toFixed(2)} s`;
}

async function write(one, signal) {
  const began = performance.now();
  const is_chat = get("form").value === "chat";
  const asked = {
    model: one.name, max_tokens: Number(get("tokens").value) || 80, temperature: Number(get("temperature").value) || 0,
    stream: true, stream_options: { include_usage: true }, seed: Number(get("seed").value) || 0,
    ...(is_chat ? { messages: [{ role: "user", content: get("prompt").value }] } : { prompt: get("prompt").value }),
  };
  const path = is_chat ? "/v1/chat/completions" : "/v1/completions";
  const reply = await call(path, { method: "POST", body: JSON.stringify(asked), signal });
  let first = 0, tokens = 0, finish = "";
  const facts = (made) => {
    const seconds = (performance.now() - first) / 1000;
    const speed = made > 1 && seconds > 0.05 ? `, ${((made - 1) / seconds).toFixed(1)} a second` : "";
    const end = finish === "length" ? ", cut at the limit" : "";
    one.facts.textContent = `${made} tokens${speed}, first after ${((first - began) / 1000).toFixed(2)} s${end}`;
  };
  for await (const chunk of events(reply.body)) {
    if (chunk.error) throw new Refused(0, chunk.error.message);
    for (const choice of chunk.choices) {
      const piece = is_chat ? choice.delta.content : choice.text;
      if (piece) {
        if (!first) first = performance.now();
        one.text.append(piece);
        tokens += 1;
        facts(tokens);
      }
      finish = choice.finish_reason || finish;
    }
    if (chunk.usage && first) facts(chunk.usage.completion_tokens);
  }
  if (!one.text.textContent) one.facts.textContent = "an empty answer";
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// -- live load ---------------------------------------------------------------------------------------------------

async function look() {
  const load = await json("/v1/load");
  const now = performance.now();
  const before = state.before;
  const speed = before && load.generated >= before.generated ? (load.generated - before.generated) / ((now - before.at) / 1000) : 0;
  state.before = { generated: load.generated, at: now };
  state.trace.push(speed);
  if (state.trace.length > TRACE) state.trace.shift();
  get("rows").textContent = load.rows;
  get("slots").textContent = load.slots;
  get("queue").textContent = load.queue;
  get("memory").textContent = load.in_memory;
  get("memory-word").textContent = load.in_memory === 1 ? "adapter" : "adapters";
  get("training").hidden = !load.training;
  get("jobs").textContent = load.training;
  get("jobs-word").textContent = load.training === 1 ? "job trains" : "jobs train";
  get("bytes").textContent = size(load.resident_bytes);
  get("speed").textContent = speed < 10 ? speed.toFixed(1) : Math.round(speed);
  notice(load.draining ? "The server is stopping: what runs is answered, nothing new is let in." : "");
  get("door").hidden = true;
  draw();
}

function draw() {
  const top = Math.max(1, ...state.trace), from = TRACE - state.trace.length;
  const points = state.trace.map((v, i) => `${(2 * (from + i)).toFixed(0)},${(39 - (35 * v) / top).toFixed(1)}`);
  const line = points.length ? `M${points.join("L")}` : "";
  get("trace").querySelector(".line").setAttribute("d", line);
  get("trace").querySelector(".area").setAttribute("d", line && `${line}L${2 * (TRACE - 1)},40L${2 * from},40Z`);
}

async function again(work, every) {
  let wait = every;
  if (!document.hidden) {
    try {
      await work();
    } catch (error) {
      troubled(error);
      wait = Math.max(every, 2000);
    }
  }
  setTimeout(again, wait, work, every);
}

async function begin() {
  try { await list(); notice(""); } catch (error) { troubled(error); }
}

get("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
get("stop").addEventListener("click", () => state.stop?.abort());
get("find").addEventListener("input", show);
get("door").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = get("key").value;
  sessionStorage.setItem("key", state.key);
  begin();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
  if (event.key === "Escape") state.stop?.abort();
});
again(list, LIST_EVERY);
again(look, LOOK_EVERY);
