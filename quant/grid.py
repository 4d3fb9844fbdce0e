"""The cells of a sweep: what each is made of and how, under keys that tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quant.quant_spec import QuantSpec
from quant.spec import SweepSpec

RECOVERED = "-recovered"


@dataclass(frozen=True)
class Cell:
    """One cell: a 16-bit model quantized by `spec`.

    model: student or teacher. layers: names of layers with a spec of their own, None for 16 bits
    (an allocated cell). recovered: its scales are trained for a few steps afterwards. budget_mb:
    of an allocated cell. control_of: keys of the allocated cells that a uniform one outside of the
    grid was added for.
    """

    key: str
    model: Literal["student", "teacher"]
    spec: QuantSpec
    layers: Mapping[str, QuantSpec | None] = field(default_factory=dict)
    recovered: bool = False
    budget_mb: float | None = None
    control_of: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything that its result depends on, as JSON."""
        return {
            "model": self.model,
            "spec": self.spec.to_dict(),
            "layers": {
                name: None if spec is None else [spec.bits, spec.group_size]
                for name, spec in sorted(self.layers.items())
            },
            "recovered": self.recovered,
            "budget_mb": self.budget_mb,
        }


def uniform(spec: QuantSpec, model: str = "student", recovered: bool = False) -> Cell:
    """The cell that is quantized by `spec` everywhere."""
    prefix = "" if model == "student" else f"{model}-"
    key = f"{prefix}{spec.key}{RECOVERED if recovered else ''}"
    return Cell(key, model, spec, recovered=recovered)  # type: ignore[arg-type]


def grid(sweep: SweepSpec) -> list[Cell]:
    """All cells that the spec names, a recovered one after its plain one; allocated cells are made
    while the sweep runs (see `allocated_keys`)."""
    cells = []
    for model in sweep.models:
        for spec in sweep.cells(model):
            cells.append(uniform(spec, model))
            if model == main_model(sweep) and recovers(sweep, spec):
                cells.append(uniform(spec, model, recovered=True))
    return cells


def main_model(sweep: SweepSpec) -> Literal["student", "teacher"]:
    """Whose cells are allocated and recovered: the student's; the teacher's where it is alone."""
    return "student" if "student" in sweep.models else "teacher"


def recovers(sweep: SweepSpec, spec: QuantSpec) -> bool:
    """Whether the cell of `spec` gets a recovered one beside it."""
    return (
        sweep.recover is not None
        and spec.bits in sweep.recover.bits
        and spec.method != "int8-dynamic"
    )


def allocated_key(budget_mb: float, model: str = "student") -> str:
    """The key of the allocated cell of a budget, e.g. allocated-0.7mb."""
    prefix = "" if model == "student" else f"{model}-"
    return f"{prefix}allocated-{budget_mb:g}mb"


def allocated_keys(sweep: SweepSpec) -> dict[str, float]:
    """{key: budget in MB} of the allocated cells that the spec asks for."""
    model = main_model(sweep)
    return {allocated_key(budget, model): budget for budget in sweep.budgets_mb}
