"""Counter-based randomness, and the order of the data: which sample comes when, on which rank, after which resume."""

import contextlib
import json
from collections.abc import Callable, Iterator
from itertools import chain, islice

import pytest
import torch
from torch import Tensor

from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.runtime.stream import PREFETCH_BATCHES, PositionedLoader, debug_count, sample_ids, split_epochs


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 100, 1000, 1023, 1024, 1025, 20_001])
def test_permute_is_a_bijection(n: int) -> None:
    for seed in (0, 1, 2**62):
        out = rng.permute(torch.arange(n), n, seed)
        assert out.dtype == torch.int64
        assert torch.equal(out.sort().values, torch.arange(n))


def test_permute_of_parts_at_any_size_depends_on_the_seed() -> None:
    whole = rng.permute(torch.arange(1000), 1000, 7)
    parts = torch.cat([rng.permute(torch.arange(start, 1000, 3), 1000, 7) for start in range(3)])
    assert torch.equal(parts, torch.cat([whole[start::3] for start in range(3)]))
    assert (whole == rng.permute(torch.arange(1000), 1000, 8)).float().mean() < 0.02
    assert (whole == torch.arange(1000)).float().mean() < 0.02
    n = 10**15 + 37
    positions = torch.arange(n - 5000, n)
    out = rng.permute(positions, n, 3)
    assert out.min() >= 0 and out.max() < n and out.unique().numel() == 5000
    n, draws = 7, 1400
    table = torch.stack([rng.permute(torch.arange(n), n, rng.fold("spread", seed)) for seed in range(draws)])
    counts = torch.stack([torch.bincount(table[:, position], minlength=n) for position in range(n)]).double()
    expected = draws / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 80  # 36 degrees of freedom; the 99.99% quantile is 77


def test_normal_rows_depend_on_seed_and_id_alone() -> None:
    together = rng.normal(5, [3, 9, 4], (4, 3, 3))
    assert together.shape == (3, 4, 3, 3) and together.dtype == torch.float32
    for row, number in enumerate((3, 9, 4)):
        assert torch.equal(together[row], rng.normal(5, torch.tensor([number]), (4, 3, 3))[0])
    assert not torch.equal(together, rng.normal(6, [3, 9, 4], (4, 3, 3)))
    many = rng.normal(0, range(200), (16, 8))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_uniform_and_integers_cover_their_range_evenly() -> None:
    ids = torch.arange(40_000)
    values = rng.uniform(11, ids)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert (torch.histc(values, 10, 0, 1) / 4000 - 1).abs().max() < 0.1
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.02
    labels = rng.integers(11, ids, 10)
    assert labels.dtype == torch.int64
    assert (torch.bincount(labels, minlength=10) / 4000 - 1).abs().max() < 0.1
    assert torch.equal(values[[7, 3]], rng.uniform(11, [7, 3]))
    assert (rng.integers(0, ids, 1) == 0).all()


def test_fold_is_63_bits_ordered_and_stable() -> None:
    assert rng.fold(1, 2) != rng.fold(2, 1) and rng.fold(1, "flip") != rng.fold(1, "noise")
    assert all(0 <= rng.fold(value, -value) < 2**63 for value in range(100))
    assert len({rng.fold(a, b) for a in range(50) for b in range(50)}) == 2500
    ids = [0, 5, 2**40]
    assert rng.seeds(3, ids) == [rng.fold(3, index) for index in ids]
    # Golden values: a change of the hash would silently change every sample of a seed.
    assert rng.fold(0) == 0xE220A8397B1DCDAF >> 1
    assert rng.integers(3, ids, 1000).tolist() == [737, 806, 52]
    assert rng.permute(torch.tensor([0, 1, 999]), 1000, 7).tolist() == [741, 287, 126]


N, SEED = 11, 5


class Ids(PositionedLoader[list[tuple[int, int]]]):
    """Batches of (epoch, id); remembers what was begun and whether its session is over."""

    def __init__(self, batch_size: int, seed: int = SEED, rank: int = 0, world_size: int = 1, n: int = N) -> None:
        super().__init__(n, batch_size, seed, rank, world_size)
        self.begun: list[list[int]] = []
        self.closed = 0

    @contextlib.contextmanager
    def _session(self) -> Iterator[Callable[[Tensor], Callable[[], list[tuple[int, int]]]]]:
        def start(positions: Tensor) -> Callable[[], list[tuple[int, int]]]:
            self.begun.append(positions.tolist())
            parts = list(sample_ids(positions, self.num_samples, self.seed))
            return lambda: [(epoch, index) for epoch, ids in parts for index in ids.tolist()]

        yield start
        self.closed += 1


def expected(start: int, stop: int, seed: int = SEED) -> list[tuple[int, int]]:
    """By the definition: position p shows permute(p % n) under the key of its epoch."""
    return [
        (p // N, int(rng.permute(torch.tensor([p % N]), N, rng.fold(seed, "order", p // N))[0]))
        for p in range(start, stop)
    ]


def test_positions_are_cut_and_handed_out_in_order() -> None:
    found = [(epoch, places.tolist()) for epoch, places in split_epochs(torch.tensor([4, 7, 10, 13, 25]), 5)]
    assert found == [(0, [4]), (1, [2]), (2, [0, 3]), (5, [0])]
    ids = [(epoch, index) for epoch, ids in sample_ids(torch.arange(8, 24), N, SEED) for index in ids.tolist()]
    assert ids == expected(8, 24)
    # A golden value: another order would go on with other samples where a run was interrupted.
    assert [int(ids[0]) for _, ids in sample_ids(torch.tensor([0, 1_000_003]), 1_000_003, 5)] == [575127, 407537]
    loader = Ids(2)
    stream = loader.stream()
    for step in range(1, 4):
        next(stream)
        assert len(loader.begun) == step - 1 + PREFETCH_BATCHES and loader.images_seen == 2 * step
    stream.close()
    assert loader.state_dict()["images_seen"] == 6


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_stream_is_shared_out_over_ranks(world_size: int) -> None:
    loaders = [Ids(2, rank=rank, world_size=world_size) for rank in range(world_size)]
    streams = [loader.stream() for loader in loaders]
    for step in range(14):  # past two epochs, which end inside batches
        whole = expected(2 * world_size * step, 2 * world_size * (step + 1))
        assert [next(stream) for stream in streams] == [whole[rank::world_size] for rank in range(world_size)]
        assert {loader.images_seen for loader in loaders} == {2 * world_size * (step + 1)}
        assert {loader.epoch for loader in loaders} == {2 * world_size * (step + 1) // N}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_iteration_gives_what_is_left_of_the_epoch(world_size: int) -> None:
    for seen in (0, 4, 10, 11, 13):
        loaders = [Ids(2, rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in loaders:
            loader.load_state_dict({"seed": SEED, "images_seen": seen})
        batches = [list(loader) for loader in loaders]
        end = (seen // N + 1) * N
        for rank, found in enumerate(batches):
            cuts = range(seen, end, 2 * world_size)
            parts = [expected(cut, min(cut + 2 * world_size, end))[rank::world_size] for cut in cuts]
            assert found == [part for part in parts if part]
        assert {loader.images_seen for loader in loaders} == {end}
        assert {loader.closed for loader in loaders} == {1}


@pytest.mark.parametrize("new_world_size", [1, 2, 4])
def test_resume_goes_on_with_the_next_sample_on_any_number_of_ranks(new_world_size: int) -> None:
    loader = Ids(2, rank=1, world_size=2)
    list(islice(loader.stream(), 2))
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {"seed": SEED, "images_seen": 8, "epoch": 0, "num_samples": N}
    for rank in range(new_world_size):
        resumed = Ids(4 // new_world_size, 0, rank, new_world_size)
        resumed.load_state_dict(state)
        found = list(chain.from_iterable(islice(resumed.stream(), 5)))
        assert found == expected(8, 28)[rank::new_world_size]


def test_an_iterator_follows_its_loader_to_another_position_and_seed() -> None:
    for endless in (True, False):
        loader = Ids(3)
        running = loader.stream() if endless else iter(loader)
        assert next(running) == expected(0, 3)
        for seen, seed in ((9, SEED), (9, 6), (22, 6)):
            loader.load_state_dict({"seed": seed, "images_seen": seen})
            assert next(running) == expected(
                seen, seen + 3 if endless else min(seen + 3, -(-(seen + 1) // N) * N), seed
            )


def test_samples_between_two_states() -> None:
    loaders = [Ids(2, rank=rank, world_size=2) for rank in range(2)]
    streams = [loader.stream() for loader in loaders]
    before = [(next(stream), loader.state_dict())[1] for stream, loader in zip(streams, loaders, strict=True)]
    for stream in streams:
        list(islice(stream, 4))
    for loader, state in zip(loaders, before, strict=True):
        assert loader.ids_between(state, loader.state_dict()) == [index for _, index in expected(4, 20)]
        assert loader.ids_between(state, state) == []


def test_what_cannot_be_is_refused() -> None:
    pytest.raises(UsageError, Ids, 1, n=0).match("the data set is empty")
    assert Ids(1, n=1).num_samples == 1
    with pytest.raises(UsageError, match=r"counts 12 samples but the data set has 11"):
        Ids(2).load_state_dict({"seed": 0, "images_seen": 4, "num_samples": 12})
    assert debug_count("debug:1") == 1 and debug_count("debug:64") == 64
    for path in ("debug:0", "debug:", "debug:-1", "debug:x"):
        pytest.raises(UsageError, debug_count, path).match("debug data needs a count of at least 1")
