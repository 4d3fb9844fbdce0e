"""Builds DeepSpeed's CPU communication op once, so that no job waits for a compiler.

    python -m trainer.build_ops

Takes 20 to 40 seconds the first time and needs g++ and ninja; later calls find it built.
"""

from __future__ import annotations

import os

from trainer.ops import ops_folder


def build() -> None:
    """Compiles the op, or finds it compiled. Raises RuntimeError when the compiler fails."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    ops_folder()  # torch builds there
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load()


if __name__ == "__main__":
    build()
