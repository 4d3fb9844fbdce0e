"""QuantSpec, one cell, and SweepSpec, the grid of them."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import ValidationError

from quant.quant_spec import BITS, CHANNEL, METHODS, QuantSpec, fitting_group_sizes
from quant.spec import SweepSpec


def keys(**settings) -> list[str]:
    return [cell.key for cell in SweepSpec(**settings).cells()]


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (QuantSpec(4, 64), "hqq-4b-g64"),
        (QuantSpec(3, CHANNEL, "rtn"), "rtn-3b-channel"),
        (QuantSpec(8, CHANNEL, "int8-dynamic"), "int8-dynamic-8b-channel"),
        (QuantSpec(4, 8, head=True), "hqq-4b-g8-head"),
        (QuantSpec(2, 128, embeddings=True, head=True), "hqq-2b-g128-embeddings-head"),
    ],
)
def test_keys_and_back_from_a_dict(spec, key):
    assert spec.key == key
    assert QuantSpec(**spec.to_dict()) == spec


def test_every_combination_has_a_key_of_its_own():
    specs = [
        QuantSpec(bits, size, method, embeddings, head)
        for method in METHODS[:2]
        for bits in BITS
        for size in (8, 32, 64, 256, CHANNEL)
        for embeddings in (False, True)
        for head in (False, True)
    ]
    assert len({spec.key for spec in specs}) == len(specs) == 280


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((7, 64), "7 bits are not offered by hqq; may be [8, 6, 5, 4, 3, 2, 1]"),
        ((True, 64), "True bits are not offered by hqq"),
        ((4.0, 64), "4.0 bits are not offered"),
        ((4, 12), "group_size 12 is none; may be a multiple of 8, from 8 on, or channel"),
        ((4, 0), "group_size 0 is none"),
        ((4, -64), "group_size -64 is none"),
        ((4, "Channel"), "group_size 'Channel' is none"),
        ((4, 64.0), "group_size 64.0 is none"),
        ((4, None), "group_size None is none"),
        ((4, 64, "gptq"), "method 'gptq' is unknown; may be hqq, rtn, int8-dynamic"),
        ((4, CHANNEL, "int8-dynamic"), "int8-dynamic has 8 bits and one scale per channel, not 4"),
        ((4, CHANNEL, "int8-dynamic"), "4 bits and group_size channel; say bits 8 and group_size"),
        ((8, 64, "int8-dynamic"), "say bits 8 and group_size channel"),
        ((4, 64, "hqq", 1), "embeddings is 1; may be True or False"),
        ((4, 64, "hqq", False, None), "head is None; may be True or False"),
    ],
)
def test_what_is_not_offered_is_one_line(arguments, line):
    with pytest.raises(ValueError) as caught:
        QuantSpec(*arguments)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_spec_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec(4, 64).bits = 2  # type: ignore[misc]


def test_the_grid_in_the_order_of_the_lists():
    assert keys(bits=[8, 4], group_size=[64, CHANNEL], methods=["rtn", "hqq"]) == [
        "rtn-8b-g64",
        "rtn-8b-channel",
        "rtn-4b-g64",
        "rtn-4b-channel",
        "hqq-8b-g64",
        "hqq-8b-channel",
        "hqq-4b-g64",
        "hqq-4b-channel",
    ]
    assert keys() == [f"hqq-{bits}b-g{size}" for bits in (8, 4, 3, 2) for size in (64, 128)]


@pytest.mark.parametrize("bits", [[4, 2], [8]])
def test_int8_dynamic_is_one_cell_whatever_the_grid(bits):
    assert keys(bits=bits, group_size=[32, 64], methods=["int8-dynamic"]) == [
        "int8-dynamic-8b-channel"
    ]
    made = keys(bits=bits, group_size=[CHANNEL, 64], methods=["hqq", "int8-dynamic"])
    assert len(made) == len(set(made)) == 2 * len(bits) + 1


def test_embeddings_and_head_hold_for_all_cells():
    cells = SweepSpec(embeddings=True, head=True, methods=["hqq", "int8-dynamic"]).cells()
    assert all(cell.embeddings and cell.head for cell in cells)
    assert not any(cell.embeddings or cell.head for cell in SweepSpec().cells())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": [7, 4]}, "7 bits are not offered; may be"),
        ({"bits": [4, 4]}, r"repeated cells: \[4\]"),
        ({"group_size": [12]}, "12 is no group size; may be a multiple of 8"),
        ({"group_size": [64, CHANNEL, CHANNEL, 64]}, r"repeated cells: \[64, 'channel'\]"),
        ({"group_size": ["row"]}, "channel"),
        ({"bits": [True]}, "bits.0\n  Input should be a valid integer"),
        ({"bits": ["4"]}, "bits.0\n  Input should be a valid integer"),
        ({"group_size": [True]}, "valid integer"),
        ({"batch_sequences": True}, "batch_sequences\n  Input should be a valid integer"),
        ({"speed_prompt_tokens": True}, "speed_prompt_tokens\n  Input should be a valid integer"),
        ({"speed_decode_tokens": "8"}, "speed_decode_tokens\n  Input should be a valid integer"),
        ({"methods": ["hqq", "hqq"]}, "repeated"),
        ({"methods": ["gptq"]}, "rtn"),
        ({"methods": []}, "at least 1"),
        ({"embeddings": 3}, "bool"),
    ],
)
def test_a_wrong_grid_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        SweepSpec(**settings)


def test_every_field_is_described():
    described = SweepSpec.model_json_schema()["properties"]
    assert all(part.get("description") for part in described.values())
    assert "int8-dynamic" in described["methods"]["items"]["enum"]


@pytest.mark.parametrize(
    ("widths", "sizes"),
    [
        ([4096, 14336], [64, 128]),  # Llama-3.1-8B
        ([576, 1536], [32, 64]),  # SmolLM2-135M: 9 x 64
        ([576, 1536, 480], [16, 32]),  # two models
        ([96, 40], [8]),
        ([100], [8]),  # refused with the layer's name where it is used
        ([], [64, 128]),
    ],
)
def test_group_sizes_that_divide_all_widths(widths, sizes):
    assert fitting_group_sizes(widths) == sizes


def test_auto_group_sizes_are_replaced_and_given_ones_stay():
    assert SweepSpec().with_group_sizes([576, 1536]).group_sizes == [32, 64]
    assert SweepSpec(group_size=[128]).with_group_sizes([576]).group_size == [128]
    left_out = [{"group_size": 32}, {"group_size": 64}]
    with pytest.raises(ValueError, match=r"sweep\.exclude: .* 32, 64"):
        SweepSpec(exclude=left_out).with_group_sizes([576])


def test_group_sizes_are_auto_or_a_list():
    for wrong in ("other", [], ["auto"], 64):
        with pytest.raises(ValidationError):
            SweepSpec(group_size=wrong)
