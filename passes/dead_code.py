"""Drop what nobody uses.

    %a = op %x; return %b   ->   return %b

An op without effect on the outputs is not computed. Inputs stay: they are the signature of the
graph. A cache that is written and never read is dead as well. Source: none.
"""

from ..ir import rewrite
from ..ir.graph import Graph


def dead_code(graph: Graph) -> Graph:
    """Drop ops and parameters that no output depends on; inputs stay.

    Returns: the new graph; `graph` itself if nothing is dead.
    """
    return rewrite.dead_code(graph)
