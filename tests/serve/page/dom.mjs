// As much of a browser as the page needs to run by itself: elements, storage, timers of node, and a server that answers
// as `server` says.
export const server = { pieces: ["one ", "two"], status: 200, pauseMs: 1, drafted: 0, asked: [] };
const made = new Map();

class Element {
  children = [];
  listeners = {};
  dataset = {};
  attributes = {};
  classes = new Set();
  value = "";
  hidden = false;
  disabled = false;
  #text = "";

  get classList() {
    const classes = this.classes;
    return {
      add: (name) => classes.add(name), remove: (name) => classes.delete(name),
      toggle: (name) => (classes.delete(name) ? false : Boolean(classes.add(name))),
    };
  }
  get textContent() {
    return this.#text + this.children.map((one) => one.textContent ?? one).join("");
  }
  set textContent(text) {
    this.children = [];
    this.#text = text;
  }
  get lastChild() {
    return this.children.at(-1);
  }
  append(...more) {
    for (const one of more) if (one instanceof Element) one.parent = this;
    this.children.push(...more);
  }
  replaceChildren(...more) {
    this.children = [];
    this.append(...more);
  }
  remove() {
    this.parent.children = this.parent.children.filter((one) => one !== this);
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  addEventListener(name, act) {
    (this.listeners[name] ??= []).push(act);
  }
  focus() {}
  fire(name, event = {}) {
    if (name === "click" && this.disabled) return;
    for (const act of this.listeners[name] ?? []) act({ preventDefault() {}, ...event });
  }
}

export const $ = (id) => made.get(id) ?? made.set(id, new Element()).get(id);

export class Storage {
  kept = new Map();
  room = Infinity;
  blocked = false;
  getItem(name) {
    if (this.blocked) throw new Error("SecurityError");
    return this.kept.get(name) ?? null;
  }
  setItem(name, value) {
    if (this.blocked || value.length > this.room) throw new Error("QuotaExceededError");
    this.kept.set(name, value);
  }
}

const listeners = {};
globalThis.addEventListener = (name, act) => (listeners[name] = act);
export const tellWindow = (name) => listeners[name]();
globalThis.localStorage = new Storage();
globalThis.sessionStorage = new Storage();
globalThis.document = {
  getElementById: $, createElement: () => new Element(), documentElement: new Element(), addEventListener() {},
};
$("status").hidden = true;

globalThis.fetch = async (path, options = {}) => {
  server.asked.push({ path, options });
  if (path === "/v1/models") return Response.json({ data: [{ id: "small" }] });
  if (path === "/status") {
    server.drafted += 10;
    const one = { model: "small", drafted_tokens: server.drafted, accepted_tokens: server.drafted / 2 };
    return Response.json({ models: [one] });
  }
  if (server.status !== 200) return Response.json({ error: { message: "full" } }, { status: server.status });
  const { signal } = options;
  async function* body() {
    for (const content of server.pieces) {
      await pause(server.pauseMs);
      if (signal.aborted) throw new DOMException("aborted", "AbortError");
      yield event({ choices: [{ delta: { content } }] });
    }
    const details = { accepted_prediction_tokens: 3, rejected_prediction_tokens: 1 };
    yield event({ choices: [], usage: { completion_tokens: 2, completion_tokens_details: details } });
    yield new TextEncoder().encode("data: [DONE]\n\n");
  }
  const source = body();
  return new Response(new ReadableStream({
    async pull(controller) {
      const { value, done } = await source.next();
      done ? controller.close() : controller.enqueue(value);
    },
  }));
};

const event = (content) => new TextEncoder().encode(`data: ${JSON.stringify(content)}\n\n`);
export const pause = (ms) => new Promise((go) => setTimeout(go, ms));
export const stored = () => JSON.parse(localStorage.getItem("benthic.conversations") ?? "[]");
export const roles = (one) => one.messages.map((message) => message.role).join(" ");

export async function until(condition) {
  for (let i = 0; i < 3000 && !condition(); i += 1) await pause(2);
  if (!condition()) throw new Error(`never: ${condition}`);
}

export async function say(text) {
  $("prompt").value = text;
  $("form").fire("submit");
  await until(() => $("stop").disabled);
}

export function same(found, expected) {
  const [left, right] = [found, expected].map((value) => JSON.stringify(value));
  if (left !== right) throw new Error(`${left} is not ${right}`);
}
