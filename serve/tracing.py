"""Spans of requests for OpenTelemetry, where its package is there and somebody listens."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = propagate = None


@contextlib.contextmanager
def span(name: str, headers: Mapping[str, str], told: Mapping[str, Any]) -> Iterator[None]:
    """A server's span, a child of the one that the client names (`traceparent`); what was `told` of the request at its end is in it."""
    if trace is None or propagate is None:
        yield
        return
    tracer, context = trace.get_tracer("kvcascade"), propagate.extract(dict(headers))
    with tracer.start_as_current_span(name, context, trace.SpanKind.SERVER) as current:
        try:
            yield
        finally:
            for key, value in told.items():
                current.set_attribute(f"kvcascade.{key}", value)
