"""What the container sees of the world: the verified root, the encrypted layer above it, ``/dev/attestation``."""
