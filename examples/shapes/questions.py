"""Conversations about scenes and the one right answer to every question in them.

Two rules settle what a question is about. "This image" is the picture sent last. A question that names no
picture ("How many shapes are there?", "And its color?") is about the picture spoken about last, which is the
newest one whenever pictures have come since. Shapes are always listed left to right.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from world import KINDS, Scene, names

NUMBERS = ("zero", "one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
NO_IMAGE = "I see no image."

WHAT_DOCS = (
    "What is this an image of?",
    "What's in this image?",
    "Whats in this image?",
    "What is the content of this image?",
    "Describe this image.",
)
WHAT_MORE = (
    "What is in this image?", "What is in the image?", "What's in the image?", "What is this?",
    "What is it?", "Describe the image.", "Describe the picture.", "Describe this picture.",
    "What's this?", "What does this image show?", "What is shown in this image?",
    "What is in this picture?", "What's in this picture?", "What is this a picture of?",
    "What do you see?", "What do you see in this image?", "What can you see in this image?",
    "Please describe this image.", "Describe this image in one sentence.",
    "Describe this image in detail.", "What is the content of this picture?",
    "What are the contents of this image?", "Can you describe this image?",
    "Tell me what is in this image.", "What is depicted in this image?", "Explain this image.",
    "What shapes are in this image?", "Which shapes do you see?", "Describe what you see.",
    "What are the shapes in this image?", "Caption this image.", "Image?",
    "Write a caption for this image.",
)  # fmt: skip
GROUND = (
    "What's the color of this image?", "What is the color of this image?", "What color is this image?",
    "What's the color of the image?", "Whats the color of this image?",
)  # fmt: skip
GROUND_FOCUS = ("What color is the background?", "What is the background color?", "And the background?")
COUNT = (
    "How many shapes are there?", "How many shapes are in the image?", "How many shapes do you see?",
    "Count the shapes.", "How many shapes can you see?", "How many objects are there?",
    "And how many shapes?",
)  # fmt: skip
COUNT_LAST = ("How many shapes are in this image?", "How many shapes are there in this image?")
SHAPE_COLOR = (
    "What color is the {kind}?", "What is the color of the {kind}?", "What's the color of the {kind}?",
    "Which color is the {kind}?", "What color does the {kind} have?",
)  # fmt: skip
SHAPE_COLOR_NEXT = ("And the {kind}?", "What about the {kind}?", "And what color is the {kind}?")
NTH = (
    "What is in the {nth} image?", "What's in the {nth} image?", "Describe the {nth} image.",
    "What is the {nth} image?", "What is the {nth} image of?", "What does the {nth} image show?",
    "What is in the {nth} picture?", "What is the content of the {nth} image?",
    "What is in image {digit}?",
)  # fmt: skip
NTH_NEXT = ("And the {nth} image?", "And the {nth} one?", "What about the {nth} image?", "And the {nth}?")
ALL = (
    "What is in these images?", "What's in these images?", "Describe these images.",
    "Describe the images.", "What are these images of?", "What is in each image?",
    "What are in these images?", "Describe each image.",
)  # fmt: skip
IMAGES = ("How many images are there?", "How many images do you see?", "How many pictures did I send?")
ITS_COLOR = (
    "And its color?",
    "Its color?",
    "What is its color?",
    "And what color is it?",
    "What color is it?",
)
ITS_KIND = ("What shape is it?", "And its shape?", "What shape is this?", "Which shape is it?")
JSON = (
    "Answer in JSON.",
    "Answer in JSON.",
    "Respond in JSON.",
    "Answer as JSON.",
    "Reply with JSON.",
    "In JSON.",
)

CHAT: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi.", "Hello", "Hi there!", "Good morning.", "Hey", "Hello, how are you?"), "Hello!"),
    (("Thanks!", "Thank you.", "Thank you very much!", "Great, thanks.", "Thx"), "You are welcome."),
    (("Who are you?", "What are you?", "What can you do?"), "I name the shapes in a picture."),
)
SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful vision assistant.",
    "You are an AI assistant that answers questions about images.", "Be brief.", "Answer the question.",
    "You are a careful observer. Answer in as few words as you can.", "You are a chatbot.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.",
)  # fmt: skip
LEADS = (
    "Here is a picture.", "Look at this.", "Please look at the image.", "Hi!", "Hello!",
    "Please tell me:", "Now:", "I have a question.", "Question:", "Thanks.", "Ok.", "USER:", "Great!",
    "Have a look.", "Please answer briefly.",
)  # fmt: skip
FILLER_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book eye "
    "job word business issue side kind head house service friend father power hour game line end "
    "member law car city name team minute idea body back parent the of and to in is that for it as "
    "was with be by on not he his but at are this have from or had an they which you were all their "
    "one can her has there been if more when will would who so no answer user server always never "
)
FILLER = FILLER_TEXT.split()


BARE = (
    "USER: {lines}{question}\nASSISTANT:", "USER: {lines}{question}\nASSISTANT:",
    "USER: {row}\n{question}\nASSISTANT:", "USER: {row} {question} ASSISTANT:",
    "{row}{question}", "{row}{question}\n", "{row}{question}\n\n", "{row}{question} ", "{row} {question}",
    "{lines}{question}", "{lines}{question}\n", "{question}{row}", "{question} {row}\n\n",
    "[INST] {lines}{question} [/INST]", "User: {row}{question}\nAssistant:", "User:{row}{question} Assistant:",
    "<|user|>\n{lines}{question}<|end|>\n<|assistant|>\n",
    "<|user|>{row}{question}</s><|assistant|>",
)  # fmt: skip
"""How documentation of models and servers writes prompts without a chat template."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the hub's format (ending with an assistant's), what each question is, and the pictures.

    ``kinds`` names the kind of question of every assistant message, in order; ``pictures`` are indices into
    the scenes the conversation was made from, in the order of the image parts. ``prompt`` is what is written
    instead of the messages up to the answer, where no chat template is used.
    """

    messages: list[dict[str, Any]]
    kinds: list[str]
    pictures: list[int]
    prompt: str | None = None


# --- answers -----------------------------------------------------------------------------------------


def what(scene: Scene) -> str:
    """Name a scene's shapes, or its plain background."""
    if not scene.shapes:
        article = "an" if scene.background[0] in "aeiou" else "a"
        return f"{article} {scene.background} background"
    return names(scene.shapes)


def as_json(scene: Scene) -> str:
    """Name a scene's shapes as JSON."""
    return json.dumps({"shapes": [{"color": shape.color, "shape": shape.kind} for shape in scene.shapes]})


def count(scene: Scene) -> str:
    """Count a scene's shapes in words."""
    return NUMBERS[len(scene.shapes)]


def color_of(scene: Scene, kind: str) -> str:
    """Return the colour of the leftmost shape of ``kind``."""
    return next(shape.color for shape in scene.shapes if shape.kind == kind)


def its_color(scene: Scene) -> str:
    """Return the colours of a scene's shapes."""
    return " and ".join(shape.color for shape in scene.shapes)


def its_kind(scene: Scene) -> str:
    """Return the kinds of a scene's shapes."""
    return " and ".join(shape.kind for shape in scene.shapes)


# --- questions ---------------------------------------------------------------------------------------


def vary(text: str, rng: random.Random) -> str:
    """Return ``text`` as a hurried hand might type it."""
    if rng.random() < 0.65:
        return text
    change = rng.randrange(8)
    if change == 0:
        return text.lower()
    if change == 1:
        return text.rstrip("?.!:")
    if change == 2:
        return text.lower().rstrip("?.!:")
    if change == 3:
        return text + rng.choice((" ", "\n", "!", "?"))
    if change == 4:
        return text.replace("color", "colour")
    if change == 5:
        return text.upper() if rng.random() < 0.3 else text.replace("What's", "What is")
    if change == 6:
        return rng.choice(("Please: ", "So, ", "OK, ", "please tell me, ")) + text[0].lower() + text[1:]
    return text + rng.choice((" Be brief.", " Thanks.", " Please.", " Answer briefly.", " please"))


def filler(rng: random.Random, most: int) -> str:
    """Return up to ``most`` words that mean nothing."""
    words = [rng.choice(FILLER) for _ in range(rng.randint(1, most))]
    if rng.random() < 0.3:
        words.insert(rng.randrange(len(words)), str(rng.randint(0, 99999)))
    text = rng.choice((" ", " ", ", ", "\n")).join(words) if rng.random() < 0.1 else " ".join(words)
    return text[0].upper() + text[1:] + rng.choice((".", ".", "!", "?", ""))


@dataclass
class Talk:
    """What has been shown and said so far: ``shown`` and ``focus`` are indices into ``scenes``."""

    scenes: Sequence[Scene]
    shown: list[int] = field(default_factory=list)
    focus: int = -1
    last: str = ""

    def ask(self, kind: str, rng: random.Random) -> tuple[str, str] | None:
        """Return a question of ``kind`` and its answer, or None where it would make no sense now."""
        if not self.shown:
            return None
        newest, here = self.scenes[self.shown[-1]], self.scenes[self.focus]
        same = self.shown[-1] == self.focus
        if kind in ("what", "what, other words"):
            if kind != "what" and not same:
                return None
            self.focus = self.shown[-1]
            return rng.choice(WHAT_DOCS if kind == "what" else WHAT_MORE), what(newest)
        if kind == "JSON":
            if rng.random() < 0.25:
                return rng.choice(JSON), as_json(here)
            if len(self.shown) > 1 and rng.random() < 0.4:
                question, self.focus = self.nth(NTH, rng)
            elif same or rng.random() < 0.5:
                question, self.focus = (
                    rng.choice(WHAT_DOCS if not same else WHAT_DOCS + WHAT_MORE),
                    self.shown[-1],
                )
            else:
                return None
            return question + rng.choice((" ", " ", "\n")) + rng.choice(JSON), as_json(self.scenes[self.focus])
        if kind == "color of the image":
            if rng.random() < 0.25:
                return rng.choice(GROUND_FOCUS), here.background
            self.focus = self.shown[-1]
            return rng.choice(GROUND), newest.background
        if kind == "count":
            if rng.random() < 0.25:
                self.focus = self.shown[-1]
                return rng.choice(COUNT_LAST), count(newest)
            return rng.choice(COUNT), count(here)
        if kind == "color of a shape":
            kinds = [k for k in KINDS if len({s.color for s in here.shapes if s.kind == k}) == 1]
            if not kinds:
                return None
            asked = rng.choice(kinds)
            phrases = SHAPE_COLOR + SHAPE_COLOR_NEXT if self.last == kind else SHAPE_COLOR
            return rng.choice(phrases).format(kind=asked), color_of(here, asked)
        if kind == "nth image":
            if len(self.shown) == 1 and rng.random() < 0.7:
                return None
            question, self.focus = self.nth(NTH + NTH_NEXT if self.last == kind else NTH, rng)
            return question, what(self.scenes[self.focus])
        if kind == "all images":
            if len(self.shown) == 1:
                return None
            self.focus = self.shown[-1]
            return rng.choice(ALL), "; ".join(what(self.scenes[i]) for i in self.shown)
        if kind == "number of images":
            return rng.choice(IMAGES), NUMBERS[len(self.shown)]
        if kind == "follow-up":
            if not here.shapes or not self.last:
                return None
            if rng.random() < 0.75:
                return rng.choice(ITS_COLOR), its_color(here)
            return rng.choice(ITS_KIND), its_kind(here)
        raise ValueError(f"no questions of kind {kind!r}")

    def nth(self, phrases: Sequence[str], rng: random.Random) -> tuple[str, int]:
        """Return a question that names a picture by its number and that picture's index in ``scenes``."""
        at = rng.randrange(len(self.shown))
        word = "last" if at == len(self.shown) - 1 and rng.random() < 0.25 else ORDINALS[at]
        return rng.choice(phrases).format(nth=word, digit=at + 1), self.shown[at]


WEIGHTS = {
    "what": 5.0,
    "what, other words": 2.0,
    "JSON": 2.0,
    "color of the image": 2.0,
    "count": 1.5,
    "color of a shape": 2.0,
    "nth image": 3.0,
    "all images": 0.6,
    "number of images": 0.3,
    "follow-up": 2.0,
}
KINDS_OF_QUESTION = (*WEIGHTS, "no image", "chat")


def blind(rng: random.Random) -> tuple[str, str]:
    """Return a question asked before any picture has come, and its answer."""
    pool: tuple[str, ...] = WHAT_DOCS + WHAT_MORE + GROUND + COUNT + NTH + ITS_COLOR + ALL + SHAPE_COLOR + GROUND_FOCUS
    if rng.random() < 0.2:
        return filler(rng, 12), NO_IMAGE
    question = rng.choice(pool if rng.random() < 0.6 else WHAT_DOCS)
    question = question.format(nth=rng.choice(ORDINALS), digit=rng.randint(1, 4), kind=rng.choice(KINDS))
    return question + (" " + rng.choice(JSON) if rng.random() < 0.1 else ""), NO_IMAGE


def lay_out(pictures: int, text: str, rng: random.Random, before: int = 0) -> list[dict[str, str]]:
    """Return a message's parts: ``pictures`` image parts around ``text``; ``before`` were sent earlier."""
    image = {"type": "image"}
    if not pictures:
        return [{"type": "text", "text": text}]
    style = rng.random()
    if style < 0.45:
        return [dict(image) for _ in range(pictures)] + [{"type": "text", "text": text}]
    if style < 0.65:
        return [{"type": "text", "text": text}] + [dict(image) for _ in range(pictures)]
    if style < 0.8:
        gap = rng.choice(("\n", " "))
        parts = [part for _ in range(pictures) for part in (dict(image), {"type": "text", "text": gap})]
        parts[-1]["text"] += text
        return parts
    if style < 0.9:
        lead = rng.choice(LEADS)
        return [
            {"type": "text", "text": lead},
            *(dict(image) for _ in range(pictures)),
            {"type": "text", "text": text},
        ]
    label = rng.choice(("Image {}:", "Image {}: ", "{}.", "\nPicture {}: "))
    parts = []
    for i in range(pictures):
        parts += [{"type": "text", "text": label.format(before + i + 1)}, dict(image)]
    return [*parts, {"type": "text", "text": text}]


def converse(
    scenes: Sequence[Scene],
    turns: int,
    rng: random.Random,
    plain: bool = False,
    weights: Mapping[str, float] = WEIGHTS,
) -> Conversation:
    """Return a conversation of ``turns`` questions that shows all ``scenes``, over one or several messages.

    ``plain`` leaves out whatever could disturb: system prompts, chatter and hurried typing. ``weights`` says how
    often each kind of question is asked.
    """
    messages: list[dict[str, Any]] = []
    kinds: list[str] = []
    talk = Talk(scenes)
    if not plain and rng.random() < 0.45:
        text = rng.choice(SYSTEMS) if rng.random() < 0.6 else filler(rng, 40)
        messages.append({"role": "system", "content": text})

    def say(kind: str, parts: list[dict[str, str]] | str, answer: str) -> None:
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": answer})
        kinds.append(kind)

    def chatter() -> None:
        questions, answer = rng.choice(CHAT)
        say("chat", [{"type": "text", "text": vary(rng.choice(questions), rng)}], answer)

    def pick() -> tuple[str, str, str]:
        while True:
            kind = rng.choices(list(weights), list(weights.values()))[0]
            asked = talk.ask(kind, rng)
            if asked:
                return kind, *asked

    if not plain and rng.random() < 0.1:
        chatter()
    if not scenes or (not plain and rng.random() < 0.05):
        question, answer = blind(rng)
        say("no image", [{"type": "text", "text": question if plain else vary(question, rng)}], answer)
    remaining = list(range(len(scenes)))
    asked = 0
    while remaining or asked < turns:
        if not scenes:
            if asked + 1 >= turns:
                break
            asked += 1
            if rng.random() < 0.3:
                chatter()
            else:
                question, answer = blind(rng)
                say("no image", [{"type": "text", "text": vary(question, rng)}], answer)
            continue
        new = 0
        if remaining and (not asked or turns - asked <= len(remaining) or rng.random() < 0.4):
            new = len(remaining) if rng.random() < 0.5 or turns - asked <= 1 else rng.randint(1, len(remaining))
        talk.shown += remaining[:new]
        remaining = remaining[new:]
        if new:
            talk.focus = talk.shown[-1]
        kind, question, answer = pick()
        talk.last = kind
        asked += 1
        if not plain:
            question = vary(question, rng)
            if rng.random() < 0.08:
                lead = rng.choice(LEADS) if rng.random() < 0.7 else filler(rng, 10)
                question = lead + rng.choice((" ", "\n")) + question
        say(
            kind,
            lay_out(new, question, rng, len(talk.shown) - new) if new or rng.random() < 0.5 else question,
            answer,
        )
        if not plain and rng.random() < 0.05:
            chatter()
    return Conversation(messages, kinds, list(talk.shown))


def bare(scenes: Sequence[Scene], rng: random.Random, weights: Mapping[str, float] = WEIGHTS) -> Conversation:
    """Return one question about all ``scenes``, written without the chat template."""
    while True:
        talk = converse(scenes, 1, rng, weights=weights)
        told = [message for message in talk.messages if message["role"] != "system"]
        if len(told) == 2 and not isinstance(told[0]["content"], str):
            break
    question = "".join(part.get("text", "") for part in told[0]["content"]).strip()
    pictures = ["<image>"] * len(talk.pictures)
    prompt = rng.choice(BARE).format(
        question=question, row="".join(pictures), lines="".join(f"{picture}\n" for picture in pictures)
    )
    return Conversation(told, talk.kinds, talk.pictures, prompt)
