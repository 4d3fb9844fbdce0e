"""Benchmark tasks by lm-eval: run for one model, and two models compared document by document.

lm-eval (github.com/EleutherAI/lm-evaluation-harness) is an optional dependency: it is imported
when tasks are asked for. A local task, a folder of YAML files and data, needs no network.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant.evaluation.lm_eval_tasks import (
    KEY,
    SEED,
    load_tasks,
    look_at_folder,
    look_at_name,
    set_fewshot,
    swapped,
)
from quant.spec import Task

Answered = Callable[[float, str, int, int], None]
HASH_DIGITS = 16  # of lm-eval's 64: enough to join documents by


def require_lm_eval() -> None:
    """Raises ValueError, one line, where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"{KEY}: needs lm-eval, which is not installed; in the checkout, run: .venv/bin/pip "
            "install --constraint requirements.lock --editable '.[tasks]'"
        )


def check_tasks(tasks: Sequence[Task]) -> list[str]:
    """What is wrong with the tasks, one line each, as far as that shows without a model.

    Local folders are read without a network. For names the index of lm-eval's own tasks is made,
    which takes seconds; whether their data can be had is not looked at.
    """
    if not tasks:
        return []
    try:
        require_lm_eval()
    except ValueError as error:
        return [str(error)]
    faults: list[str] = []
    seen: dict[str, int] = {}
    for number, task in enumerate(tasks):
        with _quiet():
            found, wrong = look_at_folder(task) if task.folder else look_at_name(task)
        for name, config in found.items():
            if name in seen and seen[name] != number:
                wrong.append(f"{name} is in {KEY}.{seen[name]} already; list every task once")
            seen.setdefault(name, number)
            if task.num_fewshot and config.get("num_fewshot") == 0:
                wrong.append(
                    f"num_fewshot is {task.num_fewshot}, but {name} fixes 0 itself; leave "
                    "num_fewshot out"
                )
        faults += [f"{KEY}.{number}: {line}" for line in wrong]
    return faults


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    batch_size: int,
    max_length: int | None = None,
    progress: Answered | None = None,
) -> dict[str, Any]:
    """The results of a model in benchmark tasks, by the tasks' own names; JSON throughout.

    Each: metric (the one that says right or wrong per document: acc, exact_match..; None: none
    does), accuracy (its mean; 0 to 1), accuracy_norm where the task has acc_norm, metrics (all of
    lm-eval's numbers, as `metric` or `metric,filter`), documents, num_fewshot, limit, batch_size,
    max_length, truncated_texts (prompts with an answer that lost their beginning to max_length),
    seed, version (of the task), task_hash (of documents, prompts and targets), lm_eval, and aligned
    lists doc_hashes and correct (0 or 1). A group has an entry of its own, over all documents of
    its `tasks`.

    batch_size: texts per forward pass, fixed: numbers may change with it in their last digits.
    max_length: tokens; None: the model's positions. Log-probabilities are summed from a softmax in
    float32, whatever the model's dtype. Random generators are left as they were found. progress:
    called with the share of all tasks that is done, the task, and its answers done and of all.
    Raises ValueError, one line, for a task that does not load or a text that does not fit.
    """
    if not tasks:
        return {}
    require_lm_eval()
    from lm_eval.evaluator import evaluate

    results: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    with _quiet() as answered, _seeded(), tempfile.TemporaryDirectory() as cache:
        harness = _harness(model, copy.deepcopy(tokenizer), batch_size, max_length)
        for number, spec in enumerate(tasks):
            loaded, found = load_tasks(spec, Path(cache))
            groups.update(found)
            for at, (name, task) in enumerate(loaded.items()):
                if name in results:
                    raise ValueError(f"{KEY}: {name} is listed twice; list every task once")
                set_fewshot(task, spec.num_fewshot)
                harness.truncated = 0
                if progress is not None:
                    share = 1 / len(loaded) / len(tasks)
                    answered[:] = [_one_of(progress, name, number / len(tasks) + at * share, share)]
                evaluated = evaluate(
                    lm=harness,
                    task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                    limit=spec.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                )
                results[name] = {
                    **_scores(name, evaluated),
                    "limit": spec.limit,
                    "batch_size": batch_size,
                    "max_length": harness.max_length,
                    "truncated_texts": harness.truncated,
                    "seed": SEED,
                    "lm_eval": version("lm_eval"),
                }
    return {**results, **_group_scores(results, groups)}


def _one_of(
    progress: Answered, task: str, before: float, share: float
) -> Callable[[int, int], None]:
    """`progress` as the bar of one task calls it. before: the share of the tasks before it."""
    return lambda done, total: progress(before + share * done / max(1, total), task, done, total)


def compare_tasks(reference: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """What `run_tasks` found for a model beside what it found for its reference, by task.

    Each: accuracy, reference_accuracy, right_to_wrong and wrong_to_right (documents that flipped,
    seen from the reference: accuracy - reference_accuracy = (wrong_to_right - right_to_wrong) /
    documents), mcnemar_p (exact two-sided binomial test that both flips are as likely; McNemar
    1947), retention (accuracy over reference_accuracy in percent; None over 0). Tasks that say
    right or wrong of no document are left out. Raises ValueError where the documents differ.
    """
    from scipy.stats import binomtest

    compared = {}
    for name, found in model.items():
        if found["metric"] is None:
            continue
        if name not in reference or reference[name]["metric"] != found["metric"]:
            raise ValueError(f"task {name}: the reference was not measured in it; run it again")
        before, after = _documents(reference, name), _documents(model, name)
        if [key for key, _ in before] != [key for key, _ in after]:
            raise ValueError(
                f"task {name}: the reference saw {len(before)} documents and the model "
                f"{len(after)}, not the same ones; run both again with the same task and limit"
            )
        pairs = [(old, new) for (_, old), (_, new) in zip(before, after, strict=True)]
        lost, won = pairs.count((1, 0)), pairs.count((0, 1))
        right, was_right = sum(new for _, new in pairs), sum(old for old, _ in pairs)
        flips = lost + won
        compared[name] = {
            "accuracy": right / len(pairs),
            "reference_accuracy": was_right / len(pairs),
            "right_to_wrong": lost,
            "wrong_to_right": won,
            "mcnemar_p": float(binomtest(lost, flips, 0.5).pvalue) if flips else 1.0,
            "retention": 100 * right / was_right if was_right else None,
        }
    return compared


def _documents(results: Mapping[str, Any], name: str) -> list[tuple[str, int]]:
    """(hash, right or wrong) of a task's documents, or a group's, in an order that hashes give."""
    found = results[name]
    pairs: list[tuple[str, int]] = []
    for member in found.get("tasks", [name]):
        one = results[member]
        keys = (f"{member}/{key}" for key in one["doc_hashes"])
        pairs += zip(keys, one["correct"], strict=True)
    return sorted(pairs, key=lambda pair: pair[0])


def _scores(name: str, evaluated: Mapping[str, Any]) -> dict[str, Any]:
    """A task's part of what lm-eval's `evaluate` returned."""
    from lm_eval.utils import hash_string

    metrics = {
        key.removesuffix(",none"): float(value) if math.isfinite(value) else None
        for key, value in evaluated["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    samples = evaluated["samples"][name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    first = sorted(
        (sample for sample in samples if sample["filter"] == filters[0]),
        key=lambda sample: sample["doc_id"],
    )
    metric = _right_or_wrong(first)
    correct = None if metric is None else [int(sample[metric]) for sample in first]
    parts = ("doc_hash", "prompt_hash", "target_hash")
    return {
        "metric": metric,
        "accuracy": None if correct is None else sum(correct) / len(correct),
        **({"accuracy_norm": metrics["acc_norm"]} if "acc_norm" in metrics else {}),
        "metrics": metrics,
        "documents": len(first),
        "num_fewshot": evaluated["n-shot"][name],
        "version": evaluated["versions"][name],
        "task_hash": hash_string("".join(sample[part] for sample in first for part in parts)),
        "doc_hashes": [sample["doc_hash"][:HASH_DIGITS] for sample in first],
        "correct": correct,
    }


def _right_or_wrong(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The metric that is 0 or 1 for every document; acc before others."""
    names = sorted(samples[0]["metrics"], key=lambda name: name != "acc")
    for name in names:
        values = [sample.get(name) for sample in samples]
        if all(isinstance(value, int | float) and value in (0, 1) for value in values):
            return str(name)
    return None


def _group_scores(
    results: Mapping[str, Any], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Of groups whose tasks share a metric: how many of all their documents are right."""
    scores = {}
    for group, members in groups.items():
        metrics = {results[member]["metric"] for member in members}
        if len(metrics) == 1 and None not in metrics and group not in results:
            right = sum(sum(results[member]["correct"]) for member in members)
            documents = sum(results[member]["documents"] for member in members)
            scores[group] = {
                "metric": metrics.pop(),
                "accuracy": right / documents,
                "documents": documents,
                "tasks": list(members),
            }
    return scores


# How lm-eval runs.


def _harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int | None,
) -> Any:  # noqa: ANN401
    """The model as lm-eval calls it."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        truncated = 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **named: Any) -> Any:  # noqa: ANN401
            for _, context, answer in requests:
                if len(answer) > self.max_length:  # else an assertion without a word
                    raise ValueError(
                        f"{KEY}: an answer of {len(answer)} tokens exceeds the {self.max_length} "
                        "that the model is given; leave the task out"
                    )
                # The last token is only predicted, never read.
                self.truncated += len(context) + len(answer) > self.max_length + 1
            return super()._loglikelihood_tokens(requests, *args, **named)

    return Harness(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype=torch.float32,
    )


@contextmanager
def _seeded() -> Iterator[None]:
    """Within the block all random generators start from `SEED`; afterwards they are as before."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def _quiet() -> Iterator[list[Callable[[int, int], None]]]:
    """Within the block lm-eval and datasets neither log nor draw progress bars.

    Those of answers, which are not drawn either, tell what is put into the list: done, and of all.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    answered: list[Callable[[int, int], None]] = []

    def no_bar(*args: Any, **named: Any) -> Any:  # noqa: ANN401
        return tqdm(*args, **{**named, "disable": True})

    class Counted(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **{**named, "disable": True})

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable:
                yield item
                self.update()

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            for notify in answered:
                notify(int(self.n), int(self.total or 0))

    logger = logging.getLogger("lm_eval")
    level, drawn = logger.level, not datasets.are_progress_bars_disabled()
    said = transformers_logging.get_verbosity()
    with ExitStack() as stack:
        for module in (lm_eval.api.model, lm_eval.api.task):
            stack.enter_context(swapped(module, "tqdm", no_bar))
        stack.enter_context(swapped(lm_eval.models.huggingface, "tqdm", Counted))
        logger.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        datasets.disable_progress_bars()
        try:
            yield answered
        finally:
            logger.setLevel(level)
            transformers_logging.set_verbosity(said)
            if drawn:
                datasets.enable_progress_bars()
