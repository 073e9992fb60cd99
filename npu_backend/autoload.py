"""The first import of torch, without torch importing torch_npu on its own.

Since 2.5 `import torch` imports every installed device package, and fails as a whole when one of them fails; so a
torch_npu without CANN beside it would make torch unusable. `vendor.py` imports torch_npu itself, where a failure can
be told from an absence. The variable is put back, because it is the user's and is inherited by their processes.
"""

import os

_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def _import_torch() -> None:
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "0"
    try:
        import torch  # noqa: F401
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


_import_torch()
