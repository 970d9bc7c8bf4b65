"""The page in a real Chromium: drawn, without an error, sorted, hovered, on a phone, in the dark; pictures are kept.

The pictures go to ``build/report-screenshots``, or to ``$MIRRORMASK_ARTIFACTS``.
"""

import os
import time
from itertools import pairwise
from pathlib import Path

import browser
import pytest
from synthetic_runs import make_grid, make_run

import mirrormask as mm

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())

ARTIFACTS = Path(os.environ.get("MIRRORMASK_ARTIFACTS", Path(__file__).parents[2] / "build" / "report-screenshots"))
EVIL = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
CHARTS = ["accuracy-chart", "size-chart", "time-chart", "layers-chart", "layers-time-chart", "weights-chart"]
CHARTS += ["imbalance-chart", *(f"training-{name}" for name in ("accuracy", "loss", "alpha", "median_a", "sign_flips"))]


@pytest.fixture(scope="module")
def driver():
    started = browser.start(1280, 900)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages about many runs, about one, and about runs whose names are markup."""
    folder = tmp_path_factory.mktemp("pages")
    make_grid(folder / "many", ("mirror", "pilot", "gmp"), (0.9, 0.98, 0.99), 3, timed=True, images=600)
    (folder / "many" / "notes.txt").write_text("not a run")
    make_run(folder / "one" / "mirror", sparsity=0.98, images=600, timed=True)
    make_run(folder / "one" / "dense", "dense", images=600)
    markup = {"shapes": {EVIL: (20, 10), "b": (10, 10)}, "classes": (EVIL, "<b>b</b>"), "images": 60, "accuracy": 0.5}
    for method in ("mirror", "dense"):
        for seed in (0, 1):
            options = {EVIL: "</script>"} if method == "mirror" else {}
            where = {"environment": {"processor": EVIL}, "data": "folder:/<i>images<|i>", "timed": True}
            make_run(folder / "evil" / f"{method}{seed}<b>", method, seed=seed, options=options, **markup, **where)
    make_run(folder / "evil" / "gmp", "gmp", seed=0, **markup, **where)
    (folder / "evil" / "<b>bold<|b>.txt").write_text("not a run")
    for name in ("many", "one", "evil"):
        mm.report.write(folder / name, folder / f"{name}.html")
    return folder


@pytest.fixture
def visit(driver, pages):
    """Open a page in a window of a size; what its console says during the test must be nothing."""

    def go(name, width=1280, height=900, dark=False):
        browser.resize(driver, width, height)
        browser.use_theme(driver, dark)
        driver.get((pages / f"{name}.html").as_uri())
        driver.execute_script("try { localStorage.clear() } catch {}")
        browser.wait_for_charts(driver)
        return driver

    driver.get_log("browser")
    yield go
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def show(driver, identity):
    """Scroll to an element and wait for its chart, if it is one."""
    driver.execute_script(
        f"document.getElementById('{identity}').scrollIntoView({{behavior: 'instant', block: 'center'}})"
    )
    browser.wait_for_charts(driver)


def column(driver, table, place):
    """The texts of a table's column."""
    script = f"return [...document.querySelectorAll('{table} tbody tr')].map((row) => row.cells[{place}].textContent)"
    return driver.execute_script(script)


def test_every_chart_is_drawn_when_it_comes_into_view(visit):
    driver = visit("many")
    drawn = "return document.querySelectorAll('.chart .main-svg').length"
    before = driver.execute_script(drawn)
    for name in CHARTS:
        show(driver, name)
        marks = f"return document.querySelectorAll('#{name} .points path, #{name} path.js-line').length"
        assert driver.execute_script(marks) >= 1, name
    assert driver.execute_script(drawn) > before >= 1


def test_the_points_stand_where_the_numbers_say(visit):
    driver = visit("many")
    script = """
        const data = JSON.parse(document.getElementById('data').textContent), setting = data.settings[0];
        return document.getElementById('accuracy-chart').data.filter((trace) => trace.error_y).map((trace) =>
          [trace.name, trace.y, trace.error_y.array, setting.cells
            .filter((cell) => setting.methods[cell.method] === trace.name).sort((a, b) => a.sparsity - b.sparsity)
            .map((cell) => [100 * cell.mean, 100 * cell.half])]);
    """
    traces = driver.execute_script(script)
    assert [name for name, *_ in traces] == ["gmp", "pilot", "mirror"]
    for _, means, halves, cells in traces:
        assert [list(pair) for pair in zip(means, halves, strict=True)] == cells


def test_hovering_over_a_point_shows_its_numbers(visit):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    driver = visit("many")
    show(driver, "accuracy-chart")
    points = driver.find_elements(By.CSS_SELECTOR, "#accuracy-chart .scatterlayer .trace .points path")
    ActionChains(driver).move_to_element(points[2]).perform()
    text = browser.wait_until(driver, "return document.querySelector('#accuracy-chart .hovertext')?.textContent")
    assert "over 3 seeds" in text
    assert "±" in text
    assert "points from dense" in text


def test_a_table_is_sorted_by_its_headings_with_the_keyboard(visit):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver = visit("many")
    show(driver, "pairs-table")
    head = driver.find_elements(By.CSS_SELECTOR, "#pairs-table th")[4]
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    numbers = [float(text.replace("−", "-")) for text in column(driver, "#pairs-table", 4)]
    assert len(numbers) == 9
    assert numbers == sorted(numbers)
    assert driver.switch_to.active_element == head.find_element(By.TAG_NAME, "button")
    driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert head.get_attribute("aria-sort") == "descending"
    again = [float(text.replace("−", "-")) for text in column(driver, "#pairs-table", 4)]
    assert again == numbers[::-1]
    assert driver.execute_script("return document.querySelectorAll('#pairs-table th[aria-sort=none]').length") == 8


def test_a_table_is_copied_whole_as_csv(visit):
    from selenium.webdriver.common.by import By

    driver = visit("many")
    driver.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => { window.got = t; }}})"
    )
    show(driver, "records-runs")
    button = browser.wait_until(driver, "return document.querySelector('#records-runs .tools button')")
    button.click()
    lines = browser.wait_until(driver, "return window.got").split("\n")
    assert lines[0].startswith("run,method,sparsity asked,obtained,seed,test accuracy,")
    assert len(lines) == 1 + 30
    assert any(line.startswith("mirror-0.99-2,mirror,0.99,0.99,2,") for line in lines)
    assert driver.find_element(By.ID, "say").text == "Copied 30 rows as CSV."


def test_a_cell_that_looks_like_a_formula_is_copied_as_words(visit, tmp_path):
    driver = visit("many")
    make_run(tmp_path / '=1+1, "x"')
    make_run(tmp_path / "plain", seed=1)
    driver.get(mm.report.write(tmp_path, tmp_path / "r.html").as_uri())
    driver.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => { window.got = t; }}})"
    )
    show(driver, "records-runs")
    browser.wait_until(driver, "return document.querySelector('#records-runs .tools button')").click()
    assert '\n"\'=1+1, ""x""",' in browser.wait_until(driver, "return window.got")


def test_opened_numbers_hold_every_cell_of_the_chart(visit):
    from selenium.webdriver.common.by import By

    driver = visit("many")
    show(driver, "accuracy-numbers")
    driver.find_element(By.CSS_SELECTOR, "#accuracy-numbers summary").click()
    browser.wait_until(driver, "return document.querySelector('#accuracy-numbers tbody tr')")
    assert len(column(driver, "#accuracy-numbers", 0)) == 1 + 3 * 3


def test_a_method_is_hidden_everywhere_by_its_button_and_keeps_the_focus(visit):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver = visit("many")
    count = "return document.getElementById('accuracy-chart').data.filter((trace) => trace.error_y).length"
    assert driver.execute_script(count) == 3
    button = driver.find_element(By.CSS_SELECTOR, "#accuracy .legend button")
    assert button.get_attribute("aria-pressed") == "true"
    button.send_keys(Keys.ENTER)
    assert driver.execute_script(count) == 2
    assert driver.switch_to.active_element.get_attribute("aria-pressed") == "false"
    pressed = driver.find_element(By.CSS_SELECTOR, "#training .legend button").get_attribute("aria-pressed")
    assert pressed == "false"
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert driver.execute_script(count) == 3


def test_choosing_another_sparsity_seed_run_and_layer_changes_what_is_shown(visit):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    driver = visit("many")
    show(driver, "training-loss")
    lines = "return document.getElementById('training-loss').data.length"
    assert driver.execute_script(lines) == 4
    selects = driver.find_elements(By.CSS_SELECTOR, "#training-controls select")
    Select(selects[1]).select_by_visible_text("every seed")
    assert driver.execute_script(lines) == 12
    Select(selects[0]).select_by_visible_text("90%")
    assert "at 90%" in driver.find_element(By.ID, "training-h").text
    show(driver, "weights-chart")
    Select(driver.find_element(By.CSS_SELECTOR, "#weights-controls select")).select_by_visible_text(
        "gmp at 98%, seed 0"
    )
    assert "gmp at 98%, seed 0" in driver.find_element(By.ID, "weights-h").text
    assert "does not follow the flow of a product" in driver.find_element(By.ID, "imbalance-chart").text
    Select(driver.find_elements(By.CSS_SELECTOR, "#weights-controls select")[1]).select_by_visible_text("5.weight")
    assert driver.find_element(By.ID, "weights-h").text.startswith("In layer 5 of gmp")
    show(driver, "run-controls")
    Select(driver.find_element(By.CSS_SELECTOR, "#run-controls select")).select_by_visible_text("pilot at 98%, seed 1")
    assert driver.find_element(By.ID, "run-h").text.startswith("pilot at 98%, seed 1 has exactly the 5,324 nonzeros")


def test_pictures_of_changed_predictions_are_there_with_both_answers(visit):
    from selenium.webdriver.common.by import By

    driver = visit("one")
    shown = driver.find_elements(By.CSS_SELECTOR, "#run-changes .pictures li")
    assert 5 <= len(shown) <= 18
    loaded = "return [...document.querySelectorAll('.pictures img')].every((image) => image.naturalWidth === 28)"
    show(driver, "run-changes")
    browser.wait_until(driver, loaded)
    words = shown[0].text.split()
    assert words[::2][0] == "truth"
    assert {"dense", "sparse"} <= set(words)
    assert not driver.find_element(By.ID, "accuracy").is_displayed()


@pytest.mark.long
def test_markup_in_names_stays_text_in_headings_tables_charts_and_labels(visit):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    driver = visit("evil")
    for name in [*CHARTS, "records-runs", "records-environments", "skipped-table", "run-changes", "pairs-table"]:
        show(driver, name)
    for details in driver.find_elements(By.TAG_NAME, "details"):
        driver.execute_script("arguments[0].open = true", details)
    points = driver.find_elements(By.CSS_SELECTOR, "#layers-chart .points path")
    show(driver, "layers-chart")
    ActionChains(driver).move_to_element(points[0]).perform()
    hover = browser.wait_until(driver, "return document.querySelector('#layers-chart .hovertext')?.textContent")
    assert EVIL in hover
    assert driver.execute_script("return window.hit") is None
    assert driver.execute_script("return document.scripts.length") == 4
    strange = "return document.querySelectorAll('main b, main i:not(section > p > i), img[src=x]').length"
    assert driver.execute_script(strange) == 0
    tick = driver.execute_script("return document.querySelector('#layers-chart .ytick text').textContent")
    assert tick == EVIL
    text = driver.execute_script("return document.body.textContent")
    for part in (EVIL, "</script>", "<b>bold<|b>.txt", "<i>images<|i>", "dense0<b>"):
        assert part in text
    alt = driver.execute_script("return document.querySelector('.pictures img').alt")
    assert "<b>b</b>" in alt or EVIL in alt


def test_the_theme_follows_the_system_until_the_button_is_pressed(visit):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver = visit("many")
    paper = "return getComputedStyle(document.body).backgroundColor"
    label = "return document.querySelector('#accuracy-chart .xtick text').style.fill"
    light, light_label = driver.execute_script(paper), driver.execute_script(label)
    browser.use_theme(driver, True)
    dark = browser.wait_until(driver, f"const now = (() => {{ {paper} }})(); return now !== '{light}' && now")
    browser.wait_until(driver, f"return (() => {{ {label} }})() !== '{light_label}'")
    button = driver.find_element(By.ID, "theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.send_keys(Keys.ENTER)
    assert driver.execute_script(paper) == light
    assert button.get_attribute("aria-pressed") == "false"
    driver.refresh()
    browser.wait_for_charts(driver)
    assert driver.execute_script(paper) == light != dark  # kept, though the system says dark


def test_the_keyboard_reaches_the_content_past_the_header(visit):
    from selenium.webdriver.common.keys import Keys

    driver = visit("many")
    driver.switch_to.active_element.send_keys(Keys.TAB)
    skip = driver.switch_to.active_element
    assert skip.text == "Skip to the results"
    time.sleep(0.05)
    assert skip.rect["y"] >= 0
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    skip.send_keys(Keys.ENTER)
    assert driver.switch_to.active_element.get_attribute("id") == "main"


def test_every_control_has_a_name_and_every_picture_words(visit):
    driver = visit("many")
    nameless = """
        const named = (node) => node.textContent.trim() && (node.tagName !== 'SELECT' || node.closest('label'));
        return [...document.querySelectorAll('button, select, a[href]')]
          .filter((node) => node.checkVisibility() && !node.closest('.modebar') && !named(node))
          .map((node) => node.outerHTML);
    """
    assert driver.execute_script(nameless) == []
    assert driver.execute_script("return [...document.images].every((image) => image.alt)")
    levels = driver.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map((node) => +node.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


@pytest.mark.parametrize("name", ["many", "one", "evil"])
@pytest.mark.parametrize("width", [375, 768])
@pytest.mark.cases(1)
def test_no_page_scrolls_sideways(visit, name, width):
    driver = visit(name, width, 800)
    for chart in [*CHARTS, "records-runs", "records-commands", "records-environments", "run-changes"]:
        show(driver, chart)
    assert driver.execute_script("return document.documentElement.scrollWidth") == width


@pytest.mark.long
def test_a_picture_of_every_page_is_kept(visit):
    import base64

    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    for name in ("many", "one"):
        for size, width in (("phone", 375), ("desktop", 1280)):
            for theme in ("light", "dark"):
                driver = visit(name, width, 900, theme == "dark")
                for chart in [*CHARTS, "records-runs", "records-commands", "records-environments"]:
                    show(driver, chart)
                driver.execute_script("scrollTo({top: 0, behavior: 'instant'})")
                height = driver.execute_script("return document.documentElement.scrollHeight")
                clip = {"x": 0, "y": 0, "width": width, "height": min(height, 12_000), "scale": 1}
                options = {"captureBeyondViewport": True, "clip": clip}
                png = base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
                (ARTIFACTS / f"{name}-{size}-{theme}.png").write_bytes(png)
                assert png[:4] == b"\x89PNG"
                assert len(png) > 50_000
