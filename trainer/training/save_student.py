"""Gathers a student's weights from its engine and writes them as a Hugging Face folder."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cluster.storage import Store
from trainer.corpus.corpus import Corpus
from trainer.corpus.tokenizer import load_tokenizer
from trainer.models.load import hash_files
from trainer.models.lora import merged_state, save_adapters
from trainer.teacher.sharded import forget
from trainer.training import best_weights, checkpoint
from trainer.training.best_weights import BestWeights
from trainer.training.checkpoint_names import DONE
from trainer.training.job import Training
from trainer.training.student import Built
from trainer.worker import Worker

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from trainer.training.student import Built


# Where in a student's folder its adapters are, beside the weights that they are merged into.
ADAPTER = "adapter"


def student_state(built: Built, is_main: bool) -> dict[str, Tensor]:
    """What was trained, by parameter name, on rank 0's CPU; collective.

    All weights of the student, or its adapters alone. Under ZeRO-3 each parameter is gathered in
    turn, so no rank holds more than one more. Other ranks get an empty dictionary.
    """
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in built.engine.module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=None, enabled=hasattr(parameter, "ds_id")
        ):
            if is_main:
                state[name] = parameter.detach().cpu().clone()
    return state


def save(
    built: Built, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Writes a student as a Hugging Face folder, from what `student_state` gave; on one rank.

    Adapters are merged into the weights, which any transformers loads, and also written beside
    them as a peft folder, `adapter`, unless what is under them is no model of its own (a slice).
    Raises ValueError on a misfit.
    """
    if not built.lora:
        save_student(built.config, state, tokenizer, folder, built.generation)
        return
    model = built.untrained()
    if built.base is not None:
        save_adapters(model, state, folder / ADAPTER)
    save_student(built.config, merged_state(model, state), tokenizer, folder, built.generation)


def save_student(
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    generation: GenerationConfig | None = None,
) -> None:
    """Writes a Hugging Face folder: safetensors, config, tokenizer, generation config if given.

    The weights are put into a fresh model of the same config, so that the folder's names are the
    architecture's own whatever wrapped the model in training. Raises ValueError on a misfit.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if unexpected or left:
        raise ValueError(f"weights do not fit the config: unexpected {unexpected}, without {left}")
    model.config.dtype = next(iter(state.values())).dtype
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_done(job: Training) -> dict[str, Any] | None:
    """The metrics of this training, if it is done and the output still holds its weights."""
    if not job.checkpoints.exists(DONE) or not job.output.exists("config.json"):
        return None
    metrics = job.checkpoints.read_json(DONE)
    return metrics if metrics["weights"] == weights_hash(job.output.fetch_folder("")) else None


def weights_hash(folder: Path) -> str:
    """Hash of a model folder's weights."""
    return hash_files(sorted(folder.glob("*.safetensors")))


def publish(
    job: Training,
    built: Built,
    corpus: Corpus,
    worker: Worker,
    metrics: dict[str, Any],
    bests: BestWeights,
    patient: ProcessGroup | None = None,
) -> None:
    """Saves the student to `job.output`, then says so; checkpoints go; collective.

    The student has the best weights. Where the last ones are others, they go to `job.last`.
    patient: a `Worker.patient_group`, in which the other ranks wait for rank 0's uploads.
    """
    state = student_state(built, worker.is_main)
    if worker.is_main:
        tokenizer = load_tokenizer(corpus.tokenizer_folder())
        chosen = bests.weights()
        if chosen is not None:
            _put(built, state, tokenizer, worker, job.last)
            state = chosen
        elif job.last.exists():
            worker.hooks.fence()
            job.last.delete("", recursive=True)
        metrics["weights"] = _put(built, state, tokenizer, worker, job.output)
        worker.hooks.flush()
        worker.hooks.fence()
        job.checkpoints.write_json(DONE, metrics)
        with suppress(OSError):  # the student is there; what is left over only takes up space
            checkpoint.prune(job.checkpoints, 0)
            if job.checkpoints.exists(best_weights.FOLDER):
                job.checkpoints.delete(best_weights.FOLDER, recursive=True)
    worker.wait(patient)
    module = built.engine.module
    built.engine.destroy()
    forget(module)


def _put(
    built: Built,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    worker: Worker,
    store: Store,
) -> str:
    """Makes `store` the student's folder with these weights; returns their hash."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-student-") as temporary:
        folder = Path(temporary)
        save(built, state, tokenizer, folder)
        worker.hooks.fence()
        new = {path.name for path in folder.iterdir()}
        for stale in sorted(set(store.list()) - new):
            store.delete(stale, recursive=True)
        store.upload_folder(folder, "")
        return weights_hash(folder)
