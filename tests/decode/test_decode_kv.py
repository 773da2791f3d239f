import pytest
import torch

from dflash_decode.kv import NO_PAGE, CacheShape, OutOfPages, PagePool


def test_pages_are_given_once_and_come_back():
    pool = PagePool(5, 4)
    one, two = pool.allocate(9), pool.allocate(8)
    assert len(one) == 3 and len(two) == 2 and sorted(one + two) == [0, 1, 2, 3, 4] and pool.free_pages == 0
    with pytest.raises(OutOfPages, match="1 tokens need 1 pages of 4; 0 of 5 are free"):
        pool.allocate(1)
    assert pool.allocate(0) == []
    pool.keep([two])
    assert pool.free_pages == 3 and sorted(pool.allocate(12)) == sorted(one)


def test_all_or_none():
    pool = PagePool(5, 4)
    with pytest.raises(OutOfPages, match="21 tokens need 6 pages of 4; 5 of 5 are free"):
        pool.allocate(21)
    assert pool.free_pages == 5


@pytest.mark.parametrize("page", [2, -1])
def test_kept_pages_are_of_the_pool(page):
    pool = PagePool(2, 1)
    pages = pool.allocate(1)
    with pytest.raises(ValueError, match="pages must be of 2, to be kept"):
        pool.keep([[page]])
    assert pool.free_pages == 1
    pool.keep([pages, pages])
    assert pool.free_pages == 1
    pool.keep(())
    assert pool.free_pages == 2


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_page_boundaries(tokens, pages):
    assert len(PagePool(8, 16).allocate(tokens)) == pages


def test_table_rows_hold_no_page_beyond_their_own():
    row = PagePool.table_row([7, 2], 4)
    assert row.tolist() == [7, 2, NO_PAGE, NO_PAGE] and row.dtype == torch.int32
    assert PagePool.table_row([], 2).tolist() == [NO_PAGE] * 2


def test_heads_are_stretches_and_layers_of_a_page_lie_side_by_side():
    caches = CacheShape(3, 2, 16, torch.bfloat16).allocate(5, 4)
    head, page = 4 * 16, 3 * 2 * 2 * 4 * 16
    assert len(caches) == 3
    assert {(t.shape, t.stride()) for c in caches for t in (c.k, c.v)} == {((5, 4, 2, 16), (page, 16, head, 1))}
    assert caches[0].k.data_ptr() % (2 << 20) == 0
    caches[1].k.fill_(1)
    for t in (caches[0].k, caches[0].v, caches[1].v, caches[2].k):
        t.fill_(0)
    assert bool((caches[1].k == 1).all())


@pytest.mark.parametrize("bad", [0, -1, 2.0, None])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match="num_pages must be an integer of at least 1"):
        PagePool(bad)
    with pytest.raises(ValueError, match="page_size must be an integer of at least 1"):
        PagePool(4, bad)
