"""The energy that a block of work takes, from the counters of the machine."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class NotMeasurable(Exception):
    """Why a machine does not tell the energy: one line, and what mends it where something does."""


class Counter(Protocol):
    """A counter of energy since some moment. source: what it counts, in words."""

    source: str

    def joules(self) -> float:
        """The count now; raises NotMeasurable."""


class EnergyMeter:
    """A context manager: the joules since it was entered.

    joules: up to the last `read`, or to the block's end; None where the machine does not tell, and
    then `why` says why. source: what was counted. On a GPU it is the whole board (NVML), on a CPU
    all its packages without the memory beside them (RAPL), whoever uses them: run nothing else.
    The counters move every millisecond (RAPL) to some ten milliseconds (NVML): measure seconds.

    powercap, nvml: where the counters of CPUs and the library of GPUs are found.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        powercap: Path | str = POWERCAP,
        nvml: str = NVML,
    ) -> None:
        self.joules: float | None = None
        self.why: str | None = None
        self.source: str | None = None
        self._start = 0.0
        self._counter: Counter | None = None
        try:
            self._counter = _counter(torch.device(device), Path(powercap), nvml)
            self._counter.joules()
            self.source = self._counter.source
        except NotMeasurable as error:
            self._fail(error)

    def __enter__(self) -> EnergyMeter:
        self.joules = None
        if self._counter is not None:
            try:
                self._start, self.joules = self._counter.joules(), 0.0
            except NotMeasurable as error:
                self._fail(error)
        return self

    def __exit__(self, *_: object) -> None:
        self.read()

    def read(self) -> float | None:
        """Joules since the block was entered. A reading takes microseconds."""
        if self._counter is not None:
            try:
                self.joules = self._counter.joules() - self._start
            except NotMeasurable as error:
                self._fail(error)
        return self.joules

    def _fail(self, error: NotMeasurable) -> None:
        self.joules, self.why, self._counter, self.source = None, str(error), None, None


def _counter(device: torch.device, powercap: Path, nvml: str) -> Counter:
    if device.type == "cpu":
        return Rapl(powercap)
    if device.type == "cuda":
        uuid = torch.cuda.get_device_properties(device).uuid
        return Nvml(f"GPU-{uuid}", nvml)
    raise NotMeasurable(f"no counter of energy is known for a device of type {device.type}")


class Rapl:
    """All packages of the processor, by the kernel's powercap files.

    docs.kernel.org/power/powercap: `energy_uj` in microjoules, which starts again at 0 beyond
    `max_energy_range_uj`: after some minutes under load, so read it more often than that.
    """

    source = "CPU packages by RAPL"

    def __init__(self, root: Path) -> None:
        self._packages = [
            zone
            for zone in sorted(root.glob("intel-rapl:*"))  # AMD's have that name too
            # Parts of a package (core, uncore, dram) are zones of their own, as is the platform.
            if _text(zone / "name").startswith("package")
        ]
        if not self._packages:
            raise NotMeasurable(
                f"no RAPL counters in {root}; virtual machines and containers have none"
            )
        self._range = [int(_text(zone / "max_energy_range_uj")) for zone in self._packages]
        self._last = self._now()
        self._total = 0

    def joules(self) -> float:
        """Since it was made; a counter that started again once since the last call is known."""
        now = self._now()
        for last, new, most in zip(self._last, now, self._range, strict=True):
            self._total += new - last if new >= last else new + most - last
        self._last = now
        return self._total / 1e6

    def _now(self) -> list[int]:
        return [int(_text(zone / "energy_uj")) for zone in self._packages]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise NotMeasurable(
            f"{path} may not be read; as root: chmod a+r {path.parent.parent}/intel-rapl:*/"
            "energy_uj"
        ) from error
    except OSError as error:
        raise NotMeasurable(f"{path} cannot be read ({error.strerror})") from error


class Nvml:
    """One GPU, by the library of NVIDIA's driver (docs.nvidia.com/deploy/nvml-api).

    By its uuid: the order of NVML's devices is not that of CUDA's. The library is called without a
    package of Python in between, for two functions.
    """

    source = "GPU by NVML"

    def __init__(self, uuid: str, library: str = NVML) -> None:
        try:
            self._library: Any = ctypes.CDLL(library)
        except OSError as error:
            raise NotMeasurable(f"{library} of NVIDIA's driver does not load") from error
        self._library.nvmlErrorString.restype = ctypes.c_char_p
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        # Of a slice (MIG) the uuid is another, and it has no counter of its own.
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))

    def joules(self) -> float:
        """Since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise NotMeasurable(f"NVIDIA's driver has no {name}; it needs a newer one")
        if code := function(*arguments):
            said = self._library.nvmlErrorString(code).decode()
            raise NotMeasurable(f"{name} of NVIDIA's driver fails: {said}")
