"""Evidence of a small enclave on the shared simulated platform, and the policy that accepts it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from small_enclaves import Signers, sign_image, small_image

from inclavare.attestation import Evidence, Policy
from inclavare.attestation.channel import EnclaveChannel, report_data, runtime_data
from inclavare.sgx.quote import TEE_TDX, Quote
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform, provisioning

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


def resigned(platform: SimulatedPlatform, quote: Quote) -> Quote:
    """The quote with another content, signed by the platform's own quoting enclave of its TEE."""
    if quote.header.tee_type == TEE_TDX:
        assert platform._td_quoting is not None
        key = platform._td_quoting[1]._key
    else:
        assert platform._quoting is not None
        key = platform._quoting._key
    return replace(quote, signature=provisioning.sign_raw(key, quote.signed_bytes()))


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
