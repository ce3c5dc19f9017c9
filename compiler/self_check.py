"""Self-check of capture: the interpreter on the graphs against the torch model, in numbers.

The torch side is stock transformers: its own masks, eager attention and cache, none of our hooks. A
prompt runs, then a second step that reads history; what goes into each attention module and what
comes out of it is recorded, and each layer's graph must give the same. So a wrong head map, RoPE
pairing, scale, window or a lost bias cannot hide.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import KvantError
from ..ir.evaluate import State, evaluate
from ..ir.graph import Graph
from .bind import ModelSource, attention_modules, open_model
from .capture import Model, capture, without_locations
from .extras import need

TOLERANCE = 2e-6  # of max |difference| / max |torch's output|, torch computing in fp32
STEPS = (11, 3)  # tokens of the prompt and of the step after it; more than SMALL_WINDOW
SMALL_WINDOW = 6

# How configurations name the number of experts; a token needs num_experts_per_tok of them.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call of an attention module took and gave."""

    inputs: dict[str, Array]
    output: Array


def self_check(source: ModelSource, model: Model, tolerance: float = TOLERANCE) -> float:
    """Check a captured model on a small one of the same attention, with random weights.

    The small model keeps the attention as it is and shrinks the rest: vocabulary, MLP, experts,
    layers, window. Its graphs must be the captured ones, but for the window, and pass
    check_capture.

    Returns: the largest relative error.
    Raises: KvantError ("capture-mismatch").
    """
    torch = need("torch", "transformers")
    from transformers import AutoModelForCausalLM

    count = 1 + max(
        min(i for i, layer in enumerate(model.layers) if layer.structure == structure)
        for structure in range(len(model.graphs))
    )
    config = _shrunk(source.config, model.layers[count - 1].index + 1)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(module)
    small = capture(open_model(module))
    same = [_comparable(graph) for graph in model.graphs]
    if [_comparable(graph) for graph in small.graphs] != same:
        raise _mismatch(model, "a smaller model of the same attention gives other graphs")
    return check_capture(module, small, tolerance=tolerance)


def check_capture(
    module: Any, model: Model, *, layers: Iterable[int] | None = None, tolerance: float = TOLERANCE
) -> float:
    """Compare the graphs of a captured model with the torch model that they were captured from.

    Args:
        module: transformers model in fp32 on the CPU; it is not changed.
        model: its capture.
        layers: positions in `model.layers` to compare; all if None.
        tolerance: the largest |difference| allowed, relative to the largest |output| of torch.

    Returns: the largest relative error.
    Raises: KvantError ("capture-mismatch") that names the first layer and step that differ.
    """
    wanted = tuple(range(len(model.layers)) if layers is None else layers)
    parts = dict(attention_modules(module))
    names = [model.layers[i].prefix for i in wanted]
    recorded = _record(module, {name: parts[name] for name in names})
    worst = 0.0
    for i, name in zip(wanted, names, strict=True):
        params = {n: _array(p) for n, p in parts[name].named_parameters()}
        graph = model.graphs[model.layers[i].structure]
        for step, error in enumerate(_errors(graph, params, recorded[name])):
            if not error <= tolerance:
                raise _mismatch(
                    model,
                    f"layer {i}, step {step}: the graph differs from torch by {error:.1e} "
                    f"relative, more than {tolerance:.0e}",
                )
            worst = max(worst, error)
    return worst


def _errors(graph: Graph, params: dict[str, Array], calls: list[_Call]) -> Iterator[float]:
    state: State | None = None
    for call in calls:
        inputs = {name: call.inputs[name] for name in graph.inputs()}
        (made,), state = evaluate(graph, inputs, params, state)
        yield float(np.max(np.abs(made - call.output)) / np.max(np.abs(call.output)))


def randomize(module: Any, seed: int = 0) -> None:
    """Give every parameter random values: a bias of zero or a norm of one would hide mistakes."""
    torch = need("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise / param.shape[-1] ** 0.5 if param.dim() > 1 else 1 + 0.3 * noise)


def _record(module: Any, parts: dict[str, Any]) -> dict[str, list[_Call]]:
    """Run a prompt and a second step of random tokens; return the calls of each part."""
    torch = need("torch", "transformers")
    from transformers import DynamicCache

    calls: dict[str, list[_Call]] = {name: [] for name in parts}

    def hook(name: str) -> Any:
        def keep(part: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            found = {"x": _array(x)}
            tables = kwargs.get("position_embeddings") or ()
            for key, table in zip(("cos", "sin"), tables, strict=bool(tables)):
                found[key] = np.broadcast_to(_array(table), (x.shape[0], *table.shape[1:]))
            calls[name].append(_Call(found, _array(output[0])))

        return keep

    hooks = [p.register_forward_hook(hook(n), with_kwargs=True) for n, p in parts.items()]
    config = module.config.get_text_config()
    generator = torch.Generator().manual_seed(1)
    shape = (2, sum(STEPS))
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    cache = DynamicCache(config=config)
    try:
        with torch.inference_mode(), _eager(module):
            for part in tokens.split(STEPS, dim=1):
                module(input_ids=part, past_key_values=cache, use_cache=True)
    finally:
        for handle in hooks:
            handle.remove()
    return calls


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """Use transformers' plain attention while the block runs."""
    configs = {id(p.config): p.config for p in module.modules() if hasattr(p, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _shrunk(config: Any, layers: int) -> Any:
    """Return a config with the same attention and little else."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    wanted = {
        "num_hidden_layers": layers,
        "vocab_size": 64,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **dict.fromkeys(_EXPERTS, max(2, getattr(text, "num_experts_per_tok", None) or 0)),
        "sliding_window": SMALL_WINDOW,
        "layer_types": list(getattr(text, "layer_types", None) or ())[:layers],
    }
    for name, size in wanted.items():
        if getattr(text, name, None):
            setattr(text, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return small


def _comparable(graph: Graph) -> Graph:
    """Return the graph without source lines, and with any window set to the small one."""
    plain = without_locations(graph)
    return replace(
        plain,
        ops=tuple(
            replace(
                op,
                attrs=tuple(
                    (key, SMALL_WINDOW if key == "window" and value else value)
                    for key, value in op.attrs
                ),
            )
            for op in plain.ops
        ),
    )


def _array(tensor: Any) -> Array:
    made: Array = tensor.detach().cpu().double().numpy()
    return made


def _mismatch(model: Model, what: str) -> KvantError:
    return KvantError(
        "capture-mismatch",
        what,
        where=f"{model.architecture} in kvant/compiler/raise_fx.py",
        fix="this is a mistake in kvant: please report it with the model's config.json",
    )
