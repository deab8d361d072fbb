"""Verifications per second beside bare dcap-qvl, on one core: real SGX and TDX quotes, and the simulated platform's.

dcap-qvl gets its collateral parsed beforehand, which is the best that its users can do. Ours is the whole of
``attestation.verify``: parsing, verification, appraisal. *Same platform* is the steady state of a service: many quotes
of platforms that it has seen, every quote different where the platform can make them. *New platform* has the collateral
from before, but no certificates; *cold* has nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dcap_qvl

from inclavare.attestation import Evidence, Policy, verify
from inclavare.attestation.verifiers import certificates, dcap
from inclavare.config import Config
from inclavare.sgx.intel import INTEL_ROOT_CA
from inclavare.sgx.quote import Quote
from inclavare.tee.sgx_sim import create

VECTORS = Path(__file__).resolve().parent.parent.parent / "shared" / "vectors"
#: Different quotes of one platform.
QUOTES = 32


@dataclass(frozen=True)
class Contender:
    """Quotes that are to be verified."""

    name: str
    quotes: list[Evidence]
    root: bytes
    now: int
    policy: Policy


def contenders() -> Iterator[Contender]:
    """What is measured; real quotes where the vectors are."""
    for kind, name, now in (("sgx", "SGX v3, real", 1751624924), ("tdx", "TDX v4, real", 1751624191)):
        path = VECTORS / kind / f"phala_{kind}_quote.bin"
        if path.exists():
            collateral = json.loads((VECTORS / "collateral" / f"phala_{kind}_quote_collateral.json").read_bytes())
            quotes = [Evidence.from_quote(path.read_bytes(), collateral)]
            yield Contender(name, quotes, INTEL_ROOT_CA, now, Policy(any_enclave=True))
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        platform = create(
            Config(state_dir=base / "state", run_dir=base / "run", log_dir=base / "log", epc_size=4 << 20)
        )
        domains = [platform.td_quote(at.to_bytes(64, "big"), bytes(48)) for at in range(QUOTES)]
        collateral = platform.td_collateral()
        policy = Policy(any_enclave=True, allow_simulated=True).with_trust_anchor(platform.root_ca())
        yield Contender(
            "TDX v4, sgx-sim",
            [Evidence.from_quote(quote, collateral) for quote in domains],
            platform.root_ca(),
            int(time.time()),
            policy,
        )
        yield Contender("SGX v3, sgx-sim", enclave_quotes(platform), platform.root_ca(), int(time.time()), policy)


def enclave_quotes(platform: Any) -> list[Evidence]:
    """Quotes over report bodies that differ in their report data, as the platform's quoting enclave signs them."""
    from sgx import leaving

    from inclavare.enclave.signing import sign_once

    image = leaving()
    enclave = platform.load(image, sign_once(image), label="bench")
    try:
        collateral, target = platform.collateral(), platform.quote_target_info()
        return [
            Evidence.from_quote(platform.quote(enclave.report(target, at.to_bytes(64, "big"))), collateral)
            for at in range(QUOTES)
        ]
    finally:
        enclave.destroy()


def microseconds(work: Callable[[], object], seconds: float, before: Callable[[], object] | None = None) -> float:
    """Median time of one call."""
    spent: list[float] = []
    work()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(spent) < 10:
        if before is not None:
            before()
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent) * 1e6


def measure(one: Contender, seconds: float) -> dict[str, Any]:
    """Bare dcap-qvl and ours, in turns, so that a busy machine does as much to both."""
    parts = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(one.quotes[0].collateral))
    turn = itertools.cycle(one.quotes)

    def bare() -> object:
        return dcap_qvl.verify_with_root_ca(next(turn).quote, parts, one.root, one.now)

    def ours() -> object:
        return verify(next(turn), one.policy, now=one.now)

    def new_platform() -> None:
        certificates.load.cache_clear()
        certificates.check_issued.cache_clear()
        dcap._platform.cache_clear()
        dcap._verdicts.clear()

    # The steady state has seen the platform, not these quotes: nothing of a quote itself is remembered.
    plans: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {
        "dcap_qvl": (bare, None),
        "same_platform": (ours, None),
        "new_platform": (ours, new_platform),
        "cold": (ours, dcap.forget),
    }
    rounds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(5):
        for name, (work, before) in plans.items():
            rounds[name].append(microseconds(work, seconds / 5, before))
    found: dict[str, Any] = {f"{name}_us": min(values) for name, values in rounds.items()}
    for name in list(plans)[1:]:
        found[f"{name}_overhead"] = found[f"{name}_us"] / found["dcap_qvl_us"] - 1
    return {
        "name": one.name,
        "quotes": len(one.quotes),
        "bytes": len(Quote.from_bytes(one.quotes[0].quote).to_bytes()),
    } | found


def main() -> int:
    """Exit code 1 if the steady state's overhead is above the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    parser.add_argument("--bar", type=float, default=0.15, help="greatest overhead over dcap-qvl")
    options = parser.parse_args()
    rows = [measure(one, options.seconds) for one in contenders()]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{'':18}{'dcap-qvl':>12}{'same platform':>24}{'new platform':>22}{'cold':>22}   (microseconds)")
        for row in rows:
            line = f"{row['name']:18}{row['dcap_qvl_us']:12.0f}"
            for name, width in (("same_platform", 24), ("new_platform", 22), ("cold", 22)):
                line += f"{row[f'{name}_us']:.0f} ({row[f'{name}_overhead']:+.0%})".rjust(width)
            print(line)
    return int(any(row["same_platform_overhead"] > options.bar for row in rows))


if __name__ == "__main__":
    sys.exit(main())
