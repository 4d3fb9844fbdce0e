"""Rules across the sections of a spec that the trainer reads, the same for all launchers.

Each gives one line (the key, what it got, what it may be), or None. Rules about the world (files,
models) are `trainer.checks` and the launchers'; these read the spec alone, and import nothing
heavy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from trainer.spec.responses import AnswersEndpoint, AnswersFile, ResponsesSpec
from trainer.spec.sections import (
    CacheSpec,
    DataSpec,
    DistillSpec,
    StudentSpec,
    TeacherSpec,
    TokenizerSpec,
    temperature_fault,
)

# Losses that are not linear in the teacher's distribution: that of a few draws, right on average,
# does not give the right one on average.
NOT_LINEAR = ("reverse_kl", "jsd", "skew_kl")

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Sections(Protocol):
    """The sections of a spec that the trainer reads."""

    @property
    def seed(self) -> int: ...
    @property
    def storage(self) -> str: ...
    @property
    def teacher(self) -> TeacherSpec | None: ...
    @property
    def student(self) -> StudentSpec: ...
    @property
    def tokenizer(self) -> TokenizerSpec | None: ...
    @property
    def data(self) -> DataSpec | None: ...
    @property
    def responses(self) -> ResponsesSpec | None: ...
    @property
    def cache(self) -> CacheSpec: ...
    @property
    def distill(self) -> DistillSpec | None: ...
    @property
    def recovery_sequences(self) -> int: ...
    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any: ...  # noqa: ANN401


class Rule(NamedTuple):
    """A rule across sections: the keys it reads, and what gives its one-line fault, if any."""

    reads: tuple[str, ...]
    fault: Callable[[Any], str | None]


def faults_of(rules: Iterable[Rule], spec: object, at_fault: Iterable[str] = ()) -> list[str]:
    """One line for every rule that `spec` breaks.

    Rules that read one of the dotted keys `at_fault` are left out: their keys hold no values to
    judge. `spec` may then be incomplete there.
    """
    bad = list(at_fault)
    told = (
        rule.fault(spec)
        for rule in rules
        if not any(_concerns(key, one) for key in rule.reads for one in bad)
    )
    return [line for line in told if line is not None]


def _concerns(key: str, bad: str) -> bool:
    """Whether a rule that reads `key` is blind when `bad` is at fault.

    A rule that reads a whole section asks only whether it is there, so a fault inside of it
    does not matter.
    """
    if key == bad or key.startswith(bad + "."):
        return True
    return bad.startswith(key + ".") and "." in key


def raise_faults(faults: list[str]) -> None:
    """In a validator: raises `faults`, if any, so that `SpecReader` tells them as lines."""
    if faults:
        raise PydanticCustomError("rules", "{text}", {"text": "\n".join(faults)})


def plain_name(value: str) -> str:
    """`value`, if it can be the name of a run; raises ValueError with what may be."""
    if not NAME.fullmatch(value):
        raise ValueError(
            "may be 1 to 63 lower-case letters, digits, '.', '_' and '-', "
            "the first a letter or a digit"
        )
    return value


def is_hub_id(model: str) -> bool:
    """Whether `model` is written like a hub id (`name` or `owner/name`), not a path or a URL."""
    return _HUB_ID.fullmatch(model) is not None


def _step_of_whole_sequences(spec: Sections) -> str | None:
    if spec.distill is None or spec.data is None:
        return None
    tokens, length = spec.distill.tokens_per_step, spec.data.sequence_length
    if tokens % length == 0:
        return None
    nearest = max(1, round(tokens / length)) * length
    return (
        f"distill.tokens_per_step: got {tokens}; may be a multiple of data.sequence_length "
        f"({length}), e.g. {nearest}"
    )


def _tokens_for_a_sequence(spec: Sections) -> str | None:
    if spec.data is None or spec.data.max_tokens == "auto":
        return None
    if spec.data.max_tokens >= spec.data.sequence_length:
        return None
    return (
        f"data.max_tokens: got {spec.data.max_tokens}; may be auto or a whole number from "
        f"data.sequence_length ({spec.data.sequence_length})"
    )


def _existing_corpus_of_texts(spec: Sections) -> str | None:
    if spec.data is None or spec.data.corpus is None or spec.responses is None:
        return None
    return (
        "data.corpus: got a corpus with responses, whose corpus is made of the answers; remove it"
    )


def _temperature_captured(spec: Sections) -> str | None:
    return None if spec.distill is None else temperature_fault(spec.distill, spec.cache)


def _losses_need_teacher(spec: Sections) -> str | None:
    if spec.teacher is not None or spec.distill is None:
        return None
    needy = spec.distill.losses.of_teacher()
    if needy:
        return (
            f"distill.losses: {needy[0]} needs a teacher; give teacher: {{model: ...}}, or train "
            "without one: losses: {ce: 1.0}"
        )
    return None


def _losses_served(spec: Sections) -> str | None:
    """What a source of the teacher's signal cannot serve."""
    distill, cache = spec.distill, spec.cache
    if distill is None:
        return None
    if distill.mode != "online":
        if "hidden" in distill.losses.used():
            return (
                f"distill.losses.hidden: got distill.mode: {distill.mode}; may be used with mode: "
                "online, as a cache holds no hidden states"
            )
        biased = [name for name in NOT_LINEAR if name in distill.losses.used()]
        if biased and cache.method == "sample":
            return (
                f"distill.losses.{biased[0]}: may not be used with cache.method: sample, whose "
                "draws would bias it, as it is not linear in the teacher's distribution; may be "
                "forward_kl, or use cache: {method: topk} or distill.mode: online"
            )
    return None


def _online_needs_signal(spec: Sections) -> str | None:
    if spec.distill is None or spec.distill.mode != "online":
        return None
    if spec.teacher is None:
        return "distill.mode: got online without a teacher; may be cached, or give teacher"
    if not spec.distill.losses.of_teacher():
        return (
            "distill.mode: got online without a loss to the teacher in distill.losses; "
            "may be cached"
        )
    return None


def _control_needs_teacher(spec: Sections) -> str | None:
    if spec.distill is None or not spec.distill.control:
        return None
    if spec.teacher is None:
        return "distill.control: got true; may be false without a teacher, whose gain it measures"
    if not spec.distill.losses.of_teacher():
        return (
            "distill.control: got true; may be false without a loss to the teacher in "
            "distill.losses, as the student is then the control"
        )
    return None


def _slice_needs_teacher(spec: Sections) -> str | None:
    if spec.student.init != "slice" or spec.teacher is not None:
        return None
    return (
        "student.init: got slice without a teacher, whose layers it keeps; may be pretrained or "
        "random, or give teacher"
    )


def _lora_needs_weights(spec: Sections) -> str | None:
    if spec.student.lora is None:
        return None
    if spec.distill is None:
        return "student.lora: may not be given with distill: null, which trains nothing; remove it"
    if spec.student.init == "random":
        return (
            "student.lora: may not be given with student.init: random, as adapters cannot make up "
            "for weights that know nothing; remove lora, or start from pretrained"
        )
    return None


def _tokenizer_fits(spec: Sections) -> str | None:
    if spec.tokenizer is None:
        if spec.teacher is None and spec.student.model is None:
            return (
                "tokenizer: got null; needed where neither teacher nor student.model brings one, "
                "e.g. tokenizer: {train: 2048}"
            )
        return None
    if spec.teacher is not None:
        return (
            "tokenizer.train: may not be given with a teacher, whose vocabulary the student must "
            "have; remove tokenizer"
        )
    if spec.student.init == "pretrained":
        return (
            "tokenizer.train: may not be given with student.init: pretrained, whose weights "
            "belong to the model's own vocabulary; remove tokenizer"
        )
    return None


def _tokenizer_reads_text(spec: Sections) -> str | None:
    if spec.tokenizer is None or spec.data is None:
        return None
    for index, source in enumerate(spec.data.train):
        if source.format != "text":
            return (
                f"data.train.{index}.format: got {source.format}; may be text with "
                "tokenizer.train, which learns from text"
            )
    return None


def _some_source(spec: Sections) -> str | None:
    if spec.data is None or spec.data.train:
        return None
    if spec.responses is not None and isinstance(spec.responses.origin, AnswersFile):
        return None
    return (
        "data.train: got []; may be a list, not empty, each a section (source, format, column, "
        "split, ...); empty with responses.from: {file: ...} alone"
    )


def _responses_for_mode(spec: Sections) -> str | None:
    wanted = spec.distill is not None and spec.distill.mode == "responses"
    if wanted and spec.responses is None:
        return "responses: got null; needed by distill.mode: responses, e.g. {from: teacher}"
    if spec.responses is None or wanted:
        return None
    mode = "null" if spec.distill is None else f"{{mode: {spec.distill.mode}}}"
    return (
        f"responses: may not be given with distill: {mode}; set distill.mode: responses, "
        "or remove it"
    )


def _answers_need_teacher(spec: Sections) -> str | None:
    if spec.responses is None or spec.responses.origin != "teacher" or spec.teacher is not None:
        return None
    return (
        "responses.from: got teacher, and there is none; give teacher, {file: ...} or "
        "{endpoint: ..., model: ...}"
    )


def _file_needs_no_prompts(spec: Sections) -> str | None:
    if spec.responses is None or spec.data is None:
        return None
    if isinstance(spec.responses.origin, AnswersFile) and spec.data.train:
        return (
            "data.train: may be [] with responses.from: {file: ...}, as prompts and answers come "
            "from that file"
        )
    return None


def _prompts_of_conversations(spec: Sections) -> str | None:
    if spec.responses is None or spec.data is None:
        return None
    if spec.distill is None or spec.distill.mode != "responses":
        return None
    for index, source in enumerate(spec.data.train):
        if source.format not in ("messages", "prompt_completion"):
            return (
                f"data.train.{index}.format: got {source.format}; may be messages or "
                "prompt_completion with distill.mode: responses, which takes the prompts from them"
            )
    return None


def _revision_of_hub_id(section: str) -> Callable[[Any], str | None]:
    def fault(spec: object) -> str | None:
        part = getattr(spec, section)
        if part is None or part.revision == "main":
            return None
        if part.model is not None and is_hub_id(part.model):
            return None
        return (
            f"{section}.revision: got {json.dumps(part.revision)}; only hub ids have revisions, "
            f"{section}.model is {json.dumps(part.model)}"
        )

    return fault


RULES = (
    Rule(("data.train", "responses.from"), _some_source),
    Rule(("distill.tokens_per_step", "data.sequence_length"), _step_of_whole_sequences),
    Rule(("data.max_tokens", "data.sequence_length"), _tokens_for_a_sequence),
    Rule(("data.corpus", "responses"), _existing_corpus_of_texts),
    Rule(
        ("distill.temperature", "distill.mode", "cache.method", "cache.temperatures"),
        _temperature_captured,
    ),
    Rule(("teacher", "distill.losses"), _losses_need_teacher),
    Rule(("distill.losses", "distill.mode", "cache.method"), _losses_served),
    Rule(("teacher", "distill.mode", "distill.losses"), _online_needs_signal),
    Rule(("teacher", "distill.control", "distill.losses"), _control_needs_teacher),
    Rule(("distill.mode", "responses"), _responses_for_mode),
    Rule(("responses.from",), lambda spec: responses_fault(spec.responses)),
    Rule(("teacher", "responses.from"), _answers_need_teacher),
    Rule(("data.train", "responses.from"), _file_needs_no_prompts),
    Rule(("data.train", "distill.mode", "responses"), _prompts_of_conversations),
    Rule(("teacher", "student.init"), _slice_needs_teacher),
    Rule(("distill", "student.init", "student.lora"), _lora_needs_weights),
    Rule(("teacher", "tokenizer", "student.model", "student.init"), _tokenizer_fits),
    Rule(("tokenizer", "data.train"), _tokenizer_reads_text),
    Rule(("teacher.model", "teacher.revision"), _revision_of_hub_id("teacher")),
    Rule(("student.model", "student.revision"), _revision_of_hub_id("student")),
)


GENERATED = ("max_new_tokens", "temperature", "top_p", "samples", "seed")


def responses_fault(responses: ResponsesSpec | None) -> str | None:
    """One line if keys of `responses` do not go together, else None."""
    if responses is None:
        return None
    origin = responses.origin
    if isinstance(origin, AnswersFile):
        for name in GENERATED:
            value = getattr(responses, name)
            if value != type(responses).model_fields[name].default:
                return (
                    f"responses.{name}: got {value}; is for answers that are generated, and those "
                    f"of from: {{file: ...}} are there; remove {name}"
                )
        return None
    if responses.temperature == 0:
        if responses.samples > 1:
            return (
                f"responses.samples: got {responses.samples}; may be 1 with temperature: 0, where "
                "all answers to a prompt are the same"
            )
        if responses.top_p < 1:
            return (
                f"responses.top_p: got {responses.top_p}; may be 1 with temperature: 0, which does "
                "not sample"
            )
    if isinstance(origin, AnswersEndpoint):
        if "@" in urlsplit(origin.endpoint).netloc:
            return (
                "responses.from.endpoint: has credentials in the URL; remove them, and name the "
                "variable that holds the key with api_key_env"
            )
        if "?" in origin.endpoint or "#" in origin.endpoint:
            return (
                "responses.from.endpoint: may be a base URL such as https://api.example.com/v1, "
                "without ? and #"  # what follows them may be a key, and is not repeated
            )
    return None
