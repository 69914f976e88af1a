"""From a loaded backend to what answers requests."""

from __future__ import annotations

from container.names import public_names
from handlers.backends.base import Backend
from handlers.images.loader import ImageLoader
from handlers.observer import Observer
from handlers.parsers.select import answer_formats
from handlers.service import Service, ServiceLimits
from handlers.sessions import Sessions
from properties.configuration import Configuration


def build_service(
    configuration: Configuration, backend: Backend, images: ImageLoader, observer: Observer
) -> Service:
    """What answers requests with a loaded backend."""
    settings = configuration.settings
    return Service(
        backend,
        images,
        ServiceLimits(
            job_queue_size=settings.job_queue_size,
            max_rolling_batch_size=settings.max_rolling_batch_size,
            predict_timeout=settings.predict_timeout,
            limit_mm_per_prompt=settings.limit_mm_per_prompt,
            request_priorities=settings.request_priorities,
            trust_request_chat_template=settings.trust_request_chat_template,
            chunked_read_timeout=settings.chunked_read_timeout,
        ),
        model_name=public_names(configuration)[0],
        output_formatter=settings.output_formatter,
        tgi_compat=settings.tgi_compat,
        formats=answer_formats(
            settings.tool_call_parser, settings.enable_auto_tool_choice, settings.reasoning_parser
        ),
        sessions=Sessions(enabled=settings.enable_stateful_sessions, expiration=settings.sessions_expiration),
        observer=observer,
    )
