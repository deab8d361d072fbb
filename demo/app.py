"""The demonstration's application: it can read its data only with a key that is released to its enclave."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

KEY = Path("/dev/attestation/secrets/data-key")
DATA = Path("/app/patients.csv.enc")


def main() -> None:
    kind = Path("/dev/attestation/attestation_type").read_text()
    print(f"application: started in an enclave (attestation: {kind}); I have data, but no key", flush=True)
    while not KEY.exists():
        time.sleep(0.05)
    print("application: a key was released to me", flush=True)
    # The key never is an argument or a variable: openssl reads it from the enclave's own file.
    opened = subprocess.run(
        ["openssl", "enc", "-d", "-aes-256-cbc", "-pbkdf2", "-in", DATA, "-pass", f"file:{KEY}"],
        capture_output=True,
        check=False,
    )
    if opened.returncode != 0:
        sys.exit("application: the key does not open my data")
    rows = opened.stdout.decode().splitlines()
    print(
        f"application: decrypted {len(rows) - 1} records, SHA-256 {hashlib.sha256(opened.stdout).hexdigest()}",
        flush=True,
    )
    Path("/var/result").write_text(rows[1])  # goes to the encrypted layer


main()
