"""What serves an artifact: loads and runs without any compiler.

artifact      artifact folder manifest plan_file constants strict_json publish target machine
cache         cache stream pages columns queries rollback state_file memory tensors
kernels       launch_reference launch_cpu launch_gpu cuda arguments verify
transformers  huggingface model_call model_checks model_edits model_mask
"""

from typing import TYPE_CHECKING, Any

__all__ = ["load"]

if TYPE_CHECKING:
    from .artifact import load


def __getattr__(name: str) -> Any:
    """Import the reader on first use, so that importing this package costs next to nothing."""
    if name != "load":
        raise AttributeError(f"module 'kvant.runtime' has no attribute {name!r}")
    from .artifact import load

    return load
