// The rolling batch as bars, and the server's own metrics as plots.

import { $, ask, element } from "./page.js";

const BATCH_MS = 300;
const METRICS_MS = 1000;
const KEPT = 300;
const MOST_BARS = 64;

/** Prometheus' text: {name: {labels: value}}, labels as they stand in the text. */
function parse(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^([a-z_]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (match) (found[match[1]] ??= {})[match[2] ?? ""] = Number(match[3]);
  }
  return found;
}

const sum = (series) => Object.values(series ?? {}).reduce((total, value) => total + value, 0);

/** What a counter grew by in a second. It begins again at 0 when the server does. */
const rate = (name) => (now, before, seconds) => Math.max(0, sum(now[name]) - sum(before[name])) / seconds;
const gauge = (name) => (now) => sum(now[name]);

/** A quantile of what a histogram has observed since before, in ms; undefined where that is nothing. */
const quantile = (name, part) => (now, before) => {
  const buckets = Object.entries(now[`${name}_bucket`] ?? {}).map(([labels, count]) =>
    [labels.includes("+Inf") ? Infinity : Number(/le="([^"]+)"/.exec(labels)[1]), count - (before[`${name}_bucket`]?.[labels] ?? 0)])
    .sort(([one], [other]) => one - other);
  const all = buckets.at(-1)?.[1] ?? 0;
  if (all <= 0) return undefined;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= part * all) {
      return 1000 * (bound === Infinity ? low : low + (bound - low) * (part * all - below) / (count - below));
    }
    [low, below] = [bound, count];
  }
};

/** The part of look-ups that found something, in %; undefined where there were none. */
const hits = (found, asked) => (now, before) => {
  const looked = sum(now[asked]) - sum(before[asked]);
  return looked > 0 ? 100 * (sum(now[found]) - sum(before[found])) / looked : undefined;
};

const TTFT = "lmi_time_to_first_token_seconds";
const GAP = "lmi_inter_token_latency_seconds";
/** [title, unit, [label, value of two readings and the seconds between them]...] */
const PLOTS = [
  ["Requests", "", ["running", gauge("lmi_requests_running")], ["waiting", gauge("lmi_requests_waiting")]],
  // lmi_generation_tokens_total grows when a request ends: these two grow with each token.
  ["Tokens generated", "/s", ["", (...readings) => rate(`${TTFT}_count`)(...readings) + rate(`${GAP}_count`)(...readings)]],
  ["Time to first token", "ms", ["p50", quantile(TTFT, 0.5)], ["p95", quantile(TTFT, 0.95)]],
  ["Time between tokens", "ms", ["p50", quantile(GAP, 0.5)], ["p95", quantile(GAP, 0.95)]],
  ["Key/value cache in use", "%", ["", (now) => 100 * sum(now.lmi_kv_cache_usage_ratio)]],
  ["Prefix cache hits", "%", ["", hits("lmi_prefix_cache_hits_total", "lmi_prefix_cache_queries_total")]],
  ["Encoder cache hits", "%", ["", hits("lmi_encoder_cache_hits_total", "lmi_encoder_cache_queries_total")]],
  ["Images", "/s", ["", rate("lmi_images_total")]],
  ["Requests ended", "/s", ["", rate("lmi_requests_finished_total")]],
  ["Errors", "/s", ["", rate("lmi_errors_total")]],
];

let shown = false;
let before, readAt;
const kept = PLOTS.map(([, , ...lines]) => lines.map(() => []));

function path(values, most) {
  let [text, drawing] = ["", false];
  values.forEach((value, at) => {
    if (value === undefined) { drawing = false; return; }
    text += `${drawing ? "L" : "M"}${at + KEPT - values.length},${(47 - 45 * value / most).toFixed(1)}`;
    // A point alone would not be seen.
    if (!drawing) text += "h.5";
    drawing = true;
  });
  return text;
}

const SVG = "http://www.w3.org/2000/svg";

function makePlots() {
  $("plots").replaceChildren(...PLOTS.map(([title, , ...lines]) => {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${KEPT} 48`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    svg.append(...lines.map(() => document.createElementNS(SVG, "path")));
    return element("div", { className: "plot" }, element("h3", { textContent: title }), element("p"), svg);
  }));
}

const round = (value) => value === undefined ? "–" : value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);

function errorsByKind(now) {
  const kinds = Object.entries(now.lmi_errors_total ?? {}).filter(([, count]) => count)
    .map(([labels, count]) => `${/kind="([^"]+)"/.exec(labels)?.[1]} ${count}`);
  return kinds.length ? ` (since the start: ${kinds.join(", ")})` : "";
}

function showPlots(now) {
  PLOTS.forEach(([title, unit, ...lines], number) => {
    const [, text, svg] = $("plots").children[number].children;
    const series = kept[number];
    const most = Math.max(...series.flat().filter((value) => value !== undefined), 1e-9);
    text.textContent = lines.map(([label], line) => `${label} ${round(series[line].at(-1))}`.trim()).join(", ") +
      ` ${unit}` + (title === "Errors" ? errorsByKind(now) : "");
    series.forEach((values, line) => svg.children[line].setAttribute("d", path(values, most)));
  });
}

async function readMetrics() {
  const response = await ask("metrics", { headers: { accept: "text/plain" } });
  if (!response.ok) return;
  const now = parse(await response.text());
  const at = performance.now();
  if (before) {
    PLOTS.forEach(([, , ...lines], number) => lines.forEach(([, value], line) => {
      const values = kept[number][line];
      values.push(value(now, before, (at - readAt) / 1000));
      if (values.length > KEPT) values.shift();
    }));
    if (shown) showPlots(now);
  }
  [before, readAt] = [now, at];
}

async function readBatch() {
  if (!shown) return;
  const response = await ask("engine/state");
  if (!response.ok) return;
  const { requests } = await response.json();
  $("batch-summary").textContent = requests.length
    ? `${requests.length} ${requests.length === 1 ? "request" : "requests"}` +
      (requests.length > MOST_BARS ? `; the ${MOST_BARS} oldest are shown` : "")
    : "No request is running.";
  $("batch").replaceChildren(...requests.slice(0, MOST_BARS).map((request) => {
    const bar = element("div", { className: `bar ${request.phase}` });
    bar.style.width = `${Math.min(100, 100 * request.tokens / request.max_tokens)}%`;
    const images = request.images ? `, ${request.images} ${request.images === 1 ? "image" : "images"}` : "";
    return element("li", {},
      element("div", { className: "track" }, bar),
      element("span", { textContent: `${request.phase}: ${request.tokens} of ${request.max_tokens} tokens${images}, ` +
        `${request.seconds.toFixed(1)} s` }));
  }));
}

/** Call work again and again, also when it fails, with a pause after each call. */
async function repeat(work, pause) {
  for (;;) {
    await work().catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

let started = false;

/** Called when the tab is shown or hidden. Metrics are read from the first time on. */
export function watch(now) {
  shown = now;
  if (!now || started) return;
  started = true;
  makePlots();
  repeat(readMetrics, METRICS_MS);
  repeat(readBatch, BATCH_MS);
}
