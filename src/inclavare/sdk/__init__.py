"""What applications import inside an enclave; light: no server, no third-party package but cryptography to seal.

::

    from inclavare.sdk import attest, seal, secret
    quote = attest.quote(report_data)
    key = secret.get("kbs:///default/key/app")
    seal.store("/data/state", seal.seal(state, counter="state"))
"""
