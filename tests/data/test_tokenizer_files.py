"""Loads tokenizers whose special tokens, added tokens and settings stand in files beside tokenizer.json.

The wanted values are those of transformers 4.57 and 5 on the same files, worked out by hand from its rules.
"""

import json
import threading
import time

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from lsjax.data.tokenizer import Tokenizer, begin_with
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
HELLO = [{"role": "user", "content": "hi"}]


def byte_level(*special: str) -> tokenizers.Tokenizer:
    """Makes byte-level BPE without merges: bytes are ids 0 to 255, special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def sentencepiece(*words: str) -> tokenizers.Tokenizer:
    """Makes BPE as in Llama 2: a decoder that drops the first space, bytes to fall back on, whole words as pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    starts = dict.fromkeys(word[:end] for word in words for end in range(1, len(word) + 1))
    letters = dict.fromkeys(letter for word in words for letter in word)
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *letters, *starts]))}
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    return backend


def load(folder, backend: tokenizers.Tokenizer, settings=None, end=None, **more) -> Tokenizer:
    """Writes a folder and loads it. `end` is eos_token_id; `more` are further files by name without .json."""
    (folder / "tokenizer.json").write_text(backend.to_str())
    files = {"tokenizer_config": settings, "generation_config": None if end is None else {"eos_token_id": end}} | more
    for name, tree in files.items():
        if tree is not None:
            (folder / f"{name}.json").write_text(json.dumps(tree))
    return load_tokenizer(folder)


def entry(text: str, special: bool = True) -> dict:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return flags | {"content": text, "special": special}


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


def test_special_tokens_named_only_in_their_map_are_used(tmp_path):
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    tokenizer = load(tmp_path, byte_level("<s>", "</s>"), {"chat_template": template}, special_tokens_map=names)
    assert tokenizer.stop == (257,)
    assert shown(tokenizer, tokenizer.encode_chat(HELLO)) == "<s>[INST] hi [/INST]"
    assert tokenizer.encode_chat(HELLO)[0] == 256


def test_tokenizer_config_goes_before_the_map_where_it_lists_the_added_tokens(tmp_path):
    listed = {"256": entry("<s>"), "257": entry("</s>"), "258": entry("<eot>")}
    backend = byte_level("<s>", "</s>", "<eot>")
    names = {"eos_token": "</s>"}
    assert load(tmp_path, backend, {"eos_token": "<eot>"}, special_tokens_map=names).stop == (257,)
    both = {"eos_token": "<eot>", "added_tokens_decoder": listed}
    assert load(tmp_path, backend, both, special_tokens_map=names).stop == (258,)


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize("end", [259, 257])
def test_added_tokens_listed_only_elsewhere_are_tokens(where, end, tmp_path):
    settings, more = {"chat_template": CHATML, "eos_token": "<|im_end|>"}, {}
    if where == "added_tokens_decoder":
        settings["added_tokens_decoder"] = {"258": entry("<|im_start|>"), "259": entry("<|im_end|>")}
    else:
        more["added_tokens"] = {"<|im_end|>": 259, "<|im_start|>": 258}
    tokenizer = load(tmp_path, byte_level("<s>", "</s>"), settings, end, **more)
    ids = tokenizer.encode_chat(HELLO)
    assert tokenizer.stop == (end,)
    assert ids[0] == 258
    assert len(ids) == 20
    assert ids[8] == 259
    assert tokenizer.decode([259]) == ""  # special in both: named as eos_token
    assert 259 not in tokenizer.encode("<|im_end|>")  # plain text stays text
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode_chat(HELLO) == ids


def test_a_token_of_the_vocabulary_that_is_named_as_special_is_special(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    tokenizer = load(tmp_path, backend, {"eos_token": "</s>", "chat_template": "ab</s>"})
    assert tokenizer.encode_chat(HELLO) == [0, 1, 2]
    assert tokenizer.decode([2]) == ""


def test_an_added_token_that_cannot_have_its_id_is_refused(tmp_path):
    listed = {"300": entry("<|im_start|>")}
    with pytest.raises(UserError, match=r"the id 300, but tokenizer\.json leaves it 258"):
        load(tmp_path, byte_level("<s>", "</s>"), {"added_tokens_decoder": listed}, 257)
    with pytest.raises(UserError, match="cannot be added"):
        load(tmp_path, byte_level("<s>", "</s>"), {"added_tokens_decoder": {"258": {"text": "x"}}}, 257)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": "258"}')
    with pytest.raises(UserError, match=r"the id '258', but tokenizer\.json leaves it 258"):
        load(tmp_path, byte_level("<s>", "</s>"), {}, 257)


@pytest.mark.parametrize("settings", [{"bos_token": None}, {}, {"add_bos_token": True}])
def test_a_template_gets_no_text_for_a_token_that_does_not_exist(settings, tmp_path):
    template = "{{ bos_token }}{{ add_bos_token }}{{ messages[0].content }}"
    tokenizer = load(tmp_path, byte_level("</s>"), settings | {"chat_template": template, "eos_token": "</s>"})
    assert shown(tokenizer, tokenizer.encode_chat(HELLO)) == "hi"


def test_added_tokens_keep_their_ids_in_whatever_order_they_stand(tmp_path):
    backend = byte_level("<s>", "</s>")
    last = backend.get_vocab_size()
    tree = json.loads(backend.to_str())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] += [{"id": last + 1, "content": "<b>"} | plain, {"id": last, "content": "<a>"} | plain]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "<a><b>"}))
    assert load_tokenizer(tmp_path).encode_chat(HELLO)[-2:] == [last, last + 1]


def test_llama_classes_have_default_tokens_and_obey_add_bos_token(tmp_path):
    backend = sentencepiece("▁hello")
    word = backend.token_to_id("▁hello")
    opened = sentencepiece("▁hello")
    begin_with(opened, "<s>")
    llama, other = {"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert load(tmp_path, backend, llama).stop == (2,)
    assert load(tmp_path, backend, llama | {"add_bos_token": True}, 2).encode("hello") == [1, word]
    assert load(tmp_path, opened, llama | {"add_bos_token": False}, 2).encode("hello") == [word]
    assert load(tmp_path, opened, llama, 2).encode("hello") == [1, word]
    assert load(tmp_path, backend, other | {"add_bos_token": True}, 2).encode("hello") == [word]
    assert load(tmp_path, opened, other | {"add_bos_token": False}, 2).encode("hello") == [1, word]


@pytest.mark.parametrize("ids", [[257, 300], [-1, 257], [257]])
def test_end_ids_without_a_token_are_left_out(ids, tmp_path):
    assert load(tmp_path, byte_level("<s>", "</s>"), end=ids).stop == (257,)


@pytest.mark.parametrize("ids", [[True], True, "257", [257.0], [[257]], [300], [], {"a": 1}])
def test_end_ids_that_are_none_are_refused(ids, tmp_path):
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id"):
        load(tmp_path, byte_level("<s>", "</s>"), end=ids)


def test_added_tokens_beyond_the_embedding_are_refused_only_when_used(tmp_path):
    tokenizer = load(tmp_path, byte_level("</s>", "<PRE>"), {"chat_template": "{{ messages[0].content }}"}, [256, 257])
    tokenizer.restrict_to(257, "model")
    assert tokenizer.stop == (256,)
    assert tokenizer.encode("a<PRE>") == tokenizer.encode_chat([{"content": "a"}]) + tokenizer.encode("<PRE>")
    with pytest.raises(UserError, match=r"holds the token '<PRE>' \(id 257\), but the embedding has 257 rows"):
        tokenizer.encode_chat([{"role": "user", "content": "<PRE>"}])
    for rows in (200, 256):  # bytes, or the only end token, beyond the embedding: another model's tokenizer
        with pytest.raises(UserError, match="model: its tokenizer has 258 tokens, its embedding"):
            load_tokenizer(tmp_path).restrict_to(rows, "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("tokenizer.json", "[" * 100_000 + "]" * 100_000, "is not a tokenizer.json"),
        ("tokenizer_config.json", '{"a": ' * 100_000 + "}" * 100_000, "tokenizer_config.json is not JSON"),
        ("added_tokens.json", '{"<x>": "y"}', "gives the token '<x>' the id 'y'"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    load(tmp_path, byte_level("</s>"), {}, 256)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_folder_with_only_a_sentencepiece_model_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(UserError, match=r"only tokenizer\.model: make tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_name_of_300_characters_is_no_tokenizer():
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer("x" * 300)


def test_threads_share_a_tokenizer(tmp_path):
    """One thread encodes chats, where special tokens count; the other plain texts, where they are text."""
    tokenizer = load(tmp_path, byte_level("<|im_start|>", "<|im_end|>"), {"chat_template": CHATML}, 257)
    plain, chat = "some <|im_end|> text " * 100, [{"role": "user", "content": "word " * 300}]
    wanted, wanted_chat = tokenizer.encode(plain), tokenizer.encode_chat(chat)
    done, wrong = threading.Event(), []

    def encode_plain():
        while not done.is_set():
            wrong.extend([] if tokenizer.encode(plain) == wanted else ["plain"])

    thread = threading.Thread(target=encode_plain)
    thread.start()
    wrong.extend("chat" for _ in range(100) if tokenizer.encode_chat(chat) != wanted_chat)
    done.set()
    thread.join()
    assert not wrong


def test_the_text_of_a_continuation_adds_to_that_of_its_context(tmp_path):
    """Decoded alone, words of Llama 2 lose the space before the first, and bytes of one character are no character."""
    tokenizer = load(tmp_path, sentencepiece("▁hello", "▁world"), end=2)
    ids = [1, *tokenizer.encode("hello world é  world")]
    whole = tokenizer.decode(ids)
    assert whole == "hello world é  world"
    assert tokenizer.decode(ids[2:], context=ids[:2]) == " world é  world"
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        text = tokenizer.decode(ids[cut:], context=ids[:cut])
        assert before + text == whole
        for end in range(cut, len(ids) + 1):
            assert (before + tokenizer.decode_settled(ids[cut:end], context=ids[:cut])).startswith(
                tokenizer.decode_settled(ids[:end])
            )
    level = load(tmp_path, byte_level("</s>"), end=256)
    ids = level.encode("aé中\U0001f600b")
    for cut in range(1, len(ids)):
        assert level.decode_settled(ids[:cut]) + level.decode(ids[cut:], context=ids[:cut]) == "aé中\U0001f600b"


def test_texts_that_a_stop_string_cannot_match_are_known(tmp_path):
    backend = byte_level("</s>", "<|im_end|>")
    backend.add_tokens(["<shown>"])
    assert load(tmp_path, backend, end=256).special_tokens == {"</s>": 256, "<|im_end|>": 257}


def test_half_a_surrogate_pair_is_refused(tmp_path):
    tokenizer = load(tmp_path, byte_level("</s>"), {"chat_template": "{{ messages[0].content }}"}, 256)
    for call in (tokenizer.encode, lambda text: tokenizer.encode_chat([{"role": "user", "content": text}])):
        with pytest.raises(UserError, match=r"half of a surrogate pair, U\+D83D at character 4"):
            call("bad\ud83d half")
    with pytest.raises(UserError, match="is int, not a string"):
        tokenizer.encode(5)


def render(template: str, tmp_path, messages=HELLO) -> str:
    tokenizer = load(tmp_path, byte_level("</s>"), {"chat_template": template, "eos_token": "</s>"})
    return shown(tokenizer, tokenizer.encode_chat(messages))


def test_generation_blocks_are_rendered(tmp_path):
    template = (
        "{% set x = 'a' %}{% for m in messages %}{% generation %}{% set x = 'b' %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ x }}{{ {'k': 'é<'} | tojson }}"
    )
    assert render(template, tmp_path) == 'hia{"k": "é<"}'


BOMBS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop without a range": "{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a product of text": "{{ ('x' * 10 ** 10) | length }}",
    "a product of a list": "{{ ([0] * 10 ** 10) | length }}",
    "a wide field": "{{ '%099999999999d' | format(1) }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a large power": "{{ (10 ** (10 ** 10)) % 7 }}",
    "a lot of text": "{% for a in range(99999) %}{% for b in range(9999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_template_has_limits_of_time_memory_and_text(what, tmp_path, monkeypatch):
    monkeypatch.setattr("lsjax.data.chat._MAX_SECONDS", 2.0)
    render("ok", tmp_path)  # starts the process, which is not part of the limit
    start = time.monotonic()
    with pytest.raises(UserError, match="chat template does not take this conversation"):
        render(BOMBS[what], tmp_path)
    assert time.monotonic() - start < 30
    assert render("ok", tmp_path) == "ok"


@pytest.mark.parametrize("messages", ["hi", None, [{1, 2}], {"role": "user"}, [{"content": object()}]])
def test_a_conversation_that_is_none_is_refused(messages, tmp_path):
    with pytest.raises(UserError, match="a conversation must"):
        render("ok", tmp_path, messages)
