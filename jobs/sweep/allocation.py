"""Allocated cells, from the driver's side: which tasks come next, and what they decide.

Layers are quantized one at a time and their KL measured on `select` (sensitivities); a knapsack
proposes allocations within each budget; the best few are measured whole on `select`, then their
neighbours; the best of all becomes a cell, and uniform cells of its size stand beside it.
Decisions are kept in the run (`allocations/`), so that they are made once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.fanout import Failure
from cluster.storage.keys import fingerprint
from jobs.run.inputs import Outputs
from jobs.sweep.fingerprints import common
from jobs.sweep.progress import EVALUATE, QUANTIZE_TOKENS, Advance
from jobs.sweep.resources import CellRequests
from jobs.sweep.shared import SharedContext, Source
from quant.grid import Cell, allocated_keys, uniform
from quant.quant_spec import BITS, CHANNEL, DYNAMIC, QuantSpec
from quant.spec import SweepSpec

# Part of every decision's fingerprint: raise it when the same inputs would be decided otherwise.
VERSION = 1
CANDIDATES = 4  # measured whole, of each budget
NEIGHBOURS = 4  # of the best of them, measured in each round
ROUNDS = 2
Item = tuple[str, Any, tuple[Any, ...]]  # key of a task, its function, and arguments


@dataclass
class _Budget:
    """One budget at work: allocations being measured, and the best so far."""

    key: str
    bytes: int
    waiting: set[str] = field(default_factory=set)
    tried: dict[str, Any] = field(default_factory=dict)  # by task: the allocation
    measured: list[tuple[float, str]] = field(default_factory=list)
    latest: set[str] = field(default_factory=set)  # of `tried`: the last round's
    rounds: int = 0


class Allocations:
    """The allocated cells of a sweep."""

    def __init__(
        self,
        sweep: SweepSpec,
        shared_context: SharedContext,
        source: Source,
        needs: CellRequests,
        outputs: Outputs,
    ) -> None:
        self.sweep, self.shared_context, self.source, self.needs = (
            sweep,
            shared_context,
            source,
            needs,
        )
        self.keys = allocated_keys(sweep)
        self.base = QuantSpec(
            min(sweep.bits),
            next((size for size in sweep.group_sizes if size != CHANNEL), CHANNEL),
            next((method for method in sweep.methods if method != DYNAMIC), "hqq"),
            any(table for table, _ in sweep.embedding_choices),
            any(head for _, head in sweep.embedding_choices),
        )
        self.inputs = {
            **common(sweep, outputs),
            "version": VERSION,
            "model": source.identity,
            "base": self.base.to_dict(),
            "bits": sorted(sweep.bits),
            "group_size": sorted(map(str, sweep.group_sizes)),
            "keep_16bit": sorted(set(sweep.keep_16bit)),
        }
        self.inputs.pop("tasks", None)  # nothing is decided on them
        self.losses: dict[tuple[str, str], dict[str, Any]] = {}
        self.pieces: set[str] = set()
        self.budgets: dict[str, _Budget] = {}
        self.decided: set[str] = set()
        self.failures: list[tuple[str, str]] = []

    # What is known already.

    def known(self) -> list[Cell]:
        """The cells of decisions that an earlier attempt took."""
        cells = []
        for key in self.keys:
            found = self._read(f"allocations/{key}.json", self._fingerprint(key))
            if found is not None:
                self.decided.add(key)
                cells += self._cells(key, found["layers"], found["controls"])
        return cells

    def to_come(self) -> int:
        """How many allocated cells are not decided yet."""
        return len(self.keys) - len(self.decided)

    def _fingerprint(self, key: str) -> str:
        return fingerprint({**self.inputs, "budget_mb": self.keys[key]})

    def _read(self, path: str, own_fingerprint: str) -> dict[str, Any] | None:
        store = self.shared_context.attempt.store
        if not store.exists(path):
            return None
        found: dict[str, Any] = store.read_json(path)
        return found if found.get("fingerprint") == own_fingerprint else None

    # Which tasks come next.

    def first(self, anew: bool = False) -> list[Item]:
        """The first tasks of the budgets that are not decided: sensitivities, or candidates where
        those are known and not to be measured anew."""
        from quant.allocation import layer_options, shards_of

        to_run = [key for key in self.keys if key not in self.decided]
        if not to_run:
            return []
        self.options = layer_options(
            self.needs.meta(self.source),
            self.base,
            [(bits, size) for bits in self.sweep.bits for size in self.sweep.group_sizes],
            dict.fromkeys(self.sweep.keep_16bit),
        )
        self.budgets = {key: _Budget(key, round(self.keys[key] * 1e6)) for key in to_run}
        path = "allocations/sensitivities.json"
        found = None if anew else self._read(path, fingerprint(self.inputs))
        if found is not None:
            self.losses = {(item["layer"], item["option"]): item for item in found["losses"]}
            return self._candidates()
        pieces = shards_of(self.options, 2 * self.needs.slots)
        items: list[Item] = []
        for number, piece in enumerate(pieces):
            name = f"sensitivity/{number}"
            self.pieces.add(name)
            items.append((f"allocate/{name}", sensitivity_task, (self.source, piece)))
        return items

    def ended(self, name: str, result: Any) -> tuple[list[Item], list[Cell]]:  # noqa: ANN401
        """Takes the result of a task; returns further tasks, and cells that are decided now."""
        kind, _, rest = name.partition("/")
        if kind == "sensitivity":
            return self._sensitivity(name, result), []
        budget = self.budgets[kind]
        budget.waiting.discard(rest)
        if not isinstance(result, Failure):
            budget.measured.append((result["kl"], rest))
        if budget.waiting:
            return [], []
        if not budget.measured:
            assert isinstance(result, Failure)
            self._fail(budget.key, result.error)
            return [], []
        return self._next_round(budget)

    def _sensitivity(self, name: str, result: Any) -> list[Item]:  # noqa: ANN401
        if isinstance(result, Failure):
            for key in [key for key in self.budgets if key not in self.decided]:
                self._fail(key, f"measuring its layers: {result.error}")
            self.pieces.discard(name)
            return []
        self.losses.update(result)
        self.pieces.discard(name)
        if self.pieces or all(key in self.decided for key in self.budgets):
            return []
        told = [
            {**found, "layer": layer, "option": option}
            for (layer, option), found in sorted(self.losses.items())
        ]
        self.shared_context.attempt.write_json(
            "allocations/sensitivities.json",
            {"fingerprint": fingerprint(self.inputs), "inputs": self.inputs, "losses": told},
        )
        return self._candidates()

    def _candidates(self) -> list[Item]:
        from quant.allocation import candidates

        items = []
        for key, budget in self.budgets.items():
            try:
                found = candidates(self.options, self._kl(), budget.bytes, CANDIDATES)
            except ValueError as error:
                self._fail(key, f"sweep.budgets_mb: {error}")
                continue
            items += self._measure(budget, found)
        return items

    def _kl(self) -> dict[tuple[str, str], float]:
        return {key: float(found["kl"]) for key, found in self.losses.items()}

    def _measure(self, budget: _Budget, allocations: list[Any]) -> list[Item]:
        items: list[Item] = []
        budget.latest = set()
        for allocation in allocations:
            if any(allocation.layers == other.layers for other in budget.tried.values()):
                continue
            rest = str(len(budget.tried))
            budget.tried[rest] = allocation
            budget.waiting.add(rest)
            budget.latest.add(rest)
            cell = self._cell(budget.key, allocation.layers)
            key = f"allocate/{budget.key}/{rest}"
            items.append((key, candidate_task, (self.source, cell)))
        return items

    def _next_round(self, budget: _Budget) -> tuple[list[Item], list[Cell]]:
        """Neighbours of the best so far; the decision when they bring nothing more."""
        from quant.allocation import neighbours

        kl, best = min(budget.measured)
        if budget.rounds < ROUNDS and best in budget.latest:
            budget.rounds += 1
            near = neighbours(
                self.options, budget.tried[best], self._kl(), budget.bytes, NEIGHBOURS
            )
            items = self._measure(budget, near)
            if items:
                return items, []
        return [], self._decide(budget, kl, best)

    def _decide(self, budget: _Budget, kl: float, best: str) -> list[Cell]:
        allocation = budget.tried[best]
        layers = {
            name: None if spec is None else [spec.bits, spec.group_size]
            for name, spec in allocation.layers.items()
        }
        controls = self._controls(allocation.bytes, budget.bytes)
        decision = {
            "fingerprint": self._fingerprint(budget.key),
            "inputs": self.inputs,
            "budget_bytes": budget.bytes,
            "bytes": allocation.bytes,
            "layers": layers,
            "predicted_kl": allocation.predicted,
            "select_kl": kl,
            "tried": [
                {"select_kl": found, "bytes": budget.tried[rest].bytes}
                for found, rest in sorted(budget.measured)
            ],
            "controls": [[spec.bits, spec.group_size] for spec in controls],
        }
        self.shared_context.attempt.write_json(f"allocations/{budget.key}.json", decision)
        self.decided.add(budget.key)
        return self._cells(budget.key, layers, decision["controls"])

    def _controls(self, size: int, budget: int) -> list[QuantSpec]:
        """Uniform cells of the same or the next larger size, and the largest within the budget."""
        from quant.allocation import uniform_bytes, uniform_controls

        specs = [
            QuantSpec(bits, group, self.base.method, self.base.embeddings, self.base.head)
            for bits in BITS
            for group in self.sweep.group_sizes
        ]
        model, kept = self.needs.meta(self.source), dict.fromkeys(self.sweep.keep_16bit)
        sizes = {spec: uniform_bytes(model, spec, kept) for spec in specs}
        return list(uniform_controls(sizes, size, budget))

    def _cells(self, key: str, layers: dict[str, Any], controls: list[Any]) -> list[Cell]:
        """The allocated cell and its controls."""
        made = {
            name: None if found is None else self._like_base(*found)
            for name, found in layers.items()
        }
        cells = [self._cell(key, made)]
        for found in controls:
            control = uniform(self._like_base(*found), self.source.role)
            cells.append(Cell(control.key, control.model, control.spec, control_of=(key,)))
        return cells

    def _like_base(self, bits: int, group_size: Any) -> QuantSpec:  # noqa: ANN401
        return QuantSpec(bits, group_size, self.base.method, self.base.embeddings, self.base.head)

    def _cell(self, key: str, layers: dict[str, QuantSpec | None]) -> Cell:
        model: Any = self.source.role
        return Cell(key, model, self.base, layers, budget_mb=self.keys[key])

    # Budgets that cannot be met.

    def _fail(self, key: str, error: str) -> None:
        if key not in self.decided:
            self.decided.add(key)
            self.failures.append((key, error))

    def take_failures(self) -> list[tuple[str, str]]:
        """Allocated cells that failed since the last call, and why."""
        found, self.failures = self.failures, []
        return found

    def empty_cell(self, key: str) -> Cell:
        """The cell of a budget for which there is no allocation."""
        return self._cell(key, {})


def sensitivity_task(
    shared_context: SharedContext, source: Source, pieces: list[Any]
) -> dict[tuple[str, str], dict[str, Any]]:
    """KL on select of the 16-bit model with one layer quantized, for each of `pieces`."""
    import torch

    from quant.allocation import sensitivity
    from quant.evaluation.reference import open_reference

    torch.set_num_threads(shared_context.threads)
    folder = source.folder()
    part, sequences = shared_context.part("select", source), shared_context.sequences("select")

    def notify(layer: int, layers: int, done: float) -> None:
        share = (layer + done / max(1, sequences)) / layers
        shared_context.report(share, f"layer {layer + 1} of {layers}")

    assert part.reference is not None
    reference = open_reference(part.reference, folder, shared_context.device, shared_context.vocab)
    model = shared_context.evaluation_config().load(folder)
    return sensitivity(
        model, reference, part.batches, pieces, shared_context.device, shared_context.vocab, notify
    )


def candidate_task(shared_context: SharedContext, source: Source, cell: Cell) -> dict[str, Any]:
    """KL on select of the model quantized by an allocation."""
    from quant.evaluation.cell import select_kl

    work = {
        "quantize": QUANTIZE_TOKENS / shared_context.sequence_length,
        "evaluation/select": EVALUATE * shared_context.sequences("select"),
    }
    advance = Advance(shared_context.report, work)
    return select_kl(
        cell,
        source.folder(),
        shared_context.part("select", source, advance),
        config=shared_context.evaluation_config(),
        keep_16bit=shared_context.sweep.keep_16bit,
        progress=advance.quantized,
    )
