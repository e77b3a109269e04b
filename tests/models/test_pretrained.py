"""The reader of others' weights: safetensors files as safetensors writes them, and what is no such file."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from bigkern.models import pretrained


def written(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_safetensors_writes_is_read(tmp_path):
    save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install '.[test]')")
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "whole": torch.arange(6).view(2, 3),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    save.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = pretrained.read_weights(tmp_path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


@pytest.mark.parametrize("padding", range(4))
def test_tensors_at_any_byte(tmp_path, padding):
    """A header whose length is no multiple of four leaves its tensors between the words of memory."""
    values = torch.tensor([1.0, -2.0, 3.5])
    header = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "__metadata__": {"pad": "p" * padding}}
    path = written(tmp_path / "a", header, bytes(values.view(torch.uint8).tolist()))
    assert torch.equal(pretrained.read_safetensors(path)["x"], values)


ENTRY = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


@pytest.mark.parametrize(
    "header",
    [
        {"x": {**ENTRY, "data_offsets": [0, 16]}},
        {"x": {**ENTRY, "data_offsets": [-4, 8]}},
        {"x": {**ENTRY, "shape": [4]}},
        {"x": {**ENTRY, "shape": [-3]}},
        {"x": {**ENTRY, "dtype": "F3"}},
        {"x": {"dtype": "F32"}},
        {"x": 3},
        [],
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(tmp_path, header):
    with pytest.raises(ValueError, match="a: not a safetensors file, or a damaged one"):
        pretrained.read_safetensors(written(tmp_path / "a", header, bytes(12)))


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 40, struct.pack("<Q", 4) + b"\x80abc"], ids=str)
def test_other_bytes_are_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a: not a safetensors file, or a damaged one"):
        pretrained.read_safetensors(tmp_path / "a")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"x": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"not a file of tensors alone, or a damaged one; model\.safetensors is"):
        pretrained.read_weights(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a state_dict"):
        pretrained.read_weights(tmp_path)


def test_an_index_names_files_of_its_own_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ('{"weight_map": {"x": "../a"}}', "names '../a', a file outside its folder"),
        ('{"weight_map": {"x": "a"}}', "a: no such file"),
        ("[]", "not an index of safetensors files"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            pretrained.read_weights(tmp_path)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"no weights there; expected model\.safetensors"):
        pretrained.read_weights(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json there"):
        pretrained.read_config(tmp_path, "bert")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        pretrained.read_config(tmp_path, "bert")
