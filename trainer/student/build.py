"""The student of a training, built and wrapped in a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.corpus.corpus import Corpus
from trainer.corpus.tokenizer import load_tokenizer
from trainer.engineconfig import training_config
from trainer.head import check_head
from trainer.models import build_model, find_model, new_config, read_config
from trainer.optimizer import make_optimizer
from trainer.student import features
from trainer.student.families import check_family
from trainer.student.lora import add_adapters, is_adapter
from trainer.student.module import StudentWithLoss
from trainer.student.slicing import slice_model
from trainer.training import Training
from trainer.worker import Worker, torch_dtype


@dataclass(frozen=True)
class Built:
    """A student ready for training.

    engine: DeepSpeed's, around a `StudentWithLoss`. config, generation: what its folder will say.
    parameters: of the student without adapters, tied ones once. micro_batch: sequences of one
    forward pass. lora: whether adapters alone are trained; base: the model under them, None if it
    is nobody else's. untrained: makes the model again as it was before training.
    """

    engine: Any
    config: Any
    generation: Any
    parameters: int
    micro_batch: int
    lora: bool
    base: str | None
    untrained: Callable[[], Any]


def build(
    job: Training, corpus: Corpus, worker: Worker, micro_batch: int, accumulation: int
) -> Built:
    """Builds the student and its engine; collective.

    Raises ValueError, one line, for a student that cannot be trained as the spec asks.
    """
    import deepspeed

    spec = job.distill
    vocab = int(corpus.manifest["vocab_size"])
    untrained = partial(build_student, job, load_tokenizer(corpus.tokenizer_folder()))
    model = untrained()
    check_family("student", model.config)
    check_head(model, vocab)
    config, generation = model.config, getattr(model, "generation_config", None)
    parameters = sum(p.numel() for name, p in model.named_parameters() if not is_adapter(name))
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = StudentWithLoss(model, vocab, _compared(job, config), job.seed)
    with worker.limiting():
        engine, *_ = deepspeed.initialize(
            model=module.to(worker.device),
            optimizer=make_optimizer(module, spec),
            config=training_config(spec, micro_batch, accumulation, worker.world),
        )
    student = job.student
    return Built(
        engine=engine,
        config=config,
        generation=generation,
        parameters=parameters,
        micro_batch=micro_batch,
        lora=student.lora is not None,
        base=student.model if student.init == "pretrained" else None,
        untrained=untrained,
    )


def _compared(job: Training, config: Any) -> features.HiddenPlan | None:
    """Which hidden states are compared with the teacher's."""
    hidden = job.distill.losses.hidden
    if hidden is None or job.teacher is None:
        return None
    folder = find_model("teacher.model", job.teacher.model, job.teacher.revision)
    return features.plan(hidden, config, read_config(folder))


def build_student(job: Training, tokenizer: Any) -> Any:
    """The model as it is before training, with adapters if the spec wants them; on the CPU."""
    student = job.student
    dtype = torch_dtype(job.distill.dtype)
    if student.init == "slice":
        assert job.teacher is not None and student.layers is not None
        folder = find_model("teacher.model", job.teacher.model, job.teacher.revision)
        model = slice_model(folder, read_config(folder), student.layers, dtype)
    else:
        folder, config = None, None
        if student.model is not None:
            weights = student.init == "pretrained"
            folder = find_model("student.model", student.model, student.revision, weights=weights)
        if student.config is not None:
            length = job.data.sequence_length
            config = new_config("student.config", student.config, tokenizer, length)
        model = build_model(
            folder=folder, config=config, init=student.init, dtype=dtype, seed=job.seed
        )
    if student.lora is not None:
        add_adapters(model, student.lora, job.seed, student.model)
    return model
