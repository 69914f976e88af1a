"""Each model family on the embedded engine beside transformers' `generate` and vLLM's CPU server, in one run.

    python -m bench.families llava qwen2_vl --size small
    python -m bench.families --no-vllm

16 requests at a time, each with an image and a text of 16 to 96 tokens, on random models with the family's
structure and published proportions, scaled down to --size:

* `generate`: answers of 8 to 120 tokens in one process, each side on one thread and by its processor time, which other
  work on the machine hardly changes. `generate` gets batches of 16, padded on the left, and runs each to the end of its
  longest answer.
* vLLM: answers of 64 tokens, both servers over HTTP at their defaults, which include vLLM's compilation.

Sides take turns, and the medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

from bench import load, report, servers
from engine.families import phi3_v
from engine.loader import load_preprocessor
from handlers.request import RequestSampling
from tests.support import (
    tiny_fuyu,
    tiny_gemma,
    tiny_llava_onevision,
    tiny_mllama,
    tiny_pixtral,
    tiny_qwen_vl,
    tiny_tiles,
)
from tests.support.engine_driver import Prompt, load_engine, run_all
from tests.support.models import HUB_NAMES, make_llava, write_hub_names
from tests.support.tiny_chameleon import make_chameleon
from tests.support.tiny_fuyu import make_fuyu
from tests.support.tiny_gemma import make_gemma3, make_paligemma
from tests.support.tiny_llava_next import make_llava_next
from tests.support.tiny_llava_onevision import make_llava_onevision
from tests.support.tiny_mllama import make_mllama
from tests.support.tiny_phi3_v import make_phi3_v
from tests.support.tiny_pixtral import HUB_NAMES_OF_PIXTRAL, make_pixtral
from tests.support.tiny_qwen_vl import make_qwen_vl
from tests.support.tiny_tiles import make_idefics3, make_internvl

STREAMS, REQUESTS = 16, 64
SHORTEST, LONGEST = 8, 120
TEXT_SHORTEST, TEXT_LONGEST = 16, 96
WIDTH, HEIGHT = 224, 168
HEAD = 64
PAD = 258

TEXT_ALONE = "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}\n"
"""vLLM has no template for PaliGemma, and puts the image and the beginning-of-sequence token before the text."""

Inputs = Callable[[Any, list[Image.Image], torch.Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """Dimensions of the decoder and of the vision tower."""

    width: int
    layers: int
    feed_forward: int
    vision_width: int
    vision_layers: int


SIZES = {
    "small": Size(512, 8, 1408, 256, 4),
    "large": Size(1024, 12, 2816, 512, 6),
}
"""About 30 and 150 million parameters."""


@dataclass(frozen=True)
class Family:
    """How a family's model is made and asked.

    Attributes:
        make: Writes the small model of the tests, whose files are then scaled up.
        inputs: What `generate` gets for an image; None for all that transformers' processor returns.
        scale: Factor for the edges of images and tiles, in pixels.
        hub_names: Names of weights on the hub, which vLLM's loader expects; None where they are transformers'.
        vllm: Further arguments of vLLM's server; None where its CPU build does not serve the family.
        more: Further entries of config.json.
    """

    make: Callable[[Path], Path]
    inputs: Inputs | None = None
    scale: int = 2
    hub_names: Any = None
    vllm: Sequence[str] | None = ()
    more: dict[str, Any] = field(default_factory=dict)


def _qwen(kind: str) -> Family:
    return Family(lambda path: make_qwen_vl(path, kind, most_tokens=96), tiny_qwen_vl.inputs, scale=1)


FAMILIES: dict[str, Family] = {
    "llava": Family(make_llava, scale=4, hub_names=HUB_NAMES),
    "chameleon": Family(make_chameleon, vllm=None),
    "fuyu": Family(make_fuyu, tiny_fuyu.patches_of, vllm=None),
    "gemma3": Family(
        lambda path: make_gemma3(path, newlines=True), tiny_gemma.inputs, scale=4, hub_names=HUB_NAMES
    ),
    "idefics3": Family(make_idefics3),
    "internvl": Family(make_internvl, tiny_tiles.inputs),
    "llava_next": Family(make_llava_next, hub_names=HUB_NAMES),
    "llava_onevision": Family(
        lambda path: make_llava_onevision(path, most_tiles=9), tiny_llava_onevision.inputs,
        hub_names=HUB_NAMES,
    ),
    "mistral3": Family(
        lambda path: make_pixtral(path, merge=2), tiny_pixtral.inputs, hub_names=HUB_NAMES_OF_PIXTRAL
    ),
    "mllama": Family(make_mllama, tiny_mllama.inputs, vllm=None),
    "paligemma": Family(
        lambda path: make_paligemma(path, newlines=True), tiny_gemma.inputs, scale=4, hub_names=HUB_NAMES,
        vllm=("--chat-template", TEXT_ALONE),
    ),
    "paligemma2": Family(
        lambda path: make_paligemma(path, second=True, newlines=True), tiny_gemma.inputs, scale=4,
        hub_names=HUB_NAMES, vllm=("--chat-template", TEXT_ALONE),
    ),
    "phi3_v": Family(make_phi3_v, vllm=None),
    "pixtral": Family(make_pixtral, tiny_pixtral.inputs, hub_names=HUB_NAMES_OF_PIXTRAL),
    "qwen2_vl": _qwen("qwen2_vl"),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
    "qwen3_vl": _qwen("qwen3_vl"),
    "smolvlm": Family(lambda path: make_idefics3(path, "smolvlm")),
}  # fmt: skip


@dataclass
class Measured:
    """Results for a family: medians over the rounds.

    Attributes:
        family: Name of the family.
        parameters: Number of parameters.
        ours: Requests per second of processor time of the embedded engine in one process; None without `generate`.
        generate: Requests per second of processor time of `generate`.
        over_generate: The former divided by the latter.
        served: Requests per second of our server; None where vLLM does not serve the family.
        vllm: Requests per second of vLLM's server.
        over_vllm: The former divided by the latter.
        prepared: Images prepared per second by one thread.
        tokens_per_image: Tokens of an image.
    """

    family: str
    parameters: int
    ours: float | None
    generate: float | None
    over_generate: float | None
    served: float | None
    vllm: float | None
    over_vllm: float | None
    prepared: float
    tokens_per_image: int


def write(name: str, folder: Path, size: Size, dtype: torch.dtype) -> Path:
    """Write a family's model, scaled up, and return its folder."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    path = family.make(folder)
    for file in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (path / file).exists():
            stored = json.loads((path / file).read_text())
            _scale_images(stored, family.scale)
            if file == "config.json":
                _scale_weights(stored, size)
                stored |= {"dtype": str(dtype).removeprefix("torch."), **family.more}
            (path / file).write_text(json.dumps(stored))
    config = (path / "config.json").read_text()
    if name == "phi3_v":
        phi3_v.register()
        _, architecture = phi3_v.classes()
        model: Any = architecture(AutoConfig.from_pretrained(path))  # type: ignore[call-arg]
    else:
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "gate" in key:
            torch.nn.init.ones_(parameter)
    model.to(dtype).save_pretrained(path)
    (path / "config.json").write_text(config)  # as on the hub, not as transformers writes it
    if family.hub_names is not None:
        write_hub_names(path / "model.safetensors", family.hub_names)
    return path


_EDGES = {
    "size", "crop_size", "max_image_size", "image_size", "image_grid_pinpoints", "resolution",
}  # fmt: skip
_AREAS = {"image_seq_length", "image_seq_len", "num_image_tokens", "mm_tokens_per_image"}


def _scale_images(stored: Any, factor: int) -> None:
    if not isinstance(stored, dict):
        return
    for key, value in stored.items():
        if key in _EDGES:
            stored[key] = _times(value, factor)
        elif key in _AREAS:
            stored[key] = value * factor**2
        else:
            _scale_images(value, factor)


def _times(value: Any, factor: int) -> Any:
    if isinstance(value, dict):
        return {key: _times(each, factor) for key, each in value.items()}
    if isinstance(value, list):
        return [_times(each, factor) for each in value]
    return value * factor if isinstance(value, int) else value


def _scale_weights(stored: dict[str, Any], size: Size) -> None:
    decoders = [part for part in (stored, stored.get("text_config")) if part and "num_hidden_layers" in part]
    for text in decoders:
        groups = text["num_attention_heads"] // text.get("num_key_value_heads", text["num_attention_heads"])
        heads = size.width // HEAD
        text |= {
            "hidden_size": size.width,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 4096,
        }
        if "num_key_value_heads" in text:
            text["num_key_value_heads"] = heads // groups
        changed = {
            "head_dim": HEAD,
            "sliding_window": text.get("sliding_window") and 512,
            "query_pre_attn_scalar": HEAD,
            "attn_logit_softcapping": text.get("attn_logit_softcapping") and 50.0,
            "final_logit_softcapping": text.get("final_logit_softcapping") and 30.0,
            "original_max_position_embeddings": 2048,
            "cross_attention_layers": list(range(3, size.layers, 5)),
            "layer_types": _pattern(text.get("layer_types", []), size.layers),
            "initializer_range": 0.02,
        }
        text |= {key: value for key, value in changed.items() if key in text}
        rope = text.get("rope_scaling") or {}
        if "mrope_section" in rope:
            rope["mrope_section"] = [8, 12, 12]
        for key in ("short_factor", "long_factor"):
            if key in rope:
                rope[key] = [1.0 + 0.1 * pair for pair in range(HEAD // 2)]
    for key in ("projection_dim", "hidden_size"):  # PaliGemma's
        if key in stored:
            stored[key] = size.width
    vision = stored.get("vision_config")
    if vision is not None:
        _scale_tower(vision, size)
        if "image_dim_out" in stored.get("img_processor", {}):
            stored["img_processor"]["image_dim_out"] = size.vision_width


def _pattern(kinds: list[str], layers: int) -> list[str]:
    """Gemma 3: five layers with a window, then one without; otherwise the given kinds in turn."""
    if set(kinds) == {"sliding_attention", "full_attention"} and kinds[0] == "sliding_attention":
        return ["full_attention" if place % 6 == 5 else "sliding_attention" for place in range(layers)]
    return (kinds * layers)[:layers]


def _scale_tower(vision: dict[str, Any], size: Size) -> None:
    width, heads = size.vision_width, size.vision_width // HEAD
    if "embed_dim" in vision:  # Qwen2-VL, whose hidden_size is the decoder's
        vision |= {"embed_dim": width, "hidden_size": size.width, "mlp_ratio": 4}
    else:
        vision["hidden_size"] = width
    changed = {
        "out_hidden_size": size.width,
        "projection_dim": size.width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": size.vision_layers,
        "depth": size.vision_layers,
        "num_attention_heads": heads,
        "attention_heads": heads,
        "num_heads": heads,
        "head_dim": HEAD,
        "vision_output_dim": width * (1 + len(vision.get("intermediate_layers_indices", ()))),
        "initializer_range": 0.02,
    }
    vision |= {key: value for key, value in changed.items() if key in vision}


class Bench:
    """A family's model in this process, and its requests."""

    def __init__(self, name: str, path: Path, dtype: torch.dtype) -> None:
        self.name, self.path, self.dtype = name, path, dtype
        preprocessor = load_preprocessor(str(path))
        assert preprocessor is not None
        self.preprocessor = preprocessor
        random = np.random.default_rng(0)
        images = [Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(REQUESTS)]
        started = time.process_time()
        prepared = [preprocessor.prepare(image) for image in images]
        self.prepared_per_second = REQUESTS / (time.process_time() - started)
        self.tokens_per_image = len(prepared[0].token_ids)
        texts = random.integers(TEXT_SHORTEST, TEXT_LONGEST + 1, REQUESTS)
        self.prompts = [
            Prompt([image, *random.integers(65, 91, length).tolist()])
            for image, length in zip(images, texts, strict=True)
        ]
        self.lengths = random.integers(SHORTEST, LONGEST + 1, REQUESTS).tolist()
        self._batches = [self._batch(start) for start in range(0, REQUESTS, STREAMS)]

    def ours(self) -> float:
        """Requests per second of processor time, with a new engine, so that nothing is cached."""
        engine = load_engine(self.path, max_num_seqs=STREAMS, kv_cache_bytes=512 << 20, dtype=str(self.dtype)[6:])
        engine.warm_up()
        adds = [
            prompt.add(self.preprocessor, RequestSampling(temperature=0.0, max_tokens=length, ignore_eos=True))
            for prompt, length in zip(self.prompts, self.lengths, strict=True)
        ]
        started = time.process_time()
        run_all(engine, adds)
        return REQUESTS / (time.process_time() - started)

    @torch.inference_mode()
    def generate(self) -> float:
        model = self._model()
        encoder = phi3_v.Phi3VModel(self._model()) if self.name == "phi3_v" else None
        seconds = 0.0
        for place, batch in enumerate(self._batches):
            length = max(self.lengths[place * STREAMS : (place + 1) * STREAMS])
            started = time.process_time()
            if encoder is not None:
                batch = self._embedded(encoder, batch)
            model.generate(
                **batch, max_new_tokens=length, min_new_tokens=length, do_sample=False, eos_token_id=None,
                pad_token_id=PAD,
            )  # fmt: skip
            seconds += time.process_time() - started
        return REQUESTS / seconds

    def _model(self) -> Any:
        if self.name == "phi3_v":
            config, architecture = phi3_v.classes()
            options = {"key_mapping": phi3_v.HUB_NAMES, "config": config.from_pretrained(self.path)}
            return architecture.from_pretrained(self.path, dtype=self.dtype, **options).eval()
        return AutoModelForImageTextToText.from_pretrained(self.path, dtype=self.dtype).eval()

    def _batch(self, start: int) -> dict[str, torch.Tensor]:
        """`generate`'s arguments for 16 requests, padded on the left."""
        prompts = self.prompts[start : start + STREAMS]
        inputs = FAMILIES[self.name].inputs or (
            lambda processor, images, _: dict(processor(images, return_tensors="pt"))
        )
        processor = None if self.name == "phi3_v" else AutoImageProcessor.from_pretrained(self.path)
        rows: list[dict[str, torch.Tensor]] = []
        for prompt in prompts:
            ids = torch.tensor([prompt.add(self.preprocessor, RequestSampling()).token_ids])
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if processor is None:
                image = self.preprocessor.prepare(prompt.images[0])
                row |= {name: torch.from_numpy(array)[None] for name, array in image.tensors.items()}
            else:
                row |= {k: torch.as_tensor(v) for k, v in inputs(processor, prompt.images, ids).items()}
            rows.append(row)
        longest = max(row["input_ids"].shape[1] for row in rows)
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name in _TEXT_SHAPED:
                fill = PAD if name == "input_ids" else 0
                values = [_padded(value, longest, fill) for value in values]
            value = torch.cat(values)
            batch[name] = value.to(self.dtype) if value.is_floating_point() else value
        return batch

    def _embedded(self, family: phi3_v.Phi3VModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """transformers has no Phi-3 Vision: its text model gets the embeddings."""
        images = [
            {"pixel_values": pixels, "grid": grid}
            for pixels, grid in zip(batch["pixel_values"], batch["grid"], strict=True)
        ]
        embeddings = family.embed(batch["input_ids"])
        embeddings[batch["input_ids"] == self.preprocessor.image_token_id] = torch.cat(family.encode(images))
        return {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}


_TEXT_SHAPED = {
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask",
}  # fmt: skip


def _padded(value: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    shape = (value.shape[0], length - value.shape[1], *value.shape[2:])
    return torch.cat([torch.full(shape, fill, dtype=value.dtype), value], dim=1)


@contextmanager
def both_servers(name: str, path: Path, python: Path, logs: Path) -> Iterator[list[servers.Server]]:
    """Run our server and vLLM's until the block ends."""
    arguments = FAMILIES[name].vllm
    assert arguments is not None
    ports = [servers.free_port() for _ in range(2)]
    ours = servers.our_command(path, ports[0], ["rolling_batch=rolling"], python)
    theirs = servers.vllm_command(python, path, ports[1], arguments)
    with (
        servers.started("ours", ours, ports[0], logs / f"{name}-ours.log") as first,
        servers.started("vllm", theirs, ports[1], logs / f"{name}-vllm.log", servers.VLLM_ENVIRONMENT) as second,
    ):
        yield [first, second]


def compare(targets: list[servers.Server], rounds: int) -> list[float]:
    """Return each server's requests per second, the median over the rounds."""
    one = load.Load(requests=REQUESTS, streams=STREAMS, width=WIDTH, height=HEIGHT, words=6, warmup=STREAMS)
    found: dict[str, list[float]] = {target.name: [] for target in targets}
    for turn in range(rounds):
        for target in targets if turn % 2 else targets[::-1]:
            run = load.run(replace(one, seed=1000 * turn), target)
            failed = [reply for reply in run.replies if not reply.ok]
            if failed:
                raise SystemExit(
                    f"{target.model}, {target.name}: {len(failed)} failed: {failed[0].outcome} {failed[0].error}"
                )
            found[target.name].append(REQUESTS / (run.end - run.begin))
    return [statistics.median(found[target.name]) for target in targets]


def measure(name: str, options: argparse.Namespace, folder: Path) -> Measured:
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    path = write(name, folder / name, SIZES[options.size], dtype)
    bench = Bench(name, path, dtype)
    parameters = sum(parameter.numel() for parameter in bench._model().parameters())
    ours, theirs = [], []
    for _ in range(0 if options.no_generate else options.rounds):
        ours.append(bench.ours())
        gc.collect()
        theirs.append(bench.generate())
        gc.collect()
    mine = other = over = served = vllm = ratio = None
    if ours:
        mine, other = statistics.median(ours), statistics.median(theirs)
        over = mine / other
    if FAMILIES[name].vllm is not None and not options.no_vllm:
        with both_servers(name, path, options.vllm_python, options.output.parent) as targets:
            served, vllm = compare(targets, options.rounds)
        ratio = served / vllm
    return Measured(
        name, parameters, mine, other, over, served, vllm, ratio, bench.prepared_per_second,
        bench.tokens_per_image,
    )  # fmt: skip


def _cells(found: Measured) -> Iterator[str]:
    yield found.family
    yield f"{found.parameters / 1e6:.0f}M"
    for value in (found.ours, found.generate, found.over_generate, found.served, found.vllm, found.over_vllm):
        yield "-" if value is None else f"{value:.2f}"
    yield f"{found.prepared:.0f}"
    yield str(found.tokens_per_image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all of them by default")
    parser.add_argument("--size", choices=SIZES, default="small", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM's server out")
    parser.add_argument("--no-generate", action="store_true", help="leave transformers' generate out")
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"), help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("bench/results/families.json"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unknown = set(options.families) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    results = []
    head = (
        "family", "size", "ours/s", "generate/s", "ratio", "served/s", "vllm/s", "ratio", "images/s", "tokens",
    )  # fmt: skip
    print("".join(f"{name:>12}" for name in head))
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families or FAMILIES:
            found = measure(family, options, Path(folder))
            results.append(asdict(found))
            print("".join(f"{cell:>12}" for cell in _cells(found)), flush=True)
            saved = {"machine": report.machine(), "dtype": options.dtype, "families": results}
            options.output.write_text(json.dumps(saved, indent=2) + "\n")


if __name__ == "__main__":
    main()
