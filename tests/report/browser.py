"""A headless Chromium for the tests and the benchmark of the page, driven by selenium."""

from __future__ import annotations

import functools
import shutil
import subprocess
import time

__all__ = ["missing", "start", "version", "wait_for_charts", "wait_until"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _found(names):
    return next((path for path in map(shutil.which, names) if path), None)


@functools.cache
def missing():
    """Why no browser can be had, or ""."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed; pip install 'mirrormask[test]'"
    lacking = [names[0] for names in (BROWSERS, ("chromedriver",)) if _found(names) is None]
    return f"{' and '.join(lacking)} not found; apt-get install chromium chromium-driver" if lacking else ""


def version():
    """The browser's name and version."""
    output = subprocess.run([_found(BROWSERS), "--version"], capture_output=True, text=True, check=True).stdout
    return output.strip()


def start(width, height, *, dark=False, scale=1):
    """A new browser with a window of this size; phones are narrower than 500 pixels."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = _found(BROWSERS)
    # Chromium's own sandbox needs rights that a container's root does not have; the page is our own.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={max(width, 500)},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_found(("chromedriver",))))
    driver.set_script_timeout(30)
    resize(driver, width, height, scale)
    use_theme(driver, dark)
    # Nothing may be fetched: a page that asks for the network fails here, not at a reader's desk.
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
    return driver


def resize(driver, width, height, scale=1):
    """Set the size of the page as a device of this width would."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def use_theme(driver, dark):
    """What the system asks pages for."""
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def wait_until(driver, script, seconds=20.0):
    """Wait until a script returns something true, and return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = driver.execute_script(script)
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(script)


def wait_for_charts(driver):
    """Wait until the page's scripts have run and every chart in view is drawn; marks that moment as ``drawn``."""
    driver.execute_async_script("""
        const done = arguments[0];
        const inView = (node) => {
          const box = node.getBoundingClientRect();
          return node.checkVisibility() && box.bottom > 0 && box.top < innerHeight;
        };
        const check = () => {
          const charts = [...document.querySelectorAll('.chart')].filter(inView);
          const drawn = charts.every((node) => node.classList.contains('empty') || node.querySelector('.main-svg .xy'));
          if (document.documentElement.dataset.ready && drawn) { performance.mark('drawn'); done(true); }
          else requestAnimationFrame(check);
        };
        check();
    """)
