"""What the trainer's sections of a spec ask for: the captures and trainings, and their names.

Shared by all launchers, so a job that one of them began is continued by another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from cluster.storage import Store, open_store
from trainer.auto import auto_activation_checkpointing, auto_learning_rate, auto_micro_batch
from trainer.checkpoints.names import DONE, INPUTS, records, step_of
from trainer.dtypes import with_dtypes
from trainer.fingerprint import fingerprint, flatten
from trainer.identity import Identities
from trainer.lossspec import LossesSpec
from trainer.models import absolute, find_model, width_of
from trainer.processor import DtypeName, this_device
from trainer.responses.identity import corpus_of_content
from trainer.responses.make import open_answers
from trainer.responses.store import AnswerStore
from trainer.rules import Sections
from trainer.spec import AnswersFile, DataSpec, SourceSpec, StudentSpec, TeacherSpec

# Folders below the storage that all runs share, and the one of a run with a folder per training.
CORPORA, CACHES, CHECKPOINTS = "_corpora", "_logits", "checkpoints"
_TEXT_ALONE = LossesSpec.model_validate({"ce": 1.0})
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


Spec = TypeVar("Spec", bound=Sections)


def resolve(
    spec: Spec, dtypes: Mapping[str, DtypeName] | None = None, device: str | None = None
) -> Spec:
    """The spec with local models named absolutely and `auto` resolved.

    dtypes: what `dtype: auto` means, by section; None: what this machine is fast at. device: "cpu"
    or "cuda", where the student is trained; None: this machine's.
    Workers run in directories of their own, so a relative name would mean nothing there. Raises
    ValueError, one line, if the student's config cannot be read.
    """
    spec = with_dtypes(_absolute(spec), dtypes)
    distill, data, student = spec.distill, spec.data, spec.student
    if distill is None:
        return spec
    assert data is not None
    changes: dict[str, Any] = {}
    lora, micro_batch = student.lora is not None, distill.micro_batch
    config: dict[str, Any] = {}
    if "auto" in (micro_batch, distill.learning_rate, distill.activation_checkpointing):
        config = _raw_config(spec)
    if micro_batch == "auto":
        micro_batch = auto_micro_batch(data.sequence_length, config, device or this_device())
        changes["micro_batch"] = micro_batch
    if distill.learning_rate == "auto":
        changes["learning_rate"] = auto_learning_rate(student.init, width_of(config), lora)
    if distill.activation_checkpointing == "auto":
        tokens = micro_batch * data.sequence_length
        changes["activation_checkpointing"] = auto_activation_checkpointing(config, tokens, lora)
    if distill.evaluate_steps == "auto":
        changes["evaluate_steps"] = max(1, distill.steps // 10)
    update: dict[str, Any] = {"distill": distill.model_copy(update=changes)}
    if data.max_tokens == "auto":
        tokens = distill.steps * distill.tokens_per_step
        update["data"] = data.model_copy(update={"max_tokens": tokens})
    return spec.model_copy(update=update)


def _absolute(spec: Spec) -> Spec:
    update: dict[str, Any] = {}
    if spec.teacher is not None:
        model = absolute(spec.teacher.model)
        update["teacher"] = spec.teacher.model_copy(update={"model": model})
    student: dict[str, Any] = {}
    if spec.student.model is not None:
        student["model"] = absolute(spec.student.model)
    if isinstance(spec.student.config, str):
        student["config"] = absolute(spec.student.config)
    if spec.responses is not None and isinstance(spec.responses.origin, AnswersFile):
        origin = AnswersFile(file=absolute(spec.responses.origin.file))
        update["responses"] = spec.responses.model_copy(update={"origin": origin})
    update["student"] = spec.student.model_copy(update=student)
    return spec.model_copy(update=update)


def _raw_config(spec: Sections) -> dict[str, Any]:
    """The student's config as it is written; of a student cut from its teacher with its layers."""
    student = spec.student
    if isinstance(student.config, dict):
        return student.config
    if student.config is not None:
        path = Path(student.config)
    else:
        key = "student.model"
        model: StudentSpec | TeacherSpec | None = student if student.model is not None else None
        if student.init == "slice":
            key, model = "teacher.model", spec.teacher
        assert model is not None
        folder = find_model(key, str(model.model), model.revision, weights=False)
        path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"student.config: {path} cannot be read as JSON ({error})") from None
    return raw if student.layers is None else {**raw, "num_hidden_layers": student.layers}


def identities(spec: Sections) -> Identities:
    """The identities of this spec's parts."""
    data = spec.data
    assert data is not None
    given = None if data.corpus is None else open_store(spec.storage).sub(CORPORA, data.corpus)
    return Identities(
        spec.teacher,
        spec.student,
        spec.tokenizer,
        data,
        spec.cache,
        spec.responses,
        given,
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
    given = SourceSpec(source=spec.responses.origin.file, format="prompt_completion")
    return data.model_copy(update={"train": [given]})


def corpus_of(names: Identities, answers: AnswerStore) -> dict[str, Any]:
    """The identity of the corpus of the answers that are there; they must be complete."""
    manifest = answers.manifest()
    assert manifest is not None
    return corpus_of_content(names.corpus, manifest)


def find_corpus(names: Identities, root: Store) -> dict[str, Any] | None:
    """The identity of a job's corpus, None while its answers are missing. root: the storage's."""
    if names.responses_spec is None:
        return names.corpus
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
    if _needs_teacher(spec.student, losses):
        inputs |= flatten(names.teacher, "teacher")
    if reads_cache(spec):
        inputs["cache"] = cache
        inputs |= draws_inputs(spec)
    return inputs


def make_capture(
    spec: Sections,
    corpus: Store,
    cache: Store,
    *,
    batch_tokens: int | Literal["auto"],
    shard_seconds: float,
) -> Any:
    """The `trainer.teacher.Capture` of a resolved spec with a teacher."""
    from trainer.teacher import Capture

    assert spec.data is not None and spec.teacher is not None
    return Capture(
        teacher=spec.teacher,
        cache_spec=spec.cache,
        data=learnt_data(spec),
        distill=spec.distill if reads_cache(spec) else None,
        seed=spec.seed,
        batch_tokens=batch_tokens,
        shard_seconds=shard_seconds,
        corpus=corpus,
        cache=cache,
    )


def make_trainings(
    spec: Sections, inputs: Mapping[str, Any], run: Store, corpus: Store, cache: Store | None
) -> list[Any]:
    """The `trainer.training.Training`s of a resolved spec: the student's, then the control's.

    The control learns from the text alone, with the same steps in the same order. Checkpoints are
    kept apart by what the weights depend on, `inputs` (`training_inputs`).
    """
    from trainer.training import Training

    assert spec.distill is not None and spec.data is not None
    jobs = []
    alone = {"mode": "cached", "losses": _TEXT_ALONE}
    folders = training_folders(spec, inputs)
    for stage, role, distill in (
        ("distill", "student", spec.distill),
        ("control", "control", spec.distill.model_copy(update=alone)),
    ):
        if stage == "control" and not spec.distill.control:
            continue
        losses = distill.losses
        jobs.append(
            Training(
                stage=stage,
                teacher=spec.teacher if _needs_teacher(spec.student, losses) else None,
                student=spec.student,
                distill=distill,
                data=learnt_data(spec),
                cache_spec=spec.cache,
                seed=spec.seed,
                corpus=corpus,
                cache=cache,
                checkpoints=run.sub(CHECKPOINTS, folders[stage]),
                output=run.sub(role),
                last=run.sub(f"{role}-last"),
                inputs=dict(inputs),
            )
        )
    return jobs


def training_folders(spec: Sections, inputs: Mapping[str, Any]) -> dict[str, str]:
    """The names of the folders for checkpoints, by stage; of the control also where none is asked.

    inputs: of `training_inputs`.
    """
    assert spec.distill is not None
    losses = {"distill": spec.distill.losses, "control": _TEXT_ALONE}
    return {
        stage: f"{stage}-{fingerprint({**inputs, 'losses': _used(each)})[:12]}"
        for stage, each in losses.items()
    }


def unfinished_trainings(
    spec: Sections, inputs: Mapping[str, Any], run: Store
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Trainings of `run` that have checkpoints to go on from but are not those of these inputs.

    By the folder's path below `run`: steps that are done, and the inputs it was begun with, empty
    if it does not say. What is done is not among them.
    """
    wanted = training_folders(spec, inputs)
    found = {}
    for name in run.list(CHECKPOINTS):
        stage = name.partition("-")[0]
        store = run.sub(CHECKPOINTS, name)
        if stage not in wanted or name == wanted[stage]:
            continue
        there = records(store.list())
        if there and not store.exists(DONE):
            told = store.read_json(INPUTS) if store.exists(INPUTS) else {}
            found[f"{CHECKPOINTS}/{name}"] = (step_of(there[-1]), told)
    return found


def unfinished_faults(
    spec: Sections,
    inputs: Mapping[str, Any],
    run: Store,
    way_out: str = "run with --redo distill to drop it and train anew",
) -> list[str]:
    """One line per input that was changed under an unfinished training, which would be passed over.

    inputs: of `training_inputs`, for the spec as it is now. way_out: what a user may do beside
    putting it back and naming the run anew.
    """
    new = json.loads(json.dumps(inputs, default=str))
    faults = []
    for path, (step, old) in unfinished_trainings(spec, inputs, run).items():
        what = f"a training of this run is unfinished at step {step}"
        rest = f"{way_out.format(path=run.path(path))}, or give the run another name"
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r} ({what}; put it back to continue, {rest})"
            for key in sorted({*old, *new} if old else ())
            if old.get(key) != new.get(key)
        ]
        faults += changed or [f"{run.path(path)}: {what}, of other inputs than these; {rest}"]
    return list(dict.fromkeys(faults))  # student and control have the same inputs


def _used(losses: LossesSpec) -> dict[str, Any]:
    """The losses that ever count; one of weight 0 changes no weights."""
    return {name: value for name, value in losses.model_dump().items() if name in losses.used()}


def _needs_teacher(student: StudentSpec, losses: LossesSpec) -> bool:
    """Whether a training learns from the teacher, or starts from its layers."""
    return bool(losses.of_teacher()) or student.init == "slice"
