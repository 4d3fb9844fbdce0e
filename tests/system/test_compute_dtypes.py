"""What a default job multiplies in, from capture to the cells, on either kind of processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.storage import open_store
from tests.fixtures.corpora import LENGTH, config_values, make_corpus, save_model, write_texts
from tests.fixtures.ranks import ROOT
from tests.fixtures.small_job import environment
from trainer.processor import cpu_dtype

WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
# A processor without instructions for bfloat16 is of the second kind as it is.
KINDS: dict[str, dict[str, str]] = {"as it is": {}, "without bf16": WITHOUT_BF16}
if cpu_dtype() == "float32":
    del KINDS["without bf16"]


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    from trainer.spec.sections import DataSpec

    root = tmp_path_factory.mktemp("dtypes")
    data = {
        "train": [{"source": write_texts(root / "texts")}],
        "select_sequences": 4,
        "report_sequences": 4,
        "sequence_length": LENGTH,
    }
    corpus = make_corpus(open_store(root).sub("corpus"), DataSpec(**data))
    teacher = save_model(root / "teacher", corpus.tokenizer_folder(), kind="llama", width=48)
    return {
        "name": "default",
        "teacher": {"model": str(teacher)},
        "student": {"init": "random", "config": config_values("llama")},
        "data": data,
        "cache": {"method": "topk", "k": 8},
        "distill": {"steps": 3, "tokens_per_step": 4 * LENGTH},
        "sweep": {"bits": [4], "group_size": [32]},
    }


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_default_job_multiplies_in_what_the_processor_is_fast_at(
    values: dict[str, Any], tmp_path: Path, changes: dict[str, str]
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**values, "storage": str(tmp_path / "runs")}))
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.products", str(path)],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    fast = "float32" if changes else cpu_dtype()
    assert set(found["trainer"]) == set(found["cells"]) == {fast}
    assert min(found["trainer"][fast], found["cells"][fast]) > 100_000
    assert found["compute_dtype"] == [fast, fast]
