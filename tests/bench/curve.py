"""Bytes against full KL over a grid of settings: the cache's codec, and byte planes with zstd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from tests.bench.measured import FIT, LENGTH, Figures, byte_planes, lossless, through_cache
from tests.bench.picture import Axis, Line, draw
from tests.bench.synthetic import Ids, Positions
from trainer.logits.records import Coding

SIZES = (16, 32, 50, 96, 128, 256)
# keep and step of the quantization
QUANTIZATION = (
    (0.0, 0.008),
    (0.0, 0.0155),
    (0.5, 0.0155),
    (0.86, 0.0225),
    (0.86, 0.032),
    (1.5, 0.032),
)
COLOURS = {"uniform": "#b4630a", "ordered": "#0b7a6f"}
Point = dict[str, float]


def curve(positions: Mapping[Ids, Positions], path: Path, fine: bool = True) -> dict[str, Any]:
    """Measures the grid for both ways of numbering ids, draws it, and returns the fronts."""
    lines: list[Line] = []
    fronts: dict[str, list[Point]] = {}
    for ids, found in positions.items():
        rest = found.rows(FIT * LENGTH, len(found.ids))
        ours: list[Point] = []
        planes: list[Point] = []
        for k, (keep, step) in product(
            SIZES if fine else SIZES[::3], QUANTIZATION[:: 1 if fine else 4]
        ):
            coding = Coding("topk", found.vocab, k, step=step, keep=keep)
            setting = {"k": k, "keep": keep, "step": step}
            ours.append(_point(setting, through_cache(found, coding)))
            planes.append(_point(setting, byte_planes(rest, k, step, keep)))
        for name, points, dashed in (("logit cache", ours, False), ("byte planes", planes, True)):
            best = front(points)
            fronts[f"{name}, {ids} ids".replace(" ", "_").replace(",", "")] = best
            lines.append(Line(f"{name}, {ids} ids", COLOURS[ids], _xy(best), _xy(points), dashed))
            print(f"{name}, {ids} ids: bytes at KL full <= " + ", ".join(_reached(best)))
    draw(
        path,
        "Bytes per token against the full KL, vocabulary 151,936",
        lines,
        Axis("KL(teacher || record), nats per token, the tail spread evenly", log=True),
        Axis("bytes per token", log=True),
        (lossless(positions["uniform"], 50), "what an exact top-50 loses"),
    )
    return {"curve": fronts}


def _point(setting: Point, figures: Figures) -> Point:
    assert figures.kl_full is not None
    return setting | {"bytes": round(figures.bytes, 2), "kl_full": round(figures.kl_full, 4)}


def _reached(points: list[Point]) -> Iterator[str]:
    for bound in (0.12, 0.15, 0.2, 0.25, 0.3, 0.4):
        if any(point["kl_full"] <= bound for point in points):
            yield f"{bound:.2f}: {_at(points, bound):.1f}"


def front(points: list[Point]) -> list[Point]:
    """The points that no other beats in both: from few bytes to many."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p["bytes"], p["kl_full"])):
        if not kept or point["kl_full"] < kept[-1]["kl_full"]:
            kept.append(point)
    return kept


def _xy(points: list[Point]) -> list[tuple[float, float]]:
    return [(point["kl_full"], point["bytes"]) for point in points]


def _at(points: list[Point], kl_full: float) -> float:
    """The fewest bytes that reach this KL."""
    return min(p["bytes"] for p in points if p["kl_full"] <= kl_full)
