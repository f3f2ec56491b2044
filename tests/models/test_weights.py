import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from babl.errors import UserError
from babl.models import from_pretrained, save_pretrained
from babl.models.t5 import T5, T5Config


@pytest.fixture
def folder(tmp_path):
    save_pretrained(
        T5(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_decoder_layers=1)), tmp_path
    )
    return tmp_path


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_whoever_may_read_files_here_may_read_weights(tmp_path):
    before = os.umask(0o027)
    try:
        save_pretrained(T5(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1)), tmp_path, 2000)
    finally:
        os.umask(before)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_missing_tensor_is_named(folder):
    edit(folder, lambda weights: weights.pop("encoder.final_layer_norm.weight"))
    refused(folder, r"1 tensors missing, first encoder\.final_layer_norm\.weight")


def test_an_unexpected_tensor_is_named(folder):
    edit(folder, lambda weights: weights.update({"encoder.final_layer_norm.weights": torch.ones(1)}))
    refused(folder, r"1 unexpected tensors, first encoder\.final_layer_norm\.weights; did you mean")


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    edit(folder, lambda weights: weights.update({"shared.weight": torch.ones(21, 8)}))
    refused(folder, r"shared\.weight has shape \(21, 8\), config\.json says \(20, 8\)")


def test_a_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is a pickle, .*only safetensors is loaded")


def test_a_damaged_file_is_named(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(folder, r"model\.safetensors: not a readable safetensors file")


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    refused(folder, r"shard model-00001\.safetensors named by model\.safetensors\.index\.json is missing")


def test_what_is_no_model_folder_is_said(folder, tmp_path):
    refused(tmp_path / "absent", "no such model folder")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    refused(folder, "model_type is 'gpt2', expected one of t5")
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json")
