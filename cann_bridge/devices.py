"""Which device the bridge computes on, in which dtypes, and why it cannot: the rules in one place."""

import importlib
import importlib.util
import os
import threading
from types import ModuleType

_imported: list[ModuleType] = []
_lock = threading.Lock()


def import_torch() -> ModuleType:
    """PyTorch without the backends that load themselves: a torch_npu without CANN would make the import fail."""
    if _imported:
        return _imported[0]
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    with _lock:
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            _imported.append(importlib.import_module("torch"))
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})
    return _imported[0]


def unavailable() -> str | None:
    """Why there is no NPU to compute on, with what to do about it, or None."""
    for name in ("torch_npu", "torch"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install torch_npu==2.13.0"
    torch = import_torch()
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"torch_npu cannot load CANN ({reason}): install the CANN toolkit and source its set_env.sh"
    if not torch.npu.is_available():
        return "torch_npu and CANN are installed but find no Ascend device: check that npu-smi info lists one"
    return None


def device(name: str = "npu"):
    """The torch.device of that name: an NPU, or `cpu` for comparisons without one."""
    return import_torch().device(name)


def weight_dtype(stored: str, device):
    """The torch dtype in which a matrix stored so is held and multiplied on that device.

    An NPU takes 16-bit and low-bit matrices in float16: not every chip has bfloat16, and no NPU product takes rows of
    integers with a scale each. A CPU takes floats as they are, and low-bit ones in float32.
    """
    torch = import_torch()
    if stored == "float32":
        return torch.float32
    if device.type != "cpu":
        return torch.float16
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(stored, torch.float32)


def predictor_dtype(device):
    """The torch dtype of a predictor's factors on that device."""
    torch = import_torch()
    return torch.float32 if device.type == "cpu" else torch.float16
