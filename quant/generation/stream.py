"""Text from a model as it is generated: sampling settings, whole characters, speed."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from quant.evaluation.speed import resident_bytes
from quant.kernels import kernel_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_TEMPERATURE = 1e-4  # below, logits over it leave float32
MOST_SEED = 2**63 - 1  # what torch's generators take


def sampling_faults(
    temperature: float, top_p: float | None, seed: int | None
) -> list[tuple[str, str]]:
    """(setting, what is wrong with it: what it is; what it may be), for each out of its range.

    temperature 0 takes the likeliest token, and draws nothing.
    """
    faults = []
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        faults.append(
            (
                "temperature",
                f"got {temperature:g}; may be 0 (the likeliest token), or "
                f"{LEAST_TEMPERATURE} and more",
            )
        )
    if top_p is not None and not 0 < top_p <= 1:
        faults.append(("top_p", f"got {top_p:g}; may be above 0, up to 1"))
    if seed is not None and not 0 <= seed <= MOST_SEED:
        faults.append(("seed", f"got {seed}; may be 0 to {MOST_SEED}"))
    return faults


BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no whole character yet


class Detokenizer:
    """Turns tokens into text one by one, in whole characters.

    A token's text depends on those before it (a leading space, the bytes of one character), so a
    piece is what the decoded text gains over that of the piece before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last piece, then what is not told yet
        self._told = 0  # how many of them are told

    def add(self, token: int) -> str:
        """The text that is now known to be whole, perhaps none."""
        self._ids.append(token)
        return self._gain(whole=True)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._gain(whole=False)

    def _gain(self, whole: bool) -> str:
        before, now = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if len(now) <= len(before) or (whole and now.endswith(BROKEN)):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: Any = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


END, LENGTH, POSITIONS, STOPPED = "end of text", "length", "positions", "stopped"


@dataclass(frozen=True)
class Statistics:
    """What a generation took.

    The prompt's seconds end with the first new token, so those of decoding are of the others.
    finish: END (the model ended the text), LENGTH (max_new_tokens), POSITIONS (the model has no
    more), STOPPED (the reader closed the stream). kernel: of the quantized layers, or the dtype.
    memory_bytes: of the weights as the kernels hold them, on CUDA the most that tensors took.
    """

    prompt_tokens: int
    prompt_s: float
    new_tokens: int
    decode_s: float
    finish: str
    kernel: str
    memory_bytes: int

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """None before the first token is there."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else None

    @property
    def new_tokens_per_s(self) -> float | None:
        """None of a single token: it comes with the prompt."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else None


class Stream(Iterator[str]):
    """The pieces of a text as they are generated; joined they are the decoded whole.

    A piece ends at a whole character. What goes wrong while generating is raised here. `close`
    (or leaving a `with` block) stops the generation; `statistics` are complete after the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Tensor,
        config: GenerationConfig,
        space: int,
        seed: int | None = None,
    ) -> None:
        """prompt: ids `[1, tokens]`; room: the most new tokens that the positions leave."""
        self.ids: list[int] = []  # the new tokens so far, special ones too
        self._model, self._tokenizer, self._prompt = model, tokenizer, prompt
        self._config, self._space, self._seed = config, space, seed
        self._stop = threading.Event()
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._clock = _Clock(self._tokens)
        self._error: BaseException | None = None
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; returns when the model stands still."""
        self._pieces.close()

    @property
    def statistics(self) -> Statistics:
        """Of what is generated so far."""
        times = self._clock.times
        ends = self._config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if self.ids and self.ids[-1] in ends:
            finish = END
        elif len(self.ids) < self._config.max_new_tokens:
            finish = STOPPED
        else:
            finish = POSITIONS if len(self.ids) == self._space else LENGTH
        kernel = kernel_names(self._model)
        if kernel == "dense":
            kernel = f"{str(self._model.dtype).removeprefix('torch.')} matmul"
        return Statistics(
            prompt_tokens=self._prompt.shape[1],
            prompt_s=times[1] - times[0] if len(times) > 1 else 0.0,
            new_tokens=len(self.ids),
            decode_s=times[len(self.ids)] - times[1] if len(self.ids) > 1 else 0.0,
            finish=finish,
            kernel=kernel,
            memory_bytes=memory_bytes(self._model),
        )

    def _run(self) -> Generator[str, None, None]:
        worker = threading.Thread(target=self._generate, name="generate", daemon=True)
        text = Detokenizer(self._tokenizer)
        worker.start()
        try:
            while (token := self._tokens.get()) is not None:
                self.ids.append(token)
                if piece := text.add(token):
                    yield piece
            if self._error is not None:
                raise self._error
            if piece := text.rest():
                yield piece
        finally:
            self._stop.set()
            worker.join()
            while not self._tokens.empty():  # generated, but not shown any more
                self._tokens.get()

    def _generate(self) -> None:
        """What the thread does: everything it has to say goes through the queue."""
        devices = [self._prompt.device] if self._prompt.device.type == "cuda" else []
        try:
            # Drawing by a seed leaves the process's own generators as they were.
            with torch.random.fork_rng(devices, enabled=self._seed is not None):
                if self._seed is not None:
                    torch.manual_seed(self._seed)
                _with_config(self._model, self._config).generate(
                    input_ids=self._prompt,
                    attention_mask=torch.ones_like(self._prompt),
                    generation_config=self._config,
                    streamer=self._clock,
                    stopping_criteria=StoppingCriteriaList([_Stopped(self._stop)]),
                )
        except BaseException as error:
            self._error = error
        finally:
            self._tokens.put(None)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[dict[str, str]],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Stream:
    """Continue `prompt` with at most `max_new_tokens` tokens (fewer where positions end).

    prompt: a text, or messages ({"role": ..., "content": ...}) for the chat template.
    temperature 0 takes the likeliest token each time; above, tokens are drawn from the
    distribution at that temperature, from its likeliest ids that hold `top_p` of the probability,
    the same again for the same seed. Other settings of the model's generation_config (penalties,
    top_k, suppressed tokens) are not applied, only its end-of-text ids. Returns a `Stream` of
    pieces of text.

    Raises ValueError, one line: an empty prompt, one longer than the model's positions, no chat
    template, values out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; may be 1 or more")
    for name, fault in sampling_faults(temperature, top_p, seed):
        raise ValueError(f"{name}: {fault}")
    ids = _prompt_ids(tokenizer, prompt)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    space = max_new_tokens + 1 if limit is None else limit - len(ids)
    if limit is not None and space < 1:
        raise ValueError(
            f"prompt: has {len(ids):,} tokens, but the model has {limit:,} positions, for prompt "
            f"and new tokens together; give one of at most {limit - 1:,} tokens"
        )
    rows = model.config.get_text_config().vocab_size
    if max(ids) >= rows:
        raise ValueError(
            f"prompt: the tokenizer gives the id {max(ids)}, the model has {rows} embedding rows; "
            "give the tokenizer that the model was made with"
        )
    own, drawn = model.generation_config, temperature > 0
    ends = tokenizer.eos_token_id if own is None or own.eos_token_id is None else own.eos_token_id
    padding = None if own is None else own.pad_token_id
    if padding is None:
        padding = ends[0] if isinstance(ends, list) else ends
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, space),
        do_sample=drawn,
        bos_token_id=None if own is None else own.bos_token_id,
        eos_token_id=ends,
        pad_token_id=padding,
        **(sampling if drawn else {}),
    )
    prompt_ids = torch.tensor([ids], device=model.device)
    return Stream(model, tokenizer, prompt_ids, config, space, seed if drawn else None)


def _with_config(model: PreTrainedModel, config: GenerationConfig) -> Any:  # noqa: ANN401
    """The same model, all of it shared, with another generation_config.

    `generate` fills what it is not given from the model's own one, which is not to change.
    """
    twin = object.__new__(type(model))
    vars(twin).update({**vars(model), "generation_config": config})
    return twin


def memory_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's weights as its kernels hold them; on a CUDA device the most that tensors
    have taken there. The process takes more: libraries, and the keys and values of the text."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return resident_bytes(model)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, str]]
) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("prompt: is empty; may be a text")
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        if not tokenizer.chat_template:
            raise ValueError(
                "prompt: messages need a chat template, which this tokenizer lacks; give a text"
            )
        text = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=False
        )
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError("prompt: the tokenizer makes no token of it; give another text")
    return ids


class _Clock(BaseStreamer):
    """Passes tokens on, and notes when the prompt (first) and each new token came."""

    def __init__(self, tokens: queue.SimpleQueue[int | None]) -> None:
        self.times: list[float] = []
        self._tokens = tokens

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self._tokens.put(int(value.reshape(-1)[0]))

    def end(self) -> None:
        """The thread says so itself, whatever ends it."""


class _Stopped(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)
