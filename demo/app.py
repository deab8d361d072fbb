"""The demonstration's application: it can read its data only with a key that is released to its enclave."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

#: A key broker's is there from the beginning; one that is released by hand comes later.
KEYS = (Path("/run/data-key"), Path("/dev/attestation/secrets/data-key"))
DATA = Path("/app/patients.csv.enc")


def main() -> None:
    kind = Path("/dev/attestation/attestation_type").read_text()
    key = next((path for path in KEYS if path.exists()), None)
    have = "I have data, but no key" if key is None else f"the key to my data was there before me, in {key}"
    print(f"application: started in an enclave (attestation: {kind}); {have}", flush=True)
    while key is None:
        time.sleep(0.05)
        key = next((path for path in KEYS if path.exists()), None)
        if key is not None:
            print("application: a key was released to me", flush=True)
    # The key never is an argument or a variable: openssl reads it from the enclave's own file.
    opened = subprocess.run(
        ["openssl", "enc", "-d", "-aes-256-cbc", "-pbkdf2", "-in", DATA, "-pass", f"file:{key}"],
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
