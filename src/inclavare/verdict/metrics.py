"""Prometheus metrics. Labels are few and closed: no tenant, path, address or anything else that a client chooses."""

from __future__ import annotations

import os

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

REQUESTS = Counter("verdictd_requests_total", "Answered HTTP requests", ("endpoint", "status"))
LATENCY = Histogram("verdictd_request_seconds", "From a request's head to its answer", ("endpoint",), buckets=_BUCKETS)
DECISIONS = Counter("verdictd_decisions_total", "Decisions", ("action", "decision", "reason", "tee"))
VERIFICATION = Histogram("verdictd_verification_seconds", "Verifying and appraising", ("tee",), buckets=_BUCKETS)
REFUSED = Counter("verdictd_refused_total", "Requests that a limit refused", ("limit",))
UNDER_WAY = Gauge("verdictd_attestations", "Attestations waiting or under way", multiprocess_mode="livesum")

#: Reasons are ids of failures; a Rego policy or a new verifier may bring ones of its own, so their number is bounded.
_MAX_REASONS = 200
_reasons: set[str] = set()


def decided(action: str, decision: str, reason: str, tee: str) -> None:
    """Count a decision by the id of its first reason (``none`` if allowed)."""
    if reason not in _reasons:
        if len(_reasons) >= _MAX_REASONS:
            reason = "other"
        _reasons.add(reason)
    DECISIONS.labels(action, decision, reason, tee).inc()


def exposition() -> bytes:
    """All metrics as text; with several processes, of all of them together."""
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
