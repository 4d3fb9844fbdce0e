"""The meter on counters in real files and a real library, whose energy the test decides."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from quant.evaluation.energy import EnergyMeter, NotMeasurable, Nvml
from tests.fixtures.waiting import until

RANGE = 262_143_328_850


def zone(root: Path, place: str, name: str, energy: int = 0) -> Path:
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder / "energy_uj"


@pytest.fixture
def machine(tmp_path) -> dict[str, Path]:
    """Two packages, and zones that count a part of them, or more, again."""
    return {
        "first": zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000),
        "second": zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000),
        "core": zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000),
        "platform": zone(tmp_path, "intel-rapl:2", "psys", 1_000_000),
        "again": zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000),
    }


def add(files: dict[str, Path], microjoules: int, *names: str) -> None:
    for name in names or files:
        old = int(files[name].read_text())
        new = files[name].with_suffix(".new")
        new.write_text(f"{(old + microjoules) % RANGE}\n")
        new.replace(files[name])  # a reader never sees half a number


def test_joules_are_those_of_all_packages_and_of_nothing_twice(tmp_path, machine):
    with EnergyMeter("cpu", tmp_path) as meter:
        add(machine, 2_500_000)
        assert meter.read() == 5.0
        add(machine, 1_000_000, "second", "core", "platform", "again")
    assert (meter.joules, meter.why, meter.source) == (6.0, None, "CPU packages by RAPL")
    add(machine, 9_000_000)
    assert meter.joules == 6.0, "the block is over"
    with meter:
        add(machine, 1_000_000, "first")
    assert meter.joules == 1.0, "each block on its own"


def test_a_counter_that_starts_again_and_again(tmp_path, machine):
    """Its range is exceeded twice, with a reading in between."""
    machine["first"].write_text(f"{RANGE - 1_000_000}\n")
    with EnergyMeter("cpu", tmp_path) as meter:
        add(machine, 3_000_000, "first")
        assert int(machine["first"].read_text()) == 2_000_000
        assert meter.read() == pytest.approx(3.0)
        for _ in range(3):
            add(machine, RANGE // 2, "first")
            meter.read()
    assert meter.joules == pytest.approx(3 + 3 * RANGE / 2 / 1e6)


def test_a_counter_that_moves_while_it_is_read(tmp_path, machine):
    """As the machine's own: a thread turns it all the time."""
    stop = threading.Event()

    def turn() -> None:
        while not stop.wait(0.001):
            add(machine, 50_000, "first")

    def count() -> int:
        return int(machine["first"].read_text())

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        before = count()
        with EnergyMeter("cpu", tmp_path) as meter:
            entered = count()
            until(lambda: count() > entered + 5_000_000)
            leaving = count()
        after = count()
    finally:
        stop.set()
        thread.join()
    found = round(1e6 * meter.joules)
    assert 5_000_000 < leaving - entered <= found <= after - before


def test_a_machine_without_counters_says_so(tmp_path, machine):
    with EnergyMeter("cpu", tmp_path / "none") as meter:
        pass
    assert (meter.joules, meter.source) == (None, None)
    assert meter.why == (
        f"no RAPL counters in {tmp_path}/none; virtual machines and containers have none"
    )
    assert "type mps" in str(EnergyMeter("mps").why)
    with EnergyMeter("cpu", tmp_path) as meter:
        shutil.rmtree(tmp_path / "intel-rapl:1")
    assert meter.joules is None and "energy_uj cannot be read (No such file" in str(meter.why)


def test_counters_that_may_not_be_read():
    """As the kernel has them since 2020, for all but root."""
    root = Path(tempfile.mkdtemp())
    uid = os.geteuid()
    try:
        os.chmod(root, 0o755)
        file = zone(root, "intel-rapl:0", "package-0")
        file.chmod(0o400 if uid == 0 else 0)
        if uid == 0:
            os.seteuid(65534)
        with EnergyMeter("cpu", root) as meter:
            pass
    finally:
        os.seteuid(uid)
        shutil.rmtree(root)
    assert meter.joules is None
    assert meter.why == f"{file} may not be read; as root: chmod a+r {root}/intel-rapl:*/energy_uj"


LIBRARY = """
#include <string.h>
static unsigned long long millijoules = 40000000000ULL;  /* more than 32 bits hold */
static int started = 0, device = 0;
int nvmlInit_v2(void) { started = 1; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  if (!started) return 1;
  if (strcmp(uuid, "GPU-right") && strcmp(uuid, "GPU-old")) return 6;
  device = !strcmp(uuid, "GPU-right");
  *handle = &device;
  return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy) {
  if (handle != &device) return 2;
  if (!device) return 3;
  *energy = millijoules;
  millijoules += 1500;
  return 0;
}
const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "Not Found"; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    """A library with the functions that NVML has, which counts 1.5 J from call to call."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "nvml.so"), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    return str(folder / "nvml.so")


def test_the_drivers_library_is_called_as_its_header_says(library):
    counter = Nvml("GPU-right", library)
    first = counter.joules()
    assert first >= 40e6 and counter.joules() == first + 1.5
    with pytest.raises(NotMeasurable, match="nvmlDeviceGetHandleByUUID .* fails: Not Found"):
        Nvml("GPU-other", library)
    with pytest.raises(NotMeasurable, match="nvmlDeviceGetTotalEnergyConsumption .* Not Supp"):
        Nvml("GPU-old", library).joules()
    with pytest.raises(NotMeasurable, match="gone.so of NVIDIA's driver does not load"):
        Nvml("GPU-right", "gone.so")
