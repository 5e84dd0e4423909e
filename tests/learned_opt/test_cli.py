"""The command line, and every file in configs/ through it."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
import yaml

import learned_opt
from geodesic.dataset import PathDataset
from learned_opt import LearnedOptimizer
from learned_opt.cli import main, make_parser, parse
from learned_opt.interrupts import RANKS
from learned_opt.output_folder import claim_output

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DEMO = ("train", "--config", str(ROOT / "configs/train/demo.yaml"), "--output", "runs/demo")
TRAIN = (*DEMO, "--smoke", "--learning_rate", "0.002", "--geodesics.seed", "3")


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    """`learned-opt` as a process of its own, alone in its job."""
    environment = {k: v for k, v in os.environ.items() if k not in RANKS}
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-m", "learned_opt.cli", *args],
        cwd=cwd,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(autouse=True, scope="module")
def threads():
    """The commands set torch's threads for their process, here that of the tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A working directory with trained weights in runs/demo, and what training printed."""
    cwd = tmp_path_factory.mktemp("cli")
    process = run(*TRAIN, cwd=cwd)
    assert process.returncode == 0, process.stderr
    noise = [ln for ln in process.stderr.splitlines() if not ln.startswith(("geodesics", "train"))]
    assert not noise  # no adverts, and no warnings that a user can do nothing about
    return cwd, process.stdout


@pytest.fixture
def demo(trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/demo of `trained`, from its working directory."""
    monkeypatch.chdir(trained[0])
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    return Path("runs/demo")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of `fit`, which then trains nothing."""
    calls = []
    monkeypatch.setattr(
        "learned_opt.training.fit.fit", lambda *args: calls.append(args) or Path("weights")
    )
    return calls


def refusal(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The message with which `main` refuses: one line, exit code 2."""
    capsys.readouterr()  # of commands before
    with pytest.raises(SystemExit) as exit:
        main(list(args))
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert message.startswith("learned-opt: error: ") and message.count("\n") == 1
    return message


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_runs(path, demo, tmp_path, monkeypatch):
    if path.stem.endswith("_full"):
        pytest.skip("its networks on all images take minutes even with --smoke")
    arguments, text = [], path.read_text()
    if any(name in text for name in ("mnist", "cifar10", "ptb")):
        data = Path(os.environ.get("LEARNED_OPT_DATA") or ROOT.parent / "shared" / "data")
        if not data.is_dir():
            pytest.skip("needs MNIST, CIFAR-10 and PTB in the folder $LEARNED_OPT_DATA")
        monkeypatch.setenv("LEARNED_OPT_DATA", str(data))
        benchmark = path.parent.name == "benchmark"
        if benchmark:  # whose processes may be older than this setting
            arguments = ["--data_root", str(data)]
        if benchmark and "cifar10" in text and not (data / "cifar10").is_dir():
            arguments += ["--data", '{"cifar10": "cifar10_jpeg"}']
    command = path.parent.name
    main([command, "--config", str(path), "--output", str(tmp_path), "--smoke", *arguments])
    assert (tmp_path / f"config-{command}.yaml").is_file()
    if command == "geodesics":
        assert "chord is feasible" in (tmp_path / "geodesics.txt").read_text()
        PathDataset.open(tmp_path / "geodesics").verify()
    elif command == "train":
        step_with(tmp_path / "weights.safetensors")
    else:
        with open(tmp_path / "results.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and not [row["error"] for row in rows if row["error"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["geodesic", "trajectory"])
def test_plot_adds_pictures_to_a_data_set_that_is_there(path, tmp_path):
    config = str(ROOT / "configs/geodesics/digits.yaml")
    args = ["geodesics", "--config", config, "--output", str(tmp_path), "--smoke"]
    args += ["--targets.path", path]
    main(args)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("geodesics/*")}
    assert shards and not (tmp_path / "plots").exists()
    main([*args, "--plot"])
    assert shards == {path: path.stat().st_mtime_ns for path in tmp_path.glob("geodesics/*")}
    pictures = {path.name: matplotlib.image.imread(path) for path in tmp_path.glob("plots/*")}
    assert set(pictures) == {"lengths.png", "pair-loss.png", "pair-plane.png"}
    assert all(picture.std() > 0 for picture in pictures.values())


@pytest.mark.slow
def test_processes_share_a_data_set_and_make_the_same(tmp_path):
    config = str(ROOT / "configs/geodesics/digits.yaml")
    args = ["geodesics", "--config", config, "--smoke", "--num_shards", "3", "--output"]
    main([*args, str(tmp_path / "one")])
    together = run(*args, "two", "--processes", "2", cwd=tmp_path)
    assert together.returncode == 0, together.stderr
    for path in (tmp_path / "one" / "geodesics").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "geodesics" / path.name).read_bytes()
    refused = run(*args, "three", "--processes", "0", cwd=tmp_path)
    assert refused.returncode == 2 and "processes is 0" in refused.stderr


def step_with(weights: Path) -> None:
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    model(torch.ones(3)).square().sum().backward()
    LearnedOptimizer(model.parameters(), weights=weights).step()
    assert model.weight.isfinite().all() and not model.weight.equal(before)


def test_train_says_how_to_use_its_weights(demo, trained):
    weights = demo.absolute() / "weights.safetensors"
    assert trained[1].endswith(
        f"use it with LearnedOptimizer(model.parameters(), weights={str(weights)!r})\n"
    )
    step_with(weights)


def test_arguments_go_over_the_file_and_the_file_over_the_defaults(demo):
    config = yaml.safe_load((demo / "config-train.yaml").read_text())
    assert config["learning_rate"] == 0.002 and config["geodesics"]["seed"] == 3
    assert config["seed"] == 0


def test_the_same_config_resumes_and_computes_nothing_again(demo):
    shards = sorted((demo / "geodesics").glob("shard-*"))
    log = [path.read_bytes() for path in demo.glob("log/*/metrics.csv")]
    before = (demo / "weights.safetensors").read_bytes(), [p.stat().st_mtime_ns for p in shards]
    main(list(TRAIN))
    after = (demo / "weights.safetensors").read_bytes(), [p.stat().st_mtime_ns for p in shards]
    assert shards and log and after == before
    assert [path.read_bytes() for path in demo.glob("log/*/metrics.csv")] == log


@pytest.mark.slow
def test_another_config_is_refused(demo):
    process = run(*TRAIN, "--geodesics.family.width", "[8, 40]", cwd=Path.cwd())
    assert process.returncode == 2
    assert process.stderr.startswith("learned-opt: error: ") and process.stderr.count("\n") == 1
    assert "geodesics.family.width.1 was 48, now it is 40" in process.stderr


def test_where_it_runs_may_change_on_resume(demo, fits):
    main([*TRAIN, "--accelerator", "auto"])
    assert fits[0][0].accelerator == "auto"


def test_target_paths_of_other_tasks_are_refused(demo, fits, capsys, tmp_path):
    other = [*TRAIN, "--output", str(tmp_path), "--dataset", str(demo / "geodesics")]
    main(other)
    assert fits[0][2].folder == demo / "geodesics"
    message = refusal(capsys, *other, "--output", str(tmp_path / "other"), "--geodesics.seed", "4")
    assert "another dataset" in message and "seed" in message


def test_only_the_first_process_of_a_job_claims_the_output(demo, fits, monkeypatch):
    runs = (demo / "provenance-train.json").read_text()
    monkeypatch.setenv("RANK", "1")
    main(list(TRAIN))
    assert (demo / "provenance-train.json").read_text() == runs and len(json.loads(runs)) >= 1
    assert len(fits[0][2]) == 2  # it has opened the data set that is there


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("train --output x --geodesics.targets.horizn 160", "geodesics.targets.horizn"),
        ("train --output x --updates many", '"updates" Expected int many'),
        ("train --output x --updates 7", "updates=7 epoch_length=60"),
        ("train --output x --geodesics.targets.horizon 161", "stride=10 horizon=161"),
        ("train --output x --rule nonsense", "nonsense geodesic_rnn"),
        ("train --output x --objectives [magic]", "magic imitation pes"),
        ("train --output x --horizon [10,800]", "horizon window=20 longer"),
        ("train --output x --objectives [backprop] --first_order false", "coordinatewise_lstm"),
        ("train --output x --curriculum.lengths [40,20]", "curriculum.lengths (40, 20) increase"),
        ("train --output x --teacher.optimizer LBFGS", "teacher.optimizer LBFGS Adam"),
        ("train --output x --accelerator gpu --devices 99", "devices=99 GPUs cpu"),
        ("train --output x --accelerator cpu --devices 9999", "devices=9999 cores num_nodes"),
        ("train --output x --devices 2 --strategy nonsense", "strategy='nonsense' cannot ddp"),
        ("train --output x --precision 16-mixed", "precision '16-mixed' bf16-mixed"),
        ("train --output x --learning_rate .nan", "learning_rate=nan positive"),
        ("train --output x --teacher.options {fused: true, foreach: true}", "teacher fused"),
        ("train --output x --select worst", "select 'worst' best last"),
        ("train --output x --selection_interval 0", "selection_interval 0 least 1"),
        ("train --output x --devices -1 --accelerator cpu", "devices=-1 cannot"),
        ("train --output x --dataset .", "dataset='.' target paths not empty"),
        ("train --output x --first.rule_config.hidden 4", "its rule geodesic_rnn 'hidden': 4"),
        ("train --output x --rule coordinatewise_lstm --rule_config.hidden 0", "hidden is 0 1"),
        ("train --updates 50", "required output"),
        ("train --output x --config absent.yaml", "absent.yaml"),
        ("train --output x --config wrong.yaml", "updatez"),
        ("benchmark --output x --tuning_seeds [0,9]", "[0] tuning_seeds reporting_seeds"),
        ("bench --output x", "bench geodesics train benchmark"),
        ("", "command"),
    ],
)
def test_a_wrong_setting_is_named(args, words, capsys, tmp_path, monkeypatch, fits):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("updatez: 50")
    message = refusal(capsys, *args.split())
    assert all(word in message for word in words.split())


@pytest.mark.parametrize(
    ("command", "settings", "meant"),
    [
        ("train", "famly: {num_tasks: 2}", "family"),
        ("train", "family: {hiden_layers: [1, 2]}", "hidden_layers"),
        ("train", "geodesics: {targets: {horizn: 20}}", "horizon"),
        ("benchmark", "tasks: [{task: {hiden: [3]}}]", "hidden"),
        ("benchmark", "tasks: [{task: {kind: quadratc}}]", "quadratic"),
        ("benchmark", "tasks: [{task: {kind: quadratic, options: {conditon: 3}}}]", "condition"),
        ("benchmark", "entrants: [{name: a, optimzer: torch.optim.SGD}]", "optimizer"),
        ("benchmark", "entrants: [lerned]", "learned"),
        ("geodesics", "family: {kinds: {mpl: 1}}", "mlp"),
    ],
)
def test_what_is_misspelt_gets_a_suggestion(command, settings, meant, capsys, tmp_path):
    (path := tmp_path / "config.yaml").write_text(settings)
    message = refusal(capsys, command, "--output", "unused", "--config", str(path))
    assert message.rstrip().endswith(f"; did you mean {meant!r}?")


def test_so_do_arguments_and_rules(capsys):
    train = ("train", "--output", "unused")
    assert "did you mean 'updates'?" in refusal(capsys, *train, "--updats", "3")
    assert "did you mean 'num_tasks'?" in refusal(capsys, *train, "--family.num_task", "3")
    assert "did you mean 'geodesic_rnn'?" in refusal(capsys, *train, "--rule", "geodesic_rn")
    assert "did you mean 'hidden'?" in refusal(capsys, *train, "--rule_config.hiden", "3")
    assert "did you mean" not in refusal(capsys, *train, "--nothing_like_it", "3")


def laughs(first, more="[{0}, {0}]"):
    """YAML of some hundred bytes with 2^60 times what is in its first line."""
    lines = (f"a{i}: &a{i} {more.format(f'*a{i - 1}')}" for i in range(1, 61))
    return "\n".join((first, *lines)).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no settings: it is empty"),
        (b"# updates: 60\n", "has only comments"),
        (bytes(range(128, 256)), "is not a text file"),
        (b"a: [1,", "is not usable YAML"),
        (b"- 1", "of type list, not settings by name"),
        (b"5", "of type int"),
        (laughs("family: &a0 [0, 0]"), "once its aliases (*) are followed"),
        (laughs("family: &a0 {kinds: {mlp: 1}}"), "once its aliases (*) are followed"),
        (laughs("family: &a0 {num_tasks: 1}", "{{<<: [{0}, {0}]}}"), "aliases (*) are followed"),
        (b"family: &a {family: *a}", "has infinitely many values"),
        (b"family: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
    ],
)
def test_a_file_without_settings_is_named(content, says, capsys, tmp_path):
    (path := tmp_path / "config.yaml").write_bytes(content)
    for args in (["--config", str(path)], [f"--config={path}"]):
        message = refusal(capsys, "train", "--output", "unused", *args)
        assert f"config={str(path)!r}" in message and says in message


def test_the_demo_s_benchmark_says_how_to_make_its_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "benchmark" / "demo.yaml"
    message = refusal(capsys, "benchmark", "--config", str(config), "--output", "runs/demo")
    command = re.search("learned-opt (train --config )CONFIG( --output .*)", message)
    assert f"{command[1]}configs/train/demo.yaml{command[2].rstrip()}\n" in config.read_text()


@pytest.mark.slow
def test_what_processes_raise_is_one_line(tmp_path, capsys):
    args = ["geodesics", "--smoke", "--num_shards", "2", "--output", str(tmp_path)]
    main(args)
    manifest = tmp_path / "geodesics" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"horizon": ', '"horizon": 9'))
    assert "horizon" in refusal(capsys, *args, "--processes", "2")


SMALL = (
    "--num_shards 4000 --evaluation_size 64 --family.num_tasks 2 --targets.horizon 20 "
    "--targets.updates 4 --targets.num_segments 8"
)
LONG = {  # the arguments of commands that take minutes, and the first file that each leaves
    "geodesics": (SMALL, "geodesics/shard-00000.json"),
    "geodesics by two": (f"{SMALL} --processes 2", "geodesics/shard-00001.json"),
    "train": (
        "--objectives [meta_loss] --updates 20000 --epoch_length 2 --selection_interval 10000 "
        "--rule_config.hidden 3 --horizon [4,10] --window 4 --open_runs 2 --validation_steps 5",
        "checkpoints/last.ckpt",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name", "to_all"),  # a terminal's Ctrl-C goes to the whole group
    [
        ("geodesics", "SIGTERM", False),
        ("geodesics by two", "SIGINT", True),
        ("geodesics by two", "SIGTERM", False),
        ("train", "SIGINT", True),
        ("train", "SIGTERM", False),
    ],
)
def test_a_signal_ends_a_command_in_one_line_and_leaves_nothing(command, name, to_all, tmp_path):
    arguments, first_file = LONG[command]
    temporary, out = tmp_path / "temporary", tmp_path / "out"
    temporary.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in RANKS}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    args = [command.split()[0], "--output", str(out), *arguments.split()]
    process = subprocess.Popen(
        # a shell that runs the tests in the background ignores SIGINT, and children inherit that
        [sys.executable, "-c", f"import signal; signal.signal({int(signal.SIGINT)}, "
         "signal.default_int_handler); from learned_opt.cli import main; main()", *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    patience = time.monotonic() + 120
    while not (out / first_file).exists() and time.monotonic() < patience:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    number = signal.Signals[name]
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"learned-opt: ended by {name}; the same command resumes" in errors.splitlines()[-1]
    for noise in ("Traceback", "KeyboardInterrupt", "Warning"):
        assert noise not in errors, errors
    patience = time.monotonic() + 30
    while group_lives(process.pid) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not group_lives(process.pid)
    assert not list(temporary.iterdir()) and not list(out.rglob(".*.tmp"))
    assert not (out / ".lock-owner.json").exists()
    with claim_output(out, yaml.safe_load((out / f"config-{args[0]}.yaml").read_text()), args[0]):
        pass  # the lock is free, and the same config may go on


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see an import")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_the_imports_is_one_line_too(name, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal({int(signal.SIGINT)}, "
         "signal.default_int_handler); from learned_opt.entry import main; main()", "train",
         "--output", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    maps = Path("/proc") / str(process.pid) / "maps"
    while "libtorch_cpu" not in maps.read_text():  # torch is on its way
        assert process.poll() is None, process.communicate()[1]
    number = signal.Signals[name]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert errors == f"learned-opt: ended by {name}; the same command resumes where it stopped\n"


def test_the_command_handles_signals_before_it_imports_torch():
    code = "import sys; from learned_opt.entry import main; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout == "False\n"
    assert 'learned-opt = "learned_opt.entry:main"' in (ROOT / "pyproject.toml").read_text()


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "first",
    [
        {"epoch_length": 150},
        {"rule_config": {"hidden": 3, "every": 3}, "objectives": ["meta_loss"], "window": 18},
    ],
)
def test_a_first_stage_is_shrunk_with_its_own_rest(first, tmp_path, capsys):
    args = ["train", "--output", str(tmp_path), "--objectives", '["step_size"]', "--smoke"]
    args += ["--rule_config", json.dumps(first.get("rule_config", {"hidden": 3}))]
    main([*args, "--window", "21", "--horizon", "[21,63]", "--first", json.dumps(first)])
    assert capsys.readouterr().out.count("use it with LearnedOptimizer(") == 1
    step_with(tmp_path / "weights.safetensors")


def test_data_that_are_not_there_are_named_before_paths_are_made(tmp_path, capsys):
    args = ["train", "--output", str(tmp_path / "out"), "--smoke", "--family.data", "absent"]
    assert "absent" in refusal(capsys, *args, "--geodesics.data_root", str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_config_cannot_make_objects():
    spec = {"class_path": "collections.Counter", "init_args": {}}
    parser = make_parser("train")
    args = ["--output", "x", "--rule_config", json.dumps({"hidden": spec})]
    assert parser.instantiate(parser.parse_args(args)).rule_config == {"hidden": spec}


@pytest.mark.parametrize("command", ["geodesics", "train", "benchmark"])
def test_help_has_types_defaults_and_the_docstrings(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not exit.value.code and "<whole number>" in text and "(default: " in text
    assert "Config(" not in text and "configuration file" not in text
    assert {
        "geodesics": "The least and the largest number of hidden layers",
        "train": "The number of meta-updates",
        "benchmark": "The tasks, and the number of steps on each",
    }[command] in text


def test_a_config_is_shrunk_only_by_smoke():
    args = ["benchmark", "--config", str(ROOT / "configs/benchmark/digits.yaml"), "--output", "x"]
    whole, small = (parse([*args, *more])[1].tasks[0].steps for more in ([], ["--smoke"]))
    assert whole == 800 and small < 100


@pytest.mark.parametrize("args", [["--version"], ["train", "--help"]])
def test_a_reader_that_closes_the_output_gets_no_traceback(args):
    command = [sys.executable, "-m", "learned_opt.entry", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert not process.stderr.read() and process.wait() in (0, 1)


def test_the_version_and_the_commands_are_told(capsys):
    for args, words in ((["--version"], learned_opt.__version__), (["--help"], "benchmark")):
        with pytest.raises(SystemExit) as exit:
            main(args)
        assert not exit.value.code and words in capsys.readouterr().out
