"""From turns, text and images to token ids: the model's chat template, with client text kept literal."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from handlers.errors import InvalidRequest, ServingError
from handlers.prompts.chat_templates import ChatTemplates, TemplateSource
from handlers.prompts.special_tokens import SEARCH_WINDOW, ControlTokens, Hidden, LiteralEncoder, encode, token_places
from handlers.protocols.body import SHORT_BYTES
from handlers.protocols.body_limits import MAX_DEPTH, check_body, depth
from handlers.request import ChatPrompt, Message, TextPart, TextPrompt, media_parts, prompt_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.families.preprocessor import PlaceholderText, Preprocessor

log = logging.getLogger(__name__)

_LONGEST_REASON = 300
_LONGEST_PROMPT = 2**22
_CHARACTERS_PER_TOKEN = 4
"""A rough mean for the longest text: with it, a prompt that will be truncated may have 8 times the context."""

_FEWEST_TOKENS = 2**20
"""The number of tokens that every prompt may have before it is truncated."""

_OURS = {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
"""Template variables that requests set by fields of their own."""

_Tokens = tuple[list[int], list[tuple[int, int]] | None]
"""The ids of tokens and, if asked for, the place of each in the text."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as text and as tokens.

    Attributes:
        text: The prompt for people to read.
        token_ids: Its tokens, with exactly one image token for each image, in reading order.
        n_images: The number of images.
        spans: The (start, stop) of each token in `text`, in characters; (0, 0) for a token that the tokenizer added.
            None if they were not asked for, or if the client sent token ids.
    """

    text: str
    token_ids: list[int]
    n_images: int
    spans: list[tuple[int, int]] | None = None


class PromptRenderer:
    """Renders prompts for one model. Pure and CPU-bound: long prompts belong in a worker thread.

    Attributes:
        longest: The most characters of a prompt, or tokens that a client sends, before it is refused unread. Encoding
            takes some hundred bytes of memory and a microsecond for each. Set it once the model's context is known.
        templates: The model's chat templates.
        image_token_id: The token that stands for an image; None for a model that takes no images.
        placeholder: The text that stands for an image in a prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: ChatTemplates | str | None,
        content_format: Literal["auto", "string", "openai"] = "auto",
        image_token: str | None = None,
        *,
        written: PlaceholderText | None = None,
        preprocessor: Preprocessor[Any] | None = None,
        search_window: int = SEARCH_WINDOW,
    ) -> None:
        """Prepare to render prompts. Raises ValueError if the arguments contradict each other.

        Args:
            tokenizer: A fast tokenizer; nothing else may set its truncation or padding.
            chat_template: The model's templates, or the source of its only one; None if it has none, so that chats are
                refused.
            content_format: The form in which templates expect a message's content; "auto" derives it from their source.
            image_token: The token that stands for an image; None for a model that takes no images.
            written: How an image is written, if not as `image_token` alone. The placeholder contains it once.
            preprocessor: What else the model's family does with prompts; None for a model without images, or if the
                backend does it.
            search_window: Characters of a prompt that are searched in one step.
        """
        self.longest = _LONGEST_PROMPT
        self._preprocessor = preprocessor
        self._adds_special_tokens = preprocessor is None or preprocessor.adds_special_tokens
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._forced_format = content_format
        if isinstance(chat_template, str):
            chat_template = ChatTemplates.only(chat_template)
        self.templates = ChatTemplates() if chat_template is None else chat_template
        self._sources = {text: _parse(text, what) for text, what in self.templates.all.items()}
        self._bos = tokenizer.bos_token
        before = [] if preprocessor is None else preprocessor.around(1)[0]
        self.image_token_id: int | None = None
        if image_token is not None:
            self.image_token_id = before[0] if before else _single_id(tokenizer, image_token)
        whole = image_token if written is None else written.placeholder
        printed = None if written is None else written.printed
        self.placeholder = whole if printed is None else printed
        if before:
            self.placeholder = ""
        self._texts_apart = written is not None and written.texts_apart
        self._substitute = None if printed is None or whole is None else (printed, whole)
        if image_token is not None and (whole or "").count(image_token) != 1:
            raise ValueError(f"the placeholder {whole!r} must hold the image token {image_token!r} once")

        images = [token for token in (image_token, printed) if token is not None]
        control = ControlTokens(_control_tokens(tokenizer, images, self._sources.values()), search_window)
        self._chat_control = control
        self._text_control = ControlTokens(images, search_window)
        self._literal = LiteralEncoder(self._backend, control)
        self._normalised = self._backend.normalizer is not None and any(
            token.normalized and token.content in set(control.tokens)
            for token in tokenizer.added_tokens_decoder.values()
        )

    @property
    def variables(self) -> dict[str, frozenset[str]]:
        """The variables that a request may set, for each of the model's templates by name."""
        named = self.templates.named
        return {name: self._settable(self._sources[template.text]) for name, template in named.items()}

    def _settable(self, source: TemplateSource) -> frozenset[str]:
        return source.variables - _OURS - self._tokenizer.special_tokens_map.keys()

    def render(self, prompt: ChatPrompt | TextPrompt, *, spans: bool = False) -> RenderedPrompt:
        """Return a prompt's text and tokens. Raises InvalidRequest for what the client can correct.

        Args:
            prompt: The turns, or the text.
            spans: Whether to return the place of each token in the text.
        """
        self._require_room(_characters(prompt))
        if isinstance(prompt, ChatPrompt):
            return self._chat(prompt, spans)
        return self._text(prompt, spans)

    def _chat(self, prompt: ChatPrompt, spans: bool) -> RenderedPrompt:
        template = self.templates.chosen(prompt.template, bool(prompt.tools))
        if template is None:
            raise self._no_template()
        source = self._sources.get(template)
        if source is None:
            try:
                source = _parse(template, "the chat template")
            except ValueError as error:
                raise InvalidRequest(str(error), param="chat_template") from error
        n_images = sum(1 for _ in media_parts(prompt))
        self._require_images(n_images)
        hidden = Hidden(self._chat_control)
        rendered = self._apply(template, source, prompt, hidden)
        # A processor's rule: what starts with BOS has all its special tokens, anything else gets them added.
        # A tokenizer alone (a model without images) adds none to a rendered template.
        starts_with_bos = bool(self._bos) and rendered.startswith(self._bos)
        add_special_tokens = self.image_token_id is not None and self._adds_special_tokens and not starts_with_bos
        if prompt.add_special_tokens is not None:
            add_special_tokens = prompt.add_special_tokens
        return self._encoded(rendered, hidden, n_images, add_special_tokens, spans)

    def _text(self, prompt: TextPrompt, spans: bool) -> RenderedPrompt:
        n_images = sum(1 for _ in media_parts(prompt))
        self._require_images(n_images)
        hidden = Hidden(self._text_control)
        if prompt.token_ids is not None:
            self._require_room(len(prompt.token_ids), "tokens")
            return self._counted(self._decoded(prompt.token_ids), list(prompt.token_ids), n_images)
        pieces = [hidden.text(p.text) if isinstance(p, TextPart) else self.placeholder or "" for p in prompt.parts]
        text, add_special_tokens = "".join(pieces), prompt.add_special_tokens and self._adds_special_tokens
        if self._preprocessor is not None:
            text = self._preprocessor.arranged(text, self._bos or "")
        return self._encoded(text, hidden, n_images, add_special_tokens, spans)

    def _decoded(self, token_ids: list[int]) -> str:
        """Decode as a batch, since other threads can run meanwhile."""
        (text,) = self._backend.decode_batch([token_ids], skip_special_tokens=False)
        return str(text)

    def _apply(self, template: str, source: TemplateSource, prompt: ChatPrompt, hidden: Hidden) -> str:
        parts = (self._forced_format if self._forced_format != "auto" else source.content_format) == "openai"
        if prompt.continue_final_message and not _ends_with_text(prompt):
            raise InvalidRequest("there is no text to continue in the last message", param="continue_final_message")
        wanted = self._settable(source)
        if unread := prompt.template_kwargs.keys() - wanted:
            log.debug("chat template variables that the template does not read: %s", sorted(unread))
        try:
            messages = [self._message(message, hidden, parts, source.accepts_strings) for message in prompt.messages]
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=hidden.value(prompt.tools) if prompt.tools else None,
                chat_template=template,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                tokenize=False,
                **{name: hidden.value(value) for name, value in prompt.template_kwargs.items() if name in wanted},
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(_reason("the chat template refuses the messages", error), param="messages") from error
        except ValueError as error:
            if not prompt.continue_final_message:
                raise InvalidRequest("the chat template cannot render these messages", param="messages") from error
            raise InvalidRequest(
                "the chat template does not end with the last message's text, so it cannot be continued",
                param="continue_final_message",
            ) from error
        except Exception as error:
            raise InvalidRequest("the chat template cannot render these messages", param="messages") from error
        return str(rendered)

    def _message(self, message: Message, hidden: Hidden, parts: bool, strings: bool) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role}
        contents = [hidden.text(p.text, alone=True) if isinstance(p, TextPart) else None for p in message.parts]
        texts = [text for text in contents if text is not None]
        if not parts:
            turn["content"] = "\n".join((self.placeholder or "") if text is None else text for text in contents)
        elif message.role == "tool" and len(texts) == len(contents):
            turn["content"] = _Result("\n".join(texts))
        elif strings and _is_plain(message):
            turn["content"] = "".join(texts)
        else:
            turn["content"] = [
                {"type": "image"} if text is None else {"type": "text", "text": text} for text in contents
            ]
        if message.name is not None:
            turn["name"] = hidden.text(message.name, alone=True)
        if message.tool_calls is not None:
            turn["tool_calls"] = [hidden.value(_with_parsed_arguments(call)) for call in message.tool_calls]
        if message.reasoning is not None:
            turn["reasoning"] = turn["reasoning_content"] = hidden.text(message.reasoning, alone=True)
        if message.tool_call_id is not None:
            turn["tool_call_id"] = hidden.text(message.tool_call_id)
        return turn

    def _encoded(
        self, rendered: str, hidden: Hidden, n_images: int, add_special_tokens: bool, with_spans: bool
    ) -> RenderedPrompt:
        if self._substitute is not None:
            rendered = rendered.replace(*self._substitute)
        self._require_room(len(rendered))
        before, after = ([], []) if self._preprocessor is None else self._preprocessor.around(n_images)
        add_special_tokens = add_special_tokens and not before
        if self._texts_apart and self.placeholder is not None:
            ids, spans = self._ids_apart(rendered.split(self.placeholder), hidden, add_special_tokens, with_spans)
        else:
            ids, spans = self._ids(rendered, hidden, add_special_tokens, with_spans)
        if len(ids) > 1 and ids[0] == ids[1] == self._tokenizer.bos_token_id:
            ids, spans = ids[1:], spans and spans[1:]
        if before:
            ids = [*before, *ids, *after]
            spans = spans and [*[(0, 0)] * len(before), *spans, *[(0, 0)] * len(after)]
        return self._counted(hidden.restore(rendered), ids, n_images, spans)

    def _ids(self, rendered: str, hidden: Hidden, add_special_tokens: bool, with_spans: bool) -> _Tokens:
        if hidden.literals or self._normalised:
            literal = self._literal.encode(rendered, hidden, add_special_tokens, self._require_tokens)
            return literal.ids, literal.spans() if with_spans else None
        encoding = encode(rendered, self._backend, add_special_tokens)
        self._require_tokens(len(encoding))
        return encoding.ids, token_places(encoding) if with_spans else None

    def _ids_apart(self, texts: list[str], hidden: Hidden, add_special_tokens: bool, with_spans: bool) -> _Tokens:
        """Tokenise texts separately, with an image token between each and the next."""
        image, image_id = self.placeholder, self.image_token_id
        assert image is not None
        assert image_id is not None
        ids, spans = self._ids(texts[0], hidden, add_special_tokens, with_spans)
        seen = len(hidden.restore(texts[0]))
        for text in texts[1:]:
            more, places = self._ids(text, hidden, add_special_tokens, with_spans)
            ids = [*ids, image_id, *more]
            before, seen = seen, seen + len(image)
            if spans is not None and places is not None:
                shifted = [(start + seen, stop + seen) if stop else (0, 0) for start, stop in places]
                spans = [*spans, (before, seen), *shifted]
            seen += len(hidden.restore(text))
        return ids, spans

    def _counted(
        self, text: str, ids: list[int], n_images: int, spans: list[tuple[int, int]] | None = None
    ) -> RenderedPrompt:
        placeholders = ids.count(self.image_token_id) if self.image_token_id is not None else n_images
        if placeholders < n_images:
            raise InvalidRequest(
                f"the request has {n_images} images, but the chat template prints {placeholders} of them: "
                "put images into user messages",
                param="messages",
            )
        if placeholders > n_images:
            if n_images == 0:
                raise InvalidRequest("the prompt holds placeholders of images, but the request has no image")
            raise ServingError("the model's chat template shows more images than the request has")
        return RenderedPrompt(text, ids, n_images, spans)

    def _require_images(self, n_images: int) -> None:
        if n_images and self.image_token_id is None:
            raise InvalidRequest("this model does not take images", param="messages")
        most = None if self._preprocessor is None else self._preprocessor.max_images
        if most is not None and n_images > most:
            raise InvalidRequest(
                f"the request has {n_images} images, but a prompt of this model holds at most {most}", param="messages"
            )

    def _require_room(self, length: int, unit: str = "characters", most: int | None = None) -> None:
        most = self.longest if most is None else most
        if length > most:
            raise InvalidRequest(
                f"the prompt has {length} {unit}, far more than this model's context holds; allowed: at most {most}"
            )

    def _require_tokens(self, count: int) -> None:
        """Refuse too many tokens before they become a list, since no other thread runs while that is made."""
        self._require_room(count, "tokens", max(_FEWEST_TOKENS, self.longest // _CHARACTERS_PER_TOKEN))

    def _no_template(self) -> InvalidRequest:
        if not (named := self.templates.named):
            text = "this model has no chat template: set option.chat_template, or send a prompt as `inputs`"
            return InvalidRequest(text, param="messages")
        text = "this model has several chat templates and none of them is its default: name one in chat_template "
        text += f"({', '.join(sorted(named))}), or set option.chat_template"
        return InvalidRequest(text, param="chat_template")


def _characters(prompt: ChatPrompt | TextPrompt) -> int:
    """Count the characters of a prompt: its turns, and everything else of the client's that a template may print."""
    count = sum(len(part.text) for part in prompt_parts(prompt) if isinstance(part, TextPart))
    if isinstance(prompt, TextPrompt):
        return count
    waiting: list[Any] = [prompt.tools, prompt.template_kwargs, prompt.template]
    for message in prompt.messages:
        waiting += (message.name, message.tool_calls, message.tool_call_id, message.reasoning)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value
            waiting += value.values()
    return count


def _parse(template: str, what: str) -> TemplateSource:
    try:
        return TemplateSource.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{what} has an error in line {error.lineno}: {error.message}") from error


def _control_tokens(
    tokenizer: PreTrainedTokenizerFast, images: Sequence[str], sources: Collection[TemplateSource]
) -> set[str]:
    """Return special tokens, image tokens, and added tokens that only templates should print.

    The last are markers of turns that were not flagged as special when the model was converted. Tokens that a template
    looks for in messages ("</think>") are mark-up that clients may send, and runs of white space are text.
    """
    printed, searched = "\x00".join(s.printed for s in sources), "\x00".join(s.searched for s in sources)
    control = {token for token in tokenizer.all_special_tokens if token}
    for token in tokenizer.added_tokens_decoder.values():
        text = token.content
        marker = text in printed and text not in searched
        if token.special or (marker and len(text.strip(" \t\r\n▁")) > 1):
            control.add(text)
    control.update(images)
    return control & set(tokenizer.get_vocab())


def _single_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    ids = tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ValueError(f"the image token {token!r} is {len(ids)} tokens in this tokenizer; it must be one")
    return int(ids[0])


class _Result(str):
    """A tool's result: a string for most templates, which yields one part to templates that loop over parts."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        return iter([{"type": "text", "text": str(self)}])


def _is_plain(message: Message) -> bool:
    """Whether to pass the content as a string: the client sent a string, or one text as the system's message."""
    if message.text_only or not message.parts:
        return True
    lone_text = len(message.parts) == 1 and isinstance(message.parts[0], TextPart)
    return lone_text and message.role in ("system", "developer")


def _ends_with_text(prompt: ChatPrompt) -> bool:
    return bool(prompt.messages) and any(isinstance(part, TextPart) for part in prompt.messages[-1].parts)


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Parse a call's arguments: OpenAI's clients send JSON text, but templates for transformers expect an object.

    Anything else becomes an empty object, as in vLLM, since a call that was cut short must not end the conversation.
    So do arguments with half a surrogate pair, which no prompt can contain, and those nested too deeply to be rendered.
    """
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments", function.get("parameters"))  # TGI takes both names
    if isinstance(arguments, str):
        text, arguments = arguments, None
        try:
            if len(text) > SHORT_BYTES:
                check_body(text.encode(), 0)
            arguments = json.loads(text)
            if "\\u" in text:
                json.dumps(arguments, ensure_ascii=False).encode()
        except (ValueError, RecursionError, InvalidRequest):
            arguments = None
    usable = isinstance(arguments, dict) and depth(arguments) <= MAX_DEPTH
    return {**call, "function": {**function, "arguments": arguments if usable else {}}}


def _reason(what: str, error: jinja2.TemplateError) -> str:
    reason = " ".join((error.message or "").split())
    return f"{what}: {reason[:_LONGEST_REASON]}" if reason else what
