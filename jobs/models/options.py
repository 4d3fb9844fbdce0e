"""What the options of `stillhouse quantize` mean, and one line for each that means nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import SpecErrors
from quant.quant_spec import BITS, CHANNEL, DYNAMIC, METHODS, GroupSize, QuantSpec, is_group_size

DYNAMIC_ONLY = f"--method {DYNAMIC}: has --bits 8 and --group-size {CHANNEL}, no others"
ONE_OUT = "--out writes one model; leave it away to compare several"
SIXTEEN = 16  # bits of a layer that stays as it is


@dataclass(frozen=True)
class Grid:
    """The options as given, in lists; an empty one was left out."""

    bits: list[int]
    group_sizes: list[GroupSize]
    methods: list[str]
    embeddings: bool = False
    head: bool = False

    def single(self, why: str = ONE_OUT) -> QuantSpec:
        """The one QuantSpec that is meant, with group size 64 and method hqq where none is given.

        why: only one is meant.

        Raises SpecErrors where several are given, or no bits.
        """
        faults = [
            f"{option}: got {', '.join(map(str, values))}; may be one value: {why}"
            for option, values in (
                ("--bits", self.bits),
                ("--group-size", self.group_sizes),
                ("--method", self.methods),
            )
            if len(values) > 1
        ]
        method = self.methods[0] if self.methods else "hqq"
        if not self.bits and method != DYNAMIC:
            faults.append(f"--bits: is missing; may be one of {', '.join(map(str, BITS))}")
        dynamic = method == DYNAMIC
        size: GroupSize = CHANNEL if dynamic else 64
        if dynamic and self._with_dynamic():
            faults.append(DYNAMIC_ONLY)
        if faults:
            raise SpecErrors(faults)
        try:
            return QuantSpec(
                self.bits[0] if self.bits else 8,
                self.group_sizes[0] if self.group_sizes else size,
                method,  # type: ignore[arg-type]
                self.embeddings,
                self.head,
            )
        except ValueError as error:
            raise SpecErrors([f"--method {method}: {error}"]) from None

    def _with_dynamic(self) -> bool:
        """Whether bits or group sizes are given that int8-dynamic has not."""
        return bool(set(self.bits) - {8} or set(self.group_sizes) - {CHANNEL})

    def section(self) -> dict[str, Any]:
        """The section `sweep` of a spec. Raises SpecErrors for what no cell would have."""
        if self.methods == [DYNAMIC] and self._with_dynamic():
            raise SpecErrors([DYNAMIC_ONLY])
        section: dict[str, Any] = {"group_size": self.group_sizes or [64]}
        if self.bits:
            section["bits"] = self.bits
        if self.methods:
            section["methods"] = self.methods
        if self.embeddings or self.head:
            section |= {"embeddings": self.embeddings, "head": self.head}
        return section


def read_grid(
    bits: str | None, group_size: str | None, method: str | None, embeddings: bool, head: bool
) -> Grid:
    """The grid of the options, which are lists with commas. Raises SpecErrors, a line for each."""
    faults: list[str] = []
    widths = _values(bits)
    sizes = _values(group_size)
    methods = [str(value) for value in _values(method)]
    offered = (
        ("--bits", widths, lambda v: v in BITS, ", ".join(map(str, BITS))),
        (
            "--group-size",
            sizes,
            lambda v: v == CHANNEL or is_group_size(v),
            f"a multiple of 8, from 8 on, or {CHANNEL}",
        ),
        ("--method", methods, lambda v: v in METHODS, ", ".join(METHODS)),
    )
    for option, values, fits, may_be in offered:
        wrong = [str(value) for value in values if not fits(value)]
        if wrong:
            faults.append(f"{option}: got {', '.join(wrong)}; may be {may_be}")
        elif len(set(values)) < len(values):
            faults.append(f"{option}: got {', '.join(map(str, values))}; give each value once")
    if faults:
        raise SpecErrors(faults)
    return Grid(widths, sizes, methods, embeddings, head)  # type: ignore[arg-type]


def read_single(bits: str | None, group_size: str | None, method: str | None) -> QuantSpec | None:
    """The QuantSpec of `generate`, None where nothing is asked for. Raises SpecErrors."""
    if bits is None and method is None:
        if group_size is not None:
            raise SpecErrors([f"--group-size {group_size}: needs --bits"])
        return None
    return read_grid(bits, group_size, method, False, False).single("one model is run")


def _values(text: str | None) -> list[int | str]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    return [int(part) if part.isdecimal() else part or "nothing" for part in parts]


def read_layers(texts: Iterable[str], spec: QuantSpec) -> dict[str, QuantSpec | None]:
    """The layers with bits of their own: "GLOB=BITS", "GLOB=BITS:GROUP", or "GLOB=16" for None.

    Raises SpecErrors, a line for each that is none.
    """
    layers: dict[str, QuantSpec | None] = {}
    faults = []
    for text in texts:
        glob, equals, value = text.rpartition("=")
        bits, colon, size = value.partition(":")
        if not (glob and equals and bits.isdecimal()) or (colon and not size):
            faults.append(
                f"--layer {text}: may be GLOB=BITS, GLOB=BITS:GROUP or GLOB=16, "
                'e.g. "*.mlp.down_proj=8:64"'
            )
        elif glob in layers:
            faults.append(f"--layer {text}: {glob} is given twice; give it once")
        elif int(bits) == SIXTEEN and not colon:
            layers[glob] = None
        else:
            group: Any = int(size) if size.isdecimal() else size or spec.group_size
            try:
                layers[glob] = QuantSpec(int(bits), group, spec.method, spec.embeddings, spec.head)
            except ValueError as error:
                faults.append(f"--layer {text}: {error}")
    if faults:
        raise SpecErrors(faults)
    return layers


def check_out(out: str, what: str) -> Path:
    """The folder `--out`, which may be new or empty. Raises SpecErrors, one line.

    what: that would be written there.
    """
    import os

    if not out.strip():
        raise SpecErrors(["--out: is empty; may be a new folder"])
    if "://" in out:
        raise SpecErrors([f"--out: got {out}; may be a local folder"])
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise SpecErrors([f"--out: {out} is a file; may be a new folder for {what}"])
    if folder.is_dir() and any(folder.iterdir()):
        raise SpecErrors([f"--out: {out} is not empty; may be a new folder for {what}"])
    there = folder.absolute().parent
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise SpecErrors([f"--out: {there} is a file; may be a new folder for {what}"])
    if not os.access(there, os.W_OK | os.X_OK):
        raise SpecErrors([f"--out: {there} is not writable; may be a new folder for {what}"])
    return folder


def check_device(device: str) -> str:
    """cpu or cuda; auto is resolved. Raises SpecErrors, one line."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise SpecErrors([f"--device: got {device}; may be auto, cpu or cuda"])
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise SpecErrors(["--device: got cuda, but torch sees no GPU here; may be cpu"])
    return ("cuda" if there else "cpu") if device == "auto" else device
