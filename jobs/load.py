"""Read a spec: YAML, dotted overrides, and one line for each thing that is wrong with it.

Relative paths inside a spec are relative to the current directory, not to the spec's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.errors import SpecErrors
from jobs.schema import spec_of
from jobs.spec import JobSpec
from trainer.spec.yaml import apply_override, dump, parse, quote


def recipes() -> dict[str, Path]:
    """The bundled specs by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_spec(path: str | Path) -> Path:
    """The file of a spec: `path` itself, or the bundled recipe of that name.

    Raises:
        SpecErrors: there is neither; the line names what exists nearby.
    """
    file = Path(path)
    if file.is_file():
        return file
    bundled = recipes()
    if str(path) in bundled:
        return bundled[str(path)]
    if file.is_dir():
        inside = sorted(str(child) for child in file.glob("*.y*ml"))
        hint = f", e.g. {inside[0]}" if inside else ""
        raise SpecErrors([f"{path}: is a folder; may be a YAML file{hint}"])
    nearby = sorted(str(child) for child in file.parent.glob("*.y*ml"))
    here = f"there are {', '.join(nearby[:8])}" if nearby else "no YAML file is there"
    raise SpecErrors([f"{path}: no such file; {here}; bundled: {', '.join(bundled)}"])


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read, override and validate the spec at `path` (a YAML file, or a bundled recipe's name).

    Args:
        overrides: ``dotted.key=value`` pairs with YAML values, applied in order; parts that
            are numbers index lists (``data.train.0.weight=2``).

    Raises:
        SpecErrors: with one line for each fault, all at once.
    """
    file = find_spec(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise SpecErrors([f"{file}: cannot be read: {why}"]) from None
    data, faults = parse(text, str(file))
    if data is None and faults:
        raise SpecErrors(faults)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {quote(data)}"
        raise SpecErrors([f"{file}: {what}; may be a mapping of keys, e.g. name: my-run"])
    for override in overrides:
        fault = apply_override(data, override)
        if fault:
            faults.append(fault)
    try:
        spec = spec_of(data)
    except SpecErrors as error:
        raise SpecErrors([*faults, *error.faults]) from None
    if faults:
        raise SpecErrors(faults)
    return spec


def dump_spec(spec: JobSpec) -> str:
    """`spec` as YAML with every key, in the order of the schema; loads back to an equal spec."""
    return dump(spec.model_dump())
