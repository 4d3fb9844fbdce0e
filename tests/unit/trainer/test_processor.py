from __future__ import annotations

from pathlib import Path

import pytest

from trainer import processor

AVX2 = "fpu sse4_2 avx avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512_vnni"
BF16 = f"{AVX512} avx512_bf16"
AMX = f"{BF16} amx_bf16 amx_tile amx_int8"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets the processor's flags."""
    for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", path)

    def write(flags: str, key: str = "flags") -> None:
        path.write_text(f"processor\t: 0\nmodel name\t: A CPU: fast\n{key}\t\t: {flags}\n\n" * 2)

    return write


@pytest.mark.parametrize(
    ("flags", "kind", "dtype"),
    [
        ("fpu sse4_2", "generic", "float32"),
        (AVX2, "avx2", "float32"),
        (AVX512, "avx512", "float32"),
        (BF16, "avx512_bf16", "bfloat16"),
        (AMX, "amx", "bfloat16"),
    ],
)
def test_instruction_sets_decide(machine, flags: str, kind: str, dtype: str) -> None:
    machine(flags)
    assert (processor.cpu_kind(), processor.cpu_dtype()) == (kind, dtype)
    assert processor.fast_dtype("cpu") == dtype and processor.processor_kind() == kind
    assert processor.fast_dtype("cuda") == processor.fast_dtype("cuda:1") == "bfloat16"
    assert processor.processor_name() == "A CPU: fast"


@pytest.mark.parametrize(
    ("variable", "value", "kind"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "avx2"),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", "avx512"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "avx512_bf16"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", "amx"),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", "amx"),
        ("ATEN_CPU_CAPABILITY", "avx2", "avx2"),
        ("ATEN_CPU_CAPABILITY", "avx512", "amx"),
    ],
)
def test_what_torch_may_not_use_does_not_count(
    machine, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, kind: str
) -> None:
    machine(AMX)
    monkeypatch.setenv(variable, value)
    assert processor.cpu_kind() == kind


def test_arm_processors_say_so_themselves(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    machine("fp asimd", key="Features")
    assert (processor.cpu_kind(), processor.cpu_dtype()) == ("neon", "float32")
    machine("fp asimd bf16 i8mm", key="Features")
    assert (processor.cpu_kind(), processor.cpu_dtype()) == ("neon", "bfloat16")


def test_a_machine_that_tells_nothing(machine, tmp_path: Path) -> None:
    assert processor.cpu_kind() in ("generic", "neon") and processor.cpu_dtype() == "float32"
