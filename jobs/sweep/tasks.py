"""What the sweep's tasks do on their machines: evaluate, quantize, measure. Run by Ray.

Each publishes its own result, under the fence of its attempt, and returns it to the driver.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.kv import Report, silent
from cluster.storage import Attempt, Store
from cluster.storage.store import format_bytes
from jobs.sweep.progress import (
    EVALUATE,
    HEAD,
    LEARN,
    QUANTIZE_TOKENS,
    TASK_DOCUMENTS,
    TASK_TOKENS,
    Advance,
)
from jobs.sweep.shared import PARTS, SharedContext, Source
from quant.evaluation.memory_forecast import MemoryEstimate
from quant.grid import Cell
from quant.spec import ExtraModel
from trainer.models.load import find_model
from trainer.spec.sections import TeacherSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


def model_task(
    shared_context: SharedContext, source: Source, own_fingerprint: str, references: bool = False
) -> dict[str, Any]:
    """Evaluates a 16-bit model and publishes evaluations/<role>.json.

    references: cells are made of it, so its final hidden states are stored too, before that.
    """
    from quant.evaluation.baselines import evaluate_model

    store = shared_context.attempt.store
    with tempfile.TemporaryDirectory(prefix="stillhouse-reference-") as temporary:
        to_run = {
            part: f"{temporary}/{part}"
            for part in PARTS
            if references and not store.exists(f"{source.references}/{part}/meta.json")
        }
        advance = _model_advance(shared_context, to_run)
        result = evaluate_model(
            source.folder(),
            shared_context.part("report", advance=advance),
            shared_context.part("select", advance=advance),
            source.role,  # type: ignore[arg-type]
            source.name,
            config=shared_context.evaluation_config(advance),
            references=to_run,
        )
        for part, folder in to_run.items():
            upload(shared_context.attempt, Path(folder), f"{source.references}/{part}", "meta.json")
    result["fingerprint"] = own_fingerprint
    shared_context.attempt.write_json(f"evaluations/{source.role}.json", result)
    return result


def teacher_task(
    shared_context: SharedContext, name: str, teacher: TeacherSpec, own_fingerprint: str
) -> dict[str, Any]:
    """Evaluates the teacher from its records alone and publishes evaluations/teacher.json."""
    from quant.evaluation.baselines import evaluate_model

    advance = Advance(shared_context.report, _tasks(shared_context))
    result = evaluate_model(
        str(find_model("teacher.model", teacher.model, teacher.revision)),
        shared_context.part("report"),
        shared_context.part("select"),
        "teacher",
        name,
        config=shared_context.evaluation_config(advance),
    )
    result["fingerprint"] = own_fingerprint
    shared_context.attempt.write_json("evaluations/teacher.json", result)
    return result


def extra_task(
    shared_context: SharedContext, extra: ExtraModel, source: Source, own_fingerprint: str
) -> dict[str, Any]:
    """Evaluates a model quantized elsewhere and publishes evaluations/extra-<name>.json."""
    from quant.evaluation.baselines import evaluate_extra

    work = _evaluations(shared_context, EVALUATE) | _tasks(shared_context)
    advance = Advance(shared_context.report, work)
    result = evaluate_extra(
        str(find_model("sweep.extra", extra.path)),
        source.folder(),
        shared_context.part("report", source, advance),
        shared_context.part("select", source, advance),
        extra.label,
        config=shared_context.evaluation_config(advance),
        reference_tasks=_reference_tasks(shared_context, source),
    )
    result["fingerprint"] = own_fingerprint
    shared_context.attempt.write_json(f"evaluations/extra-{extra.label}.json", result)
    return result


def cell_task(
    shared_context: SharedContext,
    cell: Cell,
    own_fingerprint: str,
    source: Source,
    need: MemoryEstimate,
) -> dict[str, Any]:
    """One cell: quantizes, publishes the model, evaluates it, publishes its result.json.

    A model that an earlier start of the same cell has published is not made again. need: what it
    is estimated to take. Raises MemoryError, with the numbers, where the GPU has less.
    """
    from quant.evaluation.cell import run_cell
    from trainer.corpus.tokenizer import copy_tokenizer

    began = time.perf_counter()
    _check_gpu(shared_context, need)
    folder = Path(source.folder())
    store = shared_context.attempt.store
    before = made_before(store, cell.key, own_fingerprint)
    advance = _cell_advance(shared_context, cell, quantized=before is not None)
    recover = None
    if cell.recovered:
        recover = partial(_recover, shared_context, source, advance)
    with tempfile.TemporaryDirectory(prefix="stillhouse-cell-") as temporary:

        def publish(made: dict[str, Any]) -> None:
            copy_tokenizer(folder, Path(temporary))
            found = {**made, "seconds": time.perf_counter() - began}
            publish_made(shared_context.attempt, Path(temporary), cell.key, own_fingerprint, found)

        out = temporary
        if before is not None:
            out = str(store.fetch_folder(f"cells/{cell.key}/model"))
        result = run_cell(
            cell,
            str(folder),
            shared_context.part("report", source, advance),
            shared_context.part("select", source, advance),
            out,
            config=shared_context.evaluation_config(advance),
            keep_16bit=shared_context.sweep.keep_16bit,
            recover=recover,
            reference_tasks=_reference_tasks(shared_context, source),
            progress=advance.quantized,
            made=before,
            on_saved=publish,
        )
    seconds = time.perf_counter() - began + (0.0 if before is None else before["seconds"])
    result |= {
        "fingerprint": own_fingerprint,
        "model_kept": True,
        "predicted_memory_bytes": need.device or need.host,
        "cell_s": seconds,
        "device": "gpu" if shared_context.gpus else "cpu",
        "device_hours": seconds * (shared_context.gpus or shared_context.threads) / 3600,
    }
    shared_context.attempt.write_json(f"cells/{cell.key}/result.json", result)
    _forget_made(store, cell.key)
    return result


def made_path(key: str) -> str:
    """Where it says that a cell's model is whole, while the cell has no result yet."""
    return f"cells/{key}/made.json"


def made_before(store: Store, key: str, own_fingerprint: str) -> dict[str, Any] | None:
    """What an earlier start of the cell of this fingerprint has made and published, if it has."""
    path = made_path(key)
    if not store.exists(path) or not store.exists(f"cells/{key}/model/config.json"):
        return None
    found: dict[str, Any] = store.read_json(path)
    return found if found.get("fingerprint") == own_fingerprint else None


def publish_made(
    attempt: Attempt, folder: Path, key: str, own_fingerprint: str, made: dict[str, Any]
) -> None:
    """Publishes a cell's model, in the place of one that was there, and then says so."""
    attempt.fence()
    _forget_made(attempt.store, key)  # the model is replaced now
    upload(attempt, folder, f"cells/{key}/model")
    attempt.write_json(made_path(key), {**made, "fingerprint": own_fingerprint})


def _forget_made(store: Store, key: str) -> None:
    if store.exists(made_path(key)):
        store.delete(made_path(key))


def _evaluations(shared_context: SharedContext, weight: float) -> dict[str, float]:
    """The phases of an evaluation, as `Advance` has them."""
    return {f"evaluation/{part}": weight * shared_context.sequences(part) for part in PARTS}


def _tasks(shared_context: SharedContext) -> dict[str, float]:
    """The benchmark tasks as a phase, if there are any."""
    documents = sum(task.limit or TASK_DOCUMENTS for task in shared_context.sweep.tasks)
    return {"tasks": documents * TASK_TOKENS / shared_context.sequence_length} if documents else {}


def _model_advance(shared_context: SharedContext, references: Iterable[str]) -> Advance:
    work = {f"reference/{part}": float(shared_context.sequences(part)) for part in references}
    evaluations = _evaluations(shared_context, HEAD if work else EVALUATE)
    return Advance(shared_context.report, work | evaluations | _tasks(shared_context))


def _cell_advance(shared_context: SharedContext, cell: Cell, quantized: bool) -> Advance:
    work: dict[str, float] = {}
    if not quantized:
        work["quantize"] = QUANTIZE_TOKENS / shared_context.sequence_length
        if cell.recovered and (learn := shared_context.sweep.recover) is not None:
            work["recover"] = LEARN * learn.steps * learn.batch_sequences
    return Advance(
        shared_context.report,
        work | _evaluations(shared_context, EVALUATE) | _tasks(shared_context),
    )


def _recover(
    shared_context: SharedContext, source: Source, advance: Advance, model: PreTrainedModel
) -> dict[str, Any]:
    """Trains the scales of a quantized model; see `quant.recovery.recover`."""
    from quant.recovery.recover import recover

    assert shared_context.sweep.recover is not None
    return recover(
        model,
        shared_context.sweep.recover,
        corpus=shared_context.corpus,
        cache=shared_context.cache,
        cache_spec=shared_context.cache_spec,
        data=shared_context.data,
        distill=shared_context.distill,
        select=shared_context.part("select", source),
        reference_folder=source.folder(),
        vocab=shared_context.vocab,
        seed=shared_context.seed,
        threads=shared_context.threads,
        device=shared_context.device,
        progress=advance.steps,
    )


def _check_gpu(shared_context: SharedContext, need: MemoryEstimate) -> None:
    """Raise MemoryError unless the GPU can hold the cell: better now than in its middle."""
    if not shared_context.gpus:
        return
    import torch

    _, total = torch.cuda.mem_get_info()
    if need.device > total:
        raise MemoryError(
            f"needs about {need} on the GPU, which has {format_bytes(total)}; set "
            "sweep.batch_sequences lower, or give it a larger GPU"
        )


def _reference_tasks(shared_context: SharedContext, source: Source) -> dict[str, Any] | None:
    """What the 16-bit model answers in the benchmark tasks."""
    if not shared_context.sweep.tasks:
        return None
    found = shared_context.attempt.store.read_json(f"evaluations/{source.role}.json")
    tasks: dict[str, Any] | None = found.get("tasks")
    return tasks


def upload(attempt: Attempt, folder: Path, place: str, last: str | None = None) -> None:
    """Uploads a folder. What an earlier version had left there under other names goes: programs
    that look for those names would take it for theirs. The file `last` comes last."""
    if last is None:
        attempt.upload_folder(folder, place)
    else:
        _upload_in_order(attempt, folder, place, last)
    for name in attempt.store.sizes(place).keys() - {path.name for path in folder.iterdir()}:
        attempt.store.delete(f"{place}/{name}")


def _upload_in_order(attempt: Attempt, folder: Path, place: str, last: str) -> None:
    with tempfile.TemporaryDirectory(prefix="stillhouse-last-", dir=folder.parent) as aside:
        held = Path(aside) / last
        (folder / last).rename(held)
        attempt.upload_folder(folder, place)
        attempt.write_bytes(f"{place}/{last}", held.read_bytes())
        held.rename(folder / last)


def speed_task(
    shared_context: SharedContext,
    keys: Sequence[str],
    source: Source,
    gpu_type: str,
) -> dict[str, str]:
    """Measures finished cells of one 16-bit model against it, one after the other, and adds each
    speed to its cell's result.json at once.

    A cell that has a speed already, from a process that was lost, is not measured again. gpu_type:
    of the node, as Ray calls it, "" without a GPU. Returns the errors, by cell.
    """
    shared_context.report(0.0, keys[0])
    import torch

    from quant.evaluation.cell import measure_cell
    from quant.evaluation.speed import load_baseline

    store, sweep = shared_context.attempt.store, shared_context.sweep
    tokens = sweep.speed_prompt_tokens, sweep.speed_decode_tokens
    torch.set_num_threads(shared_context.speed_threads)
    baseline = load_baseline(source.folder(), shared_context.device, *tokens)
    errors: dict[str, str] = {}
    for number, key in enumerate(keys):
        shared_context.report(number / len(keys), key)
        path = f"cells/{key}/result.json"
        if has_speed(store.read_json(path), gpu_type):
            continue
        try:
            folder = store.fetch_folder(f"cells/{key}/model")
            notify = partial(_share, shared_context.report, number, len(keys), key)
            speeds = measure_cell(str(folder), baseline, *tokens, notify=notify)
        except Exception as error:  # of this cell alone
            traceback.print_exc()
            errors[key] = " ".join(str(error).split()) or type(error).__name__
            continue
        speeds["gpu_type"] = gpu_type
        shared_context.attempt.write_json(path, {**store.read_json(path), **speeds})
    return errors


def _share(report: Report, number: int, count: int, key: str, done: float) -> None:
    """Reports a task that is at the share `done` of its cell `number` of `count`."""
    report((number + done) / count, key)


def has_speed(result: Mapping[str, Any], gpu_type: str) -> bool:
    """Whether a cell's result has speeds, measured on a GPU of this type, "" on a processor."""
    measured = result.get("decode_tokens_per_s") is not None
    return measured and (result.get("gpu_type") or "") == gpu_type


def call(function: Callable[..., T], arguments: tuple[Any, ...], report: Report = silent) -> T:
    """What the fan-out runs: one of these tasks, whose first argument is the material."""
    shared_context, *others = arguments
    return function(replace(shared_context, report=report), *others)
