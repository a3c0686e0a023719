"""Prune inside a training loop of your own: the lines with `run` are all that is added to it.

python examples/plain_loop.py [--epochs 4] [--plugin gsm-anneal] [--target macs=50%] [--output runs/plain]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from prunus.adapters.pytorch import begin


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Train and test: 8x8 images in [0, 1] and their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    return TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--plugin", default="gsm-anneal")
    parser.add_argument("--target", default="macs=50%")
    parser.add_argument("--output", default="runs/plain")
    args = parser.parse_args()

    train, test = digits()
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    run = begin(
        model,
        torch.randn(2, 1, 8, 8),
        plugin=args.plugin,
        target=args.target,
        optimizer=optimizer,
        train_data=loader,
        test_data=test,
        dense_epochs=args.epochs,  # the model above is not trained yet
        epochs=args.epochs,
    )
    model.train()
    while not run.done:
        for images, labels in loader:
            optimizer.zero_grad()
            logits = model(images)
            loss = functional.cross_entropy(logits, labels)
            loss = run.distil(loss, logits, images, labels)  # teachers, where the method wants them
            loss.backward()
            optimizer.step()
            run.step(loss)
            if run.done:
                break
        run.epoch()

    folder = run.save(args.output, overwrite=True)
    report = run.finish().report
    print(f"{report.dense.macs} -> {report.pruned.macs} MACs, {report.dense.accuracy:.3f} -> "
          f"{report.pruned.accuracy:.3f} accuracy, in {folder}")  # fmt: skip


if __name__ == "__main__":
    main()
