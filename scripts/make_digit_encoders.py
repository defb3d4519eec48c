"""Train the quickstart's two ViTs on the training digits, and write the weights shipped with the package.

    python scripts/make_digit_encoders.py

Each ViT learns to name the digit in each cell, from its output and from the features that a language model reads. From
these it also learns to name the cell, so that they show a digit's position as clearly as its class. Prints the accuracy
on unseen digits. Takes about three minutes on two CPU cores.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmvl.checkpoints import write_tensors
from ssmvl.data.scenes.digits import CELL, CELLS, digit_images
from ssmvl.progress import progress
from ssmvl.vision.digit_vit import EMPTY, SHIPPED, VARIANTS, digit_vit
from ssmvl.vision.encoders import VitEncoder

STEPS, BATCH, PEAK_LR = 1500, 128, 2e-3
PLACES = CELLS * CELLS
NOISE = 1.0  # standard deviation, relative to the features': digits and cells must be told apart clearly


def augment(digits: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate, scale, shear, shift and warp digits (n, 1, 16, 16), and change their contrast; leave one in seven."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=rng) - 1

    n = len(digits)
    angle, shear = 0.26 * uniform(n), 0.2 * uniform(n)
    width, height = (0.15 * uniform(2, n)).exp()
    rows = (angle.cos() * width, (shear - angle.sin()) * height), (angle.sin() * width, angle.cos() * height)
    matrix = torch.stack([torch.stack([*row, 0.15 * uniform(n)], dim=1) for row in rows], dim=1)
    grid = F.affine_grid(matrix, (n, 1, CELL, CELL), align_corners=False)
    warp = F.interpolate(0.06 * torch.randn(n, 2, 4, 4, generator=rng), size=(CELL, CELL), mode="bicubic")
    moved = F.grid_sample(digits, grid + warp.permute(0, 2, 3, 1), align_corners=False).clamp(0, 255) / 255
    changed = 255 * moved ** (0.25 * uniform(n, 1, 1, 1)).exp() * (1 + 0.2 * uniform(n, 1, 1, 1))
    unchanged = torch.rand(n, 1, 1, 1, generator=rng) < 1 / 7
    return torch.where(unchanged, digits, changed).clamp(0, 255).round()


def batch(images: Tensor, labels: Tensor, rng: torch.Generator, *, augmented: bool) -> tuple[Tensor, Tensor]:
    """Draw images uint8 (B, 3, 48, 48) with a digit in about half of the cells, and the class of each cell (B, 9)."""
    n = BATCH * PLACES
    which, present = torch.randint(len(labels), (n,), generator=rng), torch.rand(n, generator=rng) < 0.5
    digits = images[which][:, None].float()
    digits = (augment(digits, rng) if augmented else digits) * present[:, None, None, None]
    rows = digits.view(BATCH, CELLS, CELLS, CELL, CELL).transpose(2, 3)
    pixels = rows.reshape(BATCH, 1, CELLS * CELL, CELLS * CELL).expand(-1, 3, -1, -1)
    return pixels.to(torch.uint8), torch.where(present, labels[which], EMPTY).view(BATCH, PLACES)


def logits(encoder: VitEncoder, head: nn.Linear, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The ViT's logits of the class of each cell (B, 9, 11), and those of class and cell from its features."""
    output, (features,) = encoder.vit.forward_intermediates(
        encoder.normalise(pixels), indices=[len(encoder.vit.blocks) - 2], output_fmt="NLC", norm=False
    )
    normed = F.layer_norm(features, features.shape[-1:])
    return encoder.vit.forward_head(output), head(normed + NOISE * torch.randn_like(normed))


def train(stem: str, seed: int) -> VitEncoder:
    """Train one ViT."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    encoder = digit_vit(stem, weights="none")
    head = nn.Linear(encoder.width, EMPTY + 1 + PLACES)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.15)
    images, labels = map(torch.from_numpy, digit_images("train"))
    for _ in progress(range(STEPS), desc=f"training {stem}", unit=" steps"):
        pixels, classes = batch(images, labels, rng, augmented=True)
        of_output, of_features = logits(encoder, head, pixels)
        by_class, by_cell = of_features.split([EMPTY + 1, PLACES], dim=-1)
        cells = torch.arange(PLACES).expand(BATCH, -1)
        loss = torch.stack(
            [
                F.cross_entropy(predicted.flatten(0, 1), truth.flatten(), label_smoothing=smoothing)
                for predicted, truth, smoothing in (
                    (of_output, classes, 0.05),
                    (by_class, classes, 0.05),
                    (by_cell, cells, 0.0),
                )
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return encoder.eval()


@torch.no_grad()
def accuracy(encoder: VitEncoder) -> float:
    """Share of unseen digits that the ViT's output names correctly."""
    images, labels = map(torch.from_numpy, digit_images("test"))
    rng = torch.Generator().manual_seed(9)
    correct = []
    for _ in range(16):
        pixels, classes = batch(images, labels, rng, augmented=False)
        correct.append((encoder.vit(encoder.normalise(pixels)).argmax(-1) == classes)[classes != EMPTY])
    return torch.cat(correct).float().mean().item()


def main() -> None:
    SHIPPED.mkdir(exist_ok=True)
    for seed, stem in enumerate(VARIANTS):
        encoder = train(stem, seed)
        print(f"{stem}: names {accuracy(encoder):.1%} of unseen digits")
        write_tensors(SHIPPED / f"digit_vit_{stem}.safetensors", encoder.vit.state_dict())


if __name__ == "__main__":
    main()
