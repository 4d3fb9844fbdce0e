"""Estimates of what is left."""

from __future__ import annotations

from jobs.run.heartbeat import Remaining, in_words


def test_the_rest_takes_as_long_in_proportion_as_what_was_seen() -> None:
    remaining = Remaining()
    assert remaining.seconds("a", 0.2, 100.0) is None  # nothing seen to go on yet
    assert remaining.seconds("a", 0.25, 101.0) is None  # too soon
    assert remaining.seconds("a", 0.4, 110.0) == 30.0  # 0.2 in 10 s
    assert remaining.seconds("b", 0.5, 110.0) is None
    assert remaining.seconds("a", 1.0, 120.0) is None  # done


def test_what_begins_again_is_seen_anew() -> None:
    remaining = Remaining()
    remaining.seconds("a", 0.5, 0.0)
    remaining.seconds("a", 0.9, 10.0)
    assert remaining.seconds("a", 0.1, 100.0) is None
    assert remaining.seconds("a", 0.2, 110.0) == 80.0


def test_words_are_as_exact_as_the_guess() -> None:
    assert in_words(3) == "about 10 s left"
    assert in_words(43) == "about 40 s left"
    assert in_words(12.4 * 60) == "about 12 min left"
    assert in_words(3.52 * 3600) == "about 3.5 h left"
