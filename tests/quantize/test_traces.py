"""What a model writes itself: the tokens that a plain loop chooses, made once, and mended."""

import itertools

import pytest
import torch

from q3q.data import traces as recipes
from q3q.errors import CalibrationError
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.quantize import traces as writing
from q3q.quantize.traces import prompt_tokens, traces, uniforms, write
from tests.composed import composed_trial
from tests.models.families import build

LENGTH = 12


@pytest.fixture(scope="module")
def demo():
    trial = composed_trial("method=gptq", "calibration=traces", "evaluation=none")
    folder = trial.placement.model
    assert folder is not None
    return load_decoder(Checkpoint(folder), torch.float64), load_tokenizer(folder)


def trial_of(storage, *words):
    given = ["method=gptq", "calibration=traces", f"calibration.length={LENGTH}"]
    given += ["calibration.samples=6", "evaluation=none", f"storage={storage}", *words]
    return composed_trial(*given)


def plainly(model, prompt, length, temperature, uniform):
    """Return the tokens that follow from a full forward pass for each of them."""
    ids = list(prompt)
    while len(ids) < length:
        hidden = model.hidden(torch.tensor([ids]))[0, -1:]
        [logits] = [chunk for _, chunk in model.logits(hidden)]
        if temperature:
            chances = torch.softmax(logits[0].double() / temperature, 0).tolist()
            bounds = list(itertools.accumulate(chances))
            wanted = uniform[len(ids)] * bounds[-1]
            ids.append(next(k for k, bound in enumerate(bounds) if bound > wanted))
        else:
            ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize("kind", ["dense", "qwen3.5 moe"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_written_tokens_are_those_of_a_full_pass_for_each(kind, temperature, tmp_path):
    build(kind).save_pretrained(tmp_path)
    model = load_decoder(Checkpoint(tmp_path), torch.float64)
    prompts = [[5], [7, 1, 9, 3]]
    drawn = [uniforms(3, row, LENGTH) for row in range(2)]
    windows = write(model, prompts, LENGTH, temperature, drawn)
    assert windows.tolist() == [
        plainly(model, prompt, LENGTH, temperature, uniform)
        for prompt, uniform in zip(prompts, drawn, strict=True)
    ]


def test_traces_are_written_once_and_whoever_wants_more_goes_on(demo, tmp_path, monkeypatch):
    model, tokenizer = demo
    monkeypatch.setattr(recipes, "MOST_ROWS", 4)
    trial = trial_of(tmp_path)
    calibration = trial.spec.calibration
    windows = traces(trial, model, tokenizer, calibration)
    assert windows.shape == (6, LENGTH)
    assert len({tuple(row) for row in windows.tolist()}) == 6
    files = sorted((tmp_path / "traces").glob("*.safetensors"))
    assert len(files) == 2
    monkeypatch.setattr(writing, "write", None)  # nothing is written a second time
    assert torch.equal(traces(trial, model, tokenizer, calibration), windows)
    other = trial_of(tmp_path, "bits=2", "method.mse=true")
    assert torch.equal(traces(other, model, tokenizer, other.spec.calibration), windows)
    fewer = trial_of(tmp_path, "calibration.samples=4").spec.calibration
    assert torch.equal(traces(trial, model, tokenizer, fewer), windows[:4])


def test_a_damaged_part_is_written_again_and_the_others_stay(demo, tmp_path, monkeypatch):
    model, tokenizer = demo
    monkeypatch.setattr(recipes, "MOST_ROWS", 4)
    trial = trial_of(tmp_path)
    windows = traces(trial, model, tokenizer, trial.spec.calibration)
    first, second = sorted((tmp_path / "traces").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1] + b"\xff")
    rows = []

    def counted(*given):
        rows.append(len(given[1]))
        return write(*given)

    monkeypatch.setattr(writing, "write", counted)
    before = second.stat().st_mtime_ns
    assert torch.equal(traces(trial, model, tokenizer, trial.spec.calibration), windows)
    assert len(rows) == 1
    assert second.stat().st_mtime_ns == before
    assert list((tmp_path / "traces").glob("*.damaged*"))


def test_seeds_write_other_traces_and_greedy_ones_have_none(demo, tmp_path):
    model, tokenizer = demo
    one, other = (trial_of(tmp_path, f"seed={seed}") for seed in (0, 1))
    written = [traces(trial, model, tokenizer, trial.spec.calibration) for trial in (one, other)]
    assert not torch.equal(*written)
    assert one.spec.calibration == other.spec.calibration
    assert one.id != other.id


def test_a_prompt_without_room_and_a_tokenizer_without_a_beginning_are_refused(demo, tmp_path):
    _, tokenizer = demo
    path = tmp_path / "prompts.jsonl"
    path.write_text('"short"\n"' + "word " * 99 + '"\n', encoding="utf-8")
    trial = trial_of(tmp_path, f"calibration.prompts={path}")
    with pytest.raises(CalibrationError, match=r"prompt 2 has \d+ tokens"):
        prompt_tokens(trial, tokenizer, trial.spec.calibration)

    class Bare:
        bos_token_id = eos_token_id = None

    alone = trial_of(tmp_path)
    with pytest.raises(CalibrationError, match="neither a beginning-of-text"):
        prompt_tokens(alone, Bare(), alone.spec.calibration)


def test_prompts_take_turns(demo, tmp_path):
    model, tokenizer = demo
    path = tmp_path / "prompts.jsonl"
    path.write_text('"The cat"\n"A dog"\n', encoding="utf-8")
    trial = trial_of(tmp_path, f"calibration.prompts={path}")
    windows = traces(trial, model, tokenizer, trial.spec.calibration)
    for number, row in enumerate(windows.tolist()):
        assert tokenizer.decode(row).startswith(("The cat", "A dog")[number % 2])
