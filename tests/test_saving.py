"""Saving: in the background, out of copies, whole or not at all, on disks that fail, and what stays on disk."""

import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import checkpoint_worker as worker
import pytest
import torch
from checkpoint_worker import SHARE, names, printed
from launched import LIMIT_S
from safetensors.torch import load_file
from training_plain import BATCH, tiny_dit

from vadit.config import RunSpec
from vadit.runtime import launcher
from vadit.runtime.errors import RunError
from vadit.train import dit
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.publish import TensorFile
from vadit.train.checkpoint.save import Saving


def state_json(images_seen: int) -> str:
    """A state.json of whatever run."""
    state = {"step": 1, "images_seen": images_seen, "world_size": 1, "optimizer": "adam", "loader": {}, "guard": {}}
    return json.dumps(state)


EVERY = {"save_every_images": BATCH, "keep_checkpoints": 3}


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [
        (2, None, [6, 7, 9]),
        (1, None, [7, 9]),
        (1, 16, [2, 4, 6, 7, 9]),
        (2, 20, [3, 5, 6, 7, 9]),  # 8 images a step: the first at or past 20 and 40
        (1, 1000, [7, 9]),
    ],
)
def test_the_newest_and_every_so_many_images_stay(
    keep: int, every: int | None, kept: list[int], tmp_path: Path
) -> None:
    """A damaged one of a later step, 9, takes nobody's place."""
    for step in (9, *range(1, 8)):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "state.json").write_text(state_json(8 * step))
        publish.prune(tmp_path, RunSpec(keep_checkpoints=keep, keep_every_images=every), last=path.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in kept]


def test_room_is_needed_for_the_parts_of_all_processes(tmp_path: Path, monkeypatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    (tmp_path / "step-00000001.partial").mkdir()
    (tmp_path / "step-00000001.partial" / "another").write_bytes(bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, 1000))
    faults: list[Exception] = []
    calls: dict[str, Any] = {"published": lambda: None, "failed": faults.append, "timeout_s": 5.0, "state": {}}
    for needed, fits in ((1200, False), (1100, True)):
        files = [TensorFile(SHARE, {"x": torch.ones(2)}, {})]
        Saving(tmp_path / "step-00000001", files, token="", needed=needed, **calls).join()
        assert (not faults) is fits
        if not fits:
            assert "1,100 bytes are needed, 1,000 are free" in str(faults.pop())
            (tmp_path / "step-00000001.partial").mkdir(exist_ok=True)
            (tmp_path / "step-00000001.partial" / "another").write_bytes(bytes(100))


def test_a_run_deletes_old_checkpoints_after_the_new_one_is_there(tmp_path: Path, monkeypatch) -> None:
    before: list[list[str]] = []
    original = publish.prune

    def prune(folder: Path, *rest: Any, last: str) -> None:
        before.append(names(tmp_path))
        original(folder, *rest, last=last)

    monkeypatch.setattr(publish, "prune", prune)
    dit.train(
        tiny_dit(tmp_path, run={"save_every_images": BATCH, "keep_checkpoints": 1, "keep_every_images": 2 * BATCH})
    )
    assert before == [[f"step-0000000{number}" for number in steps] for steps in ([1], [1, 2], [2, 3], [2, 3, 4])]
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


class Gate:
    """Holds writers up until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        original = publish.write_tensors

        def write(path: Path, file: TensorFile) -> Any:
            self.reached.set()
            assert self.opened.wait(LIMIT_S)
            return original(path, file)

        monkeypatch.setattr(publish, "write_tensors", write)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_goes_on_while_a_checkpoint_is_written(stage: int, tmp_path: Path, monkeypatch) -> None:
    expected = worker.Run(tmp_path / "expected", stage)
    expected.train(2)
    expected.save(wait=True)
    gate = Gate(monkeypatch)
    run = worker.Run(tmp_path / "found", stage)
    run.train(2)
    run.save()
    assert gate.reached.wait(LIMIT_S)
    run.train(5)  # while the writer has written nothing
    torch.rand(3)
    assert not (tmp_path / "found" / "step-00000002").exists()
    gate.opened.set()
    run.checkpoints.close()
    for path in (tmp_path / "expected" / "step-00000002").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "found" / "step-00000002" / path.name).read_bytes(), path.name
    values = run.checkpoints.log_values()
    assert values["save_stall_ms"] > 0 and "save_write_ms" not in values
    # The next one writes into the same memory, and what it holds is of its own step.
    before = {name: buffer.data_ptr() for name, buffer in run.checkpoints._buffers.items()}
    run.save()
    assert {name: buffer.data_ptr() for name, buffer in run.checkpoints._buffers.items()} == before
    run.train(6)
    run.checkpoints.close()
    costs = run.checkpoints.log_values()
    assert set(costs) == {"save_stall_ms", "save_write_ms"} and all(0 < cost < 1e6 for cost in costs.values())
    again = worker.Run(tmp_path / "found", stage)
    again.restore()
    assert again.step == 5 and again.train(7) == pytest.approx(worker.plain(7)[0][5:], rel=1e-5)


def test_a_next_save_waits_for_the_former(tmp_path: Path, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    run = worker.Run(tmp_path, 1)
    run.train(1)
    run.save()
    assert gate.reached.wait(LIMIT_S)
    threading.Timer(0.3, gate.opened.set).start()
    run.train(2)
    run.save()
    assert gate.opened.is_set() and (tmp_path / "step-00000001").exists()
    run.checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_can_be_saved_once_more(folder: Path) -> None:
    run = worker.Run(folder, 1)
    run.restore()
    before = (folder / "step-00000003" / SHARE).read_bytes()
    for master in run.engines["model"].masters():
        master.mul_(2)
    run.save(wait=True)
    assert (folder / "step-00000003" / SHARE).read_bytes() != before
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert publish.newest(folder) == folder / "step-00000003"


def test_any_tensor_is_written_as_it_is(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(7).to(torch.uint8),
        "half": torch.arange(7).bfloat16(),
        "none": torch.empty(0, 3),
        "number": torch.tensor(2.5),
        "strided": torch.arange(6.0).view(2, 3).T,
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    entry = publish.write_tensors(tmp_path / "file", TensorFile("file", tensors, {"a": "b"}))
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert entry == {"bytes": (tmp_path / "file").stat().st_size, "sha256": publish._digest(tmp_path / "file")}


def test_a_part_of_a_former_save_does_not_count(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launcher, "_place", launcher.Place(world_size=2))
    partial = tmp_path / "step-00000001.partial"
    partial.mkdir()
    faults: list[Exception] = []

    def save(token: str, timeout_s: float) -> None:
        (partial / "part-00001.json").write_text(json.dumps({"token": "one", "files": {}}))
        files = [TensorFile(SHARE, {"x": torch.ones(2)}, {})]
        calls: dict[str, Any] = {"published": lambda: None, "failed": faults.append, "needed": 8}
        Saving(tmp_path / "step-00000001", files, token=token, state={}, timeout_s=timeout_s, **calls).join()

    save("two", 0.2)
    assert "part-00001.json has not appeared" in str(faults.pop()) and not (tmp_path / "step-00000001").exists()
    save("one", LIMIT_S)
    assert faults == [] and (tmp_path / "step-00000001" / SHARE).exists()


def test_no_kill_publishes_half(folder: Path) -> None:
    """At each call that touches the disk in turn the process is killed; what counts is whole in every case."""
    points = 0
    while True:
        points += 1
        pid = os.fork()
        if pid == 0:
            try:
                _save_and_die(folder, points)
            finally:
                os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        path = publish.newest(folder)
        assert path is not None
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if path.name == "step-00000004":  # killed behind the rename
            shutil.rmtree(path)
        else:
            assert path.name == "step-00000003" and not (folder / "step-00000004").exists()
        publish.clear_up(folder)
    assert path.name == "step-00000004" and points > 12
    assert torch.equal(load_file(path / SHARE)["x"], torch.arange(50.0))


def _save_and_die(folder: Path, point: int) -> None:
    """In a process of its own: write step 4 and be killed at a call to the system."""
    calls = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **settings)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("open", "mkdir", "unlink"):
        setattr(Path, name, counted(getattr(Path, name)))
    files = [TensorFile(SHARE, {"x": torch.arange(50.0)}, {})]
    state = {"state.json": state_json(1)}
    made = Saving(
        folder / "step-00000004",
        files,
        token="",
        state=state,
        published=lambda: None,
        failed=lambda error: os._exit(4),
        needed=200,
        timeout_s=5,
    )
    made.join()
    os._exit(0)


class Failing:
    """Lets the disk fail while it is `on`."""

    def __init__(self, monkeypatch, number: int) -> None:
        self.on = False
        original = os.fsync

        def fsync(handle: int) -> None:
            if self.on:
                raise OSError(number, os.strerror(number))
            original(handle)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("number", "words", "advice", "background"),
    [
        (errno.ENOSPC, "No space left on device", "free some disk space", True),
        (errno.EACCES, "Permission denied", "give this user the right to write there", False),
        (errno.ENOENT, "No such file or directory", "leave its folder in place", True),
    ],
)
def test_a_run_outlives_a_disk_that_fails(
    number: int, words: str, advice: str, background: bool, tmp_path: Path, monkeypatch, capsys
) -> None:
    disk = Failing(monkeypatch, number)
    run = worker.Run(tmp_path, 1)
    run.checkpoints.spec = RunSpec(background_saves=background)
    run.train(1)
    run.save(wait=True)
    for step in (2, 3):
        run.train(step)
        disk.on = True
        run.save()
        run.checkpoints.close()
        text = printed(capsys)
        for part in (f"step-0000000{step}couldnotbewritten", words, "traininggoeson", advice):
            assert part.replace(" ", "") in text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
    run.train(4)
    # In the background, the second is counted when the next save, or a restore, looks back.
    assert run.checkpoints.failures == (1 if background else 2)
    disk.on = False
    run.save()
    run.checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]
    assert run.checkpoints.log_values().get("failed_saves") == (2 if background else None)
    # Whoever waits for a checkpoint, hears that there is none.
    disk.on = True
    with pytest.raises(RunError, match=rf"step-00000004 could not be written \({words}\); earlier .*{advice}"):
        run.save(wait=True)
    disk.on = False
    run.save(wait=True)
    assert run.checkpoints.log_values().keys() == {"save_stall_ms", "save_write_ms"}
    again = worker.Run(tmp_path, 1)
    again.restore()
    assert again.step == 4


def test_a_run_outlives_its_folder(folder: Path) -> None:
    run = worker.Run(folder, 1)
    run.restore()
    shutil.rmtree(folder)
    run.train(4)
    run.save(wait=True)
    assert publish.newest(folder) == folder / "step-00000004"
