"""Capture: the attention of a model becomes graphs, one for each distinct structure.

No model is patched and none is known by name. transformers looks up three things by hooks, and
capture puts its own there: the attention function and the mask function (by the name HOOK) and the
layer of the cache (a subclass of the library's that overrides only `update`). Each becomes one
custom op in the torch.export program of the attention module, and raise_fx raises that.
"""

import copy
import functools
import hashlib
import inspect
import json
import linecache
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..ir.errors import KvantError
from ..ir.graph import Graph
from ..ir.text import print_graph
from ..ir.types import TensorType
from .bind import ModelSource, attention_modules
from .extras import need
from .raise_fx import Site, raise_program

HOOK = "kvant-capture"


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer.

    Attributes:
        index: its number, as the cache counts layers.
        structure: index of its graph in the model.
        prefix: of its parameters' names, such as "model.layers.0.self_attn.".
    """

    index: int
    structure: int
    prefix: str


@dataclass(frozen=True, slots=True)
class Model:
    """A captured model: a graph for each distinct structure, and the layers that have it.

    Attributes:
        name: short, fit for a file name.
        architecture: class name in transformers.
        graphs: inputs x [B, T, C], cos and sin as the model's tables are; one output [B, T, C].
        layers: in order.
        facts: heads, kv_heads, head_dim, v_head_dim, hidden, layers, rope, max_tokens, model_type,
            dtype.
        fingerprint: sha256 over graphs, layers and facts; weights and source lines do not enter.
    """

    name: str
    architecture: str
    graphs: tuple[Graph, ...]
    layers: tuple[Layer, ...]
    facts: dict[str, Any]
    fingerprint: str


def capture(source: ModelSource) -> Model:
    """Return the graphs of a model's attention layers. Weights are not read.

    Raises: KvantError "no-attention", "export-failed", "unsupported-op", "unsupported-mask" or
        "unsupported-attention-argument"; the last three show the model's own source line.
    """
    module = source.structure()
    sites = attention_modules(module)
    if not sites:
        raise KvantError(
            "no-attention",
            f"{type(module).__name__} has no causal self-attention layer",
            where=source.name,
            fix="give a decoder-only language model with attention layers",
        )
    first: dict[tuple[Any, ...], int] = {}
    layers = []
    for prefix, attention in sites:
        structure = first.setdefault(_signature(attention), len(first))
        layers.append(Layer(attention.layer_idx, structure, prefix))
    graphs = []
    for structure in range(len(first)):
        at = next(i for i, layer in enumerate(layers) if layer.structure == structure)
        name = "attention" if len(first) == 1 else f"attention_{structure}"
        graphs.append(export_attention(sites[at][1], name, _table_width(module)))
    return _model(source, module, tuple(graphs), tuple(layers))


def _model(
    source: ModelSource, module: Any, graphs: tuple[Graph, ...], layers: tuple[Layer, ...]
) -> Model:
    facts = _facts(source.config, graphs, len(layers))
    architecture = type(module).__name__
    text = [architecture, json.dumps(facts, sort_keys=True)]  # without the dtype of the weights
    text += [print_graph(without_locations(graph)) for graph in graphs]
    text += [f"{layer.index} {layer.structure} {layer.prefix}" for layer in layers]
    fingerprint = hashlib.sha256("\n".join(text).encode()).hexdigest()
    facts |= {"dtype": source.dtype}
    return Model(source.name, architecture, graphs, layers, facts, fingerprint)


def without_locations(graph: Graph) -> Graph:
    """Return the graph without source lines, which differ between releases of transformers."""
    return replace(graph, ops=tuple(replace(op, loc=None) for op in graph.ops))


def _facts(config: Any, graphs: tuple[Graph, ...], layers: int) -> dict[str, Any]:
    (attend,) = graphs[0].find("attend")
    q, k, v = (arg.tensor.shape for arg in attend.args[:3])
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    return {
        "heads": q[1],
        "kv_heads": k[1],
        "head_dim": k[3],
        "v_head_dim": v[3],
        "hidden": text.hidden_size,
        "layers": layers,
        "rope": json.loads(json.dumps(rope, default=str)),
        "max_tokens": getattr(text, "max_position_embeddings", None),
        "model_type": text.model_type,
    }


def _signature(attention: Any) -> tuple[Any, ...]:
    """Return what two layers must share to share a graph."""
    params = tuple((n, tuple(p.shape), str(p.dtype)) for n, p in attention.named_parameters())
    scalars = tuple(
        (name, key, value)
        for name, part in attention.named_modules()
        for key, value in sorted(vars(part).items())
        if key != "layer_idx" and isinstance(value, int | float | str | tuple | None)
    )
    return (type(attention).__qualname__, params, scalars)


def _table_width(module: Any) -> int:
    """Return the width of the tables that a model's rotary embedding gives; 2 if it has none.

    A copy without memory is asked: what such a module learns of a long input stays as it is.

    Raises: KvantError ("unsupported-rope") if it gives something else.
    """
    torch = need("torch", "transformers")
    for part in module.modules():
        if any("inv_freq" in name for name, _ in part.named_buffers(recurse=False)):
            shape = (1, 2)
            x = torch.empty((*shape, module.config.get_text_config().hidden_size), device="meta")
            positions = torch.empty(shape, dtype=torch.long, device="meta")
            kinds = getattr(module.config.get_text_config(), "layer_types", None) or (None,)
            takes = inspect.signature(part.forward).parameters
            kind = {"layer_type": kinds[0]} if "layer_type" in takes else {}
            tables = copy.deepcopy(part).to("meta")(x, positions, **kind)
            if not isinstance(tables, tuple) or len(tables) != 2:
                raise _no_tables(part)
            return int(tables[0].shape[-1])
    return 2


def _no_tables(part: Any) -> KvantError:
    return KvantError(
        "unsupported-rope",
        f"{type(part).__name__} gives no cos and sin, which kvant needs",
        where=_source_of(part)[1],
        fix="leave this model out; kvant takes rotary embeddings in real numbers",
    )


def export_attention(attention: Any, name: str, table_width: int) -> Graph:
    """Export one attention module with symbolic B, T and S, and raise it. Takes about a second.

    Args:
        attention: a self-attention module of transformers, on any device, the meta device too.
        name: of the graph.
        table_width: entries of cos and sin for one position.
    """
    torch = need("torch", "transformers")
    hidden = attention.config.get_text_config().hidden_size
    like = next(attention.parameters())
    shapes = {
        "x": (2, 5, hidden),
        "cos": (2, 5, table_width),
        "sin": (2, 5, table_width),
        "history": (7,),
    }
    inputs = tuple(
        torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes.values()
    )
    b, t, s = (torch.export.Dim(n, min=2) for n in "BTS")
    dims = ({0: b, 1: t}, {0: b, 1: t}, {0: b, 1: t}, {0: s})
    types = {n: TensorType("f32", ("B", "T", shape[-1])) for n, shape in shapes.items()}
    del types["history"]
    site = Site(name, *_source_of(attention), inputs=types)
    with _hooked(attention):
        try:
            probe = _probe(attention)
            program = torch.export.export(probe, inputs, dynamic_shapes=dims, strict=False)
        except KvantError:
            raise
        except Exception as error:
            raise KvantError(
                "export-failed",
                f"torch.export of {type(attention).__name__} failed: {_first_line(error)}",
                where=_last_line(error, site),
                fix="this attention module does not take (hidden states, cos and sin, a cache) "
                "as other models do; leave this model out",
            ) from error
    return raise_program(program, site)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


def _last_line(error: Exception, site: Site) -> str:
    """Return the model's own line at which an exception passed, or its file."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{site.shown}:{f.lineno}: {f.line}" for f in frames if f.filename == site.file]
    return lines[-1] if lines else site.shown


def _source_of(attention: Any) -> tuple[str, str]:
    """Return the file of the module's forward, absolute and relative to its package."""
    forward = inspect.unwrap(type(attention).forward)
    return forward.__code__.co_filename, _relative(forward.__module__, forward.__code__)


def _relative(module: str, code: Any) -> str:
    last = code.co_filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "/".join((*module.split(".")[:-1], last))


def _probe(attention: Any) -> Any:
    """Return a module that calls the attention as its decoder layer does, on tensors alone."""
    need("torch", "transformers")
    import torch
    from transformers.cache_utils import Cache

    takes = inspect.signature(attention.forward).parameters
    traced = _cache_layer()

    class Probe(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Any, cos: Any, sin: Any, history: Any) -> Any:
            layer = traced()
            layer.history = history
            cache = Cache(layers=[layer] * (attention.layer_idx + 1))
            offered = {"position_embeddings": (cos, sin), "attention_mask": None}
            known = {name: given for name, given in offered.items() if name in takes}
            return self.attention(x, past_key_values=cache, **known)[0]

    return Probe()


@contextmanager
def _hooked(attention: Any) -> Iterator[None]:
    """Let the module look up our attention function, in inference mode, while the block runs."""
    _register()
    before = attention.config._attn_implementation
    training = [part for part in attention.modules() if part.training]
    attention.config._attn_implementation = HOOK
    attention.eval()
    try:
        yield
    finally:
        attention.config._attn_implementation = before
        for part in training:
            part.training = True


@functools.cache
def _cache_layer() -> Any:
    need("torch", "transformers")
    from transformers.cache_utils import DynamicLayer

    class TracedLayer(DynamicLayer):  # type: ignore[misc]
        """The library's own cache layer; what it stores becomes a node of the program."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            write = need("torch").ops.kvant.cache_write
            return write(key_states, self.history, "k"), write(value_states, self.history, "v")

    return TracedLayer


@functools.cache
def _register() -> None:
    """Register the two custom ops and the two hooks, once per process."""
    torch = need("torch", "transformers")
    from transformers import AttentionInterface, AttentionMaskInterface

    def traced_only(*args: Any) -> Any:
        raise NotImplementedError("this op exists while a model is captured, and is never run")

    def cache_shape(x: Any, history: Any, role: str) -> Any:
        b, h, t, d = x.shape
        return x.new_empty((b, h, history.shape[0] + t, d))

    def attend_shape(q: Any, k: Any, v: Any, sinks: Any, scale: Any, *options: Any) -> Any:
        return q.new_empty((*q.shape[:3], v.shape[3]))

    library = torch.library
    library.custom_op(
        "kvant::cache_write",
        traced_only,
        mutates_args=(),
        schema="(Tensor x, Tensor history, str role) -> Tensor",
    ).register_fake(cache_shape)
    library.custom_op(
        "kvant::attend",
        traced_only,
        mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, int? window, "
        "float? softcap) -> Tensor",
    ).register_fake(attend_shape)
    AttentionInterface.register(HOOK, attention_function)
    AttentionMaskInterface.register(HOOK, mask_function)


def attention_function(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Any = None,
    **other: Any,
) -> tuple[Any, None]:
    """Stand in for the model's attention while it is captured.

    Args:
        module: the attention module.
        query: [B, H_q, T, D].
        key: [B, H, S+T, D], as the cache gave it.
        value: [B, H, S+T, D_v].
        attention_mask: must be None: causality and window are attributes.
        scaling: factor of the logits; D ** -0.5 if None.
        dropout: must be 0.
        sliding_window: number of newest tokens that a query sees.
        softcap: cap * tanh(logit / cap).
        is_causal: the module's own `is_causal` if None; must be true.
        s_aux: learned sink of each query head, [H_q].
        other: must be None each. The whitelist is the signature: a keyword that is not understood
            would be a silently wrong model.
    """
    if attention_mask is not None:
        _refuse("unsupported-mask", "gives its attention a mask tensor")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    wrong = [f"{name}=..." for name, given in other.items() if given is not None]
    wrong += [f"dropout={dropout}"] if dropout else []
    wrong += [] if causal else ["is_causal=False"]
    if wrong:
        _refuse("unsupported-attention-argument", f"calls its attention with {', '.join(wrong)}")
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    cap = None if softcap is None else float(softcap)
    torch = need("torch")
    out = torch.ops.kvant.attend(query, key, value, s_aux, scale, sliding_window, cap)
    return out.transpose(1, 2).contiguous(), None


def mask_function(*args: Any, attention_mask: Any = None, **kwargs: Any) -> None:
    """Stand in for the model's mask while it is captured: causality needs none."""
    if attention_mask is not None:
        _refuse("unsupported-mask", "was given an attention mask")


def _refuse(code: str, does: str) -> None:
    """Raise KvantError that shows the model's line which called the function that called this."""
    frame = sys._getframe(2)
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    shown = _relative(frame.f_globals.get("__name__", ""), frame.f_code)
    raise KvantError(
        code,
        f"the model {does}, which kvant cannot compile yet",
        where=f"{shown}:{frame.f_lineno}: {text}",
        fix="use a model without it; kvant takes causal attention with scale, window, softcap",
    )
