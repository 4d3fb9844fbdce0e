"""`dtype: auto` in a spec: where it stands, what replaces it, what a run has computed in so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import yaml

from cluster.storage import Store, read_events
from trainer.processor import DtypeName, fast_dtype, this_device

DTYPE_SECTIONS = ("teacher", "distill", "sweep")  # that compute in a dtype of their own
NAMES: tuple[DtypeName, ...] = ("bfloat16", "float32")


class _Spec(Protocol):
    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any: ...


Spec = TypeVar("Spec", bound=_Spec)


def undecided_dtypes(spec: object) -> list[str]:
    """The sections of a spec whose dtype is `auto`."""
    sections = {name: getattr(spec, name, None) for name in DTYPE_SECTIONS}
    return [name for name, each in sections.items() if each is not None and each.dtype == "auto"]


def with_dtypes(spec: Spec, dtypes: Mapping[str, DtypeName] | None = None) -> Spec:
    """The spec with each `dtype: auto` replaced by the section's own of `dtypes`.

    None: by what this machine is fast at.
    """
    names = undecided_dtypes(spec)
    if not names:
        return spec
    found = dict.fromkeys(names, fast_dtype(this_device())) if dtypes is None else dtypes
    return _updated(spec, {name: found[name] for name in names})


def with_auto(spec: Spec, sections: list[str]) -> Spec:
    """The spec with `dtype: auto` in these sections again."""
    return _updated(spec, dict.fromkeys(sections, "auto"))


def recorded_dtypes(run: Store) -> dict[str, DtypeName]:
    """What an earlier attempt of a run computed in, by section; {} for a new run."""
    values: Any = None
    if run.exists("spec.yaml"):
        try:
            values = yaml.safe_load(run.read_text("spec.yaml"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return {}
    elif run.exists("events"):  # under torchrun there is no spec.yaml; the events begin with it
        begun = [each for each in read_events(run) if each.get("event") == "run_start"]
        values = begun[-1].get("spec") if begun else None
    sections = values if isinstance(values, dict) else {}
    found: dict[str, DtypeName] = {}
    for name in DTYPE_SECTIONS:
        section = sections.get(name)
        dtype = section.get("dtype") if isinstance(section, dict) else None
        if dtype in NAMES:
            found[name] = dtype
    return found


def _updated(spec: Spec, dtypes: Mapping[str, str]) -> Spec:
    update = {
        name: getattr(spec, name).model_copy(update={"dtype": dtype})
        for name, dtype in dtypes.items()
    }
    return spec.model_copy(update=update)
