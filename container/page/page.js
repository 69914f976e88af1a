// Tabs, the key, and what the other scripts share.

import { showModel } from "./model.js";
import { startTry } from "./try.js";
import { watch } from "./watch.js";

export const $ = (id) => document.getElementById(id);

/** An element with properties and children. Text is always set as text, never as markup. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

let key = "";

/** fetch, with the key where one was given. Addresses are relative, so that the page works behind a path. */
export function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  return fetch(path, { ...options, headers });
}

/** What an error's body says, in the words of the server. */
export async function reasonOf(response) {
  const text = await response.text();
  try {
    return errorText(JSON.parse(text)) ?? text;
  } catch {
    return text || `The server answered ${response.status}.`;
  }
}

export function errorText(body) {
  const error = body?.error ?? body?.message;
  return typeof error === "string" ? error : error?.message;
}

const TABS = ["try", "watch", "model"];

function show(chosen) {
  for (const name of TABS) {
    $(name).hidden = name !== chosen;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === chosen));
    $(`tab-${name}`).tabIndex = name === chosen ? 0 : -1;
  }
  watch(chosen === "watch");
}

function startTabs() {
  for (const [number, name] of TABS.entries()) {
    $(`tab-${name}`).addEventListener("click", () => show(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = TABS[(number + step + TABS.length) % TABS.length];
      show(next);
      $(`tab-${next}`).focus();
    });
  }
}

/** Ask about the model until the server is ready, then start what needs it. */
async function start() {
  for (;;) {
    let wait = 1000;
    try {
      const response = await ask("engine/model");
      if (response.ok) {
        const model = await response.json();
        $("status").textContent = "";
        $("key-form").hidden = true;
        $("title").textContent = document.title = model.name;
        showModel(model);
        startTry(model);
        return;
      }
      if (response.status === 401) {
        $("key-form").hidden = false;
        return;
      }
      $("status").textContent = await reasonOf(response);
    } catch {
      $("status").textContent = "The server does not answer; trying again.";
      wait = 3000;
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  start();
});
startTabs();
start();
