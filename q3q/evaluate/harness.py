"""lm-eval's tasks on our forward: the only file that imports lm_eval."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from q3q.errors import ConfigError, IntegrityError
from q3q.evaluate.perplexity import BATCH_TOKENS, NORMAL_95
from q3q.models.decoder import Decoder

OWN_TASKS = Path(__file__).parent / "tasks"

Encoded = tuple[tuple[str, str], list[int], list[int]]


@dataclass
class Run:
    """One run of token ids through the model, and the requests that read their scores from it."""

    ids: list[int]
    riders: list[tuple[int, int, list[int]]]  # request number, first position read, continuation


class HarnessLM(TemplateLM):
    """Our decoder behind lm-eval's interface.

    A request whose tokens begin another's rides along with it: four answers that differ in their last token cost one
    forward pass. Only positions whose score somebody reads go through the head.
    """

    def __init__(self, model: Decoder, tokenizer: Any, progress: Callable[[int, int], None]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.progress = progress
        self.batch_size = 1  # lm-eval prints it; batches here are packed by tokens

    @cached_property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        return self.model.facts.max_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # q3q shows its own progress

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        sequences = share_prefixes(requests, self.max_length)
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        for batch in pack(sequences, BATCH_TOKENS):
            width = len(batch[0].ids)
            ids_BT = torch.zeros(
                len(batch), width, dtype=torch.int64
            )  # pads are to the right: nobody looks back at them
            for row, sequence in enumerate(batch):
                ids_BT[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            hidden_BTH = self.model.hidden(ids_BT)
            read = [
                (row, first + i, token, number)
                for row, sequence in enumerate(batch)
                for number, first, continuation in sequence.riders
                for i, token in enumerate(continuation)
            ]
            rows, positions, targets, owners = (torch.tensor(column) for column in zip(*read, strict=True))
            scores_P, greedy_P = self.model.log_likelihoods(hidden_BTH[rows, positions], targets)
            if not torch.isfinite(scores_P).all():
                raise IntegrityError("a log-likelihood of the evaluation is not finite")
            for number in owners.unique().tolist():
                mine = owners == number
                results[number] = (float(scores_P[mine].double().sum()), bool(greedy_P[mine].all()))
            self.progress(sum(result is not None for result in results), len(requests))
        assert all(result is not None for result in results)
        return results  # type: ignore[return-value]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise ConfigError("rolling log-likelihood tasks are not supported; use evaluation=file for a text's perplexity")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise ConfigError("generation tasks are not supported; give multiple-choice or log-likelihood tasks")


def share_prefixes(requests: Sequence[Encoded], max_length: int) -> list[Run]:
    """The fewest sequences such that each request's tokens begin one of them; too long ones lose their left end."""
    inputs = []
    for number, (_, context, continuation) in enumerate(requests):
        whole = (context + continuation)[-(max_length + 1) :]
        inputs.append((whole[:-1], number, continuation[-(len(whole) - 1) :]))
    # In lexicographic order a sequence stands right before those that it begins.
    inputs.sort(key=lambda entry: entry[0], reverse=True)
    sequences: list[Run] = []
    for ids, number, continuation in inputs:
        if not sequences or sequences[-1].ids[: len(ids)] != ids:
            sequences.append(Run(ids, []))
        sequences[-1].riders.append((number, len(ids) - len(continuation), continuation))
    return sequences


def pack(sequences: Sequence[Run], budget: int) -> list[list[Run]]:
    """Batches of sequences of like length, longest first, at most `budget` tokens each with their padding."""
    batches: list[list[Run]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.ids), reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= budget:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def known_tasks() -> list[str]:
    """Names of all tasks and groups that lm-eval ships."""
    return list(TaskManager().all_tasks)


@dataclass(frozen=True)
class TaskScores:
    """metrics by `<task>/<metric>`, their 95 % intervals where lm-eval gives a standard error, and its own results."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    results: dict[str, Any]


def run_tasks(
    model: Decoder,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskScores:
    """Score lm-eval tasks through `lm_eval.simple_evaluate`. progress is told (requests done, in all)."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = {path.stem for path in OWN_TASKS.glob("*.yaml")}
    manager = TaskManager(include_path=str(OWN_TASKS), include_defaults=not set(tasks) <= own)
    answer = simple_evaluate(
        model=HarnessLM(model, tokenizer, progress),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=1000,  # means have closed-form standard errors; 0 would switch those off too
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for task, scores in answer["results"].items():
        for key, value in scores.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or not filtered or name.endswith("_stderr"):
                continue
            metric = f"{task}/{name}" + ("" if filtered == "none" else f"/{filtered}")
            metrics[metric] = float(value)
            error = scores.get(f"{name}_stderr,{filtered}")
            if isinstance(error, (int, float)):
                low, high = value - NORMAL_95 * error, value + NORMAL_95 * error
                intervals[metric] = (max(0.0, low), min(1.0, high)) if name.startswith("acc") else (low, high)
    kept = {key: answer[key] for key in ("results", "n-samples", "versions", "configs") if key in answer}
    return TaskScores(metrics, intervals, kept)
