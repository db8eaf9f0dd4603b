"""Runs that stop, are killed, lose a file or a disk go on, to the bit, in any ZeRO stage and number of processes.

Small networks (`checkpoint_worker.py`) write and read on one process, which is this one, and on two.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoint_worker as worker
import pytest
import torch
from checkpoint_worker import SHARE, assert_same_end, flip, log, names, printed
from guard_help import counted
from latent_files import CHANNELS, CLASSES, SIDE, moments_folder, reference_folder, write_images
from launched import run_ranks
from safetensors.torch import load_file
from training_plain import BATCH, tiny_dit, tiny_tokenizer

from vadit.config import OptimizerSpec, StageSpec, vary
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError
from vadit.train import dit, loop, runs, tokenizer
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.checkpoints import Checkpoints
from vadit.train.checkpoint.shares import WEIGHTS, Shares, average, state
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine


def stop_in_step(module: ModuleType, number: int, monkeypatch) -> None:
    """Let SIGTERM arrive in the middle of a step."""
    stop = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == number else None  # noqa: E731
    monkeypatch.setattr(module, "train_step", counted(module.train_step, stop))


OFFLOADED = {"offload_optimizer": True, "precision": "bf16"}
SHORT: list[tuple[str, dict[str, Any]]] = [
    ("dit", {"zero_stage": 0}),
    ("dit", {"zero_stage": 1, "precision": "bf16"}),
    ("dit", {"zero_stage": 3}),
    ("tokenizer", {"zero_stage": 1, "precision": "autocast"}),
    ("tokenizer", {"zero_stage": 2, "precision": "bf16"}),
]
# All of ZeRO 1 to 3 in fp32 and bf16 go through test_training.py, on two processes.
LONG: list[tuple[str, dict[str, Any]]] = [
    ("dit", {"zero_stage": 0, "precision": "autocast"}),
    ("dit", {"zero_stage": 0, "precision": "bf16"}),
    ("dit", {"zero_stage": 3, "precision": "bf16"}),
    ("dit", {"zero_stage": 1, **OFFLOADED}),
    ("dit", {"zero_stage": 3, "offload_weights": True, **OFFLOADED}),
    ("tokenizer", {"zero_stage": 0}),
    ("tokenizer", {"zero_stage": 3}),
    ("tokenizer", {"zero_stage": 3, "precision": "autocast"}),
    ("tokenizer", {"zero_stage": 2, **OFFLOADED}),
    ("tokenizer", {"zero_stage": 3, "offload_weights": True, **OFFLOADED}),
]


@pytest.mark.parametrize(
    ("network", "engine"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.faults) for case in LONG)]
)
def test_a_run_goes_on_after_a_stop(network: str, engine: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    """A run that is stopped in its third step and one that is not are the same in the end."""
    trainers: dict[str, Any] = {"dit": (dit, tiny_dit), "tokenizer": (tokenizer, tiny_tokenizer)}
    module, make = trainers[network]
    engine = {"ema_decays": (0.9, 0.5), "precision": "fp32", **engine}
    straight = module.train(make(tmp_path / "straight", steps=4, **engine))
    config = make(tmp_path / "stopped", steps=4, **engine)
    with monkeypatch.context() as patch:
        stop_in_step(module, 3, patch)  # a discriminator has taken steps, too
        pytest.raises(loop.Stopped, module.train, config).match("stopped after 12 images and saved")
    assert names(tmp_path / "stopped") == ["step-00000002", "step-00000003"]
    assert_same_end(module.train(config), straight)
    before = log(straight)
    module.train(config)  # a run at its end has nothing to do
    assert log(tmp_path / "stopped") == before


def rewrite_state(path: Path, **changes: Any) -> None:
    """Change what a state.json says, and the manifest with it."""
    state = json.loads((path / "state.json").read_text()) | changes
    entry = publish.write_text(path / "state.json", json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"state.json": entry}))


DAMAGE: list[tuple[Any, str]] = [
    (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    (lambda path: (path / "state.json").write_text("{}"), "state.json has 2 bytes instead of"),
    (lambda path: (path / "manifest.json").write_text("{"), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").unlink(), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").write_text('{"state.json": {"bites": 3}}'), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").write_bytes(b"[" * 100_000), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").write_text("{}"), "state.json is missing"),
    (lambda path: rewrite_state(path, images_seen=-5), "greater than or equal to 0 (found -5)"),
    (lambda path: rewrite_state(path, world_size="many"), "world_size: Input should be a valid integer"),
    (lambda path: rewrite_state(path, step=None), "step: Input should be a valid integer"),
    (lambda path: os.truncate(path / SHARE, 1000), f"{SHARE} has 1000 bytes instead of"),
    (lambda path: (path / SHARE).unlink(), f"{SHARE} is missing"),
    (lambda path: flip(path / SHARE), f"{SHARE} has changed"),
    (lambda path: flip(path / SHARE.replace("model", "critic")), "critic-00000-of-00001.safetensors has changed"),
]


@pytest.mark.parametrize(("damage", "fault"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(damage: Any, fault: str, folder: Path, capsys) -> None:
    assert publish.newest(folder) == folder / "step-00000003"
    damage(folder / "step-00000003")
    capsys.readouterr()
    assert publish.newest(folder) == folder / "step-00000002"
    text = printed(capsys)
    assert fault.replace(" ", "") in text and "step-00000003isdamaged" in text and text.count("isdamaged") == 1


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_run_goes_on_from_the_one_before(stage: int, folder: Path) -> None:
    straight = worker.plain(4)[0]
    flip(folder / "step-00000003" / SHARE)
    run = worker.Run(folder, stage)
    run.restore()
    assert run.step == 2 and run.train(4) == pytest.approx(straight[2:], rel=1e-5)
    # Where it restores once more, nothing of what it did since is left.
    run.restore()
    assert run.step == 2 and run.train(4) == pytest.approx(straight[2:], rel=1e-5)


def test_where_all_are_damaged_nothing_starts_anew(folder: Path) -> None:
    for path in folder.iterdir():
        flip(path / SHARE)
    with pytest.raises(RunError, match=r"none of the 3 checkpoints in .* is whole; put a copy .* or delete them"):
        worker.Run(folder, 1).restore()


def test_files_are_hashed_once_and_only_to_restore(folder: Path, monkeypatch) -> None:
    hashed: list[Path] = []

    def digest(path: Path) -> str:
        hashed.append(path)
        return publish._digest_of(path, -1)

    monkeypatch.setattr(publish, "_digest", digest)
    assert runs.has_checkpoint(folder.parent) and hashed == []
    run = worker.Run(folder, 1)
    run.restore()
    assert sorted(hashed) == sorted(
        path for path in (folder / "step-00000003").iterdir() if path.name != "manifest.json"
    )
    run.train(4)
    run.save(wait=True)
    assert len(hashed) == 3


def test_what_interrupted_saves_left_is_cleared_up(folder: Path) -> None:
    (folder / "step-00000004.partial").mkdir()
    (folder / "step-00000004.partial" / "junk").write_text("half a checkpoint")
    (folder / "step-00000001.old.partial").mkdir()
    (folder / "step-00000005.partial").symlink_to(folder / "step-00000002")
    (folder / "step-00000004").symlink_to(folder.parent / "nowhere")
    # Killed between the two renames that replace a checkpoint: the old one counts.
    os.replace(folder / "step-00000003", folder / "step-00000003.replaced.partial")
    assert publish.newest(folder) == folder / "step-00000002"
    run = worker.Run(folder, 1)
    run.restore()
    assert run.step == 3
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{number}" for number in (1, 2, 3, 4)]
    run.train(4)
    run.save(wait=True)
    assert not (folder / "step-00000004" / "junk").exists()


def contents(folder: Path) -> dict[str, Any]:
    """Every file with its bytes and its time, and every folder."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    moments_folder(tmp_path / "latents")
    reference_folder(tmp_path / "more")
    run, shape = tmp_path / "run", {"in_channels": CHANNELS, "input_size": SIDE, "num_classes": CLASSES}

    def train(data: str = "latents", steps: int = 1, evaluation: dict[str, Any] | None = None, **settings: Any) -> None:
        config = tiny_dit(run, steps=steps, **settings)
        dit.train(vary(config, model=shape, data={"path": str(tmp_path / data)}, evaluation=evaluation or {}))

    train()
    before = contents(run)
    nowhere = {"every_images": BATCH, "tokenizer": str(tmp_path / "nowhere")}
    for words, settings in (
        (r"engine\.precision 'fp32', this command says 'bf16'; set it as it was", {"precision": "bf16"}),
        (r"run\.seed \d+, this command says 77", {"run": {"seed": 77}}),
        (r"counts 6 samples but the data set has 13; .*--run\.init-from with this run", {"data": "more"}),
        (r"nowhere does not exist", {"data": "nowhere"}),
        (r"nowhere is no run folder", {"evaluation": nowhere, "steps": 2}),
    ):
        with pytest.raises(UsageError, match=words):
            train(**settings)
        assert contents(run) == before
    # What only says when to tell and keep, or how the work is spread, may change.
    train(run={"log_every_images": 100, "keep_checkpoints": 7})
    train(zero_stage=3)
    assert '"zero_stage": 3' in (run / "config.json").read_text()
    (manifest,) = run.glob("checkpoints/*/manifest.json")
    manifest.write_text("{}")
    before = contents(run)
    pytest.raises(RunError, train).match("none of the 1 checkpoints")
    assert contents(run) == before


@pytest.mark.parametrize("staged", [False, True])
def test_a_refused_resume_of_a_tokenizer_changes_nothing(staged: bool, tmp_path: Path) -> None:
    images, run = write_images(tmp_path / "images"), tmp_path / "run"
    stages = (StageSpec(BATCH), StageSpec(BATCH)) if staged else ()

    def train(**data: Any) -> None:
        config = tiny_tokenizer(run, steps=2 if staged else 1)
        tokenizer.train(vary(config, data={"path": images.source.name, "loader": "torch", **data}, stages=stages))

    train()
    before = contents(run)
    pytest.raises(UsageError, train, crop="center").match("data.crop 'random'")
    shutil.copy(images.source.describe(0), tmp_path / "images" / "class0" / "more.png")
    pytest.raises(UsageError, train).match(r"counts 11 samples but the data set has 12; .*--run\.init-from")
    assert contents(run) == before
    (tmp_path / "images" / "class0" / "more.png").write_bytes(b"")
    os.unlink(images.source.describe(1))
    train(on_error="skip", max_bad_share=0.5)  # how bad images are met may change
    assert '"on_error": "skip"' in (run / "config.json").read_text()


def test_another_network_is_refused(tmp_path: Path) -> None:
    dit.train(tiny_dit(tmp_path, steps=1))
    folder, spec = tmp_path / "checkpoints", tiny_dit(tmp_path, zero_stage=1).engine

    def fresh(decays: tuple[float, ...] = (), name: str = "model") -> Checkpoints:
        network = torch.nn.Linear(2, 2)
        engine = Engine(network, optimizer=OptimizerSpec(), spec=spec, global_batch=BATCH, device=torch.device("cpu"))
        return Checkpoints(folder, engines={name: engine}, ema=ShardedEMA(engine, decays))

    with pytest.raises(UsageError, match=r"does not fit this run's config \(bias is missing there and \(2,\) here\)"):
        fresh().restore()
    pytest.raises(UsageError, fresh(name="critic").restore).match("holds no network called critic")
    assert publish.newest(tmp_path / "nothing") is None


def test_an_average_that_was_not_kept_is_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(worker, "DECAYS", (0.9, 0.25))
    pytest.raises(UsageError, worker.Run(folder, 1).restore).match(r"has no average with decay 0\.25")


WORKER = Path(__file__).parent / "checkpoint_worker.py"
Layout = tuple[int, int]  # (processes, ZeRO stage)

# Each change of sharding once, in both directions between one and two processes.
PAIRS: list[tuple[Layout, Layout]] = [
    ((1, 0), (1, 1)), ((1, 3), (1, 2)), ((1, 2), (1, 3)), ((1, 0), (2, 1)), ((1, 1), (2, 3)), ((1, 3), (2, 2)),
    ((2, 1), (2, 1)), ((2, 3), (2, 3)), ((2, 2), (2, 3)), ((2, 3), (2, 0)), ((2, 2), (1, 0)), ((2, 3), (1, 1)),
    ((2, 0), (1, 2)),
]  # fmt: skip
LAYOUTS = list(itertools.product((1, 2), (0, 1, 2, 3)))
ALL = [pair for pair in itertools.product(LAYOUTS, LAYOUTS) if pair not in PAIRS]
PLACES = {2: {"offload_optimizer": True}, 3: {"offload_optimizer": True, "offload_weights": True}}


def folder_of(out: Path, source: Layout, target: Layout | None = None) -> str:
    name = f"{source[0]}x{source[1]}"
    return str(out / (name if target is None else f"{name}-{target[0]}x{target[1]}"))


def play(out: Path, pairs: list[tuple[Layout, Layout]], settings: dict[int, dict[str, Any]]) -> Path:
    """Write what the pairs start from, and go on from it: one launch for all that takes two processes."""
    sources = sorted({source for source, _ in pairs})

    def step(name: str, layout: Layout, **arguments: str) -> tuple[int, list[Any]]:
        processes, stage = layout
        return processes, [name, {**arguments, "stage": stage, **settings.get(stage, {})}]

    writes = [step("write", source, out=folder_of(out, source)) for source in sources]
    reads = [
        step("go_on", target, source=folder_of(out, source), out=folder_of(out, source, target))
        for source, target in pairs
    ]
    worker.main([done for processes, done in writes if processes == 1])
    two = [done for processes, done in (*writes, *reads) if processes == 2]
    script = out / "script.json"
    script.write_text(json.dumps([*two, ["one_fails", {"out": str(out / "one-fails")}]]))
    codes, said = run_ranks([sys.executable, str(WORKER), str(script)])
    assert codes == [0, 0], [text[-3000:] for text in said]
    worker.main([done for processes, done in reads if processes == 1])
    return out


def whole(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of the weights, put together: NETWORK/KIND/WEIGHT."""
    path = folder / f"step-{step:08d}"
    assert publish.newest(folder) is not None
    found = {}
    for network in worker.WIDTHS:
        shares = Shares(path, network)
        kinds = {"master": WEIGHTS, "exp_avg": state("exp_avg"), "exp_avg_sq": state("exp_avg_sq")}
        kinds |= {f"ema-{decay!r}": average(decay) for decay in shares.averages}
        for kind, quantity in kinds.items():
            for name, shape in shares.shapes.items():
                if name != "shift":
                    row = torch.empty(torch.Size(shape).numel())
                    assert shares.fill(quantity, name, 0, row), (kind, name)
                    found[f"{network}/{kind}/{name}"] = row.view(shape)
        for number, name in itertools.product(range(len(shares.files[0].header.groups)), ["step"]):
            found[f"{network}/{name}/{number and 'other'}"] = shares.files[0].tensor(f"state.{number}.{name}")
    return found


def shares_on_disk(folder: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / f"step-{step:08d}").glob("*.safetensors")}


def check(out: Path, source: Layout, target: Layout, *, precision: str = "fp32") -> None:
    """Nothing was lost or moved on the way, and the curve goes on."""
    start, end = Path(folder_of(out, source)), Path(folder_of(out, source, target))
    before, after = whole(start, worker.STEPS), whole(end, worker.STEPS)
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    assert {name for name in before.keys() ^ after.keys() if "/step/" not in name} == set()
    assert before["model/step/0"] == worker.STEPS and before["critic/step/0"] == worker.STEPS - 1
    if source == target:
        assert shares_on_disk(start, worker.STEPS) == shares_on_disk(end, worker.STEPS)
    for rank in range(target[0]):
        seen = torch.load(end / f"rank-{rank}.pt")
        # ---- what the network computes with is what was restored
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for name, value in seen["weights"].items():
            if name != "shift":
                assert torch.equal(value, before[f"model/master/{name}"].to(dtype)), (rank, name)
        # ---- random numbers go on, or are new ones that depend on the process
        if source[0] == target[0]:
            torch.manual_seed(100 + rank)
            torch.rand(5)
        else:
            torch.manual_seed(rng.fold(0, "resume", rank, worker.STEPS))
        assert torch.equal(seen["random"], torch.rand(3))
        # ---- the curve, and where it ends
        losses, ends = worker.plain(2 * worker.STEPS)
        rel, size = (1e-5, 1e-5) if precision == "fp32" else (5e-2, 3e-2)
        assert seen["losses"] == pytest.approx(losses[worker.STEPS :], rel=rel)
    shares = Shares(end / f"step-{2 * worker.STEPS:08d}", "model")
    for kind, weights in ends.items():
        found = shares.whole(f"{kind}.{{}}")
        for name, value in weights.items():
            assert (found[name] - value).abs().max() <= size, (kind, name)


def check_export(out: Path, source: Layout) -> None:
    """Weights put together from shares are those that DeepSpeed gathers."""
    folder = Path(folder_of(out, source))
    gathered = torch.load(folder / "gathered.pt")
    for network, width in worker.WIDTHS.items():
        shares = Shares(folder / f"step-{worker.STEPS:08d}", network)
        found = shares.whole(WEIGHTS)
        for name, value in gathered[network].items():
            assert torch.equal(found[name], value.view(found[name].shape)), (network, name)
        assert found.keys() == worker.Net(width).state_dict().keys()
        assert torch.allclose(found["shift"], torch.linspace(-1, 1, width), atol=4e-3)
        assert torch.equal(found["statistics.running_mean"], shares.files[0].tensor("buffer.statistics.running_mean"))
        for file in shares.files:  # padding is defined, or two runs would differ in it
            for index, group in enumerate(file.header.groups):
                master = file.tensor(f"master.{index}")
                for piece in group:
                    master[piece.offset : piece.offset + piece.length] = 0
                assert not master.any()
    processes = [load_file(file.path)["buffer.statistics.running_mean"] for file in shares.files]
    assert len(processes) == source[0] and all(not torch.equal(processes[0], other) for other in processes[1:])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("short"), PAIRS, {})


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_checkpoint_goes_on_anywhere(source: Layout, target: Layout, short: Path) -> None:
    check(short, source, target)


@pytest.mark.parametrize("source", sorted({source for source, _ in PAIRS}))
def test_weights_from_shares_are_the_gathered_ones(source: Layout, short: Path) -> None:
    check_export(short, source)


def test_all_processes_agree_that_one_could_not_write(short: Path) -> None:
    seen = [json.loads((short / f"one-fails-{rank}.json").read_text()) for rank in (0, 1)]
    on_disk = sum(len(content) for content in shares_on_disk(short / "one-fails", 5).values())
    for values in seen:
        assert on_disk / 2 < values["needed"] < on_disk  # the rest are headers
        # A save in the background is looked back at by the next one, one that is waited for by itself.
        assert values["failures"] == [0, 0, 2, 2, 0] and values["step"] == 5
        assert "step-00000003 could not be written" in values["fault"]
    assert "No space left on device" in seen[1]["fault"] and "another process could not" in seen[0]["fault"]
    assert sorted(path.name for path in (short / "one-fails").iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.faults
def test_bf16_by_itself_goes_on_with_more_processes_and_with_fewer(tmp_path: Path) -> None:
    """Stage auto: 0 for a process alone, whose optimizer keeps the fp32 weights, and 1 for two."""
    pairs: list[tuple[Layout, Layout]] = [((1, 0), (2, 1)), ((2, 1), (1, 0))]
    play(tmp_path, pairs, {stage: {"precision": "bf16"} for stage in (0, 1)})
    for source, target in pairs:
        check(tmp_path, source, target, precision="bf16")


@pytest.mark.faults
def test_every_checkpoint_goes_on_everywhere(tmp_path: Path) -> None:
    play(tmp_path, ALL, {})
    for source, target in ALL:
        check(tmp_path, source, target)


@pytest.mark.faults
@pytest.mark.parametrize(("precision", "settings"), [("bf16", {1: {}, 3: {}}), ("bf16", PLACES), ("autocast", PLACES)])
def test_every_precision_and_place(settings: dict[int, dict[str, Any]], precision: str, tmp_path: Path) -> None:
    settings = {stage: {**more, "precision": precision} for stage, more in settings.items()}
    layouts = list(itertools.product((1, 2), settings))
    pairs = [pair for pair in itertools.product(layouts, layouts) if pair[0] != pair[1]]
    play(tmp_path, pairs, settings)
    for source, target in pairs:
        check(tmp_path, source, target, precision=precision)
        check_export(tmp_path, source)
