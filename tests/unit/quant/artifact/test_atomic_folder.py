"""A saved model appears whole or not at all, and nothing else is lost for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

import quant.artifact.atomic_folder
import quant.artifact.save
from quant.artifact import load_quantized, save_quantized
from quant.quant_spec import QuantSpec
from quant.quantize import quantize

SPEC, OTHER = QuantSpec(4, 32), QuantSpec(8, 32)
IDS = torch.arange(20)[None]


@pytest.fixture
def model(make_llama):
    return quantize(make_llama(num_hidden_layers=1), SPEC)


@pytest.fixture
def other(make_llama):
    return quantize(make_llama(num_hidden_layers=1, seed=1), OTHER)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Cut(BaseException):
    """Like a KeyboardInterrupt: no `except Exception` holds it up."""


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("place", ["weights", "description", "rename", "second rename"])
def test_a_save_that_is_cut_off_leaves_what_was_there(
    model, other, tmp_path, monkeypatch, place, there
):
    target = tmp_path / "model"
    if there:
        save_quantized(model, target, SPEC)
    before = content(target) if there else None
    renames, rename = [], os.rename

    def cut(*arguments):
        if place == "weights":
            arguments[0].write_bytes(b"half")
        if "rename" in place:
            renames.append(arguments)
            # The first moves what is there away; a third one would move it back.
            if place == "second rename" and len(renames) != (2 if there else 1):
                return rename(*arguments)
        raise Cut

    holder, name = {
        "weights": (quant.artifact.save, "write_tensors"),
        "description": (quant.artifact.save, "_sync"),
    }.get(place, (os, "rename"))
    with monkeypatch.context() as patched:
        patched.setattr(holder, name, cut)
        with pytest.raises(Cut):
            save_quantized(other, target, OTHER)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if there else [])
    if there:
        assert content(target) == before
    save_quantized(other, target, OTHER)
    assert torch.equal(load_quantized(target, prefer="plain")(IDS).logits, other(IDS).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_in_the_way_is_replaced_whole_but_its_tokenizer_stays(model, other, tmp_path):
    target = save_quantized(model, tmp_path / "model", SPEC)
    (target / "tokenizer.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"of the first format")
    save_quantized(other, target, OTHER)
    save_quantized(other, tmp_path / "fresh", OTHER)
    assert content(target) == {**content(tmp_path / "fresh"), "tokenizer.json": b"{}"}


def test_a_tokenizer_may_be_saved_first(model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    save_quantized(model, tmp_path / "model", SPEC)
    assert (tmp_path / "model" / "additional_chat_templates" / "tools.jinja").is_file()
    assert (tmp_path / "model" / "tokenizer_config.json").read_text() == "{}"
    load_quantized(tmp_path / "model")


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "runs"])
def test_a_folder_with_other_things_is_refused_and_left_alone(model, tmp_path, name):
    target = tmp_path / "model"
    target.mkdir()
    if name == "runs":
        save_quantized(model, target, SPEC)
        (target / name).mkdir()
    else:
        (target / name).write_text("dear")
    before = sorted(path.name for path in target.iterdir())
    with pytest.raises(ValueError, match=f"model: it holds {name}, which is no part of"):
        save_quantized(model, target, SPEC)
    assert sorted(path.name for path in target.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_comes_into_the_folder_while_saving_is_not_lost(model, tmp_path, monkeypatch):
    target = save_quantized(model, tmp_path / "model", SPEC)
    write = quant.artifact.save.write_tensors

    def late(*arguments):
        (target / "dear.txt").write_text("dear")
        write(*arguments)

    monkeypatch.setattr(quant.artifact.save, "write_tensors", late)
    with pytest.raises(ValueError, match=r"it holds dear\.txt"):
        save_quantized(model, target, SPEC)
    assert (target / "dear.txt").read_text() == "dear"


def test_a_file_in_the_way_and_a_parent_that_is_a_file(model, tmp_path):
    (tmp_path / "file").write_text("dear")
    with pytest.raises(ValueError, match="a file is in the way; name another"):
        save_quantized(model, tmp_path / "file", SPEC)
    with pytest.raises(ValueError, match="no folder can be made there"):
        save_quantized(model, tmp_path / "file" / "model", SPEC)
    assert (tmp_path / "file").read_text() == "dear"


def test_a_link_to_a_folder_is_followed(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_quantized(model, tmp_path / "link", SPEC)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "quant.json").is_file()


def test_others_may_read_what_the_umask_lets_them(model, tmp_path):
    before = os.umask(0o022)
    try:
        folder = save_quantized(model, tmp_path / "a" / "b", SPEC)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
