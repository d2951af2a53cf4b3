// Talking to the server this page came from, and to nobody else.
import { key } from "./store.js";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (key()) headers.authorization = `Bearer ${key()}`;
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new ApiError(response.status, told?.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

export async function models() {
  const response = await ask("/v1/models");
  return (await response.json()).data.map((model) => model.id);
}

export async function status() {
  return (await ask("/status")).json();
}

// Pieces of an answer as { content } and, in the end, { usage }.
export async function* stream(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("/v1/chat/completions", { method: "POST", body, signal });
  let whole = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      whole = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(200, event.error.message);
    yield { content: event.choices[0]?.delta.content ?? "", usage: event.usage };
  }
  if (!whole) throw new Error("the connection was lost before the answer was complete");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}
