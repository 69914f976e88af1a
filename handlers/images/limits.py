"""What one image may cost, and where it may come from."""

from __future__ import annotations

from dataclasses import dataclass

from handlers.images.decoder import WHITE, Color
from properties.settings import VisionSettings

_DEFAULTS = VisionSettings()


@dataclass(frozen=True)
class ImageLimits:
    """The options of `VisionSettings` about images, in bytes, and `max_concurrent_fetches` of all requests together."""

    fetch_timeout: float = _DEFAULTS.image_fetch_timeout
    max_bytes: int = _DEFAULTS.max_image_bytes
    max_pixels: int = _DEFAULTS.max_image_pixels
    max_redirects: int = _DEFAULTS.image_fetch_max_redirects
    allowed_domains: tuple[str, ...] | None = None
    allow_private: tuple[str, ...] = ()
    max_concurrent_fetches: int = 64
    cache_bytes: int = _DEFAULTS.image_cache_mb * 2**20
    memory_bytes: int = _DEFAULTS.image_memory_mb * 2**20
    background: Color = WHITE

    @classmethod
    def of(cls, settings: VisionSettings) -> ImageLimits:
        """Read the limits from the user's configuration."""
        domains = settings.allowed_media_domains
        background = (settings.media_io_kwargs or {}).get("image", {}).get("rgba_background_color", WHITE)
        red, green, blue = background
        return cls(
            fetch_timeout=settings.image_fetch_timeout,
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_redirects=settings.image_fetch_max_redirects,
            allowed_domains=None if domains is None else tuple(domains),
            allow_private=tuple(settings.image_fetch_allow_private),
            cache_bytes=settings.image_cache_mb * 2**20,
            memory_bytes=settings.image_memory_mb * 2**20,
            background=(red, green, blue),
        )
