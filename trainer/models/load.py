"""Models by name: find the folder, build from a config, load weights, tell what they are.

Only families that tests have verified can be trained and taught from. Verified
(`tests/unit/trainer/models/test_families.py`): our head gives the model's own logits; documents
packed into one sequence are as good as apart; what is saved loads again as it was. Of others any of
these may fail in silence: bloom and opt attend across documents, for they take no notice of
positions that restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.storage import open_store

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# By model_type of transformers configs.
STUDENTS = frozenset((
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "granite", "helium", "llama", "mistral",
    "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
    "stablelm", "starcoder2",
))  # fmt: skip
# Mixtures of experts teach; training one would need a loss that keeps its experts in balance.
TEACHERS = STUDENTS | {"granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"}


def check_family(role: str, config: PreTrainedConfig, key: str | None = None) -> None:
    """Raises ValueError, one line, unless this config's family is verified for `role`.

    role: "student" or "teacher". key: of the spec, that names the model; `<role>.model` if not
    given. A student that is sliced from its teacher is a student by the teacher's config.
    """
    known = STUDENTS if role == "student" else TEACHERS
    kind = config.model_type
    if kind in known:
        return
    text = config.get_text_config()
    hint = ""
    if text is not config and text.model_type in known:
        hint = f" (of this model the text part alone, saved as a {text.model_type}, can be used)"
    elif kind in TEACHERS:
        hint = " (as a teacher it can be used)"
    raise ValueError(
        f"{key or f'{role}.model'}: got a model of type {kind}{hint}; may be one of "
        f"{', '.join(sorted(known))}"
    )


# What a checkpoint consists of for us: no pickles, no other frameworks' weights.
WEIGHTS = "*.safetensors"
MODEL_FILES = [WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model"]


def find_model(key: str, name: str, revision: str = "main", *, weights: bool = True) -> Path:
    """A local folder that holds the model `name` (local folder, URL, or hub id at `revision`).

    Without `weights` the config is enough, and of a hub model the weights stay there.

    Raises ValueError, naming the spec's `key`, when it cannot be found.
    """
    if "://" in name:
        store = open_store(name)
        if not store.exists("config.json"):
            raise ValueError(f"{key}: {name} holds no config.json; give a Hugging Face folder")
        return store.fetch_folder("")
    folder = Path(name).expanduser()
    if folder.is_dir():
        for needed in ("config.json", "*.safetensors")[: 2 if weights else 1]:
            if not any(folder.glob(needed)):
                raise ValueError(f"{key}: {name} holds no {needed}; give a Hugging Face folder")
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"{key}: {name!r} is no folder; give a folder, a URL, or a hub id such as "
            "Qwen/Qwen3-0.6B"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = [pattern for pattern in MODEL_FILES if weights or pattern != WEIGHTS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"{key}: {name!r} (revision {revision}) is neither a folder nor a hub model that can "
            f"be read here ({reason}); log in with `hf auth login`, or give a local folder"
        ) from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The transformers config of a model folder (never runs code that the folder brings).

    Raises ValueError, one line, if transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # it raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}/config.json cannot be used: {reason}") from error


class UntrainedTokenizer:
    """Stands for a tokenizer that is not trained yet: its size is known, its ids are not."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        """One entry, with the highest id."""
        return {"": self.size - 1}


def new_config(
    key: str,
    config: dict[str, Any] | str,
    tokenizer: PreTrainedTokenizerBase | UntrainedTokenizer,
    length: int,
) -> PreTrainedConfig:
    """A config from the spec: inline values or a JSON file, completed from the tokenizer.

    vocab_size, bos, eos and pad ids come from the tokenizer; max_position_embeddings is at least
    `length`. Raises ValueError for a model_type that is unknown or that no student can be of, and
    for sizes that do not fit.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if isinstance(config, str):
        try:
            values = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}: {config} cannot be read as a JSON config ({error})") from None
    else:
        values = dict(config)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"{key}.model_type: transformers knows no {kind!r}; e.g. llama, qwen3")
    try:
        blank = AutoConfig.for_model(kind)
    except Exception:  # of several models in one, which are never a student
        raise ValueError(f"{key}.model_type: {kind} is no language model; e.g. llama") from None
    # Before its sizes are looked at: of another family they have other names.
    check_family("student", blank, f"{key}.model_type")
    values.update(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    values.setdefault("max_position_embeddings", length)
    try:
        made = AutoConfig.for_model(kind, **values)
        unknown = sorted(name for name in values if not hasattr(blank, name))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{key}: {kind} does not accept these values ({reason})") from None
    if unknown:
        raise ValueError(f"{key}: {kind} knows no {', '.join(unknown)}")
    return made


def max_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence the model has positions for, None where it does not say."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None)


def width_of(config: dict[str, Any]) -> int:
    """The width of the hidden states that a raw config.json or inline config names."""
    for scope in (config, config.get("text_config") or {}):
        for name in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(scope.get(name), int):
                return int(scope[name])
    return 768


def meta_model(config_or_model: PreTrainedConfig | PreTrainedModel) -> PreTrainedModel:
    """The model of a config without memory (meta device): names, shapes and parameter counts; a
    model as it is."""
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(config_or_model, torch.nn.Module):
        return config_or_model
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_or_model)


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once; also of a model that ZeRO-3 has partitioned."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())


def build_model(
    *,
    folder: Path | None,
    config: PreTrainedConfig | None,
    init: str,
    dtype: torch.dtype,
    seed: int,
) -> PreTrainedModel:
    """The student before training: pretrained weights, or random ones by `seed`.

    Random weights are drawn in float32 on the CPU and then cast, so they are the same for every
    dtype, world size and ZeRO stage.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if init == "pretrained":
        assert folder is not None
        return load_model(folder, dtype)
    config = config if config is not None else read_config(folder)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config)
    cast_stored(model, dtype)
    return model


def cast_stored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts what a checkpoint stores, in place; tied weights stay tied.

    Buffers that are never stored (a rotary embedding's frequencies) stay float32, as
    `from_pretrained` has them: else the saved model would not be the trained one. Modules that
    have a `cast_stored` of their own (quantized layers) cast their buffers themselves.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if own := getattr(module, "cast_stored", None):
            own(dtype)
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    model.config.dtype = dtype


def load_model(
    folder: Path, dtype: torch.dtype | Literal["auto"], device: torch.device | None = None
) -> PreTrainedModel:
    """A model from safetensors, tensor by tensor onto `device` (None = the CPU).

    dtype: "auto": that its config names. Raises ValueError if any weight is missing, left over or
    misfit.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        device_map=None if device is None else {"": device},
        output_loading_info=True,
    )
    model, info = loaded
    check_loading(folder, info)
    return model


def load_for_inference(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model without gradients on a device. dtype: None: that its config names.

    On a CPU its weights lie in a mapping of the file: processes on one machine share them. Raises
    ValueError as `load_model`.
    """
    return load_model(Path(folder), dtype or "auto").requires_grad_(False).eval().to(device)


def check_loading(folder: Path, info: dict[str, Any]) -> None:
    """Raises ValueError, one line, unless the loading info of `from_pretrained` is clean."""
    bad = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys and "keys" in kind}
    if bad:
        first = next(iter(bad.items()))
        raise ValueError(
            f"{folder}: the weights do not fit the model: {first[0]} {first[1][:3]}"
            f" ({sum(map(len, bad.values()))} in all)"
        )


def identity(folder: Path, name: str) -> dict[str, str]:
    """What exactly a model is: hub id and commit, or hashes of its weights; and of its config.

    A hub snapshot's folder is named by its commit, which stands for the weights. Of other folders
    the safetensors files themselves are hashed, and where they lie does not matter.
    """
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    text = json.dumps(config, sort_keys=True)
    result = {"config": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return {**result, "name": name, "revision": folder.name}
    return {**result, "weights": hash_files(sorted(folder.glob("*.safetensors")))}


def absolute(name: str) -> str:
    """The name of a model or file as it is understood in every directory: local ones absolute."""
    path = Path(name).expanduser()
    return str(path.resolve()) if "://" not in name and path.exists() else name


def tokenizer_identity(folder: Path) -> dict[str, str]:
    """Hashes of a model folder's tokenizer files and chat template."""
    tokenizer = [
        path
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
        if (path := folder / name).is_file()
    ]
    template = folder / "chat_template.jinja"
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).is_file():
            settings |= json.loads(path.read_text())
    # What decides ids and texts; the rest of these files is housekeeping.
    kept = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") or name == "chat_template"
    }
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16)
    return {
        "tokenizer": hash_files(tokenizer),
        "tokenizer_settings": digest.hexdigest(),
        "chat_template": hash_files([template]) if template.is_file() else "",
    }


def hash_files(paths: list[Path]) -> str:
    """blake2b-128 over names and contents of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def layer_progress(module: nn.Module, say: Callable[[float], None]) -> Iterator[None]:
    """Within the block `say(share)` is called after each layer of a forward pass of `module`.

    share: of its layers that are done, up to 1. A module without a list of layers says nothing.
    """
    # The outermost one: experts are lists within a layer.
    from torch import nn

    layers = next((each for each in module.modules() if isinstance(each, nn.ModuleList)), ())

    def hook(number: int) -> Callable[..., None]:
        def after(*_: Any) -> None:
            say(number / len(layers))

        return after

    handles = [
        layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers, start=1)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
