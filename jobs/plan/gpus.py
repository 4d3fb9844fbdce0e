"""GPU types: memory, and the peak of their matrix units."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.errors import SpecErrors
from trainer.processor import DtypeName

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A type of GPU. memory: bytes. flops, flops32: dense operations per second at its peak, in
    bf16 and in float32 (torch leaves TF32 off).

    marks: what the name that its driver gives holds, in lower case, all of them.
    """

    key: str
    memory: int
    flops: float
    flops32: float
    marks: tuple[str, ...]

    def peak(self, dtype: DtypeName) -> float:
        """Operations per second in a dtype."""
        return self.flops if dtype == "bfloat16" else self.flops32


# Memory is about what drivers report. Peaks are of the makers' data sheets, dense (half of what is
# printed "with sparsity"): bf16 with float32 sums, and float32 without tensor units.
GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu("b200", 178 * GIB, 2250e12, 75e12, ("b200",)),  # NVIDIA DGX B200 data sheet, 2024
        Gpu("h200", 139 * GIB, 989e12, 67e12, ("h200",)),  # NVIDIA H200 data sheet, SXM
        Gpu("h100", 80 * GIB, 989e12, 67e12, ("h100",)),  # NVIDIA H100 data sheet, SXM
        Gpu("h100-pcie", 80 * GIB, 756e12, 51e12, ("h100", "pcie")),  # the same, PCIe
        Gpu("a100-80", 80 * GIB, 312e12, 19.5e12, ("a100", "80g")),  # NVIDIA A100 data sheet
        Gpu("a100-40", 40 * GIB, 312e12, 19.5e12, ("a100",)),  # the same
        Gpu("mi300x", 192 * GIB, 1307e12, 163e12, ("mi300x",)),  # AMD Instinct MI300X data sheet
        Gpu("l40s", 48 * GIB, 362e12, 91.6e12, ("l40s",)),  # NVIDIA L40S data sheet
        Gpu("l4", 24 * GIB, 121e12, 30.3e12, ("l4",)),  # NVIDIA L4 data sheet, 242 with sparsity
        Gpu("a10g", 24 * GIB, 70e12, 31.2e12, ("a10g",)),  # Amazon EC2 G5, NVIDIA A10G data sheet
        Gpu("4090", 24 * GIB, 165e12, 82.6e12, ("4090",)),  # NVIDIA Ada white paper, table 2
        Gpu("3090", 24 * GIB, 71e12, 35.6e12, ("3090",)),  # NVIDIA GA102 white paper, table 9
    )
}


def find_gpu(key: str) -> Gpu:
    """The GPU of a key. Raises SpecErrors that lists those known."""
    if key.lower() in GPUS:
        return GPUS[key.lower()]
    raise SpecErrors([f'--gpu: got "{key}"; may be one of {", ".join(GPUS)}'])


def gpu_named(name: str) -> Gpu | None:
    """The GPU that a driver calls so, e.g. "NVIDIA H100 80GB HBM3"; None for one not known."""
    words = name.lower().replace("-", " ")
    fitting = [gpu for gpu in GPUS.values() if all(_has(words, mark) for mark in gpu.marks)]
    return max(fitting, key=lambda gpu: len(gpu.marks), default=None)


def _has(words: str, mark: str) -> bool:
    """Whether a word begins with the mark: "a100-sxm4-80gb" has a100, "l40s" has no l4."""
    return any(word == mark or (word.startswith(mark) and mark != "l4") for word in words.split())
