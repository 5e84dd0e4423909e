"""The report: its numbers from a real benchmark of a few steps, and the page in a real browser."""

from __future__ import annotations

import base64
import csv
import gzip
import html
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learned_opt import compare
from learned_opt.benchmarking import BenchmarkConfig, BenchmarkTask, Entrant, benchmark
from learned_opt.benchmarking import scores as scoring
from learned_opt.benchmarking.curves import COLOURS, style
from learned_opt.benchmarking.html import profiles_section
from learned_opt.benchmarking.report import overview_of, terminal_text, write_report
from learned_opt.benchmarking.summary import CHANCES, overview, summary_table
from learned_opt.benchmarking.tables import read_rows
from learned_opt.errors import OutputError
from learned_opt.tasks.kinds import TaskConfig

ROOT = Path(__file__).parents[2]
SEARCH = {"lr": [1e-2, 1e-1]}
ADAM = Entrant("Adam", "torch.optim.Adam", search=SEARCH)
AGAIN = Entrant("Adam again", "torch.optim.Adam", search=SEARCH)
SGD = Entrant("SGD", "torch.optim.SGD", {"lr": 0.1})
EXPLODES = Entrant("explodes", "torch.optim.SGD", {"lr": 1e30})
RAISES = Entrant("raises <b>&amp;|", "torch.optim.SparseAdam", {"lr": 0.1})
ENTRANTS = [ADAM, AGAIN, SGD, EXPLODES, RAISES]
CONFIG = BenchmarkConfig(
    name="small & quick",
    tasks=[
        BenchmarkTask(TaskConfig(hidden=(8,), batch_size=32), 30, family="in-family", targets=(2,)),
        BenchmarkTask(TaskConfig(hidden=(6, 6), batch_size=32), 25, family="held-out data"),
    ],
    entrants=ENTRANTS,
    reporting_seeds=3,
    tuning_seeds=2,
    settings=3,
    max_grid_extensions=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CONFIG, run once."""
    folder = tmp_path_factory.mktemp("report")
    benchmark(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def cells_of(line: str) -> list[str]:
    """Of a row of a table in Markdown; without the bold."""
    return [cell.strip(" *") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def row_of(markdown: str, name: str) -> dict[str, str]:
    """Of the first table, which is over all tasks."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    line = next(line for line in lines if line.startswith(f"| {name} |"))
    return dict(zip(cells_of(lines[0]), cells_of(line), strict=True))


def test_scores_are_those_of_the_curves(folder: Path) -> None:
    """The definitions once more, as loops over the curves of the cells."""
    rows, scores = read(folder / "results.csv"), read(folder / "scores.csv")
    curves = {}
    for row in rows:
        with np.load(folder / "cells" / f"{row['cell']}.npz") as file:
            losses = file["losses"].astype(float)
        curves[row["task"], row["entrant"], row["seed"]] = losses  # a window of one: 30 // 20
    for row, score in zip(rows, scores, strict=True):
        key = row["task"], row["entrant"], row["seed"]
        assert key == (score["task"], score["entrant"], score["seed"])
        base = curves[row["task"], "Adam", row["seed"]]
        target = base[-1]
        assert float(score["target_loss"]) == pytest.approx(target, rel=1e-6)
        steps = [i + 1 for i, loss in enumerate(curves[key]) if loss <= target]
        base_steps = [i + 1 for i, loss in enumerate(base) if loss <= target]
        if steps and not row["diverged"] == "True":
            assert float(score["steps_to_target"]) == steps[0]
            assert float(score["steps_speed_up"]) == pytest.approx(base_steps[0] / steps[0])
            seconds = float(row["seconds"]) * steps[0] / int(row["steps"])
            assert float(score["seconds_to_target"]) == pytest.approx(seconds)
        else:
            assert score["steps_to_target"] == "inf" and float(score["steps_speed_up"]) == 0
    finals = [float(r["final_train_loss"]) for r in rows if r["entrant"] == "Adam"][:3]
    sgd = next(i for i, row in enumerate(rows) if row["entrant"] == "SGD")
    ratio = np.median(finals) / float(rows[sgd]["final_train_loss"])
    assert float(scores[sgd]["final_train_loss_ratio"]) == pytest.approx(ratio)


def test_a_task_may_name_targets_of_its_own(folder: Path) -> None:
    rows = read(folder / "scores.csv")
    first = {row["task"] for row in rows if json.loads(row["steps_to_targets"])}
    assert first == {rows[0]["task"]}
    assert json.loads(rows[0]["steps_to_targets"])["2"] <= 30
    assert "steps to 2" in (folder / "report.md").read_text()


def test_adam_under_another_name_ties_with_adam(folder: Path) -> None:
    row = row_of((folder / "report.md").read_text(), "Adam again")
    assert row["speed-up, steps"] == "1.00 [1.00, 1.00]"
    middle, low, high = map(float, re.findall(r"[\d.]+", row["P(lower final loss)"]))
    assert low <= middle == 0.5 <= high


def test_what_diverged_or_failed_is_counted(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    explodes, raises = (row_of(text, n) for n in ("explodes", r"raises &lt;b&gt;&amp;amp;\|"))
    assert explodes["speed-up, steps"] == raises["speed-up, steps"] == "0.00 [0.00, 0.00]"
    assert explodes["diverged"] == "6 of 6" and raises["diverged"] == "0 of 6, 6 failed"


def test_where_adam_diverged_nobody_is_faster(folder: Path) -> None:
    results = scoring.read_results(folder)
    adam, sgd = (next(r for r in results.rows if r["entrant"] == name) for name in ("Adam", "SGD"))
    results.losses[adam["cell"]][-3:] = np.nan
    scores = {(s["task"], s["entrant"], s["seed"]): s for s in scoring.score(results)}
    mine, other = (scores[adam["task"], name, adam["seed"]] for name in ("SGD", "explodes"))
    assert sgd["seed"] == adam["seed"]
    assert (mine["steps_to_target"], mine["steps_speed_up"]) == (sgd["steps"], 1)
    assert (other["steps_to_target"], other["steps_speed_up"]) == (math.inf, 0)


def test_a_run_that_diverged_counts_as_infinite_and_is_shown(folder: Path) -> None:
    rows = [r for r in read_rows(folder / "results.csv") if r["entrant"] in ("SGD", "explodes")]
    rows = [row for row in rows if row["task"] == rows[0]["task"]]
    line = next(ln for ln in summary_table(rows).splitlines() if "explodes" in ln)
    assert cells_of(line)[2] == "∞" and cells_of(line)[-1] == "3 of 3"
    sgd = [row for row in rows if row["entrant"] == "SGD"]
    sgd[0] |= {"final_train_loss": math.inf, "diverged": True}  # one seed is enough
    line = summary_table(sgd).splitlines()[-1]
    assert cells_of(line)[2] == "∞" and cells_of(line)[-1] == "1 of 3"


def test_the_best_mean_is_bold(folder: Path) -> None:
    rows = [r for r in read_rows(folder / "results.csv") if r["entrant"] in ("Adam", "SGD")]
    rows = [row for row in rows if row["task"] == rows[0]["task"]]
    _, _, heading, _, *lines = summary_table(rows).splitlines()
    for column, title, best in (
        ("test_loss", "test loss", min),
        ("test_accuracy", "test accuracy %", max),
    ):
        number = cells_of(heading).index(title)
        mean = {n: np.mean([r[column] for r in rows if r["entrant"] == n]) for n in ("Adam", "SGD")}
        for line in lines:
            bold = line.strip("|").split("|")[number].strip().startswith("**")
            assert bold == (mean[cells_of(line)[0]] == best(mean.values()))


def test_there_is_a_table_for_each_family(folder: Path, page: str) -> None:
    for text in (page, (folder / "report.md").read_text()):
        assert re.search("in-family", text, re.I) and re.search("held-out data", text, re.I)


def test_the_readmes_table_needs_only_the_committed_files(folder: Path, tmp_path: Path) -> None:
    for name in ("benchmark.json", "results.csv", "scores.csv"):
        shutil.copy(folder / name, tmp_path)
    columns = ["speed-up, steps", "diverged"]
    heading, _, *lines = overview_of([tmp_path], columns).splitlines()
    assert cells_of(heading) == ["optimizer", *columns] and len(lines) == len(ENTRANTS)
    report = (folder / "report.md").read_text()
    for name, *cells in map(cells_of, lines):
        assert cells == [row_of(report, name)[column] for column in columns]
    held_out = report[report.index("**held-out data**") :]
    _, _, *lines = overview_of([tmp_path], columns, "held-out").splitlines()
    for name, *cells in map(cells_of, lines):
        assert cells == [row_of(held_out, name)[column] for column in columns]
    _, _, *lines = overview_of([tmp_path], ["P(lower mean loss)"], baseline="SGD").splitlines()
    assert dict(map(cells_of, lines))["SGD"].startswith("0.50")


def test_the_page_needs_nothing_but_a_browser(page: str) -> None:
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<link|@import|src=|url\((?!#)", outside)


def test_names_and_tracebacks_are_escaped_and_free_of_folders(folder: Path, page: str) -> None:
    assert "raises &lt;b&gt;&amp;amp;|" in page and "<b>" not in page
    assert "Traceback (most recent call last)" in page and "dense gradients" in page
    assert "small &amp; quick" in page
    for text in (page, (folder / "report.md").read_text()):
        for path in (folder, ROOT, Path(sys.prefix), Path.home()):
            assert str(path) not in text


def test_every_raw_number_can_be_downloaded(folder: Path, page: str) -> None:
    found = re.findall(r'download="([\w.]+)" href="data:[\w/]+;base64,([\w+/=]+)"', page)
    files = {name: base64.b64decode(data) for name, data in found}
    assert set(files) == {"results.csv", "scores.csv", "tuning.csv", "losses.csv.gz"}
    for name in ("results.csv", "scores.csv", "tuning.csv"):
        assert files[name] == (folder / name).read_bytes()
    rows = list(csv.reader(gzip.decompress(files["losses.csv.gz"]).decode().splitlines()))
    for row, result in zip(rows, read(folder / "results.csv"), strict=True):
        assert row[:3] == [result["task"], result["entrant"], result["seed"]]
        with np.load(folder / "cells" / f"{result['cell']}.npz") as file:
            losses = file["losses"]
        assert np.array(row[3 : 3 + len(losses)], float) == pytest.approx(
            losses, rel=1e-5, nan_ok=True
        )


def test_how_it_was_run_is_said(folder: Path, page: str) -> None:
    facts = json.loads((folder / "provenance-benchmark.json").read_text())[-1]
    for fact in (facts["cpu"], facts["platform"], facts["versions"]["torch"]):
        assert str(fact) in page
    assert "The report is on seeds 0 to 2" in page and "seeds 1000000, 1000001" in page
    assert "3 settings" in page


def test_a_report_without_tuned_adam_says_so(tmp_path: Path) -> None:
    config = replace(CONFIG, tasks=CONFIG.tasks[:1], entrants=[SGD, EXPLODES], tuning_seeds=1)
    benchmark(config, tmp_path)
    text, page = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    assert "speed-up" not in text and "no Adam with a tuned constant learning rate" in page
    assert "final train loss" in text and "∞" in text


def test_other_folders_are_explained_and_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no results of a benchmark"):
        write_report(tmp_path)
    old = shutil.copytree(folder, tmp_path / "old")
    facts = json.loads((old / "benchmark.json").read_text())
    (old / "benchmark.json").write_text(json.dumps(facts | {"format": 1}))
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="format 1"):
        write_report(old)
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    lost = shutil.copytree(folder, tmp_path / "lost")
    (lost / "cells" / (read(lost / "results.csv")[0]["cell"] + ".npz")).unlink()
    with pytest.raises(OutputError, match="run the same command again"):
        write_report(lost)


# In a browser: chromium and playwright, which continuous integration must have


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    executable = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not os.environ.get("CI"):
        pytest.importorskip("playwright")
        if executable is None:
            pytest.skip("no chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.fixture(
    scope="module", params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
)
def view(chromium, folder: Path, request: pytest.FixtureRequest) -> Iterator:
    """The page as it is seen; its errors in `view.errors`."""
    width, scheme = request.param
    view = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    view.errors = []
    view.on("console", lambda message: view.errors.append(message.text))
    view.on("pageerror", lambda error: view.errors.append(str(error)))
    view.on("request", lambda request: view.errors.append(f"requests {request.url[:80]}"))
    view.goto((folder / "report.html").as_uri())
    assert view.errors.pop(0).startswith("requests file:")  # the page itself
    yield view
    view.close()


def test_it_loads_without_errors_or_requests(view) -> None:
    assert view.errors == []
    assert view.title().endswith("small & quick")


def test_its_pictures_are_drawn(view) -> None:
    pictures = view.locator("figure > svg")
    assert pictures.count() == len(CONFIG.tasks)  # which are too few for profiles
    for picture in pictures.all():
        box = picture.bounding_box()
        assert box["width"] > 300 and box["height"] > 150
        # lines of the axes' ticks, and one for each entrant but the one that has no losses
        assert picture.locator("g[id^=line2d] > path").count() > len(ENTRANTS)


def luminance(colour: str) -> float:
    """Of a computed CSS colour (WCAG 2)."""
    values = [float(x) for x in re.findall(r"[\d.]+", colour)[:3]]
    values = values if colour.startswith("color(") else [x / 255 for x in values]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_its_text_stands_out_from_what_is_behind(view) -> None:
    """By 4.5 to 1 at least, WCAG's bound: on the page, and in every colour of the heat maps."""
    pairs = view.evaluate(
        """[document.body, ...document.querySelectorAll("td.better, td.worse")].map(e =>
             [getComputedStyle(e).color, getComputedStyle(e).backgroundColor])"""
    )
    assert len(pairs) > 2 * len(ENTRANTS)
    for text, behind in pairs:
        low, high = sorted(map(luminance, (text, behind)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, behind)


def test_its_tables_sort(view) -> None:
    """Numbers the best first, what is infinite at the far end; then the other way round; names."""
    table = view.locator("#tables table").first
    headings = table.locator("th").all_inner_texts()

    def column(heading: str) -> list[str]:
        number = headings.index(heading) + 1
        cells = table.locator(f"tbody tr td:nth-child({number})").all_inner_texts()
        return [cell.split("\n")[0] for cell in cells]

    heading = table.get_by_role("button", name="final train loss")
    heading.click()
    numbers = [float(text.replace("∞", "inf")) for text in column("final train loss")]
    assert numbers == sorted(numbers) and numbers[-1] == float("inf") > numbers[0]
    heading.click()
    again = [float(text.replace("∞", "inf")) for text in column("final train loss")]
    assert again == sorted(numbers)[::-1]
    assert table.locator("th[aria-sort=descending]").count() == 1
    table.get_by_role("button", name="test accuracy").click()
    found = column("test accuracy %")
    accuracies = [text for text in found if text != "–"]
    assert accuracies == sorted(accuracies, key=float, reverse=True)
    assert found[-2:] == ["–", "–"]
    table.get_by_role("button", name="optimizer").click()
    assert column("optimizer") == sorted((e.name for e in ENTRANTS), key=str.lower)
    assert view.errors == []


# The pages of all protocols and of `compare`


@pytest.fixture(scope="module")
def reports(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    task = TaskConfig(kind="regression", data="breast_cancer", hidden=(8,), batch_size=16)
    adam = Entrant("AdamW 1e-2", "torch.optim.AdamW", {"lr": 0.01})
    validation = BenchmarkConfig(
        name="one",
        protocol="validation",
        tasks=[BenchmarkTask(task, 30, "one")],
        entrants=["learned", "AdamW warm-up cosine", adam, EXPLODES],
        reporting_seeds=1,
        tuning_seeds=1,
        settings=2,
    )
    spoilt = {"base": {**vars(task), "options": {}}, "change": 20, "scale": 1e-3}
    going_on = BenchmarkConfig(
        name="spoilt",
        protocol="going_on",
        tasks=[BenchmarkTask(TaskConfig(kind="continued", options=spoilt), 40, "spoilt")],
        entrants=["learned", adam, EXPLODES],
        reporting_seeds=1,
    )
    benchmark(validation, root / "validation")
    benchmark(going_on, root / "going_on")
    data = torch.utils.data.TensorDataset(torch.randn(32, 2), torch.randn(32, 1))
    loader = torch.utils.data.DataLoader(data, 8)
    compare(
        lambda: torch.nn.Linear(2, 1),
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        loader,
        loader,
        20,
        ("learned", EXPLODES, SGD),
        progress=False,
    ).save(root / "compare")
    return {"training": folder} | {path.name: path for path in root.iterdir()}


@pytest.fixture(params=[1280, 390])
def open_report(chromium, reports: dict[str, Path], request: pytest.FixtureRequest) -> Iterator:
    pages = []

    def go(name: str):
        pages.append(chromium.new_page(viewport={"width": request.param, "height": 800}))
        pages[-1].goto((reports[name] / "report.html").as_uri())
        return pages[-1]

    yield go
    for page in pages:
        page.close()


NAMES = ["training", "validation", "going_on", "compare"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_never_scrolls_sideways_and_names_stay_in_place(open_report, name: str) -> None:
    view = open_report(name)
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    hidden = view.evaluate(
        """[...document.querySelectorAll(".wide")].filter(box => box.checkVisibility()).map(box => {
             const cell = box.querySelector("td"), before = cell.getBoundingClientRect().left;
             box.scrollLeft = box.scrollWidth;
             box.scrollIntoView({block: "center"});
             const {left, top} = cell.getBoundingClientRect();
             return left !== before || !cell.contains(document.elementFromPoint(left + 3, top + 3));
           })"""
    )
    assert hidden and not any(hidden)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_a_sentence_and_counts_in_english(open_report, name: str) -> None:
    view = open_report(name)
    sentence = view.locator("h1 + p").inner_text()
    assert re.search("won|kept|ended", sentence) and sentence.endswith(".")
    assert not re.search(r"\b1 (tasks|seeds|runs|optimizers|settings|steps)\b",
                         view.locator("body").inner_text())  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_have_one_order_and_one_colour(open_report, name: str) -> None:
    view = open_report(name)
    order = view.locator("#summary table").first.locator("td:first-child").all_inner_texts()
    for table in view.locator("#tables table").all():
        assert table.locator("td:first-child").all_inner_texts() == order
    for table in view.locator("#map table").all():
        assert table.locator("th").all_inner_texts()[1:] == order
    strokes = set()
    for legend in view.locator(".legend").all():
        assert [text.strip() for text in legend.locator("li").all_inner_texts()] == order
        colours = [line.get_attribute("stroke") for line in legend.locator("line").all()]
        assert len(set(colours)) == len(order)
        strokes.add(tuple(colours))
    assert len(strokes) == 1
    known = {colour.lower() for colour in COLOURS}
    for figure in view.locator("figure > svg").all():
        drawn = re.findall(r"stroke: (#\w+)", figure.inner_html())
        lines = list(dict.fromkeys(colour for colour in drawn if colour.lower() in known))
        places = [colours.index(next(c for c in colours if c.lower() == x)) for x in lines]
        assert places == sorted(places)


def test_the_colours_of_the_maps_are_no_optimizers(page: str) -> None:
    maps = re.findall(r"\.(?:better|worse) \{ background: color-mix\(in srgb, (#\w+)", page)
    assert len(maps) == 2 and not {m.lower() for m in maps} & {c.lower() for c in COLOURS}
    assert len({style(i)[0] for i in range(10)}) == 10


def test_columns_have_one_order(page: str) -> None:
    tables = [re.findall(r"<button>(.*?)</button>", table) for table in page.split("<table")[1:]]
    tables = [[html.unescape(heading) for heading in table] for table in tables if table]
    ranks = {heading: place for place, heading in enumerate(max(tables, key=len))}
    for table in tables:
        known = [ranks[heading] for heading in table if heading in ranks]
        assert known == sorted(known)


def test_profiles_are_for_five_tasks_and_after_the_curves(page: str) -> None:
    assert "profile" not in page
    costs = np.array([[10.0, 20, 30, 40, 50], [20.0, 20, 20, 20, np.inf]])
    assert profiles_section(costs[:, :4], ["A", "B"]) == []
    (section,) = profiles_section(costs, ["A", "B"])
    assert "<svg" in section.body and "share of the tasks" in section.note
    rows = [
        {"task": task, "entrant": name, "steps_to_target": cost, "steps_speed_up": 1.0,
         "diverged": False, "error": None, **dict.fromkeys(CHANCES, 1.0)}
        for name, line in zip("AB", costs, strict=True) for task, cost in enumerate(line)
    ]  # fmt: skip
    assert "profile" in overview(rows, "A").headings
    assert "profile" not in overview([row for row in rows if row["task"] < 4], "A").headings


def test_the_terminal_ends_with_the_summary_and_who_won(folder: Path) -> None:
    text = terminal_text(folder)
    *_, title, stars, sentence = text.split("\n\n")
    assert title.startswith("all tasks\n") and stars.startswith("* ") and " won: " in sentence
    _, headings, rule, *rows = title.splitlines()
    starts = [m.start() for m in re.finditer(r"-+", rule)]
    assert len(rows) > 1 and all(headings[i - 1 : i] in ("", " ") for i in starts)
    assert all(row[i] != " " and row[i - 1 : i] in ("", " ") for row in rows for i in starts)
