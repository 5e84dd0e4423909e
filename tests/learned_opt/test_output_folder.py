"""Output folders: the lock (against a real process), resuming, other configs, provenance."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from geodesic.files import write_atomic
from learned_opt.errors import OutputError
from learned_opt.output_folder import claim_output, provenance

CONFIG = {"steps": 10, "task": {"hidden": (32, 32), "data": "digits"}}
HOLD = """
import sys, time
from learned_opt.output_folder import claim_output
with claim_output(sys.argv[1], {"steps": 10}, "benchmark"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_folder(holder, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error, claim_output(tmp_path, {"steps": 10}, "benchmark"):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value)
    assert "another --output" in str(error.value)


def test_kill_9_of_the_holder_frees_the_folder(holder, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claim_output(tmp_path, {"steps": 10}, "benchmark") as folder:
        assert folder == tmp_path


def test_an_error_inside_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claim_output(tmp_path, CONFIG, "train"):
        raise ZeroDivisionError
    with claim_output(tmp_path, CONFIG, "train"):
        pass


def test_a_replaced_folder_keeps_the_name_of_its_new_owner(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with claim_output(folder, CONFIG, "train"):
        folder.rename(tmp_path / "old")
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "held\n"
    try:
        with pytest.raises(OutputError) as error, claim_output(folder, {"steps": 10}, "benchmark"):
            pass
        assert f"process {process.pid} on" in str(error.value)
    finally:
        process.kill()
        process.communicate()


def test_the_same_config_resumes_and_every_run_is_recorded(tmp_path: Path) -> None:
    written = []
    for runs in (1, 2):
        with claim_output(tmp_path / "new", CONFIG, "train") as folder:
            written.append((folder / "config-train.yaml").stat().st_mtime_ns)
        assert len(json.loads((folder / "provenance-train.json").read_text())) == runs
    assert written[0] == written[1]
    saved = yaml.safe_load((folder / "config-train.yaml").read_text())
    assert saved == {"steps": 10, "task": {"hidden": [32, 32], "data": "digits"}}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"steps": 20, "task": CONFIG["task"]}, "steps was 10, now it is 20"),
        ({"steps": 10, "task": {"hidden": (32, 16), "data": "digits"}}, "task.hidden.1 was 32"),
        ({"steps": 10, "task": CONFIG["task"], "seed": 1}, "seed was absent, now it is 1"),
        ({"task": CONFIG["task"]}, "steps was 10, now it is absent"),
    ],
)
def test_another_config_is_refused(tmp_path: Path, changed: dict, says: str) -> None:
    with claim_output(tmp_path, CONFIG, "train"):
        before = (tmp_path / "config-train.yaml").read_bytes()
    with pytest.raises(OutputError, match=says), claim_output(tmp_path, changed, "train"):
        pass
    assert (tmp_path / "config-train.yaml").read_bytes() == before


def test_values_that_yaml_spells_differently_are_the_same_config(tmp_path: Path) -> None:
    @dataclass
    class Inner:
        root: Path

    for _ in range(2):
        config = {"lr": 1e-05, "nan": float("nan"), "inner": Inner(Path("a")), "none": None}
        with claim_output(tmp_path, config, "train"):
            pass


def test_a_free_key_may_change(tmp_path: Path) -> None:
    for processes in (4, 1):
        with claim_output(tmp_path, {"steps": 10, "processes": processes}, "x", free=["processes"]):
            pass
    with pytest.raises(OutputError, match="steps"), claim_output(tmp_path, {"steps": 9}, "x"):
        pass
    for root in ("here", None):
        with claim_output(tmp_path, {"data": {"name": "a", "root": root}}, "y", free=["data.root"]):
            pass
    other = claim_output(tmp_path, {"data": {"name": "b", "root": None}}, "y", free=["data.root"])
    with pytest.raises(OutputError, match=r"data\.name"), other:
        pass


def test_a_config_whose_aliases_explode_is_refused(tmp_path: Path) -> None:
    lines = [f"a{i}: &a{i} [{f'*a{i - 1}, ' * 2 * (i > 0)}0]" for i in range(60)]
    (tmp_path / "config-train.yaml").write_text("\n".join(lines))
    with pytest.raises(OutputError, match="its aliases"), claim_output(tmp_path, CONFIG, "train"):
        pass


def test_a_damaged_provenance_is_kept_and_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "provenance-x.json").write_text('[{"started"')
    with claim_output(tmp_path, CONFIG, "x"):
        pass
    assert (tmp_path / "provenance-x.damaged.json").read_text() == '[{"started"'
    assert len(json.loads((tmp_path / "provenance-x.json").read_text())) == 1


def test_two_commands_share_a_folder(tmp_path: Path) -> None:
    for command in ("geodesics", "train"):
        with claim_output(tmp_path, {"command": command}, command):
            pass
    assert (tmp_path / "config-geodesics.yaml").exists()


def test_a_file_in_the_way_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--output"), claim_output(tmp_path / "file", {}, "train"):
        pass


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "a", "not bytes")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_provenance_names_versions_and_hardware() -> None:
    record = provenance()
    assert record["versions"]["torch"].startswith("2.")
    assert record["cores"] >= 1 and record["cpu"]
    assert json.loads(json.dumps(record)) == record
