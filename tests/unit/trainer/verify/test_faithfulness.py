"""Errors of records against the teacher: by hand in numpy float64, loops and all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.logits.records import Coding
from trainer.verify.errors import (
    Tally,
    drawn_errors,
    drawn_figures,
    gkl,
    kept_errors,
    kept_figures,
    scalar_errors,
)

POSITIONS, VOCAB, K = 7, 40, 5
TEMPERATURES = (2.0, 1.0)


def distribution(seed: int, sharp: float = 2.0) -> np.ndarray:
    """Log-probabilities [positions, vocab]."""
    logits = np.random.default_rng(seed).normal(size=(POSITIONS, VOCAB)) * sharp
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def records(log_p: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The most likely ids ascending, their log-probabilities, and log tails."""
    ids = np.sort(np.argsort(-log_p, axis=1)[:, :k], axis=1)
    rest = log_p.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    tails = np.stack([np.log(np.exp(rest / t).sum(axis=1)) for t in TEMPERATURES], axis=1)
    return ids, np.take_along_axis(log_p, ids, axis=1), tails


def errors(made: tuple[np.ndarray, ...], log_p: np.ndarray, **noisy: np.ndarray) -> dict:
    found = kept_errors(
        *(torch.from_numpy(array) for array in made),
        TEMPERATURES,
        torch.from_numpy(log_p),
        {name: torch.from_numpy(other) for name, other in noisy.items()},
    )
    assert all(v.shape == (POSITIONS,) and v.dtype == torch.float64 for v in found.values())
    return {name: value.numpy() for name, value in found.items()}


def test_exact_records_have_no_error_but_truncation() -> None:
    log_p = distribution(0)
    found = errors(records(log_p), log_p)
    for name in ("record", "tail", "missed"):
        assert np.abs(found[name]).max() < 1e-12
    for row, got in zip(log_p, found["truncation"], strict=True):
        rest = sorted(np.exp(row))[: VOCAB - K]
        even = sum(rest) / len(rest)
        assert got == pytest.approx(sum(p * math.log(p / even) for p in rest), rel=1e-9)


def test_the_record_error_is_the_generalised_kl_of_what_is_kept() -> None:
    log_p, other = distribution(1), distribution(2)
    ids, log_q, tails = records(log_p)
    log_q = log_q + 0.3 * np.random.default_rng(3).normal(size=log_q.shape)
    found = errors((ids, log_q, tails + 0.1), log_p, batch=other)
    for i in range(POSITIONS):
        record = floor = 0.0
        for id_, lq in zip(ids[i], log_q[i], strict=True):
            p, q, o = math.exp(log_p[i, id_]), math.exp(lq), math.exp(other[i, id_])
            record += p * math.log(p / q) - p + q
            floor += p * math.log(p / o) - p + o
        assert found["record"][i] == pytest.approx(record, rel=1e-9)
        assert found["record_batch"][i] == pytest.approx(floor, rel=1e-9)
        tail = 0.0
        for column, t in enumerate(TEMPERATURES):
            share = math.exp(tails[i, column]) / np.exp(log_p[i] / t).sum()
            wrong = share * math.exp(0.1)
            tail = max(tail, share * math.log(share / wrong) - share + wrong)
        assert found["tail"][i] == pytest.approx(tail, rel=1e-9)


def test_ragged_rows_count_as_what_they_keep() -> None:
    """Unused slots repeat the row's first id at minus infinity; the first is not always largest."""
    log_p = distribution(4)
    ids, log_q, tails = records(log_p)
    short_ids, short_q, short_tails = records(log_p, K - 2)
    ids[3] = [*short_ids[3], short_ids[3, 0], short_ids[3, 0]]
    log_q[3] = [*short_q[3], -np.inf, -np.inf]
    tails[3] = short_tails[3]
    found = errors((ids, log_q, tails), log_p)
    assert max(np.abs(found[n]).max() for n in ("record", "tail", "missed")) < 1e-12
    alone = errors((short_ids, short_q, short_tails), log_p)
    assert found["truncation"][3] == pytest.approx(alone["truncation"][3], rel=1e-12)


def test_a_kept_id_that_the_record_gives_nothing_is_an_error() -> None:
    log_p = distribution(5)
    ids, log_q, tails = records(log_p)
    found = errors((ids, np.where(np.arange(K) == 2, -np.inf, log_q), tails), log_p)
    assert found["tail"].max() > 1e-3  # its mass is in neither


def test_ids_that_are_not_the_most_likely_are_missed() -> None:
    log_p = distribution(6)
    order = np.argsort(-log_p, axis=1)
    ids = np.sort(np.concatenate([order[:, : K - 1], order[:, 20:21]], axis=1), axis=1)
    rest = log_p.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    tails = np.stack([np.log(np.exp(rest / t).sum(axis=1)) for t in TEMPERATURES], axis=1)
    found = errors((ids, np.take_along_axis(log_p, ids, axis=1), tails), log_p)
    assert found["record"].max() < 1e-12 and found["missed"].min() > 1e-3


def test_certain_rows_have_no_error() -> None:
    log_p = np.full((POSITIONS, VOCAB), -np.inf)
    log_p[:, 9] = 0.0
    made = (np.full((POSITIONS, 1), 9), np.zeros((POSITIONS, 1)), np.full((POSITIONS, 2), -np.inf))
    found = errors(made, log_p, batch=log_p)
    assert all((value == 0).all() for value in found.values())


def test_nothing_is_infinitely_wrong() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert gkl(p, p) == 0 and gkl(p, torch.tensor([[0.0, -torch.inf, 0.0]])).isinf()


def test_scalars_are_compared_in_nats() -> None:
    log_p = distribution(7)
    log_p[2] = -np.inf
    log_p[2, 3] = 0.0
    labels = np.arange(POSITIONS)
    entropy = np.array([-sum(math.exp(v) * v for v in row if v > -np.inf) for row in log_p])
    true = log_p[labels, labels]
    found = scalar_errors(
        torch.from_numpy(entropy + 0.02),
        torch.from_numpy(np.where(labels == 5, true - 1, true)),
        torch.from_numpy(labels),
        torch.from_numpy(log_p),
        {},
    )
    assert np.allclose(found["entropy"], 0.02)
    assert found["true"].tolist() == pytest.approx([0, 0, 0, 0, 0, 1, 0])


# -- draws -------------------------------------------------------------------------------------


def drawn(log_p: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.choice(VOCAB, draws, p=np.exp(row)) for row in log_p])


def as_record(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """As it is decoded: unique ids and log shares, filled up to the widest row."""
    rows = [np.unique(row, return_counts=True) for row in ids]
    width = max(len(row[0]) for row in rows)
    out = np.stack([np.append(i, np.full(width - len(i), i[0])) for i, _ in rows])
    shares = [
        np.append(np.log(c / ids.shape[1]), np.full(width - len(c), -np.inf)) for _, c in rows
    ]
    return torch.from_numpy(out), torch.from_numpy(np.stack(shares).astype(np.float32))


@pytest.mark.parametrize("draws", [1, 50, 400])
def test_draws_are_counted_as_multisets(draws: int) -> None:
    log_p, rng = distribution(8), np.random.default_rng(9)
    ids, again = drawn(log_p, draws, rng), drawn(log_p, draws, rng)
    found = drawn_errors(
        *as_record(ids),
        draws,
        torch.from_numpy(log_p),
        {"batch": torch.from_numpy(log_p)},
        lambda _: torch.from_numpy(again),
    )
    for i in range(POSITIONS):
        left = list(again[i])
        for id_ in ids[i]:
            if id_ in left:
                left.remove(id_)
        assert found["moved"][i] == pytest.approx(len(left) / draws)
        assert found["unique"][i] == len(set(ids[i]))
        p = np.exp(log_p[i])
        bias = np.mean([log_p[i, id_] for id_ in ids[i]]) - (p * log_p[i]).sum()
        assert found["bias"][i] == pytest.approx(bias)
        variance = (p * log_p[i] ** 2).sum() - (p * log_p[i]).sum() ** 2
        assert found["variance"][i] == pytest.approx(variance / draws)
    assert not found["draws"].any() and not found["moved_batch"].any()


def test_z_is_standard_normal_for_fair_draws_and_large_for_others() -> None:
    rng = np.random.default_rng(10)
    fair, skewed = [], []
    for number in range(150):
        log_p = distribution(number)
        cut = np.where(log_p >= np.sort(log_p, axis=1)[:, -12:-11], log_p, -np.inf)
        cut -= np.log(np.exp(cut).sum(axis=1, keepdims=True))
        for source, into in ((log_p, fair), (cut, skewed)):
            tally = Tally()
            ids = drawn(source, 50, rng)
            logits = torch.from_numpy(log_p)
            tally.add(
                **drawn_errors(
                    *as_record(ids), 50, logits, {}, lambda _, i=ids: torch.from_numpy(i)
                )
            )
            into.append(drawn_figures(tally)["z"].value)
    assert abs(np.mean(fair)) < 4 / math.sqrt(150) and 0.8 < np.std(fair) < 1.2
    # Draws from a truncated top-12, the well-known mistake.
    assert np.mean(skewed) > 2


def test_limits_follow_coding_and_noise() -> None:
    tally = Tally()
    tally.add(**{name: torch.full((4,), 0.01) for name in ("record", "tail", "missed")})
    tally.add(**{name: torch.full((4,), 0.03) for name in ("record", "tail", "missed")})
    figures = kept_figures(tally, Coding("topk", VOCAB, 50, step=0.0155))
    assert figures["record"].value == pytest.approx(0.02) and tally.positions == 8
    assert figures["record"].limit == pytest.approx(50 * 0.0155**2 / 2)
    assert not figures["record"].holds
    tally.add(record=torch.zeros(8), record_batch=torch.full((8,), 0.02))
    figure = kept_figures(tally, Coding("topk", VOCAB, 50, step=0.0155))["record"]
    assert figure.holds and figure.batch_noise == pytest.approx(0.01)
    tally.add(record=torch.full((8,), math.nan))
    assert not kept_figures(tally, Coding("topk", VOCAB, 50, step=0.0155))["record"].holds
