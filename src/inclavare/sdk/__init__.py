"""What applications import inside an enclave; light: no server, no third-party package.

::

    from inclavare.sdk import attest
    quote = attest.quote(report_data)
"""
