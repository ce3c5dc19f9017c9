"""The recipes that kvant ships, as far as a shape without weights can hold them.

What a rewrite takes from a model (an order of the channels, scales folded into weights) is left
out: it changes which numbers are stored, and neither their encoding nor the loops over them.
"""

from pathlib import Path
from typing import Any

from kvant.compiler import recipe as recipes
from kvant.passes import PASSES

AT = "@"  # "int4-token@x86-64-v3": kernels for another processor than this one


def names() -> list[str]:
    """Return all recipes."""
    return list(recipes.names())


def for_shape(name: str) -> recipes.Recipe:
    """Return a recipe without the rewrites that need a model."""
    recipe, _ = recipes.load(name)
    return recipe.model_copy(update={"rewrite": tuple(r for r in recipe.rewrite if _free(r))})


def left_out(name: str) -> list[str]:
    """Return the passes that `for_shape` leaves out."""
    return [r.name for r in recipes.load(name)[0].rewrite if not _free(r)]


def compiled(root: Path, name: str, shape: Any) -> Path:
    """Return the folder of an artifact, compiled at the first call.

    Args:
        root: folder of artifacts.
        name: of a recipe, with the processor behind an @ if it is not this one.
        shape: heads, KV heads, channels.
    """
    import kvant

    folder = root / f"{name}-{'x'.join(map(str, shape))}.kvant"
    if not folder.exists():
        recipe, _, cpu = name.partition(AT)
        target = f"cpu:{cpu}" if cpu else "cpu"
        kvant.compile(kvant.Shape(*shape), for_shape(recipe), [target], out=folder)
    return folder


def _free(rewrite: recipes.Rewrite) -> bool:
    return PASSES[rewrite.name].constants is None
