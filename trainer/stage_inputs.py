"""What the trainer's sections of a spec ask for: the captures and trainings, and their names.

Shared by all launchers, so a job that one of them began is continued by another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.storage import Store, open_store
from cluster.storage.keys import fingerprint, flatten
from trainer.identity import Identities
from trainer.spec.losses import LossesSpec
from trainer.spec.responses import AnswersFile
from trainer.spec.rules import Sections
from trainer.spec.sections import DataSpec, SourceSpec, StudentSpec

if TYPE_CHECKING:
    from trainer.responses.store import AnswerStore

# Folders below the storage that all runs share, and the one of a run with a folder per training.
CORPORA, CACHES, CHECKPOINTS = "_corpora", "_logits", "checkpoints"
TEXT_ALONE = LossesSpec.model_validate({"ce": 1.0})
# Keys of `distill` that change how a training runs, not what comes out of it.
_RUNNING = {
    "activation_checkpointing",
    "checkpoint_minutes",
    "checkpoint_steps",
    "control",
    "deepspeed",
    "keep_checkpoints",
    "micro_batch",
    "offload",
    "zero_stage",
}


def identities(spec: Sections) -> Identities:
    """The identities of this spec's parts."""
    data = spec.data
    assert data is not None
    existing = None if data.corpus is None else open_store(spec.storage).sub(CORPORA, data.corpus)
    return Identities(
        spec.teacher,
        spec.student,
        spec.tokenizer,
        data,
        spec.cache,
        spec.responses,
        existing,
        train_sequences(spec),
    )


def train_sequences(spec: Sections) -> int | None:
    """How many sequences of train a corpus must have for this resolved spec; None: all there are.

    For a training those that are captured and read. Where sources are read unequally often, so many
    more that none is repeated earlier than it would be with all documents. Without a training what
    recovery reads, and one at least.
    """
    data = spec.data
    assert data is not None
    if data.max_tokens != "auto":
        wanted = -(-data.max_tokens // data.sequence_length)
    elif spec.distill is None:
        wanted = max(1, spec.recovery_sequences)
    else:
        return None  # not resolved
    if spec.distill is None:
        return wanted
    weights = [source.weight for source in learnt_data(spec).train]
    return math.ceil(wanted * max(weights, default=1.0) / min(weights, default=1.0))


def learnt_data(spec: Sections) -> DataSpec:
    """`data` with a source for each of those of the corpus; a file of answers is one."""
    data = spec.data
    assert data is not None
    if data.train or spec.responses is None or not isinstance(spec.responses.origin, AnswersFile):
        return data
    existing = SourceSpec(source=spec.responses.origin.file, format="prompt_completion")
    return data.model_copy(update={"train": [existing]})


def corpus_of(names: Identities, answers: AnswerStore) -> dict[str, Any]:
    """The identity of the corpus of the answers that are there; they must be complete."""
    from trainer.responses.store import corpus_of_content

    manifest = answers.manifest()
    assert manifest is not None
    return corpus_of_content(names.corpus, manifest)


def find_corpus(names: Identities, root: Store) -> dict[str, Any] | None:
    """The identity of a job's corpus, None while its answers are missing. root: the storage's."""
    if names.responses_spec is None:
        return names.corpus
    from trainer.responses.make import open_answers

    answers = open_answers(root, names.responses)
    return None if answers.manifest() is None else corpus_of(names, answers)


def schedule_inputs(spec: Sections) -> dict[str, Any]:
    """What decides which sequences are read, and when; flat."""
    if spec.distill is None or spec.data is None:
        return {}
    return {
        "distill.steps": spec.distill.steps,
        "distill.tokens_per_step": spec.distill.tokens_per_step,
        "data.max_tokens": spec.data.max_tokens,
        **flatten([source.weight for source in learnt_data(spec).train], "weights"),
        "seed": spec.seed,
    }


def draws_inputs(spec: Sections) -> dict[str, Any]:
    """How many sets of draws are read, which may grow and is in no cache's identity; flat."""
    return {"cache.redraws": spec.cache.redraws} if spec.cache.method == "sample" else {}


def reads_cache(spec: Sections) -> bool:
    """Whether the training reads distributions of the train part from the logit cache."""
    distill = spec.distill
    if spec.teacher is None or distill is None or distill.mode == "online":
        return False
    return bool(distill.losses.of_distributions())


def capture_inputs(spec: Sections) -> dict[str, Any]:
    """What decides which records the cache has to hold, beside the corpus; flat."""
    if not reads_cache(spec):  # those of select and report alone
        return {}
    return {**schedule_inputs(spec), **draws_inputs(spec)}


def training_inputs(
    spec: Sections, names: Identities, corpus: str, cache: str | None
) -> dict[str, Any]:
    """What the trained weights depend on; flat.

    names: of `spec`; corpus, cache: the names of their folders.
    """
    assert spec.distill is not None
    losses = spec.distill.losses
    settings = spec.distill.model_dump(exclude={*_RUNNING, "losses"})
    inputs = flatten({**settings, "losses": _used(losses)}, "distill")
    inputs |= flatten(names.student, "student")
    inputs |= schedule_inputs(spec)
    inputs["corpus"] = corpus
    # Where no loss wants it, the best weights are chosen by the text alone.
    if needs_teacher(spec.student, losses):
        inputs |= flatten(names.teacher, "teacher")
    if reads_cache(spec):
        inputs["cache"] = cache
        inputs |= draws_inputs(spec)
    return inputs


def training_folders(spec: Sections, inputs: Mapping[str, Any]) -> dict[str, str]:
    """The names of the folders for checkpoints, by stage; of the control also where none is asked.

    inputs: of `training_inputs`.
    """
    assert spec.distill is not None
    losses = {"distill": spec.distill.losses, "control": TEXT_ALONE}
    return {
        stage: f"{stage}-{fingerprint({**inputs, 'losses': _used(each)})[:12]}"
        for stage, each in losses.items()
    }


def _used(losses: LossesSpec) -> dict[str, Any]:
    """The losses that ever count; one of weight 0 changes no weights."""
    return {name: value for name, value in losses.model_dump().items() if name in losses.used()}


def needs_teacher(student: StudentSpec, losses: LossesSpec) -> bool:
    """Whether a training learns from the teacher, or starts from its layers."""
    return bool(losses.of_teacher()) or student.init == "slice"
