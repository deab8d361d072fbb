"""verdictd, the relying party's service: it verifies evidence, applies policies and releases secrets."""
