"""Runs a suite: tuning, runs and report, by the protocol that the config names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from geodesic.files import user_path
from geodesic.processes import process_rank
from learned_opt.benchmarking import tables
from learned_opt.benchmarking.cells import FORMAT, Cell
from learned_opt.benchmarking.config import BenchmarkConfig, BenchmarkTask
from learned_opt.benchmarking.entrants import Entrant
from learned_opt.benchmarking.going_on import run_going_on
from learned_opt.benchmarking.going_on_report import write_going_on_report
from learned_opt.benchmarking.report import terminal_text, write_report
from learned_opt.benchmarking.runner import Runner
from learned_opt.benchmarking.stores import Files, Rows
from learned_opt.benchmarking.tracking import make_tracker
from learned_opt.benchmarking.tune import settings_of, tune
from learned_opt.benchmarking.validation import run_validation
from learned_opt.benchmarking.validation_report import write_validation_report
from learned_opt.benchmarking.workers import Lost
from learned_opt.errors import ConfigError, DataError, LearnedOptError, OutputError
from learned_opt.output_folder import claim_output
from learned_opt.tasks.download import download
from learned_opt.tasks.kinds import make_task
from learned_opt.yaml_size import check_size

# Settings that do not affect results, so a run that resumes in a folder may change them.
FREE = ("processes", "time_limit", "logger", "download", "data_root", "done")


def benchmark(config: BenchmarkConfig, output: str | Path) -> list[dict[str, Any]]:
    """Compares optimizers on tasks, after tuning them on other seeds than are reported.

        from learned_opt import BenchmarkConfig, BenchmarkTask, TaskConfig, benchmark

        if __name__ == "__main__":  # it starts processes
            config = BenchmarkConfig(
                tasks=[BenchmarkTask(TaskConfig(data="digits", hidden=(32,)), steps=500)],
                entrants=["learned", "Adam"],
            )
            rows = benchmark(config, "runs/benchmark")

    This is the command `learned-opt benchmark`. It prints the tables, who won, and the path of the
    report. It writes results.csv and the report into `output`. The protocol "training" also writes
    tuning.csv, benchmark.json and cells/, which has a file with the loss curve of each run. The
    other protocols also write rows.jsonl, which has a line for each run. If called again with the
    same config, it runs only what is missing. In a torchrun job all processes call it, with an
    `output` that all of them can access.

    Args:
        config: the tasks, optimizers, seeds and budgets. `config.smoke()` runs in seconds.
        output: the folder of the results; created if it does not exist.

    Returns:
        The rows of results.csv, one for each (task, entrant, seed), on every process of a job.

    Raises:
        ConfigError: an optimizer cannot be imported or refuses its arguments, an entrant has too
            few settings to try, or the device cannot be used.
        DataError: a data set is missing. Nothing has been run then.
        OutputError: `output` is in use, or holds results of another config or version.
    """
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={config.device!r} cannot be used ({error}); use cpu") from error
    for entrant in config.entrants:  # finds mistakes now, not after the tuning
        entrant.check()
        if entrant.search:
            settings_of(entrant, config.settings)
    folder, rank = user_path(output, "output", OutputError).absolute(), process_rank()[0]
    _check_format(folder)
    settings = dataclasses.asdict(config) | {"format": FORMAT}
    # each row names its run, so more entrants can be added to a folder of rows
    free = FREE if config.protocol == "training" else (*FREE, "entrants")
    with claim_output(folder, settings, "benchmark", free=free) if rank == 0 else nullcontext():
        if rank == 0 and config.download:
            for name in dict.fromkeys(task.task.data for task in config.tasks):
                download(name, config.data_root)
        tracker = make_tracker(config, folder) if rank == 0 else None
        runner = Runner(
            Files(folder / "cells")
            if config.protocol == "training"
            else Rows(folder / "rows.jsonl", rank, config.done),
            config.processes,
            config.time_limit,
            _planned(config),
            tracker and tracker.log,
        )
        with runner:
            facts = _facts(config, runner)
            results, write = PROTOCOLS[config.protocol](config, facts, runner)
        if rank:
            return results
        text, report = write(folder)
        if tracker:
            tracker.finish(results, report)
    print(f"{text}\n\n{report}")
    return results


Facts = dict[str, dict[str, Any]]
# The rows of results.csv, and a function that writes the report into a folder and returns the text
# for the terminal and the path of the report.
Outcome = tuple[list[dict[str, Any]], Callable[[Path], tuple[str, Path]]]


def _training(config: BenchmarkConfig, facts: Facts, runner: Runner) -> Outcome:
    cell = partial(_cell, config)
    tunings = tune(config, runner.run, cell)
    cells = [
        cell(task, entrant, _chosen(tunings, task, entrant), seed)
        for task in config.tasks
        for entrant in config.entrants
        for seed in config.reporting
    ]
    results = tables.result_rows(cells, runner.run(cells), tunings)

    def write(folder: Path) -> tuple[str, Path]:
        tried = tables.tuning_rows(tunings, len(config.tuning))
        summary = tables.describe(config, facts, tunings, runner.records, runner.ranks)
        tables.write(folder, results, tried, summary)
        report = write_report(folder)
        return terminal_text(folder), report

    return results, write


def _validation(config: BenchmarkConfig, facts: Facts, runner: Runner) -> Outcome:
    outcome = run_validation(config, runner.run)
    return outcome.rows, partial(write_validation_report, config, facts, outcome)


def _going_on(config: BenchmarkConfig, facts: Facts, runner: Runner) -> Outcome:
    rows, curves = run_going_on(config, runner.run)
    return rows, partial(write_going_on_report, config, rows, curves)


PROTOCOLS = {"training": _training, "validation": _validation, "going_on": _going_on}


def _cell(
    config: BenchmarkConfig, task: BenchmarkTask, entrant: Entrant, chosen: dict, seed: int
) -> Cell:
    return Cell(task, entrant, chosen, seed, config.data_root, config.threads, config.device)


def _chosen(tunings: tables.Tunings, task: BenchmarkTask, entrant: Entrant) -> dict[str, Any]:
    return dict(tunings[task.label, entrant.name].best) if entrant.search else {}


def _planned(config: BenchmarkConfig) -> int:
    """Returns the number of cells, without extensions of grids and runs of other lengths."""
    tuned = sum(bool(entrant.search) for entrant in config.entrants)
    trials = tuned * config.settings * len(config.tuning)
    return len(config.tasks) * (trials + len(config.entrants) * len(config.reporting))


def _check_format(folder: Path) -> None:
    """Raises OutputError if `folder` holds results of another version of the benchmark."""
    path = folder / "config-benchmark.yaml"
    try:
        check_size(text := path.read_text())
        found = yaml.safe_load(text).get("format", 1)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return  # absent, or damaged, which claim_output reports
    if found != FORMAT:
        raise OutputError(
            f"output={str(folder)!r} holds results of another version of the benchmark (format "
            f"{found}, this one writes {FORMAT}), which are kept; use another --output"
        )


def describe_task(entry: BenchmarkTask, data_root: str | None) -> dict[str, Any] | LearnedOptError:
    """Returns facts about a task that are known once it is made, or why it cannot be made."""
    try:
        task = make_task(entry.task, data_root)
    except LearnedOptError as error:
        return error
    chance = float(task.chance)
    return {"parameters": task.dim, "tensors": len(task.shapes), "chance": chance}


def _facts(config: BenchmarkConfig, runner: Runner) -> dict[str, dict[str, Any]]:
    """Returns facts about each task by label.

    A worker process makes the tasks, and keeps the data that it has loaded.
    """
    jobs = [partial(describe_task, entry, config.data_root) for entry in config.tasks]
    facts = runner.call(jobs)
    wrong = {
        entry.label: fact.reason if isinstance(fact, Lost) else str(fact)
        for entry, fact in zip(config.tasks, facts, strict=True)
        if isinstance(fact, (Lost, LearnedOptError))
    }
    if wrong:
        kind = DataError if any(isinstance(fact, DataError) for fact in facts) else LearnedOptError
        raise kind("; ".join(f"task {label!r}: {text}" for label, text in wrong.items()))
    return dict(zip((entry.label for entry in config.tasks), facts, strict=True))
