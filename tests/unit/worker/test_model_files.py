"""What cannot be served is refused with a sentence that names the file and the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.common.errors import StartupError
from fastserve.worker.model.config import ModelConfig
from fastserve.worker.model.errors import ModelError
from fastserve.worker.model.files import prepare
from fastserve.worker.model.loader import load_model
from support.tiny_models import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    tiny_model(folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(intact, tmp_path / "model"))


def start(model: Path) -> None:
    """What the worker does with `--model`."""
    load_model(prepare(str(model), cache_dir=model.parent / "cache"), torch.float32, CPU)


def refused(model: Path, file: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        start(model)
    sentence = str(caught.value)
    assert str(file) in sentence
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
    assert isinstance(caught.value, StartupError)  # the process ends with this one line


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


def test_an_intact_folder_is_served_as_it_is(folder: Path) -> None:
    assert prepare(str(folder)) == folder.resolve()
    start(folder)


# --- places and configuration --------------------------------------------------------------------


def test_a_missing_model(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    refused(tmp_path / "model.bin", tmp_path / "model.bin", "neither a folder nor a .gguf file")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b'{"architectures": ["Llama', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1, 2]", "does not hold a JSON object"),
        (b"{}", "architecture none is not supported"),
    ],
)
def test_config_missing_or_garbage(folder: Path, content: bytes | None, reason: str) -> None:
    path = folder / "config.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    refused(folder, path, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type yarn is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"hidden_size": "gone"}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "'wide'"),
        ({"num_attention_heads": None}, "None"),
        ({"num_attention_heads": 0, "head_dim": None}, "zero"),
        ({"rope_parameters": "none"}, "makes no sense"),
        ({"architectures": 5}, "5"),
    ],
)
def test_config_of_a_model_that_is_not_supported(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    change_config(folder, **changes)
    refused(folder, folder / "config.json", reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before False is not supported"),
        ({"activation_function": "gelu"}, "activation_function gelu is not supported"),
        ({"enable_bias": False}, "enable_bias False is not supported"),
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim other than hidden_size"),
        ({"ffn_dim": "gone"}, "ffn_dim is missing"),
    ],
)
def test_an_opt_model_that_is_not_supported(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    tiny_model(tmp_path, "OPT", ffn_dim=112, word_embed_proj_dim=64, tie_word_embeddings=True)
    change_config(tmp_path, **changes)
    refused(tmp_path, tmp_path / "config.json", reason)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 of 4 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0 of 4 experts"),
        ({"num_local_experts": "gone"}, "num_local_experts is missing"),
        ({"moe_intermediate_size": "gone"}, "moe_intermediate_size is missing"),
        ({"decoder_sparse_step": 0}, "makes no sense"),
        ({"mlp_only_layers": 1}, "makes no sense"),
        ({"hidden_size": 60}, "hidden_size 60 of experts is not a multiple of 8"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_a_mixture_of_experts_that_is_not_supported(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    tiny_model(tmp_path, "Qwen3Moe", num_hidden_layers=1, **EXPERTS)
    change_config(tmp_path, **changes)
    refused(tmp_path, tmp_path / "config.json", reason)


def test_experts_in_int8_and_experts_that_are_missing(tmp_path: Path) -> None:
    tiny_model(tmp_path, "Mixtral", num_hidden_layers=1, num_local_experts=4)
    with pytest.raises(ModelError, match="int8 of a mixture of experts is not supported"):
        load_model(tmp_path, torch.float32, CPU, int8=True)
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    refused(tmp_path, tmp_path, f"lack the tensor {name}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_act": "silu"}, "hidden_act silu is not supported (only gelu_pytorch_tanh)"),
        ({"hidden_activation": "gelu"}, "hidden_activation gelu is not supported"),
        ({"head_dim": "gone"}, "head_dim is missing"),
    ],
)
def test_a_gemma_model_that_is_not_supported(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    tiny_model(tmp_path, "Gemma", num_hidden_layers=1, tie_word_embeddings=True)
    change_config(tmp_path, **changes)
    refused(tmp_path, tmp_path / "config.json", reason)


def test_the_first_gemma_files_mean_the_same(tmp_path: Path) -> None:
    tiny_model(tmp_path, "Gemma", num_hidden_layers=1, tie_word_embeddings=True)
    config = ModelConfig.from_folder(tmp_path)
    change_config(tmp_path, hidden_act="gelu", hidden_activation=None, tie_word_embeddings="gone")
    assert ModelConfig.from_folder(tmp_path) == config


def test_a_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    refused(folder, folder / "generation_config.json", "cannot be read")


def test_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, folder / "tokenizer.json", "does not exist")


# --- safetensors ---------------------------------------------------------------------------------


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, folder, "no .safetensors file")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 0.5, -1])
def test_truncated_safetensors(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    file.write_bytes(content[:length])
    refused(folder, file, "is truncated")


@pytest.mark.parametrize("header", [b"not JSON", b"[]", b'{"a": 1}', b'{"a": {}}'])
def test_a_damaged_safetensors_header(folder: Path, header: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    refused(folder, file, "header is damaged")


def test_a_header_that_safetensors_itself_refuses(folder: Path) -> None:
    file = folder / "model.safetensors"
    header = b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(folder, file, "cannot be read")


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    refused(folder, folder, f"lack the tensor {name}")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=96)
    refused(folder, folder / "model.safetensors", "gate_proj.weight", "[112, 64]", "[96, 64]")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    tiny_model(folder, num_hidden_layers=1).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_shards(sharded: Path) -> None:
    start(sharded)
    missing = sorted(sharded.glob("model-*.safetensors"))[1]
    missing.unlink()
    refused(sharded, missing, "does not exist, but the index names it")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index(sharded: Path, content: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    refused(sharded, index, "cannot be read")


# --- GGUF ----------------------------------------------------------------------------------------

Change = Callable[[gguf.GGUFWriter], None]


def tiny_gguf(path: Path, architecture: str = "llama", change: Change = lambda _: None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.ones((32, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((32, 32), np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


@pytest.fixture(autouse=True)
def nothing_half_done_is_left(tmp_path: Path) -> Iterator[None]:
    """A conversion that fails leaves the cache as it was."""
    yield
    assert not list((tmp_path / "cache").glob("models/*"))


@pytest.mark.parametrize("part", [0, 2, 8, 20, 0.1, 0.2, 0.4, 0.6, 0.8, -1])
def test_truncated_gguf(gguf_bytes: bytes, tmp_path: Path, part: float) -> None:
    file = tmp_path / "cut.gguf"
    length = int(part * len(gguf_bytes)) if isinstance(part, float) else part
    file.write_bytes(gguf_bytes[:length])
    refused(file, file, "is truncated or no GGUF file")


def test_something_else_named_gguf(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("a text that is long enough to be taken for a header\n" * 20)
    refused(file, file, "is truncated or no GGUF file")


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "m.gguf", "gpt2")
    refused(file, file, "architecture gpt2 is not supported (supported: llama, qwen2, qwen3)")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda writer: writer.add_tensor("blk.0.ssm_a", np.ones(4, np.float32)),
            "tensor blk.0.ssm_a is not part of a supported model",
        ),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "scaled rotary embeddings",
        ),
        (lambda writer: writer.kv_data[0].pop("llama.attention.head_count"), "metadata lacks"),
        (lambda _: None, "the tokenizer cannot be converted"),
    ],
    ids=["tensor", "rope", "metadata", "tokenizer"],
)
def test_gguf_that_is_not_supported(tmp_path: Path, change: Change, reason: str) -> None:
    file = tiny_gguf(tmp_path / "m.gguf", change=change)
    refused(file, file, reason)
