"""What memory layout and mixed precision make of a training step on a processor.

    python -m benchmarks.mixed_precision [--models NAME[@PIXELS[xBATCH]] ...] [--steps 20]

Steps of all kinds take turns in rotating order, as in `step_overhead`. A row for a Markdown table: the default
step in milliseconds of the processor, then the ratios of medians: with `--channels-last`, with autocast to
bfloat16 over the whole network besides, and with `--channels-last --amp`.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from benchmarks.turns import medians
from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.mixed_precision import autocast, depthwise_in_float32

CLASSES = 10
KINDS = ("default", "--channels-last", "all in bfloat16", "--amp")
MODELS = (
    "prunus/resnet14_s2@28x128",
    "timm/resnet18@224x8",
    "timm/mobilenetv3_small_050@32x128",
    "timm/mobilenetv3_small_050@224x8",
    "timm/mobilenetv2_100@224x8",
    "timm/efficientnet_lite0@224x8",
    "timm/convnext_atto@224x8",
    "timm/resnet50@96x8",
    "torchvision/regnet_y_400mf@96x8",
)


class Steps:
    """A model with its optimizer, trained in one of the kinds."""

    def __init__(self, name: str, size: int, kind: str) -> None:
        self.model = build(name, classes=CLASSES, in_chans=3, img_size=size).module.train()
        self.layout = torch.contiguous_format if kind == "default" else torch.channels_last
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        self.kind = kind

    def one(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Seconds of the processor."""
        images = images.contiguous(memory_format=self.layout)
        started = time.process_time()
        with ExitStack() as stack:
            if self.kind == "--amp":
                stack.enter_context(depthwise_in_float32(self.model))
            with autocast("cpu", "bf16" if self.kind in KINDS[2:] else "off"):
                output = self.model(images)
            nn.functional.cross_entropy(output.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def measure(name: str, size: int, batch: int, steps: int) -> str:
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(CLASSES, (batch,))
    step = {kind: partial(Steps(name, size, kind).one, images, labels) for kind in KINDS}
    median = medians(step, steps)
    ratios = " | ".join(f"{median[kind] / median['default']:.2f}" for kind in KINDS[1:])
    return f"| `{name}` | {size} | {batch} | {1e3 * median['default']:.0f} | {ratios} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    for text in given.models:
        name, _, rest = text.partition("@")
        size, _, batch = rest.partition("x")
        print(measure(name, int(size or 224), int(batch or 8), given.steps), flush=True)


if __name__ == "__main__":
    main()
