"""Cases of the suites `cpu` and `cuda`: each a value, the machine's limit at the same moment, and the share reached."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmvl.benchmarks.limits import Shape, product_rate, read_rate, seconds, ssd_operations
from ssmvl.benchmarks.memory import SLACK, activation_bytes, build, peak, train
from ssmvl.language.mamba_lm import MambaLM
from ssmvl.language.state import RecurrentState
from ssmvl.ops.ssd import ssd

PEER_TOKENS = 256


class Row(NamedTuple):
    """One row of the table; `limit` and `of_limit` are None if the value is not compared."""

    case: str
    value: float
    unit: str
    limit: float | None = None
    of_limit: float | None = None
    peer: str | None = None


def cases(shape: Shape, device: str) -> Iterator[Row]:
    """Yield every row."""
    model = build(shape, device).eval()
    yield from _prefill(model, shape, device)
    yield from _decode(model, shape, device)
    yield from _train_step(model, shape, device)
    yield from _scan(shape, device)
    yield from _length(model, shape, device)
    yield from _memory(model, shape, device)


def compare(
    case: str, unit: str, limit: Callable[[], float], value: Callable[[], float], rounds: int = 5, **more: Any
) -> Row:
    """The round with the median share. Value and limit are measured in turn, because a machine's speed drifts."""
    pairs = sorted(((value(), limit()) for _ in range(rounds)), key=lambda pair: pair[0] / pair[1])
    measured, allowed = pairs[rounds // 2]
    return Row(case, measured, unit, allowed, measured / allowed, **more)


def operations(model: MambaLM, shape: Shape) -> float:
    """FLOPs of the forward pass per token, without the head."""
    weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    return 2 * weights + ssd_operations(shape)


@torch.no_grad()
def _prefill(model: MambaLM, shape: Shape, device: str) -> Iterator[Row]:
    embeds = model.embed(torch.randint(shape.num_tokens, (1, shape.prompt), device=device))

    def run() -> None:
        model.prefill(embeds, torch.tensor([shape.prompt], device=device), model.new_state(1))

    yield Row("prefill, first call", seconds(run, device), "s")
    yield compare(
        "prefill",
        "tok/s",
        lambda: product_rate(shape, shape.prompt, device) / operations(model, shape),
        lambda: shape.prompt / seconds(run, device),
        peer=_peer(shape) if device == "cpu" else None,
    )


@torch.no_grad()
def _decode(model: MambaLM, shape: Shape, device: str) -> Iterator[Row]:
    def step(ids: Tensor, state: RecurrentState) -> Tensor:
        return model.head(model.step(model.embed(ids), state))

    one = yield from _decode_with(step, "decode", 1, model, device)
    sixteen = yield from _decode_with(step, "decode_16", 16, model, device)
    yield Row("decode_16 / decode", sixteen / one, "times")
    if device == "cuda" or shutil.which("g++"):  # torch.compile needs a compiler
        yield from _decode_with(torch.compile(step, fullgraph=True, dynamic=False), "decode_compiled", 1, model, device)


@torch.no_grad()
def _decode_with(
    step: Callable[..., Tensor], case: str, rows: int, model: MambaLM, device: str
) -> Generator[Row, None, float]:
    state, ids = model.new_state(rows), torch.arange(rows, device=device)
    touched = sum(p.nbytes for p in model.parameters()) + 2 * state.nbytes  # the state is read and written
    yield Row(f"{case}, first call", seconds(lambda: step(ids, state), device), "s")

    def tokens_per_second(steps: int = 8) -> float:
        return steps * rows / seconds(lambda: [step(ids, state) for _ in range(steps)], device)

    row = compare(case, "tok/s", lambda: rows * read_rate(device) / touched, tokens_per_second)
    yield row
    return row.value


def _train_step(model: MambaLM, shape: Shape, device: str) -> Iterator[Row]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        train(model, shape, device)
        optimizer.step()
        optimizer.zero_grad()

    tokens = shape.rows * shape.row_length
    yield Row("train_step, first call", seconds(run, device), "s")
    yield compare(
        "train_step",
        "tok/s",
        lambda: product_rate(shape, tokens, device) / (3 * operations(model, shape)),
        lambda: tokens / seconds(run, device),
        rounds=3,
    )


@torch.no_grad()
def _scan(shape: Shape, device: str) -> Iterator[Row]:
    """K paths folded into the heads of one call of `ssd`, relative to K calls."""

    def call(paths: int) -> Callable[[], object]:
        sizes = {
            "x": (shape.heads, shape.head_dim),
            "B": (1, shape.d_state),
            "C": (1, shape.d_state),
            "dt": (shape.heads,),
        }
        inputs: dict[str, Any] = {
            name: torch.rand(1, shape.patches, paths * size[0], *size[1:], device=device)
            for name, size in sizes.items()
        }
        return lambda: ssd(**inputs, A=-torch.ones(paths * shape.heads, device=device))

    one = call(1)

    def rate(run: Callable[[], object], times: int = 1) -> float:
        return 1 / seconds(lambda: [run() for _ in range(times)], device)

    rate(one)
    yield Row("scan, K = 1", max(rate(one) for _ in range(25)), "scans/s")
    for paths in (2, 4):
        folded = call(paths)
        rate(folded)
        yield compare(f"scan, K = {paths}", "scans/s", partial(rate, one, paths), partial(rate, folded), rounds=25)


@torch.no_grad()
def _length(model: MambaLM, shape: Shape, device: str) -> Iterator[Row]:
    def tokens_per_second(length: int) -> float:
        embeds = model.embed(torch.zeros(1, length, dtype=torch.long, device=device))
        lengths, state = torch.tensor([length], device=device), model.new_state(1)
        return length / seconds(lambda: model.prefill(embeds, lengths, state), device)

    yield Row(f"length, {shape.prompt}", tokens_per_second(shape.prompt), "tok/s")
    length = 2 * shape.prompt
    while length <= shape.longest:
        yield compare(
            f"length, {length}",
            "tok/s",
            partial(tokens_per_second, shape.prompt),
            partial(tokens_per_second, length),
            rounds=3,
        )
        length *= 2


def _memory(model: MambaLM, shape: Shape, device: str) -> Iterator[Row]:
    weights = sum(p.nbytes for p in model.parameters())
    for case, run in (
        ("memory", shape),
        ("memory, rows twice as long", shape._replace(row_length=2 * shape.row_length)),
    ):
        measured, allowed = peak(run, device), 2 * weights + SLACK * activation_bytes(run)
        yield Row(case, measured / 1e6, "MB", allowed / 1e6, measured / allowed)


def _peer(shape: Shape) -> str | None:
    """Tokens per second of transformers' prefill without its head, in one cold call; None if it is not installed."""
    try:
        from transformers import Mamba2Config, Mamba2ForCausalLM, logging
    except ImportError:
        return None
    logging.set_verbosity_error()  # it warns that its kernels are missing
    config = Mamba2Config(
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        vocab_size=shape.num_tokens,
        state_size=shape.d_state,
        head_dim=shape.head_dim,
        num_heads=shape.heads,
        n_groups=1,
    )
    model, tokens = Mamba2ForCausalLM(config).eval(), min(PEER_TOKENS, shape.prompt)
    ids = torch.randint(shape.num_tokens, (1, tokens))
    rate = tokens / seconds(lambda: model.backbone(ids, use_cache=True), "cpu")
    return f"transformers {rate:.1f} tok/s at {tokens} tokens"
