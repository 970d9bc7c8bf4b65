"""The page of mirrormask report: what stands in it, that markup stays text, and what it does with bad input."""

import base64
import dataclasses
import hashlib
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import make_grid, make_run

import mirrormask as mm
from mirrormask import cli, files
from mirrormask.report import page, words
from mirrormask.report.blob import script_json
from mirrormask.train import Data, Method, Model, Recipe, recipe_file, run
from mirrormask.train.command import parse, recipes

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The elements of a page, and the text of those that are asked for."""

    def __init__(self, path):
        super().__init__()
        self.source = Path(path).read_text()
        self.tags, self.scripts, self.text, self.ids = [], [], {}, []
        self.closed = True
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.closed = False
        self.ids.append(dict(attributes).get("id"))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.closed = True

    def handle_data(self, text):
        if self.closed:
            return
        tag, attributes = self.tags[-1]
        if tag == "script":
            self.scripts[-1] += text
        if attributes.get("id"):
            self.text[attributes["id"]] = self.text.get(attributes["id"], "") + text

    @property
    def data(self):
        return json.loads(self.scripts[1])


def written(tmp_path, *folders, **options):
    return Page(mm.report.write(list(folders), tmp_path / "report.html", **options))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A comparison of two methods at two sparsities over three seeds, and its page."""
    folder = tmp_path_factory.mktemp("grid")
    make_grid(folder / "runs", timed=True)
    return written(folder, folder / "runs")


# -- what stands in it -------------------------------------------------------------------------------------------


def test_headings_say_what_the_numbers_show(grid):
    finding = grid.data["settings"][0]["findings"]
    assert finding["accuracy"] == "mirror leads gmp by 2.0\u00a0±\u00a00.1\u00a0points at 99%"
    assert grid.text["headline"] == finding["accuracy"]
    assert finding["summary"] == "2 methods and the dense model, at 90% to 99% sparsity, 3 seeds."
    assert finding["size"].startswith("mirror at 99% keeps")
    assert "faster than dense" in finding["time"]
    assert finding["significance"].endswith("differences between methods are more than chance")


def test_every_run_is_there_with_its_numbers_layers_curves_and_details(grid):
    data = grid.data
    assert len(data["runs"]) == 3 * 5
    by_folder = {run["folder"]: run for run in data["runs"]}
    one = by_folder["mirror-0.99-1"]
    numel = 300 * 784 + 100 * 300 + 1000
    assert (one["nonzeros"], one["nonzeros_asked"], one["numel"]) == (2662, 2662, numel)
    assert one["layers"] == [2352, 300, 10]
    assert len(one["curves"]["epoch"]["test_accuracy"]) == 5
    curves = {"loss", "alpha", "decay_integral", "median_a", "l1_norm", "sparsity", "below_threshold", "sign_flips"}
    assert curves <= set(one["curves"]["step"])
    assert one["distributions"][0][0] == "1.weight"
    assert one["changes"]["n"] == 60
    assert data["runs"][one["dense"]]["folder"] == "dense-1"
    assert one["bench"]["layers"][0][:2] == ["1", "rows"]
    assert data["models"][one["model"]]["shapes"] == ["300×784", "100×300", "10×100"]
    assert data["environments"] == [
        {
            "processor": "A processor",
            "gpu": "",
            "cores": "2",
            "threads": "1",
            "python": "3.11.7",
            "platform": "Linux",
            "versions": "mirrormask 0.1.0, torch 2.14.1",
        }
    ]


def test_intervals_and_tests_are_those_of_the_comparison(grid, tmp_path):
    from mirrormask.compare import load_runs
    from mirrormask.compare.comparison import compare_runs

    results = [make_run(tmp_path / f"{m}-{s}", m, 0.99, s) for m in ("mirror", "gmp", "dense") for s in (0, 1, 2)]
    comparison = compare_runs(load_runs([tmp_path]).results)
    assert len(results) == 9
    setting = written(tmp_path, tmp_path).data["settings"][0]
    cells = {setting["methods"][c["method"]]: c for c in setting["cells"]}
    for row in comparison.summaries:
        assert cells[row.method]["mean"] == pytest.approx(row.mean, rel=1e-4)
        assert cells[row.method]["half"] == pytest.approx(row.half_width, rel=1e-4)
    (pair,), (shown,) = comparison.pairs, setting["pairs"]
    assert [setting["methods"][shown[0]], setting["methods"][shown[1]]] == [pair.a, pair.b]
    assert shown[7] == pytest.approx(pair.p_corrected, rel=1e-4)


def test_each_command_trains_that_run_again(tmp_path):
    make_run(tmp_path / "a", "mirror", 0.98, 3, options={"gain": 0.5}, data="folder:/some where/images")
    run_data = written(tmp_path, tmp_path / "a").data["runs"][0]
    words_ = shlex.split(run_data["command"])
    assert words_[:2] == ["mirrormask", "train"]
    (again,), _ = recipes(parse(words_[2:]))
    assert again.fingerprint() == recipe_file.load(tmp_path / "a" / "recipe.yaml").fingerprint()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(method=Method("dense"), sparsity=0.0),
        Recipe(optimizer=mm.report.reproduce.Optimizer("adamw", options={"betas": [0.9, 0.95]}), precision="bf16"),
        Recipe(
            data=Data("cifar10", root="/a b", crop=4, flip=True, validation=500),
            model=Model("resnet20", {"stem_stride": 2}),
            method=Method("pilot", {"gain": None, "beta": 1.0}),
            sparsity=0.123456789,
            optimizer=mm.report.reproduce.Optimizer(lr=0.3, momentum=0.0, weight_decay=5e-4),
        ),
    ],
)
def test_a_command_gives_the_same_recipe(tmp_path, recipe):
    result = make_run(tmp_path / "a")
    line = mm.report.reproduce.command(dataclasses.replace(result, recipe=recipe_file.to_dict(recipe)))
    (again,), _ = recipes(parse(shlex.split(line)[2:]))
    assert again.fingerprint() == recipe.fingerprint()


def test_a_page_about_one_run_begins_with_it_and_finds_the_dense_run_beside_it(tmp_path):
    recipe = Recipe(model=Model("mlp", {"hidden": [16]}), method=Method("mirror"), epochs=2, threads=1, figure=False)
    from mirrormask.train import dense_run

    sparse = run(dataclasses.replace(recipe, out=str(tmp_path / "runs" / "demo" / "mirror")))
    dense_run(recipe, tmp_path / "runs")
    made = written(tmp_path, sparse.folder)
    data = made.data
    assert data["single"] is True
    assert [data["settings"][0]["methods"][r["method"]] for r in data["runs"]] == ["mirror", "dense"]
    assert data["runs"][0]["changes"]["n"] == 355
    assert sum(row[1] for row in data["runs"][0]["changes"]["by_class"]) == 355
    assert data["runs"][0]["distributions"][0][4] is not None
    assert made.text["headline"].startswith("mirror reaches")


def test_runs_of_an_older_version_are_shown_with_what_they_have(tmp_path):
    make_run(tmp_path / "old", extras=False)
    (tmp_path / "old" / "log.jsonl").unlink()
    shown = written(tmp_path, tmp_path / "old").data["runs"][0]
    assert shown["curves"] is None
    assert "distributions" not in shown
    assert "changes" not in shown
    assert shown["bench"] is None


def test_different_settings_are_not_compared(tmp_path):
    for data in ("fashion-mnist", "digits"):
        for method in ("mirror", "gmp"):
            make_run(tmp_path / data / method, method, data=data)
    settings = written(tmp_path, tmp_path).data["settings"]
    assert [len(s["pairs"]) for s in settings] == [1, 1]
    assert {s["title"].partition(",")[0] for s in settings} == {
        "lenet-300-100 on fashion-mnist",
        "lenet-300-100 on digits",
    }


def test_a_title_of_ones_own(tmp_path):
    make_run(tmp_path / "a")
    assert "<title>Mine &amp; &lt;yours&gt;" in written(tmp_path, tmp_path / "a", title="Mine & <yours>").source


def test_the_page_asks_for_nothing_and_runs_its_own_scripts_only(grid):
    policy = next(a["content"] for tag, a in grid.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    hashes = re.findall(r"'sha256-([^']+)'", policy)
    theme, _, plotly, app = grid.scripts
    assert hashes == [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (theme, plotly, app)]
    assert not [a for _, a in grid.tags if a.get("src") or re.match("https?:", a.get("href") or "")]
    assert len(grid.ids) - grid.ids.count(None) == len({i for i in grid.ids if i})
    assert all(("aria-label" in a) for tag, a in grid.tags if "chart" in (a.get("class") or "").split())


# -- markup stays text -------------------------------------------------------------------------------------------


def test_markup_in_any_name_stays_text(tmp_path):
    make_run(
        tmp_path / 'a"><img src=x onerror=alert(2)>',
        "mirror",
        options={EVIL: 1},
        shapes={f"{EVIL}.weight": (10, 10), '"&<!--': (10, 10)},
        classes=(EVIL, "</script>", "' onload='alert(3)"),
        images=600,
        accuracy=0.5,
        data=f"folder:/x/{EVIL.replace('/', '|')}",
        environment={"processor": EVIL},
    )
    make_run(tmp_path / "b", "dense", classes=(EVIL, "</script>", "' onload='alert(3)"), data="folder:/x/y")
    (tmp_path / EVIL.replace("/", "|")).write_text("not a run")
    made = written(tmp_path, tmp_path)
    names = {tag for tag, _ in made.tags}
    assert len(made.scripts) == 4
    assert "img" not in names
    assert not [a for _, a in made.tags if any(name.startswith("on") for name in a)]
    for text in ("<script>alert", "<img", "<!--"):
        assert text not in made.source.replace(made.scripts[2], "").replace(made.scripts[3], "")
    assert made.data["models"][0]["layers"] == [f"{EVIL}.weight", '"&<!--']
    assert made.data["environments"][0]["processor"] == EVIL
    assert any(EVIL.replace("/", "|") in path for path, _ in made.data["skipped"])


def test_json_in_a_script_cannot_end_it_and_reads_back():
    tree = {"</script><!--": ["\u2028", "&amp;", 1 / 3, float("inf"), None, True, "\udcff"]}
    text = script_json(tree)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script><!--": ["\u2028", "&amp;", 0.33333, None, None, True, "\udcff"]}


def test_a_picture_that_is_none_is_left_out(tmp_path):
    for method in ("mirror", "dense"):
        make_run(tmp_path / method, method, accuracy=0.5, images=30)
        path = tmp_path / method / "predictions.json"
        tree = json.loads(path.read_text())
        tree["images"] = dict.fromkeys(tree["images"], '"><script>alert(1)</script>')
        path.write_text(json.dumps(tree))
    changed = next(r["changes"] for r in written(tmp_path, tmp_path).data["runs"] if "changes" in r)
    assert changed["changed"] > 0
    assert changed["examples"] == []


# -- bad input ---------------------------------------------------------------------------------------------------


def test_what_is_damaged_unfinished_or_foreign_is_counted_and_named(tmp_path):
    make_run(tmp_path / "runs" / "good")
    make_run(tmp_path / "runs" / "damaged", seed=1)
    (tmp_path / "runs" / "damaged" / "result.json").write_text("{")
    make_run(tmp_path / "runs" / "unfinished", seed=2)
    (tmp_path / "runs" / "unfinished" / "result.json").unlink()
    (tmp_path / "runs" / "notes.txt").write_text("hello")
    made = written(tmp_path, tmp_path / "runs", tmp_path / "nowhere")
    reasons = {Path(path).name: reason for path, reason in made.data["skipped"]}
    assert set(reasons) == {"damaged", "unfinished", "notes.txt", "nowhere"}
    assert "damaged" in reasons["damaged"]
    assert "unfinished" in reasons["unfinished"]
    assert "4 other things" in made.source
    assert len(made.data["runs"]) == 1


@pytest.mark.parametrize("name", ["distributions.json", "predictions.json", "bench.json", "log.jsonl"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"layers": 3}', '{"layers": [{"name": 1}]}', '{"classes": 1}', "[" * 100_000]
)
def test_a_damaged_file_beside_a_good_result_costs_its_section_only(tmp_path, name, text):
    for method in ("mirror", "dense"):
        make_run(tmp_path / method, method, timed=True)
    (tmp_path / "mirror" / name).write_text(text)
    runs = written(tmp_path, tmp_path).data["runs"]
    assert len(runs) == 2
    assert ("distributions" in runs[1]) == (name != "distributions.json")


def test_nothing_to_report_on_names_what_was_there(tmp_path, capsys):
    make_run(tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    assert cli.main(["report", str(tmp_path / "half"), str(tmp_path / "no"), "--out", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert "\nmirrormask report: error: there is no finished run to report on; train one first\n" in error
    assert "half: unfinished" in error
    assert "no: does not exist" in error
    assert not (tmp_path / "r.html").exists()


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(tmp_path, capsys):
    make_run(tmp_path / "a")
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(tmp_path)]) == 2
    assert f"is a folder; give the page a name, as in '{tmp_path / 'report.html'}'" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "no" / "r.html")]) == 2
    assert "does not exist; make it, or choose another" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "a")
    out = tmp_path / "r.html"
    out.write_text("the old page")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(out)]) == 2
    assert "the old file is untouched; choose another --out, or make room" in capsys.readouterr().err
    assert out.read_text() == "the old page"
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "r.html"}


def test_the_command_says_what_it_wrote(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "a"]) == 0
    assert re.fullmatch(r"report\.html: 1 run; 4\.\d\d\sMB\n", capsys.readouterr().out)
    assert cli.main(["report", "a", "nowhere", "--out", "b.html"]) == 0
    assert "1 run, 1 other thing passed over and named in it; " in capsys.readouterr().out


def test_plotly_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    import sys

    make_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "r.html")]) == 2
    assert "mirrormask report needs plotly, which is not installed; run: pip install 'mirrormask[train]'" in (
        capsys.readouterr().err
    )


# -- size --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_page_of_500_runs_stays_under_15_mb(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda _: None)
    shapes = {f"layer{i}.weight": (64, 64) for i in range(20)}
    methods, sparsities = (
        ("mirror", "pilot", "spred", "gmp", "str", "rigl", "acdc"),
        (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999),
    )
    n = make_grid(tmp_path / "runs", methods, sparsities, 10, shapes=shapes, epochs=30, lines=4, images=500, timed=True)
    assert n == 500
    made = page.report([tmp_path / "runs"], tmp_path / "r.html")
    assert (made.runs, made.size) == (500, (tmp_path / "r.html").stat().st_size)
    assert made.size < 15e6
    runs = Page(tmp_path / "r.html").data["runs"]
    # One run of each cell at least has its details.
    detailed = {(r["method"], r["sparsity"]) for r in runs if "distributions" in r}
    assert len(detailed) == 50
    assert all(len(r["curves"]["step"]["loss"]) == 60 for r in runs)


def test_words_are_short():
    assert words.count(1, "run") == "1 run"
    assert words.sparsity(0.995) == "99.5%"
