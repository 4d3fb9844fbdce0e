"""Layers that vLLM joins into one (q/k/v, gate/up): all of a joined layer must share one scheme.

By reading vLLM (`compressed_tensors/utils.py`): `should_ignore_layer` raises when only some parts
of a joined layer are ignored, and `find_matched_target` takes the scheme of the first part for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quant.export.compressed import Scheme

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def joined_layers(names: Iterable[str]) -> list[list[str]]:
    """Groups of two or more layer names that vLLM makes one layer of."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        for kind, members in enumerate(JOINED):
            if last in members:
                found.setdefault((parent, kind), []).append(name)
    return [group for group in found.values() if len(group) > 1]


def agree(
    schemes: Mapping[str, Scheme | None],
) -> tuple[dict[str, Scheme | None], list[str]]:
    """One scheme for each joined layer: (schemes by layer name, a note for each change).

    schemes: every linear layer of the model, None where it stays in 16 bits. The most bits of the
    parts win (16 over 8 over 4), then the smallest groups; quantized inputs stay only where all
    parts have them.
    """
    agreed = dict(schemes)
    notes = []
    for group in joined_layers(schemes):
        shared = _strongest([schemes[name] for name in group])
        changed = [name for name in group if schemes[name] != shared]
        for name in changed:
            agreed[name] = shared
        if changed:
            others = ", ".join(name.rpartition(".")[2] for name in group)
            now = "16 bits" if shared is None else str(shared)
            was = ", ".join(f"{name} ({schemes[name] or '16 bits'})" for name in changed)
            notes.append(f"vLLM joins {others}, which must be stored alike: {was} is now {now}.")
    return agreed, notes


def _strongest(schemes: list[Scheme | None]) -> Scheme | None:
    known = [scheme for scheme in schemes if scheme is not None]
    if len(known) < len(schemes):
        return None
    if len(set(known)) == 1:
        return known[0]
    sizes = [scheme.group_size for scheme in known if scheme.group_size is not None]
    kinds = {scheme.kind for scheme in known}
    kind = known[0].kind if len(kinds) == 1 else "symmetric"
    size = min(sizes) if sizes and kind != "dynamic" else None
    return Scheme(max(scheme.bits for scheme in known), size, kind)
