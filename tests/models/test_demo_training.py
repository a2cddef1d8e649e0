"""Training of the demo models: a training that is killed loses nothing but time."""

from itertools import islice

import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from q3q.models.demo import train
from q3q.models.demo.train import Stage, StageCheckpoint, run_stage

STAGE = Stage(steps=7, seed=0, story_share=1.0, answer_weight=1.0, rate=1.0)


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch):
    monkeypatch.setattr(train, "KEPT_EVERY", 3)
    monkeypatch.setattr(torch, "compile", lambda model: model)


def tiny_model():
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
            tie_word_embeddings=True,
        )
    )


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        ids_BT = torch.randint(16, (2, 12), generator=generator)
        yield ids_BT, ids_BT > 7


def killed_after(steps):
    yield from islice(batches(), steps)
    raise KilledError


def test_a_killed_training_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    undisturbed = tiny_model()
    whole = run_stage(undisturbed, batches(), STAGE)

    kept = StageCheckpoint(tmp_path / "unfinished.pt", "tiny")
    for steps in (2, 5):  # before the first checkpoint, and after it
        with pytest.raises(KilledError):
            run_stage(tiny_model(), killed_after(steps), STAGE, kept)
    assert kept.path.exists()
    torch.manual_seed(9)
    model = tiny_model()
    resumed = run_stage(model, batches(), STAGE, kept)

    assert (resumed.step, resumed.recent) == (whole.step, whole.recent)
    start, end = tiny_model().state_dict(), model.state_dict()
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(end[name], value)
    assert any(not torch.equal(start[name], value) for name, value in end.items())


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    kept = StageCheckpoint(tmp_path / "unfinished.pt", "dense")
    run_stage(tiny_model(), batches(), STAGE, kept)
    with pytest.raises(SystemExit, match="of another training"):
        run_stage(tiny_model(), batches(), STAGE, StageCheckpoint(kept.path, "hybrid"))
