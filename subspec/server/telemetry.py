"""Figures of a server in Prometheus' form, named as vLLM's with another prefix."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from subspec.decoding.result import GenerationResult
from subspec.records.metrics import turn_metrics

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Telemetry:
    """Counts what a server does. ``running``, ``waiting``: numbers of requests at the moment."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"subspec_{name}", about, labels, registry=registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"subspec_{name}_seconds", about, buckets=SECONDS, registry=registry)

        for name, value in (("running", running), ("waiting", waiting)):
            gauge = Gauge(f"subspec_num_requests_{name}", f"Requests that are {name}", registry=registry)
            gauge.set_function(value)
        self.ended = counter("request_success", "Texts that ended, by reason", "finished_reason")
        self.refused = counter("request_refused", "Requests that were refused, by status", "status")
        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._new = counter("generation_tokens", "Generated tokens")
        self._steps = counter("spec_decode_num_drafts", "Verification passes")
        self._drafted = counter("spec_decode_num_draft_tokens", "Drafted tokens")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Accepted draft tokens")
        self.first = seconds("time_to_first_token", "From a request to its first token")
        self._whole = seconds("e2e_request_latency", "From a request to its end")

    def text_ended(self, result: GenerationResult, seconds: float) -> None:
        """Count a text that has ended."""
        figures = turn_metrics(result)
        self.ended.labels(result.finish_reason.value).inc()
        self._prompt.inc(figures["prompt_tokens"])
        self._new.inc(figures["new_tokens"])
        self._steps.inc(figures["iterations"])
        self._drafted.inc(figures["drafted_nodes"])
        self._accepted.inc(figures["accepted_nodes"])
        self._whole.observe(seconds)

    def page(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
