"""Compiles and loads the C++ op for CPUs (codes.cpp): `torch.ops.stillhouse_cpu`.

    python -m jobs.build_kernels

builds it, which takes about 15 seconds and needs g++ (or what CXX names); later calls find it
built, in the environment's folder of ops (`trainer.compiled_ops`), under a name that holds a hash
of the source, the flags and torch's version. Where it was not built, the first layer that wants it
builds it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from trainer.compiled_ops import ops_folder
from trainer.processor import cpu_kind

SOURCE = Path(__file__).with_name("codes.cpp")
# No fused multiply-adds but those that the source asks for: weights are rounded as torch does.
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off")
MACHINES = ("x86_64", "amd64")


@cache
def unavailable() -> str:
    """Loads the op, built if need be. Empty, or in a few words why there is none."""
    if platform.machine().lower() not in MACHINES:
        return f"no C++ op for {platform.machine()}"
    if cpu_kind() == "generic":
        return "the C++ op needs AVX2"
    try:
        torch.ops.load_library(_built())
    except (OSError, RuntimeError) as error:
        return f"no C++ op, {str(error).strip().splitlines()[0]}"
    if not torch.ops.stillhouse_cpu.has_avx2():
        return "the C++ op needs AVX2"
    return ""


def use_vnni() -> bool:
    """Whether AVX512-VNNI runs: the processor has it and torch is not held back to AVX2."""
    if unavailable() or cpu_kind() == "avx2":
        return False
    return bool(torch.ops.stillhouse_cpu.has_vnni())


def _built() -> Path:
    """The library's path. Raises RuntimeError, one line, when the compiler fails or is missing."""
    state = hashlib.sha256(SOURCE.read_bytes())
    state.update(repr((FLAGS, torch.__version__, torch._C._GLIBCXX_USE_CXX11_ABI)).encode())
    path = ops_folder() / "stillhouse_cpu" / f"{state.hexdigest()[:16]}.so"
    if not path.is_file():
        logging.getLogger(__name__).warning("compiling the C++ op for this CPU, once (15 s)")
        _compile(path)
    return path


def _compile(path: Path) -> None:
    """Whole or not at all: processes that do it at the same time do not wait for each other."""
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    compiler = os.environ.get("CXX", "g++")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [
            compiler,
            *FLAGS,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-I{include}",
            f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
            str(SOURCE),
            *("-o", str(made), f"-L{libraries}", "-ltorch_cpu", "-lc10"),
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"{compiler} not found") from None
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"{compiler} failed: {(errors or [run.stderr[-200:]])[0]}")
        made.replace(path)
