"""The parts that docs/scaling.md multiplies: counted on a model, or timed on one core of this machine.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--model timm/resnet50]

One line each. Times are the processor's; other processes on the machine disturb them little.
"""

from __future__ import annotations

import argparse
import io
import pickle
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import nn

from prunus.adapters.pytorch.augmentation import Augmentation, plain_transform
from prunus.adapters.pytorch.covariance import Moments
from prunus.adapters.pytorch.distributed import plan_digest
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.session import open_session
from prunus.core.directives import Train
from prunus.core.settings import make_settings

IMAGENET = InputSpec((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=0.875)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of the processor, for one of `repeats` after a first one."""
    work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began) / repeats


def counted(name: str) -> None:
    """What follows from the model alone."""
    session = open_session(make_settings({"model": name, "data": "none", "seed": 0}))
    adapter = session.adapter
    graph, model = adapter.graph, adapter.model
    cost = graph.cost()
    units = sum(group.units for group in graph.prunable.values())
    print(f"{name}: {cost.macs / 1e9:.3f} GMAC forward, {cost.params / 1e6:.2f} M parameters")
    print(f"{len(graph.prunable)} groups of {units} units can be pruned")
    seen = {"products": 0, "values": 0, "normed": 0, "bytes": 0}
    readers = {s.tensor for group in graph.prunable.values() for s in group.slices if s.role == "reads"}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and f"{path}.weight" in readers:
            width = module.weight.shape[1]
            seen["bytes"] += 8 * width**2

            def look(module: nn.Module, args: tuple[torch.Tensor, ...], width: int = width) -> None:
                seen["products"] += args[0].numel() * width
                seen["values"] += args[0].numel()

            handles.append(module.register_forward_pre_hook(look))
        if isinstance(module, nn.BatchNorm2d):

            def norm(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                seen["normed"] += args[0].numel()

            handles.append(module.register_forward_pre_hook(norm))
    with torch.no_grad():
        model.eval()(torch.zeros(1, *session.describe().input_size))
    for handle in handles:
        handle.remove()
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    print(f"covariances at {len(readers)} readers: {seen['bytes'] / 2**30:.2f} GiB in float64")
    print(
        f"an image: {seen['products'] / 1e9:.2f} GMAC for them, {4e-6 * seen['values']:.0f} MB of float32 inputs"
    )
    print(f"batch norms: {len(norms)} of {sum(norms)} channels, {seen['normed'] / 1e6:.1f} M values an image")
    print(f"plan hash: {1e3 * seconds(lambda: plan_digest(adapter), 5):.0f} ms")
    gates = Train(1.0, gates={n: np.ones(group.units) for n, group in graph.groups.items()})
    print(f"directive with all gates: {len(pickle.dumps(gates)) / 1e3:.0f} kB pickled")


def timed() -> None:
    """What a core of this machine does."""
    for width in (256, 1024, 2048):
        rows, moments = torch.randn(16 * 196, 1, width), Moments(width)
        took = seconds(lambda r=rows, m=moments: m.add(r), 3)  # type: ignore[misc]
        print(f"covariance of width {width}: {len(rows) * width**2 / took / 1e9:.1f} GMAC/s in float64")
    jpeg = photograph()
    print(f"a JPEG of 500 x 375 and {len(jpeg) / 1e3:.0f} kB:")
    augmented = Augmentation("rand-m7-n2-mstd0.5", 0.25).transform(IMAGENET)
    for what, transform in (
        ("evaluated", plain_transform(IMAGENET)),
        ("cropped and mirrored", Augmentation().transform(IMAGENET)),
        ("with RandAugment and erasing, too", augmented),
    ):
        took = seconds(lambda t=transform: t(Image.open(io.BytesIO(jpeg)).convert("RGB")), 60)  # type: ignore[misc]
        print(f"  {what}: {1 / took:.0f} images/s")


def photograph() -> bytes:
    """A JPEG of a size that is usual in ImageNet: blurred blobs and some noise."""
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(blobs.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int64)
    noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(noisy).save(content, "jpeg", quality=90)
    return content.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm/resnet50")
    torch.set_num_threads(1)
    counted(parser.parse_args().model)
    timed()


if __name__ == "__main__":
    main()
