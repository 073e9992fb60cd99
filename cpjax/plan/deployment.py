"""What a MindIE config says of the model, the device and the sizes."""

from pathlib import Path
from typing import Literal

from cpjax.deepseek.config import KNOWN, read_config
from cpjax.errors import InputError
from cpjax.mindie.check import setting_of
from cpjax.mindie.crosscheck import accepted
from cpjax.mindie.deployment import Deployment
from cpjax.mindie.hardware import HARDWARE, parse_hardware
from cpjax.mindie.models import quantisation
from cpjax.plan.hardware import Device, device_of
from cpjax.plan.model import ModelShape, model_of, shape_of
from cpjax.plan.setting import Setting

BITS: dict[str, Literal[4, 8, 16]] = {"W8A8": 8, "W4A8": 4}


def model_said(text: str) -> ModelShape:
    """A model by its name, or by the config.json (or folder) of a DeepSeek checkpoint, of 16-bit weights.

    Raises:
      InputError: neither.
    """
    path = Path(text)
    return shape_of(read_config(path), 16) if path.exists() else model_of(text)


def from_config(path: Path, known: dict[str, Device], device: str | None) -> tuple[Setting, list[str]]:
    """The setting of a deployment, gather as MindIE has it, and remarks on what was taken where the file says nothing.

    Raises:
      InputError: what `cpjax mindie check` refuses, a model that is not known, sizes that are not modelled.
    """
    deployment = accepted(path)
    sizes = deployment.sizes
    for field, why in (("dp", "whose groups share experts"), ("pp", "whose stages wait for each other")):
        if getattr(sizes, field) > 1:
            raise InputError(
                f"{path}: {field} is {getattr(sizes, field)}, {why}: that is not modelled; give --model, --device, --cp"
            )
    shape, remarks = _shape(deployment)
    remarks = [*deployment.warnings, *remarks]
    if device is None:
        cards = -(-deployment.world_size // deployment.nodes)
        device = "800i-a3" if cards > HARDWARE["800i-a2"] else "800i-a2"
        remarks.append(f"the config names no device: {device} was taken for {cards} cards a node; --device names it")
    setting = Setting(
        shape, device_of(_spelt(device), known), sizes.cp, sizes.tp, moe_ep=sizes.moe_ep, moe_tp=sizes.moe_tp,
        sp=1 if sizes.sp < 1 else sizes.sp, exchange="gather",
    )  # fmt: skip
    return setting, remarks


def _spelt(device: str) -> str:
    found = parse_hardware(device)
    return found if found in HARDWARE else device


def _shape(deployment: Deployment) -> tuple[ModelShape, list[str]]:
    setting = setting_of(deployment)
    name = (setting.identity.models or ("",))[0]
    if name not in KNOWN:
        raise InputError(
            f"{deployment.path}: {setting.identity.name} is none of {', '.join(KNOWN)}; give --model and --device, "
            "and leave CONFIG out"
        )
    said = quantisation(deployment.model_name)
    bits = BITS.get(said or "", 16)
    remark = f"weights of {bits} bits, as {said} in its name says" if said in BITS else "weights of 16 bits were taken"
    return shape_of(KNOWN[name], bits), [] if said in BITS else [remark]
