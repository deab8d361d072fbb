"""verdictd's web page in a real browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "unit" / part) for part in ("verdict", "")]

from web_browser import CHROMIUM, IMAGE, Site, browser, page_of, shown  # noqa: E402

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")

PAGES = (
    "workloads",
    "workloads?decision=denied",
    "refused",
    "policies",
    "policies/shop",
    "references",
    "secrets",
    "secrets/shop/key/orders",
    "audit",
    "audit?verify=1",
)

#: What of axe's rules matters here: contrast (WCAG 1.4.3), names, headings, tables, targets, and that nothing is wider
#: than the window but what scrolls by itself.
CHECKS = """() => {
  const found = [];
  const rgb = text => { const m = text.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = node => { for (; node; node = node.parentElement) { const c = rgb(getComputedStyle(node).backgroundColor);
    if (c[3] > 0) return c; } return matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0] : [255, 255, 255]; };
  for (const node of document.body.querySelectorAll('*')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    const box = node.getBoundingClientRect();
    if (!own || !box.width || box.right < 0) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ${node.outerHTML.slice(0, 80)}`);
  }
  for (const node of document.querySelectorAll('a, button, input:not([type=hidden]), summary')) {
    const name = node.getAttribute('aria-label') || node.textContent.trim() || (node.labels && node.labels[0]?.textContent);
    if (!name) found.push(`no name: ${node.outerHTML}`);
  }
  let level = 0;
  for (const node of document.querySelectorAll('h1, h2, h3, h4')) {
    const now = Number(node.tagName[1]);
    if (now > level + 1) found.push(`heading: ${node.outerHTML}`);
    level = now;
  }
  for (const node of document.querySelectorAll('table')) {
    if (!node.caption || !node.querySelector('thead th[scope=col]')) found.push('table without caption or headers');
  }
  for (const node of document.querySelectorAll('.scroll, pre')) {
    if (node.scrollWidth > node.clientWidth && node.tabIndex < 0 && !node.closest('details'))
      found.push('scrolls, but not by keyboard');
  }
  if (!document.documentElement.lang) found.push('no language');
  if (document.documentElement.scrollWidth > innerWidth) found.push(`wider than the window: ${document.documentElement.scrollWidth}`);
  return found;
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with shown(tmp_path_factory.mktemp("verdictd")) as made:
        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture
def page(chromium: Any, site: Site) -> Iterator[Any]:
    with page_of(chromium, site) as made:
        yield made


def test_sign_in_and_see_why_a_workload_was_refused(page: Any, site: Site) -> None:
    assert page.title() == "Tenants – verdictd"
    page.get_by_role("link", name="default").click()
    row = page.get_by_role("row").filter(has_text="refused")
    assert "mrenclave" in row.inner_text()
    assert site.found[:16] in row.inner_text()
    row.get_by_role("link").click()
    reason = page.get_by_role("table", name="Why it was refused").get_by_role("row").nth(1)
    assert {site.found, site.expected} <= set(reason.inner_text().split())
    reason.get_by_role("link").click()
    assert page.get_by_role("heading", level=1).inner_text() == f"Reference values of {IMAGE}"
    page.get_by_role("navigation").get_by_role("link", name="Audit").click()
    page.get_by_role("button", name="Verify the whole chain").click()
    assert "nothing was changed" in page.get_by_role("status").inner_text()
    page.get_by_role("button", name="Sign out").click()
    page.goto(site.address("secrets"))
    assert page.title() == "Sign in – verdictd"


def test_the_session_is_out_of_scripts_reach(page: Any, site: Site) -> None:
    (cookie,) = page.context.cookies()
    assert cookie["name"] == "__Host-verdictd"
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"], cookie["path"]) == (True, True, "Strict", "/")
    assert page.evaluate("document.cookie") == ""


def test_scripts_do_not_run_even_if_they_get_in(page: Any, site: Site) -> None:
    page.goto(site.address("workloads"))
    page.evaluate("""() => { const made = document.createElement('script');
        made.textContent = 'window.ran = true'; document.body.append(made); }""")
    assert page.evaluate("window.ran === undefined")


@pytest.mark.parametrize("width", [1100, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_pages_are_accessible_and_without_errors(chromium: Any, site: Site, width: int, dark: bool) -> None:
    with page_of(chromium, site, width=width, dark=dark) as page:
        problems: list[str] = []
        requests: list[str] = []
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        # What the next page cuts off has not failed.
        page.on("requestfailed", lambda r: "ABORTED" in str(r.failure) or problems.append(f"{r.url}: {r.failure}"))
        page.on("request", lambda request: requests.append(request.url))
        for where in PAGES:
            assert page.goto(site.address(where)).status == 200
            assert page.evaluate(CHECKS) == [], where
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("Access token").fill("wrong")
        assert page.evaluate(CHECKS) == []
        assert problems == []
        assert {url for url in requests if not url.startswith(site.service.url + "/")} == set()


def test_the_keyboard_is_enough(page: Any, site: Site) -> None:
    page.goto(site.address("workloads"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.textContent.trim()"))
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid" or page.evaluate("document.activeElement === document.body")
    assert "refused" in names
    assert any(name.endswith("UTC") for name in names)


def test_the_pictures_in_the_documents_are_small(site: Site) -> None:
    pictures = list((Path(__file__).parents[2] / "docs" / "images").glob("verdictd-*.png"))
    assert len(pictures) >= 5
    assert all(picture.stat().st_size < 120_000 for picture in pictures)
