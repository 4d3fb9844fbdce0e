"""The spec's `distill.losses`: which losses, how much each counts, and when."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator
from pydantic_core import CoreSchema

from cluster.storage.section import Section

Share = Annotated[float, Field(ge=0)]
Auto = Literal["auto"]
Layer = Annotated[int, Field(ge=0)]


class WeightSchedule(Section):
    """A weight that changes while training."""

    start: float = Field(ge=0, description="Weight at the first step.")
    end: float = Field(ge=0, description="Weight from the end of the change on.")
    until: float = Field(
        1.0, gt=0, le=1, description="Share of the steps after which the change has ended."
    )
    shape: Literal["linear", "cosine"] = Field("linear", description="How it changes.")

    def at(self, step: int, steps: int) -> float:
        """The weight of step `step` (from 0) of `steps`."""
        last = max(1.0, self.until * steps - 1)
        progress = min(1.0, step / last)
        if self.shape == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress


class LossSpec(Section):
    """One loss; written as a number it is the weight alone."""

    weight: Share | WeightSchedule = Field(
        1.0, description="How much it counts: a number, or {start, end, until, shape}."
    )

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return {"weight": value} if is_number else value

    @model_serializer(mode="wrap")
    def _short(self, handler: Any) -> Any:  # noqa: ANN401
        """The weight alone where that says everything."""
        full = handler(self)
        plain = set(full) == {"weight"} and not isinstance(self.weight, WeightSchedule)
        return full["weight"] if plain else full

    def at(self, step: int, steps: int) -> float:
        """The weight of step `step` (from 0) of `steps`."""
        if isinstance(self.weight, WeightSchedule):
            return self.weight.at(step, steps)
        return self.weight

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: Any) -> dict[str, Any]:  # noqa: ANN401
        """A number, or the section: what `_number` takes."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        section = dict(schema)
        schema.clear()
        schema["anyOf"] = [{"type": "number", "minimum": 0}, section]
        return reference

    @property
    def counts(self) -> bool:
        """Whether it ever has a weight above 0."""
        return self.at(0, 1) > 0 or self.at(1, 2) > 0


class JsdSpec(LossSpec):
    """Generalized Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m),
    m = beta p + (1 - beta) q."""

    beta: float = Field(0.5, gt=0, lt=1, description="Share of the teacher in the mixture.")


class SkewSpec(LossSpec):
    """Skew KL: KL(p || alpha p + (1 - alpha) q)."""

    alpha: float = Field(0.1, gt=0, lt=1, description="Share of the teacher in the mixture.")


class HiddenSpec(LossSpec):
    """Hidden states of the student drawn to those of the teacher; online only."""

    layers: Auto | Annotated[list[tuple[Layer, Layer]], Field(min_length=1)] = Field(
        "auto",
        description="Pairs [student layer, teacher layer], from 0. auto: every student layer with "
        "the teacher's at the same share of the depth.",
    )
    metric: Literal["mse", "cosine"] = Field("mse", description="Distance of two hidden states.")


class LossesSpec(Section):
    """The losses of a training by name; those that are not named do not count."""

    forward_kl: LossSpec | None = Field(None, description="KL(teacher || student).")
    reverse_kl: LossSpec | None = Field(None, description="KL(student || teacher).")
    jsd: JsdSpec | None = Field(None, description="Generalized Jensen-Shannon divergence.")
    skew_kl: SkewSpec | None = Field(None, description="KL to a mixture with the teacher.")
    ce: LossSpec | None = Field(None, description="Cross-entropy with the text.")
    hidden: HiddenSpec | None = Field(None, description="Distance of hidden states; online only.")

    @model_validator(mode="after")
    def _something_counts(self) -> LossesSpec:
        if not self.used():
            raise ValueError(
                "needs at least one loss with a weight above 0, of "
                f"{', '.join(type(self).model_fields)}"
            )
        return self

    @model_serializer(mode="wrap")
    def _named(self, handler: Any) -> Any:  # noqa: ANN401
        """The losses that are named; which others there are is no part of a spec."""
        return {name: value for name, value in handler(self).items() if value is not None}

    def used(self) -> dict[str, LossSpec]:
        """The losses that ever count, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: loss for name, loss in named.items() if loss is not None and loss.counts}

    def of_distributions(self) -> list[str]:
        """The names of those that compare with the teacher's distributions."""
        return [name for name in self.used() if name not in ("ce", "hidden")]

    def of_teacher(self) -> list[str]:
        """The names of those that need the teacher."""
        return [name for name in self.used() if name != "ce"]

    def weights(self, step: int, steps: int) -> dict[str, float]:
        """The weight of each used loss at step `step` (from 0) of `steps`."""
        return {name: loss.at(step, steps) for name, loss in self.used().items()}
