"""What Prometheus reads: counts kept in plain numbers on the event loop, exported when someone asks.

Implements `handlers.observer.Observer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from container.bodies import Bodies
from container.connections import Connections
from handlers.backends.base import BackendStats
from handlers.exchange import RequestFacts
from handlers.images.loader import ImageLoader

_TTFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80, 160)
_GAP = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 240, 480)


class Metrics:
    """The server's counters since its start, and a registry of its own that exports them."""

    def __init__(self, stats: Callable[[], BackendStats | None]) -> None:
        """stats: asked at each export; None while there is no backend.

        `facts` holds those of finished requests by request id until the request's log line has been written.
        """
        self._stats = stats
        first_token, token_gap, self._duration = self._histograms = (
            _histogram("time_to_first_token", "From a request's arrival to its first token.", _TTFT),
            _histogram("inter_token_latency", "Between two steps of one request that brought tokens.", _GAP),
            _histogram("request_duration", "From a request's arrival to its end.", _WHOLE),
        )
        self.on_first_token = first_token.observe
        self.on_token_gap = token_gap.observe
        self.in_flight = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.image_tokens = 0
        self.generation_tokens = 0
        self.images = 0
        self.finished: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.http: Counter[tuple[str, str]] = Counter()
        self.pictures: ImageLoader | None = None
        self.bodies: Bodies | None = None
        self.connections: Connections | None = None
        self.facts: dict[str, RequestFacts] = {}
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def on_admitted(self) -> None:
        self.in_flight += 1

    def on_finished(self, facts: RequestFacts) -> None:
        self.facts[facts.request_id] = facts
        self.in_flight -= 1
        self.prompt_tokens += facts.prompt_tokens
        self.cached_tokens += facts.cached_tokens
        self.image_tokens += facts.image_tokens
        self.generation_tokens += facts.completion_tokens
        self.images += facts.images
        self.finished["error" if facts.error else facts.finish_reason or "abort"] += 1
        if facts.total is not None:
            self._duration.observe(facts.total)

    def on_error(self, kind: str) -> None:
        self.errors[kind] += 1

    def on_http(self, route: str, status: int) -> None:
        """A request to a route was answered; status 499 is a client that left before."""
        self.http[route, str(status)] += 1

    def export(self, accept: str, names: Sequence[str] = ()) -> tuple[bytes, str]:
        """The exposition and its content type, in the format that an Accept header prefers.

        names: only these series, e.g. "lmi_requests_running"; all when empty.
        """
        encode, content_type = choose_encoder(accept)
        registry = self.registry.restricted_registry(names) if names else self.registry
        return encode(registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from self._own()
        stats = self._stats()
        if stats is not None:
            yield from _of_backend(stats)
            yield from stats.series

    def describe(self) -> Iterator[Metric]:
        yield from self._own()
        yield from _of_backend(BackendStats())

    def _own(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "lmi_requests_in_flight", "Requests admitted and not yet answered.", value=self.in_flight
        )
        for name, meaning, value in (
            (
                "lmi_request_bodies_held_bytes",
                "Bytes of request bodies held, counted from their arrival until their replies end.",
                0 if self.bodies is None else self.bodies.held,
            ),
            (
                "lmi_request_bodies_arriving",
                "Request bodies that have not arrived whole.",
                0 if self.bodies is None else len(self.bodies.reading),
            ),
            (
                "lmi_connections",
                "Open connections of clients.",
                0 if self.connections is None else self.connections.open,
            ),
            (
                "lmi_connections_idle",
                "Of them those without a request, or with an unfinished head.",
                0 if self.connections is None else len(self.connections.idle),
            ),
        ):
            yield GaugeMetricFamily(name, meaning, value=value)
        for histogram in self._histograms:
            for family in histogram.collect():
                family.samples = [one for one in family.samples if not one.name.endswith("_created")]
                yield family
        for name, meaning, value in (
            (
                "lmi_prompt_tokens",
                "Tokens of prompts, placeholders of pictures included.",
                self.prompt_tokens,
            ),
            ("lmi_prompt_tokens_cached", "Prompt tokens found in the prefix cache.", self.cached_tokens),
            ("lmi_image_tokens", "Placeholder tokens of pictures.", self.image_tokens),
            ("lmi_generation_tokens", "Tokens generated.", self.generation_tokens),
            ("lmi_images", "Pictures in requests.", self.images),
        ):
            yield CounterMetricFamily(name, meaning, value=value)
        if self.pictures is not None:
            yield from _of_pictures(self.pictures)
        finished = CounterMetricFamily(
            "lmi_requests_finished", "Requests ended: stop, length, abort or error.", labels=["reason"]
        )
        for reason, count in self.finished.items():
            finished.add_metric([reason], count)
        yield finished
        errors = CounterMetricFamily("lmi_errors", "Errors answered, by kind.", labels=["kind"])
        for kind, count in self.errors.items():
            errors.add_metric([kind], count)
        yield errors
        http = CounterMetricFamily(
            "lmi_http_requests",
            "Requests by route and status; 499: the client left.",
            labels=["route", "status"],
        )
        for labels, count in self.http.items():
            http.add_metric(labels, count)
        yield http


def _histogram(name: str, meaning: str, bounds: Sequence[float]) -> Histogram:
    """bounds: the buckets' inclusive upper ends in seconds, ascending."""
    return Histogram(f"lmi_{name}_seconds", meaning, buckets=bounds, registry=None)


def _of_pictures(loader: ImageLoader) -> Iterator[Metric]:
    for name, meaning, value in (
        ("lmi_images_fetched", "Pictures fetched over HTTP.", loader.fetched),
        ("lmi_image_fetched_bytes", "Bytes of pictures fetched over HTTP.", loader.bytes),
        ("lmi_images_decoded", "Pictures decoded.", loader.decoded),
        ("lmi_image_cache_hits", "Pictures found decoded already.", loader.cache_hits),
        ("lmi_image_decoders_started", "Processes that decode images, started.", loader.decoders.started),
        (
            "lmi_image_decoders_died",
            "Of them, ended over an image, which failed with a 4xx.",
            loader.decoders.died,
        ),
        (
            "lmi_image_decoders_killed",
            "Of them, killed: nobody waited for their image any more, or they did not run.",
            loader.decoders.killed,
        ),
    ):
        yield CounterMetricFamily(name, meaning, value=value)


def _of_backend(stats: BackendStats) -> Iterator[Metric]:
    blocks = stats.kv_blocks_total
    for name, meaning, value in (
        ("lmi_requests_running", "Requests in the rolling batch.", stats.running),
        ("lmi_requests_waiting", "Requests in the queue.", stats.waiting),
        (
            "lmi_kv_cache_usage_ratio",
            "Part of the key/value cache in use.",
            stats.kv_blocks_used / blocks if blocks else 0.0,
        ),
        ("lmi_replicas", "Copies of the model.", stats.replicas),
        ("lmi_replicas_ready", "Copies of the model that can generate.", stats.replicas_ready),
    ):
        yield GaugeMetricFamily(name, meaning, value=value)
    for name, meaning, value in (
        (
            "lmi_prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.prefix_cache_queries,
        ),
        ("lmi_prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
        (
            "lmi_encoder_cache_queries",
            "Pictures looked up in the vision encoder's cache (with vLLM, in that of prepared pictures).",
            stats.encoder_cache_queries,
        ),
        ("lmi_encoder_cache_hits", "Pictures found there.", stats.encoder_cache_hits),
        ("lmi_preemptions", "Requests put back into the queue for want of memory.", stats.preemptions),
        ("lmi_engine_restarts", "Engine processes started anew.", stats.engine_restarts),
    ):
        yield CounterMetricFamily(name, meaning, value=value)
