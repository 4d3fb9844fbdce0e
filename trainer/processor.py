"""What this machine's processors are fast at: the one place that knows instruction sets."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal

Kind = Literal["avx2", "avx512", "avx512_bf16", "amx", "neon", "generic"]
DtypeName = Literal["bfloat16", "float32"]

CPUINFO = Path("/proc/cpuinfo")
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, its WSL driver, AMD
# oneDNN's names for the most that it may use, in order; torch's products of matrices run in it.
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
_CAPS = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX10_1_512",
    "AVX512_CORE_FP16",
    "AVX10_1_512_AMX",
    "AVX512_CORE_AMX",
    "AVX10_1_512_AMX_FP16",
    "AVX512_CORE_AMX_FP16",
)


def cpu_kind() -> Kind:
    """The instruction set of this machine's processor that decides how fast matrix products are.

    avx512_bf16 and amx multiply bfloat16 in hardware. Where `ONEDNN_MAX_CPU_ISA` or
    `ATEN_CPU_CAPABILITY` hold torch back from an instruction set, it does not count.
    """
    flags = _flags()
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    most = _CAPS.index(cap) if cap in _CAPS else len(_CAPS)
    aten = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    if aten in ("avx2", "default"):
        most = min(most, _CAPS.index("AVX2"))
    if "amx_bf16" in flags and most >= _CAPS.index("AVX10_1_512_AMX"):
        return "amx"
    if "avx512_bf16" in flags and most >= _CAPS.index("AVX512_CORE_BF16"):
        return "avx512_bf16"
    if "avx512f" in flags and most >= _CAPS.index("AVX512_CORE"):
        return "avx512"
    if "avx2" in flags:
        return "avx2"
    return "neon" if platform.machine() in ("aarch64", "arm64") else "generic"


def cpu_dtype() -> DtypeName:
    """What CPUs like this one multiply matrices in fastest: bfloat16 only with instructions for it.

    Without them torch's bfloat16 product takes 8 to 55 times as long as the float32 one.
    """
    kind = cpu_kind()
    fast = kind in ("avx512_bf16", "amx") or (kind == "neon" and "bf16" in _flags())
    return "bfloat16" if fast else "float32"


def fast_dtype(device: str = "cpu") -> DtypeName:
    """The dtype that `dtype: auto` means on a device of this machine: "cpu", "cuda", "cuda:1"."""
    return "bfloat16" if device.partition(":")[0] == "cuda" else cpu_dtype()


def this_device() -> Literal["cpu", "cuda"]:
    """What workers of this machine compute on where nothing else is asked for.

    torch, whose import takes seconds, is asked only where a driver of GPUs is.
    """
    if not any(Path(path).exists() for path in GPU_DRIVERS):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def processor_kind(device: str = "cpu") -> str:
    """What figures measured on a device are filed under: `cpu_kind()`, or the GPU's name."""
    if device.partition(":")[0] == "cuda":
        import torch

        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return cpu_kind()


def processor_name() -> str:
    """The processor's name, as the system tells it."""
    for line in _lines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def _lines() -> tuple[str, ...]:
    try:
        return tuple(CPUINFO.read_text().splitlines())
    except OSError:
        return ()


def _flags() -> frozenset[str]:
    for line in _lines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
