"""Small networks under DeepSpeed whose checkpoints are written and read at every ZeRO stage.

As a process of its own: `checkpoint_worker.py SCRIPT`, a file of JSON, a list of [function, arguments] of this module.
All processes run the same data, so that `plain` is what every arrangement of them must give, up to rounding.
"""

import errno
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from vadit.config import EngineSpec, OptimizerSpec, RunSpec
from vadit.runtime import distributed
from vadit.runtime.errors import RunError
from vadit.train import engine
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.checkpoints import Checkpoints, Position
from vadit.train.ema import ShardedEMA

BATCH, STEPS, LR = 8, 3, 2e-3
DECAYS = (0.9, 0.5)
OPTIMIZER = OptimizerSpec(lr=LR, weight_decay=0.1)
MEASURED = frozenset((
    "images_per_s", "images_per_s_per_gpu", "mfu", "data_wait_share", "comm_share", "memory_gib", "hours_left",
    "hours_to_64_epochs", "save_stall_ms", "save_write_ms",
))  # fmt: skip
"""Values of a log point that a clock or the machine gives; all others are the same at every run of equal settings."""


class Net(nn.Module):
    """Odd sizes, so that cuts go through weights; a frozen parameter; running statistics that touch nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(7, width)
        self.shift = nn.Parameter(torch.linspace(-1, 1, width), requires_grad=False)
        self.norm = nn.LayerNorm(width)
        self.statistics = nn.BatchNorm1d(width, affine=False)
        self.last = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x) + self.shift
        self.statistics(h.detach())
        return self.last(torch.tanh(self.norm(h)))


WIDTHS = {"model": 13, "critic": 5}


def networks() -> dict[str, Net]:
    torch.manual_seed(5)
    return {name: Net(width) for name, width in WIDTHS.items()}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 7, generator=generator), torch.randn(BATCH, 3, generator=generator)


def steps_critic(step: int) -> bool:
    """The critic steps less often: its count is another one."""
    return step >= 2


def plain(last: int) -> tuple[list[float], dict[str, dict[str, torch.Tensor]]]:
    """Losses of the model in steps 1 to `last` in plain torch; then its weights and averages."""
    net = networks()["model"]
    adam = torch.optim.AdamW(net.parameters(), lr=LR, betas=OPTIMIZER.betas, weight_decay=0.1)
    averages = {decay: {name: value.detach().clone() for name, value in net.named_parameters()} for decay in DECAYS}
    losses = []
    for step in range(1, last + 1):
        x, y = batch(step)
        loss = (net(x) - y).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        for decay, average in averages.items():
            for name, value in net.named_parameters():
                average[name].lerp_(value.detach(), 1 - min(decay, (1 + step) / (10 + step)))
    weights = {name: value.detach() for name, value in net.named_parameters()}
    return losses, {"master": weights} | {f"ema-{decay!r}": averages[decay] for decay in DECAYS}


class Run:
    """The two networks as engines, with their checkpoints."""

    def __init__(self, folder: Path, stage: int, *, precision: str = "fp32", **settings: Any) -> None:
        device = torch.device("cpu")
        spec = EngineSpec(zero_stage=stage, precision=precision, max_grad_norm=0.0, **settings)  # type: ignore[arg-type]
        self.engines = {
            name: engine.Engine(net.train(), optimizer=OPTIMIZER, spec=spec, global_batch=BATCH, device=device)
            for name, net in networks().items()
        }
        self.ema = ShardedEMA(self.engines["model"], DECAYS)
        self.checkpoints = Checkpoints(folder, engines=self.engines, ema=self.ema)
        torch.manual_seed(100 + distributed.rank())
        self.step = 0

    def train(self, last: int) -> list[float]:
        """Steps up to `last`; the model's losses, each the mean over all processes."""
        losses = []
        part = slice(distributed.rank(), None, distributed.world_size())
        while self.step < last:
            self.step += 1
            x, y = batch(self.step)
            for name, network in self.engines.items():
                network.begin_step(LR)
                if name == "model":
                    self.ema.begin_step(self.step - 1)
                loss = (network(x[part].to(network.compute_dtype())).float() - y[part]).square().mean()
                if name == "model" or steps_critic(self.step):
                    network.backward(loss)
                    network.step()
                if name == "model":
                    self.ema.update(self.step - 1)
                    losses.append(distributed.all_mean(loss.detach().clone()).item())
        return losses

    def save(self, **settings: Any) -> None:
        self.checkpoints.save(Position(self.step, self.step * BATCH), {"at": self.step}, {"bad": 1}, **settings)

    def restore(self) -> None:
        restored = self.checkpoints.restore()
        assert restored is not None
        position, loader, guard = restored
        assert (loader, guard) == ({"at": position.step}, {"bad": 1}) and position.images_seen == position.step * BATCH
        self.step = position.step

    def local_weights(self) -> dict[str, torch.Tensor]:
        """The model's parameters as its forward pass sees them, whole. Collective."""
        import deepspeed

        parameters = dict(self.engines["model"].module.named_parameters())
        with deepspeed.zero.GatheredParameters([p for p in parameters.values() if hasattr(p, "ds_id")]):
            return {name: value.detach().clone() for name, value in parameters.items()}


SHARE = "model-00000-of-00001.safetensors"


def three_checkpoints(folder: Path) -> Path:
    """Write checkpoints of steps 1, 2 and 3."""
    run = Run(folder, 1)
    run.checkpoints.spec = RunSpec(keep_checkpoints=3)
    for step in (1, 2, 3):
        run.train(step)
        run.save(wait=True)
    return folder


def printed(capsys: Any) -> str:
    """What stood on the screen, without blanks: rich folds lines anywhere."""
    return "".join(capsys.readouterr().err.split())


def flip(path: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def log(folder: Path) -> list[dict[str, float]]:
    """The log points of a run, without what the clock gave, or evaluations that failed."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    dropped = {*MEASURED, "evaluations_failed"}
    return [{name: value for name, value in line.items() if name not in dropped} for line in lines]


def names(folder: Path) -> list[str]:
    """What lies in a run's folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def run_folders(out: Path) -> list[Path]:
    """The folders that have checkpoints: of the run, or of its stages."""
    return sorted(path.parent for path in out.rglob("checkpoints"))


def assert_same_end(found: Path, expected: Path) -> None:
    """Two runs logged the same losses and have the same state at the end of every stage: bit by bit.

    Weights, averages, moments, buffers and random states of every process.
    """
    ours, theirs = run_folders(found), run_folders(expected)
    assert ours and [path.relative_to(found) for path in ours] == [path.relative_to(expected) for path in theirs]
    for pair in zip(ours, theirs, strict=True):
        assert log(pair[0]) == log(pair[1])
        ends = [publish.newest(folder / "checkpoints") for folder in pair]
        assert ends[0] is not None and ends[1] is not None and ends[0].name == ends[1].name
        names = sorted(path.name for path in ends[1].glob("*.safetensors"))
        assert names and names == sorted(path.name for path in ends[0].glob("*.safetensors"))
        for name in names:
            one, other = load_file(ends[0] / name), load_file(ends[1] / name)
            assert one.keys() == other.keys()
            assert [key for key in one if not torch.equal(one[key], other[key])] == [], name


def write(out: str, stage: int, **settings: Any) -> None:
    """Train and save."""
    run = Run(Path(out), stage, **settings)
    run.train(STEPS)
    torch.rand(5)  # where a restored run must go on
    run.save(wait=True)
    gathered = {name: engine_gathered(network) for name, network in run.engines.items()}
    if distributed.is_main():
        torch.save(gathered, Path(out) / "gathered.pt")


def engine_gathered(network: engine.Engine) -> dict[str, torch.Tensor]:
    """The trained weights as DeepSpeed gathers them, whole and fp32. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: value for name, value in network.module.named_parameters() if value.requires_grad}
    if not network.spec.zero_stage:
        return {name: value.detach().clone() for name, value in trained.items()}
    return {name: safe_get_full_fp32_param(value).clone() for name, value in trained.items()}


def go_on(source: str, out: str, stage: int, **settings: Any) -> None:
    """Restore SOURCE, save it as it is under OUT, and train on; what each process saw goes into OUT/rank-R.pt."""
    run = Run(Path(source), stage, **settings)
    run.restore()
    weights = run.local_weights()
    run.checkpoints.folder = Path(out)
    run.save(wait=True)
    random = torch.rand(3)
    losses = run.train(2 * STEPS)
    run.save(wait=True)
    torch.save({"losses": losses, "random": random, "weights": weights}, Path(out) / f"rank-{distributed.rank()}.pt")


def one_fails(out: str) -> None:
    """The disk of process 1 fails in the second and third save: all hear of it, go on, and save the fourth."""
    original = publish.write_tensors

    def write(path: Path, file: publish.TensorFile) -> Any:
        if distributed.rank() == 1 and path.parent.stem in ("step-00000002", "step-00000003"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, file)

    publish.write_tensors = write
    run = Run(Path(out), 1)
    failures, fault = [], ""
    for step in (1, 2, 3, 4, 5):
        run.train(step)
        try:
            run.save(wait=step == 3)
        except RunError as error:
            fault = str(error)
        failures.append(run.checkpoints.failures)
    run.checkpoints.close()
    publish.write_tensors = original
    run.restore()
    needed = run.checkpoints._bytes_of_all(run.checkpoints._files())
    seen = {"failures": failures, "fault": fault, "step": run.step, "needed": needed}
    Path(f"{out}-{distributed.rank()}.json").write_text(json.dumps(seen))


def main(script: list[list[Any]]) -> None:
    for name, arguments in script:
        globals()[name](**arguments)
    engine.finish()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
