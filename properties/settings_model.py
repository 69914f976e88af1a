"""Options that say which model to serve and how to load it."""

from __future__ import annotations

from pydantic import BaseModel, SecretStr

from properties.field import VLLM, Level, Variable, option, server_key
from properties.values import Count, Dtype, Engine, Names, Positive, Seconds, Seed, Task, Word


class ModelSettings(BaseModel):
    """Model and loading"""

    model_id: str | None = option(
        "What to serve: a directory, a Hugging Face hub id, or s3://bucket/prefix/.",
        default=None,
        variables=(Variable("HF_MODEL_ID"),),
    )
    revision: str | None = option(
        "Branch, tag or commit of a hub model.",
        default=None,
        variables=(Variable("HF_REVISION"), Variable("HF_MODEL_REVISION", Level.TGI)),
    )
    served_model_name: Names = option(
        "Names that clients may call the model by; replies show the first. Empty: the model's own name.",
        default=[],
    )
    task: Task = option(
        "What the model is for. Only generation is served.",
        default="auto",
        variables=(Variable("HF_TASK"),),
    )
    engine: Engine = server_key(
        "LMI's engine name; the only one is Python.",
        default="Python",
        replaced=(("MPI", "Python"), ("DeepSpeed", "Python"), ("FasterTransformer", "Python")),
    )
    dtype: Dtype = option(
        "Type of weights and activations. auto: as config.json says, where the device computes in that; see above.",
        default="auto",
    )
    quantize: Word | None = option(
        "Quantise while loading, e.g. fp8 or int8_per_channel_weight_only. Leave out for a model that is quantised "
        "already: vLLM reads how from its config.json.",
        default=None,
        backends=VLLM,
        aliases=("quantization",),
        variables=(Variable("HF_MODEL_QUANTIZE", Level.TGI),),
    )
    load_format: Word = option(
        "How weights are read. The embedded engine reads safetensors (auto, safetensors), and with pt also "
        "pytorch_model.bin, a pickle of which nothing is run. vLLM knows more, e.g. dummy, runai_streamer; its auto "
        "reads .bin where there are no safetensors.",
        default="auto",
        embedded=("auto", "safetensors", "pt"),
    )
    tokenizer_mode: Word = option(
        "vLLM's tokeniser implementation, e.g. auto, hf. Prompts are tokenised by this server anyway. For a model "
        "with Mistral's own files it is chosen here: mistral where the weights are in no other format, else hf.",
        default="auto",
        backends=VLLM,
    )
    trust_remote_code: bool = option(
        "Run Python code that comes with the model.",
        default=False,
        variables=(
            Variable("HF_MODEL_TRUST_REMOTE_CODE", Level.TGI),
            Variable("HF_TRUST_REMOTE_CODE", Level.TGI, instead="OPTION_TRUST_REMOTE_CODE"),
        ),
    )
    seed: Seed = option("Seed of the engine for requests that bring none.", default=0, backends=VLLM)
    model_loading_timeout: Seconds = option(
        "Longest time until the model can generate.",
        default=1800,
        unit="s",
        variables=(
            Variable("SAGEMAKER_STARTUP_TIMEOUT", Level.SAGEMAKER),
            Variable("MODEL_LOADING_TIMEOUT"),
        ),
    )
    entry_point: str | None = option(
        "Python file of a custom handler, relative to the model directory, which answers instead of an engine. "
        "Default: model.py where it defines the handler.",
        default=None,
        aliases=("entryPoint", "entrypoint"),
        variables=(Variable("DJL_ENTRY_POINT"),),
    )
    handler: str = option("Function that the custom handler is called by.", default="handle")
    download_dir: str | None = server_key(
        "Where models from s3:// are kept. Default: below the temporary directory.", default=None
    )
    offline: bool = option(
        "Never contact the hub: use what is on this machine.",
        default=False,
        variables=(
            Variable("HF_HUB_OFFLINE"),
            Variable("DJL_OFFLINE"),
            Variable("TRANSFORMERS_OFFLINE", rank=1),
        ),
    )
    hf_token: SecretStr | None = option(
        "Hugging Face token for private and gated models.",
        default=None,
        secret=True,
        variables=(
            Variable("HF_TOKEN"),
            Variable("HUGGING_FACE_HUB_TOKEN", Level.TGI, instead="HF_TOKEN"),
        ),
    )
    enable_lora: bool = option("Serve LoRA adapters of the model.", default=False, backends=VLLM)
    max_loras: Positive = option("Adapters in one batch.", default=4, backends=VLLM)
    max_lora_rank: Positive = option("Highest rank of an adapter.", default=16, backends=VLLM)
    max_cpu_loras: Count | None = option(
        "Adapters kept in host memory. Default: max_loras.", default=None, backends=VLLM
    )
    allowed_adapter_path: str = option(
        "Directory below which adapters may lie that `POST /adapters` names, besides the model's own adapters/. "
        "Empty: none.",
        default="/opt/ml",
        backends=VLLM,
    )
    lora_dtype: Dtype = option("Type of adapter weights.", default="auto", backends=VLLM)
    fully_sharded_loras: bool = option(
        "Shard adapter computation fully over a tensor-parallel group.", default=False, backends=VLLM
    )
