"""The launch scripts: what they start, what they pass on, when they start again, and that shellcheck likes them.

Against launchers of a few lines that behave like deepspeed, torchrun and SLURM; in the fault suite for real.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkpoint_worker import assert_same_end
from launched import LAUNCH, LIMIT_S, LONG_GENERATOR, environment, free_port, logged, train_by_two, wait_until

from vadit import cli

ROOT = LAUNCH.parent

# Each start of the fake launchers is a line in STARTS, whose number picks the exit code out of CODES.
FAKE_LAUNCHER = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $* [$MASTER_ADDR:$MASTER_PORT $PYTHONSAFEPATH]" >>"$STARTS"
[[ $* == *--hostfile* ]] && cat "$(sed 's/.*--hostfile \\([^ ]*\\).*/\\1/' <<<"$*")" >>"$STARTS"
codes=($CODES)
start=$(grep -c "^${0##*/}" "$STARTS")
exit "${codes[start <= ${#codes[@]} ? start - 1 : -1]}"
"""

# Tasks as srun starts them, of two nodes; signals are passed on to all tasks, the highest exit code is srun's.
FAKE_SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1"
per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
for rank in range(int(os.environ["SLURM_NTASKS"])):
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node)}
    tasks.append(subprocess.Popen(sys.argv[2:], env=os.environ | own))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""

FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' node-7 node-8; else echo "scontrol $*" >>"$STARTS"; fi
"""

# Says what it is told, and trains for ever, until a signal.
FAKE_VADIT = """#!/usr/bin/env bash
end() { echo "rank $RANK: $1" >>"$STARTS"; kill %1; exit 0; }
trap 'end USR1' USR1
trap 'end TERM' TERM
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT: $*" >>"$STARTS"
codes=($CODES)
code=${codes[($(grep -c " of " "$STARTS") - 1) / WORLD_SIZE]}
if [[ $code == wait ]]; then sleep 100 & wait; fi
exit "$code"
"""


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """An environment in which the fakes are found first; $STARTS is the file that they write."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {"deepspeed": FAKE_LAUNCHER, "torchrun": FAKE_LAUNCHER, "srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL}
    for name, text in (scripts | {"vadit": FAKE_VADIT}).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "starts").write_text("")
    variables = environment(STARTS=str(tmp_path / "starts"), CODES="0", RESTART_PAUSE="0")
    return variables | {"PATH": f"{folder}{os.pathsep}{variables['PATH']}"}


def launch(script: str, variables: dict[str, str], *arguments: str) -> tuple[int, list[str], str]:
    """(exit code, lines that the fakes wrote, stderr)."""
    done = subprocess.run(
        [str(LAUNCH / script), *arguments], env=variables, capture_output=True, text=True, timeout=LIMIT_S
    )
    return done.returncode, Path(variables["STARTS"]).read_text().splitlines(), done.stderr


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (apt-get install shellcheck)")
    scripts = sorted(str(path.relative_to(ROOT)) for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
    assert len(scripts) == 4
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_train_on_one_machine(fakes: dict[str, str]) -> None:
    code, starts, _ = launch("train.sh", fakes, "x", "--run.out", "a b")
    assert (code, starts) == (0, ["deepspeed --quiet --master_port 29500 --module vadit train x --run.out a b [: 1]"])
    _, starts, _ = launch("train.sh", fakes | {"PROCESSES": "3", "MASTER_PORT": "4000"}, "x")
    assert starts[-1] == "deepspeed --quiet --master_port 4000 --num_accelerators 3 --module vadit train x [:4000 1]"


def test_train_on_several_machines(fakes: dict[str, str], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("h slots=2\n")
    _, starts, _ = launch("train.sh", fakes | {"HOSTFILE": str(hosts)}, "x")
    assert starts[0] == f"deepspeed --quiet --master_port 29500 --hostfile {hosts} --module vadit train x [: 1]"
    many = fakes | {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "PROCESSES": "8"}
    code, starts, _ = launch("train.sh", many, "x")
    assert code == 0 and "--no_ssh --node_rank 1 --master_addr 10.0.0.1 --module vadit train x" in starts[2]
    assert starts[3:] == ["node-0 slots=8", "node-1 slots=8"]
    assert not Path(starts[2].split("--hostfile ")[1].split()[0]).exists()
    for name in ("NODES", "MASTER_ADDR", "PROCESSES"):
        code, _, said = launch("train.sh", many | {name: ""}, "x")
        assert code == 1 and name in said


def test_torchrun(fakes: dict[str, str]) -> None:
    _, starts, _ = launch("torchrun.sh", fakes | {"PROCESSES": "3", "RESTARTS": "2", "CODES": "1"}, "x", "--a", "b c")
    one = "--standalone --local_addr 127.0.0.1"
    assert starts == [f"torchrun --nproc_per_node 3 --max_restarts 2 {one} --module vadit train x --a b c [: 1]"]
    many = fakes | {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "h", "LOCAL_ADDR": "10.0.0.1"}
    _, starts, _ = launch("torchrun.sh", many, "x")
    assert starts[-1] == (
        "torchrun --nproc_per_node gpu --max_restarts 0 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint h:29500 "
        "--rdzv_id vadit-29500 --rdzv_conf is_host=1 --local_addr 10.0.0.1 --module vadit train x [h: 1]"
    )


@pytest.mark.parametrize(
    ("codes", "restarts", "starts", "code"),
    [
        ("1 75 247 0", "3", 4, 0),
        ("1 75 247 0", "2", 3, 247),
        ("75 0", "0", 1, 75),
        ("1 2 0", "3", 2, 2),
        ("130 0", "3", 1, 130),
    ],
)
def test_train_starts_again_after_failures_only(
    codes: str, restarts: str, starts: int, code: int, fakes: dict[str, str]
) -> None:
    ended, lines, said = launch("train.sh", fakes | {"CODES": codes, "RESTARTS": restarts}, "x")
    assert (ended, len(lines)) == (code, starts)
    assert said.count("from the last checkpoint") == starts - 1


def test_torchrun_ends_its_report_with_the_sentence(monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert cli.main(["train", "lightningdit-b-debug", "--run.batch-size", "0.5"]) == 2
    left = json.loads(path.read_text())  # in the words of torch.distributed.elastic's ProcessFailure
    assert left["message"].startswith("error: --run.batch-size") and isinstance(left["timestamp"], int)


def slurm(fakes: dict[str, str], **own: str) -> subprocess.Popen[str]:
    """slurm.sbatch as SLURM runs it: a copy, elsewhere, of which two nodes have two tasks each."""
    copy = Path(fakes["STARTS"]).with_name("slurm_script")
    shutil.copy(LAUNCH / "slurm.sbatch", copy)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "8"}
    variables = fakes | job | {"SLURM_NTASKS_PER_NODE": "2"} | own
    return subprocess.Popen(["bash", str(copy), "x", "--a", "b c"], env=variables, stdout=subprocess.PIPE, text=True)


def lines_of(fakes: dict[str, str], at_least: int) -> list[str]:
    """What the fakes wrote, once it is so much."""
    wait_until(lambda: len(Path(fakes["STARTS"]).read_text().splitlines()) >= at_least, [], f"{at_least} lines")
    return sorted(Path(fakes["STARTS"]).read_text().splitlines())


def test_slurm_starts_a_process_per_task(fakes: dict[str, str]) -> None:
    job = slurm(fakes)
    assert job.wait(timeout=LIMIT_S) == 0
    assert lines_of(fakes, 4) == [
        f"rank {rank} of 4, local {rank % 2}, node-7:22345: train x --a b c" for rank in range(4)
    ]


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGUSR1, ["scontrol requeue 12345"]), (signal.SIGTERM, [])], ids=["time", "cancelled"]
)
def test_slurm_passes_signals_on_and_queues_again_when_time_runs_out(
    number: signal.Signals, after: list[str], fakes: dict[str, str]
) -> None:
    job = slurm(fakes, CODES="wait")
    lines_of(fakes, 4)
    job.send_signal(number)  # USR1, as --signal=B has it: to this script alone
    said, _ = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0 and ("goes back into the queue" in said) == bool(after)
    lines = Path(fakes["STARTS"]).read_text().splitlines()
    assert sorted(lines[4:8]) == [f"rank {rank}: {number.name.removeprefix('SIG')}" for rank in range(4)]
    assert lines[8:] == after  # once the tasks have ended


@pytest.mark.parametrize(
    ("codes", "starts", "code"), [("1 0", 2, 0), ("75 1 1 1 0", 4, 1), ("2 0", 1, 2), ("130 0", 1, 130)]
)
def test_slurm_starts_again_after_failures_only(codes: str, starts: int, code: int, fakes: dict[str, str]) -> None:
    job = slurm(fakes, CODES=codes)
    assert (job.wait(timeout=LIMIT_S), len(lines_of(fakes, 0))) == (code, 4 * starts)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train without a fault."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train_by_two({out: LONG_GENERATOR})
    return out


def ranks_under(pid: int) -> dict[int, int]:
    """Training processes among the descendants of `pid`, by rank; an older generation's are gone."""
    found: dict[int, int] = {}
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    for child in children:
        try:
            variables = dict(
                part.split("=", 1) for part in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in part
            )
        except (OSError, ValueError):
            continue
        if "LOCAL_RANK" in variables:
            found[int(variables["RANK"])] = child
        else:
            found |= ranks_under(child)
    return found


def start(command: list[str], out: Path, *settings: str, **own: str) -> tuple[subprocess.Popen[Any], Path]:
    """A launcher with LONG_GENERATOR, at least eleven of its steps done, and the file of what it says."""
    said = out.with_suffix(".txt")
    with said.open("ab") as file:
        process = subprocess.Popen(
            [*command, *LONG_GENERATOR, *settings, "--run.out", str(out)],
            env=environment(RESTART_PAUSE="0", **own),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_until(lambda: len(logged(out)) > 10, [process], "step 11")
    return process, said


@pytest.mark.faults
def test_a_killed_process_costs_a_restart(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process, said = start([str(LAUNCH / "train.sh")], out, PROCESSES="2", RESTARTS="1", MASTER_PORT=free_port())
    os.kill(ranks_under(process.pid)[1], signal.SIGKILL)
    assert process.wait(timeout=LIMIT_S) == 0, said.read_text()
    text = said.read_text()
    assert "launch: ended with code " in text and "restart 1 of 1" in text
    assert "Traceback" not in text
    assert_same_end(out, undisturbed)


@pytest.mark.faults
def test_a_stopped_process_is_named_and_replaced(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [str(LAUNCH / "torchrun.sh")]
    own = {"PROCESSES": "2", "RESTARTS": "1", "MASTER_PORT": free_port()}
    process, said = start(command, out, "--run.hang-timeout-s", "15", **own)
    os.kill(ranks_under(process.pid)[1], signal.SIGSTOP)
    assert process.wait(timeout=LIMIT_S) == 0, said.read_text()
    assert "[rank 0] error: rank 1 has not been heard of for" in said.read_text()
    assert_same_end(out, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_ends_well(number: signal.Signals, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    script = "train.sh" if number == signal.SIGUSR1 else "torchrun.sh"
    command, own = [str(LAUNCH / script)], {"PROCESSES": "2", "RESTARTS": "1", "MASTER_PORT": free_port()}
    process, said = start(command, out, **own)
    process.send_signal(number)
    assert process.wait(timeout=LIMIT_S) == 0, said.read_text()
    assert "and saved; resume with the same command" in said.read_text()
    assert len(logged(out)) < len(logged(undisturbed))


@pytest.mark.faults
def test_slurm_for_real(undisturbed: Path, fakes: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "vadit").unlink()
    out = tmp_path / "run"
    job = {"SLURM_JOB_ID": "9531", "SLURM_JOB_NODELIST": "x", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    (tmp_path / "bin" / "scontrol").write_text(FAKE_SCONTROL.replace("node-7 node-8", "127.0.0.1"))
    own = job | {name: fakes[name] for name in ("STARTS", "PATH")}
    process, said = start(["bash", str(LAUNCH / "slurm.sbatch")], out, **own)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=LIMIT_S) == 0, said.read_text()
    assert Path(fakes["STARTS"]).read_text() == "scontrol requeue 9531\n"
    assert len(logged(out)) < len(logged(undisturbed))
    process, _ = start(["bash", str(LAUNCH / "slurm.sbatch")], out, **own)
    assert process.wait(timeout=LIMIT_S) == 0, said.read_text()
    assert_same_end(out, undisturbed)
