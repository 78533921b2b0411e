"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters of one server.

    Args:
        gauges: {name: (what it is, what tells its value now)}.
    """

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fastvid_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.tokens = Counter("fastvid_tokens", "Tokens of prompts and of answers.", ["kind"], registry=registry)
        self.cache = Counter(
            "fastvid_feature_cache",
            "Videos whose features were there, or not.",
            ["found"],
            registry=registry,
        )
        self.request_seconds = self._histogram("request", "From a chat request to the end of its answer.")
        self.first_seconds = self._histogram("first_token", "From a chat request to its first token.")
        self.video_seconds = self._histogram("video", "To decode a video and make its features.")
        for name, (what, value) in gauges.items():
            Gauge(f"fastvid_{name}", what, registry=registry).set_function(value)

    def _histogram(self, name, what):
        return Histogram(f"fastvid_{name}_seconds", what, buckets=_SECONDS, registry=self._registry)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
