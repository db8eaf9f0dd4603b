"""What a run tells of itself: log points, their clocks, events on a full disk, and looks that disturb nothing."""

import dataclasses
import errno
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from checkpoint_worker import assert_same_end
from PIL import Image
from training_plain import tiny_dit, tiny_tokenizer

from vadit.config import DiTConfig, EvaluationSpec, SampleSpec
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.run_log import RunLog
from vadit.train import dit, evaluation, tokenizer
from vadit.train.tracker import Stopwatch, Tracker

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> Callable[[float], None]:
    """A clock that only goes on when it is told to: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def slow(clock: Callable[[float], None], seconds: float) -> Iterator[int]:
    """Batches that take so long."""
    number = 0
    while True:
        clock(seconds)
        yield number
        number += 1


def test_a_log_point_tells_pace_shares_and_distances(clock: Callable[[float], None]) -> None:
    speed = {"flops_per_image": 3e9, "peak_flops": 1e11}
    tracker = Tracker(CPU, batch_size=8, total_images=80, num_samples=1, communication_known=True, **speed)
    batches = tracker.batches(slow(clock, 0.25))

    def step(number: int) -> None:
        assert next(batches) == number
        with tracker.communication.running():
            clock(0.5)
            with tracker.communication.running():  # a collective that calls another is one
                clock(0.5)
        clock(0.75)
        tracker.add({"loss": torch.tensor(float(number))})

    step(0)
    with tracker.pause():  # a save: no part of the steps
        clock(7.0)
        next(tracker.batches(slow(clock, 1.0)))
        with tracker.communication.running():
            clock(1.0)
    step(1)
    values = tracker.read(16)
    assert values.pop("memory_gib") > 0.01
    assert values == pytest.approx(
        {
            "loss": 0.5,
            "images_per_s": 16 / 4,
            "images_per_s_per_gpu": 16 / 4,
            "mfu": 4 * 3e9 / 1e11,
            "data_wait_share": 0.5 / 4,
            "comm_share": 2 / 4,
            "epochs": 16.0,
            "hours_left": (80 - 16) * (4 + 9) / 16 / 3600,
            "hours_to_64_epochs": (64 - 16) * (4 + 9) / 16 / 3600,
        }
    )
    # From the second point on the pace is that since the first one; once past 64 epochs they are left out.
    for number in range(2, 8):
        step(number)
    with tracker.pause():
        clock(12.0)
    values = tracker.read(64)
    assert values["images_per_s"] == pytest.approx(48 / 12) and "hours_to_64_epochs" not in values
    assert values["hours_left"] == pytest.approx(16 * (12 + 12) / 48 / 3600) and values["loss"] == 4.5
    # Going back forgets what was counted.
    step(8)
    tracker.restart()
    step(9)
    values = tracker.read(72)
    assert values["loss"] == 9.0 and values["images_per_s"] == 4.0 and values["data_wait_share"] == 0.25 / 2


def test_what_is_not_known_is_left_out_and_a_late_term_is_a_mean_of_its_own() -> None:
    tracker = Tracker(CPU, batch_size=1, total_images=2, num_samples=1, flops_per_image=1.0, communication_known=False)
    tracker.add({"loss": torch.tensor(1.0)})
    assert tracker.read(1).keys().isdisjoint({"mfu", "comm_share"})
    tracker = Tracker(CPU, batch_size=1, total_images=9, num_samples=1)

    def terms(images_seen: int) -> dict[str, float]:
        return {name: value for name, value in tracker.read(images_seen).items() if name in ("loss", "gan")}

    for step in range(4):
        tracker.add({"loss": torch.tensor(float(step))} | ({"gan": torch.tensor(5.0)} if step == 3 else {}))
    assert terms(4) == {"loss": 1.5, "gan": 5.0}
    tracker.add({"loss": torch.tensor(2.0)})
    assert terms(5) == {"loss": 2.0}


def test_a_gpu_is_asked_by_events_and_not_waited_for(monkeypatch) -> None:
    """A stand-in for CUDA: events get the time at which the device reaches them, which is behind the host's."""
    device_time, waited, made = [0.0], [0], [0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made[0] += 1
            self.at: float | None = None

        def record(self, stream: str) -> None:
            assert stream == "default"
            self.at = device_time[0]

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            waited[0] += 1

        def elapsed_time(self, end: Any) -> float:
            return 1000 * (end.at - self.at)

    stream = ["default"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream[0])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    watch = Stopwatch(torch.device("cuda"))
    for number in range(1000):
        with watch.running():
            device_time[0] += 0.25 if number % 2 else 0.0  # every other batch was there before the device asked
        device_time[0] += 1.0
    assert waited == [0] and made[0] <= 2 * watch._MANY + 2  # events are used again
    stream[0] = "of its own"  # hidden behind the arithmetic
    with watch.running():
        device_time[0] += 5.0
    assert watch.read() == pytest.approx(125.0) and waited[0] > 0
    assert watch.read() == 0.0


class Full(io.RawIOBase):
    """A file whose disk takes `room` bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken: int = self.file.write(bytes(data[: self.room]))
        self.room -= taken
        return taken

    def close(self) -> None:
        self.file.close()
        super().close()


def test_a_log_outlives_a_full_disk(tmp_path: Path, capsys) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path)
    full = Full(log._events._file, room=200)
    lines = Full((tmp_path / "log.jsonl").open("ab", buffering=0), room=200)
    log._events._file, log._files["log.jsonl"] = full, io.TextIOWrapper(io.BufferedWriter(lines))
    for number in range(1, 20):
        log.write(images=number, step=number, values={"loss": 1 / number})
    assert "No space left" in capsys.readouterr().err
    full.room = lines.room = 1 << 30
    picture = np.zeros((4, 6, 3), np.uint8)
    log.write_evaluation({"images": 20, "step": 20, "psnr5": 12.5, "grid": "evaluations/x.png"}, picture)
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [*range(1, 20)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    told = EventAccumulator(str(tmp_path / "tensorboard"))
    told.Reload()
    assert [event.step for event in told.Scalars("loss")] == list(range(1, 20))
    assert [(event.step, event.value) for event in told.Scalars("evaluation/psnr5")] == [(20, 12.5)]
    assert [(image.width, image.height) for image in told.Images("evaluation")] == [(6, 4)]
    # Going on from 10 images forgets the later ones.
    RunLog(tmp_path, images_seen=10).close()
    assert (tmp_path / "evaluations.jsonl").read_text() == ""
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 10
    told = EventAccumulator(str(tmp_path / "tensorboard"))
    told.Reload()
    assert [event.step for event in told.Scalars("loss")] == list(range(1, 11))


DAMAGED = (
    b'{"images": 4}\n\0\0\0{"images": 8}\n\xff\xfe\n[1, 2]\n{"images": -1}\n\n{"loss": 1}\n{"images": 12}\n{"images'
)


@pytest.mark.parametrize("kind", ["damaged", "link", "dead link"])
def test_a_log_that_is_damaged_ends_nothing(kind: str, tmp_path: Path, capsys) -> None:
    path, victim = tmp_path / "log.jsonl", tmp_path / "victim"
    if kind == "damaged":
        path.write_bytes(DAMAGED)
    else:
        path.symlink_to(victim)
        if kind == "link":
            victim.write_bytes(DAMAGED)
    log = RunLog(tmp_path, images_seen=8)
    log.write(images=12, step=3, values={"loss": float("inf")})
    log.close()
    RunLog(tmp_path, images_seen=12).close()
    kept = [json.loads(line)["images"] for line in path.read_text().splitlines()]
    assert kept == ([4, 8, 12] if kind == "damaged" else [12]) and not path.is_symlink()
    assert ("5 damaged lines" if kind == "damaged" else "symbolic link") in " ".join(capsys.readouterr().err.split())
    assert not victim.exists() or victim.read_bytes() == DAMAGED


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both networks without looks: FOLDER/tokenizer, FOLDER/dit."""
    out = tmp_path_factory.mktemp("straight")
    tokenizer.train(tiny_tokenizer(out / "tokenizer"))
    dit.train(tiny_dit(out / "dit"))
    return out


def looked_at(straight: Path, out: Path, **evaluation: Any) -> DiTConfig:
    spec = EvaluationSpec(
        **{"every_images": 8, "grid_images": 5, "steps": 2, "tokenizer": str(straight / "tokenizer"), **evaluation}
    )
    return dataclasses.replace(tiny_dit(out), evaluation=spec)


def lines(folder: Path, name: str = "evaluations.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Colours:
    """A scorer whose features are mean colours."""

    inputs: ClassVar = {"reference": "reference.npz", "num_references": 52, "inception_published": False}

    def __init__(self, reference: str, *, inception_weights: str, device: torch.device, cache: Path) -> None:
        assert (reference, inception_weights) == ("reference.npz", "weights.pth")

    def features(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        torch.randn(3)  # whatever a look draws
        return images.float().mean(dim=(2, 3))

    def score(self, features: torch.Tensor, sampler: str) -> dict[str, float]:
        return {f"fid{len(features)}_{sampler}": float(features.mean())}


def test_looks_change_no_bit_of_a_generators_training(straight: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "SampleScorer", Colours)
    scored = {"num_samples": 70, "reference": "reference.npz", "inception_weights": "weights.pth"}
    dit.train(looked_at(straight, tmp_path, **scored))
    assert_same_end(tmp_path, straight / "dit")
    found = lines(tmp_path)
    assert [(line["images"], line["step"]) for line in found] == [(8, 2), (16, 4)]
    assert all(line["seconds"] > 0 and 0 < line["fid70_euler2_random"] < 255 for line in found)
    assert all(line["inputs"] == Colours.inputs for line in found)
    assert found[1]["grid"] == "evaluations/0000000016.png"
    pictures = [np.asarray(Image.open(tmp_path / line["grid"])) for line in found]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()  # the weights have moved
    # The run goes on where another look was asked for, and where none is.
    longer = dataclasses.replace(looked_at(straight, tmp_path, every_images=4, steps=1))
    assert dit.train(longer) == tmp_path


def test_looks_change_no_bit_of_a_tokenizers_training(straight: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_tokenizer(tmp_path), evaluation=EvaluationSpec(every_images=4, grid_images=5))
    tokenizer.train(config)
    assert_same_end(tmp_path, straight / "tokenizer")
    found = lines(tmp_path)
    assert [line["images"] for line in found] == [4, 8, 12]
    from vadit.eval.tokenizer import psnr, reconstruct
    from vadit.images.backends import open_images
    from vadit.images.loader import Request
    from vadit.images.pillow import decode
    from vadit.images.pixels import to_uint8
    from vadit.train.checkpoint.export import load_autoencoder

    images, network = open_images(config.data, config.autoencoder.image_size), load_autoencoder(tmp_path)
    values = []
    for index in (0, 2, 4, 5, 7):  # 5 of 8, evenly
        pixels = torch.tensor(decode(images, Request(index)).copy()).permute(2, 0, 1)[None]
        values.append(float(psnr(pixels, to_uint8(reconstruct(network, pixels, 0, posterior="mode")))))
    assert found[-1]["psnr5"] == pytest.approx(np.mean(values), rel=1e-5)
    assert "evaluations_failed" not in lines(tmp_path, "log.jsonl")[-1]


@pytest.mark.parametrize("where", ["network", "make", "finish", "disk"])
def test_a_look_that_fails_does_not_end_the_run(
    where: str, straight: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fail(*_: Any) -> Any:
        torch.randn(5)
        raise torch.OutOfMemoryError("out of memory\nand more")

    if where == "disk":
        (tmp_path / "evaluations").write_text("in the way")
    else:
        monkeypatch.setattr(evaluation.Samples, where, fail)
    dit.train(looked_at(straight, tmp_path, every_images=4))
    assert_same_end(tmp_path, straight / "dit")
    found = lines(tmp_path)
    reason = "cannot be written" if where == "disk" else "OutOfMemoryError: out of memory"
    assert len(found) == 4 and all(reason in line["failed"] and "grid" not in line for line in found)
    assert [line.get("evaluations_failed") for line in lines(tmp_path, "log.jsonl")] == [None, 1, 2, 3]
    told = " ".join(capsys.readouterr().err.split())
    assert "evaluation after 4 images failed" in told and "training goes on" in told


def test_refused_before_the_run(straight: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer(tmp_path / "other", steps=1)
    tokenizer.train(dataclasses.replace(other, autoencoder=dataclasses.replace(other.autoencoder, latent_channels=16)))
    with pytest.raises(UsageError, match="decodes 16 channels, the generator makes 32"):
        dit.train(looked_at(straight, tmp_path / "run", tokenizer=str(tmp_path / "other")))
    with pytest.raises((UsageError, RunError), match="nowhere"):
        dit.train(looked_at(straight, tmp_path / "run", tokenizer="nowhere"))
    config = looked_at(straight, tmp_path / "run", precision="tf32")
    with pytest.raises(UsageError, match="tf32 is for GPUs"):  # before data are read
        dit.train(dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / "none"))))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_quick_sampler() -> None:
    spec = EvaluationSpec(steps=50)

    def quick(**sample: Any) -> tuple[str, int, int]:
        found = evaluation.quick_sampler(SampleSpec(**sample), spec)
        return evaluation.sampler_name(found).split("_")[0], found.num_steps, found.seed

    assert quick(method="euler", num_steps=250, seed=3) == ("euler50", 51, 0)
    assert quick(method="dopri5") == ("euler50", 51, 0)
    assert quick(method="ddpm") == ("ddpm50", 50, 0)
    found = evaluation.quick_sampler(SampleSpec(method="euler_maruyama"), spec)
    assert evaluation.sampler_name(found).startswith("euler_maruyama50_")
