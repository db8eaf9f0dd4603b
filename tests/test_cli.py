"""The command line: what it refuses, how it says so, and what a dry run tells."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from vadit import cli
from vadit.commands import train
from vadit.runtime import distributed
from vadit.runtime.errors import RunError, UsageError
from vadit.train.loop import Stopped


@pytest.mark.parametrize("command", ["help", "recipes", "train"])
def test_help_and_recipes_need_no_torch(command: str) -> None:
    arguments = {"help": ["--help"], "recipes": ["recipes"], "train": ["train", "lightningdit-b", "--help"]}[command]
    code = "import sys; from vadit.cli import main; sys.exit(main(sys.argv[1:]) or 3 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [*cli.COMMANDS, "evaluate"])
def test_every_command_explains_itself(command: str, capsys) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    assert f"usage: vadit {command.split()[0]}" in capsys.readouterr().out


def test_help_of_a_recipe_gives_meaning_unit_and_default(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # one column of boxes
    assert cli.main(["train", "vavae-f16d32-dinov2", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--run.batch-size INT Images per optimizer step over all processes. (default: 256)" in text
    assert "--dry-run" in text
    assert "--stages.1.vf-weight" in text
    assert "(default: 0.5 0.9) (at least 0 and below 1)" in text
    assert cli.main(["sample", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the same number of each class. (default: recipe's)" in text
    assert "(default: recipe's) (at least 2 and at most 100,000)" in text and "(default: 64)" in text


B, DEBUG = "train lightningdit-b", "train lightningdit-b-debug"
VAVAE = "train vavae-f16d32-dinov2-debug"
REFUSALS = {
    "trian": ["'trian'", "did you mean train"],
    "train lightningdit-x": ["'lightningdit-x'", "lightningdit-", "vadit recipes"],
    "train --run.seed 1": ["name of a recipe"],
    f"{B} --optimizer.lrr 1": ["unknown setting --optimizer.lrr", "did you mean --optimizer.lr?"],
    f"{B} --optimizer.lr fast": ["--optimizer.lr", "'fast'"],
    f"{B} --engine.precision fp8": ["--engine.precision is 'fp8'", "fp32, bf16, autocast"],
    f"{B} --optimizer.kind sgd": ["error: --optimizer.kind is 'sgd'", "adamw, apex_fused, muon"],
    f"{B} --optimizer.betas 0.9": ["--optimizer.betas needs FLOAT FLOAT"],
    f"{B} --no-data.normalize": ["unknown setting --no-data.normalize", "did you mean --data.no-normalize?"],
    f"{B} faster": ["'faster'", "--name value"],
    f"{DEBUG} --dry-run --world-size 3": ["run.batch_size 4", "3 processes", "--run.batch-size 3"],
    f"{DEBUG} --world-size 2": ["--world-size 2", "--dry-run"],
    f"{B} --dry-run --world-size 0": ["--world-size is 0"],
    f"{B} --run.keep-every-images 1.5": ["--run.keep-every-images: '1.5' is not {None}|INT"],
    f"{B} --run.seed {'9' * 5000}": ["--run.seed: a number of so many digits"],
    f"{VAVAE} --run.total-images 8": ["--run.total-images has no effect", "--stages.0.total-images"],
    f"{VAVAE} --loss.vf-weight 0.3": ["--loss.vf-weight has no effect", "--stages.0.vf-weight"],
    f"{VAVAE} --stages.2.vf-weight inf": ["stages.vf_weight is inf"],
    f"{B} --run.out=~nobodys/x": ["--run.out is ~nobodys/x", "nobody's home"],
    "demo --out ~nobodys/x": ["--out is ~nobodys/x"],
    "report ~nobodys/x": ["runs is ~nobodys/x"],
    "sample x --out x --tokenizer x --cfg-scale nan": ["--cfg-scale is nan"],
    "encode --num-workers 0": ["--num-workers is 0"],
    "prepare x y.beton --quality 101": ["--quality is 101"],
    "sample --out x": ["needs folder"],
    "evaluate": ["make-reference first, found nothing"],
    "doctor --all": ["unknown setting --all"],
}


@pytest.mark.parametrize("command", REFUSALS)
def test_refusal_is_one_sentence_that_names_the_setting(command: str, capsys) -> None:
    assert cli.main(command.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(part in line for part in REFUSALS[command]), line


@pytest.mark.parametrize(
    "command",
    [
        "train vavae-f16d32-dinov2-debug --data.path nowhere",
        "train vavae-f16d32-dinov2-debug --loss.perceptual-weight 1 --loss.vgg-weights nowhere.pth",
        "train vavae-f16d32-dinov2-debug --foundation.weights nowhere.pth",
        "train vavae-f16d32-dinov2-debug --run.init-from nowhere",
        "train lightningdit-b-debug --run.init-from nowhere",
        "encode --tokenizer nowhere --images nowhere --out out",
        "sample nowhere --tokenizer nowhere --out out",
        "evaluate latents --latents nowhere",
        "import nowhere.pt --out out",
        "encode --stats-only nowhere",
    ],
)
def test_missing_input_is_named_and_nothing_is_written(command: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) in (1, 2)
    *notes, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and "nowhere" in error and "Traceback" not in str(notes), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        *("train lightningdit-b-debug --run.out", "train vavae-f16d32-dinov2-debug --run.out", "demo --out"),
        *("encode --tokenizer x --images x --out", "sample x --tokenizer x --out", "prepare x"),
        *("evaluate samples x --reference x --out", "evaluate tokenizer --tokenizer x --images x --out"),
        *("evaluate latents --latents x --picture", "evaluate make-reference x --out"),
        *("export x --out", "export x --format reference --out", "import x --out"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(command: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (f"{tmp_path}/file/out", "/proc/none/out", f"{tmp_path}/{'x' * 300}/out"):
        out = f"{place}.beton" if command.startswith("prepare") else place
        assert cli.main([*command.split(), out]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"{out} cannot be written (" in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_process_of_its_own_ends_with_code_2_and_debug_adds_the_traceback() -> None:
    plain, debug = (
        subprocess.run([sys.executable, "-m", "vadit", *words, "lightningdit-c"], capture_output=True, text=True)
        for words in (["train"], ["train", "--debug"])
    )
    assert (plain.returncode, debug.returncode, plain.stdout) == (2, 2, "")
    assert plain.stderr.startswith("error: unknown recipe 'lightningdit-c'") and plain.stderr.count("\n") == 1
    assert debug.stderr.startswith("Traceback") and debug.stderr.endswith(plain.stderr)


RANK_1_OF_2 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"RANK": "1"}, "set WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, too"),
        ({"WORLD_SIZE": "2"}, "set RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, too"),
        ({"LOCAL_RANK": "0"}, "set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, too"),
        *(
            (RANK_1_OF_2 | {name: value}, f"the launcher's {name} is ")
            for name, value in (
                *(("RANK", value) for value in ("", "-1", "1.0", "one", "9" * 5000, "\u0661")),
                *(("WORLD_SIZE", ""), ("WORLD_SIZE", "-2"), ("WORLD_SIZE", "nan"), ("LOCAL_RANK", "\x1b[31m")),
                *(("MASTER_ADDR", ""), ("MASTER_ADDR", "a b"), ("MASTER_PORT", "0x50")),
            )
        ),
        *(
            (RANK_1_OF_2 | {name: value}, f"{name}='{value}'")
            for name, value in (
                *(("RANK", "2"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "0")),
                *(("LOCAL_WORLD_SIZE", "3"), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536")),
            )
        ),
    ],
)
def test_a_launchers_environment_is_whole_or_refused(
    given: dict[str, str], named: str, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for arguments in (["train", "nonsense"], ["encode"], ["evaluate", "samples"], ["doctor"]):
        assert cli.main(arguments) == 2
        output, error = capfd.readouterr()
        assert error.startswith("error: ") and named in error and error.count("\n") == 1 and output == ""
        assert error[:-1].isprintable()


def test_the_first_process_of_a_machine_reports_a_mistake_in_the_settings(monkeypatch, capsys, tmp_path: Path) -> None:
    for name, value in RANK_1_OF_2.items():
        monkeypatch.setenv(name, value)
    for local, reported in (("0", "[rank 1] error: unknown recipe"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / local))
        assert cli.main(["train", "lightningdit-c"]) == 2
        assert capsys.readouterr().err[: len(reported) or None] == reported
        assert "unknown recipe" in (tmp_path / local).read_text()


def test_a_process_alone_opens_no_port_and_leaves_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")  # no name of torch's: a shell inside a job
    before = set(psutil.Process().net_connections())
    arguments = ["train", "lightningdit-b-f16d32-dinov2-debug", "--engine.zero-stage", "3"]
    assert cli.main([*arguments, "--run.out", str(tmp_path / "run")]) == 0
    assert set(psutil.Process().net_connections()) <= before
    assert not os.environ.keys() & RANK_1_OF_2.keys() and os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "3"


@pytest.mark.parametrize(("processes", "ends"), [("1", ["at exit", "interpreter's end"]), ("2", ["at exit"])])
def test_one_process_of_several_leaves_before_the_interpreters_end(processes: str, ends: list[str]) -> None:
    script = """
import atexit, sys
from vadit import cli

class Last:
    def __del__(self):
        print("interpreter's end", flush=True)

last = Last()
atexit.register(print, "at exit")
sys.argv = ["vadit", "--version"]
cli.entry()
"""
    environment = os.environ | RANK_1_OF_2 | {"WORLD_SIZE": processes, "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ends and done.stderr == ""


FULL = "the GPU's memory is used up"
KERNELS = "VADIT_KERNELS is 'turbo'; set it to one of auto, reference"


@pytest.mark.parametrize(
    ("command", "error", "code", "words"),
    [
        ("train", UsageError("a is 1;\n set it to 2"), 2, "error: a is 1; set it to 2"),
        ("train", ValueError(KERNELS), 2, f"error: {KERNELS}"),
        ("train", RunError("shard 3 is damaged"), 1, "error: shard 3 is damaged"),
        ("train", OSError(errno.ENOSPC, "No space left", "/x"), 1, "error: /x: No space left; free some space"),
        ("train", PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        ("train", Stopped("stopped after step 3", interrupted=False), 0, "stopped after step 3"),
        ("train", Stopped("stopped after step 3", interrupted=True), 130, "stopped after step 3"),
        ("train", KeyboardInterrupt(), 130, "stopped; the same command goes on"),
        ("train", SystemExit(3), 3, ""),
        ("train", torch.OutOfMemoryError(), 1, f"error: {FULL}; raise --engine.gradient-accumulation"),
        ("encode", torch.OutOfMemoryError(), 1, f"error: {FULL}; lower --batch-size\n"),
        ("sample", torch.OutOfMemoryError(), 1, f"error: {FULL}; free it of other programs, or use a machine"),
        (
            "encode",
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
            1,
            "error: the memory is used up; lower",
        ),
        ("train", ZeroDivisionError(), 1, "Traceback"),
        ("train", ValueError("of VADIT_KERNELS is said nothing here"), 1, "Traceback"),
    ],
    ids=str,
)
def test_failures_become_exit_codes_and_one_sentence_but_our_mistakes(
    command: str, error: BaseException, code: int, words: str, monkeypatch, capsys
) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    module, _, function = cli.COMMANDS[command][0].partition(":")
    monkeypatch.setattr(f"vadit.commands.{module}.{function}", fail)
    assert cli.main(command.split()) == code
    printed = capsys.readouterr().err
    assert printed.startswith(words) and (printed.count("\n") > 1) == (words == "Traceback")


def dry_run(capsys, *arguments: str) -> tuple[dict, str]:
    """The resolved config and the text behind it."""
    assert cli.main(["train", *arguments, "--dry-run"]) == 0
    config, _, rest = capsys.readouterr().out.partition("\n}\n")
    return json.loads(config + "}"), rest


def test_dry_run_counts_parameters(capsys) -> None:
    match = re.search(r"([\d,]+) trained parameters", dry_run(capsys, "lightningdit-b")[1])
    assert int(match[1].replace(",", "")) / 1e6 == pytest.approx(130, abs=1)


def test_dry_run_prints_what_the_overrides_resolve_to(capsys, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/her")
    assert cli.main([*VAVAE.split(), "--dry-run", "--run.out=~/x", "--stages.1.total-images=80"]) == 0
    said = capsys.readouterr().out
    assert '"out": "/home/her/x"' in said and '"total_images": 96' in said
    config, text = dry_run(
        capsys,
        "lightningdit-b-debug",
        *("--optimizer.lr", "3e-4", "--engine.zero-stage", "2", "--model.qk-norm", "--run.batch-size=8"),
        *("--engine.ema-decays", "0.9", "0.99", "--world-size", "4"),
    )
    assert config["optimizer"]["lr"] == 3e-4
    assert config["engine"]["ema_decays"] == [0.9, 0.99]
    assert config["model"]["qk_norm"] is True
    assert "4 process(es), 2 images each" in text
    assert "2 *" in text


def test_dry_run_of_samples_models_hours_with_and_without_guidance(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    networks = ["lightningdit-xl-64ep-debug", "--tokenizer", "vavae-f16d32-dinov2-debug"]
    large = ("--num-samples", "1000000000", "--num-steps", "11", "--cfg-interval", "0.25", "1", "--timestep-shift", "0")
    assert cli.main(["sample", *networks, *large, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 H200, modelled" in said and "nothing is measured" in said
    hours = [float(found) for found in re.findall(r"(?:bf16|tf32|fp32) │ +\w\S+ │ +([\d.e-]+) │", said)]
    assert hours[0] / hours[3] == pytest.approx(1.7, rel=0.01) and len(hours) == 6  # guided in 7 of 10 steps
    assert cli.main(["sample", *networks, "--method", "dopri5", "--dry-run"]) == 2
    assert "--method euler" in capsys.readouterr().err
    assert cli.main(["sample", *networks, "--dry-run", "--precision", "bf16"]) == 0
    assert set(re.findall("bf16 │|tf32 │|fp32 │", capsys.readouterr().out)) == {"bf16 │"}
    for place in (0, 2):
        mistyped = list(networks)
        mistyped[place] = networks[place].replace("-debug", "-debag")
        assert cli.main(["sample", *mistyped, "--dry-run"]) == 2
        assert f"did you mean {networks[place]}" in capsys.readouterr().err


def test_local_rank_of_the_deepspeed_launcher_may_stand_anywhere(capsys) -> None:
    config, _ = dry_run(capsys, "--local_rank=0", "lightningdit-b-debug", "--run.seed", "7", "--local-rank=1")
    assert config["run"]["seed"] == 7


@pytest.mark.parametrize(
    ("device", "arguments", "outcome"),
    [
        ("cuda", [], ("bf16", "fused")),
        ("cuda", ["--engine.zero-stage", "3"], ("bf16", None)),
        ("cuda", ["--engine.precision", "fp32"], ("fp32", None)),
        ("cpu", [], ("autocast", None)),
    ],
)
def test_fast_changes_what_no_flag_sets(device: str, arguments: list[str], outcome: Any, monkeypatch, capsys) -> None:
    monkeypatch.setattr(distributed, "device", lambda wanted: torch.device(device))
    options = train._options(["lightningdit-xl-64ep", "--fast", "--dry-run", *arguments])
    assert options is not None
    engine = options.config.engine
    assert (engine.precision, engine.float8) == outcome
    told = capsys.readouterr().err
    assert ("no change" in told) == (device == "cpu") and ("-> bf16" in told) == (outcome[0] == "bf16")
