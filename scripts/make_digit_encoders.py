"""Train the quickstart's two ViTs to classify the digit in each cell, and write the weights shipped with the package.

    python scripts/make_digit_encoders.py

Uses training digits only and prints the accuracy on unseen digits. Takes about a minute on two CPU cores.
"""

import numpy as np
import torch
from torch.nn import functional as F

from ssmvl.checkpoints import write_tensors
from ssmvl.data.scenes.digits import CELLS, digit_images, draw
from ssmvl.vision.digit_vit import EMPTY, SHIPPED, VARIANTS, digit_vit

STEPS, BATCH = 800, 128


def batch(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images uint8 (B, 3, 48, 48) with a digit in about half of the cells, and the class of each cell (B, 9)."""
    scenes, classes = [], []
    for _ in range(BATCH):
        chosen = np.where(rng.random(CELLS * CELLS) < 0.5, rng.integers(len(labels), size=CELLS * CELLS), -1)
        cells = {divmod(cell, CELLS): images[digit] for cell, digit in enumerate(chosen) if digit >= 0}
        scenes.append(np.asarray(draw(cells)).transpose(2, 0, 1))
        classes.append(np.where(chosen >= 0, labels[chosen], EMPTY))
    return torch.from_numpy(np.stack(scenes)), torch.from_numpy(np.stack(classes))


def main() -> None:
    for seed, stem in enumerate(VARIANTS):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        encoder = digit_vit(stem)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
        train = digit_images("train")
        for step in range(STEPS):
            pixels, classes = batch(*train, rng)
            loss = F.cross_entropy(encoder.vit(encoder.normalise(pixels)).flatten(0, 1), classes.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 99:
                print(f"{stem}: step {step + 1}, loss {loss.item():.4f}", flush=True)
        encoder.eval()
        with torch.no_grad():
            pixels, classes = batch(*digit_images("test"), np.random.default_rng(9))
            correct = encoder.vit(encoder.normalise(pixels)).argmax(-1) == classes
        print(f"{stem}: accuracy {correct[classes != EMPTY].float().mean():.1%} on unseen digits")
        SHIPPED.mkdir(exist_ok=True)
        write_tensors(SHIPPED / f"digit_vit_{stem}.safetensors", encoder.vit.state_dict())


if __name__ == "__main__":
    main()
