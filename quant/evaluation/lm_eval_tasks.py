"""Benchmark tasks as lm-eval has them: found by name or in a folder, checked, loaded."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quant.spec import Task

SEED = 1234  # lm-eval's own: which examples stand in a prompt, and anything that a task draws
LOADERS = ("json", "csv", "parquet", "arrow", "text")  # of files, in the place of a hub's dataset
KEY = "sweep.tasks"


def look_at_folder(task: Task) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The tasks and groups of a local folder by name, as its YAML files have them; faults."""
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(str(task.folder))
    if not root.is_dir():
        return {}, [f"{root} is no folder; give that of a task's YAML files and data"]
    paths = [path for path in sorted(root.rglob("*.yaml")) if "__pycache__" not in path.parts]
    if not paths:
        return {}, [f"{root} holds no .yaml file; give the folder of a task of lm-eval"]
    named: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    for path in paths:
        try:
            config = load_yaml(path, resolve_func=False)
        except Exception as error:  # of the parser, or an include that is not there
            wrong.append(f"{path} cannot be read ({one_line(error)}); mend the file")
            continue
        name = config.get("group", config.get("task"))
        if not isinstance(name, str):
            continue  # a file for others to include
        if name in named:
            wrong.append(f"{path} names the task {name}, as another file does; rename one")
            continue
        named[name] = config
        for one in _with_inline(config):
            for file in _files(one.get("dataset_kwargs")) if _loads_files(one) else []:
                if "://" not in file and not _found(file, [path.parent, root]):
                    wrong.append(f"{path} names {file}, which is not in {path.parent}; add it")
    if not named and not wrong:
        wrong.append(f"no file in {root} names a task; add `task: NAME` to one")
    tags = {tag for config in named.values() for tag in _listed(config.get("tag"))}
    for name, config in named.items():
        for member in _members(config):
            if member not in named and member not in tags:
                wrong.append(f"group {name} names {member}, which is not in {root}; add its YAML")
    return named, wrong


def look_at_name(task: Task) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The named task of lm-eval, as its YAML file has it, or the fault that there is none."""
    name, index = str(task.task), _built_in().task_index
    if name in index:
        return {name: index[name].cfg or {}}, []
    near = difflib.get_close_matches(name, index, n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else "; see `lm_eval ls tasks`"
    return {}, [f"lm-eval {version('lm_eval')} has no task {name}{meant}"]


@functools.cache
def _built_in() -> Any:  # noqa: ANN401
    """lm-eval's own tasks: many thousand files are read, once per process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_tasks(task: Task, cache: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(lm-eval's task objects with their data by name, the names in each group) of an entry."""
    with ExitStack() as stack:
        if task.folder is not None:
            import datasets

            stack.enter_context(swapped(datasets.config, "HF_HUB_OFFLINE", True))
            named, wrong = look_at_folder(task)
            if wrong:
                raise ValueError(f"{KEY}: {wrong[0]}")
            manager = _local_manager(Path(task.folder).resolve(), cache)
            inside = {member for config in named.values() for member in _members(config)}
            # What a group says of its members holds, so groups are first, and outer ones before.
            wanted = sorted(named, key=lambda name: ("group" not in named[name], name in inside))
        else:
            manager, wanted = _built_in(), [str(task.task)]
        tasks: dict[str, Any] = {}
        groups: dict[str, list[str]] = {}
        for name in wanted:
            if name in tasks or name in groups:
                continue
            try:
                loaded = manager.load([name])
            except Exception as error:  # of lm-eval, of datasets, of a task's own functions
                raise ValueError(
                    f"{KEY}: {task.folder or 'task'} {name} does not load ({one_line(error)}); its "
                    "data must be in its folder, in the cache of Hugging Face, or on the network"
                ) from error
            for key, one in loaded["tasks"].items():
                tasks.setdefault(key, one)
            for key, group in loaded.get("groups", {}).items():
                groups.setdefault(key, [one.task_name for one in group.get_all_tasks()])
    return tasks, groups


def _local_manager(root: Path, cache: Path) -> Any:  # noqa: ANN401
    """A TaskManager of one folder, whose files are found wherever the process stands."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._factory import TaskFactory

    class AtHome(TaskFactory):
        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:  # noqa: ANN401
            config = super()._load_full_config(entry, overrides)
            bases = [entry.yaml_path.parent, root] if entry.yaml_path else [root]
            for one in _with_inline(config):
                _settle(one, bases, cache)
            return config

    manager = TaskManager(include_path=str(root), include_defaults=False)
    manager._factory = AtHome()
    return manager


def _settle(config: dict[str, Any], bases: Sequence[Path], cache: Path) -> None:
    """Names the data of a task absolutely, and keeps what `datasets` makes of it in `cache`."""
    path = config.get("dataset_path")
    if isinstance(path, str) and path not in LOADERS and (home := _found(path, bases)):
        config["dataset_path"] = home
    if not _loads_files(config):
        return
    arguments = dict(config.get("dataset_kwargs") or {})
    for key in ("data_files", "data_dir"):
        if key in arguments:
            arguments[key] = _map_files(arguments[key], bases)
    config["dataset_kwargs"] = {"cache_dir": str(cache), **arguments}


def _loads_files(config: Mapping[str, Any]) -> bool:
    return config.get("dataset_path") in LOADERS


def _with_inline(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration, and those that stand inside a group's."""
    yield config
    for member in _listed(config.get("task")):
        if isinstance(member, dict):
            yield from _with_inline(member)


def _members(config: Mapping[str, Any]) -> list[str]:
    """What a group names that is defined elsewhere."""
    found = []
    for member in config["task"] if isinstance(config.get("task"), list) else []:
        if isinstance(member, str):
            found.append(member)
        elif "group" in member:
            found += _members(member)
        elif "dataset_path" not in member:
            found.append(member["task"])
    return found


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _files(kwargs: Mapping[str, Any] | None) -> list[str]:
    """The names in a `data_files`, which may be one, a list, or lists by split."""
    value = (kwargs or {}).get("data_files")
    parts = value.values() if isinstance(value, dict) else [value]
    return [str(name) for part in parts for name in _listed(part)]


def _map_files(value: Any, bases: Sequence[Path]) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _map_files(part, bases) for key, part in value.items()}
    if isinstance(value, list):
        return [_map_files(part, bases) for part in value]
    return _found(value, bases) or value


def _found(name: str, bases: Sequence[Path]) -> str | None:
    """The absolute name of a file, folder or pattern in the first of `bases` that has it."""
    for base in bases:
        place = base / name  # an absolute name stays what it is
        if place.exists() or (not Path(name).is_absolute() and any(base.glob(name))):
            return str(place.absolute())
    return None


def set_fewshot(task: Any, wanted: int | None) -> None:  # noqa: ANN401
    """lm-eval's own rule: a task that fixes 0 examples keeps them."""
    own = task.get_config("num_fewshot")
    if own is None or (wanted is not None and own != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=SEED)


@contextmanager
def swapped(owner: Any, name: str, value: object) -> Iterator[None]:  # noqa: ANN401
    """Within the block an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
