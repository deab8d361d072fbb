"""Coverage-guided fuzzing of every parser, with atheris: ``make fuzz`` (ARGS="--seconds 300 --only quote").

Each target runs in a process of its own, seeded from what the project itself writes and from real data where it is there. A target may
refuse its input with one of the project's errors; anything else that it raises, a hang, and bytes that are accepted although
they are not what the parser would write (see targets.py) are findings. The exit code is 1 if there were any.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

#: One input may take this long.
HANG_SECONDS = 10
MAX_LENGTH = 1 << 16


def fuzz_one(name: str, corpus: str, seconds: int) -> None:
    """Fuzz in this process; atheris ends it."""
    import atheris

    # Imported here, so that the code under test, and no other, is instrumented.
    with atheris.instrument_imports(include=["inclavare"]):
        from targets import TARGETS
    options = [
        sys.argv[0],
        corpus,
        f"-max_total_time={seconds}",
        f"-timeout={HANG_SECONDS}",
        f"-max_len={MAX_LENGTH}",
        "-rss_limit_mb=2048",
        f"-artifact_prefix={corpus}.finding-",
        "-print_final_stats=1",
    ]
    atheris.Setup(options, TARGETS[name].run)
    atheris.Fuzz()


def run(name: str, seconds: int, findings: Path) -> dict[str, object]:
    """Fuzz one target in a process of its own."""
    from targets import TARGETS

    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds()):
            (corpus / f"seed{number}").write_bytes(seed)
        seeds = len(list(corpus.iterdir()))
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, __file__, "--inside", name, str(corpus), str(seconds)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        kept = []
        for path in sorted(corpus.parent.glob("corpus.finding-*")):
            findings.mkdir(parents=True, exist_ok=True)
            to = findings / f"{name}-{path.name.removeprefix('corpus.finding-')}"
            to.write_bytes(path.read_bytes())
            kept.append(str(to))
        grown = len(list(corpus.iterdir())) - seeds
    runs = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    result: dict[str, object] = {
        "target": name,
        "runs": int(runs[1]) if runs else 0,
        "seconds": round(time.monotonic() - started, 1),
        "seeds": seeds,
        "new": grown,
        "findings": kept,
    }
    if done.returncode:
        result["output"] = done.stderr[-4000:]
    return result


def main() -> int:
    """Fuzz; the exit code."""
    if sys.argv[1:2] == ["--inside"]:
        _, _, name, corpus, seconds = sys.argv
        fuzz_one(name, corpus, int(seconds))
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="for each target (default 30)")
    parser.add_argument("--only", action="append", choices=sorted(TARGETS), help="this target; may be repeated")
    parser.add_argument("--findings", type=Path, default=Path(".fuzz"), help="where inputs that fail are kept")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    results = []
    for name in args.only or sorted(TARGETS):
        print(f"fuzzing {name} for {args.seconds} s", file=sys.stderr, flush=True)
        results.append(run(name, args.seconds, args.findings))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        table = Table("Target", "Runs", "Seconds", "Seeds", "New inputs", "Findings", box=None)
        for row in results:
            cells = [str(row[key]) for key in ("target", "runs", "seconds", "seeds", "new")]
            table.add_row(*cells, "\n".join(row["findings"]) or ("failed" if "output" in row else "none"))  # type: ignore[arg-type]
        Console().print(table)
        for row in results:
            if "output" in row:
                print(f"\n{row['target']}:\n{row['output']}")
    return int(any("output" in row for row in results))


if __name__ == "__main__":
    sys.exit(main())
