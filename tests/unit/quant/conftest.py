"""Tiny random models, token sequences and teacher records for the tests of `quant`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.logits.records import Records

VOCAB = 256


@dataclass
class Batch:
    input_ids: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray


def tiny_llama(
    tied: bool = False, seed: int = 0, scale: float = 4.0, **changes
) -> LlamaForCausalLM:
    """Hidden 64, 2 layers; weights `scale` times the usual, so that its predictions differ."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(scale)
    return model


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def batches() -> list[Batch]:
    """Two batches of unequal size; one sequence with padding, one of two packed documents."""
    rng = np.random.default_rng(3)
    made = []
    for rows in (3, 2):
        ids = rng.integers(0, VOCAB, (rows, 20))
        positions = np.tile(np.arange(20), (rows, 1))
        mask = np.ones((rows, 20), np.float32)
        mask[:, -1] = 0
        mask[0, 14:] = 0
        positions[1, 9:] = np.arange(11)
        mask[1, 8] = 0
        made.append(Batch(ids, positions, mask))
    return made


@pytest.fixture
def make_records() -> Callable[..., list[Records]]:
    """Top-k records of a model over batches, made with float64 softmax."""

    def make(model: LlamaForCausalLM, batches: list[Batch], k: int) -> list[Records]:
        made = []
        for batch in batches:
            log_probs = full_log_probs(model, batch).numpy()
            ids = np.sort(np.argsort(-log_probs, axis=-1)[..., :k], axis=-1)
            kept = np.take_along_axis(log_probs, ids, -1)
            following = np.roll(batch.input_ids, -1, axis=1)[..., None]
            entropy = -(np.exp(log_probs) * log_probs).sum(-1)
            true = np.take_along_axis(log_probs, following, -1)[..., 0]
            with np.errstate(divide="ignore"):
                log_tail = np.log(np.clip(1 - np.exp(kept).sum(-1), 0, 1))
            made.append(
                Records(
                    ids.reshape(-1, k),
                    kept.reshape(-1, k).astype(np.float32),
                    log_tail.reshape(-1, 1).astype(np.float32),
                    entropy.flatten().astype(np.float32),
                    true.flatten().astype(np.float32),
                )
            )
        return made

    return make


def full_log_probs(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """float64 log-softmax `[batch, seq, vocab]` of the model's own whole forward pass."""
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            use_cache=False,
        )
    return torch.log_softmax(output.logits.double(), dim=-1)


@pytest.fixture
def whole_log_probs() -> Callable[..., torch.Tensor]:
    return full_log_probs


@pytest.fixture
def foretell() -> Callable[..., None]:
    """Makes every second token what `model` expects, so that its accuracy is about a half."""

    def change(model: LlamaForCausalLM, batches: list[Batch]) -> None:
        for batch in batches:
            for at in range(1, batch.input_ids.shape[1], 2):
                guess = full_log_probs(model, batch)[:, at - 1].argmax(-1)
                batch.input_ids[:, at] = guess.numpy()

    return change
