"""Page bytes: vectors by hand, round trips of every format, partial writes, refusals."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.ir.arrangements import CHANNEL_QUADS, KINDS, TOKEN_QUADS, holds
from kvant.ir.encodings import Bfp, Int, Lut, Raw
from kvant.ir.encodings.lut import LLOYD
from kvant.ir.errors import KvantError
from kvant.ir.layouts import PageLayout, page_tokens
from kvant.ir.planes import pack_plane, unpack_plane


def fields_of(layout, rng):
    """Random fields of a whole page; not what any encoder would give, but of the right types."""
    x = rng.standard_normal((layout.heads, layout.tokens, layout.channels))
    fields = layout.format.encode(x)
    for name, array in fields.items():
        raw = rng.integers(0, 256, (*array.shape, array.itemsize), dtype=np.uint8)
        bits = getattr(layout.format, "bits", getattr(layout.format, "mantissa", 8))
        top = np.uint8(2**bits - 1)
        fields[name] = (raw[..., 0] & top) if name == "codes" else raw.view(array.dtype)[..., 0]
    return fields


def same_bits(a, b):
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


# Vectors by hand


def test_four_bits_split_the_channels_in_halves_low_first():
    layout = PageLayout(64, 1, 4, Int(4, "token", 4))
    fields = fields_of(layout, np.random.default_rng(0))
    fields["codes"][0, 0] = [0x1, 0x2, 0xA, 0xB]
    assert layout.pack(fields)[:2].tolist() == [0xA1, 0xB2]


def test_two_bits_split_the_channels_in_quarters_low_first():
    layout = PageLayout(64, 1, 8, Int(2, "token", 8))
    fields = fields_of(layout, np.random.default_rng(0))
    fields["codes"][0, 1] = [3, 0, 2, 0, 1, 0, 0, 2]
    # byte 0: channels 0, 2, 4, 6 = 3, 2, 1, 0; byte 1: channels 1, 3, 5, 7 = 0, 0, 0, 2
    assert layout.pack(fields)[2:4].tolist() == [0b00_01_10_11, 0b10_00_00_00]


def test_three_bits_are_two_low_bits_and_a_plane_of_high_bits():
    layout = PageLayout(64, 1, 8, Int(3, "token", 8))
    fields = fields_of(layout, np.random.default_rng(0))
    fields["codes"][0, 0] = [7, 0, 4, 1, 2, 3, 5, 6]
    page = layout.pack(fields)
    names = [(f.name, f.offset, f.shape) for f in layout.fields]
    assert names[:2] == [("codes", 0, (64, 2)), ("high", 128, (64, 1))]
    # low bits 3 0 0 1 2 3 1 2; byte 0: channels 0, 2, 4, 6 = 3, 0, 2, 1; byte 1: 0, 1, 3, 2
    assert page[:2].tolist() == [0b01_10_00_11, 0b10_11_01_00]
    # high bits 1 0 1 0 0 0 1 1, channel i at bit i
    assert page[128] == 0b11000101


def test_three_bits_of_16_channels_put_channel_j_plus_2i_at_bit_i_of_byte_j():
    layout = PageLayout(64, 1, 16, Int(3, "token", 8))
    fields = fields_of(layout, np.random.default_rng(0))
    fields["codes"][:] = 0
    fields["codes"][0, 0, 5] = 4  # 5 = 1 + 2 * 2
    high = layout.fields[1]
    assert layout.pack(fields)[high.offset : high.offset + 2].tolist() == [0, 1 << 2]


def test_eight_bits_and_raw_are_rows():
    layout = PageLayout(64, 1, 4, Int(8, "token", 4))
    fields = fields_of(layout, np.random.default_rng(0))
    assert layout.pack(fields)[:256].tolist() == fields["codes"].reshape(-1).tolist()
    layout = PageLayout(64, 1, 2, Raw("bf16"))
    page = layout.pack(layout.format.encode(np.full((1, 64, 2), 1.0)))
    assert page[:4].tolist() == [0x80, 0x3F, 0x80, 0x3F]


# Offsets


def test_fields_and_head_blocks_start_at_multiples_of_64_and_do_not_overlap():
    formats = (Int(3, "token", 8), Int(4, "channel", 32, "int", "bf16"), Bfp(4, 8), Raw("f16"))
    for fmt, channels in itertools.product(formats, (8, 24, 64)):
        layout = PageLayout(page_tokens(fmt), 3, channels, fmt)
        end = 0
        for field in layout.fields:
            assert field.offset % 64 == 0
            assert end <= field.offset < end + 64
            end = field.offset + field.nbytes
        assert end <= layout.head_bytes < end + 64
        assert layout.head_bytes % 64 == 0
        assert layout.page_bytes == 3 * layout.head_bytes


def test_the_fields_of_a_kivi_page():
    layout = PageLayout(64, 3, 64, Int(2, "channel", 32))
    assert [(f.name, f.dtype, f.shape, f.offset) for f in layout.fields] == [
        ("codes", "uint8", (64, 16), 0),
        ("scale", "float16", (2, 64), 1024),
        ("zero", "float16", (2, 64), 1280),
    ]
    assert (layout.head_bytes, layout.page_bytes) == (1536, 4608)


def test_the_fields_of_a_bfp_page():
    layout = PageLayout(64, 1, 128, Bfp(4, 64))
    assert [(f.name, f.dtype, f.shape, f.offset) for f in layout.fields] == [
        ("codes", "uint8", (64, 64), 0),
        ("exponent", "uint8", (64, 2), 4096),
    ]


def test_heads_lie_one_after_another():
    layout = PageLayout(64, 2, 4, Int(8, "token", 4, "none"))
    fields = fields_of(layout, np.random.default_rng(1))
    page = layout.pack(fields)
    second = page[layout.head_bytes : layout.head_bytes + 256]
    assert second.tolist() == fields["codes"][1].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("group", "tokens"), [(1, 64), (32, 64), (64, 64), (128, 128), (48, 192), (3, 192)]
)
def test_a_page_holds_whole_groups(group, tokens):
    assert page_tokens(Int(4, "channel", group)) == tokens


def test_a_group_of_channels_does_not_change_the_page():
    assert page_tokens(Int(4, "token", 48)) == page_tokens(Bfp(4, 48)) == 64


# Round trips


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_plane_gives_back_its_codes(bits, width, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, width * 8), dtype=np.uint8)
    packed = pack_plane(codes, bits)
    assert packed.shape == (3, width * bits)
    assert np.array_equal(unpack_plane(packed, bits), codes)


def test_channel_quads_hold_four_bytes_of_a_token_then_of_the_next():
    layout = PageLayout(32, 1, 16, Int(4, "token", 8), kind=CHANNEL_QUADS)
    codes = np.arange(32 * 16, dtype=np.uint8).reshape(1, 32, 16) % 16
    codes[0, 17, :8] = [1, 2, 3, 4, 5, 6, 7, 8]
    codes[0, 17, 8:] = 0
    scale = np.arange(64, dtype=np.float16).reshape(1, 32, 2)
    page = layout.pack({"codes": codes, "scale": scale, "zero": scale})
    # Tile 1 begins at 16 tokens of 8 bytes; quad 1 of a tile at 16 tokens of 4 bytes.
    assert page[128 + 4 : 128 + 8].tolist() == [1, 2, 3, 4]
    assert page[128 + 64 + 4 : 128 + 64 + 8].tolist() == [5, 6, 7, 8]
    stored = page[256 : 256 + 128].view(np.float16)
    assert stored.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]


def test_token_quads_hold_one_byte_of_four_tokens_then_the_next():
    layout = PageLayout(16, 1, 2, Int(8, "channel", 16), kind=TOKEN_QUADS)
    codes = np.arange(32, dtype=np.uint8).reshape(1, 16, 2)
    scale = np.ones((1, 1, 2), np.float16)
    page = layout.pack({"codes": codes, "scale": scale, "zero": scale})
    assert page[:16].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


@st.composite
def layouts(draw):
    """Every width of code x axis x group x odd multiples of what packs, in every arrangement."""
    kind = draw(st.sampled_from(["int", "bfp", "lut", "raw"]))
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    unit = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    if kind == "raw":
        fmt, unit = Raw(draw(st.sampled_from(["bf16", "f16", "f32"]))), 1
    elif kind == "bfp":
        fmt = Bfp(bits, draw(st.integers(1, 5)))
    elif kind == "lut" and bits < 8:
        fmt = Lut(bits, draw(st.integers(1, 5)), *LLOYD[bits])
    else:
        zero = draw(st.sampled_from(["none", "int", "float"]))
        axis = draw(st.sampled_from(["token", "channel"]))
        params = draw(st.sampled_from(["bf16", "f16", "f32"]))
        fmt = Int(bits, axis, draw(st.integers(1, 7)), zero, params)
    group = fmt.block if isinstance(fmt, Bfp) else getattr(fmt, "group_channels", 1)
    channels = int(np.lcm(unit, group)) * draw(st.integers(1, 3))
    tokens = fmt.group_tokens * draw(st.integers(1, 5))
    if draw(st.booleans()):
        tokens, channels = tokens * 16, channels * 4
    kinds = [kind for kind in KINDS if holds(kind, fmt, tokens, channels)]
    return PageLayout(tokens, draw(st.integers(1, 3)), channels, fmt, draw(st.sampled_from(kinds)))


@settings(max_examples=300, deadline=None)
@given(layouts(), st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack(layout, seed):
    fields = fields_of(layout, np.random.default_rng(seed))
    page = layout.pack(fields)
    assert (page.dtype, page.shape) == (np.uint8, (layout.page_bytes,))
    assert same_bits(layout.unpack(page), fields)


@settings(max_examples=150, deadline=None)
@given(layouts(), st.data())
def test_a_partial_write_changes_its_tokens_alone(layout, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    group = layout.format.group_tokens
    first = data.draw(st.integers(0, layout.tokens // group)) * group
    count = data.draw(st.integers(0, (layout.tokens - first) // group)) * group
    old, new = fields_of(layout, rng), fields_of(layout, rng)
    page = layout.pack(old)
    part = {}
    for name, array in new.items():
        per_row = layout.tokens // array.shape[1]
        part[name] = array[:, first // per_row : (first + count) // per_row]
        old[name][:, first // per_row : (first + count) // per_row] = part[name]
    layout.write(page, first, part)
    assert same_bits(layout.unpack(page), old)
    if count:
        assert same_bits(layout.read(page, first, count), part)


@settings(max_examples=100, deadline=None)
@given(layouts(), st.sampled_from(KINDS))
def test_an_arrangement_holds_the_same_fields(layout, kind):
    if not holds(kind, layout.format, layout.tokens, layout.channels):
        return
    fields = fields_of(layout, np.random.default_rng(0))
    page = layout.pack(fields)
    moved = layout.arranged(page, kind)
    assert same_bits(replace(layout, kind=kind).unpack(moved), fields)
    assert np.array_equal(replace(layout, kind=kind).arranged(moved, layout.kind), page)


def test_padding_is_zero_and_is_never_read():
    layout = PageLayout(3, 1, 3, Int(8, "token", 3, "none", "f32"))
    fields = fields_of(layout, np.random.default_rng(0))
    page = layout.pack(fields)
    used = np.zeros(layout.page_bytes, bool)
    for field in layout.fields:
        used[field.offset : field.offset + field.nbytes] = True
    assert not used.all()
    assert not page[~used].any()
    page[~used] = 255
    assert same_bits(layout.unpack(page), fields)


def test_many_pages_are_read_at_once():
    layout = PageLayout(64, 2, 8, Int(3, "token", 4))
    rng = np.random.default_rng(5)
    parts = [fields_of(layout, rng) for _ in range(3)]
    pages = np.stack([layout.pack(part) for part in parts])
    got = layout.unpack(pages)
    for i, part in enumerate(parts):
        assert same_bits({name: array[i] for name, array in got.items()}, part)


def test_what_is_read_is_a_copy():
    layout = PageLayout(64, 1, 4, Int(8, "token", 4))
    page = layout.pack(fields_of(layout, np.random.default_rng(0)))
    before = page.copy()
    for array in layout.unpack(page).values():
        array[...] = 1
    assert np.array_equal(page, before)


def test_encoded_values_survive_the_page():
    x = np.random.default_rng(6).standard_normal((2, 64, 32))
    for fmt in (Int(2, "channel", 32), Int(3, "token", 16, "int", "bf16"), Bfp(4, 16), Raw("bf16")):
        layout = PageLayout(64, 2, 32, fmt)
        fields = layout.unpack(layout.pack(fmt.encode(x)))
        assert np.array_equal(fmt.decode(fields), fmt.roundtrip(x)), fmt


# Refusals


def test_bits_without_a_layout_name_those_that_have_one():
    with pytest.raises(KvantError) as caught:
        PageLayout(64, 1, 64, Int(5, "token", 32))
    assert str(caught.value) == (
        "no page layout holds codes of 5 bits\n  where: page layout\n"
        "  fix: use one of: 2, 3, 4, 8 bits  [no-layout]"
    )


@pytest.mark.parametrize(
    "fmt", [Int(1, "token", 8), Int(6, "token", 8), Int(7, "token", 8), Bfp(5, 8)]
)
def test_other_widths_have_no_layout(fmt):
    with pytest.raises(KvantError) as caught:
        PageLayout(64, 1, 64, fmt)
    assert caught.value.code == "no-layout"


@pytest.mark.parametrize(("bits", "channels"), [(4, 5), (2, 6), (3, 12)])
def test_channels_that_do_not_fill_bytes_are_refused(bits, channels):
    with pytest.raises(KvantError) as caught:
        PageLayout(64, 1, channels, Int(bits, "channel", 64))
    assert caught.value.code == "channels-do-not-pack"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: PageLayout(64, 1, 64, Int(4, "token", 48)), "group-does-not-divide"),
        (lambda: PageLayout(64, 1, 64, Int(4, "channel", 48)), "group-does-not-divide"),
        (lambda: PageLayout(64, 1, 64, Raw("f32"), kind="columns"), "unknown-layout"),
        (lambda: PageLayout(64, 1, 64, Raw("f32"), kind=TOKEN_QUADS), "unknown-layout"),
        (lambda: PageLayout(60, 1, 64, Int(4, "token", 32), kind=TOKEN_QUADS), "unknown-layout"),
        (lambda: PageLayout(64, 1, 4, Int(4, "token", 2), kind=CHANNEL_QUADS), "unknown-layout"),
        (lambda: PageLayout(48, 1, 8, Int(4, "channel", 24), kind=CHANNEL_QUADS), "unknown-layout"),
        (lambda: PageLayout(64, 1, 64, Int(4, "channel", 1), kind=TOKEN_QUADS), "unknown-layout"),
        (lambda: PageLayout(0, 1, 64, Raw("f32")), "bad-encoding"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(make, code):
    with pytest.raises(KvantError) as caught:
        make()
    assert caught.value.code == code


@pytest.mark.parametrize(("first", "count"), [(32, 64), (16, 32), (-32, 32), (64, 32), (0, 16)])
def test_tokens_outside_the_page_or_inside_a_group_are_refused(first, count):
    layout = PageLayout(64, 1, 4, Int(8, "channel", 32))
    page = np.zeros(layout.page_bytes, np.uint8)
    with pytest.raises(KvantError) as caught:
        layout.read(page, first, count)
    assert caught.value.code == "page-range"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.pop("zero"),
        lambda f: f.update(scale=f["scale"][:, :1]),
        lambda f: f.update(codes=f["codes"][:, :, :2]),
    ],
)
def test_fields_that_are_not_the_formats_are_refused(spoil):
    layout = PageLayout(64, 1, 4, Int(8, "token", 2))
    fields = fields_of(layout, np.random.default_rng(0))
    spoil(fields)
    with pytest.raises(KvantError) as caught:
        layout.pack(fields)
    assert caught.value.code == "field-shape"


def test_a_page_of_another_size_is_refused():
    layout = PageLayout(64, 1, 4, Int(8, "token", 2))
    with pytest.raises(KvantError) as caught:
        layout.unpack(np.zeros(layout.page_bytes - 1, np.uint8))
    assert caught.value.code == "field-shape"
