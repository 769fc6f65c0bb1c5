"""What Prometheus may ask: requests, queue, slots, tokens, latency, seconds of engines' parts."""

from collections.abc import Iterator, Mapping

import prometheus_client
from prometheus_client.core import (
  CounterMetricFamily,
  GaugeMetricFamily,
  Metric,
  SummaryMetricFamily,
)

from retro_jax.generation.engine import Engine

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
  """The numbers of one server.

  Attributes:
    requests: to /v1/completions by outcome: 'stop', 'length', 'gone' (the client left), or the
      status of HTTP.
    prompt_tokens: of requests that were taken.
    first_text: seconds from a request to the first text.
    request_seconds: seconds of whole answers.
  """

  def __init__(self, engines: Mapping[str, Engine]):
    self._registry = registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
        'retro_requests', 'Completions by outcome', ['outcome'], registry=registry)
    self.prompt_tokens = prometheus_client.Counter(
        'retro_prompt_tokens', 'Tokens of prompts', registry=registry)
    self.first_text = prometheus_client.Histogram(
        'retro_first_text_seconds', 'From a request to its first text', buckets=_BUCKETS,
        registry=registry)
    self.request_seconds = prometheus_client.Histogram(
        'retro_request_seconds', 'From a request to the end of its answer', buckets=_BUCKETS,
        registry=registry)
    registry.register(_Engines(engines))

  def text(self) -> bytes:
    """All of it in Prometheus' text format."""
    return prometheus_client.generate_latest(self._registry)


class _Engines:
  """Reads the engines whenever somebody asks."""

  def __init__(self, engines: Mapping[str, Engine]):
    self._engines = engines

  def collect(self) -> Iterator[Metric]:
    waiting = GaugeMetricFamily('retro_queue_length', 'Requests without a slot',
                                labels=['database'])
    active = GaugeMetricFamily('retro_active_slots', 'Requests with a slot', labels=['database'])
    slots = GaugeMetricFamily('retro_slots', 'Slots', labels=['database'])
    written = CounterMetricFamily('retro_tokens_written', 'Tokens written', labels=['database'])
    parts = SummaryMetricFamily('retro_part_seconds', 'Calls of each part of a step',
                                labels=['database', 'part'])
    for name, engine in self._engines.items():
      waiting.add_metric([name], engine.waiting)
      active.add_metric([name], engine.active)
      slots.add_metric([name], engine.slots)
      written.add_metric([name], engine.tokens_written)
      for part, (calls, seconds) in dict(engine.totals).items():
        parts.add_metric([name, part], calls, seconds)
    yield from (waiting, active, slots, written, parts)
