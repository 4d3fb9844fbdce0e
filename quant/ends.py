"""The two ends of a language model: its input embeddings and its output head, tied or not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.leftover import is_plain_linear
from quant.spec import QuantSpec
from quant.wording import Wording


@dataclass(frozen=True)
class Ends:
    """table: looked up by token id. head: gives the logits. Each with all names of its module.

    Tables of positions or token types are no ends. tied: both hold the same parameter.
    """

    table: nn.Module | None
    table_names: tuple[str, ...]
    head: nn.Module | None
    head_names: tuple[str, ...]
    tied: bool

    @staticmethod
    def of(model: PreTrainedModel) -> Ends:
        """Those of a transformers model."""
        try:
            table = model.get_input_embeddings()
        except NotImplementedError:
            table = None
        head = model.get_output_embeddings()
        tied = _same(getattr(table, "weight", None), getattr(head, "weight", None))
        return Ends(table, _names(model, table), head, _names(model, head), tied)

    def kept(self, spec: QuantSpec, said: Wording) -> dict[str, str]:
        """Which of their names stay in 16 bits, and why."""
        table, head = said.without("embeddings"), said.without("head")
        kept = {} if spec.embeddings else dict.fromkeys(self.table_names, table)
        return kept | ({} if spec.head else dict.fromkeys(self.head_names, head))

    def check(self, model: PreTrainedModel, spec: QuantSpec) -> None:
        """Raise ValueError (one line) unless what `spec` asks for can be quantized."""
        kind = type(model).__name__
        if (spec.embeddings or (self.tied and spec.head)) and not _is_plain_table(self.table):
            tied = f", tied to its head {self.head_names[0]}" if self.tied else ""
            raise ValueError(
                f"embeddings of {kind} cannot be quantized: {_said(self.table_names, self.table)}"
                f"{tied}; only a plain torch.nn.Embedding can; leave it in 16 bits"
            )
        if self.tied and spec.embeddings != spec.head:
            asked, other = ("embeddings", "head") if spec.embeddings else ("head", "embeddings")
            raise ValueError(
                f"{asked} without {other}: {kind} ties its head {self.head_names[0]} to its "
                f"embeddings {self.table_names[0]}, one weight is both; ask for both or none"
            )
        if spec.head and not (self.head is not None and is_plain_linear(self.head)):
            raise ValueError(
                f"head of {kind} cannot be quantized: {_said(self.head_names, self.head)}; "
                "only a plain torch.nn.Linear can; leave it in 16 bits"
            )


def _is_plain_table(module: nn.Module | None) -> bool:
    """Whether the module looks rows up and does nothing else to them."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None  # renormalizes its own weight when it is called
    )


def _same(one: object, other: object) -> bool:
    """Whether two weights are one: the same parameter, or two of the same memory."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if one.is_meta or other.is_meta:  # no memory to compare
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _said(names: tuple[str, ...], module: nn.Module | None) -> str:
    if module is None:
        return "it has none"
    limit = getattr(module, "max_norm", None)
    with_norm = f" with max_norm {limit}" if limit is not None else ""
    return f"{names[0]} is of class {type(module).__name__}{with_norm}"


def _names(model: PreTrainedModel, module: nn.Module | None) -> tuple[str, ...]:
    """All names of a module in the model."""
    found = model.named_modules(remove_duplicate=False)
    return tuple(name for name, each in found if each is module and module is not None)
