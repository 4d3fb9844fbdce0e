"""Counts matrix products by dtype: what a processor spends its time on.

    python -m tests.products SPEC

runs capture, training and a cell of a spec in this process and prints the multiplications as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Where the matrices are among the arguments; a product of vectors (inner size 1) is no matter.
PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "mkldnn_linear": (0, 1),
    "_scaled_dot_product_flash_attention_for_cpu": (0, 1),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 2),
    "_weight_int4pack_mm_for_cpu": (0, 0),
}


class Products(TorchDispatchMode):
    """Elements of the first factor of every product inside the block, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.rpartition("::")[2]
        if name in PRODUCTS:
            first = args[PRODUCTS[name][0]]
            if first.shape[-1] > 1:
                self.counts[f"{str(first.dtype).removeprefix('torch.')}"] += first.numel()
        return function(*args, **(kwargs or {}))


def main(path: str) -> int:
    """Runs the spec at `path` under torchrun's entry and a cell of its student."""
    import yaml

    from cluster.storage import open_store
    from jobs.dtypes import local_dtypes
    from jobs.load import load_spec
    from quant.beside import evaluate_model
    from quant.cell import run_cell
    from quant.grid import grid
    from quant.measured import Part, Setting
    from trainer.__main__ import main as train
    from trainer.corpus.corpus import open_corpus

    with Products() as products:
        code = train([path])
        assert code == 0, code
        found: dict[str, Any] = {"trainer": dict(products.counts)}
        spec = load_spec(path)
        storage = Path(yaml.safe_load(Path(path).read_text())["storage"])
        (corpus,) = (storage / "_corpora").iterdir()
        part = open_corpus(open_store(corpus)).part("report")
        setting = Setting(dtype=local_dtypes(spec)["sweep"])
        products.counts.clear()
        student = str(storage / spec.name / "student")
        batches = Part(lambda: [part.batch([0, 1, 2, 3])])
        assert spec.sweep is not None
        cell = run_cell(grid(spec.sweep)[0], student, batches, setting=setting)
        model = evaluate_model(student, batches, None, "student", setting=setting)
        found["cells"] = dict(products.counts)
    found["compute_dtype"] = [cell["compute_dtype"], model["compute_dtype"]]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1]))
