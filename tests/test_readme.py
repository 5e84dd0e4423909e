"""README.md and docs/: their Python and commands run, and their figures match the results."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch

from learned_opt.cli import main
from learned_opt.weights import DEFAULT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = Path("runs/seed3/weights.safetensors")
    mine.parent.mkdir(parents=True)
    shutil.copy(DEFAULT, mine)
    start, end = torch.tensor([-1.5, 0.0]), torch.tensor([1.5, 0.1])
    names = {
        "loss_fn": lambda x: (-x.square().sum() / 2).exp(),
        "theta_a": start.double(),
        "theta_b": end.double(),
        "make_model": lambda: torch.nn.Linear(4, 2),
        "train_loader": [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)],
        "validation_loader": [(torch.randn(8, 4), torch.randint(2, (8,)))],
    }
    for block in blocks(README):
        exec(block, names)  # the README's own
    assert names["result"].certified and names["result"].normalized_length > 1
    assert len(names["optimizer"].param_groups) == 1
    assert "AdamW warm-up cosine" in str(names["report"])
    assert Path("runs/compare/report.html").exists()


@pytest.mark.slow
def test_the_page_on_geodesics_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks((ROOT / "docs" / "geodesics.md").read_text()):
        exec(block, names)  # the page's own
    assert names["result"].certified and names["falling"].certified
    assert names["falling"].normalized_length > names["result"].normalized_length - 1e-9
    assert names["many"].certified.all() and (tmp_path / "b.png").exists()


def test_the_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process of one, where a recipe is for many."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    mine = Path("runs/mine/weights.safetensors")
    mine.parent.mkdir(parents=True)
    shutil.copy(DEFAULT, mine)
    names: dict = {}
    try:
        for block in blocks((ROOT / "docs" / "recipes.md").read_text()):
            if "init_process_group" in block:  # what torchrun does
                store = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0"}
                for name, value in (store | {"WORLD_SIZE": "1"}).items():
                    monkeypatch.setenv(name, value)
            exec(block, names)  # the page's own
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert names["optimizer"].param_groups[0]["lr"] == 1.0
    assert (tmp_path / "checkpoint.pt").exists()
    assert all(p.full_tensor().isfinite().all() for p in names["sharded"].parameters())


def test_the_tests_that_the_contract_names_exist() -> None:
    files = (ROOT / "tests" / "learned_opt").glob("test_*.py")
    there = set(re.findall(r"def (test_\w+)", "".join(f.read_text() for f in files)))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "contract.md").read_text())
    assert set(named) <= there and len(named) >= 22


@pytest.mark.slow
def test_the_page_on_robustness_counts_the_cases_that_there_are() -> None:
    page = (ROOT / "docs" / "robustness.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| [^|]+ \| (`test_.*) \|$", page, re.MULTILINE)
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"]
    listed = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    there = Counter(re.findall(r"^[\w/]+\.py::(test_\w+)", listed, re.MULTILINE))
    counted = [sum(there[name] for name in re.findall(r"`(test_\w+)`", tests)) for _, tests in rows]
    assert counted == [int(cases) for cases, _ in rows] and len(rows) >= 19


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = re.findall(r"^learned-opt (.*)$", README, re.MULTILINE)
    assert {c.split()[0] for c in commands} == {"geodesics", "train", "benchmark"}
    threads = torch.get_num_threads()
    for number, command in enumerate(commands):
        words = command.partition("#")[0].split()
        words[words.index("--output") + 1] += str(number)
        main([*words, "--smoke"])
    torch.set_num_threads(threads)
    assert list(tmp_path.glob("runs/benchmark*/report.html"))


@pytest.mark.slow
def test_the_figures_are_those_of_the_committed_results() -> None:
    check = [sys.executable, "-m", "experiments.pages.readme", "--check"]
    process = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
def test_the_page_on_benchmarks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks((ROOT / "docs" / "benchmarks.md").read_text()):
        exec(block, names)  # the page's own
    assert names["report"].baseline == "AdamW warm-up cosine" and len(names["report"].rows) == 3


def test_the_entrants_of_the_page_on_benchmarks_take_part(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    (entrants,) = re.findall(r"```yaml\n(entrants:.*?)```", page, re.DOTALL)
    task = "{kind: regression, data: breast_cancer, hidden: [8], batch_size: 16}"
    config = tmp_path / "suite.yaml"
    config.write_text(
        f"protocol: validation\nsettings: 5\ntasks:\n  - {{steps: 30, task: {task}}}\n{entrants}"
    )
    main(["benchmark", "--config", str(config), "--output", str(tmp_path / "out"), "--smoke"])
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    assert '"entrant": "Lion"' in rows and rows.count('"error": null') == rows.count("\n")


def test_no_link_within_the_pages_is_broken() -> None:
    def anchors(page: Path) -> set[str]:
        """As GitHub makes them of headings."""
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}

    broken = []
    folders = (ROOT, ROOT / "docs", ROOT / "experiments")
    for page in (page for folder in folders for page in folder.glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_the_page_on_experiments_names_every_script() -> None:
    """Those that run by themselves; weak_scaling.py is started by training/throughput.py."""
    folder = ROOT / "experiments"
    found = (p for p in folder.rglob("*.py") if "__main__" in p.read_text())
    scripts = {p.relative_to(folder).as_posix() for p in found}
    named = set(re.findall(r"\b(\w+/\w+\.py)\b", (folder / "README.md").read_text()))
    assert named == scripts - {"training/weak_scaling.py"}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_versions_are_claimed_as_they_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = (d for d in project["dependencies"] if d.startswith("torch"))
    torch_version = re.search(r"^torch==(\d+\.\d+)", CONSTRAINTS, re.MULTILINE)[1]
    python = re.search(r"tested with \(Python (\d+\.\d+)\)", CONSTRAINTS)[1]
    assert bound.startswith(f"torch>={torch_version},")
    assert project["requires-python"] == f">={python}"
    assert f"Python {python}, torch {torch_version}" in README
