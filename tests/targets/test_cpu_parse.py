"""Our reading of a kernel's text against TVM's own."""

import pytest
import tvm
from tvm.script import from_source, tirx

from kvant.targets.cpu import emit, this_cpu
from kvant.targets.cpu_parse import parse
from kvant.targets.machines import CPUS

from .cpu_cases import PLANS

SOURCES = [
    kernel.source()
    for name, cpu in (("kivi-2bit-int", this_cpu()), ("dense-sparse", CPUS["neoverse-v2"]))
    for kernel in emit(PLANS[name], cpu).kernels
]


@pytest.mark.parametrize("text", SOURCES)
def test_a_text_means_what_tvm_reads(text: str) -> None:
    ours, theirs = parse(text), from_source(text, {"T": tirx})
    tvm.ir.assert_structural_equal(ours, theirs)
    assert ours.script() == theirs.script()


def test_another_text_is_another_function() -> None:
    text = next(text for text in SOURCES if " - 1)" in text)
    other = from_source(text.replace(" - 1)", " - 2)"), {"T": tirx})
    with pytest.raises(ValueError, match="StructuralEqual"):
        tvm.ir.assert_structural_equal(parse(text), other)


def test_an_unknown_name_is_refused() -> None:
    text = next(text for text in SOURCES if "T.max(" in text)
    with pytest.raises(Exception, match="most"):
        parse(text.replace("T.max(", "most("))
