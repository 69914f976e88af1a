// The request of the page as commands and programs that run as pasted.

const json = (value, indent) => JSON.stringify(value, null, indent);
/** For single quotes of a shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** JSON with Python's words for what differs from it. Texts are left alone. */
function python(value) {
  return json(value, 4).replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g,
    (all, text, word) => text ?? { true: "True", false: "False", null: "None" }[word]);
}

/** Headers of a shell command; the key is named, not shown, as SageMaker's endpoint is. */
const headers = (hasKey) => "-H 'content-type: application/json'" + (hasKey ? ' -H "authorization: Bearer $API_KEY"' : "");

const curl = (url, body, hasKey) => `curl -s ${quoted(url)} ${headers(hasKey)} -d @- <<'JSON'\n${json(body)}\nJSON\n`;

function openai(base, body, hasKey) {
  const { model, messages, ...rest } = body;
  const known = ["max_tokens", "temperature", "seed", "response_format"];
  const given = Object.entries(rest).filter(([name]) => known.includes(name));
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${json(base + "v1")}, api_key=${hasKey ? 'os.environ["API_KEY"]' : '"none"'})
reply = client.chat.completions.create(
    model=${json(model)},
    messages=${python(messages)},
${given.map(([name, value]) => `    ${name}=${python(value)},\n`).join("")})
print(reply.choices[0].message.content)
`;
}

const sagemaker = (body) => `import os

from sagemaker.deserializers import JSONDeserializer
from sagemaker.predictor import Predictor
from sagemaker.serializers import JSONSerializer

predictor = Predictor(
    os.environ["ENDPOINT_NAME"], serializer=JSONSerializer(), deserializer=JSONDeserializer()
)
reply = predictor.predict(${python(body)})
print(reply["choices"][0]["message"]["content"])
`;

/** TGI's own route takes one text: its images stand in it as Markdown. */
function tgi(base, body, hasKey) {
  const parts = body.messages.flatMap((message) =>
    typeof message.content === "string" ? [message.content] : message.content.map((part) =>
      part.type === "text" ? part.text : `![](${part.image_url.url})`));
  const parameters = { max_new_tokens: body.max_tokens };
  if (body.temperature > 0) Object.assign(parameters, { temperature: body.temperature, do_sample: true });
  if (body.seed !== undefined) parameters.seed = body.seed;
  const schema = body.response_format?.json_schema.schema;
  if (schema) parameters.grammar = { type: "json", value: schema };
  return curl(base + "generate", { inputs: parts.join("\n"), parameters }, hasKey);
}

/**
 * @param kind curl, openai, sagemaker or tgi
 * @param base the server's address, with a slash at its end
 * @param body of a chat request that is not streamed
 */
export function snippet(kind, base, body, hasKey) {
  switch (kind) {
    case "openai": return openai(base, body, hasKey);
    case "sagemaker": return sagemaker(body);
    case "tgi": return tgi(base, body, hasKey);
    default: return curl(base + "v1/chat/completions", body, hasKey);
  }
}
