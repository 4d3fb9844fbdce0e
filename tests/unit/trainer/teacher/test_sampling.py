"""Drawing ids: Philox against its published answers, the inverse CDF against numpy's in float64."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from trainer.teacher.sampling import BLOCK, draw, philox, stream, uniforms

# Counter, key and answer of philox4x32-10 in Random123's kat_vectors.
ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
KEY = bytes(range(16))


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, as the paper has it."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (right >> 32) ^ b ^ k, right % 2**32
        c, d = (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def plain_uniform(seed: int, key: bytes, redraw: int, position: int, number: int) -> float:
    """The random number of one draw."""
    text = seed.to_bytes(8, "little") + redraw.to_bytes(4, "little") + key
    digest = hashlib.blake2b(text, digest_size=16).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    found = plain_philox([position, number // 2, *words[2:]], words[:2])[number % 2 * 2 :][:2]
    return ((found[0] << 21) + (found[1] >> 11)) / 2**53


def plain_draw(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Ids by the distribution function of p [vocab] at u [draws], ascending."""
    sums = np.cumsum(p.astype(np.float64))
    return np.sort(np.searchsorted(sums, u * sums[-1], side="right"))


def numbers(seed: int, key: bytes, redraw: int, positions: range, draws: int) -> torch.Tensor:
    words = torch.tensor(stream(seed, key, redraw)).expand(len(positions), 4)
    return uniforms(words, torch.tensor(list(positions)), draws)


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer) -> None:
    found = philox([torch.tensor([word]) for word in counter], [torch.tensor([w]) for w in key])
    assert [int(word) for word in found] == answer == plain_philox(counter, key)


def test_uniforms_are_philox_of_seed_key_position_draw_and_redraw() -> None:
    for seed, redraw in ((0, 0), (2**63 - 1, 63)):
        found = numbers(seed, KEY, redraw, range(5, 9), 7)
        assert found.shape == (4, 7) and found.dtype == torch.float64
        for i, position in enumerate(range(5, 9)):
            for j in range(7):
                assert float(found[i, j]) == plain_uniform(seed, KEY, redraw, position, j)


def test_uniforms_differ_wherever_something_differs() -> None:
    base = numbers(3, KEY, 0, range(64), 50)
    for other in (
        numbers(4, KEY, 0, range(64), 50),
        numbers(3, KEY[::-1], 0, range(64), 50),
        numbers(3, KEY, 1, range(64), 50),
        numbers(3, KEY, 0, range(64, 128), 50),
    ):
        both = torch.cat([base, other])
        assert len(both.unique()) == both.numel()
        assert abs(np.corrcoef(base.flatten(), other.flatten())[0, 1]) < 0.06  # 3.4 deviations
    # More draws of the same leave the first ones as they were.
    assert torch.equal(numbers(3, KEY, 0, range(64), 80)[:, :50], base)


def test_uniforms_are_uniform() -> None:
    values = numbers(1, KEY, 2, range(4000), 51).flatten().numpy()
    assert values.min() >= 0 and values.max() < 1
    n = len(values)
    distance = np.abs(np.sort(values) - (np.arange(n) + 0.5) / n).max() + 0.5 / n
    assert distance * np.sqrt(n) < 1.95  # Kolmogorov-Smirnov at one in a thousand
    assert (values * 2**53 == np.floor(values * 2**53)).all() and len(set(values)) == len(values)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0, 40.0])
def test_draws_are_those_of_the_distribution_function(sharpness) -> None:
    torch.manual_seed(0)
    p = torch.softmax(sharpness * torch.randn(200, 20 * BLOCK), dim=-1)
    u = torch.rand(200, 50, dtype=torch.float64)
    found = draw(p, u)
    assert found.dtype == torch.int32
    truth = np.stack(
        [plain_draw(row, some) for row, some in zip(p.numpy(), u.numpy(), strict=True)]
    )
    assert (found.numpy() == truth).all()


def test_the_sums_are_made_in_float64() -> None:
    """In float32 a sure id would swallow all unlikely ones: 1 + 1e-9 is 1."""
    p = torch.full((1, 40 * BLOCK), 1e-9)
    p[0, 5] = 1.0
    edge = torch.linspace(1.2e-6, 1.3e-6, 200, dtype=torch.float64)  # within its own block
    u = 1 - torch.cat([edge, torch.logspace(-4, -15, 200, dtype=torch.float64)]).unsqueeze(0)
    truth = plain_draw(p[0].numpy(), u[0].numpy())
    assert (draw(p, u)[0].numpy() == truth).all() and len(set(truth)) > 40


def test_probabilities_need_not_sum_to_one() -> None:
    torch.manual_seed(1)
    p = torch.rand(9, 4 * BLOCK)
    u = torch.rand(9, 50, dtype=torch.float64)
    assert torch.equal(draw(p, u), draw(p * 1024, u))


@pytest.mark.parametrize("value", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_ids_without_probability_are_never_drawn(value) -> None:
    """Also by the numbers at the ends, and where rounding reaches the total."""
    torch.manual_seed(2)
    p = torch.rand(400, 6 * BLOCK) ** 8
    p[:, :BLOCK] = 0  # a whole block, and the ends of others
    p[:, -BLOCK - 3 :] = 0
    p[torch.rand_like(p) < 0.7] = 0
    p[:, 2 * BLOCK + 5] += 1e-30
    found = draw(p, torch.full((400, 3), value, dtype=torch.float64)).long()
    assert (p.gather(1, found) > 0).all()
    if value == 0.0:
        assert torch.equal(found[:, 0], (p > 0).int().argmax(dim=1))


def test_a_certain_id_is_drawn_always() -> None:
    p = torch.zeros(3, 2 * BLOCK)
    p[torch.arange(3), torch.tensor([0, 40, 2 * BLOCK - 1])] = 1
    found = draw(p, torch.rand(3, 50, dtype=torch.float64))
    assert (found == torch.tensor([[0], [40], [2 * BLOCK - 1]])).all()


def test_draws_have_the_distribution_they_are_drawn_from() -> None:
    """Pearson's test on a skewed distribution, over positions as a capture draws them."""
    torch.manual_seed(3)
    p = torch.softmax(2 * torch.randn(1, 2 * BLOCK), dim=-1)
    found = draw(p.expand(4000, -1).contiguous(), numbers(7, KEY, 0, range(4000), 50))
    counts = np.bincount(found.flatten().numpy(), minlength=2 * BLOCK)
    expected = p[0].double().numpy() / p[0].double().numpy().sum() * counts.sum()
    freedom = len(expected) - 1
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 4 * np.sqrt(2 * freedom)
