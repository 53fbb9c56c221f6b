import pytest
import torch
from books import layer_book, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_commvq import UnsupportedModelError
from transformers_commvq.ops import decode
from transformers_commvq.positions import PositionTrack
from transformers_commvq.rope import LAYOUTS, Rope, angles


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from([(16, 16), (16, 8), (24, 4)]),
    st.lists(st.integers(0, 200_000), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_codebook_commutes_with_rope(layout, dims, positions, seed):
    """Rotating the decoded key, decoding with rotated codebook, rotating the query back: the same scores."""
    dim, rotary = dims
    rope = Rope(layout, rotary)
    book = layer_book((16, 40), (8, 8), dim, seed % 1000).keys
    codes = random_codes(book, 1, len(positions), seed)
    cos, sin = angles(torch.tensor(positions), 1e4 ** (-torch.arange(rope.pairs) / rope.pairs))
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, len(positions), dim, generator=g)
    keys = decode(codes, book)
    rotated_key = (query * rope.rotate(keys, cos, sin)).sum(-1)
    rotated_query = (rope.pull_back(query, cos, sin) * keys).sum(-1)
    rotated_books = []
    for t in range(len(positions)):
        turned = type(book)(
            book.layout,
            rope.rotate(book.vectors.float(), cos[t], sin[t]),
            rope.rotate(book.mean, cos[t], sin[t]),
        )
        rotated_books.append((query[:, :, t] * decode(codes[:, t : t + 1], turned)[:, :, 0]).sum(-1))
    scale = keys.norm(dim=-1) * query.norm(dim=-1)
    for other in (rotated_query, torch.stack(rotated_books, -1)):
        assert ((rotated_key - other).abs() / scale).max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaling", [1.0, 1.37])
def test_unrotate_inverts_rotate(layout, scaling):
    rope = Rope(layout, 8)
    x = torch.randn(2, 3, 5, 12)
    cos, sin = angles(torch.arange(5) * 1000, torch.tensor([1.0, 0.1, 0.01, 0.001]), scaling)
    torch.testing.assert_close(rope.unrotate(rope.rotate(x, cos, sin), cos, sin), x, atol=1e-5, rtol=1e-5)
    assert torch.equal(rope.rotate(x, cos, sin)[..., 8:], x[..., 8:])


def test_layouts_match_their_definition():
    x = torch.arange(1.0, 7)
    cos, sin = torch.zeros(2), torch.ones(2)  # a quarter turn: (re, im) -> (-im, re)
    assert Rope("half", 4).rotate(x, cos, sin).tolist() == [-3, -4, 1, 2, 5, 6]
    assert Rope("interleaved", 4).rotate(x, cos, sin).tolist() == [-2, 1, -4, 3, 5, 6]


def test_unknown_layout_is_refused():
    with pytest.raises(UnsupportedModelError, match="layout"):
        Rope("spiral", 8)
    with pytest.raises(UnsupportedModelError, match="even"):
        Rope("half", 7)


class TestPositionTrack:
    inv = torch.tensor([1.0, 0.1])

    def make(self, positions, **kw):
        track = PositionTrack(self.inv, 1.0, **kw)
        positions = torch.tensor(positions)
        track.extend(0, positions, *angles(positions, self.inv))
        return track

    def test_block_equals_tables(self):
        track = self.make([list(range(7, 27))])
        (cos, sin), (cos0, sin0) = track.block(4, 12, 16, torch.device("cpu"))
        want = track.tables(4, 12, torch.device("cpu"))
        got = torch.complex(cos, sin) * torch.complex(cos0, sin0)
        torch.testing.assert_close(got, torch.complex(*want), atol=1e-5, rtol=1e-5)

    def test_gap_in_positions_is_not_a_block(self):
        track = self.make([[0, 0, 0, 1, 2, 9, 10, 11]])
        device = torch.device("cpu")
        assert track.block(0, 4, 8, device)[1] is None
        assert track.block(3, 8, 8, device)[1] is None
        assert track.block(2, 5, 8, device)[1] is not None
        assert track.block(5, 8, 8, device)[1] is not None

    def test_equal_rows_are_held_once(self):
        assert self.make([[0, 1], [0, 1]]).positions.shape == (1, 2)
        assert self.make([[0, 1], [0, 0]]).positions.shape == (2, 2)

    def test_other_frequencies_are_noticed_and_kept(self):
        track = self.make([list(range(10))])
        changed = angles(torch.arange(10, 20)[None], self.inv * 0.5)
        track.extend(10, torch.arange(10, 20)[None], *changed)
        assert not track.fixed and len(track) == 20
        cos, sin = track.tables(5, 20, torch.device("cpu"))
        first = angles(torch.arange(5, 10)[None], self.inv)
        torch.testing.assert_close(cos, torch.cat([first[0], changed[0]], 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin, torch.cat([first[1], changed[1]], 1), atol=1e-5, rtol=0)

    def test_nbytes_is_four_a_token(self):
        assert self.make([list(range(100))]).nbytes == 400
