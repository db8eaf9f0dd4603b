"""Steps that would harm a run are left out, to the bit; a lost run goes back; a stop request ends well."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_help import counted, events, faulty, newest
from launched import LIMIT_S, environment, launch_two, wait_until
from launched import logged as lines
from torch import Tensor, nn
from training_plain import BATCH, logged, tiny_dit, tiny_tokenizer

from vadit.config import EngineSpec, GuardSpec, OptimizerSpec
from vadit.models.discriminator import _BatchNorm as BatchNorm
from vadit.runtime.errors import RunError
from vadit.runtime.stream import sample_ids
from vadit.train import dit, loop, oom, runs, tokenizer
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine
from vadit.train.guard import Guard

CPU = torch.device("cpu")
EVERY_STEP = {"save_every_images": BATCH, "keep_checkpoints": 9}


class Norms:
    """An engine as far as a guard sees it: it takes the norms it is given."""

    def __init__(self, norm: float) -> None:
        self.norm = norm

    def at_boundary(self) -> bool:
        return True

    def gradient_norm(self) -> Tensor:
        return torch.tensor(self.norm)

    def step(self, veto: Tensor) -> bool:
        return not veto


def judged(guard: Guard, **norms: float) -> bool:
    """Whether a step with these gradient norms is applied."""
    engines: dict[str, Any] = {name: Norms(norm) for name, norm in norms.items()}
    return guard.step(engines)


def healthy(steps: int, *, spread: float = 0.7, seed: int = 0) -> list[float]:
    """Norms of a sound run: 1e8 at first, where the output starts at zero, then down to 1 with a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    tail = (torch.randn(steps, generator=generator) * spread).exp()
    trend = [max(1e8 * 10 ** (-step / 2), 1 + 20 * math.exp(-step / 50)) for step in range(steps)]
    return [norm * factor for norm, factor in zip(trend, tail.tolist(), strict=True)]


@pytest.mark.parametrize("spread", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("window", [16, 128])
def test_a_sound_run_meets_no_false_alarm(window: int, spread: float, tmp_path: Path) -> None:
    for seed in range(5):
        guard = Guard(GuardSpec(spike_window=window), tmp_path)
        skipped = [
            step for step, norm in enumerate(healthy(300, spread=spread, seed=seed)) if not judged(guard, model=norm)
        ]
        assert skipped == []


def test_spikes_are_left_out_and_move_nothing(tmp_path: Path) -> None:
    guard = Guard(GuardSpec(spike_window=16), tmp_path)
    assert not judged(guard, model=math.nan) and (guard.skipped, guard.in_row) == (1, 1)
    assert all(judged(guard, model=1.0 + step / 100) for step in range(16))
    before = guard.state_dict()["norms"]
    assert not judged(guard, model=11.5)
    assert not judged(guard, model=math.inf)
    assert (guard.applied, guard.skipped, guard.in_row) == (False, 3, 2)
    assert guard.state_dict()["norms"] == before
    assert judged(guard, model=11.0)
    assert (guard.applied, guard.skipped, guard.in_row) == (True, 3, 0)


def test_nothing_is_a_spike_before_the_window_has_filled(tmp_path: Path) -> None:
    guard = Guard(GuardSpec(spike_window=10), tmp_path)
    assert all(judged(guard, model=1.0) for _ in range(8))
    assert judged(guard, model=1e30)  # the ninth: eight norms say too little
    assert judged(guard, model=1.0)
    assert not judged(guard, model=1e9)  # nine in ten are 1
    off = Guard(GuardSpec(spike_window=10, spike_factor=0.0), tmp_path)
    assert all(judged(off, model=1.0) for _ in range(10)) and judged(off, model=1e30)
    assert not judged(off, model=math.inf)


def test_networks_skip_together_each_by_its_own_norms(tmp_path: Path) -> None:
    guard = Guard(GuardSpec(spike_window=8), tmp_path)
    assert all(judged(guard, model=1.0) for _ in range(20))
    # A network that joins later starts its own window.
    assert all(judged(guard, model=1.0, discriminator=1000.0) for _ in range(8))
    assert not judged(guard, model=1.0, discriminator=20_000.0)
    assert "of the discriminator, 2e+04, is a spike" in guard._reason()
    assert not judged(guard, model=20.0, discriminator=1000.0)
    assert "of the model, 20, is a spike" in guard._reason()
    assert judged(guard, model=2.0, discriminator=2000.0)


def test_guard_state_is_plain_and_goes_on_the_same(tmp_path: Path) -> None:
    spec = GuardSpec(spike_window=16)
    straight, first = Guard(spec, tmp_path), Guard(spec, tmp_path)
    norms = healthy(60)
    norms[40] = norms[55] = 1e7
    expected = [judged(straight, model=norm) for norm in norms]
    assert [index for index, good in enumerate(expected) if not good] == [40, 55]
    found = [judged(first, model=norm) for norm in norms[:41]]
    again = Guard(spec, tmp_path)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [judged(again, model=norm) for norm in norms[41:]]
    assert found == expected
    assert again.state_dict() == straight.state_dict()
    shorter = Guard(GuardSpec(spike_window=8), tmp_path)  # the setting may change between two starts
    shorter.load_state_dict(first.state_dict())
    assert shorter.state_dict()["norms"]["model"] == first.state_dict()["norms"]["model"][-8:]


def optimizer_state(engine: Engine) -> list[Tensor]:
    """Every tensor of an optimizer's state: moments and step counts."""
    outer = engine._engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    return [value.clone() for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]


def everything(engine: Engine, ema: ShardedEMA) -> list[Tensor]:
    """All that a step changes, as copies."""
    weights = [getattr(weight, "ds_tensor", weight).data for weight in engine.module.parameters()]
    own = [value.clone() for value in (*weights, *engine.module.buffers(), *engine.masters())]
    return own + optimizer_state(engine) + [shard.clone() for shard in ema.shards[0.5]]


@pytest.mark.parametrize(
    ("zero_stage", "precision", "offload"),
    [
        *[(0, precision, False) for precision in ("fp32", "bf16", "autocast")],
        *[(stage, precision, False) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "autocast")],
        (1, "fp32", True),
        *[pytest.param(stage, "fp32", True, marks=pytest.mark.faults) for stage in (2, 3)],
    ],
)
def test_a_step_left_out_changes_no_bit(zero_stage: Any, precision: Any, offload: bool, tmp_path: Path) -> None:
    spec = EngineSpec(zero_stage=zero_stage, precision=precision, gradient_accumulation=2, offload_optimizer=offload)
    generator = torch.Generator()

    def start() -> tuple[Engine, ShardedEMA, Guard]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(5, 7, 1), BatchNorm(7), nn.SiLU(), nn.Conv2d(7, 3, 1))
        engine = Engine(network.train(), optimizer=OptimizerSpec(lr=0.1), spec=spec, global_batch=8, device=CPU)
        generator.manual_seed(1)
        return engine, ShardedEMA(engine, (0.5,)), Guard(GuardSpec(spike_window=8), tmp_path)

    def step(engine: Engine, ema: ShardedEMA, guard: Guard, fault: str | None = None) -> bool:
        engine.begin_step(0.1)
        ema.begin_step(0)
        for micro in range(2):
            x = torch.randn(4, 5, 2, 2, generator=generator).to(engine.compute_dtype())
            loss = engine(x).float().square().mean()
            if fault is not None and micro == 0:  # the last micro-batch is sound
                bad = {"loss": loss.detach() * math.nan, "gradient": (loss - loss).sqrt(), "spike": 1e6 * loss}
                loss = loss + bad[fault]
            engine.backward(loss)
            if guard.step({"model": engine}):
                ema.update(0)
        return guard.applied

    run = start()
    engine, ema, guard = run
    assert all(step(*run) for _ in range(8))
    before = everything(engine, ema)
    state = generator.get_state()
    for count, fault in enumerate(("loss", "gradient", "spike")):
        assert not step(*run, fault)
        assert guard.skipped == guard.in_row == count + 1
        after = everything(engine, ema)
        assert len(before) == len(after)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), fault
        norm = engine.grad_norm()
        assert norm is not None and (1000 < norm < math.inf if fault == "spike" else norm == math.inf)
    # The next step is that of a run which never saw the bad ones.
    generator.set_state(state)
    assert step(*run)
    expected = everything(engine, ema)
    assert not torch.equal(expected[0], before[0])
    run = start()
    assert all(step(*run) for _ in range(9))
    assert all(torch.equal(one, other) for one, other in zip(expected, everything(run[0], run[1]), strict=True))


def test_a_bad_batch_is_left_out_and_recorded(tmp_path: Path, monkeypatch) -> None:
    config = tiny_dit(tmp_path, run=EVERY_STEP)
    faulty(monkeypatch, lambda call: call == 3)
    dit.train(config)
    (event,) = events(tmp_path)
    ((_, third),) = sample_ids(torch.arange(2 * BATCH, 3 * BATCH), 2 * BATCH, config.run.seed)
    assert event == {
        "event": "skipped",
        "step": 3,
        "images": 8,
        "reason": "the loss or a gradient of the model is not finite",
        "image_ids": third.tolist(),
    }
    assert logged(tmp_path, "skipped") == [0, 0, 1, 1]


def test_a_run_that_goes_wrong_goes_back_and_past_the_data(tmp_path: Path, monkeypatch) -> None:
    guard = GuardSpec(max_skips_in_row=2, rollback_lr_factor=0.5)
    config = dataclasses.replace(tiny_dit(tmp_path, steps=6, run={"save_every_images": 2 * BATCH}), guard=guard)
    seen: list[tuple[int, int, float]] = []
    original = dit.train_step

    def step(engine: Any, ema: Any, guard: Any, config: Any, batches: Any, position: Any, *rest: Any) -> Any:
        images, group = found[0].loader.state_dict()["images_seen"], engine._engine.optimizer.param_groups[0]
        seen.append((position.step, images, group["lr"]))
        return original(engine, ema, guard, config, batches, position, *rest)

    found: list[loop.Task] = []

    def run(task: loop.Task, **kwargs: Any) -> None:
        found.append(task)
        loop_run(task, **kwargs)

    loop_run = loop.run
    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(dit, "train_step", step)
    faulty(monkeypatch, lambda call: call in (4, 5))
    dit.train(config)
    rate = config.optimizer.lr
    expected = [(0, 0), (1, 4), (2, 8), (3, 12), (3, 16), (2, 20), (3, 24), (4, 28), (5, 32)]
    assert seen == [(step, images, rate if index < 5 else rate / 2) for index, (step, images) in enumerate(expected)]
    assert [event["event"] for event in events(tmp_path)] == ["skipped", "skipped", "rollback"]
    assert events(tmp_path)[-1]["reason"] == (
        "2 steps in a row were left out, the last because the loss or a gradient of the model is not finite"
    )
    assert logged(tmp_path, "step") == [1, 2, 3, 4, 5, 6]  # the third step is logged as it was taken the second time
    assert logged(tmp_path, "lr") == [rate] * 2 + [rate / 2] * 4
    assert logged(tmp_path, "skipped") == [0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_run_that_stays_wrong_ends_with_advice(steps_before: int, tmp_path: Path, monkeypatch) -> None:
    guard = GuardSpec(max_skips_in_row=2, max_rollbacks=2)
    config = dataclasses.replace(tiny_dit(tmp_path, run=EVERY_STEP), guard=guard)
    faulty(monkeypatch, lambda call: call > steps_before)
    with pytest.raises(RunError) as error:
        dit.train(config)
    told = str(error.value)
    assert "2 steps in a row were left out" in told and "--guard.rollback-lr-factor 0.5" in told
    if steps_before:
        assert "going back 2 time(s) did not help" in told and str(tmp_path / "checkpoints") in told
        assert [event["event"] for event in events(tmp_path)].count("skipped") == 6
        assert all(value.isfinite().all() for value in newest(tmp_path).values())
    else:
        assert "there is no checkpoint to go back to" in told
        assert not (tmp_path / "checkpoints").exists()


def test_a_run_may_end_at_the_first_bad_step_instead(tmp_path: Path, monkeypatch) -> None:
    config = tiny_dit(tmp_path, run=EVERY_STEP)
    faulty(monkeypatch, lambda call: call == 3)
    with pytest.raises(RunError, match=r"step 3 left out: the loss or a gradient of the model is not finite"):
        dit.train(dataclasses.replace(config, guard=GuardSpec(skip_nonfinite=False)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_guard_counts_survive_a_restart(tmp_path: Path, monkeypatch) -> None:
    config = tiny_dit(tmp_path, run=EVERY_STEP)
    faulty(monkeypatch, lambda call: call == 2)
    stop = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(dit, "train_step", counted(dit.train_step, stop))
        with pytest.raises(loop.Stopped, match="stopped after 12 images and saved; resume with the same command"):
            dit.train(config)
    guards: list[Guard] = []

    def guard(*args: Any) -> Guard:
        guards.append(Guard(*args))
        return guards[-1]

    monkeypatch.setattr(dit, "Guard", guard)
    dit.train(dataclasses.replace(config, guard=GuardSpec(spike_window=64)))  # its settings may change
    assert logged(tmp_path, "skipped") == [0, 1, 1, 1]
    assert len(guards[0].state_dict()["norms"]["model"]) == 4


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch) -> None:
    config = dataclasses.replace(tiny_dit(tmp_path, run=EVERY_STEP), guard=GuardSpec(max_rollbacks=1))
    original, steps = dit.train_step, itertools.count(1)

    def step(engine: Engine, *rest: Any) -> Any:
        terms = original(engine, *rest)
        if next(steps) >= 3:  # as faulty memory does
            engine.masters()[0].view(-1)[5] = math.nan
        return terms

    monkeypatch.setattr(dit, "train_step", step)
    with pytest.raises(
        RunError, match=r"a weight of the model is not finite after 12 images .*1 time\(s\) did not help"
    ):
        dit.train(config)
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-00000001", "step-00000002"]
    assert all(value.isfinite().all() for value in newest(tmp_path).values())


@pytest.mark.parametrize("network", ["model", "discriminator"])
def test_both_networks_of_the_tokenizer_skip_alike(network: str, tmp_path: Path, monkeypatch) -> None:
    config = tiny_tokenizer(tmp_path, zero_stage=1, loss={"disc_start_step": 1})
    states: list[list[Tensor]] = []
    original = tokenizer.train_step
    engines: list[Engine] = []

    def step(networks: tokenizer.Networks, ema: ShardedEMA, *rest: Any) -> Any:
        assert networks.discriminator is not None
        engines[:] = [networks.model, networks.discriminator]
        terms = original(networks, ema, *rest)
        states.append(
            [
                value.clone()
                for engine in engines
                for value in (*engine.module.parameters(), *engine.module.buffers(), *optimizer_state(engine))
            ]
        )
        return terms

    name = "generator_hinge_loss" if network == "model" else "discriminator_hinge_loss"
    broken = counted(
        getattr(tokenizer.objective, name), after=lambda number, loss: loss * (math.nan if number == 2 else 1)
    )
    monkeypatch.setattr(tokenizer.objective, name, broken)
    monkeypatch.setattr(tokenizer, "train_step", step)
    tokenizer.train(config)
    assert [event["reason"] for event in events(tmp_path)] == [f"the loss or a gradient of the {network} is not finite"]
    assert len(states) == 4 and logged(tmp_path, "skipped") == [0, 1, 1]
    assert all(torch.equal(one, other) for one, other in zip(states[0], states[1], strict=True))
    assert sum(not torch.equal(one, other) for one, other in zip(states[1], states[2], strict=True)) > 50
    assert all(value.isfinite().all() for state in states for value in state)


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
    assert logged(folder, "skipped") == [0] * 11 + [3] * 2
    assert logged(folder) == pytest.approx(logged(launched[0] / "dit-1"), rel=1e-5)  # what ZeRO 1 does, all do
    assert all(value.isfinite().all() for value in newest(folder).values())


def test_all_processes_go_back_stop_and_end_together(launched: tuple[Path, Done]) -> None:
    folder = launched[0] / "rollback"
    assert [event["event"] for event in events(folder)] == ["skipped", "skipped", "rollback"]
    assert logged(folder, "step") == [1, 2, 3, 4]
    for rank in range(2):
        assert (launched[0] / f"stop-{rank}").read_text() == (
            "0 stopped after 32 images and saved; resume with the same command"
        )
    out, done = launched
    assert done.returncode == 1
    assert "[rank 1] error: the shard latents-00007.safetensors is damaged" in done.stderr
    saved = runs.publish.newest(out / "damage" / "checkpoints")
    assert saved is not None and saved.name == "step-00000002"


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
        wait_until(lambda: bool(lines(run)), [process], "step")
        process.send_signal(number)
        if number == signal.SIGTERM:  # a scheduler that asks twice
            process.send_signal(number)
        _, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, told
    assert "resume with the same command" in told
    assert runs.has_checkpoint(run)


@pytest.mark.parametrize(
    ("end", "free_gib", "kills", "said"),
    [
        (
            signal.SIGKILL,
            0.01,
            0,
            "in step 12 (saving), where it held .* and 0.0 were free: probably killed for memory",
        ),
        (signal.SIGKILL, 1000.0, 1, ""),  # by a time limit; the kernel killed another program
        (signal.SIGKILL, 0.3, 0, ""),
        (signal.SIGKILL, [0.01, 1000.0], 1, "and 0.0 were free: probably"),  # another process of the run was killed
        (signal.SIGKILL, [0.01, 1000.0], 0, ""),  # by a time limit, long after it was near the end
        (signal.SIGKILL, 0.3, 1, "and 0.3 were free: probably killed for memory"),
        (torch.OutOfMemoryError("CUDA"), 1000.0, 0, "in step 12 (saving), where the GPU's memory was used up; raise"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 9.0, 0, "where the memory was used up"),
        (RuntimeError("a shape"), 0.01, 1, ""),
        (KeyboardInterrupt(), 0.01, 1, ""),
        (None, 0.01, 1, ""),
    ],
)
def test_a_start_that_memory_ended_is_explained_by_the_next(
    end: Any, free_gib: Any, kills: int, said: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    seen = iter(free_gib if isinstance(free_gib, list) else [free_gib])
    last = [0.0]

    def free_bytes(device: object) -> int:
        last[0] = next(seen, last[0])
        return int(last[0] * 2**30)

    monkeypatch.setattr(oom, "free_bytes", free_bytes)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), oom.explaining_oom(tmp_path, lambda: (11, "saving")):
            while not (tmp_path / ".running").exists() or not (tmp_path / ".running").read_bytes():
                time.sleep(0.01)
            if isinstance(end, BaseException):
                raise end
            if end is not None:
                os.kill(os.getpid(), end)
        os._exit(0)
    os.waitpid(pid, 0)
    now = oom._now
    monkeypatch.setattr(oom, "_now", lambda *where: dataclasses.replace(now(*where), kills=now(*where).kills + kills))
    for line in (said, ""):  # once
        with oom.explaining_oom(tmp_path, lambda: (0, "starting")):
            found = capfd.readouterr().err
        assert bool(found) == bool(line)
        assert re.search(line.replace("(", r"\(").replace(")", r"\)"), found)
    assert not any(tmp_path.iterdir())


def test_a_run_that_found_no_memory_says_so_when_it_goes_on(tmp_path: Path, monkeypatch, capfd) -> None:
    config = tiny_dit(tmp_path / "run")
    step = dit.train_step

    def fails(*args: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dit, "train_step", fails)
    pytest.raises(torch.OutOfMemoryError, dit.train, config)
    monkeypatch.setattr(dit, "train_step", step)
    capfd.readouterr()
    dit.train(config)
    assert "ended in step 1 (training), where the GPU's memory was used up" in capfd.readouterr().err
    assert not (tmp_path / "run" / ".running").exists()


def test_a_run_starts_where_the_kernel_does_not_count_kills_for_memory(tmp_path: Path, monkeypatch) -> None:
    read = Path.read_text

    def missing(path: Path, *arguments: Any, **options: Any) -> str:
        if str(path) == "/proc/vmstat":
            raise FileNotFoundError(path)
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", missing)
    with oom.explaining_oom(tmp_path, lambda: (3, "training")):
        pass
    assert not (tmp_path / ".running").exists()
