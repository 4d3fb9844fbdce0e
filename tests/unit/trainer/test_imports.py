"""What importing the packages brings along, seen in processes of their own."""

import subprocess
import sys

from trainer.imports import _at_first_call

COMPILER = "torch._inductor.compile_fx"


def modules_after(code: str) -> set[str]:
    """Names in `sys.modules` of a fresh process that ran `code`."""
    more = "\nimport sys; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code + more], capture_output=True, text=True, check=True, timeout=120
    )
    return set(found.stdout.split())


def test_hqq_by_itself_imports_the_compiler() -> None:
    """What makes the rest of this file worth its lines; when it fails, `trainer.imports` can go."""
    assert COMPILER in modules_after("import hqq.core.quantize")


def test_the_compiler_is_not_imported() -> None:
    muon = "deepspeed.runtime.zero.muon.original_muon"  # which every engine of DeepSpeed imports
    found = modules_after(
        f"import quant.evaluation.cell, trainer.training.loop, transformers.cache_utils, {muon}"
    )
    assert "hqq.core.quantize" in found, "transformers imports it where it is installed"
    assert COMPILER not in found


def test_the_driver_imports_no_models() -> None:
    found = modules_after("import jobs.pipeline.pipeline, jobs.stages.sweep")
    assert not found & {"torch", "transformers", "ray", "deepspeed", "hqq"}


def test_put_off_compilation_compiles_once_with_its_options() -> None:
    asked = []

    def compiler(function, **options):
        asked.append((function.__name__, options))
        return lambda x: function(x) + 1

    @_at_first_call(compiler, fullgraph=True)
    def double(x):
        """Twice x."""
        return 2 * x

    assert not asked and double.__doc__ == "Twice x."
    assert [double(2), double(3)] == [5, 7]
    assert asked == [("double", {"fullgraph": True})]
