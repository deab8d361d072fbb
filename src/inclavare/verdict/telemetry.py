"""Logs as JSON lines with the request's id, and traces for OpenTelemetry where a collector is configured."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from .config import Telemetry

#: Of the request that is being answered; 16 hexadecimal digits.
request_id: ContextVar[str] = ContextVar("verdictd_request", default="")
log = logging.getLogger("inclavare.verdict")

_tracer: Tracer | None = None


def new_request_id() -> str:
    """A request's id: ours, never the client's."""
    return secrets.token_hex(8)


def event(id: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event. Fields are named one by one, so that nothing secret slips in."""
    if log.isEnabledFor(level):
        log.log(level, id, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``event``, ``request`` and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{seconds}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        if fields is None:
            line |= {"event": record.name, "message": record.getMessage()}
        else:
            line["event"] = record.msg
        if request := request_id.get():
            line["request"] = request
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({**line, **(fields or {})}, default=str)


def start_logging(telemetry: Telemetry) -> None:
    """Send this process's log where it is configured to go.

    Raises:
        OSError: the file cannot be opened.
    """
    stream: TextIO = sys.stderr
    if telemetry.log:
        path = Path(telemetry.log)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stream = os.fdopen(descriptor, "w", buffering=1)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("inclavare").setLevel(telemetry.level.upper())


def start_tracing(telemetry: Telemetry) -> None:
    """Export traces, if a collector is configured.

    Raises:
        UsageError: ``verdict.config.secret``: the headers' file cannot be read, or others can read it.
        PlatformError: ``serving.missing``: OpenTelemetry is not installed.
    """
    global _tracer
    if not telemetry.otlp_endpoint:
        return
    from .. import serving
    from ..enclave.signing_access import read_private

    headers = {}
    if telemetry.otlp_headers_file:
        text = read_private(Path(telemetry.otlp_headers_file), "verdict.config.secret").decode("utf-8", "replace")
        headers = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in text.split("\n"))}
        headers.pop("", None)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise serving.missing(error) from None
    exporter = OTLPSpanExporter(
        telemetry.otlp_endpoint, certificate_file=telemetry.otlp_ca_file or None, headers=headers or None
    )
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(telemetry.sample)),
        resource=Resource.create({"service.name": "verdictd"}),
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("inclavare.verdict")


@contextmanager
def span(name: str, **attributes: str | int | bool) -> Iterator[None]:
    """A span of a trace; nothing at all where no collector is configured. Attributes are public values only."""
    if _tracer is None:
        yield
        return
    # Exceptions may quote what a client sent, so the span says their kind only.
    with _tracer.start_as_current_span(name, attributes=attributes, record_exception=False) as current:
        if request := request_id.get():
            current.set_attribute("request", request)
        try:
            yield
        except Exception as error:
            current.set_attribute("error.type", getattr(error, "id", None) or type(error).__name__)
            raise
