import dataclasses
import io
import json
import random
import re

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from dreamllm_jax.data import tokenizer
from dreamllm_jax.data.vocabulary import ADDED_TOKENS

STRANGE = ["", " ", "  two  spaces ", "tab\tnewline\n", "▁ literal", "漢字 é 🙂", "12345", "\x00\u200b", "<0x41>"]
SPECIAL = ["<s>", "</s>", "<unk>", "a<s>b", *ADDED_TOKENS, "x<im_patch>y", "</s><dream_start>"]


@pytest.fixture(scope="module")
def model() -> bytes:
    """A SentencePiece model trained by SentencePiece alone, as LLaMA's was."""
    rng = random.Random(1)
    words = ["".join(rng.choice("abcdefgh é") for _ in range(rng.randint(1, 8))) for _ in range(200)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.sample(words, 6)) for _ in range(300)]),
        model_writer=out,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def test_equals_sentencepiece(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours = tokenizer.load_tokenizer(tmp_path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(0)
    texts = STRANGE + SPECIAL + ["".join(rng.choice("abcdefgh é <>/\n▁🙂0") for _ in range(30)) for _ in range(1000)]
    for text in texts:
        assert ours.encode_text(text) == reference.encode(text), text
        assert ours.decode(ours.encode_text(text)) == reference.decode(reference.encode(text)), text

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in texts:
        assert ours.encode_text(text, prefix=False) == reference.encode(text), text


@pytest.mark.parametrize(
    ("splits", "prefix"),
    [
        (pre_tokenizers.Metaspace(prepend_scheme="first", split=False), "▁"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "Ġ"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), ""),
    ],
)
def test_the_prefix_of_other_tokenizers(splits, prefix, tmp_path):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = splits
    fast.train_from_iterator(["a red square"] * 9, trainers.BpeTrainer(special_tokens=["<s>", "</s>"]))
    fast.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load_tokenizer(tmp_path)
    assert "".join(map(fast.id_to_token, ours.encode_text("red", prefix=False))) == "red"
    assert "".join(map(fast.id_to_token, ours.encode_text("red"))) == f"{prefix}red"


@pytest.mark.parametrize(("told", "legacy"), [({}, True), ({"legacy": None}, True), ({"legacy": False}, False)])
def test_legacy_is_what_the_directory_says_and_is_saved(told, legacy, model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    ours = tokenizer.load_tokenizer(tmp_path)
    ours.save(tmp_path / "saved")
    assert ours.legacy == tokenizer.load_tokenizer(tmp_path / "saved").legacy == legacy


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "3"])
def test_a_damaged_description_is_named(name, content, model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is not a JSON object"):
        tokenizer.load_tokenizer(tmp_path)


@pytest.mark.parametrize("stored", ["truncation", "padding", "both"])
def test_what_transformers_stores_of_its_use_changes_no_text(stored, text_tokenizer, tmp_path):
    text_tokenizer.save(tmp_path)
    used = FastTokenizer.from_file(str(tmp_path / tokenizer.FILE))
    if stored != "padding":
        used.enable_truncation(4)
    if stored != "truncation":
        used.enable_padding(length=64, pad_id=text_tokenizer.special.pad, pad_token="[PAD]")
    used.save(str(tmp_path / tokenizer.FILE))
    ours, text = tokenizer.load_tokenizer(tmp_path), "a red square and a blue square"
    assert ours.encode_text(text) == text_tokenizer.encode_text(text)
    assert ours.encode_text(text, prefix=False) == text_tokenizer.encode_text(text, prefix=False)
    ours.save(tmp_path / "saved")
    assert FastTokenizer.from_file(str(tmp_path / "saved" / tokenizer.FILE)).truncation is None


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", ".*: it is a pointer of git-lfs"),
        (b"\xff{}", "(:| is not a tokenizer of Hugging Face)"),
        (b"", "(:| is not a tokenizer of Hugging Face)"),
    ],
)
def test_a_damaged_tokenizer_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}{message}"):
        tokenizer.load_tokenizer(tmp_path)


def test_special_tokens_follow_the_base_vocabulary(model, tmp_path):
    (tmp_path / "t.model").write_bytes(model)
    ours = tokenizer.load_tokenizer(tmp_path / "t.model")
    assert (ours.special.bos, ours.special.eos) == (1, 2)
    assert [ours.fast.token_to_id(t) for t in ADDED_TOKENS] == list(range(600, 608))
    assert ours.special.pad == 600 and ours.special.dream_end == 607 and ours.vocab_size == 608


@pytest.mark.parametrize("text", SPECIAL)
def test_special_strings_in_text_stay_text(text_tokenizer, text):
    ids = text_tokenizer.encode_text(text)
    assert not set(dataclasses.astuple(text_tokenizer.special)) & set(ids)
    assert text_tokenizer.decode(ids) == text


def test_recorded_ids_of_a_checkpoint_are_kept(model, tmp_path):
    scrambled = dict(zip(reversed(ADDED_TOKENS), range(600, 608), strict=True))
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text(json.dumps(scrambled))
    ours = tokenizer.load_tokenizer(tmp_path)
    assert ours.special.pad == 607 and ours.special.dream_end == 600
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 700}))
    with pytest.raises(ValueError, match=r"<image> should have the id 700"):
        tokenizer.load_tokenizer(tmp_path)


def test_saved_and_loaded(text_tokenizer, tmp_path):
    text_tokenizer.save(tmp_path)
    for copy in (
        tokenizer.load_tokenizer(tmp_path / tokenizer.FILE),
        tokenizer.load_tokenizer(tmp_path),
    ):
        assert copy.special == text_tokenizer.special and copy.vocab_size == text_tokenizer.vocab_size
        for text in STRANGE + SPECIAL:
            assert copy.encode_text(text) == text_tokenizer.encode_text(text)


def test_training_is_deterministic_and_keeps_to_its_size():
    texts = ["a red square", "a green square", "é"] * 10
    first, second = tokenizer.train_tokenizer(texts, 300), tokenizer.train_tokenizer(texts, 300)
    assert first.vocab_size <= 300
    assert first.fast.to_str() == second.fast.to_str()
    assert first.decode(first.encode_text("never seen: 漢")) == "never seen: 漢"
    with pytest.raises(ValueError, match="more than 267 ids"):
        tokenizer.train_tokenizer(texts, 267)


def test_what_cannot_be_converted_is_refused(tmp_path):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text here"] * 20),
        model_writer=out,
        model_type="unigram",
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="not of type BPE"):
        tokenizer.from_sentencepiece(out.getvalue())
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        tokenizer.load_tokenizer(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.model nor"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(ValueError, match="a tokenizer is"):
        tokenizer.load_tokenizer(tmp_path / "t.txt")


OWN = {"<|im_start|>": 600, "<|im_end|>": 601}


def told(directory, model: bytes, **files) -> None:
    """A directory with a SentencePiece model and JSON files by their stems."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def whole(model: bytes, *added: str) -> dict:
    """The tokenizer.json of the same vocabulary, with more tokens."""
    fast = tokenizer.from_sentencepiece(model)
    fast.add_tokens([AddedToken(token, normalized=False) for token in added])
    return json.loads(fast.to_str())


TOLD = {
    "added_tokens.json": lambda model: {"added_tokens": OWN},
    "tokenizer_config.json": lambda model: {
        "tokenizer_config": {"added_tokens_decoder": {str(i): {"content": t, "special": False} for t, i in OWN.items()}}
    },
    "a whole tokenizer.json": lambda model: {"tokenizer": whole(model, *OWN)},
    "a whole tokenizer.json and added_tokens.json": lambda model: {
        "tokenizer": whole(model, *OWN),
        "added_tokens": OWN,
    },
    "the base's tokenizer.json": lambda model: {"tokenizer": whole(model), "added_tokens": OWN},
}
ENDS = {
    "tokenizer_config": {"eos_token": "<|im_end|>"},
    "special_tokens_map": {"eos_token": {"content": "<|im_end|>"}},
    "generation_config": {"eos_token_id": 601},
    "config": {"eos_token_id": [601, 600]},
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("where", TOLD)
def test_tokens_of_the_models_authors_stay(where, end, model, tmp_path):
    """As in models that were tuned to ChatML: at their ids, which nobody else is given; what ends a text is theirs."""
    files = TOLD[where](model)
    files[end] = files.get(end, {}) | ENDS[end]
    told(tmp_path / "given", model, **files)
    ours = tokenizer.load_tokenizer(tmp_path / "given")
    ours.save(tmp_path / "saved")
    alone = [] if "tokenizer" in files else [tokenizer.load_tokenizer(tmp_path / "given" / "tokenizer.model")]
    for one in (ours, tokenizer.load_tokenizer(tmp_path / "saved"), *alone):
        assert {token: one.fast.token_to_id(token) for token in OWN} == OWN
        assert one.special.eos == 601 and one.special.bos == 1 and one.special.pad == 602 and one.vocab_size == 610
        assert one.sentencepiece_model == model
        start, *rest = one.encode_text("<|im_start|>abc")
        assert start == 600 and rest == one.encode_text("abc")
        assert one.decode([600, *rest]).removeprefix("<|im_start|>").strip() == "abc"
        assert 601 not in one.encode_text("abc<|im_end|>"), "what ends a text is never meant by one"
    assert ours.new_tokens == tuple(range(602, 610))


def test_a_vocabulary_of_its_own_comes_before_sentencepiece(model, tmp_path, caplog):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.train_from_iterator(["a red square"] * 9, trainers.BpeTrainer(special_tokens=["<s>", "</s>"]))
    told(tmp_path, model, tokenizer=json.loads(fast.to_str()))
    ours = tokenizer.load_tokenizer(tmp_path)
    assert ours.encode_text("red") == fast.encode("red").ids and ours.sentencepiece_model is None
    assert "tokenizer.model is left aside for" in caplog.text and "other ids" in caplog.text


TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


@pytest.mark.parametrize("content", [TIKTOKEN, b"\xff\xff\xff", b""])
def test_a_tokenizer_model_that_is_not_sentencepieces(content, model, tmp_path, caplog):
    """As Llama 3's, which is tiktoken's: beside a tokenizer.json that is taken, alone it is refused by name."""
    told(tmp_path, content)
    with pytest.raises(
        ValueError, match=r"tokenizer\.model: it is (tiktoken's and not|no) SentencePiece.*tokenizer\.json"
    ):
        tokenizer.load_tokenizer(tmp_path)
    told(tmp_path, content, tokenizer=whole(model))
    want = tokenizer.from_sentencepiece(model).encode("abc", add_special_tokens=False).ids
    assert tokenizer.load_tokenizer(tmp_path).encode_text("abc") == want
    assert "tokenizer.model is left aside for tokenizer.json: it is" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<a>": 700}}, "the added token <a> should have the id 700, got 600"),
        ({"added_tokens": {"<unk>": 5}}, "the added token <unk> should have the id 5, got 0"),
        (
            {
                "added_tokens": {"<a>": 600},
                "tokenizer_config": {"added_tokens_decoder": {"601": {"content": "<a>"}}},
            },
            "files disagree: '<a>' has the id 601 in one, '<a>' the id 600 in another",
        ),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "the tokenizer has no eos_token '<|im_end|>'"),
    ],
)
def test_ids_that_cannot_be_are_refused(files, message, model, tmp_path):
    told(tmp_path, model, **files)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        tokenizer.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"600": "<a>"}}},
        {"tokenizer_config": {"added_tokens_decoder": {"600": {}}}},
        {"tokenizer_config": {"added_tokens_decoder": [{"content": "<a>"}]}},
        {"tokenizer_config": {"eos_token": 2}},
        {"generation_config": {"eos_token_id": "2"}},
    ],
)
def test_descriptions_of_another_form_are_refused(files, model, tmp_path):
    told(tmp_path, model, **files)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: its files are not as transformers writes them")):
        tokenizer.load_tokenizer(tmp_path)


def test_a_list_of_added_tokens_may_be_null_and_a_model_cut_off_is_told(model, tmp_path):
    told(tmp_path, model, tokenizer_config={"added_tokens_decoder": None})
    assert tokenizer.load_tokenizer(tmp_path).vocab_size == 608
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.ClearField("trainer_spec")  # it comes after the pieces
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="or not all of one; download it again"):
        tokenizer.load_tokenizer(tmp_path)


def test_a_text_has_the_same_tokens_each_time(text_tokenizer, tmp_path):
    text_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    stored = json.loads((tmp_path / tokenizer.FILE).read_text())
    stored["model"]["dropout"] = 0.9
    (tmp_path / tokenizer.FILE).write_text(json.dumps(stored))
    ours, text = tokenizer.load_tokenizer(tmp_path), "a red square and a blue square"
    assert ours.encode_text(text) == text_tokenizer.encode_text(text)
    assert ours.encode_text(text, prefix=False) == text_tokenizer.encode_text(text, prefix=False)


def test_no_tokenizer_says_how_to_supply_one(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer at .*: put a tokenizer\.model or a tokenizer\.json there"
    ):
        tokenizer.load_tokenizer(tmp_path / "tokenizer")
