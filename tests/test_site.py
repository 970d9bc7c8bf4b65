"""The site of the docs, as ``make docs`` builds it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mirrormask as mm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    return folder


@pytest.mark.long
def test_every_method_and_every_public_name_has_its_place(site):
    for name in mm.methods.names():
        page = (site / "methods" / name / "index.html").read_text(encoding="utf-8")
        assert "Its parts" in page
    pages = "".join(page.read_text() for page in (site / "api").rglob("*.html"))
    modules = {"corrections", "decay", "export", "flow", "geometry", "masks", "methods", "report", "__version__"}
    for name in set(mm.__all__) - modules:
        assert f'id="mirrormask.{name}"' in pages, f"mm.{name} is on no page of docs/api"


@pytest.mark.long
def test_no_page_scrolls_sideways_on_a_phone(site):
    sys.path.insert(0, str(ROOT / "tests" / "report"))
    import browser

    if reason := browser.missing():
        pytest.skip(reason)
    driver = browser.start(390, 800)
    try:
        for page in sorted(site.rglob("index.html")):
            driver.get(f"file://{page}")
            width = driver.execute_script("return document.documentElement.scrollWidth")
            assert width <= 390, f"{page.relative_to(site)} is {width} pixels wide"
    finally:
        driver.quit()
