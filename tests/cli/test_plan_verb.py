"""`ssmvl plan`: memory and time of each stage, and settings that fit."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ssmvl.cli import main

Capture = pytest.CaptureFixture[str]
SHORT = ["stages.align.max_text_tokens=32", "stages.finetune.max_text_tokens=32"]
MACHINE = ["--gpus", "1", "--memory", "1"]


def table(shown: str) -> dict[str, float]:
    """Return the rows of the first stage's table, in GB."""
    lines = shown.partition("at the peak of a step")[2].partition("\n\n")[0].splitlines()[1:]
    return {name: float(size) for name, size in (re.split(r" {2,}", line.strip()) for line in lines)}


def test_a_plan_that_fits(capsys: Capture) -> None:
    assert main(["plan", "quickstart", *SHORT, *MACHINE, "--text-tokens", "16"]) == 0
    shown = capsys.readouterr().out
    assert (
        "align: trains connector, language; 64 samples per step on 1 GPU, in micro-batches of 64, without act" in shown
    )
    assert shown.count("\nfits\n") == 2
    sizes = table(shown)
    assert sizes.pop("usable of 1") == 0.92
    total = sizes.pop("total")
    assert sum(sizes.values()) == pytest.approx(total, abs=0.05)
    assert "1,600 tokens and" in shown  # 64 x (9 + 16)
    assert "at 40% of 1 × 312 TFLOP/s" in shown
    assert "for 250 steps" in shown
    assert "for 1,000 steps" in shown
    assert "the torch backend" in shown
    assert "\x1b" not in shown


@pytest.mark.long
def test_the_suggested_settings_fit(capsys: Capture) -> None:
    words = ["plan", "quickstart", "stages.align=null", "stages.order=null", "stages.finetune.max_text_tokens=32"]
    machine = ["--gpus", "2", "--memory", "0.05"]
    assert main([*words, *machine]) == 1
    shown = capsys.readouterr().out
    assert re.search(
        r"does not fit: \d\.\d\d GB too much\. Settings that fit:\n  stages\.finetune\.microbatch=\d+\n", shown
    )
    for line in re.findall(r"^  (stages\..*)$", shown, re.MULTILINE):
        assert main([*words, *line.split(), *machine]) == 0
        assert "\nfits\n" in capsys.readouterr().out


def test_a_larger_microbatch_that_fits_is_reported(capsys: Capture) -> None:
    small = ["stages.align.microbatch=2", "stages.finetune.microbatch=2"]
    assert main(["plan", "quickstart", *SHORT, *small, *MACHINE]) == 0
    assert "fits; so does stages.align.microbatch=64" in capsys.readouterr().out


@pytest.mark.long
def test_a_stage_that_fits_with_no_setting(capsys: Capture) -> None:
    one = ["stages.align=null", "stages.order=null", "stages.finetune.max_text_tokens=32"]
    assert main(["plan", "quickstart", *one, "--gpus", "1", "--memory", "0.001"]) == 1
    shown = capsys.readouterr().out
    start = "does not fit with any setting, nor on more GPUs that can share 64 samples: one sample with activation"
    assert re.search(start + r" checkpointing and sharding needs 0\.\d\d GB per GPU on 64 GPUs\n", shown)


def test_a_duration_in_epochs_is_reported_per_thousand_samples(capsys: Capture) -> None:
    epochs = [f"stages.{stage}.{key}" for stage in ("align", "finetune") for key in ("duration=2ep", "warmup=0.1dur")]
    assert main(["plan", "quickstart", *SHORT, *epochs, *MACHINE, "--mfu", "0.5", "--tflops", "1e-3"]) == 0
    assert re.search(
        r"at 50% of 1 × 0\.001 TFLOP/s: .* per step, .* for 1,000 samples \(duration 2ep\)", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--gpus", "0", "--memory", "80"], "argument --gpus: must be an integer of at least 1, received '0'"),
        (["--gpus", "1.5", "--memory", "80"], "argument --gpus: must be an integer of at least 1, received '1.5'"),
        (["--gpus", "1", "--memory=-80"], "argument --memory: must be a number above 0, received '-80'"),
        (["--gpus", "1", "--memory", "inf"], "argument --memory: must be a number above 0, received 'inf'"),
        (["--gpus", "1", "--memory", "eighty"], "argument --memory: must be a number above 0, received 'eighty'"),
        (["--memory", "80"], "the following arguments are required: --gpus"),
        ([*MACHINE, "--mfu", "40"], "argument --mfu: must be a number above 0 and at most 1, received '40'"),
        ([*MACHINE, "--tflops", "nan"], "argument --tflops: must be a number above 0, received 'nan'"),
        ([*MACHINE, "--text-tokens", "0"], "argument --text-tokens: must be an integer of at least 1, received '0'"),
    ],
)
def test_invalid_hardware_is_rejected(argv: list[str], expected: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["plan", "quickstart", *argv])
    assert exited.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["quickstrat", *MACHINE], "quickstrat"),
        (
            ["quickstart", "stages.align=null", "stages.finetune=null", "stages.order=null", *MACHINE],
            "stages: expected",
        ),
        (
            ["quickstart", "--gpus", "3", "--memory", "1"],
            "stages.align.batch: 64 samples cannot be split evenly across 3 GPUs",
        ),
        (["quickstart", "stages.align.train=[nosuch]", *MACHINE], "no parameter of the model is under 'nosuch'"),
    ],
)
def test_a_recipe_that_cannot_be_planned_is_reported(argv: list[str], expected: str, capsys: Capture) -> None:
    assert main(["plan", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert expected in shown.err
    assert shown.out == ""


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, ssmvl.cli\ntry: ssmvl.cli.main(['plan', '--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--memory GB" in done.stdout
    assert not {"torch", "rich", "composer"} & set(done.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ml_mamba", "vl_mamba", "mamba_vlm", "mamba_vlm_7b", "cobra"])
def test_published_recipes_fit_eight_gpus_of_80_gb(name: str, capsys: Capture) -> None:
    assert main(["plan", name, "--gpus", "8", "--memory", "80"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit" not in shown
    print(shown)
