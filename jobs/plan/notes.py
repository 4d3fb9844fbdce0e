"""What a user should know of a plan beside its figures."""

from __future__ import annotations

from typing import Any

from jobs.plan.needs import Models
from jobs.spec import JobSpec


def notes(spec: JobSpec, models: Models, plan: dict[str, Any]) -> list[str]:
    """Lines of text, the weightiest first."""
    assert spec.data is not None
    found = []
    tokens, stages = plan["tokens"], plan["stages"]
    if tokens["corpus"] is None:
        found.append(f"Corpus: {tokens['known']}.")
    elif tokens["known"] != "prepared before":
        found.append(
            f"Corpus: about {tokens['corpus']:,} tokens, {tokens['known']}; once it is prepared, "
            "plan counts it."
        )
    if spec.teacher is not None:
        found.append(
            f"Another data.sequence_length than {spec.data.sequence_length} makes other sequences, "
            "hence another capture."
        )
    if spec.responses is not None:
        found.append("Making the answers (section responses) is in no figure here.")
    capture = stages.get("capture", {})
    if capture.get("across_nodes"):
        found.append(
            "No node holds the teacher: it is sharded over several, and every layer travels "
            "between them in each pass; much slower than these hours say."
        )
    if spec.cache.method == "sample" and "cache" in plan["storage"]:
        found.append(
            "Draws of a teacher that is less certain than large models are on text hit up to twice "
            "as many different ids; the cache then has up to twice the bytes."
        )
    if spec.cache.positions == "loss":
        found.append(
            "cache.positions: loss captures fewer positions than these bytes are of; how many only "
            "the corpus can tell."
        )
    mixture = models.teacher is not None and models.teacher.experts
    if mixture and spec.sweep is not None and "teacher" in spec.sweep.models:
        found.append("Experts stay in 16 bits in the teacher's cells.")
    on_cpus = any(stage.get("device") == "cpu" for stage in stages.values())
    if on_cpus and not plan["place"]["core"]["measured"]:
        found.append("Hours on CPUs differ threefold with the kind of core.")
    online = spec.distill is not None and spec.distill.mode == "online"
    if online and plan.get("break_even", {}).get("students") == 1:
        found.append(
            "distill.mode: cached would be cheaper here even for one student: see break-even."
        )
    return found
