"""Options about pictures: how many, from where, how large, and what is kept of them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from properties.field import ROLLING, Variable, option
from properties.values import Count, JsonObject, Limits, MediaOptions, Names, Networks, Positive, Seconds


class VisionSettings(BaseModel):
    """Pictures"""

    limit_mm_per_prompt: Limits = option(
        "Most items per prompt and modality. Images not named: 1. Only images are served.",
        default={"image": 1, "video": 0, "audio": 0},
    )
    enable_mm_embeds: bool = option(
        "Chat requests may send the embeddings of a picture, as the model's projector makes them, in its place.",
        default=False,
    )
    image_placeholder_token: str | None = option(
        "Text that stands for a picture in a prompt. Default: what the model's processor says.",
        default=None,
        verbatim=True,
    )
    image_fetch_timeout: Seconds = option(
        "Longest time to fetch one picture, connections, redirects and transfer together.",
        default=10,
        unit="s",
        variables=(Variable("APHRODITE_IMAGE_FETCH_TIMEOUT"), Variable("VLLM_IMAGE_FETCH_TIMEOUT")),
    )
    image_fetch_max_redirects: Count = option(
        "Redirects followed for one picture; every target is checked anew.", default=3
    )
    allowed_media_domains: Names | None = option(
        "Only pictures from these hosts (exact names) are fetched. Default: any public host.", default=None
    )
    image_fetch_allow_private: Networks = option(
        "Hosts, addresses and networks that may be fetched from although private, loopback or link-local.",
        default=[],
    )
    max_image_bytes: Positive = option(
        "Largest picture file, fetched or inline.", default=20 * 2**20, unit="bytes"
    )
    max_image_pixels: Positive = option(
        "Largest picture, width times height, checked before it is decoded.",
        default=89_478_485,
        unit="pixels",
        variables=(Variable("VLLM_MAX_IMAGE_PIXELS"),),
    )
    image_cache_mb: Count = option(
        "Host memory for decoded pictures, found again by their content; the embedded engine keeps prepared "
        "ones in half as much again. 0: none.",
        default=32,
        unit="MiB",
    )
    image_memory_mb: Positive = option(
        "Host memory for decoded pictures that requests hold, beside those kept; a prompt whose pictures find no "
        "room waits, and one that needs more than all of it is served alone. Once more as much is what decoding may "
        "take.",
        default=1024,
        unit="MiB",
    )
    encoder_cache_mb: Count | None = option(
        "Device memory for outputs of the vision encoder, found again by the picture's content; 0: none. Default: 256 "
        "on an accelerator, 32 on a CPU.",
        default=None,
        backends=ROLLING,
        unit="MiB",
    )
    image_processor_backend: Literal["auto", "torchvision", "pil"] = option(
        "How pictures are resized and normalised. `torchvision` resizes several times faster than `pil`; for "
        "photographs a few values in a thousand differ, by one level of 255. The embedded engine needs no "
        "torchvision for it. `auto`: as transformers does on this machine, which is torchvision's way where it is "
        "installed.",
        default="auto",
        backends=ROLLING,
    )
    media_io_kwargs: MediaOptions | None = option(
        "What a transparent picture is put on: rgba_background_color of image, in red, green and blue from 0 to "
        "255. Default: white.",
        default=None,
    )
    mm_processor_kwargs: JsonObject | None = option(
        'Arguments for the model\'s picture processor, e.g. {"max_pixels": 802816}.', default=None
    )
