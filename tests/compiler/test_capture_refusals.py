"""Every refusal of capture: one changed thing in a model, and the whole text of the error."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvant.compiler.bind import open_model
from kvant.compiler.capture import capture, mask_function
from kvant.ir.errors import KvantError

from ..families import REFUSED
from ..families import make_model as make_family
from .conftest import Captured, MakeModel

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers import Cache  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    apply_rotary_pos_emb,
)


class Changed(LlamaAttention):  # type: ignore[misc]
    """Llama's attention, with places where a subclass does something that capture must refuse."""

    keywords: ClassVar[dict[str, Any]] = {}
    mask: Any = None

    def forward(
        self,
        hidden_states: Any,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            proj(hidden_states).view(shape).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotated(q, k, *position_embeddings)
        k, v = self.stored(past_key_values, k, v)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out = attention(self, q, k, v, self.mask, scaling=self.scaling, **self.keywords)[0]
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(self.after(out)), None

    def rotated(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return apply_rotary_pos_emb(q, k, cos, sin)

    def stored(self, cache: Any, k: Any, v: Any) -> Any:
        return cache.update(k, v, self.layer_idx)

    def after(self, out: Any) -> Any:
        return out


class Gated(Changed):
    def after(self, out: Any) -> Any:
        return out * torch.sigmoid(out)


def rotated_by(turn: Callable[[Any], Any], swap: bool = False, axis: int = 1) -> type:
    """Return attention whose RoPE is x * cos + turn(x) * sin."""

    class Rotated(Changed):
        def rotated(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
            tables = (sin, cos) if swap else (cos, sin)
            a, b = (table.unsqueeze(axis) for table in tables)
            return q * a + turn(q) * b, k * a + turn(k) * b

    return Rotated


def turn_at(x: Any, cut: int) -> Any:
    return torch.cat((-x[..., cut:], x[..., :cut]), dim=-1)


class Unread(Changed):
    def stored(self, cache: Any, k: Any, v: Any) -> Any:
        super().stored(cache, k, v)
        return k, v


class Swapped(Changed):
    def stored(self, cache: Any, k: Any, v: Any) -> Any:
        return super().stored(cache, k, v)[::-1]


class WithSinks(Changed):
    @property
    def keywords(self) -> dict[str, Any]:  # type: ignore[override]
        return {"s_aux": torch.zeros(6, device=self.q_proj.weight.device)}


class WithBias(Changed):
    @property
    def keywords(self) -> dict[str, Any]:  # type: ignore[override]
        return {"position_bias": torch.zeros(6, device=self.q_proj.weight.device)}


class Masked(Changed):
    @property
    def mask(self) -> Any:
        return torch.zeros(1, device=self.q_proj.weight.device)


class Dropped(Changed):
    keywords: ClassVar[dict[str, Any]] = {"dropout": 0.25}


class TwoWay(Changed):
    keywords: ClassVar[dict[str, Any]] = {"is_causal": False}


class Harmless(Changed):
    keywords: ClassVar[dict[str, Any]] = {"softcap": 20.0, "position_ids": None}


CALL = "out = attention(self, q, k, v, self.mask, scaling=self.scaling, **self.keywords)[0]"
TAKEN = "use a model without it; kvant takes causal attention with scale, window, softcap"
WHY = "no such path\nand more"
RULE = "leave this model out, or add a rule to kvant/compiler/raise_fx.py"


def here(text: str) -> str:
    """Return how a line of this file is shown."""
    lines = Path(__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.strip() == text)
    return "/".join((*__name__.split(".")[:-1], Path(__file__).name)) + f":{number}: {text}"


def refused(make_model: MakeModel, kind: type) -> KvantError:
    """Capture a model whose attention is of `kind`; return the error."""
    module = make_model("llama")
    for layer in module.model.layers:
        layer.self_attn = kind(module.config, layer.self_attn.layer_idx)
    with pytest.raises(KvantError) as caught:
        capture(open_model(module))
    assert module.config._attn_implementation == "sdpa"
    return caught.value


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WithBias, "calls its attention with position_bias=..."),
        (Dropped, "calls its attention with dropout=0.25"),
        (TwoWay, "calls its attention with is_causal=False"),
    ],
)
def test_an_argument_of_the_attention_is_refused(
    kind: type, said: str, make_model: MakeModel
) -> None:
    error = refused(make_model, kind)
    assert str(error) == (
        f"the model {said}, which kvant cannot compile yet\n"
        f"  where: {here(CALL)}\n"
        f"  fix: {TAKEN}  [unsupported-attention-argument]"
    )


def test_a_mask_is_refused(make_model: MakeModel) -> None:
    assert str(refused(make_model, Masked)) == (
        "the model gives its attention a mask tensor, which kvant cannot compile yet\n"
        f"  where: {here(CALL)}\n"
        f"  fix: {TAKEN}  [unsupported-mask]"
    )
    assert mask_function() is None
    with pytest.raises(KvantError, match=r"was given an attention mask.*\n.*\n.*unsupported-mask"):
        mask_function(attention_mask=torch.ones(1, 4))


def test_an_unknown_op_is_refused(make_model: MakeModel) -> None:
    assert str(refused(make_model, Gated)) == (
        "aten.mul.Tensor(reshape, sigmoid) is not part of an attention that kvant knows\n"
        f"  where: {here('return self.o_proj(self.after(out)), None')}\n"
        f"  fix: {RULE}  [unsupported-op]"
    )


@pytest.mark.parametrize(
    "kind",
    [
        rotated_by(lambda x: turn_at(x, 4), swap=True),
        rotated_by(lambda x: turn_at(x, 2)),
        rotated_by(lambda x: torch.cat((-x[..., :4], x[..., 4:]), dim=-1)),
        rotated_by(lambda x: torch.cat((x[..., 4:], -x[..., :4]), dim=-1)),
        rotated_by(lambda x: torch.cat((-x[..., :4], x[..., :4]), dim=-1)),
        rotated_by(lambda x: -turn_at(x, 4)),
        rotated_by(lambda x: torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2)),
        rotated_by(lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2)),
        rotated_by(lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(-2)),
        rotated_by(lambda x: torch.stack((-x[..., ::2], x[..., ::2]), -1).flatten(-2)),
    ],
)
def test_another_rotation_is_refused(kind: type, make_model: MakeModel) -> None:
    error = refused(make_model, kind)
    assert error.code == "unsupported-op"
    assert error.what.startswith("aten.add.Tensor(mul, mul_1) is not")
    assert error.where == here("q, k = self.rotated(q, k, *position_embeddings)")


def in_halves(turn: Callable[..., tuple[Any, Any]]) -> type:
    """Return attention whose RoPE is cat(turn(low, high, cos, sin)) with tables by pair."""

    class Rotated(Changed):
        def rotated(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
            a, b = (table[..., :4].unsqueeze(1) for table in (cos, sin))
            return tuple(torch.cat(turn(*x.chunk(2, -1), a, b), -1) for x in (q, k))

    return Rotated


@pytest.mark.parametrize(
    "turn",
    [
        lambda x, y, c, s: (x * c + y * s, y * c - x * s),
        lambda x, y, c, s: (y * c + x * s, x * c - y * s),
        lambda x, y, c, s: (x * c - y * s, y * c - x * s),
        lambda x, y, c, s: (x * c - y * s, x * c + y * s),
        lambda x, y, c, s: (x * s - y * c, y * s + x * c),
        lambda x, y, c, s: (x * c, y * c),
    ],
)
def test_another_rotation_of_halves_is_refused(turn: Any, make_model: MakeModel) -> None:
    error = refused(make_model, in_halves(turn))
    assert error.code == "unsupported-op"
    assert error.what.startswith("aten.cat.default([")
    assert error.where == here("q, k = self.rotated(q, k, *position_embeddings)")


@pytest.mark.parametrize(
    "joined",
    [
        lambda turned, x: (turned, x[..., :4]),
        lambda turned, x: (x[..., 12:], turned),
        lambda turned, x: (turned, -x[..., 12:]),
        lambda turned, x: (turned, x[..., 12:].flip(-1)),
        lambda turned, x: (turned + turned, x[..., 12:]),
    ],
)
def test_another_partial_rotation_is_refused(joined: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.phi3 import modeling_phi3

    def rotated(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        turned = [x[..., :12] * c + turn_at(x[..., :12], 6) * s for x in (q, k)]
        return tuple(torch.cat(joined(t, x), -1) for t, x in zip(turned, (q, k), strict=True))

    monkeypatch.setattr(modeling_phi3, "apply_rotary_pos_emb", rotated)
    error = refused_family("phi4-mini")
    assert error.code == "unsupported-op"
    assert "apply_rotary_pos_emb(" in error.where


def test_the_same_rotation_in_other_words_is_taken(
    make_model: MakeModel, captured: Captured
) -> None:
    kind = rotated_by(lambda x: turn_at(x, 4))
    module = make_model("llama")
    for layer in module.model.layers:
        layer.self_attn = kind(module.config, layer.self_attn.layer_idx)
    assert capture(open_model(module)).graphs == captured("llama")[1].graphs


def test_keys_must_come_from_the_cache(make_model: MakeModel) -> None:
    assert str(refused(make_model, Unread)) == (
        "aten.add.Tensor(mul_2, mul_3) is attended to as k, but the cache did not return "
        f"it as k\n  where: {here('q, k = self.rotated(q, k, *position_embeddings)')}\n"
        f"  fix: {RULE}  [unsupported-op]"
    )
    assert "attended to as k, but the cache did not" in str(refused(make_model, Swapped))


def test_an_understood_keyword_is_taken(make_model: MakeModel) -> None:
    module = make_model("llama")
    for layer in module.model.layers:
        layer.self_attn = Harmless(module.config, layer.self_attn.layer_idx)
    model = capture(open_model(module))
    assert model.graphs[0].find("attend")[0].attr("softcap") == 20.0


def test_sinks_must_be_a_parameter(make_model: MakeModel) -> None:
    error = refused(make_model, WithSinks)
    assert error.code == "unsupported-op"
    assert error.what.endswith(" stands where a parameter of the module is expected")
    assert error.where == here(CALL)


def refused_family(name: str) -> KvantError:
    with pytest.raises(KvantError) as caught:
        capture(open_model(make_family(name)))
    return caught.value


def test_latent_attention_is_refused_with_its_reason() -> None:
    error = refused_family("deepseek-v3")
    assert re.fullmatch(
        r"aten\.\w+\.default\(.*\) is attended to as k, but made of what the cache holds: "
        r"attention over a latent \(MLA\) is not built",
        error.what,
    )
    assert error.code == "unsupported-op"
    assert re.fullmatch(
        r"transformers/models/deepseek_v3/modeling_deepseek_v3.py:\d+: "
        r"key_states, value_states = self.expand_kv\(kv_nope, k_rot\)",
        error.where,
    )
    assert error.fix == RULE


def test_complex_rotary_tables_are_refused() -> None:
    assert str(refused_family("llama4")) == (
        "Llama4TextRotaryEmbedding gives no cos and sin, which kvant needs\n"
        "  where: transformers/models/llama4/modeling_llama4.py\n"
        "  fix: leave this model out; kvant takes rotary embeddings in real numbers"
        "  [unsupported-rope]"
    )


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "llama4"])
def test_real_models_that_kvant_does_not_take_say_where(name: str) -> None:
    error = refused_family(name)
    kind = make_family(name).config.model_type
    shown = f"transformers/models/{kind}/modeling_{kind}.py:"
    # What capture meets stands in the source; what cannot be rewritten is a module of the model.
    assert error.where.startswith(shown) or error.code == "unsupported-projection"


def test_a_module_that_cannot_be_exported_is_one_error(make_model: MakeModel) -> None:
    class Other(Changed):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            raise ValueError(WHY)

    assert str(refused(make_model, Other)) == (
        "torch.export of Other failed: ValueError: no such path\n"
        f"  where: {here('raise ValueError(WHY)')}\n"
        "  fix: this attention module does not take (hidden states, cos and sin, a cache) as other "
        "models do; leave this model out  [export-failed]"
    )


def test_a_model_without_attention_is_refused() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=16, state_size=4)
    module = AutoModelForCausalLM.from_config(config)
    with pytest.raises(KvantError) as caught:
        capture(open_model(module))
    assert str(caught.value) == (
        "MambaForCausalLM has no causal self-attention layer\n"
        "  where: MambaForCausalLM\n"
        "  fix: give a decoder-only language model with attention layers  [no-attention]"
    )
