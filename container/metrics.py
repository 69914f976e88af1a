"""The metrics for Prometheus: the server's own, and the backend's, which are requested at each export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families

from container.bodies import Bodies
from container.protocol import Connections
from handlers.backends.base import BackendStats
from handlers.images.loader import ImageLoader
from handlers.request import Observer, RequestFacts

_TTFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
_GAP = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 240, 480)

_OF_THE_SOCKET = ("lmi_connections", "lmi_request_bodies", "lmi_http_requests")
_OF_THE_SERVER = (*_OF_THE_SOCKET, "lmi_errors", "process_")
"""What a server of several models counts itself. It omits its models' counts of their own connections."""


class Metrics(Observer):
    """The server's metrics since its start, and a registry of its own that exports them.

    Attributes:
        bodies: Read at each export, once it is set.
        connections: The same.
        images: The same.
        facts: The facts of finished requests by request id, until the request's log line has been written.
    """

    def __init__(self, stats: Callable[[], BackendStats | None]) -> None:
        """Begin counting. stats: called at each export; it returns None while there is no backend."""
        self._stats = stats
        self.bodies: Bodies | None = None
        self.connections: Connections | None = None
        self.images: ImageLoader | None = None
        self.facts: dict[str, RequestFacts] = {}
        self.running: dict[int, RequestFacts] = {}
        self._own = CollectorRegistry()
        gauge, counter = partial(Gauge, registry=self._own), partial(Counter, registry=self._own)
        histogram = partial(Histogram, registry=self._own)
        self._in_flight = gauge("lmi_requests_in_flight", "Requests admitted and not yet answered.")
        gauge(
            "lmi_request_bodies_held_bytes",
            "Bytes of request bodies held, counted from their arrival until their replies end.",
        ).set_function(lambda: self.bodies.held if self.bodies else 0)
        gauge("lmi_request_bodies_arriving", "Request bodies that have not arrived whole.").set_function(
            lambda: len(self.bodies.reading) if self.bodies else 0
        )
        gauge("lmi_connections", "Open connections of clients.").set_function(
            lambda: self.connections.open if self.connections else 0
        )
        gauge("lmi_connections_idle", "Of them those without a request, or with an unfinished head.").set_function(
            lambda: len(self.connections.idle) if self.connections else 0
        )
        self._first_token = histogram(
            "lmi_time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=_TTFT
        )
        self._token_gap = histogram(
            "lmi_inter_token_latency_seconds", "Between two steps of one request that brought tokens.", buckets=_GAP
        )
        self._duration = histogram(
            "lmi_request_duration_seconds", "From a request's arrival to its end.", buckets=_WHOLE
        )
        self._prompt_tokens = counter("lmi_prompt_tokens", "Tokens of prompts, placeholders of images included.")
        self._cached_tokens = counter("lmi_prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._image_tokens = counter("lmi_image_tokens", "Placeholder tokens of images.")
        self._generation_tokens = counter("lmi_generation_tokens", "Tokens generated.")
        self._images = counter("lmi_images", "Images in requests.")
        self._finished = counter("lmi_requests_finished", "Requests ended: stop, length, abort or error.", ["reason"])
        self._errors = counter("lmi_errors", "Errors answered, by kind.", ["kind"])
        self._http = counter(
            "lmi_http_requests", "Requests by route and status; 499: the client left.", ["route", "status"]
        )
        self._exported = CollectorRegistry()
        self._exported.register(self)
        ProcessCollector(registry=self._exported)

    def on_admitted(self, facts: RequestFacts) -> None:
        self.running[id(facts)] = facts
        self._in_flight.inc()

    def on_finished(self, facts: RequestFacts) -> None:
        self.running.pop(id(facts), None)
        self.facts[facts.request_id] = facts
        self._in_flight.dec()
        self._prompt_tokens.inc(facts.prompt_tokens)
        self._cached_tokens.inc(facts.cached_tokens)
        self._image_tokens.inc(facts.image_tokens)
        self._generation_tokens.inc(facts.completion_tokens)
        self._images.inc(facts.images)
        self._finished.labels("error" if facts.error else facts.finish_reason or "abort").inc()
        if facts.total is not None:
            self._duration.observe(facts.total)

    def on_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def on_token_gap(self, seconds: float) -> None:
        self._token_gap.observe(seconds)

    def on_error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def on_http(self, route: str, status: int) -> None:
        """Count a reply on a route; status 499 is a client that left before it."""
        self._http.labels(route, status).inc()

    def export(
        self, accept: str, names: Sequence[str] = (), models: Mapping[str, str] | None = None
    ) -> tuple[bytes, str]:
        """Return the exposition and its content type, in the format that an Accept header prefers.

        Args:
            accept: The header.
            names: Export only these series, e.g. "lmi_requests_running"; all if empty.
            models: Of a server of several models, what each of them exports, by its name.
        """
        encode, content_type = choose_encoder(accept)
        registry: Any = self._exported
        if models is not None:
            registry = CollectorRegistry(auto_describe=False)
            registry.register(_Several(self._exported, models))
        return encode(registry.restricted_registry(names) if names else registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; called by the registry."""
        yield from self._server()
        stats = self._stats()
        if stats is not None:
            yield from _of_backend(stats)
            yield from stats.series

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics' names; called by the registry."""
        yield from self._server()
        yield from _of_backend(BackendStats())

    def _server(self) -> Iterator[Metric]:
        for family in self._own.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
        if self.images is not None:
            yield from _of_images(self.images)


class _Several:
    """The metrics of a server of several models: its own connections and bodies, and each model's, with its name."""

    def __init__(self, own: CollectorRegistry, models: Mapping[str, str]) -> None:
        self._own = own
        self._models = models

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        families = {one.name: one for one in self._own.collect() if one.name.startswith(_OF_THE_SERVER)}
        for model, text in self._models.items():
            for family in text_string_to_metric_families(text):
                if family.name.startswith(_OF_THE_SOCKET):
                    continue
                samples, family.samples = family.samples, []
                into = families.setdefault(family.name, family)
                into.samples += [one._replace(labels={"model": model, **one.labels}) for one in samples]
        yield from families.values()


def _of_images(loader: ImageLoader) -> Iterator[Metric]:
    decoders = loader.decoders
    yield from _counters(
        ("lmi_images_fetched", "Images fetched over HTTP.", loader.fetched),
        ("lmi_image_fetched_bytes", "Bytes of images fetched over HTTP.", loader.bytes),
        ("lmi_images_decoded", "Images decoded.", loader.decoded),
        ("lmi_image_cache_hits", "Images found decoded already.", loader.cache_hits),
        ("lmi_image_decoders_started", "Processes that decode images, started.", decoders.started),
        ("lmi_image_decoders_died", "Of them, ended over an image, which failed with a 4xx.", decoders.died),
        (
            "lmi_image_decoders_killed",
            "Of them, killed: nobody waited for their image any more, or they did not run.",
            decoders.killed,
        ),
    )


def _of_backend(stats: BackendStats) -> Iterator[Metric]:
    usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    for name, meaning, value in (
        ("lmi_requests_running", "Requests in the rolling batch.", stats.running),
        ("lmi_requests_waiting", "Requests in the queue.", stats.waiting),
        ("lmi_kv_cache_usage_ratio", "Part of the key/value cache in use.", usage),
        ("lmi_replicas", "Replicas of the model.", stats.replicas),
        ("lmi_replicas_ready", "Replicas of the model that can generate.", stats.replicas_ready),
    ):
        yield GaugeMetricFamily(name, meaning, value=value)
    yield from _counters(
        ("lmi_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
        ("lmi_prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
        (
            "lmi_encoder_cache_queries",
            "Images looked up in the vision encoder's cache (with vLLM, in that of prepared images).",
            stats.encoder_cache_queries,
        ),
        ("lmi_encoder_cache_hits", "Images found there.", stats.encoder_cache_hits),
        ("lmi_preemptions", "Requests put back into the queue for want of memory.", stats.preemptions),
        ("lmi_draft_tokens", "Tokens that speculative decoding drafted.", stats.draft_tokens),
        ("lmi_accepted_draft_tokens", "Of them, those that were right.", stats.accepted_tokens),
        ("lmi_engine_restarts", "Engine processes that were restarted.", stats.engine_restarts),
    )


def _counters(*counts: tuple[str, str, float]) -> Iterator[Metric]:
    for name, meaning, value in counts:
        yield CounterMetricFamily(name, meaning, value=value)
