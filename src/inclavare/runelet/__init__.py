"""The enclave's host process: it loads the enclave, serves what the container needs, and ends with the container."""
