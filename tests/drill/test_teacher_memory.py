"""What a rank holds of a teacher that ranks share: its part, and the largest layer."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures.ranks import spawn, start
from tests.system.test_sharded_teacher import batch, load, peak, save_kind


def memory(folder: Path) -> dict[str, float]:
    """Peak memory of loading a teacher and of forward passes."""
    import deepspeed  # noqa: F401 - the memory of imports is none of the teacher's
    import transformers.conversion_mapping  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from trainer.models.load import meta_model, read_config
    from trainer.teacher.sharded import largest_layer

    worker = start()
    shape = meta_model(read_config(folder))
    result = {
        "whole": 4.0 * sum(p.numel() for p in shape.parameters()),
        "layer": 4.0 * largest_layer(shape),
    }
    with peak(result):
        engine = load(folder, "float32", worker, [])
        for number in range(4):
            engine(*batch(number, worker.rank, 160))
    return result


def test_host_memory_is_bounded_by_the_share_and_the_largest_layer(tmp_path) -> None:
    """A teacher of 80 million parameters. DeepSpeed's and gloo's own buffers come on top."""
    folder = save_kind(
        tmp_path / "large",
        "llama",
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=2048,
    )
    for rank in spawn(memory, folder, world=2, fresh=True):
        assert rank["whole"] > 4 * 50e6
        assert rank["peak"] < rank["whole"] / 2 + 3 * rank["layer"] + 32e6 < 0.9 * rank["whole"]
