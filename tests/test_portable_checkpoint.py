"""A checkpoint of any ZeRO stage and number of processes serves any other: to the bit, and on the same curve.

Written and read by small networks (`checkpoint_worker.py`) on one process, which is this one, and on two.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import checkpoint_worker as worker
import pytest
import torch
from launched import run_ranks
from safetensors.torch import load_file

from vadit.runtime import rng
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.shares import WEIGHTS, Shares, average, state
from vadit.train.layout import gaps

WORKER = Path(__file__).parent / "checkpoint_worker.py"
Layout = tuple[int, int]
"""(processes, ZeRO stage)"""

# Each change of sharding once, in both directions between one and two processes.
SHORT: list[tuple[Layout, Layout]] = [
    ((1, 0), (1, 1)),
    ((1, 3), (1, 2)),
    ((1, 2), (1, 3)),
    ((1, 0), (2, 1)),
    ((1, 1), (2, 3)),
    ((1, 3), (2, 2)),
    ((2, 1), (2, 1)),
    ((2, 3), (2, 3)),
    ((2, 2), (2, 3)),
    ((2, 3), (2, 0)),
    ((2, 2), (1, 0)),
    ((2, 3), (1, 1)),
    ((2, 0), (1, 2)),
]
LAYOUTS = list(itertools.product((1, 2), (0, 1, 2, 3)))
ALL = [pair for pair in itertools.product(LAYOUTS, LAYOUTS) if pair not in SHORT]
OFFLOADED = {2: {"offload_optimizer": True}, 3: {"offload_optimizer": True, "offload_weights": True}}


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
                assert all(not master[begin:end].any() for begin, end in gaps(group, master.numel()))
    processes = [load_file(file.path)["buffer.statistics.running_mean"] for file in shares.files]
    assert len(processes) == source[0] and all(not torch.equal(processes[0], other) for other in processes[1:])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("short"), SHORT, {})


@pytest.mark.parametrize(("source", "target"), SHORT)
def test_a_checkpoint_goes_on_anywhere(source: Layout, target: Layout, short: Path) -> None:
    check(short, source, target)


@pytest.mark.parametrize("source", sorted({source for source, _ in SHORT}))
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
def test_every_checkpoint_goes_on_everywhere(tmp_path: Path) -> None:
    play(tmp_path, ALL, {})
    for source, target in ALL:
        check(tmp_path, source, target)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("precision", "settings"), [("bf16", {1: {}, 3: {}}), ("bf16", OFFLOADED), ("autocast", OFFLOADED)]
)
def test_every_precision_and_place(settings: dict[int, dict[str, Any]], precision: str, tmp_path: Path) -> None:
    settings = {stage: {**more, "precision": precision} for stage, more in settings.items()}
    layouts = list(itertools.product((1, 2), settings))
    pairs = [pair for pair in itertools.product(layouts, layouts) if pair[0] != pair[1]]
    play(tmp_path, pairs, settings)
    for source, target in pairs:
        check(tmp_path, source, target, precision=precision)
        check_export(tmp_path, source)
