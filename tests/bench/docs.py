"""Writes the measured tables into docs/cache.md, so that they are what results/ says.

    .venv/bin/python -m tests.bench.docs

Both benches do it at their end. A table stands between `<!-- NAME: begin -->` and
`<!-- NAME: end -->`; one whose figures were not measured yet stays as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.bench.figures import FOLDER, tables_by_kind

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"
# Settings in the order of the tables, and how the docs call them.
SETTINGS = {
    "topk_50": "`topk`, k: 50",
    "topk_50_ragged": "`topk`, k: 50, keep: 0.5",
    "topk_128": "`topk`, k: 128",
    "topk_128_ragged": "`topk`, k: 128, keep: 0.86, step: 0.0225",
    "sample_50": "`sample`, draws: 50",
}
TOKENS = 10**12
SHARD = 64 << 20
INDEX_ROW, READER_ROW, LENGTH = 28, 40, 2048
# Tokens/s of a worker's capture; seconds of a small read from a bucket, and how many at once.
CAPTURE_SPEED, READ_SECONDS, READS_AT_ONCE = 2000, 0.05, 16
Json = dict[str, Any]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column is text, the others are figures."""
    rule = "|---|" + "---:|" * (len(heads) - 1)
    return "\n".join("| " + " | ".join(row) + " |" if row else rule for row in (heads, [], *rows))


def figure(value: float | None, digits: int) -> str:
    """A number for a table, a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def sizes(found: Json) -> str:
    """Bytes and errors on the synthetic distributions."""
    rows = []
    for name, words in SETTINGS.items():
        uniform, ordered = found["bytes_per_token"], found["bytes_per_token_ordered"]
        planes = f"{name}_byte_planes"
        rows.append(
            [
                words,
                figure(found["ids_per_token"][name], 1),
                figure(uniform[name], 1),
                figure(uniform.get(planes), 1),
                figure(ordered[name], 1),
                figure(ordered.get(planes), 1),
                figure(found["gkl"].get(name), 4),
                figure(found["kl_full"].get(name), 3),
            ]
        )
    heads = ["cache", "ids", "bytes, uniform ids", "byte planes + zstd-3", "bytes, ordered ids"]
    return table([*heads, "byte planes + zstd-3", "gKL kept", "KL full"], rows)


def demo(found: Json) -> str:
    """The same on the demo's teacher."""
    rows = []
    for name, words in SETTINGS.items():
        ours, planes = found["settings"][name], found["settings"].get(f"{name}_byte_planes", {})
        rows.append(
            [
                words,
                figure(ours["ids"], 1),
                figure(ours["bytes"], 1),
                figure(planes.get("bytes"), 1),
                figure(ours.get("gkl"), 4),
                figure(ours.get("kl_full"), 3),
            ]
        )
    return table(["cache", "ids", "bytes", "byte planes + zstd-3", "gKL kept", "KL full"], rows)


def speeds(found: Json) -> str:
    """Tokens per second of the codec."""
    rows = [
        [SETTINGS[name], *(figure(values[f"{work}_{threads}"] / 1e6, 2) for work in
         ("encode", "decode") for threads in ("1_thread", "2_threads"))]
        for name, values in found.items()
    ]  # fmt: skip
    heads = ["million tokens/s", "encode, 1 thread", "2 threads", "decode, 1 thread", "2 threads"]
    return table(heads, rows)


def on_paper(found: Json) -> str:
    """What a cache of 10^12 tokens in full shards would be, by the bytes with ordered ids."""
    sequences = TOKENS // LENGTH
    rows = []
    for name, words in SETTINGS.items():
        each = found["bytes_per_token_ordered"][name]
        shards = each * TOKENS / SHARD
        rows.append(
            [
                words,
                figure(each * TOKENS / 1e12, 1),
                figure(SHARD / (CAPTURE_SPEED * each), 0),
                figure(2 * shards, 0),
                figure(INDEX_ROW * sequences / 1e9, 1),
                figure(shards * READ_SECONDS / READS_AT_ONCE / 60, 0),
                figure(READER_ROW * sequences / 1e9, 1),
            ]
        )
    heads = ["cache", "TB", "`shard_seconds` that fills a shard", "objects", "GB of indexes"]
    return table([*heads, "minutes to open", "GB of memory in a reader"], rows)


def angles(found: Json) -> str:
    """Angles of one student."""
    heads = ["tokens", *(f"{n // 1024}k" for n in found["tokens"]), "slope"]
    heads += ["slope of the error", "norm"]
    rows = [
        [
            f"`{name}`",
            *(figure(value, 2) for value in values),
            figure(found["slope"][name], 2),
            figure(found["error_slope"][name], 2),
            figure(found["norm_ratio"][name][-1], 2),
        ]
        for name, values in found["angle"].items()
    ]
    return table(heads, rows)


def trainings(found: Json) -> str:
    """Held-out figures after 1 and 4 epochs."""
    rows = [
        [name, *(figure(runs[epochs][key], 4) for epochs in ("1", "4") for key in ("kl", "ce"))]
        for name, runs in found["held_out"].items()
    ]
    heads = ["signal", "1 epoch: KL to the teacher", "cross-entropy"]
    return table([*heads, "4 epochs: KL to the teacher", "cross-entropy"], rows)


def cache_tables(found: Json) -> dict[str, str]:
    """Those of `tests.bench.cache` whose figures are there, by name."""
    parts = {}
    if "bytes_per_token" in found:
        parts |= {"sizes": sizes(found), "paper": on_paper(found)}
    if "demo" in found:
        parts["demo"] = demo(found["demo"])
    if "speeds" in found:
        parts["speeds"] = speeds(found["speeds"])
    return parts


def angle_tables(found: Json) -> dict[str, str]:
    """Those of `tests.bench.cache_angle` whose figures are there, by name."""
    parts = {f"angle-{name}": angles(each) for name, each in found.get("angle", {}).items()}
    if "trainings" in found:
        parts["trainings"] = trainings(found["trainings"])
    return parts


def write(page: Path = PAGE, results: Path = FOLDER) -> list[str]:
    """Fills in the tables whose figures are there; returns their names.

    Raises ValueError for a table that the page has no place for.
    """
    parts = tables_by_kind("cache", cache_tables, results)
    parts |= tables_by_kind("cache_angle", angle_tables, results)
    fill(page, parts)
    return list(parts)


def fill(page: Path, parts: dict[str, str]) -> None:
    """Puts tables into a page, by name. Raises ValueError for one that it has no place for."""
    text = page.read_text()
    for name, part in parts.items():
        pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
        text, count = re.subn(pattern, rf"\g<1>{part}\n\g<2>", text, flags=re.S)
        if count != 1:
            raise ValueError(f"{page}: {count} places for the table {name}; needs one")
    page.write_text(text)


if __name__ == "__main__":
    print("written:", ", ".join(write()) or "nothing, no figures yet")
