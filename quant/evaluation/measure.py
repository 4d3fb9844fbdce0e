"""How a model is measured: parts of a corpus, the metrics of an evaluation, benchmark tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from quant.artifact.description import FORMAT
from quant.evaluation.batches import Batch, Records, Sequences
from quant.evaluation.evaluate import evaluate
from quant.evaluation.reference import open_reference
from quant.spec import Task
from trainer.models.load import load_for_inference

if TYPE_CHECKING:
    from quant.evaluation.reference import StoredReference

# What an evaluation says of a model, and where it stands: at the top the part `report`, in
# `select` the part that choices are made on.
METRICS = (
    "tokens",
    "sequences",
    "nll",
    "perplexity",
    "perplexity_ratio",
    "perplexity_ratio_low",
    "perplexity_ratio_high",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "retention",
    *(
        f"kl_to_{model}{suffix}"
        for model in ("student", "teacher")
        for suffix in ("", "_low", "_high", "_p99", "_max")
    ),
    "kl_kinds",
    "top1_agreement",
    "teacher_top1_agreement",
    "true_prob_change",
    "true_prob_change_low",
    "true_prob_change_high",
    "true_prob_change_rms",
    "per_sequence",
    "data_hash",
    "batch_sizes",
)


@dataclass(frozen=True)
class EvaluationData:
    """A part of the corpus, as models are measured on it.

    batches, records: made anew for every pass; the teacher's records are aligned with the batches.
    reference: the folder that `write_reference` wrote of the 16-bit model; None: the model is
    run beside. progress: called with what a pass is ("reference", "evaluation")
    and the sequences that it has done, in fractions.
    """

    batches: Callable[[], Iterable[Batch]]
    records: Callable[[], Iterable[Records]] | None = None
    reference: str | None = None
    progress: Callable[[str, float], None] | None = None

    def on(self, what: str) -> Sequences | None:
        """`progress` for one pass."""
        return None if self.progress is None else partial(self.progress, what)


@dataclass(frozen=True)
class EvaluationConfig:
    """How models are evaluated: threads of torch, device, ids that exist, benchmark tasks.

    batch_sequences: texts of a batch in a task. dtype: what all models are computed in, by its name
    in torch, whatever they are stored in; None: each in its own. answered: hears how far the tasks
    are, see `quant.evaluation.lm_eval.run_tasks`.
    """

    threads: int = 1
    device: str = "cpu"
    vocab: int | None = None
    tasks: Sequence[Task] = ()
    batch_sequences: int = 8
    dtype: str | None = None
    answered: Callable[[float, str, int, int], None] | None = None

    def compute_dtype(self, model: PreTrainedModel) -> torch.dtype:
        """What this model is computed in."""
        return model.dtype if self.dtype is None else getattr(torch, self.dtype)

    def load(self, folder: str) -> PreTrainedModel:
        """A 16-bit model, on the device and in the dtype that it is computed in."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return load_for_inference(folder, self.device, dtype)


def versions() -> dict[str, str]:
    """What a result depends on: library versions and the artifact's format."""
    found = {name: version(name) for name in ("torch", "transformers", "hqq")}
    return {**found, "stillhouse_format": str(FORMAT)}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as specs and results name it."""
    return str(dtype).removeprefix("torch.")


def measure(
    model: PreTrainedModel,
    model_folder: str,
    of: str,
    report: EvaluationData,
    select: EvaluationData | None,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """The metrics of a model on `report`, and under `select` those on select.

    of: student or teacher, the 16-bit model in `model_folder` that it is compared with.
    """
    result: dict[str, Any] = {}
    for name, part in (("select", select), ("report", report)):
        if part is None:
            result[name] = None
            continue
        found = evaluate(
            model,
            part.batches(),
            reference_of(part, model_folder, config),
            part.records() if part.records is not None else None,
            config.device,
            vocab=config.vocab,
            progress=part.on("evaluation"),
        )
        result[name] = metrics(found, of)
    return {**result["report"], "select": result["select"]}


def reference_of(
    part: EvaluationData, folder: str, config: EvaluationConfig
) -> PreTrainedModel | StoredReference:
    """The 16-bit model that a part is compared with: stored, or loaded."""
    if part.reference is None:
        return config.load(folder)
    return open_reference(part.reference, folder, config.device, config.vocab)


def metrics(found: Mapping[str, Any], of: str | None) -> dict[str, Any]:
    """`METRICS` of what `evaluate` returned; what was not measured is None.

    of: student or teacher, the 16-bit model that it was compared with; None: with none. Compared
    with the teacher itself, the exact divergence stands in the place of that from its records.
    """
    result: dict[str, Any] = {name: found.get(name) for name in METRICS}
    kinds = dict(found.get("kl_kinds") or {})
    if of is not None:
        for suffix in ("", "_low", "_high", "_p99", "_max"):
            result[f"kl_to_{of}{suffix}"] = found.get(f"kl_to_reference{suffix}")
        kinds[f"kl_to_{of}"] = kinds.pop("kl_to_reference", "exact")
        result["retention"] = percent(found["accuracy"], found.get("reference_accuracy"))
    else:
        result["retention"] = percent(found["accuracy"], found.get("teacher_accuracy"))
    result["kl_kinds"] = kinds
    return result


def tasks_of(
    model: PreTrainedModel,
    model_folder: str,
    config: EvaluationConfig,
    reference: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Results of the benchmark tasks, with flips against the reference's where there are any."""
    if not config.tasks:
        return None
    from transformers import AutoTokenizer

    from quant.evaluation.lm_eval import compare_tasks, run_tasks

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = run_tasks(
        model, tokenizer, config.tasks, config.batch_sequences, progress=config.answered
    )
    if reference is None:
        return found
    compared = compare_tasks(dict(reference), found)
    return {name: {**result, **compared.get(name, {})} for name, result in found.items()}


def percent(part: float, whole: float | None) -> float | None:
    """A part of the whole in percent; None where there is no whole."""
    return 100 * part / whole if whole else None
