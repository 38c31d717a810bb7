"""DenseNet201 of torchvision, or of timm, in PyTorch's plain training loop: the same batch, size, loss and optimiser.

Run by a Python that has torch (and torchvision or timm); nothing of this project or of TensorFlow is used. Images are
random numbers: what is measured is the step, not the input.
"""

import importlib
import re
import sys
import time
from itertools import pairwise
from typing import Any

import trial
from trial import Result, Spec


def import_torchvision() -> Any:
    """The package, though its operators may be missing: built for CUDA, it can't load them beside a torch for the CPU.

    No network here uses one; but the import fails for each that nobody has defined.
    """
    import torch

    for _ in range(20):
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
    raise RuntimeError("torchvision can't be imported")


def build(spec: Spec) -> Any:
    """The network with four classes, untrained."""
    import torch

    torch.manual_seed(spec["seed"])
    torchvision = import_torchvision()
    if spec["library"] == "timm":
        import timm

        return timm.create_model("densenet201", pretrained=False, num_classes=4)
    return torchvision.models.densenet201(weights=None, num_classes=4)


def fine_tune(spec: Spec) -> Result:
    """Steps of AdamW on all kernels: from the start of the process to the first, and each; BatchNorm rests, as ours."""
    import torch

    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(spec).to(device)
    layout = torch.channels_last if spec.get("channels_last") else torch.contiguous_format
    model = model.to(memory_format=layout)
    if spec.get("batch_norm", "rest") == "rest":
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, spec.get("learning_rate", 1e-5), weight_decay=1e-4)
    loss_of = torch.nn.CrossEntropyLoss()
    step_model = torch.compile(model) if spec.get("compile") else model
    size, batch = spec["size_px"], spec["batch_size"]
    images = torch.rand(batch, 3, size, size).to(device).to(memory_format=layout)
    labels = torch.randint(0, 4, (batch,)).to(device)
    ends = []
    started = time.monotonic()
    for _ in range(spec["steps"]):
        with torch.autocast(device, torch.bfloat16, enabled=spec.get("precision") == "bfloat16"):
            loss = loss_of(step_model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        ends.append(time.monotonic())
    steps = [b - a for a, b in pairwise(ends)]
    return {
        "start_to_first_step": ends[0] - spec["started"],
        "call_to_first_step": ends[0] - started,
        "steps": steps,
        "version": torch.__version__,
    }


if __name__ == "__main__":
    trial.main({"fine_tune": fine_tune})
