"""Traces: windows that the unquantized model writes itself, to be calibrated on without any text.

Liu et al. 2023 (LLM-QAT, arXiv 2305.17888, section 3.1) let a model write what it is then trained
on: text of its own distribution, for which no data set is needed. Each window begins with the token
before a text, or with a prompt, and the model goes on until the window is full; an end-of-text
token is a token like any other, as between two documents in training.

Rows are written a few at a time, and each such part is a file of `<storage>/traces`, which is named
by what decides on it (see `data/prepared`). So traces are written once for all trials of a model, a
killed trial goes on at the part where it was, and a damaged part is written again.

Shapes: B rows, T tokens of a window, N query heads, K key-value heads, D head_dim, H hidden, V
vocabulary, C rows of one step whose logits exist at a time.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from q3q.data.calibration import as_read
from q3q.data.prepared import Arrays, Shelf, prepared, tokenizer_digest
from q3q.data.texts import load_text
from q3q.data.traces import FOLDER, part_identity, recipe, written_parts
from q3q.data.windows import refuse_changed_text
from q3q.errors import CalibrationError, ConfigError, IntegrityError
from q3q.models.attention import KeysValues
from q3q.models.decoder import Decoder
from q3q.models.footprint import cache_shape
from q3q.models.kv_cache import KvRounding
from q3q.models.recurrence import Recurrence, State
from q3q.placement import Trial
from q3q.reporter import Steps, no_steps
from q3q.spec import OWN_TEXT, Calibration
from q3q.storage.mirror import mirror_for


def traces(
    trial: Trial,
    model: Decoder,
    tokenizer: Any,
    calibration: Calibration,
    steps: Steps = no_steps,
) -> Tensor:
    """Return the windows [samples, length] that the model writes, int64 in main memory.

    Call it while the model is as it was loaded.

    Args:
        calibration: of traces, all of a trial's or its part of a mix.
        steps: receives tokens written and in all.

    Raises:
        CalibrationError: a prompt has no room in a window, or there is no token to begin with.
        IntegrityError: a logit is not finite.
    """
    samples, length = calibration.samples, calibration.length
    temperature = float(calibration.temperature or 0.0)
    prompts = prompt_tokens(trial, tokenizer, calibration)
    identity = tokenizer_digest(tokenizer)
    folder = trial.placement.storage / FOLDER
    shelf = None if identity is None else Shelf(folder, identity)
    mirror = mirror_for(trial.placement.store)
    written, token_bytes = [], cache_shape(model.facts).numbers * model.norm_H.element_size()
    for numbers in written_parts(samples, length, token_bytes):
        facts = part_identity(trial.spec, calibration, numbers)

        def make(numbers: range = numbers) -> Arrays:
            ids_BT = write(
                model,
                [prompts[number % len(prompts)] for number in numbers],
                length,
                temperature,
                [uniforms(trial.spec.seed, number, length) for number in numbers],
                lambda done, total: steps(
                    numbers.start * length + done * len(numbers), samples * length
                ),
            )
            return {"windows": ids_BT.numpy().astype("int32")}

        name = None if shelf is None else f"{FOLDER}/{shelf.path(facts).name}"
        if mirror is not None and name is not None:
            mirror.pull(name)
        windows_BT = prepared(shelf, facts, make, lambda: steps(0, samples * length))["windows"]
        if mirror is not None and name is not None:
            mirror.push_if_absent(name)
        written.append(torch.from_numpy(windows_BT.astype("int64")))
    return torch.cat(written)


def prompt_tokens(trial: Trial, tokenizer: Any, calibration: Calibration) -> list[list[int]]:
    """Return what windows begin with: each prompt's tokens, or the token before a text.

    Raises:
        CalibrationError: a prompt leaves no room in a window, or the tokenizer has no token that
            stands before a text.
    """
    if calibration.prompts is None:
        begin = tokenizer.bos_token_id
        begin = tokenizer.eos_token_id if begin is None else begin
        if begin is None:
            raise CalibrationError(
                "calibration=traces: the tokenizer has neither a beginning-of-text nor an "
                "end-of-text token for a trace to begin with: give calibration.prompts=FILE"
            )
        return [[begin]]
    path = trial.placement.calibration_file(calibration.digest)
    text = load_text(calibration.prompts, split="calibration", path=path)
    prompts = recipe(text, float(calibration.temperature or 0.0))
    refuse_changed_text(prompts, calibration.digest, f"prompts {text.name}")
    text, encode = as_read(text, tokenizer, answers=True)
    tokens = [encode(document) for document in text.documents]
    for number, ids in enumerate(tokens, 1):
        if not 0 < len(ids) < calibration.length:
            raise CalibrationError(
                f"calibration.prompts={path}: prompt {number} has {len(ids)} tokens; it must have "
                f"1 to {calibration.length - 1}, so that the model has room to go on in a window "
                f"of {calibration.length}"
            )
    return tokens


def uniforms(seed: int, number: int, count: int) -> list[float]:
    """Return random numbers from 0 to 1 for the tokens of one window, the same everywhere."""
    generator = random.Random(f"traces {seed} {number}")
    return [generator.random() for _ in range(count)]


def write(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    length: int,
    temperature: float,
    uniforms: Sequence[Sequence[float]],
    steps: Steps = no_steps,
) -> Tensor:
    """Return windows [B, T] that begin with these prompts and that the model continues.

    All rows take one token a step, those that are still in their prompts too, so all are equally
    long. The next token is the first whose cumulative probability exceeds a uniform number, as
    `random.choices` draws; at temperature 0 it is the likeliest. Nothing waits for a GPU before the
    last token.

    Args:
        prompts: of each row, 1 to length - 1 tokens.
        uniforms: of each row, a number for each token of its window.
        steps: receives tokens of a row that are written, and in all.

    Raises:
        IntegrityError: a logit is not finite.
    """
    device = model.device
    ids_BT = torch.zeros(len(prompts), length, dtype=torch.int64)
    given_BT = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
        given_BT[row, : len(prompt)] = True
    ids_BT, given_BT = ids_BT.to(device), given_BT.to(device)
    uniform_BT = torch.tensor(uniforms, dtype=torch.float64).to(device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    place = _Place(device)
    pasts = [_OwnPast(place, length) for _ in range(len(model.blocks))]
    for step in range(length - 1):
        hidden_BH = model.hidden(ids_BT[:, step : step + 1], pasts)[:, 0]
        next_B = []
        for chunk, logits_CV in model.logits(hidden_BH):
            finite &= torch.isfinite(logits_CV).all()
            next_B.append(_next(logits_CV, temperature, uniform_BT[chunk, step + 1]))
        ids_BT[:, step + 1] = torch.where(
            given_BT[:, step + 1], ids_BT[:, step + 1], torch.cat(next_B)
        )
        place.move()
        steps(step + 2, length)
    if not finite:
        raise IntegrityError("a logit of the model's own text is not finite")
    return ids_BT.cpu()


def _next(logits_CV: Tensor, temperature: float, uniform_C: Tensor) -> Tensor:
    """Return each row's next token."""
    if not temperature:
        return logits_CV.argmax(1)
    cumulative_CV = torch.softmax(logits_CV.double() / temperature, 1).cumsum(1)
    # Of a sum that rounding leaves below 1, the share counts: no token lies beyond the last.
    wanted_C1 = uniform_C[:, None] * cumulative_CV[:, -1:]
    chosen_C = torch.searchsorted(cumulative_CV, wanted_C1, right=True)[:, 0]
    return chosen_C.clamp(max=logits_CV.shape[1] - 1)


class _Place:
    """How far all rows are, which all blocks share."""

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        self.positions = torch.zeros(1, dtype=torch.int64, device=device)

    def move(self) -> None:
        self.step += 1
        self.positions = self.positions + 1  # another tensor: `Rope` knows the last one


@dataclass
class _OwnPast:
    """Attention of one new token a row to the row's own past, of rows that are equally long.

    keys_values: [B, K, T, D] each, with room for whole windows. state: of a recurrence.
    """

    place: _Place
    length: int
    keys_values: KeysValues | None = None
    state: State | None = None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.place.positions

    def __call__(
        self,
        query_BNTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        kv: KvRounding | None = None,
    ) -> Tensor:
        if kv is not None:
            raise ConfigError(
                f"{OWN_TEXT}: a model that rounds its cache after some tokens cannot write its own "
                "text yet: calibrate on another text"
            )
        if self.keys_values is None:
            shapes = ((*x.shape[:2], self.length, x.shape[-1]) for x in (key_BKTD, value_BKTD))
            keys, values = (key_BKTD.new_zeros(shape) for shape in shapes)
            self.keys_values = keys, values
        past_key_BKTD, past_value_BKTD = self.keys_values
        step = self.place.step
        past_key_BKTD[:, :, step] = key_BKTD[:, :, 0]
        past_value_BKTD[:, :, step] = value_BKTD[:, :, 0]
        return scaled_dot_product_attention(
            query_BNTD,
            past_key_BKTD[:, :, : step + 1],
            past_value_BKTD[:, :, : step + 1],
            enable_gqa=True,
        )

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX

    def recur(self, recurrence: Recurrence, inputs_BTX: Tensor) -> Tensor:
        outputs_BTY, self.state = recurrence(inputs_BTX, self.state)
        return outputs_BTY
