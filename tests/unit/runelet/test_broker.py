"""The broker inside the runelet: order, reasons, optional secrets, rotation; nothing that comes from the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inclavare.enclave.manifest import Manifest
from inclavare.errors import AppraisalError, InclavareError, PlatformError, PolicyError, UsageError
from inclavare.log import EventLog
from inclavare.runelet import admission, broker
from inclavare.shield.secrets import SecretStore

HEAD = '[attestation]\nverdictd = "https://h"\ntrust_anchor = "' + "ab" * 32 + '"\n'
FIRST = '[[secrets]]\nuri = "kbs:///a/b/optional"\npath = "/s/optional"\nrequired = false\n'
SECOND = '[[secrets]]\nuri = "kbs:///a/b/must"\npath = "/s/must"\n'


class Answers(broker.Broker):
    """A broker whose client is a table of answers."""

    def __init__(self, manifest: Manifest, log: EventLog, **answers: Any) -> None:
        super().__init__(manifest, None, log)  # type: ignore[arg-type]
        self.answers = answers
        self.asked: list[str] = []

    def fetch(self, uri: str) -> bytes:
        tag = uri.rpartition("/")[2]
        self.asked.append(tag)
        if isinstance(self.answers[tag], Exception):
            raise self.answers[tag]
        return self.answers[tag]  # type: ignore[no-any-return]


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "log")


def events(tmp_path: Path) -> list[tuple[str, str]]:
    return [(e["event"], e["uri"]) for e in map(json.loads, (tmp_path / "log").read_text().splitlines())]


def denied(id: str = "kbs.resource.denied") -> InclavareError:
    return AppraisalError("no", id=id, found="mrenclave, found aa, expected bb", remedy="correct it")


def test_required_ones_come_first_and_optional_ones_may_stay_away(tmp_path: Path, log: EventLog) -> None:
    made = Answers(Manifest.parse(HEAD + FIRST + SECOND), log, must=b"value", optional=denied())
    store = SecretStore()
    made.provision(store)
    assert made.asked == ["must", "optional"]
    assert store.names() == [b"a%2Fb%2Fmust"] and store.get(b"a%2Fb%2Fmust") == b"value"
    assert events(tmp_path) == [("secret.released", "kbs:///a/b/must"), ("secret.refused", "kbs:///a/b/optional")]
    assert "value" not in (tmp_path / "log").read_text()


def test_a_required_one_stops_the_start_with_the_reasons(tmp_path: Path, log: EventLog) -> None:
    made = Answers(Manifest.parse(HEAD + FIRST + SECOND), log, must=denied("kbs.attest.denied"), optional=b"")
    with pytest.raises(AppraisalError) as caught:
        made.provision(SecretStore())
    assert made.asked == ["must"]
    error = caught.value
    assert "kbs:///a/b/must is required" in error.message
    assert (error.id, error.found, error.remedy) == (
        "kbs.attest.denied", "mrenclave, found aa, expected bb", "correct it",
    )  # fmt: skip


def test_an_absent_broker_is_waited_for_once(tmp_path: Path, log: EventLog) -> None:
    other = FIRST.replace("optional", "another")
    away = PlatformError("away", id="kbs.unreachable")
    made = Answers(Manifest.parse(HEAD + FIRST + other), log, optional=away, another=away)
    made.provision(SecretStore())
    assert made.asked == ["optional"]
    assert len(events(tmp_path)) == 2


def test_environment_takes_text_only(log: EventLog) -> None:
    manifest = Manifest.parse(HEAD + '[[secrets]]\nuri = "kbs:///a/b/word"\nenv = "WORD"\n')
    for value in (b"\xff", b"a\0b"):
        with pytest.raises(UsageError) as caught:
            Answers(manifest, log, word=value).provision(SecretStore())
        assert caught.value.id == "runelet.secret.env"


def test_renewal_keeps_what_is_there_when_it_is_refused(tmp_path: Path, log: EventLog) -> None:
    made = Answers(Manifest.parse(HEAD + SECOND), log, must=b"one")
    store, secret = SecretStore(), Manifest.parse(HEAD + SECOND).secrets[0]
    made.provision(store)
    made.answers["must"] = b"two"
    assert not made._renew(secret, store)
    made.answers["must"] = denied()
    for _ in range(3):
        assert not made._renew(secret, store)
    assert store.get(b"a%2Fb%2Fmust") == b"two"
    made.answers["must"] = denied("kbs.attest.denied")
    assert made._renew(secret, store)  # no point in asking for more
    assert [event for event, _ in events(tmp_path)] == [
        "secret.released", "secret.renewed", "secret.refused", "secret.refused",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [SECOND, '[files]\n[[files.encrypted]]\npath = "/v"\nkey = "kbs:///a/b/c"\n'])
def test_what_is_required_needs_a_broker(text: str) -> None:
    with pytest.raises(PlatformError) as caught:
        broker.check(Manifest.parse(text))
    assert caught.value.id == "runelet.secret.unavailable"
    broker.check(Manifest.parse(FIRST))


@pytest.mark.parametrize("destination", ["/s/must", "/s/must/x", "/s", "/"])
def test_the_host_mounts_nothing_over_a_secret(destination: str) -> None:
    manifest = Manifest.parse(SECOND + '[files]\nallowed = ["/s", "/s/must"]\n[process]\nargs = ["/a"]\n')
    config = {
        "process": {"args": ["/a"], "cwd": "/", "env": []},
        "mounts": [{"destination": destination, "type": "bind", "source": "/host", "options": ["bind"]}],
    }
    with pytest.raises(PolicyError) as caught:
        admission.admit(config, manifest)
    assert caught.value.id.startswith("admission.mount.")
