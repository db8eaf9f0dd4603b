"""Guards where several processes have to agree, and signals to whole runs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from guard_help import events, newest
from launched import LIMIT_S, environment, launch_two, logged, wait_until
from training_plain import BATCH
from training_plain import logged as values

from vadit.train import runs

Done = subprocess.CompletedProcess[str]
WORKER = Path(__file__).parent / "guard_worker.py"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The run folders of two processes, one of which meets faults, from one launch; the last run of it fails."""
    out = tmp_path_factory.mktemp("ranks")
    return out, launch_two(WORKER, str(out))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_all_processes_skip_what_one_cannot_take(zero_stage: int, launched: tuple[Path, Done]) -> None:
    folder = launched[0] / f"dit-{zero_stage}"
    told = events(folder)
    assert [event["step"] for event in told] == [12, 12, 12], launched[1].stderr[-3000:]
    assert [event["reason"].split(" of the model")[0] for event in told] == [
        "the loss or a gradient",
        "the loss or a gradient",
        "the gradient norm",
    ]
    assert [len(event["image_ids"]) for event in told] == [BATCH] * 3
    assert values(folder, "skipped") == [0] * 11 + [3] * 2
    assert values(folder) == pytest.approx(values(launched[0] / "dit-1"), rel=1e-5)  # what ZeRO 1 does, all do
    assert all(value.isfinite().all() for value in newest(folder).values())


def test_all_processes_go_back(launched: tuple[Path, Done]) -> None:
    folder = launched[0] / "rollback"
    assert [event["event"] for event in events(folder)] == ["skipped", "skipped", "rollback"]
    assert values(folder, "step") == [1, 2, 3, 4]


def test_a_stop_of_one_process_is_one_of_all(launched: tuple[Path, Done]) -> None:
    for rank in range(2):
        assert (launched[0] / f"stop-{rank}").read_text() == (
            "0 stopped after 32 images and saved; resume with the same command"
        )


def test_a_damaged_shard_on_one_process_ends_all_and_is_told(
    launched: tuple[Path, Done],
) -> None:
    out, done = launched
    assert done.returncode == 1
    assert "[rank 1] error: the shard latents-00007.safetensors is damaged" in done.stderr
    saved = runs.publish.newest(out / "damage" / "checkpoints")
    assert saved is not None and saved.name == "step-00000002"


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.faults),
    ],
)
def test_a_signal_saves_and_ends_with_its_code(number: signal.Signals, code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vadit", "train", "lightningdit-b-debug", "--run.out", str(run)]
    command += ["--run.total-images", "4000000", "--run.save-every-images", "100000000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        wait_until(lambda: bool(logged(run)), [process], "step")
        process.send_signal(number)
        if number == signal.SIGTERM:  # a scheduler that asks twice
            process.send_signal(number)
        _, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, told
    assert "resume with the same command" in told
    assert runs.has_checkpoint(run)
