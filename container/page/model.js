// What is served, and why: GET /engine/model as a list and a table.

import { $, element } from "./page.js";

const count = (number) => number.toLocaleString("en");
const megabytes = (bytes) => `${count(Math.round(bytes / 2 ** 20))} MiB`;

export function showModel(model) {
  const { limits } = model;
  const rows = [
    ["Model", model.names.join(", ")],
    ["Backend", `${model.backend}: ${model.reason}`],
    ["Data type", model.dtype],
    ["Devices", model.replicas > 1 ? `${model.replicas} replicas, ${model.devices} each` : model.devices],
    ["Context", `${count(model.context)} tokens`],
    ["Key/value cache", model.cache_tokens && `${count(model.cache_tokens)} tokens`],
    ["Images", model.images ? `up to ${limits.images_per_prompt} in a prompt, ${megabytes(limits.image_bytes)} and ` +
      `${count(limits.image_pixels)} pixels each` : "this model does not take images"],
    ["Requests", `bodies of up to ${megabytes(limits.request_bytes)}; ${count(limits.requests)} at a time`],
    ["Version", model.version],
  ];
  $("facts").replaceChildren(
    ...rows.filter(([, text]) => text).flatMap(([name, text]) => [
      element("dt", { textContent: name }), element("dd", { textContent: text })]),
  );
  $("options").tBodies[0].replaceChildren(
    ...model.options.map((option) => element("tr", {},
      element("td", { textContent: option.name }),
      element("td", { textContent: option.value }),
      element("td", { textContent: option.source }))),
  );
  $("documentation").hidden = !model.documentation.length;
  $("documentation").append(...model.documentation.flatMap((name, at) => [
    at ? " · " : "", element("a", { href: `page/docs/${name}`, textContent: name.replace(".md", "") })]));
}
