"""The bit budget: the program's optimum, what units take, and what quantizing one alone loses."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

from q3q.bit_budget import BitBudget
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.streaming import StreamedDecoder
from q3q.quantize.budget.measure import Measurement, measured
from q3q.quantize.budget.program import allot, rounded
from q3q.quantize.budget.sensitivities import Sensitivities, file_of, identity_of
from q3q.quantize.budget.units import sizes_of, units_of, with_widths
from q3q.quantize.methods.build import build_method
from q3q.quantize.search import mean_divergence
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme, TrialSpec
from q3q.storage.files import sealed
from tests.nowhere import Nowhere
from tests.quantize.conftest import random_decoder
from tests.specs import evaluation_of, make_spec, method_of

SCHEME = Scheme(bits=3, group_size=16, symmetric=False)


def budget_of(**changes):
    facts = {
        **{"unit": "site", "widths": (2, 3, 4, 8), "measure": "kl", "source": "demo"},
        **{"digest": "0", "samples": 2, "length": 16, "draw": "random"},
    }
    limit = {} if changes.keys() & {"bytes", "uniform"} else {"bits": 4.0}
    return BitBudget(**{**facts, **limit, **changes})


def spec_of(method="rtn", scheme=SCHEME, **changes):
    budget = budget_of(**changes)
    return make_spec(method_of(method, scheme), scheme=scheme, budget=budget)


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_trying_everything_finds_and_breaks_ties_by_its_rule(seed):
    """Costs are small whole numbers, so that many allotments cost the same."""
    chance = random.Random(seed)
    units, widths = chance.randint(2, 6), chance.randint(2, 4)
    sizes = [[16 * w * chance.randint(1, 3) for w in range(1, widths + 1)] for _ in range(units)]
    costs = [[float(chance.randint(0, 4)) for _ in range(widths)] for _ in range(units)]
    least, most = (sum(map(end, sizes)) for end in (min, max))
    limit = chance.randint(least, most)

    def rule(chosen):
        cost = sum(row[w] for row, w in zip(costs, chosen, strict=True))
        size = sum(row[w] for row, w in zip(sizes, chosen, strict=True))
        ranks = [sorted(set(row)).index(row[w]) for row, w in zip(sizes, chosen, strict=True)]
        return (size > limit, cost, size, ranks)

    best = rule(min(itertools.product(range(widths), repeat=units), key=rule))
    assert rule(allot(costs, sizes, limit)) == best
    assert not best[0]


def test_no_allotment_below_the_smallest_and_sensitivities_keep_four_digits():
    with pytest.raises(ValueError, match="takes 3 bits, and the limit is 2"):
        allot([[1.0], [1.0]], [[1], [2]], 2)
    assert rounded(0.0123456) == 0.01235
    assert rounded(-1e-17) == 0.0
    # What differs after the fourth digit on another machine changes nothing.
    sizes = [[2, 4], [2, 4], [2, 4]]
    costs = [[0.30001, 0.1], [0.30002, 0.1], [0.3, 0.1]]
    noisy = [[0.3, 0.10000003], [0.3, 0.1], [0.30004, 0.1]]
    assert allot(costs, sizes, 9) == allot(noisy, sizes, 9) == [0, 0, 1]


@pytest.mark.parametrize("unit", ["linear", "site", "block"])
@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("rtn", SCHEME),
        ("rtn", replace(SCHEME, group_size=-1, symmetric=True)),
        ("gptq", SCHEME),  # act-order: groups lie apart
        ("gptq", replace(SCHEME, group_size=-1)),
    ],
)
def test_units_take_the_bits_that_their_codes_take(kind, method, scheme, unit):
    decoder = random_decoder(kind)
    spec = spec_of(method, scheme, unit=unit)
    units = units_of(spec, decoder.facts)
    assert len({name for one in units for name in one.linears}) == sum(
        len(site.weights) for block in decoder.blocks for site in block.sites
    )
    chosen = [spec.budget.widths[u % 4] for u in range(len(units))]
    sizes = sizes_of(spec, decoder.facts, units, spec.budget.widths)
    schemes = with_widths(spec, units, chosen)[0].schemes
    assert schemes is not None
    windows = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(1))
    blocks = quantize_model(
        decoder,
        build_method(spec),
        schemes,
        windows if method != "rtn" else None,
        Nowhere(),
    )
    for unit_, row, bits in zip(units, sizes, chosen, strict=True):
        codes = [blocks[unit_.block].quantized[name] for name in unit_.weights]
        assert sum(code.storage_bits() for code in codes) == row[spec.budget.widths.index(bits)]
        assert {code.code_bits for code in codes} == {bits}


def job_of(model, spec, windows, text):
    return Measurement(
        model=model,
        method=build_method(spec),
        schemes=spec.schemes,
        units=units_of(spec, model.facts),
        widths=spec.budget.widths,
        measure=spec.budget.measure,
        calibration_NT=None if spec.method.name == "rtn" else windows,
        text_NT=text,
    )


def all_measured(job, known=None):
    return dict(measured(job, known or {}, lambda unit: None))


@pytest.mark.parametrize(
    ("method", "unit"), [("rtn", "linear"), ("gptq", "site"), ("gptq", "linear"), ("awq", "site")]
)
@torch.inference_mode()
def test_a_sensitivity_is_the_divergence_of_a_model_in_which_the_unit_alone_is_quantized(
    kind, windows, method, unit
):
    decoder, spec = random_decoder(kind), spec_of(method, unit=unit, widths=(2, 4))
    text = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(2))
    before = [{name: w.clone() for name, w in one.weights.items()} for one in decoder.blocks]
    job = job_of(decoder, spec, windows, text)
    rows = all_measured(job)
    assert list(rows) == [one.name for one in job.units]
    for block, weights in zip(decoder.blocks, before, strict=True):
        assert all(torch.equal(block.weights[name], weights[name]) for name in weights)
    everything = {name for one in job.units for name in one.linears}
    for one in (job.units[0], job.units[-1]):  # in the first block and the last
        alone = replace(spec, skip=tuple(sorted(everything - set(one.linears))))
        for bits, found in zip(spec.budget.widths, rows[one.name], strict=True):
            copy = random_decoder(kind)
            schemes = replace(alone, scheme=replace(SCHEME, bits=bits)).schemes
            quantize_model(copy, build_method(spec), schemes, job.calibration_NT, Nowhere())
            states = [
                torch.cat([x_BTH.flatten(0, 1) for x_BTH in model.states([text])])
                for model in (decoder, copy)
            ]
            assert found == pytest.approx(mean_divergence(decoder, *states), rel=2e-3)
            assert found > 0
    by_block = all_measured(replace(job, measure="block_error"))
    assert all(row[0] > row[1] > 0 for row in by_block.values())


@torch.inference_mode()
def test_a_streamed_model_has_the_resident_ones_sensitivities_and_known_units_are_not_measured(
    random_checkpoint,
):
    checkpoint = Checkpoint(random_checkpoint())
    text = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(2))
    spec, begun = spec_of("gptq", widths=(2, 4)), []
    jobs = [
        job_of(model, spec, text, text)
        for model in (
            load_decoder(checkpoint, torch.float32),
            StreamedDecoder(checkpoint, torch.float32, ahead=False),
        )
    ]
    resident, streamed = map(all_measured, jobs)
    assert resident == streamed
    first = dict(list(resident.items())[:5])
    rest = dict(measured(jobs[0], first, lambda unit: begun.append(unit.name)))
    assert {**first, **rest} == resident
    assert not set(begun) & first.keys()


def test_a_file_of_sensitivities_is_resumed_and_what_is_damaged_or_anothers_is_put_aside(
    tmp_path, capsys
):
    spec: TrialSpec = spec_of(widths=(2, 4))
    units = units_of(spec, random_decoder("dense").facts)
    identity = identity_of(spec, units)
    path = file_of(tmp_path, identity)
    written = Sensitivities(path, identity)
    written.add(units[0].name, [0.5, 0.25])
    again = Sensitivities(path, identity)
    again.read()
    assert again.rows == {units[0].name: [0.5, 0.25]}
    assert not again.complete
    content = path.read_bytes()
    foreign = sealed({"identity": {**identity, "seed": 1}, "rows": written.rows})
    short = sealed({"identity": identity, "rows": {units[0].name: [0.5]}})
    for number, bad in enumerate((content.replace(b"0.25", b"0.35"), foreign, short, b"{"), 1):
        path.write_bytes(bad)
        other = Sensitivities(path, identity)
        other.read()
        assert other.rows == {}
        assert "measured again" in capsys.readouterr().err
        assert len(list(path.parent.glob("*.damaged*"))) == number
    # Budgets, activations and evaluations share a file; widths and units do not.
    assert spec.scheme is not None
    sharing = (
        spec_of(widths=(2, 4), bits=5.0),
        replace(spec, scheme=replace(spec.scheme, act_bits=8)),
        replace(spec, evaluation=evaluation_of("library", tasks=("piqa",))),
    )
    for same in sharing:
        assert same.id != spec.id
        assert file_of(tmp_path, identity_of(same, units)) == path
    wider = spec_of(widths=(2, 3))
    assert file_of(tmp_path, identity_of(wider, units)) != path
    json.dumps(identity)
