"""What the server measures, for Prometheus."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NAME = "minitransformer"


class HasRows(Protocol):
    """What is measured of a scheduler."""

    rows: int
    unfinished: int

    @property
    def cached_tokens(self) -> int: ...

    @property
    def reused_tokens(self) -> int: ...


class Metrics:
    """All series of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        model = ["model"]
        self.requests = Counter(f"{NAME}_requests", "Answered requests", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            f"{NAME}_request_seconds",
            "From a request to its whole answer",
            ["endpoint"],
            registry=registry,
            buckets=SECONDS,
        )
        self.prompt_tokens = Counter(f"{NAME}_prompt_tokens", "Tokens of prompts", model, registry=registry)
        self.new_tokens = Counter(f"{NAME}_generated_tokens", "Generated tokens", model, registry=registry)
        self.first = Histogram(
            f"{NAME}_time_to_first_token_seconds",
            "From a request to its first token",
            model,
            registry=registry,
            buckets=SECONDS,
        )
        self.between = Histogram(
            f"{NAME}_time_between_tokens_seconds",
            "From one token of a text to the next",
            model,
            registry=registry,
            buckets=SECONDS,
        )
        self.batch = Gauge(f"{NAME}_batch_rows", "Texts that are decoded", model, registry=registry)
        self.rows = Gauge(f"{NAME}_batch_rows_most", "Texts that can be decoded at a time", model, registry=registry)
        self.queue = Gauge(f"{NAME}_queue_texts", "Texts that wait for a row", model, registry=registry)
        self.reused = Gauge(
            f"{NAME}_reused_prompt_tokens", "Tokens of prompts that another had read", model, registry=registry
        )
        self.cache = Gauge(f"{NAME}_cache_tokens", "Tokens whose keys and values are held", model, registry=registry)

    @property
    def page(self) -> bytes:
        """All series in the text format."""
        return generate_latest(self.registry)


class Meters:
    """The series of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._first, self._between = metrics.first.labels(model), metrics.between.labels(model)
        self.new_tokens, self.prompt_tokens = metrics.new_tokens.labels(model), metrics.prompt_tokens.labels(model)

    def note_token(self, seconds: float, *, first: bool) -> None:
        """A token came so long after the request or the token before."""
        (self._first if first else self._between).observe(seconds)

    def watch(self, scheduler: HasRows) -> None:
        """Show what `scheduler` is doing whenever someone looks."""
        metrics, model = self._metrics, self._model
        metrics.rows.labels(model).set(scheduler.rows)
        metrics.batch.labels(model).set_function(lambda: min(scheduler.unfinished, scheduler.rows))
        metrics.queue.labels(model).set_function(lambda: max(0, scheduler.unfinished - scheduler.rows))
        metrics.reused.labels(model).set_function(lambda: scheduler.reused_tokens)
        metrics.cache.labels(model).set_function(lambda: scheduler.cached_tokens)
