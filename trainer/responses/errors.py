"""What is wrong with `responses`, as far as the spec and this machine tell; before work starts.

Rules across other sections (mode, teacher, formats of sources) are in `trainer.spec.rules`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trainer.spec.sections import AnswersEndpoint, AnswersFile, ResponsesSpec, TeacherSpec


def world_faults(
    spec: Any, environ: Mapping[str, str] | None = None, *, tokenizer: Any = None
) -> list[str]:
    """One line per fault that only this machine can tell: keys, files, prompts.

    spec: its sections `teacher`, `data` and `responses`; asked for where prepare will run, on the
    driver. tokenizer: the corpus's, to see whether it can render the answers, and whether those of
    a file suffice.
    """
    from trainer.corpus.chat_template import has_template
    from trainer.responses.answers_file import check_answers_size, check_file
    from trainer.responses.ask import api_key
    from trainer.responses.prompts import check_prompts

    responses = spec.responses
    if responses is None or spec.data is None:
        return []
    origin = responses.origin
    try:
        if isinstance(origin, AnswersEndpoint):
            api_key(origin, os.environ if environ is None else environ)
        if isinstance(origin, AnswersFile):
            chats = {"responses.from.file": check_file(origin)}
        else:
            chats = check_prompts(spec.data)
        if origin == "teacher":
            _check_room(responses, getattr(spec, "teacher", None))
    except ValueError as error:
        return [" ".join(str(error).split())]
    if tokenizer is None:
        return []
    if any(chats.values()) and not has_template(tokenizer):
        name = getattr(tokenizer, "name_or_path", "that is trained on the corpus")
        return [
            f"{key}: holds messages, which need a chat template, and the tokenizer {name} has "
            "none; give prompts and completions that are texts, or a model with a chat template"
            for key, is_chat in chats.items()
            if is_chat
        ]
    try:
        if isinstance(origin, AnswersFile):
            check_answers_size(origin, spec.data, tokenizer)
    except ValueError as error:
        return [" ".join(str(error).split())]
    return []


def _check_room(responses: ResponsesSpec, teacher: TeacherSpec | None) -> None:
    """Raises ValueError, one line, where no prompt at all could leave room for an answer."""
    from trainer.models.load import find_model, max_length, read_config

    if teacher is None:
        return
    folder = find_model("teacher.model", teacher.model, teacher.revision)
    positions = max_length(read_config(folder))
    if positions is not None and responses.max_new_tokens >= positions:
        raise ValueError(
            f"responses.max_new_tokens: got {responses.max_new_tokens}; may be less than the "
            f"teacher's {positions} positions, which hold the prompts too"
        )
