"""Our language model behind lm-eval's interface answers what lm-eval's own HFLM answers."""

import json
import math
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from q3q.config.model import DEMO_MODELS
from q3q.data.texts import load_text
from q3q.errors import ConfigError, IntegrityError
from q3q.evaluate import generation
from q3q.evaluate.batches import first_questions
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.chat import Chat
from q3q.evaluate.encoding import as_ids
from q3q.evaluate.harness import run as harness_run
from q3q.evaluate.harness.lm import HarnessLM
from q3q.evaluate.harness.metrics import read_metrics, shares_of
from q3q.evaluate.harness.run import Asked, TaskScores, check_samples
from q3q.evaluate.journal import Journal
from q3q.evaluate.prefixes import PackedTree
from q3q.evaluate.tree_pass import run_tree
from q3q.models.cache import Cached
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.scheme import InputRounding

WINDOW = 512  # tokens, so that little is much
OFFICIAL = Path(lm_eval.tasks.__file__).parent


def models(kind, dtype):
    folder = DEMO_MODELS / kind
    tokenizer = load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # With its logits cache HFLM scores the wrong positions where the same tokens are cut into
    # context and continuation in two ways (lm-eval 0.4.13).
    hflm = HFLM(
        pretrained=theirs, tokenizer=tokenizer, batch_size=8, max_length=WINDOW, logits_cache=False
    )
    return HarnessLM(load_decoder(Checkpoint(folder), dtype), tokenizer, max_length=WINDOW), hflm


def run_tasks(model, tokenizer, tasks, **settings) -> TaskScores:
    """Score tasks; `settings`: of what is asked, and of `run_tasks` itself."""
    own = {name: settings.pop(name) for name in [*settings] if name in Asked.__annotations__}
    return harness_run.run_tasks(model, tokenizer, Asked(tasks=tasks, **own), **settings)


@pytest.fixture(scope="module")
def both():
    """The dense demo model behind both interfaces, in float32."""
    return models("dense", torch.float32)


def instances(pairs, kind="loglikelihood"):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i, metadata=("a_task", i, 1))
        for i, pair in enumerate(pairs)
    ]


STORY = "Ada has a red ball. Ben has a blue cup.\nQuestion: Who has the ball?\nAnswer:"


def adversarial():
    pairs = [(STORY, f" {name}") for name in ("Ada", "Ben", "Cleo", "Dan")]
    pairs += [
        (STORY, " the kitchen"),
        (STORY, " the garden"),
        (STORY, " the kitchen"),
    ]  # shared inputs, and a repeat
    pairs += [
        (STORY + " Ada", " has it."),
        (STORY, " Ada has it."),
    ]  # the same tokens, cut elsewhere
    pairs += [("", "Ada has a ball."), ("", " x")]  # empty context
    pairs += [
        ("def f(", "x):\n    return x"),
        ("naïve café — ", "déjà vu 😀"),
        ("日本", "語\u0301"),
        ("1 + 1 =", "2"),
    ]
    pairs += [
        ("trailing space ", "moves"),
        ("two lines \n\n", "move too"),
        ("wor", "ld merges"),
        ("a\n", "\nb"),
    ]
    pairs += [
        ("word " * 700, "word"),
        ("word " * 700, " other words"),
        ("word " * 40, "word"),
    ]  # longer than the window
    pairs += [("a", " b" * 30), ("Ada", " ball" * 600)]  # the last one is refused
    return pairs


def agree(found, expected, absolute=1e-4, relative=1e-6):
    for (score, greedy), (theirs, their_greedy) in zip(found, expected, strict=True):
        assert abs(score - theirs) <= absolute + relative * abs(theirs)
        assert greedy == their_greedy


def test_scores_equal_hflms(both):
    ours, hflm = both
    told = []
    ours.scorer.steps = lambda done, total: told.append((done, total))
    pairs = adversarial()[:-1]
    agree(
        ours.loglikelihood(instances(pairs)),
        hflm.loglikelihood(instances(pairs), disable_tqdm=True),
    )
    assert told[0] == (0, len(pairs))
    assert told[-1] == (len(pairs), len(pairs))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_what_no_window_holds_is_refused(both):
    ours, _ = both
    with pytest.raises(
        ConfigError, match=r"a_task: a continuation has \d+ tokens; a window of 512"
    ):
        ours.loglikelihood(instances(adversarial()[-1:]))
    with pytest.raises(ConfigError, match="0 tokens"):
        ours.loglikelihood(instances([("Ada has", "")]))
    with pytest.raises(ConfigError, match="spaces"):
        ours.loglikelihood(instances([("  ", "Ada")]))


def rounded_to(bits):
    """Return a hook that rounds a linear's input as SmoothQuant does, with one scale per token."""

    def rounded(_, inputs):
        scale = inputs[0].float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        scale = scale / (2 ** (bits - 1) - 1)
        return ((inputs[0].float() / scale).round() * scale).to(inputs[0].dtype)

    return rounded


def round_inputs(ours, hflm, bits):
    """Make the linears of both models' blocks round their inputs to `bits` bits."""
    for block in ours.model.blocks:
        block.rounding = InputRounding(bits)
    for name, linear in hflm.model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name.startswith("model.layers."):
            linear.register_forward_pre_hook(rounded_to(bits))


def scores(lm, pairs):
    return np.array([score for score, _ in lm.loglikelihood(instances(pairs))])


def distances(found, expected):
    """Compute distances in nats of scores down to -20, in proportion beyond."""
    return np.abs(found - expected) / np.maximum(1.0, np.abs(expected) / 20)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "act_bits", "median", "most"),
    [("moe", None, 1e-5, 1e-3), ("dense", 8, 1e-4, 0.05)],
    ids=["moe float32", "dense float32 act 8"],
)
def test_where_a_last_bit_may_flip_a_code_or_an_expert_differences_are_small(
    kind, act_bits, median, most
):
    """The bounds are those of docs/EVALUATION.md."""
    ours, hflm = models(kind, torch.float32)
    pairs = [pair for pair in adversarial()[:-1] if len(pair[0]) < 700]
    plain = scores(ours, pairs)
    if act_bits is not None:
        round_inputs(ours, hflm, act_bits)
    found = scores(ours, pairs)
    differences = distances(found, scores(hflm, pairs))
    assert np.median(differences) <= median
    assert max(differences) <= most
    if act_bits is not None:
        assert np.median(np.abs(found - plain)) > 2 * np.median(differences)  # both sides rounded


def spans(count):
    """Return `count` pairs of a context and its continuation from the demo's evaluation text."""
    text = load_text("demo", split="evaluation").joined
    step = (len(text) - 280) // count
    return [
        (text[start : start + 240], text[start + 240 : start + 280])
        for start in range(0, count * step, step)
    ]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "act_bits"),
    [("dense", None), ("moe", None), ("dense", 8)],
    ids=["dense", "moe", "dense act 8"],
)
def test_in_bfloat16_scores_are_as_near_float32s_as_hflms_are(kind, act_bits):
    """Compare both with float32 in one run: the distance depends on the model and the processor.

    The mean of 60 such distances is good to a tenth.
    """
    pairs = spans(60)
    ours, hflm = models(kind, torch.bfloat16)
    in_float32 = models(kind, torch.float32)
    unrounded = scores(ours, pairs)
    if act_bits is not None:
        round_inputs(ours, hflm, act_bits)
        round_inputs(in_float32[0], in_float32[1], act_bits)
        assert not np.array_equal(scores(ours, pairs), unrounded)
    exact = scores(in_float32[1], pairs)
    errors, hflms_errors = (distances(scores(lm, pairs), exact) for lm in (ours, hflm))
    print(errors.mean() / hflms_errors.mean(), errors.max() / hflms_errors.max())
    assert errors.mean() <= 1.25 * hflms_errors.mean()
    assert errors.max() <= 2 * hflms_errors.max()


@torch.inference_mode()
def test_quantized_activations_do_not_depend_on_the_batch(both):
    ours, _ = both
    blocks = [block.with_weights({}) for block in ours.model.blocks]
    for block in blocks:
        block.rounding = InputRounding(8)
    quantized = HarnessLM(replace(ours.model, blocks=blocks), ours.tokenizer)
    pairs = [pair for pair in adversarial()[:-1] if len(pair[0]) < 700]
    together = quantized.loglikelihood(instances(pairs))
    alone = [quantized.loglikelihood(instances([pair]))[0] for pair in pairs]
    unquantized = ours.loglikelihood(instances(pairs))
    differences = [abs(a - b) for (a, _), (b, _) in zip(together, alone, strict=True)]
    effect = [abs(a - b) for (a, _), (b, _) in zip(together, unquantized, strict=True)]
    assert np.median(differences) <= 0.02  # a code flips where rounding was a near tie
    assert np.median(differences) < 0.2 * np.median(effect)


def test_rolling_likelihoods_equal_hflms(both):
    ours, hflm = both
    texts = [
        ("Ada has a ball. " * 250,),
        ("Ben",),
        ("naïve — 😀\n\nNew paragraph",),
    ]  # the first needs several windows
    found = ours.loglikelihood_rolling(instances(texts, "loglikelihood_rolling"))
    expected = hflm.loglikelihood_rolling(
        instances(texts, "loglikelihood_rolling"), disable_tqdm=True
    )
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_generated_texts_equal_hflms(both):
    ours, hflm = both
    shared = {"until": ["\n", "?"], "max_gen_toks": 24, "do_sample": False}
    pairs = [
        (STORY, shared),
        ("Ada has a red ball. Ben has", shared),
        (STORY + " Ada", shared),
        (STORY, shared),
    ]
    pairs += [
        ("Ada", {"until": ["."], "max_gen_toks": 40}),
        ("The", {"until": [], "max_gen_toks": 12, "temperature": 0.0}),
    ]
    pairs += [("word " * 700 + "Ada has", shared)]
    found = ours.generate_until(instances(pairs, "generate_until"))
    hflm.batch_size_per_gpu = 1
    expected = [
        hflm.generate_until(instances([pair], "generate_until"), disable_tqdm=True)[0]
        for pair in pairs
    ]
    assert found == expected
    assert len(set(found)) > 3


@pytest.mark.parametrize("tokens", [7, 64, 1000])
def test_what_prompts_share_runs_once_however_few_are_continued_together(both, monkeypatch, tokens):
    """tokens: of a batch, in which several rows end, or of which a row takes several."""
    ours, _ = both
    questions = [" What is red?", " Who has the cup?", "", " What is red? The ball", " Who"]
    contexts = sorted(
        (as_ids(ours.tok_encode(start + q)) for start in (STORY, "Ben") for q in questions),
        key=list,
    )
    ran = []

    def counted(*given):
        for first, stop, hidden in run_tree(*given):
            ran.append(stop - first)
            yield first, stop, hidden

    monkeypatch.setattr(generation, "run_tree", counted)

    def texts():
        with torch.inference_mode():
            budget = TokenBudget(tokens, most=tokens)
            return dict(
                generation.generate(ours.model, contexts, 6, lambda found: found[-1] == 0, budget)
            )

    together = texts()
    unique = sum(ran)
    for cache in (1, 100_000):  # bytes: a row at a time, some
        ran.clear()
        monkeypatch.setattr(generation, "cache_bytes", lambda *_, cache=cache: cache)
        assert texts() == together
        assert sum(ran) == unique == len(PackedTree(contexts)) < sum(map(len, contexts)) / 2


def test_rows_are_continued_together_within_what_is_free():
    """In MiB: half of what is free, of which a batch that is read ahead has its part."""

    def room(device, spare, ahead):
        return (
            generation.cache_bytes(device, None if spare is None else spare << 20, ahead << 20)
            >> 20
        )

    assert room("cpu", None, 0) == room("cpu", 8192, 0) == room("cuda", 512, 0) == 1024
    assert (room("cpu", 512, 0), room("cuda", 8192, 0)) == (256, 4096)
    assert (room("cpu", 512, 100), room("cuda", 8192, 1000)) == (156, 3096)
    assert (room("cpu", 512, 1000), room("cuda", 8192, 9000)) == (128, 2048)
    assert room("cpu", 16, 0) == room("cpu", 64, 64) == 64


def test_when_rows_end_the_caches_are_copied_block_by_block(both, monkeypatch):
    """There are as many as blocks, and one more while it is copied."""
    ours, _ = both
    seen: list[Any] = []
    alive: list[Any] = []

    def counted(select):
        def wrapped(cache, rows_R, lengths):
            copied = select(cache, rows_R, lengths)
            seen.extend((weakref.ref(cache), weakref.ref(copied)))
            alive.append(len({id(one()) for one in seen} - {id(None)}))
            return copied

        return wrapped

    contexts = sorted(
        (as_ids(ours.tok_encode(text)) for text in (STORY, "Ben", "The", "Ada has a")), key=list
    )
    lengths = iter((1, 2, 3, 9))
    limits = {}

    def ended(tokens):
        if len(tokens) == 1:
            limits[id(tokens)] = next(lengths)
        return len(tokens) >= limits[id(tokens)]

    monkeypatch.setattr(Cached, "select", counted(Cached.select))
    with torch.inference_mode():
        found = dict(generation.generate(ours.model, contexts, 9, ended, TokenBudget(64, most=64)))
    assert sorted(map(len, found.values())) == [1, 2, 3, 9]
    blocks = len(ours.model.blocks)
    assert len(alive) == 2 * blocks  # copied when two rows are left, and when one is
    assert max(alive) == blocks + 1


def test_generation_ends_where_the_models_own_settings_say(both, tmp_path):
    """A post-trained Qwen3 has two tokens that end its turn, its tokenizer names one of them."""
    ours, _ = both
    for file in (DEMO_MODELS / "dense").iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = {"until": ["nowhere"], "max_gen_toks": 24}
    pairs = [(STORY, settings), ("Ada has a red ball. Ben has", settings), ("The", settings)]
    [full, *_] = ours.generate_until(instances(pairs, "generate_until"))
    stop = ours.tokenizer(full)["input_ids"][5]
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, stop]}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    hflm = HFLM(
        pretrained=theirs, tokenizer=load_tokenizer(tmp_path), batch_size=1, max_length=WINDOW
    )
    again = HarnessLM(ours.model, load_tokenizer(tmp_path), max_length=WINDOW)
    assert again.end_tokens == (0, stop)
    found = again.generate_until(instances(pairs, "generate_until"))
    assert found == hflm.generate_until(instances(pairs, "generate_until"), disable_tqdm=True)
    assert full.startswith(found[0])
    assert found[0] != full


def test_sampling_is_refused(both):
    ours, _ = both
    sampled = instances([("a", {"do_sample": True, "temperature": 0.7})], "generate_until")
    with pytest.raises(ConfigError, match="a_task asks for sampled text"):
        ours.generate_until(sampled)
    with pytest.raises(ConfigError, match="num_beams"):
        ours.generate_until(instances([("a", {"num_beams": 4})], "generate_until"))


def test_stop_strings_do_not_end_a_thought(both):
    ours, _ = both
    thinking = HarnessLM(
        ours.model, ours.tokenizer, chat=Chat(template=True, thinking=True, think_end=" has")
    )
    [answer] = thinking.generate_until(
        instances([("Ada has a red ball.", {"until": ["."], "max_gen_toks": 40})], "generate_until")
    )
    [plain] = ours.generate_until(
        instances([("Ada has a red ball.", {"until": ["."], "max_gen_toks": 40})], "generate_until")
    )
    assert " has" in plain  # so what follows it is the answer
    assert answer == plain.rpartition(" has")[2].lstrip()


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] "
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def test_chat_templates_are_applied_as_hflm_does(both):
    ours, hflm = both
    tokenizer = load_tokenizer(DEMO_MODELS / "dense")
    tokenizer.chat_template = TEMPLATE
    history = [{"role": "user", "content": "Who has the ball?"}]
    plain = HarnessLM(ours.model, tokenizer)
    hflm.tokenizer.chat_template = TEMPLATE
    try:
        assert plain.apply_chat_template(history) == hflm.apply_chat_template(history)
        assert plain.chat_template(True) == hflm.chat_template(True)
        assert plain.tokenizer_name == hflm.tokenizer_name
    finally:
        hflm.tokenizer.chat_template = None
    quiet = HarnessLM(ours.model, tokenizer, chat=Chat(template=True, thinking=False))
    assert (
        quiet.apply_chat_template(history) == plain.apply_chat_template(history) + "<think></think>"
    )
    scored = run_tasks(
        ours.model, tokenizer, ["stories_where"], limit=3, seed=0, chat=Chat(template=True)
    )
    unscored = run_tasks(ours.model, tokenizer, ["stories_where"], limit=3, seed=0)
    rows = zip(scored.samples["stories_where"], unscored.samples["stories_where"], strict=True)
    assert all(a["prompt_hash"] != b["prompt_hash"] for a, b in rows)


QWEN_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALWAYS_THINKS = QWEN_LIKE.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}", ""
).replace("<think>\n\n</think>\n\n{% endif %}", "<think>\n")


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **options):
        return self.tokenizer(*args, **options)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **options)


def say(monkeypatch, text):
    """Whatever is asked, the model says this text, as far as it may."""

    def generate(model, contexts, most, ended, budget):
        said = load_tokenizer(DEMO_MODELS / "dense")(text)["input_ids"]
        for row in range(len(contexts)):
            tokens = []
            for token in said[:most]:
                tokens.append(token)
                if ended(tokens):
                    break
            yield row, tokens

    monkeypatch.setattr("q3q.evaluate.harness.lm.generate", generate)


THOUGHT = "<think>\nHm.\n\nNot 7.\n\nSo it is\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "thinking", "said", "most", "answer", "finished"),
    [
        (QWEN_LIKE, True, THOUGHT + "42\n\nNext: 43", 200, "42", True),
        (
            QWEN_LIKE,
            None,
            THOUGHT + "42\n\nNext: 43",
            200,
            "42",
            True,
        ),  # a hybrid model thinks if it is left to it
        (
            QWEN_LIKE,
            None,
            "42\n\nNext: 43",
            200,
            "42",
            True,
        ),  # one that does not think answers at once
        (QWEN_LIKE, None, THOUGHT + "42", 12, "", False),
        (QWEN_LIKE, True, "Hm.\n\nNot 7.", 200, "", False),
        (QWEN_LIKE, False, "42\n\nNext: 43", 200, "42", True),
        (ALWAYS_THINKS, None, THOUGHT.removeprefix("<think>\n") + "42\n\nNext", 200, "42", True),
        (ALWAYS_THINKS, None, "Hm.\n\nNot 7.", 200, "", False),
    ],
)
def test_the_answer_is_what_comes_after_the_thought(
    both, monkeypatch, template, thinking, said, most, answer, finished
):
    ours, _ = both
    tokenizer = load_tokenizer(DEMO_MODELS / "dense")
    tokenizer.chat_template = template
    lm = HarnessLM(
        ours.model, tokenizer, chat=Chat(template=True, thinking=thinking), max_gen_toks=most
    )
    prompt = lm.apply_chat_template([{"role": "user", "content": "6 * 7?"}])
    assert prompt.endswith("</think>\n\n") == (thinking is False)
    say(monkeypatch, said)
    settings = {
        "until": ["\n\n"],
        "max_gen_toks": 3,
    }  # the task's own number, which a thought would not fit into
    assert lm.generate_until(instances([(prompt, settings)], "generate_until")) == [answer]
    assert lm.finished == {"a_task": [finished]}


def test_without_a_chat_template_no_text_is_a_thought(both, monkeypatch):
    ours, _ = both
    say(monkeypatch, "<think> a </think> b\nc")
    found = ours.generate_until(
        instances([("a", {"until": ["\n"], "max_gen_toks": 40})], "generate_until")
    )
    assert found == ["<think> a </think> b"]


def test_looking_for_the_end_does_not_decode_the_whole_text_each_time(both, monkeypatch):
    ours, _ = both
    tokenizer = Counting(load_tokenizer(DEMO_MODELS / "dense"))
    said = "word " * 400 + "é😀" + "\nSTOP here\n" + "word " * 400
    settings = {"until": ["\nSTOP", "Nowhere at all"], "max_gen_toks": 1500}
    say(monkeypatch, said)
    lm = HarnessLM(ours.model, tokenizer)
    [found] = lm.generate_until(instances([("a", settings)], "generate_until"))
    assert found == said.partition("\nSTOP")[0]
    length = len(tokenizer(found)["input_ids"])
    assert length > 400
    assert tokenizer.decoded < 30 * length  # with the whole text each time it is half its square


def test_unfinished_thoughts_are_counted(both, monkeypatch, tmp_path):
    ours, _ = both
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"q": f"What is {i}?", "a": "42"}) + "\n" for i in range(4)),
        encoding="utf-8",
    )
    task = {
        "task": "talk",
        "output_type": "generate_until",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "talk.yaml").write_text(json.dumps(task), encoding="utf-8")
    tokenizer = load_tokenizer(DEMO_MODELS / "dense")
    tokenizer.chat_template = QWEN_LIKE

    def run(text, **more):
        say(monkeypatch, text)
        given = {"limit": None, "seed": 0, "include_path": tmp_path, **more}
        return run_tasks(ours.model, tokenizer, ["talk"], **given)

    def scored(text, **more):
        return run(text, **more).metrics

    thinks = {
        "chat": Chat(template=True),
        "max_gen_toks": 100,
        "journal": tmp_path / "j",
        "identity": "demo",
    }
    found = scored(THOUGHT + "42", **thinks)
    assert (found["talk/exact_match"], found["unfinished/talk"]) == (1, 0)
    assert scored("nothing", **thinks) == found  # the journal remembers
    cut = scored(THOUGHT + "42", chat=Chat(template=True), max_gen_toks=9)
    assert (cut["talk/exact_match"], cut["unfinished/talk"]) == (0, 1)
    low, high = run(THOUGHT + "42", chat=Chat(template=True), max_gen_toks=9).intervals[
        "unfinished/talk"
    ]
    assert (low, high) == pytest.approx(
        (0.5101, 1), abs=1e-4
    )  # Wilson's, of 4 of 4: 1 / (1 + 1.96^2 / 4)
    assert "unfinished/talk" not in scored("42", chat=Chat(template=True, thinking=False))


def test_intervals_of_shares_whatever_their_name_stay_between_0_and_1():
    class Averaging:
        def aggregation(self):
            return {}

    names = ("exact_match", "loss", "acc")
    rows = [
        {
            "filter": "none",
            "metrics": names,
            "exact_match": hit,
            "loss": 2 * hit,
            "acc": (hit + 1) / 2,
        }
        for hit in (0.0, 1.0, 1.0, 1.0)
    ]
    results = {
        "t": {
            f"{name}{part},none": x for name in names for part, x in (("", 0.75), ("_stderr", 0.25))
        }
    }
    _, intervals = read_metrics(results, shares_of({"t": Averaging()}, {}, {"t": rows}, results))
    assert intervals["t/exact_match"] == intervals["t/acc"]
    assert intervals["t/acc"] == pytest.approx((0.26, 1), abs=1e-3)
    assert intervals["t/acc"][1] == 1
    assert intervals["t/loss"] == pytest.approx((0.26, 1.24), abs=1e-3)


def official_tasks(folder, study_data, count=6):
    """Write lm-eval's task files for `study_data`'s first rows; return the tasks' names."""
    labels = ("1", "2", "3", "4")

    def arc(row):
        """Return every other question with numbers for labels, as some of ARC's have."""
        if len(row["question"]) % 2:
            return row
        choices = row["choices"] | {"label": labels}
        return row | {"choices": choices, "answerKey": labels["ABCD".index(row["answerKey"])]}

    written = {
        "arc": ("arc/arc_easy.yaml", "arc_easy/test", {}),
        "arc_hard": ("arc/arc_challenge.yaml", "arc_challenge/test", {"num_fewshot": 2}),
        "piqa": ("piqa/piqa.yaml", "piqa/validation", {}),
        "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag/validation", {}),
        "winogrande": ("winogrande/default.yaml", "winogrande/validation", {}),
        "boolq": ("super_glue/boolq/default.yaml", "boolq/validation", {}),
        "wikitext": ("wikitext/wikitext.yaml", "wikitext/test", {}),
        "mmlu": ("mmlu/default/mmlu_anatomy.yaml", "", {"num_fewshot": 5}),
    }
    for name, (file, source, settings) in written.items():
        if source:
            lines = (study_data / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines[:count]]
        else:
            names = ["Ada", "Ben", "Cleo", "Dan"]
            found = [
                {"question": f" Who has {k} cups?\n", "choices": names, "answer": k % 4}
                for k in range(count)
            ]
        rows = folder / f"{name}.jsonl"
        made = [arc(row) if name.startswith("arc") else row for row in found]
        rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        splits = {split: str(rows) for split in ("train", "dev", "validation", "test")}
        task = {
            "include": str(OFFICIAL / file),
            "task": f"local_{name}",
            "tag": "local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits, "cache_dir": str(folder / "cache")},
            **settings,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return [f"local_{name}" for name in written]


def test_official_tasks_score_as_with_hflm(both, study_data, tmp_path):
    ours, hflm = both
    tasks = official_tasks(tmp_path, study_data)
    found = run_tasks(
        ours.model,
        ours.tokenizer,
        tasks,
        limit=5,
        seed=0,
        include_path=tmp_path,
        max_length=WINDOW,
        journal=tmp_path / "j",
        identity="demo",
    )
    theirs = simple_evaluate(
        model=hflm,
        tasks=tasks,
        limit=5,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        fewshot_random_seed=0,
    )
    for task in tasks:
        for key, value in theirs["results"][task].items():
            name, _, filtered = key.partition(",")
            if filtered and not name.endswith("_stderr"):
                # A text's log-likelihood may differ by 1e-4 and 1e-6 of itself (below): with at
                # least 5 words of some 8 nats each, its perplexity per word may differ by 3e-5.
                assert found.metrics[f"{task}/{name}"] == pytest.approx(
                    value, rel=0 if name.startswith("acc") else 3e-5
                )
        for row, sample in zip(found.samples[task], theirs["samples"][task], strict=True):
            assert row["doc_id"] == sample["doc_id"]
            assert row["prompt_hash"] == sample["prompt_hash"]
            if task == "local_wikitext":
                assert row["log_likelihood"] == pytest.approx(
                    sample["filtered_resps"], abs=1e-4, rel=1e-6
                )
            else:
                agree(
                    zip(row["log_likelihood"], row["greedy"], strict=True), sample["filtered_resps"]
                )
                assert row["scores"]["acc"] == sample["acc"]
    assert found.effort.computed == found.effort.unique < 0.5 * found.effort.asked
    low, high = found.intervals["local_mmlu/acc"]
    assert low <= found.metrics["local_mmlu/acc"] <= high
    # Once more: all scores are in the journal, and say the same.
    again = run_tasks(
        ours.model,
        ours.tokenizer,
        tasks,
        limit=5,
        seed=0,
        include_path=tmp_path,
        max_length=WINDOW,
        journal=tmp_path / "j",
        identity="demo",
    )
    assert again.effort.computed == 0
    assert again.metrics == found.metrics
    assert again.samples == found.samples
    others = run_tasks(
        ours.model,
        ours.tokenizer,
        ["stories_who"],
        limit=1,
        seed=0,
        journal=tmp_path / "j",
        identity="other",
    )
    assert others.effort.computed == others.effort.unique > 0  # another model's are put aside
    assert (tmp_path / "j" / "scores.jsonl.damaged").is_file()


def test_a_perplexity_too_large_for_a_number_is_infinite_and_no_error(
    both, study_data, tmp_path, monkeypatch
):
    ours, _ = both
    official_tasks(tmp_path, study_data, count=2)

    def scored(nats):
        """Every text has this many nats a word of its original."""
        monkeypatch.setattr(
            HarnessLM,
            "loglikelihood_rolling",
            lambda self, requests, **_: [
                -nats * len(re.split(r"\s+", one.doc["page"])) for one in requests
            ],
        )
        found = run_tasks(
            ours.model,
            ours.tokenizer,
            ["local_wikitext"],
            limit=None,
            seed=0,
            include_path=tmp_path,
        )
        return {name.partition("/")[2]: value for name, value in found.metrics.items()}

    assert scored(3.0)["word_perplexity"] == pytest.approx(math.exp(3))
    wrecked = scored(20_000.0)
    assert wrecked["word_perplexity"] == wrecked["byte_perplexity"] == math.inf
    assert 1000 < wrecked["bits_per_byte"] < math.inf


def test_tasks_without_documents_and_documents_without_samples_fail(both, study_data, tmp_path):
    ours, _ = both
    official_tasks(tmp_path, study_data)
    task = json.loads((tmp_path / "piqa.yaml").read_text())
    task["process_docs"] = "!function nothing.left"
    (tmp_path / "nothing.py").write_text("def left(dataset):\n    return dataset.select([])\n")
    (tmp_path / "piqa.yaml").write_text(
        "".join(
            f"{key}: {value if key == 'process_docs' else json.dumps(value)}\n"
            for key, value in task.items()
        )
    )
    with pytest.raises(IntegrityError, match="local_piqa has no documents to evaluate"):
        run_tasks(
            ours.model, ours.tokenizer, ["local_piqa"], limit=2, seed=0, include_path=tmp_path
        )
    rows = [{"doc_id": i, "filter": "none"} for i in range(3)]
    check_samples({"t": rows}, {"t": range(3)})
    check_samples({"t": rows}, {"t": first_questions(3, "t", 9)})
    with pytest.raises(
        IntegrityError, match=r"t \(filter none\): 3 samples of 3 documents, there should be 4"
    ):
        check_samples({"t": rows}, {"t": range(4)})
    with pytest.raises(IntegrityError, match="there should be 3"):
        check_samples({"t": [*rows, rows[0]]}, {"t": range(3)})
    with pytest.raises(IntegrityError, match=r"t \(filter none\): 0 samples"):
        check_samples({}, {"t": range(3)})
    second = [{"doc_id": i, "filter": "strict"} for i in range(2)]
    with pytest.raises(
        IntegrityError, match=r"t \(filter strict\): 2 samples of 2 documents, there should be 3"
    ):
        check_samples(
            {"t": [*rows, *second]}, {"t": range(3)}
        )  # all documents have a sample, not of each filter


def test_a_flipped_bit_in_a_journal_is_no_other_score(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, "demo")
    journal.add([("a", [-1.5, True]), ("b", [-2.0, False])])
    journal.close()
    path.write_bytes(path.read_bytes().replace(b"-2.0", b"-3.0"))
    journal = Journal(path, "demo")
    assert journal.get("a") == [-1.5, True]
    assert journal.get("b") is None
    journal.close()


def test_a_torn_journal_keeps_what_is_whole_and_anothers_is_put_aside(tmp_path, capfd):
    path = tmp_path / "scores.jsonl"
    journal = Journal(path, "demo")
    journal.add([("a", [-1.5, True]), ("b", [-2.0, False])])
    journal.close()
    torn = path.read_bytes()[:-5]
    path.write_bytes(torn)
    journal = Journal(path, "demo")
    assert journal.get("a") == [-1.5, True]
    assert journal.get("b") is None
    journal.add([("c", [-3.0, True])])
    journal.close()
    journal = Journal(path, "demo")
    assert journal.get("c") == [-3.0, True]
    assert journal.get("a") == [-1.5, True]
    journal.close()
    journal = Journal(path, "other")
    assert journal.get("a") is None
    journal.close()
    assert f"{path} holds scores of another model" in capfd.readouterr().err
    assert b"demo" in path.with_name("scores.jsonl.damaged").read_bytes()


def test_line_by_line_ids_are_the_tokenizers_own(both):
    ours, _ = both
    random = np.random.default_rng(0)
    parts = [
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "a",
        "Ab",
        "1",
        "?",
        "?\n",
        ".",
        "é",
        "\u0301",
        "😀",
        "'s",
        "\r\n",
        "\x1c",
        "\u00a0",
        "<|endoftext|>",
    ]
    texts = ["".join(random.choice(parts, random.integers(1, 30))) for _ in range(400)]
    for text in [*texts, *(context + continuation for context, continuation in adversarial()[:8])]:
        assert ours.encode(text) == ours.tokenizer(text)["input_ids"]
    assert ours.encode._lines  # lines were used at all
