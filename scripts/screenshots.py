"""Pictures of verdictd's web page for the documents: docs/images/verdictd-*.png.

Starts a verdictd with a simulated platform, one workload that it accepts and one that it refuses, and opens its pages
in Debian's chromium. Usage: ``.venv/bin/python scripts/screenshots.py [DIRECTORY]``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "unit" / "verdict"), str(ROOT / "tests" / "unit")]

from web_browser import browser, page_of, shown  # noqa: E402

#: Picture, page, width, dark.
PICTURES = (
    ("workloads", "workloads", 1100, False),
    ("refused", "refused", 1100, False),
    ("references", "references", 1100, False),
    ("audit-dark", "audit?verify=1", 1100, True),
    ("phone", "workloads", 390, False),
)
_HEIGHT = 620
_MOST = 120_000


def main(directory: Path) -> None:
    """Make all of them."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state, shown(Path(state)) as site, browser() as chromium:
        for name, where, width, dark in PICTURES:
            with page_of(chromium, site, width=width, height=_HEIGHT, dark=dark) as page:
                page.goto(site.address(where))
                path = directory / f"verdictd-{name}.png"
                page.screenshot(path=path)
                size = path.stat().st_size
                if size > _MOST:
                    raise SystemExit(f"{path} has {size} bytes")
                print(f"{path}: {size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
