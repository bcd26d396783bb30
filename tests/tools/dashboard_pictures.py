"""Photographs the dashboard of a running server, for the documentation.

    python tests/tools/dashboard_pictures.py http://127.0.0.1:8000 docs/img

Writes ``dashboard_light.png``, ``dashboard_dark.png`` and ``dashboard_phone.png``. The server
should have been busy for some minutes, with ``--count-experts``. Needs playwright, pillow,
and a chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DESK, PHONE = {"width": 1000, "height": 900}, {"width": 360, "height": 740}
PICTURES = {"light": (DESK, "light"), "dark": (DESK, "dark"), "phone": (PHONE, "dark")}
COLOURS = 256
# Two snapshots: the second has rates of what moved.
SETTLED_MS = 2500


def photograph(url: str, folder: Path) -> list[Path]:
    """The files that were written."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    written = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (viewport, scheme) in PICTURES.items():
            page = browser.new_page(viewport=viewport, color_scheme=scheme)
            page.goto(f"{url}/dashboard")
            page.locator("#main").wait_for(state="visible")
            page.wait_for_timeout(SETTLED_MS)
            file = folder / f"dashboard_{name}.png"
            page.screenshot(path=file, full_page=name != "phone")
            Image.open(file).quantize(COLOURS).save(file, optimize=True)
            written.append(file)
        browser.close()
    return written


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for file in photograph(sys.argv[1].rstrip("/"), Path(sys.argv[2])):
        print(file)
