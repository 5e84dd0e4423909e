"""Runs PyTorch's generated tests for optimizers on LearnedOptimizer, and times its construction.

    python -m experiments.optimizer.contract --output experiments/results

This writes contract.csv, with the numbers of passed, failed and skipped tests of each rule and the
reasons, and contract.json, with the milliseconds to construct an optimizer. It takes a few minutes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

from experiments.result_files import RESULTS, ROOT, read, save
from learned_opt import LearnedOptimizer

SUITE = "tests/learned_opt/test_optimizer_suite.py"
RULES = {  # the classes of the suite and their descriptions
    "Shipped": "geodesic_rnn, shipped weights",
    "Published": "coordinatewise_lstm",
    "Prop": "rnnprop",
    "Scheduled": "scheduled, over the shipped weights",
}


def run_suite() -> list[dict[str, str | int]]:
    """Runs the suite and returns a row for each rule, outcome and reason."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", SUITE, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts = Counter(map(outcome, cases))
    return [
        {"rule": rule, "outcome": result, "tests": n, "reason": reason}
        for (rule, result, reason), n in sorted(counts.items())
    ]


def outcome(case: ElementTree.Element) -> tuple[str, str, str]:
    """Returns the rule and outcome of a test, and the reason if it was skipped or failed."""
    found = re.search(r"_([A-Z][A-Za-z]+)_(?:cpu|cuda)_", case.get("name"))
    rule = RULES.get(found[1], found[1]) if found else ""
    for tag, result in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (entry := case.find(tag)) is not None:
            return rule, result, entry.get("message", "").splitlines()[0]
    return rule, "passed", ""


def construction_ms() -> float:
    """Returns the median time to construct an optimizer, which includes reading the weights."""
    params = list(torch.nn.Linear(64, 32).parameters())
    seconds = timeit.repeat(lambda: LearnedOptimizer(params), number=1, repeat=21)
    return 1e3 * sorted(seconds)[10]


def table(path: Path) -> str:
    """Returns the counts of each rule in Markdown, and why tests were skipped or failed."""
    rows = read(path)
    outcomes = ("passed", "failed", "skipped")
    lines = ["| rule | " + " | ".join(outcomes) + " |", "| --- " * 4 + "|"]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        counts = [
            sum(int(r["tests"]) for r in rows if (r["rule"], r["outcome"]) == (rule, result))
            for result in outcomes
        ]
        lines.append(f"| {rule} | " + " | ".join(map(str, counts)) + " |")
    reasons: Counter[str] = Counter()
    for row in rows:
        if row["outcome"] != "passed":
            reasons[f"{row['outcome']}: {row['reason']}"] += int(row["tests"])
    return "\n".join(lines + [""] + [f"- {n} {reason}" for reason, n in reasons.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ms = construction_ms()
    save(args.output, "contract", run_suite(), construction_ms=ms)
    print(table(args.output / "contract.csv"), f"\nconstruction: {ms:.1f} ms")


if __name__ == "__main__":
    main()
