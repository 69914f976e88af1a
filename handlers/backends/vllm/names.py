"""Names that vLLM knows, read from the installed version's source: an import would take seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SECRET = frozenset({"hf_token"})
"""Fields of `AsyncEngineArgs` whose value is never shown."""

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


@cache
def architectures() -> frozenset[str]:
    """Return the architectures with which the installed vLLM generates; empty if it cannot be read."""
    statements = _source("model_executor", "models", "registry.py")
    tables = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
    return frozenset[str]().union(*(_keys(statements, table) for table in tables))


@cache
def engine_argument_names() -> frozenset[str]:
    """Return the fields of `AsyncEngineArgs`, which are options here; empty if vLLM is not installed.

    So a misspelt option is reported at once, whichever backend serves.
    """
    return frozenset(
        item.target.id
        for node in _source("engine", "arg_utils.py")
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith("_")
    )


@cache
def tool_parser_names() -> frozenset[str]:
    """Return the tool parsers of the installed vLLM; empty if it is not installed."""
    return _keys(_source("tool_parsers", "__init__.py"), "_TOOL_PARSERS_TO_REGISTER")


@cache
def reasoning_parser_names() -> frozenset[str]:
    """Return its reasoning parsers."""
    return _keys(_source("reasoning", "__init__.py"), "_REASONING_PARSERS_TO_REGISTER")


def _keys(statements: list[ast.stmt], table: str) -> frozenset[str]:
    """Return the keys of a module's table."""
    return frozenset(
        str(key.value)
        for node in statements
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id == table
        for key in node.value.keys
        if isinstance(key, ast.Constant)
    )


def _source(*path: str) -> list[ast.stmt]:
    """Return the statements of a file of the installed vLLM; none if it cannot be read."""
    spec = find_spec("vllm")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        try:
            return ast.parse(Path(place, *path).read_bytes()).body
        except (OSError, SyntaxError, ValueError):
            continue
    return []
