"""Text encoded line by line has the ids of the whole text, with a tokenizer made as Qwen3's is."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from q3q.data.texts import load_text
from q3q.evaluate.encoding import QWEN_SPLIT, LineEncoder, cuts_at_lines, encode_pair

# What stands next to a newline in prompts, and what a merge might want to cross it for.
PARTS = [
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    " ",
    "  ",
    "\t",
    "\x0b",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u2028",
    "\u3000",
]
PARTS += [
    "a",
    "Ab",
    "nn",
    "1",
    "23",
    "?",
    "?\n",
    "!!",
    ".\n",
    "'s",
    "'\n",
    "-\nb",
    "_",
    "é",
    "e\u0301",
    "\u0301",
    "ſ",
]
PARTS += [
    "日本",
    "語",
    "😀",
    "👩\u200d👧",
    "\u200b",
    "²",
    "Ⅳ",
    "<|endoftext|>",
    "<|im_start|>",
    "<think>",
    "Answer:",
    "A. b",
]


def qwen_like(
    split=PRETOKENIZE_REGEX,
    normalizer=None,
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
):
    """A byte-level BPE with Qwen3's normalizer, split and added tokens, on text of newlines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer or normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    text = load_text("demo", split="evaluation").joined[:60_000]
    tokenizer.train_from_iterator([*text.split(". "), *texts(300, seed=9)], trainer)
    tokenizer.add_tokens(["<think>", "</think>"])  # added, and not special, as in Qwen3
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def texts(count, seed):
    dice = np.random.default_rng(seed)
    return ["".join(dice.choice(PARTS, dice.integers(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return qwen_like()


def test_the_split_that_is_known_is_qwens():
    assert QWEN_SPLIT == PRETOKENIZE_REGEX


def test_line_by_line_ids_are_the_tokenizers_own(tokenizer):
    encode = LineEncoder(tokenizer)
    assert cuts_at_lines(tokenizer)
    for text in texts(3000, seed=0):
        assert encode(text) == tokenizer(text)["input_ids"], repr(text)
    prompt = "Question: Who?\nA. one\nB. two\nAnswer: A\n\n" * 5
    assert encode(prompt) == tokenizer(prompt)["input_ids"]
    assert len(encode._lines) > 1000  # text was cut at all
    assert len(tokenizer(prompt)["input_ids"]) < len(prompt) / 2  # and there are merges to go wrong


def test_lines_that_were_learnt_together_have_the_same_ids(tokenizer, monkeypatch):
    encode, many = LineEncoder(tokenizer), texts(500, seed=3)
    encode.learn(many)
    monkeypatch.setattr(encode, "_encode", None)  # nothing is left to be asked for
    for text in many:
        assert encode(text) == tokenizer(text)["input_ids"], repr(text)


def test_a_pair_is_split_as_its_whole_text_is(tokenizer):
    encode: Any = LineEncoder(tokenizer)
    dice = np.random.default_rng(1)
    for text in texts(500, seed=2):
        cut = int(dice.integers(1, len(text) + 1))
        context, continuation = encode_pair(encode, text[:cut], text[cut:])
        plain = encode_pair(lambda part: tokenizer(part)["input_ids"], text[:cut], text[cut:])
        assert (context, continuation) == plain


def test_a_tokenizer_that_might_merge_over_lines_is_left_alone():
    across = r"[^\s]+\n[a-z]+|[^\s]+|\s+"
    other = qwen_like(split=across)
    assert not cuts_at_lines(other)
    assert not cuts_at_lines(
        qwen_like(normalizer=normalizers.Sequence([normalizers.Replace("\n", " ")]))
    )
    assert not cuts_at_lines(qwen_like(special=("<|endoftext|>", "a\nb")))
    encode = LineEncoder(other)
    for text in texts(200, seed=3):
        assert encode(text) == other(text)["input_ids"]
    assert not encode._lines
