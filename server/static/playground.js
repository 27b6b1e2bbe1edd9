// Asks the server's own API for two answers at once and shows them as they come. Text is only ever set as text.
"use strict";

const byId = (id) => document.getElementById(id);
const form = byId("ask"), key = byId("key"), stop = byId("stop"), send = byId("send");
let running = null;

const headers = () => {
  const found = { "content-type": "application/json" };
  if (key && key.value) found.authorization = "Bearer " + key.value.trim();
  return found;
};

async function reasonOf(response) {
  try {
    const { error } = await response.json();
    return error.hint ? `${error.message} (${error.hint})` : error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

async function listModels() {
  const note = byId("key-note");
  const response = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  if (!response || !response.ok) {
    if (note && key.value) note.textContent = response ? await reasonOf(response) : "The server does not answer.";
    return;
  }
  const { data } = await response.json();
  byId("models").replaceChildren(...data.map(({ id }) => Object.assign(document.createElement("option"), { value: id })));
  if (note && key.value) note.textContent = `Accepted: ${data.length} ${data.length === 1 ? "model" : "models"} to choose from.`;
}

class Side {
  constructor(name) {
    const section = byId(`side-${name}`);
    this.name = name;
    this.model = byId(`model-${name}`);
    this.figures = section.querySelector(".figures");
    this.answer = section.querySelector(".answer");
  }

  say(text, failed = false) {
    this.figures.textContent = text;
    this.figures.classList.toggle("failure", failed);
  }

  async ask(body, path, signal) {
    this.answer.textContent = "";
    this.answer.setAttribute("aria-busy", "true");
    this.say("");
    this.started = performance.now();
    this.first = this.last = null;
    this.tokens = 0;
    try {
      const response = await fetch(path, {
        method: "POST", headers: headers(), signal, body: JSON.stringify({ ...body, model: this.model.value.trim() }),
      });
      if (!response.ok) return this.say(await reasonOf(response), true);
      await this.read(response.body);
    } catch (error) {
      if (error.name === "AbortError") this.say(this.summary("stopped"));
      else this.say("The connection broke.", true);
    } finally {
      this.answer.setAttribute("aria-busy", "false");
    }
  }

  async read(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", failure = null;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) failure = this.take(line) ?? failure;
    }
    if (failure) this.say(failure, true);
    else this.say(this.summary());
  }

  // One line of the stream; returns what went wrong, if anything did.
  take(line) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") return null;
    const event = JSON.parse(line.slice(6));
    if (event.error) return event.error.message;
    if (event.usage) this.tokens = event.usage.completion_tokens;
    const text = (event.choices ?? []).map((choice) => choice.text ?? choice.delta?.content ?? "").join("");
    if (!text) return null;
    this.last = performance.now();
    this.first ??= this.last;
    const atEnd = this.answer.scrollTop + this.answer.clientHeight >= this.answer.scrollHeight - 8;
    this.answer.append(text);
    if (atEnd) this.answer.scrollTop = this.answer.scrollHeight;
    this.say(this.summary());
    return null;
  }

  summary(ending = "") {
    const parts = [];
    if (this.first !== null) parts.push(`first token ${Math.round(this.first - this.started)} ms`);
    if (this.tokens) parts.push(`${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`);
    // A rate out of a few milliseconds says nothing.
    if (this.tokens > 1 && this.last - this.first > 50) {
      parts.push(`${(((this.tokens - 1) * 1000) / (this.last - this.first)).toFixed(1)} tokens/s`);
    }
    if (ending) parts.push(ending);
    return parts.join(" · ");
  }
}

const sides = [new Side("a"), new Side("b")];

async function askBoth() {
  if (running || !form.reportValidity()) return;
  running = new AbortController();
  stop.disabled = false;
  send.disabled = true;
  const isChat = byId("form").value === "chat", prompt = byId("prompt").value;
  const body = {
    max_tokens: Number(byId("max-tokens").value) || 256,
    temperature: Number(byId("temperature").value) || 0,
    stream: true,
    stream_options: { include_usage: true },
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const path = isChat ? "/v1/chat/completions" : "/v1/completions";
  await Promise.all(sides.map((side) => side.ask(body, path, running.signal)));
  running = null;
  stop.disabled = true;
  send.disabled = false;
}

// The adapters, never the prompt, stand in the address, so that a pair can be handed on.
function rememberPair() {
  const query = new URLSearchParams(sides.map((side) => [side.name, side.model.value.trim()]));
  history.replaceState(null, "", `/?${query}`);
}

form.addEventListener("submit", (event) => { event.preventDefault(); askBoth(); });
stop.addEventListener("click", () => running?.abort());
for (const side of sides) side.model.addEventListener("change", rememberPair);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); askBoth(); }
});
if (key) key.addEventListener("change", listModels);
else listModels();
