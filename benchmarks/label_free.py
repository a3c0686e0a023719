"""Pruning a pretrained network with unlabelled photographs: how often it still answers as the dense one.

    python benchmarks/label_free.py --model timm/tf_efficientnet_lite0 --checkpoint lite0.pth \
        --targets macs=85% macs=70% --output label_free.jsonl

The photographs are the sample images of scikit-learn and scikit-image (both must be installed), cropped at
random scales and mirrored. Agreement is measured on crops of photographs that calibration never saw. Taylor
takes the dense model's own answers as labels; bayes-reparam uses none.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

from prunus.adapters.pytorch.adapter import AdapterSettings, PyTorchAdapter
from prunus.adapters.pytorch.array_images import ArrayBatches, ArrayImages, ArrayTrainBatches, normalised
from prunus.adapters.pytorch.batches import DataBundle
from prunus.adapters.pytorch.catalog import build, construct
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.shrinking_model import Origin
from prunus.core.budget import Budget, Target
from prunus.core.directives import Note
from prunus.core.importance import ImportanceEstimator
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.testing.transcript import drive
from prunus.plugins.bayes_reparam import BayesReparam, BayesReparamConfig
from prunus.plugins.magnitude import Magnitude
from prunus.plugins.one_shot import OneShot, OneShotConfig
from prunus.plugins.taylor import Taylor

UNSEEN = ("china", "chelsea", "rocket", "coins", "motorcycle_left")
SEEN = (
    *("flower", "astronaut", "camera", "coffee", "brick", "grass", "gravel", "hubble_deep_field"),
    *("ihc", "clock_motion", "retina", "moon", "page", "cell", "horse", "microaneurysms"),
)
"""An even number: dealt out in turn, so that the two folds of images hold different photographs. The other
photograph of the stereo pair (`motorcycle_right`) is in neither list."""


def variants() -> dict[str, tuple[PruningPolicy, ImportanceEstimator | None]]:
    plain = OneShotConfig(refit="none", recalibrate="no")
    recalibrated = OneShotConfig(refit="none", recalibrate="yes")
    return {
        "bayes-reparam": (BayesReparam(BayesReparamConfig(folds=2, recalibrate="no")), None),
        "magnitude": (OneShot(plain), Magnitude()),
        "magnitude, recalibrated": (OneShot(recalibrated), Magnitude()),
        "taylor": (OneShot(plain), Taylor()),
        "taylor, recalibrated": (OneShot(recalibrated), Taylor()),
        "magnitude, sequential": (OneShot(OneShotConfig(refit="sequential", recalibrate="no")), Magnitude()),
    }


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    for target in options.targets:
        for name, (policy, estimator) in variants().items():
            if not options.variants or name in options.variants:
                row = {"target": target, "variant": name, **_run(options, target, policy, estimator)}
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def _run(
    options: argparse.Namespace, target: str, policy: PruningPolicy, estimator: ImportanceEstimator | None
) -> dict[str, Any]:
    built = build(options.model, checkpoint=options.checkpoint, img_size=options.size)
    dense = build(options.model, checkpoint=options.checkpoint, img_size=options.size).module.eval()
    seen = _crops(SEEN, options.images, options.size, 0)
    unseen = _crops(UNSEEN, options.images, options.size, 1)
    data = ArrayImages(seen, _answers(dense, seen, built.input).argmax(1))
    order = np.arange(len(seen))
    batches = ArrayBatches(data, order, built.input, 32)
    train = ArrayTrainBatches(data, built.input, 32, flip=True, shift=0)
    bundle = DataBundle(train, batches, batches, batches, 1000, (), 3)
    origin = Origin(built.source, built.input, construct, {})
    adapter = PyTorchAdapter(built.module, origin, AdapterSettings(TrainingSettings(lr=0.01)), bundle)
    graph = adapter.original_graph
    budget = Budget.resolve([Target.parse(target)], graph.cost())
    labels = estimator is not None
    task = PruningTask(graph, budget, np.random.default_rng(0), estimator, has_data=True, has_labels=labels)
    began = time.perf_counter()
    drive(policy, task, _Answering(adapter))
    seconds = time.perf_counter() - began
    before, after = _answers(dense, unseen, built.input), _answers(adapter.model, unseen, built.input)
    divergence = functional.kl_div(
        after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return {
        "agreement": float((before.argmax(1) == after.argmax(1)).float().mean()),
        "kl": float(divergence),
        "load": budget.load(adapter.graph.cost()),
        "seconds": round(seconds, 1),
    }


class _Answering:
    def __init__(self, adapter: PyTorchAdapter) -> None:
        self._adapter = adapter

    def answer(self, directive: Any) -> Any:
        if isinstance(directive, Note):
            return None
        return getattr(self._adapter, type(directive).__name__.lower())(directive)


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor, spec: InputSpec) -> Tensor:
    return torch.cat([model.eval()(normalised(part, spec)) for part in images.split(32)])


def _crops(names: tuple[str, ...], count: int, size: int, seed: int) -> Tensor:
    """(count, 3, size, size) uint8: random crops of 30-100% of the shorter side, half of them mirrored."""
    rng = np.random.default_rng(seed)
    photographs = [_photograph(name) for name in names]
    crops = []
    for k in range(count):
        image = photographs[k % len(photographs)]
        side = int(min(image.shape[1:]) * rng.uniform(0.3, 1.0))
        top, left = (int(rng.integers(0, n - side + 1)) for n in image.shape[1:])
        crop = image[:, top : top + side, left : left + side][None].float()
        crop = functional.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)[0]
        crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return torch.stack(crops).round().clamp(0, 255).byte()


def _photograph(name: str) -> Tensor:
    """(3, height, width)"""
    if name in ("china", "flower"):
        found = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
        return torch.from_numpy(np.array(found[name])).permute(2, 0, 1)
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    path = next(p for p in sorted(folder.iterdir()) if p.stem == name and p.suffix in (".png", ".jpg"))
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--targets", nargs="+", default=["macs=85%", "macs=70%"])
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
