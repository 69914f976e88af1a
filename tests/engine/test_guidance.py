"""Grammars in the engine: whatever a random model likes to say, what it says in the end matches."""

from __future__ import annotations

import json
import queue
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.config import Vocabulary
from engine.engine import Engine
from engine.guidance import MOST_STEPS, Built, GrammarError, Guidance, GuideBuilder
from engine.messages import Add
from engine.sampler import keep_only, unpacked
from engine.sampling_params import SamplingParams
from handlers.grammars.messages import Job
from handlers.grammars.source import grammar_of
from handlers.grammars.worker import compiled
from tests.support.engine_driver import EOS, Result, collect, load_engine, run_all
from tests.support.models import VOCAB, make_text_model, make_tokenizer

TOKENIZER = make_tokenizer().backend_tokenizer
IMAGE = 259

regex = LLMatcher.grammar_from_regex
lark = LLMatcher.grammar_from_lark


def schema(value: dict[str, Any]) -> str:
    return grammar_of("json_schema", json.dumps(value), "[ ]?")


def vocabulary(tokenizer: Tokenizer = TOKENIZER, eos: tuple[int, ...] = EOS, **fields: Any) -> Vocabulary:
    values: dict[str, Any] = {"size": VOCAB, "forbidden": (IMAGE,), **fields}
    return Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), eos_token_ids=eos, **values)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    return load_engine(path, vocabulary=vocabulary())


def ask(grammar: str | None, seed: int = 0, n: int = 1, **params: Any) -> Add:
    values: dict[str, Any] = {"temperature": 1.0, "max_tokens": 200, **params}
    seeds = [seed + index for index in range(n)]
    return Add(0, [256, *b"Say it: "], SamplingParams(**values), seeds, EOS, grammar=grammar)


def text(result: Result) -> str:
    return str(TOKENIZER.decode([t for t in result.token_ids if t not in EOS], skip_special_tokens=False))


def token(character: str) -> int:
    return int(TOKENIZER.encode(character).ids[0])


def answers(engine: Engine, *adds: Add) -> list[Result]:
    """In the order of the requests, and of each request's answers."""
    results = run_all(engine, list(adds))
    return [results[key] for key in sorted(results)]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "def"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_finished_answer_parses_and_validates(engine: Engine, temperature: float, seed: int) -> None:
    (result,) = answers(engine, ask(schema(PERSON), seed, temperature=temperature))
    assert result.finish == "stop"
    jsonschema.validate(json.loads(text(result)), PERSON)


@pytest.mark.parametrize(
    "pattern",
    [r"[0-9]{1,3}(\.[0-9]{1,3}){3}", r"(yes|no|perhaps)", r"[a-z]{3,6}@[a-z]{2,5}\.(com|org)", r"é+ß?[а-я]{2}", r"a?"],
)
def test_an_expression_matches_the_whole_answer(engine: Engine, pattern: str) -> None:
    for result in answers(engine, *(ask(regex(pattern), seed, max_tokens=60) for seed in range(6))):
        if result.finish == "stop":
            assert re.fullmatch(pattern, text(result))


@given(seed=st.integers(0, 2**63 - 1), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schema(engine: Engine, seed: int, data: st.DataObject) -> None:
    wanted = data.draw(schemas())
    (result,) = answers(engine, ask(schema(wanted), seed, max_tokens=400))
    if result.finish == "stop":
        jsonschema.validate(json.loads(text(result)), wanted)
    else:
        assert result.finish == "length"


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    leaves = st.one_of(
        st.integers(-50, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 7}),
        st.integers(-(2**62), 2**62).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 9999}),
        st.integers(0, 4).map(lambda low: {"type": "string", "minLength": low, "maxLength": low + 3}),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "date"}]),
        st.lists(
            st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=4), st.booleans()), min_size=1, max_size=4
        ).map(lambda values: {"enum": values}),
        st.just({"type": "number", "exclusiveMinimum": -1, "maximum": 1.5}),
    )

    def grown(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.dictionaries(st.text("abcdef ", min_size=1, max_size=4), inner, min_size=1, max_size=3)
        objects = names.map(
            lambda fields: {
                "type": "object", "properties": fields, "required": list(fields)[:1], "additionalProperties": False,
            }
        )  # fmt: skip
        lists = st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 2}
        )
        return st.one_of(objects, lists, st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}))

    return st.recursive(leaves, grown, max_leaves=5)


def test_the_others_in_the_batch_get_the_tokens_they_get_alone(path: Path, engine: Engine) -> None:
    free = [
        ask(None, 1, max_tokens=30, ignore_eos=True),
        ask(None, 2, temperature=0.0, max_tokens=30, ignore_eos=True),
        ask(None, 3, max_tokens=30, ignore_eos=True, top_k=7, repetition_penalty=1.3, min_tokens=9, logprobs=2),
    ]
    plain = load_engine(path)
    alone = [answers(plain, add)[0] for add in free]
    guided = [ask(schema(PERSON), 4, logprobs=1), ask(regex("[ab]{40}"), 5, temperature=0.0)]
    mixed = answers(engine, free[0], guided[0], free[1], guided[1], free[2])
    assert [mixed[index].token_ids for index in (0, 2, 4)] == [result.token_ids for result in alone]
    guided_alone = [answers(engine, add)[0] for add in guided]
    assert [mixed[index].token_ids for index in (1, 3)] == [result.token_ids for result in guided_alone]


def test_preempted_answers_go_on_where_they_were(path: Path, engine: Engine) -> None:
    requests = [ask(regex("[a-z]{40}"), seed) for seed in range(6)]
    want = [result.token_ids for result in answers(engine, *requests)]
    small = load_engine(path, vocabulary=vocabulary(), kv_cache_bytes=1 << 16, max_model_len=64)
    got = [result.token_ids for result in answers(small, *requests)]
    assert small.scheduler.preemptions > 0
    assert got == want


def test_each_of_n_answers_goes_its_own_way(engine: Engine) -> None:
    results = answers(engine, ask(schema(PERSON), 7, n=5))
    texts = [text(result) for result in results]
    assert len(set(texts)) == 5
    for one in texts:
        jsonschema.validate(json.loads(one), PERSON)


def test_a_prefix_that_is_cached_changes_nothing(engine: Engine) -> None:
    add = ask(schema(PERSON), 11)
    add.token_ids = [256, *b"A prompt that is longer than one block of the cache. " * 3]
    first, again = answers(engine, add)[0], answers(engine, add)[0]
    assert again.outputs[0].cached_tokens > 0
    assert again.token_ids == first.token_ids


def test_an_answer_cut_by_its_limit_says_so(engine: Engine) -> None:
    (result,) = answers(engine, ask(schema(PERSON), 3, max_tokens=5))
    assert (len(result.token_ids), result.finish) == (5, "length")


def test_a_whole_answer_at_its_limit_is_no_cut_one(engine: Engine) -> None:
    (result,) = answers(engine, ask(regex("[ab]{5}"), 3, max_tokens=5))
    assert (len(text(result)), result.finish) == (5, "stop")


@pytest.mark.parametrize("logprobs", [None, 2])
def test_the_end_of_sequence_follows_the_end_of_the_grammar(engine: Engine, logprobs: int | None) -> None:
    (result,) = answers(engine, ask(regex("[ab]{5}"), 3, logprobs=logprobs))
    assert result.finish == "stop"
    assert len(result.token_ids) == 6
    assert result.token_ids[-1] in EOS
    assert all((output.logprobs is None) == (logprobs is None) for output in result.outputs)


def test_ignore_eos_and_min_tokens_end_where_the_grammar_does(engine: Engine) -> None:
    ignoring = answers(engine, ask(regex("a{0,30}"), 1, ignore_eos=True))[0]
    assert (text(ignoring), ignoring.finish) == ("a" * 30, "stop")
    longer = [answers(engine, ask(regex("[ab]{0,30}"), seed, min_tokens=12))[0] for seed in range(8)]
    assert all(len(text(result)) >= 12 for result in longer)
    short = answers(engine, ask(regex("abc"), 1, min_tokens=12, logprobs=0))[0]
    assert (text(short), short.finish) == ("abc", "stop")


def test_other_samplers_choose_among_what_is_allowed(engine: Engine) -> None:
    for params in (
        {"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}, {"typical_p": 0.2}, {"temperature": 0.0},
        {"repetition_penalty": 2.0, "presence_penalty": 1.5}, {"logit_bias": {token("z"): 100.0}},
    ):  # fmt: skip
        (result,) = answers(engine, ask(regex("[abc]{12}"), 5, **params))
        assert re.fullmatch("[abc]{12}", text(result)), params
    biased = answers(engine, ask(regex("[abc]{12}"), 5, logit_bias={token("b"): 100.0}))[0]
    assert text(biased) == "b" * 12


def test_logprobs_are_the_models_own(path: Path, engine: Engine) -> None:
    (result,) = answers(engine, ask(regex("[ab]"), 5, logprobs=3))
    (free,) = answers(engine, ask(None, 5, logprobs=3, max_tokens=1))
    assert result.outputs[0].logprobs is not None
    assert free.outputs[0].logprobs is not None
    assert result.outputs[0].logprobs[0].token_ids[1:] == free.outputs[0].logprobs[0].token_ids[1:]
    assert result.outputs[0].logprobs[0].ranks[0] > 1


def test_an_aborted_answer_leaves_the_others(engine: Engine) -> None:
    add = ask(regex("[a-z]{30}"), 1, n=3)
    results: dict[int, Result] = {}
    assert engine.guidance is not None
    collect(results, engine.add(add, engine.guidance.build(add.grammar or "", 3)))
    for _ in range(5):
        collect(results, engine.step())
    engine.abort(1)
    while engine.has_work:
        collect(results, engine.step())
    assert [results[i].finish for i in range(3)] == ["stop", None, "stop"]


def test_requests_wait_for_their_grammars_beside_the_steps(engine: Engine) -> None:
    """Also one of which some answers are aborted meanwhile, and ones whose grammar is none."""
    inbox: queue.SimpleQueue[Built] = queue.SimpleQueue()
    builder = GuideBuilder(engine.guidance, inbox.put)
    asked = [
        ask(regex("[ab]{5}"), 1, n=3), ask(lark("start: other"), 2, n=2), ask(regex("[ab]{5}"), 3), ask(regex("b"), 4)
    ]  # fmt: skip
    for number, add in enumerate(asked):
        add.request_id = 100 + 10 * number
        builder.start(add)
    builder.abort([101, 120, 999])
    results: dict[int, Result] = {}
    for _ in asked:
        built = inbox.get(timeout=60)
        builder.take(built)
        collect(results, engine.add_built(built))
    while engine.has_work:
        collect(results, engine.step())
    assert {key: result.finish for key, result in results.items()} == {
        100: "stop", 102: "stop", 110: "error", 111: "error", 130: "stop"
    }  # fmt: skip
    assert all(results[key].outputs[-1].invalid for key in (110, 111))
    assert text(results[130]) == "b"


def test_an_engine_without_a_vocabulary_refuses_grammars(path: Path) -> None:
    plain = load_engine(path)
    inbox: queue.SimpleQueue[Built] = queue.SimpleQueue()
    builder = GuideBuilder(plain.guidance, inbox.put)
    builder.start(ask(regex("a")))
    (output,) = plain.add_built(inbox.get(timeout=60))
    assert (output.finish, output.invalid) == ("error", True)


def test_conditions_that_leave_no_token_are_the_requests_own_fault(engine: Engine) -> None:
    (result,) = answers(engine, ask(regex("[ab]{5}"), 1, allowed_token_ids=(token("c"),)))
    output = result.outputs[-1]
    assert (output.finish, output.invalid) == ("error", True)
    assert "no token" in (output.error or "")


def test_a_grammar_that_leads_nowhere_is_the_requests_own_fault(engine: Engine) -> None:
    (result,) = answers(engine, ask(lark(f'start: "a" <[{IMAGE}]>'), 1))
    output = result.outputs[-1]
    assert (output.finish, output.invalid) == ("error", True)


def test_special_tokens_and_images_are_no_text(engine: Engine) -> None:
    """Nor is anything beyond the tokenizer, of which these logits have 56 columns."""
    assert engine.guidance is not None
    (mask,) = engine.guidance.fill(engine.guidance.build(regex(r"(?s:.)*"), 1))
    allowed = {token for token in range(len(mask) * 32) if mask[token >> 5] >> (token & 31) & 1}
    assert allowed & set(range(256, VOCAB)) == set(EOS)
    assert len(allowed - set(EOS)) == 128 + 51  # ASCII, and the bytes that begin a longer character


def test_answers_that_cannot_go_on_are_told_why_even_when_there_are_no_others(engine: Engine) -> None:
    assert engine.guidance is not None
    (guide,) = engine.guidance.build(regex("yes"), 1)
    guide.accept(token("n"))
    assert guide.reason is not None
    why = guide.reason
    assert not engine.guidance.fill([guide]).any()
    assert guide.reason == why


def test_a_grammar_that_grows_too_complex_within_its_trial_says_so() -> None:
    """It is told in the compiler's words, not as the death of the process that tried it."""
    chain = "\n".join(f'r{i}: r{i + 1} "z" | r{i + 1}' for i in range(1500))
    job = Job("lark", f'start: r0\n{chain}\nr1500: "c"', None)
    assert "max is 2000" in str(compiled(job, Guidance(vocabulary(), most_compiled=0)).reason)


def test_a_grammar_that_one_answer_has_worn_out_serves_the_next() -> None:
    """Copies of a compiled grammar share the states they have seen, up to a limit."""
    guidance = Guidance(vocabulary())
    grammar = regex("a{3}")
    (worn,) = guidance.build(grammar, 1)
    worn.fail("too many states")
    (fresh,) = guidance.build(grammar, 1)
    (beside,) = guidance.build(grammar, 1)
    assert fresh._origin is not worn._origin
    assert fresh._origin is beside._origin, "compiled once"
    assert worn.reason is not None
    assert fresh.reason is None
    for _ in range(MOST_STEPS):
        guidance.fill([fresh])
    (anew,) = guidance.build(grammar, 1)
    assert anew._origin is not fresh._origin


def test_long_texts_of_bounded_length_fit() -> None:
    """Each place of a bounded text is a state of its own: 6 texts of 1,500 characters have tens of thousands."""
    names = [f"f{number}" for number in range(6)]
    texts = {name: {"type": "string", "maxLength": 1500 + place} for place, name in enumerate(names)}
    wanted = {"type": "object", "properties": texts, "required": names, "additionalProperties": False}
    guidance = Guidance(vocabulary())
    answer = json.dumps(dict.fromkeys(names, "x" * 1500))
    for _ in range(2):
        (guide,) = guidance.build(schema(wanted), 1)
        for token_id in TOKENIZER.encode(answer, add_special_tokens=False).ids:
            (mask,) = guidance.fill([guide])
            assert mask.any(), guide.reason
            guide.accept(token_id)
        assert guide.reason is None


def test_logits_narrower_than_the_tokenizer() -> None:
    guidance = Guidance(vocabulary(size=300, eos=(257,)))
    wide = make_tokenizer().backend_tokenizer
    wide.add_tokens([AddedToken(f"word{i}", normalized=False) for i in range(90)])
    narrow = Guidance(vocabulary(wide, size=300, eos=(257,)))
    for one in (guidance, narrow):
        (mask,) = one.fill(one.build(regex("(word[0-9]+)+"), 1))
        allowed = [token for token in range(len(mask) * 32) if mask[token >> 5] >> (token & 31) & 1]
        assert allowed
        assert max(allowed) < 300


def test_a_sentencepiece_tokenizer() -> None:
    """Words begin with ▁ and bytes stand in for characters that have no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁{", "a", "▁a", "b", '"']
    backend = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    guidance = Guidance(vocabulary(backend, eos=(2,), size=len(pieces), forbidden=()))

    def allowed(pattern: str, *so_far: str) -> set[str]:
        (guide,) = guidance.build(regex(pattern), 1)
        for piece in so_far:
            guide.accept(pieces.index(piece))
        (mask,) = guidance.fill([guide])
        return {piece for token, piece in enumerate(pieces) if mask[token >> 5] >> (token & 31) & 1}

    assert allowed("ab?") == {"a"}
    assert allowed("a [ab]", "a") == {"▁", "▁a", "<0x20>"}
    assert allowed("é", "<0xC3>") == {"<0xA9>"}
    assert allowed("ab?", "a") == {"b", "<0x62>", "</s>"}


@pytest.mark.parametrize("broken", ['start: "a', "start: /(?=a)/", "start: other", "{", "%json {}", ""])
def test_what_does_not_compile_says_why(broken: str) -> None:
    guidance = Guidance(vocabulary())
    with pytest.raises(GrammarError) as caught:
        guidance.build(lark(broken), 1)
    assert 0 < len(str(caught.value)) <= 301


def test_masks_are_unpacked_on_a_device_as_on_the_host() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (3, 11), dtype=np.uint32)
    want = np.unpackbits(words.view(np.uint8), axis=-1, count=345, bitorder="little").astype(bool)
    assert (unpacked(torch.from_numpy(words.view(np.int32)), 345).numpy() == want).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_on_a_cuda_device() -> None:
    scores = torch.randn(5, 345)
    masks = np.random.default_rng(0).integers(0, 2**32, (2, 11), dtype=np.uint32)
    there = scores.cuda()
    keep_only(there, [1, 3], masks)
    keep_only(scores, [1, 3], masks)
    assert torch.equal(there.cpu(), scores)


def test_masks_are_applied_as_additions_are() -> None:
    """So that a row of NaN stays one, which is how a broken row is seen."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, torch.nan, 6.0, 7.0], [8.0, 9.0, torch.inf, 1.0]])
    masks = torch.tensor([[0b0101], [0b0001]]).numpy().astype("uint32")
    keep_only(scores, [0, 1], masks)
    assert torch.equal(scores[0], torch.tensor([1.0, -torch.inf, 3.0, -torch.inf]))
    assert scores[1, 1].isnan()
    assert scores[2, 1] == 9.0
    whole = torch.tensor([[1.0, torch.inf, 3.0, 4.0]])
    keep_only(whole, [0], masks[:1])
    assert whole[0, 1].isnan()
    assert whole[0, 2] == 3.0
