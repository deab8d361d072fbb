"""Evidence of a small enclave on the shared simulated platform, and the policy that accepts it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from small_enclaves import Signers, sign_image, small_image

from inclavare.attestation import Evidence, Policy
from inclavare.attestation.channel import EnclaveChannel, report_data, runtime_data
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform

NONCE = b"nonce of 32 bytes, fresh enough!"


@dataclass(frozen=True)
class Attested:
    """An enclave that has answered a challenge."""

    platform: SimulatedPlatform
    enclave: SimulatedEnclave
    channel: EnclaveChannel
    evidence: Evidence
    policy: Policy
    nonce: bytes
    now: int


def attest(platform: SimulatedPlatform, signers: Signers, content: bytes, *, debug: bool = False) -> Attested:
    image = small_image(content, debug=debug)
    enclave = platform.load(image, sign_image(image, signers.ours).to_bytes(), label="attested")
    channel = EnclaveChannel.new()
    data = runtime_data(NONCE, channel.public_jwk)
    quote = platform.quote(enclave.report(platform.quote_target_info(), report_data(data)))
    evidence = Evidence("sgx-sim", quote, platform.collateral(), data)
    policy = Policy(mrenclave=(enclave.mrenclave.hex(),), allow_simulated=True)
    return Attested(
        platform, enclave, channel, evidence, policy.with_trust_anchor(platform.root_ca()), NONCE, int(time.time())
    )
