// The page: what is on it, and what its controls do. Talking to the server is in api.js, the history in store.js.
import { ApiError, models, status, stream } from "./api.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const STATUS_EVERY_MS = 1000;

let conversations = store.conversations();
let current = conversations[0] ?? begin();
let running = null; // what stops the answer being written
let statusTimer = null;
let lastStatus = new Map(); // of each model: when its tokens were last counted, and how many they were

function begin() {
  return { id: crypto.randomUUID?.() ?? String(Date.now()), messages: [] };
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Conversations

function showConversations() {
  $("conversations").replaceChildren(...conversations.map((one) => {
    const title = one.messages[0]?.content.slice(0, 60) || "empty";
    const open = element("button", { type: "button", className: "open", textContent: title });
    open.setAttribute("aria-current", String(one === current));
    open.addEventListener("click", () => choose(one));
    const drop = element("button", { type: "button", className: "drop", textContent: "×" });
    drop.setAttribute("aria-label", `Delete: ${title}`);
    drop.addEventListener("click", () => remove(one));
    return element("li", {}, open, drop);
  }));
}

function choose(conversation) {
  $("history").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
  if (conversation !== current) {
    running?.abort();
    current = conversation;
    showAll();
  }
  $("prompt").focus();
}

// What is kept now, with the conversations that this tab works on in the place of their copies.
function adopt(kept, ...mine) {
  conversations = kept.map((one) => mine.find((own) => own.id === one.id) ?? one);
  showConversations();
}

function remove(conversation) {
  adopt(store.remove(conversation), current);
  if (conversation.id === current.id) choose(conversations[0] ?? begin());
}

function keep(conversation) {
  adopt(store.save(conversation), conversation, current);
}

// Messages

function showAll() {
  $("messages").replaceChildren(...current.messages.map(messageItem));
  $("error").textContent = "";
  $("speed").textContent = "";
  showConversations();
  showButtons();
  scrollDown();
}

function messageItem(message) {
  const who = message.role === "user" ? "You" : "Model";
  const item = element("li", { className: message.role }, element("div", { className: "who", textContent: who }));
  item.append(element("div", { className: "said", textContent: message.content }));
  return item;
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function showButtons() {
  $("send").disabled = Boolean(running);
  $("stop").disabled = !running;
  $("again").disabled = Boolean(running) || !current.messages.length;
}

function sampling() {
  const given = NUMBERS.filter((id) => $(id).value !== "").map((id) => [id, Number($(id).value)]);
  return Object.fromEntries(given);
}

// `before` is what the answer is to replace, and comes back if there is none.
async function answer(before = []) {
  const conversation = current;
  const system = $("system").value.trim();
  const asked = system ? [{ role: "system", content: system }, ...conversation.messages] : [...conversation.messages];
  const message = { role: "assistant", content: "" };
  const item = messageItem(message);
  item.classList.add("busy");
  $("messages").append(item);
  $("error").textContent = "";
  $("live").textContent = "The model is writing.";
  running = new AbortController();
  const own = running;
  showButtons();
  const request = { model: $("model").value, messages: asked, ...sampling() };
  const pace = new Pace(request.model);
  try {
    for await (const event of stream(request, own.signal)) {
      if (event.content) {
        message.content += event.content;
        pace.token();
        const near = $("messages").scrollHeight - $("messages").scrollTop - $("messages").clientHeight < 80;
        item.lastChild.textContent = message.content;
        if (near && conversation === current) scrollDown();
      }
      if (event.usage) pace.usage(event.usage);
      if (conversation === current) $("speed").textContent = pace.text();
    }
    $("live").textContent = `Answer: ${message.content.slice(0, 2000)}`;
  } catch (error) {
    if (own.signal.aborted) $("live").textContent = "Stopped.";
    else if (conversation === current) tell("error", error);
  }
  pace.end();
  item.classList.remove("busy");
  if (running === own) running = null;
  if (!message.content) item.remove();
  conversation.messages.push(...(message.content ? [message] : before));
  if (conversation === current) {
    if (!message.content) $("messages").append(...before.map(messageItem));
    keep(conversation);
  } else if (conversations.some((one) => one.id === conversation.id)) {
    keep(conversation);
  }
  showButtons();
}

// Tokens a second and drafts that came true, while an answer is written. Until its end tells, the drafts are those of all
// that the model has written since it began.
class Pace {
  #model;
  #begun = performance.now();
  #first = null;
  #tokens = 0;
  #usage = null;
  #before = null;
  #drafts = "";
  #timer = null;

  constructor(model) {
    this.#model = model;
    this.#look();
  }

  token() {
    this.#first ??= performance.now();
    this.#tokens += 1;
  }

  usage(usage) {
    this.#usage = usage;
    this.#tokens = usage.completion_tokens;
    const details = usage.completion_tokens_details;
    const accepted = details?.accepted_prediction_tokens ?? 0;
    this.#drafts = drafts(accepted, accepted + (details?.rejected_prediction_tokens ?? 0)) || "no MTP drafts";
  }

  end() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  text() {
    if (this.#first === null) return "";
    const seconds = (performance.now() - this.#first) / 1000;
    const rate = this.#tokens > 1 && seconds > 0 ? `${((this.#tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const wait = `first after ${((this.#first - this.#begun) / 1000).toFixed(2)} s`;
    return [rate, wait, this.#drafts].filter(Boolean).join(" · ");
  }

  async #look() {
    this.#timer = setTimeout(() => this.#look(), STATUS_EVERY_MS);
    const found = await status().catch(() => null);
    const one = found?.models.find((model) => model.model === this.#model);
    if (!one || !this.#timer || this.#usage) return;
    this.#before ??= one;
    const accepted = one.accepted_tokens - this.#before.accepted_tokens;
    this.#drafts = drafts(accepted, one.drafted_tokens - this.#before.drafted_tokens);
  }
}

function drafts(accepted, drafted) {
  return drafted ? `MTP drafts accepted ${percent(accepted / drafted)} of ${drafted}` : "";
}

function percent(share) {
  return `${Math.round(share * 100)}%`;
}

function tell(id, error) {
  const wantsKey = error instanceof ApiError && error.status === 401;
  $(id).textContent = wantsKey ? "This server asks for an API key: give it under Settings." : error.message;
  if (wantsKey) showSettings(true);
}

// Status

async function showStatus() {
  try {
    const { models: all, draining } = await status();
    $("status-error").textContent = draining ? "The server is shutting down." : "";
    $("status-models").replaceChildren(...all.map(statusTable));
  } catch (error) {
    tell("status-error", error);
  }
  if (!$("status").hidden) statusTimer = setTimeout(showStatus, STATUS_EVERY_MS);
}

function statusTable(one) {
  const now = performance.now();
  const before = lastStatus.get(one.model);
  lastStatus.set(one.model, { now, tokens: one.generated_tokens });
  const rate = before ? ((one.generated_tokens - before.tokens) * 1000) / (now - before.now) : 0;
  const rows = [
    ["Running", meter(one.running, one.max_batch), `${one.running} of ${one.max_batch}`],
    ["Waiting", meter(one.waiting, one.max_queue), `${one.waiting} of ${one.max_queue}`],
    ["Cache in use", meter(one.cache_usage, 1), percent(one.cache_usage)],
    ["Cache kept for prompts to come", meter(one.cache_kept, 1), percent(one.cache_kept)],
    ["Throughput", "", `${rate.toFixed(1)} tokens/s`],
    ["Tokens written", "", one.generated_tokens.toLocaleString()],
    ["Tokens read", "", one.prompt_tokens.toLocaleString()],
    ["Of these found in the cache", "", one.prompt_tokens ? percent(one.cached_tokens / one.prompt_tokens) : "–"],
    ["MTP drafts accepted", "", one.drafted_tokens ? percent(one.accepted_tokens / one.drafted_tokens) : "none drafted"],
    ["Decoder", "", one.decoder],
    ["Prompts", "", one.reader],
  ];
  const table = element("table", {}, element("caption", { textContent: one.model }));
  table.append(...rows.map(([name, bar, value]) => {
    const head = element("th", { textContent: name, scope: "row" });
    return element("tr", {}, head, element("td", {}, bar), element("td", { textContent: value }));
  }));
  return table;
}

function meter(value, max) {
  const bar = element("meter", { min: 0, max, value });
  bar.setAttribute("aria-hidden", "true");
  return bar;
}

// Controls

function showView(name) {
  $("chat").hidden = name !== "chat";
  $("status").hidden = name !== "status";
  $("show-chat").setAttribute("aria-pressed", String(name === "chat"));
  $("show-status").setAttribute("aria-pressed", String(name === "status"));
  clearTimeout(statusTimer);
  if (name === "status") showStatus();
}

function showSettings(open) {
  $("settings").hidden = !open;
  $("show-settings").setAttribute("aria-expanded", String(open));
}

async function loadModels() {
  try {
    const names = await models();
    $("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
    const saved = store.setting("model");
    if (names.includes(saved)) $("model").value = saved;
    $("error").textContent = "";
  } catch (error) {
    tell("error", error);
  }
}

function applyTheme() {
  document.documentElement.dataset.theme = $("theme").value;
}

for (const id of [...NUMBERS, "system", "theme", "model"]) {
  $(id).value = store.setting(id);
  $(id).addEventListener("change", () => store.saveSetting(id, $(id).value));
}
$("theme").addEventListener("change", applyTheme);
$("key").value = store.key();
$("key").addEventListener("change", () => {
  store.saveKey($("key").value);
  loadModels();
});
$("menu").addEventListener("click", () => {
  $("menu").setAttribute("aria-expanded", String($("history").classList.toggle("open")));
});
$("new").addEventListener("click", () => choose(begin()));
$("show-chat").addEventListener("click", () => showView("chat"));
$("show-status").addEventListener("click", () => showView("status"));
$("show-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("stop").addEventListener("click", () => running?.abort());
$("again").addEventListener("click", () => {
  const before = [];
  while (current.messages.at(-1)?.role === "assistant") before.unshift(current.messages.pop());
  showAll();
  answer(before);
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("prompt").value.trim();
  if (!content || running) return;
  current.messages.push({ role: "user", content });
  $("prompt").value = "";
  keep(current);
  showAll();
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});

addEventListener("storage", () => adopt(store.conversations(), current));

applyTheme();
showAll();
loadModels();
