// Ask a server in every way that the JavaScript clients have, and print what it said as JSON:  node ask.mjs URL IMAGES

import { readFileSync } from "node:fs";
import { HfInference, HfInferenceEndpoint } from "@huggingface/inference-2";
import { InferenceClient } from "@huggingface/inference";
import OpenAI from "openai";

const [url, images] = process.argv.slice(2);
const dataUrl = (name) => `data:image/png;base64,${readFileSync(`${images}/${name}.png`).toString("base64")}`;
const inputs = `![](${dataUrl("red-circle")})What is in this image?\n\n`;
const parameters = { max_new_tokens: 20 };
const messages = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: dataUrl("yellow-star") } },
      { type: "text", text: "What is in this image?" },
    ],
  },
];
const model = "tgi"; // Version 2 asks the hub for one unless it is named.
const asked = { model, messages, max_tokens: 20, temperature: 0 };

const all = async (stream) => {
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return pieces;
};
const joined = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
const spoken = (pieces) => pieces.filter((piece) => !piece.token.special).map((piece) => piece.token.text).join("");
const refusal = async (work) => {
  try {
    await work();
    return null;
  } catch (error) {
    return String(error.message);
  }
};

async function second() {
  const said = {};
  for (const path of ["", "/generate_stream", "/generate"]) {
    const client = new HfInferenceEndpoint(url + path, "unused");
    if (path !== "/generate_stream") said[`text ${path}`] = (await client.textGeneration({ model, inputs, parameters })).generated_text;
    if (path !== "/generate") {
      const pieces = await all(client.textGenerationStream({ model, inputs, parameters }));
      said[`stream ${path}`] = spoken(pieces);
      said[`stream end ${path}`] = pieces.at(-1).generated_text;
    }
  }
  const client = new HfInference("unused");
  said["text by endpointUrl"] = (await client.textGeneration({ model, endpointUrl: url, inputs, parameters })).generated_text;
  const chat = new HfInferenceEndpoint(url, "unused");
  said.chat = (await chat.chatCompletion(asked)).choices[0].message.content;
  said["chat stream"] = joined(await all(chat.chatCompletionStream(asked)));
  said.refused = await refusal(() => chat.textGeneration({ model, inputs: "hi", parameters: { top_p: 7 } }));
  return said;
}

async function current() {
  const said = {};
  const client = new InferenceClient("unused", { endpointUrl: url });
  said.text = (await client.textGeneration({ model, inputs, parameters })).generated_text;
  const pieces = await all(client.textGenerationStream({ model, inputs, parameters }));
  said.stream = pieces.map((piece) => piece.choices?.[0]?.text ?? "").join("");
  said.chat = (await client.chatCompletion(asked)).choices[0].message.content;
  said["chat stream"] = joined(await all(client.chatCompletionStream(asked)));
  const v1 = new InferenceClient("unused", { endpointUrl: `${url}/v1` });
  said["chat at /v1"] = (await v1.chatCompletion(asked)).choices[0].message.content;
  said.refused = await refusal(() => client.chatCompletion({ ...asked, top_p: 7 }));
  said["refused stream"] = await refusal(() => all(client.chatCompletionStream({ ...asked, top_p: 7 })));
  return said;
}

async function openai() {
  const said = {};
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
  const ask = { model: "shapes", ...asked };
  said.chat = (await client.chat.completions.create(ask)).choices[0].message.content;
  said["chat stream"] = joined(await all(await client.chat.completions.create({ ...ask, stream: true })));
  said["final"] = (await client.chat.completions.stream(ask).finalChatCompletion()).choices[0].message.content;
  said.completion = (await client.completions.create({ model: "shapes", prompt: inputs, temperature: 0 })).choices[0].text;
  said.models = (await client.models.list()).data.map((model) => model.id);
  try {
    await client.chat.completions.create({ ...ask, top_p: 7 });
  } catch (error) {
    said.refused = [error.constructor.name, error.status, error.param];
  }
  return said;
}

const said = {};
for (const [name, way] of Object.entries({ second, current, openai })) said[name] = await way();
console.log(JSON.stringify(said));
