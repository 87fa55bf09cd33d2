"""What a browser makes of a page: chromium without a window, where there is one."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt install chromium)")

# Appended to a copy of the page, after any script of its own.
LOOK = """<script>addEventListener("load", () => {  // which comes after every image has come or failed
  const images = [...document.images];
  const shown = images.filter(i => i.getClientRects().length && i.offsetWidth > 1 && i.offsetHeight > 1);
  const found = {
    broken: images.filter(i => !i.complete || !i.naturalWidth || !i.naturalHeight).map(i => i.alt),
    shown: shown.length, alts: shown.map(i => i.alt), images: images.length,
    drawn: [...document.querySelectorAll("svg path")].filter(p => p.getTotalLength() && p.getClientRects().length).length,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
    text: document.body.innerText.length, wide: document.documentElement.scrollWidth,
  };
  const out = document.createElement("pre");
  out.id = "looked"; out.textContent = JSON.stringify(found);
  document.body.append(out);
})</script>"""


@dataclass(frozen=True)
class Seen:
    """images: in the page; shown, alts: those that take room on the screen, and their alt texts; broken: the alt texts
    of those that did not load; drawn: paths of SVG that have a length; fetched: whatever else the page asked for;
    text: characters a reader sees; wide: px; console: what the page's console said."""

    images: int
    shown: int
    alts: list[str]
    drawn: int
    fetched: list[str]
    broken: list[str]
    text: int
    wide: int
    console: list[str]


def see(page: Path, folder: Path, fragment: str = "") -> Seen:
    """Open a copy of the page in `folder`, at #fragment, in a window 1200 px wide without a network."""
    copy = folder / "looked-at.html"
    copy.write_text(page.read_text(encoding="utf-8") + LOOK, encoding="utf-8")
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900",
            "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom",
            copy.as_uri() + (f"#{fragment}" if fragment else ""),
        ],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    found = re.search(r'<pre id="looked">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"chromium showed no page: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**json.loads(html.unescape(found[1])), console=console)
