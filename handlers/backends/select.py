"""Which backend serves a model, and for which reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from handlers.backends.vllm.compat import INSTALL, check_version, installed_version
from handlers.backends.vllm.compat import architectures as vllm_architectures
from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration
from properties.field import BackendName
from properties.problem import ConfigurationError, Problem

if TYPE_CHECKING:
    from handlers.backends.backend import Backend

BACKENDS: dict[BackendName, str] = {
    "rolling": "handlers.backends.rolling.backend:RollingBackend",
    "vllm": "handlers.backends.vllm.backend:VllmBackend",
}
"""The module and class of each `Backend`, imported only when it is used."""

RollingBatch = Literal["auto", "vllm", "rolling", "disable"]

_DROPPED_BY_VLLM = {
    "MllamaForConditionalGeneration": "0.10.2",
    "FuyuForCausalLM": "0.25",
    "ChameleonForConditionalGeneration": "0.28",
}
"""For each architecture, the last vLLM version that served it."""

_REMOTE_CODE_IN_VLLM = frozenset({"Phi3VForCausalLM"})
"""Served by vLLM only with the model's own Python code."""

TESTED_VERSION = "0.32"

_TESTED = {
    "ForCausalLM": """
    AXK1 Afmoe Apertus Arcee BailingMoe BailingMoeV2 BailingMoeV2_5 BailingMoeV3 Bloom Cohere Cohere2 Cohere2Moe
    Cwm Dbrx DeciLM Deepseek DeepseekOCR DeepseekOCR2 DeepseekV2 DeepseekV3 DeepseekV32 DeepseekV4 DeepseekV41
    DeepseekVLV2 Dots3Note DotsOCR Ernie4_5 Ernie4_5_Moe Exaone Exaone4 ExaoneMoE ExaoneMoe Falcon FalconH1
    FalconMamba FlexOlmo GLM4V GPTBigCode GPTJ GPTNeoX Gemma Gemma2 Gemma3 Gemma3n Gemma4 Glm Glm4 Glm4Moe
    Glm4MoeLite Glm5Next GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared
    GraniteSWA HCXVisionV2 HYV3 HYV4 HrmText HunYuanDenseV1 HunYuanMoEV1 HyperCLOVAX IQuestCoder IQuestLoopCoder
    Inkling InternLM2 InternLM3 Jais2 Jamba K2Horizon KimiLinear LLaMA Laguna Lfm2 Lfm2Moe Llama Llama4
    LongcatFlash LongcatFlashNgram Mamba Mamba2 Mellum MiMo MiMoV2 MiMoV2Flash MiMoV2Omni MiniCPM MiniCPM3
    MiniMaxM2 MiniMaxM3Sparse Ministral3 Mistral MistralLarge3 Mixtral Molmo Moondream3 MoonshotKimia MuseGlimmer
    Nanbeige Nemotron NemotronH NemotronHPuzzle OPT Olmo Olmo2 Olmo3 OlmoHybrid Olmoe Orion Ovis2_6 Ovis2_6_Moe
    PanguEmbedded PanguProMoEV2 PanguUltraMoE Param2MoE Phi Phi3 Phi3V Phi4MM PhiMoE Plamo3 Qwen2 Qwen2Moe Qwen3
    Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe Qwen4Exp Rnj1 SarvamMLA SarvamMoE SeedOss SmolLM3 Solar StableLm
    Starcoder2 Step1 Step3Text Step3p5 TeleChat2 TeleChat3 TeleFLM UnlimitedOCR VaultGemma Zamba2
    """,
    "ForConditionalGeneration": """
    Aria AudioFlamingo3 Bagel BailingMoeV3VL Bee Blip2 ChatGLM Cohere2Vision CohereAsr CohereCompass Cosmos3
    Cosmos3Edge DeepseekV4 Eagle2_5_VL Emu3 Ernie4_5_VLMoe Exaone4_5_ FireRedASR2 FunASR FunAudioChat Gemma3
    Gemma3n Gemma4 Gemma4Unified Glm4v Glm4vMoe Glm5Next GlmAsr GlmOcr Granite4Vision GraniteSpeech
    GraniteSpeechPlus HunYuanVL Idefics3 Inkling InternS1 InternS1Pro InternS2Mobius InternS2Preview InternVL
    Isaac KananaV Keye KeyeVL1_5 KimiK25 KimiK3 KimiVL Lfm2Vl LightOnOCR Llama4 Llava LlavaNext LlavaNextVideo
    LlavaOnevision LlavaOnevision2 MiniCPMV4_6 MiniCPMV4_7 MiniMaxM3Sparse Mistral3 Molmo2 MossTranscribeDiarize
    MuseGlimmer NemotronParse OpenCUA OpenPanguVL PaddleOCRVL PaliGemma Pixtral QianfanOCR Qwen2Audio Qwen2VL
    Qwen2_5Omni Qwen2_5_VL Qwen3ASR Qwen3OmniMoe Qwen3VL Qwen3VLMoe Qwen3_5 Qwen3_5Moe Qwen4Exp R SmolVLM Step3VL
    Step3p7 StepVL VibeVoiceAsr Voxtral Whisper
    """,
    "": """
    ChatGLMModel DiffusionGemmaForBlockDiffusion GPT2LMHeadModel H2OVLChatModel HfMoondream InternVLChatModel
    Llama_Nemotron_Nano_VL MiDashengLMModel MiniCPMO MiniCPMV MossAudioModel NVLM_D
    NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3
    NemotronH_Super_Omni_Reasoning_V3 OpenVLAForActionPrediction Ovis Ovis2_5 Phi4ForCausalLMV Qwen2_5OmniModel
    Qwen3ASRRealtimeGeneration SkyworkR1VChatModel UltravoxModel VoxtralRealtimeGeneration
    """,
}

TESTED_ARCHITECTURES = frozenset(name + suffix for suffix, names in _TESTED.items() for name in names.split())
"""What the vLLM that is tested serves, for where none is installed."""


@dataclass(frozen=True)
class Choice:
    """The backend that serves, and the reason, for people."""

    backend: BackendName
    reason: str


def backend_of(name: BackendName) -> Backend:
    """Return the backend of that name; nothing is loaded."""
    module, _, kind = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), kind)()
    return backend


def vllm_installed() -> bool:
    """Whether vLLM can be imported; it is not imported here."""
    return find_spec("vllm") is not None


def vllm_version_problem() -> str | None:
    """Return why the installed vLLM cannot be driven; None if it can, or if none is installed."""
    try:
        if vllm_installed():
            check_version(installed_version())
    except InvalidConfiguration as error:
        return error.message
    return None


def choose_for(
    configuration: Configuration, config: Mapping[str, Any], accelerators: int, *, vllm: bool | None = None
) -> Choice:
    """Return what `choose` says of a configuration, which may also ask for vLLM by LMI's own options.

    Such options are only a preference: if vLLM cannot be used, the embedded engine serves, and the reason says so.

    Args:
        configuration: The options.
        config: The model's config.json.
        accelerators: Devices that the process sees.
        vllm: Whether vLLM is installed; None to find out.
    """
    settings = configuration.settings
    choice = choose(
        settings.rolling_batch,
        config.get("architectures") or [],
        accelerators,
        vllm=vllm,
        trust_remote_code=settings.trust_remote_code,
    )
    asked_by = configuration.vllm_asked_by
    if asked_by is None or choice.backend == "vllm":
        return choice
    return replace(choice, reason=f"{asked_by} asks for vLLM, but {choice.reason}")


def choose(
    rolling_batch: RollingBatch,
    architectures: Sequence[str],
    accelerators: int,
    *,
    vllm: bool | None = None,
    listed: Collection[str] | None = None,
    trust_remote_code: bool = False,
) -> Choice:
    """Apply `option.rolling_batch` to a model and a machine.

    Args:
        rolling_batch: The option.
        architectures: From the model's config.json; empty if it is not known.
        accelerators: Devices that the process sees.
        vllm: Whether vLLM is installed; None to find out.
        listed: The architectures that vLLM lists; None to find out.
        trust_remote_code: Whether the model's own Python code may run.

    Raises:
        ConfigurationError: vLLM is demanded and cannot serve.
    """
    installed = vllm_installed() if vllm is None else vllm
    if listed is None:
        listed = vllm_architectures() if installed else ()
    refusal = _refusal(architectures, installed, trust_remote_code)
    if vllm is None and refusal is None:
        refusal = vllm_version_problem()
    if rolling_batch == "vllm":
        if refusal is not None:
            raise ConfigurationError(
                [Problem(f"option.rolling_batch = 'vllm': {refusal}; use rolling or auto", "rolling_batch")]
            )
        return Choice("vllm", "option.rolling_batch says so")
    if rolling_batch == "rolling":
        return Choice("rolling", "option.rolling_batch says so")
    if rolling_batch == "disable":
        return Choice("rolling", "option.rolling_batch = disable: the embedded engine, one request at a time")
    if refusal is not None:
        return Choice("rolling", refusal)
    if accelerators == 0:
        return Choice("rolling", "no accelerator is visible")
    if listed and architectures and not set(architectures) & set(listed):
        return Choice("rolling", f"the installed vLLM does not list {', '.join(architectures)}")
    return Choice("vllm", "vLLM is installed, sees an accelerator and serves the model")


def remedy(architectures: Sequence[str], *, vllm: bool | None = None) -> str:
    """Return what to do about a model that the embedded engine does not serve, with the arguments of `choose`."""
    installed = vllm_installed() if vllm is None else vllm
    listed = vllm_architectures() if installed else TESTED_ARCHITECTURES
    for name in architectures:
        if name in _DROPPED_BY_VLLM:
            return f"vLLM {_DROPPED_BY_VLLM[name]} was the last to serve {name}: serve a model of another family"
        if name in listed:
            how = "set" if installed else f"{INSTALL} and set"
            code = " and option.trust_remote_code=true" if name in _REMOTE_CODE_IN_VLLM else ""
            return f"vLLM serves {name}: {how} option.rolling_batch=vllm{code}"
    theirs = "the installed vLLM" if installed else f"vLLM {TESTED_VERSION}"
    named = ", ".join(architectures) or "a config.json without architectures"
    return f"{theirs} does not list {named} either: serve a model of a family that is served"


def _refusal(architectures: Sequence[str], installed: bool, remote_code: bool) -> str | None:
    """Return why vLLM cannot serve; None if it can."""
    if not installed:
        return "vLLM is not installed"
    for name in architectures:
        if name in _DROPPED_BY_VLLM:
            return f"vLLM {_DROPPED_BY_VLLM[name]} was the last to serve {name}"
        if name in _REMOTE_CODE_IN_VLLM and not remote_code:
            return f"vLLM serves {name} only with option.trust_remote_code=true"
    return None
