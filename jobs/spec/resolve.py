"""What a spec's sweep leaves open: group sizes that divide the layers, and absolute paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.spec.job import JobSpec
from quant.quant_spec import CHANNEL, DYNAMIC, GroupSize, QuantSpec
from trainer.identity import Identities
from trainer.models.load import absolute

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINGLE = 64  # the group size of one model, where it fits


def resolve_group_sizes(spec: JobSpec, names: Identities) -> JobSpec:
    """The spec with `sweep.group_size: auto` replaced by sizes for all models of the grid.

    A spec whose models cannot be read or quantized is returned as it is: the sweep's checks report
    why. Raises ValueError, one line, where `sweep.exclude` leaves no cell.
    """
    sweep = spec.sweep
    if sweep is None or sweep.group_size != "auto":
        return spec
    try:
        widths = _widths_of_models(spec, names)
    except ValueError:
        return spec
    return spec.model_copy(update={"sweep": sweep.with_group_sizes(widths)})


def single_group_size(
    folder: Path, spec: QuantSpec, layers: Mapping[str, QuantSpec | None]
) -> GroupSize:
    """The group size of a model that is quantized without one being given: 64, or the largest
    below it that divides all its layers. Raises ValueError for a model that is none.

    spec, layers: how it is quantized, but for the size.
    """
    if spec.method == DYNAMIC:
        return spec.group_size
    from trainer.models.load import read_config

    whole = {
        name: None if own is None else replace(own, group_size=CHANNEL)
        for name, own in layers.items()
    }
    widths = _widths(read_config(folder), replace(spec, group_size=CHANNEL), whole)
    return next((size for size in (SINGLE, 32, 16) if not any(width % size for width in widths)), 8)


def _widths_of_models(spec: JobSpec, names: Identities) -> set[int]:
    """Input widths of all layers that the cells quantize. Raises ValueError."""
    sweep = spec.sweep
    assert sweep is not None
    widths: set[int] = set()
    for role in sweep.models:
        config = names.student_config if role == "student" else names.teacher_config
        assert config is not None
        embedding_choices = dict.fromkeys(
            (cell.embeddings, cell.head) for cell in sweep.cells(role)
        )
        for embeddings, head in embedding_choices:
            asked = QuantSpec(8, CHANNEL, "hqq", embeddings, head)
            widths |= _widths(config, asked, dict.fromkeys(sweep.keep_16bit))
    return widths


def _widths(
    config: PreTrainedConfig, spec: QuantSpec, layers: Mapping[str, QuantSpec | None]
) -> set[int]:
    from quant.targets import find_targets
    from trainer.models.load import meta_model

    targets = find_targets(meta_model(config), spec, layers or None)
    return {target.columns for target in targets.layers.values()}


def absolute_paths(spec: JobSpec) -> JobSpec:
    """The spec with its extra models and task folders named absolutely: workers run elsewhere."""
    sweep = spec.sweep
    if sweep is None or not (sweep.extra or sweep.tasks):
        return spec
    extra = [item.model_copy(update={"path": absolute(item.path)}) for item in sweep.extra]
    # The label is made of the path as it was written.
    extra = [
        item.model_copy(update={"name": before.label})
        for item, before in zip(extra, sweep.extra, strict=True)
    ]
    tasks = [
        task.model_copy(update={"folder": absolute(task.folder)}) if task.folder else task
        for task in sweep.tasks
    ]
    return spec.model_copy(
        update={"sweep": sweep.model_copy(update={"extra": extra, "tasks": tasks})}
    )
