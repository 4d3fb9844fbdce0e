"""A teacher shared out over ranks by ZeRO-3, against the same teacher whole, on process groups."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import LENGTH, VOCAB, data_spec, make_corpus, save_model, write_texts
from tests.fixtures.ranks import Log, spawn, start

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 12},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": 160},
    "mixtral": {"num_local_experts": 8, "tie_word_embeddings": False},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "old_moe": {"num_experts": 8, "tie_word_embeddings": False},
}
CASES = [(kind, "float32") for kind in KINDS] + [("llama", "bfloat16"), ("mixtral", "bfloat16")]


# Models. Nothing heavy is imported at the top: the ranks import this file.


def register_old_moe() -> None:
    """Llama with eight experts per layer that are modules of their own, as models had them."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class Config(LlamaConfig):
        model_type = "old_moe"
        num_experts = 8

    class Block(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
            self.experts = nn.ModuleList(
                nn.Linear(config.hidden_size, config.hidden_size, bias=False)
                for _ in range(config.num_experts)
            )

        def forward(self, hidden: Any) -> Any:
            chosen = self.router(hidden).argmax(dim=-1)
            result = torch.zeros_like(hidden)
            for number, expert in enumerate(self.experts):
                if (mine := chosen == number).any():
                    result[mine] = expert(hidden[mine])
            return result

    class OldMoe(LlamaForCausalLM):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = Block(config)
            self.post_init()

    AutoConfig.register("old_moe", Config, exist_ok=True)
    AutoModelForCausalLM.register(Config, OldMoe, exist_ok=True)


def save_kind(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model of a kind with lively logits, in several files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    register_old_moe()
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else SIZES) | KINDS[kind] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder, max_shard_size="60KB" if not changes else "100MB")
    return folder


# What runs on the ranks.


def wrapper(seen: list[int]) -> Any:
    """A module of logits, and of how much is held while the head is in use."""
    from torch import nn

    from trainer.losses.fused_linear import head_of
    from trainer.models.head import last_hidden

    class Logits(nn.Module):
        engine: Any = SimpleNamespace(held=lambda: 0)

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, positions: Any) -> Any:
            hidden = last_hidden(self.model, ids, positions)
            logits = head_of(self.model).logits(hidden)
            seen.append(self.engine.held())
            return logits

    return Logits


def load(folder: Path, dtype: str, group: Any, seen: list[int]) -> Any:
    """The sharded engine, telling `seen` at every module how many bytes are held."""
    import torch

    from trainer.models.load import read_config
    from trainer.teacher.sharded import load_sharded

    config = read_config(folder)
    made: list[Any] = []
    wrap = wrapper(seen)

    def keep(model: Any) -> Any:
        made.append(wrap(model))
        return made[0]

    vocab = config.vocab_size
    engine = load_sharded(folder, config, getattr(torch, dtype), group, keep, vocab)
    object.__setattr__(made[0], "engine", engine)
    for module in made[0].model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(engine.held()))
        module.register_forward_hook(lambda *_: seen.append(engine.held()))
    return engine


def batch(number: int, rank: int, vocab: int) -> tuple[Any, Any]:
    """Ids and positions; other ranks have other ids, and another number of them."""
    import torch

    draw = torch.Generator().manual_seed(100 * number + rank)
    length = 3 + 2 * rank
    ids = torch.randint(0, vocab, (1 + rank, length), generator=draw)
    return ids, torch.arange(length).expand_as(ids)


def remember_choice(chosen: list[set[int]], module: Any, given: Any, output: Any) -> None:
    """A hook on routers: which experts are chosen at all."""
    numbers = output[-1] if isinstance(output, tuple) else output.argmax(dim=-1)
    chosen.append(set(numbers.flatten().tolist()))


def traces() -> list[str]:
    """What DeepSpeed has left in this process that a training after the capture would meet."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator, utils
    from torch.nn import functional

    check = partitioned_param_coordinator.assert_ints_same_as_other_ranks
    found = {
        "modules": parameter_offload.FWD_MODULE_STACK != [],
        "check": check is not utils.assert_ints_same_as_other_ranks,
        "linear": "deepspeed" in functional.linear.__module__,
    }
    return [name for name, there in found.items() if there]


def same_as_whole(cases: list[tuple[Path, str]]) -> list[dict[str, Any]]:
    """Sharded and whole, on batches that differ between ranks."""
    import torch

    from trainer.models.load import load_model
    from trainer.teacher.sharded import largest_layer

    register_old_moe()
    worker, results = start(), []
    for folder, dtype in cases:
        seen: list[int] = []
        engine = load(folder, dtype, worker, seen)
        whole = wrapper([])(load_model(folder, getattr(torch, dtype)).eval())
        chosen: list[set[int]] = []
        remember = partial(remember_choice, chosen)
        for name, module in whole.named_modules():
            if "router" in type(module).__name__.lower() or name.endswith("router"):
                module.register_forward_hook(remember)
        rows, errors = [], []
        for number in range(5):
            given = batch(number, worker.rank, 160)
            with torch.no_grad():
                wanted = whole(*given)
            errors.append(float((engine(*given) - wanted).abs().max()))
            rows.append(float(wanted.abs().max()))
        held = engine.held()
        engine.close()
        results.append(
            {
                "errors": errors,
                "largest": max(rows),
                "chosen": chosen,
                "held": held,
                "most": max(seen),
                "times_seen": len(seen),
                "closed": engine.held(),
                "traces": traces(),
                "whole": sum(p.numel() * p.element_size() for p in whole.parameters()),
                "layer": largest_layer(whole.model) * getattr(torch, dtype).itemsize,
            }
        )
    return results


def two_nodes(folder: Path, sizes: list[int], passes: list[int]) -> dict[str, Any]:
    """Groups of the ranks of pretended nodes, with so many forward passes each."""
    import torch

    from trainer.models.load import load_model

    worker = start()
    starts = np.cumsum([0, *sizes])
    node = int(np.searchsorted(starts, worker.rank, side="right")) - 1
    os.environ["NODE_RANK"] = str(node)
    log = Log()
    worker.hooks = log.hooks()
    nodes = worker.nodes()
    group = worker.split(nodes)
    group.emit("hello")
    engine = load(folder, "float32", group, [])
    whole = wrapper([])(load_model(folder, torch.float32).eval())
    errors = []
    for number in range(passes[node]):
        if number % 3 == 2:
            engine()  # other modules than before: DeepSpeed compares among the ranks
        given = batch(number, worker.rank, 160)
        with torch.no_grad():
            errors.append(float((engine(*given) - whole(*given)).abs().max()))
    result = {
        "nodes": nodes,
        "group": (group.rank, group.world),
        "errors": errors,
        "shared": group.share(worker.rank),
        "sum": group.sum([1.0, worker.rank]),
        "patient": group.sum([worker.rank], group.patient_group()),
        "gathered": group.gather(worker.rank),
        "events": len(log.events),
        "held": engine.held(),
    }
    group.barrier()
    worker.barrier()
    return result


def capture_all(jobs: list[tuple[Any, float | None]]) -> list[dict[str, Any]]:
    """Runs captures on two pretended nodes of two ranks, with so much memory per rank if given."""
    from trainer.teacher import teacher as module
    from trainer.teacher.capture import capture

    worker, results = start(), []
    os.environ["NODE_RANK"] = str(worker.rank // 2)
    own = module.memory_of
    for job, memory in jobs:
        module.memory_of = (lambda worker, memory=memory: memory) if memory else own
        log = Log()
        metrics = capture(job, replace(worker, hooks=log.hooks()))
        told = next((event for event in log.events if event["event"] == "teacher"), None)
        results.append({"metrics": metrics, "teacher": told})
    return results


@contextmanager
def peak(result: dict[str, float]) -> Any:
    """Puts the growth of this process's own memory at its highest, in bytes, into `result`."""

    def now() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) << 10

    base, stop = now(), threading.Event()
    result["peak"] = 0

    def watch() -> None:
        while not stop.is_set():
            result["peak"] = max(result["peak"], now() - base)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# The tests.

# Captures: the teacher, its dtype, how it is sharded, bytes of memory per rank.
CAPTURES: dict[str, tuple[str, str, str, float | None]] = {
    "whole": ("llama", "float32", "none", None),
    "nodes": ("llama", "float32", "zero3", None),
    "all": ("llama", "float32", "auto", 1.5e5),
    "whole-bf16": ("llama", "bfloat16", "none", None),
    "nodes-bf16": ("llama", "bfloat16", "zero3", None),
    "whole-moe": ("mixtral", "float32", "auto", None),
    "nodes-moe": ("mixtral", "float32", "auto", 1.65e6),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {kind: save_kind(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def compared(folders) -> dict[tuple[str, str], list[dict[str, Any]]]:
    ranks = spawn(same_as_whole, [(folders[kind], dtype) for kind, dtype in CASES], world=2)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_are_the_whole_teachers(compared, case) -> None:
    """Also of mixtures of experts whose ranks choose other experts, and other numbers of them."""
    for rank in compared[case]:
        assert rank["largest"] > 1
        assert max(rank["errors"]) <= (1e-6 if case[1] == "float32" else 1e-2) * rank["largest"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "old_moe"])
def test_the_ranks_did_choose_other_experts(compared, kind) -> None:
    first, second = (rank["chosen"] for rank in compared[kind, "float32"])
    assert len(first) == len(second) == 5 * SIZES["num_hidden_layers"]
    assert all(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_rank_holds_half_the_teacher_and_at_most_its_largest_layer(compared, case) -> None:
    for rank in compared[case]:
        assert rank["times_seen"] > 100
        assert rank["held"] == pytest.approx(rank["whole"] / 2, rel=0.01)
        # Shares of an odd number of elements are rounded up.
        assert rank["held"] < rank["most"] <= rank["whole"] / 2 + rank["layer"] + 1000
        assert rank["closed"] == 0 and rank["traces"] == []


def test_groups_of_two_nodes_go_their_own_ways(folders) -> None:
    """One makes seven forward passes, the other two; nobody waits for the other group."""
    ranks = spawn(two_nodes, folders["llama"], [2, 2], [7, 2], world=4)
    assert [len(rank["errors"]) for rank in ranks] == [7, 7, 2, 2]
    assert [rank["nodes"] for rank in ranks] == [[[0, 1], [2, 3]]] * 4
    assert [rank["group"] for rank in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [rank["shared"] for rank in ranks] == [0, 0, 2, 2]
    assert [rank["sum"] for rank in ranks] == [[2, 1], [2, 1], [2, 5], [2, 5]]
    assert [rank["patient"] for rank in ranks] == [[1], [1], [5], [5]]
    assert [rank["gathered"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["events"] for rank in ranks] == [1, 0, 0, 0]
    assert max(max(rank["errors"]) for rank in ranks) < 1e-4
    assert len({rank["held"] for rank in ranks}) == 1


def test_nodes_may_have_other_numbers_of_workers(folders) -> None:
    ranks = spawn(two_nodes, folders["mixtral"], [2, 1], [1, 3], world=3)
    assert [rank["group"] for rank in ranks] == [(0, 2), (1, 2), (0, 1)]
    assert [rank["gathered"] for rank in ranks] == [[0, 1], [0, 1], [2]]
    assert max(max(rank["errors"]) for rank in ranks) < 1e-4
    assert ranks[2]["held"] == pytest.approx(2 * ranks[0]["held"], rel=0.01)


@pytest.mark.parametrize(
    ("sharding", "told"),
    [
        ("auto", r"teacher.model: .* kB of weights do not fit 1 worker of 10 kB; give"),
        ("zero3", "teacher.sharding: zero3 needs at least 2 workers; set resources.capture"),
    ],
)
def test_one_worker_that_cannot_hold_or_share_a_teacher_is_refused(
    folders, monkeypatch, sharding, told
) -> None:
    import torch

    from trainer.spec.sections import TeacherSpec
    from trainer.teacher import teacher as module
    from trainer.worker import Worker

    monkeypatch.setattr(module, "memory_of", lambda worker: 1e4)
    spec = TeacherSpec(model=str(folders["llama"]), dtype="float32", sharding=sharding)
    alone = Worker(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=told) as caught:
        module.load_teacher(spec, 160, alone, lambda model: model)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def captures(tmp_path_factory) -> dict[str, Any]:
    """What each capture's main rank had to say, its records, and the bytes of its teacher."""
    from cluster.storage import open_store
    from trainer.logits.reader import CacheReader
    from trainer.spec.sections import CacheSpec, DistillSpec, TeacherSpec
    from trainer.teacher.job import Capture, wanted

    root = tmp_path_factory.mktemp("captures")
    store, data = open_store(root), data_spec(write_texts(root / "texts", documents=120))
    corpus = make_corpus(store.sub("corpus"), data)
    assert corpus.manifest["vocab_size"] == VOCAB
    for kind in ("llama", "mixtral"):
        save_model(root / kind, corpus.tokenizer_folder(), kind=kind, width=48)
    jobs = {
        name: Capture(
            teacher=TeacherSpec(model=str(root / kind), dtype=dtype, sharding=sharding),
            cache_spec=CacheSpec(method="topk", k=8),
            data=data,
            distill=DistillSpec(steps=4, tokens_per_step=8 * LENGTH),
            seed=3,
            batch_tokens=3 * LENGTH,
            shard_seconds=20.0,
            corpus=store.sub("corpus"),
            cache=store.sub("caches", name),
        )
        for name, (kind, dtype, sharding, _) in CAPTURES.items()
    }
    told = spawn(capture_all, [(job, CAPTURES[name][3]) for name, job in jobs.items()], world=4)[0]
    result = {}
    for (name, job), said in zip(jobs.items(), told, strict=True):
        records = []
        for kind, part, numbers in wanted(job, corpus):
            with CacheReader(job.cache, kind) as reader:
                records += [reader.read(part.keys[number].tobytes()) for number in numbers]
        result[name] = {**said, "records": records}
    return result


@pytest.mark.parametrize(
    ("sharded", "whole"),
    [
        ("nodes", "whole"),
        ("all", "whole"),
        ("nodes-bf16", "whole-bf16"),
        ("nodes-moe", "whole-moe"),
    ],
)
def test_a_sharded_capture_equals_the_replicated_one(captures, sharded, whole) -> None:
    """To the last bit on a CPU: the same arithmetic on batches of the same shape."""
    a, b = captures[sharded], captures[whole]
    assert a["metrics"]["sequences"] == b["metrics"]["sequences"] == len(a["records"]) > 40
    for one, other in zip(a["records"], b["records"], strict=True):
        for name in ("ids", "log_probs", "log_tails", "entropy", "true_log_prob"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_where_the_teacher_was_is_told(captures) -> None:
    def told(name: str) -> tuple[Any, ...]:
        event = captures[name]["teacher"]
        return event["sharding"], event["groups"], event["across_nodes"]

    alone, nodes = [[0], [1], [2], [3]], [[0, 1], [2, 3]]
    assert told("whole") == told("whole-moe") == ("none", alone, False)
    assert told("nodes") == told("nodes-bf16") == told("nodes-moe") == ("zero3", nodes, False)
    assert told("all") == ("zero3", [[0, 1, 2, 3]], True)
