"""The store of target paths: round trips, resuming after kill -9, and errors that name damage."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import geodesic.dataset
from geodesic.dataset import PathDataset
from geodesic.manifest import DatasetError

HEADER = {"task": "digits", "seeds": [0, 1], "solver": {"steps": 40, "tol": 1e-6}}


def make_shard(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    counts = torch.randint(2, 9, (5,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return {
        "beads": torch.randn(int(offsets[-1]), 200, generator=generator),
        "bead_offsets": offsets,
        "certified": counts > 4,
    }


def write(folder: Path, num_shards: int, only: range | None = None) -> PathDataset:
    dataset = PathDataset.create(folder, HEADER, num_shards)
    for index in dataset.missing() if only is None else only:
        dataset.write_shard(index, make_shard(index), {"pairs": 5, "feasible": index / 8})
    return dataset


def finished(folder: Path, num_shards: int = 4) -> Path:
    write(folder, num_shards).finish()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All but what killed writers left, which is hidden and harmless."""
    return {file.name: file.read_bytes() for file in folder.glob("[!.]*")}


def start_writer(
    folder: Path, num_shards: int, indices: str, and_then: str = ""
) -> subprocess.Popen:
    """A process of its own that writes the shards and prints each index once it is written."""
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_dataset import write
for index in {indices}:
    write(Path({str(folder)!r}), {num_shards}, only=[index])
    print(index, flush=True)
{and_then}
"""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(geodesic.dataset.__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_round_trip(tmp_path):
    writer = write(tmp_path / "paths", 3)
    with pytest.raises(DatasetError, match=r"unfinished; call finish\(\)"):
        writer.shard(0)
    writer.finish()
    for dataset in (writer, PathDataset.open(tmp_path / "paths")):
        assert len(dataset) == 3 and dataset.header == HEADER
        dataset.verify()
        for index in range(3):
            read, written = dataset.shard(index), make_shard(index)
            assert read.keys() == written.keys()
            for name in written:
                assert read[name].dtype == written[name].dtype
                assert torch.equal(read[name], written[name])
            assert dataset.facts(index) == {"pairs": 5, "feasible": index / 8}
        with pytest.raises(IndexError, match=r"\[0, 3\), got 3"):
            dataset.shard(3)


def test_views_and_shared_memory_are_stored_and_a_read_shard_can_be_written_to(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    dataset = PathDataset.create(tmp_path, {}, 1)
    dataset.write_shard(0, {"whole": whole, "same": whole, "column": whole.T[1]}, {})
    dataset.finish()
    read = dataset.shard(0)
    assert torch.equal(read["column"], whole.detach()[:, 1])
    read["same"].zero_()
    assert torch.equal(read["whole"], whole.detach())
    dataset.verify()  # the file is as it was


def test_resume_writes_only_what_is_missing(tmp_path):
    write(tmp_path / "paths", 5, only=[1, 4])
    with pytest.raises(DatasetError, match="unfinished; run the command"):
        PathDataset.open(tmp_path / "paths")
    before = (tmp_path / "paths" / "shard-00001.safetensors").stat().st_mtime_ns
    resumed = PathDataset.create(tmp_path / "paths", HEADER, 5)
    assert resumed.missing() == [0, 2, 3]
    with pytest.raises(DatasetError, match=r"lacks 3 of 5 shards.*shard-00000\.safetensors"):
        resumed.finish()
    finished(tmp_path / "paths", 5)
    assert (tmp_path / "paths" / "shard-00001.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path / "paths") == contents(finished(tmp_path / "in one go", 5))


def test_the_bytes_do_not_depend_on_the_order_of_anything(tmp_path):
    reference = contents(finished(tmp_path / "a", 3))
    other = PathDataset.create(tmp_path / "b", dict(reversed(HEADER.items())), 3)
    for index in (2, 0, 1):
        tensors = dict(reversed(make_shard(index).items()))
        other.write_shard(index, tensors, {"feasible": index / 8, "pairs": 5})
    other.finish()
    assert contents(tmp_path / "b") == reference
    finished(tmp_path / "b", 3)  # a second run has nothing to do
    assert contents(tmp_path / "b") == reference


def test_a_killed_writer_is_resumed_to_the_same_bytes(tmp_path):
    folder = tmp_path / "killed"
    # It would go on for 40 shards but waits after 20, so it is certain to be killed before the end.
    writer = start_writer(folder, 40, "range(20)", and_then="sys.stdin.read()")
    for line in writer.stdout:
        if line == "4\n":
            break
    writer.kill()
    writer.communicate()
    missing = PathDataset.create(folder, HEADER, 40).missing()
    assert set(range(20, 40)) <= set(missing) <= set(range(5, 40))
    finished(folder, 40)
    assert contents(folder) == contents(finished(tmp_path / "reference", 40))


def test_every_instant_of_an_interrupted_write_is_resumed(tmp_path):
    reference = contents(finished(tmp_path / "reference"))
    folder = tmp_path / "paths"
    write(folder, 4)
    (folder / "shard-00000.json").unlink()  # killed between the shard and its record
    (folder / "shard-00001.json").write_bytes(b'{"bytes": 12')
    (folder / ".shard-00002.safetensors.0123.tmp").write_bytes(b"half")
    (folder / "shard-00003.safetensors").unlink()
    assert PathDataset.create(folder, HEADER, 4).missing() == [0, 1, 3]
    assert contents(finished(folder)) == reference


def test_two_processes_fill_one_folder(tmp_path):
    folder = tmp_path / "paths"
    writers = [start_writer(folder, 30, f"range({first}, 30, 2)") for first in (0, 1)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    dataset = PathDataset.create(folder, HEADER, 30)
    assert dataset.missing() == []
    dataset.finish()
    assert contents(folder) == contents(finished(tmp_path / "reference", 30))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def lead_out(file: Path) -> None:
    outside = file.parent.parent / "elsewhere.safetensors"
    shutil.move(file, outside)
    file.symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"has \d+ bytes instead of \d+; delete the file and run the command"),
        (flip, "does not have the sha256 of its record; delete the file and run the command"),
        (Path.unlink, "is missing; delete the file and run the command"),
        (lead_out, "leads out of its folder"),
    ],
)
def test_a_damaged_shard_is_named_and_rebuilt_alone(tmp_path, damage, message):
    folder = finished(tmp_path / "paths")
    reference = contents(folder)
    damage(folder / "shard-00002.safetensors")
    message = rf"shard-00002\.safetensors.* {message}"
    dataset = PathDataset.open(folder)
    assert torch.equal(dataset.shard(1)["beads"], make_shard(1)["beads"])
    with pytest.raises(DatasetError, match=message):
        dataset.shard(2)
    with pytest.raises(DatasetError, match=message):
        dataset.verify()
    assert PathDataset.create(folder, HEADER, 4).missing() == [2]
    assert contents(finished(folder)) == reference


def test_the_checksum_is_compared_once_and_only_if_asked_for(tmp_path):
    folder = finished(tmp_path / "paths")
    checked = PathDataset.open(folder)
    checked.shard(2)
    flip(folder / "shard-00002.safetensors")
    checked.shard(2)
    PathDataset.open(folder, check=False).shard(2)
    with pytest.raises(DatasetError, match="sha256"):
        checked.verify()
    truncate(folder / "shard-00002.safetensors")
    with pytest.raises(DatasetError, match="bytes instead of"):
        PathDataset.open(folder, check=False).shard(2)


READ_LATE = """
import sys, torch
from geodesic.dataset import PathDataset
tensors = PathDataset.open(sys.argv[1], check=sys.argv[2] == "check").shard(0)
print("read", flush=True)
sys.stdin.readline()
print({name: float(tensor.double().sum()) for name, tensor in sorted(tensors.items())})
"""


def overwrite(file: Path) -> None:
    """In place, as a copy over the file does."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\xff" * (file.stat().st_size // 2))


def cut(file: Path) -> None:
    os.truncate(file, 100)


@pytest.mark.parametrize("check", ["check", "no check"])
@pytest.mark.parametrize("damage", [cut, overwrite, Path.unlink])
def test_what_was_read_stays_whatever_becomes_of_the_file(tmp_path, damage, check):
    """By a process of its own: to read on in a mapping of a file that was cut ends it."""
    dataset = PathDataset.create(tmp_path, {}, 1)
    shard = {"beads": torch.arange(2.0**18), "run": torch.arange(3)}
    dataset.write_shard(0, shard, {})
    dataset.finish()
    reader = subprocess.Popen(
        [sys.executable, "-c", READ_LATE, str(tmp_path), check],
        cwd=Path(geodesic.dataset.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout.readline() == "read\n"
    damage(tmp_path / "shard-00000.safetensors")
    output, _ = reader.communicate("\n", timeout=60)
    sums = {name: float(tensor.double().sum()) for name, tensor in shard.items()}
    assert reader.returncode == 0 and output == f"{sums}\n"


OTHER = HEADER | {"seeds": [2, 3]}


def copy_shard(source: Path, index: int, folder: Path) -> None:
    for file in source.glob(f"shard-{index:05d}.*"):
        shutil.copy(file, folder)


def forget_origin(folder: Path) -> None:
    """Leaves the shards as earlier versions wrote them: without what says where they are from."""
    for file in folder.glob("*.safetensors"):
        content = save(load_file(file))
        file.write_bytes(content)
        record = json.loads(file.with_suffix(".json").read_bytes())
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        file.with_suffix(".json").write_text(json.dumps(record))


def command_in(error: pytest.ExceptionInfo) -> str:
    return re.search("run `(.*)` and then", str(error.value))[1]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_shards_of_another_dataset_are_refused_with_what_removes_them(tmp_path, count):
    other = finished(tmp_path / "other", 10)
    folder = tmp_path / "it's here"
    dataset = PathDataset.create(folder, OTHER, 10)
    for index in range(count):
        copy_shard(other, index, folder)
    messages = []
    for ask in (dataset.missing, dataset.finish, lambda: dataset.fill(lambda index: None)):
        with pytest.raises(DatasetError, match=r"shard-00000.* came from another dataset") as error:
            ask()
        messages.append(command_in(error))
    assert not dataset.finished and len(set(messages)) == 1
    subprocess.run(messages[0], shell=True, check=True)
    dataset = PathDataset.create(folder, OTHER, 10)
    assert dataset.missing() == list(range(10))


def test_a_finished_dataset_does_not_take_a_shard_of_another(tmp_path):
    other = PathDataset.create(tmp_path / "other", OTHER, 4)
    other.write_shard(2, make_shard(2), {"pairs": 5, "feasible": 0.25})
    folder = finished(tmp_path / "paths")
    copy_shard(tmp_path / "other", 2, folder)
    with pytest.raises(DatasetError, match=r"shard-00002\.safetensors"):
        PathDataset.open(folder).shard(2)
    with pytest.raises(DatasetError, match="shard-00002 came from another dataset"):
        PathDataset.create(folder, HEADER, 4).missing()
    manifest = json.loads((folder / "manifest.json").read_bytes())  # as adopted long ago
    manifest["shards"][2] = json.loads((folder / "shard-00002.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    dataset = PathDataset.open(folder)
    assert torch.equal(dataset.shard(1)["beads"], make_shard(1)["beads"])
    for read in (lambda: dataset.shard(2), dataset.verify):
        with pytest.raises(DatasetError, match="shard-00002 came from another dataset"):
            read()


def test_shards_of_earlier_versions_are_known_by_a_finished_manifest_only(tmp_path):
    folder = tmp_path / "unfinished"
    write(folder, 4, only=[0, 1])
    forget_origin(folder)
    with pytest.raises(DatasetError, match=r"shard-00000 and 1 more came .* earlier version"):
        PathDataset.create(folder, HEADER, 4).missing()
    folder = finished(tmp_path / "finished")
    forget_origin(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    records = [json.loads(file.read_bytes()) for file in sorted(folder.glob("shard-*.json"))]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": records}))
    PathDataset.open(folder).verify()
    dataset = PathDataset.create(folder, HEADER, 4)
    assert dataset.missing() == []
    truncate(folder / "shard-00001.safetensors")
    dataset.fill(lambda index: (make_shard(index), {"pairs": 5, "feasible": index / 8}))
    PathDataset.open(folder).verify()


@pytest.mark.parametrize("made_again", [True, False])
def test_a_writer_stops_when_its_folder_is_replaced(tmp_path, made_again):
    folder, finishing = tmp_path / "paths", finished(tmp_path / "whole")
    writer, late = PathDataset.create(folder, HEADER, 4), PathDataset.open(finishing)

    def replace(folder):
        shutil.rmtree(folder)
        if made_again:
            PathDataset.create(folder, OTHER, 4)

    def make(index):
        if index == 2:
            replace(folder)
        return make_shard(index), {}

    message = (
        "deleted and made again .*header.seeds" if made_again else r"manifest\.json is missing"
    )
    with pytest.raises(DatasetError, match=message):
        writer.fill(make)
    replace(finishing)
    with pytest.raises(DatasetError, match=message):
        late.finish()
    for path in (folder, finishing):
        assert [file.name for file in path.glob("*")] == ["manifest.json"] * made_again
    if made_again:
        assert not PathDataset.create(folder, OTHER, 4).finished


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "shard-00000.safetensors", "", None])
def test_a_manifest_cannot_name_another_file(tmp_path, name):
    folder = finished(tmp_path / "paths")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["shards"][1]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r"shard 1 (must be the file shard-00001|is damaged)"):
        PathDataset.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2, and this version reads 1"),
        ({"format": "something"}, "is not the manifest of a dataset of paths"),
        ({"shards": []}, "is damaged"),
        ({"num_shards": "4"}, "is damaged"),
        ({"header": None}, "is damaged"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused_and_left_alone(tmp_path, change, message):
    file = finished(tmp_path / "paths") / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    before = file.read_bytes()
    with pytest.raises(DatasetError, match=message):
        PathDataset.open(file.parent)
    with pytest.raises(DatasetError, match=message):
        PathDataset.create(file.parent, HEADER, 4)
    assert file.read_bytes() == before


def test_a_folder_without_a_readable_manifest_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"manifest\.json is missing"):
        PathDataset.open(tmp_path / "nowhere")
    folder = finished(tmp_path / "paths")
    truncate(folder / "manifest.json")
    with pytest.raises(DatasetError, match=r"manifest\.json is not JSON"):
        PathDataset.create(folder, HEADER, 4)
    (folder / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="holds shards but no manifest"):
        PathDataset.create(folder, HEADER, 4)


@pytest.mark.parametrize(
    ("header", "num_shards", "message"),
    [
        (HEADER | {"task": "mnist"}, 4, "header.task is 'digits' there and 'mnist' here"),
        (HEADER | {"seeds": [0, True]}, 4, r"header.seeds is \[0, 1\] there and \[0, True\] here"),
        (HEADER | {"solver": {"steps": 41}}, 4, "header.solver.steps is 40 there and 41 here"),
        (HEADER | {"extra": 1}, 4, "header.extra is only in the new one"),
        ({"task": "digits"}, 4, "header.seeds is only in the old one"),
        (HEADER, 5, "num_shards is 4 there and 5 here"),
    ],
)
def test_another_header_is_refused_by_its_first_difference(tmp_path, header, num_shards, message):
    folder = finished(tmp_path / "paths")
    before = contents(folder)
    with pytest.raises(DatasetError, match=message):
        PathDataset.create(folder, header, num_shards)
    assert contents(folder) == before


def test_what_is_not_json_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="header must be JSON"):
        PathDataset.create(tmp_path / "a", {"task": object()}, 1)
    assert not (tmp_path / "a").exists()
    dataset = PathDataset.create(tmp_path / "b", {"steps": (1, 2)}, 1)
    assert dataset.header == {"steps": [1, 2]}
    with pytest.raises(DatasetError, match="facts of shard 0 must be JSON with finite numbers"):
        dataset.write_shard(0, make_shard(0), {"loss": float("nan")})
    assert dataset.missing() == [0]
