"""The chat template of models in Mistral's own format, which have none: what mistral_common makes of a chat.

It is the same for the tokenizer's versions 3 and 7 but for where system prompts go and how tool results are written.
Unlike mistral_common it takes an assistant's turn with text and tool calls, and ids of tool calls of any length, of
which the last nine characters count, as with vLLM.
"""

from __future__ import annotations

_TEMPLATE = """\
{%- set ns = namespace(system='', turns=[], users=0, seen=0, text=false) -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if message['content'] is string -%}
    {%- set parts = [{'type': 'text', 'text': message['content']}] -%}
  {%- else -%}
    {%- set parts = message['content'] or [] -%}
  {%- endif -%}
  {%- set calls = (message['tool_calls'] or []) | list -%}
  {%- if role == 'system' and not systems_stand_apart -%}
    {%- for part in parts -%}
      {%- set ns.system = ns.system ~ ('\\n\\n' if ns.system else '') ~ part['text'] -%}
    {%- endfor -%}
  {%- elif ns.turns and ns.turns[-1]['role'] == role and role in ('user', 'assistant') -%}
    {%- set last = ns.turns[-1] -%}
    {%- set joined = {'role': role, 'parts': last['parts'] + parts, 'calls': last['calls'] + calls} -%}
    {%- set ns.turns = ns.turns[:-1] + [joined] -%}
  {%- else -%}
    {%- set turn = {'role': role, 'parts': parts, 'calls': calls, 'id': message['tool_call_id']} -%}
    {%- set ns.turns = ns.turns + [turn] -%}
    {%- set ns.users = ns.users + (1 if role == 'user' else 0) -%}
  {%- endif -%}
{%- endfor -%}
{%- macro texts(parts) -%}
  {%- for part in parts -%}
    {%- if part['type'] != 'text' -%}
      {{- raise_exception('images can stand in user messages only') -}}
    {%- endif -%}
    {{- '' if loop.first else '\\n\\n' -}}{{- part['text'] -}}
  {%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for turn in ns.turns -%}
  {%- set role = turn['role'] -%}
  {%- if loop.first and role not in ('user', 'system') -%}
    {{- raise_exception('the first message must be the user\\'s') -}}
  {%- endif -%}
  {%- if role == 'user' -%}
    {%- set ns.seen = ns.seen + 1 -%}
    {%- if ns.seen == ns.users and tools -%}
      {{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST]' -}}
    {%- if ns.seen == ns.users and ns.system -%}
      {{- ns.system ~ '\\n\\n' -}}
    {%- endif -%}
    {%- set parts = turn['parts'] -%}
    {%- set images = parts | rejectattr('type', 'equalto', 'text') | list | length -%}
    {%- if images == 1 and parts | length > 1 and parts[-1]['type'] != 'text' -%}
      {#- one text and one image: the image comes first -#}
      {%- set parts = [parts[-1]] + parts[:-1] -%}
    {%- endif -%}
    {%- set ns.text = false -%}
    {%- for part in parts -%}
      {%- if part['type'] == 'text' -%}
        {{- '\\n\\n' if ns.text else '' -}}{{- part['text'] -}}
      {%- else -%}
        {{- '[IMG]' -}}
      {%- endif -%}
      {%- set ns.text = part['type'] == 'text' -%}
    {%- endfor -%}
    {{- '[/INST]' -}}
  {%- elif role == 'assistant' -%}
    {{- texts(turn['parts']) -}}
    {%- if turn['calls'] -%}
      {{- '[TOOL_CALLS][' -}}
      {%- for call in turn['calls'] -%}
        {%- set arguments = call['function']['arguments'] -%}
        {%- set arguments = (arguments or '{}') if arguments is string else arguments | tojson -%}
        {{- '{"name": "' ~ call['function']['name'] ~ '", "arguments": ' ~ arguments -}}
        {{- ', "id": "' ~ (call['id'] or '')[-9:] ~ '"}' ~ ('' if loop.last else ', ') -}}
      {%- endfor -%}
      {{- ']' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- elif role == 'tool' -%}
    {%- set result = texts(turn['parts']) -%}
    {%- set id = (turn['id'] or '')[-9:] -%}
    {%- if systems_stand_apart -%}
      {{- '[TOOL_RESULTS]' ~ id ~ '[TOOL_CONTENT]' ~ result ~ '[/TOOL_RESULTS]' -}}
    {%- else -%}
      {%- if result | int | string == result -%}
        {%- set result = result | int -%}
      {%- elif result | float | string == result -%}
        {%- set result = result | float -%}
      {%- endif -%}
      {{- '[TOOL_RESULTS]' ~ ({'content': result, 'call_id': id} | tojson) ~ '[/TOOL_RESULTS]' -}}
    {%- endif -%}
  {%- elif role == 'system' -%}
    {{- '[SYSTEM_PROMPT]' ~ texts(turn['parts']) ~ '[/SYSTEM_PROMPT]' -}}
  {%- else -%}
    {{- raise_exception('the roles of messages are system, user, assistant and tool') -}}
  {%- endif -%}
{%- endfor -%}
"""

_SYSTEMS_STAND_APART = {"v3": False, "v7": True}


def chat_template(version: str) -> str | None:
    """The Jinja source for a version of Mistral's tokenizer; None for one whose chats are not known here."""
    apart = _SYSTEMS_STAND_APART.get(version)
    if apart is None:
        return None
    return f"{{%- set systems_stand_apart = {str(apart).lower()} -%}}\n{_TEMPLATE}"
