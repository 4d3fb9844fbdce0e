"""Faults of a sweep that only models and files can tell; looked for before Ray starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from jobs.run.inputs import ResolvedJob
from quant.quant_spec import CHANNEL, QuantSpec
from quant.spec import SweepSpec
from trainer.checks import faults_in, has_student, world_faults
from trainer.identity import Identities
from trainer.models.load import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def sweep_faults(job: ResolvedJob) -> list[str]:
    """One line per fault of what the sweep names: models, layers, group sizes, tasks."""
    spec, found = job.spec, job.names
    assert spec.sweep is not None
    faults = world_faults(spec, found, ["sweep"])
    if has_student(spec, found):
        configs = {"student": found.student_config}
        if found.teacher_config is not None:
            configs["teacher"] = found.teacher_config
        for role in spec.sweep.models:
            more = _model_faults(spec.sweep, configs[role], role)
            faults += [line for line in more if line not in faults]
    if not faults:  # what follows reads files, which takes a moment
        faults += _extra_faults(spec.sweep, found)
        faults += _task_faults(spec.sweep)
    return faults


def _model_faults(sweep: SweepSpec, config: PreTrainedConfig, role: str) -> list[str]:
    """What a model cannot be quantized with: its layers, its two ends, the group sizes."""
    from quant.targets import check_group_size, find_targets
    from trainer.models.load import meta_model

    model, kept = meta_model(config), dict.fromkeys(sweep.keep_16bit)
    find = partial(_in_keys, find_targets, model)
    faults = faults_in(partial(find, QuantSpec(8, CHANNEL), kept), "sweep")
    cells = sweep.cells(role)
    for table, head in dict.fromkeys((cell.embeddings, cell.head) for cell in cells):
        if faults or not (table or head):
            continue
        embedding_choices = QuantSpec(8, CHANNEL, "hqq", table, head)
        key = "sweep.embeddings" if table else "sweep.head"
        more = faults_in(partial(find, embedding_choices, kept), key)
        if more and len(sweep.embedding_choices) > 1:
            asked = f"{{embeddings: {str(table).lower()}, head: {str(head).lower()}}}"
            more = [f"{line}; or sweep.exclude: [{asked}]" for line in more]
        faults += more
    if faults:
        return faults  # what follows would only repeat them
    for size, table, head in dict.fromkeys(
        (cell.group_size, cell.embeddings, cell.head) for cell in cells
    ):
        check = partial(_in_keys, check_group_size, model, [size], table, head, kept)
        faults += [line for line in faults_in(check, "sweep.group_size") if line not in faults]
    return faults


def _in_keys(check: Callable[..., object], *arguments: object) -> None:
    """`check` of `arguments`, whose faults name the key that becomes its `layers`."""
    from quant.unsupported import LayersError

    key = "sweep.keep_16bit:"
    try:
        check(*arguments)
    except LayersError as error:
        line = error.line(f"{key} {error.pattern!r}", f"{key} {list(error.keep)}")
        raise ValueError(line) from error


def _extra_faults(sweep: SweepSpec, found: Identities) -> list[str]:
    """Models quantized elsewhere must be there, and have the ids of the corpus."""
    from trainer.corpus.tokenizer import check_same_vocabulary

    faults = []
    for number, extra in enumerate(sweep.extra):
        key = f"sweep.extra.{number}.path"
        look = partial(find_model, key, extra.path)
        more = faults_in(look, key)
        if not more and found.tokenizer_folder is not None:
            folder = look()
            if any(folder.glob("tokenizer*")):
                check = partial(check_same_vocabulary, found.tokenizer_folder, folder)
                more = faults_in(check, key)
        faults += more
    return faults


def _task_faults(sweep: SweepSpec) -> list[str]:
    """Benchmark tasks must be there, and so must lm-eval."""
    if not sweep.tasks:
        return []
    from quant.evaluation.lm_eval import check_tasks

    return check_tasks(sweep.tasks)
