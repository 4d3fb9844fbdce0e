"""What the tasks of a sweep take of the cluster: CPUs, GPUs, memory, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.capacity import NotEnough, fit_task
from cluster.resources import ResourceRequest
from cluster.session import Cluster
from cluster.spec import CellResources
from jobs.errors import SpecErrors
from jobs.forecast.stage_memory import GPU_WEIGHTS
from jobs.run.context import Context
from jobs.sweep.shared import Source
from quant.evaluation.memory_forecast import MemoryEstimate
from quant.grid import Cell
from quant.spec import SweepSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A pass of a model of fewer weights gains little from more than one core.
SPREAD_WEIGHTS = 10_000_000
RECOVERY = 10.0  # times as long as the cell alone, for the order of tasks


@dataclass
class CellRequests:
    """Needs of this sweep's tasks. limit_s: seconds that one may run. slots: tasks at once."""

    sweep: SweepSpec
    asked: CellResources
    cluster: Cluster
    sequence_length: int
    cpus: int
    gpus: float
    models: dict[str, Any]  # by role, without weights

    @staticmethod
    def of(context: Context, sources: dict[str, Source]) -> CellRequests:
        """Those of a run on its cluster. Raises SpecErrors if no cell could ever start."""
        from quant.artifact.sizes import parameter_count

        spec = context.spec
        assert spec.sweep is not None and spec.data is not None
        asked = spec.resources.sweep
        models: dict[str, Any] = {role: _model(sources[role]) for role in spec.sweep.models}
        weights = max(parameter_count(model) for model in models.values())
        try:
            cpus, gpus = fit_task(asked, context.cluster, wants_gpu=weights >= GPU_WEIGHTS)
        except NotEnough as error:
            raise SpecErrors([str(error)]) from error
        length = spec.data.sequence_length
        return CellRequests(spec.sweep, asked, context.cluster, length, cpus, gpus, models)

    @property
    def limit_s(self) -> float:
        return 60.0 * self.asked.minutes_per_cell

    @property
    def slots(self) -> int:
        return self.cluster.capacity(self.cpus, self.gpus)

    def task(self) -> ResourceRequest:
        """A task that needs no memory worth mentioning."""
        return ResourceRequest(self.cpus, self.gpus)

    def cell(self, cell: Cell, source: Source) -> ResourceRequest:
        """A cell's."""
        return ResourceRequest(self.cpus, self.gpus, self._memory(cell, source))

    def model(self, source: Source) -> ResourceRequest:
        """A task's that evaluates a 16-bit model, or quantizes single layers of it."""
        return ResourceRequest(self.cpus, self.gpus, self._memory(None, source))

    def reference(self, source: Source) -> ResourceRequest:
        """A task's that evaluates a 16-bit model while all cells of it wait: of a large model it
        has all CPUs of a machine, unless the spec says how many."""
        cpus = self.cpus
        large = self.model_cost(source) >= SPREAD_WEIGHTS
        if large and not self.gpus and self.asked.cpus_per_cell == "auto":
            cpus = max(cpus for cpus, _ in self.cluster.nodes)
        return replace(self.model(source), cpus=cpus)

    def _memory(self, cell: Cell | None, source: Source) -> int:
        if self.asked.memory_gb_per_cell != "auto":
            return int(self.asked.memory_gb_per_cell * 1e9)
        return self.forecast(cell, source).host

    def forecast(self, cell: Cell | None, source: Source) -> MemoryEstimate:
        """What a cell takes; of evaluating the 16-bit model where there is no cell."""
        from quant.evaluation.memory import cell_memory

        kept = dict.fromkeys(self.sweep.keep_16bit)
        return cell_memory(
            self.meta(source),
            None if cell is None else cell.spec,
            self.sweep.batch_sequences,
            self.sequence_length,
            kept if cell is None else {**cell.layers, **kept},
            cuda=self.gpus > 0,
            training=cell is not None and cell.recovered,
            tasks=bool(self.sweep.tasks),
        )

    def meta(self, source: Source) -> PreTrainedModel:
        """The model of a source, without weights."""
        if source.role not in self.models:
            self.models[source.role] = _model(source)
        return self.models[source.role]

    def model_cost(self, source: Source) -> float:
        """How long a task takes that evaluates a 16-bit model, or tries an allocation of it."""
        from quant.artifact.sizes import parameter_count

        return float(parameter_count(self.meta(source)))

    def cost(self, cell: Cell, source: Source) -> float:
        """How long a cell takes beside others, roughly: the longest go first."""
        return self.model_cost(source) * (RECOVERY if cell.recovered else 1.0)

    def exclusive(self, measured: Collection[str] = ()) -> tuple[ResourceRequest, int]:
        """What a task takes that is to be alone on its machine, and how many machines there are.

        On GPUs all are of one type, so that their speeds can be compared: of `measured`, those of
        speeds that there are, where the cluster has one of these, else the most frequent.
        """
        types = self.cluster.gpu_types or ("",) * len(self.cluster.nodes)
        nodes = [
            (node, kind)
            for node, kind in zip(self.cluster.nodes, types, strict=True)
            if node[1] >= self.gpus
        ]
        chosen = _gpu_type([kind for _, kind in nodes], measured) if self.gpus else ""
        alike = [cpus for (cpus, _), kind in nodes if not self.gpus or kind == chosen]
        most = max(alike, default=self.cpus)
        gpus = 1 if self.gpus else 0
        machines = min(alike.count(most), self.cluster.machines)
        return ResourceRequest(float(most), gpus, gpu_type=chosen), max(1, machines)


def _gpu_type(there: Sequence[str], measured: Collection[str]) -> str:
    """The type of GPUs on which speeds are measured."""
    counts = Counter(kind for kind in there if kind)
    known = {kind: count for kind, count in counts.items() if kind in measured} or counts
    return max(known, key=lambda kind: (known[kind], kind), default="")


def _model(source: Source) -> PreTrainedModel:
    from trainer.models.load import meta_model, read_config

    return meta_model(read_config(source.config_folder()))
