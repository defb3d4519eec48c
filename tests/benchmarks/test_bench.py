"""`ssmvl bench` with a tiny model; the measured values are not checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssmvl.benchmarks import limits, memory, model_cases
from ssmvl.cli import main
from ssmvl.ops import rms_norm

TINY = limits.Shape(
    width=32,
    num_layers=2,
    num_tokens=64,
    d_state=8,
    head_dim=16,
    prompt=32,
    longest=64,
    rows=2,
    row_length=80,
    answer=4,
    patches=9,
)


MEDIUM = TINY._replace(width=512, head_dim=64, d_state=16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.Shape, "__new__", lambda cls: TINY)
    monkeypatch.setattr(model_cases, "read_rate", lambda device: 1e9)
    monkeypatch.setattr(model_cases.shutil, "which", lambda name: None)  # no compilation
    monkeypatch.setattr(model_cases, "peak", lambda shape, device: 10**6)


def test_prints_a_table_and_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "cpu", "--json", str(tmp_path / "rows.json")]) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    rows = {row["case"]: row for row in written["rows"]}
    names = list(rows)
    assert written["machine"]["torch"] == torch.__version__
    assert all(set(row) == {"case", "value", "unit", "limit", "of_limit", "peer"} for row in written["rows"])
    assert all(f"\n{name} " in printed for name in names)
    for name in ("prefill", "decode", "train_step"):
        assert rows[name]["unit"] == "tok/s"
        assert rows[name]["of_limit"] == pytest.approx(rows[name]["value"] / rows[name]["limit"])
        assert rows[f"{name}, first call"]["unit"] == "s"
    assert names.index("decode") < names.index("decode_16")
    assert {"scan, K = 1", "scan, K = 2", "scan, K = 4", "length, 32", "length, 64", "memory"} <= set(names)
    assert rows["prefill"]["peer"].startswith("transformers ")


def test_sizes_match_the_modules() -> None:
    model = memory.build(TINY, "cpu")
    mixer = model.layers[0].mixer
    products = ((mixer.in_proj.in_features, mixer.in_proj.out_features), (mixer.inner, mixer.out_proj.out_features))
    assert TINY.products == products
    assert (TINY.heads, TINY.channels) == (mixer.heads, mixer.channels)


def test_activations_are_what_autograd_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula against every tensor that autograd saves, except parameters and ids."""
    monkeypatch.setattr(rms_norm, "SMALL", 0)  # as at any realistic size
    model = memory.build(TINY, "cpu")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            saved[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        memory.train(model, TINY, "cpu")
    nbytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert nbytes <= 1.05 * memory.activation_bytes(TINY)
    assert nbytes >= 0.9 * memory.activation_bytes(TINY)


def test_the_peak_is_that_of_a_separate_process() -> None:
    held = torch.ones(2**27)  # 512 MiB in this process, which must not count
    weights = sum(p.nbytes for p in memory.build(MEDIUM, "meta").parameters())
    assert weights < memory.peak(MEDIUM, "cpu") < 3 * weights + 4 * memory.activation_bytes(MEDIUM) < held.nbytes


def test_a_missing_cuda_device_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert main(["bench", "--suite", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
