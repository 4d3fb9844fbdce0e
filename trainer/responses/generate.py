"""One batch of answers from a model: transformers' `generate`, driven by numbers of our own.

Everything that decides an answer is given here: of the model's generation_config.json only the ids
that end an answer are heeded, not its temperature, top_k or penalties.

The next token is drawn with random numbers of its own: transformers draws from torch's global
generator, so an answer there depends on what else is in the batch and was drawn before. Here the
number is Philox4x32-10 of (seed, prompt, sample, position) and the id is found by inverting the
distribution function (`trainer.teacher.sampling`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from trainer.corpus import chat_template
from trainer.corpus.tokenizer import pad_id, vocabulary_size
from trainer.responses.prompts import Prompt
from trainer.teacher.sampling import BLOCK, draw, uniforms
from trainer.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trainer.spec.responses import ResponsesSpec


class NextToken(LogitsProcessor):
    """Leaves one id of each row finite, so that greedy decoding takes it.

    streams: int64 [batch, 4], `sampling.stream` of each row. prompt: columns of the input that are
    the (padded) prompt. vocab: ids from there on are rows of no token. temperature 0: the most
    likely id. top_p: of the most likely ids as many as have this probability together (Holtzman et
    al., "The curious case of neural text degeneration", ICLR 2020).
    """

    def __init__(
        self, streams: Tensor, prompt: int, vocab: int, temperature: float, top_p: float
    ) -> None:
        self.streams, self.prompt, self.vocab = streams, prompt, vocab
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [batch, rows] of which all but the next id are -inf."""
        known = scores[:, : self.vocab].float()
        if self.temperature == 0:
            chosen = known.argmax(dim=-1, keepdim=True)
        else:
            probabilities = nucleus((known / self.temperature).softmax(dim=-1), self.top_p)
            place = torch.full(
                (len(scores),), input_ids.shape[1] - self.prompt, device=scores.device
            )
            numbers = uniforms(self.streams, place, 1)
            padded = torch.nn.functional.pad(probabilities, (0, -self.vocab % BLOCK))
            chosen = draw(padded, numbers).long()
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [rows, vocab] with 0 for all ids outside of the nucleus; not normalized."""
    if top_p >= 1:
        return probabilities
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, ids, kept)


# Tokens that end a turn in chat templates, where the tokenizer's end-of-text token does not.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>")


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. ends: ids of which each ends an answer. pad: the padding id."""

    max_new_tokens: int
    temperature: float
    top_p: float
    vocab: int
    ends: tuple[int, ...]
    pad: int


@dataclass
class UnderWay:
    """A batch under way. tell(tokens): after every token, with the number of new ones. stop():
    whether a stop is asked for. stopped: whether the batch was left because of that."""

    notify: Callable[[int], None]
    stop: Callable[[], bool]
    stopped: bool = False


class TeacherWithAnswers(nn.Module):
    """The teacher, called for answers; what wraps the model in `load_teacher`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        model.generation_config = GenerationConfig()

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        streams: Tensor,
        settings: Settings,
        group: Worker | None,
        batch: UnderWay,
    ) -> Tensor:
        """New ids [batch, at most max_new_tokens] after prompts [batch, seq], padded on the left.

        mask: 1 where a prompt is. streams: int64 [batch, 4]. group: ranks that share one copy of
        the weights and so must make equally many forward passes, None where this rank has its own.
        After the first id that ends an answer a row holds ids of no meaning; all rows are short
        if `batch` was stopped.
        """
        start = ids.shape[1]
        sampler = NextToken(streams, start, settings.vocab, settings.temperature, settings.top_p)
        model: Any = self.model
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=settings.pad,
            ),
            logits_processor=[sampler],
            stopping_criteria=StoppingCriteriaList([_AllEnded(settings.ends, start, group, batch)]),
            synced_gpus=False,
        )
        return output[:, start:]


class _AllEnded(StoppingCriteria):
    """Ends the batch once all its rows, and those of the group's other ranks, have ended, or once a
    stop is asked for."""

    def __init__(
        self, ends: Sequence[int], start: int, group: Worker | None, batch: UnderWay
    ) -> None:
        self.ends, self.start, self.group, self.batch = ends, start, group, batch
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        ends = torch.tensor(self.ends, device=input_ids.device)
        now = torch.isin(input_ids[:, -1], ends)
        self.ended = now if self.ended is None else self.ended | now
        over, stop = bool(self.ended.all()), self.batch.stop()
        if self.group is not None:
            going, stops = self.group.sum([float(not over), float(stop)])
            over, stop = going == 0.0, stops > 0.0
        self.batch.stopped = stop and not over
        self.batch.notify(input_ids.shape[1] - self.start)
        return torch.full_like(now, over or stop)


def ending_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of which each ends an answer: the model's own, the tokenizer's, and ends of turns."""
    ids = {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = GenerationConfig.from_pretrained(folder, config_file_name=name).eos_token_id
            if found is not None:
                ids |= set(found if isinstance(found, list) else [found])
    template = str(getattr(tokenizer, "chat_template", None) or "")
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in END_OF_TURN if token in template and token in vocabulary}
    return tuple(sorted(ids))


def make_settings(
    responses: ResponsesSpec, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Settings:
    """The settings of a `ResponsesSpec` for the model in `folder`."""
    return Settings(
        max_new_tokens=responses.max_new_tokens,
        temperature=responses.temperature,
        top_p=responses.top_p,
        vocab=vocabulary_size(tokenizer),
        ends=ending_ids(folder, tokenizer),
        pad=pad_id(tokenizer),
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The ids that the model goes on from, as they will be learnt from; messages up to its turn.

    Raises ValueError, one line, for messages that the chat template does not take.
    """
    if not isinstance(prompt.value, str):
        try:
            return chat_template.prompt_ids(tokenizer, prompt.value)
        except ValueError as error:
            shown = str(prompt.value)[:120]
            raise ValueError(f"data.train.{prompt.source}: {error}: {shown}") from None
    ids: list[int] = chat_template.Chat(tokenizer).encode(prompt.value, special=True).tolist()
    # Some tokenizers end every text; what goes on has not ended.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def cut_answer(ids: Sequence[int], ends: Sequence[int]) -> tuple[list[int], str]:
    """The ids before the first one that ends an answer, and "stop"; or all, and "length"."""
    for place, token in enumerate(ids):
        if token in ends:
            return list(ids[:place]), "stop"
    return list(ids), "length"


def answer_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int], is_chat: bool
) -> str:
    """The text of an answer, with the space that a text's continuation may begin with."""
    decode: Any = tokenizer.decode
    if not is_chat:
        before = decode(prompt, skip_special_tokens=True)
        whole = decode([*prompt, *ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
    return decode(ids, skip_special_tokens=True)
