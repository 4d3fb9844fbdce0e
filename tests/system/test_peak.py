"""The peak of a rank's memory: what grew since it was asked to look, not what was there before."""

from __future__ import annotations

from tests.fixtures.ranks import spawn

MB = 1_000_000


def hold(sizes: list[int]) -> tuple[int | None, int | None, int | None]:
    """(peak of this rank before, after it held so much, largest of all ranks) in bytes."""
    import torch

    from tests.fixtures.ranks import start
    from trainer.worker import PeakMemory

    worker = start()
    before = torch.ones(100 * MB // 4)  # noqa: F841 - is no part of the growth
    peak = PeakMemory(worker.device)
    first = peak.bytes()
    del_me = torch.ones(sizes[worker.rank] // 4)
    del del_me
    return first, peak.bytes(), peak.largest(worker)


def test_growth_is_told_and_the_largest_of_the_ranks() -> None:
    told = spawn(hold, [200 * MB, 400 * MB], world=2)
    for (first, after, largest), size in zip(told, (200 * MB, 400 * MB), strict=True):
        assert first is not None and after is not None and largest is not None
        assert first < 20 * MB
        assert abs(after - size) < 20 * MB
        assert abs(largest - 400 * MB) < 20 * MB
