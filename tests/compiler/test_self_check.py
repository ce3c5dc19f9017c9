"""The check of what was captured: all of the steps, small models, random weights."""

import pytest

from kvant.compiler.bind import open_model
from kvant.compiler.capture import capture
from kvant.compiler.self_check import STEPS, _shrunk, check_capture, randomize, self_check
from kvant.ir.errors import KvantError

from .conftest import MakeModel
from .test_capture import with_attr

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_check_capture_covers_history(make_model: MakeModel) -> None:
    """The second step alone must fail when the cache is read wrongly; so it is compared."""
    module = make_model("mistral")
    wrong = with_attr(capture(open_model(module)), "attend", "window", STEPS[0])
    with pytest.raises(KvantError, match="step 0"):
        check_capture(module, wrong)
    wide = make_model("mistral", sliding_window=STEPS[0])
    unwindowed = with_attr(capture(open_model(wide)), "attend", "window", None)
    with pytest.raises(KvantError, match="step 1"):
        check_capture(wide, unwindowed)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "smollm3", "gpt-oss"])
def test_self_check_on_a_shrunk_config(family: str, make_model: MakeModel) -> None:
    """The other families are checked so whenever they are compiled."""
    source = open_model(make_model(family, vocab_size=128))
    model = capture(source)
    assert self_check(source, model) <= 2e-6
    with pytest.raises(KvantError, match=r"gives other graphs\n"):
        self_check(source, with_attr(model, "attend", "scale", 0.77))


@pytest.mark.parametrize("name", ["Qwen3MoeConfig", "MixtralConfig", "GptOssConfig"])
def test_the_shrunk_model_has_no_more_experts_than_a_token_needs(name: str) -> None:
    """The self-check of a model of 30 billion parameters must fit a laptop."""
    import transformers

    real = getattr(transformers, name)()
    with torch.device("meta"):
        small = transformers.AutoModelForCausalLM.from_config(_shrunk(real, 1))
    assert sum(p.numel() for p in small.parameters()) < 60e6
    attention = small.model.layers[0].self_attn
    assert attention.q_proj.weight.shape[1] == real.hidden_size


def test_randomize_hides_nothing(make_model: MakeModel) -> None:
    module = make_model("qwen2")
    bias = module.model.layers[0].self_attn.q_proj.bias
    assert float(bias.detach().abs().min()) > 0
    randomize(module, seed=3)
    first = bias.detach().clone()
    randomize(module, seed=3)
    assert torch.equal(first, bias)
