"""The student of a training, built and wrapped with its loss in a DeepSpeed engine.

The loss is computed in the wrapped module's forward, so ZeRO-3 gathers the head for it and nothing
calls `model.module` behind the engine's back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.corpus.corpus import Corpus
from trainer.corpus.tokenizer import load_tokenizer
from trainer.losses.divergences import Loss, Target
from trainer.losses.fused_linear import Head, fused_loss, head_of
from trainer.models import hidden_states
from trainer.models.head import check_head, last_hidden
from trainer.models.hidden_states import HiddenLoss, HiddenPairs, collected
from trainer.models.load import build_model, check_family, find_model, new_config, read_config
from trainer.models.lora import add_adapters, is_adapter
from trainer.models.slicing import slice_model
from trainer.training.engine import make_optimizer, training_config
from trainer.training.job import Training
from trainer.worker import Worker, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class StudentWithLoss(nn.Module):
    """forward(batch, losses) -> (loss, float64 sums of each loss).

    hidden: which hidden states are compared with the teacher's, None for none; what that learns is
    drawn from `seed` and is no part of `model`.
    """

    def __init__(
        self, model: PreTrainedModel, vocab: int, hidden: HiddenPairs | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.vocab = vocab
        dtype = next(model.parameters()).dtype
        self.hidden = None if hidden is None else HiddenLoss(hidden, dtype, seed)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_weights: Tensor,
        labels: Tensor,
        losses: Mapping[str, tuple[float, Loss]],
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        log_tail: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | None = None,
        teacher_states: Sequence[Tensor] | None = None,
        hidden_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch; shapes as in `loader.MicroBatch`, losses as in `fused_loss`.

        A teacher that runs beside the student gives instead of records its final hidden states
        [tokens, teacher width] and its head; and teacher_states, [batch, seq, teacher width] for
        each pair of layers, for the distance of hidden states, which counts `hidden_weight`. The
        sums are float64 [losses], and one more with teacher_states: that distance.
        """
        compared = None if teacher_states is None else self.hidden
        layers = [] if compared is None else compared.pairs.student_layers
        with collected(self.model, layers) as states:
            hidden = last_hidden(self.model, input_ids, position_ids)
        if losses:
            head = head_of(self.model, self.vocab)
            target = Target(labels, ids, log_probs, log_tail)
            if teacher_head is not None:
                target = replace(target, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
            loss, sums = fused_loss(hidden, head, target, token_weights, losses)
        else:
            loss, sums = hidden.new_zeros((), dtype=torch.float32), token_weights.new_zeros(0)
        if teacher_states is None:
            return loss, sums
        if compared is None:
            raise ValueError("teacher_states need a plan of the hidden states to compare")
        own = [states[layer] for layer in layers]
        distance = compared(own, teacher_states, token_weights)
        return (
            loss + hidden_weight * distance.float(),
            torch.cat([sums.double(), distance.detach().unsqueeze(0)]),
        )


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


def _compared(job: Training, config: PreTrainedConfig) -> hidden_states.HiddenPairs | None:
    """Which hidden states are compared with the teacher's."""
    hidden = job.distill.losses.hidden
    if hidden is None or job.teacher is None:
        return None
    folder = find_model("teacher.model", job.teacher.model, job.teacher.revision)
    return hidden_states.hidden_pairs(hidden, config, read_config(folder))


def build_student(job: Training, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
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
