"""Options about images: how many, from where, how large, and what is kept of them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from properties.field import ROLLING, Variable, option
from properties.values import Count, JsonObject, Limits, MediaOptions, Names, Networks, Positive, Seconds


class VisionSettings(BaseModel):
    """Images"""

    limit_mm_per_prompt: Limits = option(
        "Most items per prompt, by modality; images that are not named: 1. Only images are served.",
        default={"image": 1, "video": 0, "audio": 0},
    )
    enable_mm_embeds: bool = option(
        "Chat requests may send the embeddings of an image, as the model's projector makes them, in its place.",
        default=False,
    )
    image_placeholder_token: str | None = option(
        "Text that stands for an image in a prompt. Default: what the model's processor says.",
        default=None,
        verbatim=True,
    )
    image_fetch_timeout: Seconds = option(
        "Longest time to fetch one image: connections, redirects and transfer together.",
        default=10,
        unit="s",
        variables=(Variable("APHRODITE_IMAGE_FETCH_TIMEOUT"), Variable("VLLM_IMAGE_FETCH_TIMEOUT")),
    )
    image_fetch_max_redirects: Count = option(
        "Redirects followed for one image; every target is checked again.", default=3
    )
    allowed_media_domains: Names | None = option(
        "Images are fetched only from these hosts (exact names). Default: any public host.", default=None
    )
    image_fetch_allow_private: Networks = option(
        "Hosts, addresses and networks that may be fetched from even if private, loopback or link-local.",
        default=[],
    )
    max_image_bytes: Positive = option(
        "Largest image file, fetched or inline.", default=20 * 2**20, unit="bytes"
    )
    max_image_pixels: Positive = option(
        "Largest image, width times height, checked before it is decoded.",
        default=89_478_485,
        unit="pixels",
        variables=(Variable("VLLM_MAX_IMAGE_PIXELS"),),
    )
    image_cache_mb: Count = option(
        "Host memory for a cache of decoded images, by content. The embedded engine uses half as much again for "
        "prepared images. 0: no cache.",
        default=32,
        unit="MiB",
    )
    image_memory_mb: Positive = option(
        "Host memory for the decoded images of running requests, besides the cache. A prompt whose images do not fit "
        "waits, and one that needs more than all of it is served alone. Decoding may use as much again.",
        default=1024,
        unit="MiB",
    )
    encoder_cache_mb: Count | None = option(
        "Device memory for a cache of the vision encoder's outputs, by content. 0: no cache. Default: 256 on an "
        "accelerator, 32 on a CPU.",
        default=None,
        backends=ROLLING,
        unit="MiB",
    )
    image_processor_backend: Literal["auto", "torchvision", "pil"] = option(
        "How images are resized and normalised. `torchvision` resizes several times faster than `pil`; for "
        "photographs a few values in a thousand differ, by one level of 255. The embedded engine needs no "
        "torchvision for it. `auto`: as transformers does on this machine, which is torchvision's way where it is "
        "installed.",
        default="auto",
        backends=ROLLING,
    )
    media_io_kwargs: MediaOptions | None = option(
        "Background of transparent images: rgba_background_color of image, as red, green and blue from 0 to 255. "
        "Default: white.",
        default=None,
    )
    mm_processor_kwargs: JsonObject | None = option(
        'Arguments for the model\'s image processor, e.g. {"max_pixels": 802816}.', default=None
    )
