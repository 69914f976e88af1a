// A chat with images. It lives in this tab's memory only.

import { $, ask, element, errorText, reasonOf } from "./page.js";
import { snippet } from "./snippets.js";

let model;
/** Turns as they are sent: {role, text, images: [{url, name}], note}. */
let turns = [];
/** Images of the message that is being written. */
let images = [];
/** Of the answer that is being written, else null. */
let running = null;

const asUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

async function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      $("problem").textContent = `${file.name} is not an image.`;
      continue;
    }
    images.push({ url: await asUrl(file), name: file.name || "pasted image" });
  }
  showImages();
}

function showImages() {
  $("images").replaceChildren(...images.map((image, at) => {
    const move = (step) => {
      const [moved] = images.splice(at, 1);
      images.splice(at + step, 0, moved);
      showImages();
      $("images").children[at + step].querySelector("button").focus();
    };
    const button = (text, label, work, disabled) => {
      const made = element("button", { type: "button", textContent: text, disabled });
      made.setAttribute("aria-label", label);
      made.addEventListener("click", work);
      return made;
    };
    const item = element("li", { draggable: true },
      element("img", { src: image.url, alt: image.name, draggable: false }),
      element("span", {},
        button("←", `Move ${image.name} to the left`, () => move(-1), at === 0),
        button("×", `Remove ${image.name}`, () => { images.splice(at, 1); showImages(); $("question").focus(); }),
        button("→", `Move ${image.name} to the right`, () => move(1), at === images.length - 1)));
    item.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/x-position", String(at)));
    item.addEventListener("drop", (event) => {
      const from = event.dataTransfer.getData("text/x-position");
      if (from === "") return;
      event.preventDefault();
      event.stopPropagation();
      $("composer").classList.remove("over");
      images.splice(at, 0, ...images.splice(Number(from), 1));
      showImages();
    });
    return item;
  }));
}

// The request

function content(turn) {
  if (!turn.images?.length) return turn.text;
  const parts = turn.images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return turn.text ? [...parts, { type: "text", text: turn.text }] : parts;
}

/** The body of a request with these turns. Throws where a parameter cannot be read. */
function bodyOf(asked) {
  const messages = asked.map((turn) => ({ role: turn.role, content: content(turn) }));
  const system = $("system").value.trim();
  if (system) messages.unshift({ role: "system", content: system });
  const body = { model: model.name, messages, max_tokens: Number($("max-tokens").value) || 256 };
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  if ($("schema").value.trim()) {
    let schema;
    try {
      schema = JSON.parse($("schema").value);
    } catch (error) {
      throw new Error(`The JSON schema is not JSON: ${error.message}`);
    }
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  return body;
}

/** The turns, and what is being written as one more. A question that failed is left out, and so is its error. */
function withDraft() {
  const text = $("question").value.trim();
  const kept = turns.filter((turn, at) => !turn.error && !turns[at + 1]?.error);
  return text || images.length ? [...kept, { role: "user", text, images }] : turns;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer() {
  let body;
  try {
    body = bodyOf(turns);
  } catch (error) {
    $("problem").textContent = error.message;
    return;
  }
  $("problem").textContent = "";
  const turn = { role: "assistant", text: "", note: "" };
  turns.push(turn);
  running = new AbortController();
  const { signal } = running;
  showTurns();
  showRunning();
  const began = performance.now();
  let first, usage;
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (!response.ok) throw new Error(await reasonOf(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(errorText(event));
      usage = event.usage ?? usage;
      const text = event.choices?.[0]?.delta?.content;
      if (text) {
        first ??= performance.now();
        turn.text += text;
        showText(turn);
      }
      if (event.choices?.[0]?.finish_reason === "length") turn.cut = true;
    }
  } catch (error) {
    if (signal.aborted) turn.note = "stopped";
    else turn.error = error.message;
  }
  running = null;
  if (usage) turn.note = cost(usage, began, first ?? performance.now(), turn.cut);
  showTurns();
  showRunning();
}

function cost(usage, began, first, cut) {
  const ended = performance.now();
  const seconds = (ended - first) / 1000;
  const tokens = usage.completion_tokens;
  const imageTokens = usage.prompt_tokens_details?.image_tokens ?? 0;
  return [
    `${usage.prompt_tokens} prompt tokens${imageTokens ? `, ${imageTokens} of them images` : ""}`,
    `${tokens} tokens${cut ? " (cut at the most allowed)" : ""}`,
    `first after ${Math.round(first - began)} ms`,
    ...(tokens > 1 && seconds > 0 ? [`${((tokens - 1) / seconds).toFixed(1)} tokens/s`] : []),
  ].join(" · ");
}

// What is shown

function small(text, work) {
  const button = element("button", { type: "button", textContent: text, disabled: Boolean(running) });
  button.addEventListener("click", work);
  return button;
}

function showTurns() {
  $("turns").replaceChildren(...turns.map((turn, at) => {
    const footer = element("footer", {}, turn.note ?? "");
    if (turn.role === "user") footer.append(small("Edit", () => edit(at)));
    else if (at === turns.length - 1 && !running) footer.append(small("Regenerate", () => { turns.length = at; answer(); }));
    const shown = element("article", { className: `turn ${turn.role}` });
    shown.setAttribute("aria-label", turn.role === "user" ? "You" : "Answer");
    if (turn.images?.length) {
      shown.append(element("div", { className: "images" },
        ...turn.images.map(({ url, name }) => element("img", { src: url, alt: name }))));
    }
    shown.append(element("p", { className: "text", textContent: turn.text }));
    if (turn.error) shown.append(element("p", { className: "error", textContent: turn.error }));
    shown.append(footer);
    return shown;
  }));
  $("examples").hidden = turns.length > 0 || !model.examples.length;
  $("turns").scrollTop = $("turns").scrollHeight;
}

function showText(turn) {
  $("turns").lastElementChild.querySelector(".text").textContent = turn.text;
}

function showRunning() {
  const busy = Boolean(running);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("clear").disabled = busy;
}

/** Take a turn back into the message that is being written; what followed it goes. */
function edit(at) {
  const turn = turns[at];
  turns.length = at;
  images = [...turn.images];
  $("question").value = turn.text;
  showTurns();
  showImages();
  $("question").focus();
}

function send() {
  if (running) return;
  const draft = withDraft();
  if (draft === turns) {
    $("problem").textContent = "Type a message or add an image.";
    return;
  }
  turns = draft;
  images = [];
  $("question").value = "";
  showImages();
  answer();
}

async function copy() {
  const asked = withDraft();
  const last = asked.findLastIndex((turn) => turn.role === "user");
  if (last < 0) {
    $("problem").textContent = "There is no request to copy yet: type a message.";
    return;
  }
  try {
    const body = bodyOf(asked.slice(0, last + 1));
    await navigator.clipboard.writeText(snippet($("copy-as").value, new URL(".", location.href).href, body, model.key));
    $("status").textContent = "Copied.";
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

async function useExample({ question, image }) {
  const response = await ask(image);
  await addFiles([new File([await response.blob()], image.split("/").at(-1), { type: response.headers.get("content-type") })]);
  $("question").value = question;
  send();
}

function showExamples() {
  $("examples").replaceChildren(...model.examples.map((example) => {
    const button = element("button", { type: "button" },
      element("img", { src: example.image, alt: "" }), element("span", { textContent: example.question }));
    button.addEventListener("click", () => useExample(example));
    return button;
  }));
}

export function startTry(served) {
  model = served;
  $("max-tokens").max = model.context;
  $("schema-label").hidden = !model.structured_outputs;
  if (!model.images) {
    for (const label of document.querySelectorAll("label[for=files]")) label.hidden = true;
    $("question").placeholder = "Ask something";
  }
  showExamples();
  showTurns();

  const composer = $("composer");
  composer.addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    turns = [];
    $("problem").textContent = "";
    showTurns();
    $("question").focus();
  });
  $("copy").addEventListener("click", copy);
  $("files").addEventListener("change", async () => {
    await addFiles($("files").files);
    $("files").value = "";
  });
  // Files may be dropped anywhere on the page; elsewhere the browser would open them.
  addEventListener("dragover", (event) => {
    event.preventDefault();
    composer.classList.toggle("over", event.dataTransfer.types.includes("Files"));
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) composer.classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    composer.classList.remove("over");
    addFiles(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
  });
}
