"""Whatever bytes an artifact holds: one line of refusal, or a model of just its tensors."""

from __future__ import annotations

import random
import shutil

import pytest
from safetensors.torch import load_file

from quant.artifact import load_quantized
from tests.fixtures.artifacts import (
    CONFIG,
    DESCRIPTION,
    FILES,
    MIB,
    WEIGHTS,
    make_sound,
    peak_bytes,
    same_tensors,
)

pytestmark = pytest.mark.timeout(120)  # what a file claims may not take its time

CASES = {DESCRIPTION: 100, WEIGHTS: 100, CONFIG: 50}  # for each kind of damage
TOKENS = [b"0", b"-1", b"1e9", b"null", b"true", b'""', b"[]", b"{}", b"NaN", b"9" * 30, b"\x00"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("sound") / "model")


def span(name: str, data: bytes) -> int:
    """Bytes that are damaged: the whole file, of the weights the header."""
    return 8 + int.from_bytes(data[:8], "little") if name == WEIGHTS else len(data)


def flipped(rng: random.Random, data: bytes, end: int) -> bytes:
    """One to three bits turned over."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        made[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(made)


def cut(rng: random.Random, data: bytes, end: int) -> bytes:
    """A piece missing: the end, or one to forty bytes from the middle."""
    at = rng.randrange(end)
    return data[:at] if rng.random() < 0.5 else data[:at] + data[at + rng.randint(1, 40) :]


def swapped(rng: random.Random, data: bytes, end: int) -> bytes:
    """Some other value, or a piece from elsewhere in the file, over what is there."""
    at = rng.randrange(end)
    other = rng.randrange(end)
    piece = rng.choice([*TOKENS, data[other : other + rng.randint(1, 30)]])
    keep = rng.choice([0, len(piece)])
    return data[:at] + piece + data[at + keep :]


def renumbered(rng: random.Random, data: bytes, end: int) -> bytes:
    """One digit of a number is another: still JSON, still of the same length."""
    digits = [at for at in range(8, end) if 48 <= data[at] <= 57]
    made = bytearray(data)
    made[rng.choice(digits)] = rng.randrange(48, 58)
    return bytes(made)


@pytest.mark.parametrize("damage", [flipped, cut, swapped, renumbered])
@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS, CONFIG])
def test_damaged_files(sound, tmp_path, name, damage):
    folder = shutil.copytree(sound, tmp_path / "model")
    data = (folder / name).read_bytes()
    rng = random.Random(f"{name} {damage.__name__}")
    refused = 0
    before = peak_bytes()
    for case in range(CASES[name]):
        damaged = damage(rng, data, span(name, data))
        (folder / name).write_bytes(damaged)
        try:
            model = load_quantized(folder, prefer="plain")
        except ValueError as error:
            refused += 1
            line = str(error)
            assert line.startswith(str(folder)) and "\n" not in line, (case, line)
        else:
            assert same_tensors(model, load_file(folder / WEIGHTS)), (case, damaged)
    assert refused > CASES[name] // 3
    assert peak_bytes() - before < 256 * MIB


def test_the_fuzz_starts_from_a_whole_artifact(sound):
    assert sorted(path.name for path in sound.iterdir()) == sorted(FILES)
    assert same_tensors(load_quantized(sound, prefer="plain"), load_file(sound / WEIGHTS))
