"""Files in the layouts of ML-Mamba's and Cobra's releases, loaded into small models of those recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ssmvl
from ssmvl.errors import CheckpointError
from ssmvl.interfaces import Grid
from ssmvl.model.vlm import VisionLanguageModel

WIDTH, ROWS, TOKENS, LAYERS, HEAD, STATE = 32, 272, 257, 2, 16, 8
INNER, CHANNELS = 2 * WIDTH, 2 * WIDTH + 2 * STATE
HEADS, FEATURES = INNER // HEAD, 2 * 128
SMALL = [
    "model.tokenizer=bytes",
    "model.encoders.dinov2={name: digit_vit, stem: fine}",
    "model.encoders.siglip={name: digit_vit, stem: coarse}",
    f"model.language.width={WIDTH}",
    f"model.language.num_layers={LAYERS}",
    f"model.language.num_tokens={TOKENS}",
]
MIXER = f"mixer={{name: mamba2, d_state: {STATE}, head_dim: {HEAD}}}"
ML_MAMBA = [*SMALL, f"model.connector.{MIXER}", f"model.language.{MIXER}"]
COBRA = [*SMALL, "model.language.mixer={name: mamba1, d_state: 4}"]
OWN = {
    "conv1d.weight": (CHANNELS, 1, 4),
    "conv1d.bias": (CHANNELS,),
    "dt_bias": (HEADS,),
    "A_log": (HEADS,),
    "D": (HEADS,),
}
SHARED = {
    "in_proj.weight": (INNER + CHANNELS + HEADS, WIDTH), "norm.weight": (INNER,), "out_proj.weight": (WIDTH, INNER),
}  # fmt: skip

Tensors = dict[str, Tensor]


def random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Random tensors, scaled so that every part affects the result."""
    tensors = {
        name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5) for name, shape in shapes.items()
    }
    return {name: t.abs() if name.endswith("A_log") else t for name, t in tensors.items()}


def linear(name: str, in_width: int, out_width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_width, in_width), f"{name}.bias": (out_width,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def projector(in_width: int) -> Tensors:
    sizes = ((0, in_width, 4 * in_width), (2, 4 * in_width, WIDTH), (4, WIDTH, WIDTH))
    return random({k: v for i, a, b in sizes for k, v in linear(f"projector.{i}", a, b).items()})


def language(mixer: dict[str, tuple[int, ...]], rows: int, prefix: str) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embedding.weight": (rows, WIDTH),
        "backbone.norm_f.weight": (WIDTH,),
    }
    for i in range(LAYERS):
        shapes[f"backbone.layers.{i}.norm.weight"] = (WIDTH,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    tensors = {prefix + name: tensor for name, tensor in random(shapes).items()}
    return tensors | {f"{prefix}lm_head.weight": tensors[f"{prefix}backbone.embedding.weight"]}


def ml_mamba_file(prefix: str = "") -> dict[str, Tensors]:
    """The four parts of a release, with handwritten names and shapes."""
    scan: dict[str, tuple[int, ...]] = norm("norm_f")
    for i in range(2):
        backward = {name.replace(".", "_b.", 1) if "." in name else f"{name}_b": s for name, s in OWN.items()}
        scan |= {f"layers.{i}.mixer.{name}": shape for name, shape in (SHARED | OWN | backward).items()}
        scan |= norm(f"layers.{i}.norm")
        scan |= {k: v for w in (1, 2, 3) for k, v in linear(f"layers.{i}.mlp.w{w}", WIDTH, WIDTH).items()}
    return {
        "mlp": random(linear("0", FEATURES, WIDTH)),
        "bidirectional_mamba": random(scan),
        "projector": projector(WIDTH),
        "llm_backbone": language(SHARED | OWN, ROWS, prefix),
    }


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mixer_pass(x: Tensor, w: Tensors, b: str = "") -> Tensor:
    """A Mamba-2 pass through (L, D) up to the gated norm, position by position; `b` selects the backward parameters."""
    z, xBC, dt = (x @ w["in_proj.weight"].T).split([INNER, CHANNELS, HEADS], -1)
    taps, bias = w[f"conv1d{b}.weight"][:, 0], w[f"conv1d{b}.bias"]
    padded = torch.cat([xBC.new_zeros(3, CHANNELS), xBC])
    xBC = F.silu(torch.stack([(padded[t : t + 4].T * taps).sum(1) for t in range(len(x))]) + bias)
    dt = F.softplus(dt + w[f"dt_bias{b}"])
    state, out = x.new_zeros(HEADS, HEAD, STATE), []
    for t in range(len(x)):
        u, B, C = xBC[t].split([INNER, STATE, STATE])
        u = u.view(HEADS, HEAD)
        decay = torch.exp(-dt[t] * w[f"A_log{b}"].exp())
        state = decay[:, None, None] * state + dt[t][:, None, None] * u[:, :, None] * B
        out.append((state @ C + w[f"D{b}"][:, None] * u).flatten())
    return rms(torch.stack(out) * F.silu(z), w["norm.weight"])


def under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}


def three_layers(x: Tensor, w: Tensors) -> Tensor:
    for i in (0, 2, 4):
        x = x @ w[f"projector.{i}.weight"].T + w[f"projector.{i}.bias"]
        x = F.gelu(x) if i < 4 else x
    return x


def straight_line(release: dict[str, Tensors], features: Tensor, ids: Tensor, prefix: str = "") -> Tensor:
    """Logits after each position of text that follows one image with these features (L, 256), in fp64."""
    x = F.gelu(features.double() @ release["mlp"]["0.weight"].double().T + release["mlp"]["0.bias"].double())
    for i in range(2):
        w = under(release["bidirectional_mamba"], f"layers.{i}.")
        mixer = under(w, "mixer.")
        both = (mixer_pass(x, mixer) + mixer_pass(x.flip(0), mixer, "_b").flip(0)) / 2
        x = x + both @ mixer["out_proj.weight"].T
        y = F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"])
        gate, up = (y @ w[f"mlp.w{k}.weight"].T + w[f"mlp.w{k}.bias"] for k in (1, 2))
        x = x + (F.silu(gate) * up) @ w["mlp.w3.weight"].T + w["mlp.w3.bias"]
    final = under(release["bidirectional_mamba"], "norm_f.")
    x = three_layers(F.layer_norm(x, (WIDTH,), final["weight"], final["bias"]), under(release["projector"], ""))
    w = under(release["llm_backbone"], f"{prefix}backbone.")
    x = torch.cat([x, w["embedding.weight"][ids]])
    for i in range(LAYERS):
        mixer = under(w, f"layers.{i}.mixer.")
        x = x + mixer_pass(rms(x, w[f"layers.{i}.norm.weight"]), mixer) @ mixer["out_proj.weight"].T
    return (rms(x, w["norm_f.weight"]) @ w["embedding.weight"].T)[-len(ids) :]


def logits_after(model: VisionLanguageModel, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The model's features of one image, and its logits at each position of the text after it."""
    images = dict.fromkeys(model.image_specs, pixels)
    features = {name: encoder(pixels) for name, encoder in model.encoders.items()}
    places = model.tokens_per_image
    row = torch.cat([torch.full((places,), -1), ids])[None]
    logits = model(row, torch.arange(places), torch.arange(places, places + len(ids)), images)
    return model.fusion(features)[0], logits


@pytest.mark.parametrize("prefix", ["", "llm."])
def test_a_released_ml_mamba_gives_the_logits_of_a_straight_line_rewrite(tmp_path: Path, prefix: str) -> None:
    release = ml_mamba_file(prefix)
    torch.save({"model": release}, tmp_path / "ml_mamba.pt")
    model = ssmvl.build_model("ml_mamba", *ML_MAMBA, weights=tmp_path / "ml_mamba.pt").eval()
    pixels, ids = torch.randint(256, (1, 3, 48, 48), dtype=torch.uint8), torch.tensor([7, 250, 31, 4, 4, 99])
    with torch.no_grad():
        features, actual = logits_after(model, pixels, ids)
        expected = straight_line(release, features, ids, prefix)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_encoders_load_their_own_weights(tmp_path: Path) -> None:
    torch.save({"model": ml_mamba_file()}, tmp_path / "x.pt")
    model = ssmvl.build_model("ml_mamba", *ML_MAMBA, weights=tmp_path / "x.pt")
    shipped = ssmvl.build_model("ml_mamba", *ML_MAMBA, "model.language.weights=none", weights="recipe")
    assert model.encoders.state_dict().keys() == shipped.encoders.state_dict().keys()
    for name, tensor in shipped.encoders.state_dict().items():
        assert torch.equal(model.encoders.state_dict()[name], tensor)


def test_a_released_cobra(tmp_path: Path) -> None:
    inner = 2 * WIDTH
    mixer: dict[str, Any] = {
        "in_proj.weight": (2 * inner, WIDTH), "conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,),
        "x_proj.weight": (2 + 2 * 4, inner), "dt_proj.weight": (inner, 2), "dt_proj.bias": (inner,),
        "A_log": (inner, 4), "D": (inner,), "out_proj.weight": (WIDTH, inner),
    }  # fmt: skip
    release = {"projector": projector(FEATURES), "llm_backbone": language(mixer, 264, "llm.")}
    torch.save({"model": release}, tmp_path / "cobra.pt")
    model = ssmvl.build_model("cobra", *COBRA, weights=tmp_path / "cobra.pt")
    actual = model.connector(torch.ones(1, 9, FEATURES), Grid(1, 3, 3))[0].double()
    expected = three_layers(torch.ones(9, FEATURES).double(), under(release["projector"], ""))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.language.layers[1].mixer.named_parameters():
        assert torch.equal(parameter, release["llm_backbone"][f"llm.backbone.layers.1.mixer.{name}"])
    assert torch.equal(model.language.embedding.weight, release["llm_backbone"]["llm.lm_head.weight"])


def test_a_release_for_another_number_of_paths_is_rejected(tmp_path: Path) -> None:
    torch.save({"model": ml_mamba_file()}, tmp_path / "x.pt")
    match = r"mixer\.A_log \(in the file: .*A_log_b\) is \(8,\), the model has \(16,\)"
    with pytest.raises(CheckpointError, match=match):
        ssmvl.build_model("ml_mamba", *ML_MAMBA, "model.connector.scan_order=csm", weights=tmp_path / "x.pt")


def test_a_release_without_its_connector_is_rejected(tmp_path: Path) -> None:
    release = ml_mamba_file()
    del release["projector"]
    torch.save({"model": release}, tmp_path / "x.pt")
    match = r"missing connector\.projector\.1\.0\.weight \(in the file: model\.projector"
    with pytest.raises(CheckpointError, match=match):
        ssmvl.build_model("ml_mamba", *ML_MAMBA, weights=tmp_path / "x.pt")
