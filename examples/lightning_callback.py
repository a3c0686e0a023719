"""Prune inside Lightning's loop: a callback that begins a run and tells it of every step.

pip install lightning
python examples/lightning_callback.py [--epochs 4] [--plugin gsm-anneal] [--target macs=50%]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from prunus.adapters.pytorch import LoopRun, begin

try:
    import lightning
except ImportError:
    raise SystemExit("this example needs Lightning: pip install lightning") from None


class Pruning(lightning.Callback):
    """Prunes `module.network` while Lightning trains it; the settings are those of `begin`."""

    def __init__(self, example_inputs: Tensor, **settings: Any) -> None:
        self.example_inputs, self.settings = example_inputs, settings
        self.run: LoopRun | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.run = begin(
            module.network,
            self.example_inputs,
            optimizer=trainer.optimizers[0],
            steps_per_epoch=int(trainer.num_training_batches),
            **self.settings,
        )
        module.pruning = self.run

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.run is not None
        self.run.step(outputs["loss"])
        if self.run.done:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        assert self.run is not None
        self.run.epoch()


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
        self.pruning: LoopRun | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        loss = functional.cross_entropy(logits, labels)
        return loss if self.pruning is None else self.pruning.distil(loss, logits, images, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--plugin", default="gsm-anneal")
    parser.add_argument("--target", default="macs=50%")
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    pruning = Pruning(
        torch.randn(2, 1, 8, 8),
        plugin=args.plugin,
        target=args.target,
        train_data=train,
        test_data=test,
        dense_epochs=args.epochs,
        epochs=args.epochs,
    )
    trainer = lightning.Trainer(
        max_epochs=3 * args.epochs,  # the callback stops earlier
        callbacks=[pruning],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader)
    assert pruning.run is not None
    report = pruning.run.finish().report
    print(f"{report.dense.macs} -> {report.pruned.macs} MACs, accuracy {report.pruned.accuracy:.3f}")


if __name__ == "__main__":
    main()
