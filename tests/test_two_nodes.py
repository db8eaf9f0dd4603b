"""Two machines for real: two network namespaces joined by a cable that can be pulled, a process in each, over gloo.

Both are started through launch/train.sh without ssh, as on two machines. Needs root and `ip` (iproute2).
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import launched
import pytest
from checkpoint_worker import assert_same_end
from launched import GENERATOR, LIMIT_S, LONG_GENERATOR, STEPS, TOKENIZER, environment, logged, train_by_two, wait_until
from training_plain import plain_dit, tiny_dit

from vadit.train.watchdog import HANG_CODE

CASES = {
    (model, stage): [*recipe, "--engine.zero-stage", str(stage)]
    for model, recipe in (("generator", LONG_GENERATOR), ("tokenizer", TOKENIZER))
    for stage in (1, 3)
}


class Nodes:
    """Namespaces `a` and `b` of this test process, 10.9.0.1 and 10.9.0.2."""

    def __init__(self) -> None:
        self.names = [f"vadit-{letter}-{os.getpid()}" for letter in "ab"]
        self.cards = [f"v{letter}{os.getpid()}" for letter in "ab"]

    def build(self) -> None:
        known = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        for line in known.splitlines():  # of a test process that was killed
            name = line.split()[0]
            if re.fullmatch(r"vadit-[ab]-\d+", name) and not Path("/proc", name.split("-")[2]).exists():
                subprocess.run(["ip", "netns", "del", name], capture_output=True)
        (a, b), (card_a, card_b) = self.names, self.cards
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", card_a, "netns", a, "type", "veth", "peer", "name", card_b, "netns", b)
        for number, (name, card) in enumerate(zip(self.names, self.cards, strict=True), start=1):
            ip("-n", name, "addr", "add", f"10.9.0.{number}/24", "dev", card)
            ip("-n", name, "link", "set", card, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        self.kill()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def kill(self) -> None:
        """End whatever still runs in there."""
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in found.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def cable(self, state: str) -> None:
        """Pull it (down) or plug it in (up)."""
        ip("-n", self.names[0], "link", "set", self.cards[0], state)

    def start(self, out: Path, arguments: list[str], **own: str) -> list[subprocess.Popen[bytes]]:
        """launch/train.sh on both, as one process each; what they say goes to OUT-0.txt and OUT-1.txt."""
        started = []
        for rank, (name, card) in enumerate(zip(self.names, self.cards, strict=True)):
            variables = environment(
                GLOO_SOCKET_IFNAME=card, NODES="2", NODE_RANK=str(rank), MASTER_ADDR="10.9.0.1", PROCESSES="1", **own
            )
            command = ["ip", "netns", "exec", name, str(launched.LAUNCH / "train.sh"), *arguments]
            command += ["--run.out", str(out)]
            with told(out, rank).open("ab") as file:
                started.append(subprocess.Popen(command, env=variables, stdout=file, stderr=file))
        return started


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def told(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}-{rank}.txt")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (apt-get install iproute2)")
    built = Nodes()
    try:
        try:
            built.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here ({error.stderr.strip()})")
        yield built
    finally:
        built.remove()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test that failed nothing runs on, and the cable is in."""
    yield
    if "nodes" in request.fixturenames:
        nodes: Nodes = request.getfixturevalue("nodes")
        nodes.kill()
        nodes.cable("up")


def finish(started: list[subprocess.Popen[bytes]], out: Path) -> list[int]:
    """Exit codes of both."""
    try:
        return [process.wait(timeout=LIMIT_S) for process in started]
    except subprocess.TimeoutExpired:
        pytest.fail("".join(told(out, rank).read_text()[-3000:] for rank in (0, 1)))


def test_two_machines_train_as_one_process(nodes: Nodes, tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = 4
    started = nodes.start(out, [*GENERATOR, "--run.total-images", str(steps * 4)])
    assert finish(started, out) == [0, 0], told(out, 0).read_text() + told(out, 1).read_text()
    expected, _ = plain_dit(tiny_dit(tmp_path / "plain", steps=steps), world_size=2)
    assert [line["loss"] for line in logged(out)] == pytest.approx(expected, rel=1e-5)
    assert not told(out, 1).read_text().count("run folder")  # one of them tells


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All CASES by two processes of one machine, in folders MODEL-STAGE."""
    folder = tmp_path_factory.mktemp("one")
    train_by_two({folder / "{}-{}".format(*case): arguments for case, arguments in CASES.items()})
    return folder


@pytest.mark.faults
@pytest.mark.parametrize(("model", "stage"), CASES)
def test_a_cable_pulled_for_a_while_changes_nothing(
    model: str, stage: int, nodes: Nodes, one_machine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    started = nodes.start(out, CASES[model, stage])
    wait_until(lambda: len(logged(out)) > 0, started, "step")
    nodes.cable("down")
    before = len(logged(out))
    time.sleep(3)
    assert len(logged(out)) - before <= 1  # the run stood still
    nodes.cable("up")
    assert finish(started, out) == [0, 0], told(out, 0).read_text()
    assert_same_end(out, one_machine / f"{model}-{stage}")


@pytest.mark.faults
def test_a_cable_pulled_for_long_ends_both_and_the_same_command_goes_on(
    nodes: Nodes, one_machine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = [*CASES["generator", 3], "--run.hang-timeout-s", "15"]
    started = nodes.start(out, arguments)
    wait_until(lambda: len(logged(out)) > 11, started, "step 12")
    nodes.cable("down")
    assert finish(started, out) == [HANG_CODE, HANG_CODE]
    for rank in (0, 1):
        text = told(out, rank).read_text()
        assert f"[rank {rank}] error: rank {1 - rank} has not been heard of for" in text
        found = re.search(r"the last step it reported is (\d+)", text)
        assert found and 5 < int(found[1]) < STEPS  # about 12: what was told lags behind what was done
        assert "Current thread" in text
    assert len(logged(out)) < STEPS
    nodes.cable("up")
    assert finish(nodes.start(out, arguments), out) == [0, 0], told(out, 0).read_text()
    assert_same_end(out, one_machine / "generator-3")
