"""Models that come in Mistral's own files only, as Pixtral-12B-2409: the embedded engine loads them as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from container.check import describe
from engine.errors import ModelLoadError
from handlers import LLM, SamplingParams
from handlers.artefacts import ArtefactError
from handlers.artefacts.mistral import completed, lacks_hub_files
from handlers.artefacts.tekken import VERSIONS, chat_template, read_tekken, tokenizer_files
from tests.support.checked import CPU, configure
from tests.support.engine_driver import Oracle, Prompt, load_engine
from tests.support.exactness import PromptMaker, check_random_load, prompts_with
from tests.support.likeness import check_chat, edit_json, noise
from tests.support.tiny_mistral import IMG, LONGEST, SPECIAL, UNIT, make_mistral, params, tekken, weights
from tests.support.tiny_pixtral import inputs

KINDS: dict[str, dict[str, Any]] = {
    "pixtral": {},
    "mistral3": {"merge": 2},
    "text": {"images": False, "version": "v7"},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Completed: what the rest of the server reads."""
    folder = tmp_path_factory.mktemp("models")
    return completed(make_mistral(folder / "model", **KINDS[kind]), folder)


@pytest.fixture(scope="module")
def oracle(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """transformers on the same weights in its own format, written here by the rule of the rotary embedding alone."""
    folder = tmp_path_factory.mktemp("converted")
    for file in path.iterdir():
        if file.name not in ("consolidated.safetensors", "params.json", "tekken.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(
        converted(load_file(path / "consolidated.safetensors")),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return Oracle(folder, inputs)


def converted(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mistral's names as transformers' checkpoints have them."""
    sees = any(name.startswith("vision_encoder") for name in stored)
    parts = [
        ("vision_encoder.", "vision_tower."),
        ("vision_language_adapter.w_in", "multi_modal_projector.linear_1"),
        ("vision_language_adapter.w_out", "multi_modal_projector.linear_2"),
        ("pre_mm_projector_norm", "multi_modal_projector.norm"),
        ("patch_merger", "multi_modal_projector.patch_merger"),
    ]
    found = {}
    for name, tensor in stored.items():
        own = next((pair for pair in parts if name.startswith(pair[0])), None)
        if own is None:
            for theirs, ours in (
                ("attention.w", "self_attn.w"), ("attention_norm", "input_layernorm"),
                ("ffn_norm", "post_attention_layernorm"), ("feed_forward", "mlp"), ("tok_embeddings", "embed_tokens"),
            ):  # fmt: skip
                name = name.replace(theirs, ours)
            name = "lm_head.weight" if name == "output.weight" else f"model.{name}"
            name = f"language_model.{name}" if sees else name
        else:
            name = name.replace(*own)
        if name.endswith((".wq.weight", ".wk.weight")):
            tensor = halves(tensor)
        for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{theirs}.", f".{ours}.")
        for letter in "qkvo":
            name = name.replace(f".w{letter}.", f".{letter}_proj.")
        found[name] = tensor
    return found


def halves(weight: torch.Tensor, head: int = 32) -> torch.Tensor:
    """Each head's even rows, then its odd ones."""
    each = weight.split(head)
    return torch.cat([torch.cat([rows[0::2], rows[1::2]]) for rows in each])


def ordinary(make: PromptMaker) -> PromptMaker:
    """Prompts without special tokens in their text, among them those of images."""

    def made(rng: Any, prefixes: list[list[int]]) -> Prompt:
        prompt = make(rng, prefixes)
        items = [item + SPECIAL if isinstance(item, int) and item < SPECIAL else item for item in prompt.items]
        return Prompt(items)

    return made


@pytest.mark.parametrize("seed", range(2))
def test_tokens_equal_generate_on_the_converted_model(path: Path, oracle: Oracle, kind: str, seed: int) -> None:
    images = [noise(*size, seed) for size in [(9, 60), (300, 40), (64, 64), (33, 31), (20, 600)]]
    make = prompts_with([] if kind == "text" else images)
    check_random_load(path, oracle, seed, ordinary(make), max_model_len=400)


def test_a_chat_through_the_backend(path: Path, oracle: Oracle, kind: str) -> None:
    if kind != "text":
        template = (path / "chat_template.jinja").read_text()
        check_chat(path, oracle, template, [noise(70, 30), noise(31, 90, 1)])


def test_neighbours_turned_together_score_as_halves_do() -> None:
    """Mistral multiplies neighbouring numbers of a head as one complex number; transformers turns halves."""
    random = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(32, 16, generator=random), torch.randn(5, 16, generator=random)
    frequencies = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    angles = torch.arange(5)[:, None] * frequencies
    theirs = torch.view_as_complex((hidden @ weight.T).view(5, 16, 2)) * torch.polar(torch.ones(5, 16), angles)
    want = torch.view_as_real(theirs).flatten(1) @ torch.view_as_real(theirs).flatten(1).T
    turned = torch.cat([angles, angles], -1)[None]
    ours = (hidden @ halves(weight).T)[None, None]
    query, _ = apply_rotary_pos_emb(ours, ours, turned.cos(), turned.sin())
    torch.testing.assert_close(query[0, 0] @ query[0, 0].T, want, atol=1e-4, rtol=1e-4)


def test_it_is_completed_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    model = make_mistral(tmp_path / "model")
    assert lacks_hub_files(model)
    first = completed(model, tmp_path / "root")
    assert completed(model, tmp_path / "root") == first
    assert not lacks_hub_files(first)
    assert (first / "consolidated.safetensors").is_symlink()
    assert first.stat().st_mode & 0o777 == 0o755, "read by another user's server, which may share the root"
    edit_json(model / "params.json", rope_theta=10000.0)
    second = completed(model, tmp_path / "root")
    assert json.loads((second / "config.json").read_text())["text_config"]["rope_theta"] == 10000.0
    assert sorted(entry.name for entry in (tmp_path / "root" / "mistral").iterdir()) == sorted(
        [first.name, second.name]
    )


def test_files_of_its_own_are_kept(tmp_path: Path) -> None:
    model = make_mistral(tmp_path / "model")
    (model / "chat_template.jinja").write_text("its own")
    (model / "preprocessor_config.json").write_text("{}")
    found = completed(model, tmp_path)
    assert (found / "chat_template.jinja").read_text() == "its own"
    assert (found / "preprocessor_config.json").read_text() == "{}"


def test_the_tokenizer_gives_back_every_text(tmp_path: Path) -> None:
    for name, content in tokenizer_files(read_tekken(make_mistral(tmp_path / "m") / "tekken.json")).items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("a red circle, the\n\nsquare", "naïve 你好 🦙", " 1234  "):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    merged = tokenizer.convert_ids_to_tokens(tokenizer(" red circle").input_ids[1:])
    assert merged == ["Ġred", "Ġcircle"]
    assert tokenizer("[IMG]").input_ids == [1, IMG]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"moe": {"num_experts": 8}}, r'has moe = \{"num_experts":8\}, which this server does not read'),
        ({"yarn": {"factor": 4}}, "has yarn = "),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "has quantization = "),
        ({"llama_4_scaling": {"beta": 0.1}}, "has llama_4_scaling = "),
        ({"q_lora_rank": 1536}, "has q_lora_rank = 1536"),
        ({"model_type": "mamba"}, 'has model_type = "mamba"'),
        ({"sliding_window": [4096, None]}, r"Expected `int \| null`, got `array` - at `\$\.sliding_window`"),
        ({"n_layers": 0}, r"Expected `int` >= 1 - at `\$\.n_layers`"),
        ({"dim": "wide"}, r"at `\$\.dim`"),
        ({"vision_encoder": {"hidden_size": 64}}, "missing required field"),
        (
            {"vision_encoder": params()["vision_encoder"] | {"mm_projector_id": "mlp"}},
            "mm_projector_id = 'mlp'",
        ),
        ({"vision_encoder": params()["vision_encoder"] | {"spatial_merge_size": 2}}, "fit neither Pixtral"),
    ],
)
def test_what_is_not_read_in_this_format_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    model = make_mistral(tmp_path / "model", **changed)
    with pytest.raises(ArtefactError, match=message):
        completed(model, tmp_path)
    (error,) = describe(configure(model, f"download_dir={tmp_path}"), CPU)["errors"]
    assert error.startswith("params.json of the model")


def test_a_tokenizer_whose_chats_are_not_known_is_warned_of(tmp_path: Path) -> None:
    """Also where the model has a config.json, so that its tokenizer is all that is completed."""
    alone = make_mistral(tmp_path / "model", images=False, version="v99")
    with_config = make_mistral(tmp_path / "with_config", images=False, version="v99")
    (with_config / "config.json").write_bytes((completed(alone, tmp_path) / "config.json").read_bytes())
    for model in (alone, with_config):
        warnings = describe(configure(model, f"download_dir={tmp_path}"), CPU)["warnings"]
        (warning,) = [text for text in warnings if text.startswith("the model has no chat template, so every chat")]
        assert "set option.chat_template" in warning
        assert f"of the versions {', '.join(VERSIONS)} there is one" in warning


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab": []}, "has 0 tokens and 20 special ones"),
        ({"config": {}}, "missing required field"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "numbered from 0"),
        ({"vocab": [{"token_bytes": "AA=="}] * 400}, "lists a token twice"),
        ({"vocab": [{"token_bytes": "é"}] * 400}, "not base64"),
    ],
)
def test_a_damaged_tokenizer_is_told(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    model = make_mistral(tmp_path / "model")
    edit_json(model / "tekken.json", **changed)
    with pytest.raises(ArtefactError, match=message):
        completed(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.lora.weight", torch.zeros(2), "holds 'layers.0.lora.weight', which is not a tensor"),
        (
            "layers.1.attention.wq.weight",
            None,
            r"files lack .*language_model\.layers\.1\.self_attn\.q_proj\.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_told(tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    path = completed(make_mistral(tmp_path / "model"), tmp_path)
    stored = weights(params()) | ({} if tensor is None else {name: tensor})
    if tensor is None:
        del stored[name]
    save_file(stored, tmp_path / "model" / "consolidated.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        load_engine(path)


def test_check_and_the_offline_api_take_it(tmp_path: Path) -> None:
    model = make_mistral(tmp_path / "model")
    found = describe(configure(model, f"download_dir={tmp_path / 'root'}"), CPU)
    assert found["errors"] == []
    assert found["prompts"]["template"] == "chat_template.jinja"
    tokens = (LONGEST // UNIT) * (LONGEST // UNIT + 1)
    assert found["prompts"]["image_tokens"]["336x336"] == tokens
    assert found["memory"]["weights"] == sum(tensor.nbytes for tensor in weights(params()).values())
    with LLM(str(model), dtype="float32", download_dir=str(tmp_path / "root")) as llm:
        turn = {"role": "user", "content": "what?"}
        (answer,) = llm.chat([turn], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert answer.prompt_token_ids[:2] == [1, 3]
    assert len(answer.outputs[0].token_ids) == 4


CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "what?"}],
    "a system prompt": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "that"},
        {"role": "user", "content": "why?"},
    ],
    "turns in a row": [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "end"},
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "abcdefghj", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "12", "tool_call_id": "abcdefghj"},
        {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "wet"},
        {"role": "user", "content": "and tomorrow?"},
    ],
    "an image behind the text": [
        {"role": "user", "content": [{"type": "text", "text": "this"}, {"type": "image"}]},
    ],
    "images and texts": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"},
            ],
        },
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "d"}]},
    ],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_written_as_mistral_common_writes_them(tmp_path: Path, version: str, chat: str) -> None:
    """Token for token, by its own tokenizer, where it is installed."""
    common = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(version=version)))
    read = read_tekken(tmp_path / "tekken.json")
    for name, content in tokenizer_files(read).items():
        (tmp_path / name).write_text(json.dumps(content))
    tools = TOOLS if chat == "tools" else None
    image = noise(16, 8)
    theirs = [
        turn
        | {
            "content": turn["content"]
            if isinstance(turn["content"], str)
            else [part if part["type"] == "text" else {"type": "image", "image": image} for part in turn["content"]]
        }
        for turn in CHATS[chat]
    ]
    more = {"reasoning_effort": "high"} if version == "v15" and chat == "tools" else {}
    wanted = common.MistralTokenizer.from_file(tmp_path / "tekken.json").encode_chat_completion(
        request.ChatCompletionRequest(messages=theirs, tools=tools, **more)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, mistral_format=False)
    ours = tokenizer.apply_chat_template(CHATS[chat], tools=tools, chat_template=chat_template(read), **more)[
        "input_ids"
    ]
    expanded = [each for token in ours for each in ([IMG, IMG, 13] if token == IMG else [token])]
    assert expanded == wanted.tokens


def test_an_effort_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(version="v15")))
    read = read_tekken(tmp_path / "tekken.json")
    for name, content in tokenizer_files(read).items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, mistral_format=False)
    with pytest.raises(TemplateError, match="reasoning_effort of this model is one of none, high"):
        tokenizer.apply_chat_template(CHATS["a question"], chat_template=chat_template(read), reasoning_effort="low")


def test_other_versions_have_no_template(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(version="v99")))
    assert chat_template(read_tekken(tmp_path / "tekken.json")) is None
