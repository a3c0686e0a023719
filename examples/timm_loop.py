"""Prune with timm's training utilities: its optimizer, scheduler, moving average and loss scaler.

    python examples/timm_loop.py [--epochs 4] [--plugin gsm-anneal] [--target macs=50%]

timm's `train.py` needs the same five lines: `begin` after the optimizer and `ModelEmaV3` are made, `distil` and
`step` in `train_one_epoch`, `epoch` after it, and `save` at the end.
"""

from __future__ import annotations

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from prunus.adapters.pytorch import begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--plugin", default="gsm-anneal")
    parser.add_argument("--target", default="macs=50%")
    parser.add_argument("--images", type=int, default=1400)
    args = parser.parse_args()

    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    data = TensorDataset(functional.interpolate(small, scale_factor=4), labels)
    train, test = torch.utils.data.random_split(data, [args.images, len(data) - args.images])
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)

    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=2 * args.epochs,
        updates_per_epoch=len(loader),
        step_on_epochs=False,
    )
    scaler = NativeScaler(device="cpu")
    average = ModelEmaV3(model, decay=0.98)

    run = begin(
        model,
        torch.randn(2, 1, 32, 32),
        plugin=args.plugin,
        target=args.target,
        optimizer=optimizer,
        ema=average,
        train_data=loader,
        test_data=test,
        dense_epochs=args.epochs,
        epochs=args.epochs,
    )
    updates = 0
    while not run.done:
        model.train()
        for images, labels in loader:
            logits = model(images)
            loss = run.distil(functional.cross_entropy(logits, labels), logits, images, labels)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())  # asked for anew each time
            updates += 1
            average.update(model, step=updates)
            scheduler.step_update(updates, metric=float(loss))
            run.step(loss)
            if run.done:
                break
        run.epoch()

    report = run.finish().report
    print(f"{report.dense.params} -> {report.pruned.params} parameters, accuracy {report.pruned.accuracy:.3f}; "
          f"the average has {sum(p.numel() for p in average.module.parameters())}")  # fmt: skip


if __name__ == "__main__":
    main()
