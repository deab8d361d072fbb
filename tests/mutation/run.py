"""Mutation testing of the rules, with mutmut: ``make mutate`` (ARGS="--only keys").

Each rule of the architecture (a comparison, a mask, a condition) is changed, one at a time, in a copy of the source tree, and the tests
that name the rule must fail. What they do not notice is listed with its diff, unless it only words a refusal differently.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SOURCE = "src/inclavare"
#: Rules and the tests that name them: sources below src/inclavare, tests below tests.
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "keys": (("sgx/keys.py",), ("unit/sgx/test_keys.py",)),
    "tokens": (("sgx/tokens.py",), ("unit/sgx/test_tokens.py",)),
    "sigstruct": (("sgx/sigstruct.py",), ("unit/sgx/test_sigstruct.py",)),
    "sealing": (("sgx/sealing.py",), ("unit/sgx/test_sealing.py",)),
    "report": (("sgx/report.py",), ("unit/sgx/test_report.py",)),
    "container-processor": (("tee/sgx_sim/cpu.py",), ("unit/tee/test_sgx_sim_processor.py",)),
    "memory": (("tee/sgx_sim/memory.py",), ("unit/tee/test_sgx_sim_memory.py",)),
    "processor-build": (
        tuple(f"tee/sgx_sim/processor/{name}.py" for name in ("rules", "secs", "encls_build", "encls_debug")),
        ("unit/tee/processor",),
    ),
    "processor-paging": (
        tuple(f"tee/sgx_sim/processor/{name}.py" for name in ("encls_paging", "encls_edmm", "enclu_edmm")),
        ("unit/tee/processor",),
    ),
    "processor-flow": (
        tuple(
            f"tee/sgx_sim/processor/{name}.py" for name in ("enclu_flow", "enclu_identity", "aex", "access", "logical")
        ),
        ("unit/tee/processor",),
    ),
}


def mutate(name: str) -> dict[str, object]:
    """Run one group in a copy of the tree."""
    sources, tests = GROUPS[name]
    with tempfile.TemporaryDirectory(prefix="inclavare-mutate-") as directory:
        work = Path(directory)
        for part in ("src", "tests"):
            shutil.copytree(REPO / part, work / part, ignore=shutil.ignore_patterns("__pycache__"))
        (work / "pyproject.toml").write_text(
            '[tool.pytest.ini_options]\naddopts = "--strict-markers"\nmarkers = ["crun: x", "daemon: x"]\n'
            "[tool.mutmut]\n"
            f"source_paths = {json.dumps([f'{SOURCE}/{source}' for source in sources])}\n"
            f"pytest_add_cli_args_test_selection = {json.dumps([f'tests/{test}' for test in tests])}\n"
            'also_copy = ["src", "tests", "pyproject.toml"]\n'
        )
        done = _mutmut(work, "run", "--max-children", "2")
        counts = re.findall(r"(\d+)/(\d+)", done.stdout.replace("\r", "\n"))
        if not counts:
            raise SystemExit(f"{name}: mutmut failed\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        survived = re.findall(r"^\s*(\S+): survived", _mutmut(work, "results").stdout, re.MULTILINE)
        diffs = [_mutmut(work, "show", mutant).stdout for mutant in survived]
        wordings = _wordings([work / SOURCE / source for source in sources])
        kept = [diff for diff in diffs if not _only_wording(diff, wordings)]
        return {"group": name, "mutants": int(counts[-1][1]), "wording": len(diffs) - len(kept), "survivors": kept}


def _mutmut(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace")


def _wordings(paths: list[Path]) -> set[str]:
    """The lines of refusals: of ``raise`` statements, and of functions that make or word an error."""
    found: set[str] = set()
    for path in [file for given in paths for file in ([given] if given.is_file() else given.rglob("*.py"))]:
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            made = isinstance(node, ast.FunctionDef) and "Error" in ast.dump(node.returns or ast.Constant(None))
            if isinstance(node, ast.Raise) or made:
                assert isinstance(node, ast.stmt) and node.end_lineno is not None
                found |= {line.strip() for line in lines[node.lineno - 1 : node.end_lineno]}
    return found


def _only_wording(diff: str, wordings: set[str]) -> bool:
    removed = [line[1:].strip() for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    return bool(removed) and all(line in wordings for line in removed)


def main() -> int:
    """Mutate; the exit code is 0 if everything ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(GROUPS), help="this group; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    results = []
    for name in args.only or GROUPS:
        print(f"mutating {name}", file=sys.stderr, flush=True)
        results.append(mutate(name))
    if args.json:
        print(json.dumps(results, indent=2))
        return 0
    for result in results:
        for diff in result["survivors"]:  # type: ignore[attr-defined]
            print(diff)
    print(f"{'Group':24}{'Mutants':>9}{'Wording':>9}{'Survivors':>11}")
    for result in results:
        survivors = len(result["survivors"])  # type: ignore[arg-type]
        print(f"{result['group']:24}{result['mutants']:>9}{result['wording']:>9}{survivors:>11}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
