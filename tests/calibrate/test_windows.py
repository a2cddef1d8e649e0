import random
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from q3q.data.texts import Text, load_text
from q3q.data.windows import consecutive_windows, draw_windows, encoder
from q3q.errors import CalibrationError


def characters(text):
    """One token per character."""
    return [ord(character) for character in text]


def spelled(windows):
    return ["".join(map(chr, row)) for row in windows.tolist()]


class Counting:
    """`characters`, keeping what was encoded."""

    def __init__(self):
        self.seen = []

    def __call__(self, text):
        self.seen.append(text)
        return characters(text)


def documents_of(seed, count, longest):
    """Random documents of 0 to `longest` letters."""
    dice = random.Random(seed)
    return tuple(
        "".join(dice.choices("abcdef", k=dice.randrange(longest + 1))) for _ in range(count)
    )


def refuse(complaint, text, **settings):
    with pytest.raises(CalibrationError) as refusal:
        draw_windows(text, characters, **({"samples": 2, "length": 4, "seed": 0} | settings))
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_first_windows_follow_each_other_from_the_start_of_the_joined_text():
    text = Text("t", ("abc", "defg", "h"), joiner="--")
    windows = draw_windows(text, characters, samples=3, length=4, draw="first", seed=0)
    assert spelled(windows) == ["abc-", "-def", "g--h"]
    assert windows.dtype == torch.int64
    refuse("has 3 windows of 4 tokens, 4 were asked for", text, samples=4, draw="first")
    refuse("has 0 windows of 13 tokens, 2 were asked for", text, length=13, draw="first")


@pytest.mark.parametrize("samples", [1, 5, 40])
def test_first_windows_are_those_of_the_whole_text_though_only_its_start_is_encoded(samples):
    text = load_text("demo", split="calibration")
    tokenizer = byte_pairs(text)
    whole = tokenizer(text.joined, verbose=False)["input_ids"]
    seen = []

    def encode(part):
        seen.append(len(part))
        return tokenizer(part, verbose=False)["input_ids"]

    windows = draw_windows(text, encode, samples=samples, length=64, draw="first", seed=0)
    assert torch.equal(windows, consecutive_windows(whole, 64, samples))
    assert sum(seen) < 0.5 * len(text.joined)


def test_first_windows_hold_no_token_that_a_cut_between_documents_made():
    """Tokens of two characters cross documents: a prefix may end otherwise than the whole text."""
    text = Text(
        "t", tuple(a + b + c for a in "abcdefgh" for b in "ijk" for c in "lmnopq"), joiner=""
    )
    whole = Text("t", (text.joined,))

    def pairs(part):
        return [
            256 * ord(pair[0]) + ord(pair[-1])
            for pair in (part[i : i + 2] for i in range(0, len(part), 2))
        ]

    for samples in range(1, 100):
        settings: Any = {"samples": samples, "length": 2, "draw": "first", "seed": 0}
        assert torch.equal(
            draw_windows(text, pairs, **settings), draw_windows(whole, pairs, **settings)
        )


def gptq_documents(documents, samples, length, seed):
    """The published draw: documents until one is long enough, then a window of it."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(documents) - 1)
            if len(documents[i]) > length:
                break
        i_start = random.randint(0, len(documents[i]) - length - 1)
        rows.append(documents[i][i_start : i_start + length])
    return rows


def gptq_stream(joined, samples, length, seed):
    """The published draw from one running text."""
    random.seed(seed)
    starts = [random.randint(0, len(joined) - length - 1) for _ in range(samples)]
    return [joined[start : start + length] for start in starts]


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize(("count", "longest", "length"), [(50, 30, 20), (200, 12, 11), (2, 40, 5)])
def test_random_windows_of_documents_are_gptqs(seed, count, longest, length):
    documents = documents_of(seed, count, longest)
    windows = draw_windows(
        Text("t", documents), characters, samples=16, length=length, draw="random", seed=seed
    )
    assert spelled(windows) == gptq_documents(documents, 16, length, seed)


def test_random_windows_are_the_studys_256_of_c4():
    """The first eleven of the C4 windows that the study cached as (document, offset).

    Efficient-ML/Qwen3-Quantization, eval_my: 45,576 documents of the first validation shard,
    windows of 2,048 tokens; documents have lengths that fit the offsets.
    """
    study = {
        25247: (388, 2437),
        31845: (829, 3072),
        23465: (597, 2646),
        16417: (1090, 3139),
        9631: (79, 2176),
        5886: (347, 2396),
        8155: (325, 2374),
        7605: (298, 6144),
        13064: (1065, 4096),
        23406: (397, 2560),
        2994: (1114, 3163),
    }
    documents = tuple(f"{k:05d}" + "." * study.get(k, (0, 0))[1] for k in range(45_576))

    def encode(document):
        number = int(document[:5])
        return [100_000 * number + place for place in range(study[number][1])]

    windows = draw_windows(
        Text("c4", documents), encode, samples=11, length=2048, draw="random", seed=0
    )
    assert [divmod(start, 100_000) for start in windows[:, 0].tolist()] == [
        (k, at) for k, (at, _) in study.items()
    ]


@pytest.mark.parametrize(
    "text",
    [
        Text("one document", ("abcdefghijklmnopqrstuvwxyz",)),
        Text("running", ("abcdefghi", "klm", "", "opqrstuvwxyz"), joiner="+", running=True),
        Text("no document longer", ("abcd", "efgh", "ijkl"), joiner="\n"),
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_random_windows_of_a_running_text_start_anywhere(text, seed):
    windows = draw_windows(text, characters, samples=20, length=4, draw="random", seed=seed)
    assert spelled(windows) == gptq_stream(text.joined, 20, 4, seed)


def test_tokens_not_bytes_decide_whether_a_document_is_long_enough():
    """Long in bytes, short in tokens: the joined text it is."""
    text = Text("t", ("abababab", "cdcdcdcd", "efefefef"), joiner="")

    def pairs(part):
        return [ord(first) for first in part[::2]]

    windows = draw_windows(text, pairs, samples=9, length=4, draw="random", seed=0)
    assert spelled(windows) == gptq_stream("aaaacccceeee", 9, 4, seed=0)
    longer = Text("t", (*text.documents, "ghghghghgh"), joiner="")
    assert set(
        spelled(draw_windows(longer, pairs, samples=9, length=4, draw="random", seed=0))
    ) == {"gggg"}


def test_random_windows_may_overlap_and_a_text_of_just_one_window_gives_it():
    assert spelled(
        draw_windows(Text("t", ("abcd",)), characters, samples=2, length=4, draw="random", seed=0)
    ) == [
        "abcd",
        "abcd",
    ]
    refuse("the text t has 3 tokens, but one window needs 4", Text("t", ("abc",)), draw="random")


def test_random_windows_encode_a_few_documents_not_the_text():
    documents = tuple("x" * 10 if i % 10 else "y" * 100 for i in range(10_000))
    encode = Counting()
    draw_windows(Text("t", documents), encode, samples=8, length=50, draw="random", seed=0)
    assert (
        len(encode.seen) == 9
    )  # the windows' documents, and one to learn that there are long ones
    assert len(set(encode.seen)) == 1


def awq_blocks(documents, samples, length, seed):
    """The published draw, with the shuffle of `datasets` itself."""
    shuffled = datasets.Dataset.from_dict({"text": list(documents)}).shuffle(seed=seed)
    lines = []
    for row in shuffled:
        line = row["text"].strip()
        if len(line) > length or not line:
            continue
        lines.append(line)
        if len(lines) == samples:
            break
    joined = "".join(lines)
    return [joined[i * length : (i + 1) * length] for i in range(len(joined) // length)]


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize(("count", "longest", "length"), [(100, 30, 20), (300, 60, 25), (10, 9, 8)])
def test_document_windows_are_awqs(seed, count, longest, length):
    documents = tuple(f" {document}\n" for document in documents_of(seed, count, longest))
    windows = draw_windows(
        Text("t", documents), characters, samples=32, length=length, draw="documents", seed=seed
    )
    assert spelled(windows) == awq_blocks(documents, 32, length, seed)
    assert 0 < len(windows) <= 32


def test_document_windows_need_short_documents():
    text = Text("t", ("abcdefgh", "ab", "", "  "))
    refuse(
        "1 document of 1 to 4 tokens, drawn from the 4 of the text t: 2 tokens, but one window "
        "needs 4",
        text,
        draw="documents",
    )


@pytest.mark.parametrize("draw", ["random", "documents"])
def test_equal_seeds_draw_equal_windows_and_others_do_not(draw):
    text = load_text("demo", split="calibration")
    state = random.getstate()
    drawn = [
        draw_windows(text, characters, samples=8, length=400, draw=draw, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert random.getstate() == state  # nobody else's dice are touched


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"draw": "all"}, "draw='all': give first, random or documents"),
        ({"draw": "first", "samples": 0}, "samples=0"),
        ({"draw": "first", "length": 0}, "length=0"),
    ],
)
def test_a_draw_without_meaning_is_refused(settings, complaint):
    refuse(complaint, Text("t", ("abcdefgh",)), **settings)


def test_consecutive_windows_drop_the_tail():
    assert consecutive_windows(range(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert consecutive_windows(torch.arange(11), 3, limit=2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert consecutive_windows(list(range(6)), 3, limit=9).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(CalibrationError, match="2 tokens, but one window needs 3"):
        consecutive_windows([1, 2], 3)


def byte_pairs(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.documents[:200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


def test_encoding_a_long_text_warns_of_nothing(caplog):
    text = load_text("demo", split="evaluation")
    tokenizer = byte_pairs(text)
    transformers.logging.enable_propagation()
    try:
        ids = encoder(tokenizer)(text.joined)
        assert not caplog.records
        assert len(ids) > 1000
        assert tokenizer.decode(ids) == text.joined
        tokenizer("a word " * 100)  # the warning there would have been
        assert caplog.records
    finally:
        transformers.logging.disable_propagation()
