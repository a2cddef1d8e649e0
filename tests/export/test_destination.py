"""What a sweep asks of destinations: no two trials share one, and a fresh start forgets only its own."""

from dataclasses import replace

import pytest

from q3q.errors import ExportError
from q3q.export.destination import forget_export, is_finished, refuse_shared
from q3q.export.writer import open_exporter


def test_two_trials_cannot_write_to_one_place(checkpoint, spec_of, tmp_path):
    original = checkpoint()
    one, other = (spec_of(original, "gptq", tmp_path / "out", bits=bits) for bits in (4, 8))
    refuse_shared([one, replace(other, export=None), spec_of(original, "gptq", tmp_path / "elsewhere")])
    with pytest.raises(ExportError, match=r"out is given to 2 trials.*method.name"):
        refuse_shared([one, other])


def test_a_fresh_start_removes_its_own_export_and_no_other(checkpoint, spec_of, export, tmp_path):
    original = checkpoint()
    spec = spec_of(original, "hf", tmp_path / "out")
    made, _ = export(original, spec)
    assert is_finished(spec)
    forget_export(spec_of(original, "hf", tmp_path / "out", bits=3))
    assert made.path.exists()
    forget_export(spec)
    assert not made.path.exists()
    open_exporter(spec, original)
    forget_export(spec)
    assert not made.partial.exists()
