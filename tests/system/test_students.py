"""Students of every kind on real process groups: families, adapters, slices, ZeRO-Offload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import (
    config_values,
    data_spec,
    load_plain,
    log_softmax,
    make_corpus,
    plain_cache,
    plain_logits,
    save_model,
    write_texts,
)
from tests.fixtures.students import KEPT, STEPS, STOP_AT, Seen, World, deepen, run

LORA_RATE = 5e-2  # four steps from zero
BEST_RATE = 0.2  # too high: the last weights are not the best
FAMILIES = ("llama", "qwen3", "gemma", "gpt2", "mistral")
OFFLOADED = ((1, "bfloat16"), (2, "float32"), (3, "bfloat16"))
ADAPTED = ((1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16"))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    from cluster.storage import open_store
    from trainer.spec.sections import CacheSpec

    root = tmp_path_factory.mktemp("students")
    data = data_spec(write_texts(root / "texts", documents=120))
    store = open_store(root)
    corpus = make_corpus(store.sub("corpus"), data)
    tokenizer = corpus.tokenizer_folder()
    save_model(root / "llama", tokenizer, kind="llama")
    save_model(root / "gpt2", tokenizer, kind="gpt2")
    teacher = save_model(root / "teacher", tokenizer, kind="qwen3", width=48)
    deepen(teacher, layers=5)
    plain_cache(
        store.sub("cache"), load_plain(teacher), corpus, CacheSpec(**KEPT), by_document=True
    )
    return World(root, data, corpus)


def family_config(kind: str) -> dict[str, Any]:
    more = {"qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8}, "mistral": {"sliding_window": 8}}
    return {**config_values(kind), **more.get(kind, {})}


def lora(world: World, base: str, **more: Any) -> dict[str, Any]:
    return {"model": world.model(base), "lora": {"r": 4, "alpha": 16, **more}}


@pytest.fixture(scope="module")
def alone(world) -> dict[str, Seen]:
    """Families on one rank: at a stretch, and stopped and resumed."""
    jobs = {}
    for kind in FAMILIES:
        student = {"config": family_config(kind), "init": "random"}
        jobs[kind] = (world.job(kind, student), None)
        jobs[f"{kind}-stopped"] = (world.job(f"{kind}-stopped", student), STOP_AT)
    student = {"init": "slice", "layers": 3}
    jobs["slice"] = (world.job("slice-1", student), None)
    jobs["lora"] = (world.job("lora-1", lora(world, "llama"), learning_rate=LORA_RATE), None)
    (results,) = run(jobs, 1)
    return results


@pytest.fixture(scope="module")
def two(world) -> list[dict[str, Seen]]:
    """By rank: adapters, slices and offload on two ranks."""
    jobs: dict[str, tuple[Any, int | None]] = {}
    new = {"config": family_config("llama"), "init": "random"}
    for stage, dtype in OFFLOADED:
        for offload in ("none", "cpu"):
            name = f"{offload}-{stage}-{dtype}"
            job = world.job(name, new, offload=offload, zero_stage=stage, dtype=dtype)
            jobs[name] = (job, None)
    for stage, dtype in ADAPTED:
        name = f"lora-{stage}-{dtype}"
        more = {"zero_stage": stage, "dtype": dtype, "learning_rate": LORA_RATE}
        job = world.job(name, lora(world, "llama"), **more)
        jobs[name] = (job, None)
    for name, student, more in (
        ("cpu-3", new, {"offload": "cpu"}),
        ("lora-3", lora(world, "llama", dropout=0.1), {"activation_checkpointing": True}),
        ("slice-3", {"init": "slice", "layers": 3}, {"dtype": "bfloat16"}),
    ):
        for suffix, stop in (("", None), ("-stopped", STOP_AT)):
            job = world.job(f"{name}-x{suffix}", student, zero_stage=3, **more)
            jobs[f"{name}-x{suffix}"] = (job, stop)
    jobs["lora-gpt2"] = (world.job("lora-gpt2", lora(world, "gpt2")), None)
    sliced = {"init": "slice", "layers": 2, "lora": {"targets": ["q_proj", "down_proj"]}}
    jobs["lora-slice"] = (world.job("lora-slice", sliced, zero_stage=3), None)
    rate = {"learning_rate": BEST_RATE, "schedule": "constant", "warmup_ratio": 0.0}
    best = world.job("lora-best", lora(world, "llama"), zero_stage=3, evaluate_steps=1, **rate)
    jobs["lora-best"] = (best, None)
    overlay = {"zero_optimization": {"reduce_bucket_size": 10_000}, "wall_clock_breakdown": True}
    jobs["overlay"] = (world.job("overlay", new, deepspeed=overlay), None)
    return run(jobs, 2)


def report_logits(world: World, folder: str | Path, dtype: str = "float32") -> np.ndarray:
    """Logits [tokens, vocab] of the same sequences by stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return forward(world, model)


def forward(world: World, model: Any) -> np.ndarray:
    import torch

    batch = world.corpus.part("report").batch(np.arange(3))
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            use_cache=False,
        ).logits
    return logits.flatten(0, 1).float().numpy()


def stopped_is_whole(seen: dict[str, Seen], name: str) -> None:
    whole, parts = seen[name], seen[f"{name}-stopped"]
    assert parts.told.first("resume")["step"] == STOP_AT
    assert parts.told.losses() == whole.told.losses()
    assert len(set(whole.told.losses())) == STEPS
    assert whole.told.metrics and parts.told.metrics
    for key in ("select_ce", "select_forward_kl"):
        assert parts.told.metrics[key].hex() == whole.told.metrics[key].hex()
    np.testing.assert_array_equal(parts.logits, whole.logits)


# Families.


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_distilled_resumed_and_saved(world, alone, kind) -> None:
    stopped_is_whole(alone, kind)
    seen = alone[kind]
    values = seen.told.values()
    assert values[-1] < values[0]
    np.testing.assert_allclose(
        report_logits(world, world.root / "students" / kind), seen.logits, atol=1e-4
    )


# Adapters.


@pytest.mark.parametrize("stage, dtype", ADAPTED)
def test_adapters_and_nothing_else_are_trained(two, stage, dtype) -> None:
    seen = two[0][f"lora-{stage}-{dtype}"]
    assert seen.trained and all(".lora_" in name for name in seen.trained)
    assert len(seen.trained) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks
    # The head is tied to the embeddings and has none.
    assert set(seen.state) == {name.removeprefix("model.") for name in seen.trained}
    changed = [
        name for name in seen.state if not np.array_equal(seen.state[name], seen.start[name])
    ]
    assert len(changed) == len(seen.state)
    assert all(not seen.start[name].any() for name in seen.state if ".lora_B." in name)
    assert set(seen.moments) == {"cpu torch.float32"}


def test_the_stages_draw_and_train_the_same_adapters(alone, two) -> None:
    single = alone["lora"]
    for stage, dtype in ADAPTED:
        for rank in two:
            seen = rank[f"lora-{stage}-{dtype}"]
            for name, value in seen.start.items():
                whole = single.start[name]
                np.testing.assert_array_equal(value, whole if dtype == "float32" else low(whole))
        seen = two[0][f"lora-{stage}-{dtype}"]
        near = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(seen.told.values(), single.told.values(), rtol=near)
    assert single.told.values()[-1] < single.told.values()[0] - 0.1


@pytest.mark.parametrize("name", [f"lora-{stage}-{dtype}" for stage, dtype in ADAPTED])
def test_the_merged_folder_is_the_trained_model(world, two, name) -> None:
    seen = two[0][name]
    dtype = name.rpartition("-")[2]
    found = report_logits(world, seen.folder, dtype)
    if dtype == "float32":
        np.testing.assert_allclose(found, seen.logits, atol=1e-4)
    else:  # both compute in bfloat16, on weights that are rounded at other places
        scale = np.abs(seen.logits).max()
        assert np.abs(found - seen.logits).max() < 0.1 * scale
        assert np.abs(found - seen.logits).mean() < 0.01 * scale
    base = report_logits(world, world.root / "llama", dtype)
    assert np.abs(base - seen.logits).max() > 0.1 * np.abs(seen.logits).max()
    names = {path.name for path in Path(seen.folder).iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "adapter"} <= names


@pytest.mark.parametrize(
    "name, base", [("lora-2-float32", "llama"), ("lora-3-float32", "llama"), ("lora-gpt2", "gpt2")]
)
def test_the_adapter_folder_is_peft_s(world, two, name, base) -> None:
    from peft import PeftModel

    seen = two[0][name]
    folder = Path(seen.folder) / "adapter"
    model = PeftModel.from_pretrained(load_plain(world.root / base), folder)
    np.testing.assert_allclose(forward(world, model.eval()), seen.logits, atol=1e-4)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == world.model(base)
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (4, 16, True)
    np.testing.assert_allclose(report_logits(world, seen.folder), seen.logits, atol=1e-4)


def test_the_best_adapters_are_published_and_the_last_lie_beside_them(world, two) -> None:
    from peft import PeftModel

    seen = two[0]["lora-best"]
    told = [event for event in seen.told.events if event["event"] == "evaluation"]
    curve = {event["step"]: event["select_forward_kl"] for event in told}
    best = min(curve, key=curve.__getitem__)
    assert len(curve) == STEPS and best < STEPS  # else this test tells nothing
    assert seen.told.metrics["best_step"] == best
    lastly = world.root / "last" / "lora-best"
    last = report_logits(world, lastly)
    np.testing.assert_allclose(last, seen.logits, atol=1e-3 * np.abs(last).max())
    adapter = Path(seen.folder) / "adapter"
    model = PeftModel.from_pretrained(load_plain(world.root / "llama"), adapter).eval()
    found = report_logits(world, seen.folder)
    np.testing.assert_allclose(forward(world, model), found, atol=1e-3 * np.abs(found).max())
    part = world.corpus.part("select")
    batch = part.batch(np.arange(len(part)))
    for folder, key in ((seen.folder, "select_ce"), (lastly, "last_select_ce")):
        log_q = log_softmax(plain_logits(load_plain(folder), batch, by_document=True))
        truth = -np.take_along_axis(log_q[:, :-1], batch.input_ids[:, 1:, None], -1)[..., 0]
        mask = batch.loss_mask[:, :-1] == 1
        assert seen.told.metrics[key] == pytest.approx(truth[mask].mean(), rel=1e-3)


def low(value: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16."""
    import torch

    return torch.from_numpy(value).bfloat16().float().numpy()


@pytest.mark.parametrize("name", ["lora-3-x", "slice-3-x", "cpu-3-x"])
def test_they_are_resumed_to_the_last_bit(two, name) -> None:
    stopped_is_whole(two[0], name)


# Slices.


def test_a_slice_starts_from_the_teachers_own_layers(world, alone, two) -> None:
    teacher = dict(load_plain(world.root / "teacher").named_parameters())
    for seen in (alone["slice"], two[0]["slice-3-x"]):
        assert sum(name.endswith("q_proj.weight") for name in seen.start) == 3
        for name, value in seen.start.items():
            for new, old in ((0, 0), (1, 2), (2, 4)):
                if name.startswith(f"model.layers.{new}."):
                    other = name.replace(f".{new}.", f".{old}.")
                    break
            else:
                other = name
            expected = teacher[other].detach().numpy()
            wanted = expected if seen is alone["slice"] else low(expected)
            np.testing.assert_array_equal(value, wanted, name)


def test_a_trained_slice_is_a_model_of_its_own(world, alone, two) -> None:
    values = alone["slice"].told.values()
    assert values[-1] < values[0] - 0.05
    folder = world.root / "students" / "slice-1"
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["layer_types"] == ["full_attention"] * 3  # layers 0, 2 and 4 of the teacher
    np.testing.assert_allclose(report_logits(world, folder), alone["slice"].logits, atol=1e-4)
    adapted = two[0]["lora-slice"]
    assert {name.split(".")[-4] for name in adapted.trained} == {"q_proj", "down_proj"}
    assert not (Path(adapted.folder) / "adapter").exists()  # nobody else has what is under it
    np.testing.assert_allclose(report_logits(world, adapted.folder), adapted.logits, atol=1e-4)


# Offload and DeepSpeed's settings.


@pytest.mark.parametrize("stage, dtype", OFFLOADED)
def test_offload_trains_as_without_it(two, stage, dtype) -> None:
    plain, moved = (two[0][f"{offload}-{stage}-{dtype}"] for offload in ("none", "cpu"))
    np.testing.assert_allclose(moved.told.values(), plain.told.values(), rtol=1e-5)
    assert set(moved.moments) == {"cpu torch.float32"}
    assert plain.told.values()[-1] < plain.told.values()[0]


def test_settings_that_change_no_result_change_none(two) -> None:
    plain, overlaid = two[0]["none-2-float32"], two[0]["overlay"]
    np.testing.assert_allclose(overlaid.told.values(), plain.told.values(), rtol=1e-5)
